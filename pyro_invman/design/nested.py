r"""Log-marginals of a model by nested quasi-Monte Carlo, caught between two sides."""

from __future__ import annotations

import copy
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
        return self.below(draws, points), self.above(draws, points)

    def below(self, draws: Draws, points: int) -> Tensor:
        """The estimate (S, C) whose mean lies below."""
        law, rows = self._law(draws)
        uniform = None
        if law is not None and rows is not None:
            net = DigitalNet(points, 1 + self.rows.dim)
            uniform = net.shifted(torch.rand(*rows.shape[:2], 1 + self.rows.dim, dtype=torch.float64))
        return self._weights(draws, points, law, uniform).logsumexp(0) - math.log(points)

    def above(self, draws: Draws, points: int) -> Tensor:
        r"""The estimate (S, C) whose mean lies above.

        Its gradient in the design is that of log p(A, past | d) along the draws, by Fisher's identity,
        :math:`\nabla \log p(A) = E_{r \mid A} \nabla \log p(A, r)`: points are held, and known sites move.
        """
        law, rows = self._law(draws)
        uniform, own = None, self._own(draws)
        if law is not None and rows is not None:
            uniform = DigitalNet(points, 1 + self.rows.dim).shifted(law.uniform(rows))[1:]
            own = own - law.log_prob(rows) + self.rows.sites_of(rows)[1]
        with_own = torch.cat([own.unsqueeze(0), self._weights(draws, points - 1, law, uniform)])
        return with_own.logsumexp(0) - math.log(points)

    def _law(self, draws: Draws) -> tuple[Conditioned | None, Tensor | None]:
        """q given what draws know, and rows (S, C, D) of the r that came with it."""
        if not self.proposed:
            return None, None
        values = {name: value.detach() for name, value in draws.values.items()}
        return self.law.at(self.given(values)), self.rows(values)

    def _own(self, draws: Draws) -> Tensor:
        """log p(A, r, past) (S, C) of the draws themselves."""
        if not torch.is_grad_enabled():
            return draws.joint(self.scored)
        names = self.experiment.named("target", "nuisance", "outcome")
        held = {n: draws.values[n].detach() if n in self.proposed else draws.values[n] for n in names}
        run = self.experiment.run(len(draws.log_weight), held)
        return run.joint(self.scored) + self.experiment.scores(run, self._drawn)

    @property
    def _drawn(self) -> tuple[str, ...]:
        """Latents that the model itself draws."""
        latents = self.experiment.named("target", "nuisance")
        return tuple(n for n in latents if n not in self.known and n not in self.proposed)

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
            score = run.joint(self.scored) - density
            if torch.is_grad_enabled():
                score = score + self.experiment.scores(run, self._drawn)
            parts.append(score.reshape(count, num, candidates))
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

    def lower(self, draws: Draws, points: int) -> Tensor:
        """The estimate (S, C) whose mean lies below, alone; differentiable in the designs."""
        low = -self.outcome.above(draws, points)
        low = low + (draws.joint(self.exact_both or ()) if self.both is None else self.both.below(draws, points))
        return low - (draws.joint(self.exact_target or ()) if self.target is None else self.target.above(draws, points))

    def at(self, experiment: Experiment) -> NestedGain:
        """The same proposals for an experiment at other designs."""
        other = copy.copy(self)
        other.experiment = experiment
        for name in ("outcome", "both", "target"):
            marginal = copy.copy(getattr(self, name))
            if marginal is not None:
                marginal.experiment = experiment
            setattr(other, name, marginal)
        return other
