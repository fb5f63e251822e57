"""Annealing against what its equations say at their ends."""

from __future__ import annotations

import pytest
import torch

from pyro_invman.simulators import grain_growth as gg


def test_cold_changes_nothing_and_heat_only_softens() -> None:
    before = gg.unannealed(500, torch.Generator().manual_seed(0))
    assert torch.allclose(gg.annealed(before, torch.full((500,), 300.0)), before, rtol=1e-4)
    after = gg.annealed(before, torch.full((500,), 1000.0))
    assert (after[:, 0] > before[:, 0]).all() and (after[:, 1] < before[:, 1]).all()
    hottest = gg.annealed(before, torch.full((500,), 2000.0))
    assert torch.allclose(hottest[:, 1], gg.HARDNESS + gg.PETCH / hottest[:, 0].sqrt(), rtol=1e-5)


def test_growth_of_the_square_is_the_same_for_all() -> None:
    before = gg.unannealed(500, torch.Generator().manual_seed(0)).double()
    grown = gg.annealed(before, torch.full((500,), 1100.0).double())[:, 0].square() - before[:, 0].square()
    rate = 2 * gg.GROWTH * torch.tensor(-gg.GROWTH_ENERGY / (gg.GAS * 1100.0)).double().exp().item()
    assert grown.std() < 1e-9 * rate
    assert grown.mean().item() == pytest.approx(rate, rel=1e-6)


def test_sections_are_of_different_specimens() -> None:
    (before, planned), (after, used) = gg.simulate(2000, seed=1)
    assert before.shape == after.shape == (2000, 2) and planned.shape == used.shape == (2000, 1)
    assert torch.corrcoef(torch.stack([before[:, 0], after[:, 0]]))[0, 1].abs() < 4.5 / 2000**0.5
    again = gg.simulate(2000, seed=1)
    assert torch.equal(again[1][0], after)
    assert used.min() >= gg.COLDEST and used.max() <= gg.HOTTEST
