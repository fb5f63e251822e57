"""``describe TABLE``: what is in a table, what it likely means, and a first project file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyro_invman import tables
from pyro_invman.cli.dialect import Dialect, RawTable, guess_dialect, guess_sheet, raw_table
from pyro_invman.cli.guesses import Guess, column_of, guess_roles
from pyro_invman.cli.printed import answer, say, table
from pyro_invman.cli.project import NAME, Project
from pyro_invman.variables import DataError

_LABELLED = (".nc", ".zarr")
_MOST = 12


def describe(arguments: argparse.Namespace) -> None:
    """Reads a table raw, guesses, prints what was found and writes the first project file."""
    path = Path(arguments.table)
    out = Path(arguments.out) if arguments.out else path.parent / NAME
    kind = tables.kind_of(path)
    if kind in _LABELLED:
        raise DataError(f"{path}: a {kind} says itself what it holds, in attributes; `fit` reads it as it is")
    if out.exists() and not (arguments.force or arguments.look):
        raise DataError(f"{out} exists already and is kept; --force writes it anew, --look only prints what would be")
    sheet = arguments.sheet if arguments.sheet is not None else 0
    dialect = None
    if kind in tables.WRITTEN:
        dialect = guess_dialect(path, arguments.sep, arguments.decimal, arguments.encoding)
    elif kind == ".xlsx":
        dialect = guess_sheet(path, sheet, arguments.decimal)
    raw = raw_table(path, dialect, sheet)
    if not raw.line_numbers:
        raise DataError(f"{path}: found names and no row, expected rows of cells")
    decimal = dialect.decimal if dialect is not None else "."
    columns = [column_of(name, cells, decimal, raw.units.get(name, "")) for name, cells in raw.columns.items()]
    guess = guess_roles(columns)
    project = project_from(guess, dialect, sheet)
    if not arguments.look:
        out.write_text(project.to_toml(_notes(guess, dialect)), encoding="utf-8")
        say(f"wrote {out}")
    report = _report(path, raw, guess, dialect, project)
    answer(report, arguments.json, lambda: _text(path, out, report, arguments.prog))


def project_from(guess: Guess, dialect: Dialect | None, sheet: str | int = 0) -> Project:
    """The project that guesses amount to."""
    used = [c for c in guess.columns if c.role]
    labels = [c for c in guess.columns if c.name in (guess.task, guess.source)]
    blanks = [text for column in used for text in column.blanks if text not in tables.MISSING]
    written = {} if dialect is None else {k: getattr(dialect, k) for k in Dialect._fields if k != "reasons"}
    return Project(
        task=guess.task,
        source=guess.source,
        **written,
        missing=(*tables.MISSING, *dict.fromkeys(blanks)),
        sheet=sheet,
        columns={c.header: c.name for c in (*labels, *used) if c.header != c.name},
        roles={c.name: str(c.role) for c in used},
        supports={c.name: c.support for c in used if c.support != "real"},
        units={c.name: c.units for c in used if c.units},
        resolutions={c.name: c.resolution for c in used if c.resolution},
    )


def _notes(guess: Guess, dialect: Dialect | None) -> dict[str, str]:
    notes = dict(dialect.reasons) if dialect is not None else {}
    notes = {key: reason for key, reason in notes.items() if reason} | dict(guess.why)
    for column in guess.columns:
        if column.name in (guess.task, guess.source):
            continue
        doubt = "DECIDE: " if "role" in column.doubt else ""
        notes[f"roles.{column.name if column.role else column.header}"] = f"{doubt}{column.why.get('role', '')}"
        if column.role:
            for part, where in (("support", "supports"), ("units", "units"), ("resolution", "resolutions")):
                if part in column.why and (part != "resolution" or column.resolution):
                    notes[f"{where}.{column.name}"] = column.why[part]
    return notes


def _report(path: Path, raw: RawTable, guess: Guess, dialect: Dialect | None, project: Project) -> dict[str, Any]:
    used_as = {guess.task: "task", guess.source: "source"}
    columns = [
        {
            "header": c.header,
            "name": c.name,
            "role": used_as.get(c.name) or c.role or "left out",
            "units": c.units,
            "support": c.support if c.role else "",
            "measured": c.cells - c.missing - len(c.wrong),
            "missing": c.missing,
            "range": c.range,
        }
        for c in guess.columns
    ]
    rows = len(raw.line_numbers)
    cells = rows * max(1, len(project.roles))
    missing = sum(c.missing for c in guess.columns if c.role)
    return {
        "table": str(path),
        "rows": rows,
        "blank_lines": raw.blank_lines,
        "repeated": _repeated(raw),
        "missing_share": missing / cells,
        "written": None if dialect is None else {k: getattr(dialect, k) for k in Dialect._fields if k != "reasons"},
        "task": guess.task,
        "source": guess.source,
        "columns": columns,
        "guessed": [f"{name}: {note}" for name, note in _notes(guess, dialect).items()],
        "decide": [c.name for c in guess.columns if "role" in c.doubt and c.role],
        "to_mend": [
            {"column": c.header, "row": row, "line": raw.line_numbers[row], "found": text}
            for c in guess.columns
            if c.role
            for row, text in c.wrong
        ],
    }


def _repeated(raw: RawTable) -> list[dict[str, int]]:
    """Rows that are, cell by cell, an earlier one."""
    first: dict[tuple[str, ...], int] = {}
    found = []
    for row, cells in enumerate(zip(*raw.columns.values(), strict=True)):
        if any(cells) and first.setdefault(cells, row) != row:
            found.append({"row": row, "line": raw.line_numbers[row], "line_of_first": raw.line_numbers[first[cells]]})
    return found


def _text(path: Path, out: Path, report: dict[str, Any], prog: str) -> str:
    written = report["written"]
    how = ""
    if written is not None and path.suffix.lower() in tables.WRITTEN:
        marks = f"{written['separator']!r} between cells, decimal mark {written['decimal']!r}"
        how = f"; {written['encoding']}, {marks}"
    blank = f", {report['blank_lines']} lines blank" if report["blank_lines"] else ""
    parts = [
        f"{path}: {report['rows']} rows{blank}, {report['missing_share']:.0%} of the used cells missing{how}",
        "",
        table(report["columns"]),
        "",
        "What was guessed, and why:",
        *(f"  {line}" for line in report["guessed"]),
    ]
    if report["repeated"]:
        count, one = len(report["repeated"]), report["repeated"][0]
        rows = "1 row is" if count == 1 else f"{count} rows are"
        where = f"line {one['line']} is line {one['line_of_first']}"
        parts += ["", f"{rows} an earlier one cell by cell ({where}); each counts, so take copies out of the table"]
    if report["to_mend"]:
        parts += ["", "Cells that are no numbers, which `fit` refuses (rows count from 0, without the header):"]
        parts += _to_mend(report["to_mend"])
    todo = f"check {out}" if not report["decide"] else f"in {out}, decide on {', '.join(report['decide'])}"
    return "\n".join([*parts, "", f"Next: {todo}; then  {prog} fit {path} --out model"])


def _to_mend(cells: list[dict[str, Any]]) -> list[str]:
    """Cells that were found alike in a column on one line, with what to do about them."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        alike.setdefault((cell["column"], cell["found"]), []).append(cell)
    lines = []
    for (column, found), each in alike.items():
        where = ", ".join(f"row {cell['row']} (line {cell['line']})" for cell in each[:3])
        more = f" and {len(each) - 3} more" if len(each) > 3 else ""
        lines.append(f"  {column}, {where}{more}: {found!r}; {tables.what_to_do(found)}")
    return lines if len(lines) <= _MOST else [*lines[:_MOST], f"  and {len(lines) - _MOST} more kinds"]
