r"""Quasi-random numbers for the sample sites of a Pyro model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MultivariateNormal
from torch.distributions.utils import clamp_probs
from torch.quasirandom import SobolEngine

_BITS = 30
_MOST = 256  # dimensions; beyond, what a net would gain is small


class QuasiRandom:
    r"""Draws that fill the space of a model's random numbers evenly, so that means over them vary less.

    One scrambled Sobol' net a call, moved by a digital shift of its own at each candidate,
    :math:`u_{sc} = v_s \oplus \delta_c`. Each number is uniform, so means are unbiased; calls are independent, and
    the spread of their means is an honest error. A site takes its value at the quantile of its numbers where its
    distribution has quantiles (normal, multivariate normal, Bernoulli, categorical, whatever has ``icdf``); any other
    is drawn as ever. A value is differentiable in its distribution's parameters where its draws would be.

    Arguments:
        common: whether all candidates meet the same numbers, so that what sets them apart is not the draw.

    References:
        Owen, *Scrambled net variance for integrals of smooth functions*, Annals of Statistics 1997.
    """

    def __init__(self, common: bool = False) -> None:
        self.common = common

    @contextmanager
    def drawing(self, num: int, candidates: int, sizes: Mapping[str, int]) -> Iterator[None]:
        """Within it, the sites of `sizes` are drawn so, from as many numbers each for `num` draws at each candidate."""
        total = sum(sizes.values())
        if total > _MOST:
            yield
            return
        seed = int(torch.randint(2**31 - 1, ()))
        net = SobolEngine(total, scramble=True, seed=seed).draw(num, dtype=torch.float64)
        shifts = 1 if self.common else candidates
        bits = (net * 2.0**_BITS).long().unsqueeze(1) ^ torch.randint(2**_BITS, (shifts, total))
        uniform = (bits + torch.rand(bits.shape, dtype=torch.float64)) * 2.0**-_BITS
        uniform = uniform.expand(num, candidates, total)
        parts = dict(zip(sizes, uniform.split(list(sizes.values()), -1), strict=True))
        with _Quantiles(parts):
            yield


class _Quantiles(Messenger):
    def __init__(self, uniform: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uniform = uniform

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None or msg["name"] not in self.uniform:
            return
        fn = msg["fn"]
        uniform = self.uniform[msg["name"]]
        shape = fn.shape() if hasattr(fn, "shape") and callable(fn.shape) else None
        if shape is None or shape.numel() != uniform.numel():
            return
        value = quantile(fn, uniform.reshape(shape))
        if value is not None:
            msg["value"] = value if fn.has_rsample else value.detach()
            msg["done"] = True


def quantile(fn: Distribution, uniform: Tensor) -> Tensor | None:
    """The value of `fn` at uniform numbers of its full shape, distributed as its draws are; None where it has none."""
    if isinstance(fn, Independent):
        return quantile(fn.base_dist, uniform)
    if isinstance(fn, MultivariateNormal):
        normal = torch.special.ndtri(clamp_probs(uniform)).to(fn.loc.dtype)
        return fn.loc + (fn._unbroadcasted_scale_tril @ normal.unsqueeze(-1)).squeeze(-1)
    if isinstance(fn, Bernoulli):
        return (uniform < fn.probs).to(fn.probs.dtype)
    if isinstance(fn, Categorical):
        reached = fn.probs.cumsum(-1)
        return (reached < uniform.unsqueeze(-1) * reached[..., -1:]).sum(-1).clamp_max(fn.probs.shape[-1] - 1)
    if fn.has_rsample is False and fn.event_shape:
        return None
    try:
        dtype = next(p.dtype for p in (getattr(fn, name) for name in fn.arg_constraints) if torch.is_tensor(p))
        return fn.icdf(clamp_probs(uniform.to(dtype)))
    except (NotImplementedError, AttributeError, StopIteration):
        return None
