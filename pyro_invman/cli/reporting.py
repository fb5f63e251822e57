"""``report``: a verdict on each direction, from rows that a model was not fitted to."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_invman.cli.fitting import HELD_OUT, HISTORY
from pyro_invman.cli.printed import answer, say, table
from pyro_invman.cli.project import project_of
from pyro_invman.cli.questions import model_of, rows_of
from pyro_invman.diagnostics import report as report_on
from pyro_invman.results import from_record
from pyro_invman.variables import DataError

if TYPE_CHECKING:
    import xarray as xr

_SHOWN = ("verdict", "questions", "log_loss", "log_loss_of_nothing", "covered", "reasons")
_HEADS = ("verdict", "questions", "log loss [nat]", "knowing nothing [nat]", "90 % coverage", "reasons")


def report(arguments: argparse.Namespace) -> None:
    """Asks a model about rows that it has not seen, prints the verdicts, and writes the page or the tree."""
    kind = Path(arguments.out).suffix.lower() if arguments.out else ".html"
    if kind not in (".html", ".nc", ".zarr"):
        raise DataError(f"--out {arguments.out}: found the ending {kind!r}, expected .html, .nc or .zarr")
    model = model_of(arguments.model)
    tree = report_on(
        model,
        _held_out(arguments, model.variables),
        history=_history(arguments.model),
        out=arguments.out if kind == ".html" else None,
        title=f"Can {Path(arguments.model).resolve().name} be trusted?",
        max_questions=arguments.max_questions,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    if kind == ".nc":
        tree.to_netcdf(arguments.out)
    elif kind == ".zarr":
        tree.to_zarr(arguments.out, mode="w", consolidated=False)
    if arguments.out:
        say(f"wrote {arguments.out}")
    verdicts = tree["verdicts"].to_dataset()
    lines: list[dict[str, Any]] = [
        {"direction": str(name)}
        | {head: verdicts[field].values.tolist()[n] for head, field in zip(_HEADS, _SHOWN, strict=True)}
        for n, name in enumerate(verdicts["direction"].values)
    ]
    found = {"verdicts": lines, "notes": list(tree.attrs["notes"]), "out": arguments.out}
    answer(found, arguments.json, lambda: "\n".join([table(lines), *(f"note: {note}" for note in found["notes"])]))


def _held_out(arguments: argparse.Namespace, variables: Any) -> xr.Dataset:
    """Rows of the table that is named, else those that `fit` kept."""
    if arguments.table:
        return rows_of(arguments.table, project_of(arguments, arguments.model), variables)
    kept = Path(arguments.model) / HELD_OUT
    if not kept.is_file():
        raise DataError(f"{arguments.model}: `fit` kept no rows from the fit; name a table of others by --table")
    return _record(kept)


def _history(folder: str) -> xr.Dataset | None:
    path = Path(folder) / HISTORY
    return _record(path) if path.is_file() else None


def _record(path: Path) -> xr.Dataset:
    try:
        found = from_record(json.loads(path.read_text(encoding="utf-8")))
        if not found.data_vars:
            raise ValueError("nothing in it")
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged, it cannot be read ({error!r})") from error
