r"""This package and its peers in the same folds of the same tables: new tasks after k rows, in both directions.

Forward are the outputs of test rows given their inputs, each output on its own; inverse is one input of test rows given
the other inputs and the outputs. Every method sees the same training rows and the same k rows of a held-out task, all
standardised alike (`fewshot_data`). A peer's forward predictive is a normal, its inverse is Bayes on a grid of equally
likely values; this package is asked for each conditional as it stands, and scored by its density and by draws.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

import pyro_invman as pim
from benchmarks.fewshot_data import (
    KERNEL,
    Episode,
    Fold,
    RealSet,
    Scores,
    aggregate,
    by_task,
    draw_scores,
    folds,
    grid_scores,
    load,
    paired,
    records,
    with_simulated_source,
)
from benchmarks.fewshot_peers import PEERS, Peer, Table, gaussian_scores, inverse
from pyro_invman.data import from_columns, to_tensor, variables_of
from pyro_invman.simulators import melt_pool, oscillations

DRAWS = 512


class Method(Protocol):
    """What takes part."""

    def fit(self, real: RealSet, fold: Fold, seed: int) -> None:
        """Learns from the rows of the fold."""

    def forward(self, real: RealSet, asked: Episode, k: int) -> Scores:
        """Scores (M, Q) of the test rows, NaN where an output is not measured."""

    def inverse(self, real: RealSet, fold: Fold, asked: Episode, k: int) -> Scores:
        """Scores (M,) of the sought input in the inverse rows."""


def context_of(asked: Episode, k: int, forward: bool) -> np.ndarray:
    """What is known of the task: its first k rows and its cheap ones; for the inverse, those that show no answer."""
    cheap = asked.cheap if forward else np.setdiff1d(asked.cheap, asked.peeking)
    return np.r_[asked.context_rows(k), cheap].astype(int)


class OfPeer:
    """A peer by name."""

    def __init__(self, name: str) -> None:
        self.peer: Peer = PEERS[name]()

    def fit(self, real: RealSet, fold: Fold, seed: int) -> None:
        """Learns from the rows of the fold."""
        self.peer.fit(real.table.rows(fold.rows), seed)

    def forward(self, real: RealSet, asked: Episode, k: int) -> Scores:
        """Scores (M, Q) of normals."""
        predict = self.peer.condition(real.table.rows(context_of(asked, k, True)))
        return gaussian_scores(real.table.y[asked.test], *predict(real.table.x[asked.test]))

    def inverse(self, real: RealSet, fold: Fold, asked: Episode, k: int) -> Scores:
        """Scores (M,) by Bayes on the fold's grid."""
        predict = self.peer.condition(real.table.rows(context_of(asked, k, False)))
        x, y = real.table.x[asked.inverse], real.table.y[asked.inverse]
        column = real.columns.index(str(real.sought))
        weights = inverse(predict, x, y, column, fold.grid, np.ones(len(fold.grid)))
        return grid_scores(x[:, column], weights, fold.grid)


class Manifold:
    """This package, as it comes but for a latent of eight dimensions instead of four."""

    def __init__(self, latent_dim: int = 8, fit: dict[str, Any] | None = None, **settings: Any) -> None:
        self.latent_dim, self.settings, self.keywords = latent_dim, settings, dict(fit or {})

    def fit(self, real: RealSet, fold: Fold, seed: int) -> None:
        """Learns from the rows of the fold."""
        ds = real.ds.isel(row=fold.rows)
        self.manifold = pim.ProcessManifold(variables_of(ds), self.latent_dim, seed=seed, **self.settings)
        self.history = self.manifold.fit(ds, seed=seed, progress=False, **self.keywords)

    def _task(self, real: RealSet, asked: Episode, k: int, forward: bool) -> pim.TaskPosterior:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pim.UnfamiliarTask)
            return self.manifold.infer_task(real.ds.isel(row=context_of(asked, k, forward)), seed=k)

    def _row(self, real: RealSet, rows: np.ndarray) -> torch.Tensor:
        return to_tensor(real.ds.isel(row=rows), self.manifold.variables)

    @torch.no_grad()
    def forward(self, real: RealSet, asked: Episode, k: int) -> Scores:
        """Scores (M, Q) of the conditionals of each output."""
        task, rows = self._task(real, asked, k, True), self._row(real, asked.test)
        names = self.manifold.variables.names
        given = {name: rows[:, j] for j, name in enumerate(names) if name not in real.outputs}
        torch.manual_seed(k)
        found: dict[str, list[np.ndarray]] = {"nlpd": [], "crps": [], "coverage90": []}
        for output in real.outputs:
            answer = rows[:, names.index(output)]
            d = task.conditional([output], given)
            score = d.log_prob(answer.unsqueeze(-1)).double()
            found["nlpd"].append((-score).masked_fill(answer.isnan(), math.nan).numpy())
            drawn = draw_scores(answer.numpy(), d.sample(torch.Size((DRAWS,))).squeeze(-1).mT.double().numpy())
            for name, values in drawn.items():
                found[name].append(values)
        return {name: np.stack(columns, -1) for name, columns in found.items()}

    @torch.no_grad()
    def inverse(self, real: RealSet, fold: Fold, asked: Episode, k: int) -> Scores:
        """Scores (M,) of the conditional of the sought input; its density as the peers', normals about draws."""
        task, rows = self._task(real, asked, k, False), self._row(real, asked.inverse)
        names = self.manifold.variables.names
        given = {name: rows[:, j] for j, name in enumerate(names) if name != real.sought}
        torch.manual_seed(k)
        draws = task.conditional([str(real.sought)], given).sample(torch.Size((DRAWS,))).squeeze(-1).mT.double()
        return draw_scores(rows[:, names.index(str(real.sought))].numpy(), draws.numpy(), KERNEL)


class WithSimulation(Manifold):
    """This package, with simulated columns as rows of a source of their own: one of the same task and settings for each
    measured row, of new tasks known from the start, at the settings of test rows too (for the inverse, not there)."""

    def __init__(self, source: str, **settings: Any) -> None:
        super().__init__(reference_source="measured", **settings)
        self.source = source

    def fit(self, real: RealSet, fold: Fold, seed: int) -> None:
        """Learns from the rows of the fold, and what was simulated of them."""
        self.wide = with_simulated_source(real, source=self.source, measured="measured")
        rows = np.flatnonzero(np.isin(self.wide.origin, fold.rows))
        super().fit(self.wide, fold._replace(rows=rows), seed)

    def _beside(self, asked: Episode) -> Episode:
        here = self.wide.table.task == self.wide.tasks.index(asked.task)
        cheap = np.flatnonzero(~self.wide.measured & here)
        return asked._replace(cheap=cheap, peeking=cheap[np.isin(self.wide.origin[cheap], asked.test)])

    def forward(self, real: RealSet, asked: Episode, k: int) -> Scores:
        """Scores (M, Q) of the conditionals of each output."""
        return super().forward(self.wide, self._beside(asked), k)

    def inverse(self, real: RealSet, fold: Fold, asked: Episode, k: int) -> Scores:
        """Scores (M,) of the conditional of the sought input."""
        return super().inverse(self.wide, fold, self._beside(asked), k)


def contest(
    real: RealSet, fold: Fold, name: str, method: Method, seed: int, shots: tuple[int, ...] | None = None
) -> Iterator[dict[str, Any]]:
    """Fits a method to a fold and scores its episodes: records, the first with the fit's processor seconds."""
    began = time.process_time()
    method.fit(real, fold, seed)
    yield {"fit_cpu_s": time.process_time() - began}
    for asked in fold.episodes:
        for k in asked.ks if shots is None else [k for k in asked.ks if k in shots]:
            yield from records(real, name, asked, k, method.forward(real, asked, k), seed)
            if len(asked.inverse):
                yield from records(real, name, asked, k, method.inverse(real, fold, asked, k), seed)


# ------------------------------------------------------------------------------------------------ simulated sets
def simulated(name: str, seed: int, tasks: int = 160, new: int = 30) -> RealSet:
    """A set of `tasks` training tasks of 20 rows and `new` ones of 40, of which 20 are scored.

    ``melt_pool``: its hidden absorptivity and beam are in no column; positive columns as logarithms; inverse of power.
    ``oscillations``: the displacement as recorded; inverse of time.
    """
    simulate, sought, logarithms = {
        "melt_pool": (melt_pool.simulate, "power_W", True),
        "oscillations": (oscillations.simulate, "time_s", False),
    }[name]
    parts = [simulate(tasks, 20, seed=1_000 + seed), simulate(new, 40, seed=5_000 + seed)]
    hidden = [column for column in ("absorptivity", "beam_offset_um") if column in parts[0]]
    parts = [part.drop_vars(hidden) for part in parts]
    variables = variables_of(parts[0])
    values = [to_tensor(part, variables).numpy() for part in parts]
    if logarithms:
        values = [np.log(part) for part in values]
    mean, sd = np.nanmean(values[0], 0), np.nanstd(values[0], 0)
    cells = (np.concatenate(values) - mean) / sd
    labels = [f"{kind} {t}" for kind, part in zip(("train", "new"), parts, strict=True) for t in part.task.values]
    roles = {v.name: v.role for v in variables}
    ds = from_columns({v.name: cells[:, j] for j, v in enumerate(variables)}, roles=roles, task=labels)
    outputs = tuple(v.name for v in variables if v.role == "observation")
    inputs = tuple(v.name for v in variables if v.role != "observation")
    number = np.unique(np.array(labels, object), return_inverse=True)[1]
    protocol = {"ks": [0, 1, 2, 5, 10, 20], "min_rows": 40, "n_splits": 1, "inv_rows": 8}
    return RealSet(
        name=name,
        ds=ds,
        table=Table(cells[:, variables.indices(inputs)], cells[:, variables.indices(outputs)], number),
        columns=inputs,
        outputs=outputs,
        sought=sought,
        tasks=tuple(sorted(set(labels))),
        measured=np.ones(len(cells), bool),
        origin=np.arange(len(cells)),
        group=np.arange(len(cells)),
        simulated={},
        protocol=protocol | {"test_frac": 0.5, "test_min": 20, "test_max": 20},
    )


# ------------------------------------------------------------------------------------------------ the parts
RIVALS = ("single_gp", "pooled_gp", "hierarchical_gp", "multitask_gp", "random_forest", "neural_process")
SIMULATED = ("melt_pool", "oscillations")
REAL = ("meltpoolnet", "mpea", "warfarin_pkpd", "crossed_barrel")
OURS = "invman"
SIMULATION = "rosenthal"  # the source of the simulated columns of melt pools
OURS_BESIDE = f"{OURS}+{SIMULATION}"
_EARLY = (1, 2, 4, 5)
Cell = dict[str, Any]


def methods_of(fit: Cell) -> dict[str, Callable[[], Method]]:
    """Who takes part, by name; `fit` holds keywords of this package's fit."""
    peers: dict[str, Callable[[], Method]] = {name: lambda name=name: OfPeer(name) for name in RIVALS}  # type: ignore[misc]
    ours: dict[str, Callable[[], Method]] = {
        OURS: lambda: Manifold(fit=fit),
        OURS_BESIDE: lambda: WithSimulation(SIMULATION, fit=fit),
    }
    return ours | peers


def on_simulated(seed: int, tasks: int, fit: Cell, names: Sequence[str], cell: Cell) -> Iterator[Cell]:
    """Methods of these names on fresh simulated tasks; those that `cell` holds are kept. Yields after each."""
    for name in SIMULATED:
        real = simulated(name, seed, new=tasks)
        yield from _all(real, folds(real, 1)[0], fit, seed, names, cell)


def on_data(seed: int, tasks: int, fit: Cell, names: Sequence[str], cell: Cell) -> Iterator[Cell]:
    """Methods of these names on fold `seed` of five of each real set; those that `cell` holds are kept."""
    for name in REAL:
        real = load(name)
        yield from _all(real, folds(real, 5)[seed], fit, seed, names, cell)


def _all(real: RealSet, fold: Fold, fit: Cell, seed: int, names: Sequence[str], cell: Cell) -> Iterator[Cell]:
    found = cell.setdefault(real.name, {"fit_cpu_s": {}, "records": []})
    for name, make in methods_of(fit).items():
        if name not in names or name in found["fit_cpu_s"] or (name == OURS_BESIDE and not real.simulated):
            continue
        first, *scored = contest(real, fold, name, make(), seed)
        means = by_task(scored).reset_index().drop(columns="set")
        found["fit_cpu_s"][name] = round(first["fit_cpu_s"], 1)
        found["records"] += json.loads(means.round(5).to_json(orient="records"))
        print(f"{real.name}, {seed}, {name}: fit {found['fit_cpu_s'][name]} CPU s", file=sys.stderr, flush=True)
        yield cell


def contest_table(cells: dict[str, Cell]) -> str:
    """Means over tasks of the folds that this package has run, by number of known rows, and differences to the rivals.

    A rival stands in the table when it has run on all those folds: differences pair the same tasks.
    """
    parts = []
    ran = {
        name: {fold: cell[name] for fold, cell in cells.items() if OURS in cell.get(name, {}).get("fit_cpu_s", {})}
        for name in (*SIMULATED, *REAL)
    }
    names = [name for name, there in ran.items() if there]
    for name in names:
        everywhere = set.intersection(*(set(cell["fit_cpu_s"]) for cell in ran[name].values()))
        rows = [
            record | {"set": name, "split": 0, "seed": 0, "output": "all", "task": f"{fold} {record['task']}"}
            for fold, cell in ran[name].items()
            for record in cell["records"]
            if record["method"] in everywhere
        ]
        table = aggregate(rows).reset_index()
        for direction in table.direction.unique():
            score = "nlpd" if name in SIMULATED else "crps"
            side = table[table.direction == direction]
            wide = side.assign(k=side.k.astype(str)).pivot_table(index="method", columns="k", values=score, sort=False)
            methods = [OURS, *(m for m in wide.index if m != OURS)]
            lines = [f"**{name}, {direction}**, {score}", ""]
            lines += ["| | " + " | ".join(f"k = {k}" for k in wide) + " | less the rival's, k = 1 … 5 | all k |"]
            lines += ["|---" * (wide.shape[1] + 3) + "|"]
            for method in methods:
                cells_ = " | ".join(f"{value:.3f}" for value in wide.loc[method])
                apart = " | "
                if method != OURS:
                    early = [k for k in side.k.unique() if k in _EARLY]
                    apart = " | ".join(
                        f"{d.mean:+.3f} ± {d.error:.3f} ({100 * (d.ratio - 1):+.0f} %)"
                        for d in (
                            paired(rows, OURS, method, score, direction, early),
                            paired(rows, OURS, method, score, direction),
                        )
                    )
                lines.append(f"| {method} | {cells_} | {apart} |")
            ours = side[side.method == OURS].set_index("k").loc["pooled"]
            rivals = [m for m in methods if m not in (OURS, OURS_BESIDE)]
            if score == "crps" and rivals:
                losses = {m: paired(rows, OURS, m, "nlpd", direction) for m in rivals}
                rival, d = max(losses.items(), key=lambda each: each[1].mean)
                lines += ["", f"Log loss, nats, less that of the best rival ({rival}): {d.mean:+.3f} ± {d.error:.3f}."]
            if direction == "forward":
                lines += ["", f"Coverage of 90 % intervals, this package: {ours.coverage90:.3f}."]
            parts.append("\n".join(lines))
    for name in names:
        first = next(iter(ran[name].values()))["fit_cpu_s"]
        spent = ", ".join(f"{method} {seconds:.0f}" for method, seconds in first.items())
        parts.append(f"Folds of {name}: {len(ran[name])}. Fit to the first, CPU s: {spent}.")
    return "\n\n".join(parts)
