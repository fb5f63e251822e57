"""Tables in: files and columns to a validated `xarray.Dataset`, and from there to a tensor with NaN for missing cells.

The convention: dimension ``row``; each data variable has dims ``("row",)`` and attributes ``role``, ``support``,
``units`` (and ``lower``, ``upper`` for an interval, ``levels`` for a categorical one, ``resolution`` where values are
rounded); optional coordinates ``task`` and ``source`` on ``row``; NaN means "not measured".
"""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_invman.variables import ROLES, DataError, Variable, Variables

RESERVED = ("row", "draw", "step", "design", "task", "source")
_LABELS = ("task", "source")


def read(
    path: str | os.PathLike[str],
    roles: Mapping[str, str],
    task: str | None = None,
    source: str | None = None,
    units: Mapping[str, str] | None = None,
    supports: Mapping[str, Any] | None = None,
    *,
    resolutions: Mapping[str, float] | None = None,
    informative: Iterable[str] = (),
    **reading: Any,
) -> xr.Dataset:
    """A table of runs as a validated dataset.

    Arguments:
        path: ``.csv``, ``.xlsx``, ``.parquet``, ``.nc`` or ``.zarr``.
        roles: column to ``parameter``, ``observation`` or ``condition``. Columns without a role are left out and
            listed in ``ds.attrs["left_out"]``.
        task, source: columns that name the task and the source of each row.
        units: column to units.
        supports: column to ``"real"`` (the default), ``"positive"``, ``"categorical"`` or ``("interval", lower, upper)``.
        resolutions: column to the step its values were rounded to.
        informative: parameters and conditions that are evidence about the task, too.
        reading: handed to the pandas reader (``sep=";"``, ``decimal=","``, ``encoding=...``, ``sheet_name=...``).

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the table cannot be used as it is; the message names column, row, what was found and expected.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no table at {path}")
    columns = _columns(path, reading)
    for what, name in (("task", task), ("source", source)):
        if name is not None and name not in columns:
            raise DataError(f"{what} column {name!r} is not in {path.name}; {_close(name, columns)}")
    for what, names in (("roles", roles), ("units", units or {}), ("supports", supports or {})):
        for name in names:
            if name not in columns:
                raise DataError(f"{what}: column {name!r} is not in {path.name}; {_close(name, columns)}")
    labels = {what: columns[name] for what, name in (("task", task), ("source", source)) if name is not None}
    left_out = [name for name in columns if name not in roles and name not in (task, source)]
    ds = from_columns(
        {name: columns[name] for name in roles},
        roles=roles,
        units={name: unit for name, unit in (units or {}).items() if name in roles},
        supports={name: support for name, support in (supports or {}).items() if name in roles},
        resolutions=resolutions,
        informative=informative,
        **labels,
    )
    ds.attrs["left_out"] = left_out
    return ds


def from_columns(
    columns: Mapping[str, Any],
    roles: Mapping[str, str],
    units: Mapping[str, str] | None = None,
    supports: Mapping[str, Any] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    levels: Mapping[str, Sequence[str]] | None = None,
    task: Any = None,
    source: Any = None,
    resolutions: Mapping[str, float] | None = None,
    informative: Iterable[str] = (),
) -> xr.Dataset:
    """Columns of equal length as a validated dataset.

    Arguments:
        columns: name to values (N,); numbers with NaN for missing cells, or for a categorical variable level names
            with None, NaN or "" for missing ones.
        roles, units, supports, resolutions, informative: as in `read`; a column without a role is refused.
        bounds: interval variables to (lower, upper); instead of a support ``("interval", lower, upper)``.
        levels: categorical variables to the names of their levels; by default those that occur, sorted.
        task, source: a label a row (N,), or one for all.

    Raises:
        DataError: as `validate`.
    """
    units, supports, levels = units or {}, dict(supports or {}), levels or {}
    for name, ends in (bounds or {}).items():
        supports[name] = ("interval", *ends)
    for what, names in (("roles", roles), ("units", units), ("supports", supports), ("levels", levels),
                        ("resolutions", resolutions or {}), ("informative", informative)):  # fmt: skip
        for name in names:
            if name not in columns:
                raise DataError(f"{what}: there is no column {name!r}; {_close(name, columns)}")
    data: dict[str, Any] = {}
    length: tuple[str, int] | None = None
    for name, cells in columns.items():
        if name not in roles:
            raise DataError(f"column {name!r} has no role; expected one of {list(ROLES)}")
        array = cells.detach().cpu().numpy() if isinstance(cells, Tensor) else np.asarray(cells)
        if array.ndim != 1:
            raise DataError(f"{name}: expected one value a row, shape (N,), found shape {array.shape}")
        length = length or (name, len(array))
        if len(array) != length[1]:
            raise DataError(f"{name}: {len(array)} rows, but {length[0]} has {length[1]}")
        attrs = _attrs(name, roles[name], units.get(name, ""), supports.get(name, "real"))
        if name in levels:
            attrs["levels"] = [str(level) for level in levels[name]]
        if (resolutions or {}).get(name):
            attrs["resolution"] = float((resolutions or {})[name])
        if name in set(informative):
            attrs["informative"] = 1
        data[name] = ("row", array, attrs)
    if length is None:
        raise DataError("the table is empty: no column has a role")
    for name in data:
        if name in RESERVED:
            raise DataError(f"{name}: the name of a dimension or label; rename the column")
    coords = {}
    for what, given in (("task", task), ("source", source)):
        if given is not None:
            label = np.full(length[1], given, dtype=object) if isinstance(given, str) else np.asarray(given, dtype=object)
            if label.shape != (length[1],):
                raise DataError(f"{what}: expected one label a row, shape ({length[1]},), found shape {label.shape}")
            coords[what] = ("row", label)
    return validate(xr.Dataset(data, coords=coords))


def validate(ds: xr.Dataset, training: bool = True) -> xr.Dataset:
    """`ds`, coded: categorical columns as level numbers, labels as strings, everything else as float64.

    Arguments:
        training: also refuse what cannot be learned from: no row, a column with no observed cell, a constant column.

    Raises:
        DataError: unknown role or support, text in a numeric column, ±inf, values outside the support, unknown levels,
            blank labels, a name that is also a dimension, wrong dimensions.
    """
    if not isinstance(ds, xr.Dataset):
        raise DataError(f"expected an xarray.Dataset, found {type(ds).__name__}")
    if not ds.data_vars:
        raise DataError("the table is empty: it has no variable")
    if "row" not in ds.sizes:
        raise DataError(f"expected the dimension 'row', found {list(ds.sizes)}")
    if training and ds.sizes["row"] == 0:
        raise DataError("the table is empty: it has no row")
    coded: dict[str, Any] = {}
    for name, array in ds.data_vars.items():
        name = str(name)
        if name in RESERVED or name in ds.sizes:
            raise DataError(f"{name}: the name of a dimension or label; rename the variable")
        if array.dims != ("row",):
            raise DataError(f"{name}: expected dimensions ('row',), found {array.dims}")
        attrs = dict(array.attrs)
        if "role" not in attrs:
            raise DataError(f"{name}: has no role; set attrs['role'] to one of {list(ROLES)}")
        if attrs.get("support") == "categorical":
            cells, attrs["levels"] = _code_levels(name, array.values, attrs.get("levels"))
        else:
            cells = _numbers(name, array.values)
        variable = _variable(name, attrs)
        _check_support(variable, cells)
        if training:
            seen = cells[~np.isnan(cells)]
            if not len(seen):
                raise DataError(f"{name}: no observed cell in {len(cells)} rows; leave the column out")
            if seen.min() == seen.max():
                shown = variable.levels[int(seen[0])] if variable.discrete else f"{seen[0]:g}"
                raise DataError(f"{name}: constant, every observed cell is {shown}; there is nothing to learn, leave it out")
        coded[name] = ("row", cells, {k: v for k, v in attrs.items() if v is not None})
    coords = {}
    for what in ds.coords:
        if what == "row":
            continue
        coordinate = ds.coords[what]
        if what in _LABELS:
            if coordinate.dims != ("row",):
                raise DataError(f"{what}: expected one label a row, found dimensions {coordinate.dims}")
            coords[what] = ("row", _text(str(what), coordinate.values))
    return xr.Dataset(coded, coords=coords, attrs=ds.attrs)


def variables_of(ds: xr.Dataset) -> Variables:
    """The variables that a validated dataset declares."""
    return Variables(_variable(str(name), array.attrs) for name, array in ds.data_vars.items())


def to_tensor(ds: xr.Dataset, variables: Variables) -> Tensor:
    """Rows (N, D) in float64, in the order of `variables`; a variable that `ds` lacks is missing throughout.

    Raises:
        DataError: units differ from those of `variables`, a level was not seen before, a name is unknown, or a cell lies
            outside its support.
    """
    if "row" not in ds.sizes:
        raise DataError(f"expected the dimension 'row', found {list(ds.sizes)}")
    columns = np.full((ds.sizes["row"], len(variables)), np.nan)
    for name, array in ds.data_vars.items():
        column = variables.index(str(name))
        variable = variables[column]
        units = array.attrs.get("units", variable.units)
        if units != variable.units:
            raise DataError(f"{name}: units {units!r}, but the model was fitted with {variable.units!r}; convert the column")
        if array.dims != ("row",):
            raise DataError(f"{name}: expected dimensions ('row',), found {array.dims}")
        if variable.discrete:
            values = array.values
            own = array.attrs.get("levels")
            if own is not None and values.dtype.kind in "fiu":  # codes of this dataset's own levels
                cells, own = _code_levels(str(name), values, own)
                values = np.array([None, *own], dtype=object)[np.where(np.isnan(cells), -1, cells).astype(int) + 1]
            cells, _ = _code_levels(str(name), values, list(variable.levels))
        else:
            cells = _numbers(str(name), array.values)
        _check_support(variable, cells)
        columns[:, column] = cells
    return torch.from_numpy(columns)


def from_tensor(values: Tensor, variables: Variables, dims: Sequence[str] = ("row",)) -> xr.Dataset:
    """Cells (*dims, D) in natural units as a dataset with the attributes of `variables`."""
    array = values.detach().cpu().double().numpy()
    if array.ndim != len(dims) + 1 or array.shape[-1] != len(variables):
        raise DataError(f"values: expected shape (*{tuple(dims)}, {len(variables)}), found {array.shape}")
    return xr.Dataset(
        {v.name: (tuple(dims), array[..., j], _attrs_of(v)) for j, v in enumerate(variables)}
    )


# ---------------------------------------------------------------------------------------------- columns of a file
def _columns(path: Path, reading: dict[str, Any]) -> dict[str, np.ndarray]:
    if path.suffix in (".nc", ".zarr"):
        try:
            with (xr.open_zarr(path) if path.suffix == ".zarr" else xr.open_dataset(path)) as ds:
                ds.load()
        except (ImportError, ValueError) as error:
            raise DataError(f"{path.name}: cannot be read ({error})") from error
        flat = ds.reset_coords()
        return {str(name): array.values for name, array in flat.data_vars.items()}
    import pandas as pd

    readers = {".csv": pd.read_csv, ".xlsx": pd.read_excel, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path.name}: unknown kind of table {path.suffix!r}; expected .csv, .xlsx, .parquet, .nc or .zarr")
    if path.suffix == ".csv":
        with open(path, newline="", encoding=reading.get("encoding", "utf-8")) as file:
            header = next(csv.reader(file, delimiter=reading.get("sep", ",")), [])
        for position, name in enumerate(header):
            if name in header[:position]:
                raise DataError(f"{path.name}: two columns are named {name!r} (columns {header.index(name)} and {position})")
    try:
        table = readers[path.suffix](path, **reading)
    except ImportError as error:
        raise DataError(f"{path.name}: reading {path.suffix} needs a package that is not installed ({error})") from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path.name}: the table is empty") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path.name}: cannot be read ({error})") from error
    if not len(table):
        raise DataError(f"{path.name}: the table is empty: it has no row")
    names = [str(name) for name in table.columns]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise DataError(f"{path.name}: two columns are named {name!r}")
    return {name: table.iloc[:, j].to_numpy() for j, name in enumerate(names)}


def _close(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(map(str, known))}"


# ---------------------------------------------------------------------------------------------- cells
def _attrs(name: str, role: str, units: str, support: Any) -> dict[str, Any]:
    attrs: dict[str, Any] = {"role": role, "units": units}
    if isinstance(support, str):
        return attrs | {"support": support}
    try:
        kind, lower, upper = support
        return attrs | {"support": str(kind), "lower": float(lower), "upper": float(upper)}
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: support {support!r}; expected 'real', 'positive', 'categorical' or ('interval', lower, upper)"
        ) from error


def _attrs_of(variable: Variable) -> dict[str, Any]:
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


def _variable(name: str, attrs: Mapping[str, Any]) -> Variable:
    ends = {end: float(attrs[end]) for end in ("lower", "upper") if attrs.get(end) is not None}
    return Variable(
        name,
        role=str(attrs.get("role")),
        support=str(attrs.get("support", "real")),
        units=str(attrs.get("units", "")),
        levels=tuple(np.atleast_1d(attrs["levels"]).tolist()) if "levels" in attrs else (),
        resolution=float(attrs.get("resolution", 0.0)),
        informative=bool(attrs.get("informative", False)),
        **ends,
    )


def _numbers(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "fiub":
        cells = values.astype(np.float64)
    elif values.dtype.kind in "OUST":
        import pandas as pd

        blank = pd.isna(values)
        cells = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(np.float64)
        text = np.flatnonzero(np.isnan(cells) & ~np.asarray(blank))
        if len(text):
            row, found = int(text[0]), str(values[text[0]])
            hint = "name it categorical, or mend the cell"
            if found.replace(",", ".", 1).replace(".", "", 1).strip().lstrip("-+").isdigit() and "," in found:
                hint = 'it looks like a decimal comma: pass decimal=","'
            raise DataError(f"{name}, row {row}: found text {found!r}, expected a number; {hint}")
    else:
        raise DataError(f"{name}: cells of type {values.dtype}; expected numbers")
    infinite = np.flatnonzero(np.isinf(cells))
    if len(infinite):
        raise DataError(f"{name}, row {infinite[0]}: found {cells[infinite[0]]}, expected a finite number or NaN")
    return cells


def _text(name: str, values: np.ndarray) -> np.ndarray:
    import pandas as pd

    blank = np.flatnonzero(pd.isna(values) | (values.astype(str) == ""))
    if len(blank):
        raise DataError(f"{name}, row {blank[0]}: blank; expected the name of the {name}")
    return values.astype(str)


def _code_levels(name: str, values: np.ndarray, levels: Any) -> tuple[np.ndarray, list[str]]:
    """Cells as codes with NaN, and the names of the levels."""
    import pandas as pd

    known = None if levels is None else [str(level) for level in np.atleast_1d(levels)]
    missing = np.asarray(pd.isna(values))
    if known is not None and values.dtype.kind in "fiu":
        cells = np.where(missing, np.nan, values.astype(np.float64))
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~missing & ~((cells >= 0) & (cells < len(known)) & (cells == np.floor(cells))))
        if len(bad):
            row = int(bad[0])
            raise DataError(f"{name}, row {row}: found code {cells[row]:g}, expected 0 … {len(known) - 1} for {known}")
        return cells, known
    text = pd.Series(values, dtype=object).where(~missing, "").astype(str).str.strip()
    missing = (text == "").to_numpy()
    if known is None:
        known = sorted(text[~missing].unique())
    codes = pd.Categorical(text, categories=known).codes.astype(np.float64)
    unseen = np.flatnonzero((codes < 0) & ~missing)
    if len(unseen):
        row = int(unseen[0])
        raise DataError(f"{name}, row {row}: unseen level {text.iloc[row]!r}; known: {known}")
    codes[missing] = np.nan
    if not known:
        raise DataError(f"{name}: no observed cell in {len(values)} rows; leave the column out")
    if len(known) == 1:
        raise DataError(f"{name}: constant, every observed cell is {known[0]}; there is nothing to learn, leave it out")
    return codes, known


def _check_support(variable: Variable, cells: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        if variable.support == "positive":
            bad, expected = np.flatnonzero(cells <= 0), "a number above zero; declare it real, or ('interval', 0, …)"
        elif variable.support == "interval":
            bad = np.flatnonzero((cells < variable.lower) | (cells > variable.upper))
            expected = f"a number in [{variable.lower:g}, {variable.upper:g}]"
        else:
            return
    if len(bad):
        raise DataError(f"{variable.name}, row {bad[0]}: found {cells[bad[0]]:g}, expected {expected}")
