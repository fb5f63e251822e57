r"""Log-marginals of a model by nested quasi-Monte Carlo, caught between two sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_invman.design.experiment import Draws, Experiment
from pyro_invman.design.guides import Rows
from pyro_invman.design.proposals import Conditioned, DigitalNet, Proposal

_AT_ONCE = 2**21  # numbers a pass of the model, which bounds memory


class Structure:
    """What an information gain needs to integrate: which nuisances matter, directly or through others.

    Attributes:
        nuisances: those that move outcomes, targets or past data.
        likelihood_is_explicit: none moves any of them given the targets.
        prior_is_explicit: none moves targets or past data.
    """

    def __init__(self, experiment: Experiment) -> None:
        past = experiment.named("past")
        nuisances = [n for n in experiment.named("nuisance") if experiment.sites[n].explicit]
        told = [*experiment.outcomes, *experiment.targets, *past]
        relevant = [n for n in nuisances if experiment.reacts(told, [n])]
        self.likelihood_is_explicit = not relevant
        self.prior_is_explicit = not any(experiment.reacts([*experiment.targets, *past], [n]) for n in relevant)
        waiting = list(relevant)
        while waiting:
            child = waiting.pop()
            above = [n for n in nuisances if n not in relevant and experiment.reacts([child], [n])]
            relevant += above
            waiting += above
        self.nuisances = tuple(n for n in nuisances if n in relevant)


class Marginal:
    r"""log p(A, past | d) of some sites A, everything else integrated out with a proposal q over sites r:

    .. math:: \hat p = \frac{1}{M} \sum_{m=1}^M \frac{p(A, r_m, \text{past} \mid d)}{q(r_m \mid A)}.

    With all M points drawn from q, :math:`E \log \hat p \le \log p` (Jensen). With the r that came with A as one of
    them, :math:`E \log \hat p \ge \log p`: that is a divergence between the law of point sets that contain a draw of
    the posterior and of those that do not. Both hold for points that are a randomly shifted digital net mapped
    through the quantiles of q, for the net is closed under the shift; then both close much faster than 1/M where r has
    few dimensions.

    Arguments:
        known: sites A.
        proposed: sites r; what is in neither is drawn by the model itself.
        draws: of the model, to which q is fitted; None proposes from the model itself.
        components: of q (see :class:`pyro_invman.design.proposals.Proposal`).

    References:
        Foster et al., *Variational Bayesian optimal experimental design*, NeurIPS 2019.
        Foster et al., *A unified stochastic gradient approach to designing Bayesian-optimal experiments*, AISTATS 2020.
    """

    def __init__(
        self,
        experiment: Experiment,
        known: Sequence[str],
        proposed: Sequence[str],
        draws: Draws | None,
        components: int = 1,
    ) -> None:
        self.experiment = experiment
        self.known, self.past = tuple(known), experiment.named("past")
        self.proposed = tuple(proposed) if draws is not None else ()
        self.scored = (*self.proposed, *(n for n in self.known if experiment.sites[n].explicit), *self.past)
        if draws is not None and self.proposed:
            self.rows, self.given = Rows(experiment, self.proposed), Rows(experiment, self.known)
            targets, given = self.rows(draws.values), self.given(draws.values)
            self.law = Proposal(targets, given, draws.log_weight, components)

    def sides(self, draws: Draws, points: int) -> tuple[Tensor, Tensor]:
        """Estimates (S, C) of log p(A, past) of draws whose means lie below it and above it."""
        if not self.proposed:
            below = self._weights(draws, points, None, None)
            above = self._weights(draws, points - 1, None, None)
            own = draws.joint(self.scored)
        else:
            net = DigitalNet(points, 1 + self.rows.dim)
            law = self.law.at(self.given(draws.values))
            rows = self.rows(draws.values)
            uniform = law.uniform(rows)
            below = self._weights(draws, points, law, net.shifted(torch.rand_like(uniform)))
            above = self._weights(draws, points - 1, law, net.shifted(uniform)[1:])
            own = draws.joint(self.scored) - law.log_prob(rows) + self.rows.sites_of(rows)[1]
        with_own = torch.cat([own.unsqueeze(0), above])
        return below.logsumexp(0) - math.log(points), with_own.logsumexp(0) - math.log(points)

    def _weights(self, draws: Draws, points: int, law: Conditioned | None, uniform: Tensor | None) -> Tensor:
        """Log-weights (M, S, C) at points (M, S, C, D) of the unit cube."""
        num, candidates = draws.log_weight.shape
        size = max(1, sum(site.shape.numel() for site in self.experiment.sites.values()))
        parts = []
        step = max(1, _AT_ONCE // (num * candidates * size))
        for start in range(0, points, step):
            count = min(step, points - start)
            given = {n: v.repeat(count, *[1] * (v.dim() - 1)) for n, v in draws.values.items() if n in self.known}
            density = torch.zeros(count * num, candidates)
            if law is not None and uniform is not None:
                repeated = law.repeated(count)
                rows = repeated.rows(uniform[start : start + count].flatten(0, 1))
                sites, jacobian = self.rows.sites_of(rows)
                given |= sites
                density = repeated.log_prob(rows) - jacobian
            run = self.experiment.run(count * num, given)
            parts.append((run.joint(self.scored) - density).reshape(count, num, candidates))
        return torch.cat(parts)


class NestedGain:
    r"""Both sides of the information density of each draw, by three log-marginals:

    .. math:: \log \frac{p(y, \theta \mid d)}{p(y \mid d)\, p(\theta)}

    (under past data each given them). Nuisances, wherever they stand, are integrated in each marginal; where none
    matters the first over the last is the likelihood, which is exact.

    Cost: 2 M runs of the model a draw, for each marginal that is not exact.
    """

    def __init__(
        self,
        experiment: Experiment,
        structure: Structure,
        make: Callable[[Sequence[str], Sequence[str]], Marginal],
    ) -> None:
        self.experiment = experiment
        past = experiment.named("past")
        targets, outcomes = experiment.targets, experiment.outcomes
        nuisances = tuple(n for n in structure.nuisances if experiment.sites[n].proposable)
        unknown = (*(n for n in targets if experiment.sites[n].proposable), *nuisances)
        self.outcome = make(outcomes, unknown)
        self.exact_both: tuple[str, ...] | None = None
        self.exact_target: tuple[str, ...] | None = None
        self.both: Marginal | None = None
        self.target: Marginal | None = None
        if structure.likelihood_is_explicit:
            self.exact_both = (*outcomes, *targets, *past)
        else:
            self.both = make((*outcomes, *targets), nuisances)
        if structure.prior_is_explicit:
            self.exact_target = (*targets, *past)
        else:
            self.target = make(targets, nuisances)

    def sides(self, draws: Draws, points: int) -> tuple[Tensor, Tensor]:
        """Estimates (S, C) of each draw's information density, less log p(past), whose means lie below and above."""
        below, above = self.outcome.sides(draws, points)
        low, high = -above, -below
        for marginal, exact, sign in ((self.both, self.exact_both, 1), (self.target, self.exact_target, -1)):
            if marginal is None:
                assert exact is not None
                low, high = low + sign * draws.joint(exact), high + sign * draws.joint(exact)
            else:
                sides = marginal.sides(draws, points)
                low = low + (sides[0] if sign > 0 else -sides[1])
                high = high + (sides[1] if sign > 0 else -sides[0])
        return low, high
