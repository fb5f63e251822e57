r"""The expected information gain of any Pyro model, between two limits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_invman.design.enumerated import EnumeratedGain
from pyro_invman.design.experiment import Draws, Experiment, isolated
from pyro_invman.design.limits import limits
from pyro_invman.design.nested import Marginal, NestedGain, Structure
from pyro_invman.design.quasi import QuasiRandom
from pyro_invman.design.variational import (
    ContrastiveGain,
    MarginalGain,
    MarginalLikelihoodGain,
    PosteriorGain,
)
from pyro_invman.results import gain_dataset
from pyro_invman.variables import DataError

if TYPE_CHECKING:
    import xarray as xr

METHODS = ("auto", "posterior", "marginal", "marginal_likelihood", "vnmc", "contrastive", "infonce", "enumeration")
_BATCHES = 16  # over which `num_samples` are spread
_BATCHES_IN_TIME = 3, 10  # into which time is cut, at least and otherwise
_PILOT = 0.15  # share of the time in which proposals get the draws that they are fitted to
_TRIED = 0.03  # share of the time left that a trial batch takes at least, to tell how long others will
_GROWN = 4  # times the draws of a trial batch that the next one has
_FIRST_LOOK = 8  # batches before the bracket may end the search
_MOST_NUMBERS = 2**22  # numbers a batch
_COMPONENTS = 6  # of a proposal whose moments do not suffice
_MOST_POINTS = 4096  # inner draws
_DEAR = 512  # nested draws that the time left should allow
_LEAST_SHARE = 1 / 64, 1 / 8  # of the draws, for which the dear terms are computed
_LEAST_WEIGHED = 50.0  # effective draws of a batch under past data


class _Estimator(NamedTuple):
    """A method ready for its batches.

    Arguments:
        name: of the method.
        batch: draws so many and gives estimates (C,) below and above, with non-finite terms counted (C,).
        sides: which of them are bounds.
        points: inner draws M of each draw.
        cost: runs of the model a draw.
    """

    name: str
    batch: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    sides: tuple[bool, bool]
    points: int = 0
    cost: float = 1.0


def expected_information_gain(
    model: Callable[..., Any],
    designs: Tensor,
    observation_labels: str | Sequence[str],
    target_labels: str | Sequence[str] | None = None,
    *,
    method: str = "auto",
    num_samples: int | None = None,
    max_seconds: float | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
    vectorized: bool = True,
    guide: Callable[..., Any] | None = None,
) -> xr.Dataset:
    r"""Expected information gain of each design, in nats, between a lower and an upper limit.

    .. math:: I(d) = E_{p(y, \theta \mid d)} \left[ \log \frac{p(\theta \mid y, d)}{p(\theta)} \right]

    for outcomes y and targets θ; what else the model draws is integrated. Past data are conditioned on.

    =======================  =======  ===============================================================================
    method                   bounds   what it needs
    =======================  =======  ===============================================================================
    ``posterior``            lower    an explicit prior over continuous targets
    ``marginal``             upper    an explicit likelihood of continuous outcomes, no nuisance that matters
    ``marginal_likelihood``  neither  continuous outcomes that can be drawn
    ``vnmc``                 both     an explicit likelihood; a normal proposal, fitted by moments
    ``contrastive``          both     an explicit likelihood; the prior as proposal (the lower is at most log M)
    ``infonce``              lower    outcomes that can be drawn; a normal critic, fitted by moments
    ``enumeration``          both     few joint values of outcomes (and of targets, where nuisances matter)
    =======================  =======  ===============================================================================

    ``auto`` takes ``enumeration`` where it applies, else ``vnmc``; its proposal, and how many inner points it needs,
    are chosen in a pilot by how far the two sides lie apart. Without an explicit likelihood it takes the higher of
    ``posterior`` and ``infonce``, and there is no upper limit: NaN. Formulas and papers stand with the classes of
    :mod:`pyro_invman.design.variational`, :mod:`~pyro_invman.design.nested` and
    :mod:`~pyro_invman.design.enumerated`.

    Arguments:
        model: a Pyro model, called with designs (S, C, *design_shape); each site's batch shape begins with (S, C).
        designs: candidates (C, *design_shape).
        observation_labels: the site or sites that would be observed.
        target_labels: the site or sites to learn about; None for all latents.
        num_samples: draws a design at most (16,384 where neither this nor `max_seconds` is given). With it and without
            `max_seconds` the result depends on the seed alone.
        max_seconds: wall time at most.
        tolerance: nats; the search ends when every bracket is as narrow.
        seed: of everything that is drawn; generators and Pyro's parameter store are left as found.
        vectorized: False calls the model with one design (*design_shape) at a time.
        guide: proposes latents under past data (see :class:`pyro_invman.design.Experiment`).

    Returns:
        Over ``design``: ``eig``; ``lower`` and ``upper``, one-sided 97.5 % limits that include the error of sampling
        (and, above, what outcomes too rare to have been drawn may tell: p (1 − log p) at p = log 40 / S);
        ``std_error`` of `eig`; ``non_finite``, terms that were infinite and took the estimate with them. In its
        attributes the method, and what was spent: samples, inner points, runs of the model, seconds.

    Raises:
        DataError: see :class:`pyro_invman.design.Experiment`; a method that the model does not allow; past data that
            leave too few of the draws any weight.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_invman as pim
        >>> def model(designs):
        ...     with pyro.plate_stack("designs", designs.shape[:2]):
        ...         slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(slope * designs, 1.0))
        >>> found = pim.design.expected_information_gain(model, torch.tensor([0.0, 1.0, 3.0]), "y", "slope")
        >>> exact = 0.5 * torch.log1p(torch.tensor([0.0, 1.0, 3.0]) ** 2)
        >>> bool((found.lower - 1e-3 <= exact.numpy()).all() and (exact.numpy() <= found.upper + 1e-3).all())
        True

    References:
        Foster et al., *Variational Bayesian optimal experimental design*, NeurIPS 2019.
    """
    if method not in METHODS:
        raise DataError(f"method: found {method!r}, expected one of {list(METHODS)}")
    if num_samples is not None and num_samples < 2 * _BATCHES:
        raise DataError(f"num_samples: found {num_samples}, expected at least {2 * _BATCHES}")
    if max_seconds is not None and not max_seconds > 0:
        raise DataError(f"max_seconds: found {max_seconds}, expected more than 0")
    began = time.monotonic()
    experiment = Experiment(
        model, designs, observation_labels, target_labels, vectorized=vectorized, guide=guide, seed=seed
    )
    with isolated(seed), torch.no_grad():
        search = _Search(experiment, method, num_samples, max_seconds, tolerance, began)
        return search.run()


class _Search:
    """Pilot, then batches until the bracket is narrow or the budget is spent."""

    def __init__(
        self,
        experiment: Experiment,
        method: str,
        num_samples: int | None,
        max_seconds: float | None,
        tolerance: float,
        began: float,
    ) -> None:
        self.experiment, self.method, self.tolerance, self.began = experiment, method, tolerance, began
        self.max_seconds = math.inf if max_seconds is None else max_seconds
        if num_samples is None:
            num_samples = (16_384 if experiment.vectorized else 512) if max_seconds is None else 2**40
        self.num_samples = num_samples
        numbers = sum(site.shape.numel() for site in experiment.sites.values()) * experiment.num_candidates
        self.most = max(32, _MOST_NUMBERS // max(1, numbers))
        self.weighed = bool(experiment.named("past")) or experiment.guide is not None
        self.quasi = QuasiRandom() if experiment.vectorized else None
        self.runs = 0
        self.effective = 1.0  # share of draws that past data leave, at the least
        self.tried = torch.zeros(0)  # the lower terms of the last trial

    def left(self) -> float:
        """Seconds."""
        return self.max_seconds - (time.monotonic() - self.began)

    def draw(self, num: int, quasi: bool = True) -> Draws:
        draws = self.experiment.draw(num, self.quasi if quasi else None)
        self.runs += num
        if self.weighed:
            effective = draws.log_weight.softmax(0).square().sum(0).reciprocal()
            self.effective = min(self.effective, float(effective.min()) / num)
            if effective.min() < min(_LEAST_WEIGHED, num / 8):
                raise DataError(
                    f"past data leave {effective.min():.1f} effective draws of {num}; pass a guide that was trained on "
                    "them, or more num_samples"
                )
        return draws

    # ------------------------------------------------------------------ choosing
    def estimator(self) -> _Estimator:
        experiment, method = self.experiment, self.method
        structure = Structure(experiment)
        if method == "auto":
            if EnumeratedGain.problem(experiment, structure) is None:
                method = "enumeration"
            else:
                method = "vnmc" if experiment.explicit and self._targets_are_explicit() else "free"
        if method == "enumeration":
            return self._enumerated(EnumeratedGain(experiment, structure))
        if method in ("vnmc", "contrastive"):
            if not experiment.explicit or not self._targets_are_explicit():
                raise DataError(
                    f"method {method!r}: outcomes and targets must be scored, and one of them can only be drawn; use "
                    "'infonce' or 'auto'"
                )
            return self._nested(structure, method)
        pilot = self.draw(self._pilot_size(), quasi=False)
        if method == "free":
            choices = [self._variational(name, structure, pilot) for name in self._free(structure)]
            if len(choices) > 1:
                trial = [choice.batch(min(self.most, 1024))[0].mean() for choice in choices]
                return choices[0] if trial[0] >= trial[1] else choices[1]
            return choices[0]
        return self._variational(method, structure, pilot)

    def _targets_are_explicit(self) -> bool:
        return all(self.experiment.sites[n].explicit for n in self.experiment.targets)

    def _free(self, structure: Structure) -> list[str]:
        """Methods that only draw outcomes."""
        names = [] if self.weighed else ["infonce"]
        continuous = all(self.experiment.sites[n].proposable for n in self.experiment.targets)
        if structure.prior_is_explicit and continuous:
            names.insert(0, "posterior")
        if not names:
            raise DataError("auto: outcomes without a likelihood, past data and targets without a density at once")
        return names

    def _pilot_size(self) -> int:
        rows = sum(site.shape.numel() for site in self.experiment.sites.values())
        wanted = min(max(2048, 128 * rows), self.most, max(64, self.num_samples))
        if not self.experiment.vectorized:
            wanted = min(wanted, max(64, self.num_samples // 4))
        if math.isfinite(self.max_seconds):
            took = []
            for few in (32, 512) if self.experiment.vectorized else (8, 16):
                began = time.monotonic()
                self.draw(few, quasi=False)
                took.append(time.monotonic() - began)
            each = max((took[1] - took[0]) / (few / 2), took[1] / few / _GROWN)
            wanted = max(64, min(wanted, int(_PILOT * self.max_seconds / each)))
        return wanted

    # ------------------------------------------------------------------ the methods' batches
    def _variational(self, method: str, structure: Structure, pilot: Draws) -> _Estimator:
        experiment = self.experiment
        if method in ("posterior", "marginal"):
            if method == "posterior" and not (structure.prior_is_explicit and self._targets_are_explicit()):
                raise DataError("method 'posterior': the targets' prior is no explicit density; use 'auto'")
            if method == "marginal" and not (structure.likelihood_is_explicit and experiment.explicit):
                raise DataError(
                    f"method 'marginal': nuisances {list(structure.nuisances)} matter, or the outcomes have no "
                    "likelihood, so there is no log p(y | target) to be had; use 'vnmc' or 'auto'"
                )
        kinds = {
            "posterior": (PosteriorGain, (True, False)),
            "marginal": (MarginalGain, (False, True)),
            "marginal_likelihood": (MarginalLikelihoodGain, (False, False)),
            "infonce": (ContrastiveGain, (True, False)),
        }
        kind, sides = kinds[method]
        gain: Any = kind(experiment, pilot)

        def batch(num: int) -> tuple[Tensor, Tensor, Tensor]:
            draws = self.draw(num, quasi=method != "infonce")  # contrasts must be independent
            terms = gain.terms(draws)
            found = _mean(terms, draws.log_weight)
            if method == "posterior":
                found = found + self._log_past(draws)
            return found, found, _infinite(terms)

        return _Estimator(method, batch, sides)

    def _enumerated(self, gain: EnumeratedGain) -> _Estimator:
        cost = len(gain.outcome_values) * len(gain.target_values)

        def batch(num: int) -> tuple[Tensor, Tensor, Tensor]:
            low, high = gain.sides(self.draw(num // 2), self.draw(num // 2))
            self.runs += num * cost
            return low, high, torch.zeros(len(low), dtype=torch.long)

        return _Estimator("enumeration", batch, (True, True), cost=1 + cost)

    def _nested(self, structure: Structure, method: str) -> _Estimator:
        experiment = self.experiment
        pilot = self.draw(self._pilot_size(), quasi=False)
        trial = self.draw(min(self.most, 64 if experiment.vectorized else 8))

        def made(components: int) -> NestedGain:
            fitted = pilot if components else None
            return NestedGain(experiment, structure, lambda a, r: Marginal(experiment, a, r, fitted, components))

        gain = made(1 if method == "vnmc" else 0)
        marginals = sum(m is not None for m in (gain.outcome, gain.both, gain.target))
        points, gap = self._enough_points(gain, trial, 16)
        if method == "vnmc" and gap > self.tolerance and self._affords_mixture(pilot):
            others = [made(_COMPONENTS), made(0)]
            gaps = [self._gap(other, trial, points) for other in others]
            best = min(range(2), key=lambda k: gaps[k])
            if gaps[best] < gap:
                gain = others[best]
                points, gap = self._enough_points(gain, trial, points)
        # the posterior bound, where the targets have one, moves with the draws' information and costs little
        control = None
        if all(experiment.sites[n].proposable for n in experiment.targets) and structure.prior_is_explicit:
            control = PosteriorGain(experiment, pilot)
        terms = None if control is None else control.terms(trial)
        slope, share = _worth(self.tried, terms, 2 * points * marginals)

        def batch(num: int) -> tuple[Tensor, Tensor, Tensor]:
            draws = self.draw(num)
            few = max(min(num, 16), int(num * share))
            part = Draws(
                {n: v if experiment.sites[n].role == "past" else v[:few] for n, v in draws.values.items()},
                {n: v[:few] for n, v in draws.log_prob.items()},
                draws.log_weight[:few],
            )
            low, high = gain.sides(part, points)
            self.runs += few * 2 * points * marginals
            infinite = _infinite(low) + _infinite(high)
            offset = self._log_past(draws)
            if control is not None:
                moved = slope * control.terms(draws)
                low, high = low - moved[:few], high - moved[:few]
                offset = offset + _mean(moved, draws.log_weight)
            return _mean(low, part.log_weight) + offset, _mean(high, part.log_weight) + offset, infinite

        return _Estimator(method, batch, (True, True), points, 1 + share * 2 * points * marginals)

    def _enough_points(self, gain: NestedGain, trial: Draws, points: int) -> tuple[int, float]:
        """Inner draws with which the sides lie close enough, as far as time allows, and how close they lie."""
        while True:
            began = time.monotonic()
            gap = self._gap(gain, trial, points)
            ahead = 4 * (time.monotonic() - began) / len(trial.log_weight) * _DEAR
            if gap <= self.tolerance or points >= _MOST_POINTS or ahead > 0.4 * self.left():
                return points, gap
            points *= 4

    def _gap(self, gain: NestedGain, trial: Draws, points: int) -> float:
        """How far the sides lie apart, in the worst candidate, or four times the mean over candidates."""
        low, high = gain.sides(trial, points)
        self.tried = low
        self.runs += 2 * points * len(trial.log_weight)
        gaps = _mean(high - low, trial.log_weight)
        gap = max(gaps.max().item(), 4 * gaps.mean().item())
        return gap if math.isfinite(gap) else math.inf

    def _affords_mixture(self, pilot: Draws) -> bool:
        """Whether fitting one takes a small part of the time left (at about 10⁹ products a second)."""
        numbers = sum(site.shape.numel() for site in self.experiment.sites.values())
        return pilot.log_weight.numel() * (numbers + 4) ** 2 * _COMPONENTS * 1e-8 < 0.2 * self.left()

    def _log_past(self, draws: Draws) -> Tensor:
        if not self.weighed:
            return torch.zeros(self.experiment.num_candidates, dtype=torch.float64)
        return draws.log_weight.double().logsumexp(0) - math.log(len(draws.log_weight))

    # ------------------------------------------------------------------ the batches
    def run(self) -> xr.Dataset:
        estimator = self.estimator()
        num = max(2, 2 ** int(math.log2(min(self.num_samples / _BATCHES, self.most))))
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        if math.isfinite(self.max_seconds):
            num, found = self._affordable(estimator, num)
        took = 0.0
        while True:
            start = time.monotonic()
            found.append(estimator.batch(num))
            took = max(0.8 * took, time.monotonic() - start)
            if len(found) < 2:
                continue
            if (len(found) + 1) * num > self.num_samples or took > self.left():
                break
            if len(found) >= _FIRST_LOOK and len(found) % 4 == 0 and self._narrow(found, estimator, num):
                break
        return self._result(found, estimator, num)

    def _affordable(self, estimator: _Estimator, num: int) -> tuple[int, list[tuple[Tensor, Tensor, Tensor]]]:
        """Draws a batch, such that the time left is cut into enough batches: some of what trials take they take however
        few their draws, the rest for each. Where the former is much, batches are fewer, lest it take most time. The
        last trial is the first batch where it is as large."""
        trial = 32 if self.experiment.vectorized else 4
        took: list[float] = []
        while True:
            began = time.monotonic()
            last = estimator.batch(trial)
            took.append(time.monotonic() - began)
            # what costs little more for more draws is tried on, as long as time is left
            cheap = took[-1] < 2 * took[0]
            if took[-1] > self.left() * (1 / (2 * _GROWN) if cheap else _TRIED) or _GROWN * trial > num:
                break
            trial *= _GROWN
        each = took[-1] / trial
        if len(took) > 1:
            each = max((took[-1] - took[-2]) / (trial - trial / _GROWN), each / _GROWN)
        fixed = took[-1] - each * trial
        least, wanted = (max(self.left(), 0.0) / count - fixed for count in _BATCHES_IN_TIME)
        affordable = max(wanted, min(fixed, least)) / each
        if affordable < 2 * trial:
            return trial, [last]
        return int(min(num, 2 ** int(math.log2(affordable)))), []

    def _narrow(self, found: list[tuple[Tensor, Tensor, Tensor]], estimator: _Estimator, num: int) -> bool:
        if not any(estimator.sides):
            return False
        lower, upper, eig, _ = limits(found, self.effective * num)
        width = upper - lower if all(estimator.sides) else 2 * (eig - lower).abs()
        return bool((width <= self.tolerance).all())

    def _result(self, found: list[tuple[Tensor, Tensor, Tensor]], estimator: _Estimator, num: int) -> xr.Dataset:
        lower, upper, eig, error = limits(found, self.effective * num)
        nothing = torch.full_like(eig, torch.nan)
        columns = {
            "eig": eig,
            "lower": lower if estimator.sides[0] else nothing,
            "upper": upper if estimator.sides[1] else nothing,
            "std_error": error,
            "non_finite": sum((f[2] for f in found), torch.zeros_like(found[0][2])),
        }
        attrs = {
            "method": estimator.name,
            "bounds": {(1, 1): "both", (1, 0): "lower", (0, 1): "upper", (0, 0): "neither"}[estimator.sides],
            "samples": len(found) * num,
            "inner_points": estimator.points,
            "model_runs": self.runs,
            "seconds": time.monotonic() - self.began,
        }
        return gain_dataset(columns, self.experiment.designs, attrs)


def _mean(terms: Tensor, log_weight: Tensor) -> Tensor:
    """Weighted mean (C,) of terms (S, C), in double precision."""
    weights = log_weight.double().softmax(0)
    return torch.where(weights > 0, weights * terms.double(), 0.0).sum(0)


def _infinite(terms: Tensor) -> Tensor:
    return (~terms.isfinite()).sum(0)


def _worth(low: Tensor, control: Tensor | None, cost: float) -> tuple[Tensor, float]:
    """Slope (C,) of a control variate, and which share of the draws is worth the dear terms beside it."""
    if control is None or not (low.isfinite().all() and control.isfinite().all()):
        return low.new_zeros(low.shape[1]), 1.0
    spread = control.var(0).clamp_min(1e-30)
    covariance = ((low - low.mean(0)) * (control - control.mean(0))).sum(0) / (len(low) - 1)
    slope = (covariance / spread).clamp(0.0, 1.0)
    slope = torch.where((slope - 1).abs() < 0.1, torch.ones_like(slope), slope)
    rest, moved = (low - slope * control).var(0), slope.square() * spread + 1e-30
    # few will do only where the control says the rest at every candidate: where it does not, the dear terms say all
    least = float(((rest / moved).max() / cost).sqrt().clamp(*_LEAST_SHARE))
    ratio = float((rest.mean() / moved.mean() / cost).sqrt().clamp(least, 1.0))
    return slope, 2.0 ** round(math.log2(ratio))
