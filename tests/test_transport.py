"""Maps between populations: closed forms between Gaussians, change of variables, then what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_invman as pim
from pyro_invman.density.conditional_gaussian import ConditionalGaussian, rotation
from pyro_invman.density.conditional_law import optimal_turn, turn_of_pairs
from pyro_invman.density.coupling import Anchor, Coupling, assignment, coupled_draws, even_noise, squared_distances
from pyro_invman.density.velocity import Solver, VelocityField

SHORT = pim.Schedule(steps=30)
TIGHT = Solver(tolerance=1e-6)


def spd(seed: int, dim: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.double)
    return root @ root.mT + 0.2 * torch.eye(dim, dtype=torch.double)


def symmetric(matrix: Tensor, function: str) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(getattr(values, function)()) @ vectors.mT


def optimal(s0: Tensor, s1: Tensor) -> Tensor:
    """The matrix of the optimal map from N(0, s0) to N(0, s1)."""
    root = symmetric(s0, "sqrt")
    inner = symmetric(root @ s1 @ root, "sqrt")
    return torch.linalg.inv(root) @ inner @ torch.linalg.inv(root)


def gaussians(s0: Tensor, s1: Tensor, m0: Tensor, m1: Tensor, **settings: object) -> pim.ConditionalTransport:
    """A map whose laws are set to N(m0, s0) and N(m1, s1), flows untrained."""
    transport = pim.ConditionalTransport(len(m0), 0, **settings).double()  # type: ignore[arg-type]
    for law, s, m in zip(transport.laws, (s0, s1), (m0, m1), strict=True):
        rows, columns = torch.tril_indices(len(m), len(m))
        law.gaussian.out.bias.data = torch.cat([m, symmetric(s, "log")[rows, columns] / 2])
    return transport


def bent(engine: str, stochastic: bool = False, dim: int = 2) -> pim.ConditionalTransport:
    """A map with random weights everywhere."""
    transport = pim.ConditionalTransport(dim, 1, stochastic, engine=engine, noise=0.4, width=16).double()
    torch.manual_seed(1)
    for parameter in transport.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return transport


def grid(half: float, number: int = 101) -> tuple[Tensor, float]:
    axis = torch.linspace(-half, half, number, dtype=torch.double)
    return torch.cartesian_prod(axis, axis), float((axis[1] - axis[0]) ** 2)


# ------------------------------------------------------------------ between Gaussians
@pytest.mark.parametrize("engine", ["optimal", "base"])
def test_gaussians_by_the_closed_form(engine: str) -> None:
    s0, s1, m0, m1 = spd(0), spd(1), torch.arange(3).double(), -torch.ones(3).double()
    transport = gaussians(s0, s1, m0, m1, engine=engine)
    x, none = torch.randn(50, 3, dtype=torch.double), torch.zeros(50, 0, dtype=torch.double)
    matrix, go = optimal(s0, s1), transport.condition(none)
    assert torch.allclose(go(x), m1 + (x - m0) @ matrix.mT, atol=1e-9)
    assert torch.allclose(go.inv(go(x)), x, atol=1e-9)
    assert torch.allclose(go.log_abs_det_jacobian(x, x), matrix.logdet().expand(50), atol=1e-9)
    pushed = dist.TransformedDistribution(dist.MultivariateNormal(m0, s0), [transport.condition(none[:1])])
    assert torch.allclose(pushed.log_prob(x), dist.MultivariateNormal(m1, s1).log_prob(x), atol=1e-8)


def test_cost_between_gaussians_is_the_wasserstein_distance() -> None:
    s0, s1 = spd(2), spd(3)
    root = symmetric(s0, "sqrt")
    distance = (s0 + s1 - 2 * symmetric(root @ s1 @ root, "sqrt")).trace()
    go = gaussians(s0, s1, torch.zeros(3).double(), torch.zeros(3).double()).condition(torch.zeros(0).double())
    jacobian = torch.stack([go(row) for row in torch.eye(3, dtype=torch.double)], -1)
    moved = jacobian - torch.eye(3, dtype=torch.double)
    assert (moved @ s0 @ moved.mT).trace().item() == pytest.approx(distance.item(), rel=1e-9)


def test_scales_say_what_is_near() -> None:
    """In units of its own, each coordinate's optimal map is that of the stretched laws."""
    s0, s1, scales = spd(4, 2), spd(5, 2), torch.tensor([3.0, 0.2]).double()
    zero, stretch = torch.zeros(2).double(), torch.diag(1 / scales)
    transport = gaussians(s0, s1, zero, zero)
    transport.length.copy_(scales)
    go = transport.condition(torch.zeros(0).double())
    matrix = torch.diag(scales) @ optimal(stretch @ s0 @ stretch, stretch @ s1 @ stretch) @ stretch
    x = torch.randn(2, dtype=torch.double)
    assert torch.allclose(go(x), matrix @ x, atol=1e-9)


def test_rotation_where_singular_values_coincide() -> None:
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.double)
    matrix = (2.0 * turn).requires_grad_()
    assert torch.allclose(rotation(matrix), turn, atol=1e-12)
    assert torch.autograd.gradcheck(rotation, (matrix,))


def test_conditional_gaussian_density() -> None:
    gaussian = ConditionalGaussian(2, 1).double()
    torch.manual_seed(0)
    gaussian.out.weight.data.normal_(std=0.1)
    points, cell = grid(8.0, 221)
    c = torch.tensor([[0.7]]).double()
    assert (gaussian.log_prob(points, c).exp().sum() * cell).item() == pytest.approx(1.0, abs=1e-6)
    gaussian.floor = 0.0
    x, many = torch.randn(40, 2, dtype=torch.double), c.expand(40, 1)
    expected = -gaussian.log_prob(x, many).mean() - math.log(2 * math.pi)
    assert gaussian.loss(x, many).item() == pytest.approx(expected.item(), abs=1e-9)


def test_gaussian_map_is_learned() -> None:
    """N(c, 1) to N(2 c + 1, 1/4) in each coordinate: the optimal map is x ↦ 2 c + 1 + (x − c) / 2."""
    generator = torch.Generator().manual_seed(0)
    c0, c1 = (torch.rand(4000, 1, generator=generator) for _ in range(2))
    x0 = c0 + torch.randn(4000, 2, generator=generator)
    x1 = 2 * c1 + 1 + 0.5 * torch.randn(4000, 2, generator=generator)
    transport = pim.ConditionalTransport(2, 1, groups=40, group_size=64)
    history = transport.fit((x0, c0), (x1, c1), progress=False, schedule=pim.Schedule(steps=200, batch_size=128))
    c = torch.linspace(0.1, 0.9, 400).unsqueeze(-1)
    x = c + torch.randn(400, 2, generator=generator)
    error = transport(x, c) - (2 * c + 1 + (x - c) / 2)
    assert error.square().mean().sqrt() < 0.1
    assert history.attrs["solver_error_10"] < 0.02
    assert set(history.part.values) >= {"map", "source: flow", "target: gaussian"}


@pytest.mark.parametrize("setting", ["OT-CFM", "plain flow matching"])
def test_batches_learn_the_map_of_their_setting(setting: str) -> None:
    """From N(m0, S0) to N(m1, S1), whose axes differ: batches coupled by optimal transport learn the optimal map,
    batches coupled at random the flow of v = (t S1 − (1 − t) S0) ((1 − t)² S0 + t² S1)⁻¹ x about the mean. Both are
    linear and take the one law to the other; in a coordinate they are 1.0 apart."""
    s0 = torch.tensor([[4.0, 0.0], [0.0, 0.25]], dtype=torch.double)
    s1 = torch.tensor([[2.125, 1.875], [1.875, 2.125]], dtype=torch.double)
    m0, m1 = torch.tensor([1.0, -0.5]), torch.tensor([0.0, 1.0])
    flowed, steps = torch.eye(2, dtype=torch.double), 1000
    for k in range(steps):
        t = (k + 0.5) / steps
        slope = (t * s1 - (1 - t) * s0) @ torch.linalg.inv((1 - t) ** 2 * s0 + t**2 * s1)
        flowed = torch.linalg.matrix_exp(slope / steps) @ flowed
    assert torch.allclose(flowed @ s0 @ flowed.mT, s1, atol=1e-3)
    maps = {"OT-CFM": optimal(s0, s1).float(), "plain flow matching": flowed.float()}
    generator = torch.Generator().manual_seed(0)
    source, target, x = (
        m + torch.randn(number, 2, generator=generator) @ torch.linalg.cholesky(s).float().mT
        for m, s, number in ((m0, s0, 4000), (m1, s1, 4000), (m0, s0, 500))
    )
    coupling = Coupling(0.0, None, optimal=setting == "OT-CFM")
    transport = pim.ConditionalTransport(2, 0, engine="batch", coupling=coupling, scales=[1.0, 1.0], width=64)
    settings = pim.Schedule(steps=500, batch_size=128)
    history = transport.fit((source, source[:, :0]), (target, target[:, :0]), progress=False, schedule=settings)
    found = transport(x, x[:, :0])
    errors = {name: (found - m1 - (x - m0) @ a.mT).square().mean().sqrt().item() for name, a in maps.items()}
    assert errors.pop(setting) < 0.15
    assert min(errors.values()) > 0.8
    assert history.attrs["solver_error_10"] < 0.15


def test_plain_batches_learn_a_map_that_follows_the_condition() -> None:
    """N(0, 1), whatever the condition, to N(2 c + 1, 1/4): random couples leave x and c independent, and every
    coordinate's flow is x ↦ 2 c + 1 + x / 2."""
    generator = torch.Generator().manual_seed(1)
    c0, c1, at = (torch.rand(n, 1, generator=generator) for n in (4000, 4000, 400))
    x0, x = torch.randn(4000, 2, generator=generator), torch.randn(400, 2, generator=generator)
    x1 = 2 * c1 + 1 + 0.5 * torch.randn(4000, 2, generator=generator)
    transport = pim.ConditionalTransport(2, 1, engine="batch", coupling=Coupling(0.0, None, optimal=False), width=64)
    transport.fit((x0, c0), (x1, c1), progress=False, schedule=pim.Schedule(steps=400, batch_size=256))
    at = at.clamp(transport.context_low, transport.context_high)
    error = transport(x, at) - (2 * at + 1 + x / 2)
    assert error.square().mean().sqrt() < 0.12


# ------------------------------------------------------------------ change of variables
@pytest.mark.parametrize("engine", ["optimal", "base", "batch"])
def test_bijection(engine: str) -> None:
    transport = bent(engine)
    x, c = torch.randn(3, 2, dtype=torch.double), torch.randn(3, 1, dtype=torch.double)
    go = transport.condition(c, TIGHT)
    y = go(x)
    assert torch.allclose(go.inv(y), x, atol=1e-4)
    assert (y - x).abs().max() > 0.05
    found = go.log_abs_det_jacobian(x, y)
    assert torch.allclose(go.inv.log_abs_det_jacobian(y, x), -found, atol=1e-4)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(transport.condition(c[i], TIGHT), x[i])
        assert found[i].item() == pytest.approx(jacobian.slogdet().logabsdet.item(), abs=1e-4)


@pytest.mark.parametrize("population", ["source", "target"])
def test_laws_integrate_to_one(population: str) -> None:
    points, cell = grid(9.0)
    law = bent("base").law(population, torch.tensor([0.3]).double())
    assert law.batch_shape == () and law.event_shape == (2,)
    with torch.no_grad():
        assert (law.log_prob(points).exp().sum() * cell).item() == pytest.approx(1.0, abs=1e-3)


def test_base_takes_law_to_law() -> None:
    transport, c = bent("base"), torch.tensor([0.3]).double()
    source, target = (transport.law(name, c, TIGHT) for name in ("source", "target"))
    go, x = transport.condition(c, TIGHT), torch.randn(20, 2, dtype=torch.double)
    y = go(x)
    assert torch.allclose(source.log_prob(x), target.log_prob(y) + go.log_abs_det_jacobian(x, y), atol=1e-3)


def test_stochastic_map_has_a_density() -> None:
    transport = bent("optimal", stochastic=True)
    x, c = torch.tensor([0.5, -0.2]).double(), torch.tensor([0.3]).double()
    law = transport.given(x, c)
    points, cell = grid(6.0)
    with torch.no_grad():
        density = law.log_prob(points).exp() * cell
        draws = transport(x.expand(4_000, 2), c)
    assert density.sum().item() == pytest.approx(1.0, abs=1e-3)
    mean = (density.unsqueeze(-1) * points).sum(0)
    assert (draws.mean(0) - mean).abs().max() < 4.5 * draws.std(0).max() / 4_000**0.5
    with pytest.raises(pim.DataError, match="not stochastic"):
        bent("optimal").given(x, c)


def test_shapes_and_gradients() -> None:
    transport = bent("optimal")
    c = torch.randn(5, 1, dtype=torch.double, requires_grad=True)
    x = torch.randn(4, 5, 2, dtype=torch.double, requires_grad=True)
    base = dist.Normal(torch.zeros(5, 2).double(), 1.0).to_event(1)
    pushed = dist.TransformedDistribution(base, [transport.condition(c)])
    assert pushed.batch_shape == (5,) and pushed.sample((4,)).shape == (4, 5, 2)
    pushed.log_prob(x).sum().backward()
    for tensor in (x, c, transport.fields[0].out.weight):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0
    assert transport.inv.condition(c)(transport(x, c)).allclose(x, atol=1e-3)


@pytest.mark.parametrize("engine", ["optimal", "base", "batch"])
def test_one_point_at_many_conditions(engine: str) -> None:
    transport, x = bent(engine), torch.tensor([0.3, -0.1]).double()
    c = torch.linspace(-1, 1, 4).double().unsqueeze(-1)
    together, one = transport.condition(c), transport.condition(c[2])
    assert together(x).shape == (4, 2) and together.log_abs_det_jacobian(x, x).shape == (4,)
    assert torch.allclose(together(x)[2], one(x), atol=1e-3)


def test_in_a_pyro_model() -> None:
    transport = bent("optimal")
    c = torch.randn(7, 1, dtype=torch.double)

    def model() -> Tensor:
        pyro.module("transport", transport)
        with pyro.plate("row", 7):
            before = pyro.sample("before", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            law = dist.TransformedDistribution(dist.Normal(before, 0.1).to_event(1), [transport.condition(c)])
            return pyro.sample("after", law)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["after"]["log_prob"].shape == (7,)
    assert any(name.startswith("transport") for name in trace.param_nodes)


# ------------------------------------------------------------------ couplings
def test_assignment_sorts_a_line() -> None:
    a, b = torch.randn(60, 1), torch.randn(60, 1)
    to = assignment(squared_distances(a, b))
    assert torch.equal(b[to][a[:, 0].argsort()], b.sort(0).values)


def test_even_noise_is_normal_and_even() -> None:
    """Over groups the moments of independent normals; within a group of 64 as many below as above the median of each
    coordinate, where independent draws differ by eight."""
    noise = even_noise(500, 64, 3, torch.Generator().manual_seed(0))
    assert bool(((noise < 0).sum(1) == 32).all())
    one = noise[:, 5]
    assert float(one.mean(0).abs().max()) < 4.5 / 500**0.5
    assert float((one.mT @ one / 500 - torch.eye(3)).abs().max()) < 4.5 * (2 / 500) ** 0.5
    assert torch.equal(noise, even_noise(500, 64, 3, torch.Generator().manual_seed(0)))


def test_couples_of_two_gaussians_lie_near_the_optimal_map() -> None:
    """Nearer than those of independent draws."""
    middle, count = torch.zeros(2).double(), 64
    transport = gaussians(spd(1, 2), spd(2, 2), middle, middle)
    generator, nothing = torch.Generator().manual_seed(0), torch.zeros(20, 0, dtype=torch.double)
    start, end, _ = coupled_draws(*transport._laws, nothing, count, transport.length, None, generator)
    off = (end - start).square().mean()
    roots = [law.root(nothing.unsqueeze(1)) for law in transport._laws]
    turn = optimal_turn(*roots, transport.length)
    independent = []
    for _ in range(20):
        a, b = torch.randn(2, count, 2, generator=generator, dtype=torch.double)
        x0, x1 = (root.go(z, False, False)[0][0] for root, z in zip(roots, (a, b), strict=True))
        independent.append(b[assignment(squared_distances(x0, x1))] - turn.go(a, False, False)[0][0])
    assert off < torch.stack(independent).square().mean() / 2


def test_batches_without_distance_cost_nothing() -> None:
    field, generator = VelocityField(2, 1), torch.Generator().manual_seed(0)
    x, c = torch.randn(50, 2), torch.randn(50, 1)
    mixed = torch.randperm(50, generator=generator)
    tables = (x, c, x[mixed], c[mixed], generator)
    assert Coupling(1.0, 0.1).loss(field, *tables) == 0
    assert Coupling(0.0, None).loss(field, *tables) == 0
    assert Coupling(0.0, None, optimal=False).loss(field, *tables) > 1


def test_far_conditions_count_little() -> None:
    """Two couples, one at equal and one at distant conditions: the second hardly counts."""
    field, generator = VelocityField(1, 1), torch.Generator().manual_seed(0)
    x0, x1 = torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [3.0]])
    c0, c1 = torch.tensor([[0.0], [5.0]]), torch.tensor([[0.0], [6.0]])
    found = Coupling(100.0, 0.2).loss(field, x0, c0, x1, c1, generator)
    weight = math.exp(-1 / (2 * 0.2**2))
    assert found.item() == pytest.approx((1 + 9 * weight) / (1 + weight), rel=1e-5)


def test_anchor_learns_a_shift_and_says_where_it_knows() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, c = torch.randn(20, 2, generator=generator), torch.rand(20, 1, generator=generator)
    shift = torch.cat([1 + 2 * c, -c], -1)
    anchor = Anchor(x0, x0 + shift, c, 1.0)
    mean, variance = anchor.predict(x0[:5], c[:5])
    assert (mean - x0[:5] - shift[:5]).abs().max() < 0.05
    assert anchor.predict(x0[:1] + 30, c[:1])[1] > 10 * variance.max()
    assert anchor.cost(x0, x0 + shift, c).argmin(-1).tolist() == list(range(20))
    covariance = anchor.factor @ anchor.factor.mT
    law = torch.distributions.MultivariateNormal(torch.zeros(20).double(), covariance)
    assert anchor.evidence == pytest.approx(float(law.log_prob(shift.mT.double()).sum()), rel=1e-6)


def test_anchor_corrects_what_is_expected() -> None:
    """Pairs that say of every point the same beyond what is expected are followed; those that contradict each other
    are not, elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x0, c = torch.randn(40, 2, generator=generator), torch.rand(40, 1, generator=generator)
    expected, noise = x0.sin() + c, torch.randn(40, 2, generator=generator)
    off = torch.tensor([0.3, -0.2])
    mean, _ = Anchor(x0[:20], (expected + off)[:20], c[:20], 1.0, expected[:20]).predict(x0, c, expected)
    assert float((mean - expected - off).abs().max()) < 0.05
    contradicting = Anchor(x0[:20], (expected + 0.3 * noise)[:20], c[:20], 1.0, expected[:20])
    mean, variance = contradicting.predict(x0[20:], c[20:], expected[20:])
    assert float((mean - expected[20:]).square().mean().sqrt()) < 0.15
    assert 0.2**2 < float(variance.mean()) < 0.45**2


def test_pairs_choose_among_the_maps() -> None:
    """A standard normal to itself: the laws say nothing about a quarter turn, ten pairs do."""
    generator = torch.Generator().manual_seed(0)
    none = torch.zeros(1500, 0)
    source, target = (torch.randn(1500, 2, generator=generator) for _ in range(2))
    before = torch.randn(10, 2, generator=generator)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    settings = {"progress": False, "schedule": pim.Schedule(steps=100, batch_size=128)}
    x = torch.randn(300, 2, generator=generator)
    errors = []
    for pairs in (None, (before, before @ turn.mT, torch.zeros(10, 0))):
        transport = pim.ConditionalTransport(2, 0, groups=30, group_size=64)
        transport.fit((source, none), (target, none), pairs, **settings)  # type: ignore[arg-type]
        errors.append((transport(x, torch.zeros(300, 0)) - x @ turn.mT).square().mean().sqrt().item())
    assert errors[0] > 1.0
    assert errors[1] < 0.3


# ------------------------------------------------------------------ keeping, and what is refused
def tables(number: int = 60, other: int | None = None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    source, target = (
        (torch.randn(n, 2, generator=generator), torch.rand(n, 1, generator=generator))
        for n in (number, other or number)
    )
    return source, target


def at_seven(rows: Tensor, value: float) -> Tensor:
    """The rows with another one for the seventh."""
    return rows.index_fill(0, torch.tensor(7), value)


@pytest.mark.parametrize("engine", ["optimal", "base", "batch"])
def test_save_load_and_seed(engine: str, tmp_path: Path) -> None:
    coupling = Coupling(2.0, 0.3) if engine == "batch" else None
    settings = {"engine": engine, "coupling": coupling, "groups": 4, "group_size": 16, "width": 16}
    x, c = torch.randn(5, 2), torch.full((5, 1), 0.5)
    answers = []
    for _ in range(2):
        transport = pim.ConditionalTransport(2, 1, scales=[1.0, 2.0], **settings)  # type: ignore[arg-type]
        transport.fit(*tables(), seed=4, progress=False, schedule=SHORT)
        answers.append(transport(x, c))
    assert torch.equal(*answers)
    transport.save(tmp_path)
    again = pim.load(tmp_path)
    assert isinstance(again, pim.ConditionalTransport)
    assert torch.equal(again(x, c), answers[0])
    with (tmp_path / "weights.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff\xff\xff\x7f")
    with pytest.raises(pim.DataError, match="damaged"):
        pim.load(tmp_path)


def test_few_evaluations_and_their_error() -> None:
    transport = bent("base")
    x, c = torch.randn(30, 2, dtype=torch.double), torch.zeros(30, 1, dtype=torch.double)
    error = transport.solver_error(x, c, 10)
    assert torch.allclose(error, (transport(x, c, 10) - transport(x, c)).norm(dim=-1))
    assert transport.solver_error(x, c, 40).mean() < error.mean() / 8
    with pytest.raises(pim.DataError, match="evaluations"):
        transport(x, c, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: ((torch.randn(60, 3), s[1]), t), r"source points: shape \(60, 3\), expected 2"),
        (lambda s, t: (s, (t[0], torch.rand(60, 2))), "target conditions"),
        (lambda s, t: ((s[0][:0], s[1][:0]), t), "source: 0 rows, expected at least 10; a population must"),
        (lambda s, t: (s, (torch.zeros(0), torch.zeros(0))), "target: 0 rows, expected at least 10"),
        (lambda s, t: (s, t[0]), r"target: found Tensor, expected a tuple \(points, conditions\)"),
        (lambda s, t: (s, (*t, t[1])), r"target: found 3 parts, expected a tuple \(points, conditions\)"),
        (lambda s, t: (s, (torch.randn(60, 1), t[1])), r"target points: shape \(60, 1\), expected 2 .* made for"),
        (lambda s, t: (s, (t[0][None], t[1][None])), r"target: points of shape \(1, 60, 2\)"),
        (lambda s, t: (s, (t[0][:5], t[1][:5])), "target: 5 rows, expected at least 10 .* measure more"),
        (lambda s, t: ((s[0], s[1][:50]), t), "source: points of shape"),
        (
            lambda s, t: ((s[0].clone().index_fill_(0, torch.tensor(7), math.nan), s[1]), t),
            r"source points at \(7, 0\): found nan.* leave out",
        ),
        (
            lambda s, t: (s, (t[0], t[1].clone().index_fill_(0, torch.tensor(7), math.inf))),
            r"target conditions at \(7, 0\): found inf",
        ),
        (lambda s, t: (s, (t[0], t[1] + 2)), "no value is common"),
        (lambda s, t: ((torch.ones(60, 2), s[1]), t), "source: coordinate 0 is the same in all rows.* leave it out"),
    ],
)
def test_fit_refuses(change, message: str) -> None:  # type: ignore[no-untyped-def]
    source, target = change(*tables())
    with pytest.raises(pim.DataError, match=message):
        pim.ConditionalTransport(2, 1).fit(source, target, progress=False)


def test_pairs_turn_one_normal_into_the_other() -> None:
    """With errors of 0.2 in ten pairs the turn is known to about 0.2 / √20; unpaired rows give the rest, so that both
    together know the map better than the pairs do."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    before = torch.randn(10, 2, generator=generator)
    after = before @ turn.mT + 0.2 * torch.randn(10, 2, generator=generator)
    found = turn_of_pairs(before, after)
    torch.testing.assert_close(found @ found.mT, torch.eye(2))
    assert float((found - turn).norm()) < 3 * 0.2 / math.sqrt(20) * math.sqrt(2)
    torch.testing.assert_close(turn_of_pairs(before, before @ turn.mT), turn, atol=1e-3, rtol=0)
    nothing = turn_of_pairs(1e-3 * before, 1e-3 * after + torch.randn(10, 2, generator=generator))
    assert float((nothing - torch.eye(2)).norm()) < 0.05


PAIR = torch.zeros(3, 2), torch.zeros(3, 2), torch.full((3, 1), 0.5)
LOST = torch.tensor([[0.0, 0.0], [0.0, math.nan], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((LOST, *PAIR[1:]), r"pairs, before at \(1, 1\): found nan, expected a finite number; leave out"),
        ((PAIR[0], -LOST / 0, PAIR[2]), r"pairs, after at \(0, 0\): found nan"),
        ((*PAIR[:2], PAIR[2] / 0), r"pairs, conditions at \(0, 0\): found inf"),
        ((torch.zeros(3, 3), *PAIR[1:]), r"pairs, before: shape \(3, 3\), expected 2 .* made for"),
        ((PAIR[0], torch.zeros(3, 1), PAIR[2]), r"pairs, after: shape \(3, 1\), expected 2"),
        ((*PAIR[:2], torch.zeros(3, 2)), r"pairs, conditions: shape \(3, 2\), expected 1"),
        ((PAIR[0], PAIR[1][:2], PAIR[2]), r"pairs, after: shape \(2, 2\), expected \(3, 2\), one row for each pair"),
        ((*PAIR[:2], PAIR[2][:1]), r"pairs, conditions: shape \(1, 1\), expected \(3, 1\)"),
        (tuple(part[:0] for part in PAIR), "pairs: 0 of them, .* leave `pairs` out"),
        (PAIR[:2], r"pairs: found 2 parts, expected a tuple \(before, after, conditions\)"),
    ],
)
def test_pairs_are_checked(pairs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(pim.DataError, match=message):
        pim.ConditionalTransport(2, 1).fit(*tables(), pairs, progress=False)  # type: ignore[arg-type]


def test_pairs_need_an_engine_that_can_use_them() -> None:
    for engine in ("base", "batch"):
        with pytest.raises(pim.DataError, match="only the engine 'optimal'"):
            pim.ConditionalTransport(2, 1, engine=engine).fit(*tables(), PAIR, progress=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "best"},
        {"event_dim": 0},
        {"stochastic": True, "noise": 0.0},
        {"scales": [1.0]},
        {"scales": [1.0, -1.0]},
        {"scales": [1.0, math.nan]},
        {"coupling": Coupling()},
    ],
)
def test_settings_are_checked(settings: dict) -> None:
    with pytest.raises(pim.DataError):
        pim.ConditionalTransport(**{"event_dim": 2, "context_dim": 1} | settings)


def test_conditions_out_of_range_are_said() -> None:
    transport = pim.ConditionalTransport(2, 1, engine="base", stochastic=True, width=16)
    (x0, c0), (x1, c1) = tables()
    transport.fit((x0, c0), (x1, 0.4 + c1), progress=False, schedule=SHORT)
    low, high = (0.4 + c1).min().item(), c0.max().item()  # where both were seen
    assert (transport.context_low.item(), transport.context_high.item()) == pytest.approx((low, high))
    x, inside, above, below = torch.zeros(2, 2), torch.tensor([[0.6], [0.7]]), torch.tensor([[0.6], [4.0]]), [[0.1]]
    size = torch.cat([c0, 0.4 + c1]).std().item()
    far = rf"condition 0 at \(1,\): 4 lies {4 - high:.3f}\d* outside \[0\.4\d*, 0\.9\d*\], where both populations"
    asked = (
        lambda c: transport(x, c),
        lambda c: transport.condition(c),
        lambda c: transport.inv.condition(c),
        lambda c: transport.given(x, c),
        lambda c: transport.law("target", c),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ask in asked:
            ask(inside)
    for ask in asked:
        with pytest.warns(pim.UnfamiliarCondition, match=far) as caught:
            ask(above)
        assert f"that is {(4 - high) / size:.2g} of its standard deviations" in str(caught[0].message)
        assert "ask within, or measure there" in str(caught[0].message)
    with pytest.warns(pim.UnfamiliarCondition, match=rf"condition 0 at \(0,\): 0.1 lies {low - 0.1:.3f}\d* outside"):
        transport.condition(torch.tensor(below))


@pytest.mark.parametrize(
    ("x", "c", "message"),
    [
        (torch.zeros(2, 2), torch.tensor([[0.5], [math.nan]]), r"c at \(1, 0\): found nan, expected a finite number"),
        (torch.zeros(2, 2), torch.zeros(2, 2), r"c: shape \(2, 2\), expected 1 in the last dimension"),
        (torch.zeros(2, 1), torch.zeros(2, 1), r"x: shape \(2, 1\), expected 2 in the last dimension"),
        (torch.tensor([[0.0, math.inf]]), torch.zeros(1, 1), r"x at \(0, 1\): found inf"),
    ],
)
def test_points_and_conditions_are_checked(x: Tensor, c: Tensor, message: str) -> None:
    transport = pim.ConditionalTransport(2, 1, stochastic=True, width=16)
    for ask in (transport, transport.given):
        with pytest.raises(pim.DataError, match=message):
            ask(x, c)


@pytest.mark.parametrize("engine", ["optimal", "base", "batch"])
def test_small_populations_are_said(engine: str) -> None:
    transport = pim.ConditionalTransport(2, 1, engine=engine, width=16, groups=4, group_size=16)
    with pytest.warns(pim.SmallPopulation, match="source: 12 rows, target: 400; .* the smaller, of which to measure"):
        history = transport.fit(*tables(12, 400), progress=False, schedule=SHORT)
    assert (history.attrs["source_rows"], history.attrs["target_rows"]) == (12, 400)
    assert transport(torch.zeros(3, 2), torch.full((3, 1), 0.5)).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transport.fit(*tables(30, 400), progress=False, schedule=SHORT._replace(steps=1))


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_a_share_to_hold_out_is_checked(share: float) -> None:
    with pytest.raises(pim.DataError, match=f"validation: {share}, expected a share between 0 and 1"):
        pim.ConditionalTransport(2, 1).fit(*tables(), progress=False, validation=share)
