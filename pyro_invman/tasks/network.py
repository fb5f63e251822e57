r"""What a manifold learns: the density of a row given its task's latent, and the belief about a latent given rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invman.density.anyorder import AnyOrderFlow
from pyro_invman.density.context import Layout
from pyro_invman.density.queries import QueryMix, query_loss
from pyro_invman.density.random_functions import Anchor
from pyro_invman.tasks.effects import TaskContext, TaskEffects
from pyro_invman.tasks.encoder import Belief, TaskEncoder
from pyro_invman.tasks.prior import GaussianProcessPrior, NormalPrior


class Aims(NamedTuple):
    """Weights of what a manifold is trained for, beside the bound on the evidence, and the draws that estimate it.

    `queries`: any-order conditionals of a row given its latent. `dreams`: beliefs that recover the latents of tasks
    drawn from the manifold itself. `draws`: S. `no_rows`, `all_rows`: shares of tasks seen without a row, and with all;
    the others have a number of rows uniform in between.
    """

    queries: float = 1.0
    dreams: float = 0.05
    draws: int = 4
    no_rows: float = 0.1
    all_rows: float = 0.4


class ManifoldNetwork(nn.Module):
    r"""p(row | z), p(z | conditions) and q(z | rows), in working coordinates.

    Arguments:
        layout: the D columns of a row.
        roles: 0, 1, 2 for parameter, observation, condition (D,).
        evidence: which columns are evidence about the task (D,).
        latent_dim: L.
        flow, encoder: keywords of `AnyOrderFlow` and `TaskEncoder`.
    """

    roles: Tensor
    evidence: Tensor
    constant: Tensor
    follow: Tensor
    links: Tensor

    def __init__(
        self,
        layout: Layout,
        roles: Tensor,
        evidence: Tensor,
        latent_dim: int,
        flow: dict[str, Any],
        encoder: dict[str, Any],
    ) -> None:
        super().__init__()
        self.latent_dim, self.dim = latent_dim, len(layout.levels)
        free = torch.full((latent_dim,), math.inf, dtype=layout.lower.dtype)
        wider = Layout(
            layout.levels + (0,) * latent_dim, torch.cat([layout.lower, -free]), torch.cat([layout.upper, free])
        )
        self.flow = AnyOrderFlow(wider, **flow)
        context = self.flow.context = TaskContext(wider)
        self.register_buffer("roles", roles, persistent=False)
        self.register_buffer("evidence", evidence, persistent=False)
        self.register_buffer("constant", torch.zeros_like(evidence))
        self.register_buffer("follow", torch.full(evidence.shape, 0.5))
        self.register_buffer("links", torch.zeros(self.dim, self.dim, dtype=torch.long))
        owner = context.owner[: len(context.owner) - latent_dim]
        self.base = TaskEffects((~evidence)[owner].tolist(), latent_dim)
        context.__dict__["base_of_tasks"] = self.base  # seen, not owned: its state is kept once
        self.encoder = TaskEncoder(context, self.base, **encoder)
        self.prior: NormalPrior | GaussianProcessPrior = NormalPrior(latent_dim)
        self.columns: list[int] = evidence.nonzero()[:, 0].tolist()

    @property
    def context(self) -> TaskContext:
        """Of the flow."""
        return self.flow.context  # type: ignore[return-value]

    @torch.no_grad()
    def fit_base(
        self, values: Tensor, task: Tensor, bend: bool = True, seed: int = 0, group: Tensor | None = None
    ) -> None:
        """Fits the closed-form process, linear unless it may `bend`, to working rows (N, D) of tasks (N,), each of a
        `group` (T,), and stands the flow on it."""
        context = self.context
        self.constant.copy_(constant_columns(values, task))
        self.learn_links(values)
        cells, known = context.row_cells(values)
        owner = context.owner[: cells.shape[-1]]
        whole = truths(values, task, self.constant, self.roles)[owner]
        # functions of settings that some observation was never measured with would carry a link over to it
        answered = bool((self.links[~self.evidence][:, self.evidence] > 0).all())
        self.base.fit(torch.where(known, cells, math.nan), task, bend and answered, seed, group, whole)
        if self.flow.links is not None:
            own = owner.unsqueeze(-1) == owner
            self.base.separate(self.flow.links.linked[owner][:, owner] | own)
        blank = values.new_full((len(values), self.latent_dim), math.nan)
        context.fit_scores(torch.cat([values, blank], -1))
        mean, covariance = self.base.effects.joint()
        context.base.mean.copy_(mean)
        context.base.covariance.copy_(covariance)
        context.knots[self.dim :] = context.scores

    def learn_links(self, values: Tensor) -> None:
        """Counts the rows (N, D) that show each pair of columns; given the latent, cells depend along those alone."""
        observed = (~values.isnan()).long()
        self.links.copy_(observed.mT @ observed)
        self.take_links()

    def take_links(self) -> None:
        """Lets the flow depend as the `links` that were counted say."""
        known = bool(self.links.any())  # of a network that has seen nothing, nothing is known
        self.flow.link(F.pad(self.links > 0, (0, self.latent_dim, 0, self.latent_dim), value=known))

    # ------------------------------------------------------------------ beliefs
    def before(self, conditions: Tensor, inducing: Tensor | None = None) -> Belief:
        """The prior belief at conditions (..., C), given whitened inducing values where there are some."""
        if inducing is not None and isinstance(self.prior, GaussianProcessPrior):
            mean, variance = self.prior.given_inducing(conditions, inducing)
        else:
            mean, variance = self.prior.moments(conditions)
        mean, variance = mean.to(self.flow.dtype), variance.to(self.flow.dtype)
        return Belief(torch.diag_embed(1 / variance), mean / variance)

    def anchor(self, rows: Tensor) -> Anchor | None:
        """What the base says of working rows (..., D) by their settings alone; None where it has nothing to work out.

        Asked once, it serves every latent and every observation of the rows.
        """
        return self.base.anchor(*self.context.row_cells(rows))

    def sequence(self, rows: Tensor) -> Anchor | None:
        """The same of working rows (..., K, D) of tasks, each given the rows before it."""
        return self.base.sequence(*self.context.row_cells(rows))

    def infer(self, rows: Tensor, before: Belief, anchor: Anchor | None = None) -> Belief:
        """q(z | rows) of working rows (..., K, D) with NaN."""
        return self.encoder(self.context, rows, (~rows.isnan() & self.evidence).any(-1), before, anchor)

    def evidence_of(self, rows: Tensor, latent: Tensor, anchor: Anchor | None = None) -> Tensor:
        """log p(y | x, η, z) (..., K) of working rows (..., K, D) with NaN, each given the rows of its task before it
        unless another `anchor` is handed; `latent` broadcasts against (..., K, L)."""
        anchor = anchor or self.sequence(rows)
        shape = torch.broadcast_shapes(rows.shape[:-1], latent.shape[:-1])
        rows = rows.expand(*shape[len(shape) - rows.dim() + 1 :], -1)
        known = ~rows.isnan()
        told = (known & self.evidence).any(-1)  # a row that tells nothing, as those that fill tasks up, costs nothing
        anchor = None if anchor is None else anchor.of(told)
        row, known, latent = rows[told].nan_to_num(0.0), known[told], latent.expand(*shape, -1)[..., told, :]
        given = torch.cat([row.expand(*latent.shape[:-1], -1), latent], -1)
        seen = F.pad(known & ~self.evidence, (0, self.latent_dim), value=True)
        answers = row[..., self.columns].expand(*latent.shape[:-1], -1)
        scores = self.flow.log_prob(given, seen, self.columns, answers, known[..., self.columns], anchor)
        return scores.new_zeros(shape).masked_scatter(told.expand(shape), scores)

    def dream(self, rows: Tensor, latent: Tensor, generator: torch.Generator | None) -> Tensor:
        """Rows (..., D) like `rows`, with observations drawn given their settings and `latent` (..., L)."""
        known = ~rows.isnan()
        row = rows.nan_to_num(0.0)
        shape = torch.broadcast_shapes(row.shape[:-1], latent.shape[:-1])
        anchor = self.base.dreamt(*self.context.row_cells(rows), shape, generator)
        given = torch.cat([row.expand(*shape, -1), latent.expand(*shape, -1)], -1)
        seen = F.pad(known & ~self.evidence, (0, self.latent_dim), value=True)
        drawn = self.flow.draw(given, seen, self.columns, shape, generator=generator, anchor=anchor)
        dreamt = row.expand(*shape, -1).index_copy(-1, torch.tensor(self.columns, device=row.device), drawn)
        return torch.where(known, dreamt, math.nan)

    # ------------------------------------------------------------------ learning
    def loss(
        self,
        rows: Tensor,
        conditions: Tensor,
        mix: QueryMix,
        aims: Aims,
        share: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Loss of tasks with working rows (B, K, D), NaN where a row is short of K, in nats a cell.

        `share` is what one task counts for in the evidence bound of all, for the prior's own divergence.
        """
        number, most, _ = rows.shape
        kind, part = torch.rand(2, number, generator=generator, dtype=rows.dtype)
        length = (~rows.isnan()).any(-1).sum(-1)
        some = 1 + (part * length).long()
        size = torch.where(kind < aims.no_rows, 0, torch.where(kind < aims.no_rows + aims.all_rows, length, some))
        seen = torch.where((torch.arange(most) < size.unsqueeze(-1)).unsqueeze(-1), rows, math.nan)
        inducing = None
        if isinstance(self.prior, GaussianProcessPrior):
            q_scale = F.softplus(self.prior.whitened_scale)
            inducing = self.prior.whitened_loc + q_scale * torch.randn(
                q_scale.shape, generator=generator, dtype=rows.dtype
            )
        before, anchor = self.before(conditions, inducing), self.anchor(rows)
        bound, latent, weights = self.bound(seen, before, aims.draws, generator, anchor)
        cells = (~seen[..., self.columns].isnan()).sum().clamp_min(1)
        loss = -(bound.sum() - share * number * self.prior.kl()) / cells
        if aims.queries > 0:  # the latent is found from observations given settings alone: no gradient from here
            picked = torch.multinomial(weights.mT, 1, generator=generator)  # (B, 1)
            chosen = latent.detach().gather(0, picked.mT.unsqueeze(-1).expand(1, number, self.latent_dim)).squeeze(0)
            loss = loss + aims.queries * self.query_loss(rows, chosen, mix, generator)
        if aims.dreams > 0:
            mean, variance = (part.detach() for part in self._moments(before))
            truth = mean + variance.sqrt() * torch.randn(mean.shape, generator=generator, dtype=rows.dtype)
            with torch.no_grad():
                dreamt = self.dream(seen, truth.unsqueeze(-2), generator)
            missed = -self.infer(dreamt, Belief(*(part.detach() for part in before)), anchor).log_prob(truth)
            loss = loss + aims.dreams * missed.mean() / self.latent_dim
        return loss

    def query_loss(self, rows: Tensor, latent: Tensor, mix: QueryMix, generator: torch.Generator | None) -> Tensor:
        """Loss a cell of any-order queries to tasks' rows (B, K, D) given latents (B, L).

        A cell that is constant in a task counts once for the task, however many rows repeat it.
        """
        real = (~rows.isnan()).any(-1)
        times = (~rows.isnan()).sum(-2, keepdim=True).clamp_min(1).to(rows)
        counts = torch.where(self.constant, 1 / times, 1.0).expand_as(rows)[real]
        of_row = latent.unsqueeze(1).expand(-1, rows.shape[1], -1)[real]
        return query_loss(self.flow, rows[real], mix, self.roles, generator, of_row, counts)

    @staticmethod
    def _moments(belief: Belief) -> tuple[Tensor, Tensor]:
        variance = 1 / belief.precision.diagonal(dim1=-2, dim2=-1)
        return belief.shift * variance, variance

    def bound(
        self,
        rows: Tensor,
        before: Belief,
        draws: int,
        generator: torch.Generator | None,
        anchor: Anchor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Importance-weighted bound (B,) on the log evidence of tasks' rows (B, K, D),

        .. math:: \log \frac{1}{S} \sum_s \frac{p(z_s) \prod_n p(y_n \mid x_n, \eta_n, z_s)}{q(z_s \mid rows)},

        with the draws (S, B, L) and their normalised weights (S, B). With S = 1 it is the evidence lower bound.

        References:
            Burda, Grosse & Salakhutdinov, *Importance weighted autoencoders*, ICLR 2016.
        """
        anchor = anchor or self.anchor(rows)
        belief = self.infer(rows, before, anchor)
        latent = belief.sample(draws, generator)
        evidence = self.evidence_of(rows, latent.unsqueeze(-2)).sum(-1)
        weights = before.log_prob(latent) + evidence - belief.log_prob(latent)
        return weights.logsumexp(0) - math.log(draws), latent, weights.detach().softmax(0)


def constant_columns(values: Tensor, task: Tensor) -> Tensor:
    """Which columns (D,) of rows (N, D) never vary within a task (N,), though some task shows them twice."""
    tasks, dim = int(task.max()) + 1, values.shape[1]
    seen = ~values.isnan()
    index = task.unsqueeze(-1).expand_as(values)
    low = values.new_full((tasks, dim), math.inf)
    low = low.scatter_reduce(0, index, values.nan_to_num(math.inf), "amin")
    high = values.new_full((tasks, dim), -math.inf)
    high = high.scatter_reduce(0, index, torch.where(seen, values, -math.inf), "amax")
    times = _times(values, task)
    return ((low >= high) | (times == 0)).all(0) & (times > 1).any(0)


def truths(values: Tensor, task: Tensor, constant: Tensor, roles: Tensor) -> Tensor:
    """Which columns (D,) of rows (N, D) are one value a task: those that are `constant`, and parameters that no task
    shows twice."""
    return constant | ((roles == 0) & (_times(values, task) <= 1).all(0))


def _times(values: Tensor, task: Tensor) -> Tensor:
    """How often each task shows each column (T, D)."""
    shown = (~values.isnan()).to(values)
    return shown.new_zeros(int(task.max()) + 1, values.shape[1]).index_add(0, task, shown)
