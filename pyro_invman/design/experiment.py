r"""A Pyro model asked as an experiment: what it draws at many designs at once, and how it scores what it is told."""

from __future__ import annotations

import copy
import difflib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_invman.design.quasi import QuasiRandom
from pyro_invman.variables import DataError

_PROBES = 64  # draws that are exchanged to see what depends on what
_NUDGES = (1e-3, -1e-3, 0.1, 1.0)  # of a lone design, to see whether the outcome notices


class Site(NamedTuple):
    """What a sample site of the model is to the experiment.

    Arguments:
        role: ``outcome``, ``target``, ``nuisance``, ``past`` (observed already) or ``derived`` (deterministic).
        shape: of its value beyond (S, C).
        support: of its distribution; None where it has none, or a continuous one that no known bijection reaches.
        explicit: whether it can be scored.
        pathwise: whether its draws are differentiable in its distribution's parameters.
        proposable: whether a proposal may stand in for its own law: a latent that is explicit and continuous.
    """

    role: str
    shape: torch.Size
    support: constraints.Constraint | None
    discrete: bool
    explicit: bool
    pathwise: bool

    @property
    def proposable(self) -> bool:
        return self.role in ("target", "nuisance") and self.explicit and not self.discrete and self.support is not None


class Draws(NamedTuple):
    """Joint draws of the model.

    Arguments:
        values: of each sample site, (S, C, *site shape).
        log_prob: of each explicit site given those above it, summed over its own dimensions, (S, C).
        log_weight: log p(past | latents), plus the prior over the guide where a guide proposed them, (S, C).
    """

    values: dict[str, Tensor]
    log_prob: dict[str, Tensor]
    log_weight: Tensor

    def joint(self, names: Sequence[str]) -> Tensor:
        """Sum (S, C) of the log-probabilities of some sites."""
        return sum((self.log_prob[name] for name in names), torch.zeros_like(self.log_weight))


class Experiment:
    r"""A Pyro model at C candidate designs.

    .. math:: p(y, \theta, u \mid d) = p(\theta, u)\, p(y \mid \theta, u, d)

    with outcomes y, targets θ and whatever other latents u (nuisances) the model has. Sites may stand in any order, so
    targets may lie downstream of nuisances. Sites that are observed already (``obs=``, ``pyro.condition``,
    ``pyro.factor``) are past data: they weigh the draws.

    Arguments:
        model: called with designs (S, C, *design_shape); each of its sites has a batch shape that begins with (S, C),
            as under ``pyro.plate_stack("designs", designs.shape[:2])``. With ``vectorized=False`` it is called with
            one design (*design_shape) at a time.
        designs: (C, *design_shape).
        observation_labels: the site or sites that would be observed.
        target_labels: the site or sites to learn about; None for all latents.
        vectorized: whether the model broadcasts.
        guide: proposes latents when there are past data, in place of the prior; draws are weighed by prior over guide.
            A trained autoguide, or a Pyro function of designs (S, C, *design_shape) with sites of those names.

    Raises:
        DataError: a label that is no site, a site in two roles, an outcome or target that is observed already, a model
            whose outcomes ignore the design, sites that do not broadcast, a density that is NaN.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(designs):
        ...     with pyro.plate_stack("designs", designs.shape[:2]):
        ...         slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(slope * designs, 0.5))
        >>> experiment = Experiment(model, torch.linspace(0, 1, 5), "y", "slope")
        >>> experiment.run(100).values["y"].shape
        torch.Size([100, 5])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        designs: Tensor,
        observation_labels: str | Sequence[str],
        target_labels: str | Sequence[str] | None = None,
        *,
        vectorized: bool = True,
        guide: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(designs, Tensor) or designs.dim() < 1 or not len(designs):
            kind = tuple(designs.shape) if isinstance(designs, Tensor) else type(designs).__name__
            raise DataError(f"designs: found {kind}, expected a tensor (C, *design_shape) of at least one candidate")
        if designs.is_floating_point() and not designs.isfinite().all():
            bad = int((~designs.isfinite()).reshape(len(designs), -1).any(-1).nonzero()[0])
            raise DataError(f"designs: candidate {bad} is not finite")
        self.model, self.designs, self.vectorized, self.guide = model, designs, vectorized, guide
        self.outcomes = _names("observation_labels", observation_labels)
        self._sites: dict[str, Site] = {}
        with isolated(seed), torch.no_grad():
            trace = self._traces(2, {}, None)[0]
            found = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
            latent = [n for n, s in found.items() if not s["is_observed"] and n not in self.outcomes]
            self.targets = tuple(latent) if target_labels is None else _names("target_labels", target_labels)
            self._check_labels(found)
            for name, site in found.items():
                self._sites[name] = self._described(name, site)
            if not self.targets:
                raise DataError("target_labels: the model has no latent site to learn about")
            if not self._notices_design():
                raise DataError(
                    f"{', '.join(self.outcomes)}: the model draws the same at every design, so none tells more than "
                    "another; use `designs` in the outcome's distribution"
                )

    # ------------------------------------------------------------------ what the model is
    @property
    def num_candidates(self) -> int:
        """C"""
        return len(self.designs)

    @property
    def sites(self) -> Mapping[str, Site]:
        """What each sample site is."""
        return self._sites

    def named(self, *roles: str) -> tuple[str, ...]:
        """Names of the sites in some roles, in the order of the model."""
        return tuple(name for name, site in self._sites.items() if site.role in roles)

    @property
    def explicit(self) -> bool:
        """Whether all outcomes can be scored."""
        return all(self._sites[name].explicit for name in self.outcomes)

    def at(self, designs: Tensor) -> Experiment:
        """The same experiment at other designs (C', *design_shape)."""
        if designs.shape[1:] != self.designs.shape[1:]:
            raise DataError(f"designs: found {tuple(designs.shape)}, expected (C, *{tuple(self.designs.shape[1:])})")
        other = copy.copy(self)
        other.designs = designs
        return other

    def _check_labels(self, found: Mapping[str, Any]) -> None:
        for label, names in (("observation_labels", self.outcomes), ("target_labels", self.targets)):
            for name in names:
                if name not in found:
                    near = difflib.get_close_matches(name, found, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise DataError(f"{label}: {name!r} is no sample site of the model, which has {list(found)}{hint}")
                if found[name]["is_observed"] and not _deterministic(found[name]):
                    raise DataError(
                        f"{label}: site {name!r} is observed already, so it is past data; leave it unconditioned"
                    )
        both = set(self.outcomes) & set(self.targets)
        if both:
            raise DataError(f"{sorted(both)[0]!r} is among observation_labels and target_labels; it can be only one")

    def _described(self, name: str, site: Mapping[str, Any]) -> Site:
        derived = _deterministic(site)
        role = "outcome" if name in self.outcomes else "target" if name in self.targets else None
        role = role or ("derived" if derived else "past" if site["is_observed"] else "nuisance")
        try:
            support = site["fn"].support
        except (NotImplementedError, AttributeError):
            support = None
        whole = not torch.is_tensor(site["value"]) or not site["value"].is_floating_point()
        discrete = whole if support is None else bool(getattr(support, "is_discrete", whole))
        support = support if discrete else _bijected(support)
        explicit = not derived and not isinstance(_innermost(site["fn"]), dist.Delta)
        if explicit:
            try:
                site["fn"].log_prob(site["value"])
            except (NotImplementedError, AttributeError):
                explicit = False
        shape = torch.Size(site["value"].shape[2 if self.vectorized else 0 :])
        pathwise = bool(getattr(site["fn"], "has_rsample", False)) and not discrete
        return Site(role, shape, support, discrete, explicit, pathwise)

    # ------------------------------------------------------------------ asking it
    def draw(self, num: int, quasi: QuasiRandom | None = None) -> Draws:
        """S = `num` joint draws, latents from the guide where there is one; weigh them by `log_weight`."""
        if self.guide is None:
            return self.run(num, quasi=quasi)
        latents, log_guide = self._proposed(num)
        draws = self.run(num, latents)
        return draws._replace(log_weight=draws.log_weight + draws.joint(tuple(latents)) - log_guide)

    def run(self, num: int, given: Mapping[str, Tensor] | None = None, quasi: QuasiRandom | None = None) -> Draws:
        """S = `num` joint draws, with the sites of `given` held at values (S, C, *site shape); all else is drawn anew
        in the order of the model, from quasi-random numbers where `quasi` is handed over."""
        given = {n: v for n, v in (given or {}).items() if n not in self._sites or self._sites[n].role != "derived"}
        traces = self._traces(num, given, quasi)
        values: dict[str, Tensor] = {}
        log_prob: dict[str, Tensor] = {}
        like = self.designs if self.designs.is_floating_point() else torch.zeros(())
        log_weight = like.new_zeros(num, self.num_candidates)
        for name, site in self._sites.items():
            for trace in traces:
                if name not in trace.nodes:
                    raise DataError(f"site {name!r} was drawn at first and is missing now; its sites must not change")
            values[name] = self._joined([trace.nodes[name]["value"] for trace in traces], name, num)
            if site.role in ("outcome", "target") and values[name].is_floating_point():
                self._refuse_nan(name, "value", values[name])
            if site.explicit:
                log_prob[name] = self._scored([trace.nodes[name] for trace in traces], name, num)
                if site.role == "past":
                    log_weight = log_weight + log_prob[name]
        return Draws(values, log_prob, log_weight)

    def scores(self, draws: Draws, names: Sequence[str]) -> Tensor:
        """Zeros (S, C) whose gradient is the score of those sites that draws cannot be differentiated through; added to
        the log-weights of draws, it makes the gradient of a weighted mean of them right."""
        found = torch.zeros_like(draws.log_weight)
        for name in names:
            if name in draws.log_prob and not self._sites[name].pathwise:
                found = found + draws.log_prob[name] - draws.log_prob[name].detach()
        return found

    def _traces(self, num: int, given: Mapping[str, Tensor], quasi: QuasiRandom | None) -> list[Any]:
        if self.vectorized:
            model = pyro.condition(self.model, data=dict(given)) if given else self.model
            designs = self.designs.expand(num, *self.designs.shape)
            if quasi is None:
                return [poutine.trace(model).get_trace(designs)]
            with poutine.trace() as tracer, quasi.drawing(num, self.num_candidates, self._random_numbers()):
                model(designs)
            return [tracer.trace]
        traces = []
        for s in range(num):
            for c, design in enumerate(self.designs):
                data = {name: value[s, c] for name, value in given.items()}
                traces.append(poutine.trace(pyro.condition(self.model, data=data)).get_trace(design))
        return traces

    def _random_numbers(self) -> dict[str, int]:
        """How many random numbers each latent and outcome takes."""
        drawn = self.named("target", "nuisance", "outcome")
        return {name: self._sites[name].shape.numel() for name in drawn if name not in self.named("derived")}

    def _joined(self, values: list[Tensor], name: str, num: int) -> Tensor:
        if not self.vectorized:
            return torch.stack(values).reshape(num, self.num_candidates, *values[0].shape)
        value = values[0]
        if value.shape[:2] != (num, self.num_candidates) and self._sites[name].role not in ("past", "derived"):
            raise DataError(
                f"site {name!r}: its value has shape {tuple(value.shape)}, expected it to begin with "
                f"{(num, self.num_candidates)}, draws and candidates; put the site under "
                "pyro.plate_stack('designs', designs.shape[:2]), or pass vectorized=False"
            )
        return value

    def _scored(self, sites: list[Any], name: str, num: int) -> Tensor:
        scores = []
        for site in sites:
            if isinstance(site["scale"], Tensor) or site["scale"] != 1.0:
                raise DataError(
                    f"site {name!r}: its log-probability is scaled (a subsampled plate?), which is no density"
                )
            score = site["fn"].log_prob(site["value"])
            if site["mask"] is not None:
                mask = torch.as_tensor(site["mask"], device=score.device)
                score = torch.where(mask, score, torch.zeros_like(score))
            scores.append(score)
        if not self.vectorized:
            score = torch.stack([s.sum() for s in scores]).reshape(num, self.num_candidates)
        else:
            score = scores[0]
            if score.shape[:2] != (num, self.num_candidates):
                raise DataError(
                    f"site {name!r}: its batch shape is {tuple(score.shape)}, expected it to begin with "
                    f"{(num, self.num_candidates)}, draws and candidates; put the site under "
                    "pyro.plate_stack('designs', designs.shape[:2]), or pass vectorized=False"
                )
            score = score.flatten(2).sum(-1) if score.dim() > 2 else score
        self._refuse_nan(name, "log-probability", score)
        return score

    def _refuse_nan(self, name: str, what: str, found: Tensor) -> None:
        bad = found.isnan()
        if bad.any():
            c = int(bad.flatten(2).any(-1).any(0).nonzero()[0]) if bad.dim() > 2 else int(bad.any(0).nonzero()[0])
            raise DataError(f"site {name!r}: its {what} is NaN at design {c}, {self.designs[c].tolist()}")

    def _proposed(self, num: int) -> tuple[dict[str, Tensor], Tensor]:
        """Latents from the guide (S, C, *site shape), and its log-density (S, C)."""
        rows = num * self.num_candidates
        if isinstance(self.guide, AutoGuide):
            if self.guide.prototype_trace is None:
                raise DataError("guide: the autoguide has never been run; train it on the past data first")
            stacks = [s["cond_indep_stack"] for s in self.guide.prototype_trace.nodes.values() if s["type"] == "sample"]
            depth = max((-frame.dim for stack in stacks for frame in stack if frame.vectorized), default=0)
            with poutine.trace() as tracer, pyro.plate("guide_draws", rows, dim=-1 - depth):
                self.guide()
        else:
            assert self.guide is not None
            with poutine.trace() as tracer:
                self.guide(self.designs.expand(num, *self.designs.shape))
        drawn = {n: s for n, s in tracer.trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
        shape = (num, self.num_candidates)
        latents = {}
        for name in self.named("target", "nuisance"):
            if name in drawn:
                value: Tensor = drawn[name]["value"]  # type: ignore[assignment]
                expected = (*shape, *self._sites[name].shape)
                if value.numel() != torch.Size(expected).numel():
                    raise DataError(f"guide: site {name!r} has shape {tuple(value.shape)}, expected {expected}")
                latents[name] = value.reshape(expected)
        if not latents:
            raise DataError(f"guide: none of its sites {list(drawn)} is a latent of the model")
        scores = [s["fn"].log_prob(s["value"]) for s in drawn.values()]  # type: ignore[attr-defined]
        return latents, sum((s.reshape(*shape, -1).sum(-1) for s in scores), torch.zeros(shape))

    # ------------------------------------------------------------------ what depends on what
    def reacts(self, sites: Sequence[str], to: Sequence[str]) -> bool:
        """Whether the log-probability of some sites changes when the values of others change places between draws."""
        sites = [name for name in sites if name not in to and self._sites[name].explicit]
        if not sites or not to:
            return False
        num = _PROBES if self.vectorized else 8
        before = self.run(num)
        kept = {n: before.values[n] for n in self.named("target", "nuisance", "outcome")}
        after = self.run(num, kept | {n: kept[n].roll(1, 0) for n in to})
        return any(not torch.equal(before.log_prob[n], after.log_prob[n]) for n in sites)

    def _notices_design(self) -> bool:
        others = [self.designs.roll(1, 0)]
        if torch.equal(others[0], self.designs):
            if not self.designs.is_floating_point():
                return True  # a lone design that cannot be nudged: nothing to tell by
            others = [self.designs * (1 + nudge) + nudge for nudge in _NUDGES]
        num = _PROBES if self.vectorized else 4
        before = self._seeded(num, {})
        # latents stay as they are, so that only what the outcomes make of the design differs
        kept = {n: before.values[n] for n in self.named("target", "nuisance")}
        before = self._seeded(num, kept)
        for designs in others:
            try:
                redrawn = self.at(designs)._seeded(num, kept)
                rescored = self.at(designs)._seeded(num, kept | {n: before.values[n] for n in self.outcomes})
            except Exception:
                if len(others) == 1:
                    raise
                return True  # a nudge left the model's domain, so it looks at the design
            for name in self.outcomes:
                if not torch.equal(before.values[name], redrawn.values[name]):
                    return True
                if name in before.log_prob and not torch.equal(before.log_prob[name], rescored.log_prob[name]):
                    return True
        return False

    def _seeded(self, num: int, given: Mapping[str, Tensor]) -> Draws:
        with isolated(1):
            return self.run(num, given)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seeds every generator that a model may draw from; puts them, and the names in Pyro's parameter store, back."""
    store = pyro.get_param_store()
    names = set(store.keys())
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        pyro.set_rng_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for name in set(store.keys()) - names:
                del store[name]


def _names(label: str, names: str | Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{label}: found {names!r}, expected the name of a sample site, or a list of names")
    if len(set(names)) < len(names):
        raise DataError(f"{label}: {list(names)} names a site twice")
    return names


def _deterministic(site: Mapping[str, Any]) -> bool:
    return bool((site["infer"] or {}).get("_deterministic"))


def _bijected(support: constraints.Constraint | None) -> constraints.Constraint | None:
    """A support that a bijection from real numbers is known of, which is that of its components for a mixture."""
    while isinstance(support, constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if support is None:
        return None
    try:
        biject_to(support)
    except NotImplementedError:
        return None
    return support


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
