r"""Gross errors among the cells of rows: how often they come, and which cells they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_invman.density.gaussian import distinct
from pyro_invman.density.normal_rows import NormalRows
from pyro_invman.density.outliers import GrossErrors, outlier_probabilities
from pyro_invman.tasks.effects import TaskEffects
from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.network import ManifoldNetwork

_RARE = 0.01  # chance of an error that is believed in at least, and of a hundred cells before any is seen
_BROAD = 5.0  # scale of errors in spreads of the clean cells, as if four had been seen
_NARROWEST = 3.0  # the same at least
_ROUNDS = 6
_GROSS = 5.0  # robust spreads from the median, beyond which a cell is not trusted at the start


class Contamination(nn.Module):
    r"""An observed cell of observation m is with probability :math:`\pi_m` a draw of :math:`N(c_m, s_m^2)`, broad, and
    says nothing; otherwise it is of the process.

    Which cells these are, the closed form under the manifold tells
    (:func:`pyro_invman.density.outliers.outlier_probabilities`): each cell against what all others of its row and task
    say of it. With :math:`w_{nm}` those probabilities over the N observed cells of a column, in working coordinates,
    and :math:`\bar v_m`, :math:`v_m` mean and variance of the cells weighted by :math:`1 - w`,

    .. math:: \pi_m = \frac{1 + \sum_n w_{nm}}{100 + N}, \qquad c_m = \bar v_m, \qquad
              s_m^2 = \frac{100\, v_m + \sum_n w_{nm} (y_{nm} - c_m)^2}{4 + \sum_n w_{nm}},

    kept within 0.01 to 0.5 and at least :math:`9 v_m`. Learning alternates between these, the closed form of rows
    without errors, and w. What is an error is drawn with probability w, by the same uniform draws in every round, so
    that doubtful cells leave variances as they are. Of new rows, cells with :math:`w > 1/2` are left out: averaging
    over draws gains less than 0.01 nats a cell on a linear-Gaussian process. Categorical observations are taken as
    they are.

    Arguments:
        num_observations: M, cells of a row that are evidence.

    References:
        Box & Tiao, *A Bayesian approach to some outlier problems*, Biometrika 1968.
        Celeux & Diebolt, *The SEM algorithm*, Computational Statistics Quarterly 1985.
    """

    chance: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, num_observations: int) -> None:
        super().__init__()
        self.register_buffer("chance", torch.full((num_observations,), _RARE, dtype=torch.float64))
        self.register_buffer("centre", torch.zeros(num_observations, dtype=torch.float64))
        self.register_buffer("scale", torch.full((num_observations,), _BROAD, dtype=torch.float64))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the module, but stays in double precision."""
        super()._apply(fn, recurse)
        for name in ("chance", "centre", "scale"):
            setattr(self, name, getattr(self, name).double())
        return self

    @torch.no_grad()
    def probabilities(self, network: ManifoldNetwork, rows: Tensor, task: Tensor, before: Belief) -> Tensor:
        """Of working rows (N, D) of tasks (N,) with prior beliefs (T,): (N, D), 0 but for observed evidence."""
        base, cells = network.base, cells_of(network, rows)
        found = self._of_cells(base, cells, task, (before.precision.double(), before.shift.double()))
        owner = network.context.owner[base.answers]
        cell = network.context.first[network.columns]
        position = torch.searchsorted(base.answers, cell)
        return torch.zeros_like(rows, dtype=torch.float64).index_copy(1, owner[position], found[:, position])

    def _of_cells(self, base: TaskEffects, cells: Tensor, task: Tensor, before: tuple[Tensor, Tensor]) -> Tensor:
        known, filled = ~cells.isnan(), cells.nan_to_num(0.0)
        rows = normal_rows(base, filled, known)
        errors = GrossErrors(self.chance, self.centre, self.scale)
        return outlier_probabilities(rows, filled[:, base.answers], known[:, base.answers], task, before, errors)

    @torch.no_grad()
    def fit(self, network: ManifoldNetwork, rows: Tensor, task: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Learns from working rows (N, D) of tasks (N,), as if observations were linear in settings and latent.

        Returns the probabilities (N, D), and uniform draws beneath which those of cells must lie that are learned from.
        """
        level = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        context, base = network.context, network.base
        cells = cells_of(network, rows)
        owner = context.owner[base.answers]
        settings = torch.zeros(cells.shape[1], dtype=torch.bool).index_fill(0, base.settings, True)
        continuous = ~context.categorical[owner]
        weight = _gross(cells[:, base.answers]) * continuous
        linear = TaskEffects(settings.tolist(), network.latent_dim)
        tasks = int(task.max()) + 1
        eye = torch.eye(network.latent_dim, dtype=torch.float64).repeat(tasks, 1, 1)
        for _ in range(_ROUNDS):
            kept = cells.clone()
            kept[:, base.answers] = cells[:, base.answers].masked_fill(weight > level[:, owner], math.nan)
            linear.effects.fit(kept, task, max_iterations=50, tolerance=1e-4)
            self._learn(cells[:, base.answers], weight, continuous)
            weight = self._of_cells(linear, cells, task, (eye, eye[..., 0] * 0.0))
        found = torch.zeros_like(rows, dtype=torch.float64)
        return found.index_copy(1, owner[continuous], weight[:, continuous]), level

    @torch.no_grad()
    def learn(self, network: ManifoldNetwork, rows: Tensor, probability: Tensor) -> None:
        """How often errors come and where they lie, of working rows (N, D) with probabilities (N, D)."""
        base, context = network.base, network.context
        owner = context.owner[base.answers]
        answers = cells_of(network, rows)[:, base.answers]
        self._learn(answers, probability[:, owner], ~context.categorical[owner])

    def _learn(self, answers: Tensor, weight: Tensor, continuous: Tensor) -> None:
        seen = ~answers.isnan()
        answers, weight = answers.nan_to_num(0.0), torch.where(seen, weight, 0.0)
        clean, wrong = torch.where(seen, 1 - weight, 0.0), weight.sum(0)
        number = clean.sum(0).clamp_min(1e-9)
        centre = (clean * answers).sum(0) / number
        spread = ((clean * (answers - centre).square()).sum(0) / number).clamp_min(1e-12)
        broad = ((weight * (answers - centre).square()).sum(0) + 4 * _BROAD**2 * spread) / (wrong + 4)
        chance = ((wrong + 100 * _RARE) / (seen.sum(0) + 100)).clamp(_RARE, 0.5)
        self.chance.copy_(torch.where(continuous, chance, 0.0))
        self.centre.copy_(centre)
        self.scale.copy_(broad.maximum(_NARROWEST**2 * spread).sqrt())


def normal_rows(base: TaskEffects, cells: Tensor, known: Tensor) -> NormalRows:
    """What the closed form says of the observations of rows (N, E) given their settings, read where `known`."""
    settings, answers, covariance = base.settings, base.answers, base.effects.covariance
    patterns, of_row = distinct(known[:, settings])
    both = patterns.unsqueeze(-1) & patterns.unsqueeze(-2)
    eye = torch.eye(len(settings), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(torch.where(both, covariance[settings][:, settings], eye))
    across = torch.where(patterns.unsqueeze(-1), covariance[settings][:, answers], 0.0)  # (P, S, M)
    slope = torch.cholesky_solve(across, factor)
    left = covariance[answers][:, answers] - across.mT @ slope
    off = torch.where(known[:, settings], cells[:, settings] - base.effects.mean[settings], 0.0)
    mean = base.effects.mean[answers] + (off.unsqueeze(-2) @ slope[of_row]).squeeze(-2)
    rows = NormalRows(mean, base.effects.loading[answers].expand(len(cells), -1, -1), left[of_row])
    functions, anchor = base.functions, base.anchor(cells, known)
    if functions is None or anchor is None:
        return rows
    together = anchor.scale.unsqueeze(-1) * anchor.scale.unsqueeze(-2) * functions.residuals.covariance
    readable = functions.readable(known[:, settings])
    return NormalRows(
        torch.where(readable[:, None], anchor.mean, rows.mean),
        torch.where(readable[:, None, None], anchor.directions, rows.directions),
        torch.where(readable[:, None, None], together, rows.covariance),
    )


def cells_of(network: ManifoldNetwork, rows: Tensor) -> Tensor:
    """Cells (N, E) with NaN of working rows (N, D), in double precision."""
    cells, known = network.context.row_cells(rows)
    return cells.double().masked_fill(~known, math.nan)


def _gross(answers: Tensor) -> Tensor:
    """Which cells (N, M) lie so far from the others of their column that the first fit goes without them."""
    middle = answers.nanmedian(0).values
    spread = 1.4826 * (answers - middle).abs().nanmedian(0).values
    return (((answers - middle).abs() > _GROSS * spread) & (spread > 0)).double()
