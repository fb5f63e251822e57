r"""Whether a task belongs to what a manifold has learned."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from pyro_invman.density.random_functions import Anchor
from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.fingerprint import surprise
from pyro_invman.tasks.network import ManifoldNetwork

_DRAWS = 16
_AT_ONCE = 50_000
_FAMILIAR = 0.99  # share of tasks of the manifold that are taken for such


class UnfamiliarTask(UserWarning):
    """A task is like none that was learned."""


def excursion(belief: Belief, before: Belief) -> Tensor:
    r"""How far beliefs (...) moved from the prior, in units of how far such rows move them:

    .. math:: (m - m_0)^T (\Sigma_0 - \Sigma)^{-1} (m - m_0),

    about :math:`\chi^2_L` for a task of the manifold.
    """
    mean, factor = belief.scale_tril()
    mean_before, factor_before = before.scale_tril()
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    learned = factor_before @ factor_before.mT - factor @ factor.mT
    # beliefs are narrower than the prior, but a direction of which nothing was learned must count for nothing
    size, turn = torch.linalg.eigh(learned + 1e-6 * eye)
    moved = (turn.mT @ (mean - mean_before).unsqueeze(-1)).squeeze(-1)
    return (moved.square() / size.clamp_min(1e-2)).sum(-1)


def inflation_of(moved: float, latent_dim: int) -> float:
    """What the prior variance is multiplied by for a task whose belief moved by `moved`, 1 for a familiar one."""
    half = torch.tensor(latent_dim / 2, dtype=torch.float64)
    familiar = float(torch.special.gammainc(half, torch.tensor(moved / 2, dtype=torch.float64)))
    return max(1.0, moved / latent_dim) if familiar > _FAMILIAR else 1.0


def widened(network: ManifoldNetwork, rows: Tensor, before: Belief) -> tuple[Belief, float]:
    """The prior belief about the task of working rows (K, D), wider where the task is unfamiliar, which is warned of;
    and what its variance was multiplied by."""
    if not len(rows):
        return before, 1.0
    moved = float(excursion(network.infer(rows, before), before))
    inflation = inflation_of(moved, network.latent_dim)
    if inflation > 1.0:
        warnings.warn(
            f"the task is like none that was learned (its latent lies {math.sqrt(moved):.1f} prior standard "
            f"deviations out); predictions are widened, ask typicality(rows) for a p-value",
            UnfamiliarTask,
            stacklevel=4,
        )
        before = Belief(before.precision / inflation, before.shift / inflation)
    return before, inflation


@torch.no_grad()
def p_value(
    network: ManifoldNetwork, rows: Tensor, before: Belief, generator: torch.Generator, simulations: int = 199
) -> float:
    """The share of simulated tasks, with the settings and the missing cells of working rows (K, D), that are at least
    as strange; by the excursion of the belief and by the evidence of the rows, whichever is stranger."""
    if not bool((~rows[..., network.columns].isnan()).any()):
        return 1.0
    latent = before.sample(simulations, generator)
    anchor = network.anchor(rows)
    dreamt = network.dream(rows, latent.unsqueeze(-2), generator)
    every = torch.cat([rows.unsqueeze(0), dreamt])
    number = max(1, _AT_ONCE // (_DRAWS * len(rows) * len(network.columns)))
    found = torch.cat([_statistics(network, part, before, generator, anchor) for part in every.split(number)])
    return float(surprise(found[0], found[1:]))


def _statistics(
    network: ManifoldNetwork, rows: Tensor, before: Belief, generator: torch.Generator, anchor: Anchor | None
) -> Tensor:
    """Excursion and minus the evidence of tasks (R, K, D): (R, 2)."""
    wide = Belief(before.precision.expand(len(rows), -1, -1), before.shift.expand(len(rows), -1))
    evidence, _, _ = network.bound(rows, wide, _DRAWS, generator, anchor)
    moved = excursion(network.infer(rows, wide, anchor), wide)
    return torch.stack([moved, -evidence], -1).double()
