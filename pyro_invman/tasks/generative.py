"""A manifold as Pyro functions: tasks in a plate, rows of each in another."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_invman.distributions import ConditionalFlow
from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.inference import normal
from pyro_invman.tasks.network import ManifoldNetwork
from pyro_invman.variables import Standardization, Variables


def model(
    network: ManifoldNetwork,
    standardization: Standardization,
    variables: Variables,
    before: Belief,
    rows: Tensor,
    tasks: int | None,
    rows_a_task: int | None,
) -> Tensor:
    """Latents `z` (T, 1, L) of tasks, with prior beliefs `before` (T,), and their rows (T, N, D) given the settings."""
    pyro.module("manifold", network)
    names = [variables[c].name for c in network.columns]
    with pyro.plate("task", len(rows), subsample_size=tasks, dim=-2) as t:
        assert t is not None
        latent: Tensor = pyro.sample("z", _in_plate(before, t))
        with pyro.plate("row", rows.shape[1], subsample_size=rows_a_task, dim=-1) as n:
            part = rows[t.unsqueeze(-1), n]
            settings = part.clone()
            settings[..., network.columns] = math.nan
            d = ConditionalFlow(network.flow, standardization, variables, names, settings, latent)
            pyro.sample("rows", d, obs=part[..., network.columns])
    return latent


def guide(
    network: ManifoldNetwork, standardization: Standardization, before: Belief, rows: Tensor, tasks: int | None
) -> Tensor:
    """The amortised belief about `z`, which reads all rows (T, N, D) of a task."""
    pyro.module("manifold", network)
    with pyro.plate("task", len(rows), subsample_size=tasks, dim=-2) as t:
        assert t is not None
        working = standardization(rows[t]).to(network.flow.dtype)
        belief = network.infer(working, Belief(before.precision[t], before.shift[t]))
        latent: Tensor = pyro.sample("z", _in_plate(belief, torch.arange(len(t))))
    return latent


def _in_plate(belief: Belief, tasks: Tensor) -> dist.MultivariateNormal:
    """Beliefs about some tasks, batch shape (T, 1): one latent for all rows of a task."""
    return normal(Belief(belief.precision[tasks].unsqueeze(1), belief.shift[tasks].unsqueeze(1)))
