r"""The guided estimators of `pyro.contrib.oed` on linear-Gaussian problems, untuned and tuned by hand.

Untuned: guides as in Pyro's own tests (a linear map of the outcomes, or a mean, from zero; a full triangular scale from
one), trained with the settings of its two tutorials, *working memory* (Adam, 100 draws a step, learning rates from 0.1
down to 0.001) and *elections* (Adam, 10 draws a step, 0.001), for as many steps as the time allows; 10,000 draws in the
end.

Tuned by hand: guides of the right shape (the covariance of a linear model, whose scales are learned, from its
prior), with learning rates that fall a hundredfold; half the time trains, the other half draws for the estimate. The
rate is the one with the least error against the truth, which favours them. No guide checks its arguments, which would
cost most of its time.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.oed.eig import marginal_eig, marginal_likelihood_eig, nmc_eig, posterior_eig, vnmc_eig
from torch import Tensor
from torch.distributions import constraints

ESTIMATORS = ("posterior", "marginal", "marginal_likelihood", "vnmc")
RATES = (0.1, 0.03)
_AT_ONCE = 20_000  # draws of an estimate
_TRIAL = 10  # steps, to time them


class Linear(NamedTuple):
    """y = x θ + z u + noise: designs x (C, n, p), prior spread (p,) of θ; z (n, m) where there are nuisances u."""

    model: Callable[[Tensor], None]
    x: Tensor
    prior: Tensor
    z: Tensor | None
    exact: Tensor


class Setting(NamedTuple):
    """How an estimator is used: draws a step, learning rates (first, last), draws in the end, share of time that it
    trains."""

    name: str
    family: str
    draws: Any
    rates: tuple[float, float]
    final: Any
    training: float


def untuned(estimator: str) -> list[Setting]:
    """The tutorials'; variational nested Monte Carlo, which is in neither, with the draws of its test."""
    nested = estimator == "vnmc"
    return [
        Setting(
            "working memory", "plain", (9, 3) if nested else 100, (0.1, 0.001), (500, 100) if nested else 10_000, 1.0
        ),
        Setting("elections", "plain", (9, 3) if nested else 10, (0.001, 0.001), (500, 100) if nested else 10_000, 1.0),
    ]


def by_hand(estimator: str) -> list[Setting]:
    draws, final = ((50, 10), (1000, 20)) if estimator == "vnmc" else (100, _AT_ONCE)
    return [Setting(f"rate {rate:g}", "linear", draws, (rate, rate / 100), final, 0.5) for rate in RATES]


# ---------------------------------------------------------------------- guides
def _triangle(name: str, count: int, size: int) -> Tensor:
    return pyro.param(name, torch.eye(size).repeat(count, 1, 1), constraint=constraints.lower_cholesky)


def _scales(problem: Linear, what: str) -> tuple[Tensor, Tensor]:
    """Learned covariances of the latents (C, p), as variances, and of the outcomes given these (C, n, n)."""
    count, rows, _ = problem.x.shape
    prior = pyro.param(f"{what}_prior", problem.prior.repeat(count, 1), constraint=constraints.positive)
    noise = pyro.param(f"{what}_noise", torch.ones(count), constraint=constraints.positive)
    given = noise.square()[:, None, None] * torch.eye(rows)
    if problem.z is not None:
        own = pyro.param(f"{what}_own", torch.ones(count), constraint=constraints.positive)
        given = given + own.square()[:, None, None] * problem.z @ problem.z.mT
    return prior.square(), given


def guides(problem: Linear, family: str) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Of the latents given outcomes, of the outcomes, and of the outcomes given latents."""
    count, rows, size = problem.x.shape

    def posterior(y_dict: dict[str, Tensor], design: Tensor, observations: Any, targets: Any) -> None:
        y = y_dict["y"]
        if family == "linear":
            variance, given = _scales(problem, "posterior")
            weighed = torch.linalg.solve(given, problem.x)  # (C, n, p)
            covariance = torch.linalg.inv(problem.x.mT @ weighed + torch.diag_embed(1 / variance))
            mean = torch.einsum("cpq,cnq,...cn->...cp", covariance, weighed, y)
            scale = torch.linalg.cholesky(covariance)
        else:
            slope = pyro.param("slope", torch.zeros(count, size, rows))
            mean = torch.einsum("cpn,...cn->...cp", slope, y)
            scale = _triangle("scale", count, size)
        pyro.sample("theta", dist.MultivariateNormal(mean, scale_tril=scale, validate_args=False))

    def marginal(design: Tensor, observations: Any, targets: Any) -> None:
        mean = pyro.param("mean", torch.zeros(count, rows))
        if family == "linear":
            variance, given = _scales(problem, "marginal")
            scale = torch.linalg.cholesky(problem.x * variance[:, None] @ problem.x.mT + given)
        else:
            scale = _triangle("marginal_scale", count, rows)
        pyro.sample("y", dist.MultivariateNormal(mean, scale_tril=scale, validate_args=False))

    def likelihood(theta_dict: dict[str, Tensor], design: Tensor, observations: Any, targets: Any) -> None:
        centre = torch.einsum("cnp,...cp->...cn", problem.x, theta_dict["theta"])
        mean = pyro.param("shift", torch.zeros(count, rows))
        if family == "linear":
            scale = torch.linalg.cholesky(_scales(problem, "likelihood")[1])
        else:
            scale = _triangle("likelihood_scale", count, rows)
        pyro.sample("y", dist.MultivariateNormal(centre + mean, scale_tril=scale, validate_args=False))

    return posterior, marginal, likelihood


# ---------------------------------------------------------------------- estimators
def _estimate(
    problem: Linear,
    estimator: str,
    given: tuple[Callable[..., None], ...],
    draws: Any,
    steps: int,
    rates: Any,
    final: Any,
) -> Tensor:
    """(C,) after `steps` more of training."""
    optimizer = pyro.optim.ExponentialLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": rates[0]},
            "gamma": (rates[1] / rates[0]) ** (1 / max(steps, 1)),
        }
    )
    posterior, marginal, likelihood = given
    asked = {"num_samples": draws, "num_steps": steps, "optim": optimizer, "final_num_samples": final}
    where = (problem.model, problem.x, "y", "theta")
    if estimator == "posterior":
        return posterior_eig(*where, guide=posterior, **asked)
    if estimator == "marginal":
        return marginal_eig(*where, guide=marginal, **asked)
    if estimator == "vnmc":
        return vnmc_eig(*where, guide=posterior, **asked)
    return marginal_likelihood_eig(*where, marginal_guide=marginal, cond_guide=likelihood, **asked)


def run(problem: Linear, estimator: str, setting: Setting, seed: int, seconds: float) -> dict[str, Any]:
    """Root mean squared error over designs with so many seconds of the processor; what went wrong, where it did."""
    record: dict[str, Any] = {"estimator": estimator, "setting": setting.name, "seed": seed}
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            given = guides(problem, setting.family)
            _estimate(problem, estimator, given, setting.draws, 1, (1e-9, 1e-9), setting.draws)
            began = time.process_time()  # what is done but once is not counted
            few = (2, 2) if estimator == "vnmc" else 2
            start = time.process_time()
            _estimate(problem, estimator, given, setting.draws, _TRIAL, (1e-9, 1e-9), few)
            step = (time.process_time() - start) / _TRIAL
            start = time.process_time()
            with torch.no_grad():
                _estimate(problem, estimator, given, setting.draws, 0, (1.0, 1.0), setting.final)
            last = time.process_time() - start
            pyro.clear_param_store()
            left = seconds - (time.process_time() - began)
            train = left - last if setting.training == 1.0 else setting.training * left
            steps = max(1, int(train / step))
            found = [_estimate(problem, estimator, given, setting.draws, steps, setting.rates, setting.final).detach()]
            while setting.training < 1.0 and time.process_time() - began + last < seconds:
                with torch.no_grad():
                    found.append(_estimate(problem, estimator, given, setting.draws, 0, (1.0, 1.0), setting.final))
            error = torch.stack(found).double().mean(0) - problem.exact
            record |= {"rmse": float(error.square().mean().sqrt()), "steps": steps, "estimates": len(found)}
        except (ValueError, ArithmeticError, RuntimeError) as failure:
            record |= {"rmse": math.inf, "failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
    return record | {"cpu_seconds": time.process_time() - began}


def nested(problem: Any, seed: int, seconds: float, inner_nuisances: bool = False) -> dict[str, Any]:
    """Nested Monte Carlo, doubled until it has had as many seconds of the processor; with `inner_nuisances` as its
    documentation has it for random effects."""
    outer = 64
    while True:
        pyro.set_rng_seed(seed)
        began = time.process_time()
        inner = int(math.sqrt(outer))
        more: dict[str, Any] = {"M_prime": inner} if inner_nuisances else {}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = nmc_eig(problem.model, problem.designs, "y", problem.target, N=outer, M=inner, **more)
        spent = time.process_time() - began
        if spent >= seconds or outer >= 2**17:
            error = float((found.double() - problem.exact).square().mean().sqrt())
            name = "inner draws of nuisances" if inner_nuisances else "as it stands"
            return {"estimator": "nmc", "setting": name, "seed": seed, "rmse": error, "cpu_seconds": spent}
        outer *= 2


def contest(problem: Linear, estimators: Sequence[str], seeds: int, seconds: float) -> dict[str, Any]:
    """Estimators, untuned and tuned by hand."""
    found: dict[str, Any] = {"untuned": [], "by hand": []}
    for estimator in estimators:
        for kind, settings in (("untuned", untuned(estimator)), ("by hand", by_hand(estimator))):
            found[kind] += [
                run(problem, estimator, setting, seed, seconds) for setting in settings for seed in range(seeds)
            ]
    return found


def errors(records: list[dict[str, Any]], estimator: str) -> dict[str, float]:
    """Mean error over seeds of an estimator's settings."""
    groups: dict[str, list[float]] = {}
    for record in records:
        if record["estimator"] == estimator:
            groups.setdefault(record["setting"], []).append(record["rmse"])
    return {setting: sum(values) / len(values) for setting, values in groups.items()}
