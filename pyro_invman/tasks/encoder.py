r"""From partial rows of a task to a belief about its latent, evidence adding up in natural parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_invman.density.backbones import MaskedMLP
from pyro_invman.density.context import Context
from pyro_invman.density.random_functions import Anchor
from pyro_invman.tasks.effects import TaskContext, TaskEffects

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_MORE = 2  # measurements a row may be worth beyond its number of observations


class Belief(NamedTuple):
    """A normal over latents: its `precision` (..., L, L), and precision times mean as `shift` (..., L)."""

    precision: Tensor
    shift: Tensor

    def mean(self) -> Tensor:
        """(..., L)"""
        factor = torch.linalg.cholesky(self.precision)
        return torch.cholesky_solve(self.shift.unsqueeze(-1), factor).squeeze(-1)

    def scale_tril(self) -> tuple[Tensor, Tensor]:
        """Mean (..., L) and a factor S (..., L, L) with S Sᵀ the covariance."""
        factor = torch.linalg.cholesky(self.precision)
        mean = torch.cholesky_solve(self.shift.unsqueeze(-1), factor).squeeze(-1)
        eye = torch.eye(self.shift.shape[-1], dtype=factor.dtype, device=factor.device)
        return mean, torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False).mT

    def sample(self, number: int, generator: torch.Generator | None) -> Tensor:
        """Latents (number, ..., L)."""
        mean, factor = self.scale_tril()
        noise = torch.randn(number, *mean.shape, generator=generator, dtype=mean.dtype)
        return mean + (factor @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, latent: Tensor) -> Tensor:
        """Log-density (...) of latents (..., L)."""
        factor = torch.linalg.cholesky(self.precision)
        mean = torch.cholesky_solve(self.shift.unsqueeze(-1), factor).squeeze(-1)
        white = (factor.mT @ (latent - mean).unsqueeze(-1)).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * white.square().sum(-1) + log_det - _HALF_LOG_2PI * latent.shape[-1]


class TaskEncoder(nn.Module):
    r"""q(z | rows) from any number of partial rows, in any order.

    Each row is worth a few linear measurements of z with unit noise, :math:`e = U z + N(0, I)`, so

    .. math:: \Lambda = \Lambda_0 + \sum_n U_n^T U_n, \qquad h = h_0 + \sum_n U_n^T e_n.

    No row gives the prior back, a row without observations adds nothing, duplicates count twice. U and e start at
    those of the closed-form process (`TaskEffects`), where they are exact; a network that reads the row corrects them.
    It reads in rounds: from the second on it sees the belief of the round before, and its measurements are taken around
    that belief's mean, as in an iterated linearisation.

    Arguments:
        context: of the flow over cells and latent, whose columns it shares.
        base: the closed-form process.
        width, blocks: of the network.
        rounds: how often the rows are read.
    """

    def __init__(self, context: Context, base: TaskEffects, width: int = 64, blocks: int = 2, rounds: int = 2) -> None:
        super().__init__()
        self.latent_dim, self.rounds = base.latent_dim, rounds
        self.worth = base.num_observations + _MORE
        self.read = MaskedMLP(context, width, blocks)
        around = self.latent_dim + base.num_observations * (1 + self.latent_dim)
        self.beside = nn.Linear(around, width)
        self.round = nn.Embedding(rounds, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, self.worth * (self.latent_dim + 2))
        with torch.no_grad():
            self.out.weight.mul_(0.02)
            self.out.bias.zero_()
            self.round.weight.mul_(0.1)

    def forward(
        self,
        context: TaskContext,
        rows: Tensor,
        evident: Tensor,
        prior: Belief,
        anchor: Anchor | None = None,
    ) -> Belief:
        """The belief (..., ) about tasks with working rows (..., K, D), NaN where a cell is missing.

        `evident` (..., K) says which rows have an observation, `prior` (...) is the belief before; `anchor` is what the
        base has worked out for the rows.
        """
        if rows.shape[-2] == 0:
            return prior
        with torch.no_grad():
            base, (cells, measured) = context.base_of_tasks, context.row_cells(rows)
            anchor = anchor or base.anchor(cells, measured)
            anchor = None if anchor is None else anchor.of(evident)
            told = base.measurements(cells[evident], measured[evident], anchor)
            directions, residuals = told.directions.to(rows), told.residuals.to(rows)
        number, rows = rows.shape[:-1], rows[evident]  # (R, D): what has no observation adds nothing
        known, rows = ~rows.isnan(), rows.nan_to_num(0.0)
        blank = rows.new_zeros(*rows.shape[:-1], self.latent_dim)
        unknown = torch.zeros_like(blank, dtype=torch.bool)
        belief = prior

        def of_rows(part: Tensor) -> Tensor:
            """Of tasks (..., L), for each of their rows (R, L)."""
            return part.detach().unsqueeze(-2).expand(*number, -1)[evident]

        for turn in range(self.rounds):
            mean, factor = belief.scale_tril()
            spread = factor.square().sum(-1).sqrt()
            known_latent = unknown if turn == 0 else ~unknown
            shown = of_rows(mean) if turn else blank
            seen = context(torch.cat([rows, shown], -1), torch.cat([known, known_latent], -1), anchor)
            beside = torch.cat(
                [
                    of_rows(spread.log()),
                    residuals.clamp(-10, 10),
                    directions.flatten(-2).clamp(-10, 10),
                ],
                -1,
            )
            hidden = self.read(seen) + self.beside(beside) + self.round.weight[turn]
            correction = self.out(nn.functional.silu(self.norm(hidden)))
            correction = correction.unflatten(-1, (self.worth, self.latent_dim + 2))
            turned, moved, gate = correction.split([self.latent_dim, 1, 1], -1)
            gate = gate.clamp(-8.0, 1.0).exp()
            bare = nn.functional.pad(directions, (0, 0, 0, _MORE))
            around = nn.functional.pad(residuals, (0, _MORE)).unsqueeze(-1)
            u = gate * (bare + turned)
            e = gate * (around + moved + (turned @ shown.unsqueeze(-1)))
            u, e = (part.new_zeros(*number, *part.shape[1:]).index_put((evident,), part) for part in (u, e))
            u, e = u.flatten(-3, -2), e.flatten(-3, -2)
            belief = Belief(prior.precision + u.mT @ u, prior.shift + (u.mT @ e).squeeze(-1))
        return belief
