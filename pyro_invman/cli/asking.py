"""``infer``, ``predict`` and ``impute``: conditionals of a flow, or of a task of a manifold."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_invman.cli.printed import answer, headed, quantile_rows, say, table
from pyro_invman.cli.project import Project, project_of
from pyro_invman.cli.questions import (
    asked_task,
    cells_of,
    draws_of,
    givens_of,
    level,
    model_of,
    rows_of,
    targets_of,
)  # fmt: skip
from pyro_invman.cli.typed import Names
from pyro_invman.data import from_tensor, labels_of, to_tensor
from pyro_invman.joint import JointFlow
from pyro_invman.tasks.manifold import ProcessManifold
from pyro_invman.tasks.typicality import UnfamiliarTask
from pyro_invman.variables import DataError, Variables


def infer(arguments: argparse.Namespace) -> None:
    """p(parameters | what was measured): median and 90 % interval."""
    _ask(arguments, ("parameter",))


def predict(arguments: argparse.Namespace) -> None:
    """p(observations | settings): median and 90 % interval."""
    _ask(arguments, ("observation",))


def _ask(arguments: argparse.Namespace, roles: tuple[str, ...]) -> None:
    model = model_of(arguments.model)
    variables: Variables = model.variables
    project = project_of(arguments, arguments.model)
    given, rows = givens_of(arguments, model, project)
    targets = targets_of(arguments.targets, Names(variables, project.columns), variables, roles, list(given))
    report: dict[str, Any] = {"given": given}
    answerer: Any = model
    if isinstance(model, ProcessManifold):
        answerer, known = asked_task(model, arguments, project)
        report["task_rows"] = 0 if known is None else known.sizes["row"]
        report["belongs"] = answerer.belongs
    elif arguments.rows or arguments.of or arguments.conditions:
        needs = "--rows, --of and --conditions need a ProcessManifold"
        raise DataError(f"{arguments.model}: holds a JointFlow, which knows no tasks; {needs}")
    cells = given if rows is None else cells_of(rows, variables, targets)
    draws = draws_of(answerer.conditional(targets, cells), arguments.num_samples, arguments.seed)
    if rows is None:
        lines = quantile_rows(variables, targets, draws)
    else:
        draws = draws.expand(len(draws), len(rows), len(targets))
        lines = [
            {"row": row} | line for row in range(len(rows)) for line in quantile_rows(variables, targets, draws[:, row])
        ]
    report["targets"] = lines
    if arguments.out:
        _write_draws(arguments.out, project, variables, targets, draws)
        say(f"{arguments.out}: {len(draws)} draws" + ("" if rows is None else f" of each of {len(rows)} rows"))
    answer(report, arguments.json, lambda: table(lines))


def _write_draws(path: str, project: Project, variables: Variables, targets: list[str], draws: Tensor) -> None:
    """Draws (S, n), or of rows (S, R, n): a line each, or arrays with units over "draw" and "row"."""
    kind = Path(path).suffix.lower()
    if kind in (".nc", ".zarr"):
        asked = Variables(variables[variables.index(name)] for name in targets)
        ds = from_tensor(draws, asked, ("draw", "row")[: draws.dim() - 1])
        ds.to_netcdf(path) if kind == ".nc" else ds.to_zarr(path, mode="w", consolidated=False)
        return
    if kind != ".csv":
        raise DataError(f"--out {path}: found the ending {kind!r}, expected .csv, .nc or .zarr")

    def cells(draw: Tensor) -> list[Any]:
        return [level(variables, name, float(cell)) for name, cell in zip(targets, draw.tolist(), strict=True)]

    if draws.dim() == 2:
        project.write_csv(path, targets, map(cells, draws))
        return
    lines = ([row, *cells(draw)] for row in range(draws.shape[1]) for draw in draws[:, row])
    project.write_csv(path, ["row", *targets], lines)


def impute(arguments: argparse.Namespace) -> None:
    """A table's missing cells, completed by draws; measured cells stay as they are."""
    model = model_of(arguments.model)
    project = project_of(arguments, arguments.model)
    ds = rows_of(arguments.table, project, model.variables)
    values = to_tensor(ds, model.variables)
    if isinstance(model, JointFlow):
        filled = model.impute(ds, arguments.num_samples, seed=arguments.seed)
        cells = torch.stack([torch.from_numpy(filled[v.name].values) for v in model.variables], -1)
    else:
        cells = _completed(model, ds, values, arguments)
    heads = ["draw", "row", *model.variables.names]
    labels = {label: names for label in ("task", "source") if (names := labels_of(ds, label)) is not None}
    lines = (
        [draw, row, *(level(model.variables, n, c) for n, c in zip(model.variables.names, found, strict=True)), *(
            names[row] for names in labels.values()
        )]
        for draw, rows in enumerate(cells.tolist())
        for row, found in enumerate(rows)
    )  # fmt: skip
    heads += [getattr(project, label) or label for label in labels]
    project.write_csv(arguments.out, heads, lines)
    say(f"{arguments.out}: {arguments.num_samples} completed copies of {ds.sizes['row']} rows")
    report = {"out": arguments.out, "rows": len(values), "draws": arguments.num_samples}
    counts = [
        {"variable": headed(v), "measured": int((~c.isnan()).sum()), "completed": int(c.isnan().sum())}
        for v, c in zip(model.variables, values.T, strict=True)
    ]
    answer(report | {"variables": counts}, arguments.json, lambda: table(counts))


def _completed(manifold: ProcessManifold, ds: Any, values: Tensor, arguments: argparse.Namespace) -> Tensor:
    """Draws (S, N, D) of rows, each completed given its own cells and the other rows of its task."""
    tasks = labels_of(ds, "task") or [""] * len(values)
    cells = values.expand(arguments.num_samples, *values.shape).clone()
    strange: dict[str, str] = {}
    for row in values.isnan().any(-1).nonzero()[:, 0].tolist():
        others = [n for n, task in enumerate(tasks) if task == tasks[row] and n != row]
        hidden = values[row].isnan()
        targets = [v.name for v, gone in zip(manifold.variables, hidden.tolist(), strict=True) if gone]
        given = {v.name: c for v, c in zip(manifold.variables, values[row], strict=True) if not bool(c.isnan())}
        with warnings.catch_warnings(record=True, action="always") as caught:
            task = manifold.infer_task(ds.isel(row=others), seed=arguments.seed)
        for each in caught:
            if issubclass(each.category, UnfamiliarTask):
                strange.setdefault(tasks[row], str(each.message))
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        draws = draws_of(task.conditional(targets, given), arguments.num_samples, arguments.seed + row)
        cells[:, row, hidden] = draws.to(cells)
    for name, message in strange.items():
        say(f"note: {name}: {message}" if name else f"note: {message}")
    return cells
