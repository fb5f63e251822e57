r"""The tasks that a manifold has learned: rows to rehearse, beliefs to compare with, and what held-out ones showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_invman.tasks.effects import HELD_OUT
from pyro_invman.tasks.network import ManifoldNetwork
from pyro_invman.tasks.rows import TaskRows
from pyro_invman.tasks.typicality import p_value

_ROWS = 24  # of each task
_CHECKED = 40  # held-out tasks whose p-values are kept
_SIMULATIONS = 99


@dataclass(frozen=True)
class Memory:
    """Tasks by name, with up to 24 working rows of each (N, D), the task of each row (N,), beliefs `loc` (T, L) and
    `covariance` (T, L, L), which tasks were held out, and the p-values of these."""

    names: tuple[str, ...]
    rows: Tensor
    task: Tensor
    loc: Tensor
    covariance: Tensor
    held_out: Tensor
    p_values: Tensor

    @classmethod
    def empty(cls, dim: int, latent_dim: int) -> Memory:
        """No task yet."""
        none = torch.empty(0, dtype=torch.long)
        return cls(
            (),
            torch.empty(0, dim),
            none,
            torch.empty(0, latent_dim),
            torch.empty(0, latent_dim, latent_dim),
            none,
            torch.empty(0, dtype=torch.float64),
        )

    @classmethod
    @torch.no_grad()
    def of(cls, network: ManifoldNetwork, data: TaskRows, names: Sequence[str], held_out: Tensor, seed: int) -> Memory:
        """What is kept of the tasks of `data`."""
        generator = torch.Generator().manual_seed(seed)
        rows = data.batch(torch.arange(len(names)), _ROWS, generator)
        real = (~rows.isnan()).any(-1)
        mean, factor = network.infer(rows, network.before(data.conditions)).scale_tril()
        found = []
        for t in held_out[:_CHECKED].tolist():
            some = rows[t, : 1 + t % _ROWS]
            with network.base.without(HELD_OUT):
                found.append(p_value(network, some, network.before(data.conditions[t]), generator, _SIMULATIONS))
        return cls(
            tuple(names),
            rows[real],
            real.nonzero()[:, 0],
            mean,
            factor @ factor.mT,
            held_out,
            torch.tensor(found, dtype=torch.float64),
        )

    def split_with(self, new: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tasks to learn from and to hold out when `new` ones join: the new are drawn as often as all the old, and a
        tenth of them is held out."""
        held = set(self.held_out.tolist())
        old = torch.tensor([t for t in range(len(self.names)) if t not in held], dtype=torch.long)
        joined = torch.randperm(new, generator=generator) + len(self.names)
        checked = new // 10
        learned = torch.cat([old, joined[checked:].repeat(max(1, len(old) // new))])
        return learned, torch.cat([self.held_out, joined[:checked]])

    def tensors(self) -> dict[str, Tensor]:
        """All but the names."""
        return {name: value for name, value in vars(self).items() if name != "names"}

    @classmethod
    def from_tensors(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> Memory:
        """What `tensors` gave."""
        return cls(tuple(names), **tensors)
