"""Raw tables: files to columns of cells, and cells to numbers, or the reason why not.

A column is an array (N,) of whatever was found; what comes out is float64 with NaN for "not measured".
"""

from __future__ import annotations

import codecs
import csv
import difflib
import importlib.util
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyro_invman.variables import DataError, Variable

MISSING = ("", "NA", "N/A", "#N/A", "NaN", "nan")
"""Text that stands for "not measured" in a table, unless told otherwise."""


_NEEDS = {
    ".csv": "pandas",
    ".tsv": "pandas",
    ".xlsx": "openpyxl",
    ".parquet": "pyarrow",
    ".nc": "netCDF4",
    ".zarr": "zarr",
}
WRITTEN = (".csv", ".tsv")
"""Kinds of table that are text."""


# ------------------------------------------------------------------------------------------------ files
def kind_of(path: Path) -> str:
    """The ending of a table that is there and can be read.

    Raises:
        FileNotFoundError: it is not there.
        DataError: nothing reads such a table, or what does is not installed.
    """
    kind = path.suffix.lower()
    if kind not in _NEEDS:
        raise DataError(f"{path}: found the ending {path.suffix!r}, expected one of {list(_NEEDS)}")
    if not path.exists():
        raise FileNotFoundError(f"there is no table at {path}")
    package = _NEEDS[kind]
    if importlib.util.find_spec(package) is None:
        raise DataError(f"{path}: reading {kind} needs the package {package}; run: pip install {package}")
    return kind


def csv_lines(path: Path, sep: str, encoding: str) -> Iterator[list[str]]:
    """The lines of a .csv as cells, those without a single character left out."""
    return (cells for _, cells in numbered_lines(path, sep, encoding))


def numbered_lines(path: Path, sep: str, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """The same with the number of each line in the file, from 1."""
    plain = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    with open(path, newline="", encoding=plain) as file:
        lines = csv.reader(file, delimiter=sep, skipinitialspace=True)
        yield from ((lines.line_num, cells) for cells in lines if cells)


def csv_head(path: Path, sep: str, encoding: str, skip_lines: int, units_row: bool) -> tuple[list[str], list[str]]:
    """The names of a .csv, and the units in the line under them, without brackets, where there is such a line."""
    lines = islice(csv_lines(path, sep, encoding), skip_lines, None)
    header = next(lines, None)
    if header is None:
        raise DataError(f"{path}: found an empty table, expected a line of names and lines of cells")
    names = _header(path, header)
    return names, _units(path, names, next(lines, [])) if units_row else []


def _units(path: Path, names: Sequence[str], cells: Iterable[Any]) -> list[str]:
    """What the line under the names says, without brackets."""
    units = [as_written(cell).strip("[]()").strip() for cell in cells]
    for name, cell in zip(names, units, strict=False):
        if re.fullmatch(r"[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?", cell):
            expected = "expected units; is there a units row at all?"
            raise DataError(f"{path}: found {cell!r} in the units row under {name!r}, {expected}")
    return units


def csv_columns(
    path: Path,
    as_text: Collection[str],
    missing: Sequence[str],
    sep: str,
    decimal: str,
    encoding: str,
    skip_lines: int = 0,
    units_row: bool = False,
) -> dict[str, Any]:
    """The columns of a .csv; those named in `as_text` as they are written, the others as numbers where they can be.

    Lines of separators only are no rows. `skip_lines` lines stand above the header, one more below it if `units_row`.
    """
    names, _ = csv_head(path, sep, encoding, skip_lines, units_row)
    other = next((mark for mark in ";\t|," if mark != sep and mark in names[0]), None)
    if len(names) == 1 and other:
        how = f"pass sep={other!r} (on the command line, --sep)"
        raise DataError(f"{path}: found one column, {names[0]!r}; if {other!r} separates columns, {how}")
    above = skip_lines + 1 + units_row
    lines = ((len(line), not any(map(str.strip, line))) for line in islice(csv_lines(path, sep, encoding), above, None))
    # pandas skips what is blank all through, and fills a short line up, which looks like cells that were not measured
    kept = np.array([line for line in lines if line != (1, True) or len(names) == 1], dtype=int).reshape(-1, 2)
    widths, blank = kept[:, 0], kept[:, 1].astype(bool)
    uneven = (widths != len(names)) & ~(blank & (widths < len(names)))
    if uneven.any():
        row = int(uneven.argmax()) - int(blank[: uneven.argmax()].sum())
        found = f"found {widths[uneven.argmax()]} cells, expected {len(names)}"
        raise DataError(f"{path}, row {row}: {found}; mend the line")
    if not len(kept):
        return {name: pd.Series([], dtype=float) for name in names}
    plain = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    with open(path, newline="", encoding=plain) as file:
        ahead = filter(None, csv.reader(file, delimiter=sep, skipinitialspace=True))
        for _ in range(above):
            next(ahead)
        frame = pd.read_csv(
            file, sep=sep, decimal=decimal, skipinitialspace=True, header=None, names=names,
            index_col=False, dtype={name: "str" for name in as_text if name in names}, na_values=list(missing),
            keep_default_na=False, low_memory=False,
        )  # fmt: skip
    if len(frame) != len(kept):
        raise DataError(f"{path}: found {len(frame)} rows in {len(kept)} lines; take out lines of quotes and blanks")
    frame = frame[~blank].reset_index(drop=True)
    return {
        name: frame[name] if decimal == "." or name in as_text else _with_mark(frame[name], decimal) for name in names
    }


def _with_mark(cells: pd.Series, decimal: str) -> pd.Series:
    """A column that pandas left as text, its numbers as such: what is none of them stands out."""
    if pd.api.types.is_numeric_dtype(cells) or pd.api.types.is_bool_dtype(cells):
        return cells
    pattern = re.compile(rf"\s*[-+]?\d*{re.escape(decimal)}?\d+([eE][-+]?\d+)?\s*")
    found = [
        float(cell.replace(decimal, ".")) if isinstance(cell, str) and pattern.fullmatch(cell) else cell
        for cell in cells
    ]
    return pd.Series(found, dtype=object)


def sheet_rows(path: Path, sheet: str | int) -> pd.DataFrame:
    """All cells of one sheet of an .xlsx as they are, NaN where there is nothing; the first row is row 0."""
    return pd.read_excel(path, sheet_name=sheet, header=None, dtype=object, na_values=[""], keep_default_na=False)


def xlsx_head(path: Path, sheet: str | int, skip_lines: int, units_row: bool) -> tuple[list[str], list[str]]:
    """The names of a sheet, and the units in the row under them, as `csv_head` gives them."""
    frame = sheet_rows(path, sheet)
    if len(frame) <= skip_lines:
        raise DataError(f"{path}: found an empty sheet {sheet!r}, expected a row of names and rows of cells")
    names = _header(path, frame.iloc[skip_lines])
    below = frame.iloc[skip_lines + 1] if units_row and len(frame) > skip_lines + 1 else []
    return names, _units(path, names, below)


def xlsx_columns(
    path: Path,
    missing: Sequence[str],
    sheet: str | int,
    decimal: str = ".",
    skip_lines: int = 0,
    units_row: bool = False,
) -> dict[str, Any]:
    """The columns of one sheet of an .xlsx; `skip_lines` rows stand above the header, one more below it if `units_row`.

    Rows without a cell are none. `decimal` is the mark of numbers that were entered as text, if they are to be read.
    """
    names, _ = xlsx_head(path, sheet, skip_lines, units_row)
    frame = sheet_rows(path, sheet).iloc[skip_lines + 1 + units_row :]
    frame = frame[~frame.isna().all(axis=1)]
    frame = frame.mask(frame.isin(list(missing)))
    columns = {name: frame.iloc[:, position] for position, name in enumerate(names)}
    return {n: (cells if decimal == "." else _with_mark(cells, decimal)).to_numpy() for n, cells in columns.items()}


def parquet_columns(path: Path, as_text: Collection[str]) -> dict[str, Any]:
    """The columns of a .parquet; those named in `as_text` hold names, though they be numbers."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    _header(path, table.column_names)
    frame = table.to_pandas()
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    return {str(name): cells.astype(object) if name in as_text else cells for name, cells in frame.items()}


def as_written(cell: Any, decimal: str = ".") -> str:
    """A cell of any make as text, "" where there is nothing; a number has that mark."""
    if pd.isna(cell):
        return ""
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() else str(cell).replace(".", decimal)
    return str(cell).strip()


def _header(path: Path, cells: Iterable[Any]) -> list[str]:
    found = ["" if pd.isna(cell) else str(cell).strip() for cell in cells]
    names = [name or f"Unnamed: {position}" for position, name in enumerate(found)]
    refuse_duplicates(str(path), names)
    return names


def refuse_duplicates(where: str, names: Iterable[Any]) -> None:
    """Two columns of one name are an error of the table `where`."""
    seen: dict[Any, int] = {}
    for position, name in enumerate(names):
        if name in seen:
            found = f"found {name!r} twice (columns {seen[name]} and {position})"
            raise DataError(f"{where}: {found}, expected different names; rename one")
        seen[name] = position


def suggest(name: Any, known: Iterable[Any]) -> str:
    """What may have been meant by a name that is not known."""
    names = [str(each) for each in known]
    close = difflib.get_close_matches(str(name), names, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"expected one of {names}"


# ------------------------------------------------------------------------------------------------ cells
def column(name: str, cells: Any) -> np.ndarray:
    """Cells (N,) of any make as an array; masked ones become None."""
    if isinstance(cells, np.ma.MaskedArray):
        array = cells.data.astype(object)
        array[np.ma.getmaskarray(cells)] = None
    else:
        try:
            array = np.asarray(cells)
            # numpy turns a NaN among text into the text "nan"
            array = np.asarray(cells, dtype=object) if array.dtype.kind in "UST" else array
        except ValueError:
            raise DataError(f"{name}: found cells of different lengths, expected one cell for each row") from None
    if array.ndim != 1:
        raise DataError(f"{name}: found shape {array.shape}, expected (N,), one cell for each row")
    return array


def numbers(name: str, values: np.ndarray) -> np.ndarray:
    """Cells (N,) of a numeric variable as float64; only NaN, None and their like are missing."""
    if values.dtype.kind in "fiu":
        cells = values.astype(np.float64)
    elif values.dtype.kind in "OUST":
        values = values.astype(object)
        missing = pd.isna(values)
        kind = pd.api.types.infer_dtype(values[~missing])
        if kind not in ("floating", "integer", "mixed-integer-float", "decimal", "empty"):
            raise _not_a_number(name, values, missing)
        cells = np.where(missing, np.nan, values).astype(np.float64)
    else:
        found = f"found {values[0]!s} ({values.dtype})" if len(values) else f"found cells of type {values.dtype}"
        raise DataError(f"{name}, row 0: {found}, expected a number; convert it, or declare support 'categorical'")
    infinite = np.isinf(cells)
    if infinite.any():
        row = int(infinite.argmax())
        raise DataError(f"{name}, row {row}: found {cells[row]}, expected a finite number, or NaN if not measured")
    return cells


def _not_a_number(name: str, values: np.ndarray, missing: np.ndarray) -> DataError:
    """About the first cell that no number can be made of or, failing that, the first that is not a number."""
    parsed = pd.to_numeric(pd.Series(values).astype(str), errors="coerce").to_numpy(dtype=float)
    wrong = np.isnan(parsed) & ~missing
    if not wrong.any():
        wrong = np.array([isinstance(cell, str | bytes | bool | np.bool_) for cell in values])
    row = int(wrong.argmax())
    found = values[row]
    what, todo = "text" if isinstance(found, str) else type(found).__name__, ""
    if isinstance(found, str) and not found.strip():
        todo = "a cell that was not measured is NaN"
    elif isinstance(found, str):
        todo = what_to_do(found.strip())
    else:
        todo = _MEND
    return DataError(f"{name}, row {row}: found {what} {found!r}, expected a number; {todo}")


_MEND = "mend the cell, name it in missing= if it means 'not measured', or declare support 'categorical'"
_DECIMAL_COMMA = re.compile(r"[-+]?[\d.\s'’]*\d,\d+([eE][-+]?\d+)?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:([,.\s'’])\d{3})(?:\1\d{3})*(?:[,.]\d+)?")
_CENSORED = re.compile(r"[<>≤≥]=?\s*[-+]?[\d.,]+.*")
_WITH_UNITS = re.compile(r"[-+]?[\d.,]*\d\s*([^\W\d_]|[%°µ]).*")


def what_to_do(text: str) -> str:
    """About a text that stands where a number was expected."""
    if _CENSORED.fullmatch(text):
        return (
            "mend the cell: a limit of detection is no measurement (censored); write what was read, or count it as not "
            "measured (blank, or named in missing=) and declare how cells go unrecorded (mechanism= of JointFlow.fit)"
        )
    decimal_comma = 'if the comma is a decimal comma, pass decimal="," to read (on the command line, --decimal)'
    if _DECIMAL_COMMA.fullmatch(text):
        digits = re.sub(r"[.\s'’](?=\d{3})", "", text)
        more = f"; take out the thousands separators ({digits!r})" if digits != text else ""
        if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+", text):
            more = f"; if it separates thousands, take it out ({text.replace(',', '')!r})"
        return decimal_comma + more
    if _THOUSANDS.fullmatch(text):
        return "mend the cell: take out the thousands separators"
    if _WITH_UNITS.fullmatch(text):
        return "mend the cell: units belong into units=, or declare support 'categorical'"
    return _MEND


def _distinct(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Cells (N,) as positions in a list of distinct names, −1 where blank, and that list.

    A whole number is named as an integer, all else as it is written.
    """
    found_at, uniques = pd.factorize(values.astype(object) if values.dtype.kind in "UST" else values)
    whole = [isinstance(each, float | np.floating) and float(each).is_integer() for each in uniques]
    found = [str(int(each)) if is_whole else str(each) for each, is_whole in zip(uniques, whole, strict=True)]
    distinct = list(dict.fromkeys(name for name in found if name.strip()))
    place = {name: position for position, name in enumerate(distinct)}
    lookup = np.array([*(place.get(name, -1) for name in found), -1])
    return lookup[found_at], distinct


def codes(name: str, values: np.ndarray, levels: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Names of levels (N,) as codes with NaN, and the levels: by default those that occur, sorted."""
    positions, found = _distinct(values)
    alike: dict[str, str] = {}
    for each in found:
        twin = alike.setdefault(each.strip(), each)
        if twin != each:
            row = int((positions == found.index(each)).argmax())
            difference = f"found {each!r}, which differs from {twin!r} by blanks only"
            raise DataError(f"{name}, row {row}: {difference}, expected one spelling; mend the cell")
    if levels is None:
        levels = sorted(found, key=float) if values.dtype.kind in "fiu" else sorted(found)
    place = {level: code for code, level in enumerate(levels)}
    for position, each in enumerate(found):
        if each not in place:
            row = int((positions == position).argmax())
            raise DataError(f"{name}, row {row}: found category {each!r}, not seen before; {suggest(each, levels)}")
    lookup = np.array([*(place[each] for each in found), np.nan])
    return lookup[positions], list(levels)


def check_codes(name: str, values: np.ndarray, levels: Sequence[str]) -> np.ndarray:
    """Cells (N,) that are codes of `levels` already, as float64."""
    cells = values.astype(np.float64)
    wrong = ~np.isnan(cells) & ~np.isin(cells, np.arange(len(levels)))
    if wrong.any():
        row = int(wrong.argmax())
        expected = f"expected a whole number from 0 to {len(levels) - 1}, the code of one of {list(levels)}"
        raise DataError(f"{name}, row {row}: found {cells[row]:g}, {expected}")
    return cells


def labels(name: str, values: np.ndarray) -> np.ndarray:
    """Cells (N,) of a task or source as text, none of them blank."""
    positions, found = _distinct(values)
    blank = positions < 0
    if blank.any():
        row = int(blank.argmax())
        raise DataError(f"{name}, row {row}: found a blank cell, expected the name of the {name}; fill it in")
    return np.array([*found, ""], dtype=object)[positions]


def check_support(variable: Variable, cells: np.ndarray) -> None:
    """Cells (N,) lie in the support of their variable, or are NaN."""
    if variable.support == "positive":
        wrong, expected = cells <= 0, "a number above 0"
    elif variable.lower is not None and variable.upper is not None:
        wrong = (cells < variable.lower) | (cells > variable.upper)
        expected = f"a number from {variable.lower:g} to {variable.upper:g}"
    else:
        return
    if wrong.any():
        row = int(wrong.argmax())
        more = f" (and {wrong.sum() - 1} more)" if wrong.sum() > 1 else ""
        found = f"found {cells[row]:g}, expected {expected} for support {variable.support!r}"
        todo = "mend the cell, leave it blank if it was not measured, or declare another support"
        raise DataError(f"{variable.name}, row {row}: {found}{more}; {todo}")


def check_varies(variable: Variable, cells: np.ndarray) -> None:
    """Cells (N,) can be learned from: some are observed, and they differ."""
    seen = cells[~np.isnan(cells)]
    if not len(seen):
        found = f"found no observed cell in {len(cells)} rows"
        raise DataError(f"{variable.name}: {found}, expected some to learn from; leave the variable out")
    if seen.min() == seen.max():
        same = repr(variable.levels[int(seen[0])]) if variable.discrete else f"{seen[0]:g}"
        found = f"found the constant {same} in all {len(seen)} observed cells"
        raise DataError(f"{variable.name}: {found}, expected values that vary; leave the variable out")
