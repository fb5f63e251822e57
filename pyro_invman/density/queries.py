"""Which cells are given and which are asked for, drawn per row: what an any-order flow is trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TARGETS_A_ROW = 3


class Queries(NamedTuple):
    """Known cells (B, D), targets (B, T) as columns, and which of these are truly asked (B, T)."""

    known: Tensor
    targets: Tensor
    asked: Tensor


class QueryMix(NamedTuple):
    """Shares of the kinds of query; they need not sum to one.

    `parameters`, `observations`, `conditions`: that role given all the rest of the row. `joint`: nothing given.
    `uniform`: each cell given with a rate that is itself uniform. `block`: whole roles given or not.
    """

    parameters: float = 0.6
    observations: float = 0.1
    conditions: float = 0.0
    joint: float = 0.05
    uniform: float = 0.2
    block: float = 0.05

    def draw(self, observed: Tensor, roles: Tensor, number: int, generator: torch.Generator | None = None) -> Queries:
        """Queries for rows whose cells are `observed` (B, D).

        `roles` (D,) is 0, 1, 2 for parameter, observation, condition. A kind draws the given cells; then a place in
        the canonical chain over the other observed cells: what stands before it is known too, and it is asked for
        together with up to `number` − 1 other cells that are not known.
        """
        rows, dim = observed.shape
        device = observed.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        present = torch.stack([(roles == role).any() for role in range(3)])
        shares = torch.tensor(self, dtype=torch.float64)
        shares[:3] *= present.to(shares)
        if int(present.sum()) < 2:  # one role alone: a role given the others is the joint
            shares[:3] = 0.0
        kind = torch.searchsorted((shares.cumsum(0) / shares.sum()).float().to(device), uniform(rows)).clamp_max(5)
        in_role = roles == kind.clamp_max(2).unsqueeze(-1)
        block = (uniform(rows, 3) < 0.5)[:, roles]
        scattered = uniform(rows, dim) < uniform(rows, 1)
        kind = kind.unsqueeze(-1)
        given = torch.where(kind < 3, ~in_role, torch.where(kind == 4, scattered, (kind == 5) & block)) & observed
        full = (given == observed).all(-1, keepdim=True)  # nothing left to ask: ask for everything instead
        given = given & ~full
        todo = observed & ~given
        place = (uniform(rows, 1) * todo.sum(-1, keepdim=True)).long()
        rank = todo.cumsum(-1) - 1
        known = given | (todo & (rank < place))
        order = torch.where(observed & ~known, uniform(rows, dim), 2.0)
        order = torch.where(todo & (rank == place), -1.0, order)
        order, targets = order.sort(-1)
        number = min(number, dim)
        return Queries(known, targets[:, :number], order[:, :number] < 2.0)


def query_loss(
    module: nn.Module,
    batch: Tensor,
    mix: QueryMix,
    roles: Tensor,
    generator: torch.Generator | None,
    latent: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Mean −log p over the cells of `batch` (B, D) that `mix` asks an any-order flow for.

    Each target is given what of the known cells it may depend on. A `latent` (B, L) is given. `counts` (B, D) is what
    each cell counts for (1 where None).
    """
    known, targets, asked = mix.draw(~batch.isnan(), roles, _TARGETS_A_ROW, generator)
    right = torch.where(asked, batch.gather(1, targets), 0.0)
    row = batch.nan_to_num(0.0)
    if latent is not None:
        row, known = torch.cat([row, latent], -1), F.pad(known, (0, latent.shape[-1]), value=True)
    if module.links is not None:  # cells that were drawn may not be linked: what the first target sees is known
        known = module.visible(known, targets[:, 0])  # type: ignore[operator]
        seen = module.visible(known.unsqueeze(-2), targets)  # type: ignore[operator]
        asked = asked & (seen == known.unsqueeze(-2)).all(-1)
    scores = module.cell_log_prob(row, known, targets, right)  # type: ignore[operator]
    weight = asked.to(scores) if counts is None else torch.where(asked, counts.gather(1, targets), 0.0)
    return -(torch.where(asked, scores, 0.0) * weight).sum() / weight.sum().clamp_min(1e-6)
