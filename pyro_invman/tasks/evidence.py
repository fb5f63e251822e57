"""What rows bring to the inference of a task, before its latent is inferred."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.rows import of_one_task
from pyro_invman.tasks.sources import apart
from pyro_invman.tasks.typicality import widened

if TYPE_CHECKING:
    import xarray as xr

    from pyro_invman.tasks.manifold import ProcessManifold


class Evidence(NamedTuple):
    """Rows of one task (K, D), of the reference source, in natural units and `working` coordinates.

    `rows` are without the cells that likely are gross errors, of which `errors` (K, D) are the probabilities, NaN where
    a cell was not measured. `stated` (D,) is what is known of the task as a whole. `before` is the prior belief with
    what `others` (K', D), working rows each of a `source`, say; its variance was multiplied by `inflation` where the
    task is like none that was learned.
    """

    rows: Tensor
    working: Tensor
    errors: Tensor
    stated: Tensor
    before: Belief
    others: Tensor
    source: Sequence[str]
    inflation: float


def evidence_of(manifold: ProcessManifold, rows: xr.Dataset | None, conditions: Mapping[str, Any] | None) -> Evidence:
    """Of `rows` of one task, or of none, and of `conditions` that are stated of it as a whole.

    Raises:
        DataError: rows of several tasks, cells outside their support.
    """
    stated = conditions or {}
    own, other, source = (None, None, []) if rows is None else apart(rows, manifold.reference_source)
    natural, whole = of_one_task(own, stated, manifold.variables)
    everything = torch.cat([whole.unsqueeze(0), natural])
    errors = manifold._errors(everything, torch.zeros(len(everything), dtype=torch.long))
    everything = everything.masked_fill(errors > 0.5, math.nan)
    working = manifold.standardization(everything).to(manifold.network.flow.dtype)
    others = manifold.standardization(of_one_task(other, stated, manifold.variables)[0]).to(working)
    with torch.no_grad():
        before = manifold._before(working)
        if source:
            before = manifold.sources.inform(manifold.network, others, source, before, working[1:])
        before, inflation = widened(manifold.network, working[1:], before)
    return Evidence(
        everything[1:],
        working[1:],
        errors[1:].masked_fill(natural.isnan(), math.nan),
        everything[0],
        before,
        others,
        source,
        inflation,
    )
