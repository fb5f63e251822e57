r"""Observations as random functions of settings, one shared by all tasks and one of each task; all closed forms.

It is the base under the manifold where observations bend with their settings: a hierarchical Gaussian process in the
coordinates of a few inducing rows, whose task functions learn from the tasks how they vary together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_invman.density.gaussian import GaussianBase
from pyro_invman.density.hyperparameters import JITTER, Hyperparameters, hyperparameters, kernel
from pyro_invman.density.mixed_model import MixedModel
from pyro_invman.density.random_effects import Measurements

_FLOAT = torch.float64
_UNSAID = 0.003  # of the rows' variance that inducing rows may leave out, on average


class Anchor(NamedTuple):
    """What settings say of the M observations of rows: `mean` and `scale` (..., M) at a latent of zero, and the
    directions U (..., M, L) in which the latent moves the mean."""

    mean: Tensor
    scale: Tensor
    directions: Tensor

    def deeper(self) -> Anchor:
        """With one more dimension behind those of the rows, against which several cells of a row broadcast."""
        return Anchor(self.mean.unsqueeze(-2), self.scale.unsqueeze(-2), self.directions.unsqueeze(-3))

    def of(self, rows: Tensor) -> Anchor:
        """Of some `rows` (...), which are True, in one dimension."""
        mean, scale = (part.expand(*rows.shape, -1)[rows] for part in self[:2])
        return Anchor(mean, scale, self.directions.expand(*rows.shape, -1, -1)[rows])


class Features(NamedTuple):
    """N rows by their settings: mean and scale (M, N) and directions (M, N, L) of their observations, and what
    covariances between rows are made of: settings in length scales of the shared (M, N, P) and the task function
    (M, N, V), the task function beyond the latent (M, N, F), and what is accounted for elsewhere (M, N, G)."""

    mean: Tensor
    scale: Tensor
    directions: Tensor
    shared: Tensor
    varying: Tensor
    rest: Tensor
    elsewhere: Tensor

    def unflatten(self, shape: Sequence[int]) -> Features:
        """N rows as rows (*shape)."""
        return Features(*(part.reshape(len(part), *shape, *part.shape[2:]) for part in self))

    def anchor(self) -> Anchor:
        """Outputs behind the rows."""
        return Anchor(self.mean.movedim(0, -1), self.scale.movedim(0, -1), self.directions.movedim(0, -2))


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
        self.apart: list[tuple[Tensor, Tensor]] = []  # not kept: weights and explained without each group of tasks

    @contextmanager
    def without(self, group: int) -> Iterator[None]:
        """Inside, the shared function is known from the tasks of other groups alone: to their own group's tasks it is
        what it will be to new ones. Nothing changes where no groups were named in fitting."""
        if not self.apart:
            yield
            return
        kept = self.weights, self.explained
        self.weights, self.explained = self.apart[group]
        try:
            yield
        finally:
            self.weights, self.explained = kept

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

    def hyperparameters(self) -> list[Hyperparameters]:
        """Of each observation."""
        shared, own = self.shared_rate.log().neg(), self.own_rate.log().neg()
        return [Hyperparameters(*parts) for parts in zip(shared, own, self.variances, strict=True)]

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
        return self.features(settings, known).unflatten(settings.shape[:-1]).anchor()

    def features(self, settings: Tensor, known: Tensor) -> Features:
        """Rows with settings (..., S), read where `known`, as N rows in one; in double precision."""
        x = self.inputs(settings, known)
        told = known.expand(settings.shape).any(-1).flatten()
        if int(told.sum()) + 1 >= len(told):
            return self._features(x.reshape(-1, x.shape[-1]))
        first = (~told).nonzero()[:1, 0]  # rows of which nothing is told are one
        apart = torch.cat([told.nonzero()[:, 0], first])
        place = torch.where(told, told.cumsum(0) - 1, len(apart) - 1)
        return Features(*(part[:, place] for part in self._features(x.reshape(-1, x.shape[-1])[apart])))

    def _features(self, flat: Tensor) -> Features:
        """Of what the kernels see (N, P)."""
        of_shared, of_own, of_offset, noise = self.variances.unsqueeze(-1).unbind(1)  # (M, 1) each
        shared, varying = flat * self.shared_rate.unsqueeze(1), flat[:, self.varying] * self.own_rate.unsqueeze(1)
        near = kernel(shared, self.inducing)  # (M, N, I)
        mean = self.offset.unsqueeze(-1) + (near @ self.weights.unsqueeze(-1)).squeeze(-1)
        explained = near @ self.explained
        left = of_shared * (1 - explained.square().sum(-1)).clamp_min(0.0)
        own, lost = _features(varying, self.own_inducing, self.own_whiten)
        own = of_own.sqrt().unsqueeze(-1) * own
        ones = of_offset.sqrt().unsqueeze(-1).expand(-1, len(flat), 1)
        both = torch.cat([ones, own], -1)
        rest = both @ self.rest
        variance = noise + left + of_own * lost + rest.square().sum(-1)
        elsewhere = torch.cat([of_shared.sqrt().unsqueeze(-1) * explained, own], -1)
        return Features(mean, variance.clamp_min(1e-12).sqrt(), both @ self.loading, shared, varying, rest, elsewhere)

    def left_over(self, a: Features, b: Features) -> Tensor:
        """Covariance (M, ..., N, N') between rows of a task of what neither the shared function as it is known, nor
        the latent, nor noise accounts for."""
        of_shared, of_own = (v.reshape(-1, *[1] * (a.shared.dim() - 1)) for v in self.variances[:, :2].unbind(1))
        kernels = of_shared * kernel(a.shared, b.shared) + of_own * kernel(a.varying, b.varying)
        return kernels + a.rest @ b.rest.mT - a.elsewhere @ b.elsewhere.mT

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
        inducing: int = 400,
        own_inducing: int = 24,
        iterations: int = 8,
        seed: int = 0,
        like: RandomFunctions | None = None,
        optional: Tensor | None = None,
        group: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> RandomFunctions:
        """Fits settings (N, S) and observations (N, M) with NaN, of tasks (N,) numbered from 0.

        Arguments:
            strength: degrees of freedom of the prior about the kernel's covariance of task functions.
            inducing, own_inducing: numbers of inducing rows of the shared and the task functions, at most.
            iterations: rounds of expectation–maximisation.
            seed: of the choice of tasks that length scales and variances are found on.
            like: length scales and variances are sought near these.
            optional: settings (S,) that may be missing, beside those that are missing here.
            group: of each task (T,), from 0: `without` shows the shared function as learned without one of them.
            constant: observations (M,) that are one value a task, however many rows show it.
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
        near = [None] * y.shape[1] if like is None else like.hyperparameters()
        flat = [False] * y.shape[1] if constant is None else constant.tolist()
        each = [
            hyperparameters(x, varying, y[:, q], seen[:, q], task, seed, *how)
            for q, how in enumerate(zip(near, flat, strict=True))
        ]
        rates = torch.stack([h.shared for h in each]).neg().exp()
        own_rates = torch.stack([h.own for h in each]).neg().exp()
        variances = torch.stack([h.variances for h in each])
        places, whiten = _inducing(x, rates, inducing)
        own_places, own_whiten = _inducing(x[:, varying], own_rates, own_inducing)
        shared, lost = _features(x * rates.unsqueeze(1), places, whiten)
        own, own_lost = _features(x[:, varying] * own_rates.unsqueeze(1), own_places, own_whiten)
        noise = variances[:, 3:] + variances[:, :1] * lost + variances[:, 1:2] * own_lost
        shared = variances[:, 0, None, None].sqrt() * shared
        ones = variances[:, 2, None, None].sqrt().expand(-1, len(x), 1)
        own = torch.cat([ones, variances[:, 1, None, None].sqrt() * own], -1)
        em = MixedModel(shared, own, y, seen, task, noise, strength)
        for _ in range(iterations):
            em.step()
        loading, rest = em.directions(latent_dim)

        def shared_function(tasks: Tensor) -> tuple[Tensor, Tensor]:
            about = em.known_from(tasks)
            return variances[:, :1].sqrt() * (about.weights.unsqueeze(-2) @ whiten).squeeze(-2), about.explained(whiten)

        weights, explained = shared_function(torch.ones(em.tasks, dtype=torch.bool))
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
            "weights": weights,
            "explained": explained,
            "loading": loading,
            "rest": rest,
        }
        made = cls({name: list(value.shape) for name, value in found.items()})
        for name, value in found.items():
            made.get_buffer(name).copy_(value)
        made.residuals.covariance.copy_(em.correlation())
        if group is not None:
            made.apart = [shared_function(group != g) for g in range(int(group.max()) + 1)]
        return made


_NAMES = tuple(name for name in RandomFunctions.__annotations__)


def _varies(x: Tensor, task: Tensor) -> Tensor:
    """Which inputs (P,) vary within more than one task in twenty."""
    tasks, index = int(task.max()) + 1, task.unsqueeze(-1).expand_as(x)
    low = x.new_full((tasks, x.shape[1]), math.inf).scatter_reduce(0, index, x, "amin")
    high = x.new_full((tasks, x.shape[1]), -math.inf).scatter_reduce(0, index, x, "amax")
    return (high > low).to(_FLOAT).mean(0) > 0.05


def _features(near: Tensor, places: Tensor, whiten: Tensor) -> tuple[Tensor, Tensor]:
    """Nyström features (M, N, I) of scaled inputs (M, N, P), and the variance that they lose (M, N)."""
    features = kernel(near, places) @ whiten.mT
    return features, (1 - features.square().sum(-1)).clamp_min(0.0)


def _inducing(x: Tensor, rates: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Scaled inducing rows (M, I, P), each the one that those before it say least about, until they say
    nearly all of the others or are `most`; and whitening (M, I, I)."""
    scaled = x * rates.unsqueeze(1)
    left = torch.ones(scaled.shape[:2], dtype=_FLOAT)
    factor = torch.zeros(*scaled.shape[:2], min(most, len(x)), dtype=_FLOAT)
    each, chosen = torch.arange(len(rates)), []
    for j in range(factor.shape[-1]):
        pick = left.argmax(-1)
        column = kernel(scaled[each, pick].unsqueeze(1), scaled).squeeze(1)
        column = column - (factor[..., :j] @ factor[each, pick, :j].unsqueeze(-1)).squeeze(-1)
        factor[..., j] = column / (left[each, pick] + JITTER).sqrt().unsqueeze(-1)
        left = (left - factor[..., j].square()).clamp_min(0.0)
        left[each, pick] = 0.0
        chosen.append(pick)
        if bool((left.mean(-1) < _UNSAID).all()):
            break
    where = scaled[each, torch.stack(chosen)].movedim(0, 1)
    eye = torch.eye(len(chosen), dtype=_FLOAT)
    factor = torch.linalg.cholesky(kernel(where, where) + JITTER * eye)
    return where, torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
