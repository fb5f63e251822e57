r"""What a Pyro model says at given designs: its latents in real coordinates, and its outcome given them.

A model takes designs (B, N, *design_shape) and draws one set of latents and one outcome for each of the B × N leading
entries, broadcasting over them as in ``pyro.contrib.oed``. Here it is read rather than simulated: latents are handed in
as real coordinates (B, N, d), carried to each site's support by the bijection that the site itself calls for, and the
outcome is left as a distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_invman.variables import DataError

Model = Callable[[Tensor], Any]


class Reading(Messenger):
    """Runs a model with latents and outcomes put in place, and keeps what its sites say.

    `coordinates` (B, N, d) or `latents` by name give the latents, which are drawn where both are None. `outcomes` by
    name, broadcastable to (B, N, *shape), are what was observed; an outcome that is not given is drawn, or stands as
    zeros where `draw` is False.
    """

    def __init__(
        self,
        labels: Sequence[str],
        coordinates: Tensor | None = None,
        latents: Mapping[str, Tensor] | None = None,
        outcomes: Mapping[str, Tensor] | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__()
        self._labels, self._real, self._given, self._draw = labels, coordinates, latents, draw
        self._put = dict(outcomes or {})
        self._lead = torch.Size()
        self._used = 0
        self._pieces: list[Tensor] = []
        self._prior: list[Callable[[], Tensor]] = []
        self._known: list[Callable[[], Tensor]] = []
        self._log_likelihood: list[Tensor] = []
        self.latents: dict[str, Tensor] = {}
        self.outcomes: dict[str, Tensor] = {}
        self.laws: dict[str, Any] = {}
        self.known: list[str] = []

    def of(self, model: Model, designs: Tensor) -> Reading:
        """Reads `model` at designs (B, N, *design_shape)."""
        self._lead = designs.shape[:2]
        with self:
            model(designs)
        absent = [label for label in self._labels if label not in self.laws]
        if absent:
            raise DataError(
                f"the model has no site {absent[0]!r} to observe, found {sorted([*self.latents, *self.laws])}"
            )
        if not self.latents:
            raise DataError("the model has no latent site: there is nothing to learn from its outcome")
        return self

    def _pyro_sample(self, message: Any) -> None:
        if site_is_subsample(message):
            return
        if message["name"] in self._labels:
            self._outcome(message)
        elif message["is_observed"]:
            self.known.append(message["name"])
            self._known.append(self._density(message, message["value"]))
        else:
            self._latent(message)

    def _outcome(self, message: Any) -> None:
        name, law = message["name"], message["fn"]
        if message["is_observed"]:
            raise DataError(f"site {name!r} is observed within the model: an outcome to be must be free in it")
        if message["mask"] is not None or not bool(torch.as_tensor(message["scale"] == 1.0).all()):
            raise DataError(
                f"site {name!r} is masked or scaled: it has no density; hand in NaN for what is not measured"
            )
        if law.batch_shape[:2] != self._lead:
            raise DataError(
                f"site {name!r} has batch shape {tuple(law.batch_shape)}: the model must broadcast over the leading "
                f"dimensions {tuple(self._lead)} of its designs"
            )
        self.laws[name] = law
        if name in self._put:
            value = self._put[name].expand(law.shape())
            self._log_likelihood.append(self._total(law.log_prob(value)))
        elif self._draw or self._real is None:
            value = law.sample()
        else:
            value = self._real.new_zeros(()).expand(law.shape())
        self.outcomes[name] = message["value"] = value

    def _latent(self, message: Any) -> None:
        name, law = message["name"], message["fn"]
        if law.support.is_discrete:
            raise DataError(f"latent site {name!r} is discrete, expected continuous ones: sum it out of the likelihood")
        bijection = biject_to(law.support)
        if self._given is not None:
            if name not in self._given:
                raise DataError(f"no value for the latent site {name!r}, found {sorted(self._given)}")
            value = self._given[name].expand(law.shape())
            self._pieces.append(bijection.inv(value).reshape(*self._lead, -1))
        elif self._real is None:
            value = law.sample()
            if value.shape[:2] != self._lead:
                raise DataError(
                    f"latent site {name!r} has shape {tuple(value.shape)}: the model must broadcast over the leading "
                    f"dimensions {tuple(self._lead)} of its designs (draw it inside a plate over them)"
                )
            self._pieces.append(bijection.inv(value).reshape(*self._lead, -1))
        else:
            shape = bijection.inverse_shape(law.shape())[2:]
            real = self._real[..., self._used : self._used + shape.numel()].reshape(*self._lead, *shape)
            self._used += shape.numel()
            value = bijection(real)
            self._prior.append(lambda: self._total(bijection.log_abs_det_jacobian(real, value)))
        self._prior.append(self._density(message, value))
        self.latents[name] = message["value"] = value

    def _density(self, message: Any, value: Tensor) -> Callable[[], Tensor]:
        # worked out when asked for only: it costs as much as a simple likelihood
        law, scale, mask = message["fn"], message["scale"], message["mask"]
        return lambda: self._total(scale_and_mask(law.log_prob(value), scale, mask))

    def _total(self, term: Tensor) -> Tensor:
        """A log-density summed to the leading dimensions."""
        return term.expand(*self._lead, *term.shape[2:]).reshape(*self._lead, -1).sum(-1)

    @property
    def coordinates(self) -> Tensor:
        """Latents drawn or given by name, as real coordinates (B, N, d)."""
        return torch.cat(self._pieces, -1)

    @property
    def log_prior(self) -> Tensor:
        """Prior log-density of the latents (of their coordinates, where these were given), (B, N)."""
        return torch.stack([term() for term in self._prior]).sum(0)

    @property
    def log_known(self) -> Tensor:
        """Log-likelihood of what is observed within the model, the sites `known`, (B, N)."""
        return torch.stack([term() for term in self._known]).sum(0)

    @property
    def log_likelihood(self) -> Tensor:
        """Log-likelihood of the outcomes put in, (B, N)."""
        return torch.stack(self._log_likelihood).sum(0)


def repeated(tensor: Tensor, count: int) -> Tensor:
    """(R, N, ...) repeated for each of `count` designs: (R · count, N, ...)."""
    return tensor.unsqueeze(1).expand(tensor.shape[0], count, *tensor.shape[1:]).reshape(-1, *tensor.shape[1:])


def at_designs(designs: Tensor, particles: int) -> Tensor:
    """Designs (R, C, *design_shape), the same for every particle: (R · C, N, *design_shape)."""
    flat = designs.reshape(-1, 1, *designs.shape[2:])
    return flat.expand(len(flat), particles, *designs.shape[2:])
