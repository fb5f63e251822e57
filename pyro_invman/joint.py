r"""One joint density over a row, and every conditional of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_invman import storage
from pyro_invman.completion import Completion
from pyro_invman.data import from_tensor, to_tensor, validate, variables_of
from pyro_invman.declared import Row, Simulator
from pyro_invman.density.anyorder import AnyOrderFlow
from pyro_invman.density.context import Layout
from pyro_invman.density.links import alike
from pyro_invman.density.queries import QueryMix
from pyro_invman.distributions import ConditionalFlow, stack_given
from pyro_invman.identification import warn_of_unlinked
from pyro_invman.information import MutualInformation, mutual_information
from pyro_invman.learning import Lesson, Run, learn
from pyro_invman.results import history_dataset, rows_tree
from pyro_invman.training import Schedule
from pyro_invman.variables import ROLES, DataError, Standardization, Variable, Variables, unrounded

if TYPE_CHECKING:
    import xarray as xr


class JointFlow(PyroModule):
    r"""One density p(x, y, η) over the variables of a row, learned from incomplete rows.

    Every conditional comes back from `conditional` as a Pyro distribution with exact density. Rows may miss any cells;
    a missing cell is left out, never filled. Placed in a Pyro model as an attribute of a `PyroModule`, called inside
    the model as ``flow(targets, given)``, or registered by ``pyro.module``, it trains by SVI with everything else.

    Arguments:
        variables: what the cells of a row are.
        exchangeable: groups of repeated measurements whose order carries no meaning. A group is a list of members, a
            member a tuple of the names it consists of, in the same order for each.
        seed: of the initial weights.
        architecture: keywords of :class:`pyro_invman.density.anyorder.AnyOrderFlow`.

    Example::

        >>> import torch
        >>> import pyro_invman as pim
        >>> x = torch.linspace(-1, 1, 400)
        >>> y = 2 * x + 0.1 * torch.randn(400)
        >>> ds = pim.from_columns({"x": x, "y": y}, roles={"x": "parameter", "y": "observation"})
        >>> flow = pim.JointFlow.from_dataset(ds)
        >>> flow.conditional(["x"], given={"y": torch.zeros(5)}).batch_shape
        torch.Size([5])

    References:
        Shih, Sadigh & Ermon, *Training and inference on any-order autoregressive models the right way*, NeurIPS 2022.
    """

    def __init__(
        self,
        variables: Variables,
        exchangeable: Sequence[Sequence[Sequence[str]]] | None = None,
        seed: int = 0,
        **architecture: Any,
    ) -> None:
        super().__init__()
        self.variables = variables
        self.architecture = architecture
        self.exchangeable = _checked_groups(variables, exchangeable or ())
        self.standardization = Standardization(variables)
        self.register_buffer("links", torch.zeros(len(variables), len(variables), dtype=torch.long))
        self.seed = seed
        self.simulated: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self.density = self._untrained()
        self.register_buffer("_roles", torch.tensor([ROLES.index(v.role) for v in variables]), persistent=False)

    def _untrained(self) -> AnyOrderFlow:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return AnyOrderFlow(self._layout(), **self.architecture)

    def _layout(self) -> Layout:
        levels = tuple(len(v.levels) for v in self.variables)
        groups = tuple(tuple(tuple(self.variables.indices(m)) for m in group) for group in self.exchangeable)
        return Layout(levels, self.standardization.lower, self.standardization.upper, groups)

    @classmethod
    def from_dataset(
        cls,
        ds: xr.Dataset,
        seed: int = 0,
        exchangeable: Sequence[Sequence[Sequence[str]]] | None = None,
        **architecture: Any,
    ) -> JointFlow:
        """An untrained flow for the variables of `ds`: standardised by its observed cells, with its Gaussian base
        fitted to them, so that it is already the best Gaussian answer.

        Raises:
            DataError: the data cannot be learned from (see :func:`pyro_invman.validate`).
        """
        ds = validate(ds)
        variables = variables_of(ds)
        flow = cls(variables, exchangeable, seed, **architecture)
        values = to_tensor(ds, variables)
        flow._learn_links(values)
        flow._learn_scales(values)
        return flow

    def _learn_links(self, values: Tensor, simulator: Simulator | None = None) -> None:
        self.simulated = None if simulator is None else (tuple(simulator.given), tuple(simulator.targets))
        observed = (~values.isnan()).long()
        self.links.copy_(observed.T @ observed)
        self._take_links()

    def _take_links(self) -> None:
        """Lets the density depend along pairs that rows show together; members of a group may stand for each other."""
        links = self.links
        for g in range(len(self.exchangeable)):
            links = alike(links, self.density.context.columns_of(g))
        linked = links > 0
        if self.simulated is not None:  # what is simulated together is linked as if it had been measured together
            given, targets = (self.variables.indices(names) for names in self.simulated)
            for column in targets:
                linked[column, [*given, *targets]] = linked[[*given, *targets], column] = True
        self.density.link(linked)

    def _learn_scales(self, values: Tensor) -> None:
        values = unrounded(values, self.variables, torch.Generator().manual_seed(self.seed))
        for group in self.exchangeable:  # every member takes every place once, so that all are treated alike
            columns = torch.tensor([self.variables.indices(member) for member in group])
            moved = [values.clone() for _ in group]
            for shift, rows in enumerate(moved):
                rows[:, columns.flatten()] = values[:, columns.roll(shift, 0).flatten()]
            values = torch.cat(moved)
        self.standardization.load_state_dict(Standardization.fit(self.variables, values).state_dict())
        self._take_bounds()
        self.density.fit_base(self.standardization(values))

    def _take_bounds(self) -> None:
        self.density.lower.copy_(self.standardization.lower)
        self.density.upper.copy_(self.standardization.upper)

    # ------------------------------------------------------------------ learning
    def fit(
        self,
        ds: xr.Dataset,
        seed: int = 0,
        max_seconds: float | None = None,
        progress: bool = True,
        *,
        queries: QueryMix | None = None,
        schedule: Schedule | None = None,
        validation: float = 0.1,
        completion: Completion | bool | None = None,
        mechanism: Callable[[Row], Any] | None = None,
        simulator: Simulator | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> xr.Dataset:
        r"""Learns the density from the rows of `ds`; returns the history over ``step``.

        Minimises :math:`-\log p(t \mid g)` averaged over targets and givens drawn among the *observed* cells of each
        row, which is right when cells are missing completely at random. Where a test finds that the mask depends on
        observed values, or something is declared, missing cells are then drawn from the flow and the completed rows
        learned from, in rounds (:mod:`pyro_invman.completion`); the history says what was found and done. A second fit
        starts anew.

        That cells which go missing by their *own* value do so in a certain way can be declared, but not tested: no
        recorded cell speaks of those that were not.

        Arguments:
            seed: of the split, the batches and the queries: the same seed gives the same weights.
            max_seconds: wall time at most.
            progress: a bar on standard error, where that is a terminal.
            queries: shares of the kinds of query.
            schedule: learning rate, steps, patience.
            validation: share of rows held out for early stopping (at least one row).
            completion: how, or whether, missing cells are drawn and learned from. None: where the mask depends on
                observed values, some variables are linked only through others, or something is declared.
            mechanism: a Pyro function of a row (names to tensors (B,) in natural units) with a Bernoulli site for each
                variable that may go unrecorded by its value, named like it, 1 where it is recorded.
            simulator: the known law of some variables given others.
            checkpoint: a file that keeps the state of the run; with `resume` a run that was interrupted goes on from
                it and ends as if undisturbed.

        Returns:
            the history, with attributes ``missing_by`` and ``missing_by_p_values`` of that test, ``completion`` (why
            cells were drawn, or "none"), and of each round ``evidence``, log p(observed cells) of held-out rows in nats
            a row, and ``kept``, 0 where it had fallen and the round was taken back.

        Raises:
            DataError: the rows do not fit the variables, the checkpoint belongs to another run, or what is declared
                does not fit the variables or the rows.
        """
        values = to_tensor(validate(ds), self.variables)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(values), generator=generator)
        held_out = max(1, round(validation * len(values)))
        if len(values) - held_out < 2:
            raise DataError(f"fit: {len(values)} rows; at least 3 are needed to learn from some and hold one out")
        order = _held_out_first(order, held_out, ~values.isnan())
        self._learn_links(values, simulator)
        training_rows, validation_rows = values[order[held_out:]], values[order[:held_out]]
        self.density.load_state_dict(self._untrained().state_dict())  # a fit starts anew
        self._learn_scales(training_rows)
        lesson = Lesson(
            training_rows,
            validation_rows,
            self._roles,
            self._shuffle,
            queries or QueryMix(),
            schedule or Schedule(),
            completion,
            mechanism,
            simulator,
        )
        settings = {
            "asked": [lesson.queries, lesson.schedule, completion],
            "declared": [getattr(mechanism, "__qualname__", None), self.simulated],
            "validation": validation,
            "seed": seed,
            "architecture": self.architecture,
            "schema": self._schema()["variables"],
        }
        digest = hashlib.sha256(json.dumps(settings, default=str).encode())
        digest.update(values.numpy().tobytes())
        run = Run(seed, max_seconds, progress, checkpoint, resume, digest.hexdigest())
        records, phases, attrs = learn(self.density, self.standardization, self.variables, lesson, run)
        return history_dataset(records, attrs, (self.variables, self.links), phases)

    def _shuffle(self, rows: int, generator: torch.Generator) -> Tensor:
        """Columns (rows, D) with the members of each exchangeable group in random order, row by row."""
        order = torch.arange(len(self.variables)).repeat(rows, 1)
        for g in range(len(self.exchangeable)):
            columns = self.density.context.columns_of(g)
            moved = columns[torch.rand(rows, len(columns), generator=generator).argsort(-1)]
            order[:, columns.flatten()] = moved.flatten(1)
        return order

    # ------------------------------------------------------------------ asking
    def forward(self, targets: Sequence[str], given: Mapping[str, Any] | None = None) -> ConditionalFlow:
        """`conditional`, called so that a Pyro model registers the weights.

        Raises:
            RuntimeError: Pyro's parameter store holds another flow under the same name, so that this one would silently
                not be trained. Make both attributes of one `PyroModule`, or clear the store.
        """
        name = f"{self._pyro_get_fullname('density')}$$$out.weight"
        held = dict(pyro.get_param_store().named_parameters()).get(name)
        if held is not None and held is not self.density.out.weight:
            raise RuntimeError(
                f"the parameter store holds another flow's weights as {name!r}: make both flows attributes of one "
                "PyroModule, or call pyro.clear_param_store()"
            )
        return self.conditional(targets, given)

    def conditional(self, targets: Sequence[str], given: Mapping[str, Any] | None = None) -> ConditionalFlow:
        """p(targets | given) as a Pyro distribution; what is in neither is marginalised.

        Of two variables that no row shows together nothing is known. Unless others link them, each ignores the other;
        through others that were measured with both they are dependent, and independent given those. Either way an
        :class:`pyro_invman.UnidentifiedConditional` says so.

        Arguments:
            targets: names, in the order of the last dimension of values.
            given: name to values in natural units (numbers or tensors that broadcast against each other; level names
                or codes for a categorical variable). A NaN is a cell that is not known.

        Returns:
            batch_shape: broadcast of the givens; event_shape: (len(targets),).

        Raises:
            DataError: unknown or repeated names, a target that is also given, values outside their support.
        """
        targets = self._checked(targets, given or ())
        d = self._conditional(targets, given)
        if self.density.links is None:
            return d
        known = (~d.given.isnan()).reshape(-1, len(self.variables)).any(0).nonzero()[:, 0].tolist()
        warn_of_unlinked(self.variables, self.density.links, d.columns, known)
        return d

    def _checked(self, targets: Sequence[str], given: Iterable[str]) -> list[str]:
        targets, given = [targets] if isinstance(targets, str) else list(targets), list(given)
        if not targets:
            raise DataError(f"targets: none named; expected some of {list(self.variables.names)}")
        for position, name in enumerate(targets):
            self.variables.index(name)
            if name in targets[:position]:
                raise DataError(f"targets: {name} is named twice")
            if name in given:
                raise DataError(f"{name} is both a target and given; take it out of one")
        return targets

    def _conditional(self, targets: Sequence[str], given: Mapping[str, Any] | None = None) -> ConditionalFlow:
        weights = self.density.out.weight
        row = stack_given(
            self.variables, dict(given or {}), torch.promote_types(torch.get_default_dtype(), weights.dtype)
        )
        return ConditionalFlow(self.density, self.standardization, self.variables, targets, row.to(weights.device))

    def mutual_information(
        self, a: Sequence[str], b: Sequence[str], given: Sequence[str] = (), *, num_samples: int = 10_000, seed: int = 0
    ) -> MutualInformation:
        r"""I(a; b | given) in nats, as the flow believes it, from `num_samples` of its own draws.

        .. math:: I(a; b \mid g) = E\left[\log p(a \mid b, g) - \log p(a \mid g)\right]

        Zero where nothing links the two, and no estimate of what the process does there.

        Arguments:
            a, b, given: disjoint names of variables; one name may stand for a list of one.

        Raises:
            DataError: no names, unknown or repeated ones, or fewer than 2 draws.
        """
        given = [given] if isinstance(given, str) else list(given)
        given = self._checked(given, ()) if given else []
        b = self._checked(b, given)
        a = self._checked(a, [*b, *given])
        if num_samples < 2:
            raise DataError(f"num_samples: found {num_samples}, expected at least 2: their spread is the error")
        warn_of_unlinked(self.variables, self.density.links, self.variables.indices(a), self.variables.indices(b))
        return mutual_information(self._conditional, a, b, given, num_samples, seed)

    def log_prob(self, ds: xr.Dataset) -> Tensor:
        """Log-density (N,) of the observed cells of each row, jointly, in natural units."""
        values = to_tensor(ds, self.variables)
        d = self._conditional(self.variables.names)
        with torch.no_grad():
            return torch.cat([d.log_prob(rows) for rows in values.split(2048)])

    def impute(self, ds: xr.Dataset, num_samples: int = 100, seed: int = 0) -> xr.Dataset:
        """Rows completed by draws from p(missing | observed), over dims ("draw", "row"); observed cells unchanged."""
        values = to_tensor(ds, self.variables)
        missing = values.isnan()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            filled = values.expand(num_samples, *values.shape).clone()
            patterns, member = missing.unique(dim=0, return_inverse=True)
            for p, pattern in enumerate(patterns):
                names = [v.name for v, hidden in zip(self.variables, pattern, strict=True) if hidden]
                if not names:
                    continue
                rows = (member == p).nonzero()[:, 0]
                d = ConditionalFlow(self.density, self.standardization, self.variables, names, values[rows])
                columns = pattern.nonzero()[:, 0]
                draws = d.sample(torch.Size((num_samples,))).to(filled)
                filled[:, rows.unsqueeze(-1), columns] = draws
        return from_tensor(filled, self.variables, dims=("draw", "row"))

    def to_datatree(self, ds: xr.Dataset, num_draws: int = 200, seed: int = 0) -> xr.DataTree:
        """Of each row of `ds`, draws of its parameters given the rest of it ("posterior") and of its observations given
        the rest of it ("posterior_predictive"), beside the data; dimensions ("chain", "draw", "row")."""
        values = to_tensor(ds, self.variables)
        found = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for role in ("parameter", "observation"):
                names = self.variables.with_role(role)
                rest = {v.name: values[:, c] for c, v in enumerate(self.variables) if v.role != role}
                draws = values.new_empty(num_draws, len(values), 0)
                if names:
                    draws = self._conditional(names, rest).expand(values.shape[:1]).sample(torch.Size((num_draws,)))
                found.append(draws)
        return rows_tree(self.variables, values, *found)

    # ------------------------------------------------------------------ keeping
    def _schema(self) -> dict[str, Any]:
        return {
            "kind": "JointFlow",
            "variables": self.variables.to_list(),
            "exchangeable": [[list(m) for m in group] for group in self.exchangeable],
            "architecture": self.architecture,
            "seed": self.seed,
            "simulated": self.simulated,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes weights (safetensors), schema (JSON) and a checksum of each to `folder`; no pickle."""
        storage.write(folder, self._schema(), self.state_dict())

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> JointFlow:
        """The flow that `save` described.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: the schema describes no flow.
            RuntimeError: the tensors are not its weights.
        """
        variables = Variables(Variable.from_dict(fields) for fields in schema["variables"])
        flow = cls(variables, schema["exchangeable"], schema["seed"], **schema["architecture"])
        if "density.out.weight" not in tensors:
            raise RuntimeError("density.out.weight is missing")
        flow.to(tensors["density.out.weight"].dtype)
        flow.load_state_dict(dict(tensors))
        flow._take_bounds()
        if schema["simulated"] is not None:
            given, targets = schema["simulated"]
            flow.simulated = (tuple(given), tuple(targets))
        flow._take_links()
        return flow


def _held_out_first(order: Tensor, held_out: int, observed: Tensor) -> Tensor:
    """Rows in `order`, those to be held out first, so that the others (N, D) still show every pair that is `observed`.

    Rows that show a pair which none of the others would are learned from, if there are enough without one.
    """

    def together(rows: Tensor) -> Tensor:
        return rows.long().T @ rows.long()

    lost = (together(observed[order[held_out:]]) == 0) & (together(observed) > 0)
    if not bool(lost.any()):
        return order
    shows = observed[order].to(torch.float32)
    needed = ((shows @ lost.to(shows)) * shows).sum(-1) > 0
    return order[needed.to(torch.uint8).argsort(stable=True)]


def _checked_groups(
    variables: Variables, groups: Sequence[Sequence[Sequence[str]]]
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    seen: set[str] = set()
    checked = []
    for group in groups:
        members = tuple(tuple(member) for member in group)
        if len(members) < 2:
            raise DataError(f"exchangeable: group {members} has {len(members)} member; expected at least 2")
        for member in members:
            if len(member) != len(members[0]):
                raise DataError(
                    f"exchangeable: member {member} has {len(member)} variables, {members[0]} has {len(members[0])}"
                )
            for name, twin in zip(member, members[0], strict=True):
                variable, first = variables[variables.index(name)], variables[variables.index(twin)]
                if name in seen:
                    raise DataError(f"exchangeable: {name} is named twice")
                if variable.discrete or (
                    variable.role,
                    variable.support,
                    variable.units,
                    variable.lower,
                    variable.upper,
                ) != (first.role, first.support, first.units, first.lower, first.upper):
                    raise DataError(
                        f"exchangeable: {name} and {twin} differ in role, support or units, or are categorical"
                    )
                seen.add(name)
        checked.append(members)
    return tuple(checked)
