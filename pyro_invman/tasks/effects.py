r"""The closed-form process under a manifold: linear, or bent where tasks held out say that it bends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pyro_invman.density.context import Context
from pyro_invman.density.random_effects import Measurements, RandomEffects
from pyro_invman.density.random_functions import Anchor, RandomFunctions
from pyro_invman.density.remainder import MOST, Remainder, drawn

_FEWEST_TASKS = 8
_MARGIN = 0.1  # nats a task by which functions that bend must describe tasks better
_ROUNDS = 3  # of expectation–maximisation, to tell whether functions bend
HELD_OUT = 0  # the group of tasks that are not learned from, but stop the learning


class TaskEffects(nn.Module):
    """Observations of a row given its settings and its task's latent, as normals.

    `effects` is linear and answers whatever is known. `functions` (None where the data are as well described without)
    bend, and answer where a row knows the settings that it needs; both share the latent.

    Arguments:
        settings: which of the E cells of a row are settings.
        latent_dim: L.
    """

    settings: Tensor
    answers: Tensor

    def __init__(self, settings: list[bool], latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.effects = RandomEffects(settings, latent_dim)
        self.functions: RandomFunctions | None = None
        mask = torch.tensor(settings)
        self.register_buffer("settings", mask.nonzero()[:, 0], persistent=False)
        self.register_buffer("answers", (~mask).nonzero()[:, 0], persistent=False)

    @property
    def num_observations(self) -> int:
        """M, the cells that are not settings."""
        return len(self.answers)

    @torch.no_grad()
    def fit(
        self,
        cells: Tensor,
        task: Tensor,
        bend: bool = True,
        seed: int = 0,
        group: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> None:
        """Fits rows (N, E) with NaN of tasks (N,), each of a `group` (T,): what bends is fitted to all and can leave
        one out (`without`), what is linear never sees those of group 0, which are held out. Cells (E,) that are
        `constant` are one value a task.

        With functions if they may `bend` and, learned from three quarters of the tasks, describe the others better than
        what is linear does, by more than a tenth of a nat a task.
        """
        tasks = int(task.max()) + 1
        self.functions = None
        if bend and tasks >= _FEWEST_TASKS and len(self.settings):
            self.functions = self._functions(
                cells, task, tasks, seed, group, None if constant is None else constant[self.answers]
            )
        if self.functions is None:
            learned = torch.ones_like(task, dtype=torch.bool) if group is None else group[task] != HELD_OUT
            self.effects.fit(cells[learned], task[learned].unique(return_inverse=True)[1])
        else:
            believed = self._measured(self.functions, cells).posterior(task, tasks)
            self.effects.fit(cells, task, believed)

    @torch.no_grad()
    def separate(self, linked: Tensor) -> None:
        """Makes pairs of cells that are not `linked` (E, E) independent given the others and the latent, which rows
        that show no such pair together cannot tell."""
        self.effects.separate(linked)
        if self.functions is not None:
            self.functions.residuals.separate(linked[self.answers][:, self.answers])

    def without(self, group: int | None) -> AbstractContextManager[None]:
        """Inside, functions of settings are known from the tasks of other groups alone."""
        return nullcontext() if self.functions is None or group is None else self.functions.without(group)

    def _functions(
        self, cells: Tensor, task: Tensor, tasks: int, seed: int, group: Tensor | None, constant: Tensor | None
    ) -> RandomFunctions | None:
        order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
        apart = (order[: max(2, tasks // 4)] == task.unsqueeze(-1)).any(-1)
        learned = task[~apart].unique(return_inverse=True)[1]
        optional = cells[:, self.settings].isnan().any(0)
        bent = self._fitted(cells[~apart], learned, seed, optional, constant)
        read = apart & bent.readable(~cells[:, self.settings].isnan())
        rows, of = cells[read], task[read].unique(return_inverse=True)[1]
        linear = RandomEffects(self._is_setting(), self.latent_dim)
        linear.fit(cells[~apart], learned)
        alone = linear.measurements(rows.nan_to_num(0.0), ~rows.isnan())
        number = int(of.max()) + 1 if len(of) else 0
        gain = torch.stack([self._evidence(bent, rows[of == t]) for t in range(number)])
        gain = gain - alone.log_evidence(of, number)
        better = number > 0 and float(gain.mean()) > _MARGIN
        return self._fitted(cells, task, seed, optional, constant, bent, group) if better else None

    def _evidence(self, functions: RandomFunctions, rows: Tensor) -> Tensor:
        """Log-density () of the observations of one task's rows (K, E), in blocks of 512, given their settings."""
        total = rows.new_zeros((), dtype=torch.float64)
        for part in rows.split(MOST):
            known, filled = ~part.isnan(), part.nan_to_num(0.0)
            settings, answers = (..., self.settings), (..., self.answers)
            told = functions, filled[settings], known[settings], filled[answers], known[answers]
            measured = functions.measurements(Remainder(*told).sequence(), filled[answers], known[answers])
            total = total + measured.log_evidence(torch.zeros(len(part), dtype=torch.long), 1).sum()
        return total

    def _is_setting(self) -> list[bool]:
        mask = torch.zeros(len(self.settings) + len(self.answers), dtype=torch.bool)
        mask[self.settings] = True
        return mask.tolist()

    def _fitted(
        self,
        cells: Tensor,
        task: Tensor,
        seed: int,
        optional: Tensor,
        constant: Tensor | None,
        like: RandomFunctions | None = None,
        group: Tensor | None = None,
    ) -> RandomFunctions:
        return RandomFunctions.fitted(
            cells[:, self.settings],
            cells[:, self.answers],
            task,
            self.latent_dim,
            seed=seed,
            like=like,
            optional=optional,
            group=group,
            constant=constant,
            iterations=_ROUNDS if like is None else 8,
        )

    def _measured(self, functions: RandomFunctions, cells: Tensor) -> Measurements:
        known, filled = ~cells.isnan(), cells.nan_to_num(0.0)
        anchor = functions.anchor(filled[..., self.settings], known[..., self.settings])
        return functions.measurements(anchor, filled[..., self.answers], known[..., self.answers])

    def anchor(self, cells: Tensor, known: Tensor) -> Anchor | None:
        """What the settings of rows (..., E) with cells `known` say of their observations; None where it is linear."""
        if self.functions is None:
            return None
        return self.functions.anchor(cells[..., self.settings], known[..., self.settings])

    def remainder(self, cells: Tensor, known: Tensor) -> Remainder | None:
        """What rows (..., K, E) of tasks say of them beyond the latent; None where it is linear, or without a row.

        Of more than 512 rows, 512 are taken at random.
        """
        if self.functions is None or not cells.shape[-2]:
            return None
        if cells.shape[-2] > MOST:
            some = torch.randperm(cells.shape[-2], generator=torch.Generator().manual_seed(0))[:MOST]
            cells, known = cells[..., some, :], known[..., some, :]
        settings, answers = self.settings, self.answers
        return Remainder(
            self.functions, cells[..., settings], known[..., settings], cells[..., answers], known[..., answers]
        )

    def sequence(self, cells: Tensor, known: Tensor) -> Anchor | None:
        """Anchors of rows (..., K, E), each given those before it; of more than 512 rows, in blocks of 512."""
        if self.functions is None:
            return None
        if not cells.shape[-2]:
            return self.anchor(cells, known)
        blocks = [self.remainder(*block) for block in zip(cells.split(MOST, -2), known.split(MOST, -2), strict=True)]
        found = [block.sequence() for block in blocks if block is not None]
        return _joined(found)

    def dreamt(
        self, cells: Tensor, known: Tensor, shape: Sequence[int], generator: torch.Generator | None
    ) -> Anchor | None:
        """Anchors of rows (..., K, E) with the task's function beyond the latent drawn for each of `shape` (..., K)."""
        if self.functions is None or not cells.shape[-2]:
            return None
        settings = self.settings
        found = []
        for part, told in zip(cells.split(MOST, -2), known.split(MOST, -2), strict=True):
            here = (*shape[:-1], part.shape[-2])
            found.append(drawn(self.functions, part[..., settings], told[..., settings], here, generator))
        return _joined(found)

    def measurements(self, cells: Tensor, known: Tensor, anchor: Anchor | None = None) -> Measurements:
        """What rows (..., E) with cells `known` measure of the latent; `anchor` as it was worked out for them."""
        if self.functions is None:
            return self.effects.measurements(cells, known)
        anchor = anchor or self.functions.anchor(cells[..., self.settings], known[..., self.settings])
        bent = self.functions.measurements(anchor, cells[..., self.answers], known[..., self.answers])
        readable = self.functions.readable(known[..., self.settings])
        if bool(readable.all()):
            return bent
        linear = self.effects.measurements(cells, known)
        joined = []
        for a, b in zip(bent, linear, strict=True):
            joined.append(torch.where(readable.reshape(*readable.shape, *[1] * (a.dim() - readable.dim())), a, b))
        return Measurements(*joined)


def _joined(blocks: list[Anchor]) -> Anchor:
    """Blocks of rows as one."""
    mean, scale, directions = zip(*blocks, strict=True)
    return Anchor(torch.cat(mean, -2), torch.cat(scale, -2), torch.cat(directions, -3))


class TaskContext(Context):
    """What a network sees of a row and its task's latent, which are the last cells, on a base that may bend."""

    base_of_tasks: TaskEffects

    def row_cells(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cells (..., E) of working rows (..., D) without a latent, and which are known, of rows with NaN."""
        blank = rows.new_zeros(*rows.shape[:-1], self.base_of_tasks.latent_dim)
        cells = self.cells(torch.cat([rows, blank], -1))[..., : -self.base_of_tasks.latent_dim]
        return cells.nan_to_num(0.0), ~cells.isnan()

    def expected(self, cells: Tensor, known: Tensor, anchor: Anchor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and scale (..., E + L) of every cell given the known ones; `anchor` as it was worked out for the row."""
        mean, scale = super().expected(cells, known)
        base = self.base_of_tasks
        functions = base.functions
        if functions is None:
            return mean, scale
        number = base.latent_dim
        settings, answers = base.settings, base.answers
        anchor = anchor or functions.anchor(cells[..., settings], known[..., settings])
        told = known[..., -number:]
        latent = torch.where(told, cells[..., -number:], 0.0).to(anchor.mean)
        centre = anchor.mean + torch.einsum("...ml,...l->...m", anchor.directions, latent)
        open_ = torch.where(told, 0.0, 1.0).to(anchor.mean).unsqueeze(-2)
        size = (anchor.scale.square() + (anchor.directions * open_).square().sum(-1)).sqrt()
        centre, size = functions.given_others(centre, size, cells[..., answers], known[..., answers])
        readable = functions.readable(known[..., settings]).unsqueeze(-1)
        shape = torch.broadcast_shapes(mean.shape[:-1], centre.shape[:-1])
        mean, scale = mean.expand(*shape, -1), scale.expand(*shape, -1)
        centre = torch.where(readable, centre.to(mean), mean[..., answers])
        size = torch.where(readable, size.to(scale), scale[..., answers])
        return mean.index_copy(-1, answers, centre), scale.index_copy(-1, answers, size)
