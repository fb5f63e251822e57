"""Pictures carry what they show: names, units, the right numbers."""

from __future__ import annotations

import itertools

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


@pytest.mark.parametrize("ends", [(95, 130), (20, 90), (4, 60), (12, 1_900), (0.03, 9), (2, 7e4), (1e-4, 3e5)])
@pytest.mark.parametrize("size", [(4.2, 4), (3.2, 3.2)])
def test_predictive_labels_stay_apart_on_logarithmic_axes(ends, size):
    measured = np.geomspace(*ends, 9)
    figure, ax = plt.subplots(figsize=size, constrained_layout=True)
    plots.predictive(measured, np.stack([measured / 1.3, measured, measured * 1.3]), "depth", "um", ax, log=True)
    figure.canvas.draw()
    for axis, side in ((ax.xaxis, "x"), (ax.yaxis, "y")):
        low, high = sorted(axis.get_view_interval())
        labels = [*axis.get_majorticklabels(), *axis.get_minorticklabels()]
        inside = [t for t in labels if t.get_text() and low <= t.get_position()[side == "y"] <= high]
        boxes = [text.get_window_extent() for text in inside]
        spans = sorted((box.x0, box.x1) if side == "x" else (box.y0, box.y1) for box in boxes)
        assert len(spans) >= 2
        assert all(right[0] > left[1] for left, right in itertools.pairwise(spans)), inside
        assert not any("$" in text.get_text() for text in inside)


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


def test_gain_against_cost_names_the_sides_that_say_something():
    def campaign(likelihood):
        known = {"gain": [0.5, 0.25], "cost": [1.0, 4.0], "posterior": [np.nan, np.nan], "likelihood": likelihood}
        return xr.Dataset({name: ("suggestion", values) for name, values in known.items()})

    ax = plots.gain_against_cost(campaign([np.nan, np.nan]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["expected gain, as chosen"]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0, 0], [1, 0.5], [5, 0.75]])
    ax = plots.gain_against_cost(campaign([0.4, np.nan]))
    assert [line.get_label() for line in ax.lines] == ["expected gain, as chosen", "likelihood side"]
    np.testing.assert_allclose(ax.lines[1].get_xydata()[0], [1, 0.4])


def test_trade_off_labels_stay_apart_and_inside():
    found = {"forward": [0.92, 0.918, 0.9179, 0.82, 0.815], "inverse": [0.385, 0.386, 0.3861, 0.452, 0.453]}
    weight = np.linspace(0, 1, 5)
    curve = xr.Dataset({name: ("weight", values) for name, values in found.items()}, coords={"weight": weight})
    ax = plots.trade_off(curve.assign_attrs(inverse="parameters"))
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.texts] == ["λ = 0, 0.5", "λ = 1"]
    frame = ax.get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in (text.get_window_extent() for text in ax.texts))
    ax = plots.trade_off(curve.isel(weight=[0, 0, 0]).assign_attrs(inverse="task"))
    assert len(ax.texts) == 1
