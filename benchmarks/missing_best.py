r"""How well the conditionals of a normal can be known at all from rows that hide cells at random.

The Gaussian of greatest likelihood on the same rows is efficient: no unbiased estimate has smaller standard errors. Its
log-likelihood is that of a few moments for each pattern of observed cells, so that it is found by
expectation–maximisation to machine precision, and its observed Fisher information I is a Hessian of them, at the truth.
Coefficients f of all conditionals have the covariance :math:`J I^{-1} J^\top`, J the slopes of f; draws of that normal
say how large the largest of their errors is.

References:
    Dempster, Laird & Rubin, *Maximum likelihood from incomplete data via the EM algorithm*, JRSS B 1977.
    Little & Rubin, *Statistical analysis with missing data*, 2019, chapters 9 and 11.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_invman.simulators.linear_gaussian import LinearGaussian


class Moments(NamedTuple):
    """Of the rows with one pattern: observed columns (K,), number, mean (K,) and covariance (K, K)."""

    columns: Tensor
    number: int
    mean: Tensor
    covariance: Tensor


def moments(rows: Tensor) -> list[Moments]:
    """Of rows (N, D) with NaN, pattern by pattern."""
    patterns, which = (~rows.isnan()).unique(dim=0, return_inverse=True)
    found = []
    for p, pattern in enumerate(patterns):
        columns = pattern.nonzero()[:, 0]
        some = rows[which == p][:, columns]
        if len(columns):
            found.append(Moments(columns, len(some), some.mean(0), some.mT.cov(correction=0).reshape(len(columns), -1)))
    return found


def log_likelihood(parts: list[Moments], mean: Tensor, covariance: Tensor) -> Tensor:
    """Of the observed cells."""
    total = mean.new_zeros(())
    for columns, number, middle, spread in parts:
        block, off = covariance[columns][:, columns], middle - mean[columns]
        explained = torch.linalg.solve(block, spread + torch.outer(off, off)).trace()
        total = total - number / 2 * (block.logdet() + explained + len(columns) * math.log(2 * math.pi))
    return total


def greatest_likelihood(rows: Tensor, start: LinearGaussian, tolerance: float = 1e-9) -> LinearGaussian:
    """The Gaussian of greatest likelihood of rows (N, D) with NaN, from `start` on."""
    parts, mean, covariance = moments(rows), start.mean, start.covariance
    number = sum(part.number for part in parts)
    for _ in range(10_000):
        first, second = torch.zeros_like(mean), torch.zeros_like(covariance)
        for columns, count, middle, spread in parts:
            gain = torch.linalg.solve(covariance[columns][:, columns], covariance[columns]).mT
            imputed = mean + gain @ (middle - mean[columns])
            left = covariance - gain @ covariance[columns] + gain @ spread @ gain.mT
            first, second = first + count * imputed, second + count * (left + torch.outer(imputed, imputed))
        before, mean = mean, first / number
        moved, covariance = covariance, second / number - torch.outer(mean, mean)
        if max(float((mean - before).abs().max()), float((covariance - moved).abs().max())) < tolerance:
            break
    return LinearGaussian(start.variables, mean, (covariance + covariance.mT) / 2)


def conditionals(dim: int) -> Iterator[tuple[int, list[int]]]:
    """Every target and set of givens."""
    for target in range(dim):
        others = [j for j in range(dim) if j != target]
        for number in range(1, dim):
            for known in itertools.combinations(others, number):
                yield target, list(known)


def coefficients(process: LinearGaussian, mean: Tensor, covariance: Tensor) -> list[Tensor]:
    """Intercept, slopes and standard deviation of every conditional, in standard scores of `process`."""
    size = process.covariance.diagonal().sqrt()
    middle, spread = (mean - process.mean) / size, covariance / torch.outer(size, size)
    found = []
    for target, known in conditionals(len(mean)):
        slopes = torch.linalg.solve(spread[known][:, known], spread[known, target])
        sd = (spread[target, target] - slopes @ spread[known, target]).sqrt()
        found.append(torch.cat([(middle[target] - slopes @ middle[known]).reshape(1), slopes, sd.reshape(1)]))
    return found


def attainable(process: LinearGaussian, rows: Tensor, bar: float, draws: int = 4000) -> dict[str, float]:
    """Largest standard error of a coefficient by the observed Fisher information of `rows` (N, D), and the largest
    error among all coefficients: its median, its 95 % quantile, and how often it is within the bar."""
    dim, parts = len(process.mean), moments(rows)
    below = torch.tril_indices(dim, dim)

    def unpacked(theta: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.zeros(dim, dim, dtype=theta.dtype).index_put((below[0], below[1]), theta[dim:])
        return theta[:dim], root @ root.mT

    def flat(theta: Tensor) -> Tensor:
        return torch.cat(coefficients(process, *unpacked(theta)))

    theta = torch.cat([process.mean, torch.linalg.cholesky(process.covariance)[below[0], below[1]]])
    information = torch.func.hessian(lambda t: -log_likelihood(parts, *unpacked(t)))(theta)
    slopes = torch.func.jacrev(flat)(theta)
    root = slopes @ torch.linalg.cholesky(torch.linalg.inv(information))
    noise = torch.randn(draws, len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    largest = (noise @ root.mT).abs().amax(-1)
    return {
        "rows": len(rows),
        "largest_standard_error": float(root.norm(dim=-1).max()),
        "largest_error_median": float(largest.median()),
        "largest_error_95": float(largest.quantile(0.95)),
        "within_bar": float((largest <= bar).double().mean()),
    }


def compare_normal(process: LinearGaussian, found: LinearGaussian, bar: float, seed: int) -> dict[str, Any]:
    """Errors of the coefficients of every conditional of one variable, and divergences over drawn givens."""
    pairs = zip(
        coefficients(process, found.mean, found.covariance),
        coefficients(process, process.mean, process.covariance),
        strict=True,
    )
    errors = [float((a - b).abs().max()) for a, b in pairs]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2000, len(process.mean), generator=generator, dtype=torch.float64)
    rows, names = process.mean + noise @ torch.linalg.cholesky(process.covariance).mT, process.variables.names
    divergences = []
    for target, known in conditionals(len(process.mean)):
        given = {names[j]: rows[:, j] for j in known}
        other = found.conditional([names[target]], given)
        divergences.append(float(process.kl_conditional([names[target]], given, other).mean()))
    return summary(errors, divergences, bar)


def summary(errors: list[float], divergences: list[float], bar: float) -> dict[str, Any]:
    """Of the largest error of a coefficient in each conditional, and of the conditionals' divergences."""
    return {
        "largest_error": max(errors),
        "mean_error": sum(errors) / len(errors),
        "within": sum(e <= bar for e in errors) / len(errors),
        "kl": sum(divergences) / len(divergences),
        "largest_kl": max(divergences),
    }
