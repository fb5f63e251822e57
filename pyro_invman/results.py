"""What comes back from learning, as labelled arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_invman.training import Record
from pyro_invman.variables import ROLES, Variable, Variables

_MEANING = {
    "train_loss": ("mean loss of the batches since the last evaluation", "nat"),
    "validation_loss": ("loss of the averaged weights on held-out rows", "nat"),
    "learning_rate": ("learning rate", ""),
    "seconds": ("wall time since the start", "s"),
}


def history_dataset(
    records: Sequence[Record],
    attrs: Mapping[str, Any],
    links: tuple[Variables, Tensor] | None = None,
    rounds: Sequence[int] | None = None,
) -> xr.Dataset:
    """The history of a fit over ``step``, with `attrs` as its attributes.

    Coordinates beside it: with `links` (variables, and how many rows show each pair of them, (D, D)) these; with
    `rounds` the round of completion that each record belongs to, 0 before the first.
    """
    beside: dict[str, Any] = {}
    if links is not None:
        meaning = {"long_name": "rows that show both variables"}
        beside = {dim: list(links[0].names) for dim in ("variable", "other")}
        beside["links"] = (("variable", "other"), links[1].cpu().numpy(), meaning)
    if rounds is not None:
        beside["round"] = (
            "step",
            np.array(rounds, dtype=int),
            {"long_name": "round of completion, 0 before the first"},
        )
    columns = np.array(records, dtype=float).reshape(len(records), len(Record._fields)).T
    named = dict(zip(Record._fields, columns, strict=True))
    step = named.pop("step").astype(int)
    return xr.Dataset(
        {
            name: ("step", values, dict(zip(("long_name", "units"), _MEANING[name], strict=True)))
            for name, values in named.items()
        },
        coords={"step": step} | beside,
        attrs=dict(attrs),
    )


def outlier_dataset(variables: Variables, evidence: Sequence[int], rows: Tensor, probability: Tensor) -> xr.Dataset:
    """Probabilities (N, D) that cells of rows (N, D) are gross errors, over ``row``, for columns of `evidence`; NaN
    where a cell was not observed."""
    found = probability.masked_fill(rows.isnan(), np.nan).detach().cpu().double().numpy()
    names = {variables[c].name: c for c in evidence}
    return xr.Dataset(
        {n: ("row", found[:, c], {"long_name": f"probability that {n} is a gross error"}) for n, c in names.items()}
    )


Column = tuple[Sequence[str], Tensor, Mapping[str, Any]]
"""Dimensions, values and attributes of an array."""


def groups_tree(
    groups: Mapping[str, Mapping[str, Column]], coords: Mapping[str, Sequence[Any]], attrs: Mapping[str, Any]
) -> xr.DataTree:
    """Groups of arrays as a tree that NetCDF, Zarr and ArviZ take; a group without an array is left out.

    Arguments:
        coords: names along dimensions; a group has those that its arrays lie along.
        attrs: of the posterior.
    """
    found = {}
    for group, columns in groups.items():
        if not columns:
            continue
        arrays = {n: xr.Variable(dims, _cells(values), dict(notes)) for n, (dims, values, notes) in columns.items()}
        along = {dim for array in arrays.values() for dim in array.dims}
        names = {dim: xr.Variable(dim, np.asarray(list(each))) for dim, each in coords.items() if dim in along}
        found[f"/{group}"] = xr.Dataset(arrays, coords=names, attrs=dict(attrs) if group == "posterior" else {})
    return tree_of(found, {})


def _cells(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return np.asarray(values.double() if values.is_floating_point() else values)


def _column(variable: Variable, values: Tensor, dims: Sequence[str]) -> Column:
    attrs: dict[str, Any] = {"units": variable.units, "role": variable.role}
    if variable.discrete:
        attrs["levels"] = list(variable.levels)
    return dims, values.double(), attrs


def inference_tree(
    variables: Variables,
    names: Sequence[str],
    latent: Tensor,
    rows: Tensor,
    predicted: Tensor,
    evidence: Sequence[int],
    attrs: Mapping[str, Any],
) -> xr.DataTree:
    """Posterior, posterior predictive, observed and constant data of tasks, plates as dimensions.

    ArviZ reads it where it is installed.

    Arguments:
        names: of the T tasks.
        latent: draws (S, T, L).
        rows: natural units (T, N, D) with NaN.
        predicted: draws of the evidence columns of these rows (S, T, N, M).
        evidence: the M columns that are evidence about a task; the others are constant data.
    """
    draws, _, dim = latent.shape
    coords = {
        "chain": [0],
        "draw": range(draws),
        "task": list(names),
        "latent": range(dim),
        "row": range(rows.shape[1]),
    }
    cells = ("task", "row")
    settings = [c for c in range(len(variables)) if c not in set(evidence)]
    z: Column = ("chain", "draw", "task", "latent"), latent.unsqueeze(0), {"units": "prior standard deviations"}
    groups: dict[str, dict[str, Column]] = {
        "posterior": {"z": z},
        "posterior_predictive": {
            variables[c].name: _column(variables[c], predicted[None, ..., m], ("chain", "draw", *cells))
            for m, c in enumerate(evidence)
        },
        "observed_data": {variables[c].name: _column(variables[c], rows[..., c], cells) for c in evidence},
        "constant_data": {variables[c].name: _column(variables[c], rows[..., c], cells) for c in settings},
    }
    return groups_tree(groups, coords, attrs)


def rows_tree(variables: Variables, rows: Tensor, inferred: Tensor, predicted: Tensor) -> xr.DataTree:
    """The same of rows apart (N, D): what their parameters may have been, and what their observations would be.

    Arguments:
        inferred: draws of the parameters (S, N, P), in the order of the columns, given all else that a row shows.
        predicted: draws of the observations (S, N, M), given parameters and conditions.
    """
    coords = {"chain": [0], "draw": range(len(inferred)), "row": range(len(rows))}
    of_role = {role: [c for c, v in enumerate(variables) if v.role == role] for role in ROLES}

    def drawn(role: str, draws: Tensor) -> dict[str, Column]:
        return {
            variables[c].name: _column(variables[c], draws[None, ..., m], ("chain", "draw", "row"))
            for m, c in enumerate(of_role[role])
        }

    def shown(role: str) -> dict[str, Column]:
        return {variables[c].name: _column(variables[c], rows[:, c], ("row",)) for c in of_role[role]}

    groups = {
        "posterior": drawn("parameter", inferred),
        "posterior_predictive": drawn("observation", predicted),
        "observed_data": shown("observation"),
        "constant_data": shown("parameter") | shown("condition"),
    }
    return groups_tree(groups, coords, {"rows_are": "apart"})


def curve_dataset(
    strata: Sequence[str],
    targets: Sequence[str] | None,
    points: np.ndarray,
    tables: Mapping[str, np.ndarray],
    losses: Mapping[str, Sequence[float]],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Calibration curves over ("stratum", "target", "point"), what goes with a curve, and losses of strata.

    Arguments:
        targets: names, or None where a curve is about all targets together.
        tables: `curve`, `lower` and `upper` (strata, targets, points); `p_value` and `count` (strata, targets).
        losses: name to nats (strata,).
    """
    dims = ("stratum", "target", "point")
    found = xr.Dataset(
        {name: (dims[: table.ndim], table) for name, table in tables.items()}
        | {name: ("stratum", list(each), {"units": "nat"}) for name, each in losses.items()},
        coords={"stratum": list(strata), "target": list(targets or [""]), "point": points},
        attrs=dict(attrs),
    )
    return found if targets is not None else found.isel(target=0, drop=True)


def check_dataset(
    strata: Sequence[str],
    targets: Sequence[Variable],
    statistics: Sequence[str],
    tables: Mapping[str, np.ndarray],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Statistics of measured and of drawn cells, `tables` over ("stratum", "target", "statistic")."""
    return xr.Dataset(
        {name: (("stratum", "target", "statistic"), table) for name, table in tables.items()},
        coords={
            "stratum": list(strata),
            "target": [v.name for v in targets],
            "statistic": list(statistics),
            "units": ("target", [v.units for v in targets]),
        },
        attrs=dict(attrs),
    )


_CHOSEN = {
    "gain": "expected gain by which it was chosen",
    "closed_form": "expected gain by the closed form",
    "likelihood": "expected gain by the flow, likelihood side",
    "posterior": "expected gain by the flow, posterior side",
    "error": "standard error of the two sides",
}


def campaign_history(
    suggested: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], kinds: Sequence[str]
) -> xr.Dataset:
    """Suggestions of a campaign over ``suggestion``, gains apart by ``target``, and rows told over ``measurement``."""
    data: dict[str, Any] = {
        name: ("suggestion", np.array([s[name] for s in suggested], float), {"long_name": text, "units": "nat"})
        for name, text in _CHOSEN.items()
    }
    data["gap"] = ("suggestion", data["likelihood"][1] - data["posterior"][1], {"units": "nat"})
    for name in ("candidate", "batch"):
        data[name] = ("suggestion", np.array([s[name] for s in suggested], int))
    data["cost"] = ("suggestion", np.array([s["cost"] for s in suggested], float))
    apart = np.array([[s["by_target"][kind] for kind in kinds] for s in suggested], float).reshape(-1, len(kinds))
    data["target_gain"] = (("suggestion", "target"), apart, {"long_name": "closed-form gain", "units": "nat"})
    for name, kind in (("candidate", int), ("cost", float), ("cells", int)):
        data[f"measured_{name}"] = ("measurement", np.array([m[name] for m in measured], kind))
    return xr.Dataset(data, coords={"target": list(kinds)})


def trade_off_dataset(points: Sequence[tuple[float, float, float, float]], inverse: str) -> xr.Dataset:
    """Gains forward and inverse, and cost, of batches over ``weight``, the share of the inverse."""
    share, *columns = np.array(points, float).reshape(-1, 4).T
    names = ("forward", "inverse", "cost")
    data = {name: ("weight", column) for name, column in zip(names, columns, strict=True)}
    return xr.Dataset(data, coords={"weight": share}, attrs={"inverse": inverse})


def joined_rows(rows: xr.Dataset | None, more: xr.Dataset | None, without: Sequence[str]) -> xr.Dataset | None:
    """Rows and more rows, of which cells `without` are not known, one below the other; labels both have are kept."""
    if more is not None:
        more = more.drop_vars([name for name in without if name in more])
    if rows is None or more is None:
        return rows if more is None else more
    shared = [name for name in ("task", "source") if name in rows.coords and name in more.coords]
    parts = [part.drop_vars([str(c) for c in part.coords if c not in shared]) for part in (rows, more)]
    wide = []
    for part, other in (parts, parts[::-1]):
        absent = {n: ("row", np.full(part.sizes["row"], np.nan), other[n].attrs) for n in other if n not in part}
        wide.append(part.assign(absent))
    wide[1] = wide[1][list(wide[0].data_vars)]
    return xr.concat(wide, "row", combine_attrs="override")


def to_record(ds: xr.Dataset) -> dict[str, Any]:
    """A dataset as JSON knows it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value

    found: dict[str, Any] = plain(ds.to_dict(data="list"))
    return found


def from_record(record: Mapping[str, Any]) -> xr.Dataset:
    """What `to_record` gave."""
    return xr.Dataset.from_dict(dict(record))


def gain_dataset(columns: Mapping[str, Tensor], designs: Tensor, attrs: Mapping[str, Any]) -> xr.Dataset:
    """Numbers (C,) of C designs (C, *design_shape) over ``design``; the designs themselves stand beside them."""
    meaning = {
        "eig": ("expected information gain", "nat"),
        "lower": ("one-sided 97.5 % lower limit of the gain", "nat"),
        "upper": ("one-sided 97.5 % upper limit of the gain", "nat"),
        "std_error": ("standard error of the gain", "nat"),
        "non_finite": ("terms that were infinite", ""),
    }
    dims = ("design", *(f"design_{k}" for k in range(1, designs.dim())))
    found = {
        name: ("design", values.detach().cpu().numpy(), dict(zip(("long_name", "units"), meaning[name], strict=True)))
        for name, values in columns.items()
    }
    where = xr.Variable(dims, designs.detach().cpu().numpy(), {"long_name": "what was asked about"})
    return xr.Dataset(found, coords={"designs": where}, attrs=dict(attrs))


def optimum_dataset(
    found: Mapping[str, float],
    design: Tensor,
    starts: Mapping[str, Tensor],
    steps: Mapping[str, Tensor],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """An optimum `design` (*design_shape) with the numbers of its gain, what became of each start, and the way there.

    Arguments:
        starts: numbers (A,) or designs (A, *design_shape) over ``start``.
        steps: numbers (K, A) or designs (K, A, *design_shape) over ``step`` and ``start``.
    """
    shape = [f"design_{k}" for k in range(1, design.dim() + 1)]
    meaning = {
        "eig": ("expected information gain", "nat"),
        "lower": ("one-sided 97.5 % lower limit of the gain", "nat"),
        "upper": ("one-sided 97.5 % upper limit of the gain", "nat"),
        "std_error": ("standard error of the gain", "nat"),
        "non_finite": ("terms of the gain that were infinite", ""),
        "design": ("design of the highest gain", ""),
        "began": ("where it began", ""),
        "ended": ("where it ended", ""),
        "ended_eig": ("expected information gain where it ended", "nat"),
        "ended_std_error": ("standard error of the gain where it ended", "nat"),
        "non_finite_gradients": ("steps that were not taken, for a gradient that was not finite", ""),
        "bound": ("bound on the gain before the step, by its few draws", "nat"),
        "path": ("design before the step", ""),
    }

    def column(dims: Sequence[str], name: str, values: Any) -> xr.Variable:
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        return xr.Variable(
            (*dims, *shape)[: np.ndim(values)], values, dict(zip(("long_name", "units"), meaning[name], strict=True))
        )

    columns = {name: column((), name, value) for name, value in found.items()} | {
        "design": column((), "design", design)
    }
    columns |= {name: column(("start",), name, values) for name, values in starts.items()}
    columns |= {name: column(("step", "start"), name, values) for name, values in steps.items()}
    return xr.Dataset(columns, attrs=dict(attrs))


# ---------------------------------------------------------------------------------------------- of a report
def named_dataset(dim: str, records: Mapping[str, Mapping[str, Any]], attrs: Mapping[str, Any]) -> xr.Dataset:
    """Records that share their fields, over `dim` by name."""
    fields = list(next(iter(records.values()), {}))
    columns = {f: (dim, np.array([record[f] for record in records.values()])) for f in fields}
    return xr.Dataset(columns, coords={dim: list(records)}, attrs=dict(attrs))


def answers_dataset(
    variables: Sequence[Variable],
    cells: Mapping[str, np.ndarray],
    levels: Sequence[float],
    numbers: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[str]],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Questions with known answers over ("question", "target"), quantiles of what was said at `levels`.

    Arguments:
        cells: `truth` (N, n) and `quantiles` (N, n, levels).
        numbers: (N,) each, of a question.
        labels: N texts by kind.
    """
    dims = ("question", "target", "quantile")
    names = [v.name for v in variables]
    found = xr.Dataset(
        {name: (dims[: each.ndim], each) for name, each in {**cells, **numbers}.items()},
        coords={"target": names, "quantile": list(levels), "units": ("target", [v.units for v in variables])},
        attrs=dict(attrs),
    )
    found["positive"] = ("target", np.array([v.support == "positive" for v in variables]))
    found["discrete"] = ("target", np.array([v.discrete for v in variables]))
    return found.assign_coords({kind: ("question", list(each)) for kind, each in labels.items()})


def inventory_dataset(
    variables: Variables, rows: Tensor, labels: Mapping[str, Sequence[str]], links: Tensor | None = None
) -> xr.Dataset:
    """What is measured where: cells over ``variable``, and over each kind of `labels`; patterns of measured cells over
    ``pattern``, the most frequent first; with `links` (D, D), how many learned rows show each pair.

    Arguments:
        rows: natural units (N, D) with NaN.
        labels: N names by kind, as "task" and "source".
    """
    shown = (~rows.isnan()).cpu().numpy()
    patterns, number = np.unique(shown, axis=0, return_counts=True)
    order = np.argsort(-number, kind="stable")
    data: dict[str, Any] = {
        "cells": ("variable", shown.sum(0), {"long_name": "cells measured"}),
        "measured": (("pattern", "variable"), patterns[order]),
        "rows": ("pattern", number[order], {"long_name": "rows with this pattern"}),
    }
    coords: dict[str, Any] = {"variable": list(variables.names)}
    for field in ("role", "units", "support"):
        coords[field] = ("variable", [str(getattr(v, field)) for v in variables])
    for kind, each in labels.items():
        names, place = np.unique(np.array(each, dtype=str), return_inverse=True)
        cells = np.zeros((len(names), len(variables)), dtype=int)
        np.add.at(cells, place, shown)
        data[f"cells_by_{kind}"] = ((kind, "variable"), cells)
        data[f"rows_of_{kind}"] = (kind, np.bincount(place, minlength=len(names)))
        coords[kind] = names
    if links is not None:
        coords["other"] = list(variables.names)
        data["links"] = (("variable", "other"), links.cpu().numpy(), {"long_name": "learned rows that show both"})
    return xr.Dataset(data, coords=coords, attrs={"rows": len(shown)})


def fingerprint_dataset(
    tasks: Sequence[str],
    known: Sequence[bool],
    means: Tensor,
    covariances: Tensor,
    columns: Mapping[str, Sequence[Any]],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Beliefs about latents of tasks, `mean` (T, L) and `covariance` (T, L, L), and `columns` (T,) beside them."""
    data: dict[str, Any] = {
        "mean": (("task", "latent"), means.cpu().numpy(), {"units": "prior standard deviations"}),
        "covariance": (("task", "latent", "other_latent"), covariances.cpu().numpy()),
        "known": ("task", np.array(known, dtype=bool), {"long_name": "learned, not held out"}),
    }
    data |= {name: ("task", np.array(each)) for name, each in columns.items()}
    return xr.Dataset(data, coords={"task": list(tasks)}, attrs=dict(attrs))


def tree_of(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> xr.DataTree:
    """Datasets by path under one root with `attrs`; texts are of variable length, which every store knows."""
    groups = {path: _with_texts(ds) for path, ds in groups.items()}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(attrs)), **groups})


def _with_texts(ds: xr.Dataset) -> xr.Dataset:
    texts = {n: xr.Variable(v.dims, v.values.astype(object), v.attrs) for n, v in ds.variables.items() if _is_text(v)}
    return ds.assign_coords({n: v for n, v in texts.items() if n in ds.coords}).assign(
        {n: v for n, v in texts.items() if n not in ds.coords}
    )


def _is_text(variable: xr.Variable) -> bool:
    return bool(variable.dtype.kind == "U")
