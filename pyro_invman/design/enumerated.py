r"""Information gain where outcomes can be counted: no draw of them is needed."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_invman.design.experiment import Draws, Experiment
from pyro_invman.design.nested import Structure
from pyro_invman.variables import DataError

_MOST = 64  # joint values of outcomes and targets
_LEAST = -1e6  # logarithm of a probability


class EnumeratedGain:
    r"""Both sides of the gain from tables of probabilities, averaged over draws of what is above them:

    .. math:: \hat P(y) = \frac1S \sum_s p(y \mid \theta_s, d), \qquad
              I = H[P(y)] - E_\theta H[p(y \mid \theta, d)],

    and, where the targets can be counted too, :math:`I = H[P(\theta)] + H[P(y)] - H[P(\theta, y)]`, which integrates
    any nuisance. The entropy of an estimated table lies below in the mean (Jensen); the cross entropy of two
    independent ones, :math:`-\sum \hat P_1 \log \hat P_2`, lies above.

    Cost: one run of the model a draw for each joint value.
    """

    def __init__(self, experiment: Experiment, structure: Structure) -> None:
        problem = self.problem(experiment, structure)
        if problem:
            raise DataError(f"method 'enumeration': {problem}")
        self.experiment = experiment
        self.counted_targets = not structure.likelihood_is_explicit
        self.outcome_values = _values(experiment, experiment.outcomes)
        self.target_values = _values(experiment, experiment.targets) if self.counted_targets else [{}]

    @staticmethod
    def problem(experiment: Experiment, structure: Structure) -> str | None:
        """Why it cannot serve; None if it can."""
        if not experiment.explicit:
            return "the outcomes have no explicit likelihood"
        count = _count(experiment, experiment.outcomes)
        if count is None or count > _MOST:
            return f"the outcomes do not take at most {_MOST} values"
        if structure.likelihood_is_explicit:
            return None
        targets = _count(experiment, experiment.targets)
        if targets is None or targets * count > _MOST:
            return f"nuisances matter, and outcomes and targets do not take at most {_MOST} joint values"
        if experiment.reacts(experiment.named("nuisance", "past"), experiment.targets):
            return "nuisances or past data depend on the targets"
        return None

    def _table(self, draws: Draws) -> Tensor:
        """log p(θ, y | above) (S, C, K_θ, K_y); without the targets where they are not counted."""
        num, candidates = draws.log_weight.shape
        above = {n: draws.values[n] for n in self.experiment.named("nuisance", "target")}
        scored = (*self.experiment.outcomes, *(self.experiment.targets if self.counted_targets else ()))
        columns = []
        for target, outcome in itertools.product(self.target_values, self.outcome_values):
            fixed = {n: v.expand(num, candidates, *v.shape) for n, v in (target | outcome).items()}
            columns.append(self.experiment.run(num, above | fixed).joint(scored))
        table = torch.stack(columns, -1).double()
        return table.reshape(num, candidates, len(self.target_values), len(self.outcome_values))

    def sides(self, first: Draws, second: Draws) -> tuple[Tensor, Tensor]:
        """Estimates (C,) of the gain from two independent halves, whose means lie below and above."""
        tables = [self._table(half) for half in (first, second)]
        weights = [half.log_weight.double().softmax(0) for half in (first, second)]
        means = [(t + w.log()[..., None, None]).logsumexp(0) for w, t in zip(weights, tables, strict=True)]
        y_low, y_high = _entropy(*(m.logsumexp(-2) for m in means))
        if self.counted_targets:
            z_low, z_high = _entropy(*(m.logsumexp(-1) for m in means))
            both_low, both_high = _entropy(*(m.flatten(-2) for m in means))
            return z_low + y_low - both_high, z_high + y_high - both_low
        noise = [torch.einsum("sc,sckl->c", w, -_times(t, t)) for w, t in zip(weights, tables, strict=True)]
        return y_low - sum(noise) / 2, y_high - sum(noise) / 2

    def at(self, experiment: Experiment) -> EnumeratedGain:
        """The same values for an experiment at other designs."""
        other = copy.copy(self)
        other.experiment = experiment
        return other


def _entropy(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates (C,) of the entropy of a table known by the logarithms (C, K) of two halves, below and above."""
    both = torch.logaddexp(first, second) - math.log(2)
    low = -_times(both, both).sum(-1)
    high = -(_times(first, second) + _times(second, first)).sum(-1) / 2
    return low, high


def _times(first: Tensor, second: Tensor) -> Tensor:
    """exp(first) second, zero where the first is minus infinity; so are its derivatives."""
    return first.exp() * second.clamp_min(_LEAST)


def _values(experiment: Experiment, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Every joint value of some sites."""
    each = []
    for name in names:
        site = experiment.sites[name]
        levels = _levels(site.support)
        assert levels is not None
        draws = itertools.product(levels, repeat=site.shape.numel())
        dtype = torch.long if isinstance(site.support, constraints.integer_interval) else torch.get_default_dtype()
        each.append([{name: torch.tensor(v, dtype=dtype).reshape(site.shape)} for v in draws])
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*each)]


def _count(experiment: Experiment, names: Sequence[str]) -> int | None:
    total = 1
    for name in names:
        site = experiment.sites[name]
        levels = _levels(site.support) if site.explicit else None
        if levels is None or site.shape.numel() > math.log2(_MOST):
            return None
        total *= len(levels) ** site.shape.numel()
    return total


def _levels(support: constraints.Constraint | None) -> list[float] | None:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.boolean:
        return [0.0, 1.0]
    if isinstance(support, constraints.integer_interval):
        ends = [torch.as_tensor(end) for end in (support.lower_bound, support.upper_bound)]
        if all((end == end.flatten()[0]).all() for end in ends):
            return [float(k) for k in range(int(ends[0].flatten()[0]), int(ends[1].flatten()[0]) + 1)]
    return None
