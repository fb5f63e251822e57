"""What an any-order network sees of a row of which some cells are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_invman.density.gaussian import GaussianBase

PER_CELL = 4  # value, normal score, leave-one-out residual, known or not


class Layout(NamedTuple):
    """What the D columns of a row are.

    `levels[j]` is the number of levels of a categorical column, 0 for a continuous one; `lower` and `upper` (D,) bound
    the continuous columns in working coordinates; `groups` lists exchangeable measurements: a group is a tuple of
    members, a member the tuple of its columns.
    """

    levels: tuple[int, ...]
    lower: Tensor
    upper: Tensor
    groups: tuple[tuple[tuple[int, ...], ...], ...] = ()


class Seen(NamedTuple):
    """The known cells of rows, zero where a cell is not known.

    `singles` (..., S, 4) outside groups, `members` (..., M, 4 C) group by group, and what the Gaussian base says of
    every cell, `mean` and `scale` (..., E).
    """

    singles: Tensor
    members: list[Tensor]
    mean: Tensor
    scale: Tensor

    @property
    def present(self) -> list[Tensor]:
        """Which members (..., M) have a known cell."""
        return [(cells[..., PER_CELL - 1 :: PER_CELL] > 0).any(-1) for cells in self.members]


class Context(nn.Module):
    """Known cells to what a network reads.

    A known cell shows as its value, its normal score (so that a skewed or heavy-tailed column is readable at both
    ends), its leave-one-out residual under the Gaussian base, and a flag. A categorical column is one indicator for
    each level.
    """

    categorical: Tensor
    owner: Tensor
    level: Tensor
    first: Tensor
    member: Tensor
    single: Tensor
    knots: Tensor
    scores: Tensor

    def __init__(self, layout: Layout, num_knots: int = 33) -> None:
        super().__init__()
        self.layout = layout
        self.discrete = any(layout.levels)
        dim = len(layout.levels)
        sizes = [max(n, 1) for n in layout.levels]
        owner = [j for j, size in enumerate(sizes) for _ in range(size)]
        first = [sum(sizes[:j]) for j in range(dim)]
        grouped = {j for group in layout.groups for member in group for j in member}
        member = [-1] * dim
        for group in layout.groups:
            for m, columns in enumerate(group):
                for j in columns:
                    member[j] = m
        fixed = {
            "owner": owner,
            "level": [k for size in sizes for k in range(size)],
            "first": first,
            "member": member,
            "single": [e for e, j in enumerate(owner) if j not in grouped],
        }
        for name, entries in fixed.items():
            self.register_buffer(name, torch.tensor(entries, dtype=torch.long), persistent=False)
        self.register_buffer("categorical", torch.tensor([n > 0 for n in layout.levels]), persistent=False)
        for g, group in enumerate(layout.groups):
            self.register_buffer(f"group_{g}", torch.tensor(group), persistent=False)
        self.base = GaussianBase(len(owner))
        self.register_buffer("knots", torch.linspace(-4, 4, num_knots).repeat(dim, 1))
        self.register_buffer(
            "scores", torch.special.ndtri((torch.arange(num_knots) + 0.5) / num_knots), persistent=False
        )
        self.num_singles = len(fixed["single"])
        self.member_sizes = [len(group[0]) for group in layout.groups]

    def columns_of(self, group: int) -> Tensor:
        """Columns (M, C) of a group."""
        return self.get_buffer(f"group_{group}")

    def cells(self, values: Tensor) -> Tensor:
        """Working values (..., D) to the cells (..., E) of the base; NaN stays NaN."""
        if not self.discrete:
            return values
        spread = values[..., self.owner]
        indicator = torch.where(spread.isnan(), spread, (spread == self.level).to(values))
        return torch.where(self.categorical[self.owner], indicator, spread)

    def fit(self, values: Tensor, linked: Tensor | None = None) -> None:
        """Fits the base and the normal scores to working rows (N, D) with NaN; pairs that are not `linked` (D, D) are
        independent given the others."""
        self.fit_base(values, linked)
        self.fit_scores(values)

    @torch.no_grad()
    def fit_base(self, values: Tensor, linked: Tensor | None = None) -> None:
        """Fits the base alone."""
        self.base.fit(self.cells(values))
        for g in range(len(self.member_sizes)):
            self.base.exchange(self.first[self.columns_of(g)])
        if linked is not None:
            own = self.owner.unsqueeze(-1) == self.owner
            self.base.separate(linked[self.owner][:, self.owner] | own)

    @torch.no_grad()
    def fit_scores(self, values: Tensor) -> None:
        """Fits the normal scores alone."""
        quantiles = (torch.arange(self.knots.shape[1], dtype=torch.float64) + 0.5) / self.knots.shape[1]
        for j in range(values.shape[1]):
            seen = values[:, j][~values[:, j].isnan()].double()
            if len(seen):
                stride = -(-len(seen) // 1_000_000)  # torch.quantile takes 16 million values at most
                self.knots[j] = torch.quantile(seen[::stride], quantiles).to(self.knots)

    def normal_scores(self, values: Tensor) -> Tensor:
        """Piecewise linear map (..., D) of each column's quantiles to those of a standard normal, within ±4."""
        flat = values.reshape(-1, values.shape[-1])
        right = torch.searchsorted(self.knots, flat.detach().mT.contiguous()).clamp(1, self.knots.shape[1] - 1).mT
        column = torch.arange(flat.shape[-1], device=values.device)
        below, above = self.knots[column, right - 1], self.knots[column, right]
        slope = (self.scores[right] - self.scores[right - 1]) / (above - below).clamp_min(1e-6)
        return (self.scores[right - 1] + slope * (flat - below)).clamp(-4, 4).reshape(values.shape)

    def forward(self, values: Tensor, known: Tensor, anchor: Any = None) -> Seen:
        """`values` (..., D) in working coordinates, read where `known` (..., D); the two broadcast.

        `anchor` is what a base has worked out for the row already.
        """
        values = torch.where(known, values, 0.0)
        cells, known_cells, scores = self.cells(values), known, self.normal_scores(values)
        if self.discrete:
            known_cells = known[..., self.owner]
            scores = torch.where(self.categorical[self.owner], 0.0, scores[..., self.owner])
        mean, scale = self.expected(cells, known_cells, anchor)
        shown = (
            cells,
            scores,
            ((cells - mean) / scale).clamp(-10, 10),
            torch.ones_like(cells),
        )
        seen = torch.stack(shown, -1) * known_cells.unsqueeze(-1)  # (..., E, 4)
        members = [seen[..., self.first[self.columns_of(g)], :].flatten(-2) for g in range(len(self.member_sizes))]
        return Seen(seen[..., self.single, :] if members else seen, members, mean, scale)

    def expected(self, cells: Tensor, known: Tensor, anchor: Any = None) -> tuple[Tensor, Tensor]:
        """Mean and scale (..., E) of every cell given the known ones, leave-one-out where it is itself known."""
        mean, scale = self.base.condition(cells, known)
        return mean, scale

    def own(self, members: list[Tensor], targets: Tensor) -> list[Tensor]:
        """The known cells of the member that each target (..., T) is of, group by group; zero for one in no group."""
        shown = []
        for g, cells in enumerate(members):
            inside = (targets.unsqueeze(-1) == self.columns_of(g).flatten()).any(-1, keepdim=True)
            index = self.member[targets].clamp(0, cells.shape[-2] - 1).unsqueeze(-1)
            shown.append(cells.gather(-2, index.expand(*index.shape[:-1], cells.shape[-1])) * inside)
        return shown

    def slots(self) -> list[int]:
        """For each column what it is apart from its place among exchangeable members, as numbers from 0."""
        slots, count = [-1] * len(self.layout.levels), 0
        for group in self.layout.groups:
            for c in range(len(group[0])):
                for member in group:
                    slots[member[c]] = count
                count += 1
        for j, slot in enumerate(slots):
            if slot < 0:
                slots[j] = count
                count += 1
        return slots
