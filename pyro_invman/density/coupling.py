"""Which point of one population goes with which of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_invman.density.bijections import Flowed
from pyro_invman.density.conditional_law import ConditionalLaw, Parts, Population, Widen, optimal_turn
from pyro_invman.density.velocity import Solver, VelocityField, matching_loss, matching_loss_at, stratified
from pyro_invman.training import Schedule

_DRAWING = Solver("adams", 16)  # of couples
_MAP = Schedule(steps=2400, batch_size=1024)
_BATCHES = Schedule(steps=4000, batch_size=128, patience=20)
_CHECKED = 4  # held-out batches


class Coupling(NamedTuple):
    r"""How batches of two unpaired tables are coupled, and what a network learns from the couples.

    Conditional variable flow matching couples rows by the cost
    :math:`|x_0 - x_1|^2 + \eta\, |c_0 - c_1|^2`, follows :math:`N((1 - t)\, c_0 + t\, c_1, \sigma_c^2)` beside the
    states, and weights a couple by :math:`\exp(-|c_1 - c_0|^2 / 2 \sigma_c^2)`. Its flow leaves the condition where it
    is, so that only the velocity of the state is learned. States and conditions are standardised.

    Arguments:
        condition_cost: :math:`\eta`.
        condition_width: :math:`\sigma_c`; None for conditions that do not move: the network reads the target's, and
            nothing is reweighted.
        width: :math:`\sigma`, of the path of the states.
        optimal: couple by optimal transport within the batch; False couples at random.

    With ``Coupling(0.0, None)`` this is OT-CFM, with ``Coupling(0.0, None, optimal=False)`` plain flow matching.

    References:
        Generale, Robertson & Kalidindi, *Conditional variable flow matching*, arXiv:2411.08314, 2024.
        Tong et al., *Improving and generalizing flow-based generative models with minibatch optimal transport*, 2024.
    """

    condition_cost: float = 10.0
    condition_width: float | None = 0.1
    width: float = 0.03
    optimal: bool = True

    def loss(
        self, field: VelocityField, x0: Tensor, c0: Tensor, x1: Tensor, c1: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Loss of a batch of each population, x (B, D) and c (B, K), rows in no correspondence."""
        if self.optimal:
            to = assignment(squared_distances(x0, x1) + self.condition_cost * squared_distances(c0, c1))
            x1, c1 = x1[to], c1[to]
        t = stratified(len(x0), generator).to(x0)
        if self.condition_width is None:
            return matching_loss_at(field, t, x0, x1, c1, generator, width=self.width)
        c = torch.lerp(c0, c1, t.unsqueeze(-1))
        c = c + self.condition_width * torch.randn(c.shape, generator=generator).to(c)
        far = (c1 - c0).square().sum(-1) / (2 * self.condition_width**2)
        # the nearest couple counts one: a batch without a near couple says as much as it can, and not 0 / 0
        weight = torch.exp(far.min() - far)
        return matching_loss_at(field, t, x0, x1, c, generator, width=self.width, weight=weight)

    def fit(self, field: VelocityField, source: Population, target: Population, widen: Widen, parts: Parts) -> None:
        """Trains `field` on batches of two populations in standardised coordinates."""

        def batch_loss(module: VelocityField, rows: Tensor, generator: torch.Generator) -> Tensor:
            others = torch.randint(len(target.rows), (len(rows),), generator=generator)
            x0, c0 = widen(source.rows[rows], generator), source.context[rows]
            return self.loss(module, x0, c0, target.rows[others], target.context[others], generator)

        def held_out(module: VelocityField) -> float:
            generator, total = torch.Generator().manual_seed(parts.seed + 1), 0.0
            size = min(256, len(source.held_out), len(target.held_out))
            for _ in range(_CHECKED):
                i, j = (torch.randperm(len(p.held_out), generator=generator)[:size] for p in (source, target))
                x0, c0 = widen(source.held_out[i], generator), source.context_held_out[i]
                x1, c1 = target.held_out[j], target.context_held_out[j]
                total += self.loss(module, x0, c0, x1, c1, generator).item()
            return total / _CHECKED

        parts.train("map", field, batch_loss, held_out, len(source.rows), _BATCHES, 1.0)


@torch.no_grad()
def coupled_draws(
    source: ConditionalLaw,
    target: ConditionalLaw,
    c: Tensor,
    size: int,
    length: Tensor,
    anchor: Anchor | None,
    generator: torch.Generator,
    beyond: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of two laws at the same conditions `c` (G, K), `size` S of each, coupled within each condition.

    By squared distance in units of `length` (D,), or by what `anchor` makes of it, which expects a draw of the source
    where its noise leads in the target. Draws come from `even_noise`: with independent ones, more of one law than of
    the other would fall on one side of a gap, and some be sent across.

    Returns:
        whitened points (G, S, D): of the source, turned as the optimal map between Gaussians turns them and then by
        `beyond` (D, D), and of the target; and c (G, K).
    """
    starts, ends = [], []
    for at in c.split(32):
        roots = [law.root(at.unsqueeze(1)) for law in (source, target)]
        turn = optimal_turn(roots[0], roots[1], length, beyond)
        noise = [even_noise(len(at), size, len(length), generator).to(c) for _ in roots]
        flows = [Flowed(law.field, at.unsqueeze(1), _DRAWING) for law in (source, target)]
        white = [flow.go(z, False, False)[0] for flow, z in zip(flows, noise, strict=True)]
        places = [root.go(u, False, False)[0] / length for root, u in zip(roots, white, strict=True)]
        if anchor is None:
            costs = [squared_distances(x0, x1) for x0, x1 in zip(*places, strict=True)]
        else:
            seen = flows[1].go(turn.go(noise[0], False, False)[0], False, False)[0]
            expected = roots[1].go(seen, False, False)[0] / length
            parts = zip(places[0], places[1], at, expected, strict=True)
            costs = [anchor.cost(x0, x1, condition.expand(size, -1), e) for x0, x1, condition, e in parts]
        ends += [end[assignment(cost)] for end, cost in zip(white[1], costs, strict=True)]
        starts.append(turn.go(white[0], False, False)[0])
    return torch.cat(starts), torch.stack(ends), c


def even_noise(groups: int, size: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draws of N(0, I) (groups, size, dim), each group a scrambled Sobol sequence of its own: every draw is normal, and
    those of a group fill space more evenly than independent ones.

    References:
        Matousek, *On the L2-discrepancy for anchored boxes*, Journal of Complexity 1998.
    """
    seeds = torch.randint(2**31, (groups,), generator=generator).tolist()
    cells = torch.stack([SobolEngine(dim, scramble=True, seed=k).draw(size, dtype=torch.float64) for k in seeds])
    return torch.special.ndtri(cells + 2.0**-31)  # the middles of cells of width 2^-30


def fit_couples(field: VelocityField, couples: Sequence[Tensor], parts: Parts) -> None:
    """Trains `field` on `coupled_draws`; the couples of a tenth of the conditions are held out."""
    start, end, c = couples
    at, apart = c.unsqueeze(1).expand(*start.shape[:2], -1), max(1, len(c) // 10)
    rows = [values[apart:].flatten(0, 1) for values in (start, end, at)]
    out = [values[:apart].flatten(0, 1) for values in (start, end, at)]

    def loss(module: VelocityField, which: Tensor, generator: torch.Generator) -> Tensor:
        return matching_loss(module, rows[0][which], rows[1][which], rows[2][which], generator)

    def held_out(module: VelocityField) -> float:
        generator = torch.Generator().manual_seed(parts.seed + 1)
        return matching_loss(module, out[0], out[1], out[2], generator).item()

    parts.train("map", field, loss, held_out, len(rows[0]), _MAP, 1.0)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M) between rows of `a` (N, D) and `b` (M, D)."""
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)


def assignment(cost: Tensor) -> Tensor:
    """Which column each row goes to (N,), one to one, at least total `cost` (N, N): optimal transport between equal
    weights, by POT's network simplex."""
    import ot

    number = len(cost)
    plan = ot.emd([], [], cost.detach().double().cpu().numpy(), numItermax=1_000_000)
    return torch.as_tensor(plan).argmax(-1).to(cost.device) if number else torch.zeros(0, dtype=torch.long)


class Anchor:
    r"""Where a few known pairs say that points go: a Gaussian process for the displacement :math:`x_1 - e(x_0, c)` from
    where they are expected without the pairs.

    With kernel :math:`a^2 \exp(-|u - u'|^2 / 2 l^2) + b^2 (1 + u \cdot u')` over :math:`u = (x_0, c)` and noise
    :math:`s^2`, shared by the coordinates and chosen by marginal likelihood: pairs that contradict each other count as
    noise, and little is learned from them. Away from the pairs it falls back on what is expected, with a wide law.

    The cost of sending :math:`x_0` to :math:`x_1` is :math:`|x_1 - e(u) - \mu(u)|^2 / (v(u) + s^2)`, twice the negative
    log-likelihood but for a term that every couple of a row shares.

    Arguments:
        x0, x1: the pairs (P, D), in units of the cost.
        c: their conditions (P, K), standardised.
        scale: by which x_0 is divided in u, so that places and conditions compare.
        expected: e of the pairs (P, D); x0 itself where None.

    References:
        Rasmussen & Williams, *Gaussian processes for machine learning*, 2006, chapters 2 and 5.

    Attributes:
        evidence: the logarithm of the marginal likelihood of the pairs.
    """

    _STEPS = 150

    def __init__(self, x0: Tensor, x1: Tensor, c: Tensor, scale: float, expected: Tensor | None = None) -> None:
        self.scale = scale
        self.inputs, shift = self._read(x0, c), (x1 - (x0 if expected is None else expected)).double()
        size = shift.square().mean().sqrt().clamp_min(1e-6).log()
        self.logs = torch.stack([size, size - 1, size.new_tensor(0.0), size - 2]).requires_grad_()
        optimizer = torch.optim.Adam([self.logs], lr=0.05)
        with torch.enable_grad():
            for _ in range(self._STEPS):
                loss = -self._log_likelihood(self._factor(), shift)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    self.logs[3].clamp_(min=size - math.log(1e3))
        self.logs = self.logs.detach()
        self.factor = self._factor()
        self.weights = torch.cholesky_solve(shift, self.factor)
        self.evidence = float(self._log_likelihood(self.factor, shift))

    def _read(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([x / self.scale, c], -1).double()

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        near, linear, length, _ = self.logs.exp()
        bump = torch.exp(-0.5 * squared_distances(a, b) / length.square())
        return near.square() * bump + linear.square() * (1 + a @ b.mT)

    def _factor(self) -> Tensor:
        noise = self.logs[3].exp().square() * torch.eye(len(self.inputs), dtype=torch.double)
        return torch.linalg.cholesky(self._kernel(self.inputs, self.inputs) + noise)

    @staticmethod
    def _log_likelihood(factor: Tensor, shift: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(factor, shift, upper=False)
        volume = factor.diagonal().log().sum() + len(shift) * math.log(2 * math.pi) / 2
        return -0.5 * white.square().sum() - shift.shape[-1] * volume

    def predict(self, x: Tensor, c: Tensor, expected: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean (N, D) of where points `x` (N, D) go, and the variance (N,) of each coordinate, noise included; they are
        `expected` (N, D), or where they are."""
        inputs = self._read(x, c)
        across = self._kernel(inputs, self.inputs)
        near, linear, _, noise = self.logs.exp().square()
        before = near + linear * (1 + inputs.square().sum(-1))
        known = torch.linalg.solve_triangular(self.factor, across.mT, upper=False).square().sum(0)
        start = x if expected is None else expected
        return start + (across @ self.weights).to(x), ((before - known).clamp_min(0) + noise).to(x)

    def cost(self, x0: Tensor, x1: Tensor, c: Tensor, expected: Tensor | None = None) -> Tensor:
        """Cost (N, M) of sending each of `x0` (N, D), at conditions `c` (N, K), to each of `x1` (M, D)."""
        mean, variance = self.predict(x0, c, expected)
        return squared_distances(mean, x1) / variance.unsqueeze(-1)
