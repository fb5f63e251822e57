"""Peers of the few-shot benchmark: a new task's outputs (and, by Bayes, its inputs) from many tasks and k rows.

Every peer is fitted once to the training tasks and conditioned on k rows of one new task; it then gives a Gaussian of
a *new noisy observation* of each output. All see the same standardised table and treat missing cells alike: a missing
input is set to the mean (0) and flagged by an indicator column, a missing output is no datum.

    single_gp               GP on the k rows alone: offset + isotropic RBF + noise. Below 5 measured rows its
                            hyper-parameters are the medians of those fitted to training tasks; from 5 on they are
                            the mode within a factor 10 of these medians (log-normal prior about them, log-sd 1).
    pooled_gp               ARD RBF + noise on all tasks and the k rows, blind to tasks.
    hierarchical_gp         shared ARD RBF + task-specific ARD RBF + task offset + noise, exact. The mark to beat.
    coupled_hierarchical_gp likewise, with task parts correlated between the outputs (a full coregionalisation matrix
                            for the offsets and one for the functions), so that one output informs on another.
    multitask_gp            ARD RBF x (W W' + diag v) over tasks, rank 2 (gpytorch); the new task's row of W is normal
                            with the moments of the training tasks' rows and updated by the k rows (Laplace).
    random_forest           100 trees on inputs, one-hot task and the means of the task's context, refitted with the k
                            rows; variance = spread + leaf variance, scaled by out-of-bag residuals.
    neural_process          attentive conditional neural process, trained on contexts of 0 to 20 rows; stopped early
                            and widened by held-out tasks.

Exact GPs cost the cube of the rows: hyper-parameters are found on at most 800 cells of whole tasks (at most 20 rows
each), inference conditions on at most 1200 rows per output, drawn evenly from all tasks (coupled: 1600 cells of all
outputs; multitask: 800 rows per output). Forests are grown on at most 1200 rows per output. The neural process
sees every row.

References:
    | Multi-task Gaussian process prediction (Bonilla, Chai & Williams, 2007)
    | Hierarchical Bayesian modelling of gene expression time series across irregularly sampled replicates
      and clusters (Hensman, Lawrence & Rattray, 2013)
    | Attentive neural processes (Kim et al., 2019)
    | Strictly proper scoring rules, prediction, and estimation (Gneiting & Raftery, 2007)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, ndtr
from torch import Tensor, nn
from torch.nn import functional as F

Predictor = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Inputs (M, P) to mean and standard deviation (M, Q) of a new noisy observation."""
FLOOR = 1e-2  # no predictive standard deviation is below this share of the output's
_BLOCK = 4_096  # rows predicted at once


class Table(NamedTuple):
    """Standardised rows.

    Attributes:
        x: Inputs (N, P), parameters and conditions; NaN where not measured.
        y: Outputs (N, Q), NaN where not measured.
        task: Task numbers (N,), int.
    """

    x: np.ndarray
    y: np.ndarray
    task: np.ndarray

    def rows(self, index: np.ndarray) -> Table:
        """The rows of an index or mask."""
        return Table(self.x[index], self.y[index], self.task[index])


class Peer(Protocol):
    """A method of the benchmark."""

    name: str

    def fit(self, train: Table, seed: int) -> None:
        """Learns what tasks have in common."""

    def condition(self, context: Table) -> Predictor:
        """The predictive of one new task of which k rows are known; k may be 0."""


class Filler:
    """Missing inputs to the mean with an indicator column for every input that the training rows lack somewhere."""

    def __init__(self, x: np.ndarray) -> None:
        self.flagged = np.flatnonzero(np.isnan(x).any(0))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([np.nan_to_num(x, nan=0.0), np.isnan(x[:, self.flagged]).astype(float)], 1)


def balanced(task: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Index of at most `most` rows, as evenly from all tasks as their rows allow."""
    order = rng.permutation(len(task))
    turn = np.empty(len(task), int)
    seen: dict[int, int] = {}
    for i in order:
        turn[i] = seen.get(int(task[i]), 0)
        seen[int(task[i])] = turn[i] + 1
    return np.sort(order[np.argsort(turn[order], kind="stable")][:most])


def whole_tasks(task: np.ndarray, most: int, per_task: int, rng: np.random.Generator) -> np.ndarray:
    """Index of at most `most` rows of as few tasks as need be, at most `per_task` of each."""
    found: list[np.ndarray] = []
    for t in rng.permutation(np.unique(task)):
        found.append(rng.permutation(np.flatnonzero(task == t))[:per_task])
        if sum(map(len, found)) >= most:
            break
    return np.concatenate(found)[:most]


# ------------------------------------------------------------------------------------------------ exact GPs
class Cells(NamedTuple):
    """Measured cells as data of a GP: inputs (N, P), output and task of each (N,), values (N,)."""

    x: Tensor
    output: Tensor
    task: Tensor
    value: Tensor

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, task: np.ndarray) -> Cells:
        row, output = np.nonzero(~np.isnan(y))
        return cls(*map(torch.as_tensor, (x[row], output, task[row], y[row, output])))

    def pick(self, index: np.ndarray) -> Cells:
        return Cells(*(part[torch.as_tensor(index)] for part in self))


class HierarchicalKernel:
    r"""Covariance of cells, with shared, task-specific and constant parts,

    .. math:: \delta_{qq'} a_q k(x, x'; \ell_q) + \delta_{tt'} [ B_{qq'} k(x, x'; \ell') + C_{qq'} ]

    and noise of variance :math:`s_q^2`; k is an RBF with a length scale for each input. Hyper-parameters are
    the mode under wide priors: log-normal for the length scales about :math:`e^{\sqrt 2} \sqrt P` (log-sd √3) and
    the variances about 0.3 (log-sd 2).
    """

    def __init__(self, num_inputs: int, num_outputs: int, task_parts: bool = True) -> None:
        p, q = num_inputs, num_outputs
        self.p, self.q, self.task_parts = p, q, task_parts
        self.length = math.log(p) / 2 + math.sqrt(2)
        entries = q * (q - 1) // 2
        self.sizes = [q, q * p, q, p, q, q, entries, entries]  # a, l, noise, l', diagonals and rests of B and C
        start = [math.log(0.5), self.length - 1, math.log(0.1), self.length - 0.5, -0.9, -0.9, 0.0, 0.0]
        limits = [(-7, 4), (-3, 6), (-9, 1), (-3, 6), (-4, 1.5), (-4, 1.5), (-3, 3), (-3, 3)]
        if not task_parts:
            self.sizes[3:] = [0] * 5
        self.theta = torch.tensor(np.repeat(start, self.sizes), dtype=torch.float64)
        self.bounds = [bound for bound, size in zip(limits, self.sizes, strict=True) for _ in range(size)]

    def parts(self, theta: Tensor) -> list[Tensor]:
        return list(theta.split(self.sizes))

    def noise(self, theta: Tensor) -> Tensor:
        return self.parts(theta)[2].exp()

    def _coregionalisation(self, diagonal: Tensor, rest: Tensor) -> Tensor:
        low = torch.diag(diagonal.exp())
        i, j = torch.tril_indices(self.q, self.q, -1)
        low = low.index_put((i, j), rest)
        return low @ low.mT

    def __call__(self, theta: Tensor, a: Cells, b: Cells) -> Tensor:
        """Covariance (N, N') without noise."""
        variance, length, _, own, b_diagonal, c_diagonal, b_rest, c_rest = self.parts(theta)
        scale = length.reshape(self.q, self.p).neg().exp()
        shared = variance.exp()[a.output].unsqueeze(-1) * _rbf(a.x * scale[a.output], b.x * scale[b.output])
        if self.q > 1:
            shared = shared * (a.output.unsqueeze(-1) == b.output)
        same = a.task.unsqueeze(-1) == b.task
        if not self.task_parts or not same.any():
            return shared
        functions, offsets = self._coregionalisation(b_diagonal, b_rest), self._coregionalisation(c_diagonal, c_rest)
        pairs = (a.output.unsqueeze(-1), b.output)
        specific = functions[pairs] * _rbf(a.x * own.neg().exp(), b.x * own.neg().exp()) + offsets[pairs]
        return shared + same * specific

    def variance(self, theta: Tensor, output: Tensor) -> Tensor:
        """Prior variance of noisy cells."""
        variance, _, noise, _, b_diagonal, c_diagonal, b_rest, c_rest = self.parts(theta)
        found = variance.exp() + noise.exp()
        if self.task_parts:
            found = found + self._coregionalisation(b_diagonal, b_rest).diagonal()
            found = found + self._coregionalisation(c_diagonal, c_rest).diagonal()
        return found[output]

    def log_prior(self, theta: Tensor) -> Tensor:
        variance, length, noise, own, *diagonals, b_rest, c_rest = self.parts(theta)
        lengths = torch.cat([length, own]) - self.length
        variances = torch.cat([variance, noise, *(2 * d for d in diagonals)]) - math.log(0.3)
        return -(lengths.square().sum() / 6 + variances.square().sum() / 8 + (b_rest**2).sum() + (c_rest**2).sum())

    def fit(self, cells: Cells, steps: int = 120) -> HierarchicalKernel:
        """Finds the mode by L-BFGS within bounds."""
        if not len(cells.value):
            return self

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            theta = torch.tensor(values, requires_grad=True)
            covariance = self(theta, cells, cells) + torch.diag(self.noise(theta)[cells.output] + 1e-8)
            with torch.no_grad():  # the gradient of the Gaussian in closed form spares that of the factor
                factor = torch.linalg.cholesky(covariance)
                inverse = torch.cholesky_inverse(factor)
                weight = inverse @ cells.value
                nll = cells.value @ weight / 2 + factor.diagonal().log().sum()
                slope = (inverse - torch.outer(weight, weight)) / 2
            prior = self.log_prior(theta)
            ((slope * covariance).sum() - prior).backward()
            assert theta.grad is not None
            return float(nll - prior.detach()), theta.grad.numpy()

        best = math.inf
        for start in self.starts():
            options = {"maxiter": steps}
            found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=self.bounds, options=options)
            if found.fun < best:
                best, self.theta = found.fun, torch.tensor(found.x)
        return self

    def starts(self) -> list[np.ndarray]:
        """From where the mode is sought: as built; with rapid task functions; with tasks that differ by much."""
        starts = [self.theta.numpy()]
        if self.task_parts:
            for part, shift in ((3, -1.5), (4, 0.6)):
                parts = [p.clone() for p in self.parts(self.theta)]
                parts[part] += shift
                if part == 4:
                    parts[5] += shift
                    parts[0] -= 1.0
                starts.append(torch.cat(parts).numpy())
        return starts


def _rbf(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1) - 2 * a @ b.mT
    return (squares.clamp(min=0) / -2).exp()


class Posterior:
    """An exact GP on cells, extended by those of a new task at the cost of the square of its cells."""

    def __init__(self, kernel: HierarchicalKernel, cells: Cells) -> None:
        self.kernel, self.theta, self.cells = kernel, kernel.theta, cells
        self.factor = self._factor(kernel(self.theta, cells, cells), cells)
        self.white = torch.linalg.solve_triangular(self.factor, cells.value.unsqueeze(-1), upper=False)

    def _factor(self, covariance: Tensor, cells: Cells) -> Tensor:
        return torch.linalg.cholesky(covariance + torch.diag(self.kernel.noise(self.theta)[cells.output] + 1e-8))

    def _whiten(self, new: Cells) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, self.kernel(self.theta, self.cells, new), upper=False)

    def condition(self, context: Cells) -> Callable[[Cells], tuple[Tensor, Tensor]]:
        """Mean and standard deviation of noisy cells of the context's task."""
        known = self._whiten(context)
        residual = context.value - (known.mT @ self.white).squeeze(-1)
        factor = self._factor(self.kernel(self.theta, context, context) - known.mT @ known, context)
        update = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False)

        def predict(new: Cells) -> tuple[Tensor, Tensor]:
            through = self._whiten(new)
            cross = self.kernel(self.theta, context, new) - known.mT @ through
            extra = torch.linalg.solve_triangular(factor, cross, upper=False)
            mean = through.mT @ self.white + extra.mT @ update
            variance = self.kernel.variance(self.theta, new.output) - through.square().sum(0) - extra.square().sum(0)
            return mean.squeeze(-1), variance.clamp(min=FLOOR**2).sqrt()

        return predict


@dataclass
class GaussianProcess:
    """pooled_gp and the two hierarchical GPs; outputs apart, or `coupled` in one process."""

    name: str = "hierarchical_gp"
    task_parts: bool = True
    coupled: bool = False
    hyper_cells: int = 800
    most_cells: int = 1_200
    posteriors: list[tuple[Posterior, list[int]]] = field(default_factory=list)

    def fit(self, train: Table, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.filler, q = Filler(train.x), train.y.shape[1]
        self.posteriors = []
        x = self.filler(train.x)
        for outputs in [list(range(q))] if self.coupled else [[i] for i in range(q)]:
            cells = Cells.of(x, train.y[:, outputs], train.task)
            task = cells.task.numpy()
            kernel = HierarchicalKernel(x.shape[1], len(outputs), self.task_parts)
            if len(task):
                hyper = whole_tasks(task, self.hyper_cells, 20 * len(outputs), rng)
                kernel.fit(cells.pick(hyper))
                cells = cells.pick(balanced(task, self.most_cells, rng))
            self.posteriors.append((Posterior(kernel, cells), outputs))

    @torch.no_grad()
    def condition(self, context: Table) -> Predictor:
        x, task = self.filler(context.x), np.full(len(context.x), -1)
        predictions = [(p.condition(Cells.of(x, context.y[:, o], task)), o) for p, o in self.posteriors]

        @torch.no_grad()
        def predict(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            mean, sd = np.empty((2, len(new), context.y.shape[1]))
            for start in range(0, len(new), _BLOCK):
                rows = slice(start, start + _BLOCK)
                x = self.filler(new[rows])
                for conditioned, outputs in predictions:
                    shape = (len(x), len(outputs))
                    found = conditioned(Cells.of(x, np.zeros(shape), np.full(len(x), -1)))
                    mean[rows, outputs], sd[rows, outputs] = (part.numpy().reshape(shape) for part in found)
            return mean, sd

        return predict


class SingleGP:
    """GP on the k rows alone; see the module."""

    name = "single_gp"
    tasks = 30  # that the medians are taken over

    def fit(self, train: Table, seed: int) -> None:
        self.filler = Filler(train.x)
        x = torch.as_tensor(self.filler(train.x))
        p = x.shape[1]
        # logs of the variances of offset, function and noise, and of the length scale
        prior = np.array([math.log(0.5), math.log(0.5), math.log(0.1), math.log(p) / 2])
        wide = [(-6.0, 3.0), (-6.0, 3.0), (-8.0, 0.7), (math.log(p) / 2 - 3, math.log(p) / 2 + 3)]
        tasks = np.random.default_rng(seed).permutation(np.unique(train.task))
        self.medians = []
        for y in train.y.T:
            fitted: list[np.ndarray] = []
            for t in tasks:
                rows = torch.as_tensor(np.flatnonzero((train.task == t) & ~np.isnan(y))[:40])
                if len(rows) >= 5 and len(fitted) < self.tasks:
                    fitted.append(self._fit(x[rows], torch.as_tensor(y)[rows], prior, wide, 2.0))
            self.medians.append(np.median(fitted, 0) if fitted else prior)

    @staticmethod
    def _covariance(theta: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return theta[0].exp() + theta[1].exp() * _rbf(a * theta[3].neg().exp(), b * theta[3].neg().exp())

    def _factor(self, theta: Tensor, x: Tensor) -> Tensor:
        return torch.linalg.cholesky(self._covariance(theta, x, x) + (theta[2].exp() + 1e-8) * torch.eye(len(x)))

    def _fit(
        self, x: Tensor, y: Tensor, start: np.ndarray, bounds: list[tuple[float, float]], spread: float
    ) -> np.ndarray:
        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            theta = torch.tensor(values, requires_grad=True)
            factor = self._factor(theta, x)
            white = torch.linalg.solve_triangular(factor, y.unsqueeze(-1), upper=False)
            nll = white.square().sum() / 2 + factor.diagonal().log().sum()
            nll = nll + (theta - torch.as_tensor(start)).square().sum() / (2 * spread**2)
            (gradient,) = torch.autograd.grad(nll, theta)
            return float(nll.detach()), gradient.numpy()

        with torch.enable_grad():
            return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60}).x

    def condition(self, context: Table) -> Predictor:
        known: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for y, median in zip(context.y.T, self.medians, strict=True):
            rows = ~np.isnan(y)
            x, value, theta = torch.as_tensor(self.filler(context.x[rows])), torch.as_tensor(y[rows]), median
            if rows.sum() >= 5:
                near = [(m - math.log(10), m + math.log(10)) for m in median]
                theta = self._fit(x, value, median, near, 1.0)
            fitted = torch.as_tensor(theta)
            factor = self._factor(fitted, x)
            known.append((fitted, x, factor, torch.linalg.solve_triangular(factor, value.unsqueeze(-1), upper=False)))

        def predict(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found, filled = [], torch.as_tensor(self.filler(new))
            for theta, x, factor, white in known:
                through = torch.linalg.solve_triangular(factor, self._covariance(theta, x, filled), upper=False)
                variance = theta[:3].exp().sum() - through.square().sum(0)
                found.append(((through.mT @ white).squeeze(-1), variance.clamp(min=FLOOR**2).sqrt()))
            mean, sd = (torch.stack(part, -1).numpy() for part in zip(*found, strict=True))
            return mean, sd

        return predict


class MultitaskGP:
    """Coregionalisation over tasks, trained with gpytorch; see the module."""

    name = "multitask_gp"
    most_rows, steps, rank = 800, 120, 2

    def fit(self, train: Table, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.filler = Filler(train.x)
        x = self.filler(train.x)
        self.outputs = []
        for y in train.y.T:
            rows = np.flatnonzero(~np.isnan(y))
            rows = rows[balanced(train.task[rows], self.most_rows, rng)]
            task = np.unique(train.task[rows], return_inverse=True)[1]
            self.outputs.append(self._train(x[rows], y[rows], task, seed))

    def _train(self, x: np.ndarray, y: np.ndarray, task: np.ndarray, seed: int) -> dict[str, Any]:
        import gpytorch
        from linear_operator import to_linear_operator

        rows, values, tasks = torch.as_tensor(x), torch.as_tensor(y), torch.as_tensor(task)
        torch.manual_seed(seed)
        kernel = gpytorch.kernels.RBFKernel(ard_num_dims=x.shape[1]).double()
        kernel.lengthscale = math.sqrt(x.shape[1]) * 1.5
        index = gpytorch.kernels.IndexKernel(num_tasks=int(task.max()) + 1, rank=self.rank).double()
        with torch.no_grad():
            index.covar_factor.mul_(0.3)[:, 0] = 0.8
        index.var = torch.full_like(index.var, 0.2)
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        likelihood.noise = 0.1

        class Model(gpytorch.models.ExactGP):
            def __init__(self) -> None:
                super().__init__((rows, tasks.unsqueeze(-1)), values, likelihood)
                self.mean, self.kernel, self.index = gpytorch.means.ZeroMean(), kernel, index

            def forward(self, x: Tensor, t: Tensor) -> gpytorch.distributions.MultivariateNormal:
                task = t.squeeze(-1)
                between = self.index.covar_factor[task] @ self.index.covar_factor[task].mT
                between = between + self.index.var[task] * (task.unsqueeze(-1) == task)
                covariance = to_linear_operator(self.kernel(x).to_dense() * between)  # factored with the noise added
                return gpytorch.distributions.MultivariateNormal(self.mean(x), covariance)

        model = Model().train()
        objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
        with gpytorch.settings.max_cholesky_size(10_000), gpytorch.settings.fast_computations(False, False, False):
            for _ in range(self.steps):
                optimiser.zero_grad()
                w = index.covar_factor  # rows of few data stay near those of all tasks
                prior = (w - w.mean(0)).square().sum() / (2 * 0.5**2) + index.var.log().sub(
                    math.log(0.1)
                ).square().sum() / 8
                loss = -objective(model(rows, tasks.unsqueeze(-1)), values) + prior / len(values)
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            scale, w, own = kernel.lengthscale.squeeze(0), index.covar_factor.clone(), index.var.clone()
            noise = likelihood.noise.squeeze().clone()
            scaled = rows / scale
            covariance = _rbf(scaled, scaled) * (w @ w.mT + own.diag())[tasks][:, tasks]
            factor = torch.linalg.cholesky(covariance + (noise + 1e-8) * torch.eye(len(rows)))
            white = torch.linalg.solve_triangular(factor, values.unsqueeze(-1), upper=False)
            spread = torch.cov(w.mT).reshape(self.rank, self.rank) if len(w) > 1 else 0.25 * torch.eye(self.rank)
            mean, spread = w.mean(0), spread.double() + 1e-4 * torch.eye(self.rank)
        return {"x": scaled, "scale": scale, "loading": w[tasks], "factor": factor, "white": white, "noise": noise,
                "own": own.median(), "mean": mean, "spread": spread}  # fmt: skip

    @staticmethod
    def _latent(o: dict[str, Any], a: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean (R, N) of the latent functions and the whitened cross covariance (R, n, N)."""
        cross = o["loading"].mT.unsqueeze(-1) * _rbf(o["x"], a)
        through = torch.linalg.solve_triangular(o["factor"], cross, upper=False)
        return (through * o["white"]).sum(1), through

    def condition(self, context: Table) -> Predictor:
        known = []
        for o, y in zip(self.outputs, context.y.T, strict=True):
            rows = ~np.isnan(y)
            a = torch.as_tensor(self.filler(context.x[rows])) / o["scale"]
            known.append((o, a, *self._row(o, a, torch.as_tensor(y[rows]))))

        def predict(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = []
            for known_output in known:
                blocks = [new[i : i + _BLOCK] for i in range(0, len(new), _BLOCK)] or [new]
                found.append(
                    [torch.cat(p) for p in zip(*(self._predict(b, *known_output) for b in blocks), strict=True)]
                )
            mean, sd = (torch.stack(part, -1).numpy() for part in zip(*found, strict=True))
            return mean, sd

        return predict

    def _row(self, o: dict[str, Any], a: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Mode and covariance of the new task's row of W, and what prediction needs of its k rows."""
        mean, through = self._latent(o, a)
        eye, base = torch.eye(len(y), dtype=torch.float64), _rbf(a, a)
        precision = torch.linalg.inv(o["spread"])

        def factor(w: Tensor) -> Tensor:
            along = torch.einsum("r,rnk->nk", w, through)
            return torch.linalg.cholesky((w @ w + o["own"]) * base - along.mT @ along + (o["noise"] + 1e-6) * eye)

        def energy(w: Tensor) -> Tensor:
            low = factor(w)
            white = torch.linalg.solve_triangular(low, (y - w @ mean).unsqueeze(-1), upper=False)
            gap = w - o["mean"]
            return white.square().sum() / 2 + low.diagonal().log().sum() + gap @ precision @ gap / 2

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            w = torch.tensor(values, requires_grad=True)
            e = energy(w)
            return float(e.detach()), torch.autograd.grad(e, w)[0].numpy()

        w, covariance = o["mean"], o["spread"]
        if len(y):
            w = torch.as_tensor(minimize(loss, w.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 50}).x)
            curvature, axes = torch.linalg.eigh(torch.autograd.functional.hessian(energy, w))
            least = torch.linalg.eigvalsh(precision)[0]  # data do not widen what the prior says
            covariance = axes @ torch.diag(1 / curvature.clamp(min=least)) @ axes.mT
        low = factor(w)
        along = torch.einsum("r,rnk->nk", w, through)
        update = torch.linalg.solve_triangular(low, (y - w @ mean).unsqueeze(-1), upper=False)
        return w, covariance, {"low": low, "along": along, "update": update}

    def _predict(
        self, new: np.ndarray, o: dict[str, Any], a: Tensor, w: Tensor, covariance: Tensor, known: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        b = torch.as_tensor(self.filler(new)) / o["scale"]
        latent, through = self._latent(o, b)
        along = torch.einsum("r,rnm->nm", w, through)
        cross = (w @ w + o["own"]) * _rbf(a, b) - known["along"].mT @ along
        extra = torch.linalg.solve_triangular(known["low"], cross, upper=False)
        mean = w @ latent + (extra.mT @ known["update"]).squeeze(-1)
        variance = w @ w + o["own"] + o["noise"] - along.square().sum(0) - extra.square().sum(0)
        if not len(a):  # E of the square over the row: the functions' own variance, too, scales with it
            second = torch.einsum("rnm,snm->rsm", through, through).neg() + torch.eye(self.rank).unsqueeze(-1)
            variance = variance + torch.einsum("rs,rsm->m", covariance, second)
        variance = variance + torch.einsum("rs,rm,sm->m", covariance, latent, latent)
        return mean, variance.clamp(min=FLOOR**2).sqrt()


# ------------------------------------------------------------------------------------------------ forest
class RandomForest:
    """scikit-learn's forest; see the module."""

    name = "random_forest"
    trees, most_rows = 100, 1_200

    def fit(self, train: Table, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.filler, self.seed, self.tasks = Filler(train.x), seed, np.unique(train.task)
        summary = np.zeros((len(train.y), 2 * train.y.shape[1]))
        for t in self.tasks:  # each row sees as many other rows of its task as a new row might
            rows = np.flatnonzero(train.task == t)
            for i in rows:
                others = rng.permutation(rows[rows != i])[: rng.integers(0, 21)]
                summary[i] = self._summary(train.y[others])
        one_hot = (train.task[:, None] == self.tasks).astype(float)
        self.train = np.concatenate([self.filler(train.x), summary, one_hot, np.zeros((len(summary), 1))], 1), train.y
        self.index = []
        for y in train.y.T:
            rows = np.flatnonzero(~np.isnan(y))
            self.index.append(rows[balanced(train.task[rows], self.most_rows, rng)])
        self.blank: list[Any] | None = None

    @staticmethod
    def _summary(y: np.ndarray) -> np.ndarray:
        """Mean of each output, shrunk to 0 as if one more row lay there, and how many were measured."""
        count = (~np.isnan(y)).sum(0)
        return np.concatenate([np.nansum(y, 0) / (count + 1), count / 20])

    def _features(self, x: np.ndarray, summary: np.ndarray) -> np.ndarray:
        task = np.concatenate([np.zeros(len(self.tasks)), [1.0]])
        return np.concatenate([self.filler(x), np.broadcast_to(summary, (len(x), len(summary))),
                               np.broadcast_to(task, (len(x), len(task)))], 1)  # fmt: skip

    def condition(self, context: Table) -> Predictor:
        forests = self.blank if not len(context.x) and self.blank else [
            self._grow(context, q) for q in range(context.y.shape[1])
        ]  # fmt: skip
        if not len(context.x):
            self.blank = forests
        summary = self._summary(context.y)

        def predict(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            features = self._features(new, summary)
            found = [self._moments(forest, features) for forest, _ in forests]
            mean = np.stack([m for m, _ in found], 1)
            sd = [np.sqrt(np.maximum(scale * v, FLOOR**2)) for (_, v), (_, scale) in zip(found, forests, strict=True)]
            return mean, np.stack(sd, 1)

        return predict

    def _grow(self, context: Table, output: int) -> tuple[Any, float]:
        from sklearn.ensemble import RandomForestRegressor

        rows = self.index[output]
        x, y = self.train[0][rows], self.train[1][rows, output]
        for i in np.flatnonzero(~np.isnan(context.y[:, output])):
            others = np.arange(len(context.y)) != i
            x = np.concatenate([x, self._features(context.x[i : i + 1], self._summary(context.y[others]))])
            y = np.append(y, context.y[i, output])
        forest = RandomForestRegressor(
            self.trees, min_samples_leaf=3, max_features=0.5, oob_score=True, random_state=self.seed
        ).fit(x.astype(np.float32), y)
        seen = np.isfinite(forest.oob_prediction_)
        squares = (y - forest.oob_prediction_)[seen] ** 2
        return forest, float(np.clip(squares.mean() / self._moments(forest, x[seen])[1].mean(), 0.5, 5.0))

    @staticmethod
    def _moments(forest: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        leaves = forest.apply(x.astype(np.float32))
        trees = [(tree.tree_, leaves[:, j]) for j, tree in enumerate(forest.estimators_)]
        means = np.array([tree.value[leaf, 0, 0] for tree, leaf in trees])
        return means.mean(0), means.var(0) + np.mean([tree.impurity[leaf] for tree, leaf in trees], 0)


# ------------------------------------------------------------------------------------------------ neural process
_DROPOUT = 0.1


class _Attention(nn.Module):
    """Queries read tokens; residual, then a residual MLP."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_token, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(2 * width, width),
            nn.Dropout(_DROPOUT),
        )

    def forward(self, query: Tensor, token: Tensor, known: Tensor) -> Tensor:
        q = self.query(self.norm_query(query)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.key_value(self.norm_token(token)).chunk(2, -1)
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=known[:, None, None, :])
        query = query + self.out(read.transpose(1, 2).flatten(2))
        return query + self.mlp(self.norm(query))


class _Network(nn.Module):
    """Attentive conditional neural process over rows with missing cells, (B, K, ·) and (B, M, ·)."""

    def __init__(self, num_inputs: int, num_outputs: int, width: int) -> None:
        super().__init__()
        cells = 2 * (num_inputs + num_outputs)
        self.encode = nn.Sequential(nn.Linear(cells, width), nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(width, width))
        self.locate = nn.Sequential(
            nn.Linear(2 * num_inputs, width), nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(width, width)
        )
        self.nothing = nn.Parameter(torch.zeros(1, 1, width))  # a token that is always there
        self.among = nn.ModuleList([_Attention(width) for _ in range(2)])
        self.across = nn.ModuleList([_Attention(width) for _ in range(2)])
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2 * num_outputs)
        )

    @staticmethod
    def _cells(values: Tensor) -> Tensor:
        return torch.cat([values.nan_to_num(0.0), values.isnan().to(values)], -1)

    def forward(self, x: Tensor, y: Tensor, known: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        token = self.encode(torch.cat([self._cells(x), self._cells(y)], -1))
        token = torch.cat([self.nothing.expand(len(x), 1, -1), token], 1)
        known = torch.cat([known.new_ones(len(x), 1), known], 1)
        for layer in self.among:
            token = layer(token, token, known)
        query = self.locate(self._cells(new))
        for layer in self.across:
            query = layer(query, token, known)
        mean, raw = self.head(query).chunk(2, -1)
        return mean, FLOOR + F.softplus(raw)


@dataclass
class NeuralProcess:
    """Own attentive conditional neural process: width 64, dropout, AdamW with a rate that halves; one task in eight is
    held out to stop early and to widen the standard deviations by a factor for each output."""

    name: str = "neural_process"
    max_seconds: float = 180.0
    max_steps: int = 8_000
    width: int = 64
    most_context: int = 20
    rows: int = 40  # of a task in one step

    def fit(self, train: Table, seed: int) -> None:
        torch.manual_seed(seed)
        draw = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        tasks = [np.flatnonzero(train.task == t) for t in rng.permutation(np.unique(train.task))]
        held = min(max(1, len(tasks) // 8), 25) if len(tasks) > 1 else 0
        x, y = (torch.as_tensor(part, dtype=torch.float32) for part in (train.x, train.y))
        self.network = _Network(x.shape[1], y.shape[1], self.width)
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=1e-2)
        check = [self._batch(x, y, tasks[:held] or tasks, torch.Generator().manual_seed(i), False) for i in range(30)]
        best, best_state, stale, start = math.inf, self.network.state_dict(), 0, time.monotonic()
        for step in range(1, self.max_steps + 1):
            some = [tasks[held:][i] for i in torch.randint(len(tasks) - held, (16,), generator=draw)]
            loss = self._loss(*self._batch(x, y, some, draw, True))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimiser.step()
            late = time.monotonic() - start > self.max_seconds
            if step % 100 == 0 or late or step == self.max_steps:
                self.network.eval()
                with torch.no_grad():
                    score = float(torch.stack([self._loss(*batch) for batch in check]).mean())
                self.network.train()
                stale = 0 if score < best else stale + 1
                if score < best:
                    best, best_state = score, {k: v.clone() for k, v in self.network.state_dict().items()}
                elif stale % 4 == 0:
                    for group in optimiser.param_groups:
                        group["lr"] /= 2
                if late or stale > 12:
                    break
        self.network.load_state_dict(best_state)
        self.network.eval()
        self.widening = self._widening(check)

    @torch.no_grad()
    def _widening(self, batches: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Factors (Q,) of the standard deviations, at least 1, under which the held-out tasks are likeliest."""
        squares: list[Tensor] = []
        for x, y, known in batches:
            mean, sd = self.network(x, y, known, x)
            squares.append(((y - mean) / sd).square().masked_fill(known.unsqueeze(-1), math.nan).flatten(0, 1))
        return torch.cat(squares).nanmean(0).sqrt().nan_to_num(1.0).clamp(1.0, 3.0)

    def _batch(
        self, x: Tensor, y: Tensor, tasks: list[np.ndarray], draw: torch.Generator, hide: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, R, ·) in random order, NaN where there is none, and which of them (B, R) are context."""
        inputs = x.new_full((len(tasks), self.rows, x.shape[1]), math.nan)
        outputs = y.new_full((len(tasks), self.rows, y.shape[1]), math.nan)
        known = torch.zeros(len(tasks), self.rows, dtype=torch.bool)
        for b, rows in enumerate(tasks):
            order = torch.as_tensor(rows)[torch.randperm(len(rows), generator=draw)[: self.rows]]
            inputs[b, : len(order)], outputs[b, : len(order)] = x[order], y[order]
            most = min(self.most_context, len(order) - 1)
            known[b, : int(torch.randint(most + 1, (), generator=draw))] = True
        if hide:  # in half the tasks, one context cell in five: a new task may lack others than these did
            lost = torch.rand(outputs.shape, generator=draw) < 0.2 * (
                torch.rand(len(tasks), 1, 1, generator=draw) < 0.5
            )
            outputs = outputs.masked_fill(lost & known.unsqueeze(-1), math.nan)
        return inputs, outputs, known

    def _loss(self, x: Tensor, y: Tensor, known: Tensor) -> Tensor:
        mean, sd = self.network(x, y, known, x)
        target = ~known.unsqueeze(-1) & ~y.isnan()
        nll = ((y.nan_to_num(0.0) - mean) / sd).square() / 2 + sd.log()
        return (nll * target).sum() / target.sum().clamp(min=1)

    def condition(self, context: Table) -> Predictor:
        x, y = (torch.as_tensor(part, dtype=torch.float32).unsqueeze(0) for part in (context.x, context.y))
        known = torch.ones(1, len(context.x), dtype=torch.bool)

        @torch.no_grad()
        def predict(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = self.network(x, y, known, torch.as_tensor(new, dtype=torch.float32).unsqueeze(0))
            mean, sd = (part.squeeze(0).double().numpy() for part in found)
            return mean, sd * self.widening.double().numpy()

        return predict


PEERS: dict[str, Callable[[], Peer]] = {
    "single_gp": SingleGP,
    "pooled_gp": lambda: GaussianProcess("pooled_gp", task_parts=False),
    "hierarchical_gp": GaussianProcess,
    "coupled_hierarchical_gp": lambda: GaussianProcess("coupled_hierarchical_gp", coupled=True, most_cells=1_600),
    "multitask_gp": MultitaskGP,
    "random_forest": RandomForest,
    "neural_process": NeuralProcess,
}


# ------------------------------------------------------------------------------------------------ inverse and scores
def inverse(
    predictor: Predictor, x: np.ndarray, y: np.ndarray, column: int, grid: np.ndarray, prior_weights: np.ndarray
) -> np.ndarray:
    r"""Posterior (M, G) of input `column` on a grid by Bayes, :math:`\propto \pi_g \prod_q N(y_q; m_q(g), s_q(g)^2)`.

    Arguments:
        predictor: Of the task.
        x: Inputs (M, P); what stands in `column` is not used.
        y: Outputs (M, Q); a missing one is left out.
        column: Index of the input sought.
        grid: Its values (G,).
        prior_weights: Prior (G,) on the grid, of any sum.
    """
    rows = np.repeat(x, len(grid), 0)
    rows[:, column] = np.tile(grid, len(x))
    mean, sd = (part.reshape(len(x), len(grid), -1) for part in predictor(rows))
    cells = -(((y[:, None] - mean) / sd) ** 2) / 2 - np.log(sd)
    log_weight = np.where(np.isnan(y)[:, None], 0.0, cells).sum(-1)
    with np.errstate(divide="ignore"):
        log_weight = log_weight + np.log(prior_weights)
    return np.exp(log_weight - logsumexp(log_weight, 1, keepdims=True))


def gaussian_scores(y: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> dict[str, np.ndarray]:
    """Negative log density, CRPS and whether the central 90 % interval covers, cell by cell; NaN where y is."""
    z = (y - mean) / sd
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return {
        "nlpd": z**2 / 2 + np.log(sd) + math.log(2 * math.pi) / 2,
        "crps": sd * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi)),
        "coverage90": np.where(np.isnan(z), np.nan, np.abs(z) <= 1.6448536269514722),
    }
