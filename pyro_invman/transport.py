r"""Maps between populations that were never measured together, at every value of a continuous condition."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from pyro_invman import storage
from pyro_invman.density.bijections import Flowed, Linear, TransportMap, standardised
from pyro_invman.density.conditional_law import ConditionalLaw, Parts, Population, optimal_turn, turn_of_pairs
from pyro_invman.density.coupling import Anchor, Coupling, coupled_draws, fit_couples
from pyro_invman.density.velocity import Solver, VelocityField
from pyro_invman.populations import (
    check_finite,
    checked_pairs,
    checked_table,
    warn_if_small,
    warn_if_unfamiliar,
)
from pyro_invman.results import history_dataset
from pyro_invman.training import Schedule
from pyro_invman.variables import DataError

if TYPE_CHECKING:
    import xarray as xr

ENGINES = ("optimal", "base", "batch")
POPULATIONS = ("source", "target")


class ConditionalTransport(ConditionalTransformModule):
    r"""A map :math:`T(\cdot\,; c)` that takes the law :math:`p_0(x \mid c)` to :math:`p_1(x \mid c)`, amortised over c.

    Learned from two tables whose rows are in no correspondence. Many maps do that; which one is a choice, and the
    data cannot tell. Engines:

    ``"optimal"``
        the map of least :math:`E |x - T(x; c)|^2` at each condition, or the one nearest to a few known pairs. Both
        laws are learned first, each as a flow from noise; then points drawn from both *at the same condition* are
        coupled by optimal transport, and a flow is matched to the couples. Its paths are nearly straight.
    ``"base"``
        the two learned laws through their common noise z, :math:`x_0 \to z \to x_1`: the same laws for half the
        work, with no say in which point goes where beyond the Gaussian part, and by curved paths.
    ``"batch"``
        batches of the tables coupled as they come: conditional variable flow matching, OT-CFM, plain flow matching.

    The first two work in coordinates whitened by a Gaussian that follows c, between which the optimal map has a
    closed form,

    .. math:: x \mapsto m_1 + R_1\, Q\, R_0^{-1} (x - m_0),

    with :math:`R_i` roots of the covariances and Q the polar factor of :math:`R_1^\top R_0`: a Gaussian problem is
    answered by it, and flows learn what is not Gaussian.

    Arguments:
        event_dim: the number D of coordinates of either population.
        context_dim: the number K of conditions; 0 for none.
        stochastic: widens the source by Gaussian noise and maps the widened law, so that T becomes a random map with
            an exact density (`given`). For a source law that is thinner than the target's (a curve against an area),
            between which no smooth map exists.
        engine: one of those above.
        noise: standard deviation of the widening, in those of each coordinate of the source.
        scales: what counts as distance one in each coordinate (D,); the standard deviations of the two populations
            pooled, where None.
        coupling: of the engine ``"batch"``.
        groups, group_size: conditions, and points at each, that the engine ``"optimal"`` couples.
        seed: of the initial weights.
        architecture: keywords of :class:`pyro_invman.density.velocity.VelocityField`.

    Example::

        >>> import torch
        >>> import pyro_invman as pim
        >>> c = torch.rand(500, 1)
        >>> transport = pim.ConditionalTransport(event_dim=2, context_dim=1)
        >>> settings = pim.Schedule(steps=20)
        >>> history = transport.fit((torch.randn(500, 2), c), (3 + torch.randn(500, 2), c), schedule=settings,
        ...                         progress=False)
        >>> transport(torch.zeros(4, 2), torch.full((4, 1), 0.5)).shape
        torch.Size([4, 2])

    References:
        Generale, Robertson & Kalidindi, *Conditional variable flow matching*, arXiv:2411.08314, 2024.
        Su et al., *Dual diffusion implicit bridges for image-to-image translation*, ICLR 2023.
        Pooladian et al., *Multisample flow matching*, ICML 2023.
    """

    bijective = True

    def __init__(
        self,
        event_dim: int,
        context_dim: int,
        stochastic: bool = False,
        *,
        engine: str = "optimal",
        noise: float = 0.1,
        scales: Sequence[float] | None = None,
        coupling: Coupling | None = None,
        groups: int = 1024,
        group_size: int = 64,
        seed: int = 0,
        **architecture: Any,
    ) -> None:
        super().__init__()
        if engine not in ENGINES:
            raise DataError(f"engine: {engine!r}, expected one of {ENGINES}")
        if event_dim < 1 or context_dim < 0:
            raise DataError(f"event_dim {event_dim}, context_dim {context_dim}: expected at least 1, at least 0")
        if stochastic and not noise > 0:
            raise DataError(f"noise: {noise}, expected a positive one for a stochastic map")
        if scales is not None and (len(scales) != event_dim or not all(0 < s < math.inf for s in scales)):
            raise DataError(f"scales: {list(scales)}, expected {event_dim} positive lengths, one for each coordinate")
        if coupling is not None and engine != "batch":
            raise DataError(f"coupling: only the engine 'batch' couples batches, not {engine!r}")
        self.dim, self.context_dim, self.stochastic, self.engine = event_dim, context_dim, stochastic, engine
        self.noise, self.scales = noise, None if scales is None else tuple(float(s) for s in scales)
        self.coupling = coupling or Coupling()
        self.groups, self.group_size, self.seed, self.architecture = groups, group_size, seed, architecture
        self.register_buffer("middle", torch.zeros(event_dim))
        self.register_buffer("spread", torch.ones(event_dim))
        self.register_buffer("length", torch.ones(event_dim))
        self.register_buffer("beyond", torch.eye(event_dim))
        self.register_buffer("context_mean", torch.zeros(context_dim))
        self.register_buffer("context_scale", torch.ones(context_dim))
        self.register_buffer("context_low", torch.full((context_dim,), -math.inf))
        self.register_buffer("context_high", torch.full((context_dim,), math.inf))
        self._start_anew()

    middle: Tensor
    spread: Tensor
    length: Tensor
    beyond: Tensor
    context_mean: Tensor
    context_scale: Tensor
    context_low: Tensor
    context_high: Tensor

    def _start_anew(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            laws = 0 if self.engine == "batch" else 2
            fields = 0 if self.engine == "base" else 1
            sizes = (self.dim, self.context_dim)
            self.laws = nn.ModuleList(ConditionalLaw(*sizes, **self.architecture) for _ in range(laws))
            self.fields = nn.ModuleList(VelocityField(*sizes, **self.architecture) for _ in range(fields))
        self.to(self.length)

    # ------------------------------------------------------------------ the map
    def condition(self, c: Tensor, solver: Solver | None = None) -> TransportMap:
        """The bijection at conditions `c` (*batch_shape, K), against which
        x (*sample_shape, *batch_shape, D) broadcasts.

        Where the map is stochastic, this is the bijection of the widened source.

        Raises:
            DataError: `c` has another number of conditions, or is not finite.

        Warns:
            UnfamiliarCondition: a condition lies outside those that both populations were seen at.
        """
        standard = self._standard(c)
        self._warn_if_unfamiliar(c)
        return TransportMap(self._stages(standard, (solver or Solver()).checked()), self.length.dtype)

    def forward(self, x: Tensor, c: Tensor, evaluations: int | None = None) -> Tensor:
        """Pushes `x` (..., D), a draw of :math:`p_0(. | c)`, to :math:`p_1(. | c)`, at `c` (..., K).

        A stochastic map draws its noise from torch's global generator.

        Arguments:
            evaluations: of the networks, at most (see `solver_error`); None for as many as a tolerance of 1e-5 takes.

        Raises:
            DataError: x or c has another dimension than the map, or is not finite; or evaluations are too few.
        """
        check_finite(x, self.dim, "x")
        return self.condition(c, self._within(evaluations))(self._widened(x))

    def given(self, x: Tensor, c: Tensor, solver: Solver | None = None) -> dist.TransformedDistribution:
        r"""The law of T(x; c) for a stochastic map, with exact density: :math:`N(x, noise^2)` pushed through the
        bijection of the widened source.

        Raises:
            DataError: the map is not stochastic.
        """
        if not self.stochastic:
            raise DataError("given: the map is not stochastic, and sends x to one point; ask with stochastic=True")
        check_finite(x, self.dim, "x")
        spread = (self.noise * self.spread).to(x).expand_as(x)
        return dist.TransformedDistribution(dist.Normal(x, spread).to_event(1), [self.condition(c, solver)])

    def law(self, population: str, c: Tensor, solver: Solver | None = None) -> dist.TransformedDistribution:
        """The learned law of the ``"source"`` (widened, where the map is stochastic) or the ``"target"`` at
        conditions `c` (*batch_shape, K): a Pyro distribution with exact density.

        Raises:
            DataError: there is no such population, or the engine learns no laws.
        """
        if population not in POPULATIONS:
            raise DataError(f"law: {population!r}, expected one of {POPULATIONS}")
        if self.engine == "batch":
            raise DataError("law: the engine 'batch' learns no laws, only the map between them")
        self._warn_if_unfamiliar(c)
        learned = self._laws[POPULATIONS.index(population)]
        stages = learned.stages(self._standard(c), (solver or Solver()).checked())
        place = torch.zeros(*c.shape[:-1], self.dim, dtype=c.dtype, device=c.device)
        noise = dist.Normal(place, torch.ones_like(place)).to_event(1)
        return dist.TransformedDistribution(noise, [TransportMap(stages, self.length.dtype)])

    @torch.no_grad()
    def solver_error(self, x: Tensor, c: Tensor, evaluations: int) -> Tensor:
        """How far (...) `evaluations` of the networks end from where the flow leads (to a tolerance of 1e-5), in
        units of `scales`, for points `x` (..., D) of the (widened) source."""
        few, exact = self.condition(c, self._within(evaluations)), self.condition(c)
        return ((few(x) - exact(x)) / self.length.to(x)).norm(dim=-1)

    def _within(self, evaluations: int | None) -> Solver:
        if evaluations is None:
            return Solver()
        return Solver("adams", evaluations // (2 if self.engine == "base" else 1)).checked()

    def _widened(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not self.stochastic:
            return x
        spread = (self.noise * self.spread).to(x)
        return x + spread * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)

    # ------------------------------------------------------------------ what it is made of
    @property
    def _laws(self) -> list[ConditionalLaw]:
        return [law for law in self.laws if isinstance(law, ConditionalLaw)]

    @property
    def _field(self) -> VelocityField:
        (field,) = self.fields
        assert isinstance(field, VelocityField)
        return field

    def _stages(self, c: Tensor, solver: Solver) -> list[Linear | Flowed]:
        if self.engine == "batch":
            place = standardised(self.middle, self.length)
            return [place, Flowed(self._field, c, solver), place.inv]
        if self.engine == "base":
            return self._through_noise(c, solver)
        source, target = (law.root(c) for law in self._laws)
        turn = optimal_turn(source, target, self.length, self.beyond)
        return [source.inv, turn, Flowed(self._field, c, solver), target]

    def _through_noise(self, c: Tensor, solver: Solver) -> list[Linear | Flowed]:
        source, target = (law.root(c) for law in self._laws)
        to_noise = Flowed(self._laws[0].field, c, solver, reverse=True)
        turn = optimal_turn(source, target, self.length, self.beyond)
        return [source.inv, to_noise, turn, Flowed(self._laws[1].field, c, solver), target]

    # ------------------------------------------------------------------ learning
    def fit(
        self,
        source: tuple[Tensor, Tensor],
        target: tuple[Tensor, Tensor],
        pairs: tuple[Tensor, Tensor, Tensor] | None = None,
        seed: int = 0,
        max_seconds: float | None = None,
        progress: bool = True,
        *,
        schedule: Schedule | None = None,
        validation: float = 0.1,
    ) -> xr.Dataset:
        r"""Learns the map from two unpaired tables; returns the history over ``step``, ``part`` by part.

        Known pairs anchor the engine ``"optimal"``: among the maps between the two Gaussians they choose the rotation
        (:func:`pyro_invman.density.conditional_law.turn_of_pairs`), unless they are likelier without; and couples are
        chosen nearest to where the laws' common noise sends points, corrected by a Gaussian process that the pairs
        teach (:class:`pyro_invman.density.coupling.Anchor`). Their rows count among
        both populations too. A second fit starts anew.

        Arguments:
            source, target: points (N, D) and conditions (N, K) of each population.
            pairs: points before (P, D), the same after (P, D), conditions (P, K).
            seed: of splits, batches and draws: the same seed gives the same weights.
            max_seconds: wall time at most, shared out among the parts.
            schedule: of every part; None chooses for each.
            validation: share of rows held out to choose the weights that are kept.

        Returns:
            the history, with attributes ``source_rows``, ``target_rows``, ``pairs``, and ``solver_error_5`` and
            ``solver_error_10``: the root mean square of `solver_error` over 500 rows of the source (the first is
            absent where there are two flows to follow).

        Raises:
            DataError: a population is empty or too small, a value is not finite, dimensions differ from the map's,
                no condition is common to both, or the engine cannot use pairs.

        Warns:
            SmallPopulation: one has more than 20 times fewer rows than the other.
        """
        if not 0 < validation < 1:
            raise DataError(f"validation: {validation}, expected a share between 0 and 1")
        (x0, c0), (x1, c1) = (
            checked_table(table, name, self.dim, self.context_dim, self.length)
            for table, name in ((source, "source"), (target, "target"))
        )
        warn_if_small(len(x0), len(x1))
        if pairs is not None and self.engine != "optimal":
            raise DataError(f"pairs: only the engine 'optimal' can be anchored by them, not {self.engine!r}")
        anchors = None if pairs is None else checked_pairs(pairs, self.dim, self.context_dim, self.length)
        if anchors is not None:
            x0, c0 = torch.cat([x0, anchors[0]]), torch.cat([c0, anchors[2]])
            x1, c1 = torch.cat([x1, anchors[1]]), torch.cat([c1, anchors[2]])
        generator = torch.Generator().manual_seed(seed)
        self._start_anew()
        self.beyond.copy_(torch.eye(self.dim))
        self._learn_scales(x0, c0, x1, c1)
        run = Parts(seed, max_seconds, progress, schedule)
        sides = [Population(x, self._standard(c), validation, generator) for x, c in ((x0, c0), (x1, c1))]
        if self.engine == "batch":
            self._fit_batches(sides, run)
        else:
            share = 0.4 if self.engine == "optimal" else 0.6
            for name, law, side in zip(POPULATIONS, self._laws, sides, strict=True):
                law.fit(name, side, self._widened if name == "source" else _left_alone, run, share)
            if self.engine == "optimal":
                self._fit_couples(sides, anchors, generator, run)
        self.eval()
        order = torch.randperm(len(x0), generator=generator)[:500]
        held_out, at = x0[order], c0[order]
        at = at.clamp(self.context_low, self.context_high)
        attrs: dict[str, Any] = {"source_rows": len(x0), "target_rows": len(x1)}
        attrs["pairs"] = 0 if anchors is None else len(anchors[0])
        for evaluations in (5, 10) if self.engine != "base" else (10,):
            error = self.solver_error(self._widened(held_out, generator), at, evaluations)
            attrs[f"solver_error_{evaluations}"] = error.square().mean().sqrt().item()
        history = history_dataset(run.records, attrs)
        history["part"] = ("step", run.names)
        return history

    def _fit_couples(
        self, sides: Sequence[Population], anchors: tuple[Tensor, ...] | None, generator: torch.Generator, run: Parts
    ) -> None:
        """Couples draws of the learned laws at conditions that both populations were seen at."""
        pool = torch.cat([side.context for side in sides])
        low, high = ((end - self.context_mean) / self.context_scale for end in (self.context_low, self.context_high))
        pool = pool[((pool >= low - 1e-6) & (pool <= high + 1e-6)).all(-1)]
        c = pool[torch.randint(len(pool), (self.groups,), generator=generator)]
        anchor = None
        if anchors is not None:
            anchor = self._anchored(*anchors)
        source, target = self._laws
        couples = coupled_draws(source, target, c, self.group_size, self.length, anchor, generator, self.beyond)
        fit_couples(self._field, couples, run)

    @torch.no_grad()
    def _anchored(self, before: Tensor, after: Tensor, c: Tensor) -> Anchor:
        """Turns the map as the pairs ask for, where that makes them likelier, and learns what they say beyond where the
        laws' common noise then leads."""
        at = self._standard(c)
        source, target = (law.root(at) for law in self._laws)
        turned = optimal_turn(source, target, self.length).go(source.inv.go(before, False, False)[0], False, False)[0]
        asked, found = turn_of_pairs(turned, target.inv.go(after, False, False)[0]), []
        scale = (self.spread / self.length).mean().item()
        for turn in (torch.eye(self.dim).to(asked), asked):
            self.beyond.copy_(turn)
            expected = TransportMap(self._through_noise(at, Solver()), self.length.dtype)(before)
            x0, x1, e = (points / self.length for points in (before, after, expected))
            found.append((Anchor(x0, x1, at, scale, e), turn))
        anchor, turn = max(found, key=lambda each: each[0].evidence)
        self.beyond.copy_(turn)
        return anchor

    def _fit_batches(self, sides: Sequence[Population], run: Parts) -> None:
        """Couples batches of the tables as they are."""
        place = standardised(self.middle, self.length)
        for side in sides:
            side.rows, side.held_out = (place.go(x, False, False)[0] for x in (side.rows, side.held_out))

        def widen(x: Tensor, generator: torch.Generator) -> Tensor:
            return self._widened(x * self.length, generator) / self.length

        self.coupling.fit(self._field, sides[0], sides[1], widen, run)

    # ------------------------------------------------------------------ what comes in
    def _learn_scales(self, x0: Tensor, c0: Tensor, x1: Tensor, c1: Tensor) -> None:
        spreads = []
        for name, x in zip(POPULATIONS, (x0, x1), strict=True):
            spreads.append(x.std(0))
            if bool((spreads[-1] == 0).any()):
                j = int((spreads[-1] == 0).nonzero()[0])
                raise DataError(
                    f"{name}: coordinate {j} is the same in all rows; expected one that varies, leave it out"
                )
        for law, x, spread in zip(self._laws, (x0, x1), spreads, strict=False):
            law.mean.copy_(x.mean(0))
            law.scale.copy_(spread)
        self.middle.copy_((x0.mean(0) + x1.mean(0)) / 2)
        self.spread.copy_(spreads[0])
        pooled = ((spreads[0].square() + spreads[1].square()) / 2).sqrt()
        self.length.copy_(pooled if self.scales is None else self.length.new_tensor(self.scales))
        if self.context_dim == 0:
            return
        both = torch.cat([c0, c1])
        self.context_mean.copy_(both.mean(0))
        self.context_scale.copy_(torch.where(both.std(0) > 0, both.std(0), 1.0))
        low, high = c0.amin(0).maximum(c1.amin(0)), c0.amax(0).minimum(c1.amax(0))
        if bool((low > high).any()):
            k = int((low > high).nonzero()[0])
            raise DataError(
                f"condition {k}: the source was seen at [{c0[:, k].min():g}, {c0[:, k].max():g}] and the target at "
                f"[{c1[:, k].min():g}, {c1[:, k].max():g}]; no value is common to both, so nothing can be compared"
            )
        self.context_low.copy_(low)
        self.context_high.copy_(high)

    def _standard(self, c: Tensor) -> Tensor:
        check_finite(c, self.context_dim, "c")
        return (c.to(self.context_mean) - self.context_mean) / self.context_scale

    def _warn_if_unfamiliar(self, c: Tensor) -> None:
        warn_if_unfamiliar(c.detach().to(self.context_mean), self.context_low, self.context_high, self.context_scale)

    # ------------------------------------------------------------------ keeping
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes weights (safetensors), schema (JSON) and a checksum of each to `folder`; no pickle."""
        settings = {
            "event_dim": self.dim,
            "context_dim": self.context_dim,
            "stochastic": self.stochastic,
            "engine": self.engine,
            "noise": self.noise,
            "scales": self.scales,
            "coupling": self.coupling._asdict() if self.engine == "batch" else None,
            "groups": self.groups,
            "group_size": self.group_size,
            "seed": self.seed,
            **self.architecture,
        }
        schema = {"kind": "ConditionalTransport", "variables": [], "settings": settings}
        storage.write(folder, schema, self.state_dict())

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConditionalTransport:
        """The map that `save` described.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: the schema describes no map.
            RuntimeError: the tensors are not its weights.
        """
        settings = dict(schema["settings"])
        settings["coupling"] = settings["coupling"] and Coupling(**settings["coupling"])
        transport = cls(**settings)
        if "length" not in tensors:
            raise RuntimeError("length is missing")
        transport.to(tensors["length"].dtype)
        transport.load_state_dict(dict(tensors))
        return transport.eval()


def _left_alone(x: Tensor, generator: torch.Generator) -> Tensor:
    return x
