r"""Real multi-task tables for the few-shot benchmark: rows, folds over tasks, scores and paired comparisons.

A set is a folder with a csv and a ``meta.json`` that names its columns, their transforms and its protocol; nothing here
knows a set by name. Of each held-out task and split, a part of the rows is for the test and the others are an ordered
pool whose first k are what is known of the task. All numbers are in standard deviations of the whole set's measured
rows, after the transform of each column, so that scores compare across columns and sets.

References:
    | The continuous ranked probability score for circular variables and its application to mesoscale forecast
      ensemble verification (Grimit, Gneiting, Berrocal & Johnson, 2006)
    | Strictly proper scoring rules, prediction, and estimation (Gneiting & Raftery, 2007)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from scipy.special import logsumexp, ndtr

from benchmarks.fewshot_peers import Table
from pyro_invman.data import from_columns, validate
from pyro_invman.variables import DataError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FEWEST = 10  # rows of a level of its own
GRID, PER_TASK = 40, 40  # points of the inverse's grid; rows a task that make it
KERNEL = 0.15  # standard deviation of the normals about its points, or about draws
_FLOOR = math.log(1e-12)  # added to that density
SCORES = ("crps", "nlpd", "coverage90")
_CELL = ["set", "method", "direction", "k"]


# ------------------------------------------------------------------------------------------------ sets
@dataclass(frozen=True)
class RealSet:
    """A table as this package (`ds`) and as its peers (`table`) see it, row by row the same.

    Attributes:
        name: Folder of the set.
        ds: Standardised columns of support "real" and categorical conditions, coordinates task and, where there are
            sources, source. Attributes of a column: transform, natural_units, mean and sd (of the transformed column),
            unusable (recorded cells that the transform cannot take, NaN here).
        table: Inputs (N, P), outputs (N, Q), task numbers (N,); NaN where not measured. A category is 0/1 for each
            level, and for "not measured", of at least 10 rows; so is a source.
        columns: Names of the inputs (P).
        outputs: Names of the outputs (Q).
        sought: Column that the inverse asks for, among `columns` and in `ds`; None where there is none.
        tasks: Name of each task number.
        measured: Rows (N,) of the source of record; the others are cheap: never scored, always known.
        origin: For a simulated row the measured one that it belongs to, else its own number (N,).
        group: Replicates share a number (N,).
        simulated: Output to simulated cells (N,), where a column ``sim_<output>`` is declared.
        protocol: ks, min_rows, n_splits, test_frac, test_min, test_max, inv_rows, ….
    """

    name: str
    ds: xr.Dataset
    table: Table
    columns: tuple[str, ...]
    outputs: tuple[str, ...]
    sought: str | None
    tasks: tuple[str, ...]
    measured: np.ndarray
    origin: np.ndarray
    group: np.ndarray
    simulated: dict[str, np.ndarray]
    protocol: dict[str, Any]

    def eligible(self) -> np.ndarray:
        """Numbers of the tasks with at least min_rows measured rows that show an output."""
        rows = self.measured & ~np.isnan(self.table.y).all(1)
        return np.flatnonzero(
            np.bincount(self.table.task[rows], minlength=len(self.tasks)) >= self.protocol["min_rows"]
        )


def transformed(cells: pd.Series, transform: str) -> tuple[np.ndarray, int]:
    """Cells (N,) after "lin", "log10" or "log10+offset", and how many recorded ones it cannot take (NaN there).

    Raises:
        DataError: another transform.
    """
    values = pd.to_numeric(cells, errors="coerce").to_numpy(float)
    if transform.startswith("log10"):
        shifted = values + float(transform[5:] or 0.0)
        values = np.log10(shifted, out=np.full(len(values), math.nan), where=shifted > 0)
    elif transform != "lin":
        raise DataError(f"{cells.name}: found the transform {transform!r}, expected lin, log10 or log10+offset")
    values = np.where(np.isfinite(values), values, math.nan)
    return values, int((np.isnan(values) & cells.notna().to_numpy()).sum())


def load(name: str, low_source: bool = False, data: Path = DATA) -> RealSet:
    """The set in folder `name`. Columns that do not vary are left out (``ds.attrs["left_out"]``), levels with fewer
    than 10 rows are pooled into "other".

    Arguments:
        low_source: also the rows of the other sources, where the set declares a source of record.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: a column is not there, a transform is unknown, no output varies.
    """
    meta = json.loads((data / name / "meta.json").read_text())
    raw = pd.read_csv(data / name / meta["csv"], low_memory=False)
    numeric = {c["col"]: (c, role) for key, role in _ROLES.items() for c in meta.get(key, [])}
    simulated = {c.removeprefix("sim_"): c for c in meta.get("simulation_columns", []) if c.startswith("sim_")}
    simulated = {output: c for output, c in simulated.items() if output in [y["col"] for y in meta["y"]]}
    source, task = meta.get("source"), meta.get("task", "task")
    classes = list(meta.get("categorical", []))
    others = [meta.get("group"), source and source["column"]]
    for column in [*numeric, *classes, *simulated.values(), task, *filter(None, others)]:
        if column not in raw:
            raise DataError(f"{name}: found no column {column!r}, which meta.json declares; it has {list(raw)}")
    if source and not low_source:
        raw = raw[raw[source["column"]] == source["high"]].reset_index(drop=True)
    measured = (raw[source["column"]] == source["high"]).to_numpy() if source else np.ones(len(raw), bool)

    cells: dict[str, np.ndarray] = {}
    attrs: dict[str, dict[str, Any]] = {}
    for column, (spec, _) in numeric.items():
        values, unusable = transformed(raw[column], spec["transform"])
        seen = values[measured & ~np.isnan(values)]
        if len(seen) and seen.min() < seen.max():
            mean, sd = float(seen.mean()), float(seen.std())
            cells[column] = (values - mean) / sd
            attrs[column] = {"transform": spec["transform"], "natural_units": spec.get("unit", "")}
            attrs[column] |= {"mean": mean, "sd": sd, "unusable": unusable}
    outputs = tuple(c["col"] for c in meta["y"] if c["col"] in cells)
    inputs = tuple(c for c in cells if c not in outputs)
    sought = meta.get("inverse", {}).get("col")
    if not outputs or (sought is not None and sought not in inputs):
        raise DataError(f"{name}: found no values that vary in {sought if outputs else 'any output'}; nothing to score")

    levels = {c: raw[c].astype(str).where(raw[c].notna(), "") for c in classes}
    flags = _flags(levels | ({"source": raw[source["column"]].astype(str)} if source and low_source else {}))
    levels = {c: _pooled(texts) for c, texts in levels.items()}
    levels = {c: texts for c, texts in levels.items() if texts[texts != ""].nunique() > 1}
    ds = from_columns(
        cells | {c: texts.to_numpy(object) for c, texts in levels.items()},
        roles={c: numeric[c][1] for c in cells} | dict.fromkeys(levels, "condition"),
        supports=dict.fromkeys(levels, "categorical"),
        task=raw[task].astype(object).to_numpy(),
        source=raw[source["column"]].astype(str).to_numpy(object) if source else None,
    )
    for column, described in attrs.items():
        ds[column].attrs.update(described)
    ds.attrs["left_out"] = [c for c in raw if c not in ds.data_vars and c != task]
    columns = [cells[c] for c in inputs] + list(flags.values())
    number, names = pd.factorize(raw[task])
    group = np.arange(len(raw))
    if meta.get("group"):  # numbered as if there were no other source: the splits are the same with and without it
        group = np.where(measured, 0, -1)
        group[measured] = pd.factorize(raw.loc[measured, meta["group"]])[0]
    return RealSet(
        name=name,
        ds=ds,
        table=Table(np.stack(columns, 1), np.stack([cells[c] for c in outputs], 1), number),
        columns=(*inputs, *flags),
        outputs=outputs,
        sought=sought,
        tasks=tuple(map(str, names)),
        measured=measured,
        origin=np.arange(len(raw)),
        group=group,
        simulated={
            output: (transformed(raw[c], attrs[output]["transform"])[0] - attrs[output]["mean"]) / attrs[output]["sd"]
            for output, c in simulated.items()
            if output in outputs
        },
        protocol=meta["protocol"],
    )


_ROLES = {"x": "parameter", "eta": "condition", "y": "observation"}


def _pooled(texts: pd.Series) -> pd.Series:
    """Levels with fewer than 10 rows as "other"; a missing one ("") stays missing."""
    return texts.where((texts == "") | (texts.map(texts.value_counts()) >= FEWEST), "other")


def _flags(levels: Mapping[str, pd.Series]) -> dict[str, np.ndarray]:
    """0/1 for each level, and for "not measured", of at least 10 rows but not all."""
    return {
        f"{column}={level or 'not measured'}": (texts == level).to_numpy(float)
        for column, texts in levels.items()
        for level, rows in texts.value_counts().items()
        if FEWEST <= rows < len(texts)
    }


def with_simulated_source(
    real: RealSet, outputs: Sequence[str] | None = None, source: str = "simulation", measured: str = "measured"
) -> RealSet:
    """The set with one more row, of a source of its own, for each measured row with a simulated output: the settings
    and the task of that row, the simulated values as its outputs, scaled like the measured ones. The first N rows, and
    so folds and episodes but for their cheap rows, are those of `real`.

    Arguments:
        outputs: those that the new rows show; by default all that are simulated.
        source, measured: name of the new source, and of the old rows where they have none.

    Raises:
        DataError: an output that is not simulated, or none is.
    """
    chosen = tuple(real.simulated) if outputs is None else tuple(outputs)
    if unknown := sorted(set(chosen) - set(real.simulated)) or not chosen:
        raise DataError(f"{real.name}: found no simulated column for {unknown}; known: {sorted(real.simulated)}")
    new = np.full(real.table.y.shape, math.nan)
    for output in chosen:
        new[:, real.outputs.index(output)] = real.simulated[output]
    origin = np.flatnonzero(real.measured & ~np.isnan(new).all(1))
    index, rows = np.r_[np.arange(len(new)), origin], len(origin)
    y = np.concatenate([real.table.y, new[origin]])
    ds = real.ds.isel(row=index)
    for q, output in enumerate(real.outputs):
        ds[output] = ("row", y[:, q], ds[output].attrs)
    old = ds["source"].values if "source" in ds.coords else np.full(len(index), measured, object)
    is_new = np.arange(len(index)) >= len(new)
    ds = ds.assign_coords(source=("row", np.where(is_new, source, old).astype(object)))
    return replace(
        real,
        ds=validate(ds, training=False),
        table=Table(np.c_[real.table.x[index], is_new], y, real.table.task[index]),
        columns=(*real.columns, f"source={source}"),
        measured=np.r_[real.measured, np.zeros(rows, bool)],
        origin=np.r_[real.origin, origin],
        group=np.r_[real.group, np.full(rows, -1)],
        simulated={output: np.r_[cells, np.full(rows, math.nan)] for output, cells in real.simulated.items()},
    )


# ------------------------------------------------------------------------------------------------ folds
@dataclass(frozen=True)
class Episode:
    """A held-out task in one split of its rows; all are row numbers of the set.

    Attributes:
        task, split: Name of the task, number of the split.
        pool: Rows that become known, in order.
        test: Rows that are scored.
        inverse: Those of them whose sought input is scored.
        cheap: The task's rows of other sources, known from the start. Leave out `peeking` ones for the inverse.
        peeking: Those of them that were simulated at the settings of a test row, and so show the input sought.
        ks: Numbers of known rows that the protocol asks for and the pool has.
    """

    task: str
    split: int
    pool: np.ndarray
    test: np.ndarray
    inverse: np.ndarray
    cheap: np.ndarray
    peeking: np.ndarray
    ks: tuple[int, ...]

    def context_rows(self, k: int) -> np.ndarray:
        """The first k rows of the pool.

        Raises:
            DataError: the pool has fewer.
        """
        if not 0 <= k <= len(self.pool):
            raise DataError(f"k: found {k}, expected 0 to {len(self.pool)}, the pool of {self.task}")
        return self.pool[:k]


class Fold(NamedTuple):
    """Tasks to learn from and tasks to be recognised.

    Attributes:
        training: Names of the training tasks.
        held_out: Names of the held-out tasks, all eligible.
        rows: Rows of the training tasks, of every source.
        episodes: One for each held-out task and split.
        grid: Quantiles (40,) of the sought input in the training tasks, equal in prior weight; empty if none is sought.
    """

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    rows: np.ndarray
    episodes: tuple[Episode, ...]
    grid: np.ndarray


def folds(real: RealSet, num_folds: int = 5, seed: int = 0) -> list[Fold]:
    """Folds over tasks: each eligible task is held out once; tasks with fewer than min_rows rows are always among the
    training tasks. There are as many folds as eligible tasks, where these are fewer than `num_folds`. The episodes of a
    task do not depend on `seed`.

    Raises:
        DataError: no task is eligible, or nothing is left to learn from.
    """
    eligible = np.random.default_rng(seed).permutation(real.eligible())
    number = min(num_folds, len(eligible))
    if number < 1 or (number == 1 and len(real.tasks) == len(eligible)):
        raise DataError(f"{real.name}: found {len(eligible)} eligible of {len(real.tasks)} tasks; too few for a fold")
    found = []
    for fold in range(number):
        out = np.sort(eligible[fold::number])
        left = np.setdiff1d(np.arange(len(real.tasks)), out)
        episodes = [episode(real, t, split) for t in out for split in range(real.protocol["n_splits"])]
        names = [tuple(real.tasks[t] for t in part) for part in (left, out)]
        rows = np.flatnonzero(np.isin(real.table.task, left))
        found.append(Fold(names[0], names[1], rows, tuple(episodes), _grid(real, left, seed)))
    return found


def episode(real: RealSet, task: int, split: int) -> Episode:
    """Split `split` of the rows of task number `task`. Replicates (rows of one group) stay together."""
    protocol, group = real.protocol, real.group
    own = real.table.task == task
    rows = np.flatnonzero(own & real.measured & ~np.isnan(real.table.y).all(1))
    order = np.random.default_rng(100 + split).permutation(np.unique(group[rows]))
    tested = int(np.clip(round(protocol["test_frac"] * len(order)), protocol["test_min"], protocol["test_max"]))
    test = rows[np.isin(group[rows], order[:tested])]
    parts = [rows[group[rows] == g] for g in order[tested:]]
    if protocol.get("one_per_group"):
        parts = [part[:1] for part in parts]
    else:
        parts = [np.random.default_rng(split).permutation(part) for part in parts]
    pool = np.concatenate([np.zeros(0, int), *parts])
    inverse = test[:0]
    if real.sought is not None:
        inverse = test[: protocol["inv_rows"]]
        inverse = inverse[~np.isnan(real.table.x[inverse, real.columns.index(real.sought)])]
    cheap = np.flatnonzero(own & ~real.measured)
    peeking = cheap[np.isin(real.origin[cheap], test)]
    ks = tuple(k for k in protocol["ks"] if k <= len(pool))
    return Episode(real.tasks[task], split, pool, test, inverse, cheap, peeking, ks)


def _grid(real: RealSet, tasks: np.ndarray, seed: int) -> np.ndarray:
    if real.sought is None:
        return np.zeros(0)
    rng = np.random.default_rng(seed)
    x = real.table.x[:, real.columns.index(real.sought)]
    rows = [np.flatnonzero(real.measured & (real.table.task == t)) for t in tasks]
    seen = x[np.concatenate([rng.permutation(part)[:PER_TASK] for part in rows])]
    return np.quantile(seen[~np.isnan(seen)], (np.arange(GRID) + 0.5) / GRID)


# ------------------------------------------------------------------------------------------------ scores
def mixture_scores(y: np.ndarray, weights: np.ndarray, means: np.ndarray, sds: np.ndarray) -> dict[str, np.ndarray]:
    r"""Scores (...) of mixtures of S normals at y (...), NaN where y is: negative log density, whether the central 90 %
    interval covers, and the continuous ranked probability score

    .. math:: \sum_i w_i A(y - m_i, s_i^2) - \tfrac12 \sum_{ij} w_i w_j A(m_i - m_j, s_i^2 + s_j^2),
        \quad A(m, s^2) = 2 s \varphi(m / s) + m (2 \Phi(m / s) - 1)

    Arguments:
        weights, means, sds: (..., S), or what broadcasts to it; weights sum to 1.

    Raises:
        DataError: weights that do not sum to 1, or a standard deviation that is not positive.
    """
    y = np.asarray(y, float)
    parts = np.broadcast_arrays(y[..., None], *(np.asarray(part, float) for part in (weights, means, sds)))
    shape, number = parts[0].shape[:-1], parts[0].shape[-1]
    value, w, m, s = (part.reshape(-1, number) for part in parts)
    if len(w) and not np.abs(w.sum(1) - 1).max() < 1e-5:
        raise DataError(f"weights, row {_first(np.abs(w.sum(1) - 1) >= 1e-5)}: expected a sum of 1")
    if not (s > 0).all():
        raise DataError(f"sds, row {_first((~(s > 0)).any(1))}: expected positive numbers")
    z = (value - m) / s
    with np.errstate(divide="ignore"):
        nlpd = -logsumexp(np.log(w) - z**2 / 2 - np.log(s), axis=1) + math.log(2 * math.pi) / 2
    below = (w * ndtr(z)).sum(1)
    spread = np.empty(len(w))
    block = max(1, 2_000_000 // number**2)
    for i in range(0, len(w), block):
        a, b, c = (part[i : i + block] for part in (w, m, s))
        apart = _absolute(b[:, :, None] - b[:, None], np.hypot(c[:, :, None], c[:, None]))
        spread[i : i + block] = np.einsum("ri,rij,rj->r", a, apart, a)
    crps = (w * _absolute(value - m, s)).sum(1) - spread / 2
    cover = np.where(np.isnan(below), math.nan, (below >= 0.05) & (below <= 0.95))
    found = {"crps": crps, "nlpd": nlpd, "coverage90": cover}
    return {score: cells.reshape(shape) for score, cells in found.items()}


def draw_scores(y: np.ndarray, draws: np.ndarray, width: float | None = None) -> dict[str, np.ndarray]:
    r"""Scores (...) of S draws (..., S) at y (...), NaN where y is. The ranked probability score is without bias,
    :math:`\sum_i |x_i - y| / S - \sum_{i<j} |x_i - x_j| / (S (S - 1))`, and so is the coverage of the interval.

    Arguments:
        draws: At least 20.
        width: Standard deviation of a normal about each draw; gives the negative log density.

    Raises:
        DataError: fewer than 20 draws, which have no 90 % interval.
    """
    y, draws = np.asarray(y, float), np.sort(np.asarray(draws, float), -1)
    number = draws.shape[-1]
    if number < 20:
        raise DataError(f"draws: found {number}, expected at least 20")
    weights = np.full(draws.shape, 1 / number)
    away = np.abs(draws - y[..., None]).mean(-1)
    lower, upper = np.quantile(draws, (0.05, 0.95), axis=-1, method="weibull")
    cover = np.where(np.isnan(away), math.nan, (y >= lower) & (y <= upper))
    found = {"crps": away - _half_spread(draws, weights) * number / (number - 1), "coverage90": cover}
    return found if width is None else found | {"nlpd": _kernel_nlpd(y, draws, weights, width)}


def grid_scores(
    truth: np.ndarray, weights: np.ndarray, grid: np.ndarray, width: float = KERNEL
) -> dict[str, np.ndarray]:
    """Scores (M,) of weights (M, G), each row of sum 1, on a sorted grid (G,): the ranked probability score of the
    points, the negative log density of normals of standard deviation `width` about them (at most 27.6)."""
    points, truth = np.broadcast_to(grid, weights.shape), np.asarray(truth, float)
    if len(weights) and not np.abs(weights.sum(1) - 1).max() < 1e-5:
        raise DataError(f"weights, row {_first(np.abs(weights.sum(1) - 1) >= 1e-5)}: expected a sum of 1")
    crps = (weights * np.abs(points - truth[:, None])).sum(1) - _half_spread(points, weights)
    return {"crps": crps, "nlpd": _kernel_nlpd(truth, points, weights, width)}


def _absolute(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """E|X| of a normal."""
    z = mean / sd
    return 2 * sd * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) + mean * (2 * ndtr(z) - 1)


def _half_spread(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """E|X - X'| / 2 of sorted points (..., S) with weights (..., S)."""
    below = np.cumsum(weights, -1)
    return (weights * points * (2 * below - weights - 1)).sum(-1)


def _kernel_nlpd(y: np.ndarray, points: np.ndarray, weights: np.ndarray, width: float) -> np.ndarray:
    z = (y[..., None] - points) / width
    with np.errstate(divide="ignore"):
        density = logsumexp(np.log(weights) - z**2 / 2, axis=-1) - math.log(width * math.sqrt(2 * math.pi))
    return -np.logaddexp(density, _FLOOR)


def _first(bad: np.ndarray) -> int:
    return int(np.flatnonzero(bad)[0])


# ------------------------------------------------------------------------------------------------ comparison
def records(
    real: RealSet, method: str, asked: Episode, k: int, scores: Mapping[str, np.ndarray], seed: int = 0
) -> list[dict[str, Any]]:
    """Scores of one method in one episode, averaged over rows: one record for each output that the test rows show, or
    one for the inverse.

    Arguments:
        scores: name to (M, Q) over the test rows and outputs, NaN where not measured; or to (M,) over the inverse rows.

    Raises:
        DataError: another shape, or a score is NaN where there is something to score.
    """
    forward = all(np.ndim(cells) == 2 for cells in scores.values())
    rows = asked.test if forward else asked.inverse
    seen = ~np.isnan(real.table.y[rows]) if forward else np.ones((len(rows), 1), bool)
    head = {"set": real.name, "method": method, "direction": "forward" if forward else "inverse", "k": k}
    head |= {"task": asked.task, "split": asked.split, "seed": seed}
    found: list[dict[str, Any]] = []
    for q, output in enumerate(real.outputs if forward else (str(real.sought),)):
        means = {}
        for score, cells in scores.items():
            if cells.shape != (seen.shape if forward else seen.shape[:1]):
                raise DataError(f"{method}, {score}: found shape {cells.shape}, expected {seen.shape}")
            column = cells.reshape(seen.shape)[seen[:, q], q]
            if np.isnan(column).any():
                raise DataError(f"{method}, {score} of {output}: found NaN for a measured cell of {asked.task}")
            means[score] = float(column.mean()) if len(column) else math.nan
        if seen[:, q].any():
            found.append(head | {"output": output} | means)
    return found


def by_task(found: Iterable[Mapping[str, Any]] | pd.DataFrame, common_k: int | None = None) -> pd.DataFrame:
    """Means over splits and seeds, then outputs: one row for each set, method, direction, k and task.

    Arguments:
        common_k: for k up to this, only tasks that have every such k, so that a curve over k is of the same tasks.
    """
    table = pd.DataFrame(found)
    scores = [score for score in SCORES if score in table]
    table = table.groupby([*_CELL, "task", "output"])[scores].mean().groupby([*_CELL, "task"]).mean().reset_index()
    if common_k is not None:
        early = table[table.k <= common_k]
        have = early.groupby(["set", "method", "direction", "task"]).k.transform("nunique")
        want = early.groupby(["set", "method", "direction"]).k.transform("nunique")
        table = table.drop(early.index[have < want])
    return table


def aggregate(found: Iterable[Mapping[str, Any]] | pd.DataFrame, common_k: int | None = None) -> pd.DataFrame:
    """Means over tasks of `by_task`, standard errors (`crps_error`, …) and the number of tasks, indexed by set, method,
    direction and k; k = "pooled" is the mean over each task's k, then over tasks."""
    table = by_task(found, common_k)
    scores = [score for score in SCORES if score in table]
    pooled = table.groupby([*_CELL[:3], "task"])[scores].mean().reset_index().assign(k="pooled")
    groups = pd.concat([table.astype({"k": object}), pooled]).groupby(_CELL, sort=False)[scores]
    error = groups.sem().add_suffix("_error")
    return pd.concat([groups.mean(), error, groups.size().rename("tasks")], axis=1)


class Difference(NamedTuple):
    """Of a method to another, tasks paired; errors are standard errors over tasks.

    Attributes:
        mean, error: Of the difference.
        ratio, ratio_error: Of the means, the error by the delta method.
        tasks: Number of tasks.
    """

    mean: float
    error: float
    ratio: float
    ratio_error: float
    tasks: int


def paired(
    found: Iterable[Mapping[str, Any]] | pd.DataFrame,
    method: str,
    other: str,
    score: str = "crps",
    direction: str = "forward",
    ks: Sequence[int] | None = None,
) -> Difference:
    """`method` less `other` on one set, task by task, each task's mean over `ks` (default: all it has).

    Raises:
        DataError: the two were not scored on the same tasks, splits, outputs and k.
    """
    table = pd.DataFrame(found)
    table = table[(table.direction == direction) & table.method.isin([method, other])]
    if table["set"].nunique() > 1:
        raise DataError(f"found the sets {sorted(table['set'].unique())}, expected records of one")
    table = table if ks is None else table[table.k.isin(ks)]
    sides = [table[table.method == side] for side in (method, other)]
    keys = [set(zip(*(side[c] for c in ("task", "split", "output", "k")), strict=True)) for side in sides]
    if keys[0] != keys[1] or not keys[0]:
        example = sorted(keys[0] ^ keys[1], key=str)[:1]
        raise DataError(f"{method} and {other}: found {example or 'no record'} in one only, expected the same episodes")
    a, b = (by_task(side).groupby("task")[score].mean() for side in sides)
    number, ratio = len(a), float(a.mean() / b.mean())
    error = (a - ratio * b).std() / math.sqrt(number) / b.mean()
    return Difference(float((a - b).mean()), float((a - b).sem()), ratio, float(abs(error)), number)
