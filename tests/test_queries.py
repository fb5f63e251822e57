"""What an any-order flow is asked in training: only of observed cells, in the shares that were set."""

import pytest
import torch
from torch import Tensor

from pyro_invman.density.queries import Queries, QueryMix

ROLES = torch.tensor([0, 0, 1, 1, 1, 2])
DIM, ROWS = len(ROLES), 4000
ALONE = {name: QueryMix(**{n: float(n == name) for n in QueryMix._fields}) for name in QueryMix._fields}


def observed_cells(share: float = 0.6, rows: int = ROWS) -> Tensor:
    return torch.rand(rows, DIM, generator=torch.Generator().manual_seed(1)) < share


def draw(mix: QueryMix, observed: Tensor, number: int = 3, seed: int = 0, roles: Tensor = ROLES) -> Queries:
    return mix.draw(observed, roles, number, torch.Generator().manual_seed(seed))


def asked_cells(queries: Queries) -> Tensor:
    """How often each cell (B, D) is asked for."""
    return torch.zeros(queries.known.shape).scatter_add(-1, queries.targets, queries.asked.float())


MIXES = [pytest.param(mix, id=name) for name, mix in (ALONE | {"default": QueryMix()}).items()]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("number", [1, 3, DIM, DIM + 5])
def test_only_observed_cells_are_known_or_asked_and_none_is_both(mix, number):
    observed = observed_cells()
    queries = draw(mix, observed, number)
    asked = asked_cells(queries)
    assert queries.targets.shape == queries.asked.shape == (ROWS, min(number, DIM))
    assert not (queries.known & ~observed).any()
    assert not ((asked > 0) & (~observed | queries.known)).any()
    assert (asked <= 1).all()


@pytest.mark.parametrize("mix", MIXES)
def test_as_many_are_asked_as_there_are(mix):
    observed = observed_cells()
    queries = draw(mix, observed)
    left = (observed & ~queries.known).sum(-1)
    assert torch.equal(queries.asked.sum(-1), left.clamp_max(3))
    assert (left >= 1).eq(observed.any(-1)).all()  # every row with a cell is asked something


def test_a_row_without_observed_cells_is_asked_nothing():
    queries = draw(QueryMix(), torch.zeros(50, DIM, dtype=torch.bool))
    assert not queries.known.any() and not queries.asked.any()


@pytest.mark.parametrize("mix", MIXES)
def test_a_single_observed_cell_is_asked_for_given_nothing(mix):
    observed = torch.eye(DIM, dtype=torch.bool)
    queries = draw(mix, observed)
    assert not queries.known.any()
    assert torch.equal(asked_cells(queries).bool(), observed)


@pytest.mark.parametrize(("role", "name"), [(0, "parameters"), (1, "observations"), (2, "conditions")])
def test_a_role_given_the_others(role, name):
    """Known: all of the other roles and the cells of this role before the first target."""
    observed = observed_cells()
    observed = observed[(observed & (role == ROLES)).any(-1)]
    queries = draw(ALONE[name], observed)
    others = role != ROLES
    # where nothing else is observed the whole row is asked for, which is the same
    assert torch.equal(queries.known[:, others], observed[:, others])
    assert (ROLES[queries.targets][queries.asked] == role).all()


def test_the_cells_known_are_a_prefix_of_the_chain():
    """Given nothing: what is known stands before the first target, and all that stands there is known."""
    observed = observed_cells()
    queries = draw(ALONE["joint"], observed)
    first = queries.targets[:, :1]
    expected = observed & (torch.arange(DIM) < first)
    rows = observed.any(-1)
    assert torch.equal(queries.known[rows], expected[rows])


def test_the_place_in_the_chain_is_uniform():
    queries = draw(ALONE["joint"], torch.ones(20_000, DIM, dtype=torch.bool))
    counts = queries.known.sum(-1).bincount(minlength=DIM).double()
    statistic = ((counts - 20_000 / DIM) ** 2 / (20_000 / DIM)).sum()
    assert statistic < 25.7  # chi-squared with 5 degrees of freedom, false alarms 1e-4


def test_every_row_given_or_not_block_by_block():
    observed = torch.ones(ROWS, DIM, dtype=torch.bool)
    queries = draw(ALONE["block"], observed, DIM)
    first = queries.targets[:, 0]
    later = torch.arange(DIM) > first.unsqueeze(-1)
    for role in range(3):  # after the first target a role is known as a whole or not at all
        cells = (role == ROLES) & later & (ROLES[first] != role).unsqueeze(-1)
        known = (queries.known & cells).sum(-1)
        assert ((known == 0) | (known == cells.sum(-1))).all()


def test_the_rate_of_scattered_cells_is_itself_uniform():
    """With a uniform rate the number of given cells is uniform on 0 … D, and a full row is asked for instead."""
    roles = torch.zeros(DIM, dtype=torch.long)
    observed = torch.ones(60_000, DIM, dtype=torch.bool)
    queries = draw(ALONE["uniform"], observed, DIM, roles=roles)
    counts = torch.bincount((~queries.known).sum(-1), minlength=DIM + 1)[1:].double() / 60_000
    # m unknown cells: with a cells to ask for, uniform on 1 … D or D again, the place leaves 1 … a of them
    asks = torch.full((DIM,), 1 / (DIM + 1)).double()
    asks[-1] += 1 / (DIM + 1)
    expected = torch.stack([sum(asks[a - 1] / a for a in range(m, DIM + 1)) for m in range(1, DIM + 1)])
    error = (expected * (1 - expected) / 60_000).sqrt()
    assert ((counts - expected).abs() < 4.2 * error).all()  # false alarms below 2e-4


def test_kinds_come_in_their_shares():
    """Roles of one column each, all observed: a kind shows in what is known and asked first."""
    mix = QueryMix(parameters=3.0, observations=1.0, conditions=0.0, joint=0.0, uniform=0.0, block=0.0)
    queries = draw(mix, torch.ones(20_000, 2, dtype=torch.bool), 1, roles=torch.tensor([0, 1]))
    share = (queries.targets[:, 0] == 0).double().mean()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 20_000) ** 0.5
    assert torch.equal(queries.known, queries.targets == torch.tensor([1, 0]))


def test_roles_that_are_absent_take_no_share():
    """Without conditions their share goes to the others; with one role alone every kind of role is the joint."""
    mix = QueryMix(parameters=0.5, observations=0.0, conditions=0.5, joint=0.0, uniform=0.0, block=0.0)
    roles = torch.tensor([0, 0, 1])
    queries = draw(mix, torch.ones(500, 3, dtype=torch.bool), roles=roles)
    assert queries.known[:, 2].all()
    alone = QueryMix(parameters=1.0, observations=0.0, conditions=0.0, joint=1.0, uniform=0.0, block=0.0)
    queries = draw(alone, torch.ones(500, 3, dtype=torch.bool), roles=torch.zeros(3, dtype=torch.long))
    assert torch.equal(queries.known, torch.arange(3) < queries.targets[:, :1])


def test_the_same_generator_gives_the_same_queries():
    first, second, other = (draw(QueryMix(), observed_cells(), seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.known, other.known)
