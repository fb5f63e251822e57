"""Rows of many tasks, from which batches of tasks are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_invman.data import labels_of, to_tensor
from pyro_invman.distributions import stack_given
from pyro_invman.variables import DataError, Variables

if TYPE_CHECKING:
    import xarray as xr


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


def by_task(ds: xr.Dataset, variables: Variables) -> tuple[Tensor, Tensor, list[str]]:
    """Natural rows (N, D), the task of each (N,), and the tasks' names.

    Raises:
        DataError: there is no task column, or cells are outside their support.
    """
    values = to_tensor(ds, variables)
    names = labels_of(ds, "task")
    if names is None:
        raise DataError("task: the data have no task column; name it in read(..., task=) or from_columns(..., task=)")
    found = sorted(set(names))
    number = {name: t for t, name in enumerate(found)}
    return values, torch.tensor([number[name] for name in names], dtype=torch.long), found


def conditions_of(cells: Tensor, task: Tensor) -> Tensor:
    """What a prior sees of each task (T, 2 C): its constant cells, of rows (N, C), zero with a flag where not known."""
    tasks = int(task.max()) + 1 if len(task) else 1
    seen = (~cells.isnan()).to(cells)
    total = cells.new_zeros(tasks, cells.shape[1]).index_add(0, task, cells.nan_to_num(0.0))
    number = cells.new_zeros(tasks, cells.shape[1]).index_add(0, task, seen)
    return torch.cat([total / number.clamp_min(1.0), (number == 0).to(cells)], -1)


def of_one_task(rows: xr.Dataset | None, conditions: Mapping[str, Any], variables: Variables) -> tuple[Tensor, Tensor]:
    """Rows of one task in natural units (K, D), and what is stated of it as a whole (D,), NaN where nothing is.

    Raises:
        DataError: rows of several tasks, cells outside their support, or a condition that is none or not one number.
    """
    natural = torch.empty(0, len(variables), dtype=torch.float64)
    if rows is not None:
        names = labels_of(rows, "task")
        if names is not None and len(set(names)) > 1:
            raise DataError(f"rows: found {len(set(names))} tasks, expected rows of one; select one of them")
        natural = to_tensor(rows, variables)
    for name in conditions:
        if variables[variables.index(name)].role != "condition":
            raise DataError(f"conditions: {name} is a {variables[variables.index(name)].role}")
    stated = stack_given(variables, dict(conditions), torch.float64)
    if stated.dim() != 1:
        raise DataError(f"conditions: found shape {tuple(stated.shape[:-1])}, expected one number a condition")
    return torch.where(natural.isnan(), stated, natural), stated


def first_known(rows: Tensor, names: Sequence[str], variables: Variables) -> dict[str, float]:
    """The first known cell of each of some columns of rows (K, D), where there is one."""
    found = {}
    for name in names:
        cells = rows[:, variables.index(name)]
        cells = cells[~cells.isnan()]
        if len(cells):
            found[name] = float(cells[0])
    return found
