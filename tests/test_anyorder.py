"""The any-order flow, untrained but with random weights: every identity of probability holds for any weights."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_invman.density.anyorder import AnyOrderFlow
from pyro_invman.density.context import Layout
from pyro_invman.variables import DataError

INF = math.inf
F64 = torch.float64
GROUP = (((2, 3), (4, 5), (6, 7)),)
HEADS = ["mixture", "spline"]
BACKBONES = ["mlp", "transformer"]


def layout(levels: tuple[int, ...], ends: dict[int, tuple[float, float]] | None = None, groups=()) -> Layout:
    lower, upper = torch.full((len(levels),), -INF, dtype=F64), torch.full((len(levels),), INF, dtype=F64)
    for column, (low, high) in (ends or {}).items():
        lower[column], upper[column] = low, high
    return Layout(levels, lower, upper, groups)


def correlated(number: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    frame = torch.eye(dim, dtype=F64) + 0.4 * torch.randn(dim, dim, generator=generator, dtype=F64)
    return torch.randn(number, dim, generator=generator, dtype=F64) @ frame


def flow_of(what: Layout, seed: int = 0, noise: float = 0.3, **architecture) -> AnyOrderFlow:
    """A small flow in double precision, all of its weights random."""
    torch.set_default_dtype(F64)
    torch.manual_seed(seed)
    flow = AnyOrderFlow(what, width=16, trunk_blocks=1, components=4, group_width=8, **architecture)
    rows = correlated(400, len(what.levels))
    for j, levels in enumerate(what.levels):
        low, high = what.lower[j], what.upper[j]
        if levels:
            rows[:, j] = torch.randint(levels, (400,))
        elif low.isfinite():
            rows[:, j] = low + (high - low) * rows[:, j].sigmoid()
    rows = rows.masked_fill(torch.rand(rows.shape) < 0.2, math.nan)
    for group in what.groups:  # every member takes every place once
        columns = torch.tensor(group)
        moved = rows.repeat(len(group), 1, 1)
        for shift in range(len(group)):
            moved[shift][:, columns.flatten()] = rows[:, columns.roll(shift, 0).flatten()]
        rows = moved.flatten(0, 1)
    flow.fit_base(rows)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return flow


@pytest.fixture(params=list(itertools.product(HEADS, BACKBONES)), ids="-".join)
def mixed(request) -> AnyOrderFlow:
    """Real, three levels, interval, real, two levels."""
    head, backbone = request.param
    return flow_of(layout((0, 3, 0, 0, 2), {2: (-1.0, 1.5)}), head=head, backbone=backbone)


def row_of(*batch: int, seed: int = 3) -> Tensor:
    """Rows (*batch, 5) within the support of `mixed`."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(*batch, 5, generator=generator, dtype=F64)
    row[..., 1] = torch.randint(3, batch, generator=generator)
    row[..., 2] = 2.5 * torch.rand(batch, generator=generator) - 1
    row[..., 4] = torch.randint(2, batch, generator=generator)
    return row


def known(*columns: int, dim: int = 5) -> Tensor:
    return torch.tensor([j in columns for j in range(dim)])


def axis(column: int, points: int = 4001) -> Tensor:
    return torch.linspace(-1.0, 1.5, points) if column == 2 else torch.linspace(-25.0, 25.0, points)


# ------------------------------------------------------------------------------------------------ total probability
@torch.no_grad()
def test_one_cell_integrates_to_one_whatever_is_given(mixed):
    row = row_of()
    for column, mask in itertools.product([0, 2, 3], [(), (1,), (1, 4), (0, 1, 2, 3, 4)]):
        x = axis(column, 20_001)
        log_prob = mixed.log_prob(row, known(*set(mask) - {column}), [column], x.unsqueeze(-1))
        torch.testing.assert_close(torch.trapezoid(log_prob.exp(), x).item(), 1.0, rtol=0, atol=1e-4)


@torch.no_grad()
def test_levels_sum_to_one(mixed):
    row = row_of()
    for column, levels in ((1, 3), (4, 2)):
        codes = torch.arange(levels, dtype=F64).unsqueeze(-1)
        mass = mixed.log_prob(row, known(0, 3), [column], codes).exp()
        torch.testing.assert_close(mass.sum().item(), 1.0)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_two_cells_and_a_level_integrate_to_one(head):
    flow = flow_of(layout((0, 3, 0, 0, 2), {2: (-1.0, 1.5)}), head=head, noise=0.1)  # smooth enough for the grid
    x, y = torch.linspace(-12.0, 12.0, 301), axis(2, 101)
    grid = torch.stack(torch.meshgrid(x, torch.arange(3.0), y, indexing="ij"), -1)
    mass = flow.log_prob(row_of(), known(4), [0, 1, 2], grid).exp()
    total = torch.trapezoid(torch.trapezoid(mass, y).sum(-1), x).item()
    assert abs(total - 1) < 1e-3


# ------------------------------------------------------------------------------------------------ factors
def test_log_prob_is_the_sum_of_its_factors(mixed):
    row = row_of(7)
    for chain, given in (([0, 1, 2, 3, 4], ()), ([3, 1], (0, 4)), ([4, 2, 0], (1,)), ([2], (0, 1, 3, 4))):
        seen, total = known(*given), torch.zeros(7)
        for column in chain:
            target = torch.full((7, 1), column)
            total = total + mixed.cell_log_prob(row, seen, target, row[:, [column]]).squeeze(-1)
            seen = seen | known(column)
        torch.testing.assert_close(mixed.log_prob(row, known(*given), chain, row[:, chain]), total)


def test_marginal_times_conditional_is_the_joint(mixed):
    row = row_of(7)
    joint = mixed.log_prob(row, known(4), [0, 1, 2, 3], row[:, :4])
    marginal = mixed.log_prob(row, known(4), [0, 1], row[:, :2])
    conditional = mixed.log_prob(row, known(0, 1, 4), [2, 3], row[:, 2:4])
    torch.testing.assert_close(joint, marginal + conditional)


def test_many_targets_of_one_row_are_scored_as_each_alone(mixed):
    row, targets = row_of(7), torch.tensor([0, 1, 2, 3])
    together = mixed.cell_log_prob(row, known(4), targets.expand(7, 4), row[:, :4])
    each = [mixed.cell_log_prob(row, known(4), torch.full((7, 1), t), row[:, t : t + 1]) for t in range(4)]
    torch.testing.assert_close(together, torch.cat(each, -1))


def test_a_batch_of_given_rows_is_a_loop_over_them(mixed):
    rows, masks = row_of(6), torch.rand(6, 5) < 0.5
    masks[:, [1, 3]] = False
    answers = row_of(4, 6, seed=8)[..., [1, 3]]
    batched = mixed.log_prob(rows, masks, [1, 3], answers)
    assert batched.shape == (4, 6)
    looped = [mixed.log_prob(rows[b], masks[b], [1, 3], answers[:, b]) for b in range(6)]
    torch.testing.assert_close(batched, torch.stack(looped, -1))
    one = mixed.log_prob(rows[0], masks[0], [1, 3], answers)  # many answers to one row
    torch.testing.assert_close(one, mixed.log_prob(rows[0].expand(4, 6, 5), masks[0].expand(4, 6, 5), [1, 3], answers))


def test_what_stands_in_cells_that_are_not_known_is_not_read(mixed):
    row, mask = row_of(5), known(0, 4)
    other = torch.where(mask, row, 1.0)
    first, second = (mixed.log_prob(r, mask, [1, 2, 3], row[:, 1:4]) for r in (row, other))
    assert torch.equal(first, second)


def test_an_answer_that_is_not_wanted_is_a_target_left_out(mixed):
    row, chain = row_of(32), [0, 1, 2, 3]
    wanted = torch.tensor(list(itertools.product([True, False], repeat=4))).repeat(2, 1)
    found = mixed.log_prob(row, known(4), chain, row[:, :4].masked_fill(~wanted, math.nan), wanted)
    for b in range(32):
        asked = [j for j in chain if wanted[b, j]]
        expected = mixed.log_prob(row[b], known(4), asked, row[b, asked]) if asked else torch.tensor(0.0)
        torch.testing.assert_close(found[b], expected)


def test_gradients_are_exact_and_finite_beside_cells_that_are_not_wanted(mixed):
    row = row_of(2)
    answers = row[:, [0, 2, 3]].clone().requires_grad_()
    given = row.clone().requires_grad_()
    wanted = torch.tensor([[True, False, True], [False, True, True]])
    assert torch.autograd.gradcheck(
        lambda answers: mixed.log_prob(row, known(4), [0, 2, 3], answers, wanted), (answers,), atol=1e-4
    )
    missing = torch.where(wanted, answers, math.nan)
    log_prob = mixed.log_prob(given, known(1, 4), [0, 2, 3], missing, wanted).sum()
    gradients = torch.autograd.grad(log_prob, [answers, given, *mixed.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_no_target_has_log_density_zero(mixed):
    assert torch.equal(mixed.log_prob(row_of(3), known(0), [], torch.zeros(3, 0)), torch.zeros(3))


# ------------------------------------------------------------------------------------------------ draws
@torch.no_grad()
def test_draws_follow_the_density(mixed):
    """Probability integral transforms along the chain are uniform, and levels come at their mass (1e-4 each)."""
    row, number = row_of(), 4000
    draws = mixed.draw(row, known(3), [0, 1, 2], (number,), generator=torch.Generator().manual_seed(0))
    completed, seen = row.repeat(number, 1), known(3)
    for k, column in enumerate([0, 1, 2]):
        target = torch.full((number, 1), column)
        if column == 1:
            mass = torch.stack(
                [
                    mixed.cell_log_prob(completed, seen, target, torch.full((number, 1), c)).exp()
                    for c in (0.0, 1.0, 2.0)
                ]
            ).squeeze(-1)
            for code in range(3):
                excess = ((draws[:, 1] == code).double() - mass[code]).sum()
                assert excess.abs() < 3.9 * (mass[code] * (1 - mass[code])).sum().sqrt()
        else:
            raw, mean, scale, _ = mixed.parameters_of(completed, seen, target)
            levels = mixed.cell(raw, mean, scale, target).cdf(draws[:, k : k + 1]).squeeze(-1)
            assert stats.kstest(levels.numpy(), "uniform").pvalue > 1e-4
        completed[:, column], seen = draws[:, k], seen | known(column)


@torch.no_grad()
def test_the_entropy_of_draws_is_the_integral_of_the_density(mixed):
    row, x = row_of(), axis(0, 20_001)
    log_prob = mixed.log_prob(row, known(1, 2), [0], x.unsqueeze(-1))
    entropy = torch.trapezoid(-(log_prob.exp() * log_prob.clamp_min(-700)), x)
    draws = mixed.draw(row, known(1, 2), [0], (20_000,), generator=torch.Generator().manual_seed(1))
    scores = -mixed.log_prob(row, known(1, 2), [0], draws)
    assert abs(scores.mean() - entropy) < 4 * scores.std() / 20_000**0.5


@torch.no_grad()
def test_quantile_draws_are_monotone_and_repeatable(mixed):
    row = row_of(2)
    uniform = torch.linspace(0.01, 0.99, 50).reshape(-1, 1, 1).expand(50, 2, 1)
    for column in (0, 1, 2):
        draws = mixed.draw(row, known(3), [column], (50, 2), uniform)
        assert (draws.diff(dim=0) >= 0).all()
        assert torch.equal(draws, mixed.draw(row, known(3), [column], (50, 2), uniform))


def test_quantile_draws_are_differentiable_in_the_given_cells():
    flow = flow_of(layout((0, 0, 0)))
    uniform = torch.tensor([[0.2, 0.7], [0.5, 0.9]])
    given = torch.tensor([0.3, 0.0, 0.0], dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda given: flow.draw(given, known(0, dim=3), [1, 2], (2,), uniform), (given,), atol=1e-4
    )


def test_draws_stay_within_the_support(mixed):
    draws = mixed.float().draw(row_of().float(), known(0), [1, 2, 4], (5000,))
    assert ((draws[:, 1] >= -1) & (draws[:, 1] <= 1.5)).all()
    assert set(draws[:, 0].tolist()) <= {0.0, 1.0, 2.0} and set(draws[:, 2].tolist()) <= {0.0, 1.0}


# ------------------------------------------------------------------------------------------------ exchangeable groups
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_exchangeable_members_in_any_order(backbone, order):
    """p(theta | members) is invariant; the conditionals of a member's cells follow their member."""
    flow = flow_of(layout((0,) * 8, groups=GROUP), backbone=backbone)
    columns = torch.tensor(GROUP[0])
    move = torch.arange(8)
    move[columns.flatten()] = columns[list(order)].flatten()
    row = torch.randn(9, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
    masks = torch.rand(9, 8, generator=torch.Generator().manual_seed(2)) < 0.6
    masks[:, :2] = False
    same = {"rtol": 1e-9, "atol": 1e-9}
    first = flow.log_prob(row, masks, [0, 1], row[:, :2])
    moved = flow.log_prob(row[:, move], masks[:, move], [0, 1], row[:, :2])
    torch.testing.assert_close(first, moved, **same)
    masks = masks & (torch.arange(8) != 5)
    here = move.argsort()[5]  # where the second cell of the second member goes
    first = flow.log_prob(row, masks, [5], row[:, 5:6])
    moved = flow.log_prob(row[:, move], masks[:, move], [int(here)], row[:, 5:6])
    torch.testing.assert_close(first, moved, **same)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_conditional_of_a_member_reads_its_own_cells(backbone):
    """Without them two members could not be told apart."""
    flow = flow_of(layout((0,) * 8, groups=GROUP), backbone=backbone)
    row = torch.randn(8, dtype=F64)
    swapped = row[[0, 1, 4, 3, 2, 5, 6, 7]]  # first cells of two members change hands, the set of values is the same
    mask = known(2, 4, dim=8)
    answer = torch.zeros(1)
    assert abs(flow.log_prob(row, mask, [3], answer) - flow.log_prob(swapped, mask, [3], answer)) > 1e-6


# ------------------------------------------------------------------------------------------------ the base
def test_a_new_flow_has_the_mean_and_scale_of_its_base():
    """Untrained mixture heads: symmetric about the base's conditional mean, of about its scale."""
    torch.set_default_dtype(F64)
    flow = AnyOrderFlow(layout((0,) * 4), width=16)
    flow.fit_base(correlated(2000, 4))
    row = correlated(5, 4, seed=9)
    mean, scale = flow.context.base.condition(row, known(0, 1, dim=4))
    target = torch.full((5, 1), 2)
    cell = flow.cell(*flow.parameters_of(row, known(0, 1, dim=4), target)[:3], target)
    torch.testing.assert_close(cell.icdf(torch.full((5, 1), 0.5)).squeeze(-1), mean[:, 2], rtol=0, atol=1e-9)
    width = (cell.icdf(torch.full((5, 1), 0.8413)) - cell.icdf(torch.full((5, 1), 0.1587))).squeeze(-1) / 2
    torch.testing.assert_close(width, scale[:, 2], rtol=0.05, atol=0)


def test_unknown_kinds_are_refused():
    for wrong in ({"head": "histogram"}, {"backbone": "rnn"}):
        with pytest.raises((ValueError, DataError), match=next(iter(wrong.values()))):
            AnyOrderFlow(layout((0, 0)), **wrong)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_a_stretched_head_is_wider_about_its_middle_and_integrates_to_one(head):
    flow = flow_of(layout((0, 0)), head=head)
    row, seen, grid = torch.tensor([0.4, 0.0]), torch.tensor([True, False]), torch.linspace(-40, 40, 8001)

    def moments() -> tuple[Tensor, Tensor, Tensor]:
        density = flow.log_prob(row, seen, [1], grid.unsqueeze(-1)).exp()
        mass, mean = torch.trapezoid(density, grid), torch.trapezoid(density * grid, grid)
        return mass, mean, torch.trapezoid(density * (grid - mean).square(), grid).sqrt()

    plain = moments()
    flow.stretch[1] = 1.7
    mass, mean, deviation = moments()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, 1.7 * plain[2], atol=1e-3, rtol=1e-3)
    if head == "mixture":
        torch.testing.assert_close(mean, plain[1], atol=1e-4, rtol=0)
