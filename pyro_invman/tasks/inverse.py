r"""A sought setting of a row of a task, by Bayes' rule on what the task's forward conditionals say."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions.utils import lazy_property

from pyro_invman.density.univariate import Blend
from pyro_invman.tasks.designs import learned, marginal
from pyro_invman.tasks.network import ManifoldNetwork
from pyro_invman.tasks.predictive import TaskConditional

_FIRST = 32  # nodes, even under the prior
_LATER = ((16, 0.5), (16, 0.0))  # nodes of a round, where those before it found the mass, and how far between them
_SPREAD = 0.2  # share of later nodes that still cover the prior
_PARTICLES = 64  # that the likelihood at a node is averaged over
_END = 1e-5  # of the prior's probability, beyond which the likelihood is taken as constant


class Ratio:
    r"""A density on [0, 1], log-linear between nodes: that of a law relative to another, along the other's probability.

    Arguments:
        nodes: ascending from 0 to 1 (..., N).
        log_height: unnormalised log-density there (..., N).
    """

    def __init__(self, nodes: Tensor, log_height: Tensor) -> None:
        self.nodes = nodes
        rise = log_height.diff(dim=-1)
        log_area = log_height[..., :-1] + _log_mean_exp(rise) + nodes.diff(dim=-1).clamp_min(1e-30).log()
        total = log_area.logsumexp(-1, keepdim=True)
        self.log_height = log_height - total
        self.reached = F.pad((log_area - total).exp().cumsum(-1), (1, 0))

    def _between(self, table: Tensor, at: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Nodes, log-heights and what is reached there, left and right (...,) of the piece of `table` around `at`."""
        shape = torch.broadcast_shapes(table.shape[:-1], at.shape)
        piece = (table[..., 1:-1] <= at.unsqueeze(-1)).sum(-1, keepdim=True).expand(*shape, 1)

        def ends(values: Tensor) -> tuple[Tensor, Tensor]:
            values = values.expand(*shape, values.shape[-1])
            return values.gather(-1, piece).squeeze(-1), values.gather(-1, piece + 1).squeeze(-1)

        return ends(self.nodes), ends(self.log_height), ends(self.reached)

    def log_prob(self, level: Tensor) -> Tensor:
        """Log-density (...,) at probabilities of the other law."""
        (left, right), (low, high), _ = self._between(self.nodes, level)
        return low + (high - low) * (level - left) / (right - left).clamp_min(1e-30)

    def icdf(self, probability: Tensor) -> Tensor:
        """Quantile (...,), in closed form and differentiable."""
        (left, right), (low, high), (before, after) = self._between(self.reached, probability)
        tiny = torch.finfo(probability.dtype).tiny
        share = ((probability - before) / (after - before).clamp_min(tiny)).clamp(0.0, 1.0)
        rise = high - low
        flat = rise.abs() < 1e-4
        steep = torch.where(flat, 1.0, rise.abs())
        share_down = torch.where(rise > 0, 1 - share, share)  # from the higher end
        part = -torch.log1p(share_down * torch.expm1(-steep)).clamp_min(-80.0) / steep
        part = torch.where(flat, share, torch.where(rise > 0, 1 - part, part))
        return left + (right - left) * part.clamp(0.0, 1.0)


def _log_mean_exp(rise: Tensor) -> Tensor:
    """log ∫ exp(rise t) dt over [0, 1], stable for every rise."""
    size = rise.abs()
    flat = size < 1e-4
    safe = torch.where(flat, 1.0, size)
    down = torch.where(flat, -size / 2, torch.log(-torch.expm1(-safe)) - safe.log())
    return rise.clamp_min(0.0) + down


class TaskInverse(TaskConditional):
    r"""p(x | y, other settings, rows of the task) of one continuous setting x, by Bayes' rule,

    .. math:: p(x \mid y, g) \propto p(x \mid g) \sum_s w_s \, p(y \mid x, g, z_s),

    with the prior of a chosen setting (:mod:`pyro_invman.tasks.designs`). The likelihood is the forward conditional,
    with all that the task's rows say, which the direct conditional :math:`p(x \mid y, g, z)` cannot know. Relative to
    the prior, and along the prior's own probability, the density is log-linear between nodes that are placed where the
    mass is: exactly normalised, as wide in support as the prior, differentiable in the value, in what is given and in
    the weights, with differentiable draws.

    Arguments:
        network: of the manifold.
        follows: probability () that the setting follows the others of its row as in the tasks that were learned.

    The others are those of :class:`TaskConditional` after the flow; there is one target, and at most 64 particles.
    """

    _kept: ClassVar[tuple[str, ...]] = (*TaskConditional._kept, "network", "follows")

    def __init__(self, network: ManifoldNetwork, follows: Tensor, *args: Any, **keywords: Any) -> None:
        super().__init__(network.flow, *args, **keywords)
        self.network, self.follows, self.has_rsample = network, follows, True
        if self.num_components > _PARTICLES:
            self.particles, self.prior_log_weights = _fewer(self.particles, self.prior_log_weights)

    @property
    def _column(self) -> int:
        return self.variables.index(self.targets[0])

    @lazy_property
    def _prior(self) -> Blend:
        """p(x | other settings) in working coordinates, batch shape that of the given rows."""
        centre = (self.prior_log_weights.exp().unsqueeze(-1) * self.particles).sum(0)
        row = self.standardization(self.given).to(self.density.dtype)
        follows = learned(self.network, row.nan_to_num(0.0), ~row.isnan(), centre, self._column)
        return Blend(follows, marginal(self.network, self._column), self.follows)

    def _joint(self, level: Tensor) -> Tensor:
        """log w_s + log p(y | x, g, z_s) (S, N, *own batch) at levels (N, *own batch) of the prior."""
        value = self._natural(self._prior.icdf(level)).squeeze(-1)
        here = torch.arange(self.given.shape[-1], device=self.given.device) == self._column
        rows = torch.where(here, value.unsqueeze(-1), self.given)
        particles, weights = self.particles, self.prior_log_weights
        return TaskConditional(
            self.density,
            self.standardization,
            self.variables,
            self.evidence,
            self.targets,
            rows,
            particles,
            weights,
            False,
            self.remainder,
        )._weighed

    def _natural(self, working: Tensor) -> Tensor:
        """Working values (...,) of the sought setting as natural ones (..., 1), inside the support."""
        natural = self.standardization.inverse(working.to(self.given.dtype).unsqueeze(-1), index=[self._column])
        low, high = self._at(self.given, self.particles[0])._ends(natural)
        return natural.clamp(low, high)

    @lazy_property
    def _nodes(self) -> tuple[Tensor, Tensor]:
        """Levels of the prior (N, *own batch), ascending, and what the particles say there (S, N, *own batch)."""
        batch, dtype = self._own_batch, self.density.dtype

        def even(number: int, start: float) -> Tensor:
            level = (torch.arange(number, dtype=dtype, device=self.given.device) + start) / number
            return level.reshape(-1, *[1] * len(batch)).expand(-1, *batch)

        level = even(_FIRST, 0.5)
        joint = self._joint(level)
        for number, start in _LATER:
            with torch.no_grad():
                found = _ratio(level, joint.logsumexp(0))
                blend = torch.logaddexp(found.log_height + math.log(1 - _SPREAD), level.new_tensor(_SPREAD).log())
                more = Ratio(found.nodes, blend).icdf(even(number, start)).clamp(_END, 1 - _END)
            level, order = torch.cat([level, more]).sort(0)
            joint = torch.cat([joint, self._joint(more)], 1)
            joint = joint.gather(1, order.expand(len(joint), *order.shape))
        return level, joint

    @lazy_property
    def _ratio(self) -> Ratio:
        level, joint = self._nodes
        return _ratio(level, joint.logsumexp(0))

    @lazy_property
    def log_weights(self) -> Tensor:
        """Normalised log-weights of the components (S, *batch_shape)."""
        level, joint = self._nodes
        width = torch.cat([torch.zeros_like(level[:1]), (level[1:] + level[:-1]) / 2, torch.ones_like(level[:1])])
        return (joint + width.diff(dim=0).clamp_min(1e-12).log()).logsumexp(1).log_softmax(0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*sample_shape, *batch_shape) of `value` (*sample_shape, *batch_shape, 1)."""
        if self._validate_args:
            self._at(self.given, self.particles[0])._validate_sample(value)
        level, density, missing = self._placed(value)
        score = density + self._ratio.log_prob(level).to(density)
        return score.masked_fill(missing, 0.0).expand(self._shape_of(value))

    def _placed(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Level of the prior, the prior's log-density in natural units, and whether a value is missing, all (...,)."""
        column = [self._column]
        working = self.standardization(value, index=column).squeeze(-1).to(self.density.dtype)
        jacobian = self.standardization.log_abs_det_jacobian(value, index=column).squeeze(-1)
        missing = working.isnan()
        working = working.nan_to_num(0.0)
        return self._prior.cdf(working), self._prior.log_prob(working) + jacobian, missing

    def log_prob_std_error(self, value: Tensor) -> Tensor:
        """Standard error of `log_prob` from integrating over finitely many latents, by the delta method."""
        level, _, missing = self._placed(value)
        level = level.expand(torch.broadcast_shapes(level.shape, self._own_batch))
        batch = len(self._own_batch)
        joint = self._joint(level.reshape(-1, *self._own_batch)).unflatten(1, level.shape[: level.dim() - batch])
        weights = self.log_weights.exp()
        weights = weights.reshape(len(weights), *[1] * (level.dim() - batch), *weights.shape[1:])
        error = (joint.softmax(0) - weights).square().sum(0).sqrt()
        return error.masked_fill(missing, 0.0).expand(self._shape_of(value))

    def _drawn(self, sample_shape: Any) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        level = torch.rand(shape, dtype=self.density.dtype, device=self.given.device)
        return self._natural(self._prior.icdf(self._ratio.icdf(level).clamp(_END, 1 - _END)))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (*sample_shape, *batch_shape, 1), without gradient."""
        with torch.no_grad():
            return self._drawn(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws that are differentiable in what is given and in the weights of the flow."""
        return self._drawn(sample_shape)


def _fewer(particles: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """So many latents that stand for more: of even ones the first, which cover the belief evenly (Sobol points)."""
    number = torch.arange(_PARTICLES, device=particles.device)
    if float(log_weights.max() - log_weights.min()) > 1e-6:  # by systematic resampling
        reached = log_weights.exp().cumsum(0)
        number = torch.searchsorted(reached, (number + 0.5) / _PARTICLES * reached[-1]).clamp_max(len(reached) - 1)
    return particles[number], log_weights.new_full((_PARTICLES,), -math.log(_PARTICLES))


def _ratio(level: Tensor, log_height: Tensor) -> Ratio:
    """Between nodes (N, ...), and constant beyond the outermost."""
    level, height = level.movedim(0, -1), log_height.movedim(0, -1)
    return Ratio(
        F.pad(F.pad(level, (1, 0)), (0, 1), value=1.0), torch.cat([height[..., :1], height, height[..., -1:]], -1)
    )
