"""Peers of the few-shot benchmark: exact answers where there are some, and what every predictive must do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.stats import norm

from benchmarks.fewshot_data import grid_scores
from benchmarks.fewshot_peers import (
    PEERS,
    Cells,
    Filler,
    GaussianProcess,
    HierarchicalKernel,
    MultitaskGP,
    NeuralProcess,
    Peer,
    Posterior,
    RandomForest,
    Table,
    balanced,
    gaussian_scores,
    inverse,
    whole_tasks,
)

pytest.importorskip("sklearn", reason="the peers need scikit-learn: pip install pyro_invman[bench]")

NOISE = 0.2


def table(tasks: int, rows: int, seed: int, missing: float = 0.1) -> Table:
    """y1 = sin 1.5 x1 + b + noise, y2 = x2 - b + noise with a task's offset b ~ N(0, 0.7^2)."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(tasks), rows)
    x = rng.normal(size=(len(task), 2))
    offset = 0.7 * rng.normal(size=tasks)[task]
    y = np.stack([np.sin(1.5 * x[:, 0]) + offset, x[:, 1] - offset], 1) + NOISE * rng.normal(size=(len(task), 2))
    x[rng.random(len(task)) < missing / 2, 1] = np.nan
    y[rng.random(y.shape) < missing] = np.nan
    return Table(x, y, task)


def small(name: str) -> Peer:
    peer = PEERS[name]()
    if isinstance(peer, GaussianProcess):
        peer.hyper_cells, peer.most_cells = 120, 250
    if isinstance(peer, MultitaskGP):
        peer.most_rows, peer.steps = 150, 60
    if isinstance(peer, RandomForest):
        peer.trees = 40
    if isinstance(peer, NeuralProcess):
        peer.max_steps, peer.max_seconds, peer.width = 400, 60.0, 32
    return peer


@pytest.fixture(scope="module")
def train() -> Table:
    return table(20, 14, seed=0)


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_predicts_new_rows_and_learns_from_the_context(name: str, train: Table) -> None:
    with torch.random.fork_rng():
        peer = small(name)
        peer.fit(train, seed=0)
        fresh = table(25, 30, seed=1)
        loss: dict[int, float] = {}
        for k in (0, 2, 10):
            found = []
            for t in range(25):
                rows = fresh.rows(fresh.task == t)
                mean, sd = peer.condition(rows.rows(np.arange(k)))(rows.x[10:])
                assert mean.shape == sd.shape == (20, 2)
                found.append(gaussian_scores(rows.y[10:], mean, sd)["nlpd"])
            loss[k] = float(np.nanmean(found))
    nothing = float(np.nanmean(gaussian_scores(fresh.y, np.zeros(2), np.nanstd(fresh.y, 0))["nlpd"]))
    known = 0.5 * math.log(2 * math.pi * math.e * NOISE**2)
    assert loss[10] < nothing - 0.05 and loss[10] > known
    if name != "pooled_gp":
        assert loss[10] < loss[0] - 0.1
    if "hierarchical" in name:
        assert loss[2] < loss[0] - 0.3 and loss[10] < known + 0.45


@pytest.mark.parametrize("name", PEERS)
def test_order_of_the_context_is_irrelevant_and_unmeasured_outputs_say_nothing(name: str, train: Table) -> None:
    if name == "random_forest":
        pytest.skip("a forest draws rows by their place")
    peer = small(name)
    if isinstance(peer, NeuralProcess):
        peer.max_steps = 5
    peer.fit(train, seed=0)
    rows = table(1, 12, seed=2).rows(np.arange(12))
    first = peer.condition(rows.rows(np.arange(6)))(rows.x[6:])
    turned = peer.condition(rows.rows(np.arange(6)[::-1].copy()))(rows.x[6:])
    for a, b in zip(first, turned, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    if name != "neural_process":  # which reads inputs of rows without outputs
        bare = Table(rows.x[:7], rows.y[:7].copy(), rows.task[:7])
        bare.y[6] = np.nan
        for a, b in zip(first, peer.condition(bare)(rows.x[6:]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("coupled", [False, True])
def test_extended_posterior_is_that_of_the_joint_gaussian(coupled: bool) -> None:
    both, new = table(5, 6, seed=3, missing=0.2), table(1, 8, seed=4, missing=0.0)
    outputs = slice(None) if coupled else slice(1)
    kernel = HierarchicalKernel(2, 2 if coupled else 1)
    kernel.theta = kernel.theta + 0.3 * torch.randn(
        len(kernel.theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    filled = np.nan_to_num(both.x)
    known = Cells.of(filled, both.y[:, outputs], both.task)
    context = Cells.of(new.x[:5], new.y[:5, outputs], np.full(5, -1))
    query = Cells.of(new.x[5:], new.y[5:, outputs], np.full(3, -1))
    with torch.no_grad():
        mean, sd = Posterior(kernel, known).condition(context)(query)
        data = Cells(*(torch.cat(parts) for parts in zip(known, context, strict=True)))
        noise = kernel.noise(kernel.theta)
        covariance = kernel(kernel.theta, data, data) + torch.diag(noise[data.output])
        weights = torch.linalg.solve(covariance, kernel(kernel.theta, data, query))
        expected = kernel(kernel.theta, query, query) + torch.diag(noise[query.output])
        expected = (expected - kernel(kernel.theta, data, query).mT @ weights).diagonal().sqrt()
    torch.testing.assert_close(mean, weights.mT @ data.value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sd, expected, rtol=1e-5, atol=1e-6)


def test_coupled_outputs_inform_on_each_other(train: Table) -> None:
    """The offsets of the outputs are opposite, so that one measured tells the other."""
    fresh, errors = table(15, 12, seed=5, missing=0.0), {}
    for name in ("hierarchical_gp", "coupled_hierarchical_gp"):
        peer, found = small(name), []
        peer.fit(train, seed=0)
        for t in range(15):
            rows = fresh.rows(fresh.task == t)
            context = rows.rows(np.arange(6))
            context.y[:, 1] = np.nan
            found.append((peer.condition(context)(rows.x[6:])[0] - rows.y[6:])[:, 1] ** 2)
        errors[name] = float(np.mean(found))
    assert errors["coupled_hierarchical_gp"] < 0.5 * errors["hierarchical_gp"]


def test_inverse_of_a_linear_gaussian_is_the_closed_form() -> None:
    slopes, noise = np.array([1.5, -0.5]), np.array([0.4, 0.7])
    grid = np.linspace(-6, 6, 2001)
    y = np.array([[1.0, 0.3], [np.nan, -0.4], [np.nan, np.nan]])
    x = np.array([[np.nan, 0.2], [9.0, -1.0], [0.0, 0.0]])

    def predictor(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return rows[:, :1] * slopes + rows[:, 1:], np.broadcast_to(noise, (len(rows), 2))

    weights = inverse(predictor, x, y, 0, grid, norm.pdf(grid))
    np.testing.assert_allclose(weights.sum(1), 1)
    seen = ~np.isnan(y)
    precision = 1 + (seen * (slopes / noise) ** 2).sum(1)
    mean = np.nansum((y - x[:, 1:]) * slopes / noise**2, 1) / precision
    np.testing.assert_allclose(weights @ grid, mean, atol=1e-6)
    np.testing.assert_allclose(weights @ grid**2 - mean**2, 1 / precision, rtol=1e-4)
    np.testing.assert_array_equal(x[:, 0], [np.nan, 9.0, 0.0])


def test_scores_are_their_definitions() -> None:
    y, mean, sd = np.array([0.3, -2.0, np.nan]), np.array([0.0, 0.5, 1.0]), np.array([0.7, 1.3, 1.0])
    scores = gaussian_scores(y, mean, sd)
    np.testing.assert_allclose(scores["nlpd"], -norm.logpdf(y, mean, sd))
    for i in range(2):
        below, _ = integrate.quad(lambda u, i=i: norm.cdf(u, mean[i], sd[i]) ** 2, -20, y[i])
        above, _ = integrate.quad(lambda u, i=i: norm.sf(u, mean[i], sd[i]) ** 2, y[i], 20)
        assert scores["crps"][i] == pytest.approx(below + above, rel=1e-5)
    np.testing.assert_array_equal(scores["coverage90"], [1, 0, np.nan])


def test_grid_scores_are_those_of_mixtures() -> None:
    grid, truth = np.linspace(-5, 5, 1001), np.array([0.4, -1.0])
    weights = np.stack([norm.pdf(grid, 0, 1), norm.pdf(grid, 0.5, 0.8)])
    weights /= weights.sum(1, keepdims=True)
    exact = gaussian_scores(truth, np.array([0, 0.5]), np.array([1, 0.8]))
    found = grid_scores(truth, weights, grid, 0.15)
    np.testing.assert_allclose(found["crps"], exact["crps"], rtol=1e-4)
    wide = np.sqrt(np.array([1, 0.64]) + 0.15**2)
    np.testing.assert_allclose(found["nlpd"], -norm.logpdf(truth, [0, 0.5], wide), rtol=1e-5)
    point = np.array([[0.0, 1.0]])
    np.testing.assert_allclose(grid_scores(np.array([0.5]), point, np.array([0.0, 2.0]))["crps"], [1.5])


def test_missing_inputs_are_flagged_where_training_rows_lack_them() -> None:
    filler = Filler(np.array([[1.0, np.nan, 2.0], [0.5, 3.0, 1.0]]))
    np.testing.assert_array_equal(filler(np.array([[np.nan, np.nan, 4.0]])), [[0, 0, 4, 1]])


def test_subsamples_are_even_over_tasks() -> None:
    task = np.repeat([0, 1, 2, 3], [2, 20, 20, 20])
    rng = np.random.default_rng(0)
    index = balanced(task, 32, rng)
    assert len(np.unique(index)) == 32 and np.bincount(task[index]).tolist() == [2, 10, 10, 10]
    assert np.array_equal(balanced(task, 100, rng), np.arange(62))
    index = whole_tasks(task, 25, 10, rng)
    assert len(np.unique(index)) == len(index) <= 25 and np.bincount(task[index]).max() == 10
