r"""Observations as random functions of settings, one shared by all tasks and one of each task; all closed forms.

It is the base under the manifold where observations bend with their settings: a hierarchical Gaussian process in the
coordinates of a few inducing rows, whose task functions learn from the tasks how they vary together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_invman.density.gaussian import GaussianBase
from pyro_invman.density.random_effects import Measurements

_FLOAT = torch.float64
_JITTER = 1e-6


class Anchor(NamedTuple):
    """What settings say of the M observations of rows: `mean` and `scale` (..., M) at a latent of zero, and the
    directions U (..., M, L) in which the latent moves the mean."""

    mean: Tensor
    scale: Tensor
    directions: Tensor

    def deeper(self) -> Anchor:
        """With one more dimension behind those of the rows, against which several cells of a row broadcast."""
        return Anchor(self.mean.unsqueeze(-2), self.scale.unsqueeze(-2), self.directions.unsqueeze(-3))


class _Hyperparameters(NamedTuple):
    """Of one observation: length scales (P,) and (V,) of the shared and the task function; variances of the shared
    function, the task function, the task's offset and the noise (4,)."""

    shared: Tensor
    own: Tensor
    variances: Tensor


class RandomFunctions(nn.Module):
    r"""Observations of row n of task t at settings s,

    .. math:: y_{q} = \mu_q + \varphi_q(s)^T a_q + \psi_q(s)^T b_{tq} + e_q, \qquad
              a_q \sim N(0, I), \quad b_t \sim N(0, \Sigma), \quad e \sim N(0, \mathrm{diag}(\sigma^2))

    with :math:`\varphi` and :math:`\psi` the Nyström features of squared-exponential kernels, :math:`\psi` with a
    constant and of settings alone that vary within tasks. Length scales and variances maximise the marginal likelihood
    of some whole tasks; :math:`\Sigma`, over all observations and features together, starts as the kernel's identity
    and is found by expectation–maximisation under an inverse-Wishart prior about it. The L directions in which
    :math:`\Sigma` moves observations most are the latent, :math:`z \sim N(0, I_L)`; the others, what is not known of
    :math:`a` and what the features leave out widen the scale.

    A missing setting shows as its mean and, where training rows lack it too, as an indicator.

    Arguments:
        sizes: the shapes of what is learned, as `sizes` gives them; `fitted` makes one from rows.

    References:
        Bonilla, Chai & Williams, *Multi-task Gaussian process prediction*, NeurIPS 2007.
        Williams & Seeger, *Using the Nyström method to speed up kernel machines*, NeurIPS 2001.
        Hensman, Lawrence & Rattray, *Hierarchical Bayesian modelling of gene expression time series*, BMC
        Bioinformatics 2013.
    """

    optional: Tensor
    varying: Tensor
    centre: Tensor
    offset: Tensor
    shared_rate: Tensor
    own_rate: Tensor
    variances: Tensor
    inducing: Tensor
    own_inducing: Tensor
    own_whiten: Tensor
    weights: Tensor
    explained: Tensor
    loading: Tensor
    rest: Tensor

    def __init__(self, sizes: dict[str, list[int]]) -> None:
        super().__init__()
        for name in _NAMES:
            kind = torch.bool if name in ("optional", "varying") else _FLOAT
            self.register_buffer(name, torch.zeros(sizes[name], dtype=kind))
        self.residuals = GaussianBase(sizes["offset"][0])

    def sizes(self) -> dict[str, list[int]]:
        """The shapes of all that is learned, from which an empty one is built."""
        return {name: list(self.get_buffer(name).shape) for name in _NAMES}

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the module, but stays in double precision: Nyström features need it."""
        super()._apply(fn, recurse)
        for name in _NAMES:
            if name not in ("optional", "varying"):
                setattr(self, name, self.get_buffer(name).to(_FLOAT))
        return self

    @property
    def num_observations(self) -> int:
        """M"""
        return len(self.offset)

    @property
    def latent_dim(self) -> int:
        """L"""
        return self.loading.shape[-1]

    # ------------------------------------------------------------------ reading
    def inputs(self, settings: Tensor, known: Tensor) -> Tensor:
        """What the kernels see (..., P) of settings (..., S), read where `known`."""
        shown = torch.where(known, settings.to(_FLOAT) - self.centre, 0.0)
        return torch.cat([shown, (~known.expand_as(shown)).to(_FLOAT)[..., self.optional]], -1)

    def readable(self, known: Tensor) -> Tensor:
        """Whether rows (...) know every setting that training rows always know."""
        return (known | self.optional).all(-1)

    def anchor(self, settings: Tensor, known: Tensor) -> Anchor:
        """Means, scales and directions at settings (..., S), read where `known`; in double precision."""
        x = self.inputs(settings, known)
        flat = x.reshape(-1, x.shape[-1])
        of_shared, of_own, of_offset, noise = self.variances.unsqueeze(-1).unbind(1)  # (M, 1) each
        near = _kernel(flat * self.shared_rate.unsqueeze(1), self.inducing)  # (M, N, I)
        mean = self.offset.unsqueeze(-1) + (near @ self.weights.unsqueeze(-1)).squeeze(-1)
        left = of_shared * (1 - (near @ self.explained).square().sum(-1)).clamp_min(0.0)
        own, lost = _features(flat[:, self.varying] * self.own_rate.unsqueeze(1), self.own_inducing, self.own_whiten)
        ones = of_offset.sqrt().unsqueeze(-1).expand(-1, len(flat), 1)
        own = torch.cat([ones, of_own.sqrt().unsqueeze(-1) * own], -1)
        variance = noise + left + of_own * lost + (own @ self.rest).square().sum(-1)
        directions = own @ self.loading  # (M, N, L)
        shape = settings.shape[:-1]
        return Anchor(
            mean.mT.reshape(*shape, self.num_observations),
            variance.clamp_min(1e-12).sqrt().mT.reshape(*shape, self.num_observations),
            directions.transpose(0, 1).reshape(*shape, self.num_observations, self.latent_dim),
        )

    def given_others(self, mean: Tensor, scale: Tensor, answers: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale (..., M) of each observation given the others of its row (..., M) that are `seen`."""
        residual = torch.where(seen, (answers.to(_FLOAT) - mean) / scale, 0.0)
        apart = self.residuals.condition(residual, seen)
        return mean + scale * apart.mean, scale * apart.scale

    def measurements(self, anchor: Anchor, answers: Tensor, seen: Tensor) -> Measurements:
        """What rows measure of the latent; zero where an observation (..., M) is not `seen`."""
        mean, scale, directions = anchor
        residual = torch.where(seen, (answers.to(_FLOAT) - mean) / scale, 0.0)
        directions = torch.where(seen.unsqueeze(-1), directions / scale.unsqueeze(-1), 0.0)
        eye = torch.eye(self.num_observations, dtype=_FLOAT, device=mean.device)
        both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
        factor = torch.linalg.cholesky(torch.where(both, self.residuals.covariance, eye))
        sides = torch.cat([directions, residual.unsqueeze(-1)], -1)
        white = torch.linalg.solve_triangular(factor, sides, upper=False)
        size = factor.diagonal(dim1=-2, dim2=-1).log() + torch.where(seen, scale.log(), 0.0)
        return Measurements(white[..., :-1], white[..., -1], size.sum(-1), seen.sum(-1))

    # ------------------------------------------------------------------ learning
    @classmethod
    @torch.no_grad()
    def fitted(
        cls,
        settings: Tensor,
        answers: Tensor,
        task: Tensor,
        latent_dim: int,
        *,
        strength: float = 10.0,
        inducing: int = 100,
        own_inducing: int = 24,
        iterations: int = 8,
        seed: int = 0,
        like: RandomFunctions | None = None,
        optional: Tensor | None = None,
    ) -> RandomFunctions:
        """Fits settings (N, S) and observations (N, M) with NaN, of tasks (N,) numbered from 0.

        Arguments:
            strength: degrees of freedom of the prior about the kernel's covariance of task functions.
            inducing, own_inducing: numbers of inducing rows of the shared and the task functions, at most.
            iterations: rounds of expectation–maximisation.
            seed: of the choice of tasks that length scales and variances are found on.
            like: take length scales and variances from here.
            optional: settings (S,) that may be missing, beside those that are missing here.
        """
        known = ~settings.isnan()
        optional = ~known.all(0) if optional is None else optional | ~known.all(0)
        count = known.sum(0).clamp_min(1)
        centre = settings.nan_to_num(0.0).to(_FLOAT).sum(0) / count
        shown = torch.where(known, settings.to(_FLOAT) - centre, 0.0)
        x = torch.cat([shown, (~known).to(_FLOAT)[:, optional]], -1)
        varying = _varies(x, task) if like is None else like.varying
        seen = ~answers.isnan()
        offset = answers.to(_FLOAT).nan_to_num(0.0).sum(0) / seen.sum(0).clamp_min(1)
        y = torch.where(seen, answers.to(_FLOAT) - offset, 0.0)
        if like is None:
            each = [_hyperparameters(x, varying, y[:, q], seen[:, q], task, seed) for q in range(y.shape[1])]
            rates = torch.stack([h.shared for h in each]).neg().exp()
            own_rates = torch.stack([h.own for h in each]).neg().exp()
            variances = torch.stack([h.variances for h in each])
        else:
            rates, own_rates, variances = like.shared_rate, like.own_rate, like.variances
        places, whiten = _inducing(x, rates, inducing)
        own_places, own_whiten = _inducing(x[:, varying], own_rates, own_inducing)
        shared, lost = _features(x * rates.unsqueeze(1), places, whiten)
        own, own_lost = _features(x[:, varying] * own_rates.unsqueeze(1), own_places, own_whiten)
        noise = variances[:, 3:] + variances[:, :1] * lost + variances[:, 1:2] * own_lost
        shared = variances[:, 0, None, None].sqrt() * shared
        ones = variances[:, 2, None, None].sqrt().expand(-1, len(x), 1)
        own = torch.cat([ones, variances[:, 1, None, None].sqrt() * own], -1)
        em = _Mixed(shared, own, y, seen, task, noise, strength)
        for _ in range(iterations):
            em.step()
        loading, rest = em.directions(latent_dim)
        found = {
            "optional": optional,
            "varying": varying,
            "centre": centre,
            "offset": offset,
            "shared_rate": rates,
            "own_rate": own_rates,
            "variances": variances,
            "inducing": places,
            "own_inducing": own_places,
            "own_whiten": own_whiten,
            "weights": variances[:, :1].sqrt() * (em.weights.unsqueeze(-2) @ whiten).squeeze(-2),
            "explained": em.explained(whiten),
            "loading": loading,
            "rest": rest,
        }
        made = cls({name: list(value.shape) for name, value in found.items()})
        for name, value in found.items():
            made.get_buffer(name).copy_(value)
        made.residuals.covariance.copy_(em.correlation())
        return made


_NAMES = tuple(name for name in RandomFunctions.__annotations__)


class _Mixed:
    """The linear mixed model of given features: shared (M, N, I) and own (M, N, F), answers (N, M) where seen, and
    variances (M, N) of what else is in them."""

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
        among = torch.stack([self.own[:, rows].mT @ self.own[:, rows] for rows in self.rows])
        across = torch.stack([self.own[:, rows].mT @ self.shared[:, rows] for rows in self.rows])
        self.among, self.across = _block_diagonal(among), _block_diagonal(across)
        self.own_y = torch.stack([(self.own[:, r].mT @ self.y[:, r, None]).flatten() for r in self.rows]).unsqueeze(-1)
        self.shared_y = (self.shared.mT @ self.y.unsqueeze(-1)).flatten()
        self.total = _block_diagonal((self.shared.mT @ self.shared).unsqueeze(0))[0]
        self.covariance = torch.eye(self.among.shape[-1], dtype=_FLOAT)

    def step(self) -> None:
        """One round of expectation–maximisation; weights of the shared functions are integrated out."""
        prior = torch.cholesky_inverse(torch.linalg.cholesky(self.covariance))
        factor = torch.linalg.cholesky(prior + self.among)
        sides = torch.cat([self.across, self.own_y], -1)
        reduced = torch.linalg.solve_triangular(factor, sides, upper=False).flatten(0, 1)
        eye = torch.eye(len(self.total), dtype=_FLOAT)
        self.factor = torch.linalg.cholesky(self.total + eye - reduced[:, :-1].mT @ reduced[:, :-1])
        right = self.shared_y - reduced[:, :-1].mT @ reduced[:, -1]
        solved = torch.cholesky_solve(right.unsqueeze(-1), self.factor)
        self.weights = solved.reshape(len(self.shared), -1)
        spread = torch.cholesky_inverse(factor)  # (T, B, B)
        self.functions = (spread @ (self.own_y - self.across @ solved)).squeeze(-1)
        gain = spread @ self.across  # how the task functions give way to the shared ones
        lean = torch.linalg.solve_triangular(self.factor, gain.mT, upper=False)
        moments = self.functions.mT @ self.functions + (spread + lean.mT @ lean).sum(0)
        self.covariance = (self.strength * torch.eye(len(moments), dtype=_FLOAT) + moments) / (
            self.strength + self.tasks
        )

    def explained(self, whiten: Tensor) -> Tensor:
        """A factor (M, I, R) of the share of each shared function's variance that is known, of kernels to the inducing
        rows; directions of which next to nothing is known are left out."""
        width = self.shared.shape[-1]
        inverse = torch.cholesky_inverse(self.factor)
        eye = torch.eye(width, dtype=_FLOAT)
        blocks = [inverse[q * width : (q + 1) * width, q * width : (q + 1) * width] for q in range(len(self.shared))]
        size, turn = torch.linalg.eigh(eye - torch.stack(blocks))
        kept = int((size > 1e-3).any(0).sum())
        return whiten.mT @ (turn * size.clamp_min(0.0).sqrt().unsqueeze(-2))[..., -max(kept, 1) :]

    def directions(self, latent_dim: int) -> tuple[Tensor, Tensor]:
        """Loadings (M, F, L) of the directions that move observations most, and a factor (M, F, F) of the others."""
        factor = torch.linalg.cholesky(self.covariance)
        _, turn = torch.linalg.eigh(factor.mT @ self.among.sum(0) @ factor)
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


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(T, M, A, B) to (T, M A, M B)."""
    tasks, outputs, a, b = blocks.shape
    wide = blocks.new_zeros(tasks, outputs, a, outputs, b)
    for q in range(outputs):
        wide[:, q, :, q] = blocks[:, q]
    return wide.reshape(tasks, outputs * a, outputs * b)


def _varies(x: Tensor, task: Tensor) -> Tensor:
    """Which inputs (P,) vary within more than one task in twenty."""
    tasks, index = int(task.max()) + 1, task.unsqueeze(-1).expand_as(x)
    low = x.new_full((tasks, x.shape[1]), math.inf).scatter_reduce(0, index, x, "amin")
    high = x.new_full((tasks, x.shape[1]), -math.inf).scatter_reduce(0, index, x, "amax")
    return (high > low).to(_FLOAT).mean(0) > 0.05


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """exp(−|a − b|² / 2) (..., N, N')."""
    squares = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT
    return (-0.5 * squares.clamp_min(0.0)).exp()


def _features(near: Tensor, places: Tensor, whiten: Tensor) -> tuple[Tensor, Tensor]:
    """Nyström features (M, N, I) of scaled inputs (M, N, P), and the variance that they lose (M, N)."""
    features = _kernel(near, places) @ whiten.mT
    return features, (1 - features.square().sum(-1)).clamp_min(0.0)


def _inducing(x: Tensor, rates: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Scaled inducing rows (M, I, P), each the one that those before it say least about, and whitening (M, I, I)."""
    number = min(number, len(x))
    places = []
    for rate in rates:
        scaled = x * rate
        left = torch.ones(len(x), dtype=_FLOAT)
        factor = torch.zeros(len(x), number, dtype=_FLOAT)
        chosen: list[int] = []
        for j in range(number):
            pick = int(left.argmax())
            column = _kernel(scaled[pick : pick + 1], scaled)[0] - factor[:, :j] @ factor[pick, :j]
            factor[:, j] = column / (left[pick] + _JITTER).sqrt()
            left = (left - factor[:, j].square()).clamp_min(0.0)
            left[pick] = 0.0
            chosen.append(pick)
        places.append(scaled[chosen])
    where = torch.stack(places)
    eye = torch.eye(number, dtype=_FLOAT)
    factor = torch.linalg.cholesky(_kernel(where, where) + _JITTER * eye)
    return where, torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


def _some_tasks(task: Tensor, most: int, each: int, generator: torch.Generator) -> Tensor:
    """Rows of whole tasks (at most `each` of one), about `most` in all."""
    found = [task.new_empty(0)]
    names = task.unique()
    for t in names[torch.randperm(len(names), generator=generator)]:
        rows = (task == t).nonzero()[:, 0]
        found.append(rows[torch.randperm(len(rows), generator=generator)[:each]])
        if sum(map(len, found)) >= most:
            break
    return torch.cat(found)[:most]


def _hyperparameters(
    x: Tensor, varying: Tensor, y: Tensor, seen: Tensor, task: Tensor, seed: int, most: int = 500
) -> _Hyperparameters:
    """The mode of one observation's marginal likelihood on some whole tasks, under wide priors, from three starts."""
    generator = torch.Generator().manual_seed(seed)
    rows = seen.nonzero()[:, 0]
    rows = rows[_some_tasks(task[rows], most, 20, generator)]
    x, y, same = x[rows], y[rows], (task[rows].unsqueeze(-1) == task[rows]).to(_FLOAT)
    own = x[:, varying]
    inputs, owned = x.shape[1], own.shape[1]
    sizes = [inputs, owned, 4]
    about = torch.tensor(
        [math.log(max(inputs, 1)) / 2 + math.sqrt(2)] * inputs + [math.log(max(owned, 1)) / 2 + math.sqrt(2)] * owned
    ).to(_FLOAT)
    about = torch.cat([about, torch.full((4,), math.log(0.3), dtype=_FLOAT)])
    width = torch.tensor([3.0] * (inputs + owned) + [4.0] * 4, dtype=_FLOAT)
    eye = torch.eye(len(y), dtype=_FLOAT)

    def negative(theta: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log posterior density, and its gradient."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_(True)
            shared, length, variances = theta.clamp(-9.0, 6.0).split(sizes)
            v = variances.exp()
            a, b = x * shared.neg().exp(), own * length.neg().exp()
            covariance = v[0] * _kernel(a, a) + same * (v[1] * _kernel(b, b) + v[2]) + (v[3] + _JITTER) * eye
            with torch.no_grad():  # the gradient of the normal in closed form spares that of the factor
                factor = torch.linalg.cholesky(covariance)
                inverse = torch.cholesky_inverse(factor)
                solved = inverse @ y
                value = 0.5 * (y @ solved) + factor.diagonal().log().sum()
                slope = 0.5 * (inverse - torch.outer(solved, solved))
            prior = ((theta - about).square() / (2 * width)).sum()
            ((slope * covariance).sum() + prior).backward()
        assert theta.grad is not None
        return value + prior.detach(), theta.grad

    start = about.clone()
    start[:inputs] -= 1.0
    start[inputs : inputs + owned] -= 0.5
    start[-4:] = torch.tensor([0.5, 0.16, 0.16, 0.1], dtype=_FLOAT).log()
    rapid, apart = start.clone(), start.clone()
    rapid[inputs : inputs + owned] -= 1.5
    apart[-4:] += torch.tensor([-1.0, 1.2, 1.2, 0.0], dtype=_FLOAT)
    tried = [_minimise(negative, begin, 12) for begin in (start, rapid, apart)]
    _, found = _minimise(negative, min(tried, key=lambda one: one[0])[1], 50)
    shared, length, variances = found.clamp(-9.0, 6.0).split(sizes)
    return _Hyperparameters(shared, length, variances.exp())


def _minimise(negative, start: Tensor, steps: int) -> tuple[float, Tensor]:  # type: ignore[no-untyped-def]
    """L-BFGS with a strong Wolfe line search."""
    theta = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        value, theta.grad = negative(theta)
        return value

    optimizer.step(closure)
    return float(negative(theta)[0]), theta.detach()
