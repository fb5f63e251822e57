"""The benchmark of design: what candidates show, and where curves reach their goals."""

import math

import numpy as np

from benchmarks import campaign
from pyro_invman.simulators import melt_pool


def test_candidates_show_settings_and_what_was_recorded_alone():
    rows = campaign.experiments(campaign.fresh(0, 1)[0])
    found = campaign.blank(rows, campaign.OUTPUTS)
    assert not {*campaign.OUTPUTS, *campaign.HIDDEN} & set(found.data_vars)
    for text, row in zip(found["measure"].values, range(rows.sizes["row"]), strict=True):
        seen = [name for name in campaign.OUTPUTS if not np.isnan(rows[name].values[row])]
        assert text == ",".join(seen)


def test_training_knows_hidden_truths_in_one_row_of_each_task():
    ds = campaign.training(0, tasks=6, rows=3)
    known = ~np.isnan(ds["absorptivity"].values)
    assert known.sum() == 6 and len(set(ds["task"].values[known])) == 6
    assert set(ds["source"].values[known]) == {"experiment"}
    assert set(ds["source"].values) == set(melt_pool.SOURCES)


def test_where_a_curve_reaches_a_goal():
    assert campaign.needed([0, 1, 2], [1.0, 0.5, 0.25], 0.5) == 1.0
    assert campaign.needed([0, 2, 4], [1.0, 0.5, 0.25], 0.75) == 1.0
    assert campaign.needed([0, 1], [0.2, 0.1], 0.3) == 0.0
    assert math.isinf(campaign.needed([0, 1], [1.0, 0.5], 0.1))


def test_tables_pair_by_task_and_leave_out_what_a_pool_does_not_have():
    gain, random = [1.0, 0.4, 0.2], [1.0, 0.6, 0.4]
    one = {"gain": gain, "closed form": gain, "variance": random} | {f"random {o}": random for o in range(3)}
    lines = campaign.replay_table({"a": one, "b": {way: curve[:2] for way, curve in one.items()}}).splitlines()
    assert lines[3].endswith("| -0.200 ± 0.000 | more than 1 |") and "| 2 | 1 |" in lines[4]
    assert lines[4].endswith("± nan | – |")
