r"""Conditionals of a row of a task whose latent is not known, but believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_invman.density.anyorder import AnyOrderFlow
from pyro_invman.density.random_functions import Anchor
from pyro_invman.density.remainder import Remainder
from pyro_invman.distributions import ConditionalFlow
from pyro_invman.tasks.effects import TaskContext
from pyro_invman.variables import Standardization, Variables

_AT_ONCE = 65_536  # rows a pass, which bounds memory
_DRAWS = 1024


class TaskConditional(TorchDistribution):
    r"""p(targets | given, rows of the task), the task's latent integrated out as a finite mixture:

    .. math:: p(t \mid g, \text{rows}) = \sum_s w_s(g)\, p(t \mid g, z_s), \qquad
              w_s(g) \propto w_s\, p(g_y \mid g_x, g_\eta, z_s).

    Exact and normalised for its S components. Where the base bends and the targets are evidence, each component also
    knows what the task's rows say beyond the latent (:class:`pyro_invman.density.remainder.Remainder`). Given
    observations :math:`g_y` are evidence about the task and move the weights; given settings are not. Each element of
    the batch integrates z on its own.

    Arguments:
        density: the flow over the D cells of a row and the L of the latent.
        standardization, variables: of the cells.
        evidence: columns whose cells are evidence about the task.
        targets: names of the n targets.
        given: the row in natural units (*batch_shape, D), NaN where a cell is not given.
        particles: latents (S, L).
        log_weights: of the particles (S,), normalised.
        remainder: what the task's rows say of it beyond the latent, for targets that are evidence.

    Shapes:
        batch_shape is that of `given` without its last dimension, event_shape is (n,).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    _kept: ClassVar[tuple[str, ...]] = (
        "density",
        "standardization",
        "variables",
        "evidence",
        "targets",
        "given",
        "particles",
        "prior_log_weights",
        "remainder",
        "has_rsample",
    )

    def __init__(
        self,
        density: AnyOrderFlow,
        standardization: Standardization,
        variables: Variables,
        evidence: Sequence[int],
        targets: Sequence[str],
        given: Tensor,
        particles: Tensor,
        log_weights: Tensor,
        validate_args: bool | None = None,
        remainder: Remainder | None = None,
    ) -> None:
        self.density, self.standardization, self.variables = density, standardization, variables
        self.evidence, self.targets = tuple(evidence), tuple(targets)
        self.given, self.particles, self.prior_log_weights = given, particles, log_weights
        self.remainder = remainder
        self.has_rsample = (
            not any(variables[c].discrete for c in variables.indices(self.targets)) and not self._informed
        )
        super().__init__(given.shape[:-1], torch.Size((len(self.targets),)), validate_args=validate_args)

    @property
    def _informed(self) -> bool:
        return bool((~self.given[..., list(self.evidence)].isnan()).any())

    @property
    def num_components(self) -> int:
        """S"""
        return len(self.particles)

    def _at(self, given: Tensor, latent: Tensor, anchor: Anchor | None = None) -> ConditionalFlow:
        return ConditionalFlow(
            self.density, self.standardization, self.variables, self.targets, given, latent, self._validate_args, anchor
        )

    def _anchor(self, columns: Sequence[int], given: Tensor) -> Anchor | None:
        """What the base says of rows by their settings, if all that is asked of them are `columns` of evidence."""
        if not set(columns) <= set(self.evidence):
            return None
        context: TaskContext = self.density.context  # type: ignore[assignment]
        cells, known = context.row_cells(self.standardization(given).to(self.density.dtype))
        if self.remainder is None:
            return context.base_of_tasks.anchor(cells, known)
        settings = context.base_of_tasks.settings
        return self.remainder.anchor(cells[..., settings], known[..., settings])

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        """The product of the targets' supports."""
        return self._at(self.given, self.particles[0]).support

    @lazy_property
    def log_weights(self) -> Tensor:
        """Normalised log-weights of the components (S, *batch_shape)."""
        return self._weighed.log_softmax(0)

    @lazy_property
    def _weighed(self) -> Tensor:
        """log w_s + log p(given observations | given settings, z_s) (S, *batch_shape)."""
        weights = self.prior_log_weights.reshape(-1, *[1] * len(self._own_batch))
        if not self._informed:
            return weights.expand(-1, *self.given.shape[:-1])
        columns = list(self.evidence)
        cells = self.given[..., columns]
        settings = self.given.clone()
        settings[..., columns] = math.nan
        names = [self.variables[c].name for c in columns]
        apart = ConditionalFlow(
            self.density,
            self.standardization,
            self.variables,
            names,
            settings.unsqueeze(0),
            None,
            False,
            self._anchor(columns, settings),
        )
        scores = [self._scores(apart, cells, part) for part in self._parts(cells.shape[:-1].numel())]
        return weights + torch.cat(scores)

    def _parts(self, rows: int) -> tuple[Tensor, ...]:
        return self.particles.split(max(1, _AT_ONCE // max(1, rows)))

    def _scores(self, template: ConditionalFlow, value: Tensor, latent: Tensor) -> Tensor:
        """log p(value | given, z) (*sample_shape, S', *batch_shape) of some particles (S', L)."""
        latent = latent.reshape(-1, *[1] * len(self.given.shape[:-1]), latent.shape[-1])
        d = ConditionalFlow(
            self.density,
            self.standardization,
            self.variables,
            template.targets,
            template.given,
            latent,
            False,
            template.anchor,
        )
        return d.log_prob(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*sample_shape, *batch_shape) of `value` (*sample_shape, *batch_shape, n)."""
        return self._joined(value).logsumexp(-len(self._own_batch) - 1).expand(self._shape_of(value))

    def log_prob_std_error(self, value: Tensor) -> Tensor:
        """Standard error of `log_prob` from integrating over finitely many latents, by the delta method."""
        axis = -len(self._own_batch) - 1
        share = self._joined(value).softmax(axis)
        weights = self.log_weights.exp()
        error = (share - weights).square().sum(axis).sqrt()
        return error.expand(self._shape_of(value))

    @property
    def _own_batch(self) -> torch.Size:
        return self.given.shape[:-1]

    def _shape_of(self, value: Tensor) -> torch.Size:
        return torch.broadcast_shapes(value.shape[:-1], self.batch_shape)

    def _joined(self, value: Tensor) -> Tensor:
        """log w_s + log p(value | given, z_s), (*sample_shape, S, *own batch)."""
        anchor = self._anchor(self.variables.indices(self.targets), self.given)
        template = self._at(self.given.unsqueeze(0), self.particles[0], anchor)
        if self._validate_args:
            self._at(self.given, self.particles[0])._validate_sample(value)
        batch = len(self._own_batch)
        value = value.expand(*torch.broadcast_shapes(value.shape[:-1], self._own_batch), -1)
        samples = value.shape[: value.dim() - 1 - batch]
        lifted = value.unsqueeze(-batch - 2)
        rows = samples.numel() * self._own_batch.numel()
        scores = [self._scores(template, lifted, part) for part in self._parts(rows)]
        return self.log_weights + torch.cat(scores, -batch - 1)

    def _draw(self, sample_shape: Any) -> ConditionalFlow:
        """The conditional given one latent for each draw, picked by weight."""
        shape = torch.Size(sample_shape) + self.batch_shape
        weights = self.log_weights.detach().exp().movedim(0, -1)  # (*own batch, S)
        reached = weights.expand(*shape, -1).cumsum(-1)
        level = torch.rand(*shape, 1, dtype=reached.dtype, device=reached.device) * reached[..., -1:]
        picked = (reached < level).sum(-1).clamp_max(self.num_components - 1)
        anchor = self._anchor(self.variables.indices(self.targets), self.given)
        return self._at(self.given, self.particles[picked], anchor)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (*sample_shape, *batch_shape, n), without gradient."""
        with torch.no_grad():
            return self._draw(sample_shape).sample()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws that are differentiable in the given settings and the weights of the flow.

        Raises:
            NotImplementedError: a target is categorical, or observations are given, which move the mixture's weights.
        """
        if not self.has_rsample:
            raise NotImplementedError(
                "rsample: categorical targets, and mixtures whose weights depend on given observations, have no "
                "differentiable draw; use sample"
            )
        return self._draw(sample_shape).rsample()

    def expand(self, batch_shape: Any, _instance: TaskConditional | None = None) -> TaskConditional:
        """The same law over a larger batch; nothing is copied."""
        new = self._get_checked_instance(type(self), _instance)
        for name in self._kept:
            setattr(new, name, getattr(self, name))
        batch_shape = torch.Size(batch_shape)
        if torch.broadcast_shapes(self.batch_shape, batch_shape) != batch_shape:
            raise ValueError(f"expand: batch_shape {tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}")
        super(TaskConditional, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def _draws(self) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.sample(torch.Size((_DRAWS,)))

    @property
    def mean(self) -> Tensor:
        """Mean (*batch_shape, n), from 1,024 draws."""
        return self._draws.mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance (*batch_shape, n), from 1,024 draws."""
        return self._draws.var(0)
