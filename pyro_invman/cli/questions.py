"""What is asked of a model: values by name, rows of a table, and of a manifold the task that they belong to."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_invman.cli.printed import say
from pyro_invman.cli.project import Project
from pyro_invman.cli.typed import Names
from pyro_invman.data import labels_of, to_tensor
from pyro_invman.joint import JointFlow
from pyro_invman.saved import load
from pyro_invman.tables import suggest
from pyro_invman.tasks.manifold import ProcessManifold
from pyro_invman.tasks.posterior import TaskPosterior
from pyro_invman.variables import DataError, Variables

if TYPE_CHECKING:
    import xarray as xr


def model_of(folder: str, *kinds: type) -> Any:
    """The model in a folder.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read, or is of another kind.
    """
    model = load(folder)
    if not isinstance(model, kinds or (JointFlow, ProcessManifold)):
        expected = " or a ".join(kind.__name__ for kind in kinds or (JointFlow, ProcessManifold))
        raise DataError(f"{folder}: holds a {type(model).__name__}, expected a {expected}")
    return model


def values_of(texts: Any, called: Names, what: str = "given") -> dict[str, Any]:
    """``name=value,…`` as numbers and names of levels.

    Raises:
        DataError: an unknown name, or no number where one is expected.
    """
    found: dict[str, Any] = {}
    for name, text in called.pairs(texts, what).items():
        variable = called.variable(name)
        if variable.discrete:
            if text not in variable.levels:
                raise DataError(f"--{what} {name}: found {text!r}; {suggest(text, variable.levels)}")
            found[name] = text
            continue
        try:
            found[name] = float(text)
        except ValueError as error:
            raise DataError(f"--{what} {name}: found {text!r}, expected a number with a decimal point") from error
    return found


def targets_of(
    text: str | None, called: Names, variables: Variables, roles: Sequence[str], given: Sequence[str]
) -> list[str]:
    """The names asked for; by default all variables of some roles that are not given.

    Raises:
        DataError: an unknown name, or none that is left.
    """
    if text is not None:
        return called.list(text)
    found = [v.name for v in variables if v.role in roles and v.name not in given]
    if not found:
        left = " or ".join(roles)
        raise DataError(f"--targets: no {left} is left to ask for; name some of {list(variables.names)}")
    return found


def rows_of(
    table: str, project: Project, variables: Variables, task: str | None = None, beside: Sequence[str] = ()
) -> xr.Dataset:
    """Rows of a table as a model's variables; of one task, where it is named.

    Raises:
        DataError: nothing in it is a variable of the model, or no row is of that task.
    """
    ds = project.dataset(table, variables, training=False, beside=beside)
    unknown = [name for name in ds.attrs["left_out"] if name not in (project.task, project.source)]
    say(f"{table}: {ds.sizes['row']} rows" + (f"; not of the model, and not used: {unknown}" if unknown else ""))
    labels = labels_of(ds, "task")
    if task is not None:
        if labels is None:
            raise DataError(f"--of {task}: found no column {project.task or 'of tasks'!r} in {table}, expected it")
        kept = [row for row, label in enumerate(labels) if label == task]
        if not kept:
            raise DataError(f"--of {task}: no row of that task; {suggest(task, dict.fromkeys(labels))}")
        return ds.isel(row=kept)
    return ds


def one_task(rows: xr.Dataset, table: str) -> xr.Dataset:
    """Rows that are of one task.

    Raises:
        DataError: they are of several.
    """
    found = list(dict.fromkeys(labels_of(rows, "task") or ()))
    if len(found) > 1:
        raise DataError(
            f"{table}: found rows of {len(found)} tasks ({', '.join(found[:3])}…), expected one; say --of NAME"
        )
    return rows


def asked_task(
    manifold: ProcessManifold, arguments: argparse.Namespace, project: Project
) -> tuple[TaskPosterior, xr.Dataset | None]:
    """What is known of the task that is asked about, and the rows that it is known by."""
    rows = None
    if arguments.rows:
        rows = one_task(rows_of(arguments.rows, project, manifold.variables, arguments.of), arguments.rows)
    elif arguments.of:
        raise DataError(f"--of {arguments.of}: found no --rows, expected the table with rows of that task")
    else:
        say("no --rows: the answer is about a task of which nothing is known")
    called = Names(manifold.variables, project.columns)
    conditions = coded(values_of(arguments.conditions, called, "conditions"), manifold.variables)
    return manifold.infer_task(rows, arguments.method, conditions, seed=arguments.seed), rows


def coded(values: dict[str, Any], variables: Variables) -> dict[str, float]:
    """Values with codes in place of names of levels."""
    return {
        name: float(variables[variables.index(name)].levels.index(value)) if isinstance(value, str) else value
        for name, value in values.items()
    }


def givens_of(
    arguments: argparse.Namespace, model: JointFlow | ProcessManifold, project: Project
) -> tuple[dict[str, Any], Tensor | None]:
    """What is given: by name for all rows, and the rows (R, D) that are to be answered, if a table of them is."""
    _names_no_task(arguments.given, project)
    given = values_of(arguments.given, Names(model.variables, project.columns))
    if not arguments.table:
        return given, None
    ds = rows_of(arguments.table, project, model.variables)
    values = to_tensor(ds, model.variables)
    for name, value in coded(dict(given), model.variables).items():
        column = model.variables.index(name)
        said = ~values[:, column].isnan() & (values[:, column] != value)
        if bool(said.any()):
            row = int(said.nonzero()[0, 0])
            raise DataError(
                f"--given {name}: {arguments.table}, row {row} says {values[row, column]:g}; leave out either"
            )
        values[:, column] = value
    return given, values


def _names_no_task(given: Sequence[str] | str | None, project: Project) -> None:
    texts = given if isinstance(given, str) else ",".join(given or ())
    if project.task and (found := re.search(rf"(?:^|,)\s*{re.escape(project.task)}\s*=\s*([^,]*)", texts)):
        name = found[1].strip()
        raise DataError(
            f"--given {project.task}={name}: {project.task!r} names the task and is no variable; a task is known by "
            f"its rows: --rows TABLE --of {shlex.quote(name)}"
        )


def cells_of(values: Tensor, variables: Variables, targets: Sequence[str]) -> dict[str, Tensor]:
    """Cells (R,) of rows by name that are given where `targets` are asked for; those nowhere known are left out."""
    return {
        v.name: values[:, column]
        for column, v in enumerate(variables)
        if v.name not in targets and not bool(values[:, column].isnan().all())
    }


def level(variables: Variables, name: str, cell: float) -> Any:
    """A cell as it is written: a number, the name of a level, or None."""
    variable = variables[variables.index(name)]
    if math.isnan(cell):
        return None
    return variable.levels[int(cell)] if variable.discrete else cell


def draws_of(distribution: Any, number: int, seed: int) -> Tensor:
    """Draws (S, …, n), the same for the same seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        found: Tensor = distribution.sample(torch.Size((number,)))
    return found
