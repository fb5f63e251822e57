"""What each learned task saves the next one, on a process whose functions are learned from the tasks too."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import pyro_invman as pim
from pyro_invman.data import to_tensor, variables_of
from pyro_invman.simulators import oscillations

NUMBERS = (8, 16, 32, 64, 128)
_SCORED = 80  # rows of a fresh task before those that are scored


def on_oscillations(seed: int, tasks: int, shots: Sequence[int], fit: dict[str, Any]) -> dict[str, list[float]]:
    """Negative log predictive density a row of fresh damped oscillations after k of `shots` rows, by number of tasks
    of 20 rows that were learned."""
    learned = oscillations.simulate(max(NUMBERS), 20, seed=1000 + seed)
    fresh = oscillations.simulate(tasks, _SCORED + 20, seed=5000 + seed)
    variables = variables_of(learned)
    observed = variables.with_role("observation")
    rows = to_tensor(fresh, variables).reshape(tasks, _SCORED + 20, -1)[:, _SCORED:]
    number = np.unique(np.asarray(learned.task.values), return_inverse=True)[1]
    found = {}
    for size in NUMBERS:
        manifold = pim.ProcessManifold(variables, 8, seed=seed)
        manifold.fit(learned.isel(row=number < size), seed=seed, progress=False, **fit)
        losses = []
        for k in shots:
            scores = []
            for t in range(tasks):
                begin = t * (_SCORED + 20)
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore", pim.UnfamiliarTask)
                    task = manifold.infer_task(fresh.isel(row=slice(begin, begin + k)), num_particles=128)
                    given = {v.name: rows[t, :, j] for j, v in enumerate(variables) if v.name not in observed}
                    answers = rows[t][:, variables.indices(observed)]
                    scores.append(task.conditional(observed, given).log_prob(answers).mean())
            losses.append(-float(torch.stack(scores).mean()))
        found[str(size)] = losses
    return found
