r"""The linear mixed model of shared and task functions in given features, by expectation–maximisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

_FLOAT = torch.float64


class _Reduced(NamedTuple):
    """A task's cells with its functions integrated out: :math:`R w` predicts `answers` (r,) of unit noise from the
    shared weights w, `shared` R (r, M I). `own` P (r, M F) leads back: the functions' mean is
    :math:`P^T (\\text{answers} - R w)`."""

    shared: Tensor
    answers: Tensor
    own: Tensor


class Known(NamedTuple):
    """What is known of the shared weights: mean (M, I), and the Cholesky factor of their precision (M I, M I)."""

    weights: Tensor
    factor: Tensor

    def explained(self, whiten: Tensor) -> Tensor:
        """A factor (M, I, R) of the share of each shared function's variance that is known, of kernels to the inducing
        rows; directions of which next to nothing is known are left out."""
        outputs, width = self.weights.shape
        inverse = torch.cholesky_inverse(self.factor)
        eye = torch.eye(width, dtype=_FLOAT)
        blocks = [inverse[q * width : (q + 1) * width, q * width : (q + 1) * width] for q in range(outputs)]
        size, turn = torch.linalg.eigh(eye - torch.stack(blocks))
        kept = int((size > 1e-3).any(0).sum())
        return whiten.mT @ (turn * size.clamp_min(0.0).sqrt().unsqueeze(-2))[..., -max(kept, 1) :]


class MixedModel:
    """The linear mixed model of given features: shared (M, N, I) and own (M, N, F), answers (N, M) where seen, and
    variances (M, N) of what else is in them.

    A task with fewer cells than it has features is worked out in its cells, any other in its features.
    """

    def __init__(
        self, shared: Tensor, own: Tensor, y: Tensor, seen: Tensor, task: Tensor, noise: Tensor, strength: float
    ) -> None:
        order = task.argsort()
        self.task, self.tasks, self.strength = task[order], int(task.max()) + 1, strength
        self.scale, self.seen = noise[:, order].sqrt(), seen[order].mT
        weight = (self.seen / self.scale).unsqueeze(-1)
        self.shared, self.own, self.y = shared[:, order] * weight, own[:, order] * weight, y[order].mT * weight[..., 0]
        ends = torch.bincount(task, minlength=self.tasks).cumsum(0).tolist()
        self.rows = [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        self.width = self.own.shape[0] * self.own.shape[2]
        self.in_cells = [int(self.seen[:, rows].sum()) < self.width for rows in self.rows]
        self.among = torch.stack([self.own[:, rows].mT @ self.own[:, rows] for rows in self.rows])
        self.covariance = torch.eye(self.width, dtype=_FLOAT)

    def _cells(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shared (C, M I) and own features (C, M F), and answers (C,), of the cells seen in a task."""
        rows, found = self.rows[t], []
        for q, seen in enumerate(self.seen[:, rows]):
            wide = [
                nn.functional.pad(part[q, rows][seen], (q * part.shape[2], (len(part) - 1 - q) * part.shape[2]))
                for part in (self.shared, self.own)
            ]
            found.append((*wide, self.y[q, rows][seen]))
        shared, own, y = (torch.cat(part) for part in zip(*found, strict=True))
        return shared, own, y

    def _reduced(self, t: int, prior: Tensor) -> _Reduced:
        if self.in_cells[t]:
            shared, own, y = self._cells(t)
            left = own @ self.covariance
            factor = torch.linalg.cholesky(left @ own.mT + torch.eye(len(y), dtype=_FLOAT))
            sides = torch.cat([shared, y.unsqueeze(-1), left], -1)
        else:
            rows = self.rows[t]
            own, y = self.own[:, rows], self.y[:, rows, None]
            across, own_y = torch.block_diag(*own.mT @ self.shared[:, rows]), (own.mT @ y).flatten()
            factor = torch.linalg.cholesky(prior + torch.block_diag(*self.among[t]))
            sides = torch.cat([across, own_y.unsqueeze(-1), torch.eye(self.width, dtype=_FLOAT)], -1)
        white = torch.linalg.solve_triangular(factor, sides, upper=False)
        shared, y, own = white.split([self.shared.shape[0] * self.shared.shape[2], 1, self.width], -1)
        return _Reduced(shared, y.squeeze(-1), own)

    def step(self) -> None:
        """One round of expectation–maximisation; weights of the shared functions are integrated out."""
        prior = torch.cholesky_inverse(torch.linalg.cholesky(self.covariance))
        self.parts = [self._reduced(t, prior) for t in range(self.tasks)]
        self.weights, self.factor = self.known_from(torch.ones(self.tasks, dtype=torch.bool))
        moments, functions = torch.zeros_like(self.covariance), []
        for p, few in zip(self.parts, self.in_cells, strict=True):
            functions.append(p.own.mT @ (p.answers - p.shared @ self.weights.flatten()))
            leant = torch.linalg.solve_triangular(self.factor, p.shared.mT, upper=False)
            spread = leant.mT @ leant  # of the cells, as the shared weights are not known
            spread.diagonal().add_(-1.0 if few else 1.0)
            moments += p.own.mT @ spread @ p.own
            if few:
                moments += self.covariance
        self.functions = torch.stack(functions)
        moments += self.functions.mT @ self.functions
        self.covariance = (self.strength * torch.eye(self.width, dtype=_FLOAT) + moments) / (self.strength + self.tasks)

    def known_from(self, tasks: Tensor) -> Known:
        """What the cells of some `tasks` (T,) say of the shared weights, as of the last round."""
        whole = (torch.tensor([not few for few in self.in_cells]) & tasks)[self.task]
        rows = [q & whole for q in self.seen]
        total = [part[some].mT @ part[some] for part, some in zip(self.shared, rows, strict=True)]
        right = torch.cat([part[some].mT @ y[some] for part, y, some in zip(self.shared, self.y, rows, strict=True)])
        chosen = [p for p, some in zip(self.parts, tasks.tolist(), strict=True) if some]
        few = [few for few, some in zip(self.in_cells, tasks.tolist(), strict=True) if some]
        sign = [torch.full((len(p.answers), 1), 1.0 if f else -1.0) for p, f in zip(chosen, few, strict=True)]
        shared, answers = torch.cat([p.shared for p in chosen]), torch.cat([p.answers for p in chosen])
        signed = shared * torch.cat(sign).to(_FLOAT)
        precision = torch.block_diag(*total) + signed.mT @ shared
        precision.diagonal().add_(1.0)
        factor = torch.linalg.cholesky(precision)
        weights = torch.cholesky_solve((right + signed.mT @ answers).unsqueeze(-1), factor).squeeze(-1)
        return Known(weights.reshape(len(self.shared), -1), factor)

    def directions(self, latent_dim: int) -> tuple[Tensor, Tensor]:
        """Loadings (M, F, L) of the directions that move observations most, and a factor (M, F, F) of the others."""
        factor = torch.linalg.cholesky(self.covariance)
        _, turn = torch.linalg.eigh(factor.mT @ torch.block_diag(*self.among.sum(0)) @ factor)
        turned = (factor @ turn).flip(-1)
        if latent_dim > turned.shape[-1]:
            turned = nn.functional.pad(turned, (0, latent_dim - turned.shape[-1]))
        turned = turned.reshape(len(self.own), -1, turned.shape[-1])
        rest = turned[..., latent_dim:]
        size, turn = torch.linalg.eigh(rest @ rest.mT)
        return turned[..., :latent_dim], turn * size.clamp_min(0.0).sqrt().unsqueeze(-2)

    def correlation(self) -> Tensor:
        """Of the residuals of different observations of a row (M, M), shrunk where few rows show both."""
        functions = self.functions.reshape(self.tasks, len(self.own), -1)
        left = self.y - (self.shared @ self.weights.unsqueeze(-1)).squeeze(-1)
        left = left - torch.einsum("mnf,nmf->mn", self.own, functions[self.task])
        together = self.seen.to(_FLOAT) @ self.seen.to(_FLOAT).mT
        found = left @ left.mT / (together + 1e-9)
        size = found.diagonal().clamp_min(1e-9).sqrt()
        found = found / (size.unsqueeze(-1) * size) * together / (together + 20.0)
        return torch.where(torch.eye(len(found), dtype=torch.bool), 1.0, 0.95 * found)
