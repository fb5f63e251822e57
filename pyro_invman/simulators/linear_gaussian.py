r"""Linear-Gaussian processes: closed forms for densities, conditionals, task posteriors and information gain.

`LinearGaussian` is one row of D variables, :math:`v \sim N(\mu, \Sigma)`. `HierarchicalLinearGaussian` ties
the rows of a task by a latent :math:`z \sim N(0, I_L)`,

.. math:: v_n = \mu + W z + e_n, \qquad e_n \sim N(0, \Sigma)

where W is zero for parameters and conditions, since settings are no evidence about the task: p(x | z) is p(x)
and :math:`p(y | x, z) = N(\mu_y + W_y z + \Sigma_{yx} \Sigma_{xx}^{-1} (x - \mu_x), \Sigma_{y|x})`.
Cells that are missing (NaN) are integrated out exactly. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_invman.data import from_tensor
from pyro_invman.variables import DataError, Variable, Variables

if TYPE_CHECKING:
    import xarray as xr

MECHANISMS = ("completely_at_random", "at_random")
_STEEPNESS = 2.0  # of the chance to go missing in the driver, in probits a standard deviation


class LinearGaussian:
    r"""A row of D jointly Gaussian variables, :math:`v \sim N(\mu, \Sigma)`.

    Arguments:
        variables: The D variables, all of support "real".
        mean: :math:`\mu`, shape (..., D).
        covariance: :math:`\Sigma`, shape (..., D, D), positive definite.

    Raises:
        DataError: If a shape, a support or the covariance does not fit.

    Example:
        >>> process = LinearGaussian.random(num_parameters=2, num_observations=2, seed=0)
        >>> process.variables.names
        ('x1', 'x2', 'y1', 'y2')
        >>> process.conditional(["x1"], given={"y2": 0.5}).event_shape
        torch.Size([1])
    """

    def __init__(self, variables: Variables, mean: Tensor, covariance: Tensor) -> None:
        self.variables = variables
        self.mean, self.covariance = mean.double(), covariance.double()
        _check_process(variables, self.mean, self.covariance)

    @classmethod
    def random(
        cls, num_parameters: int = 4, num_observations: int = 4, seed: int = 0, condition_number: float = 30.0
    ) -> LinearGaussian:
        """Parameters x1, x2, … and observations y1, y2, … with a random mean and covariance.

        The covariance has a random orthogonal frame, eigenvalues spread evenly in the logarithm over
        `condition_number`, and then each variable a scale within a factor e of 1.
        """
        generator = torch.Generator().manual_seed(seed)
        variables = _named(num_parameters, num_observations)
        mean, covariance = _random_normal(len(variables), condition_number, generator)
        return cls(variables, mean, covariance)

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-density (...) of the observed cells of rows (..., D); NaN cells are marginalised."""
        return _log_normal(self._columns(values) - self.mean, self.covariance)

    def conditional(
        self, targets: Sequence[str], given: Mapping[str, Tensor | float] | None = None
    ) -> MultivariateNormal:
        """p(targets | given), of event shape (len(targets),) and the batch shape of the givens.

        A NaN in a given is a cell that is not known.
        """
        given = dict(given or {})
        columns, known = self.variables.indices(targets), self.variables.indices(given)
        _check_query(targets, given)
        values = torch.full_like(self.mean, math.nan)
        if given:
            cells = [torch.as_tensor(cell, dtype=torch.float64) for cell in given.values()]
            shape = torch.broadcast_shapes(self.mean.shape[:-1], *(cell.shape for cell in cells))
            values = values.expand(*shape, -1).clone()
            values[..., known] = torch.stack([cell.expand(shape) for cell in cells], -1)
        seen = ~values.isnan()
        shared = self.covariance[..., :, columns]
        gain = _solve(self.covariance, seen, shared)
        residual = torch.where(seen, values.nan_to_num(0.0) - self.mean, 0.0)
        loc = self.mean[..., columns] + (gain * residual.unsqueeze(-1)).sum(-2)
        covariance = shared[..., columns, :] - gain.mT @ shared
        return MultivariateNormal(loc, covariance_matrix=(covariance + covariance.mT) / 2)

    def kl_conditional(
        self,
        targets: Sequence[str],
        given: Mapping[str, Tensor | float] | None,
        other: Distribution,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> Tensor:
        r"""KL(p(targets | given) ‖ other) in nats, of the batch shape of the conditional.

        A closed form for a `MultivariateNormal`; for any other distribution over the same targets the mean of
        :math:`\log p - \log q` over `num_samples` draws from p in antithetic pairs.
        """
        exact = self.conditional(targets, given)
        if isinstance(other, torch.distributions.MultivariateNormal):
            return kl_divergence(exact, other)
        generator = torch.Generator().manual_seed(seed)
        shape = (-(-num_samples // 2), *exact.batch_shape, len(targets))
        half = torch.randn(shape, dtype=torch.float64, generator=generator)
        draws = exact.loc + (exact.scale_tril @ torch.cat([half, -half]).unsqueeze(-1)).squeeze(-1)
        return (exact.log_prob(draws) - other.log_prob(draws)).mean(0)

    def mutual_information(self, a: Sequence[str], b: Sequence[str], given: Sequence[str] = ()) -> Tensor:
        """I(a; b | given) in nats, for three disjoint sets of variables; it does not depend on values."""
        _check_query([*a, *b], given)
        a_and_given, b_and_given = self._log_det([*a, *given]), self._log_det([*b, *given])
        return (a_and_given + b_and_given - self._log_det([*a, *b, *given]) - self._log_det(given)) / 2

    def sample(
        self,
        num_rows: int,
        seed: int,
        missing: float = 0.0,
        mechanism: str = "completely_at_random",
        driver: str | None = None,
    ) -> xr.Dataset:
        r"""Rows of the process, of whose cells a share is missing.

        Missing "completely_at_random", every cell is left out with probability `missing`. Missing
        "at_random", the driver is always observed and any other cell of the row is left out with probability
        :math:`\Phi(b + 2 t)`, with t the driver's standard score and b such that the mean is `missing`.

        Arguments:
            num_rows: Number of rows N.
            seed: Of values and mask; the same seed gives the same values whatever is missing.
            missing: Share of the cells that are left out (at random: of those other than the driver).
            mechanism: "completely_at_random" or "at_random".
            driver: Name of the variable that decides, at random; default the first.
        """
        if self.mean.dim() > 1:
            raise DataError(f"mean has shape {tuple(self.mean.shape)}; expected one process to sample, (D,)")
        generator = torch.Generator().manual_seed(seed)
        values = _rows(self.mean, self.covariance, (num_rows,), generator)
        column = 0 if driver is None else self.variables.index(driver)
        score = (values[:, column] - self.mean[column]) / self.covariance[column, column].sqrt()
        return from_tensor(_leave_out(values, score, column, missing, mechanism, generator), self.variables)

    def _columns(self, values: Tensor) -> Tensor:
        if values.shape[-1:] != (len(self.variables),):
            raise DataError(
                f"values has shape {tuple(values.shape)}; expected (..., {len(self.variables)}), "
                f"one column for each of {', '.join(self.variables.names)}"
            )
        return values.double()

    def _log_det(self, names: Sequence[str]) -> Tensor:
        columns = self.variables.indices(names)
        return torch.linalg.slogdet(self.covariance[..., columns, :][..., columns]).logabsdet


class HierarchicalLinearGaussian:
    r"""Rows of tasks, :math:`v_n = \mu + W z + e_n`, where :math:`z \sim N(0, I_L)` is shared within a task.

    Arguments:
        variables: The D variables, all of support "real".
        mean: :math:`\mu`, shape (D,).
        loading: W, shape (D, L), zero for variables other than observations.
        covariance: :math:`\Sigma`, shape (D, D), positive definite, of a row given the task.

    Rows are tensors (..., K, D) in natural units with NaN for missing cells; K may be 0. Leading dimensions
    are batches of tasks.

    Raises:
        DataError: If a shape, a support, a loading or the covariance does not fit.

    Example:
        >>> process = HierarchicalLinearGaussian.random(seed=0)
        >>> nothing = torch.empty(0, len(process.variables))
        >>> process.task_posterior(nothing).covariance_matrix
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    def __init__(self, variables: Variables, mean: Tensor, loading: Tensor, covariance: Tensor) -> None:
        self.variables = variables
        self.mean, self.loading, self.covariance = mean.double(), loading.double(), covariance.double()
        _check_process(variables, self.mean, self.covariance)
        if self.mean.dim() != 1 or self.loading.dim() != 2 or len(self.loading) != len(variables):
            raise DataError(
                f"mean and loading have shapes {tuple(mean.shape)} and {tuple(loading.shape)}; "
                f"expected ({len(variables)},) and ({len(variables)}, L)"
            )
        for variable, row in zip(variables, self.loading, strict=True):
            if variable.role != "observation" and row.any():
                raise DataError(
                    f"{variable.name} is a {variable.role} with loading {row.tolist()}; expected zeros, "
                    "since settings are no evidence about the task"
                )

    @property
    def latent_dim(self) -> int:
        """L."""
        return self.loading.shape[-1]

    @classmethod
    def random(
        cls,
        num_parameters: int = 2,
        num_observations: int = 4,
        latent_dim: int = 2,
        seed: int = 0,
        task_share: float = 0.5,
        condition_number: float = 30.0,
    ) -> HierarchicalLinearGaussian:
        """Parameters x1, …, observations y1, … as in `LinearGaussian.random`, with a random loading.

        `task_share` is the share that is between tasks of an observation's variance given the parameters.
        """
        if not 0 <= task_share < 1:
            raise DataError(f"task_share is {task_share}; expected at least 0 and below 1")
        generator = torch.Generator().manual_seed(seed)
        variables = _named(num_parameters, num_observations)
        mean, covariance = _random_normal(len(variables), condition_number, generator)
        row = LinearGaussian(variables, mean, covariance)
        zero = dict.fromkeys(variables.with_role("parameter"), 0.0)
        within = row.conditional(variables.with_role("observation"), zero).variance
        direction = torch.randn(num_observations, latent_dim, dtype=torch.float64, generator=generator)
        direction = direction / direction.norm(dim=-1, keepdim=True)
        loading = torch.zeros(len(variables), latent_dim, dtype=torch.float64)
        loading[num_parameters:] = direction * (within * task_share / (1 - task_share)).sqrt().unsqueeze(-1)
        return cls(variables, mean, loading, covariance)

    def row_given_latent(self, latent: Tensor) -> LinearGaussian:
        """The process of one row of the task with latent (..., L)."""
        return LinearGaussian(self.variables, self.mean + latent.double() @ self.loading.mT, self.covariance)

    def row_given_rows(self, rows: Tensor) -> LinearGaussian:
        """The process of one new row of the task of which `rows` (..., K, D) are known, z integrated out."""
        latent = self.task_posterior(rows)
        mean = self.mean + latent.loc @ self.loading.mT
        between = self.loading @ latent.covariance_matrix @ self.loading.mT
        return LinearGaussian(self.variables, mean, self.covariance + between)

    def task_posterior(self, rows: Tensor) -> MultivariateNormal:
        """p(z | rows), event shape (L,), of rows (..., K, D). No rows, or no observed y, give the prior."""
        precision, shift = self._evidence(rows)
        loc = torch.linalg.solve(precision, shift.unsqueeze(-1)).squeeze(-1)
        return MultivariateNormal(loc, precision_matrix=precision)

    def posterior_predictive(
        self,
        targets: Sequence[str],
        given: Mapping[str, Tensor | float] | None = None,
        rows: Tensor | None = None,
    ) -> MultivariateNormal:
        """p(targets | given, rows): cells of a new row given others of it and what is known of the task.

        The batch shape is that of the givens broadcast with the leading dimensions of `rows`.
        """
        rows = torch.empty(0, len(self.variables), dtype=torch.float64) if rows is None else rows
        return self.row_given_rows(rows).conditional(targets, given)

    def log_evidence(self, rows: Tensor) -> Tensor:
        r"""Evidence (...) of rows (..., K, D) of a task, :math:`\log \int p(z) \prod_n p(y_n | x_n, z) dz`.

        `log_evidence(old and new rows) - log_evidence(old rows)` is the joint log-density of the new ones.
        """
        residual = self._residual(rows)
        settings = torch.tensor([v.role != "observation" for v in self.variables])
        of_settings = _log_normal(torch.where(settings, residual, math.nan), self.covariance)
        apart = _log_normal(residual, self.covariance) - of_settings
        precision, shift = self._evidence(rows)
        explained = (shift * torch.linalg.solve(precision, shift.unsqueeze(-1)).squeeze(-1)).sum(-1)
        return apart.sum(-1) + (explained - torch.linalg.slogdet(precision).logabsdet) / 2

    def information_gain(self, measured: Tensor, rows: Tensor | None = None) -> Tensor:
        """Expected information gain (nats) about z, shape (...), of measuring new rows. Values do not matter.

        Arguments:
            measured: Which cells of the new rows would be observed, bool (..., N, D).
            rows: What is known of the task already, (..., K, D).
        """
        if measured.dtype != torch.bool:
            raise DataError(f"measured has type {measured.dtype}; expected torch.bool, True for observed cells")
        prior = torch.eye(self.latent_dim, dtype=torch.float64)
        before = prior if rows is None else self._evidence(rows)[0]
        after = before + self._evidence(torch.where(measured, self.mean, math.nan))[0] - prior
        return (torch.linalg.slogdet(after).logabsdet - torch.linalg.slogdet(before).logabsdet) / 2

    def sample_latent(self, num_tasks: int, seed: int) -> Tensor:
        """Latents (T, L) of the tasks that `sample` draws with the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num_tasks, self.latent_dim, dtype=torch.float64, generator=generator)

    def sample(
        self,
        num_tasks: int,
        rows_per_task: int,
        seed: int,
        missing: float = 0.0,
        mechanism: str = "completely_at_random",
        driver: str | None = None,
    ) -> xr.Dataset:
        """Rows of T tasks, with coordinate `task`; the other arguments are as in `LinearGaussian.sample`.

        `to_tensor(ds, process.variables).reshape(T, K, D)` has the shape that the other methods take.
        """
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(num_tasks, self.latent_dim, dtype=torch.float64, generator=generator)
        mean = (self.mean + latent @ self.loading.mT).unsqueeze(1)
        values = _rows(mean, self.covariance, (num_tasks, rows_per_task), generator).flatten(0, 1)
        column = 0 if driver is None else self.variables.index(driver)
        variance = self.covariance[column, column] + self.loading[column].square().sum()
        score = (values[:, column] - self.mean[column]) / variance.sqrt()
        values = _leave_out(values, score, column, missing, mechanism, generator)
        task = [f"task {t}" for t in range(num_tasks) for _ in range(rows_per_task)]
        return from_tensor(values, self.variables).assign_coords(task=("row", task))

    def _residual(self, rows: Tensor) -> Tensor:
        if rows.dim() < 2 or rows.shape[-1] != len(self.variables):
            raise DataError(f"rows has shape {tuple(rows.shape)}; expected (..., K, {len(self.variables)})")
        return rows.double() - self.mean

    def _evidence(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Precision (..., L, L) of p(z | rows) and precision times mean (..., L)."""
        residual = self._residual(rows)
        weights = _solve(self.covariance, ~residual.isnan(), self.loading)
        precision = (self.loading.mT @ weights).sum(-3) + torch.eye(self.latent_dim, dtype=torch.float64)
        return precision, (weights * residual.nan_to_num(0.0).unsqueeze(-1)).sum((-3, -2))


def _named(num_parameters: int, num_observations: int) -> Variables:
    parameters = [Variable(f"x{i + 1}", "parameter") for i in range(num_parameters)]
    return Variables(parameters + [Variable(f"y{i + 1}", "observation") for i in range(num_observations)])


def _random_normal(dim: int, condition_number: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    frame = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    eigenvalues = torch.logspace(0, -math.log10(condition_number), dim, dtype=torch.float64)
    scale = (2 * torch.rand(dim, dtype=torch.float64, generator=generator) - 1).exp()
    covariance = scale.unsqueeze(-1) * (frame * eigenvalues) @ frame.mT * scale
    return torch.randn(dim, dtype=torch.float64, generator=generator), (covariance + covariance.mT) / 2


def _check_process(variables: Variables, mean: Tensor, covariance: Tensor) -> None:
    for variable in variables:
        if variable.support != "real":
            raise DataError(f"{variable.name} has support {variable.support}; expected real")
    dim = len(variables)
    if mean.shape[-1:] != (dim,) or covariance.shape[-2:] != (dim, dim):
        raise DataError(
            f"mean and covariance have shapes {tuple(mean.shape)} and {tuple(covariance.shape)}; "
            f"expected (..., {dim}) and (..., {dim}, {dim}) for {', '.join(variables.names)}"
        )
    if not torch.allclose(covariance, covariance.mT) or torch.linalg.cholesky_ex(covariance).info.any():
        raise DataError("covariance: found one that is not symmetric and positive definite, expected both")


def _check_query(targets: Sequence[str], given: Sequence[str] | Mapping[str, object]) -> None:
    if not targets or len(set(targets)) < len(targets):
        raise DataError(f"targets is {list(targets)}; expected at least one name, each once")
    both = [name for name in targets if name in given]
    if both:
        raise DataError(f"{both[0]} is a target and also given; ask for it or give it")


def _rows(mean: Tensor, covariance: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(*shape, covariance.shape[-1], dtype=torch.float64, generator=generator)
    return mean + noise @ torch.linalg.cholesky(covariance).mT


def _leave_out(
    values: Tensor, score: Tensor, driver: int, missing: float, mechanism: str, generator: torch.Generator
) -> Tensor:
    """Rows (N, D) with a share of NaN; `score` (N,) is the standard score of the driver's column."""
    if not 0 <= missing < 1:
        raise DataError(f"missing is {missing}; expected a share of at least 0 and below 1")
    if mechanism not in MECHANISMS:
        raise DataError(f"mechanism is {mechanism!r}; expected one of {', '.join(MECHANISMS)}")
    chance = torch.tensor(missing, dtype=torch.float64).expand(values.shape)
    if mechanism == "at_random" and missing > 0:
        # E Phi(b + s t) = Phi(b / sqrt(1 + s^2)) for standard normal t
        intercept = math.sqrt(1 + _STEEPNESS**2) * torch.special.ndtri(chance)
        chance = torch.special.ndtr(intercept + _STEEPNESS * score.unsqueeze(-1))
        chance = chance.index_fill(-1, torch.tensor([driver]), 0.0)
    left_out = torch.rand(values.shape, dtype=torch.float64, generator=generator) < chance
    return values.masked_fill(left_out, math.nan)


def _masked(covariance: Tensor, seen: Tensor) -> Tensor:
    """The covariance of the seen cells; unseen ones become independent with variance one."""
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    return torch.where(both, covariance, torch.eye(seen.shape[-1], dtype=torch.float64))


def _solve(covariance: Tensor, seen: Tensor, columns: Tensor) -> Tensor:
    """Inverse covariance of the seen cells times their rows of `columns` (..., D, M); zero in unseen rows."""
    factor = torch.linalg.cholesky(_masked(covariance, seen))
    return torch.cholesky_solve(torch.where(seen.unsqueeze(-1), columns, 0.0), factor)


def _log_normal(residual: Tensor, covariance: Tensor) -> Tensor:
    """Log-density (...) of the cells of residuals (..., D) that are not NaN."""
    seen = ~residual.isnan()
    factor = torch.linalg.cholesky(_masked(covariance, seen))
    filled = torch.where(seen, residual, 0.0)
    white = torch.linalg.solve_triangular(factor, filled.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -(white.square().sum(-1) + seen.sum(-1) * math.log(2 * math.pi)) / 2 - log_det
