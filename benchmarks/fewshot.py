r"""A new task from a handful of rows: ``python -m benchmarks.fewshot``.

Parts, each a table of its own in ``results/fewshot-PART.json`` and ``.md``:

``exact``
    The hierarchical linear-Gaussian process (200 training tasks of 20 rows, 40 % of cells missing), whose task
    posterior and predictive are closed forms. After k rows of a fresh task: excess of the negative log predictive
    density over the exact one, a cell; coverage of 90 % intervals; the amortised belief beside the fitted model's own
    posterior (NUTS); the task function at five fixed inputs.
``growth``
    The same process, and damped oscillations, learned from 8 to 128 tasks: rows that a fresh task needs to reach the
    loss which the largest reaches after 5; and the loss on old tasks after `extend`.
``typicality``
    p-values of tasks that belong and of tasks whose latent lies 4 prior standard deviations out; coverage there;
    likeness of tasks beside the loss of using one for the other.
``corruption``
    The process of ``exact`` with a tenth of the observed observations, in training tasks and in the rows of fresh tasks
    that are handed over, replaced by gross errors, draws five times as wide as their column; never in rows that are
    scored. What that costs with the contamination channel and without, what the channel costs where nothing is
    corrupted, and how well it tells the errors.
``cost``
    Milliseconds of `infer_task` beside the seconds that a multitask Gaussian process takes to be fitted to the same
    tasks, and seconds of training against rows and tasks.
``peers``
    Melt pools and damped oscillations, simulated: negative log predictive density of rows of fresh tasks after k rows,
    forward and inverse, beside Gaussian processes, a random forest and a neural process.
``data``
    Four real sets (beside the project), a seed for each of five folds over tasks: the same, by ranked probability
    score.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_invman as pim
from benchmarks import fewshot_contest
from benchmarks.fewshot_data import folds
from benchmarks.fewshot_growth import on_oscillations
from benchmarks.fewshot_peers import PEERS
from benchmarks.sbi import machine, versions
from pyro_invman.data import from_tensor, to_tensor
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian
from pyro_invman.tasks.encoder import Belief

ROOT = Path(__file__).resolve().parents[1]
SHOTS = (0, 1, 2, 5, 10, 20)
LEVEL = 0.9
_WEIGHED = 8192
Cell = dict[str, Any]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of values (T,), one a task."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def tasks_of(process: HierarchicalLinearGaussian, tasks: int, rows: int, seed: int, missing: float = 0.4) -> Tensor:
    """Rows (T, K, D)."""
    ds = process.sample(tasks, rows, seed=seed, missing=missing)
    return to_tensor(ds, process.variables).reshape(tasks, rows, -1)


def fitted(
    process: HierarchicalLinearGaussian,
    tasks: int,
    rows: int,
    seed: int,
    errors: float = 0.0,
    contamination: bool = False,
    **fit: Any,
) -> pim.ProcessManifold:
    """A manifold learned from tasks of `process`, with a share of gross `errors` among their observations."""
    ds = process.sample(tasks, rows, seed=1000 + seed, missing=0.4)
    corrupted, _ = with_errors(process, to_tensor(ds, process.variables), errors, seed)
    ds = from_tensor(corrupted, process.variables).assign_coords(task=ds.task)
    manifold = pim.ProcessManifold.from_dataset(
        ds, latent_dim=process.latent_dim, seed=seed, contamination=contamination
    )
    manifold.fit(ds, seed=seed, progress=False, **fit)
    return manifold


def with_errors(
    process: HierarchicalLinearGaussian, rows: Tensor, share: float, seed: int, width: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Rows (..., D), a `share` of their observed observations drawn anew, `width` times as wide as their column; and
    which cells these are."""
    generator = torch.Generator().manual_seed(seed)
    observations = torch.tensor([v.role == "observation" for v in process.variables])
    wrong = (torch.rand(rows.shape, generator=generator) < share) & observations & ~rows.isnan()
    scale = (process.covariance.diagonal() + process.loading.square().sum(-1)).sqrt()
    drawn = process.mean + width * scale * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    return torch.where(wrong, drawn, rows), wrong


class Asked:
    """Fresh tasks of a process, and what their rows' observations are worth to a belief."""

    def __init__(self, process: HierarchicalLinearGaussian) -> None:
        self.process, self.variables = process, process.variables
        self.observations = self.variables.with_role("observation")
        self.settings = self.variables.with_role("parameter")

    def infer(self, manifold: pim.ProcessManifold, rows: Tensor, particles: int | None = None) -> pim.TaskPosterior:
        """The belief of `manifold` after rows (k, D)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pim.UnfamiliarTask)
            return manifold.infer_task(from_tensor(rows, self.variables), num_particles=particles)

    def given(self, rows: Tensor) -> dict[str, Tensor]:
        """Settings of rows (n, D), NaN where missing."""
        return {name: rows[:, self.variables.index(name)] for name in self.settings}

    def answers(self, rows: Tensor) -> Tensor:
        """Observations (n, M) of rows (n, D), NaN where missing."""
        return rows[:, self.variables.indices(self.observations)]

    def scores(self, task: pim.TaskPosterior, rows: Tensor) -> Tensor:
        """log p(observations | settings, task) (n,) of rows (n, D), each on its own."""
        with torch.no_grad():
            return task.conditional(self.observations, self.given(rows)).log_prob(self.answers(rows)).double()

    def exact_scores(self, context: Tensor, rows: Tensor) -> Tensor:
        """The same under the exact predictive."""
        context = context.expand(len(rows), -1, -1)
        together = torch.cat([context, rows.unsqueeze(1)], 1)
        return self.process.log_evidence(together) - self.process.log_evidence(context)

    def covered(self, task: pim.TaskPosterior, rows: Tensor, draws: int = 400) -> tuple[float, int]:
        """How many observed cells of rows (n, D) lie in their central 90 % intervals, and of how many."""
        answers = self.answers(rows)
        found = task.conditional(self.observations, self.given(rows)).sample(torch.Size((draws,))).double()
        level = (found < answers).double().mean(0)
        inside = (level > (1 - LEVEL) / 2) & (level < (1 + LEVEL) / 2)
        seen = ~answers.isnan()
        return float(inside[seen].sum()), int(seen.sum())


# ------------------------------------------------------------ exact
def exact(seed: int, tasks: int, fit: Cell) -> Cell:
    """One seed of the part ``exact``: a process, a fit, fresh tasks."""
    process = HierarchicalLinearGaussian.random(seed=seed)
    began = time.process_time()
    manifold = fitted(process, 200, 20, seed, **fit)
    cell: Cell = {"fit_cpu_s": time.process_time() - began, "shots": {}}
    fresh, asked = tasks_of(process, tasks, 40, seed=9000 + seed), Asked(process)
    torch.manual_seed(seed)
    for k in SHOTS:
        excess, nothing, inside = [], [], []
        for rows in fresh:
            context, rest = rows[:k], rows[20:]
            number = int((~asked.answers(rest).isnan()).sum())
            task = asked.infer(manifold, context, 256 if k == 0 else 128)
            exactly = asked.exact_scores(context, rest).sum()
            excess.append((exactly - asked.scores(task, rest).sum()) / number)
            nothing.append((exactly - asked.exact_scores(context[:0], rest).sum()) / number)
            if len(excess) % 4 == 0:
                hit, of = asked.covered(task, rest, 200)
                inside.append(hit / of)
        mean, error = mean_and_error(torch.stack(excess))
        coverage, coverage_error = mean_and_error(torch.tensor(inside))
        cell["shots"][str(k)] = {
            "excess": mean,
            "std_error": error,
            "coverage": coverage,
            "coverage_std_error": coverage_error,
            "learned_by_exact": float(torch.stack(nothing).mean()),
            "excess_by_task": [round(float(e), 5) for e in excess],
        }
    cell |= _beside_nuts(process, manifold, asked, fresh, seed)
    return cell


def _beside_nuts(
    process: HierarchicalLinearGaussian, manifold: pim.ProcessManifold, asked: Asked, fresh: Tensor, seed: int
) -> Cell:
    """KL(fitted model's own posterior ‖ amortised) a dimension, and task functions at five inputs, for some tasks."""
    network = manifold.network
    divergences, by_weights, off, width = [], [], [], []
    inputs = torch.linspace(-2, 2, 5, dtype=torch.float64)
    scale = process.covariance.diagonal().sqrt()
    for number, k in enumerate((2, 5, 10)):
        rows = fresh[number, :k]
        ds = from_tensor(rows, process.variables)
        long_run = manifold.infer_task(ds, method="nuts", num_particles=600, seed=seed)
        quick = asked.infer(manifold, rows)
        working = manifold.standardization(rows).float()
        with torch.no_grad():
            z = long_run.particles
            prior = network.before(torch.empty(0))  # wider where the task is like none that was learned
            before = Belief(prior.precision / quick.inflation, prior.shift / quick.inflation)
            joint = before.log_prob(z) + network.evidence_of(working, z.unsqueeze(-2)).sum(-1)
            # the evidence by importance sampling from normals about the long run and the belief, and from the prior
            near = torch.distributions.MultivariateNormal(z.mean(0), covariance_matrix=2 * z.T.cov())
            parts = [near, quick.latent, torch.distributions.MultivariateNormal(0 * z[0], before.precision.inverse())]
            w = torch.cat([part.sample((_WEIGHED,)) for part in parts])
            proposed = torch.stack([part.log_prob(w) for part in parts]).logsumexp(0) - math.log(len(parts))
            target = before.log_prob(w) + network.evidence_of(working, w.unsqueeze(-2)).sum(-1)
            log_evidence = (target - proposed).logsumexp(0) - math.log(len(w))
            divergence = (joint - log_evidence - quick.latent.log_prob(z)).mean()
            share = (target - proposed).softmax(0)
            weighed = (share * (target - log_evidence - quick.latent.log_prob(w))).sum()
        divergences.append(float(divergence) / z.shape[-1])
        by_weights.append(float(weighed) / z.shape[-1])
        for step in inputs:
            settings = {n: process.mean[process.variables.index(n)] + step * scale[process.variables.index(n)]
                        for n in asked.settings}  # fmt: skip
            truth = process.posterior_predictive(asked.observations, settings, rows)
            draws = quick.conditional(asked.observations, settings).sample(torch.Size((2000,))).double()
            off.append(((draws.mean(0) - truth.mean) / truth.variance.sqrt()).square().mean())
            width.append((draws.std(0) / truth.variance.sqrt()).mean())
    return {
        "kl_per_dim_to_nuts": divergences,
        "kl_per_dim_by_weights": by_weights,
        "function_off_in_sd": float(torch.stack(off).mean().sqrt()),
        "function_width_ratio": float(torch.stack(width).mean()),
    }


def exact_table(cells: dict[str, Cell]) -> str:
    """Pooled over seeds, standard errors by task."""
    lines = [
        "| k | excess NLPD a cell (bar 0.05) | coverage of 90 % | exact gain over k = 0, a cell |",
        "|---|---|---|---|",
    ]
    for k in map(str, SHOTS):
        found = [cell["shots"][k] for cell in cells.values()]
        excess = torch.tensor([e for one in found for e in one["excess_by_task"]])
        mean, error = mean_and_error(excess)
        coverage = sum(one["coverage"] for one in found) / len(found)
        coverage_error = math.sqrt(sum(one["coverage_std_error"] ** 2 for one in found)) / len(found)
        gain = sum(one["learned_by_exact"] for one in found) / len(found)
        lines.append(f"| {k} | {mean:.4f} ± {error:.4f} | {coverage:.3f} ± {coverage_error:.3f} | {gain:.3f} |")
    kl = torch.tensor([d for cell in cells.values() for d in cell["kl_per_dim_to_nuts"]])
    off = sum(cell["function_off_in_sd"] for cell in cells.values()) / len(cells)
    width = sum(cell["function_width_ratio"] for cell in cells.values()) / len(cells)
    lines += [
        "",
        f"Amortised belief beside the fitted model's own posterior (NUTS), KL a dimension: mean {kl.mean():.3f}, "
        f"largest {kl.max():.3f} (bar 0.1; {len(kl)} tasks).",
        f"Task function at five inputs: off by {off:.3f} predictive standard deviations (RMS), "
        f"width ratio {width:.3f}.",
        f"{len(cells)} seeds; fit {sum(c['fit_cpu_s'] for c in cells.values()) / len(cells):.0f} CPU s each.",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------ growth
def growth(seed: int, tasks: int, fit: Cell) -> Cell:
    """Loss of fresh tasks after 0 … 80 rows, learned from 8 … 128 tasks; of old tasks before and after `extend`."""
    process = HierarchicalLinearGaussian.random(
        num_parameters=3, num_observations=4, latent_dim=3, seed=100 + seed, task_share=0.8
    )
    asked, fresh = Asked(process), tasks_of(process, tasks, 100, seed=9000 + seed)
    cell: Cell = {"losses": {}}
    shots = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50, 80)
    torch.manual_seed(seed)
    for number in (8, 16, 32, 64, 128):
        manifold = fitted(process, number, 20, seed, **fit)
        losses = []
        for k in shots:
            scores = torch.stack(
                [asked.scores(asked.infer(manifold, rows[:k], 128), rows[80:]).sum() for rows in fresh]
            )
            losses.append(float(-scores.sum() / (~fresh[:, 80:, 3:].isnan()).sum()))
        cell["losses"][str(number)] = losses
        if number == 64:
            cell |= _after_extend(process, manifold, asked, seed)
    cell["shots"] = list(shots)
    cell["oscillations"] = on_oscillations(seed, tasks // 2, shots, fit)
    return cell


def _after_extend(process: HierarchicalLinearGaussian, manifold: pim.ProcessManifold, asked: Asked, seed: int) -> Cell:
    old = tasks_of(process, 64, 20, seed=1000 + seed)

    def loss() -> float:
        scores = torch.stack([asked.scores(asked.infer(manifold, rows[:10], 128), rows[10:]).sum() for rows in old])
        return float(-scores.sum() / (~old[:, 10:, 3:].isnan()).sum())

    before = loss()
    more = process.sample(32, 20, seed=5000 + seed, missing=0.4)
    manifold.extend(more.assign_coords(task=("row", [f"new {t}" for t in more.task.values])), progress=False)
    return {"old_loss_before": before, "old_loss_after": loss()}


def rows_needed(shots: Sequence[int], losses: Sequence[float], wanted: float) -> float:
    """The number of rows at which the loss first falls to `wanted`, by linear interpolation in log(1 + k)."""
    for (k, a), (m, b) in zip(zip(shots, losses, strict=True), zip(shots[1:], losses[1:], strict=True), strict=False):
        if a <= wanted:
            return float(k)
        if b <= wanted:
            part = (a - wanted) / (a - b)
            return math.expm1(math.log1p(k) + part * (math.log1p(m) - math.log1p(k)))
    return math.inf


def growth_table(cells: dict[str, Cell]) -> str:
    """Rows needed by number of tasks."""
    shots = next(iter(cells.values()))["shots"]
    rise = [c["old_loss_after"] - c["old_loss_before"] for c in cells.values()]
    return "\n".join(
        [
            "The linear-Gaussian process, nats a cell:",
            "",
            *_by_number(shots, [c["losses"] for c in cells.values()]),
            "",
            f"After `extend` by 32 tasks the loss on the old ones rises by {sum(rise) / len(rise):.4f} nats a cell "
            f"(largest {max(rise):.4f}; bar 0.02).",
            "",
            "Damped oscillations, nats a row:",
            "",
            *_by_number(shots, [c["oscillations"] for c in cells.values() if "oscillations" in c]),
        ]
    )


def _by_number(shots: Sequence[int], losses: Sequence[dict[str, list[float]]]) -> list[str]:
    """Lines of a table: losses after k rows and rows needed, by number of tasks."""
    at = [shots.index(k) for k in (0, 5, 20, 80)]
    lines = ["| training tasks | k = 0 | k = 5 | k = 20 | k = 80 | rows needed (median of seeds) |"]
    lines.append("|---" * 6 + "|")
    for number in losses[0] if losses else []:
        wanted = [one[list(one)[-1]][shots.index(5)] for one in losses]
        needed = sorted(rows_needed(shots, one[number], goal) for one, goal in zip(losses, wanted, strict=True))
        mean = " | ".join(f"{sum(one[number][k] for one in losses) / len(losses):.3f}" for k in at)
        lines.append(f"| {number} | {mean} | {needed[len(needed) // 2]:.1f} |")
    return lines


# ------------------------------------------------------------ typicality
def typicality(seed: int, tasks: int, fit: Cell) -> Cell:
    """False alarms, power, coverage of tasks far out, and likeness."""
    process = HierarchicalLinearGaussian.random(seed=seed)
    manifold, asked = fitted(process, 500, 20, seed, **fit), Asked(process)
    fresh = tasks_of(process, tasks, 40, seed=9000 + seed)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(tasks, process.latent_dim, generator=generator, dtype=torch.float64)
    latent = 4 * direction / direction.norm(dim=-1, keepdim=True)
    near = HierarchicalLinearGaussian(process.variables, process.mean, process.loading, process.covariance)
    far = torch.stack(
        [
            to_tensor(near.row_given_latent(z).sample(40, seed=int(i) + 77_000, missing=0.4), process.variables)
            for i, z in enumerate(latent)
        ]
    )
    cell: Cell = {"false_alarms": {}, "auroc": {}}
    for k in (1, 2, 5, 10, 20):
        of = [manifold.typicality(from_tensor(rows[:k], process.variables), simulations=99) for rows in fresh]
        p_values = torch.tensor(of)
        cell["false_alarms"][str(k)] = float((p_values <= 0.05).double().mean())
        if k == 10:
            strange = torch.tensor(
                [manifold.typicality(from_tensor(rows[:k], process.variables), simulations=99) for rows in far[:200]]
            )
            cell["auroc"] = float(
                (
                    (strange.unsqueeze(-1) < p_values).double() + 0.5 * (strange.unsqueeze(-1) == p_values).double()
                ).mean()
            )
            hits = [asked.covered(asked.infer(manifold, rows[:k]), rows[20:]) for rows in far[:200]]
            cell["coverage_far_out"] = sum(h for h, _ in hits) / sum(n for _, n in hits)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pim.UnfamiliarTask)
                cell["flagged_far_out"] = sum(not asked.infer(manifold, rows[:k]).belongs for rows in far[:200]) / 200
    cell["likeness_rank_correlation"] = _likeness(manifold, asked, fresh[:25])
    return cell


def _likeness(manifold: pim.ProcessManifold, asked: Asked, rows: Tensor) -> float:
    """Rank correlation of likeness with the loss of one task's rows given another's, over all pairs."""
    beliefs = [asked.infer(manifold, task[:20], 128) for task in rows]
    alike, lost = [], []
    for i, a in enumerate(beliefs):
        for j, b in enumerate(beliefs):
            if i != j:
                alike.append(manifold.similarity(a, b))
                lost.append(float(-asked.scores(a, rows[j, 20:]).sum() + asked.scores(b, rows[j, 20:]).sum()))
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (alike, lost)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def typicality_table(cells: dict[str, Cell]) -> str:
    """Means over seeds."""
    number = len(cells)

    def mean(get: Callable[[Cell], float]) -> float:
        return sum(get(cell) for cell in cells.values()) / number

    alarms = {k: mean(lambda c, k=k: c["false_alarms"][k]) for k in next(iter(cells.values()))["false_alarms"]}  # type: ignore[misc]
    return "\n".join(
        [
            "| k | " + " | ".join(alarms) + " |",
            "|---|" + "---|" * len(alarms),
            "| false alarms at level 0.05 (bar 0.03–0.07) | " + " | ".join(f"{v:.3f}" for v in alarms.values()) + " |",
            "",
            f"Latent 4 prior standard deviations out, k = 10: AUROC {mean(lambda c: c['auroc']):.3f} (bar 0.95), "
            f"flagged by `infer_task` {mean(lambda c: c['flagged_far_out']):.2f}, coverage of 90 % intervals "
            f"{mean(lambda c: c['coverage_far_out']):.3f} (bar 0.85).",
            f"Likeness beside the loss of using one task for another, rank correlation "
            f"{mean(lambda c: c['likeness_rank_correlation']):.2f} (bar −0.7).",
        ]
    )


# ------------------------------------------------------------ corruption
def corruption(seed: int, tasks: int, fit: Cell, names: Sequence[str], cell: Cell) -> Iterable[Cell]:
    """One seed of the part ``corruption``: four fits, each of which the cell keeps; excess over the exact predictive
    after the rows as they were before they were corrupted."""
    process = HierarchicalLinearGaussian.random(seed=seed)
    fresh, asked = tasks_of(process, tasks, 40, seed=9000 + seed), Asked(process)
    corrupted, wrong = with_errors(process, fresh, 0.1, 500 + seed)
    for channel in (False, True):
        for name, handed, errors in (("clean", fresh, 0.0), ("corrupted", corrupted, 0.1)):
            name = f"{name}, {'with' if channel else 'without'}"
            if name in cell:
                continue
            began = time.process_time()
            manifold = fitted(process, 200, 20, seed, errors, channel, **fit)
            found: Cell = {"fit_cpu_s": time.process_time() - began}
            found |= _after_errors(manifold, asked, fresh, handed, wrong if errors else None)
            if name == "clean, without":  # the least that can be lost: the same rows, errors crossed out
                crossed = fresh.masked_fill(wrong, math.nan)
                cell["errors known"] = _after_errors(manifold, asked, fresh, crossed, None)
            cell[name] = found
            yield cell


def _after_errors(
    manifold: pim.ProcessManifold, asked: Asked, fresh: Tensor, handed: Tensor, wrong: Tensor | None
) -> Cell:
    """Excess a cell of each task (T,) by k after the rows `handed` (T, K, D), and how well errors are told by k."""
    found: Cell = {"excess_by_task": {}, "auroc": {}}
    for k in SHOTS:
        excess, flags, hits = [], [], []
        for t, rows in enumerate(fresh):
            rest = rows[20:]
            task = asked.infer(manifold, handed[t, :k], 128)
            exactly = asked.exact_scores(rows[:k], rest).sum()
            number = int((~asked.answers(rest).isnan()).sum())
            excess.append(round(float((exactly - asked.scores(task, rest).sum()) / number), 5))
            if k and wrong is not None and task.outliers is not None:
                flag, hit = asked.answers(task.outliers), asked.answers(wrong[t, :k])
                flags.append(flag[~flag.isnan()])
                hits.append(hit[~flag.isnan()])
        found["excess_by_task"][str(k)] = excess
        if flags:
            flag, hit = torch.cat(flags), torch.cat(hits)
            above = (flag[hit].unsqueeze(-1) > flag[~hit]).double() + 0.5 * (
                flag[hit].unsqueeze(-1) == flag[~hit]
            ).double()
            found["auroc"][str(k)] = float(above.mean())
    return found


def corruption_table(cells: dict[str, Cell]) -> str:
    """Differences paired by task, pooled over the seeds whose four fits are done."""
    whole = [cell for cell in cells.values() if "corrupted, with" in cell]
    if not whole:
        return "No seed is done yet."

    def difference(k: int, first: str, second: str) -> str:
        pairs = [
            torch.tensor(cell[first]["excess_by_task"][str(k)]) - torch.tensor(cell[second]["excess_by_task"][str(k)])
            for cell in whole
        ]
        mean, error = mean_and_error(torch.cat(pairs))
        return f"{mean:.3f} ± {error:.3f}"

    lines = [
        "| k | rise, channel (bar 0.1) | rise, no channel | rise, errors known | channel where all is clean (bar 0.02) "
        "| AUROC (bar 0.85) |",
        "|---|---|---|---|---|---|",
    ]
    for k in SHOTS:
        columns = [
            difference(k, "corrupted, with", "clean, with"),
            difference(k, "corrupted, without", "clean, without"),
            difference(k, "errors known", "clean, without"),
            difference(k, "clean, with", "clean, without"),
        ]
        told = [cell["corrupted, with"]["auroc"].get(str(k)) for cell in whole]
        columns.append(f"{sum(told) / len(told):.3f}" if k else "–")
        lines.append(f"| {k} | " + " | ".join(columns) + " |")
    spent = {n: sum(c[n]["fit_cpu_s"] for c in whole) / len(whole) for n in ("clean, with", "clean, without")}
    lines += [
        "",
        f"Nats a cell, standard errors by task; {len(whole)} seeds, "
        f"{len(whole[0]['clean, with']['excess_by_task']['0'])} fresh tasks each; "
        f"fit {spent['clean, with']:.0f} CPU s with the channel, {spent['clean, without']:.0f} without.",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------ cost
def cost(seed: int, tasks: int, fit: Cell) -> Cell:
    """Milliseconds of `infer_task` for 20 rows, beside the fit of a multitask Gaussian process to the same tasks of
    melt pools, and the processor seconds of training by size of the data."""
    process = HierarchicalLinearGaussian.random(seed=seed)
    manifold = fitted(process, 50, 20, seed, schedule=pim.Schedule(steps=20, batch_size=24))
    few = [from_tensor(rows, process.variables) for rows in tasks_of(process, 30, 20, seed=3)]
    cell: Cell = {"infer_task_ms": {"linear": _milliseconds(manifold, few)}, "steps": {}}
    real = fewshot_contest.simulated("melt_pool", seed, tasks=60, new=30)
    fold = folds(real, 1)[0]
    bent = pim.ProcessManifold.from_dataset(real.ds.isel(row=fold.rows))
    if bent.network.base.functions is None:
        raise RuntimeError("the closed form of melt pools came out linear: there is no bent one to time")
    few = [real.ds.isel(row=asked.context_rows(20)) for asked in fold.episodes]
    cell["infer_task_ms"]["bent"] = _milliseconds(bent, few)
    began = time.perf_counter()
    PEERS["multitask_gp"]().fit(real.table.rows(fold.rows), seed)
    cell["multitask_gp_fit_ms"] = 1e3 * (time.perf_counter() - began)
    for number, length in ((100, 10), (1000, 10), (1000, 100)):
        ds = process.sample(number, length, seed=seed, missing=0.4)
        began = time.process_time()
        grown = pim.ProcessManifold.from_dataset(ds, latent_dim=2)
        base = time.process_time() - began
        plan = pim.Schedule(steps=number // 24, batch_size=24, evaluate_every=10_000, learning_rate=1e-3)
        began = time.process_time()
        grown.fit(ds, progress=False, schedule=plan)
        cell["steps"][f"{number} × {length}"] = {
            "base_cpu_s": base,
            "an_epoch_cpu_s": time.process_time() - began - base,
        }
    return cell


def _milliseconds(manifold: pim.ProcessManifold, tasks: Sequence[Any]) -> float:
    """The median over `tasks` of the wall time of `infer_task`, the first of which warms up."""
    spent = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pim.UnfamiliarTask)
        for rows in [tasks[0], *tasks]:
            began = time.perf_counter()
            manifold.infer_task(rows)
            spent.append(time.perf_counter() - began)
    return 1e3 * sorted(spent[1:])[len(tasks) // 2]


def cost_table(cells: dict[str, Cell]) -> str:
    """Means over seeds."""

    def mean(get: Callable[[Cell], float]) -> float:
        return sum(get(cell) for cell in cells.values()) / len(cells)

    linear, bent = (mean(lambda c, on=on: c["infer_task_ms"][on]) for on in ("linear", "bent"))  # type: ignore[misc]
    rival = mean(lambda c: c["multitask_gp_fit_ms"])
    lines = [
        f"`infer_task` for 20 rows: {linear:.1f} ms on a linear base, {bent:.1f} ms on a bent one (bar 20); a "
        f"multitask Gaussian process takes {rival / bent:.0f} times as long to be fitted to the same tasks (bar 100).",
        "",
        "| tasks × rows | base, CPU s | one pass over the tasks, CPU s |",
        "|---|---|---|",
    ]
    for size in next(iter(cells.values()))["steps"]:
        found = [c["steps"][size] for c in cells.values()]
        base, epoch = (sum(f[name] for f in found) / len(found) for name in ("base_cpu_s", "an_epoch_cpu_s"))
        lines.append(f"| {size} | {base:.1f} | {epoch:.1f} |")
    return "\n".join(lines)


Run = Callable[[int, int, Cell, Sequence[str], Cell], Iterable[Cell]]


def _alone(run: Callable[[int, int, Cell], Cell]) -> Run:
    """A part of this package alone, which is whole or not there."""
    return lambda seed, tasks, fit, names, cell: [] if cell else [run(seed, tasks, fit)]


PARTS: dict[str, tuple[Run, Callable[[dict[str, Cell]], str], int]] = {
    "exact": (_alone(exact), exact_table, 200),
    "growth": (_alone(growth), growth_table, 60),
    "typicality": (_alone(typicality), typicality_table, 1000),
    "corruption": (corruption, corruption_table, 200),
    "cost": (_alone(cost), cost_table, 0),
    "peers": (fewshot_contest.on_simulated, fewshot_contest.contest_table, 30),
    "data": (fewshot_contest.on_data, fewshot_contest.contest_table, 0),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; the exit status."""
    methods = list(fewshot_contest.methods_of({}))
    parser = argparse.ArgumentParser("python -m benchmarks.fewshot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", type=int, help="fresh tasks (each part has its own number)")
    parser.add_argument("--max-seconds", type=float, help="wall seconds a fit may take")
    parser.add_argument(
        "--methods", nargs="+", default=methods, choices=methods, help="of the parts `peers` and `data`"
    )
    parser.add_argument("--resume", action="store_true", help="keep the seeds, and methods, that the result files hold")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for part in arguments.parts:
        run, table, number = PARTS[part]
        path = arguments.out / f"fewshot-{part}.json"
        found: dict[str, Any] = {"machine": machine(), "versions": versions("invman"), "cells": {}}
        if arguments.resume and path.exists():
            found = json.loads(path.read_text())
        for seed in arguments.seeds:
            tasks = number if arguments.tasks is None else arguments.tasks
            fit, earlier = {"max_seconds": arguments.max_seconds}, found["cells"].get(str(seed), {})
            for cell in run(seed, tasks, fit, arguments.methods, earlier):
                found["cells"][str(seed)] = cell
                text = table(found["cells"])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
                path.with_suffix(".md").write_text(text + "\n")
            print(f"{part}, seed {seed}\n{table(found['cells'])}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
