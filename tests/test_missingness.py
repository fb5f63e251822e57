"""Tests of the mask: closed forms, a false-alarm rate that holds, and power where there is something to find."""

import math

import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from pyro_invman.density.missingness import _p_values, _scores, dependences

NAN = math.nan


def rows(number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(number, 4, dtype=torch.float64, generator=generator)
    return torch.stack([z[:, 0], z[:, 0] + z[:, 1], (z[:, 2] + z[:, 0]).exp(), (z[:, 3] > 0).double()], -1)


LEVELS = (0, 0, 0, 2)


def test_ranks_are_wilcoxons_and_ties_are_counted():
    values = rows(80, 0)[:, 0].mul(3).round()
    hidden = torch.arange(80) % 3 == 0
    seen = torch.ones(80, 1, dtype=torch.bool)
    found = _p_values(_scores(values, 0)[0].unsqueeze(-1), seen, hidden.unsqueeze(-1))
    expected = mannwhitneyu(values[hidden], values[~hidden], method="asymptotic", use_continuity=False).pvalue
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_false_alarms_are_as_rare_as_stated():
    """400 sets missing completely at random at a rate of 0.05: no more than 34 alarms, with probability 0.999."""
    alarms = 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(10_000 + seed)
        values = rows(120, seed)
        hidden = torch.rand(120, 4, generator=generator) < 0.3
        hidden[:, 1] |= hidden[:, 0]  # masks may depend on each other
        alarms += bool(dependences(values.masked_fill(hidden, NAN), LEVELS, 0.05))
    assert alarms <= 34


@pytest.mark.parametrize("kind", ["shift", "spread", "level"])
def test_what_depends_is_found_and_named(kind):
    values = rows(1000, 1)
    on = {"shift": 0, "spread": 0, "level": 3}[kind]
    chance = {
        "shift": values[:, 0].sigmoid(),
        "spread": (values[:, 0].abs() - 1).mul(2).sigmoid(),
        "level": 0.3 + 0.3 * values[:, 3],
    }[kind]
    hidden = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) < chance
    values[:, 2] = values[:, 2].where(~hidden, NAN)
    found = dependences(values, LEVELS)
    assert (2, on) in {(d.hidden, d.on) for d in found}
    assert all(d.hidden == 2 and d.p_value <= 0.01 for d in found)


def test_what_cannot_be_tested_raises_no_alarm():
    values = rows(200, 3)
    apart = values.clone()
    apart[:100, 0], apart[100:, 1:] = NAN, NAN  # no row shows both
    assert dependences(apart, LEVELS) == []
    few = values.clone()
    few[few[:, 0].argsort()[:9], 1] = NAN  # nine rows are too few to say
    assert dependences(few, LEVELS) == []
    constant = values.clone()
    constant[:, 0], constant[:50, 1] = 1.0, NAN
    assert dependences(constant, LEVELS) == []
    assert dependences(values, LEVELS) == []
    nothing = values.clone()
    nothing[:, 2] = NAN
    assert dependences(nothing, LEVELS) == []
