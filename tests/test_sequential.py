"""Sequential design: beliefs and choices beside closed forms, and experiments taken up from disk."""

from __future__ import annotations

import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_invman import DataError
from pyro_invman.design.gains import expected_gains
from pyro_invman.design.mixtures import Mixtures
from pyro_invman.design.particles import assimilate
from pyro_invman.design.sequential import Search, Sequential
from pyro_invman.design.told import total_information

NOISE = 0.5
LISTED = torch.tensor([[1.0, 0.0], [0.0, 1.3], [1.5, 1.4], [0.0, 0.0]])


def line(designs: Tensor) -> None:
    """y ~ N(θ · d, NOISE²) with θ ~ N(0, I) in two dimensions."""
    with pyro.plate_stack("leading", designs.shape[:-1]):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((theta * designs).sum(-1), NOISE))


def both(designs: Tensor) -> None:
    """The two coordinates at once, so that the outcome is no single number."""
    with pyro.plate_stack("leading", designs.shape[:-1]):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(theta * designs, NOISE).to_event(1))


def choice(designs: Tensor) -> None:
    """A yes or no of logit θ d."""
    with pyro.plate_stack("leading", designs.shape):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=theta * designs))


def exact(designs: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of θ under `line` after outcomes (t,) of designs (t, 2)."""
    covariance = torch.linalg.inv(torch.eye(2) + designs.mT @ designs / NOISE**2)
    return covariance @ designs.mT @ outcomes / NOISE**2, covariance


def test_belief_and_choices_are_those_of_the_closed_form() -> None:
    experiment = Sequential(line, LISTED, num_particles=20_000, seed=1)
    theta = torch.tensor([0.8, -1.1])
    design, done = experiment.step(), 0
    noise = NOISE * torch.randn(4, generator=torch.Generator().manual_seed(3))
    while done < 4:
        _, covariance = exact(experiment.designs, experiment.observations["y"])
        gains = 0.5 * torch.log1p((LISTED @ covariance * LISTED).sum(-1) / NOISE**2)
        assert torch.equal(design, LISTED[gains.argmax()])
        design = experiment.step(theta @ design + noise[done])
        assert float(experiment.gains[done]) == pytest.approx(float(gains.max()), abs=0.02)
        done += 1
    mean, covariance = exact(experiment.designs, experiment.observations["y"])
    found = experiment.latents["theta"]
    # 20,000 particles of which about half are distinct: 0.01 posterior standard deviations are their standard error
    assert ((found.mean(0) - mean).abs() < 0.05 * covariance.diagonal().sqrt()).all()
    assert torch.allclose(found.mT.cov(), covariance, rtol=0.08, atol=0.004)


def test_continuous_designs_reach_the_end_of_their_interval() -> None:
    def model(designs: Tensor) -> None:
        with pyro.plate_stack("leading", designs.shape):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta * designs, NOISE))

    experiment = Sequential(model, dist.Uniform(-2.0, 2.0), num_rollouts=3, search=Search(coarse=32, refined=16))
    assert (experiment.step().abs() > 1.99).all()


def test_a_belief_keeps_both_modes() -> None:
    def target(positions: Tensor) -> tuple[Tensor, Tensor]:
        theta = positions[..., 0]
        return -0.5 * theta.square(), -0.5 * ((1.5 - theta.abs()) / 0.05).square()

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 4000, 1, generator=generator)
    cloud = assimilate(start, target, generator)
    positive = (cloud.positions[..., 0] > 0).double().mean(-1)
    assert ((positive - 0.5).abs() < 0.1).all()
    # N(0, 1) at 1.5 against a likelihood of 0.05: mean 1.5 / (1 + 0.05²), standard deviation 0.05
    assert cloud.positions.abs().mean() == pytest.approx(1.5 / 1.0025, abs=0.003)
    assert cloud.positions.abs().std() == pytest.approx(0.05, rel=0.06)


@pytest.mark.parametrize("model", [line, both])
def test_expected_gains_of_normals(model) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    positions = torch.randn(3, 4000, 2, generator=generator)
    designs = LISTED[:3].expand(3, 3, 2)
    found = expected_gains(model, ["y"], positions, designs, generator)
    ratio = designs.square() / NOISE**2
    wanted = 0.5 * (torch.log1p(ratio.sum(-1)) if model is line else torch.log1p(ratio).sum(-1))
    # nested: 64 outer particles, whose terms have a standard deviation below 1
    assert torch.allclose(found, wanted, atol=0.03 if model is line else 4 / math.sqrt(64))
    assert float((found - wanted).mean().abs()) < (0.03 if model is line else 4 / math.sqrt(64 * 9))


def test_expected_gains_of_a_choice_by_quadrature() -> None:
    generator = torch.Generator().manual_seed(0)
    designs = torch.tensor([[0.0, 0.7, 3.0]])
    found = expected_gains(choice, ["y"], torch.randn(1, 50_000, 1, generator=generator), designs, generator)
    theta = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-0.5 * theta.square()) / torch.exp(-0.5 * theta.square()).sum()

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)

    p = torch.sigmoid(theta * designs[0].double().unsqueeze(-1))
    wanted = entropy((p * weight).sum(-1)) - (entropy(p) * weight).sum(-1)
    assert torch.allclose(found[0].double(), wanted, atol=0.01)


def test_total_information_brackets_what_a_history_told() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(6, 2, generator=generator)
    designs = torch.randn(6, 3, 2, generator=generator)
    outcomes = (designs @ theta.unsqueeze(-1)).squeeze(-1) + NOISE * torch.randn(6, 3, generator=generator)
    lower, upper = total_information(line, {"theta": theta}, designs, {"y": outcomes}, 100_000, seed=1)
    told = torch.distributions.Normal(designs @ theta.unsqueeze(-1), NOISE).log_prob(outcomes.unsqueeze(-1))
    covariance = designs @ designs.mT + NOISE**2 * torch.eye(3)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(6, 3), covariance).log_prob(outcomes)
    wanted = told.sum((-2, -1)) - marginal
    assert (lower <= upper).all()
    assert torch.allclose(lower, wanted, atol=0.05)
    assert torch.allclose(upper, wanted, atol=0.05)
    few, _ = total_information(line, {"theta": theta}, designs, {"y": outcomes}, 10, seed=1)
    assert (few <= math.log(11) + 1e-5).all()


def test_contrastive_draws_near_a_belief_close_the_bracket() -> None:
    """So much is told that no draw of the prior explains it: bounds by the prior are empty, those near a belief are
    not, whether the belief is right or twice too wide."""
    generator, noise = torch.Generator().manual_seed(0), 1e-3

    def precise(designs: Tensor) -> None:
        with pyro.plate_stack("leading", designs.shape[:2]):
            slope = pyro.sample("slope", dist.LogNormal(0.0, 1.0))
            level = pyro.sample("level", dist.Normal(0.0, 2.0))
            pyro.sample("y", dist.Normal(slope.log() * designs[..., 0] + level * designs[..., 1], noise))

    theta = torch.tensor([1.0, 2.0]) * torch.randn(5, 2, generator=generator)
    designs = torch.randn(5, 4, 2, generator=generator)
    outcomes = (designs @ theta.unsqueeze(-1)).squeeze(-1) + noise * torch.randn(5, 4, generator=generator)
    latents = {"slope": theta[:, 0].exp(), "level": theta[:, 1]}
    law = designs.double()
    prior = torch.diag(torch.tensor([1.0, 0.25]).double())
    precision = prior + law.mT @ law / noise**2
    mean = torch.linalg.solve(precision, (law.mT @ outcomes.double().unsqueeze(-1)) / noise**2).squeeze(-1)
    told = torch.distributions.Normal((law @ theta.double().unsqueeze(-1)).squeeze(-1), noise).log_prob(outcomes)
    covariance = law @ torch.linalg.inv(prior) @ law.mT + noise**2 * torch.eye(4)
    wanted = told.sum(-1) - torch.distributions.MultivariateNormal(torch.zeros(5, 4).double(), covariance).log_prob(
        outcomes.double()
    )
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    lower, upper = total_information(precise, latents, designs, {"y": outcomes}, 2000, seed=1)
    assert (lower < wanted - 3).all() and (upper > wanted + 3).all()
    for width in (1.0, 2.0):
        draws = torch.randn(5, 2, 1000, generator=generator).double()
        belief = (mean.unsqueeze(1) + width * (root @ draws).mT).float()
        lower, upper = total_information(precise, latents, designs, {"y": outcomes}, 20_000, seed=1, belief=belief)
        assert torch.allclose(lower.double(), wanted, atol=0.05) and torch.allclose(upper.double(), wanted, atol=0.05)
    with pytest.raises(DataError, match="belief has shape"):
        total_information(precise, latents, designs, {"y": outcomes}, 10, belief=belief[:3])


def test_a_mixture_keeps_the_modes_of_its_cloud() -> None:
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(3, 2000, 2, generator=generator) * torch.tensor([0.01, 3.0])
    clouds[:, :500] += torch.tensor([1.0, 0.0])
    found = Mixtures.fit(clouds, 6, generator)
    drawn = found.sample(20_000, generator)
    assert torch.allclose((drawn[..., 0] > 0.5).float().mean(1), torch.tensor(0.25), atol=0.02)
    assert bool(((drawn[..., 0] < 0.1) | (drawn[..., 0] > 0.9)).all())
    x = torch.linspace(-0.2, 1.2, 2001)
    grid = torch.stack(torch.meshgrid(x, torch.linspace(-16, 16, 161), indexing="ij"), -1).reshape(1, -1, 2)
    mass = found.log_prob(grid.expand(3, -1, -1)).exp().sum(1) * (x[1] - x[0]) * 0.2
    assert torch.allclose(mass, torch.ones(3), atol=0.01)


def test_taken_up_from_disk_it_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    places = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def run(interrupted: bool) -> Tensor:
        search = Search(coarse=24, refined=8, particles=200)
        experiment = Sequential(line, places, num_rollouts=2, num_particles=400, search=search, seed=5)
        design = experiment.step()
        for step in range(4):
            if interrupted and step == 2:
                experiment.save(tmp_path / "half")
                experiment = Sequential.load(tmp_path / "half", line, places)
                assert torch.equal(experiment.step(), design)  # handed out, not answered: handed out again
            design = experiment.step(design.sum(-1) - 0.1 * step)
        assert experiment.designs.shape == (2, 4, 2)
        return design

    assert torch.equal(run(False), run(True))
    with pytest.raises(DataError, match="another experiment"):
        Sequential.load(tmp_path / "half", choice, dist.Normal(0.0, 1.0))


def test_what_was_not_measured_teaches_nothing() -> None:
    experiment = Sequential(line, LISTED, num_rollouts=2, num_particles=4000, seed=2)
    design = experiment.step()
    before = experiment.latents["theta"].clone()
    experiment.step(torch.tensor([math.nan, 3.0]))
    after = experiment.latents["theta"]
    assert experiment.observations["y"].isnan().tolist() == [[True], [False]]
    assert torch.equal(experiment.designs[:, 0], design)
    # moves leave the prior as it was, up to the error of 4,000 particles
    assert torch.allclose(after[0].mean(0), before[0].mean(0), atol=0.08)
    assert torch.allclose(after[0].std(0), torch.ones(2), atol=0.08)
    mean, _ = exact(design[1:2], torch.tensor([3.0]))
    assert torch.allclose(after[1].mean(0), mean, atol=0.08)


def test_errors_name_the_experiment() -> None:
    experiment = Sequential(line, LISTED, num_rollouts=2, num_particles=100)
    with pytest.raises(DataError, match="before any design"):
        experiment.record(torch.zeros(2))
    experiment.step()
    with pytest.raises(DataError, match=r"y has shape \(3,\), expected \(2,\)"):
        experiment.step(torch.zeros(3))
    with pytest.raises(DataError, match="history 1: the observation has probability zero"):
        experiment.step(torch.tensor([0.0, math.inf]))
    assert experiment.designs.shape == (2, 0, 2)  # an outcome that cannot be is not kept
    asked = Sequential(choice, torch.tensor([0.5, 2.0]), num_particles=100)
    with pytest.raises(DataError, match=r"experiment 0: y is 0\.5, outside the support"):
        asked.record(torch.tensor(0.5), torch.tensor(1.0))
    with pytest.raises(DataError, match="no site 'z'"):
        Sequential(line, LISTED, "z")

    def deaf(designs: Tensor) -> None:
        with pyro.plate_stack("leading", designs.shape[:-1]):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, NOISE))

    with pytest.raises(DataError, match="ignores its designs"):
        Sequential(deaf, LISTED, num_particles=100).step()
