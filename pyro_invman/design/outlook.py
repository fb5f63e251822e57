r"""What the rows that could be measured, and what is asked for, have to do with each other in one task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_invman.density.joint_normal import JointNormal
from pyro_invman.density.normal_rows import NormalRows
from pyro_invman.density.remainder import Remainder
from pyro_invman.tasks.contamination import cells_of, normal_rows
from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.evidence import evidence_of
from pyro_invman.tasks.inference import quasi_draws
from pyro_invman.tasks.network import ManifoldNetwork
from pyro_invman.tasks.sources import Heard

if TYPE_CHECKING:
    import xarray as xr

    from pyro_invman.tasks.manifold import ProcessManifold

_DRAWS = 1024  # of the latent, by which a sought cell is made linear in it


class Known(NamedTuple):
    """What is known of a task: working `rows` (K, D) of the reference, the beliefs `before` and after them, working
    rows of `others` (K', D), each of a `source`."""

    manifold: ProcessManifold
    rows: Tensor
    before: Belief
    belief: Belief
    others: Tensor
    source: Sequence[str]

    @property
    def network(self) -> ManifoldNetwork:
        """Of the manifold."""
        return self.manifold.network

    @classmethod
    @torch.no_grad()
    def of(cls, manifold: ProcessManifold, rows: xr.Dataset | None, conditions: Mapping[str, Any] | None) -> Known:
        """Of rows of one task; errors as in :meth:`pyro_invman.ProcessManifold.infer_task`."""
        found = evidence_of(manifold, rows, conditions)
        belief = manifold.network.infer(found.working, found.before)
        return cls(manifold, found.working, found.before, belief, found.others, found.source)

    def heard(self, source: str) -> Heard:
        """What the rows of a source say of latent and bias."""
        own = self.others[[n for n, name in enumerate(self.source) if name == source]]
        return self.manifold.sources.heard(self.network, own, source, self.before, self.rows)


class Candidates(NamedTuple):
    """Rows that could be measured: `rows` (C, D) in working coordinates with their settings, which columns each would
    show, `measured` (C, D), and the `source` of each, "" for the reference."""

    rows: Tensor
    measured: Tensor
    source: Sequence[str]


class Target(NamedTuple):
    """What is asked for, of `weight` λ.

    `kind` is "task" for the latent, "parameters" or "predict" for the cells `columns` of working `rows` (G, D), which
    show what is given of each, and "bias" for that of `source`; gains are means over the rows.
    """

    kind: str
    weight: float
    columns: tuple[int, ...] = ()
    rows: Tensor | None = None
    source: str = ""


class Outlook(NamedTuple):
    """Latent, biases, candidates and targets as jointly normal cells: which of them each candidate (C, M) would show,
    where `seen`, and groups of cells (G, P), where `wanted`, for each target."""

    joint: JointNormal
    cells: Tensor
    seen: Tensor
    groups: tuple[tuple[Tensor, Tensor], ...]

    def gains(self, which: Tensor) -> Tensor:
        """Information (T, C') about each target from some candidates (C',), in nats."""
        cells, seen = self.cells[which], self.seen[which]
        found = [self.joint.information(cells, seen, *group).mean(0) for group in self.groups]
        return torch.stack(found)

    def after(self, candidate: int) -> Outlook:
        """The same once a candidate was measured, whatever it showed."""
        return self._replace(joint=self.joint.after(self.cells[candidate][self.seen[candidate]]))


class _Builder:
    """Cells as they are added: directions in the latent, and covariance given it."""

    def __init__(self, belief: Belief) -> None:
        precision = belief.precision.double()
        self.spread = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        number = len(precision)
        self.directions = [torch.eye(number, dtype=torch.float64)]
        self.apart: list[Tensor] = [torch.zeros(number, number, dtype=torch.float64)]
        self.across: list[tuple[Tensor, Tensor, Tensor]] = []
        self.number = number

    def add(self, directions: Tensor, covariance: Tensor) -> Tensor:
        """Numbers (E,) of new cells with directions (E, L) and a covariance (E, E) of their own."""
        self.directions.append(directions)
        self.apart.append(covariance)
        found = torch.arange(self.number, self.number + len(directions))
        self.number += len(directions)
        return found

    def joint(self) -> JointNormal:
        directions = torch.cat(self.directions)
        covariance = torch.block_diag(*self.apart)
        for a, b, shared in self.across:
            covariance[a.unsqueeze(-1), b] += shared
            covariance[b.unsqueeze(-1), a] += shared.mT
        covariance = covariance + directions @ self.spread @ directions.mT
        return JointNormal((covariance + covariance.mT) / 2)


@torch.no_grad()
def outlook(known: Known, candidates: Candidates, targets: Sequence[Target], seed: int = 0) -> Outlook:
    r"""The closed form under the manifold, as a joint normal of all that is asked about.

    Given the latent, observations of the reference are what its base says, the task's own function with the rows so far
    included; those of another source are heard through its instrument, all with one bias; a sought setting is linear in
    the latent as draws of the manifold's conditional say. The latent is as the belief has it.
    """
    base, made = known.network.base, _Builder(known.belief)
    number = base.num_observations
    predicted = [t for t in targets if t.kind == "predict"]
    own = torch.tensor([not name for name in candidates.source], dtype=torch.bool)
    rows = torch.cat([candidates.rows[own], *(t.rows for t in predicted if t.rows is not None)])
    of_reference = made.add(*_reference(known, rows)).reshape(-1, number)
    cells = torch.zeros(len(candidates.rows), number, dtype=torch.long)
    cells[own] = of_reference[: int(own.sum())]
    biases: dict[str, Tensor] = {}
    asked = [t.source for t in targets if t.kind == "bias"]
    for name in dict.fromkeys([*(s for s in candidates.source if s), *asked]):
        here = torch.tensor([s == name for s in candidates.source])
        biases[name], cells[here] = _other(known, made, name, candidates.rows[here])
    groups, taken = [], int(own.sum())
    for target in targets:
        if target.kind == "task":
            group = torch.arange(known.network.latent_dim).unsqueeze(0)
            groups.append((group, torch.ones_like(group, dtype=torch.bool)))
        elif target.kind == "bias":
            group = biases[target.source].unsqueeze(0)
            groups.append((group, torch.ones_like(group, dtype=torch.bool)))
        elif target.rows is not None and target.kind == "predict":
            group = of_reference[taken : taken + len(target.rows)]
            taken += len(target.rows)
            groups.append((group, _owned(known.network, target.columns).expand_as(group)))
        elif target.rows is not None:
            found = [made.add(*_sought(known, row, target.columns, seed)) for row in target.rows]
            groups.append((torch.stack(found), torch.ones(len(found), len(found[0]), dtype=torch.bool)))
    return Outlook(made.joint(), cells, measured_cells(known.network, candidates.measured), tuple(groups))


def measured_cells(network: ManifoldNetwork, measured: Tensor) -> Tensor:
    """Which cells (..., M) of evidence are shown where columns (..., D) are `measured`."""
    return measured[..., network.context.owner[network.base.answers]]


def _owned(network: ManifoldNetwork, columns: Sequence[int]) -> Tensor:
    asked = torch.zeros(network.dim, dtype=torch.bool)
    asked[list(columns)] = True
    return measured_cells(network, asked)


def _reference(known: Known, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Directions (R M, L) and covariance (R M, R M) given the latent of the observations of working rows (R, D)."""
    network, base = known.network, known.network.base
    cells = cells_of(network, rows)
    filled, told = cells.nan_to_num(0.0), ~cells.isnan()
    law = normal_rows(base, filled, told)
    functions, settings, answers = base.functions, base.settings, base.answers
    blocks = torch.block_diag(*law.covariance) if len(rows) else torch.zeros(0, 0, dtype=torch.float64)
    if functions is None or not len(rows):
        return law.directions.flatten(0, 1), blocks
    before = cells_of(network, known.rows)
    far, seen = before.nan_to_num(0.0), ~before.isnan()
    remainder = Remainder(functions, far[:, settings], seen[:, settings], far[:, answers], seen[:, answers])
    anchor, covariance = remainder.together(filled[:, settings], told[:, settings])
    size, turn = torch.linalg.eigh(covariance)  # functions of several observations vary together as their noise does
    root = (turn * size.clamp_min(0.0).sqrt().unsqueeze(-2)) @ turn.mT
    joined = torch.einsum("qab,rcb,qr->aqcr", root, root, functions.residuals.covariance)
    read = functions.readable(told[:, settings])
    both = (read.unsqueeze(-1) & read).repeat_interleave(law.mean.shape[1], 0).repeat_interleave(law.mean.shape[1], 1)
    directions = torch.where(read[:, None, None], anchor.directions, law.directions).flatten(0, 1)
    alone = torch.where(read[:, None, None], 0.0, law.covariance)
    return directions, torch.where(both, joined.flatten(2, 3).flatten(0, 1), 0.0) + torch.block_diag(*alone)


def _other(known: Known, made: _Builder, source: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (M,) of a source's bias and (R, M) of what it would show of working rows (R, D)."""
    heard = known.heard(source)
    slope, _, spread = heard.bias_given_latent()
    bias = made.add(slope, spread)
    cells = cells_of(known.network, rows)
    law: NormalRows = normal_rows(known.network.base, cells.nan_to_num(0.0), ~cells.isnan())
    _, _, log_gain, log_noise = heard.instrument
    shown = law.through(
        torch.zeros_like(law.mean), log_gain.exp().expand_as(law.mean), log_noise.exp().expand_as(law.mean)
    )
    if not len(rows):
        return bias, torch.zeros(0, len(bias), dtype=torch.long)
    repeated = spread.repeat(len(rows), len(rows))
    own = torch.block_diag(*shown.covariance) + repeated
    found = made.add((shown.directions + slope).flatten(0, 1), own)
    made.across.append((bias, found, spread.repeat(1, len(rows))))
    return bias, found.reshape(len(rows), -1)


def _sought(known: Known, row: Tensor, columns: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Directions (P, L) and covariance (P, P) of cells of a working row (D,), linear in the latent by least squares."""
    network = known.network
    latent = quasi_draws(known.belief, _DRAWS, seed)
    values = draw_cells(network, row.expand(_DRAWS, -1), latent, columns, torch.Generator().manual_seed(seed))
    wide = row.new_full((_DRAWS, network.dim + network.latent_dim), math.nan)
    wide[:, list(columns)] = values
    owner = network.context.owner
    chosen = torch.tensor([int(c) in set(columns) for c in owner.tolist()])
    cells = network.context.cells(wide)[:, chosen].double()
    design = torch.cat([latent.double(), latent.new_ones(_DRAWS, 1).double()], -1)
    slope = torch.linalg.lstsq(design, cells).solution
    left = cells - design @ slope
    covariance = left.mT @ left / (_DRAWS - design.shape[-1])
    return slope[:-1].mT, covariance + 1e-9 * torch.eye(len(covariance), dtype=torch.float64)


def draw_cells(
    network: ManifoldNetwork, rows: Tensor, latent: Tensor, columns: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Draws (N, P) of `columns` of working rows (N, D) given the others of them that are known, and latents (N, L)."""
    given, seen = with_latent(rows, latent)
    return network.flow.draw(given, seen, sorted(columns), rows.shape[:-1], generator=generator)[
        ..., [sorted(columns).index(c) for c in columns]
    ]


def with_latent(rows: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (..., D + L) of working rows (..., D) with NaN and latents (..., L), and which of them are known."""
    row, shape = rows.nan_to_num(0.0), torch.broadcast_shapes(rows.shape[:-1], latent.shape[:-1])
    given = torch.cat([row.expand(*shape, -1), latent.expand(*shape, -1)], -1)
    return given, torch.nn.functional.pad(~rows.isnan(), (0, latent.shape[-1]), value=True)
