r"""Length scales and variances of one observation as a random function of settings, shared and of each task."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_FLOAT = torch.float64
JITTER = 1e-6
_FLAT = 6.0  # log length scale of an input that says nothing
_BLUR = 0.01  # of its offset's variance, in which one value a task varies about itself


class Hyperparameters(NamedTuple):
    """Of one observation: logarithms of the length scales (P,) and (V,) of the shared and the task function; variances
    of the shared function, the task function, the task's offset and the noise (4,)."""

    shared: Tensor
    own: Tensor
    variances: Tensor


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """exp(−|a − b|² / 2) (..., N, N')."""
    squares = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT
    return (-0.5 * squares.clamp_min(0.0)).exp()


def _evenly(task: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most `most` rows, as evenly from all tasks (N,) as their rows allow: what is constant within a task is told
    apart by the number of tasks alone."""
    order = torch.randperm(len(task), generator=generator)
    shuffled, by_task = task[order].sort(stable=True)
    first = torch.searchsorted(shuffled, shuffled)
    turn = torch.arange(len(task)) - first
    return order[by_task[turn.argsort(stable=True)]][:most]


def _whole(task: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most `most` rows of tasks (N,) as whole as 20 rows of each make them, or more where tasks are few: what a task
    is like by itself is told apart by rows of the same one."""
    tasks = int(task.max()) + 1 if len(task) else 0
    each, found = max(20, most // max(tasks, 1)), []
    for t in torch.randperm(tasks, generator=generator).tolist():
        rows = (task == t).nonzero()[:, 0]
        found.append(rows[torch.randperm(len(rows), generator=generator)[:each]])
        if sum(map(len, found)) >= most:
            break
    return torch.cat(found)[:most] if found else task


def hyperparameters(
    x: Tensor,
    varying: Tensor,
    y: Tensor,
    seen: Tensor,
    task: Tensor,
    seed: int,
    near: Hyperparameters | None = None,
    constant: bool = False,
) -> Hyperparameters:
    """The mode of one observation's marginal likelihood under wide priors: on 500 rows of whole tasks from three
    starts, or, if it is known to be `near`, on 1,500 of all tasks from there.

    One that is `constant` in a task is a function of what is constant there, and the task's offset: rows of which each
    task shows one would not tell that from a function of the task, or from noise.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = seen.nonzero()[:, 0]
    if constant:  # one of each task
        chosen = _evenly(task[rows], min(1500, len(task[rows].unique())), generator)
    else:
        chosen = _whole(task[rows], 500, generator) if near is None else _evenly(task[rows], 1500, generator)
    rows = rows[chosen]
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

    def read(theta: Tensor) -> Hyperparameters:
        shared, length, variances = theta.clamp(-9.0, _FLAT).split(sizes)
        v = variances.exp()
        if constant:
            shared, v = torch.where(varying, _FLAT, shared), torch.stack([v[0], _BLUR * v[2], v[2], _BLUR * v[2]])
        return Hyperparameters(shared, length, v)

    def negative(theta: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log posterior density, and its gradient."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_(True)
            found = read(theta)
            a, b, v = x * found.shared.neg().exp(), own * found.own.neg().exp(), found.variances
            covariance = v[0] * kernel(a, a) + same * (v[1] * kernel(b, b) + v[2]) + (v[3] + JITTER) * eye
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

    def found_from(start: Tensor, steps: int) -> Hyperparameters:
        return read(_minimise(negative, start, steps)[1])

    if near is not None:
        return found_from(torch.cat([near.shared, near.own, near.variances.log()]), 40)
    start = about.clone()
    start[:inputs] -= 1.0
    start[inputs : inputs + owned] -= 0.5
    start[-4:] = torch.tensor([0.5, 0.16, 0.16, 0.1], dtype=_FLOAT).log()
    rapid, apart = start.clone(), start.clone()
    rapid[inputs : inputs + owned] -= 1.5
    apart[-4:] += torch.tensor([-1.0, 1.2, 1.2, 0.0], dtype=_FLOAT)
    tried = [_minimise(negative, begin, 12) for begin in (start, rapid, apart)]
    return found_from(min(tried, key=lambda one: one[0])[1], 50)


def _minimise(negative, start: Tensor, steps: int) -> tuple[float, Tensor]:  # type: ignore[no-untyped-def]
    """L-BFGS with a strong Wolfe line search."""
    theta = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        value, theta.grad = negative(theta)
        return value

    optimizer.step(closure)
    return float(negative(theta)[0]), theta.detach()
