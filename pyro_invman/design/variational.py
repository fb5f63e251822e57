r"""Bounds on the information gain from guides: one pass of the model a draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_invman.design.experiment import Draws, Experiment
from pyro_invman.design.guides import Rows
from pyro_invman.design.proposals import Conditioned, Proposal
from pyro_invman.variables import DataError

_CONTRASTS = 256
_DEFENSE = 1e-3  # of the wide part


class NormalGuide:
    """log q(sites | given sites), normal in the coordinates of :class:`Rows` but for a thousandth that is wide."""

    def __init__(self, experiment: Experiment, sites: Sequence[str], given: Sequence[str], draws: Draws) -> None:
        self.rows, self.given = Rows(experiment, sites), Rows(experiment, given)
        self.law = Proposal(self.rows(draws.values), self._given(draws), draws.log_weight, defense=_DEFENSE)

    def _given(self, draws: Draws) -> Tensor:
        if not self.given.names:
            return draws.log_weight.new_zeros(*draws.log_weight.shape, 0)
        return self.given(draws.values)

    def score(self, draws: Draws) -> Tensor:
        """Log-density (S, C) of the sites of draws."""
        rows = self.rows(draws.values)
        return self.law.log_prob(rows, self._given(draws)) - self.rows.sites_of(rows)[1]

    def crossed(self, draws: Draws, contrasts: int) -> Tensor:
        """Log-density (L, S, C) of each draw's sites given what `contrasts` other draws have."""
        rows, law = self.rows(draws.values), self.law.at(self._given(draws))
        jacobian = self.rows.sites_of(rows)[1]
        scores = []
        for k in range(1, contrasts + 1):
            moved = Conditioned(law.parts, law.shares.roll(k, 1), [mean.roll(k, 0) for mean in law.means])
            scores.append(moved.log_prob(rows) - jacobian)
        return torch.stack(scores)


def needs_density(experiment: Experiment, method: str, sites: Sequence[str]) -> None:
    """Refuses sites that a normal guide cannot describe."""
    for name in sites:
        site = experiment.sites[name]
        if site.discrete or site.support is None:
            kind = "discrete" if site.discrete else "without a support"
            raise DataError(
                f"method {method!r}: site {name!r} is {kind}, and a normal guide cannot score it; use 'auto'"
            )


class PosteriorGain:
    r"""Lower side: :math:`I \ge E \log q(\theta \mid y, d) - E \log p(\theta)` (Barber & Agakov).

    Nuisances are integrated by being drawn. The prior must be explicit. Cost: one run of the model a draw.

    References:
        Barber & Agakov, *The IM algorithm*, NeurIPS 2003. Foster et al., NeurIPS 2019.
    """

    def __init__(self, experiment: Experiment, draws: Draws) -> None:
        self.experiment = experiment
        needs_density(experiment, "posterior", experiment.targets)
        self.guide = NormalGuide(experiment, experiment.targets, experiment.outcomes, draws)

    def terms(self, draws: Draws) -> Tensor:
        """(S, C), less log p(past)."""
        return self.guide.score(draws) - draws.joint((*self.experiment.targets, *self.experiment.named("past")))


class MarginalGain:
    r"""Upper side: :math:`I \le E[\log p(y \mid \theta, d) - \log q(y \mid d)]`.

    For an explicit likelihood without nuisances. Cost: one run of the model a draw.

    References:
        Foster et al., NeurIPS 2019.
    """

    def __init__(self, experiment: Experiment, draws: Draws) -> None:
        self.experiment = experiment
        needs_density(experiment, "marginal", experiment.outcomes)
        self.guide = NormalGuide(experiment, experiment.outcomes, (), draws)

    def terms(self, draws: Draws) -> Tensor:
        """(S, C)."""
        return draws.joint(self.experiment.outcomes) - self.guide.score(draws)


class MarginalLikelihoodGain:
    r"""Neither side: :math:`I \approx E[\log q(y \mid \theta, d) - \log q(y \mid d)]`, for outcomes that can only be
    drawn. Its error is at most the sum of the two guides' divergences.

    References:
        Foster et al., NeurIPS 2019.
    """

    def __init__(self, experiment: Experiment, draws: Draws) -> None:
        needs_density(experiment, "marginal_likelihood", experiment.outcomes)
        self.likelihood = NormalGuide(experiment, experiment.outcomes, experiment.targets, draws)
        self.marginal = NormalGuide(experiment, experiment.outcomes, (), draws)

    def terms(self, draws: Draws) -> Tensor:
        """(S, C)."""
        return self.likelihood.score(draws) - self.marginal.score(draws)


class ContrastiveGain:
    r"""Lower side, at most log(L + 1), with L other draws θ_l as contrasts (InfoNCE):

    .. math:: I \ge E \log \frac{f(y, \theta_0)}{\frac{1}{L+1} \sum_{l=0}^{L} f(y, \theta_l)}

    with f a learned :math:`q(y \mid \theta, d)`, so that outcomes, targets and nuisances need only be drawn. Any f
    gives a bound. Cost: one run of the model a draw, L evaluations of the guide.

    References:
        van den Oord et al., *Representation learning with contrastive predictive coding*, 2018.
        Foster et al., AISTATS 2020.
    """

    def __init__(self, experiment: Experiment, draws: Draws, contrasts: int = _CONTRASTS) -> None:
        needs_density(experiment, "contrastive", experiment.outcomes)
        if experiment.named("past") or experiment.guide is not None:
            raise DataError(
                "method 'contrastive': its draws must weigh alike, so it takes no past data; use 'posterior'"
            )
        self.contrasts = contrasts
        self.guide = NormalGuide(experiment, experiment.outcomes, experiment.targets, draws)

    def terms(self, draws: Draws) -> Tensor:
        """(S, C)."""
        own = self.guide.score(draws)
        others = self.guide.crossed(draws, min(self.contrasts, len(own) - 1))
        both = torch.cat([own.unsqueeze(0), others])
        return own - both.logsumexp(0) + math.log(len(both))
