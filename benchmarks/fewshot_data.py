r"""Real multi-task tables for the few-shot benchmark: rows, folds over tasks, scores and paired comparisons.

A set is a folder with a csv and a ``meta.json`` that names columns, transforms and protocol; nothing here knows a set
by name. In each split of a held-out task, some rows are the test, the others an ordered pool whose first k are known.
All numbers are in standard deviations of the whole set's measured rows, after each column's transform.

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
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from scipy.special import logsumexp, ndtr

from benchmarks.fewshot_peers import Table
from pyro_invman.data import from_columns, validate
from pyro_invman.variables import DataError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FEWEST = 10  # rows that make a level of its own
GRID, PER_TASK = 40, 40  # points of the inverse's grid; most rows of a task that make it
KERNEL = 0.15  # standard deviation of the normals about its points
FLOOR = 1e-12  # added to their density
SCORES = ("crps", "nlpd", "coverage90")
Scores = dict[str, np.ndarray]
Records: TypeAlias = Iterable[Mapping[str, Any]] | pd.DataFrame
_ROLES = {"x": "parameter", "eta": "condition", "y": "observation"}
_CASE = ["set", "method", "direction", "k"]


# ------------------------------------------------------------------------------------------------ sets
@dataclass(frozen=True)
class RealSet:
    """A table as this package (`ds`) and as its peers (`table`) see it, row by row the same.

    Attributes:
        name: Folder of the set.
        ds: Standardised columns of support "real", with attributes transform, natural_units, mean, sd and unusable (how
            many recorded cells the transform cannot take: NaN); categorical conditions; coordinates task and source.
        table: Inputs (N, P), outputs (N, Q), task numbers (N,). Categories and sources are 0/1 for each level, and for
            "not measured", of at least 10 rows.
        columns, outputs: Names of the inputs and outputs.
        sought: The input that the inverse asks for, or None.
        tasks: Names by task number.
        measured: Rows (N,) of the source of record. The others are cheap: always known, never scored.
        origin: The measured row that a simulated one belongs to; else the row itself (N,).
        group: Replicates share a number (N,).
        simulated: Output to simulated cells (N,), where ``sim_<output>`` is declared.
        protocol: As in meta.json.
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

    def scorable(self) -> np.ndarray:
        """Measured rows (N,) that show an output."""
        return self.measured & ~np.isnan(self.table.y).all(1)

    def eligible(self) -> np.ndarray:
        """Numbers of the tasks with at least min_rows scorable rows."""
        rows = np.bincount(self.table.task[self.scorable()], minlength=len(self.tasks))
        return np.flatnonzero(rows >= self.protocol["min_rows"])


def load(name: str, low_source: bool = False, data: Path = DATA) -> RealSet:
    """The set in the folder `name`. Columns that do not vary are left out (``ds.attrs["left_out"]``); levels of fewer
    than 10 rows are pooled into "other".

    Arguments:
        low_source: also the rows of other sources, where a source of record is declared.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: a column is not there, a transform is unknown, nothing varies that could be scored.
    """
    meta = json.loads((data / name / "meta.json").read_text())
    raw = pd.read_csv(data / name / meta["csv"], low_memory=False)
    source, task, group = meta.get("source"), meta.get("task", "task"), meta.get("group")
    specs = {c["col"]: c | {"role": role} for key, role in _ROLES.items() for c in meta.get(key, [])}
    twins = {c: c.removeprefix("sim_") for c in meta.get("simulation_columns", [])}
    classes, labels = meta.get("categorical", []), [task, group, source and source["column"]]
    for column in [*specs, *classes, *twins, *filter(None, labels)]:
        if column not in raw:
            raise DataError(f"{name}: found no column {column!r}, which meta.json declares; known: {list(raw)}")
    if source and not low_source:
        raw = raw[raw[source["column"]] == source["high"]].reset_index(drop=True)
    measured = (raw[source["column"]] == source["high"]).to_numpy() if source else np.ones(len(raw), bool)

    cells, attrs = {}, {}
    for column, spec in specs.items():
        values, unusable = _transformed(raw[column], spec["transform"])
        seen = values[measured & ~np.isnan(values)]
        if len(seen) and seen.min() < seen.max():
            mean, sd = float(seen.mean()), float(seen.std())
            cells[column] = (values - mean) / sd
            attrs[column] = {"transform": spec["transform"], "natural_units": spec.get("unit", "")}
            attrs[column] |= {"mean": mean, "sd": sd, "unusable": unusable}
    outputs = tuple(c for c in cells if specs[c]["role"] == "observation")
    inputs = tuple(c for c in cells if c not in outputs)
    sought = meta.get("inverse", {}).get("col")
    if not outputs or (sought and sought not in inputs):
        raise DataError(f"{name}: found no values that vary in {sought if outputs else 'any output'}; nothing to score")
    texts = {c: raw[c].astype(str).where(raw[c].notna(), "") for c in classes}
    flags = _flags(texts | ({"source": raw[source["column"]].astype(str)} if source else {}))
    texts = {c: s.where((s == "") | (s.map(s.value_counts()) >= FEWEST), "other") for c, s in texts.items()}
    texts = {c: s for c, s in texts.items() if s[s != ""].nunique() > 1}
    ds = from_columns(
        cells | {c: s.to_numpy(object) for c, s in texts.items()},
        roles={c: specs[c]["role"] for c in cells} | dict.fromkeys(texts, "condition"),
        supports=dict.fromkeys(texts, "categorical"),
        task=raw[task].to_numpy(object),
        source=raw[source["column"]].to_numpy(object) if source else None,
    )
    for column, described in attrs.items():
        ds[column].attrs.update(described)
    ds.attrs["left_out"] = [c for c in raw if c not in ds.data_vars and c not in labels]
    simulated = {}
    for column, output in twins.items():
        if output != column and output in outputs:
            values = _transformed(raw[column], attrs[output]["transform"])[0]
            simulated[output] = (values - attrs[output]["mean"]) / attrs[output]["sd"]
    number, names = pd.factorize(ds["task"].values)
    replicates = np.where(measured, np.arange(len(raw)), -1)
    if group:  # numbered by measured rows alone: the same splits with and without the other sources
        replicates[measured] = pd.factorize(raw.loc[measured, group])[0]
    return RealSet(
        name=name,
        ds=ds,
        table=Table(
            np.stack([*(cells[c] for c in inputs), *flags.values()], 1),
            np.stack([cells[c] for c in outputs], 1),
            number,
        ),
        columns=(*inputs, *flags),
        outputs=outputs,
        sought=sought,
        tasks=tuple(map(str, names)),
        measured=measured,
        origin=np.arange(len(raw)),
        group=replicates,
        simulated=simulated,
        protocol=meta["protocol"],
    )


def _transformed(cells: pd.Series, transform: str) -> tuple[np.ndarray, int]:
    """Cells (N,) after "lin", "log10" or "log10+offset", and how many recorded ones it cannot take (NaN there)."""
    values = pd.to_numeric(cells, errors="coerce").to_numpy(float)
    if transform.startswith("log10"):
        shifted = values + float(transform[5:] or 0.0)
        values = np.log10(shifted, out=np.full(len(values), math.nan), where=shifted > 0)
    elif transform != "lin":
        raise DataError(f"{cells.name}: found the transform {transform!r}, expected lin, log10 or log10+offset")
    values = np.where(np.isfinite(values), values, math.nan)
    return values, int((np.isnan(values) & cells.notna().to_numpy()).sum())


def _flags(texts: Mapping[str, pd.Series]) -> Scores:
    """0/1 for each level ("": not measured) of at least 10 rows but not all."""
    return {
        f"{column}={level or 'not measured'}": (cells == level).to_numpy(float)
        for column, cells in texts.items()
        for level, rows in cells.value_counts().items()
        if FEWEST <= rows < len(cells)
    }


def with_simulated_source(
    real: RealSet, outputs: Sequence[str] | None = None, source: str = "simulation", measured: str = "measured"
) -> RealSet:
    """The set with a further row, of a source of its own, for each measured row with simulated outputs: the same
    settings and task, the simulated values for outputs. The first N rows and the splits are those of `real`.

    Arguments:
        outputs: Those that the new rows show; by default all in ``real.simulated``.
        source, measured: Name of the new source, and of the old rows where they have none.

    Raises:
        DataError: an output that is not simulated, or none is.
    """
    chosen = tuple(real.simulated) if outputs is None else tuple(outputs)
    unknown = [output for output in chosen if output not in real.simulated]
    if unknown or not chosen:
        raise DataError(f"{real.name}: found no simulated column for {unknown}; known: {sorted(real.simulated)}")
    new = np.full(real.table.y.shape, math.nan)
    for output in chosen:
        new[:, real.outputs.index(output)] = real.simulated[output]
    origin = np.flatnonzero(real.measured & ~np.isnan(new).all(1))
    index = np.r_[np.arange(len(new)), origin]
    is_new = np.arange(len(index)) >= len(new)
    y = np.concatenate([real.table.y, new[origin]])
    ds = real.ds.isel(row=index)
    ds = ds.assign({output: ("row", y[:, q], ds[output].attrs) for q, output in enumerate(real.outputs)})
    old = ds["source"].values if "source" in ds.coords else np.full(len(index), measured, object)
    ds = ds.assign_coords(source=("row", np.where(is_new, source, old).astype(object)))
    left_out = [column for column in ds.attrs["left_out"] if column.removeprefix("sim_") not in chosen]
    return replace(
        real,
        ds=validate(ds.assign_attrs(left_out=left_out), training=False),
        table=Table(np.c_[real.table.x[index], is_new], y, real.table.task[index]),
        columns=(*real.columns, f"source={source}"),
        measured=real.measured[index] & ~is_new,
        origin=np.r_[real.origin, origin],
        group=np.where(is_new, -1, real.group[index]),
        simulated={output: np.where(is_new, math.nan, cells[index]) for output, cells in real.simulated.items()},
    )


# ------------------------------------------------------------------------------------------------ folds
class Episode(NamedTuple):
    """One split of a held-out task, as row numbers of the set.

    Attributes:
        task, split: Name of the task, number of the split.
        pool: Rows that become known, in this order.
        test: Rows that are scored.
        inverse: Those of them whose sought input is scored.
        cheap: The task's rows of other sources, known from the start.
        peeking: Those of them at the settings of a test row; they show the input sought: not for the inverse.
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
        """The first k rows of the pool; DataError where it has fewer."""
        if not 0 <= k <= len(self.pool):
            raise DataError(f"k: found {k}, expected 0 to {len(self.pool)}, the pool of {self.task}")
        return self.pool[:k]


class Fold(NamedTuple):
    """Tasks to learn from and eligible tasks held out, by name; the training tasks' `rows`; an episode for each
    held-out task and split; `grid` (40,), equally likely quantiles of the sought input in the training tasks."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    rows: np.ndarray
    episodes: tuple[Episode, ...]
    grid: np.ndarray


def folds(real: RealSet, num_folds: int = 5, seed: int = 0) -> list[Fold]:
    """Each eligible task is held out in one fold; tasks with fewer than min_rows rows are always training tasks. A set
    with fewer eligible tasks than `num_folds` has a fold for each. Episodes do not depend on `seed`.

    Raises:
        DataError: no task is eligible, or none would be left to learn from.
    """
    eligible = np.random.default_rng(seed).permutation(real.eligible())
    number = min(num_folds, len(eligible))
    if number < 1 or (number == 1 and len(eligible) == len(real.tasks)):
        raise DataError(f"{real.name}: found {len(eligible)} eligible of {len(real.tasks)} tasks, too few for a fold")
    found = []
    for out in (np.sort(eligible[fold::number]) for fold in range(number)):
        left = np.setdiff1d(np.arange(len(real.tasks)), out)
        training, held_out = (tuple(real.tasks[t] for t in part) for part in (left, out))
        rows = np.flatnonzero(np.isin(real.table.task, left))
        episodes = [episode(real, t, split) for t in out for split in range(real.protocol["n_splits"])]
        found.append(Fold(training, held_out, rows, tuple(episodes), _grid(real, left, seed)))
    return found


def episode(real: RealSet, task: int, split: int) -> Episode:
    """Split `split` of task number `task`, as the protocol has it; rows of one group stay together."""
    protocol, group, own = real.protocol, real.group, real.table.task == task
    rows = np.flatnonzero(own & real.scorable())
    order = np.random.default_rng(100 + split).permutation(np.unique(group[rows]))
    tested = int(np.clip(round(protocol["test_frac"] * len(order)), protocol["test_min"], protocol["test_max"]))
    test = rows[np.isin(group[rows], order[:tested])]
    pool = [np.random.default_rng(split).permutation(rows[group[rows] == g]) for g in order[tested:]]
    if protocol.get("one_per_group"):
        pool = [np.sort(part)[:1] for part in pool]
    known = np.concatenate([rows[:0], *pool])
    inverse = test[: protocol["inv_rows"]] if real.sought else test[:0]
    if real.sought:
        inverse = inverse[~np.isnan(real.table.x[inverse, real.columns.index(real.sought)])]
    cheap = np.flatnonzero(own & ~real.measured)
    peeking = cheap[np.isin(real.origin[cheap], test)]
    ks = tuple(k for k in protocol["ks"] if k <= len(known))
    return Episode(real.tasks[task], split, known, test, inverse, cheap, peeking, ks)


def _grid(real: RealSet, tasks: np.ndarray, seed: int) -> np.ndarray:
    if not real.sought:
        return np.zeros(0)
    rng, x = np.random.default_rng(seed), real.table.x[:, real.columns.index(real.sought)]
    rows = [np.flatnonzero(real.measured & (real.table.task == t)) for t in tasks]
    seen = x[np.concatenate([rng.permutation(part)[:PER_TASK] for part in rows])]
    return np.quantile(seen[~np.isnan(seen)], (np.arange(GRID) + 0.5) / GRID)


# ------------------------------------------------------------------------------------------------ scores
def mixture_scores(y: np.ndarray, weights: np.ndarray, means: np.ndarray, sds: np.ndarray) -> Scores:
    r"""Scores (...) at y (...) of mixtures of normals, weights, means and sds (..., S): negative log density, whether
    the central 90 % interval covers, and the continuous ranked probability score

    .. math:: \sum_i w_i A(y - m_i, s_i) - \tfrac12 \sum_{ij} w_i w_j A(m_i - m_j, \sqrt{s_i^2 + s_j^2}),
        \quad A(m, s) = 2 s \varphi(m / s) + m (2 \Phi(m / s) - 1)

    Raises:
        DataError: weights that do not sum to 1, or a standard deviation that is not positive.
    """
    parts = np.broadcast_arrays(*(np.asarray(part, float) for part in (np.asarray(y)[..., None], weights, means, sds)))
    shape, number = parts[0].shape[:-1], parts[0].shape[-1]
    value, w, m, s = (part.reshape(-1, number) for part in parts)
    _check("weights, sum", w.sum(1), np.abs(w.sum(1) - 1) < 1e-5, "1")
    _check("sds, smallest", s.min(1), s.min(1) > 0, "a positive number")
    z = (value - m) / s
    with np.errstate(divide="ignore"):
        nlpd = -logsumexp(np.log(w) - z**2 / 2 - np.log(s), axis=1) + math.log(2 * math.pi) / 2
    below, spread = (w * ndtr(z)).sum(1), np.empty(len(w))
    block = max(1, 2_000_000 // number**2)
    for i in range(0, len(w), block):
        a, b, c = (part[i : i + block] for part in (w, m, s))
        apart = _absolute(b[:, :, None] - b[:, None], np.hypot(c[:, :, None], c[:, None]))
        spread[i : i + block] = np.einsum("ri,rij,rj->r", a, apart, a)
    crps = (w * _absolute(value - m, s)).sum(1) - spread / 2
    cover = np.where(np.isnan(below), math.nan, (below >= 0.05) & (below <= 0.95))
    return {score: cells.reshape(shape) for score, cells in zip(SCORES, (crps, nlpd, cover), strict=True)}


def draw_scores(y: np.ndarray, draws: np.ndarray, width: float | None = None) -> Scores:
    r"""Scores (...) at y (...) of draws (..., S), at least 20: the ranked probability score without bias,
    :math:`\sum_i |x_i - y| / S - \sum_{i<j} |x_i - x_j| / (S (S - 1))`, whether the 90 % interval covers, and, given
    the `width` (standard deviation) of a normal about each draw, the negative log density (at most 27.6)."""
    y, draws = np.asarray(y, float), np.sort(np.asarray(draws, float), -1)
    number = draws.shape[-1]
    _check("draws", np.array([number]), np.array([number >= 20]), "at least 20")
    weights, away = np.full(draws.shape, 1 / number), np.abs(draws - y[..., None]).mean(-1)
    lower, upper = np.quantile(draws, (0.05, 0.95), axis=-1, method="weibull")
    cover = np.where(np.isnan(away), math.nan, (y >= lower) & (y <= upper))
    found = {"crps": away - _half_spread(draws, weights) * number / (number - 1), "coverage90": cover}
    return found if width is None else found | {"nlpd": _kernel_nlpd(y, draws, weights, width)}


def grid_scores(truth: np.ndarray, weights: np.ndarray, grid: np.ndarray, width: float = KERNEL) -> Scores:
    """Scores at the truth (M,) of weights (M, G) on a sorted grid (G,): the ranked probability score of the points, and
    the negative log density of normals of standard deviation `width` about them (at most 27.6)."""
    points, truth = np.broadcast_to(grid, weights.shape), np.asarray(truth, float)
    _check("weights, sum", weights.sum(1), np.abs(weights.sum(1) - 1) < 1e-5, "1")
    crps = (weights * np.abs(points - truth[:, None])).sum(1) - _half_spread(points, weights)
    return {"crps": crps, "nlpd": _kernel_nlpd(truth, points, weights, width)}


def _check(what: str, found: np.ndarray, fine: np.ndarray, expected: str) -> None:
    if not fine.all():
        row = int(np.flatnonzero(~fine)[0])
        raise DataError(f"{what}, row {row}: found {found[row]:g}, expected {expected}")


def _absolute(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """E|X| of a normal."""
    z = mean / sd
    return 2 * sd * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) + mean * (2 * ndtr(z) - 1)


def _half_spread(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """E|X - X'| / 2 of sorted points (..., S) with weights (..., S)."""
    return (weights * points * (2 * np.cumsum(weights, -1) - weights - 1)).sum(-1)


def _kernel_nlpd(y: np.ndarray, points: np.ndarray, weights: np.ndarray, width: float) -> np.ndarray:
    z = (y[..., None] - points) / width
    return -np.log((weights * np.exp(-(z**2) / 2)).sum(-1) / (width * math.sqrt(2 * math.pi)) + FLOOR)


# ------------------------------------------------------------------------------------------------ comparison
def records(real: RealSet, method: str, asked: Episode, k: int, scores: Scores, seed: int = 0) -> list[dict[str, Any]]:
    """Means over rows of scores (M, Q) over the test rows and outputs, NaN where not measured (a record for each output
    shown), or of scores (M,) over the inverse rows (a record, or none where there is no such row).

    Raises:
        DataError: another shape, or NaN where there is something to score.
    """
    forward = all(cells.ndim == 2 for cells in scores.values())
    seen = ~np.isnan(real.table.y[asked.test]) if forward else np.ones((len(asked.inverse), 1), bool)
    case = {"set": real.name, "method": method, "direction": "forward" if forward else "inverse", "k": k}
    found = []
    for q, output in enumerate(real.outputs if forward else [real.sought]):
        record: dict[str, Any] = case | {"task": asked.task, "split": asked.split, "seed": seed, "output": output}
        for score, cells in scores.items():
            if cells.shape != (seen.shape if forward else (len(seen),)):
                raise DataError(f"{method}, {score}: found shape {cells.shape}, expected {seen.shape}")
            column = cells.reshape(seen.shape)[seen[:, q], q]
            if np.isnan(column).any():
                raise DataError(f"{method}, {score} of {output} in {asked.task}: found NaN where a cell is measured")
            record[score] = float(column.sum() / max(len(column), 1))
        found += [record] * bool(seen[:, q].any())
    return found


def by_task(found: Records) -> pd.DataFrame:
    """Means over splits and seeds, then over outputs, indexed by set, method, direction, k and task."""
    table = pd.DataFrame(found)
    scores = [score for score in SCORES if score in table]
    return table.groupby([*_CASE, "task", "output"])[scores].mean().groupby([*_CASE, "task"]).mean()


def aggregate(found: Records) -> pd.DataFrame:
    """Means of `by_task` over tasks, their standard errors (``crps_error``, …) and the number of tasks, indexed by set,
    method, direction and k, and with k = "pooled" for the mean over each task's k."""
    table = by_task(found)
    pooled = table.groupby([*_CASE[:3], "task"]).mean().assign(k="pooled").reset_index()
    groups = pd.concat([table.reset_index().astype({"k": object}), pooled]).groupby(_CASE, sort=False)
    scores = groups[list(table.columns)]
    return pd.concat([scores.mean(), scores.sem().add_suffix("_error"), groups.size().rename("tasks")], axis=1)


class Difference(NamedTuple):
    """Of one method to another: mean difference, ratio of means, and their standard errors over so many tasks."""

    mean: float
    error: float
    ratio: float
    ratio_error: float
    tasks: int


def paired(
    found: Records,
    method: str,
    other: str,
    score: str = "crps",
    direction: str = "forward",
    ks: Sequence[int] | None = None,
) -> Difference:
    """`method` less `other` on one set, task by task, each task at its mean over `ks` (default: all that it has).

    Raises:
        DataError: several sets, or the two were not scored on the same tasks, splits, outputs and k.
    """
    table = pd.DataFrame(found)
    table = table[(table.direction == direction) & (table.k.isin(ks) if ks is not None else True)]
    sides = [table[table.method == side] for side in (method, other)]
    keys = [set(side[["set", "task", "split", "output", "k"]].itertuples(index=False, name=None)) for side in sides]
    if keys[0] != keys[1] or len({key[0] for key in keys[0]}) != 1:
        example = sorted(keys[0] ^ keys[1], key=str)[:1] or sorted({key[0] for key in keys[0]})
        raise DataError(f"{method} and {other}: found {example}, expected the same episodes of one set for both")
    a, b = (by_task(side).groupby("task")[score].mean() for side in sides)
    ratio = float(a.mean() / b.mean())
    return Difference(
        float((a - b).mean()), float((a - b).sem()), ratio, float((a - ratio * b).sem() / abs(b.mean())), len(a)
    )
