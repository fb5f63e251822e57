"""Dependence along links alone: the graph against brute force, and a Gaussian against its closed form."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyro_invman.density.anyorder import AnyOrderFlow
from pyro_invman.density.context import Layout
from pyro_invman.density.gaussian import GaussianBase, most_entropic
from pyro_invman.density.links import Links, alike, links_between

F64 = torch.float64
NAN = math.nan


def graph(dim: int, *edges: tuple[int, int]) -> Tensor:
    linked = torch.eye(dim, dtype=torch.bool)
    for a, b in edges:
        linked[a, b] = linked[b, a] = True
    return linked


CHAIN = graph(5, (0, 1), (1, 2), (2, 3))  # and 4, which nothing links
TWO_CLIQUES = graph(5, (0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (1, 4))


def reaches(linked: Tensor, start: int, goal: int, stops: set[int]) -> bool:
    """Whether a path leads from start to goal through none of the stops."""
    seen, front = {start}, [start]
    while front:
        here = front.pop()
        for there in linked[here].nonzero()[:, 0].tolist():
            if there == goal:
                return True
            if there not in seen and there not in stops:
                seen.add(there)
                front.append(there)
    return False


def covariance_of(dim: int, seed: int = 0) -> Tensor:
    frame = torch.randn(dim, dim, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return frame @ frame.mT + 0.5 * torch.eye(dim, dtype=F64)


@pytest.mark.parametrize("linked", [CHAIN, TWO_CLIQUES], ids=["chain", "cliques"])
def test_visible_are_the_known_cells_that_some_path_reaches_before_others(linked):
    links = Links(linked)
    masks = torch.tensor(list(itertools.product([False, True], repeat=5)))
    found = links.visible(masks.unsqueeze(-2), torch.arange(5))
    assert found.shape == (32, 5, 5)
    for mask, by_target in zip(masks, found, strict=True):
        for target, seen in enumerate(by_target):
            known = {c for c in range(5) if mask[c] and c != target}
            expected = {c for c in known if reaches(linked, target, c, known - {c})}
            assert {c for c in known if seen[c]} == expected


@pytest.mark.parametrize("linked", [CHAIN, TWO_CLIQUES], ids=["chain", "cliques"])
def test_cells_are_drawn_after_those_that_separate_them_from_the_rest(linked):
    links = Links(linked)
    cliques = [[], [0], [3], [1, 2], [0, 1, 2] if linked is TWO_CLIQUES else [2, 3], [4]]
    for clique in cliques:
        known = torch.zeros(5, dtype=torch.bool)
        known[clique] = True
        order = links.order(known).tolist()
        assert sorted(order) == list(range(5)) and set(order[: len(clique)]) == set(clique)
        for place in range(len(clique), 5):
            before, here = set(order[:place]), order[place]
            beside = {c for c in before if linked[here, c]}
            assert all(linked[a, b] for a, b in itertools.combinations(beside, 2))
            assert not any(reaches(linked, here, c, beside) for c in before - beside)


def test_what_lies_between_two_columns():
    links = Links(CHAIN)
    assert links.between(0, 1) == [] and links.between(0, 2) == [1] and links.between(3, 0) == [2, 1]
    assert links.between(0, 4) is None


def test_nothing_is_left_out_where_all_are_linked_or_nothing_was_seen():
    assert links_between(torch.ones(3, 3, dtype=torch.bool)) is None
    assert links_between(torch.zeros(3, 3, dtype=torch.bool)) is None
    assert links_between(CHAIN) is not None


def test_members_of_a_group_stand_for_each_other():
    """Rows of (x1, y1) alone link x2 and y2 too; no row shows two members."""
    counts = torch.zeros(5, 5, dtype=torch.long)
    counts[:2, :2] = 7
    counts[4, :2] = counts[:2, 4] = 3
    found = alike(counts, torch.tensor([[0, 1], [2, 3]]))
    assert (found[:2, :2] == 7).all() and (found[2:4, 2:4] == 7).all()
    assert (found[:2, 2:4] == 0).all() and (found[4, :4] == 3).all() and torch.equal(found, found.mT)


# ------------------------------------------------------------------------------------------------ Gaussian
def test_the_most_entropic_covariance_of_a_chain_is_its_closed_form():
    covariance = covariance_of(5)
    found = most_entropic(covariance, CHAIN)
    expected = torch.where(CHAIN, covariance, 0.0)
    for a, b, between in ((0, 2, [1]), (1, 3, [2]), (0, 3, [1, 2])):
        value = covariance[a, between[0]] / covariance[between[0], between[0]]
        for left, right in zip(between, [*between[1:], b], strict=True):
            value = value * covariance[left, right] / (1 if right == b else covariance[right, right])
        expected[a, b] = expected[b, a] = value
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(most_entropic(covariance, torch.ones_like(CHAIN)), covariance)


def test_unlinked_pairs_have_no_partial_covariance_and_the_rows_are_as_likely():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(600, 5, dtype=F64, generator=generator) @ torch.linalg.cholesky(covariance_of(5)).mT
    rows[:200, 3:] = NAN  # 0, 1, 2 together
    rows[200:400, [0, 4]] = NAN  # 1, 2, 3
    rows[400:, [0, 2, 3]] = NAN  # 1, 4
    free, held = GaussianBase(5, ridge=0.0), GaussianBase(5, ridge=0.0)
    for base in (free, held):
        base.fit(rows, max_iterations=2000, tolerance=1e-10)
    held.separate(TWO_CLIQUES)
    precision = torch.linalg.inv(held.covariance)
    assert precision[~TWO_CLIQUES].abs().max() < 1e-10
    torch.testing.assert_close(held.log_prob(rows), free.log_prob(rows), rtol=0, atol=1e-9)


def test_an_unlinked_given_changes_no_bit_of_any_answer():
    """A flow with weights drawn at random, so that anything it were let see would show."""
    free = torch.full((5,), math.inf)
    flow = AnyOrderFlow(Layout((0,) * 5, -free, free), width=16, components=3).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    flow.link(CHAIN)
    row = torch.randn(7, 5, dtype=F64)
    other = row.clone()
    other[:, [0, 4]] += 10.0
    known = torch.tensor([True, False, True, False, True])
    answers = torch.randn(7, 1, dtype=F64)
    assert torch.equal(flow.log_prob(row, known, [3], answers), flow.log_prob(other, known, [3], answers))
    fewer = torch.tensor([True, False, False, False, True])
    changed = flow.log_prob(row, fewer, [3], answers) - flow.log_prob(other, fewer, [3], answers)
    assert (changed.abs() > 1e-6).all()  # 0 reaches 3 through 1 and 2, of which nothing is known
    pair = torch.randn(7, 2, dtype=F64)
    apart = flow.log_prob(row, known, [1], pair[:, :1]) + flow.log_prob(row, known, [3], pair[:, 1:])
    torch.testing.assert_close(flow.log_prob(row, known, [1, 3], pair), apart)
