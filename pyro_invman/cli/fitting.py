"""``fit TABLE``: a model from a table, and how well it does on rows that were kept from it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pyro_invman.cli.printed import answer, say, table
from pyro_invman.cli.project import NAME, project_for
from pyro_invman.data import labels_of, to_tensor
from pyro_invman.diagnostics.answers import Answers, HeldOut
from pyro_invman.joint import JointFlow
from pyro_invman.results import to_record
from pyro_invman.tasks.manifold import ProcessManifold
from pyro_invman.variables import DataError

if TYPE_CHECKING:
    import xarray as xr

HELD_OUT, HISTORY = "held_out.json", "history.json"
"""What a fit keeps beside its model: rows that it did not learn from, and its history."""
_FEWEST_TASKS = 5  # below which none is kept from the fit
_MOST_NAMED = 6
_QUESTIONS = 30  # of a variable, to a manifold, which takes a tenth of a second over each
_CONTEXT = tuple(range(2, 40))  # every row after the first two of a task, given those before it


def fit(arguments: argparse.Namespace) -> None:
    """Fits a flow, or a manifold where rows belong to tasks, and saves it with what was said of the table."""
    folder = Path(arguments.out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder}: is a file, expected a folder for the model")
    project = project_for(arguments)
    if not project.roles and Path(arguments.table).suffix.lower() not in (".nc", ".zarr"):
        raise DataError(
            f"no roles: `describe {arguments.table}` writes a project file that guesses them, or name them by "
            "--roles column=parameter,…"
        )
    ds = project.dataset(arguments.table)
    left_out = ds.attrs["left_out"]
    say(f"{arguments.table}: {ds.sizes['row']} rows, {len(ds.data_vars)} variables; left out: {left_out}")
    tasks = labels_of(ds, "task")
    as_manifold = arguments.model == "manifold" or (arguments.model is None and tasks is not None)
    if as_manifold and tasks is None:
        raise DataError(
            "--model manifold: found no task column, expected one; name it by --task or in the project file"
        )
    training, held_out = _split(ds, tasks if as_manifold else None, arguments.test_share, arguments.seed)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    how: dict[str, Any] = {"checkpoint": checkpoint, "resume": arguments.resume}
    model: JointFlow | ProcessManifold
    if as_manifold:
        number = len(set(labels_of(training, "task") or ()))
        say(f"fitting a manifold to {number} tasks (--model flow takes all rows for one)")
        if held_out is not None:
            kept = sorted(set(labels_of(held_out, "task") or ()))
            more = f" and {len(kept) - _MOST_NAMED} more" if len(kept) > _MOST_NAMED else ""
            names = ", ".join(kept[:_MOST_NAMED])
            say(f"kept from the fit, to ask about afterwards: {names}{more}; --test-share 0 learns from all")
        model = ProcessManifold.from_dataset(
            training,
            arguments.latent_dim,
            arguments.task_prior,
            arguments.seed,
            reference_source=arguments.reference_source,
        )
    else:
        say(f"fitting one joint density to {training.sizes['row']} rows")
        model = JointFlow.from_dataset(training, seed=arguments.seed)
    history = model.fit(training, arguments.seed, arguments.max_seconds, **how)
    model.save(folder)
    (folder / NAME).write_text(project.to_toml(), encoding="utf-8")
    (folder / HISTORY).write_text(json.dumps(to_record(history)), encoding="utf-8")
    (folder / HELD_OUT).unlink(missing_ok=True)
    if held_out is not None:
        (folder / HELD_OUT).write_text(json.dumps(to_record(held_out)), encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    report: dict[str, Any] = {
        "model": str(arguments.out),
        "kind": type(model).__name__,
        "steps": int(history.step[-1]),
        "rows": training.sizes["row"],
        "held_out_rows": 0 if held_out is None else held_out.sizes["row"],
    }
    if held_out is not None:
        say(f"asking about {held_out.sizes['row']} rows that were kept from the fit")
        if isinstance(model, ProcessManifold):
            report["held_out_tasks"] = sorted(set(labels_of(held_out, "task") or ()))
        report["held_out"] = held_out_report(model, held_out)
    answer(report, arguments.json, lambda: _text(report))


def _split(ds: xr.Dataset, tasks: list[str] | None, share: float, seed: int) -> tuple[xr.Dataset, xr.Dataset | None]:
    """Rows to learn from, and rows kept from that: of tasks of their own, where there are tasks."""
    if not 0 <= share < 1:
        raise DataError(f"--test-share: found {share:g}, expected at least 0 and less than 1")
    generator = torch.Generator().manual_seed(seed)
    if tasks is None:
        order = torch.randperm(ds.sizes["row"], generator=generator)
        count = round(share * len(order))
        kept = order[:count].numpy()
        return ds.isel(row=order[count:].numpy()), ds.isel(row=kept) if count else None
    names = sorted(set(tasks))
    order = torch.randperm(len(names), generator=generator)
    count = max(1, round(share * len(names))) if share > 0 and len(names) >= _FEWEST_TASKS else 0
    if not count and share > 0:
        say(f"{len(names)} tasks are too few to keep one from the fit: nothing is said of how well it does")
    gone = {names[i] for i in order[:count].tolist()}
    away = torch.tensor([name in gone for name in tasks], dtype=torch.bool)
    rest = ds.isel(row=(~away).nonzero()[:, 0].numpy())
    return rest, ds.isel(row=away.nonzero()[:, 0].numpy()) if count else None


# ---------------------------------------------------------------------------------------------- what is reported
def held_out_report(model: JointFlow | ProcessManifold, held_out: xr.Dataset) -> list[dict[str, Any]]:
    """For each variable, over held-out rows that show it: log loss given the rest of the row (and, of a manifold, rows
    of its task before it), in nats, in units of the training rows' standard deviation in working coordinates, beside
    that of knowing nothing (its own learned marginal), and the share of truths inside the central 90 % interval."""
    scores = []
    for variable in tqdm(model.variables, desc="held-out rows", leave=False, disable=not sys.stderr.isatty()):
        line = _scored(model, held_out, variable.name)
        if line is not None:
            scores.append({"variable": variable.name, "units": variable.units} | line)
    cells = [line for line in scores if not math.isnan(line["90 % coverage"])]
    total = sum(line["rows"] for line in cells)
    if total:
        means = {
            key: sum(line["rows"] * line[key] for line in cells) / total
            for key in ("log loss", "knowing nothing", "90 % coverage")
        }
        scores.append({"variable": "all numbers", "units": "", "rows": total, **means})
    return scores


def _scored(model: JointFlow | ProcessManifold, held_out: xr.Dataset, name: str) -> dict[str, Any] | None:
    column = model.variables.index(name)
    variable = model.variables[column]
    target = to_tensor(held_out, model.variables)[:, column : column + 1]
    target = target[~target[:, 0].isnan()]
    if not len(target):
        return None
    if isinstance(model, ProcessManifold):
        if bool(model.network.constant[column]):
            return None  # of a task as a whole: each held-out task tells it once
        asked: Answers = HeldOut(model, held_out, context_sizes=_CONTEXT, max_questions=_QUESTIONS).ask([name])
    else:
        asked = HeldOut(model, held_out, num_draws=500, max_questions=len(target)).ask([name])
    unit = 0.0
    if not variable.discrete:
        unit = float(model.standardization.log_abs_det_jacobian(asked.truth, index=[column]).mean())
    line: dict[str, Any] = {
        "rows": len(asked),
        "log loss": float(-asked.log_prob.mean()) + unit,
        "knowing nothing": float(-asked.nothing.mean()) + unit,
        "90 % coverage": math.nan,
    }
    if not variable.discrete:
        low, high = asked.draws.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
        line["90 % coverage"] = float(((asked.truth >= low) & (asked.truth <= high)).double().mean())
    return line


def _text(report: Mapping[str, Any]) -> str:
    head = (
        f"model: {report['model']} ({report['kind']})   steps: {report['steps']}   rows: {report['rows']}   "
        f"held-out rows: {report['held_out_rows']}"
    )
    if "held_out" not in report:
        return head
    whom = "that were kept from the fit"
    if "held_out_tasks" in report:
        whom = "of tasks that were kept from the fit, and two or more rows of its task before it"
    return (
        f"{head}\n\nEach variable given the rest of its row, on rows {whom};\n"
        f"log loss in nats a cell, of standardised values:\n\n{table(report['held_out'])}"
    )
