"""What a command says: results as tables or JSON on standard output, all else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_invman.variables import Variable, Variables

LEVELS = (0.05, 0.5, 0.95)


def say(line: str) -> None:
    """A line about what is going on."""
    print(line, file=sys.stderr, flush=True)


def answer(report: Mapping[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """The result, for machines or for people."""
    print(json.dumps(plain(report), indent=1, ensure_ascii=False) if as_json else text(), flush=True)


def plain(value: Any) -> Any:
    """`value` as JSON knows it; a number that is none is null."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as columns under these, text to the left and numbers to the right."""
    if not rows:
        return "(none)"
    heads = list(rows[0])
    cells = [[_cell(row[head]) for head in heads] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    text = [all(isinstance(row[head], str) for row in rows) for head in heads]
    lines = [
        "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, text, strict=True)).rstrip()
        for line in (heads, ["-" * width for width in widths], *cells)
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def headed(variable: Variable) -> str:
    """A name as the head of a column: with units."""
    return f"{variable.name} [{variable.units}]" if variable.units else variable.name


def quantile_rows(variables: Variables, targets: Sequence[str], draws: Tensor) -> list[dict[str, Any]]:
    """Median and 90 % interval of each target by draws (S, n); shares of the levels, where it is categorical."""
    rows: list[dict[str, Any]] = []
    for k, name in enumerate(targets):
        variable = variables[variables.index(name)]
        if variable.discrete:
            shares = torch.bincount(draws[..., k].long(), minlength=len(variable.levels)) / len(draws)
            likely = shares.argsort(descending=True)[:3].tolist()
            text = ", ".join(f"{variable.levels[c]} {shares[c]:.0%}" for c in likely)
            rows.append({"target": name, "units": "", "5 %": "", "median": text, "95 %": ""})
            continue
        low, middle, high = draws[..., k].double().quantile(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
        rows.append({"target": name, "units": variable.units, "5 %": low, "median": middle, "95 %": high})
    return rows
