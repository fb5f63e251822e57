"""A Pyro model asked as an experiment: what is refused, what is scored, what weighs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyro_invman as pim
from pyro_invman.design.experiment import Experiment, isolated
from pyro_invman.design.quasi import QuasiRandom, quantile

DESIGNS = torch.linspace(0, 1, 5)


def line(designs: Tensor) -> None:
    """y = slope d + u + noise, with an earlier look at the slope."""
    with pyro.plate_stack("designs", designs.shape[:2]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        pyro.sample("before", dist.Normal(slope, 0.5))
        pyro.sample("y", dist.Normal(slope * designs + u[..., 0], 0.5))


PAST = pyro.condition(line, data={"before": torch.tensor(1.0)})


def test_roles_and_dependence() -> None:
    experiment = Experiment(PAST, DESIGNS, "y", "slope")
    assert {name: site.role for name, site in experiment.sites.items()} == {
        "slope": "target",
        "u": "nuisance",
        "before": "past",
        "y": "outcome",
    }
    with torch.no_grad():
        assert experiment.reacts(["y"], ["u"])
        assert not experiment.reacts(["slope", "before"], ["u"])
    assert Experiment(line, DESIGNS, "y").targets == ("slope", "u", "before")


@pytest.mark.parametrize(
    ("outcome", "target", "says"),
    [
        ("yy", "slope", "did you mean 'y'"),
        ("y", "slop", "did you mean 'slope'"),
        ("y", "before", "observed already"),
        ("before", "slope", "observed already"),
        ("y", ["slope", "y"], "only one"),
        ([], "slope", "expected the name"),
        ("y", ["slope", "slope"], "twice"),
    ],
)
def test_labels_are_checked(outcome: str | list[str], target: str | list[str], says: str) -> None:
    with pytest.raises(pim.DataError, match=says):
        Experiment(PAST, DESIGNS, outcome, target)


@pytest.mark.parametrize("designs", [DESIGNS, torch.ones(1)])
@pytest.mark.parametrize("vectorized", [True, False])
def test_a_model_that_ignores_the_design_is_refused(designs: Tensor, vectorized: bool) -> None:
    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2] if vectorized else ()):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope, 1.0))

    with pytest.raises(pim.DataError, match="the same at every design"):
        Experiment(model, designs, "y", "slope", vectorized=vectorized)


def test_a_model_that_does_not_broadcast_is_told_how_to() -> None:
    def model(designs: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * designs, 1.0))

    with pytest.raises(pim.DataError, match="vectorized=False"):
        Experiment(model, DESIGNS, "y", "slope")
    draws = Experiment(model, DESIGNS, "y", "slope", vectorized=False).run(7)
    assert draws.values["slope"].shape == draws.log_prob["y"].shape == (7, 5)


@pytest.mark.parametrize("vectorized", [True, False])
def test_scores_are_those_of_the_model(vectorized: bool) -> None:
    def model(designs: Tensor) -> None:
        lead = designs.shape[:2] if vectorized else ()
        with pyro.plate_stack("designs", lead, rightmost_dim=-2), pyro.plate("times", 3, dim=-1):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope * designs.unsqueeze(-1), 1.0))

    given = {"slope": torch.ones(2, 5, 3), "y": torch.zeros(2, 5, 3)}
    scored = Experiment(model, DESIGNS, "y", "slope", vectorized=vectorized).run(2, given)
    one = dist.Normal(DESIGNS, 1.0).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(scored.log_prob["y"], 3 * one.expand(2, 5))
    torch.testing.assert_close(
        scored.joint(("slope", "y"))[0], 3 * (one + dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)))
    )


def test_a_plate_left_of_the_designs_is_refused() -> None:
    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            with pyro.plate("times", 3, dim=-3):
                slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope.sum(0) * designs, 1.0))

    with pytest.raises(pim.DataError, match=r"'slope'.*expected it to begin"):
        Experiment(model, DESIGNS, "y", "slope")


def test_nan_is_refused_by_name() -> None:
    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope * (designs - 0.5).sqrt(), 1.0, validate_args=False))

    with pytest.raises(pim.DataError, match=r"site 'y'.*NaN at design 0"):
        Experiment(model, DESIGNS, "y", "slope").run(3)


@pytest.mark.parametrize("kind", [None, AutoNormal, AutoMultivariateNormal])
def test_past_data_weigh_the_draws(kind: Callable | None) -> None:
    guide = None
    if kind is not None:

        def past() -> None:
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            pyro.sample("before", dist.Normal(slope, 0.5), obs=torch.tensor(1.0))

        guide = kind(past)
        svi = SVI(past, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(200):
            svi.step()
    experiment = Experiment(PAST, DESIGNS, "y", "slope", guide=guide)
    with torch.no_grad(), isolated(0):
        draws = experiment.draw(20_000)
    weights = draws.log_weight.softmax(0)
    mean = (weights * draws.values["slope"]).sum(0)
    evidence = draws.log_weight.logsumexp(0) - math.log(20_000)
    # conjugate: N(0, 1) seen through N(., 1/4) at 1; at 5 standard errors of the prior's few effective draws
    torch.testing.assert_close(mean, torch.full((5,), 0.8), atol=0.03, rtol=0.0)
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(1.0)).expand(5)
    torch.testing.assert_close(evidence, exact, atol=0.05, rtol=0.0)


def test_an_untrained_autoguide_is_refused() -> None:
    experiment = Experiment(PAST, DESIGNS, "y", "slope", guide=AutoNormal(lambda: None))
    with pytest.raises(pim.DataError, match="train it"):
        experiment.draw(3)


def test_the_world_is_left_as_found() -> None:
    def model(designs: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate_stack("designs", designs.shape[:2]):
            slope = pyro.sample("slope", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(slope * designs, 1.0))

    pyro.param("mine", torch.tensor(2.0))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    Experiment(model, DESIGNS, "y", "slope")
    assert set(pyro.get_param_store().keys()) == {"mine"}
    torch.testing.assert_close(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(1.0, 2.0),
        dist.LogNormal(0.0, 0.5),
        dist.Exponential(2.0),
        dist.Bernoulli(0.3),
        dist.Categorical(torch.tensor([0.2, 0.5, 0.3])),
        dist.MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.6], [0.6, 0.5]])),
        dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_quantiles_are_draws(fn: dist.TorchDistribution) -> None:
    """At evenly spread numbers, means and variances are those of the distribution."""
    size = fn.event_shape.numel()
    uniform = torch.quasirandom.SobolEngine(size, scramble=True, seed=0).draw(2**14, dtype=torch.float64)
    wide = fn.expand(torch.Size((2**14,)))
    value = quantile(wide, uniform.reshape(wide.shape()))
    assert value is not None
    mean, variance = (
        (fn.mean, fn.variance)
        if not isinstance(fn, dist.Categorical)
        else (
            torch.tensor(1.1),
            torch.tensor(0.49),
        )
    )
    torch.testing.assert_close(value.float().mean(0), mean, atol=2e-3, rtol=0.0)
    torch.testing.assert_close(value.float().var(0), variance, atol=2e-2, rtol=0.0)


def test_quasi_random_means_vary_less() -> None:
    experiment = Experiment(line, DESIGNS, "y", "slope")
    with torch.no_grad(), isolated(0):
        plain = torch.stack([experiment.run(1024).values["y"].mean(0) for _ in range(20)])
        quasi = torch.stack([experiment.run(1024, quasi=QuasiRandom()).values["y"].mean(0) for _ in range(20)])
    assert (quasi.std(0) < 0.2 * plain.std(0)).all()
    assert (quasi.mean(0).abs() < 0.02).all()
