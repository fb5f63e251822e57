"""Pictures carry what they show: names, units, the right numbers."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pyro_invman import plots
from pyro_invman.tasks.fingerprint import Fingerprint


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


def test_task_map_shows_the_directions_in_which_tasks_differ():
    along = torch.tensor([3.0, 4.0, 0.0, 0.0]).double() / 5
    beliefs = {f"t{i}": Fingerprint(i * along, 0.04 * torch.eye(4).double(), 1.0) for i in range(-3, 4)}
    ax = plots.task_map(beliefs, new={"mine": Fingerprint(2.5 * along, torch.eye(4).double(), 0.5)})
    places = sorted(abs(float(line.get_xdata()[0])) for line in ax.lines)
    np.testing.assert_allclose(places, [0, 1, 1, 2, 2, 2.5, 3, 3], atol=1e-9)
    widths = [patch.width for patch in ax.patches]
    np.testing.assert_allclose(widths, [0.4] * 7 + [2.0])
    assert ax.texts[-1].get_text() == "mine" and "prior standard deviations" in ax.get_xlabel()


def test_task_map_of_one_latent_dimension():
    ax = plots.task_map({"a": Fingerprint(torch.ones(1).double(), torch.eye(1).double(), 0.1)})
    assert abs(float(ax.lines[0].get_xdata()[0])) == 1 and float(ax.lines[0].get_ydata()[0]) == 0


def test_bands_sort_their_setting():
    setting = np.array([2.0, 0.0, 1.0])
    quantiles = np.arange(5)[:, None] + 10 * setting
    ax = plots.bands(setting, quantiles, ("time", "depth"), ("s", "um"), measured=(setting, setting), truth=setting)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 2], [1, 12], [2, 22]])
    assert ax.get_xlabel() == "time [s]" and ax.get_ylabel() == "depth [um]"
    with pytest.raises(ValueError, match=r"expected \(5, 3\)"):
        plots.bands(setting, quantiles[:3], ("time", "depth"))


def test_calibration_draws_curves_less_the_diagonal():
    from pyro_invman import diagnostics

    d = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(80, 2), 1.0), 1)
    curves = diagnostics.sbc(d, d.sample() + 3, names=["a", "b"])
    ax = plots.calibration(curves)
    lowest = [line.get_ydata().min() for line in ax.lines[:2]]
    assert max(lowest) < -0.8  # all truths are higher than said
    assert [line.get_label() for line in ax.lines[:2]] == ["a", "b"]
    with pytest.raises(ValueError, match="stratum"):
        plots.calibration(curves, "k: 3")


def test_missingness_and_links_fill_what_was_measured():
    patterns = xr.Dataset(
        {"measured": (("pattern", "variable"), [[True, False], [True, True]]), "rows": ("pattern", [7, 2])},
        coords={"variable": ["x", "y"]},
    )
    ax = plots.missingness(patterns)
    np.testing.assert_array_equal(ax.images[0].get_array(), [[1, 0], [1, 1]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["7", "2"]
    counts = xr.DataArray([[9, 0], [0, 4]], dims=("variable", "other"), coords={"variable": ["x", "y"]})
    ax = plots.links(counts)
    assert [t.get_text() for t in ax.texts] == ["9", "–", "–", "4"]
