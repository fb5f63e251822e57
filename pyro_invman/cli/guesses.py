"""What a column likely is, guessed from its header and its cells, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pyro_invman.cli.dialect import NUMBER, means_missing
from pyro_invman.cli.headers import name_and_units, plain_units, says, tokens, words

_PARAMETERS = words(
    "power speed velocity voltage current flow rate feed dose pressure hatch layer beam spot duration setpoint set",
    "nominal target scan focus energy frequency amount ratio laser gain time temperature",
)
_OBSERVATIONS = words(
    "depth width length height yield hardness strength response signal measured result output intensity roughness",
    "porosity error score observed reading displacement strain stress efficiency quality defect",
    "crack mode toughness modulus loss count titer effect",
)
_CONDITIONS = words(
    "ambient humidity room alloy material substrate density conductivity melting boiling heat age sex weight",
    "absorptivity gas atmosphere season batch grade supplier condition preheat",
)
_TASKS = words(
    "task alloy heat material patient subject reactor machine batch specimen sample lot instrument experiment study",
    "paper reference doi donor plate site group animal plot field id",
)
_SOURCES = words("source lab laboratory operator technique device simulator method origin instrument")
_REMARKS = words("remark comment note bemerkung kommentar notes info description")
_SHARES = words("share fraction probability efficiency absorptivity porosity humidity pct percent percentage")
_NAMING = words("id no nr index ref replicate repeat run")
_MANY = 20


@dataclass(frozen=True)
class Column:
    """A column as it is guessed to be; `why` tells by what of it, `doubt` names what of it is a guess from little."""

    header: str
    name: str
    units: str
    kind: str  # "number", "text", "blank"
    cells: int
    missing: int
    values: tuple[float, ...] = ()
    levels: Mapping[str, int] = field(default_factory=dict)
    blanks: tuple[str, ...] = ()
    wrong: tuple[tuple[int, str], ...] = ()
    role: str | None = None
    support: str = "real"
    resolution: float = 0.0
    why: Mapping[str, str] = field(default_factory=dict)
    doubt: frozenset[str] = frozenset()

    @property
    def range(self) -> str:
        """What occurs, in a few words."""
        if self.kind == "number":
            return f"{min(self.values):g} to {max(self.values):g}"
        some = ", ".join(list(self.levels)[:3])
        return f"{len(self.levels)} different: {some}{', …' if len(self.levels) > 3 else ''}" if self.levels else ""


# ---------------------------------------------------------------------------------------------- cells
def column_of(header: str, cells: Sequence[str], decimal: str, stated_units: str = "") -> Column:
    """A column by its header and its cells as they are written; roles come later, from all columns together."""
    name, units, where = name_and_units(header)
    why = {}
    if stated_units and not means_missing(stated_units):
        units, where = plain_units(stated_units), "in the units row"
    if units:
        why["units"] = where
    other = "," if decimal == "." else "."
    numbers, blanks, rest = [], Counter[str](), list[tuple[int, str]]()
    for row, cell in enumerate(cells):
        if NUMBER.fullmatch(cell) and other not in cell:
            numbers.append(float(cell.replace(decimal, ".")))
        elif means_missing(cell):
            blanks[cell] += 1
        else:
            rest.append((row, cell))
    missing = sum(blanks.values())
    column = Column(header, name, units, "blank", len(cells), missing, blanks=tuple(blanks), why=why)
    if not numbers and not rest:
        return column
    if len(rest) > len(numbers):
        kept = [cell for cell in cells if cell and cell.lower() not in ("na", "n/a", "#n/a", "nan")]
        levels = dict(Counter(kept).most_common())
        return replace(column, kind="text", missing=len(cells) - len(kept), blanks=(), levels=levels, units="", why={})
    column = replace(column, kind="number", values=tuple(numbers), wrong=tuple(rest))
    written = [cell for cell in cells if NUMBER.fullmatch(cell)]
    return _with_support(column, max(_decimals(cell, decimal) for cell in written))


def _decimals(cell: str, decimal: str) -> int:
    if "e" in cell.lower():
        return 9
    return len(cell.partition(decimal)[2])


def _with_support(column: Column, decimals: int) -> Column:
    low, high = min(column.values), max(column.values)
    why = dict(column.why)
    support, resolution = "real", 0.0
    share = column.units == "%" or bool(tokens(column.header) & set(_SHARES))
    step = 10.0**-decimals
    if share and low >= 0 and high <= (100 if column.units == "%" or high > 1 else 1):
        support = f"interval:0:{100 if column.units == '%' or high > 1 else 1}"
        why["support"] = "a share by its header or units"
    elif column.units in ("degC", "F"):
        why["support"] = "degrees may go below 0"
    elif low > 0:
        support, why["support"] = "positive", "no cell is 0 or below"
    else:
        why["support"] = f"found {low:g}, so not 'positive'"
    if len(set(column.values)) >= 5 and (high - low) / step <= 40:
        resolution, why["resolution"] = step, f"written to {step:g}, within a range of {high - low:g}"
    return replace(column, support=support, resolution=resolution, why=why)


# ---------------------------------------------------------------------------------------------- all together
@dataclass(frozen=True)
class Guess:
    """Columns with roles, which of them names the task and which the source, and why."""

    columns: tuple[Column, ...]
    task: str | None
    source: str | None
    why: Mapping[str, str]


def guess_roles(columns: Sequence[Column]) -> Guess:
    """What each column is for; what cannot be known is guessed, and named among the doubts."""
    rows = columns[0].cells if columns else 0
    task = _label(columns, _TASKS, rows, fewest=5)
    source = _label([c for c in columns if c is not task], _SOURCES, rows, fewest=2)
    columns = _distinct_names(columns, [c.header for c in (task, source) if c is not None])
    named = {c.header: c.name for c in columns}
    why: dict[str, str] = {}
    if task is not None:
        groups = len(_levels(task))
        why["task"] = f"its header says so, and {groups} names share {rows} rows; take it out if rows have no groups"
    if source is not None:
        why["source"] = f"its header says so; {len(_levels(source))} names"
    labels = [named[c.header] for c in (task, source) if c is not None]
    maybe = [c for c in columns if c.name not in labels and c.kind == "text" and 5 <= len(c.levels) <= rows / 2]
    if task is None and maybe:
        name = maybe[0].name
        why["task"] = f'DECIDE: if the rows of one {name} share something hidden, write task = "{name}", without a role'
    found = [c if c.name in labels else _role_of(c, rows) for c in columns]
    if not any(c.role == "observation" for c in found):
        last = next((n for n in reversed(range(len(found))) if found[n].kind == "number" and found[n].role), None)
        if last is not None:
            reason = "the last number of the row; no header says what was measured"
            found[last] = _with_role(found[last], "observation", reason, doubt=True)
    return Guess(tuple(found), named[task.header] if task else None, named[source.header] if source else None, why)


def _levels(column: Column) -> Mapping[str, int]:
    return column.levels if column.kind == "text" else Counter(f"{value:g}" for value in column.values)


def _label(columns: Sequence[Column], words: Sequence[str], rows: int, fewest: int) -> Column | None:
    """The column that names groups of rows, by its header: text or whole numbers that repeat."""
    for word in words:
        for column in columns:
            numbers = column.kind == "number" and all(value.is_integer() for value in column.values)
            groups = len(_levels(column)) if numbers or column.kind == "text" else 0
            usable = not column.missing and not column.units and fewest <= groups <= rows / 2
            if usable and says(column.header, [word]):
                return column
    return None


def _role_of(column: Column, rows: int) -> Column:
    if column.kind == "blank":
        return _left_out(column, "nothing in it")
    if len(_levels(column)) == 1:
        return _left_out(column, "the same in all rows, so that nothing can be learned from it")
    if column.kind == "text" and says(column.header, _REMARKS):
        return _left_out(column, "remarks, by its header")
    if column.kind == "text":
        if any(re.fullmatch(r"[-+]?[\d.,]+\s*[^\W\d_]+\S*", level) for level in list(column.levels)[:1]):
            return _left_out(column, "numbers with units in the cells; write the numbers alone")
        if len(column.levels) > max(_MANY, rows / 10) or max(column.levels.values()) < 2:
            return _left_out(column, f"{len(column.levels)} different texts, so remarks or names rather than levels")
        why = dict(column.why) | {"support": f"{len(column.levels)} texts that repeat"}
        column = replace(column, support="categorical", why=why)
        measured = says(column.header, _OBSERVATIONS)
        word, role = measured or says(column.header, _CONDITIONS), "observation" if measured else "condition"
        return _with_role(column, role, word or "text, rarely what is measured", doubt=not word)
    whole = all(value.is_integer() for value in column.values)
    if whole and not column.units and len(set(column.values)) == column.cells and _counts_rows(column):
        return _left_out(column, "it numbers the rows")
    word = says(column.header, _NAMING)
    if whole and not column.units and word:
        return _left_out(column, f"whole numbers under {word!r}, so names rather than quantities")
    for role, known in (("observation", _OBSERVATIONS), ("condition", _CONDITIONS), ("parameter", _PARAMETERS)):
        word = says(column.header, known)
        if word:
            return _with_role(column, role, word, doubt=False)
    if column.missing > 0.05 * column.cells:
        return _with_role(column, "observation", "blanks are more common in what is measured than in what is set", True)
    return _with_role(column, "parameter", "hardly a blank, as in what is set", doubt=True)


def _counts_rows(column: Column) -> bool:
    named = says(column.header, (*_NAMING, "number")) is not None
    dense = max(column.values) - min(column.values) < 2 * column.cells
    return dense and (named or list(column.values) == sorted(column.values))


def _left_out(column: Column, reason: str) -> Column:
    return replace(column, role=None, why=dict(column.why) | {"role": f"left out: {reason}"})


def _with_role(column: Column, role: str, reason: str, doubt: bool) -> Column:
    text = reason if " " in reason else f"its header says {reason!r}"
    doubts = column.doubt | {"role"} if doubt else column.doubt - {"role"}
    resolution = column.resolution if role == "observation" else 0.0
    return replace(column, role=role, why=dict(column.why) | {"role": text}, doubt=doubts, resolution=resolution)


def _distinct_names(columns: Sequence[Column], labels: Sequence[str]) -> list[Column]:
    """Names that differ, none of which is taken by dimensions; "task" and "source" are for the headers `labels`."""
    taken, found = {"row", "draw"}, []
    for column in columns:
        name, number = column.name, 1
        while name in taken or (name in ("task", "source") and column.header not in labels):
            number += 1
            name = f"{column.name}_{number}"
        taken.add(name)
        found.append(replace(column, name=name))
    return found
