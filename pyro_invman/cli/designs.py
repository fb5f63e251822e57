"""``design``: which rows of a task to measure next."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyro_invman.cli.printed import answer, headed, say, table
from pyro_invman.cli.project import Project, project_of
from pyro_invman.cli.questions import coded, level, model_of, one_task, rows_of, values_of
from pyro_invman.cli.typed import Names
from pyro_invman.data import from_columns
from pyro_invman.design.campaign import Campaign
from pyro_invman.tables import suggest
from pyro_invman.tasks.manifold import ProcessManifold
from pyro_invman.variables import DataError, Variables

if TYPE_CHECKING:
    import xarray as xr

_MOST = 20_000
_GAINS = ("gain", "likelihood", "posterior", "error")


def design(arguments: argparse.Namespace) -> None:
    """The next n rows among candidates, by information gained for what it costs."""
    manifold: ProcessManifold = model_of(arguments.model, ProcessManifold)
    variables = manifold.variables
    project = project_of(arguments, arguments.model)
    cost = _cost(arguments.cost)
    candidates = _candidates(arguments, project, variables, cost if isinstance(cost, str) else None)
    rows = None
    if arguments.rows:
        rows = one_task(rows_of(arguments.rows, project, variables, arguments.of), arguments.rows)
    else:
        say("no --rows: the plan is for a task of which nothing is known")
    campaign = Campaign(
        manifold,
        rows,
        candidates,
        cost=cost,
        objective=_objective(arguments, project, variables, candidates),
        conditions=coded(values_of(arguments.conditions, Names(variables, project.columns), "conditions"), variables),
        seed=arguments.seed,
    )
    chosen = campaign.suggest(arguments.n)
    settings = [v for v in variables if v.name in candidates and v.role != "observation"]
    lines = [_line(chosen, n, settings, variables) for n in range(chosen.sizes["row"])]
    if arguments.out:
        heads = [v.name for v in variables]
        to_fill = (
            [level(variables, name, float(chosen[name][k])) if name in chosen else None for name in heads]
            for k in range(len(lines))
        )
        project.write_csv(arguments.out, heads, to_fill)
        say(f"{arguments.out}: {len(lines)} rows to measure and fill in; then pass them by --rows")
    report = {"candidates": candidates.sizes["row"], "stop": chosen.attrs["stop"], "suggested": lines}
    answer(report, arguments.json, lambda: _text(report))


def _line(chosen: xr.Dataset, n: int, settings: list[Any], variables: Variables) -> dict[str, Any]:
    found: dict[str, Any] = {"candidate": int(chosen["candidate"][n])}
    found |= {headed(v): level(variables, v.name, float(chosen[v.name][n])) for v in settings}
    found |= {"cost": float(chosen["cost"][n])}
    return found | {f"{name} [nat]": float(chosen[name][n]) for name in _GAINS}


def _text(report: Mapping[str, Any]) -> str:
    if report["stop"]:
        return f"nothing is suggested: {report['stop']}"
    return (
        f"{len(report['suggested'])} of {report['candidates']} candidates to measure next, each given those before:\n\n"
        f"{table(report['suggested'])}\n\n"
        "gain: expected information, in nats; likelihood and posterior: two estimates of it, which agree where the\n"
        "model is right"
    )


def _cost(text: str | None) -> str | float | None:
    if text is None:
        return "cost"
    try:
        return float(text)
    except ValueError:
        return text


def _candidates(arguments: argparse.Namespace, project: Project, variables: Variables, cost: str | None) -> xr.Dataset:
    if bool(arguments.candidates) == bool(arguments.grid):
        raise DataError("design: expected either --candidates TABLE or --grid name=LOW:HIGH:COUNT,…")
    if arguments.grid:
        return grid(arguments.grid, variables, Names(variables, project.columns))
    beside = [name for name in (cost, "measure") if name]
    ds = rows_of(arguments.candidates, project, variables, beside=beside)
    if cost not in (None, "cost") and cost not in ds.coords:
        raise DataError(f"--cost: no column {cost!r} in {arguments.candidates}; {suggest(cost, ds.attrs['left_out'])}")
    # what would be measured has no cell yet; a column without one says nothing of which of them that is
    empty = [v.name for v in variables if v.role == "observation" and v.name in ds and bool(ds[v.name].isnull().all())]
    return ds.drop_vars(empty) if "measure" in ds.coords else ds


def grid(texts: list[str], variables: Variables, called: Names) -> xr.Dataset:
    """Candidates at every combination of ``name=LOW:HIGH:COUNT``, ``name=VALUE`` or ``name=LEVEL|LEVEL``.

    Raises:
        DataError: an unknown name, a range that is none, or more combinations than can be weighed.
    """
    axes: dict[str, list[Any]] = {}
    for name, text in called.pairs(texts, "grid").items():
        variable = variables[variables.index(name)]
        if variable.role == "observation":
            raise DataError(f"--grid {name}: is an observation, which is measured; expected settings")
        axes[name] = text.split("|") if variable.discrete else _axis(name, text)
    number = 1
    for values in axes.values():
        number *= len(values)
    if number > _MOST:
        raise DataError(f"--grid: found {number} combinations, expected at most {_MOST}; take fewer points")
    points = list(itertools.product(*axes.values()))
    known = {v.name: v for v in variables}
    return from_columns(
        {name: [point[k] for point in points] for k, name in enumerate(axes)},
        {name: known[name].role for name in axes},
        units={name: known[name].units for name in axes},
        supports={
            name: ("interval", known[name].lower, known[name].upper)
            if known[name].support == "interval"
            else known[name].support
            for name in axes
        },
        levels={name: known[name].levels for name in axes if known[name].discrete},
    )


def _axis(name: str, text: str) -> list[float]:
    parts = text.split(":")
    try:
        if len(parts) == 1:
            return [float(parts[0])]
        low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
    except (ValueError, IndexError):
        raise DataError(f"--grid {name}: found {text!r}, expected LOW:HIGH:COUNT, or one number") from None
    if count < 2 or len(parts) > 3 or not low < high:
        raise DataError(f"--grid {name}: found {text!r}, expected LOW < HIGH and a COUNT of at least 2")
    return [low + (high - low) * k / (count - 1) for k in range(count)]


def _objective(
    arguments: argparse.Namespace, project: Project, variables: Variables, candidates: xr.Dataset
) -> dict[str, Any]:
    """What the rows are for, as a campaign takes it."""
    found: dict[str, Any] = {}
    for text in arguments.objective or ["task"]:
        kind, _, what = text.partition("=")
        if kind == "task" and not what:
            found["task"] = True
        elif kind in ("parameters", "predict") and what:
            found[kind] = Names(variables, project.columns).list(what)
        else:
            raise DataError(f"--objective: found {text!r}, expected task, parameters=name,… or predict=name,…")
    if "parameters" in found and arguments.parameters_of:
        found["of"] = rows_of(arguments.parameters_of, project, variables)
    elif any(variables[variables.index(name)].role == "parameter" for name in found.get("parameters", ())):
        raise DataError("--objective parameters=…: whose settings are asked for? Say by --parameters-of TABLE")
    if "predict" in found:
        if arguments.at:
            found["at"] = rows_of(arguments.at, project, variables)
        else:
            say("no --at: predictions are wanted at the candidates themselves")
            settings = [v.name for v in variables if v.role != "observation" and v.name in candidates]
            found["at"] = candidates[settings].drop_vars([str(c) for c in candidates.coords])
    return found


__all__ = ["design", "grid"]
