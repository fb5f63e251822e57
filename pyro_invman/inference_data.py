"""What inference in a Pyro model found, as labelled arrays: plates become dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from pyro_invman.results import Column, groups_tree
from pyro_invman.variables import DataError

if TYPE_CHECKING:
    import xarray as xr

_DRAWS = ("chain", "draw")
_OBSERVED, _UNOBSERVED = "_observed", "_unobserved"


def to_datatree(
    model: Callable[..., Any],
    samples: Any,
    *args: Any,
    units: Mapping[str, str] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    constant: Mapping[str, Any] | None = None,
    seed: int = 0,
    parallel: bool = False,
    **kwargs: Any,
) -> xr.DataTree:
    """Posterior, posterior predictive, observed and constant data of a Pyro model, as ArviZ reads them.

    Dimensions are "chain", "draw", and the names of the plates that a site stands in; event dimensions are called
    ``SITE_dim_0`` and so on, and batch dimensions of size 1 without a plate go. Where a site has an `obs_mask`, cells
    that were not observed are NaN among the observed data, and imputed among the posterior. Factors are no data.

    Arguments:
        model: the function that was inferred.
        samples: a `pyro.infer.MCMC` that has run, or draws by site, each (S, *shape of the site).
        args, kwargs: what the model was called with.
        units: of sites and constants, kept as attributes.
        coords: names of the elements of a plate, by plate.
        constant: what the model was given, by name: tensors whose sizes say which plates they lie along, or pairs
            (dimensions, tensor).
        seed: of the predictive draws.
        parallel: whether the model takes all draws at once, as one more plate to the left of its own.

    Raises:
        DataError: no draws, a constant whose plates cannot be told, names that do not fit a plate.

    Example::

        >>> import pyro.distributions as dist
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("row", len(x)):
        ...         return pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
        >>> x = torch.arange(3.0)
        >>> tree = to_datatree(model, {"slope": torch.ones(50)}, x, y=2 * x, units={"y": "um"}, constant={"x": x})
        >>> tree["posterior_predictive"]["y"].dims, tree["observed_data"]["y"].attrs["units"]
        (('chain', 'draw', 'row'), 'um')

    References:
        Kumar et al., *ArviZ a unified library for exploratory analysis of Bayesian models in Python*, JOSS 2019.
    """
    chains = _by_chain(samples)
    shape = next(iter(chains.values())).shape[:2]
    flat = {name: values.flatten(0, 1) for name, values in chains.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        pyro.set_rng_seed(seed)
        traced = poutine.trace(poutine.condition(model, {name: values[0] for name, values in flat.items()}))
        sites = {
            name: site
            for name, site in traced.get_trace(*args, **kwargs).nodes.items()
            if site["type"] == "sample" and type(site["fn"]).__name__ not in ("Unit", "_Subsample")
        }
        computed = [
            name for name, site in sites.items() if (site["infer"] or {}).get("_deterministic") and name not in flat
        ]
        observed = [name for name, site in sites.items() if site["is_observed"] and name not in (*computed, *flat)]
        if computed:
            flat |= Predictive(model, flat, return_sites=computed, parallel=parallel)(*args, **kwargs)
        known = {name: values for name, values in flat.items() if name not in computed}
        predicted = {}
        if observed:
            asked = Predictive(poutine.uncondition(model), known, return_sites=observed, parallel=parallel)
            predicted = asked(*args, **kwargs)
    notes = dict(units or {})

    def drawn(name: str, values: Tensor) -> Column:
        values = values.unflatten(0, shape)
        dims, kept = _dims(sites[name], values[0, 0])
        return (*_DRAWS, *dims), values.reshape(*shape, *kept), _attrs(notes, _plain(name))

    groups: dict[str, dict[str, Column]] = {
        "posterior": {n: drawn(n, v) for n, v in flat.items() if n in sites and not n.endswith(_UNOBSERVED)},
        "posterior_predictive": {_plain(name): drawn(name, values) for name, values in predicted.items()},
        "observed_data": {},
        "constant_data": {},
    }
    for name in observed:
        value: Tensor = sites[name]["value"]  # type: ignore[assignment]
        dims, kept = _dims(sites[name], value)
        groups["observed_data"][_plain(name)] = dims, _seen(sites[name]).reshape(kept), _attrs(notes, _plain(name))
    plates = _plates(sites)
    for name, values in (constant or {}).items():
        dims, cells = values if isinstance(values, tuple) else (_along(name, values, plates), values)
        groups["constant_data"][name] = tuple(dims), torch.as_tensor(cells), _attrs(notes, name)
    found = {"chain": range(shape[0]), "draw": range(shape[1])} | {plate: range(size) for plate, size in plates.items()}
    for plate, elements in (coords or {}).items():
        if plate not in plates or len(elements) != plates[plate]:
            raise DataError(f"coords: found {len(elements)} names for {plate!r}, expected plates and sizes {plates}")
        found[plate] = elements  # type: ignore[assignment]
    return groups_tree(groups, found, {"inference_library": "pyro", "inference_library_version": pyro.__version__})


def _by_chain(samples: Any) -> dict[str, Tensor]:
    """Draws (chains, draws, *shape) by site."""
    if hasattr(samples, "get_samples"):
        found = dict(samples.get_samples(group_by_chain=True))
    else:
        found = {name: values.unsqueeze(0) for name, values in dict(samples).items()}
    if not found:
        raise DataError("samples: found no site, expected draws by site, or an MCMC that has run")
    shapes = {name: tuple(values.shape[:2]) for name, values in found.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"samples: found chains and draws {shapes}, expected as many of each site")
    return found


def _plain(name: str) -> str:
    """A site as the model calls it, where a mask made two of it."""
    return name.removesuffix(_OBSERVED)


def _plates(sites: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the plates that tensors lie along."""
    return {f.name: int(f.size) for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized}


def _dims(site: Mapping[str, Any], value: Tensor) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the dimensions of a site's value, and their sizes, without those of size 1 that no plate made."""
    frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
    event = len(site["fn"].event_shape)
    if (site["infer"] or {}).get("_deterministic"):  # to Pyro all of it is one event
        fits = all(value.dim() >= -dim and value.shape[dim] == f.size for dim, f in frames.items())
        event = 0 if frames and fits else value.dim()
    dims, kept = [], []
    batch = value.dim() - event
    for k, size in enumerate(value.shape):
        frame = frames.get(k - batch) if k < batch else None
        if frame is None and size == 1 and k < batch:
            continue
        dims.append(frame.name if frame is not None else f"{_plain(site['name'])}_dim_{k - batch if k >= batch else k}")
        kept.append(size)
    return tuple(dims), tuple(kept)


def _seen(site: Mapping[str, Any]) -> Tensor:
    """An observed value, NaN where a mask says that it was not observed."""
    value: Tensor = site["value"]
    mask = site.get("mask")
    if not site["name"].endswith(_OBSERVED) or not isinstance(mask, Tensor):
        return value
    event = len(site["fn"].event_shape)
    return value.double().masked_fill(
        ~mask.expand(value.shape[: value.dim() - event])[(...,) + (None,) * event], torch.nan
    )


def _attrs(units: Mapping[str, str], name: str) -> dict[str, Any]:
    return {"units": units[name]} if name in units else {}


def _along(name: str, values: Any, plates: Mapping[str, int]) -> tuple[str, ...]:
    """The plates along which a constant lies, by its sizes."""
    dims = []
    for size in torch.as_tensor(values).shape:
        fitting = [plate for plate, number in plates.items() if number == size and plate not in dims]
        if len(fitting) != 1:
            found = f"found size {size}, which {len(fitting)} of the plates {dict(plates)} have"
            raise DataError(f"constant {name}: {found}; name its dimensions: ((…,), tensor)")
        dims.append(fitting[0])
    return tuple(dims)


__all__ = ["to_datatree"]
