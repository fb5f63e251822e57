"""Tables in: files and columns to a validated `xarray.Dataset`, and from there to a tensor with NaN for missing cells.

The convention: dimension ``row``; each data variable has dims ``("row",)`` and attributes ``role``, ``support`` and
``units`` (``lower`` and ``upper`` for an interval, ``levels`` for a categorical variable, whose cells are codes,
``resolution`` where values are rounded, ``informative`` = 1); optional text coordinates ``task`` and ``source`` on
``row``; NaN means "not measured", and nothing else does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_invman import tables
from pyro_invman.variables import DataError, Variable, Variables

_LABELS = ("task", "source")
_RESERVED = ("row", "draw", *_LABELS)
_FIELDS = ("role", "support", "units", "lower", "upper", "levels", "resolution", "informative")


def read(
    path: str | os.PathLike[str],
    roles: Mapping[str, str] | None = None,
    task: str | None = None,
    source: str | None = None,
    units: Mapping[str, str] | None = None,
    supports: Mapping[str, Any] | None = None,
    *,
    levels: Mapping[str, Sequence[str]] | None = None,
    resolutions: Mapping[str, float] | None = None,
    informative: Mapping[str, bool] | None = None,
    training: bool = True,
    sep: str = ",",
    decimal: str = ".",
    encoding: str = "utf-8",
    missing: Sequence[str] = tables.MISSING,
    sheet: str | int = 0,
    columns: Mapping[str, str] | None = None,
    skip_lines: int = 0,
    units_row: bool = False,
    beside: Sequence[str] = (),
    variables: Variables | None = None,
) -> xr.Dataset:
    """A table of runs as a validated dataset; nothing about it is guessed.

    Arguments:
        path: ``.csv``, ``.tsv``, ``.xlsx``, ``.parquet``, ``.nc`` or ``.zarr``. What is said of a ``.csv`` goes for a
            ``.tsv`` too.
        roles: column to ``parameter``, ``observation`` or ``condition``. Columns without a role are left out and
            listed in ``ds.attrs["left_out"]``. A ``.nc`` or ``.zarr`` may carry roles, units and the rest as
            attributes; what is given here goes before them.
        task, source: columns that name the task and the source of each row, read as text.
        units: column to units.
        supports: column to ``"real"`` (default), ``"positive"``, ``"categorical"`` or ``("interval", lower, upper)``.
        levels: categorical column to the names of its levels, in order; by default those that occur, sorted.
        resolutions: column to the step its values were rounded to (1 for counts).
        informative: column to whether, though set by someone, it is evidence about the task.
        training: also refuse what cannot be learned from; see `validate`.
        sep, decimal, encoding: of a ``.csv``; one character each for the first two. The decimal mark also goes for
            numbers that are text in an ``.xlsx``.
        missing: texts that mean "not measured" in a ``.csv`` or ``.xlsx``.
        sheet: name or position of the sheet of an ``.xlsx``.
        columns: header as it is in the table to the name that everything else goes by.
        skip_lines: lines above the header of a ``.csv`` (blank ones not counted) or ``.xlsx``.
        units_row: the line under the header of one of these holds units, taken where `units` says nothing.
        beside: columns to keep as coordinates on ``row``, as they are.
        variables: of a model. They say what `roles`, `units`, `supports`, `levels` and the rest would; of them, and of
            `columns`, `task`, `source` and `beside`, the table need not have all.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the table cannot be used as it is; the message names column, row (counted from 0, without the
            header), what was found and what was expected.

    Example::

        >>> import pathlib, tempfile
        >>> table = pathlib.Path(tempfile.mkdtemp(), "runs.csv")
        >>> _ = table.write_text("power_W,depth_um,operator\\n200,84,ann\\n250,,bob\\n300,120,ann\\n")
        >>> ds = read(table, roles={"power_W": "parameter", "depth_um": "observation"}, units={"power_W": "W"})
        >>> ds["depth_um"].values
        array([ 84.,  nan, 120.])
        >>> ds.attrs["left_out"]
        ['operator']
    """
    path = Path(path)
    kind = tables.kind_of(path)
    renamed = {str(header): str(name) for header, name in (columns or {}).items()}
    labels: dict[str, Any] = {"task": task, "source": source}
    text = {column for column in (task, source) if column is not None}
    if isinstance(supports, Mapping):
        text |= {column for column, support in supports.items() if support == "categorical"}
    text |= {v.name for v in variables or () if v.discrete}
    text |= {header for header, name in renamed.items() if name in text}
    stated: dict[str, str] = {}
    stored: dict[str, dict[str, Any]] = {}
    attrs: dict[str, Any] = {}
    try:
        if kind in (".nc", ".zarr"):
            found, stored, attrs = _stored_columns(path, kind)
        elif kind == ".parquet":
            found = tables.parquet_columns(path, text)
        elif kind == ".xlsx":
            found = tables.xlsx_columns(path, missing, sheet, decimal, skip_lines, units_row)
            stated = dict(zip(*tables.xlsx_head(path, sheet, skip_lines, units_row), strict=False))
        else:
            found = tables.csv_columns(path, text, missing, sep, decimal, encoding, skip_lines, units_row)
            stated = dict(zip(*tables.csv_head(path, sep, encoding, skip_lines, units_row), strict=False))
    except UnicodeDecodeError as error:
        how = "pass its encoding= (on the command line, --encoding), often 'latin1'"
        raise DataError(f"{path}: not {encoding} text ({error}); {how}") from error
    except (DataError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a reader raises anything at all on a damaged file
        raise DataError(f"{path}: cannot be read as {kind}: {error}") from error
    index = {"row": found.pop("row")} if "row" in stored else {}
    absent = [header for header in renamed if header not in found] if variables is None else []
    if absent:
        raise DataError(f"columns: no column {absent[0]!r}; {tables.suggest(absent[0], found)}")
    tables.refuse_duplicates(f"{path}, renamed", [renamed.get(name, name) for name in found])
    found = {renamed.get(name, name): cells for name, cells in found.items()}
    stored = {renamed.get(name, name): fields for name, fields in stored.items()}
    stated = {renamed.get(name, name): cell for name, cell in stated.items()}
    if variables is not None:
        labels = {label: column if column in found else None for label, column in labels.items()}
        beside = [name for name in beside if name in found]
        stored |= {v.name: _attrs(v) | stored.get(v.name, {}) for v in variables if v.name in found}
        roles = {v.name: v.role for v in variables if v.name in found}
        if not roles:
            raise DataError(f"{path}: found columns {list(found)}, expected some of {list(variables.names)}")
    if roles is None and not any("role" in fields for fields in stored.values()):
        raise DataError(f"roles: {path.name} says nothing about roles; name some of {list(found)}")
    for label in _LABELS:
        if labels[label] is None:
            labels[label] = label if label in stored and stored[label].get("coordinate") else None
        elif labels[label] not in found:
            raise DataError(f"{label}: no column {labels[label]!r}; {tables.suggest(labels[label], found)}")
    if variables is None:
        units = {name: stated[name] for name in roles or () if stated.get(name)} | dict(units or {})
    fields = _declared(found, stored, roles, units, supports, None, levels, resolutions, informative)
    for name in beside:
        if name not in found:
            raise DataError(f"beside: no column {name!r}; {tables.suggest(name, found)}")
    used = {*fields, *(label for label in labels.values() if label is not None), *beside}
    attrs["left_out"] = _texts(attrs.get("left_out", [])) + [name for name in found if name not in used]
    coords = index | {label: found[column] for label, column in labels.items() if column is not None}
    coords |= {name: found[name] for name in beside if name not in fields}
    return validate(_dataset({name: found[name] for name in fields}, fields, coords, attrs), training)


def from_columns(
    columns: Mapping[str, Any] | pd.DataFrame,
    roles: Mapping[str, str],
    units: Mapping[str, str] | None = None,
    supports: Mapping[str, Any] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    levels: Mapping[str, Sequence[str]] | None = None,
    task: Any = None,
    source: Any = None,
    resolutions: Mapping[str, float] | None = None,
    informative: Mapping[str, bool] | None = None,
    training: bool = False,
) -> xr.Dataset:
    """Columns of one length as a validated dataset.

    Arguments:
        columns: name to cells (N,): numbers with NaN where not measured; for a categorical variable the names of
            levels with None, NaN or "" where not measured or, if `levels` are given, their codes.
        roles, units, supports, levels, resolutions, informative: as in `read`.
        bounds: name to (lower, upper), for a variable whose support is given as plain ``"interval"``.
        task, source: a label for each row (N,), or one for all.
        training: also refuse what cannot be learned from; see `validate`.

    Raises:
        DataError: lengths that differ, unknown names, and all that `validate` refuses.

    Example::

        >>> ds = from_columns(
        ...     {"power_W": [200, 250, 300], "mode": ["keyhole", "", "lack of fusion"]},
        ...     roles={"power_W": "parameter", "mode": "observation"},
        ...     supports={"power_W": "positive", "mode": "categorical"},
        ... )
        >>> ds["mode"].values, ds["mode"].attrs["levels"]
        (array([ 0., nan,  1.]), ['keyhole', 'lack of fusion'])
    """
    tables.refuse_duplicates("columns", list(columns))
    fields = _declared(columns, {}, roles, units, supports, bounds, levels, resolutions, informative)
    coords = {label: cells for label, cells in (("task", task), ("source", source)) if cells is not None}
    left_out = [name for name in columns if name not in fields]
    used = {name: columns[name] for name in fields}
    return validate(_dataset(used, fields, coords, {"left_out": left_out}), training)


def validate(ds: xr.Dataset, training: bool = True) -> xr.Dataset:
    """`ds` in normal form: float64 cells, codes for named levels, text labels; itself where it already is.

    Arguments:
        training: also refuse what cannot be learned from: no row, a variable with no observed cell, a constant one.

    Raises:
        DataError: wrong dimensions, a name that is also a dimension, unknown role or support, text in a numeric
            variable, ±inf, values outside the support, codes or names that are not among the levels, blank labels.
    """
    if not isinstance(ds, xr.Dataset):
        found = f"found {type(ds).__name__}"
        raise DataError(f"data: {found}, expected an xarray.Dataset; `read` and `from_columns` make one")
    if not ds.data_vars:
        raise DataError("data: found no variable, expected at least one; give a role to some column")
    _check_shape(ds)
    if training and ds.sizes["row"] == 0:
        raise DataError("data: found an empty table (no row), expected rows to learn from")
    normal: dict[str, Any] = {}
    for key, array in ds.data_vars.items():
        name = str(key)
        cells, levels = _cells(name, array)
        variable = _variable(name, array.attrs, levels)
        tables.check_support(variable, cells)
        if training:
            tables.check_varies(variable, cells)
        others = {field: value for field, value in array.attrs.items() if field not in _FIELDS}
        normal[name] = ("row", cells, others | _attrs(variable))
    labels = {label: ("row", tables.labels(label, ds[label].values)) for label in _LABELS if label in ds.coords}
    result = ds.assign(normal).assign_coords(labels)
    if "left_out" in ds.attrs:
        result.attrs["left_out"] = _texts(ds.attrs["left_out"])
    return ds if result.identical(ds) and all(v.dtype == ds[n].dtype for n, v in result.items()) else result


def variables_of(ds: xr.Dataset) -> Variables:
    """The variables of a dataset, in its order.

    Raises:
        DataError: a role, a support or the levels of a variable are missing or wrong.
    """
    _check_shape(ds)
    return Variables(
        _variable(str(name), array.attrs, _cells(str(name), array)[1]) for name, array in ds.data_vars.items()
    )


def to_tensor(ds: xr.Dataset, variables: Variables) -> Tensor:
    """The cells (N, D) of `ds` in float64, columns in the order of `variables`, NaN where not measured.

    A variable that `ds` lacks is missing in every row. Levels are matched by name.

    Raises:
        DataError: a variable that is not among `variables`, units that differ from theirs, a category that they do not
            know, and all that `validate` refuses outside training.
    """
    _check_shape(ds)
    values = np.full((ds.sizes["row"], len(variables)), np.nan)
    for key, array in ds.data_vars.items():
        column = variables.index(str(key))
        variable = variables[column]
        units = str(array.attrs.get("units", ""))
        if units != variable.units:
            expected = f"expected {variable.units!r}, as when fitted"
            raise DataError(f"{variable.name}: found units {units!r}, {expected}; convert the column and its units")
        if variable.discrete:
            cells = tables.codes(variable.name, _level_names(variable.name, array), variable.levels)[0]
        else:
            cells = tables.numbers(variable.name, array.values)
        tables.check_support(variable, cells)
        values[:, column] = cells
    return torch.from_numpy(values)


def labels_of(ds: xr.Dataset, label: str) -> list[str] | None:
    """The `label` ("task" or "source") of each row as text, None where `ds` has none."""
    return list(map(str, tables.labels(label, ds[label].values))) if label in ds.coords else None


def from_tensor(values: Tensor, variables: Variables, dims: Sequence[str] = ("row",)) -> xr.Dataset:
    """Cells (*dims, D) in natural units as a dataset over `dims`.

    Raises:
        DataError: the shape of `values` does not fit `dims` and `variables`.
    """
    if values.dim() != len(dims) + 1 or values.shape[-1] != len(variables):
        expected = f"({', '.join((*dims, str(len(variables))))})"
        raise DataError(f"values: found shape {tuple(values.shape)}, expected {expected}")
    cells = values.detach().cpu().double().numpy()
    return xr.Dataset({v.name: (tuple(dims), cells[..., column], _attrs(v)) for column, v in enumerate(variables)})


# ------------------------------------------------------------------------------------------------ files
def _stored_columns(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    # times are left as numbers: units of "s" or "days" are no reason to turn a column into dates
    how: dict[str, Any] = {"engine": "netcdf4", "decode_times": False, "decode_timedelta": False}
    if kind == ".zarr":
        how |= {"engine": "zarr", "consolidated": False}
    with xr.open_dataset(path, **how) as opened:
        ds = opened.load()
    # Zarr lists its arrays in no order, and what is fitted to them should not depend on that
    names = sorted(map(str, ds.variables)) if kind == ".zarr" else [str(name) for name in ds.variables]
    columns = {name: ds.variables[name] for name in names}
    fields = {name: dict(array.attrs) | {"coordinate": name in ds.coords} for name, array in columns.items()}
    return columns, fields, dict(ds.attrs)


# ------------------------------------------------------------------------------------------------ declarations
def _declared(
    columns: Iterable[str],
    stored: Mapping[str, Mapping[str, Any]],
    roles: Mapping[str, str] | None,
    units: Mapping[str, str] | None,
    supports: Mapping[str, Any] | None,
    bounds: Mapping[str, tuple[float, float]] | None,
    levels: Mapping[str, Sequence[str]] | None,
    resolutions: Mapping[str, float] | None,
    informative: Mapping[str, bool] | None,
) -> dict[str, dict[str, Any]]:
    """What is said of each column that has a role, stored and given."""
    known = list(columns)
    if roles is None:
        roles = {name: fields["role"] for name, fields in stored.items() if "role" in fields}
    given: dict[str, Mapping[str, Any]] = {}
    for argument, mapping in (
        ("roles", roles), ("units", units), ("supports", supports), ("bounds", bounds), ("levels", levels),
        ("resolutions", resolutions), ("informative", informative),
    ):  # fmt: skip
        given[argument] = {} if mapping is None else mapping
        if not isinstance(given[argument], Mapping):
            found = f"found {type(mapping).__name__}"
            raise DataError(f"{argument}: {found}, expected a mapping from column to what is said of it")
        for name in given[argument]:
            if name not in known:
                raise DataError(f"{argument}: no column {name!r}; {tables.suggest(name, known)}")
    result = {}
    for name, role in roles.items():
        if name in _RESERVED:
            raise DataError(f"{name}: the name of a dimension or label, and so none for a variable; rename the column")
        fields = {field: value for field, value in stored.get(name, {}).items() if field != "coordinate"}
        fields["role"] = role
        if name in given["supports"]:
            fields = {f: v for f, v in fields.items() if f not in ("support", "lower", "upper", "levels")}
            fields |= _support(name, given["supports"][name])
        if name in given["bounds"]:
            fields |= _support(name, ("interval", *given["bounds"][name])) | {"support": fields.get("support")}
        for argument, field in (
            ("units", "units"), ("levels", "levels"), ("resolutions", "resolution"), ("informative", "informative"),
        ):  # fmt: skip
            if name in given[argument]:
                fields[field] = given[argument][name]
        result[name] = fields
    return result


def _support(name: str, support: Any) -> dict[str, Any]:
    if isinstance(support, str):
        return {"support": support}
    try:
        kind, lower, upper = support
    except (TypeError, ValueError):
        expected = "expected 'real', 'positive', 'categorical' or ('interval', lower, upper)"
        raise DataError(f"{name}: found support {support!r}, {expected}") from None
    return {"support": kind, "lower": lower, "upper": upper}


def _variable(name: str, attrs: Mapping[str, Any], levels: Sequence[str]) -> Variable:
    if "role" not in attrs:
        expected = "expected 'parameter', 'observation' or 'condition' in its attrs['role']"
        raise DataError(f"{name}: found no role, {expected}; set it or drop the variable")
    fields = {field: attrs[field] for field in _FIELDS if attrs.get(field) is not None and field != "levels"}
    if attrs.get("support") == "categorical" and not levels:
        found = "found no observed cell and no declared levels, expected some"
        raise DataError(f"{name}: {found}; declare its levels or leave the variable out")
    return Variable(name, levels=tuple(levels), **fields)


def _attrs(variable: Variable) -> dict[str, Any]:
    """What NetCDF and Zarr can hold: no None, no truth values, no empty list."""
    attrs: dict[str, Any] = {"role": variable.role, "support": variable.support, "units": variable.units}
    if variable.support == "interval":
        attrs |= {"lower": variable.lower, "upper": variable.upper}
    if variable.discrete:
        attrs["levels"] = list(variable.levels)
    if variable.resolution:
        attrs["resolution"] = variable.resolution
    if variable.informative:
        attrs["informative"] = 1
    return attrs


def _dataset(
    columns: Mapping[str, Any], fields: Mapping[str, Any], labels: Mapping[str, Any], attrs: Mapping[str, Any]
) -> xr.Dataset:
    data = {name: ("row", _array(name, cells), fields[name]) for name, cells in columns.items()}
    first = next(iter(data), None)
    rows = len(data[first][1]) if first is not None else 0
    for name, (_, cells, _) in data.items():
        if len(cells) != rows:
            raise DataError(f"{name}: found {len(cells)} rows, expected {rows}, as in {first}")
    coords = {}
    for label, cells in labels.items():
        names = np.full(rows, cells, dtype=object) if isinstance(cells, str) else _array(label, cells)
        if len(names) != rows:
            raise DataError(f"{label}: found {len(names)} labels, expected {rows}, one for each row")
        coords[label] = ("row", names)
    return xr.Dataset(data, coords=coords, attrs=dict(attrs))


def _texts(attribute: Any) -> list[str]:
    """A list of text, of which NetCDF gives the text itself where there is one."""
    return [str(item) for item in np.atleast_1d(np.asarray(attribute, dtype=object))]


# ------------------------------------------------------------------------------------------------ cells
def _check_shape(ds: xr.Dataset) -> None:
    if "row" not in ds.dims:
        raise DataError(f"data: found dimensions {list(ds.sizes)}, expected 'row'; rename the one that counts rows")
    for name in (*ds.data_vars, *(label for label in _LABELS if label in ds.coords)):
        array = ds[name]
        if name in ds.data_vars and (name in _RESERVED or name in ds.dims):
            raise DataError(f"{name}: the name of a dimension or label, and so none for a variable; rename it")
        if array.dims != ("row",):
            found = f"found dimensions {array.dims} of sizes {array.shape}"
            raise DataError(f"{name}: {found}, expected ('row',), one cell for each row")


def _array(name: str, cells: Any) -> np.ndarray:
    """Cells (N,) of any make as an array."""
    if isinstance(cells, xr.Variable) and cells.dims != ("row",):
        raise DataError(f"{name}: found dimensions {cells.dims}, expected ('row',), one cell for each row")
    return tables.column(name, cells.detach().cpu().numpy() if isinstance(cells, Tensor) else cells)


def _cells(name: str, array: xr.DataArray) -> tuple[np.ndarray, list[str]]:
    """Cells as float64 with NaN, and the levels that they are codes of; numbers are codes if levels are declared."""
    levels = _texts(array.attrs["levels"]) if "levels" in array.attrs else None
    if array.attrs.get("support") != "categorical":
        return tables.numbers(name, array.values), levels or []
    if levels is not None and array.dtype.kind in "fiu":
        return tables.check_codes(name, array.values, levels), levels
    return tables.codes(name, array.values, levels)


def _level_names(name: str, array: xr.DataArray) -> np.ndarray:
    """Cells of a categorical variable as names, None where missing."""
    if "levels" not in array.attrs or array.dtype.kind not in "fiu":
        return array.values
    levels = _texts(array.attrs["levels"])
    cells = tables.check_codes(name, array.values, levels)
    return np.array([*levels, None], dtype=object)[np.where(np.isnan(cells), -1, cells).astype(int)]
