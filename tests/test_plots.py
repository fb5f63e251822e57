"""Pictures carry what they show: names, units, the right numbers."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import xarray as xr

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pyro_invman import plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_corner_labels_axes_and_marks_the_truth():
    draws = np.random.default_rng(0).normal(size=(500, 2))
    axes = plots.corner(draws, ["power", "speed"], ["W", "mm/s"], truth=[0.5, -0.5], prior=2 * draws)
    assert axes.shape == (2, 2)
    assert axes[1, 0].get_xlabel() == "power [W]" and axes[1, 0].get_ylabel() == "speed [mm/s]"
    (mark,) = [line for line in axes[1, 0].lines if line.get_marker() == "+"]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (0.5, -0.5)
    assert not axes[0, 1].axison


def test_predictive_counts_what_is_inside():
    measured = np.array([1.0, 2.0, 3.0, 4.0])
    quantiles = np.stack([measured - 0.5, measured, measured + 0.5])
    quantiles[:, 3] += 5
    ax = plots.predictive(measured, quantiles, "depth", "um", log=True)
    assert ax.get_title().startswith("75%") and ax.get_xlabel() == "measured depth [um]" and ax.get_xscale() == "log"


def test_history_marks_the_best_step():
    losses = {"train_loss": ("step", [np.nan, 2.0, 1.0]), "validation_loss": ("step", [3.0, 1.5, 1.7])}
    ax = plots.history(xr.Dataset(losses, coords={"step": [0, 20, 40]}))
    assert ax.lines[2].get_xdata()[0] == 20 and ax.get_ylabel() == "loss [nat per cell]"


def test_save_writes_a_picture_and_closes_it(tmp_path):
    plots.save(plots.corner(np.zeros((9, 1)) + np.arange(9)[:, None], ["x"], [""]), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and not plt.get_fignums()
