r"""Whether the settings of a task depend on each other as in the tasks that were learned.

Settings are chosen: a new task may keep the habits of the others (a faster scan at more power), or not. For a setting x
given others g of its row, either of two laws holds in a task as a whole,

.. math:: p(x \mid g) \text{ as learned, with probability } \pi, \qquad p(x) \text{ otherwise,}

with :math:`\pi` learned from tasks held out, and updated by the settings of a task's own rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_invman.density.univariate import Mixture, Univariate
from pyro_invman.tasks.network import ManifoldNetwork

_ROUNDS = 100
_NARROWEST = 0.05


def learned(network: ManifoldNetwork, row: Tensor, known: Tensor, latent: Tensor, column: int) -> Univariate:
    """p(x | known settings) near latents (..., L) of a continuous column, in working coordinates (...,).

    `row` (..., D) is read where `known` (..., D), of which settings other than the column count.
    """
    others = known & ~network.evidence
    others = others & (torch.arange(network.dim, device=row.device) != column)
    shape = torch.broadcast_shapes(row.shape[:-1], latent.shape[:-1])
    cells = torch.cat([row.expand(*shape, -1), latent.expand(*shape, -1)], -1)
    return network.flow.head_of(cells, F.pad(others, (0, network.latent_dim), value=True), column)


def marginal(network: ManifoldNetwork, column: int) -> Mixture:
    """p(x) of a continuous column, in working coordinates (): normals about its quantiles in the learned rows, each as
    wide as its neighbours are apart and no narrower than a twentieth of their spread."""
    knots = network.context.knots[column]
    apart = F.pad((knots[2:] - knots[:-2]) / 2, (1, 1))
    apart[0], apart[-1] = knots[1] - knots[0], knots[-1] - knots[-2]
    scale = apart.maximum(_NARROWEST * knots.std()).clamp_min(torch.finfo(knots.dtype).eps)
    flow = network.flow
    ends = (flow.lower[column], flow.upper[column]) if flow.bounded else (None, None)
    return Mixture(torch.zeros_like(knots), knots, scale, *ends)


@torch.no_grad()
def evidence_to_follow(network: ManifoldNetwork, rows: Tensor, latent: Tensor, column: int) -> Tensor:
    """Σ log p(x | other settings) − log p(x) over working rows (..., K, D) of tasks near latents (..., L): (...,)."""
    known, row = ~rows.isnan(), rows.nan_to_num(0.0)
    cell, follows = row[..., column], learned(network, row, known, latent.unsqueeze(-2), column)
    gain = follows.log_prob(cell) - marginal(network, column).log_prob(cell)
    return torch.where(known[..., column], gain, 0.0).sum(-1)


@torch.no_grad()
def share_that_follows(network: ManifoldNetwork, rows: Tensor, latent: Tensor) -> Tensor:
    """π of every column (D,), from tasks' working rows (T, K, D) that were not learned from and their latents (T, L);
    a half for columns without a question: categorical, of evidence or constant in a task."""
    share = torch.full((network.dim,), 0.5, dtype=network.flow.dtype)
    for column in range(network.dim):
        if network.flow.layout.levels[column] or bool(network.evidence[column] | network.constant[column]):
            continue
        gain, part = evidence_to_follow(network, rows, latent, column), share[column]
        for _ in range(_ROUNDS):  # expectation-maximisation under a uniform prior, which counts as a task of each kind
            part = (1 + (part.logit() + gain).sigmoid().sum()) / (2 + len(rows))
        share[column] = part
    return share
