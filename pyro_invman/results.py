"""What comes back from learning, as labelled arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pyro_invman.training import Record

_MEANING = {
    "train_loss": ("mean loss of the batches since the last evaluation", "nat"),
    "validation_loss": ("loss of the averaged weights on held-out rows", "nat"),
    "learning_rate": ("learning rate", ""),
    "seconds": ("wall time since the start", "s"),
}


def history_dataset(records: Sequence[Record], attrs: Mapping[str, Any]) -> xr.Dataset:
    """The history of a fit over ``step``, with `attrs` as its attributes."""
    columns = np.array(records, dtype=float).reshape(len(records), len(Record._fields)).T
    named = dict(zip(Record._fields, columns, strict=True))
    step = named.pop("step").astype(int)
    return xr.Dataset(
        {
            name: ("step", values, dict(zip(("long_name", "units"), _MEANING[name], strict=True)))
            for name, values in named.items()
        },
        coords={"step": step},
        attrs=dict(attrs),
    )
