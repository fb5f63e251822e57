r"""Bounds on the information gain that can be climbed: their gradients in the designs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_invman.design.enumerated import EnumeratedGain
from pyro_invman.design.experiment import Draws, Experiment
from pyro_invman.design.nested import Marginal, NestedGain, Structure
from pyro_invman.design.quasi import QuasiRandom
from pyro_invman.design.variational import ContrastiveGain, PosteriorGain
from pyro_invman.variables import DataError

METHODS = ("auto", "enumeration", "vnmc", "contrastive", "posterior", "infonce")
_AT_ONCE = 2**21  # numbers a pass of the model whose graph is kept
_PILOT = 512  # draws that proposals are fitted to, more where there are many sites
_DEAR = 2**21  # numbers a step, beyond which points are no longer added
_POINTS = (16, 64, 256, 1024)  # inner points, the first with which the sides lie close
_CLOSE = 0.03  # nats
_TRIAL = 32  # draws by which that is told
_COMPONENTS = 6  # of a mixture, which is fitted anew every so many steps
_EVERY = 10
_HEARD = 4  # outcomes of the same latents, where these have scores


class Slope:
    r"""A lower bound on the gain of C designs, and its gradient, from fresh draws at each call.

    .. math:: \nabla_d I = E\left[ \nabla_d T + (T - \bar T)\, \nabla_d \log p(v \mid d) \right], \qquad
              T = \log \frac{p(y, \theta \mid d)}{p(y \mid d)\, p(\theta)}

    where draws move with the design as far as their distributions allow, and v is what was drawn from the others
    (counts, choices, censored numbers). The control variate :math:`\bar T` is the mean of T over other outcomes of the
    same latents, of which each has four then. All designs meet the same quasi-random numbers.

    ``enumeration`` sums over outcomes that can be counted, which leaves no score; ``vnmc`` takes marginals from points
    of a proposal that is fitted by moments at each step (the lower side of
    :class:`pyro_invman.design.nested.NestedGain`), ``contrastive`` from points of the prior; ``posterior`` and
    ``infonce`` climb the bounds of :mod:`pyro_invman.design.variational`, whose guides are fitted at each step, so that
    what they would gain by moving is of second order.

    Arguments:
        experiment: at the designs that are started from.
        method: one of METHODS.
        num_samples: S draws a design and call.

    References:
        Foster et al., *A unified stochastic gradient approach to designing Bayesian-optimal experiments*, AISTATS 2020.
        Ao & Li, *On estimating the gradient of the expected information gain in Bayesian experimental design*, AAAI
        2024.
    """

    def __init__(self, experiment: Experiment, method: str, num_samples: int) -> None:
        self.experiment, self.num_samples = experiment, num_samples
        self.calls, self.runs, self.points, self.components = 0, 0, 0, 1
        self.gain: Any = None
        with torch.no_grad():
            self.structure = Structure(experiment)
            self.name = self._chosen(method)
            if self.name == "enumeration":
                self.gain = EnumeratedGain(experiment, self.structure)
            elif self.name in ("vnmc", "contrastive"):
                self._choose_points(experiment)
        common = experiment.vectorized and self.name != "infonce"  # whose contrasts must be independent
        self.quasi = QuasiRandom(common=True) if common else None
        self.heard = 1 if all(experiment.sites[n].pathwise for n in experiment.outcomes) else _HEARD

    def __call__(self, designs: Tensor) -> tuple[Tensor, Tensor]:
        """The bound (C,) at designs (C, *design_shape), and its gradient, of their shape."""
        leaf = designs.detach().clone().requires_grad_()
        if self.name != "enumeration" and self._stale():
            with torch.no_grad():
                self.gain = self._fitted(self.experiment.at(designs.detach()))
        total = torch.zeros(len(designs), dtype=torch.float64)
        numbers = sum(site.shape.numel() for site in self.experiment.sites.values()) * len(designs)
        chunks = math.ceil(numbers * max(1, self.points) * self.num_samples / _AT_ONCE)
        chunks = max(1, min(chunks, self.num_samples // 8))
        for _ in range(chunks):
            with torch.enable_grad():
                bound = self._bound(self.experiment.at(leaf), self.num_samples // chunks)
                if not bound.requires_grad:
                    raise DataError(
                        f"{', '.join(self.experiment.outcomes)}: no gradient reaches the design; outcomes that are "
                        "drawn without a likelihood must be differentiable functions of it"
                    )
                bound.sum().backward()
            total += bound.detach()
        self.calls += 1
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return total / chunks, gradient / chunks

    # ------------------------------------------------------------------ choosing
    def _chosen(self, method: str) -> str:
        experiment = self.experiment
        explicit = experiment.explicit and all(experiment.sites[n].explicit for n in experiment.targets)
        continuous = all(experiment.sites[n].proposable for n in experiment.targets)
        guided = continuous and self.structure.prior_is_explicit
        if method == "auto":
            if EnumeratedGain.problem(experiment, self.structure) is None:
                return "enumeration"
            if explicit and not (guided and not experiment.vectorized):
                return "vnmc"
            return "posterior" if guided else "infonce"
        if method in ("vnmc", "contrastive") and not explicit:
            raise DataError(
                f"method {method!r}: outcomes and targets must be scored, and one of them can only be drawn; use "
                "'infonce' or 'auto'"
            )
        if method == "posterior" and not guided:
            raise DataError("method 'posterior': the targets have no explicit prior over real numbers; use 'auto'")
        return method

    def focus(self, designs: Tensor, num_samples: int) -> None:
        """Goes on with fewer designs (C', *design_shape) and more draws of each; points are chosen anew for them."""
        self.num_samples = num_samples
        if isinstance(self.gain, NestedGain):
            with torch.no_grad():
                self._choose_points(self.experiment.at(designs))
        if self.name != "enumeration":
            self.gain = None

    def _choose_points(self, experiment: Experiment) -> None:
        """The proposal with which the sides lie closest at every design, and how many points bring them close."""
        trial = experiment.draw(_TRIAL if experiment.vectorized else 4)
        weight = trial.log_weight.softmax(0)
        size = sum(site.shape.numel() for site in experiment.sites.values()) * weight.shape[1] * self.num_samples
        gaps: dict[int, float] = {}
        for points in _POINTS if experiment.vectorized else _POINTS[:1]:
            if gaps and points * size > _DEAR:
                break
            self.points = points
            for components in (0,) if self.name == "contrastive" else (1, 0, _COMPONENTS):
                self.components = components
                low, high = self._fitted(experiment).sides(trial, points)
                gap = (weight * (high - low)).sum(0).max().item()
                gaps[components] = gap if math.isfinite(gap) else math.inf
                if gap <= _CLOSE:
                    return
        self.components = min(gaps, key=lambda k: gaps[k])

    def _stale(self) -> bool:
        if self.gain is None:
            return True
        if self.name == "contrastive" or self.components == 0:
            return False
        return self.calls % (_EVERY if self.components > 1 else 1) == 0

    # ------------------------------------------------------------------ bounds
    def _fitted(self, experiment: Experiment) -> Any:
        """The gain with guides or proposals for an experiment's designs."""
        if self.name == "contrastive" or self.components == 0:
            return NestedGain(experiment, self.structure, lambda a, r: Marginal(experiment, a, r, None))
        rows = sum(site.shape.numel() for site in experiment.sites.values())
        pilot = experiment.draw(max(_PILOT, 16 * rows) if experiment.vectorized else self.num_samples)
        self.runs += len(pilot.log_weight)
        if self.name == "posterior":
            return PosteriorGain(experiment, pilot)
        if self.name == "infonce":
            return ContrastiveGain(experiment, pilot)
        return NestedGain(experiment, self.structure, lambda a, r: Marginal(experiment, a, r, pilot, self.components))

    def _bound(self, experiment: Experiment, num: int) -> Tensor:
        """(C,), differentiable."""
        latents = experiment.named("target", "nuisance")
        if self.name == "enumeration":
            halves = []
            for _ in range(2):
                half = experiment.draw(max(2, num // 2), self.quasi)
                halves.append(half._replace(log_weight=half.log_weight.detach() + experiment.scores(half, latents)))
            self.runs += num * (1 + len(self.gain.outcome_values) * len(self.gain.target_values))
            low, high = self.gain.at(experiment).sides(*halves)
            return (low + high) / 2
        draws = experiment.draw(max(2, num // self.heard), self.quasi)
        weights = (draws.log_weight.detach().double() + experiment.scores(draws, latents).double()).softmax(0)
        several = _heard(experiment, draws, self.heard) if self.heard > 1 else draws
        self.runs += len(several.log_weight)
        if isinstance(self.gain, NestedGain):
            gain = self.gain.at(experiment)
            marginals = sum(m is not None for m in (gain.outcome, gain.both, gain.target))
            self.runs += len(several.log_weight) * self.points * marginals
            terms = gain.lower(several, self.points)
        else:
            terms = self.gain.terms(several)
        terms = terms.double().reshape(self.heard, *weights.shape)
        if self.heard > 1:
            scores = experiment.scores(several, experiment.outcomes).double().reshape(terms.shape)
            others = (terms.sum(0) - terms) / (self.heard - 1)
            terms = terms + (terms - others).detach() * scores
        # self-normalised, so that the gradient of the weights has the mean as its control variate
        return (weights * terms.mean(0)).sum(0)


def _heard(experiment: Experiment, draws: Draws, count: int) -> Draws:
    """`count` outcomes (count S, C) of each draw of the latents."""
    names = experiment.named("target", "nuisance")
    held = {n: draws.values[n].repeat(count, *[1] * (draws.values[n].dim() - 1)) for n in names}
    log_weight = draws.log_weight.repeat(count, 1)
    return experiment.run(len(log_weight), held)._replace(log_weight=log_weight)
