r"""Training a manifold's network on tasks, and its loss on tasks held out."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invman.density.queries import QueryMix
from pyro_invman.density.random_functions import Anchor
from pyro_invman.tasks.designs import share_that_follows
from pyro_invman.tasks.effects import HELD_OUT
from pyro_invman.tasks.network import Aims, ManifoldNetwork
from pyro_invman.tasks.rows import TaskRows
from pyro_invman.training import Record, Schedule, train

_ROWS_A_TASK = 24  # at most, in a step
_SHOTS = (0, 1, 2, 5, 10)
_GROUPS = 5  # of tasks, each learned from while the base does not know it
_FACTORS = (-0.4, 0.8, 13)  # logarithms of the stretches that are tried: from, to, how many
_STRETCH = 0.25  # standard deviation of a stretch's logarithm before it is learned
_WORTH = 8.0  # cells of an observation that a task counts for at most: those of a task err together


def schedule_for(tasks: int, rows: int) -> Schedule:
    """The schedule for a number of tasks and of rows; a batch counts tasks."""
    steps = min(max(rows // 2, 800), 6000)
    return Schedule(
        learning_rate=3e-3, batch_size=min(tasks, 24), steps=steps, warmup=100, evaluate_every=50, patience=20
    )


def groups_of(order: Tensor, held_out: int) -> Tensor:
    """The group (T,) of each task of an order (T,): 0 of the first `held_out`, 1 to 5 in turn of the others."""
    group = torch.full_like(order, HELD_OUT)
    group[order[held_out:]] = 1 + torch.arange(len(order) - held_out) % _GROUPS
    return group


def train_network(
    network: ManifoldNetwork,
    data: TaskRows,
    learned: Tensor,
    held_out: Tensor,
    queries: QueryMix,
    aims: Aims,
    plan: Schedule,
    seed: int,
    group: Tensor | None = None,
    **run: Any,
) -> list[Record]:
    """Trains `network` in place on the tasks `learned`, until the loss on those `held_out` rises; the history.

    Where each task is of a `group` (T,) and the base bends, a step learns from tasks of one, while the base is as known
    from the others: what it says of a task that it was fitted to is better than what it will say of new ones.

    `run` holds the other keywords of :func:`pyro_invman.training.train`.
    """

    grouped = None if network.base.functions is None else group

    def loss(module: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        which, left_out = learned[batch], None
        if grouped is not None:
            left_out = int(grouped[which[0]])
            alike = learned[grouped[learned] == left_out]
            which = alike[torch.randperm(len(alike), generator=generator)[: len(batch)]]
        rows = data.batch(which, _ROWS_A_TASK, generator)
        share = 1.0 / len(learned)
        with network.base.without(left_out):
            return module.loss(rows, data.conditions[which], queries, aims, share, generator)  # type: ignore[operator]

    fixed = torch.Generator().manual_seed(seed + 1)
    which = held_out.repeat(max(1, min(8, 32 // len(held_out))))
    rows, conditions = data.batch(which, _ROWS_A_TASK, fixed), data.conditions[which]

    def validate(module: nn.Module) -> float:
        with module.base.without(HELD_OUT):  # type: ignore[operator, union-attr]
            return held_out_loss(module, rows, conditions, queries, aims, seed)  # type: ignore[arg-type]

    history = train(network, loss, validate, len(learned), plan, seed=seed + 2, **run)
    with network.base.without(HELD_OUT):
        learn_habits(network, data.batch(held_out, _ROWS_A_TASK, fixed), data.conditions[held_out])
        learn_stretch(network, rows, conditions, len(which) // len(held_out), seed)
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
    draws: int = 16,
) -> float:
    """Loss a cell of rows (B, K, D) given 0, 1, 2, 5, 10 others of their task, forward and by any-order queries."""
    generator = torch.Generator().manual_seed(seed)
    before = network.before(conditions)
    sizes = [k for k in _SHOTS if k < rows.shape[1]]
    total, cells, asked = 0.0, 0.0, 0.0
    for k in sizes:
        latent = network.infer(rows[:, :k], before).sample(draws, generator)
        rest = rows[:, k:]
        scores = network.evidence_of(rest, latent.unsqueeze(-2), _after(network, rows, k))
        total -= float((scores.logsumexp(0) - math.log(draws)).sum())
        cells += float((~rest[..., network.columns].isnan()).sum())
        if aims.queries > 0:
            asked += float(network.query_loss(rest, latent[0], queries, generator))
    return total / max(cells, 1.0) + aims.queries * asked / len(sizes)


def _after(network: ManifoldNetwork, rows: Tensor, k: int) -> Anchor | None:
    """Anchors of tasks' rows (B, K, D) from the k-th on, given the k before."""
    cells, known = network.context.row_cells(rows)
    remainder = network.base.remainder(cells[:, :k], known[:, :k])
    if remainder is None:
        return network.anchor(rows[:, k:])
    settings = network.base.settings
    return remainder.anchor(cells[:, k:, settings], known[:, k:, settings])


@torch.no_grad()
def learn_stretch(
    network: ManifoldNetwork, rows: Tensor, conditions: Tensor, times: int, seed: int, draws: int = 16
) -> None:
    """By how much heads of observations are stretched: the most probable factor of each, log-normal about 1, given what
    cells of held-out tasks (B, K, D), each there so many `times`, score after 0, 1, 2, 5 and 10 rows of their task.

    References:
        Guo, Pleiss, Sun & Weinberger, *On calibration of modern neural networks*, ICML 2017.
    """
    flow, columns = network.flow, torch.tensor(network.columns)
    flow.stretch.fill_(1.0)
    generator, before = torch.Generator().manual_seed(seed), network.before(conditions)
    tried = torch.linspace(*_FACTORS[:2], int(_FACTORS[2])).to(flow.stretch)
    score = -0.5 * (tried / _STRETCH).square().unsqueeze(-1).repeat(1, len(columns))
    sizes = [k for k in _SHOTS if k < rows.shape[1]]
    for k in sizes:
        rest = rows[:, k:]
        latent = network.infer(rows[:, :k], before).sample(draws, generator).unsqueeze(-2)
        given = torch.cat([part.expand(draws, *rest.shape[:-1], -1) for part in (rest.nan_to_num(0.0), latent)], -1)
        known = F.pad(~rest.isnan() & ~network.evidence, (0, network.latent_dim), value=True)
        targets = columns.expand(*given.shape[:-1], -1)
        raw, mean, scale, _ = flow.parameters_of(given, known, targets, _after(network, rows, k))
        seen = ~rest[..., network.columns].isnan() & ~flow.categorical[columns]
        number = seen.sum(-2).clamp_min(1)
        weight = (number.clamp_max(_WORTH) / number).unsqueeze(-2) / (times * len(sizes))
        answers = rest[..., network.columns].nan_to_num(0.0)
        for g, factor in enumerate(tried.exp()):
            cells = flow.cell(raw, mean, scale, targets, factor.expand(targets.shape)).log_prob(answers).logsumexp(0)
            score[g] += torch.where(seen, cells * weight, 0.0).sum((0, 1))
    flow.stretch[columns] = tried[score.argmax(0)].exp()
