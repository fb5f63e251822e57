r"""Mixtures of normal conditionals, and the quasi-random points at which nested estimates are taken."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_invman.design.guides import GaussianConditional

_BITS = 30
_DEFENSE = 1 / 16  # share of the wide component; one of 16 points of a net
_WIDE = 2.0  # its scale, in those of the draws
_SWEEPS = 15  # of expectation and maximisation
_FLOOR = 1e-4  # of the variances, for each component
_PILED = 0.01  # share of draws at an end of what is given, above which they are a component of their own
_NONE = -60.0  # log-share of a draw that a component does not start with


class Proposal:
    r"""q(t | g) of rows t (S, C, D) given rows g (S, C, G), one at each candidate: a mixture

    .. math:: q_c(t \mid g) = \delta N(\mu_c, 2^2 \Lambda_c) + (1 - \delta) \sum_k \pi_{ck}(g)\,
              N(a_{ck} + B_{ck} \phi(g), \Sigma_{ck})

    whose first part, with the moments of all draws, is there so that no outcome finds it empty. With one component the
    second part matches moments; with more it is the conditional of a joint normal mixture, fitted by expectation and
    maximisation.

    Arguments:
        targets, given, log_weight: rows of draws and their log-weights (S, C).
        components: K.
        defense: share of the wide part.
    """

    def __init__(
        self,
        targets: Tensor,
        given: Tensor,
        log_weight: Tensor,
        components: int = 1,
        defense: float = _DEFENSE,
    ) -> None:
        nothing = targets[..., :0]
        wide = GaussianConditional(targets, nothing, log_weight).widened(_WIDE)
        self.defense = defense
        self.gates: list[tuple[GaussianConditional, Tensor]] = []
        if components == 1:
            self.parts = [wide, GaussianConditional(targets, given, log_weight)]
        else:
            self.parts = [wide, *self._fitted(targets, given, log_weight, components)]

    def _fitted(self, targets: Tensor, given: Tensor, log_weight: Tensor, components: int) -> list[GaussianConditional]:
        both = torch.cat([given, targets], -1)
        floor = both.var(0) * _FLOOR
        spread = both.std(0).clamp_min(1e-12)
        # each component starts around a draw of its own
        centres = both[torch.randperm(len(both))[:components]]
        distance = ((both.unsqueeze(0) - centres.unsqueeze(1)) / spread).square().sum(-1)
        share = _apart(given, (-0.5 * distance * components).log_softmax(0))
        empty = targets[..., :0]
        parts: list[GaussianConditional] = []
        for _ in range(_SWEEPS):
            size = (share + log_weight).logsumexp(1).log_softmax(0)  # (K, C)
            weights = [s + log_weight for s in share.clamp_min(_NONE)]
            parts = [GaussianConditional(targets, given, w, floor, squares=False) for w in weights]
            gates = [GaussianConditional(given, empty, w, floor[:, : given.shape[-1]]) for w in weights]
            self.gates = list(zip(gates, size.clamp_min(-30.0), strict=True))
            joint = [p.log_prob(targets, given) for p in parts]
            share = (torch.stack(joint) + self._gated(given)).log_softmax(0)
        return parts

    def _gated(self, given: Tensor) -> Tensor:
        """log w_k N(g) (K, S, C), not normalised."""
        return torch.stack([gate.log_prob(given, given[..., :0]) + size for gate, size in self.gates])

    def shares(self, given: Tensor) -> Tensor:
        """log of the components' shares (K + 1, S, C)."""
        first = given.new_full((1, *given.shape[:2]), math.log(self.defense))
        rest = self._gated(given).log_softmax(0) if self.gates else torch.zeros_like(first)
        return torch.cat([first, rest + math.log1p(-self.defense)])

    def at(self, given: Tensor) -> Conditioned:
        """The law given rows (S, C, G)."""
        return Conditioned(self.parts, self.shares(given), [part.mean(given[..., : part.taken]) for part in self.parts])

    def log_prob(self, targets: Tensor, given: Tensor) -> Tensor:
        """Log-density (S, C)."""
        return self.at(given).log_prob(targets)


def _apart(given: Tensor, share: Tensor) -> Tensor:
    """Log-shares (K, S, C) with which components start, where draws pile up at an end of a given number (S, C, G), as
    censored outcomes do, one component for each end: beyond it, what is known of the targets jumps."""
    for k, end in enumerate((given.amin(0), given.amax(0)) if given.shape[-1] else ()):
        there = (given == end).any(-1)
        piled = there.to(share).mean(0)
        piled_here = there & (piled > _PILED) & (piled < 1 - _PILED)
        own = torch.arange(len(share)).reshape(-1, 1, 1) == k
        elsewhere = own & ~there & (piled > _PILED)
        share = torch.where(piled_here, torch.where(own, 0.0, _NONE), share.masked_fill(elsewhere, _NONE))
    return share


class Conditioned:
    """A :class:`Proposal` given rows: components, their log-shares (K, S, C), their means K × (S, C, D)."""

    def __init__(self, parts: list[GaussianConditional], shares: Tensor, means: list[Tensor]) -> None:
        self.parts, self.shares, self.means = parts, shares, means
        self.reached = shares.exp().cumsum(0)

    def repeated(self, count: int) -> Conditioned:
        """The same, `count` times along S."""
        means = [mean.repeat(count, 1, 1) for mean in self.means]
        return Conditioned(self.parts, self.shares.repeat(1, count, 1), means)

    def log_prob(self, targets: Tensor) -> Tensor:
        """Log-density (S, C)."""
        return self._each(targets).logsumexp(0)

    def _each(self, targets: Tensor) -> Tensor:
        scores = [part.score(part.standard(targets, mean)) for part, mean in zip(self.parts, self.means, strict=True)]
        return torch.stack(scores) + self.shares

    def rows(self, uniform: Tensor) -> Tensor:
        """Rows (S, C, D) at points (S, C, 1 + D) of the cube, of which the first number chooses the component."""
        normal = torch.special.ndtri(uniform[..., 1:]).to(self.means[0].dtype)
        chosen = (uniform[..., 0] >= self.reached[:-1]).sum(0)
        found = self.parts[0].rows(normal, self.means[0])
        for k in range(1, len(self.parts)):
            rows = self.parts[k].rows(normal, self.means[k])
            found = torch.where((chosen == k).unsqueeze(-1), rows, found)
        return found

    def uniform(self, targets: Tensor) -> Tensor:
        """A point (S, C, 1 + D) of the cube whose rows are `targets`: uniform, if they are draws of the law."""
        probability = self._each(targets).softmax(0).cumsum(0)
        chosen = (torch.rand_like(probability[0]) * probability[-1] >= probability[:-1]).sum(0)
        start = torch.cat([torch.zeros_like(self.reached[:1]), self.reached[:-1]])
        start = start.gather(0, chosen.unsqueeze(0))[0]
        share = self.shares.gather(0, chosen.unsqueeze(0))[0].exp()
        normal = self.parts[0].standard(targets, self.means[0])
        for k in range(1, len(self.parts)):
            standard = self.parts[k].standard(targets, self.means[k])
            normal = torch.where((chosen == k).unsqueeze(-1), standard, normal)
        selector = start + share * torch.rand_like(start)
        return torch.cat([selector.unsqueeze(-1).double(), torch.special.ndtr(normal.double())], -1)


class DigitalNet:
    r"""M points in the unit cube, a power of two, closed under bitwise addition: the head of a Sobol' sequence.

    Shifted by any point u they are :math:`\{u \oplus v_m\}`. Shifted by a uniform u each is uniform. Shifted by a
    given point, that point is among them, and it could have been any of them; this is what lets a nested estimate
    contain the draw that made the data and stay a bound (see :mod:`pyro_invman.design.nested`).

    References:
        Niederreiter, *Random number generation and quasi-Monte Carlo methods*, SIAM 1992.
    """

    def __init__(self, points: int, dim: int) -> None:
        net = SobolEngine(dim).draw(points, dtype=torch.float64)
        self.bits = (net * 2.0**_BITS).round().long()  # (M, D); the first is zero

    def shifted(self, uniform: Tensor) -> Tensor:
        """Points (M, S, C, D) of shifts (S, C, D); the first of them is the shift itself."""
        scaled = uniform.double() * 2.0**_BITS
        whole = scaled.floor().clamp(0, 2**_BITS - 1)
        moved = whole.long() ^ self.bits.reshape(-1, 1, 1, self.bits.shape[-1])
        return ((moved + (scaled - whole)) * 2.0**-_BITS).clamp(2.0**-50, 1 - 2.0**-50)
