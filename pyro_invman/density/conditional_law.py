"""The law of a population at every value of a condition, learned in parts that share a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_invman.density.bijections import Flowed, Linear
from pyro_invman.density.conditional_gaussian import ConditionalGaussian, rotation
from pyro_invman.density.velocity import Solver, VelocityField, matching_loss
from pyro_invman.training import Record, Schedule, train

Widen = Callable[[Tensor, torch.Generator], Tensor]

_GAUSSIAN = Schedule(steps=700, batch_size=256, averaging=0.99)
# a rate is given up after 440 steps without improvement, however few the rows
_FLOW = Schedule(steps=3000, batch_size=1024, evaluate_every=88, patience=5, coolings=3)


class Population:
    """Rows x (N, D) with standardised conditions c (N, K), a share of them held out."""

    def __init__(self, x: Tensor, c: Tensor, validation: float, generator: torch.Generator) -> None:
        order, apart = torch.randperm(len(x), generator=generator), max(1, round(validation * len(x)))
        self.rows, self.context = x[order[apart:]], c[order[apart:]]
        self.held_out, self.context_held_out = x[order[:apart]], c[order[:apart]]


class Parts:
    """The parts of a fit one after another: seeds, time left, and one history.

    Arguments:
        max_seconds: wall time for all; a part is given its share of what is left.
        schedule: of every part; each part's own where None.
    """

    def __init__(
        self, seed: int, max_seconds: float | None = None, progress: bool = False, schedule: Schedule | None = None
    ) -> None:
        self.seed, self.max_seconds, self.progress, self.schedule = seed, max_seconds, progress, schedule
        self.began = time.monotonic()
        self.records: list[Record] = []
        self.names: list[str] = []

    def train(
        self,
        name: str,
        module: nn.Module,
        loss: Callable[[Any, Tensor, torch.Generator], Tensor],
        held_out: Callable[[Any], float],
        rows: int,
        schedule: Schedule,
        share: float,
    ) -> None:
        """Trains one part, with `share` of the time that is left; steps and seconds go on from the part before."""
        before = time.monotonic() - self.began
        left = None if self.max_seconds is None else max(0.0, share * (self.max_seconds - before))
        records = train(
            module,
            loss,
            held_out,
            rows,
            self.schedule or schedule,
            seed=self.seed,
            max_seconds=left,
            progress=self.progress,
        )
        first = self.records[-1].step if self.records else 0
        self.records += [r._replace(step=first + r.step, seconds=before + r.seconds) for r in records]
        self.names += [name] * len(records)
        module.requires_grad_(True)


class ConditionalLaw(nn.Module):
    r"""A law p(x | c): noise :math:`z \sim N(0, I)` follows a flow to u, and :math:`x = m(c) + R(c)\, u`.

    m and R are those of a Gaussian that follows c, fitted first; the flow learns what is not Gaussian, and is the
    identity before it has learned. x is in natural units, c standardised.

    Arguments:
        event_dim: the number D of coordinates.
        context_dim: the number K of conditions.
        architecture: keywords of :class:`pyro_invman.density.velocity.VelocityField`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, event_dim: int, context_dim: int, **architecture: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(event_dim))
        self.register_buffer("scale", torch.ones(event_dim))
        self.gaussian = ConditionalGaussian(event_dim, context_dim)
        self.field = VelocityField(event_dim, context_dim, **architecture)

    def root(self, c: Tensor) -> Linear:
        """u ↦ m(c) + R(c) u, with R a root of the Gaussian's covariance, at conditions `c` (..., K)."""
        mean, log_root = self.gaussian(c)
        root = self.scale.unsqueeze(-1) * torch.linalg.matrix_exp(log_root)
        inverse = torch.linalg.matrix_exp(-log_root) / self.scale
        log_det = log_root.diagonal(dim1=-1, dim2=-2).sum(-1) + self.scale.log().sum()
        return Linear(torch.zeros_like(mean), root, inverse, self.mean + self.scale * mean, log_det)

    def stages(self, c: Tensor, solver: Solver) -> list[Linear | Flowed]:
        """From noise to x."""
        return [Flowed(self.field, c, solver), self.root(c)]

    def fit(self, name: str, population: Population, widen: Widen, parts: Parts, share: float) -> None:
        """Learns the law of a population; `widen` adds to each batch the noise that the law is to include."""
        c, c_out = population.context, population.context_held_out
        checked = self._standard(widen(population.held_out, torch.Generator().manual_seed(parts.seed + 1)))

        def gaussian_loss(module: ConditionalGaussian, rows: Tensor, generator: torch.Generator) -> Tensor:
            return module.loss(self._standard(widen(population.rows[rows], generator)), c[rows])

        def gaussian_held_out(module: ConditionalGaussian) -> float:
            return module.loss(checked, c_out).item()

        parts.train(f"{name}: gaussian", self.gaussian, gaussian_loss, gaussian_held_out, len(c), _GAUSSIAN, share / 4)
        with torch.no_grad():
            mean, log_root = self.gaussian(c)
            whitener = torch.linalg.matrix_exp(-log_root)
            mean_out, log_root_out = self.gaussian(c_out)
            white_out = _applied(torch.linalg.matrix_exp(-log_root_out), checked - mean_out)

        def flow_loss(module: VelocityField, rows: Tensor, generator: torch.Generator) -> Tensor:
            x = self._standard(widen(population.rows[rows], generator))
            return _from_noise(module, _applied(whitener[rows], x - mean[rows]), c[rows], generator)

        def flow_held_out(module: VelocityField) -> float:
            return _from_noise(module, white_out, c_out, torch.Generator().manual_seed(parts.seed + 1)).item()

        parts.train(f"{name}: flow", self.field, flow_loss, flow_held_out, len(c), _FLOW, share)

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


def optimal_turn(source: Linear, target: Linear, length: Tensor, beyond: Tensor | None = None) -> Linear:
    r"""Q between the roots of two laws, which makes ``source.inv``, Q, ``target`` the optimal map between their
    Gaussians, for squared distances in units of `length` (D,); followed by a rotation `beyond` (D, D)."""
    weight = length.square().reciprocal().unsqueeze(-1)
    matrix = rotation(target.matrix.mT @ (weight * source.matrix))
    matrix = matrix if beyond is None else beyond @ matrix
    still = torch.zeros_like(source.before)
    return Linear(still, matrix, matrix.mT, still, torch.zeros_like(source.log_det))


def turn_of_pairs(before: Tensor, after: Tensor) -> Tensor:
    r"""The orthogonal G (D, D) that pairs of whitened points (P, D) ask for beyond the optimal turn, which counts as a
    pair with an error of one:

    .. math:: G = \mathrm{polar}\Bigl(I + s^{-2} \sum_p u_1^{(p)} u_0^{(p)\top}\Bigr), \qquad
              s^2 = \frac{\sum_p |u_1^{(p)} - G_\infty u_0^{(p)}|^2}{P D - D (D - 1) / 2},

    with :math:`G_\infty` the polar factor of the sum alone (Procrustes), and s one where no more numbers are given than
    :math:`G_\infty` fits. Every such G takes one Gaussian to the other.

    References:
        Schönemann, *A generalized solution of the orthogonal Procrustes problem*, Psychometrika 1966.
    """
    product, dim = after.mT @ before, before.shape[-1]
    left = (after - before @ rotation(product).mT).square().sum()
    free = before.numel() - dim * (dim - 1) // 2
    variance = (left / free).clamp_min(1e-4) if free > 0 else torch.ones_like(left)
    return rotation(torch.eye(dim, dtype=product.dtype, device=product.device) + product / variance)


def _applied(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _from_noise(field: VelocityField, end: Tensor, c: Tensor, generator: torch.Generator) -> Tensor:
    start = torch.randn(end.shape, generator=generator).to(end)
    return matching_loss(field, start, end, c, generator)
