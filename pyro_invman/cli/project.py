"""The project file: what is said of a table, typed once."""

from __future__ import annotations

import argparse
import csv
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_invman import tables
from pyro_invman.cli.printed import say
from pyro_invman.cli.typed import pairs
from pyro_invman.data import read
from pyro_invman.variables import DataError, Variables

if TYPE_CHECKING:
    import xarray as xr

NAME = "invman.toml"
_TABLES = {
    "columns": "header in the table = name that everything else goes by",
    "roles": "parameter (set, or wanted), observation (measured), condition (the circumstances)",
    "supports": "real (if nothing is said), positive, categorical, interval:LOWER:UPPER",
    "units": "free text",
    "levels": "names of the levels of a categorical column, in order; those that occur if nothing is said",
    "resolutions": "the step to which values were rounded when recorded",
    "informative": "true: evidence about the task, though it was set",
}


@dataclass(frozen=True)
class Project:
    """What is said of a table: how it is written, which columns are used, and what they are."""

    task: str | None = None
    source: str | None = None
    separator: str = ","
    decimal: str = "."
    encoding: str = "utf-8"
    missing: Sequence[str] = tables.MISSING
    skip_lines: int = 0
    units_row: bool = False
    sheet: str | int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    supports: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    levels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    resolutions: Mapping[str, float] = field(default_factory=dict)
    informative: Mapping[str, bool] = field(default_factory=dict)

    def dataset(
        self,
        table: str | Path,
        variables: Variables | None = None,
        *,
        beside: Sequence[str] = (),
        training: bool = True,
        labels: bool = True,
    ) -> xr.Dataset:
        """A table as this project says, or as the variables of a model."""
        said: dict[str, Any] = {}
        skip_lines, units_row = self.skip_lines, self.units_row
        if variables is not None and Path(table).is_file():
            skip_lines, units_row = self._above(Path(table), variables)
        if variables is None:
            # a file that carries roles needs none here
            said = {name: getattr(self, name) or None for name in ("roles", "units", "levels")}
            said |= {"resolutions": self.resolutions or None, "informative": self.informative or None}
            said["supports"] = {name: support_of(name, text) for name, text in self.supports.items()}
        return read(
            table,
            task=self.task if labels else None,
            source=self.source if labels else None,
            sep=self.separator,
            decimal=self.decimal,
            encoding=self.encoding,
            missing=self.missing,
            skip_lines=skip_lines,
            units_row=units_row,
            sheet=self.sheet,
            columns=self.columns,
            beside=beside,
            variables=variables,
            training=training,
            **said,
        )

    def _above(self, table: Path, variables: Variables) -> tuple[int, bool]:
        """Lines above the header of a new table, and whether units stand below it: no more than in the table that was
        learned from, as a new one may lack them. The header is known by its names."""
        kind, head = table.suffix.lower(), list[list[str]]()
        if kind in tables.WRITTEN:
            head = list(islice(tables.csv_lines(table, self.separator, self.encoding), self.skip_lines + 2))
        elif kind == ".xlsx":
            rows = tables.sheet_rows(table, self.sheet).head(self.skip_lines + 2).to_numpy().tolist()
            head = [[tables.as_written(cell, self.decimal) for cell in row] for row in rows]
        if not (self.skip_lines or self.units_row) or not head:
            return 0, False
        known = {*self.columns, *variables.names}
        numeric = {v.name for v in variables if not v.discrete}
        named = (n for n, line in enumerate(head[: self.skip_lines + 1]) if known & {cell.strip() for cell in line})
        skip = next(named, self.skip_lines)
        if not self.units_row or len(head) < skip + 2:
            return skip, False
        names = [self.columns.get(cell.strip(), cell.strip()) for cell in head[skip]]
        over = [cell.strip() for name, cell in zip(names, head[skip + 1], strict=False) if name in numeric]
        told = [cell for cell in over if cell not in self.missing]
        return skip, bool(told) and not any(re.fullmatch(r"[-+]?[\d.,]+([eE][-+]?\d+)?", cell) for cell in told)

    def write_csv(self, path: str | Path, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Rows as a .csv that this project reads as rows for a model."""
        with open(path, "w", newline="", encoding=self.encoding) as file:
            writer = csv.writer(file, delimiter=self.separator, lineterminator="\n")
            writer.writerow(heads)
            writer.writerows([self._written(cell) for cell in row] for row in rows)

    def _written(self, cell: Any) -> str:
        if isinstance(cell, float):
            return "" if cell != cell else f"{cell:.8g}".replace(".", self.decimal)
        return "" if cell is None else str(cell)

    def to_toml(self, notes: Mapping[str, str] | None = None) -> str:
        """The project as a file; `notes` are remarks by key, or by "table.key"."""
        notes = notes or {}
        lines = [
            "# What invman knows of this table. Change what is wrong; lines that say DECIDE are guesses from little."
        ]
        default = Project()
        for key in _PLAIN:
            value = getattr(self, key)
            if value != getattr(default, key):
                lines.append(f"{key} = {_toml(value)}{_remark(notes.get(key))}")
            elif key in notes:
                lines.append(f"# {key}: {notes[key]}")
        for name, meaning in _TABLES.items():
            entries = getattr(self, name)
            if not entries and not any(key.startswith(f"{name}.") for key in notes):
                continue
            lines += ["", f"[{name}]  # {meaning}"]
            lines += [
                f"{_key(key)} = {_toml(value)}{_remark(notes.get(f'{name}.{key}'))}" for key, value in entries.items()
            ]
            named = {key.removeprefix(f"{name}."): note for key, note in notes.items() if key.startswith(f"{name}.")}
            lines += [f"# {_key(key)}: {note}" for key, note in named.items() if key not in entries]
        return "\n".join(lines) + "\n"


_PLAIN = tuple(each.name for each in fields(Project) if each.name not in _TABLES)


def _remark(note: str | None) -> str:
    return f"  # {note}" if note else ""


def _key(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else json.dumps(text, ensure_ascii=False)


def _toml(value: Any) -> str:
    # JSON and TOML write text, numbers, truth and lists of them alike
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def support_of(name: str, text: Any) -> Any:
    """A support as `read` takes it.

    Raises:
        DataError: an interval without two numbers.
    """
    kind, *ends = str(text).split(":")
    if kind != "interval":
        return text
    try:
        lower, upper = map(float, ends)
    except ValueError as error:
        raise DataError(f"--supports {name}: found {text!r}, expected interval:LOWER:UPPER") from error
    return ("interval", lower, upper)


# ---------------------------------------------------------------------------------------------- from a file
def load_project(path: str | Path) -> Project:
    """The project in a file.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is no TOML, or holds keys or kinds of value that mean nothing here.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no project file at {path}; `describe TABLE` writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a TOML file ({error})") from error
    default = asdict(Project())
    for key, value in found.items():
        if key not in default:
            raise DataError(f"{path}: found the key {key!r}; {tables.suggest(key, default)}")
        kinds = {"missing": list, "sheet": (str, int), "task": str, "source": str}
        expected = kinds.get(key, dict if key in _TABLES else type(default[key]))
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):  # type: ignore[arg-type]
            names = expected.__name__ if isinstance(expected, type) else "text or a number"
            raise DataError(f"{path}: found {key} = {value!r}, expected {_KINDS.get(names, names)}")
    return Project(**found)


_KINDS = {
    "dict": "a table [...]",
    "str": "text in quotes",
    "int": "a whole number",
    "bool": "true or false",
    "list": "a list",
}


def project_file(arguments: argparse.Namespace) -> Path | None:
    """The project file that a command goes by: the one named, else the one beside the table or in this folder."""
    if arguments.project:
        return Path(arguments.project)
    for folder in dict.fromkeys((Path(arguments.table).parent, Path())):
        if (folder / NAME).is_file():
            say(f"roles, units and the rest as {folder / NAME} says (--project names another)")
            return folder / NAME
    return None


def project_for(arguments: argparse.Namespace) -> Project:
    """What the project file says of a table that is learned from, and then the options."""
    path = project_file(arguments)
    return with_options(load_project(path) if path else Project(), arguments)


def project_of(arguments: argparse.Namespace, model: str | Path) -> Project:
    """How new tables for a model are written: as the one that it was fitted to, if nothing else is said."""
    if arguments.project:
        return with_options(load_project(arguments.project), arguments)
    kept = Path(model) / NAME
    return with_options(load_project(kept) if kept.is_file() else Project(), arguments)


def with_options(project: Project, arguments: argparse.Namespace) -> Project:
    """The project, with what is said by options in place of what it says."""
    said = vars(arguments)
    plainly = {
        "separator": said.get("sep"),
        "decimal": said.get("decimal"),
        "encoding": said.get("encoding"),
        "sheet": said.get("sheet"),
        "task": said.get("task"),
        "source": said.get("source"),
        "missing": said["missing"].split(",") if said.get("missing") is not None else None,
    }
    project = replace(project, **{key: value for key, value in plainly.items() if value is not None})
    return replace(
        project,
        roles={**project.roles, **pairs(said.get("roles"), "roles")},
        supports={**project.supports, **pairs(said.get("supports"), "supports")},
        units={**project.units, **pairs(said.get("units"), "units")},
    )
