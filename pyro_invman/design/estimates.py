r"""Expected information by the flow itself, from both sides of its joint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_invman.density.random_functions import Anchor
from pyro_invman.density.remainder import Remainder
from pyro_invman.design.outlook import Candidates, Known, Target, with_latent
from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.inference import quasi_draws
from pyro_invman.tasks.network import ManifoldNetwork

_AT_ONCE = 32_768  # rows of the flow a pass


class Estimate(NamedTuple):
    """Information from the `likelihood` and the `posterior` side (C,), in nats, with standard errors (C,)."""

    likelihood: Tensor
    posterior: Tensor
    likelihood_error: Tensor
    posterior_error: Tensor


@torch.no_grad()
def estimates(
    known: Known,
    candidates: Candidates,
    pending: Candidates,
    targets: Sequence[Target],
    draws: int = 64,
    particles: int = 64,
    seed: int = 0,
) -> Estimate:
    r"""Σ λ I(T; Y | known, pending) of candidates of the reference, weighted over targets, from two sides,

    .. math:: E[\log q(Y \mid T) - \log q(Y)] \qquad \text{and} \qquad E[\log q(T \mid Y) - \log q(T)],

    all given what is known and what the pending rows would show. The first weighs latents by the flow's densities; the
    second asks the manifold what it would believe of the latent with Y among the rows. On a joint that agrees with
    itself they are equal; how far apart they are says how far it does not. Each log of a mean over latents is halfway
    between the mean with and the mean without the latent that the draw came from, whose errors have opposite signs.

    Arguments:
        known: of the task.
        candidates: C rows, and `pending` ones whose results are awaited, all of the reference.
        targets: of the kinds "task", "parameters" and "predict".
        draws, particles: N joint draws, and S latents that densities are averaged over.

    References:
        Kirsch & Gal, *Unifying approaches in active learning and active sampling via Fisher information and
        information-theoretic quantities*, TMLR 2022.
        Foster et al., *Variational Bayesian optimal experimental design*, NeurIPS 2019.
    """
    scene = _Scene(known, draws, particles, seed)
    scene.await_(pending)
    return scene.of(candidates, targets)


class _Scene:
    """N joint draws of latent and pending rows, with S latents of the belief after these."""

    def __init__(self, known: Known, draws: int, particles: int, seed: int) -> None:
        self.network, self.known, self.seed = known.network, known, seed
        number = self.network.latent_dim
        engine = torch.quasirandom.SobolEngine(number + len(self.network.columns), scramble=True, seed=seed)
        points = engine.draw(draws, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        mean, factor = known.belief.scale_tril()
        self.truth = mean + torch.special.ndtri(points[:, :number]).to(mean) @ factor.mT  # (N, L)
        self.uniform = points[:, number:].to(mean)  # (N, M), even together with the truths
        self.draws, self.particles = draws, particles
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = known.rows.unsqueeze(0)  # (1 or N, K, D)
        self.belief = Belief(known.belief.precision.unsqueeze(0), known.belief.shift.unsqueeze(0))
        self.inner = quasi_draws(known.belief, particles, seed + 1).unsqueeze(1)  # (S, 1 or N, L)
        self._kept = self._remainder(self.rows)

    # ------------------------------------------------------------------ rows of the task
    def _remainder(self, rows: Tensor) -> Remainder | None:
        base, (cells, told) = self.network.base, self.network.context.row_cells(rows)
        if base.functions is None or not rows.shape[-2]:
            return None
        settings, answers = base.settings, base.answers
        return Remainder(
            base.functions, cells[..., settings], told[..., settings], cells[..., answers], told[..., answers]
        )

    def _anchor(self, rows: Tensor, remainder: Remainder | None) -> Anchor | None:
        """What the base says of working rows (B, R, D) by their settings."""
        cells, told = self.network.context.row_cells(rows)
        if remainder is None:
            return self.network.base.anchor(cells, told)
        settings = self.network.base.settings
        return remainder.anchor(cells[..., settings], told[..., settings])

    def await_(self, pending: Candidates) -> None:
        """Draws what pending rows show, one after the other, and takes it for known."""
        for n in range(len(pending.rows)):
            row = pending.rows[n].reshape(1, 1, -1)
            drawn = self._drawn(row, pending.measured[n].reshape(1, 1, -1), self._kept, again=True)
            self.rows = torch.cat([self.rows.expand(self.draws, -1, -1), drawn], 1)
            self._kept = self._remainder(self.rows)
        if len(pending.rows):
            self.belief = self._believe(self.rows)
            points = torch.quasirandom.SobolEngine(self.truth.shape[-1], scramble=True, seed=self.seed + 1)
            scores = torch.special.ndtri(points.draw(self.particles, dtype=torch.float64).clamp(1e-6, 1 - 1e-6))
            mean, factor = self.belief.scale_tril()
            self.inner = mean + (factor @ scores.to(mean).reshape(self.particles, 1, -1, 1)).squeeze(-1)

    def _believe(self, rows: Tensor) -> Belief:
        return self.network.infer(rows, self.known.before)

    def _drawn(self, rows: Tensor, measured: Tensor, remainder: Remainder | None, again: bool = False) -> Tensor:
        """Rows (N, C, D): working rows (1, C, D) with what is `measured` (1, C, D) of them, drawn given each truth; by
        the same uniforms for every candidate, or by others `again`."""
        network = self.network
        columns = _asked(network, measured)
        if remainder is not None:
            rows = rows.expand(max(len(rows), remainder.seen.shape[1]), -1, -1)
        given, seen = with_latent(rows, self.truth.unsqueeze(1))
        anchor = self._anchor(rows, remainder)
        shape = torch.Size((self.draws, rows.shape[1]))
        uniform = self.uniform[:, : len(columns)]
        if again:
            uniform = torch.rand(uniform.shape, generator=self.generator, dtype=given.dtype).clamp(1e-6, 1 - 1e-6)
        drawn = network.flow.draw(given, seen, columns, shape, uniform.unsqueeze(1).expand(*shape, -1), anchor=anchor)
        full = rows.expand(*shape, -1).index_copy(-1, torch.tensor(columns), drawn)
        return torch.where(measured, full, rows)

    def _scores(self, rows: Tensor, measured: Tensor, latent: Tensor, remainder: Remainder | None) -> Tensor:
        """log p of what is `measured` (1, C, D) of rows (N, C, D) given their settings and latents (S, B, L), to
        (S, N, C)."""
        network, found = self.network, []
        columns = _asked(network, measured)
        size = max(1, _AT_ONCE // (len(latent) * self.draws))
        for part in range(0, rows.shape[1], size):
            some, asked = rows[:, part : part + size], measured[:, part : part + size]
            settings = some[:1] if remainder is None or remainder.seen.shape[1] == 1 else some
            settings = torch.where(asked, math.nan, settings)
            anchor = self._anchor(settings, remainder)
            given, seen = with_latent(settings, latent.unsqueeze(2))
            answers = some[..., columns].nan_to_num(0.0)
            wanted = asked[..., columns].expand(answers.shape)
            score = network.flow.log_prob(given, seen, columns, answers, wanted, anchor)
            found.append(score.expand(len(latent), self.draws, some.shape[1]))
        return torch.cat(found, -1)

    def _of(self, rows: Tensor, measured: Tensor, remainder: Remainder | None) -> Tensor:
        """The same (S + 1, N, C) given the latents of the belief and, last, the truth."""
        inner = self._scores(rows, measured, self.inner, remainder)
        return torch.cat([inner, self._scores(rows, measured, self.truth.unsqueeze(0), remainder)])

    # ------------------------------------------------------------------ both sides
    def of(self, candidates: Candidates, targets: Sequence[Target]) -> Estimate:
        """Of candidates, what was drawn so far being known."""
        rows, measured = candidates.rows.unsqueeze(0), candidates.measured.unsqueeze(0)
        bends, plain = self.network.base.functions is not None, None
        sides = torch.zeros(2, self.draws, rows.shape[1], dtype=rows.dtype)
        for target in targets:
            forward = target.kind == "predict"
            if forward and bends:
                gain = self._nearby(rows, measured, *self._asked(target))
            else:
                plain = plain or self._told(self._drawn(rows, measured, self._kept), measured)
                scores, moved = plain
                if target.kind == "task":
                    gain = scores[-1] - _log_mean(scores), moved[-1]
                else:
                    sought = self._sought(*self._asked(target), self._kept if forward else None).unsqueeze(-1)
                    alone = _log_mean(sought)
                    gain = (
                        _log_mean(sought + scores) - alone - _log_mean(scores),
                        _log_mean(sought + moved, moved) - alone,
                    )
            sides = sides + target.weight * torch.stack(gain)
        return Estimate(*sides.mean(1), *(sides.std(1) / math.sqrt(self.draws)))

    def _told(self, shown: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of rows as they are `shown` (N, C, D), and what they move the belief by, (S + 1, N, C) each."""
        return self._of(shown, measured, self._kept), self._moved(shown)

    def _asked(self, target: Target) -> tuple[Tensor, Tensor]:
        """A row (N, D) of the target for each draw, all rows in turn, and which columns (1, 1, D) are asked."""
        assert target.rows is not None
        order = torch.arange(self.draws) % len(target.rows)
        columns = torch.zeros(1, 1, self.network.dim, dtype=torch.bool)
        columns[..., list(target.columns)] = True
        return target.rows[order], columns

    def _moved(self, rows: Tensor) -> Tensor:
        """Log-density (S + 1, N, C) of the latents in what the manifold would believe with rows (N, C, D), each among
        those known, less that in the belief so far."""
        after = self._believe(self._with(rows))
        latent = torch.cat([self.inner.expand(-1, self.draws, -1), self.truth.unsqueeze(0)]).unsqueeze(2)
        before = Belief(self.belief.precision.unsqueeze(1), self.belief.shift.unsqueeze(1))
        return after.log_prob(latent) - before.log_prob(latent)

    def _with(self, rows: Tensor) -> Tensor:
        """Rows (N, C, K + 1, D) of the task with one of rows (N, C, D) each."""
        known = self.rows.expand(self.draws, -1, -1).unsqueeze(1)
        return torch.cat([known.expand(-1, rows.shape[1], -1, -1), rows.unsqueeze(2)], 2)

    def _sought(self, point: Tensor, columns: Tensor, remainder: Remainder | None) -> Tensor:
        """log p (S + 1, N) of cells `columns` of one row (N, D) a draw, drawn given each truth."""
        asked = columns[0, 0].nonzero()[:, 0].tolist()
        anchor = None if remainder is None else self._anchor(point.unsqueeze(1), remainder)
        given, seen = with_latent(point.unsqueeze(1), self.truth.unsqueeze(1))
        drawn = self.network.flow.draw(given, seen, asked, (self.draws, 1), generator=self.generator, anchor=anchor)
        found = []
        for latent in (self.inner, self.truth.unsqueeze(0)):
            given, seen = with_latent(point.unsqueeze(1), latent.unsqueeze(2))
            found.append(self.network.flow.log_prob(given, seen, asked, drawn, None, anchor)[..., 0])
        return torch.cat(found)

    def _nearby(self, rows: Tensor, measured: Tensor, point: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides (N, C) for `columns` of one row (N, D) a draw, where a base that bends lets rows near each other
        share more than the latent."""
        point = self._drawn(point.unsqueeze(1), columns, self._kept, again=True)
        beside = self._remainder(torch.cat([self.rows.expand(self.draws, -1, -1), point], 1))
        shown = self._drawn(rows, measured, beside)
        scores, moved = self._told(shown, measured)
        sought = self._of(point, columns, self._kept)  # (S + 1, N, 1)
        alone = _log_mean(sought)
        likelihood = _log_mean(sought + self._of(shown, measured, beside)) - alone - _log_mean(scores)
        after = self._after(shown, point, columns)
        return likelihood, _log_mean(after + moved, moved) - alone

    def _after(self, shown: Tensor, point: Tensor, columns: Tensor) -> Tensor:
        """log p (S + 1, N, C) of `columns` of rows `point` (N, 1, D), each of rows `shown` (N, C, D) known."""
        number, asked = shown.shape[1], columns[0, 0].nonzero()[:, 0].tolist()
        remainder = self._remainder(self._with(shown).flatten(0, 1))
        point = point.repeat_interleave(number, 0)  # (N C, 1, D)
        settings, answers = torch.where(columns, math.nan, point), point[..., asked]
        anchor, found = self._anchor(settings, remainder), []
        for latent in (self.inner.expand(-1, self.draws, -1), self.truth.unsqueeze(0)):
            for part in latent.split(max(1, _AT_ONCE // len(point))):
                given, seen = with_latent(settings, part.repeat_interleave(number, 1).unsqueeze(2))
                found.append(self.network.flow.log_prob(given, seen, asked, answers, None, anchor)[..., 0])
        return torch.cat(found).unflatten(-1, (self.draws, number))


def _asked(network: ManifoldNetwork, measured: Tensor) -> list[int]:
    """Columns of which some row of (..., D) is measured, at least one."""
    found: list[int] = measured.reshape(-1, measured.shape[-1]).any(0).nonzero()[:, 0].tolist()
    return found or network.columns[:1]


def _log_mean(terms: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """log of the mean of exp(terms) over the first dimension, whose last entry belongs to the draw itself: halfway
    between with and without it; divided by the mean of exp(log_weights)."""
    weights = torch.zeros_like(terms) if log_weights is None else log_weights
    whole = terms.logsumexp(0) - weights.logsumexp(0)
    others = terms[:-1].logsumexp(0) - weights[:-1].logsumexp(0)
    return 0.5 * (whole + others)
