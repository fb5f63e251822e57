"""Which measurement next, on a learned manifold: regret curves beside random choice and a Gaussian process's variance.

    melt_pool       hidden absorptivity and beam offset of fresh tasks of the melt-pool simulator, from 60 candidate
                    tracks a task, of which each shows what an experiment would have recorded; error by number of rows.
    two_sources     the same beside 60 rows a task of the analytic source, at a tenth of the cost; error by total cost.
    meltpoolnet, mpea, warfarin_pkpd
                    replays: choose from the measured rows of a held-out task, score the density of its test rows.

One manifold a set (warfarin: two, of halves of its subjects), which serves every way of choosing; only the choice
differs. That of the simulator stands on its closed form, without training. ``gain`` is `pim.design.Campaign` with a
shortlist of four and 32 draws; ``closed form`` the same without one; ``random`` the mean of several orders;
``variance`` takes the candidate whose measured outputs have the largest total predictive variance in the multitask
Gaussian process of `benchmarks.fewshot_peers`, fitted to the training tasks; ``cost-blind`` is ``gain`` without regard
to cost.

    python -m benchmarks.campaign [--parts ...] [--tasks 20] [--cache FOLDER] [--resume]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import pyro_invman as pim
from benchmarks import fewshot_data
from benchmarks.fewshot_peers import MultitaskGP, Table
from benchmarks.sbi import machine, versions
from pyro_invman.data import to_tensor, variables_of
from pyro_invman.design.campaign import Campaign
from pyro_invman.simulators import melt_pool

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = ("absorptivity", "beam_offset_um")
CONDITIONS = melt_pool.VARIABLES.with_role("condition")
OUTPUTS = melt_pool.VARIABLES.with_role("observation")
INPUTS = ("power_W", "speed_mm_s", "beam_um", "layer_um", *CONDITIONS)
SHOTS = 16  # rows a design may ask for, of the simulator
BUDGET = 80.0  # cost it may spend, of two sources
COSTS = {"experiment": 10.0, "analytic": 1.0}
REPLAYED = {"meltpoolnet": (16, 20, 1), "mpea": (14, 20, 1), "warfarin_pkpd": (7, 16, 2)}
"""Fewest rows of a task that is held out, tasks held out of a fit, and fits."""
MOST = 10  # rows of a replay
ORDERS = 4  # random ones of the simulator's rows
REPLAYS = 3  # and of a replay's
SHORTLIST = 4
SHOWN = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # rows after which hidden truths are inferred
PARTICLES = 128
Curve = list[float]
Choose = Callable[[xr.Dataset, list[int]], int]
Cell = dict[str, Any]


# ------------------------------------------------------------------------------------------------ the simulator
def training(seed: int, tasks: int = 640, rows: int = 16) -> xr.Dataset:
    """Tasks of both sources; hidden truths are known in one row of each, and are evidence of the task."""
    ds = melt_pool.simulate(tasks, rows, seed=1_000 + seed, sources=melt_pool.SOURCES, reveal_hidden=1.0)
    first = np.zeros(ds.sizes["row"], bool)
    first[np.unique(ds["task"].values, return_index=True)[1]] = True
    for name in HIDDEN:
        ds[name] = ds[name].copy(data=np.where(first, ds[name].values, math.nan))
        ds[name].attrs["informative"] = 1
    return ds


def fresh(seed: int, tasks: int) -> list[xr.Dataset]:
    """Tasks never seen, 60 rows of each source; hidden truths in every row."""
    ds = melt_pool.simulate(tasks, 60, seed=5_000 + seed, sources=melt_pool.SOURCES, reveal_hidden=1.0)
    names = ds["task"].values
    return [ds.isel(row=np.flatnonzero(names == name)) for name in dict.fromkeys(names)]


def blank(rows: xr.Dataset, outputs: Sequence[str]) -> xr.Dataset:
    """Rows as candidates: settings, and in ``measure`` what was recorded."""
    seen = np.stack([~np.isnan(rows[name].values) for name in outputs], -1)
    measure = [",".join(name for name, shown in zip(outputs, row, strict=True) if shown) for row in seen]
    kept = rows.drop_vars([name for name in (*outputs, *HIDDEN) if name in rows])
    return kept.assign_coords(measure=("row", measure))


def manifold_of(name: str, cache: Path | None, make: Callable[[], pim.ProcessManifold]) -> pim.ProcessManifold:
    """The manifold in the cache, or made and kept there."""
    if cache is not None and (cache / name / "schema.json").exists():
        found = pim.load(cache / name)
        assert isinstance(found, pim.ProcessManifold)
        return found
    began = time.process_time()
    made = make()
    print(f"{name}: fit {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
    if cache is not None:
        made.save(cache / name)
    return made


def of_melt_pool(seed: int, cache: Path | None) -> pim.ProcessManifold:
    """The simulator's manifold in closed form, experiments the reference."""

    def make() -> pim.ProcessManifold:
        ds = training(seed)
        return pim.ProcessManifold.from_dataset(ds, latent_dim=4, seed=seed, reference_source="experiment")

    return manifold_of("melt", cache, make)


def table_of(
    ds: xr.Dataset, scale: tuple[np.ndarray, np.ndarray] | None
) -> tuple[Table, tuple[np.ndarray, np.ndarray]]:
    """Logarithms in standard units, for the Gaussian process."""
    cells = np.log(np.stack([ds[name].values for name in (*INPUTS, *OUTPUTS)], -1))
    scale = scale or (np.nanmean(cells, 0), np.nanstd(cells, 0))
    cells = (cells - scale[0]) / scale[1]
    task = np.unique(ds["task"].values, return_inverse=True)[1]
    return Table(cells[:, : len(INPUTS)], cells[:, len(INPUTS) :], task), scale


def largest_variance(peer: MultitaskGP, table: Table, told: list[int], left: list[int]) -> int:
    """The row of most predictive variance, summed over the outputs that it would show."""
    _, sd = peer.condition(table.rows(np.array(told, int)))(table.x[left])
    shown = ~np.isnan(table.y[left])
    return left[int(np.where(shown, sd**2, 0.0).sum(1).argmax())]


def hidden_error(manifold: pim.ProcessManifold, known: xr.Dataset | None, task: xr.Dataset, seed: int) -> list[float]:
    """Errors of the posterior means of the hidden truths, by importance weights: the amortised belief was trained on
    settings drawn at random, which designed ones are not."""
    conditions = {name: float(task[name][0]) for name in CONDITIONS}
    torch.manual_seed(seed)
    task_known = manifold.infer_task(known, "importance", conditions=conditions, num_particles=4 * PARTICLES)
    mean = task_known.conditional(list(HIDDEN)).mean
    return [float(mean[j]) - float(task[name][0]) for j, name in enumerate(HIDDEN)]


def curve_of(
    manifold: pim.ProcessManifold, task: xr.Dataset, picks: Sequence[int], costs: Sequence[float]
) -> list[tuple[float, list[float]]]:
    """Total cost and errors after some of the `picks`, from none on."""
    rows = hide(task)
    found = [(0.0, hidden_error(manifold, None, task, 0))]
    for k in [k for k in SHOWN[1:] if k < len(picks)] + [len(picks)]:
        error = hidden_error(manifold, rows.isel(row=list(picks[:k])), task, k)
        found.append((float(sum(costs[:k])), error))
    return found


def hide(task: xr.Dataset) -> xr.Dataset:
    """Rows without the hidden truths."""
    return task.drop_vars(list(HIDDEN))


def designed(
    manifold: pim.ProcessManifold,
    task: xr.Dataset,
    among: Sequence[int],
    *,
    blind: bool = False,
    shortlist: int = SHORTLIST,
    shots: int = SHOTS,
    budget: float = math.inf,
) -> tuple[list[int], list[float]]:
    """Rows of a task in the order in which a campaign asks for them, and what each costs."""
    rows = task.isel(row=list(among))
    price = [COSTS[name] for name in rows["source"].values]
    candidates = blank(rows, OUTPUTS).assign_coords(cost=("row", price))
    conditions = {name: float(task[name][0]) for name in CONDITIONS}
    objective = {"parameters": list(HIDDEN)}
    cost = 1.0 if blind else "cost"
    campaign = Campaign(
        manifold, None, candidates, cost, objective, conditions=conditions, shortlist=shortlist, draws=32
    )
    picks: list[int] = []
    spent: list[float] = []
    known = hide(rows)
    while len(picks) < shots and sum(spent) < budget:
        chosen = campaign.suggest(1)["candidate"].values
        if not len(chosen):
            break
        picks.append(int(chosen[0]))
        spent.append(price[picks[-1]])
        campaign.tell(known.isel(row=chosen).assign_coords(candidate=("row", chosen)))
    return [among[p] for p in picks], spent


def melt_pool_part(seed: int, tasks: int, cache: Path | None, seconds: float, cell: Cell) -> Iterator[Cell]:
    """Error by number of rows; every way of choosing on the same tasks."""
    manifold = of_melt_pool(seed, cache)
    train, scale = table_of(experiments(training(seed)), None)
    peer = MultitaskGP()
    peer.fit(train, seed)
    for t, both in enumerate(fresh(seed, tasks)):
        if str(t) in cell:
            continue
        task = experiments(both)
        number, table = task.sizes["row"], table_of(task, scale)[0]
        found: Cell = {"truth": [float(task[name][0]) for name in HIDDEN]}
        ones = [1.0] * SHOTS
        found["gain"] = curve_of(manifold, task, designed(manifold, task, range(number))[0], ones)
        for order in range(ORDERS):
            random = np.random.default_rng(100 * t + order).permutation(number)[: 2 * SHOTS]
            found[f"random {order}"] = curve_of(manifold, task, random.tolist(), ones * 2)
        told: list[int] = []
        while len(told) < SHOTS:
            told.append(largest_variance(peer, table, told, [n for n in range(number) if n not in told]))
        found["variance"] = curve_of(manifold, task, told, ones)
        cell[str(t)] = found
        yield cell


def two_sources_part(seed: int, tasks: int, cache: Path | None, seconds: float, cell: Cell) -> Iterator[Cell]:
    """Error by total cost, experiments at 10 and analytic rows at 1."""
    manifold = of_melt_pool(seed, cache)
    for t, task in enumerate(fresh(seed, tasks)):
        if str(t) in cell:
            continue
        own = np.flatnonzero(task["source"].values == "experiment").tolist()
        every = list(range(task.sizes["row"]))
        found: Cell = {"truth": [float(task[name][0]) for name in HIDDEN]}
        for name, picks, costs in (
            ("gain per cost, two sources", *designed(manifold, task, every, shots=40, budget=BUDGET)),
            ("gain, experiments alone", *designed(manifold, task, own, shots=int(BUDGET / 10))),
            ("cost-blind, two sources", *designed(manifold, task, every, blind=True, shots=40, budget=BUDGET)),
        ):
            found[name] = curve_of(manifold, task, picks, costs)
        for order in range(ORDERS):
            random = np.random.default_rng(100 * t + order).permutation(every)
            price = np.array([COSTS[task["source"].values[n]] for n in random])
            within = int((np.cumsum(price) <= BUDGET).sum())
            found[f"random, two sources {order}"] = curve_of(manifold, task, random[:within].tolist(), price.tolist())
        cell[str(t)] = found
        yield cell


def experiments(ds: xr.Dataset) -> xr.Dataset:
    """The rows of the reference."""
    return ds.isel(row=np.flatnonzero(ds["source"].values == "experiment"))


# ------------------------------------------------------------------------------------------------ replays
def held_out(real: fewshot_data.RealSet) -> list[np.ndarray]:
    """Numbers of the tasks held out of each fit."""
    least, number, fits = REPLAYED[real.name]
    rows = np.bincount(real.table.task[real.scorable()], minlength=len(real.tasks))
    order = np.random.default_rng(0).permutation(np.flatnonzero(rows >= least))
    return [np.sort(order[number * f : number * (f + 1)]) for f in range(fits)]


@torch.no_grad()
def loss_of(manifold: pim.ProcessManifold, real: fewshot_data.RealSet, known: Sequence[int], test: np.ndarray) -> float:
    """Negative log predictive density of the test rows, nats a cell, in standard units."""
    task = manifold.infer_task(real.ds.isel(row=list(known)), num_particles=PARTICLES)
    rows = to_tensor(real.ds.isel(row=test), manifold.variables)
    names, total, number = manifold.variables.names, 0.0, 0
    given = {name: rows[:, j] for j, name in enumerate(names) if name not in real.outputs}
    for output in real.outputs:
        answer = rows[:, names.index(output)]
        seen = ~answer.isnan()
        if bool(seen.any()):
            asked = {name: value[seen] for name, value in given.items()}
            total -= float(task.conditional([output], asked).log_prob(answer[seen].unsqueeze(-1)).sum())
            number += int(seen.sum())
    return total / number


def replayed(manifold: pim.ProcessManifold, real: fewshot_data.RealSet, episode: Any, shortlist: int) -> list[int]:
    """Pool rows in the order in which a campaign that is to predict the test rows asks for them."""
    pool = real.ds.isel(row=episode.pool)
    at = real.ds.isel(row=episode.test)
    objective = {"predict": list(real.outputs), "at": at.drop_vars(list(real.outputs))}
    candidates = blank(pool, real.outputs)
    campaign = Campaign(manifold, None, candidates, None, objective, shortlist=shortlist, draws=32)
    picks: list[int] = []
    for _ in range(min(MOST, len(episode.pool))):
        chosen = campaign.suggest(1)["candidate"].values
        picks.append(int(chosen[0]))
        campaign.tell(pool.isel(row=chosen).assign_coords(candidate=("row", chosen)))
    return episode.pool[picks].tolist()


def replay_part(name: str, tasks: int, cache: Path | None, seconds: float, cell: Cell) -> Iterator[Cell]:
    """Loss on test rows by number of rows chosen."""
    real = fewshot_data.load(name)
    for fold, out in enumerate(held_out(real)):
        rows = np.flatnonzero(~np.isin(real.table.task, out))

        def make(rows: np.ndarray = rows) -> pim.ProcessManifold:
            ds = real.ds.isel(row=rows)
            made = pim.ProcessManifold(variables_of(ds), 8, seed=0)
            made.fit(ds, seed=0, max_seconds=seconds, progress=False)
            return made

        todo = [t for t in out[:tasks] if real.tasks[t] not in cell]
        if not todo:
            continue
        manifold, peer = manifold_of(f"{name}-{fold}", cache, make), MultitaskGP()
        peer.fit(real.table.rows(rows), 0)
        for t in todo:
            episode = fewshot_data.episode(real, int(t), 0)
            most = min(MOST, len(episode.pool))
            ways = {f"random {o}": random_order(episode, int(t), o)[:most] for o in range(REPLAYS)}
            ways["gain"] = replayed(manifold, real, episode, SHORTLIST)
            ways["closed form"] = replayed(manifold, real, episode, 0)
            told: list[int] = []
            while len(told) < most:
                told.append(largest_variance(peer, real.table, told, [n for n in episode.pool if n not in told]))
            ways["variance"] = told
            found: Cell = {}
            for way, order in ways.items():
                found[way] = [
                    loss_of(manifold, real, [int(n) for n in order[:k]], episode.test) for k in range(most + 1)
                ]
            cell[real.tasks[t]] = found
            yield cell


def random_order(episode: Any, task: int, order: int) -> list[int]:
    """The pool in a random order."""
    return np.random.default_rng(1_000 * task + order).permutation(episode.pool).tolist()


# ------------------------------------------------------------------------------------------------ tables
def needed(at: Sequence[float], curve: Sequence[float], goal: float) -> float:
    """Where a curve first reaches down to a goal, between points by straight lines; infinite where it does not."""
    points = list(zip(at, curve, strict=False))
    for (a, left), (b, right) in itertools.pairwise(points):
        if left <= goal:
            return float(a)
        if right <= goal:
            return float(a + (b - a) * (left - goal) / (left - right))
    return math.inf


def _spread(cell: Cell) -> np.ndarray:
    """Standard deviations (2,): of the absorptivities over tasks, and that of the law of beam offsets, since few tasks
    have but a few machines."""
    absorptivity = float(np.std([found["truth"][0] for found in cell.values()]))
    return np.array([absorptivity or 1.0, melt_pool.BEAM_OFFSET_UM / math.sqrt(3)])


def _error_by_rows(cell: Cell, way: str) -> np.ndarray:
    """Root mean square error over tasks by the rows of `SHOWN`, of each hidden truth in its standard deviations and of
    both together: (3, rows)."""
    curves = [[error for _, error in found[name]] for found in cell.values() for name in found if name in _named(way)]
    squares = ((np.array(curves) / _spread(cell)) ** 2).mean(0).T
    return np.sqrt(np.concatenate([squares, squares.mean(0, keepdims=True)]))


def _named(way: str) -> list[str]:
    return [way, *(f"{way} {order}" for order in range(ORDERS))]


def melt_pool_table(cell: Cell) -> str:
    """Errors by rows, and rows needed to the errors of random choice, of each hidden truth and of both."""
    ways = ("gain", "variance", "random")
    curves = {way: _error_by_rows(cell, way) for way in ways}
    lines = []
    for part, name in enumerate((*HIDDEN, "both")):
        lines += [f"| {name}, rows | " + " | ".join(ways) + " | gain needs for random's | variance needs |"]
        lines.append("|---" * 6 + "|")
        for place, k in enumerate(SHOWN):
            goal = float(curves["random"][part][place])
            errors = [f"{curves[way][part][place]:.3f}" if place < curves[way].shape[1] else "–" for way in ways]
            rows = [needed(SHOWN, curves[way][part].tolist(), goal) for way in ways[:-1]]
            lines.append(f"| {k} | " + " | ".join([*errors, *map(_number, rows)]) + " |")
        lines.append("")
    return "\n".join([*lines, f"{len(cell)} fresh tasks; errors in standard deviations of the truths."])


def _number(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.1f}"


def _error_by_cost(cell: Cell, way: str, grid: np.ndarray) -> np.ndarray:
    squares = []
    for found in cell.values():
        for name in found:
            if name in _named(way):
                cost = np.array([c for c, _ in found[name]])
                errors = (np.array([e for _, e in found[name]]) / _spread(cell)) ** 2
                squares.append(errors[np.searchsorted(cost, grid, side="right") - 1].mean(1))
    return np.sqrt(np.mean(squares, 0))


def two_sources_table(cell: Cell) -> str:
    """Errors by cost, and cost needed to the errors of experiments alone."""
    ways = (
        "gain per cost, two sources",
        "cost-blind, two sources",
        "random, two sources",
        "gain, experiments alone",
    )
    grid = np.arange(0.0, BUDGET + 1)
    curves = {way: _error_by_cost(cell, way, grid) for way in ways}
    lines = ["| cost | " + " | ".join(ways) + " |", "|---" * 5 + "|"]
    for at in (0, 2, 5, 10, 20, 40, 60, 80):
        lines.append(f"| {at} | " + " | ".join(f"{curves[way][at]:.3f}" for way in ways) + " |")
    lines += ["", "| error of experiments alone at a cost of | " + " | ".join(ways[:-1]) + " |", "|---" * 4 + "|"]
    for at in (20, 40, 60, 80):
        goal = curves[ways[-1]][at]
        found = [_number(needed(grid, curves[way], goal)) for way in ways[:-1]]
        lines.append(f"| {at} ({goal:.3f}) | " + " | ".join(found) + " |")
    return "\n".join([*lines, "", f"{len(cell)} fresh tasks; an experiment costs 10, an analytic row 1."])


def replay_table(cell: Cell) -> str:
    """Loss by rows, the difference to random choice paired by task, and the rows that random choice needs."""
    ways = ("gain", "closed form", "variance", "random")
    lines = ["| k | tasks | " + " | ".join(ways) + " | gain − random | random needs for gain's |", "|---" * 8 + "|"]
    most = max(len(found["gain"]) for found in cell.values())
    common = min(len(found["gain"]) for found in cell.values())  # rows that every task has
    every = [
        [np.mean([found[f"random {o}"][k] for o in range(REPLAYS)]) for k in range(common)] for found in cell.values()
    ]
    random = np.mean(every, 0).tolist()
    for k in range(most):
        some = [found for found in cell.values() if len(found["gain"]) > k]
        each = {way: np.array([found[way][k] for found in some]) for way in ways[:-1]}
        each["random"] = np.array([np.mean([found[f"random {o}"][k] for o in range(REPLAYS)]) for found in some])
        off = each["gain"] - each["random"]
        error = off.std(ddof=1) / math.sqrt(len(off)) if len(off) > 1 else math.nan
        line = " | ".join(f"{each[way].mean():.3f}" for way in ways)
        rows = needed(range(common), random, float(each["gain"].mean()))
        text = "–" if k >= common else f"more than {common - 1}" if math.isinf(rows) else f"{rows:.1f}"
        lines.append(f"| {k} | {len(some)} | {line} | {off.mean():.3f} ± {error:.3f} | {text} |")
    return "\n".join(
        [*lines, "", f"Negative log predictive density of test rows, nats a cell; {len(cell)} tasks held out."]
    )


PARTS: dict[str, tuple[Callable[..., Iterator[Cell]], Callable[[Cell], str]]] = {
    "melt_pool": (melt_pool_part, melt_pool_table),
    "two_sources": (two_sources_part, two_sources_table),
} | {
    name: (lambda seed, *rest, name=name: replay_part(name, *rest), replay_table)
    for name in REPLAYED  # type: ignore[misc]
}


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.campaign", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", type=int, default=20, help="held-out tasks (of a replay, those of a fit at most)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=240.0, help="wall seconds a fit may take")
    parser.add_argument("--cache", type=Path, help="folder to keep fitted manifolds in")
    parser.add_argument("--resume", action="store_true", help="keep the tasks that the result files hold")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", pim.UnfamiliarTask)
    for part in arguments.parts:
        run, table = PARTS[part]
        path = arguments.out / f"campaign-{part}.json"
        found: dict[str, Any] = {"machine": machine(), "versions": versions("invman"), "tasks": {}}
        if arguments.resume and path.exists():
            found = json.loads(path.read_text())
        began = time.process_time()
        for cell in run(arguments.seed, arguments.tasks, arguments.cache, arguments.max_seconds, found["tasks"]):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found | {"tasks": cell}) + "\n")
            path.with_suffix(".md").write_text(table(cell) + "\n")
            print(f"{part}: {len(cell)} tasks, {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
        if path.exists():
            print(f"{part}\n{table(found['tasks'])}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
