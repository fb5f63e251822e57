"""The mixed model against the Gaussian that it is."""

import pytest
import torch

from pyro_invman.density.mixed_model import MixedModel
from pyro_invman.density.random_functions import RandomFunctions

F64 = torch.float64
OUTPUTS, SHARED, OWN = 2, 5, 3


@pytest.fixture(scope="module")
def model() -> MixedModel:
    """Tasks of one row, which are worked out in their cells, and of twelve, worked out in features; two rounds."""
    generator = torch.Generator().manual_seed(0)
    task = torch.tensor([0] * 12 + [1] + [2] * 12 + [3, 3] + [4])
    shared, own, y, hidden = (
        torch.randn(shape, generator=generator, dtype=F64)
        for shape in (
            (OUTPUTS, len(task), SHARED),
            (OUTPUTS, len(task), OWN),
            (len(task), OUTPUTS),
            (len(task), OUTPUTS),
        )
    )
    noise = 0.2 + torch.rand(OUTPUTS, len(task), generator=generator, dtype=F64)
    em = MixedModel(shared, own, y, hidden < 0.8, task, noise, 10.0)
    em.step()
    kept = em.covariance.clone()
    em.step()
    em.before = kept  # type: ignore[attr-defined]  # what the last round stood on
    return em


def dense(model: MixedModel, tasks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (M I,) and covariance of the shared weights by the joint normal of all cells of some tasks."""
    parts = [model._cells(t) for t in tasks]
    shared, y = torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])
    inner = torch.block_diag(*(p[1] @ model.before @ p[1].mT for p in parts))  # type: ignore[attr-defined]
    gain = torch.linalg.solve(shared @ shared.mT + inner + torch.eye(len(y), dtype=F64), shared).mT
    return gain @ y, torch.eye(shared.shape[1], dtype=F64) - gain @ shared


@pytest.mark.parametrize("tasks", [[0, 1, 2, 3, 4], [0, 3], [1, 4], [2]])
def test_shared_weights_are_known_from_any_tasks_as_by_the_joint_normal(model, tasks):
    assert model.in_cells == [False, True, False, True, True]
    some = torch.zeros(5, dtype=torch.bool)
    some[tasks] = True
    known = model.known_from(some)
    mean, covariance = dense(model, tasks)
    torch.testing.assert_close(known.weights.flatten(), mean)
    torch.testing.assert_close(torch.cholesky_inverse(known.factor), covariance)
    whiten = torch.eye(SHARED, dtype=F64).expand(OUTPUTS, -1, -1)
    share = known.explained(whiten)
    for q, block in enumerate(covariance.unflatten(0, (OUTPUTS, SHARED)).unflatten(-1, (OUTPUTS, SHARED)).unbind(0)):
        torch.testing.assert_close(
            share[q] @ share[q].mT, torch.eye(SHARED, dtype=F64) - block[:, q], atol=2e-3, rtol=0
        )


@torch.no_grad()
def test_without_its_group_a_task_is_as_new():
    """Group 0 alone shows what happens beyond s = 1: without it, nothing is known there."""
    generator = torch.Generator().manual_seed(1)
    task = torch.arange(20).repeat_interleave(8)
    group = (torch.arange(20) >= 4).long()
    s = 2 * torch.rand(160, 1, generator=generator, dtype=F64) - 1 + 3 * (1 - group[task, None])
    y = (2 * s).sin() + 0.1 * torch.randn(160, 1, generator=generator, dtype=F64)
    functions = RandomFunctions.fitted(s, y, task, latent_dim=1, group=group)
    at, known = torch.tensor([[3.0], [0.0]], dtype=F64), torch.ones(2, 1, dtype=torch.bool)
    before = functions.anchor(at, known)
    with functions.without(0):
        apart = functions.anchor(at, known)
    after = functions.anchor(at, known)
    assert apart.scale[0] > 3 * before.scale[0]
    torch.testing.assert_close(apart.mean[1], before.mean[1], atol=0.05, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
