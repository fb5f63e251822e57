r"""The any-order autoregressive flow: one network for every conditional of a row.

For targets :math:`t_1, \dots, t_n` and given cells :math:`g`, in the canonical order of the columns,

.. math:: \log p(t \mid g) = \sum_k \log p(t_k \mid g, t_{<k}),

where each factor is a one-dimensional head whose parameters come from a network that sees which cells are known.

References:
    Uria, Murray & Larochelle, *A deep and tractable density estimator*, ICML 2014.
    Shih, Sadigh & Ermon, *Training and inference on any-order autoregressive models the right way*, NeurIPS 2022.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invman.density.backbones import Block, MaskedMLP, TokenTransformer
from pyro_invman.density.context import PER_CELL, Context, Layout
from pyro_invman.density.links import Links, links_between
from pyro_invman.density.univariate import Mixture, Spline


class Parameters(NamedTuple):
    """Raw parameters of continuous heads (..., T, P), the base's mean and scale (..., T), categorical logits."""

    raw: Tensor
    mean: Tensor
    scale: Tensor
    logits: Tensor | None


class AnyOrderFlow(nn.Module):
    """p(any cells | any others) of one row, in working coordinates.

    Arguments:
        layout: what the columns are.
        width: of the hidden layers.
        backbone: what reads the known cells, a masked residual ``mlp`` or a token ``transformer``.
        trunk_blocks: blocks of the backbone.
        head_blocks: residual blocks that see the target too.
        head: ``mixture`` of truncated normals, or monotone rational-quadratic ``spline``.
        components: of the mixture, or bins of the spline.
        min_scale: smallest scale of a component, in units of the Gaussian base's conditional scale.
        group_width: of the network that reads the members of an exchangeable group.
        dropout: share of the hidden units of residual blocks that are left out in training.
    """

    lower: Tensor
    upper: Tensor
    categorical: Tensor
    num_levels: Tensor
    slot: Tensor
    stretch: Tensor

    def __init__(
        self,
        layout: Layout,
        width: int = 128,
        backbone: str = "mlp",
        trunk_blocks: int = 2,
        head_blocks: int = 1,
        head: str = "mixture",
        components: int = 16,
        min_scale: float = 1e-3,
        group_width: int = 64,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        if head not in ("mixture", "spline"):
            raise ValueError(f"head: expected 'mixture' or 'spline', found {head!r}")
        if backbone not in ("mlp", "transformer"):
            raise ValueError(f"backbone: expected 'mlp' or 'transformer', found {backbone!r}")
        self.layout, self.kind, self.components, self.min_scale = layout, head, components, min_scale
        self.dim, self.max_levels = len(layout.levels), max(layout.levels)
        self.bounded = bool((layout.lower.isfinite() | layout.upper.isfinite()).any())
        self.context = Context(layout)
        self.links: Links | None = None
        slots = self.context.slots()
        fixed = {
            "lower": layout.lower.to(torch.get_default_dtype()),
            "upper": layout.upper.to(torch.get_default_dtype()),
            "categorical": torch.tensor([n > 0 for n in layout.levels]),
            "num_levels": torch.tensor(layout.levels),
            "slot": torch.tensor(slots),
        }
        for name, entries in fixed.items():
            self.register_buffer(name, entries, persistent=False)
        self.register_buffer("stretch", torch.ones(self.dim))
        self.backbone: nn.Module = (
            MaskedMLP(self.context, width, trunk_blocks, group_width, dropout)
            if backbone == "mlp"
            else TokenTransformer(self.context, width, trunk_blocks)
        )
        self.slot_embedding = nn.Embedding(max(slots) + 1, width)
        self.query = nn.Linear(2 + PER_CELL * sum(self.context.member_sizes), width)
        self.head = nn.ModuleList(Block(width, dropout) for _ in range(head_blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3 * components + (head == "spline"))
        self.out_levels = nn.Linear(width, self.max_levels) if self.max_levels else None
        with torch.no_grad():
            for layer in (self.out, self.out_levels):
                if layer is not None:
                    layer.weight.zero_()
                    layer.bias.zero_()
            if head == "mixture":  # close to a standard normal, of components that differ
                spread = torch.special.ndtri((torch.arange(components) + 0.5) / components)
                start = torch.stack([torch.zeros(components), 0.8 * spread, torch.full((components,), math.log(0.6))])
                self.out.bias.copy_(start.flatten())
        self.eval()  # only a training loop leaves units out

    def as_base(self) -> AnyOrderFlow:
        """A copy that answers as its Gaussian base does: what it has learned besides is left out."""
        alone = copy.deepcopy(self)
        with torch.no_grad():
            for layer in (alone.out, alone.out_levels):
                if layer is not None:
                    layer.weight.zero_()
                    layer.bias.zero_()
            if self.kind == "mixture":  # of components that are one standard normal
                alone.out.bias[2 * self.components :] = math.log1p(-self.min_scale)
        return alone

    def link(self, linked: Tensor) -> None:
        """Lets dependence run along the `linked` pairs (D, D) of columns alone; all False: nothing is known of any."""
        self.links = links_between(linked)

    def fit_base(self, values: Tensor) -> None:
        """Fits the Gaussian base and the normal scores to working rows (N, D) with NaN."""
        self.context.fit(values, None if self.links is None else self.links.linked)

    def refit_base(self, values: Tensor) -> None:
        """Fits the Gaussian base alone; what the network reads keeps its meaning."""
        self.context.fit_base(values, None if self.links is None else self.links.linked)

    def visible(self, known: Tensor, target: Tensor) -> Tensor:
        """Which of the `known` cells (..., D) the `target` column (...) depends on, (..., D)."""
        return known if self.links is None else self.links.visible(known, target)

    def parameters_of(self, values: Tensor, known: Tensor, targets: Tensor, anchor: Any = None) -> Parameters:
        """What the heads of `targets` (..., T) need, given the cells of `values` (..., D) that are `known` (..., D).

        `known` may be smaller and broadcast: rows with the same cells known share the work of the Gaussian base.
        """
        seen = self.context(values, known, anchor)
        hidden = self.backbone(seen)
        cells = self.context.first[targets]
        mean, scale = seen.mean.gather(-1, cells), seen.scale.gather(-1, cells)
        asked = torch.cat([mean.unsqueeze(-1), scale.log().unsqueeze(-1), *self.context.own(seen.members, targets)], -1)
        hidden = hidden.unsqueeze(-2) + self.slot_embedding(self.slot[targets]) + self.query(asked)
        for block in self.head:
            hidden = block(hidden)
        hidden = F.silu(self.norm(hidden))
        logits = None
        if self.out_levels is not None:  # around the base's linear probabilities
            level = torch.arange(self.max_levels, device=targets.device)
            levels = (cells.unsqueeze(-1) + level).clamp_max(seen.mean.shape[-1] - 1)
            likely = seen.mean.unsqueeze(-2).expand(*levels.shape[:-1], -1).gather(-1, levels)
            logits = self.out_levels(hidden) + likely.clamp(0.01, 1.0).log()
        return Parameters(self.out(hidden), mean, scale, logits)

    def cell(
        self, raw: Tensor, m: Tensor, s: Tensor, targets: Tensor, stretch: Tensor | None = None
    ) -> Mixture | Spline:
        """The heads of continuous targets, in working coordinates: shaped around the base's mean and scale, and then
        stretched about their middle by the factors of their columns, unless others (...,) are handed."""
        stretch = self.stretch[targets] if stretch is None else stretch
        bounds = (self.lower[targets], self.upper[targets]) if self.bounded else (None, None)
        if self.kind == "spline":
            widths, heights, slopes = raw.split([self.components, self.components, self.components + 1], -1)
            return Spline(widths, heights, slopes, m, s * stretch, *bounds)
        logits, loc, log_scale = raw.unflatten(-1, (3, self.components)).unbind(-2)
        scale = self.min_scale + log_scale.clamp(-12.0, 2.0).exp()
        middle = (logits.softmax(-1) * loc).sum(-1, keepdim=True)
        loc, scale = middle + stretch.unsqueeze(-1) * (loc - middle), stretch.unsqueeze(-1) * scale
        loc, scale = m.unsqueeze(-1) + s.unsqueeze(-1) * loc, s.unsqueeze(-1) * scale
        if bounds[0] is None or bounds[1] is None:
            return Mixture(logits, loc, scale)
        reach = 3.0 * scale  # a component far outside the support would hold no mass to tell it by
        loc = loc.maximum(bounds[0].unsqueeze(-1) - reach).minimum(bounds[1].unsqueeze(-1) + reach)
        return Mixture(logits, loc, scale, *bounds)

    def cell_log_prob(
        self, values: Tensor, known: Tensor, targets: Tensor, answers: Tensor, anchor: Any = None
    ) -> Tensor:
        """log p(answer | known cells) (..., T) of each target on its own.

        `values` (..., D) is read where `known` (..., D) is true, and the two broadcast; `targets` (..., T) are columns,
        `answers` (..., T) their values.
        """
        return self._score(self.parameters_of(values, known, targets, anchor), targets, answers)

    def _score(self, parameters: Parameters, targets: Tensor, answers: Tensor) -> Tensor:
        raw, mean, scale, logits = parameters
        if logits is None:
            return self.cell(raw, mean, scale, targets).log_prob(answers)
        discrete = self.categorical[targets]
        continuous = self.cell(raw, mean, scale, targets).log_prob(torch.where(discrete, mean.detach(), answers))
        code = torch.where(discrete, answers, 0.0).long().clamp(0, self.max_levels - 1)
        log_mass = self._log_mass(logits, targets).expand(*continuous.shape, self.max_levels)
        picked = log_mass.gather(-1, code.expand(continuous.shape).unsqueeze(-1)).squeeze(-1)
        return torch.where(discrete, picked, continuous)

    def _log_mass(self, logits: Tensor, targets: Tensor) -> Tensor:
        levels = self.num_levels[targets].clamp_min(1).unsqueeze(-1)
        beyond = torch.arange(self.max_levels, device=logits.device) >= levels
        return logits.masked_fill(beyond, -math.inf).log_softmax(-1)

    def _ask(self, row: Tensor, known: Tensor, target: int, anchor: Any) -> tuple[Parameters, Tensor]:
        """Parameters of one target for rows (..., D), and its column as a tensor (...,)."""
        shape = torch.broadcast_shapes(row.shape, known.shape)[:-1]
        column = torch.full(shape, target, dtype=torch.long, device=row.device)
        seen = self.visible(known, column.new_tensor(target))
        raw, mean, scale, logits = self.parameters_of(row, seen, column.unsqueeze(-1), anchor)
        return Parameters(
            raw.squeeze(-2),
            mean.squeeze(-1),
            scale.squeeze(-1),
            None if logits is None else logits.squeeze(-2),
        ), column

    @property
    def dtype(self) -> torch.dtype:
        return self.out.weight.dtype

    def head_of(self, row: Tensor, known: Tensor, target: int, anchor: Any = None) -> Mixture | Spline:
        """p(target | known cells) of a continuous column, for working rows (..., D), as a law of one cell."""
        (raw, mean, scale, _), column = self._ask(row, known, target, anchor)
        return self.cell(raw, mean, scale, column)

    # ------------------------------------------------------------------ whole queries
    def log_prob(
        self,
        given: Tensor,
        known: Tensor,
        targets: Sequence[int],
        answers: Tensor,
        wanted: Tensor | None = None,
        anchor: Any = None,
    ) -> Tensor:
        r"""Exact :math:`\log p(t \mid g)` in one pass.

        Arguments:
            given: working values (..., D), read where `known` (..., D) is true.
            targets: n columns, in the order of the chain.
            answers: their values (sample..., ..., n), broadcasting against `given` from the right.
            wanted: which answers count (sample..., ..., n); the others are marginalised. None: all.
            anchor: what the base has worked out for the given rows, if no target changes it (`TaskContext`).

        Returns:
            (sample..., ...)
        """
        shape = torch.broadcast_shapes(given.shape[:-1], answers.shape[:-1])
        if not targets:
            return answers.new_zeros(shape)
        if wanted is not None:  # anything inside the support serves where a target does not count
            inside = (0.5 * (self.lower + self.upper)).nan_to_num(0.0)
            answers = torch.where(wanted, answers, inside[list(targets)])
        parameters, column = self._ask(given, known, targets[0], anchor)  # once a given row, however many answers
        terms = [self._score(parameters, column, answers[..., 0]).expand(shape).unsqueeze(-1)]
        later = targets[1:]
        if later:
            row, seen = given.expand(*shape, self.dim), known
            rows, masks = [], []
            for k, target in enumerate(targets[:-1]):
                here = torch.arange(self.dim, device=given.device) == target
                row = torch.where(here, answers[..., k : k + 1], row)
                seen = seen | (here if wanted is None else here & wanted[..., k : k + 1])
                rows.append(row)
                masks.append(seen)
            columns = torch.tensor(list(later), device=given.device).expand(*shape, len(later)).unsqueeze(-1)
            right = answers[..., 1:].expand(*shape, len(later)).unsqueeze(-1)
            rows_, masks_ = torch.stack(rows, -2), torch.stack(masks, -2)
            deeper = None if anchor is None else anchor.deeper()
            masks_ = self.visible(masks_, columns.squeeze(-1))
            scores = self.cell_log_prob(rows_, masks_, columns, right, deeper).squeeze(-1)
            terms.append(scores)
        joined = torch.cat(terms, -1)
        return (joined if wanted is None else torch.where(wanted, joined, 0.0)).sum(-1)

    def draw(
        self,
        given: Tensor,
        known: Tensor,
        targets: Sequence[int],
        shape: Sequence[int],
        uniform: Tensor | None = None,
        generator: torch.Generator | None = None,
        anchor: Any = None,
    ) -> Tensor:
        """Draws (*shape, n) of the targets, one chain each.

        Arguments:
            given, known, anchor: as in `log_prob`; they broadcast against `shape` from the right.
            uniform: (*shape, n) in (0, 1): each target is its quantile there, differentiable in the given cells and in
                the weights. None: plain draws, without gradient.
        """
        shape = torch.Size(shape)
        row, seen, drawn = given, known, []
        for k, target in enumerate(targets):
            parameters, column = self._ask(row, seen, target, anchor)
            raw, mean, scale, logits = parameters
            if logits is not None and self.layout.levels[target]:
                mass = self._log_mass(logits, column).exp().expand(*shape, self.max_levels)
                level = torch.rand(shape, generator=generator, dtype=mass.dtype, device=mass.device)
                level = level if uniform is None else uniform[..., k]
                code = (mass.cumsum(-1) < level.unsqueeze(-1)).sum(-1)
                value = code.clamp_max(self.layout.levels[target] - 1).to(mass)
            else:
                cell = self.cell(raw, mean, scale, column)
                value = cell.sample(generator, shape) if uniform is None else cell.icdf(uniform[..., k])
            drawn.append(value)
            here = torch.arange(self.dim, device=given.device) == target
            row, seen = torch.where(here, value.unsqueeze(-1), row), seen | here
        return torch.stack(drawn, -1) if drawn else given.new_zeros(*shape, 0)

    @torch.no_grad()
    def complete(self, rows: Tensor, generator: torch.Generator | None = None, at_once: int = 8192) -> Tensor:
        """Rows (N, D) whose NaN cells are drawn from p(missing | observed), each row along its own chain.

        The chain is that of the columns, or where not all are linked one in which each cell is drawn after those that
        separate it from the rest.
        """
        return torch.cat([self._completed(part, generator) for part in rows.split(at_once)]) if len(rows) else rows

    def _completed(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        known, filled = ~rows.isnan(), rows.nan_to_num(0.0)
        order = known.logical_not().to(torch.uint8).argsort(stable=True)
        if self.links is not None:
            order = self.links.order(known)
        told = known.sum(-1)
        for k in range(int((self.dim - told).max())):
            active = (told + k < self.dim).nonzero()[:, 0]
            target = order[active].gather(1, (told[active] + k).unsqueeze(-1))  # (n, 1)
            seen = self.visible(known[active], target.squeeze(-1))
            raw, mean, scale, logits = self.parameters_of(filled[active], seen, target)
            value = self.cell(raw, mean, scale, target).sample(generator)
            if logits is not None:
                mass = self._log_mass(logits, target).exp().cumsum(-1)
                code = (mass < torch.rand(value.shape, generator=generator).to(mass).unsqueeze(-1)).sum(-1)
                code = code.minimum((self.num_levels[target] - 1).clamp_min(0))
                value = torch.where(self.categorical[target], code.to(value), value)
            filled[active.unsqueeze(-1), target] = value
            known[active.unsqueeze(-1), target] = True
        return filled
