r"""Many tasks on one manifold: a density of rows given a latent per task, and the task recognised from few rows."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_invman import storage
from pyro_invman.data import labels_of, to_tensor, validate, variables_of
from pyro_invman.density.context import Layout
from pyro_invman.density.queries import QueryMix
from pyro_invman.results import history_dataset, inference_tree, outlier_dataset
from pyro_invman.tables import suggest
from pyro_invman.tasks import generative, inference, keeping
from pyro_invman.tasks.contamination import Contamination
from pyro_invman.tasks.effects import HELD_OUT
from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.evidence import evidence_of
from pyro_invman.tasks.fingerprint import Fingerprint, Likeness, corrected, nearest, similarity
from pyro_invman.tasks.learning import groups_of, schedule_for, train_network
from pyro_invman.tasks.memory import Memory
from pyro_invman.tasks.network import Aims, ManifoldNetwork
from pyro_invman.tasks.posterior import TaskPosterior
from pyro_invman.tasks.prior import GaussianProcessPrior
from pyro_invman.tasks.rows import TaskRows, by_task, conditions_of, first_known
from pyro_invman.tasks.sources import Sources, apart
from pyro_invman.tasks.typicality import p_value
from pyro_invman.training import Schedule
from pyro_invman.variables import ROLES, DataError, Standardization, Variable, Variables, unrounded

if TYPE_CHECKING:
    import xarray as xr

PRIORS = ("normal", "gp")


class ProcessManifold(PyroModule):
    r"""One process met as many tasks, :math:`p(z_t) \prod_n p(\text{row}_{tn} \mid z_t)`, learned from incomplete rows.

    What rows say about a task is p(y | x, η, z): settings were chosen, so they are no evidence, unless a variable
    declares `informative`. Each conditional of a row of a task is a Pyro distribution with the latent integrated out.

    Arguments:
        variables: what the cells of a row are.
        latent_dim: L, dimensions of the latent of a task.
        task_prior: "normal", or "gp" for a sparse Gaussian process over the tasks' constant conditions, which then act
            through the latent alone, on a linear base; without such conditions that is the normal one too.
        seed: of the initial weights.
        flow: keywords of :class:`pyro_invman.density.anyorder.AnyOrderFlow`.
        encoder: keywords of :class:`pyro_invman.tasks.encoder.TaskEncoder`.
        contamination: whether observed cells may be gross errors; those that likely are, by what the others say of them
            (:class:`pyro_invman.tasks.contamination.Contamination`), are then left out, in learning and of new rows.
        reference_source: the source that is learned and predicted; rows of others are heard as instruments
            (:class:`pyro_invman.tasks.sources.Sources`). Where none is named, sources are not told apart.
    """

    def __init__(
        self,
        variables: Variables,
        latent_dim: int = 4,
        task_prior: str = "normal",
        seed: int = 0,
        flow: Mapping[str, Any] | None = None,
        encoder: Mapping[str, Any] | None = None,
        contamination: bool = False,
        reference_source: str | None = None,
    ) -> None:
        super().__init__()
        if task_prior not in PRIORS:
            raise DataError(f"task_prior: found {task_prior!r}, expected one of {PRIORS}")
        if latent_dim < 1:
            raise DataError(f"latent_dim: found {latent_dim}, expected at least 1")
        if not any(_is_evidence(v) for v in variables):
            raise DataError("variables: found no observation, expected at least one: settings say nothing about a task")
        self.variables, self.latent_dim, self.task_prior, self.seed = variables, latent_dim, task_prior, seed
        self.flow_settings = {"width": 96, "components": 12} | dict(flow or {})
        self.encoder_settings = dict(encoder or {})
        self.standardization = Standardization(variables)
        self.task_conditions: tuple[str, ...] = ()
        self.network = self._untrained()
        self.contamination = Contamination(self.network.base.num_observations) if contamination else None
        self.reference_source = reference_source
        self.sources = Sources((), self.network.base.num_observations)
        self.memory = Memory.empty(len(variables), latent_dim)

    def _untrained(self) -> ManifoldNetwork:
        layout = Layout(
            tuple(len(v.levels) for v in self.variables), self.standardization.lower, self.standardization.upper
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return ManifoldNetwork(
                layout,
                torch.tensor([ROLES.index(v.role) for v in self.variables]),
                torch.tensor([_is_evidence(v) for v in self.variables]),
                self.latent_dim,
                self.flow_settings,
                self.encoder_settings,
            )

    @classmethod
    def from_dataset(
        cls, ds: xr.Dataset, latent_dim: int = 4, task_prior: str = "normal", seed: int = 0, **settings: Any
    ) -> ProcessManifold:
        """An untrained manifold for the variables of `ds`, standing on the closed form fitted to its tasks.

        Raises:
            DataError: the data cannot be learned from, or have no task column.
        """
        ds = validate(ds)
        manifold = cls(variables_of(ds), latent_dim, task_prior, seed, **settings)
        values, task, _ = by_task(manifold._of_reference(ds), manifold.variables)
        manifold._learn_scales(values, task)
        manifold._learn_sources(ds)
        return manifold

    def _of_reference(self, ds: xr.Dataset) -> xr.Dataset:
        own = apart(ds, self.reference_source)[0]
        if not own.sizes["row"] and ds.sizes["row"]:
            raise DataError(f"reference_source: found no row of {self.reference_source!r}, expected some")
        return own

    def _learn_sources(self, ds: xr.Dataset) -> None:
        source = apart(ds, self.reference_source)[2]
        self.sources = Sources(sorted(set(source)), self.network.base.num_observations)
        if source:
            values, task, _ = by_task(ds, self.variables)
            rows = self.standardization(values).to(self.network.flow.dtype)
            own = torch.tensor([name == self.reference_source for name in labels_of(ds, "source") or []])
            self.sources.fit(self.network, rows[~own], task[~own], source, rows[own], task[own])

    def _learn_scales(self, values: Tensor, task: Tensor, group: Tensor | None = None) -> None:
        values = unrounded(values, self.variables, torch.Generator().manual_seed(self.seed))
        if self.contamination is None:
            self._stand_on(values, task, group)
            return
        working = Standardization.fit(self.variables, values)(values)
        wrong, level = self.contamination.fit(self.network, working, task, self.seed)
        for _ in range(2):
            self._stand_on(values.masked_fill(wrong > level, math.nan), task, group)
            self.contamination.learn(self.network, self.standardization(values), wrong)
            if self.network.base.functions is None:
                break
            wrong = self._errors(values, task)  # by functions that bend, where lines have told so far

    def _stand_on(self, values: Tensor, task: Tensor, group: Tensor | None) -> None:
        self.standardization.load_state_dict(Standardization.fit(self.variables, values).state_dict())
        self._take_bounds()
        working = self.standardization(values)
        # with a Gaussian process over conditions these act through the latent, not through functions of the settings
        self.network.fit_base(working, task, self.task_prior == "normal", self.seed, group)
        self.task_conditions = tuple(
            v.name
            for v, constant in zip(self.variables, self.network.constant.tolist(), strict=True)
            if constant and v.role == "condition"
        )
        if self.task_prior == "gp" and self.task_conditions:
            conditions = self._conditions(working, task).to(self.network.flow.dtype)
            self.network.prior = GaussianProcessPrior.induced_by(conditions, self.latent_dim, self.seed)

    def _take_bounds(self) -> None:
        flow = self.network.flow
        flow.lower[: len(self.variables)] = self.standardization.lower.to(flow.lower)
        flow.upper[: len(self.variables)] = self.standardization.upper.to(flow.upper)

    def _conditions(self, working: Tensor, task: Tensor) -> Tensor:
        """What the prior sees of each task (T, C)."""
        return conditions_of(working[:, self.variables.indices(self.task_conditions)], task)

    def _errors(self, values: Tensor, task: Tensor) -> Tensor:
        """Probability (N, D) that cells of natural rows (N, D) are gross errors; 0 without contamination."""
        if self.contamination is None:
            return torch.zeros_like(values)
        working = self.standardization(values).to(self.network.flow.dtype)
        with torch.no_grad():
            before = self.network.before(self._conditions(working, task))
        return self.contamination.probabilities(self.network, working, task, before)

    def _heard(self, values: Tensor, task: Tensor, level: Tensor | float = 0.5) -> Tensor:
        """Natural rows (N, D) without the cells whose probability of being gross errors is above `level`."""
        return values.masked_fill(self._errors(values, task) > level, math.nan)

    # ------------------------------------------------------------------ learning
    def fit(
        self,
        ds: xr.Dataset,
        seed: int = 0,
        max_seconds: float | None = None,
        progress: bool = True,
        *,
        queries: QueryMix | None = None,
        aims: Aims | None = None,
        schedule: Schedule | None = None,
        validation: float = 0.1,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> xr.Dataset:
        """Learns manifold and beliefs from the tasks of `ds`; returns the history over ``step``.

        Arguments:
            seed: of the split, the batches and the draws.
            max_seconds: wall time of the training at most; the closed form is fitted before it.
            queries: shares of the kinds of query, for conditionals of a row given its latent.
            aims: weights of what is trained for.
            schedule: learning rate, steps, patience; a batch counts tasks.
            validation: share of tasks held out for early stopping (at least one).
            checkpoint, resume: as in :meth:`pyro_invman.JointFlow.fit`.

        Raises:
            DataError: no task column, fewer than 3 tasks, or rows that do not fit the variables.
        """
        values, task, names = by_task(self._of_reference(validate(ds)), self.variables)
        if len(names) < 3:
            raise DataError(f"task: found {len(names)} tasks, expected at least 3: some to learn from, one to hold out")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(names), generator=generator)
        held_out = max(1, round(validation * len(names)))
        group = groups_of(order, held_out)
        self.network = self._untrained()  # a fit starts anew
        self._learn_scales(values, task, group)
        self._learn_sources(ds)
        level = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed), dtype=values.dtype)
        values = self._heard(values, task, level)
        data = self._task_rows(values, task, seed)
        plan = schedule or schedule_for(len(names) - held_out, int((group[task] > HELD_OUT).sum()))
        settings = [seed, validation, plan, queries, aims, keeping.built_with(self), names, task.tolist()]
        history = train_network(
            self.network,
            data,
            order[held_out:],
            order[:held_out],
            queries or QueryMix(),
            aims or Aims(),
            plan,
            seed,
            group,
            max_seconds=max_seconds,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
            fingerprint=hashlib.sha256(repr(settings).encode() + values.numpy().tobytes()).hexdigest(),
        )
        self.memory = Memory.of(self.network, data, names, order[:held_out], seed)
        attrs = {"tasks": len(names) - held_out, "held_out_tasks": held_out, "rows": len(values)}
        return history_dataset(history, attrs, (self.variables, self.links))

    def _task_rows(self, values: Tensor, task: Tensor, seed: int) -> TaskRows:
        generator = torch.Generator().manual_seed(seed)
        dtype = self.network.flow.dtype
        working = self.standardization(unrounded(values, self.variables, generator)).to(dtype)
        renew = None
        if any(v.resolution > 0 for v in self.variables):

            def renew(index: Tensor, generator: torch.Generator) -> Tensor:
                return self.standardization(unrounded(values[index], self.variables, generator)).to(dtype)

        return TaskRows(working, task, self._conditions(working, task), renew)

    def extend(
        self,
        ds: xr.Dataset,
        seed: int = 0,
        max_seconds: float | None = None,
        progress: bool = True,
        *,
        schedule: Schedule | None = None,
    ) -> xr.Dataset:
        """Learns further tasks without forgetting the old ones, whose rows are kept and rehearsed; the history.

        Scales and linear base stay as they are.

        Raises:
            DataError: the manifold was not fitted, a task of that name is known, or the rows do not fit.
        """
        known = self.memory.names
        if not known:
            raise DataError("extend: the manifold knows no task yet; fit it first")
        values, task, names = by_task(self._of_reference(validate(ds, training=False)), self.variables)
        for name in names:
            if name in known:
                raise DataError(f"extend: a task {name!r} is known already; give the new one another name")
        rows = torch.cat(
            [self.memory.rows, self.standardization(self._heard(values, task)).to(self.network.flow.dtype)]
        )
        self.network.learn_links(rows)
        of_task = torch.cat([self.memory.task, task + len(known)])
        data = TaskRows(rows, of_task, self._conditions(rows, of_task))
        learned, held_out = self.memory.split_with(len(names), torch.Generator().manual_seed(seed))
        plan = schedule or schedule_for(len(learned), len(rows))._replace(
            learning_rate=5e-4, steps=400 + 10 * len(names), evaluate_every=25, patience=8
        )
        history = train_network(
            self.network,
            data,
            learned,
            held_out,
            QueryMix(),
            Aims(),
            plan,
            seed,
            max_seconds=max_seconds,
            progress=progress,
        )
        self.memory = Memory.of(self.network, data, [*known, *names], held_out, seed)
        attrs = {"tasks": len(known) + len(names), "new_tasks": len(names), "rows": len(rows)}
        return history_dataset(history, attrs, (self.variables, self.links))

    @property
    def links(self) -> Tensor:
        """Rows of learned tasks that show each pair of variables together, (D, D)."""
        return self.network.links

    # ------------------------------------------------------------------ asking
    def infer_task(
        self,
        rows: xr.Dataset | None = None,
        method: str = "amortized",
        conditions: Mapping[str, Any] | None = None,
        *,
        num_particles: int | None = None,
        seed: int = 0,
    ) -> TaskPosterior:
        """What is known of a task after some rows, however partial; none, or zero rows, give the prior.

        Arguments:
            rows: of one task; a task column is not needed.
            method: "amortized" (milliseconds), or sharpened by "importance" weights, "svi" or "nuts".
            conditions: what is known of the task as a whole, by name; rows without them need not repeat it.
            num_particles: latents that stand for the belief; chosen by its width where None.

        Raises:
            DataError: unknown method, rows of several tasks, cells outside their support.
        """
        if method not in inference.METHODS:
            raise DataError(f"method: found {method!r}, expected one of {inference.METHODS}")
        known = evidence_of(self, rows, conditions)
        found = inference.infer(self.network, known.working, known.before, method, num_particles, seed)
        return TaskPosterior(
            self.network,
            self.standardization,
            self.variables,
            known.rows,
            first_known(torch.cat([known.stated.unsqueeze(0), known.rows]), self.task_conditions, self.variables),
            found.latent,
            found.particles,
            found.log_weights,
            method,
            found.k_hat,
            known.inflation,
            known.errors,
        )

    def _before(self, working: Tensor) -> Belief:
        """The prior belief () about the task of working rows (K, D)."""
        conditions = self._conditions(working, torch.zeros(len(working), dtype=torch.long))
        return self.network.before(conditions[0])

    @torch.no_grad()
    def to_datatree(self, ds: xr.Dataset, num_draws: int = 200, seed: int = 0) -> xr.DataTree:
        """Beliefs about the tasks of `ds`, what they predict of their rows, and the data, plates as dimensions."""
        rows, names = self.padded(ds)
        working = self.standardization(rows).to(self.network.flow.dtype)
        heard = self._heard(rows.flatten(0, 1), torch.arange(len(rows)).repeat_interleave(rows.shape[1]))
        heard = self.standardization(heard.unflatten(0, rows.shape[:2])).to(working)
        belief = self.network.infer(heard, self._beliefs_before(rows))
        generator = torch.Generator().manual_seed(seed)
        latent = belief.sample(num_draws, generator)
        columns = self.network.columns
        dreamt = self.network.dream(working, latent.unsqueeze(-2), generator)
        predicted = self.standardization.inverse(dreamt.double())[..., columns]
        return inference_tree(self.variables, names, latent, rows, predicted, columns, {"rows_are": "all of each task"})

    def outliers(self, ds: xr.Dataset) -> xr.Dataset:
        """Probability that observed cells of evidence are gross errors, by the others of their task in `ds`."""
        values, task, _ = by_task(ds, self.variables)
        return outlier_dataset(self.variables, self.network.columns, values, self._errors(values, task))

    # ------------------------------------------------------------------ likeness
    def fingerprint(self, rows: xr.Dataset | TaskPosterior | str) -> Fingerprint:
        """What is known of a task's latent, as a normal: of rows, of an inferred task, or of a known task by name."""
        if isinstance(rows, str):
            names = self.memory.names
            if rows not in names:
                raise DataError(f"task: {rows!r} is not known; {suggest(rows, list(names))}")
            t = names.index(rows)
            return Fingerprint.of(self.memory.loc[t], self.memory.covariance[t])
        task = rows if isinstance(rows, TaskPosterior) else self.infer_task(rows)
        return Fingerprint.of_particles(task.particles, task.log_weights)

    def similarity(self, a: xr.Dataset | TaskPosterior | str, b: xr.Dataset | TaskPosterior | str) -> float:
        """Likeness of two tasks in [0, 1]; see :func:`pyro_invman.tasks.fingerprint.similarity`."""
        return similarity(self.fingerprint(a), self.fingerprint(b))

    def nearest(self, rows: xr.Dataset | TaskPosterior | str, n: int = 5) -> list[Likeness]:
        """The `n` known tasks most alike, the most alike first."""
        known = {name: self.fingerprint(name) for name in self.memory.names if name != rows}
        return nearest(self.fingerprint(rows), known, n)

    def typicality(self, rows: xr.Dataset | TaskPosterior, *, simulations: int = 199, seed: int = 0) -> float:
        """p-value that a task belongs to what was learned.

        Simulated from the manifold given the settings of the rows and which of their cells are missing, and corrected
        by the p-values of held-out tasks; about uniform for tasks of the manifold, small for others. Without an
        observation it is 1.
        """
        if isinstance(rows, TaskPosterior):
            natural = rows.rows
        else:
            natural = to_tensor(apart(rows, self.reference_source)[0], self.variables)
            natural = self._heard(natural, torch.zeros(len(natural), dtype=torch.long))
        working = self.standardization(natural).to(self.network.flow.dtype)
        if not bool((~working[:, self.network.columns].isnan()).any()):
            return 1.0
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            found = p_value(self.network, working, self._before(working), generator, simulations)
        return corrected(found, self.memory.p_values.tolist())

    # ------------------------------------------------------------------ keeping
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes weights, remembered rows (safetensors), schema (JSON) and a checksums to `folder`; no pickle."""
        storage.write(folder, *keeping.state_of(self))

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ProcessManifold:
        """The manifold that `save` described; errors as in :meth:`pyro_invman.JointFlow.from_schema`."""
        built_with = {name: schema[name] for name in keeping.BUILT_WITH}
        variables = Variables(Variable.from_dict(fields) for fields in built_with.pop("variables"))
        manifold = cls(variables, **built_with)
        keeping.restore(manifold, schema, tensors)
        manifold._take_bounds()
        return manifold

    # ------------------------------------------------------------------ as Pyro functions
    def model(self, rows: Tensor, tasks: int | None = None, rows_a_task: int | None = None) -> Tensor:
        """The generative model of tasks' rows (T, N, D) in natural units; NaN: a missing cell, or a task that is short.

        Plates `task` (dim −2) and `row` (dim −1), of which `tasks` and `rows_a_task` are taken where given. Observed
        observations are scored given the settings of their row, rows apart given z. Returns the latents (T, 1, L).
        """
        before = self._beliefs_before(rows)
        return generative.model(self.network, self.standardization, self.variables, before, rows, tasks, rows_a_task)

    def guide(self, rows: Tensor, tasks: int | None = None, rows_a_task: int | None = None) -> Tensor:
        """The amortised belief about the latents of tasks, which reads all their rows (T, N, D)."""
        before = self._beliefs_before(rows)
        return generative.guide(self.network, self.standardization, before, rows, tasks)

    def _beliefs_before(self, rows: Tensor) -> Belief:
        working = self.standardization(rows).to(self.network.flow.dtype)
        task = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
        return self.network.before(self._conditions(working.flatten(0, 1), task))

    def padded(self, ds: xr.Dataset) -> tuple[Tensor, list[str]]:
        """Rows (T, N, D) by task in natural units, NaN where a task has fewer than N, and the tasks' names."""
        values, task, names = by_task(self._of_reference(ds), self.variables)
        return TaskRows(values, task, values.new_empty(len(names), 0)).all(), names


def _is_evidence(variable: Any) -> bool:
    return variable.role == "observation" or variable.informative
