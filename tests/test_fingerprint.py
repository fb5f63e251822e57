"""Likeness of tasks from beliefs about their latents."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_invman.tasks.fingerprint import Fingerprint, corrected, nearest, similarity, surprise

F64 = torch.float64


def belief(mean: list[float], scale: float) -> Fingerprint:
    return Fingerprint.of(torch.tensor(mean, dtype=F64), scale**2 * torch.eye(len(mean), dtype=F64))


def test_information_is_the_divergence_from_the_prior():
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    mean = torch.tensor([1.0, -0.5], dtype=F64)
    prior = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    expected = kl_divergence(MultivariateNormal(mean, covariance), prior)
    assert Fingerprint.of(mean, covariance).information == pytest.approx(float(expected))


def test_particles_give_their_weighted_moments():
    particles = torch.randn(5000, 2, dtype=F64)
    weights = -0.5 * (particles - 1.0).square().sum(-1) + 0.5 * particles.square().sum(-1)
    found = Fingerprint.of_particles(particles, weights)
    torch.testing.assert_close(found.mean, torch.ones(2, dtype=F64), atol=0.15, rtol=0)


def test_bhattacharyya_of_sharp_beliefs():
    """Far from the prior's width nothing is discounted: exp(−d²/8s²)."""
    for apart in (0.0, 0.01, 0.03):
        found = similarity(belief([3.0, 0.0], 0.01), belief([3.0 + apart, 0.0], 0.01))
        assert found == pytest.approx(math.exp(-((apart / 0.01) ** 2) / 8), abs=0.01)


def test_tasks_of_which_nothing_is_known_are_not_alike():
    unknown = belief([0.0, 0.0], 1.0)
    assert similarity(unknown, unknown) < 1e-6
    assert similarity(unknown, belief([1.0, 1.0], 0.05)) < 0.01


def test_similarity_is_symmetric_and_bounded():
    torch.manual_seed(0)
    for _ in range(50):
        a, b = (belief(torch.randn(3).tolist(), float(torch.rand(()) + 0.05)) for _ in range(2))
        assert similarity(a, b) == pytest.approx(similarity(b, a))
        assert 0 <= similarity(a, b) <= 1


def test_nearest_is_sorted():
    known = {name: belief([float(i)], 0.1) for i, name in enumerate("abc")}
    found = nearest(belief([1.9], 0.1), known, 2)
    assert [likeness.task for likeness in found] == ["c", "b"]


def test_surprise_is_uniform_for_one_of_the_simulated():
    torch.manual_seed(0)
    values = [float(surprise(torch.randn(2, dtype=F64), torch.randn(99, 2, dtype=F64))) for _ in range(400)]
    ranks = torch.tensor(values)
    for level in (0.05, 0.2, 0.5):
        assert abs(float((ranks <= level).float().mean()) - level) < 3 * math.sqrt(level * (1 - level) / 400) + 0.01


def test_surprise_is_small_for_what_is_strange_in_one_respect():
    simulated = torch.randn(199, 2, dtype=F64)
    assert surprise(torch.tensor([8.0, 0.0], dtype=F64), simulated) <= 0.02


def test_held_out_tasks_correct_what_was_simulated():
    generator = torch.Generator().manual_seed(0)
    scores = 1.8 * torch.randn(300, generator=generator, dtype=F64) - 0.4  # p-values that are too extreme
    held_out = torch.special.ndtr(scores).tolist()
    again = torch.tensor([corrected(p, held_out) for p in held_out])
    assert float((torch.tensor(held_out) < 0.05).float().mean()) > 0.15
    assert abs(float((again < 0.05).float().mean()) - 0.05) < 0.025
    assert corrected(0.3, []) == pytest.approx(0.3)
