"""Rows of many tasks, from which batches of tasks are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class TaskRows:
    """Ragged tasks: rows (N, D), which task each is of, and what the prior sees of each task.

    Arguments:
        rows: working coordinates with NaN.
        task: (N,), from 0.
        conditions: (T, C).
        renew: where cells are rounded, gives rows (..., D) of some indices anew, within their rounding.
    """

    def __init__(
        self,
        rows: Tensor,
        task: Tensor,
        conditions: Tensor,
        renew: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        self.rows, self.conditions, self._renew = rows, conditions, renew
        self._by_task = task.argsort(stable=True)
        self.counts = torch.bincount(task, minlength=len(conditions))
        self._starts = self.counts.cumsum(0) - self.counts

    def batch(self, which: Tensor, most: int, generator: torch.Generator) -> Tensor:
        """Up to `most` rows of each task, in random order: (B, K, D), NaN where a task has fewer."""
        counts = self.counts[which].unsqueeze(-1)
        key = torch.rand(len(which), int(counts.max()), generator=generator)
        key, place = torch.where(torch.arange(key.shape[1]) < counts, key, 2.0).sort(-1)
        key, place = key[:, :most], place[:, :most]
        last = len(self._by_task) - 1
        index = self._by_task[(self._starts[which].unsqueeze(-1) + place).clamp_max(last)]
        rows = self.rows[index] if self._renew is None else self._renew(index, generator)
        return torch.where((key < 2.0).unsqueeze(-1), rows, math.nan)

    def all(self) -> Tensor:
        """Every row of every task, in its own order: (T, K, D), NaN where a task has fewer."""
        place = torch.arange(len(self.rows)) - self._starts.repeat_interleave(self.counts)
        tasks = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        padded = self.rows.new_full((len(self.counts), int(self.counts.max()), self.rows.shape[-1]), math.nan)
        padded[tasks, place] = self.rows[self._by_task]
        return padded


def conditions_of(cells: Tensor, task: Tensor) -> Tensor:
    """What a prior sees of each task (T, 2 C): its constant cells, of rows (N, C), zero with a flag where not known."""
    tasks = int(task.max()) + 1 if len(task) else 1
    seen = (~cells.isnan()).to(cells)
    total = cells.new_zeros(tasks, cells.shape[1]).index_add(0, task, cells.nan_to_num(0.0))
    number = cells.new_zeros(tasks, cells.shape[1]).index_add(0, task, seen)
    return torch.cat([total / number.clamp_min(1.0), (number == 0).to(cells)], -1)
