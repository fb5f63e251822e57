"""What held-out tasks teach: how wide predictions should be."""

import pytest
import torch

import pyro_invman as pim
from pyro_invman.data import to_tensor
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian
from pyro_invman.tasks.learning import groups_of, learn_stretch

PROCESS = HierarchicalLinearGaussian.random(seed=0)


def test_groups_are_of_about_the_same_size_and_hold_the_held_out_apart():
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    group = groups_of(order, 4)
    assert sorted(group.tolist()) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 3
    assert set((group == 0).nonzero()[:, 0].tolist()) == set(order[:4].tolist())


@torch.no_grad()
@pytest.mark.parametrize("truth", [0.8, 1.0, 1.6])
def test_a_stretch_is_found_from_tasks_that_were_drawn_with_it(truth):
    ds = PROCESS.sample(60, 10, seed=1)
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=2, flow={"width": 16}, encoder={"width": 16})
    network, generator = manifold.network, torch.Generator().manual_seed(0)
    rows = manifold.standardization(to_tensor(PROCESS.sample(60, 8, seed=2), PROCESS.variables))
    rows = rows.to(network.flow.dtype).unflatten(0, (60, 8))
    network.flow.stretch[network.columns] = truth
    latent = torch.randn(60, 1, 2, generator=generator)
    drawn, conditions = network.dream(rows, latent, generator), torch.zeros(60, 0)
    learn_stretch(network, drawn, conditions, 1, seed=0)
    found = network.flow.stretch
    settings = [c for c in range(network.dim) if c not in network.columns]
    assert (found[settings] == 1.0).all()
    assert (found[network.columns].log() - torch.tensor(truth).log()).abs().max() < 0.16
