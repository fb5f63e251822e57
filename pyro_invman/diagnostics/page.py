"""A report as one page that opens from disk: no network, no script."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pyro_invman.diagnostics.verdict import CARE, DO_NOT, USE
from pyro_invman.tasks.fingerprint import Fingerprint

if TYPE_CHECKING:
    import xarray as xr

_MOST = 25  # lines of a table
_NAMED = 5  # givens of a question
_GROSS = 0.5  # probability above which a cell is listed
_STRANGE = 0.02  # p-value of so many unusual tasks, below which the page says so
_CHECKED = ("measured", "lower", "median", "upper", "p_value")
_CLASSES = {USE: "use", CARE: "care", DO_NOT: "not"}


class Table(NamedTuple):
    """Heads, and lines of cells, as texts; `left_out` counts lines that are not shown."""

    heads: list[str]
    lines: list[list[str]]
    left_out: int = 0


class Figure(NamedTuple):
    """A picture as a data URI, and what it shows."""

    source: str
    caption: str


def page(tree: xr.DataTree) -> str:
    """The page of a tree that :func:`pyro_invman.diagnostics.report` gave, or that was read back from disk: HTML with
    its style and pictures in it.

    Example::

        >>> import pyro_invman as pim
        >>> process = pim.simulators.linear_gaussian.LinearGaussian.random(1, 1, seed=0)
        >>> found = pim.diagnostics.report(process, process.sample(40, seed=1), progress=False)
        >>> pim.diagnostics.page(found).startswith("<!DOCTYPE html>")
        True
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    notes = tree.attrs["notes"]
    verdicts = tree["verdicts"].to_dataset()
    inventory = tree["inventory"].to_dataset()
    return template.render(
        title=tree.attrs["title"],
        model=tree.attrs["model"],
        seed=tree.attrs["seed"],
        notes=[notes] if isinstance(notes, str) else list(notes),
        rows=int(inventory.attrs["rows"]),
        verdicts=[_verdict(verdicts.sel(direction=name), tree) for name in verdicts.direction.values],
        level=float(verdicts.attrs["level"]),
        inventory=_inventory(inventory),
        fit=_fit(tree["fit"].to_dataset()) if "fit" in tree.children else None,
        directions=[_direction(str(name), tree) for name in verdicts.direction.values],
        tasks=_tasks(tree["tasks"].to_dataset()) if "tasks" in tree.children else None,
        cells=_cells(tree, inventory) if "cells" in tree.children else None,
    )


# ---------------------------------------------------------------------------------------------- sections
def _verdict(found: xr.Dataset, tree: xr.DataTree) -> dict[str, Any]:
    name = str(found.direction.values)
    said = str(found.verdict.values)
    return {
        "name": name,
        "question": _short(tree[f"answers/{name}"].attrs["question"]),
        "verdict": said,
        "css": _CLASSES[said],
        "reasons": str(found.reasons.values).split("; "),
        "numbers": [
            ("questions", str(int(found.questions))),
            ("log loss [nat]", _number(found.log_loss)),
            ("knowing nothing [nat]", _number(found.log_loss_of_nothing)),
            ("gain [nat]", f"{_number(found.gain)} ± {_number(found.gain_error)}"),
            ("90 % intervals held", _share(found.covered)),
        ],
    }


def _inventory(found: xr.Dataset) -> dict[str, Any]:
    from pyro_invman import plots

    rows = int(found.attrs["rows"])
    measured = [
        [str(name), str(role), str(units), str(support), str(int(cells)), _share(cells / max(1, rows))]
        for name, role, units, support, cells in zip(
            *(found[field].values for field in ("variable", "role", "units", "support", "cells")), strict=True
        )
    ]
    figures = [
        _figure(
            plots.missingness(found),
            "Held-out rows by what is measured in them, the most frequent pattern first"
            + (
                f"; {found.sizes['pattern'] - 20} rarer patterns are not drawn." if found.sizes["pattern"] > 20 else "."
            ),
        )
    ]
    if "links" in found:
        caption = (
            "Learned rows that show both of two variables. Where there is a dash, what the two say about each other "
            "comes through others, or from tasks, or is not known."
        )
        figures.append(_figure(plots.links(found.links), caption))
    by = []
    for kind in ("task", "source"):
        if f"cells_by_{kind}" in found:
            names, cells = found[kind].values, found[f"cells_by_{kind}"].values
            lines = [
                [str(name), str(int(number)), *(str(int(n)) for n in line)]
                for name, number, line in zip(names, found[f"rows_of_{kind}"].values, cells, strict=True)
            ]
            by.append((kind, _table([kind, "rows", *map(str, found["variable"].values)], lines)))
    heads = ["variable", "role", "units", "support", "cells measured", "share of rows"]
    return {"measured": Table(heads, measured), "by": by, "figures": figures}


def _fit(found: xr.Dataset) -> dict[str, Any]:
    from pyro_invman import plots

    best = int(np.nanargmin(found.validation_loss.values))
    caption = (
        f"Loss of a fit of {int(found.step[-1])} steps, the least on held-out rows at step {int(found.step[best])} "
        "(dotted), whose weights were kept. Training below held-out by much is over-fitting, which stopping cures; "
        "both still falling at the end means that it was stopped early."
    )
    told = [[str(name), str(value)] for name, value in found.attrs.items() if np.ndim(value) == 0]
    return {"figure": _figure(plots.history(found), caption), "told": Table(["of the fit", ""], told)}


def _direction(name: str, tree: xr.DataTree) -> dict[str, Any]:
    from pyro_invman import plots

    said = tree[f"answers/{name}"].to_dataset()
    ranks, held = (tree[f"calibration/{name}/{kind}"].to_dataset() for kind in ("sbc", "coverage"))
    points, check = (tree[f"calibration/{name}/{kind}"].to_dataset() for kind in ("tarp", "check"))
    figures = [
        _figure(
            plots.calibration(ranks),
            "Ranks of truths among draws, less the diagonal: in the band where the model is right. All above 0: truths "
            "lie lower than said; above at the left and below at the right: further out than said (over-confident); "
            "the other way round: nearer than said.",
        ),
        _figure(
            plots.calibration(held),
            "Share of truths in regions of highest density, less their content: below the band, the model is "
            "over-confident; above it, too wide.",
        ),
    ]
    for target in said.target.values[~said.discrete.values]:
        one = said.sel(target=target)
        seen = ~np.isnan(one.truth.values)
        if seen.any():
            quantiles = one.quantiles.sel(quantile=[0.05, 0.5, 0.95]).values[seen].T
            units = str(one.units.values)
            log = bool(one.positive) and bool((quantiles > 0).all())
            axes = plots.predictive(one.truth.values[seen], quantiles, str(target), units, log=log)
            figures.append(_figure(axes, f"What was said of {target}, against what was measured."))
    covered = held.curve.interp(point=0.9)
    lines = [
        [
            str(stratum),
            str(int(held["count"].sel(stratum=stratum))),
            _number(held.log_loss.sel(stratum=stratum)),
            _number(held.log_loss_of_nothing.sel(stratum=stratum)),
            _share(covered.sel(stratum=stratum)),
            *(_number(each.p_value.sel(stratum=stratum).min()) for each in (ranks, held, points)),
        ]
        for stratum in held.stratum.values
    ]
    heads = ["which", "questions", "log loss [nat]", "knowing nothing [nat]", "90 % regions held"]
    everywhere = check.sel(stratum="all")
    drawn = [
        [
            f"{target}{_in(everywhere.units.sel(target=target))}",
            str(statistic),
            *(_number(everywhere[field].sel(target=target, statistic=statistic)) for field in _CHECKED),
        ]
        for target in everywhere.target.values
        for statistic in everywhere.statistic.values
    ]
    return {
        "name": name,
        "question": _short(said.attrs["question"]),
        "figures": figures,
        "strata": Table([*heads, "p: ranks", "p: regions", "p: random points"], lines),
        "check": Table(["of", "statistic", "measured", "drawn: 5 %", "median", "95 %", "p"], drawn),
    }


def _tasks(found: xr.Dataset) -> dict[str, Any]:
    from pyro_invman import plots

    known, new = ({}, {})  # type: tuple[dict[str, Fingerprint], dict[str, Fingerprint]]
    for name in found.task.values:
        one = found.sel(task=name)
        belief = Fingerprint.of(torch.from_numpy(one["mean"].values), torch.from_numpy(one.covariance.values))
        (known if bool(one.known) else new)[str(name)] = belief
    held_out = found.sel(task=~found.known.values.astype(bool))
    order = np.argsort(held_out.p_value.values, kind="stable")
    below = float(found.attrs["unusual_below"])
    lines = [
        [
            str(held_out.task.values[t]) + (" *" if held_out.p_value.values[t] <= below else ""),
            _number(held_out.p_value.values[t]),
            str(held_out.nearest.values[t]),
            _number(held_out.similarity.values[t]),
        ]
        for t in order
    ]
    number, unusual, chance = len(lines), int(found.attrs["unusual"]), float(found.attrs["p_value_of_so_many"])
    sentence = (
        f"{unusual} of {number} held-out tasks have a p-value of {below:g} or less, where {below * number:.2g} are "
        f"expected by chance (so many or more: p = {_number(chance)})."
    )
    verdict = (
        "Held-out tasks are like those learned."
        if chance > _STRANGE
        else "More held-out tasks are unlike those learned than chance explains: the population has moved, or the "
        "manifold is too narrow."
    )
    caption = (
        "Beliefs about tasks, ellipses of one standard deviation; stars are held out. Wide ellipses: little is known."
    )
    figure = _figure(plots.task_map(known, new), caption) if known else None
    table = _table(["task", "p-value", "most alike", "likeness"], lines)
    return {"figure": figure, "sentence": sentence, "verdict": verdict, "table": table, "strange": chance <= _STRANGE}


def _cells(tree: xr.DataTree, inventory: xr.Dataset) -> dict[str, Any]:
    found = tree["cells"].to_dataset()
    units = dict(zip(inventory["variable"].values, inventory.units.values, strict=True))
    flagged = []
    for name, column in found.data_vars.items():
        values = column.values
        for row in np.flatnonzero(np.nan_to_num(values) > _GROSS):
            flagged.append((float(values[row]), int(row), str(name)))
    flagged.sort(reverse=True)
    lines = [[str(row), f"{name}{_in(units[name])}", _share(p)] for p, row, name in flagged]
    cells = int(sum((~np.isnan(column.values)).sum() for column in found.data_vars.values()))
    return {"count": len(flagged), "of": cells, "table": _table(["row", "cell", "gross error"], lines)}


# ---------------------------------------------------------------------------------------------- pieces
def _table(heads: Sequence[str], lines: Iterable[list[str]]) -> Table:
    every = list(lines)
    return Table(list(heads), every[:_MOST], max(0, len(every) - _MOST))


def _figure(axes: Any, caption: str) -> Figure:
    from pyro_invman import plots

    drawn = io.BytesIO()
    plots.save(axes, drawn, format="svg", metadata={"Date": None})
    return Figure("data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode(), caption)


def _number(value: Any) -> str:
    number = float(value)
    if math.isnan(number):
        return "–"
    return f"{number:.3g}".replace("-", "−")


def _short(question: str) -> str:
    """A question with at most five names given."""
    targets, given = question.split(" | ")
    names = given.split(", ")
    return (
        question if len(names) <= _NAMED else f"{targets} | {', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
    )


def _share(value: Any) -> str:
    return "–" if math.isnan(float(value)) else f"{float(value):.0%}"


def _in(units: Any) -> str:
    text = str(getattr(units, "values", units))
    return f" [{text}]" if text else ""
