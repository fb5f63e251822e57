r"""Training a manifold's network on tasks, and its loss on tasks held out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_invman.density.queries import QueryMix
from pyro_invman.tasks.designs import share_that_follows
from pyro_invman.tasks.network import Aims, ManifoldNetwork
from pyro_invman.tasks.rows import TaskRows
from pyro_invman.training import Record, Schedule, train

_ROWS_A_TASK = 24  # at most, in a step
_SHOTS = (0, 1, 2, 5, 10)


def schedule_for(tasks: int, rows: int) -> Schedule:
    """The schedule for a number of tasks and of rows; a batch counts tasks."""
    steps = min(max(rows // 2, 800), 6000)
    return Schedule(
        learning_rate=3e-3, batch_size=min(tasks, 24), steps=steps, warmup=100, evaluate_every=50, patience=20
    )


def train_network(
    network: ManifoldNetwork,
    data: TaskRows,
    learned: Tensor,
    held_out: Tensor,
    queries: QueryMix,
    aims: Aims,
    plan: Schedule,
    seed: int,
    **run: Any,
) -> list[Record]:
    """Trains `network` in place on the tasks `learned`, until the loss on those `held_out` rises; the history.

    `run` holds the other keywords of :func:`pyro_invman.training.train`.
    """

    def loss(module: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        which = learned[batch]
        rows = data.batch(which, _ROWS_A_TASK, generator)
        share = 1.0 / len(learned)
        return module.loss(rows, data.conditions[which], queries, aims, share, generator)  # type: ignore[operator]

    fixed = torch.Generator().manual_seed(seed + 1)
    which = held_out.repeat(max(1, min(8, 64 // len(held_out))))
    rows, conditions = data.batch(which, _ROWS_A_TASK, fixed), data.conditions[which]

    def validate(module: nn.Module) -> float:
        return held_out_loss(module, rows, conditions, queries, aims, seed)  # type: ignore[arg-type]

    history = train(network, loss, validate, len(learned), plan, seed=seed + 2, **run)
    learn_habits(network, data.batch(held_out, _ROWS_A_TASK, fixed), data.conditions[held_out])
    return history


@torch.no_grad()
def learn_habits(network: ManifoldNetwork, rows: Tensor, conditions: Tensor) -> None:
    """How far tasks (T,) held out, with working rows (T, K, D), choose their settings as those learned did."""
    belief = network.infer(rows, network.before(conditions))
    network.follow.copy_(share_that_follows(network, rows, belief.mean()))


@torch.no_grad()
def held_out_loss(
    network: ManifoldNetwork,
    rows: Tensor,
    conditions: Tensor,
    queries: QueryMix,
    aims: Aims,
    seed: int,
    draws: int = 32,
) -> float:
    """Loss a cell of rows (B, K, D) given 0, 1, 2, 5, 10 others of their task, forward and by any-order queries."""
    generator = torch.Generator().manual_seed(seed)
    before = network.before(conditions)
    sizes = [k for k in _SHOTS if k < rows.shape[1]]
    total, cells, asked = 0.0, 0.0, 0.0
    every, known = network.context.row_cells(rows)
    for k in sizes:
        belief = network.infer(rows[:, :k], before)
        latent = belief.sample(draws, generator)
        rest = rows[:, k:]
        remainder = network.base.remainder(every[:, :k], known[:, :k])
        settings = network.base.settings
        apart = network.anchor(rest)
        if remainder is not None:
            apart = remainder.anchor(every[:, k:, settings], known[:, k:, settings])
        scores = network.evidence_of(rest, latent.unsqueeze(-2), apart).logsumexp(0) - math.log(draws)
        total -= float(scores.sum())
        cells += float((~rest[..., network.columns].isnan()).sum())
        if aims.queries > 0:
            asked += float(network.query_loss(rest, latent[0], queries, generator))
    return total / max(cells, 1.0) + aims.queries * asked / len(sizes)
