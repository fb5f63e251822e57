r"""Distributions of one cell, batched: what a head of the any-order flow puts out.

Each has `log_prob`, `cdf`, `icdf` and `sample`, lives on an interval ``(lower, upper)`` that may be infinite on either
side, and puts no mass outside it.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_FAR = 60.0


class Univariate(Protocol):
    """One real cell: every tensor broadcasts against the batch shape of the parameters."""

    def log_prob(self, value: Tensor) -> Tensor: ...

    def cdf(self, value: Tensor) -> Tensor: ...

    def icdf(self, probability: Tensor) -> Tensor: ...


def _bisected(law: Univariate, probability: Tensor, low: Tensor, high: Tensor) -> Tensor:
    r"""Quantile (...,) of a law between `low` and `high`; its gradient is that of the implicit function
    :math:`\partial v = (\partial u - \partial F) / p(v)`."""
    with torch.no_grad():
        low, high = (end.expand(torch.broadcast_shapes(end.shape, probability.shape)) for end in (low, high))
        for _ in range(60 if probability.dtype == torch.float64 else 34):
            middle = (low + high) / 2
            right = law.cdf(middle) < probability
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        value = (low + high) / 2
    if not torch.is_grad_enabled():
        return value
    density = law.log_prob(value.detach()).detach().exp()
    change = (probability - law.cdf(value)) / density.clamp_min(1e-30)
    return value + (change - change.detach())  # the value stays within the support, only the gradient is added


def _log_interval_mass(low: Tensor, high: Tensor) -> Tensor:
    """log(Φ(high) − Φ(low)) for low < high, both finite, stable in both tails."""
    flip = low > 0  # work in the left tail, where log_ndtr is accurate
    log_a = torch.special.log_ndtr(torch.where(flip, -high, low))
    log_b = torch.special.log_ndtr(torch.where(flip, -low, high))
    return log_b + torch.log(-torch.expm1((log_a - log_b).clamp_max(-1e-7)))


def _normal_cdf(z: Tensor) -> Tensor:
    """Φ(z), accurate in the left tail too, where `torch.special.ndtr` is 0 from −8.3 on (−5.5 in single precision)."""
    return 0.5 * torch.special.erfc(-z / math.sqrt(2))


def _normal_quantile(log_probability: Tensor) -> Tensor:
    """z where log Φ(z) is given, accurate in the left tail too."""
    deep = log_probability < -8
    # log Φ is concave, so that Newton's method from the left of the root climbs to it
    z = -(-2 * log_probability.clamp_max(-8)).sqrt()
    for _ in range(4):
        log_cdf = torch.special.log_ndtr(z)
        z = z - (log_cdf - log_probability) * (log_cdf + 0.5 * z.square() + _LOG_SQRT_2PI).exp()
    return torch.where(deep, z, torch.special.ndtri(log_probability.exp()))


class Mixture:
    r"""A mixture of K normals, each truncated to ``(lower, upper)``:

    .. math:: p(v) = \sum_k w_k \frac{N(v; m_k, s_k)}{\Phi((u - m_k)/s_k) - \Phi((l - m_k)/s_k)}, \quad l < v < u.

    Arguments:
        logits: unnormalised log-weights (..., K).
        loc: locations (..., K).
        scale: scales (..., K), positive.
        lower, upper: the support (...,), or None for the whole line.
    """

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
    ) -> None:
        self.log_weights = logits.log_softmax(-1)
        self.loc, self.scale = loc, scale
        self.ends = None if lower is None or upper is None else (lower, upper)
        if lower is not None and upper is not None:
            # an end beyond _FAR scales bounds no mass that can be told from none; clamped, gradients stay finite
            self._low = ((lower.clamp_min(-1e9).unsqueeze(-1) - loc) / scale).clamp(-_FAR, _FAR)
            self._high = ((upper.clamp_max(1e9).unsqueeze(-1) - loc) / scale).clamp(-_FAR, _FAR)
            self._log_mass = _log_interval_mass(self._low, self._high)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (...,); −inf outside the support."""
        z = (value.unsqueeze(-1) - self.loc) / self.scale
        parts = self.log_weights - 0.5 * z.square() - self.scale.log() - _LOG_SQRT_2PI
        if self.ends is None:
            return parts.logsumexp(-1)
        inside = (value >= self.ends[0]) & (value <= self.ends[1])
        return torch.where(inside, (parts - self._log_mass).logsumexp(-1), -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function (...,)."""
        z = (value.unsqueeze(-1) - self.loc) / self.scale
        if self.ends is None:
            return (self.log_weights.exp() * _normal_cdf(z)).sum(-1)
        inside = (value > self.ends[0]) & (value < self.ends[1])
        safe = torch.where(inside.unsqueeze(-1), z.clamp(-_FAR, _FAR), self._high)
        below = (self.log_weights + _log_interval_mass(self._low, safe) - self._log_mass).exp().sum(-1).clamp_max(1.0)
        return torch.where(inside, below, (value >= self.ends[1]).to(value))

    def icdf(self, probability: Tensor) -> Tensor:
        """Quantile (...,), found by bisection, differentiable."""
        with torch.no_grad():
            nearest = self.loc
            if self.ends is not None:
                nearest = nearest.maximum(self.ends[0].unsqueeze(-1)).minimum(self.ends[1].unsqueeze(-1))
            low, high = (nearest - 12.0 * self.scale).amin(-1), (nearest + 12.0 * self.scale).amax(-1)
            if self.ends is not None:
                low, high = low.maximum(self.ends[0]), high.minimum(self.ends[1])
        return _bisected(self, probability, low, high)

    def sample(self, generator: torch.Generator | None = None, shape: torch.Size | None = None) -> Tensor:
        """Draws of `shape`, to which the batch shape must broadcast (default: one a batch element); no gradient."""
        with torch.no_grad():
            batch = torch.broadcast_shapes(self.log_weights.shape, self.loc.shape)
            shape = batch[:-1] if shape is None else shape
            like, size = self.loc, torch.Size(shape)

            def uniform() -> Tensor:
                return torch.rand(size, dtype=like.dtype, device=like.device, generator=generator)

            cumulative = self.log_weights.exp().cumsum(-1).expand(*shape, batch[-1])
            chosen = (cumulative < uniform().unsqueeze(-1)).sum(-1, keepdim=True)
            chosen = chosen.clamp_max(batch[-1] - 1)

            def pick(parameter: Tensor) -> Tensor:
                return parameter.expand(*shape, batch[-1]).gather(-1, chosen).squeeze(-1)

            loc, scale = pick(self.loc), pick(self.scale)
            if self.ends is None:
                return loc + scale * torch.randn(size, dtype=like.dtype, device=like.device, generator=generator)
            low, high = pick(self._low), pick(self._high)
            flip = low > 0  # in the left tail log Φ is accurate
            low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
            below, above = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
            share = uniform().clamp_min(torch.finfo(like.dtype).eps / 4)
            z = _normal_quantile(above + torch.log(share + (1 - share) * (below - above).exp()))
            value = loc + scale * torch.where(flip, -z, z)
            return value.clamp(*self.ends)


class Spline:
    r"""A monotone rational-quadratic spline g of K bins, with linear tails on an unbounded cell:

    .. math:: p(v) = b(g(r)) \, g'(r) / s, \quad r = (v - m) / s,

    where the base b is standard normal on the whole line; on a bounded cell r runs over the spline's own interval
    :math:`[-B, B]` as v runs over ``(lower, upper)``, and b is uniform there.

    Arguments:
        widths, heights: unnormalised bin sizes (..., K).
        slopes: unconstrained derivatives at the K + 1 knots (..., K + 1).
        loc, scale: m and s (...,); not used on a bounded cell.
        lower, upper: the support (...,), infinite or None for the whole line.

    References:
        Durkan, Bekasov, Murray & Papamakarios, *Neural spline flows*, NeurIPS 2019.
    """

    reach = 5.0
    _smallest = 1e-3

    def __init__(
        self,
        widths: Tensor,
        heights: Tensor,
        slopes: Tensor,
        loc: Tensor,
        scale: Tensor,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
    ) -> None:
        bins, reach = widths.shape[-1], self.reach
        self.bounded = (
            torch.zeros((), dtype=torch.bool) if lower is None or upper is None else lower.isfinite() & upper.isfinite()
        )
        if lower is not None and upper is not None:
            low, high = torch.where(self.bounded, lower, -1.0), torch.where(self.bounded, upper, 1.0)
            loc = torch.where(self.bounded, (low + high) / 2, loc)
            scale = torch.where(self.bounded, (high - low) / (2 * reach), scale)
            self.ends: tuple[Tensor, Tensor] | None = (lower, upper)
        else:
            self.ends = None
        self.loc, self.scale = loc, scale
        size = 1 - self._smallest * bins
        edges = [
            2 * reach * F.pad((self._smallest + size * w.softmax(-1)).cumsum(-1), (1, 0)) - reach
            for w in (widths, heights)
        ]
        self.x, self.y = edges
        slope = self._smallest + F.softplus(slopes + math.log(math.expm1(1.0)))
        at_end = torch.zeros(bins + 1, dtype=torch.bool, device=slopes.device)
        at_end[0] = at_end[-1] = True
        self.d = torch.where(at_end & ~self.bounded.unsqueeze(-1), 1.0, slope)

    def _bin(self, edges: Tensor, value: Tensor) -> list[Tensor]:
        """x0, width, y0, height, slope left, slope right (...,) of the bin that holds `value`."""
        bins = edges.shape[-1] - 1
        shape = torch.broadcast_shapes(edges.shape[:-1], value.shape)
        k = (edges[..., 1:-1] <= value.unsqueeze(-1)).sum(-1, keepdim=True).clamp(0, bins - 1).expand(*shape, 1)

        def at(table: Tensor, index: Tensor) -> Tensor:
            return table.expand(*shape, table.shape[-1]).gather(-1, index).squeeze(-1)

        x0, y0 = at(self.x, k), at(self.y, k)
        return [x0, at(self.x, k + 1) - x0, y0, at(self.y, k + 1) - y0, at(self.d, k), at(self.d, k + 1)]

    def _forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """g(r) and log g'(r) − log s."""
        r = (value - self.loc) / self.scale
        r = torch.where(self.bounded, r.clamp(-self.reach, self.reach), r)  # rounding may put an end outside
        inside = r.abs() <= self.reach
        safe = torch.where(inside, r, 0.0)
        x0, w, y0, h, d0, d1 = self._bin(self.x, safe)
        t, slope = (safe - x0) / w, h / w
        below = slope + (d0 + d1 - 2 * slope) * t * (1 - t)
        g = y0 + h * (slope * t.square() + d0 * t * (1 - t)) / below
        log_slope = (
            2 * slope.log()
            + (d1 * t.square() + 2 * slope * t * (1 - t) + d0 * (1 - t).square()).log()
            - 2 * below.log()
        )
        return torch.where(inside, g, r), torch.where(inside, log_slope, 0.0) - self.scale.log()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (...,); −inf outside the support."""
        g, log_slope = self._forward(value)
        normal = -0.5 * g.square() - _LOG_SQRT_2PI
        result = log_slope + torch.where(self.bounded, -math.log(2 * self.reach), normal)
        if self.ends is None:
            return result
        return torch.where((value >= self.ends[0]) & (value <= self.ends[1]), result, -math.inf)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function (...,)."""
        g, _ = self._forward(value)
        uniform = ((g + self.reach) / (2 * self.reach)).clamp(0.0, 1.0)
        return torch.where(self.bounded, uniform, _normal_cdf(g))

    def icdf(self, probability: Tensor) -> Tensor:
        """Quantile (...,), in closed form."""
        g = torch.where(self.bounded, self.reach * (2 * probability - 1), torch.special.ndtri(probability))
        inside = g.abs() < self.reach
        safe = torch.where(inside, g, 0.0)
        x0, w, y0, h, d0, d1 = self._bin(self.y, safe)
        slope, dy = h / w, safe - y0
        bend = d0 + d1 - 2 * slope
        a, b, c = h * (slope - d0) + dy * bend, h * d0 - dy * bend, -slope * dy
        t = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0.0).sqrt())
        value = self.loc + self.scale * torch.where(inside, x0 + w * t, g)
        return value if self.ends is None else value.clamp(*self.ends)

    def sample(self, generator: torch.Generator | None = None, shape: torch.Size | None = None) -> Tensor:
        """Draws of `shape`, to which the batch shape must broadcast (default: one a batch element); no gradient."""
        with torch.no_grad():
            batch = torch.broadcast_shapes(self.x.shape[:-1], self.loc.shape)
            uniform = torch.rand(
                batch if shape is None else shape,
                dtype=self.loc.dtype,
                device=self.loc.device,
                generator=generator,
            )
            eps = torch.finfo(uniform.dtype).eps
            return self.icdf(uniform.clamp(eps, 1 - eps))


class Blend:
    """Either of two laws of a cell, `first` with probability `share` (...,)."""

    def __init__(self, first: Univariate, second: Univariate, share: Tensor) -> None:
        self.first, self.second, self.share = first, second, share

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (...,)."""
        share = self.share
        return torch.logaddexp(
            share.log() + self.first.log_prob(value), share.neg().log1p() + self.second.log_prob(value)
        )

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function (...,)."""
        return self.share * self.first.cdf(value) + (1 - self.share) * self.second.cdf(value)

    def icdf(self, probability: Tensor) -> Tensor:
        """Quantile (...,), between those of the two, by bisection, differentiable."""
        with torch.no_grad():
            ends = self.first.icdf(probability), self.second.icdf(probability)
        return _bisected(self, probability, torch.minimum(*ends), torch.maximum(*ends))
