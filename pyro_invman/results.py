"""What comes back from learning, as labelled arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_invman.training import Record
from pyro_invman.variables import Variable, Variables

_MEANING = {
    "train_loss": ("mean loss of the batches since the last evaluation", "nat"),
    "validation_loss": ("loss of the averaged weights on held-out rows", "nat"),
    "learning_rate": ("learning rate", ""),
    "seconds": ("wall time since the start", "s"),
}


def history_dataset(
    records: Sequence[Record], attrs: Mapping[str, Any], links: tuple[Variables, Tensor] | None = None
) -> xr.Dataset:
    """The history of a fit over ``step``, with `attrs` as its attributes.

    `links`: variables, and how many rows show each pair of them (D, D), which stands beside it as a coordinate.
    """
    beside: dict[str, Any] = {}
    if links is not None:
        meaning = {"long_name": "rows that show both variables"}
        beside = {dim: list(links[0].names) for dim in ("variable", "other")}
        beside["links"] = (("variable", "other"), links[1].cpu().numpy(), meaning)
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
    coords = {"chain": [0], "draw": np.arange(draws), "task": list(names)}
    per_row = coords | {"row": np.arange(rows.shape[1])}

    def column(c: int, values: Tensor, dims: tuple[str, ...]) -> xr.Variable:
        variable: Variable = variables[c]
        attrs = {"units": variable.units, "role": variable.role}
        if variable.discrete:
            attrs["levels"] = ", ".join(variable.levels)
        return xr.Variable(dims, values.detach().cpu().double().numpy(), attrs)

    settings = [c for c in range(len(variables)) if c not in set(evidence)]
    cells = ("task", "row")
    only_cells = {name: per_row[name] for name in cells}
    posterior = xr.Dataset(
        {"z": (("chain", "draw", "task", "latent"), latent.detach().cpu().double().numpy()[None])},
        coords=coords | {"latent": np.arange(dim)},
        attrs=dict(attrs),
    )
    predictive = xr.Dataset(
        {
            variables[c].name: column(c, predicted[None, ..., m], ("chain", "draw", *cells))
            for m, c in enumerate(evidence)
        },
        coords=per_row,
    )
    observed = xr.Dataset({variables[c].name: column(c, rows[..., c], cells) for c in evidence}, coords=only_cells)
    constant = xr.Dataset({variables[c].name: column(c, rows[..., c], cells) for c in settings}, coords=only_cells)
    return xr.DataTree.from_dict(
        {
            "/posterior": posterior,
            "/posterior_predictive": predictive,
            "/observed_data": observed,
            "/constant_data": constant,
        }
    )


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
