"""How a .csv is written, guessed from its text: encoding, separator, decimal mark, where the header stands."""

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
    """How a .csv is written, and why that is thought so, by what of it."""

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
    skip = next((n for n, line in enumerate(split) if len(line) == width and _is_header(line)), 0)
    if skip:
        reasons["skip_lines"] = f"the first line of {width} names is {split[skip][:3]}…"
    body = [line for line in split[skip + 1 :] if len(line) == width]
    if decimal is None:
        decimal, reasons["decimal"] = _decimal(body, separator)
    units_row = bool(body) and _is_units(body[0], body[1:])
    if units_row:
        reasons["units_row"] = f"the line under the header is {[cell for cell in body[0] if cell][:4]}…, over numbers"
    return Dialect(separator, decimal, encoding, skip, units_row, reasons)


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


def _decimal(body: Sequence[Sequence[str]], separator: str) -> tuple[str, str]:
    cells = [cell.strip() for line in body for cell in line]
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
    """The cells of a table as they are written, "" where there is nothing, by header; the line of the file that each
    row stands in, and how many lines between them are blank."""

    columns: dict[str, list[str]]
    line_numbers: list[int]
    blank_lines: int


def raw_table(path: Path, dialect: Dialect | None, sheet: str | int) -> RawTable:
    """A table as it is written.

    Raises:
        DataError: a line with more or fewer cells than the header.
    """
    if dialect is not None:
        how = (path, dialect.separator, dialect.encoding)
        names, _ = tables.csv_head(*how, dialect.skip_lines, dialect.units_row)
        lines = list(tables.numbered_lines(*how))[dialect.skip_lines + 1 + dialect.units_row :]
        told = [(number, line) for number, line in lines if any(cell.strip() for cell in line)]
        for row, (number, line) in enumerate(told):
            if len(line) != len(names):
                raise DataError(
                    f"{path}, row {row} (line {number}): found {len(line)} cells, expected {len(names)}, as in the "
                    "header; mend the line, or pass --sep, if another mark separates the cells"
                )
        columns = {name: [line[k].strip() for _, line in told] for k, name in enumerate(names)}
        return RawTable(columns, [number for number, _ in told], len(lines) - len(told))
    excel = path.suffix.lower() == ".xlsx"
    found = tables.xlsx_columns(path, ("",), sheet) if excel else tables.parquet_columns(path, ())
    columns = {name: [tables.as_written(cell) for cell in cells] for name, cells in found.items()}
    rows = len(next(iter(columns.values()), []))
    return RawTable(columns, [row + 2 for row in range(rows)], 0)
