r"""What is known of one task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_invman.data import to_tensor
from pyro_invman.density.links import Links
from pyro_invman.density.remainder import Remainder
from pyro_invman.distributions import stack_given
from pyro_invman.identification import warn_of_unlinked
from pyro_invman.tasks.designs import evidence_to_follow
from pyro_invman.tasks.inverse import TaskInverse
from pyro_invman.tasks.network import ManifoldNetwork
from pyro_invman.tasks.predictive import TaskConditional
from pyro_invman.variables import DataError, Standardization, Variables

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class TaskPosterior:
    """The belief about a task's latent, and every conditional of a row of it.

    Arguments:
        network, standardization, variables: of the manifold.
        rows: what the belief stands on, natural units (K, D), without cells that likely are gross errors.
        conditions: what is known of the task as a whole, by name.
        latent: Pyro distribution over z, event shape (L,).
        particles: latents (S, L) that stand for it in mixtures.
        log_weights: normalised (S,).
        method: how the belief was found.
        k_hat: shape of the tail of the importance weights, NaN where there are none; above 0.7 do not trust them
            (Vehtari et al., *Pareto smoothed importance sampling*, JMLR 2024).
        inflation: what the prior variance was multiplied by; above 1 the task is like none that was learned.
        outliers: probability (K, D) that each cell that was handed is a gross error, NaN where none was; 0 where the
            manifold is without contamination.
    """

    network: ManifoldNetwork
    standardization: Standardization
    variables: Variables
    rows: Tensor
    conditions: Mapping[str, float]
    latent: TorchDistribution
    particles: Tensor
    log_weights: Tensor
    method: str
    k_hat: float = math.nan
    inflation: float = 1.0
    outliers: Tensor | None = None

    @property
    def belongs(self) -> bool:
        """Whether the task looks like those that were learned."""
        return self.inflation == 1.0

    @property
    def num_rows(self) -> int:
        """k"""
        return len(self.rows)

    @property
    def effective_sample_size(self) -> float:
        """Of the particles."""
        return float(1 / self.log_weights.exp().square().sum())

    def conditional(self, targets: Sequence[str], given: Mapping[str, Any] | None = None) -> TaskConditional:
        """p(targets | given, rows of the task) as a Pyro distribution, z integrated out.

        Given the task, variables that no row shows together are independent unless others link them; an
        :class:`pyro_invman.UnidentifiedConditional` says so. What is known of the task as a whole (its constant
        conditions) is given too, unless it is named among the targets or the givens.

        Arguments and errors are those of :meth:`pyro_invman.JointFlow.conditional`.
        """
        targets = [targets] if isinstance(targets, str) else list(targets)
        given = dict(given or {})
        if not targets:
            raise DataError(f"targets: none named; expected some of {list(self.variables.names)}")
        for position, name in enumerate(targets):
            self.variables.index(name)
            if name in targets[:position]:
                raise DataError(f"targets: {name} is named twice")
            if name in given:
                raise DataError(f"{name} is both a target and given; take it out of one")
        known = {name: value for name, value in self.conditions.items() if name not in targets and name not in given}
        dtype = torch.promote_types(torch.get_default_dtype(), self.network.flow.dtype)
        row = stack_given(self.variables, known | given, dtype)
        self._warn(targets, row)
        arguments = (
            self.standardization,
            self.variables,
            self.network.columns,
            targets,
            row,
            self.particles,
            self.log_weights,
        )
        if self._sought(targets, row):
            return TaskInverse(self.network, self._follows(targets[0]), *arguments, remainder=self._remainder)
        return TaskConditional(self.network.flow, *arguments, remainder=self._remainder)

    def _warn(self, targets: Sequence[str], row: Tensor) -> None:
        graph = self.network.flow.links
        if graph is not None:
            columns = (~row.isnan()).reshape(-1, len(self.variables)).any(0).nonzero()[:, 0].tolist()
            of_row = Links(graph.linked[: len(self.variables), : len(self.variables)])
            warn_of_unlinked(self.variables, of_row, self.variables.indices(targets), columns, "the task", 4)

    def _sought(self, targets: Sequence[str], row: Tensor) -> bool:
        """Whether one setting that varies within a task is asked for, given observations, and the base bends, so that
        rows say more of the task than a direct conditional knows."""
        columns = self.variables.indices(targets)
        if self.network.base.functions is None or len(columns) > 1 or self.variables[columns[0]].discrete:
            return False
        apart = columns[0] in self.network.columns or bool(self.network.constant[columns[0]])
        return not apart and bool((~row[..., self.network.columns].isnan()).any())

    def _follows(self, name: str) -> Tensor:
        """Probability () that a setting of this task follows its others as in the tasks that were learned."""
        column = self.variables.index(name)
        with torch.no_grad():
            rows = self.standardization(self.rows).to(self.network.flow.dtype)
            gain = evidence_to_follow(self.network, rows, self._centre, column)
            return (self.network.follow[column].logit() + gain).sigmoid()

    @property
    def _centre(self) -> Tensor:
        return (self.log_weights.exp().unsqueeze(-1) * self.particles).sum(0)

    @cached_property
    def _remainder(self) -> Remainder | None:
        return self.network.base.remainder(*self.network.context.row_cells(self.standardization(self.rows)))

    def log_prob(self, ds: xr.Dataset) -> Tensor:
        """log p(y | x, η, rows of the task) of all rows of `ds` jointly, in nats and natural units, a scalar."""
        natural = to_tensor(ds, self.variables)
        with torch.no_grad():
            rows = self.standardization(torch.cat([self.rows, natural])).to(self.network.flow.dtype)
            anchor = self.network.sequence(rows)
            parts = self.particles.split(max(1, 65_536 // max(1, len(rows))))
            each = torch.cat([self.network.evidence_of(rows, z.unsqueeze(-2), anchor) for z in parts])
            scores = each[:, self.num_rows :].sum(-1)
            jacobian = self.standardization.log_abs_det_jacobian(natural)[:, self.network.columns].nansum()
            return (scores + self.log_weights).logsumexp(0) + jacobian.to(scores)
