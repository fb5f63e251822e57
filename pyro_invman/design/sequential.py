r"""Sequential design: an experiment that chooses each next design by all outcomes so far."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_invman import storage
from pyro_invman.design.gains import expected_gains, seeded
from pyro_invman.design.particles import assimilate
from pyro_invman.design.readings import Model, Reading, at_designs, repeated
from pyro_invman.variables import DataError

Propose = Callable[[Mapping[str, Tensor]], Tensor]
_DECADES = 2.0
_AT_ONCE = 1 << 20


class Search(NamedTuple):
    """How the next of continuous designs is sought.

    `coarse` candidates are scored by `particles` of the belief; then, `rounds` times, `refined` new ones around the
    `elite` best, at half the distance each time; the best `elite` are scored again by all particles, and the best of
    these is chosen.
    """

    coarse: int = 128
    refined: int = 48
    rounds: int = 3
    elite: int = 6
    particles: int = 500


class Sequential:
    r"""An experiment that chooses each next design so that its outcome is expected to tell most about the latents.

    After outcomes :math:`y_{1:t}` at designs :math:`\xi_{1:t}` the belief :math:`p(\theta \mid y_{1:t})` is carried by
    particles (sequential Monte Carlo: annealed, resampled and moved; see `design.particles`), and the next design is

    .. math:: \xi_{t+1} = \arg\max_\xi\; H[p(y \mid \xi, y_{1:t})] - E_{\theta \mid y_{1:t}} H[p(y \mid \theta, \xi)],

    worked out exactly given the particles where the outcome is one normal number (or a bijection of one) or can be
    enumerated, by a nested contrastive estimate otherwise (see `design.gains`). Many independent experiments of the
    same model, `num_rollouts` of them, can be run at once at a fraction of the cost each.

    Arguments:
        model: Pyro model of designs (R, N, *design_shape) that draws latents and an outcome for each leading entry,
            broadcasting over both. All latents are continuous; what else is observed in it (`pyro.condition`) is
            respected.
        designs: a list of candidates (C, *design_shape), which may be chosen repeatedly; or a distribution over designs
            from which candidates are drawn and whose support, real or an interval, bounds them.
        observation_labels: the site, or sites, of the outcome.
        num_rollouts: R, experiments at once; None for a single one, without the leading dimension.
        num_particles: N, particles of each belief.
        propose: gives designs worth a look, (R, n, *design_shape) for any n, from the latents of the belief by name,
            (R, N, *shape) each; candidates are scattered around them. For continuous designs only.
        sweeps: moves of every particle after each step of annealing.
        search: how continuous designs are sought.
        seed: of everything drawn; the same seed gives the same designs for the same outcomes.

    Raises:
        DataError: a site is absent, discrete, masked or does not broadcast; the outcome does not depend on the design.

    References:
        Foster et al., *Deep adaptive design*, ICML 2021 (the problem).
        Drovandi, McGree & Pettitt, *A sequential Monte Carlo algorithm to incorporate model uncertainty in Bayesian
        sequential design*, JCGS 2014 (greedy designs on particles).

    Examples:
        >>> import pyro, pyro.distributions as dist
        >>> def model(designs):
        ...     with pyro.plate_stack("leading", designs.shape):
        ...         theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(theta * designs, 0.5))
        >>> experiment = Sequential(model, torch.tensor([0.1, 1.0, 3.0]), "y")
        >>> design = experiment.step()  # the first one
        >>> design
        tensor(3.)
        >>> design = experiment.step(torch.tensor(2.4))  # its outcome; the next one
        >>> round(float(experiment.latents["theta"].mean()), 1)
        0.8
    """

    def __init__(
        self,
        model: Model,
        designs: Tensor | Distribution,
        observation_labels: str | Sequence[str] = "y",
        *,
        num_rollouts: int | None = None,
        num_particles: int = 2000,
        propose: Propose | None = None,
        sweeps: int = 3,
        search: Search = Search(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        self.model, self._space, self._propose = model, _checked(designs), propose
        self.labels = [observation_labels] if isinstance(observation_labels, str) else list(observation_labels)
        self.num_rollouts, self.sweeps, self.search = num_rollouts, sweeps, search
        self._rollouts = 1 if num_rollouts is None else num_rollouts
        self._generator = torch.Generator().manual_seed(seed)
        first = self._anywhere = self._draw(1)
        with seeded(self._generator):
            prior = Reading(self.labels).of(model, at_designs(first, num_particles))
        self._outcome_shapes = {label: prior.outcomes[label].shape[2:] for label in self.labels}
        self.positions = prior.coordinates.contiguous()
        self._design_shape = first.shape[2:]
        self._designs = first[:, :0]
        self._outcomes = {label: prior.outcomes[label][:, :0] for label in self.labels}
        self._seen = torch.zeros(self._rollouts, 0, dtype=torch.bool)
        self._gains = self.positions.new_zeros(self._rollouts, 0)
        self._pending: Tensor | None = None
        if prior.known:
            self._learn(lambda rows, positions: self._known_target(first[rows], positions))

    # what was done ------------------------------------------------------------------------------------------------

    @property
    def designs(self) -> Tensor:
        """Designs whose outcomes are in, (R, t, *design_shape)."""
        return self._outside(self._designs)

    @property
    def observations(self) -> dict[str, Tensor]:
        """Outcomes by label, (R, t, *shape); NaN where nothing was measured."""
        seen = {
            label: self._seen.reshape(*self._seen.shape, *[1] * len(s)) for label, s in self._outcome_shapes.items()
        }
        return {label: self._outside(value.where(seen[label], torch.nan)) for label, value in self._outcomes.items()}

    @property
    def gains(self) -> Tensor:
        """Information expected of each of them when it was chosen, in nats, (R, t); NaN where another was used."""
        return self._outside(self._gains)

    @property
    def latents(self) -> dict[str, Tensor]:
        """The belief: equally weighted draws of each latent site, (R, N, *shape)."""
        return {name: self._outside(value) for name, value in self._latents().items()}

    # what is next -------------------------------------------------------------------------------------------------

    def step(self, observation: Tensor | Mapping[str, Tensor] | None = None, *, design: Tensor | None = None) -> Tensor:
        """The next design (R, *design_shape), after the outcome of the last.

        Arguments:
            observation: outcome (R, *shape) of the design that was handed out last, by label where there are several;
                an experiment whose outcome is NaN was not measured. Without one, the design handed out last is handed
                out again, the first at the start.
            design: (R, *design_shape), where another than that one was used.

        Raises:
            DataError: an outcome of another shape, outside its support or partly NaN, or for no design.
        """
        if observation is not None:
            self.record(observation, design)
        elif design is not None:
            raise DataError("a design without its outcome: hand over both, or neither")
        if self._pending is None:
            self._pending, self._expected = self._choose()
        return self._outside(self._pending)

    def record(self, observation: Tensor | Mapping[str, Tensor], design: Tensor | None = None) -> None:
        """Takes in an outcome as `step` does, and chooses nothing."""
        if design is None and self._pending is None:
            raise DataError("an outcome before any design: ask for the first by step(), or hand over `design`")
        used = self._inside(design, self._design_shape, "design") if design is not None else self._pending
        assert used is not None
        given = dict(observation) if isinstance(observation, Mapping) else {self.labels[0]: observation}
        if set(given) != set(self.labels):
            raise DataError(f"outcomes of {sorted(given)}, expected those of {sorted(self.labels)}")
        values = {label: self._inside(given[label], self._outcome_shapes[label], label) for label in self.labels}
        missing = torch.stack([v.isnan().reshape(self._rollouts, -1).any(-1) for v in values.values()])
        whole = torch.stack([v.isnan().reshape(self._rollouts, -1).all(-1) for v in values.values()])
        if not torch.equal(missing.any(0), whole.all(0)):
            row = int((missing.any(0) != whole.all(0)).nonzero()[0])
            raise DataError(f"experiment {row}: part of the outcome is NaN; measured is all of it, or nothing")
        seen = ~missing.any(0)
        with seeded(self._generator):
            reading = Reading(self.labels, self.positions[:, :1]).of(self.model, at_designs(used[:, None], 1))
        for label, value in values.items():
            # what was not measured stands as something possible, so that no gradient or check meets a NaN
            filled = torch.where(_beside(seen, value), value, reading.outcomes[label][:, 0].to(value))
            inside = reading.laws[label].support.check(filled[:, None]).reshape(self._rollouts, -1).all(-1)
            if not bool(inside.all()):
                row = int((~inside).nonzero()[0])
                raise DataError(f"experiment {row}: {label} is {filled[row].tolist()}, outside the support of its site")
            values[label] = filled
        expected = self._expected if design is None else self._gains.new_full((self._rollouts,), torch.nan)
        kept = self._designs, self._outcomes, self._seen, self._gains
        self._designs = torch.cat([self._designs, used[:, None]], 1)
        self._outcomes = {k: torch.cat([v, values[k][:, None].to(v)], 1) for k, v in self._outcomes.items()}
        self._seen = torch.cat([self._seen, seen[:, None]], 1)
        self._gains = torch.cat([self._gains, expected[:, None]], 1)
        try:
            self._learn(self._target)
        except DataError:  # an outcome that cannot be is not kept
            self._designs, self._outcomes, self._seen, self._gains = kept
            raise
        self._pending = None

    # belief -------------------------------------------------------------------------------------------------------

    def _learn(self, target: Callable[[slice, Tensor], tuple[Tensor, Tensor]]) -> None:
        histories, particles, _ = self.positions.shape
        block = max(1, _AT_ONCE // (particles * max(1, self._designs.shape[1])))
        learned = []
        for start in range(0, histories, block):
            rows = slice(start, start + block)
            cloud = assimilate(self.positions[rows], functools.partial(target, rows), self._generator, self.sweeps)
            learned.append(cloud.positions)
        self.positions = torch.cat(learned)

    def _target(self, rows: slice, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density before the last outcome, and its log-likelihood, of positions (r, n, d) in histories `rows`."""
        designs, seen = self._designs[rows], self._seen[rows]
        histories, steps = seen.shape
        particles = positions.shape[1]
        prior = Reading(self.labels, positions, draw=False).of(self.model, at_designs(designs[:, :1], particles))
        past = prior.log_prior + prior.log_known if prior.known else prior.log_prior
        put = {k: v[rows].reshape(-1, 1, *self._outcome_shapes[k]) for k, v in self._outcomes.items()}
        told = Reading(self.labels, repeated(positions, steps), outcomes=put)
        each = told.of(self.model, at_designs(designs, particles)).log_likelihood.reshape(histories, steps, particles)
        each = each.where(seen.unsqueeze(-1), torch.zeros_like(each))
        return past + each[:, :-1].sum(1), each[:, -1]

    def _known_target(self, first: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        reading = Reading(self.labels, positions, draw=False).of(self.model, at_designs(first, positions.shape[1]))
        return reading.log_prior, reading.log_known

    def _latents(self) -> dict[str, Tensor]:
        places = at_designs(self._anywhere, self.positions.shape[1])
        return Reading(self.labels, self.positions, draw=False).of(self.model, places).latents

    # search -------------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[Tensor, Tensor]:
        """The best designs (R, *design_shape) and what is expected of them (R,)."""
        if isinstance(self._space, Tensor):
            candidates = self._draw(len(self._space))
            return _best(candidates, self._score(candidates, self.positions))
        order = torch.randperm(self.positions.shape[1], generator=self._generator)
        few = self.positions[:, order[: self.search.particles]]
        candidates = self._coarse()
        scale = candidates.std(1, keepdim=True)
        gains = self._score(candidates, few)
        for turn in range(self.search.rounds):
            best = _taken(candidates, gains.topk(self.search.elite, -1).indices)
            parent = torch.randint(self.search.elite, (self.search.refined,), generator=self._generator)
            refined = self._scattered(best[:, parent], 0.3 * 0.5**turn * scale, decades=1.0)
            candidates = torch.cat([candidates, refined], 1)
            gains = torch.cat([gains, self._score(refined, few)], 1)
        finalists = _taken(candidates, gains.topk(self.search.elite, -1).indices)
        return _best(finalists, self._score(finalists, self.positions))

    def _coarse(self) -> Tensor:
        """Candidates (R, C, *design_shape): from the distribution over designs, around what is proposed from the belief
        and around past designs."""
        drawn = self._draw(self.search.coarse)
        near = [self._designs] if self._designs.shape[1] else []
        if self._propose is not None:
            near.append(self._propose(self._latents()))
        if not near:
            return drawn
        places = []
        for source in near:
            if source.shape[:1] != (self._rollouts,) or source.shape[2:] != self._design_shape:
                raise DataError(
                    f"proposed designs of shape {tuple(source.shape)}, expected ({self._rollouts}, n, "
                    f"{', '.join(map(str, self._design_shape))})"
                )
            index = torch.randint(source.shape[1], (self.search.coarse // (2 * len(near)),), generator=self._generator)
            places.append(source[:, index])
        around = torch.cat(places, 1)
        spread = around.std(1, keepdim=True) if self._propose is not None else drawn.std(1, keepdim=True)
        return torch.cat([drawn[:, : self.search.coarse - around.shape[1]], self._scattered(around, spread)], 1)

    def _scattered(self, designs: Tensor, scale: Tensor, decades: float = _DECADES) -> Tensor:
        """Designs (R, C, *design_shape) moved at random, by up to `scale` and down to `decades` less, within bounds."""
        length = torch.rand(designs.shape[:2], generator=self._generator, dtype=designs.dtype)
        normal = torch.randn(designs.shape, generator=self._generator, dtype=designs.dtype)
        moved = designs + scale * _beside(10 ** (-decades * length), designs) * normal
        assert isinstance(self._space, Distribution)
        bounds = _bounds(self._space)
        return moved if bounds is None else torch.minimum(torch.maximum(moved, bounds[0]), bounds[1])

    def _score(self, candidates: Tensor, positions: Tensor) -> Tensor:
        gains = expected_gains(self.model, self.labels, positions, candidates, self._generator)
        if not bool(gains.isfinite().all()):
            row, place = (int(i) for i in (~gains.isfinite()).nonzero()[0])
            raise DataError(
                f"experiment {row}: the information expected of design {candidates[row, place].tolist()} is "
                f"{float(gains[row, place])}; check the model's outcome there"
            )
        if gains.shape[1] > 1 and not self._designs.shape[1] and bool((gains == gains[:, :1]).all()):
            raise DataError(f"the outcome {self.labels} tells the same at every design: the model ignores its designs")
        return gains

    def _draw(self, count: int) -> Tensor:
        """Designs (R, count, *design_shape): the first of the list, or draws."""
        if isinstance(self._space, Tensor):
            return self._space[:count].expand(self._rollouts, count, *self._space.shape[1:])
        with seeded(self._generator):
            return self._space.sample((self._rollouts, count))

    # shapes, and the folder ---------------------------------------------------------------------------------------

    def _outside(self, tensor: Tensor) -> Tensor:
        return tensor[0] if self.num_rollouts is None else tensor

    def _inside(self, tensor: Tensor, shape: Sequence[int], name: str) -> Tensor:
        """A tensor that was handed over, with the leading dimension (R, ...)."""
        tensor = torch.as_tensor(tensor)
        expected = tuple(shape) if self.num_rollouts is None else (self._rollouts, *shape)
        if tuple(tensor.shape) != expected:
            raise DataError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        return tensor[None] if self.num_rollouts is None else tensor

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes belief, history, random state and the design that is out to `folder`."""
        tensors = {
            "positions": self.positions,
            "designs": self._designs,
            "seen": self._seen,
            "gains": self._gains,
            "random": self._generator.get_state(),
            **{f"outcome.{label}": value for label, value in self._outcomes.items()},
        }
        if self._pending is not None:
            tensors |= {"pending": self._pending, "expected": self._expected}
        schema = {
            "kind": "Sequential",
            "variables": self.labels,
            "num_rollouts": self.num_rollouts,
            "sweeps": self.sweeps,
            "search": self.search._asdict(),
        }
        storage.write(folder, schema, tensors)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: Model,
        designs: Tensor | Distribution,
        propose: Propose | None = None,
    ) -> Sequential:
        """The experiment that `save` wrote to `folder`, where it was; functions are not on disk, and are handed over.

        Raises:
            FileNotFoundError: there is none.
            DataError: it is damaged, or belongs to another model or other designs.
        """
        schema = storage.read_schema(folder)
        if schema["kind"] != "Sequential":
            raise DataError(f"{folder}: holds a {schema['kind']!r}, expected a 'Sequential'")
        tensors = storage.read_tensors(folder, schema)
        loaded = cls(
            model,
            designs,
            schema["variables"],
            num_rollouts=schema["num_rollouts"],
            num_particles=tensors["positions"].shape[1],
            propose=propose,
            sweeps=schema["sweeps"],
            search=Search(**schema["search"]),
        )
        for name, found, own in [
            ("latents", tensors["positions"], loaded.positions),
            ("designs", tensors["designs"], loaded._designs),
            *((label, tensors[f"outcome.{label}"], loaded._outcomes[label]) for label in loaded.labels),
        ]:
            if found.shape[2:] != own.shape[2:]:
                raise DataError(
                    f"{folder}: its {name} have shape {tuple(found.shape[2:])}, those of the model or designs handed "
                    f"over {tuple(own.shape[2:])}: another experiment"
                )
        loaded.positions, loaded._designs = tensors["positions"], tensors["designs"]
        loaded._seen, loaded._gains = tensors["seen"], tensors["gains"]
        loaded._outcomes = {label: tensors[f"outcome.{label}"] for label in loaded.labels}
        loaded._generator.set_state(tensors["random"])
        if "pending" in tensors:
            loaded._pending, loaded._expected = tensors["pending"], tensors["expected"]
        return loaded


def _checked(designs: Tensor | Distribution) -> Tensor | Distribution:
    if isinstance(designs, Tensor):
        if not designs.dim() or not len(designs) or not bool(designs.isfinite().all()):
            raise DataError(f"candidates of shape {tuple(designs.shape)}: expected (C, *design_shape), finite, C > 0")
        return designs
    if designs.batch_shape:
        raise DataError(f"a distribution over designs with batch shape {tuple(designs.batch_shape)}: use .to_event()")
    _bounds(designs)
    return designs


def _bounds(designs: Distribution) -> tuple[Tensor, Tensor] | None:
    """Bounds of the support of a distribution over designs, None where there are none."""
    support = designs.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real:
        return None
    if isinstance(support, constraints.interval):
        return torch.as_tensor(support.lower_bound), torch.as_tensor(support.upper_bound)
    raise DataError(f"designs with support {support}: expected real numbers or intervals")


def _beside(values: Tensor, tensor: Tensor) -> Tensor:
    """`values` with dimensions of one behind, to meet `tensor`."""
    return values.reshape(*values.shape, *[1] * (tensor.dim() - values.dim()))


def _taken(designs: Tensor, index: Tensor) -> Tensor:
    return designs[torch.arange(len(designs)).unsqueeze(-1), index]


def _best(designs: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    best = gains.argmax(-1, keepdim=True)
    return _taken(designs, best)[:, 0], gains.gather(1, best)[:, 0]
