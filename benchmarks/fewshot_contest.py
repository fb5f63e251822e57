r"""This package and its peers in the same folds of the same tables: new tasks after k rows, in both directions.

Forward are the outputs of test rows given their inputs, each output on its own; inverse is one input of test rows given
the other inputs and the outputs. Every method sees the same training rows and the same k rows of a held-out task, all
standardised alike (`fewshot_data`). A peer's forward predictive is a normal, its inverse is Bayes on a grid of equally
likely values; this package is asked for each conditional as it stands, and scored by its density and by draws.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

import pyro_invman as pim
from benchmarks.fewshot_data import KERNEL, Episode, Fold, RealSet, Scores, draw_scores, grid_scores, records
from benchmarks.fewshot_peers import PEERS, Peer, gaussian_scores, inverse
from pyro_invman.data import to_tensor

DRAWS = 512


class Method(Protocol):
    """What takes part."""

    def fit(self, real: RealSet, fold: Fold, seed: int) -> None:
        """Learns from the rows of the fold."""

    def forward(self, real: RealSet, asked: Episode, k: int) -> Scores:
        """Scores (M, Q) of the test rows, NaN where an output is not measured."""

    def inverse(self, real: RealSet, fold: Fold, asked: Episode, k: int) -> Scores:
        """Scores (M,) of the sought input in the inverse rows."""


def context_of(asked: Episode, k: int, forward: bool) -> np.ndarray:
    """What is known of the task: its first k rows and its cheap ones; for the inverse, those that show no answer."""
    cheap = asked.cheap if forward else np.setdiff1d(asked.cheap, asked.peeking)
    return np.r_[asked.context_rows(k), cheap].astype(int)


class OfPeer:
    """A peer by name."""

    def __init__(self, name: str) -> None:
        self.peer: Peer = PEERS[name]()

    def fit(self, real: RealSet, fold: Fold, seed: int) -> None:
        """Learns from the rows of the fold."""
        self.peer.fit(real.table.rows(fold.rows), seed)

    def forward(self, real: RealSet, asked: Episode, k: int) -> Scores:
        """Scores (M, Q) of normals."""
        predict = self.peer.condition(real.table.rows(context_of(asked, k, True)))
        return gaussian_scores(real.table.y[asked.test], *predict(real.table.x[asked.test]))

    def inverse(self, real: RealSet, fold: Fold, asked: Episode, k: int) -> Scores:
        """Scores (M,) by Bayes on the fold's grid."""
        predict = self.peer.condition(real.table.rows(context_of(asked, k, False)))
        x, y = real.table.x[asked.inverse], real.table.y[asked.inverse]
        column = real.columns.index(str(real.sought))
        weights = inverse(predict, x, y, column, fold.grid, np.ones(len(fold.grid)))
        return grid_scores(x[:, column], weights, fold.grid)


class Manifold:
    """This package."""

    def __init__(self, latent_dim: int = 4, fit: dict[str, Any] | None = None, **settings: Any) -> None:
        self.latent_dim, self.settings, self.keywords = latent_dim, settings, dict(fit or {})

    def fit(self, real: RealSet, fold: Fold, seed: int) -> None:
        """Learns from the rows of the fold."""
        ds = real.ds.isel(row=fold.rows)
        self.manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=self.latent_dim, seed=seed, **self.settings)
        self.history = self.manifold.fit(ds, seed=seed, progress=False, **self.keywords)

    def _task(self, real: RealSet, asked: Episode, k: int, forward: bool) -> pim.TaskPosterior:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pim.UnfamiliarTask)
            return self.manifold.infer_task(real.ds.isel(row=context_of(asked, k, forward)), seed=k)

    def _row(self, real: RealSet, rows: np.ndarray) -> torch.Tensor:
        return to_tensor(real.ds.isel(row=rows), self.manifold.variables)

    @torch.no_grad()
    def forward(self, real: RealSet, asked: Episode, k: int) -> Scores:
        """Scores (M, Q) of the conditionals of each output."""
        task, rows = self._task(real, asked, k, True), self._row(real, asked.test)
        names = self.manifold.variables.names
        given = {name: rows[:, j] for j, name in enumerate(names) if name not in real.outputs}
        torch.manual_seed(k)
        found: dict[str, list[np.ndarray]] = {"nlpd": [], "crps": [], "coverage90": []}
        for output in real.outputs:
            answer = rows[:, names.index(output)]
            d = task.conditional([output], given)
            score = d.log_prob(answer.unsqueeze(-1)).double()
            found["nlpd"].append((-score).masked_fill(answer.isnan(), math.nan).numpy())
            drawn = draw_scores(answer.numpy(), d.sample(torch.Size((DRAWS,))).squeeze(-1).mT.double().numpy())
            for name, values in drawn.items():
                found[name].append(values)
        return {name: np.stack(columns, -1) for name, columns in found.items()}

    @torch.no_grad()
    def inverse(self, real: RealSet, fold: Fold, asked: Episode, k: int) -> Scores:
        """Scores (M,) of the conditional of the sought input; its density as the peers', normals about draws."""
        task, rows = self._task(real, asked, k, False), self._row(real, asked.inverse)
        names = self.manifold.variables.names
        given = {name: rows[:, j] for j, name in enumerate(names) if name != real.sought}
        torch.manual_seed(k)
        draws = task.conditional([str(real.sought)], given).sample(torch.Size((DRAWS,))).squeeze(-1).mT.double()
        return draw_scores(rows[:, names.index(str(real.sought))].numpy(), draws.numpy(), KERNEL)


def contest(
    real: RealSet, fold: Fold, name: str, method: Method, seed: int, shots: tuple[int, ...] | None = None
) -> Iterator[dict[str, Any]]:
    """Fits a method to a fold and scores its episodes: records, the first with the fit's processor seconds."""
    began = time.process_time()
    method.fit(real, fold, seed)
    yield {"fit_cpu_s": time.process_time() - began}
    for asked in fold.episodes:
        for k in asked.ks if shots is None else [k for k in asked.ks if k in shots]:
            yield from records(real, name, asked, k, method.forward(real, asked, k), seed)
            if len(asked.inverse):
                yield from records(real, name, asked, k, method.inverse(real, fold, asked, k), seed)
