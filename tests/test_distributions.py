"""One contract that every conditional of a flow keeps, whatever its targets, givens and heads.

The flows here are untrained, with weights moved at random: every cell then depends on every known one, and the contract
cannot lean on a good fit. All of it runs in double precision.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_invman.distributions import ConditionalFlow, stack_given
from pyro_invman.joint import JointFlow
from pyro_invman.variables import DataError, Variable, Variables

NAN = math.nan
VARIABLES = Variables(
    [
        Variable("a", "parameter"),
        Variable("p", "parameter", "positive", units="W"),
        Variable("c", "condition", "categorical", levels=("x", "y", "z")),
        Variable("q", "observation", "interval", lower=-2.0, upper=3.0),
        Variable("b", "observation", units="K"),
        Variable("e", "condition", "categorical", levels=("off", "on")),
    ]
)


class Case(NamedTuple):
    """A conditional, and the shape of its batch."""

    targets: tuple[str, ...]
    given: Mapping[str, Any] = {}
    head: str = "mixture"
    batch_shape: tuple[int, ...] = ()

    @property
    def discrete(self) -> list[bool]:
        return [VARIABLES[VARIABLES.index(name)].discrete for name in self.targets]


CASES = {
    "one target": Case(("b",), {"a": 0.4, "c": "z"}),
    "unbounded": Case(("a", "b"), {"p": 1.5, "e": "on"}),
    "positive": Case(("p",), {"a": -0.3}),
    "interval": Case(("q",), {"b": 250.0, "p": 0.7}),
    "pressed against an end": Case(("q",), {"b": torch.tensor([100.0, 500.0])}, batch_shape=(2,)),
    "an interval and a half-line": Case(("q", "p"), {"a": 1.0}),
    "categorical": Case(("c",), {"a": 0.2, "q": -1.9}),
    "two categorical": Case(("c", "e"), {"b": 320.0}),
    "mixed, not in the order of the columns": Case(("q", "c", "p"), {"b": 270.0}),
    "batched givens": Case(
        ("p", "a"),
        {"b": torch.tensor([[240.0], [300.0]]), "q": torch.tensor([-1.0, 0.0, 2.5])},
        batch_shape=(2, 3),
    ),
    "NaN in a given": Case(
        ("b", "q"), {"a": torch.tensor([0.3, NAN, NAN]), "c": torch.tensor([1.0, 1.0, NAN])}, batch_shape=(3,)
    ),
    "nothing given": Case(("b", "p")),
    "the whole row": Case(("a", "p", "c", "q", "b", "e")),
    "spline, unbounded": Case(("a", "b"), {"p": 1.5}, head="spline"),
    "spline, supports": Case(("p", "q"), {"a": torch.tensor([0.0, 1.0])}, head="spline", batch_shape=(2,)),
    "spline, mixed": Case(("e", "q"), {"b": 300.0}, head="spline"),
}
CONTINUOUS = {name: case for name, case in CASES.items() if not any(case.discrete)}
SEVERAL = {name: case for name, case in CASES.items() if len(case.targets) > 1}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_continuous_case = pytest.mark.parametrize("case", CONTINUOUS.values(), ids=CONTINUOUS)
every_case_of_several = pytest.mark.parametrize("case", SEVERAL.values(), ids=SEVERAL)


def rows(number: int = 300, seed: int = 0) -> Tensor:
    """Incomplete rows of `VARIABLES`, correlated."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(number, 6, dtype=torch.float64, generator=generator)
    a = z[:, 0]
    p = (0.5 * a + 0.5 * z[:, 1]).exp()
    c = (a + z[:, 2] > 0).double() + (a + z[:, 2] > 1).double()
    q = 0.5 + 2.4 * torch.tanh(z[:, 3] + 0.5 * c - 0.5)
    b = 280 + 20 * a - 5 * q + 10 * z[:, 4]
    e = (q + z[:, 5] > 0).double()
    values = torch.stack([a, p, c, q, b, e], -1)
    return torch.where(torch.rand(values.shape, generator=generator) < 0.2, NAN, values)


def flow_with(head: str = "mixture", variables: Variables = VARIABLES, values: Tensor | None = None) -> JointFlow:
    """A flow in double precision with weights moved at random from their start."""
    flow = JointFlow(variables, width=24, trunk_blocks=1, head=head, components=5).double()
    flow._learn_scales(rows() if values is None else values)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.5 / math.sqrt(p.shape[-1]) * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return flow


flow_of = cache(flow_with)


def conditional(case: Case) -> ConditionalFlow:
    given = {name: cell.double() if isinstance(cell, Tensor) else cell for name, cell in case.given.items()}
    return flow_of(case.head).conditional(case.targets, given)


@pytest.fixture(autouse=True)
def double_precision(fresh_state: None) -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------- shapes
@every_case
@pytest.mark.parametrize("sample_shape", [(), (4,), (5, 2)], ids=str)
def test_shapes(case: Case, sample_shape: tuple[int, ...]) -> None:
    d = conditional(case)
    assert d.batch_shape == case.batch_shape
    assert d.event_shape == (len(case.targets),)
    assert d.event_dim == 1
    assert d.shape(sample_shape) == sample_shape + d.batch_shape + d.event_shape
    value = d.sample(sample_shape)
    assert value.shape == d.shape(sample_shape)
    assert value.dtype == torch.float64
    assert not value.requires_grad
    log_prob = d.log_prob(value)
    assert log_prob.shape == sample_shape + d.batch_shape
    assert log_prob.isfinite().all()
    assert d.mean.shape == d.variance.shape == d.batch_shape + d.event_shape
    assert d.support.check(value).all()
    assert d.support.check(value).shape == log_prob.shape


@every_case
def test_one_value_for_all_of_a_batch(case: Case) -> None:
    d = conditional(case)
    value = d.sample()[(0,) * len(d.batch_shape)]
    torch.testing.assert_close(d.log_prob(value), d.log_prob(value.expand(d.shape())), rtol=1e-10, atol=1e-10)


@every_case
def test_a_batch_is_its_elements(case: Case) -> None:
    d = conditional(case)
    value = d.sample((3,))
    log_prob = d.log_prob(value)
    for index in itertools.product(*map(range, d.batch_shape)):
        alone = ConditionalFlow(d.density, d.standardization, d.variables, d.targets, d.given[index])
        assert alone.batch_shape == ()
        torch.testing.assert_close(alone.log_prob(value[(slice(None), *index)]), log_prob[(slice(None), *index)])


class Named(ConditionalFlow):
    """A subclass, to be kept."""


@every_case
@pytest.mark.parametrize("extra", [(), (2,), (4, 1)], ids=str)
def test_expand(case: Case, extra: tuple[int, ...]) -> None:
    d = conditional(case)
    d = Named(d.density, d.standardization, d.variables, d.targets, d.given)
    wide = d.expand(torch.Size((*extra, *d.batch_shape)))
    assert type(wide) is Named
    assert wide.batch_shape == extra + d.batch_shape
    assert wide.event_shape == d.event_shape
    assert wide.given is d.given
    value = wide.sample((2,))
    assert value.shape == (2, *wide.batch_shape, *d.event_shape)
    assert wide.log_prob(value).shape == (2, *wide.batch_shape)
    torch.testing.assert_close(wide.log_prob(value), d.log_prob(value))
    assert wide.log_prob(value[(0,) * (value.dim() - 1)]).shape == wide.batch_shape
    if d.has_rsample:
        assert wide.rsample().shape == wide.shape()
        # copies in an expanded batch are different draws
        assert len(value.reshape(-1, len(case.targets)).unique(dim=0)) == value[..., 0].numel()
    twice = wide.expand(torch.Size((3, *wide.batch_shape)))
    assert type(twice) is Named
    assert twice.sample().shape == (3, *extra, *d.batch_shape, *d.event_shape)
    assert twice.log_prob(twice.sample()).shape == twice.batch_shape


def test_expand_replaces_ones_and_refuses_the_rest() -> None:
    d = flow_of().conditional(["a", "p"], {"b": torch.tensor([[250.0], [300.0]])})
    assert d.batch_shape == (2, 1)
    assert d.expand((2, 3)).sample().shape == (2, 3, 2)
    for shape in ((2,), (3, 1), (1, 1), ()):
        with pytest.raises((ValueError, RuntimeError)):
            d.expand(shape)


@every_case
def test_plates(case: Case) -> None:
    d = conditional(case)
    outer = len(d.batch_shape) + 1
    with pyro.poutine.trace() as trace, pyro.plate("outer", 3, dim=-outer):
        pyro.sample("value", d)
    site = trace.trace.nodes["value"]
    assert site["value"].shape == (3, *d.batch_shape, *d.event_shape)
    trace.trace.compute_log_prob()
    torch.testing.assert_close(site["log_prob"], d.log_prob(site["value"]))


@every_case
def test_to_event(case: Case) -> None:
    d = conditional(case)
    value = d.sample((2,))
    for more in range(len(d.batch_shape) + 1):
        joined = d.to_event(more)
        assert joined.batch_shape == d.batch_shape[: len(d.batch_shape) - more]
        assert joined.event_shape == d.shape()[len(d.batch_shape) - more :]
        assert joined.has_rsample == d.has_rsample
        torch.testing.assert_close(
            joined.log_prob(value), d.log_prob(value).reshape(2, *joined.batch_shape, -1).sum(-1)
        )
        assert joined.support.check(value).all()


@every_case
def test_mask(case: Case) -> None:
    d = conditional(case)
    wide = d.expand(torch.Size((4, *d.batch_shape)))
    kept = torch.tensor([True, False, True, False]).reshape(4, *[1] * len(d.batch_shape))
    value = wide.sample()
    masked = wide.mask(kept)
    assert masked.shape() == wide.shape()
    torch.testing.assert_close(masked.log_prob(value), torch.where(kept, wide.log_prob(value), 0.0))
    assert (d.mask(False).log_prob(d.sample()) == 0).all()


@every_case
def test_pickling(case: Case) -> None:
    d = conditional(case)
    file = io.BytesIO()
    torch.save(d, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is ConditionalFlow
    assert repr(again) == repr(d)
    value = d.sample((2,))
    assert torch.equal(again.log_prob(value), d.log_prob(value))


def test_repr_names_targets_and_what_is_given() -> None:
    d = conditional(CASES["NaN in a given"])
    assert repr(d) == "ConditionalFlow(b, q | a, c; batch_shape=(3,))"
    assert repr(flow_of().conditional("a")) == "ConditionalFlow(a | nothing; batch_shape=())"


# ---------------------------------------------------------------------- support
@every_case
def test_has_rsample_unless_a_target_is_categorical(case: Case) -> None:
    d = conditional(case)
    assert d.has_rsample is not any(case.discrete)
    assert d.support.is_discrete is any(case.discrete)
    if any(case.discrete):
        with pytest.raises(NotImplementedError, match="categorical"):
            d.rsample()
    else:
        value = d.rsample((2,))
        assert value.shape == d.shape((2,))
        assert value.requires_grad
        assert d.support.check(value).all()
        # Pyro's way to ask for a score-function estimate
        assert not d.has_rsample_(False).has_rsample
        assert not d.expand(d.batch_shape).has_rsample
        assert not d().requires_grad


@every_case
def test_support_of_each_target(case: Case) -> None:
    """The support is the product of the targets' own: moving one cell out of its own leaves the product."""
    d = conditional(case)
    value = d.sample()
    assert isinstance(d.support, constraints.independent)
    assert d.support.event_dim == 1
    outside = {"positive": -0.1, "interval": 3.1, "categorical": 0.5}
    for position, name in enumerate(case.targets):
        variable = VARIABLES[VARIABLES.index(name)]
        if variable.support == "real":
            continue
        wrong = value.clone()
        wrong[..., position] = len(variable.levels) if variable.discrete else outside[variable.support]
        for bad in (wrong[..., position], torch.full_like(wrong[..., position], outside[variable.support])):
            wrong[..., position] = bad
            assert not d.support.check(wrong).any()
            with pytest.raises(DataError, match=f"value of {name} at .*{variable.support}"):
                d.log_prob(wrong)


@every_continuous_case
def test_support_maps_to_the_whole_space_and_back(case: Case) -> None:
    d = conditional(case)
    transform = biject_to(d.support)
    value = d.sample((5,))
    free = transform.inv(value)
    assert free.shape == value.shape
    torch.testing.assert_close(transform(free), value)
    log_det = transform.log_abs_det_jacobian(free, value)
    assert log_det.shape == (5, *d.batch_shape)
    jacobian = torch.func.vmap(torch.func.jacrev(transform))(free.reshape(-1, len(case.targets)))
    torch.testing.assert_close(log_det.flatten(), torch.linalg.slogdet(jacobian).logabsdet)


@every_case
def test_outside_the_support_there_is_no_density(case: Case) -> None:
    d = conditional(case)
    free = ConditionalFlow(d.density, d.standardization, d.variables, d.targets, d.given, validate_args=False)
    for position, name in enumerate(case.targets):
        if VARIABLES[VARIABLES.index(name)].support == "interval":
            for cell in (-2.001, 3.001, 40.0):
                value = d.sample()
                value[..., position] = cell
                assert (free.log_prob(value) == -math.inf).all()


def test_single_precision_draws_stay_inside() -> None:
    """Wide givens press the mass against an end; rounding must not carry a draw across it."""
    torch.set_default_dtype(torch.float32)
    flow = flow_with().float()
    d = flow.conditional(["p", "q"], {"b": torch.tensor([-2000.0, 0.0, 280.0, 600.0, 3000.0])})
    for value in (d.sample((2000,)), d.rsample((2000,))):
        assert value.dtype == torch.float32
        assert d.support.check(value).all()
        assert d.log_prob(value).isfinite().all()


# ---------------------------------------------------------------------- the density integrates to one
def axis(name: str, number: int) -> tuple[Tensor, Tensor]:
    """Points over all of a variable's support, and the weights of the trapezoidal rule in unconstrained space."""
    variable = VARIABLES[VARIABLES.index(name)]
    if variable.discrete:
        codes = torch.arange(len(variable.levels)).double()
        return codes, torch.ones_like(codes)
    flow = flow_of()
    free = torch.linspace(-12.0, 12.0, number)
    if variable.support == "interval":
        value = -2 + 5 * torch.sigmoid(1.5 * free)
        slope = 7.5 * torch.sigmoid(1.5 * free) * torch.sigmoid(-1.5 * free)
    else:
        column = VARIABLES.index(name)
        value = flow.standardization.inverse(free.unsqueeze(-1), index=[column])[:, 0]
        slope = (-flow.standardization.log_abs_det_jacobian(value.unsqueeze(-1), index=[column])[:, 0]).exp()
    return value, slope * (free[1] - free[0])


def integrable(case: Case) -> bool:
    return len(case.targets) - sum(case.discrete) <= 2


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if integrable(c)], ids=[n for n, c in CASES.items() if integrable(c)]
)
def test_integrates_to_one(case: Case) -> None:
    """Trapezoidal rule over continuous targets, sum over levels of the others."""
    d = conditional(case)
    number = 601 if len(case.targets) - sum(case.discrete) == 1 else 321 if case.head == "spline" else 171
    points, weights = zip(*(axis(name, number) for name in case.targets), strict=True)
    grid = torch.stack(torch.meshgrid(*points, indexing="ij"), -1).reshape(-1, *[1] * len(d.batch_shape), len(points))
    weight = torch.stack(torch.meshgrid(*weights, indexing="ij"), -1).prod(-1).flatten()
    with torch.no_grad():
        density = d.log_prob(grid).exp().reshape(len(weight), -1)
    total = (weight.unsqueeze(-1) * density).sum(0)
    # splines have kinks in their density's slope, where the rule converges slowly
    tolerance = 1e-3 if case.head == "spline" else 1e-5
    torch.testing.assert_close(total, torch.ones_like(total), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------- draws follow the density
def rosenblatt(d: ConditionalFlow, draws: Tensor) -> Tensor:
    """Draws (S, n) of a distribution without batch to what must be independent and uniform (S, n).

    Each cell goes through the distribution function of its own factor, integrated numerically from `log_prob` alone; a
    level, through its place within its own step.
    """
    uniforms = torch.empty_like(draws)
    for k, column in enumerate(sorted(d.columns)):
        position = d.columns.index(column)
        name = VARIABLES[column].name
        row = d.given.expand(len(draws), -1).clone()
        for earlier in sorted(d.columns)[:k]:
            row[:, earlier] = draws[:, d.columns.index(earlier)]
        factor = ConditionalFlow(d.density, d.standardization, d.variables, [name], row)
        points, weights = axis(name, 121)
        with torch.no_grad():
            mass = weights.unsqueeze(-1) * factor.log_prob(points.reshape(-1, 1, 1)).exp()
        mine = draws[:, position]
        if VARIABLES[column].discrete:
            below = torch.where(points.unsqueeze(-1) < mine, mass, 0.0).sum(0)
            own = torch.where(points.unsqueeze(-1) == mine, mass, 0.0).sum(0)
            uniforms[:, position] = below + own * torch.rand(len(draws))
        else:
            middle = mass.cumsum(0) - 0.5 * mass  # the trapezoidal rule up to each point
            right = torch.searchsorted(points, mine.contiguous()).clamp(1, len(points) - 1)
            share = (mine - points[right - 1]) / (points[right] - points[right - 1])
            step = torch.arange(len(draws))
            uniforms[:, position] = torch.lerp(middle[right - 1, step], middle[right, step], share)
    return uniforms.clamp(0, 1)


@every_case
@pytest.mark.parametrize("method", ["sample", "__call__"])
def test_goodness_of_fit(case: Case, method: str) -> None:
    """Kolmogorov–Smirnov on each factor and χ² on each pair, for plain draws and for what Pyro draws (`rsample` where
    there is one). Were the seed not fixed, a right implementation would fail any of these about 130 tests with a
    probability of 0.2 % in all."""
    d = conditional(case)
    worst = 1.0
    for index in itertools.islice(itertools.product(*map(range, d.batch_shape)), 3):
        alone = ConditionalFlow(d.density, d.standardization, d.variables, d.targets, d.given[index])
        with torch.no_grad():
            draws = getattr(d, method)((600,))[(slice(None), *index)]
        uniforms = rosenblatt(alone, draws).numpy()
        for k in range(uniforms.shape[1]):
            worst = min(worst, stats.kstest(uniforms[:, k], "uniform").pvalue)
        for i, k in itertools.combinations(range(uniforms.shape[1]), 2):
            counts = np.histogram2d(uniforms[:, i], uniforms[:, k], bins=4, range=[[0, 1], [0, 1]])[0]
            worst = min(worst, stats.chisquare(counts.flatten()).pvalue)
    assert worst > 1.5e-5


def test_goodness_of_fit_has_power() -> None:
    """The test above must refuse draws of a slightly different law."""
    d = conditional(CASES["one target"])
    draws = d.sample((600,))
    shifted = draws + 0.25 * d.variance.sqrt()
    assert stats.kstest(rosenblatt(d, shifted)[:, 0].numpy(), "uniform").pvalue < 1.5e-5


@every_continuous_case
def test_moments(case: Case) -> None:
    """The quasi-random moments agree with those of 8,000 plain draws within 5 of their standard errors, plus 1 % of a
    standard deviation for the quasi-random error itself."""
    d = conditional(case)
    draws = d.sample((8_000,))
    deviation = draws.std(0)
    assert ((d.mean - draws.mean(0)).abs() < (5 / math.sqrt(8_000) + 0.01) * deviation).all()
    fourth = ((draws - draws.mean(0)) ** 4).mean(0)
    error = (fourth - deviation**4).clamp_min(0).sqrt() / math.sqrt(8_000)
    assert ((d.variance - deviation**2).abs() < 5 * error + 0.05 * deviation**2).all()
    assert torch.equal(d.mean, conditional(case).mean)


# ---------------------------------------------------------------------- gradients
def given_row(case: Case) -> Tensor:
    return conditional(case).given.clone()


@every_case
def test_log_prob_gradient(case: Case) -> None:
    """Exact against central differences, in the value and in the given cells, of continuous cells."""
    d = conditional(case)
    discrete = torch.tensor(case.discrete)
    value = d.sample((2,))
    row = d.given
    known = ~row.isnan() & torch.tensor([not v.discrete for v in VARIABLES])

    def log_prob(cells: Tensor, given: Tensor) -> Tensor:
        filled = row.masked_scatter(known, given)
        d = ConditionalFlow(
            flow_of(case.head).density, flow_of(case.head).standardization, VARIABLES, case.targets, filled
        )
        return d.log_prob(value.masked_scatter((~discrete).expand(value.shape), cells))

    cells = value[..., ~discrete].flatten().requires_grad_()
    given = row[known].requires_grad_()
    inputs = tuple(x for x in (cells, given) if x.numel())
    if len(inputs) == 2:
        assert torch.autograd.gradcheck(log_prob, inputs, eps=1e-6, atol=1e-5)
    elif cells.numel():
        assert torch.autograd.gradcheck(lambda c: log_prob(c, row[known]), inputs, eps=1e-6, atol=1e-5)
    elif given.numel():
        assert torch.autograd.gradcheck(lambda g: log_prob(cells, g), inputs, eps=1e-6, atol=1e-5)


def seeded(function: Callable[[], Tensor]) -> Tensor:
    pyro.set_rng_seed(7)
    return function()


@every_continuous_case
def test_rsample_gradient(case: Case) -> None:
    """Of the quantile at fixed uniforms, against central differences, in the given cells and along the weights."""
    flow = flow_with(case.head)
    row = given_row(case)
    known = ~row.isnan() & torch.tensor([not v.discrete for v in VARIABLES])

    def draw(given: Tensor) -> Tensor:
        filled = row.masked_scatter(known, given)
        return seeded(ConditionalFlow(flow.density, flow.standardization, VARIABLES, case.targets, filled).rsample)

    given = row[known]
    if given.numel():
        assert torch.autograd.gradcheck(draw, given.requires_grad_(), eps=1e-6, atol=1e-5, rtol=1e-4)
    weights = list(flow.density.parameters())
    direction = [torch.randn_like(w) for w in weights]
    total = draw(given.detach()).sum()
    slopes = torch.autograd.grad(total, weights, allow_unused=True)
    slope = sum((g * v).sum() for g, v in zip(slopes, direction, strict=True) if g is not None)

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            torch._foreach_add_(weights, direction, alpha=step)
            result = draw(given.detach()).sum()
            torch._foreach_add_(weights, direction, alpha=-step)
        return result

    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["one target", "positive", "interval"])
def test_rsample_gradient_moves_the_law(name: str) -> None:
    r"""A draw at a fixed uniform moves by :math:`-(\partial F / \partial g) / p`, with F integrated from `log_prob`."""
    case = CASES[name]
    d = conditional(case)
    column = VARIABLES.index(next(iter(case.given)))
    step = 1e-4

    def at(shift: float) -> ConditionalFlow:
        row = d.given.clone()
        row[..., column] += shift
        return ConditionalFlow(d.density, d.standardization, d.variables, d.targets, row)

    row = d.given.clone().requires_grad_()
    draws = seeded(lambda: ConditionalFlow(d.density, d.standardization, d.variables, d.targets, row).rsample((20,)))
    slopes = torch.stack([torch.autograd.grad(x, row, retain_graph=True)[0][column] for x in draws[:, 0]])
    points, weights = axis(case.targets[0], 4001)
    with torch.no_grad():
        change = (at(step).log_prob(points.unsqueeze(-1)).exp() - at(-step).log_prob(points.unsqueeze(-1)).exp()) / (
            2 * step
        )
        flux = (weights * change).cumsum(0) - 0.5 * weights * change
        here = torch.from_numpy(np.interp(draws[:, 0].detach().numpy(), points.numpy(), flux.numpy()))
        expected = -here / d.log_prob(draws.detach()).exp()
    torch.testing.assert_close(slopes, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


@every_case
def test_gradients_stay_finite_with_missing_cells(case: Case) -> None:
    flow = flow_with(case.head)
    d = conditional(case)
    row = d.given.clone().requires_grad_()
    value = d.sample((6,))
    for k in range(len(case.targets)):
        value[k % 6, ..., k] = NAN
    value[-1] = NAN
    value.requires_grad_()
    new = ConditionalFlow(flow.density, flow.standardization, VARIABLES, case.targets, row)
    log_prob = new.log_prob(value)
    assert (log_prob[-1] == 0).all()
    log_prob.sum().backward()
    assert value.grad is not None and row.grad is not None
    assert value.grad.isfinite().all()
    assert (value.grad[value.isnan()] == 0).all()
    assert row.grad.isfinite().all()
    assert (row.grad[row.isnan()] == 0).all()
    for name, p in flow.density.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


# ---------------------------------------------------------------------- what conditionals owe to each other
@every_case_of_several
def test_order_of_targets_permutes_columns_only(case: Case) -> None:
    d = conditional(case)
    given = {name: torch.as_tensor(d.given[..., VARIABLES.index(name)]) for name in case.given}
    value = seeded(lambda: d.sample((3,)))
    log_prob = d.log_prob(value)
    for order in itertools.islice(itertools.permutations(range(len(case.targets))), 6):
        other = flow_of(case.head).conditional([case.targets[k] for k in order], given)
        assert torch.equal(other.log_prob(value[..., list(order)]), log_prob)
        assert torch.equal(seeded(lambda other=other: other.sample((3,))), value[..., list(order)])


@every_case_of_several
def test_missing_value_is_that_target_left_out(case: Case) -> None:
    d = conditional(case)
    given = {name: d.given[..., VARIABLES.index(name)] for name in case.given}
    value = d.sample((3,))
    for k in range(len(case.targets)):
        kept = [j for j in range(len(case.targets)) if j != k]
        holed = value.clone()
        holed[..., k] = NAN
        without = flow_of(case.head).conditional([case.targets[j] for j in kept], given)
        torch.testing.assert_close(d.log_prob(holed), without.log_prob(value[..., kept]), rtol=1e-10, atol=1e-10)


def test_missing_cells_differ_from_row_to_row() -> None:
    d = flow_of().conditional(VARIABLES.names)
    values = rows(40, seed=3)
    assert (values.isnan().sum(-1) > 0).any()
    each = [
        flow_of()
        .conditional([n for n, cell in zip(VARIABLES.names, row, strict=True) if not cell.isnan()])
        .log_prob(row[~row.isnan()])
        for row in values
        if not row.isnan().all()
    ]
    values = values[~values.isnan().all(-1)]
    torch.testing.assert_close(d.log_prob(values), torch.stack(each), rtol=1e-10, atol=1e-10)


@every_case
def test_missing_given_is_that_cell_left_out(case: Case) -> None:
    d = conditional(case)
    value = d.sample()
    given = {name: d.given[..., VARIABLES.index(name)] for name in case.given}
    for name in given:
        fewer = {n: cell for n, cell in given.items() if n != name}
        holed = flow_of(case.head).conditional(case.targets, fewer | {name: NAN})
        without = flow_of(case.head).conditional(case.targets, fewer)
        torch.testing.assert_close(holed.log_prob(value), without.log_prob(value), rtol=1e-10, atol=1e-10)


@every_case_of_several
def test_marginal_times_conditional_is_the_joint(case: Case) -> None:
    """Along the canonical order: p(t) = p(first k) p(rest | first k)."""
    d = conditional(case)
    given = {name: d.given[..., VARIABLES.index(name)] for name in case.given}
    value = d.sample((4,))
    chain = sorted(range(len(case.targets)), key=lambda j: d.columns[j])
    for k in range(1, len(chain)):
        first, rest = chain[:k], chain[k:]
        marginal = flow_of(case.head).conditional([case.targets[j] for j in first], given)
        after = flow_of(case.head).conditional(
            [case.targets[j] for j in rest], given | {case.targets[j]: value[..., j] for j in first}
        )
        together = marginal.log_prob(value[..., first]) + after.log_prob(value[..., rest])
        torch.testing.assert_close(d.log_prob(value), together, rtol=1e-10, atol=1e-10)


def test_levels_can_be_named() -> None:
    flow = flow_of()
    value = torch.tensor([0.3])
    named = flow.conditional(["a"], {"c": ["z", "x"], "e": "on"})
    coded = flow.conditional(["a"], {"c": torch.tensor([2.0, 0.0]), "e": 1})
    assert coded.given.dtype == torch.float64
    arrayed = flow.conditional(["a"], {"c": np.array(["z", "x"]), "e": np.array("on")})
    assert named.batch_shape == (2,)
    assert torch.equal(named.log_prob(value), coded.log_prob(value))
    assert torch.equal(arrayed.log_prob(value), coded.log_prob(value))


def test_probabilities_of_integer_codes() -> None:
    """Codes of any dtype: the log-probability keeps its own."""
    d = flow_of().conditional(["c"], {"a": 0.1})
    codes = torch.arange(3).unsqueeze(-1)
    log_prob = d.log_prob(codes)
    assert log_prob.dtype == torch.float64
    torch.testing.assert_close(log_prob, d.log_prob(codes.double()))
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))


def test_units_move_the_density_by_their_jacobian() -> None:
    """The same rows in mm instead of m: the density falls by 1000 a target, nothing else changes."""
    values = rows()[:, [0, 1]]
    in_metres = Variables([Variable("a", "parameter"), Variable("p", "observation", "positive", units="m")])
    in_millimetres = Variables([Variable("a", "parameter"), Variable("p", "observation", "positive", units="mm")])
    scale = torch.tensor([1.0, 1000.0])
    one = flow_with("mixture", in_metres, values).conditional(["p", "a"])
    two = flow_with("mixture", in_millimetres, values * scale).conditional(["p", "a"])
    value = one.sample((5,))
    torch.testing.assert_close(
        two.log_prob(value * scale.flip(0)), one.log_prob(value) - math.log(1000.0), rtol=1e-6, atol=1e-6
    )


def test_what_a_seed_draws_is_repeatable() -> None:
    d = conditional(CASES["the whole row"])
    assert torch.equal(seeded(lambda: d.sample((5,))), seeded(lambda: d.sample((5,))))
    assert not torch.equal(d.sample((5,)), d.sample((5,)))


def test_nothing_is_cached_between_calls() -> None:
    """A value drawn before a change of the weights is scored with the new ones, with gradient."""
    flow = flow_with()
    d = flow.conditional(["a", "p"], {"b": 290.0})
    value = d.rsample().detach()
    before = d.log_prob(value)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.05
    after = d.log_prob(value)
    assert after.requires_grad
    assert (after - before).abs() > 1e-6


# ---------------------------------------------------------------------- errors
def test_value_of_a_wrong_shape() -> None:
    d = flow_of().conditional(["a", "p"], {"b": torch.tensor([250.0, 280.0, 300.0])})
    with pytest.raises(DataError, match=r"value: the last dimension has 3 entries, expected 2.*'a', 'p'"):
        d.log_prob(torch.ones(3))
    with pytest.raises(DataError, match=r"value: the last dimension has no entries"):
        d.log_prob(torch.tensor(1.0))
    with pytest.raises(DataError, match=r"value: .*\(4,\).*batch_shape \(3,\)"):
        d.log_prob(torch.ones(4, 2))


def test_value_outside_its_support() -> None:
    d = flow_of().conditional(["p", "c"])
    with pytest.raises(DataError, match=r"value of p at \(1,\): found -2, outside its support positive"):
        d.log_prob(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    with pytest.raises(DataError, match=r"value of c at \(0,\): found 3, outside its support categorical"):
        d.log_prob(torch.tensor([[1.0, 3.0]]))
    with pytest.raises(DataError, match=r"value of p at \(\): found inf"):
        d.log_prob(torch.tensor([math.inf, 0.0]))


@pytest.mark.parametrize(
    ("targets", "given", "message"),
    [
        ((), None, "targets: none named"),
        (("a", "a"), None, "targets: a is named twice"),
        (("aa",), None, "unknown variable 'aa'; did you mean a"),
        (("a",), {"bb": 1.0}, "unknown variable 'bb'"),
        (("a", "b"), {"b": 1.0}, "b is both a target and given"),
        (("a",), {"p": -1.0}, r"given p at \(\): found -1, outside its support positive"),
        (("a",), {"p": [1.0, 0.0]}, r"given p at \(1,\): found 0, outside its support positive"),
        (
            ("a",),
            {"q": torch.tensor([[0.0, 3.5]])},
            r"given q at \(0, 1\): found 3.5, outside its support interval",
        ),
        (("a",), {"b": math.inf}, r"given b at \(\): found inf"),
        (("a",), {"c": 1.5}, r"given c at \(\): found 1.5, outside its support categorical"),
        (("a",), {"c": "w"}, r"given c: unseen level 'w'; known: \['x', 'y', 'z'\]"),
        (("a",), {"c": ["x", "w"]}, "given c: unseen level 'w'"),
        (("a",), {"b": "warm"}, "given b: found 'warm', expected numbers"),
        (("a",), {"b": None}, "given b: found None, expected numbers"),
        (("a",), {"b": torch.ones(2), "p": torch.ones(3)}, r"given: shapes .*'p': \(3,\).* do not broadcast"),
    ],
)
def test_a_question_that_cannot_be_asked(targets: tuple[str, ...], given: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        flow_of().conditional(targets, given)


def test_given_cells_keep_the_wider_dtype_and_their_gradient() -> None:
    cell = torch.tensor([250.0, 300.0], dtype=torch.float64, requires_grad=True)
    row = stack_given(VARIABLES, {"b": cell, "a": 1}, torch.float32)
    assert row.dtype == torch.float64
    assert row.shape == (2, 6)
    assert row.isnan().sum() == 8
    row.nansum().backward()
    assert torch.equal(cell.grad, torch.ones(2, dtype=torch.float64))


def test_given_numbers_keep_their_digits() -> None:
    """Plain numbers take the dtype of the row, not the default one."""
    torch.set_default_dtype(torch.float32)
    for number in (0.1, [0.1], np.array([0.1])):
        assert (
            stack_given(VARIABLES, {"a": number}, torch.float64)[..., 0] == torch.tensor(0.1, dtype=torch.float64)
        ).all()
    assert flow_of().conditional(["p"], {"a": 0.1}).given[0].item() == 0.1


def test_validation_can_be_switched_off() -> None:
    d = flow_of().conditional(["q"])
    free = ConditionalFlow(d.density, d.standardization, d.variables, d.targets, d.given, validate_args=False)
    assert free.log_prob(torch.tensor([7.0])) == -math.inf
    assert free.expand((2,)).log_prob(torch.tensor([7.0])).shape == (2,)
    with pytest.raises(DataError):
        d.expand((2,)).log_prob(torch.tensor([7.0]))


def test_contract_of_a_pyro_distribution() -> None:
    d = conditional(CASES["batched givens"])
    assert isinstance(d, dist.TorchDistribution)
    assert not d.has_enumerate_support
    assert d().shape == d.shape()
