"""The contest: what a simulated set holds, and that every method is scored on the same cells."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import fewshot_contest as contest
from benchmarks.fewshot_data import folds, paired
from pyro_invman import Schedule


@pytest.mark.parametrize("name", contest.SIMULATED)
def test_a_simulated_set_keeps_its_new_tasks_apart(name):
    real = contest.simulated(name, seed=0, tasks=12, new=3)
    (fold,) = folds(real, 1)
    assert {task.split()[0] for task in fold.held_out} == {"new"} and len(fold.held_out) == 3
    assert {task.split()[0] for task in fold.training} == {"train"} and len(fold.rows) == 12 * 20
    for asked in fold.episodes:
        assert len(asked.test) == 20 and len(asked.pool) == 20 and len(asked.inverse) == 8
        assert not set(asked.test) & set(asked.pool)
    measured = real.table.y[fold.rows]
    np.testing.assert_allclose(np.nanmean(measured, 0), 0, atol=1e-6)
    assert not {"absorptivity", "beam_offset_um"} & set(real.ds.data_vars)


def test_methods_are_scored_on_the_same_cells():
    real = contest.simulated("oscillations", seed=1, tasks=10, new=2)
    (fold,) = folds(real, 1)
    brief = {"schedule": Schedule(steps=5, batch_size=8)}
    methods = {"invman": contest.Manifold(2, brief, flow={"width": 16}), "peer": contest.OfPeer("hierarchical_gp")}
    found = []
    for name, method in methods.items():
        first, *rest = contest.contest(real, fold, name, method, 0, shots=(0, 5))
        assert first["fit_cpu_s"] > 0
        found += rest
    for direction in ("forward", "inverse"):
        difference = paired(found, "invman", "peer", "nlpd", direction)
        assert difference.tasks == 2 and np.isfinite(difference.mean)
    table = pd.DataFrame(found)
    assert set(table.k) == {0, 5} and table.nlpd.notna().all()
