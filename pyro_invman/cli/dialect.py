"""How a table is written, guessed from its cells: encoding, separator, decimal mark, where the header stands."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pyro_invman import tables
from pyro_invman.variables import DataError

_SEPARATORS = (";", "\t", ",", "|")
_LINES = 400
NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?")
_BLANKS = {
    "", "-", "--", "---", "–", "—", "?", ".", "*", "na", "n/a", "#n/a", "n.a.", "nan", "null", "none", "nil", "nd",
    "n.d.", "n.m.", "missing", "unknown", "k.a.", "not measured", "#div/0!", "#value!", "#ref!",
}  # fmt: skip
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Dialect(NamedTuple):
    """How a table is written, and why that is thought so, by what of it."""

    separator: str
    decimal: str
    encoding: str
    skip_lines: int
    units_row: bool
    reasons: dict[str, str]


def means_missing(text: str) -> bool:
    """Whether a text in a column of numbers likely says that nothing was measured."""
    return text.strip().lower() in _BLANKS


def guess_dialect(
    path: Path, separator: str | None = None, decimal: str | None = None, encoding: str | None = None
) -> Dialect:
    """What a .csv looks like; what is given is taken for granted.

    Raises:
        DataError: there is nothing in it, or it is not text.
    """
    raw = path.read_bytes()
    reasons: dict[str, str] = {}
    if encoding is None:
        encoding, reasons["encoding"] = _encoding(raw, path)
    text = raw.decode("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)
    head = "".join(text.splitlines(keepends=True)[:_LINES])
    if not head.strip():
        raise DataError(f"{path}: found an empty table, expected a line of names and lines of cells")
    if separator is None:
        separator = max(_SEPARATORS, key=lambda mark: _agreement(head, mark))
        lines, cells = _agreement(head, separator)
        reasons["separator"] = (
            f"gives {cells} cells in each of {lines} lines" if lines else "no mark separates anything"
        )
    split = _lines(head, separator)
    width = _width(split)
    skip, units_row, more = _header_at([line if len(line) == width else [""] for line in split])
    if decimal is None:
        body = [line for line in split[skip + 1 :] if len(line) == width]
        decimal, reasons["decimal"] = _decimal([cell for line in body for cell in line])
    return Dialect(separator, decimal, encoding, skip, units_row, reasons | more)


def guess_sheet(path: Path, sheet: str | int, decimal: str | None = None) -> Dialect:
    """What a sheet of an .xlsx looks like: where its header stands, and the mark of numbers that are text in it.

    Raises:
        DataError: there is nothing in it.
    """
    frame = tables.sheet_rows(path, sheet)
    rows = frame.dropna(axis=1, how="all").head(_LINES).to_numpy().tolist()
    if not rows:
        raise DataError(f"{path}: found an empty sheet {sheet!r}, expected a row of names and rows of cells")
    skip, units_row, reasons = _header_at([[tables.as_written(cell) for cell in row] for row in rows])
    if decimal is None:
        texts = [cell for row in rows[skip + 1 :] for cell in row if isinstance(cell, str)]
        decimal, reasons["decimal"] = _decimal(texts)
    return Dialect(",", decimal, "utf-8", skip, units_row, reasons)


def _header_at(lines: Sequence[Sequence[str]]) -> tuple[int, bool, dict[str, str]]:
    """How many lines stand above the header, whether units stand below it, and why that is thought so."""
    skip = next((n for n, line in enumerate(lines) if _is_header(line)), 0)
    reasons = {}
    if skip:
        some = [cell for cell in lines[skip] if cell][:3]
        reasons["skip_lines"] = f"the first line of {len(lines[skip])} names is {some}…"
    body = [line for line in lines[skip + 1 :] if len(line) == len(lines[skip]) and any(map(str.strip, line))]
    units_row = bool(body) and _is_units(body[0], body[1:])
    if units_row:
        reasons["units_row"] = f"the line under the header is {[cell for cell in body[0] if cell][:4]}…, over numbers"
    return skip, units_row, reasons


def _encoding(raw: bytes, path: Path) -> tuple[str, str]:
    for mark, name in _BOMS.items():
        if raw.startswith(mark):
            return name, "it starts with a byte order mark"
    if b"\0" in raw:
        raise DataError(f"{path}: found a zero byte, expected text; if it is one, pass --encoding")
    try:
        raw.decode("utf-8")
        return "utf-8", "it decodes as such"
    except UnicodeDecodeError as error:
        name = "cp1252" if any(0x80 <= byte < 0xA0 for byte in raw) else "latin1"
        around = raw[max(0, error.start - 8) : error.start + 8].decode("latin1")
        return name, f"it is no utf-8, and reads {around!r} so; check that letters such as µ and ° come out right"


def _lines(text: str, separator: str) -> list[list[str]]:
    """Lines as cells; those without a character are no lines, and those of separators only are as empty."""
    return [line for line in csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True) if line]


def _width(lines: Sequence[Sequence[str]]) -> int:
    counts = Counter(len(line) for line in lines if any(cell.strip() for cell in line))
    return max(counts, key=lambda width: (counts[width], width))


def _agreement(text: str, separator: str) -> tuple[int, int]:
    """Lines that have as many cells as most have, and as many names above them; none where that is one cell."""
    lines = _lines(text, separator)
    width = _width(lines)
    if width == 1 or not any(len(line) == width and _is_header(line) for line in lines):
        return (0, 0)
    return (sum(len(line) == width for line in lines), width)


def _is_header(line: Sequence[str]) -> bool:
    filled = [cell.strip() for cell in line if cell.strip()]
    return len(filled) >= max(1, len(line) - 1) and not any(NUMBER.fullmatch(cell) for cell in filled)


def _decimal(cells: Sequence[str]) -> tuple[str, str]:
    cells = [cell.strip() for cell in cells]
    commas = [cell for cell in cells if re.fullmatch(r"[-+]?\d+,\d+([eE][-+]?\d+)?", cell)]
    points = [cell for cell in cells if re.fullmatch(r"[-+]?\d+\.\d+([eE][-+]?\d+)?", cell)]
    thousands = [cell for cell in commas if re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", cell)]
    if len(commas) > len(points) and len(thousands) < len(commas):
        return ",", f"{len(commas)} cells are like {commas[0]!r}, {len(points)} have a point"
    return ".", f"{len(points)} cells have a point, {len(commas)} a comma" if commas else ""


def _is_units(first: Sequence[str], below: Sequence[Sequence[str]]) -> bool:
    """Whether a line is text over columns of numbers, and short."""
    over = [
        column
        for column in range(len(first))
        if sum(bool(NUMBER.fullmatch(line[column].strip())) for line in below[:50]) > len(below[:50]) / 2
    ]
    cells = [first[column].strip() for column in over]
    told = [cell for cell in cells if not means_missing(cell)]
    return bool(told) and not any(NUMBER.fullmatch(cell) or len(cell) > 12 for cell in cells)


class RawTable(NamedTuple):
    """The cells of a table as they are written, "" where there is nothing, by header; units under these, if there are;
    the line of the file that each row stands in, and how many lines between them are blank."""

    columns: dict[str, list[str]]
    units: dict[str, str]
    line_numbers: list[int]
    blank_lines: int


def raw_table(path: Path, dialect: Dialect | None, sheet: str | int) -> RawTable:
    """A table as it is written; `dialect` is None for a kind that needs none.

    Raises:
        DataError: a line with more or fewer cells than the header.
    """
    if dialect is None:
        found = tables.parquet_columns(path, ())
        columns = {name: [tables.as_written(cell) for cell in cells] for name, cells in found.items()}
        return RawTable(columns, {}, list(range(1, 1 + len(next(iter(columns.values()), [])))), 0)
    above = dialect.skip_lines + 1 + dialect.units_row
    if path.suffix.lower() in tables.WRITTEN:
        how = (path, dialect.separator, dialect.encoding)
        names, units = tables.csv_head(*how, dialect.skip_lines, dialect.units_row)
        lines = list(tables.numbered_lines(*how))[above:]
    else:
        names, units = tables.xlsx_head(path, sheet, dialect.skip_lines, dialect.units_row)
        rows = enumerate(tables.sheet_rows(path, sheet).to_numpy().tolist(), start=1)
        lines = [(n, [tables.as_written(cell, dialect.decimal) for cell in row]) for n, row in rows][above:]
    told = [(number, line) for number, line in lines if any(cell.strip() for cell in line)]
    for row, (number, line) in enumerate(told):
        if len(line) != len(names):
            raise DataError(
                f"{path}, row {row} (line {number}): found {len(line)} cells, expected {len(names)}, as in the "
                "header; mend the line, or pass --sep, if another mark separates the cells"
            )
    columns = {name: [line[k].strip() for _, line in told] for k, name in enumerate(names)}
    stated = dict(zip(names, units, strict=False))
    return RawTable(columns, stated, [number for number, _ in told], len(lines) - len(told))
