"""Designs that tell most, beside those that closed forms and quadrature say do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_invman import DataError
from pyro_invman.design import expected_information_gain, optimize
from pyro_invman.design.experiment import Experiment, isolated
from pyro_invman.design.region import Region
from pyro_invman.design.slope import Slope

BEST_NOISE = 2**0.5


def dose(designs: Tensor) -> None:
    """The noise grows with the dose: ½ log(1 + (d / (0.2 + 0.1 d²))²) is highest at √2."""
    with pyro.plate_stack("designs", designs.shape[:2]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * designs, 0.2 + 0.1 * designs.square()))


def line(designs: Tensor) -> None:
    """An intercept and a slope, heard at each of q points (q, 1)."""
    with pyro.plate_stack("designs", designs.shape[:2]):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
        mean = theta[..., :1] + theta[..., 1:] * designs[..., 0]
        pyro.sample("y", dist.Normal(mean, 0.5).to_event(1))


def told_by_line(points: Tensor) -> float:
    x = torch.stack([torch.ones_like(points), points], -1).double()
    prior = torch.tensor([1.0, 4.0], dtype=torch.float64).diag()
    return 0.5 * float(torch.logdet(torch.eye(len(points), dtype=torch.float64) + x @ prior @ x.mT / 0.25))


def shares(designs: Tensor) -> None:
    """Effort d_k on effect k: ½ Σ log(1 + τ_k² d_k / σ²), which water fills."""
    with pyro.plate_stack("designs", designs.shape[:2]):
        effects = pyro.sample("effects", dist.Normal(torch.zeros(3), torch.tensor([4.0, 2.0, 0.5]).sqrt()).to_event(1))
        pyro.sample("y", dist.Normal(effects * designs.sqrt(), 1.0).to_event(1))


def sums_to_one(designs: Tensor) -> Tensor:
    return designs + (1 - designs.sum(-1, keepdim=True)) / designs.shape[-1]


def question(designs: Tensor) -> None:
    """Is θ below d? Most open in the middle of the belief, at 0.7."""
    with pyro.plate_stack("designs", designs.shape[:2]):
        theta = pyro.sample("theta", dist.Normal(0.7, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=3 * (designs - theta)))


def test_an_interior_optimum_with_its_bracket() -> None:
    found = optimize(dose, torch.tensor(0.5), "y", "slope", bounds=(0.0, 5.0), num_steps=100, seed=1)
    assert abs(float(found.design) - BEST_NOISE) < 0.01
    best = 0.5 * math.log1p((BEST_NOISE / 0.4) ** 2)
    assert float(found.lower) <= best + 1e-4 and float(found.upper) >= best - 1e-4
    assert float(found.upper - found.lower) < 0.05
    assert (torch.as_tensor(found.ended.values) - BEST_NOISE).abs().max() < 0.1  # every start found it
    assert dict(found.sizes) == {"start": 9, "step": 100}
    # the best went on: three of nine, after three fifths of the steps
    assert found.bound.notnull().sum("start").values.tolist() == [9] * 60 + [3] * 40
    assert found.attrs["method"] == "vnmc" and found.attrs["bounds"] == "both"


def test_a_batch_at_the_ends_of_its_box() -> None:
    found = optimize(line, torch.tensor([[0.1], [0.2]]), "y", "theta", bounds=(-1.0, 1.0), num_steps=80)
    # exactly at the ends, and not twice at one, which is a maximum among its neighbours
    assert sorted(found.design.values[:, 0].tolist()) == [-1.0, 1.0]
    assert abs(float(found.eig) - told_by_line(torch.tensor([-1.0, 1.0]))) < 0.02
    assert told_by_line(torch.tensor([1.0, 1.0])) < told_by_line(torch.tensor([-1.0, 1.0])) - 0.4
    assert found.design.dims == ("design_1", "design_2")
    assert found.path.dims == ("step", "start", "design_1", "design_2")


def test_a_sum_and_a_box_at_once() -> None:
    """Effort is spent where the water stands: d = max(λ − σ²/τ², ε)."""
    initial = torch.full((3,), 1 / 3)
    found = optimize(shares, initial, "y", "effects", bounds=(0.01, 1.0), constraint=sums_to_one, num_steps=150)
    level = (1 - 0.01 + 1 / 4 + 1 / 2) / 2
    exact = torch.tensor([level - 1 / 4, level - 1 / 2, 0.01])
    design = torch.as_tensor(found.design.values)
    torch.testing.assert_close(design, exact, atol=0.02, rtol=0.0)
    assert abs(design.sum() - 1) < 1e-4
    assert design[2] == torch.tensor(0.01)


def test_a_question_by_symmetry() -> None:
    found = optimize(question, torch.tensor(-1.0), "y", "theta", bounds=(-3.0, 3.0), num_steps=100)
    assert found.attrs["method"] == "enumeration"
    assert abs(float(found.design) - 0.7) < 0.02


def test_two_questions_are_not_asked_alike() -> None:
    """Together: the best pair of a fine grid, by quadrature, is apart."""

    def questions(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=5 * (designs - theta.unsqueeze(-1))).to_event(1))

    grid, theta = torch.linspace(-2, 2, 81, dtype=torch.float64), torch.linspace(-6, 6, 1201, dtype=torch.float64)
    weight = (-0.5 * theta.square()).softmax(0)
    p = torch.sigmoid(5 * (grid - theta.unsqueeze(-1)))
    noise = (weight.unsqueeze(-1) * (torch.special.entr(p) + torch.special.entr(1 - p))).sum(0)
    told = -(noise.unsqueeze(-1) + noise)
    for first in (p, 1 - p):
        for second in (p, 1 - p):
            told = told + torch.special.entr(torch.einsum("s,sa,sb->ab", weight, first, second))
    found = optimize(questions, torch.tensor([0.1, 0.2]), "y", "theta", bounds=(-2.0, 2.0), num_steps=100, seed=2)
    low, high = sorted(found.design.values.tolist())
    nearest = [int((grid - d).abs().argmin()) for d in (low, high)]
    assert float(told.max() - told[nearest[0], nearest[1]]) < 0.002
    assert high - low > 0.5
    assert abs(float(found.eig) - float(told.max())) < 0.01


def test_a_state_between_effect_and_outcome_is_integrated() -> None:
    """A nuisance whose own law depends on the design: ½ log(1 + d² / (1 + 0.09 (1 + d²)²))."""

    def state(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            between = pyro.sample("between", dist.Normal(theta * designs, 1.0))
            pyro.sample("y", dist.Normal(between, 0.3 * (1 + designs.square())))

    found = optimize(state, torch.tensor(0.5), "y", "theta", bounds=(0.1, 5.0), num_starts=4, num_steps=100)
    square = math.sqrt(109 / 9)  # where the derivative of that is zero
    assert abs(float(found.design) - math.sqrt(square)) < 0.06
    exact = 0.5 * math.log1p(square / (1 + 0.09 * (1 + square) ** 2))
    assert float(found.lower) <= exact + 1e-3 and float(found.upper) >= exact - 1e-3


@pytest.mark.parametrize("method", ["vnmc", "contrastive", "posterior", "infonce"])
def test_gradients_are_those_of_the_gain(method: str) -> None:
    """Means over many calls beside the derivative of the closed form, at 4 standard errors and a bound's own bias."""
    designs = torch.tensor([0.7, 2.0, 4.0])
    experiment = Experiment(dose, designs, "y", "slope")
    with isolated(0):
        slope = Slope(experiment, method, 256)
        found = torch.stack([slope(designs)[1] for _ in range(20)]).double()
    leaf = designs.double().requires_grad_()
    (0.5 * torch.log1p((leaf / (0.2 + 0.1 * leaf.square())).square())).sum().backward()
    assert leaf.grad is not None
    error = (found.mean(0) - leaf.grad).abs()
    assert (error < 4 * found.std(0) / math.sqrt(20) + 0.02).all()


def counted(designs: Tensor) -> None:
    """Counts without end, whose law is θ d where θ is 1 or 3."""
    with pyro.plate_stack("designs", designs.shape[:2]):
        theta = pyro.sample("theta", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Poisson((1 + 2 * theta) * designs))


def told_by_counts(designs: Tensor) -> Tensor:
    y = torch.arange(60.0, dtype=torch.float64)
    given = torch.stack([dist.Poisson(rate * designs.unsqueeze(-1)).log_prob(y).exp() for rate in (1, 3)])
    return torch.special.entr(given.mean(0)).sum(-1) - torch.special.entr(given).sum(-1).mean(0)


def test_scores_of_counts_are_the_gradient_of_their_gain() -> None:
    designs = torch.tensor([0.3, 1.0, 3.0])
    with isolated(0):
        slope = Slope(Experiment(counted, designs, "y", "theta"), "auto", 512)
        found = torch.stack([slope(designs)[1] for _ in range(60)]).double()
    leaf = designs.double().requires_grad_()
    told_by_counts(leaf).sum().backward()
    assert slope.name == "vnmc"
    assert leaf.grad is not None
    assert ((found.mean(0) - leaf.grad).abs() < 4 * found.std(0) / math.sqrt(60) + 0.01).all()


def test_outcomes_that_can_only_be_drawn() -> None:
    def drawn(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            noise = torch.randn(slope.shape) * (0.2 + 0.1 * designs.square())
            pyro.sample("y", dist.Delta(slope * designs + noise))

    found = optimize(drawn, torch.tensor(0.5), "y", "slope", bounds=(0.0, 5.0), num_starts=3, num_steps=100)
    assert found.attrs["method"] == "posterior"
    assert abs(float(found.design) - BEST_NOISE) < 0.1
    assert math.isnan(float(found.upper))


def test_one_design_at_a_time_and_without_a_box() -> None:
    def one(design: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.7, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=3 * (design - theta)))

    found = optimize(one, torch.tensor(0.0), "y", "theta", vectorized=False, num_steps=60, num_samples=24)
    assert dict(found.sizes) == {"start": 1, "step": 60}
    assert abs(float(found.design) - 0.7) < 0.25
    assert found.ended_eig.values[0] == found.eig.values


def test_past_data_move_the_optimum() -> None:
    """After an exact look at θ the middle of the belief is elsewhere."""

    def twice(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("before", dist.Normal(theta, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=4 * (designs - theta)))

    past = pyro.condition(twice, data={"before": torch.tensor(1.6)})
    found = optimize(past, torch.tensor(0.0), "y", "theta", bounds=(-3.0, 3.0), num_starts=3, num_samples=512)
    assert abs(float(found.design) - 0.8) < 0.05


def test_a_seed_is_a_result_and_nothing_outside_is_touched() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        optimize(dose, torch.tensor(0.5), "y", "slope", bounds=(0.0, 5.0), num_steps=5, num_starts=2, seed=s)
        for s in (3, 3, 4)
    )
    assert first.design.equals(again.design) and first.eig.equals(again.eig)
    assert not first.path.equals(other.path)
    torch.testing.assert_close(torch.get_rng_state(), before)
    assert not list(pyro.get_param_store().keys())


def test_the_bracket_is_not_what_was_climbed() -> None:
    """Fifty designs that tell the same: the best of their estimates is not reported as the optimum's gain."""

    def flat(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta + 0 * designs.sin(), 1 + 1e-4 * designs.cos()))

    asked: dict[str, Any] = {"bounds": (-3.0, 3.0), "num_starts": 50, "num_steps": 1, "num_samples": 16}
    found = [optimize(flat, torch.tensor(0.0), "y", "theta", seed=s, **asked) for s in range(3)]
    exact = 0.5 * math.log(2)
    for each in found:
        assert abs(float(each.eig) - exact) < 4 * float(each.std_error) + 1e-3


def test_gradients_that_are_not_finite_are_counted() -> None:
    def root(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope * designs.sqrt(), 0.5 + 0.2 * designs))

    asked: dict[str, Any] = {"bounds": (0.0, 9.0), "num_steps": 60}
    found = optimize(root, torch.tensor(0.0), "y", "slope", num_starts=4, **asked)
    # √d / (0.5 + 0.2 d) is highest at 2.5; at 0 its slope is infinite, and that start stays there
    assert found.non_finite_gradients.values.tolist() == [36, 0, 0, 0]
    assert float(found.ended[0]) == 0.0
    assert abs(float(found.design) - 2.5) < 0.2
    with pytest.raises(DataError, match="in none of 36 steps"):
        optimize(root, torch.tensor(0.0), "y", "slope", num_starts=1, **asked)


def deaf(designs: Tensor) -> None:
    with pyro.plate_stack("designs", designs.shape[:2]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope, 1.0))


def rounding(designs: Tensor) -> None:
    with pyro.plate_stack("designs", designs.shape[:2]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * designs.round(), 1.0))


def simulated(designs: Tensor) -> None:
    with pyro.plate_stack("designs", designs.shape[:2]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Delta((slope * designs).detach() + torch.randn(slope.shape)))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (dose, {"observation_labels": "Y"}, "'Y' is no sample site"),
        (dose, {"target_labels": "slop"}, "did you mean 'slope'"),
        (deaf, {}, "the same at every design"),
        (rounding, {}, "gradient in the design is zero at every start"),
        (simulated, {}, "no gradient reaches the design"),
        (dose, {"initial_design": torch.tensor(7.0)}, r"found 7, outside its bounds \[0, 5\]"),
        (dose, {"initial_design": torch.tensor(1)}, "initial_design: found torch.int64"),
        (dose, {"initial_design": torch.tensor(math.nan)}, "expected finite numbers"),
        (dose, {"bounds": (5.0, 0.0)}, "lower 5 and upper 0, not in order"),
        (dose, {"bounds": (torch.zeros(2), 1.0)}, "broadcasts to the design's"),
        (dose, {"bounds": 3.0}, "expected a pair"),
        (dose, {"bounds": None, "num_starts": 3}, "give finite bounds"),
        (dose, {"constraint": constraints.positive}, "give intervals as bounds"),
        (dose, {"constraint": lambda d: d + 1}, "expected a projection"),
        (dose, {"constraint": lambda d: d[0]}, "expected designs"),
        (dose, {"constraint": lambda d: d.clamp_min(2.0)}, "which the constraint moves to 2.0"),
        (dose, {"method": "marginal"}, "found 'marginal'"),
        (dose, {"num_steps": 0}, "num_steps: found 0"),
        (dose, {"max_seconds": -1.0}, "max_seconds: found -1"),
        (counted, {"target_labels": "theta", "method": "posterior"}, "no explicit prior over real numbers"),
    ],
)
def test_what_cannot_be_climbed(model: Callable[..., None], arguments: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {
        "initial_design": torch.tensor(1.0),
        "observation_labels": "y",
        "target_labels": "slope",
        "bounds": (0.0, 5.0),
        "num_steps": 2,
    }
    with pytest.raises(DataError, match=message):
        optimize(model, **(asked | arguments))


def test_sets_that_do_not_meet_are_said() -> None:
    region = Region(torch.full((3,), 1 / 3), (0.0, 1.0), sums_to_one)
    region.upper.fill_(0.1)
    with pytest.raises(DataError, match="no design satisfies both"):
        region.projected(torch.rand(2, 3))


def test_projections_are_the_nearest_of_a_box_and_a_plane() -> None:
    region = Region(torch.full((3,), 1 / 3), (0.0, 1.0), sums_to_one)
    found = region.projected(torch.tensor([[2.0, 0.0, 0.0], [0.6, 0.6, -1.0], [0.2, 0.3, 0.5]]))
    exact = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=0.0)


def test_time_is_kept_to() -> None:
    """Steps fall to nothing when time does, however many were allowed."""
    found = optimize(dose, torch.tensor(0.5), "y", "slope", bounds=(0.0, 5.0), num_steps=10**6, max_seconds=1.0)
    assert found.sizes["step"] < 10**4
    assert abs(float(found.design) - BEST_NOISE) < 0.2
    ends = torch.as_tensor(found.ended.values)
    best = expected_information_gain(dose, ends, "y", "slope", num_samples=512)
    assert float(best.eig.max()) < float(found.upper) + 0.05
