"""Pictures of fits and of conditionals; every function takes and returns matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Ellipse
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from pyro_invman.tasks.fingerprint import Fingerprint

_POSTERIOR, _PRIOR, _TRUTH = "#20639b", "#b0b7bf", "#d1495b"


def label(name: str, units: str = "") -> str:
    """Axis label: the name, and its units in brackets."""
    return f"{name} [{units}]" if units else name


def corner(
    draws: np.ndarray,
    names: Sequence[str],
    units: Sequence[str],
    truth: Sequence[float] | None = None,
    prior: np.ndarray | None = None,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """One- and two-dimensional marginals of `draws` (S, n), over those of `prior` (S, n) where given; axes (n, n)."""
    n = len(names)
    if axes is None:
        _, axes = plt.subplots(n, n, figsize=(2.3 * n, 2.3 * n), squeeze=False, constrained_layout=True)
    both = draws if prior is None else np.concatenate([draws, prior])
    ends = np.quantile(both, [0.005, 0.995], axis=0)
    for i in range(n):
        for j in range(n):
            ax: Axes = axes[i, j]
            if j > i:
                ax.set_axis_off()
                continue
            if i == j:
                bins = np.linspace(ends[0, i], ends[1, i], 40).tolist()
                if prior is not None:
                    ax.hist(prior[:, i], bins, density=True, color=_PRIOR, alpha=0.6, label="before")
                ax.hist(draws[:, i], bins, density=True, histtype="step", lw=1.6, color=_POSTERIOR, label="after")
                if truth is not None:
                    ax.axvline(truth[i], color=_TRUTH, lw=1.4, label="truth")
                ax.set_yticks([])
            else:
                if prior is not None:
                    ax.plot(prior[:, j], prior[:, i], ".", ms=1.5, color=_PRIOR, alpha=0.4, rasterized=True)
                ax.plot(draws[:, j], draws[:, i], ".", ms=1.8, color=_POSTERIOR, alpha=0.4, rasterized=True)
                if truth is not None:
                    ax.plot(truth[j], truth[i], "+", ms=11, mew=2, color=_TRUTH)
                ax.set_ylim(ends[0, i], ends[1, i])
            ax.set_xlim(ends[0, j], ends[1, j])
            ax.tick_params(labelsize=7)
            if i == n - 1:
                ax.set_xlabel(label(names[j], units[j]), fontsize=8)
            if j == 0 and i > 0:
                ax.set_ylabel(label(names[i], units[i]), fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return axes


def predictive(
    measured: np.ndarray, quantiles: np.ndarray, name: str, units: str = "", ax: Axes | None = None, log: bool = False
) -> Axes:
    """Predicted median and 90 % interval, `quantiles` (3, N), against what was `measured` (N,)."""
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 4), constrained_layout=True)
    low, middle, high = quantiles
    inside = (measured >= low) & (measured <= high)
    for chosen, colour, text in ((inside, _POSTERIOR, "inside"), (~inside, _TRUTH, "outside")):
        spread = np.stack([middle - low, high - middle])[:, chosen]
        ax.errorbar(
            measured[chosen], middle[chosen], spread, fmt=".", ms=4, lw=0.7, alpha=0.7, color=colour, label=text
        )
    ends = np.array([measured.min(), measured.max()])
    ax.plot(ends, ends, color="0.3", lw=0.8)
    if log:
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis in (ax.xaxis, ax.yaxis):
            _plain_decades(axis)
    ax.set_xlabel(f"measured {label(name, units)}")
    ax.set_ylabel("predicted, 90 % interval")
    ax.set_title(f"{inside.mean():.0%} inside, of {len(measured)}", fontsize=9)
    ax.legend(fontsize=7, frameon=False, loc="upper left")  # off the diagonal
    return ax


def _plain_decades(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers that stay apart: at 1, 2 and 5 of each decade, at 1 and 3, or at 1
    alone, the fewer the more decades it spans, and where it spans less than a factor of 5, as on a linear axis."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    subs = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs) if decades > np.log10(5) else MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def bands(
    setting: np.ndarray,
    quantiles: np.ndarray,
    names: tuple[str, str],
    units: tuple[str, str] = ("", ""),
    measured: tuple[np.ndarray, np.ndarray] | None = None,
    truth: np.ndarray | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Predicted median and 50 and 90 % bands along a setting (P,), over what was `measured`.

    Arguments:
        quantiles: at 5, 25, 50, 75 and 95 % (5, P).
        names, units: of the setting and of what is predicted.
        measured: settings and cells (N,) each.
        truth: (P,), where it is known.
    """
    if quantiles.shape != (5, len(setting)):
        raise ValueError(f"quantiles: found shape {quantiles.shape}, expected (5, {len(setting)})")
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.6), constrained_layout=True)
    order = np.argsort(setting)
    x, q = setting[order], quantiles[:, order]
    ax.fill_between(x, q[0], q[4], color=_POSTERIOR, alpha=0.18, lw=0, label="90 %")
    ax.fill_between(x, q[1], q[3], color=_POSTERIOR, alpha=0.32, lw=0, label="50 %")
    ax.plot(x, q[2], color=_POSTERIOR, lw=1.4, label="median")
    if truth is not None:
        ax.plot(x, truth[order], color=_TRUTH, lw=1.1, ls="--", label="truth")
    if measured is not None:
        ax.plot(*measured, "o", ms=3.5, color="0.2", alpha=0.7, label="measured")
    ax.set_xlabel(label(names[0], units[0]))
    ax.set_ylabel(label(names[1], units[1]))
    ax.legend(fontsize=7, frameon=False)
    return ax


def calibration(curves: xr.Dataset, stratum: str = "all", ax: Axes | None = None) -> Axes:
    """Curves of :func:`pyro_invman.diagnostics.sbc`, `coverage` or `tarp` less the diagonal, in their bands.

    A right model stays in the band all along. Of ranks, a curve above 0 means truths that are lower than said; of
    coverage, a curve below 0 means regions that hold fewer truths than said.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 3.2), constrained_layout=True)
    known = [str(name) for name in curves.stratum.values]
    if stratum not in known:
        raise ValueError(f"stratum: found {stratum!r}, expected one of {known}")
    chosen = curves.sel(stratum=stratum)
    targets = [str(t) for t in chosen.target.values] if "target" in chosen.dims else [None]
    points = np.concatenate([[0.0], chosen.point.values, [1.0]])
    first = chosen if targets[0] is None else chosen.isel(target=0)
    ends = [np.concatenate([[0.0], first[side].values, [1.0]]) - points for side in ("lower", "upper")]
    ax.fill_between(points, *ends, color=_PRIOR, alpha=0.35, lw=0, label=f"{chosen.attrs['band_level']:.0%} band")
    for k, target in enumerate(targets):
        one = chosen if target is None else chosen.sel(target=target)
        curve = np.concatenate([[0.0], one.curve.values, [1.0]]) - points
        colour = _POSTERIOR if len(targets) == 1 else plt.get_cmap("viridis")(0.85 * k / (len(targets) - 1))
        ax.plot(points, curve, color=colour, lw=1.3, label=target or chosen.attrs["diagnostic"])
    ax.axhline(0.0, color="0.4", lw=0.8)
    ranks = chosen.attrs["diagnostic"] == "sbc"
    ax.set_xlabel("level of the truth among draws" if ranks else "content of the region")
    ax.set_ylabel("share of questions below, less level" if ranks else "share of truths held, less content")
    ax.legend(fontsize=7, frameon=False)
    return ax


def missingness(patterns: xr.Dataset, most: int = 20, ax: Axes | None = None) -> Axes:
    """What is measured together: a line for each of the `most` frequent patterns of `measured` ("pattern", "variable")
    cells, with the `rows` ("pattern",) that show it."""
    chosen = patterns.isel(pattern=slice(0, most))
    shown, rows = chosen.measured.values.astype(bool), chosen.rows.values
    names = [str(name) for name in chosen.variable.values]
    if ax is None:
        size = (1.6 + 0.34 * len(names), 1.5 + 0.24 * len(rows))
        _, ax = plt.subplots(figsize=size, constrained_layout=True)
    ax.imshow(np.where(shown, 1.0, 0.0), cmap=_filled(), aspect="auto", vmin=0, vmax=1)
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    ax.set_yticks(range(len(rows)), [str(int(n)) for n in rows], fontsize=7)
    ax.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=1.2)
    ax.tick_params(which="both", length=0)
    ax.set_ylabel("rows with this pattern")
    ax.set_xlabel("variable (filled: measured)")
    return ax


def _filled() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(["#eef0f2", _POSTERIOR])


def links(counts: xr.DataArray, ax: Axes | None = None) -> Axes:
    """How many rows show each pair of variables together ("variable", "other"); blank where none does."""
    names = [str(name) for name in counts["variable"].values]
    if ax is None:
        side = 1.8 + 0.36 * len(names)
        _, ax = plt.subplots(figsize=(side, side), constrained_layout=True)
    number = counts.values.astype(float)
    ax.imshow(np.where(number > 0, np.log10(np.maximum(number, 1)), np.nan), cmap="Blues", vmin=-0.6)
    most = max(1.0, number.max())
    for i in range(len(names)):
        for j in range(len(names)):
            dark = number[i, j] > most**0.8
            text = f"{int(number[i, j])}" if number[i, j] > 0 else "–"
            ax.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if dark else "0.25")
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_xlabel("rows that show both")
    return ax


def history(record: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Training and held-out loss of a fit against its steps."""
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    ax.plot(record.step, record.train_loss, color=_PRIOR, label="training rows")
    ax.plot(record.step, record.validation_loss, color=_POSTERIOR, label="held-out rows")
    best = int(record.validation_loss.values.argmin())
    ax.axvline(float(record.step[best]), color="0.6", lw=0.8, ls=":")
    ax.set_xlabel("step")
    ax.set_ylabel("loss [nat per cell]")
    ax.legend(fontsize=8, frameon=False)
    return ax


def task_map(
    known: Mapping[str, Fingerprint], new: Mapping[str, Fingerprint] | None = None, ax: Axes | None = None
) -> Axes:
    """Fingerprints of tasks as points with ellipses of one standard deviation, the `new` ones as stars.

    The axes are the two directions of the latent in which the means of the `known` tasks differ most; a latent of one
    dimension is drawn against nothing.
    """
    if not known:
        raise ValueError("known: found no task, expected at least one")
    if ax is None:
        _, ax = plt.subplots(figsize=(5.4, 5), constrained_layout=True)
    means = np.stack([np.asarray(f.mean) for f in known.values()])
    _, _, directions = np.linalg.svd(means - means.mean(0), full_matrices=True)
    plane = np.zeros((2, means.shape[1]))
    plane[: min(2, len(directions))] = directions[:2]
    for tasks, colour, weight in ((known, _POSTERIOR, 0.35), (new or {}, _TRUTH, 0.9)):
        for name, found in tasks.items():
            x, y = plane @ np.asarray(found.mean)
            size, turn = np.linalg.eigh(plane @ np.asarray(found.covariance) @ plane.T)
            width, height = 2 * np.sqrt(size.clip(0))
            angle = np.degrees(np.arctan2(turn[1, 0], turn[0, 0]))
            ax.add_patch(Ellipse((x, y), width, height, angle=angle, fill=False, color=colour, alpha=weight, lw=0.8))
            ax.plot(x, y, "." if tasks is known else "*", ms=5 if tasks is known else 11, color=colour)
            if tasks is not known or len(known) <= 40:
                points = 6 if tasks is known else 9
                ax.annotate(name, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=points, color=colour)
    ax.set_xlabel("first direction of the latent\n[prior standard deviations]")
    ax.set_ylabel("second direction of the latent\n[prior standard deviations]")
    ax.set_aspect("equal", adjustable="datalim")
    return ax


def gain_against_cost(history: xr.Dataset, ax: Axes | None = None) -> Axes:
    """What a campaign's suggestions promise in all against what they cost, and what the flow's two sides say, where it
    was asked (``shortlist=0`` asks it nothing)."""
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    cost = np.concatenate([[0.0], history.cost.values.cumsum()])
    gain = np.concatenate([[0.0], history.gain.values.cumsum()])
    ax.plot(cost, gain, marker=".", color=_POSTERIOR, label="expected gain, as chosen")
    for name, colour in (("likelihood", _TRUTH), ("posterior", "0.4")):
        side = history[name].values
        if np.isfinite(side).any():
            ax.plot(cost[1:], gain[:-1] + side, "_", ms=7, color=colour, label=f"{name} side")
    ax.set_xlabel("total cost")
    ax.set_ylabel("expected gain [nat]")
    ax.legend(fontsize=8, frameon=False)
    return ax


def trade_off(curve: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Expected gain inverse against forward, along the weight between the two."""
    if ax is None:
        _, ax = plt.subplots(figsize=(4.2, 3.8), constrained_layout=True)
    ax.plot(curve.forward, curve.inverse, marker=".", color=_POSTERIOR)
    ax.margins(0.12)
    points = np.stack([curve.forward.values, curve.inverse.values], -1)
    low, size = points.min(0), np.ptp(points, axis=0)
    places = (points - low) / np.where(size > 0, size, 1.0)
    named: dict[int, list[str]] = {}
    for n in dict.fromkeys((0, len(points) // 2, len(points) - 1)):
        near = [m for m in named if np.abs(places[m] - places[n]).max() < 0.1]
        named.setdefault(near[0] if near else n, []).append(f"{float(curve.weight[n]):.2g}")
    for n, weights in named.items():
        side: Any = "right" if places[n, 0] > 0.5 else "left"
        shift = (-5 if side == "right" else 5, 4)
        ax.annotate(f"λ = {', '.join(weights)}", points[n], shift, textcoords="offset points", fontsize=8, ha=side)
    ax.set_xlabel("forward: expected gain about predictions [nat]")
    ax.set_ylabel(f"inverse: expected gain about the {curve.attrs['inverse']} [nat]")
    return ax


def save(axes: Any, path: Any, **options: Any) -> None:
    """Writes the figure that `axes` belong to, and closes it."""
    figure = np.ravel(axes)[0].figure
    figure.savefig(path, dpi=130, **options)
    plt.close(figure)
