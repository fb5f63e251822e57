r"""Rows of other sources than the one that is asked about: instruments that see the same process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_invman.data import labels_of
from pyro_invman.density.normal_rows import NormalRows
from pyro_invman.tasks.contamination import cells_of, normal_rows
from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.network import ManifoldNetwork

if TYPE_CHECKING:
    import xarray as xr

_BIAS, _LOG_GAIN, _LOG_NOISE = (0.0, 1.0), (0.0, 0.5), (math.log(0.5), 1.0)  # mean and scale over sources
_LOG_DRIFT = (math.log(0.1), 1.0)
_STEPS = 60


class Sources(nn.Module):
    r"""Sources beside the reference, each of which shows observation v in working coordinates as

    .. math:: \hat v = b_t + g v + \tau \varepsilon, \qquad \varepsilon \sim N(0, 1), \qquad b_t \sim N(b, \omega^2),

    with a bias, its drift from task to task, a gain and a noise for each observation, normal over sources: b ~ N(0, 1),
    log ω ~ N(log 0.1, 1), log g ~ N(0, 0.5²) and log τ ~ N(log 0.5, 1). They are the most probable ones, latents and
    tasks' biases integrated out, and b is as uncertain as the curvature there says. What a source is off by in a task
    stays, however many rows it shows. Under the closed form rows of a source are linear measurements of latent and
    biases together; what they say of the latent alone is left when the biases are integrated out:

    .. math:: \Lambda = \Lambda_{zz} - \Lambda_{zb} \Lambda_{bb}^{-1} \Lambda_{bz}, \qquad
              h = h_z - \Lambda_{zb} \Lambda_{bb}^{-1} h_b.

    A source met in learning has a bias that is known but for its drift. One that was not has the prior's, so that its
    first rows say little about levels and much about differences. Discrepancy that changes within a task counts as
    noise.

    Arguments:
        names: of the J sources.
        num_observations: M.

    References:
        Kennedy & O'Hagan, *Predicting the output from a complex computer code when fast approximations are available*,
        Biometrika 2000.
    """

    bias: Tensor
    bias_scale: Tensor
    log_gain: Tensor
    log_noise: Tensor

    def __init__(self, names: Sequence[str], num_observations: int) -> None:
        super().__init__()
        self.names = tuple(names)
        shape = (len(self.names), num_observations)
        start = {"bias": _BIAS[0], "bias_scale": _BIAS[1], "log_gain": _LOG_GAIN[0], "log_noise": _LOG_NOISE[0]}
        for name, value in start.items():
            self.register_buffer(name, torch.full(shape, value, dtype=torch.float64))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the module, but stays in double precision."""
        super()._apply(fn, recurse)
        for name in ("bias", "bias_scale", "log_gain", "log_noise"):
            setattr(self, name, getattr(self, name).double())
        return self

    def fit(
        self, network: ManifoldNetwork, rows: Tensor, task: Tensor, source: Sequence[str], own: Tensor, own_task: Tensor
    ) -> None:
        """Learns from working rows (N, D) of tasks (N,), each of a `source`, and the reference's `own` (N', D)."""
        tasks = 1 + max(int(task.max()), int(own_task.max()))
        before = self._after(network, own, own_task, _prior(network, tasks))
        for j, name in enumerate(self.names):
            of = torch.tensor([s == name for s in source])
            seen, law, answers = _read(network, rows[of])
            self.bias[j], self.bias_scale[j], self.log_gain[j], self.log_noise[j] = _fitted(
                law, answers, seen, task[of], before
            )

    def _after(
        self, network: ManifoldNetwork, rows: Tensor, task: Tensor, before: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        seen, law, answers = _read(network, rows)
        return law.weighed(torch.where(seen, answers - law.mean, 0.0), seen, task, before)[2:]

    def inform(
        self, network: ManifoldNetwork, rows: Tensor, source: Sequence[str], before: Belief, own: Tensor
    ) -> Belief:
        """The belief () about a task after its working rows (K, D) by other sources; `own` (K', D) are the reference's,
        which tell bias from latent where a source is new."""
        start = before.precision.double().unsqueeze(0), before.shift.double().unsqueeze(0)
        precision, shift = start
        for name in dict.fromkeys(source):
            told = self.heard(network, rows[[n for n, s in enumerate(source) if s == name]], name, before, own)
            precision, shift = precision + told.of_latent()[0], shift + told.of_latent()[1]
        return Belief(precision[0].to(before.precision), shift[0].to(before.shift))

    def heard(self, network: ManifoldNetwork, rows: Tensor, name: str, before: Belief, own: Tensor) -> Heard:
        """What working rows (K, D) by the source `name` say; the other arguments are as in `inform`."""
        seen, law, answers = _read(network, rows)
        if name in self.names:
            j = self.names.index(name)
            found = self.bias[j], self.bias_scale[j], self.log_gain[j], self.log_noise[j]
        else:
            start = before.precision.double().unsqueeze(0), before.shift.double().unsqueeze(0)
            after = self._after(network, own, torch.zeros(len(own), dtype=torch.long), start)
            task = torch.zeros(len(rows), dtype=torch.long)
            _, _, log_gain, log_noise = _fitted(law, answers, seen, task, after)
            prior = torch.full_like(log_gain, _BIAS[0]), torch.full_like(log_gain, _BIAS[1])
            found = *prior, log_gain, log_noise
        return _heard(law, answers, seen, found)


def apart(ds: xr.Dataset, reference: str | None) -> tuple[xr.Dataset, xr.Dataset, list[str]]:
    """Rows of the reference, rows of other sources, and whose each of these is; all are the reference's where none is
    named or there is no source column."""
    names = labels_of(ds, "source") if reference is not None else None
    if names is None:
        return ds, ds.isel(row=slice(0, 0)), []
    own = [n for n, name in enumerate(names) if name == reference]
    others = [n for n, name in enumerate(names) if name != reference]
    return ds.isel(row=own), ds.isel(row=others), [names[n] for n in others]


Instrument = tuple[Tensor, Tensor, Tensor, Tensor]  # bias, its scale in one task, log gain and log noise (M,)


def _prior(network: ManifoldNetwork, tasks: int) -> tuple[Tensor, Tensor]:
    eye = torch.eye(network.latent_dim, dtype=torch.float64)
    return eye.repeat(tasks, 1, 1), torch.zeros(tasks, len(eye), dtype=torch.float64)


@torch.no_grad()
def _read(network: ManifoldNetwork, rows: Tensor) -> tuple[Tensor, NormalRows, Tensor]:
    """Which observations of working rows (N, D) are seen, their law, and their cells, (N, M) each."""
    base, context = network.base, network.context
    cells = cells_of(network, rows)
    known, filled = ~cells.isnan(), cells.nan_to_num(0.0)
    seen = known[:, base.answers] & ~context.categorical[context.owner[base.answers]]
    return seen, normal_rows(base, filled, known), filled[:, base.answers]


def _with_bias(law: NormalRows) -> NormalRows:
    """The rows with their bias (M,) as further latents behind."""
    eye = torch.eye(law.mean.shape[-1], dtype=law.mean.dtype, device=law.mean.device)
    return law._replace(directions=torch.cat([law.directions, eye.expand(len(law.mean), -1, -1)], -1))


class Heard(NamedTuple):
    """Rows of one task by one `instrument`: `precision` (1, L + M, L + M) and precision times mean, `shift`
    (1, L + M), that they add to the latent and to the bias less its mean, the prior of the bias included."""

    instrument: Instrument
    precision: Tensor
    shift: Tensor

    def of_latent(self) -> tuple[Tensor, Tensor]:
        """Precision (1, L, L) and precision times mean (1, L) that they add to the latent, biases integrated out."""
        number = self.shift.shape[-1] - len(self.instrument[0])
        slope, offset, _ = self.bias_given_latent()
        across = self.precision[:, :number, number:]
        told = self.precision[:, :number, :number] + across @ slope
        return told, self.shift[:, :number] - (across @ offset.unsqueeze(-1)).squeeze(-1)

    def bias_given_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The bias less its mean as a normal about slope (M, L) times latent plus offset (M,), covariance (M, M)."""
        number = self.shift.shape[-1] - len(self.instrument[0])
        spread = torch.linalg.inv(self.precision[0, number:, number:])
        return -spread @ self.precision[0, number:, :number], spread @ self.shift[0, number:], spread


def _heard(law: NormalRows, answers: Tensor, seen: Tensor, instrument: Instrument) -> Heard:
    bias, scale, log_gain, log_noise = instrument
    number = law.directions.shape[-1]
    shown = law.through(bias.expand_as(answers), log_gain.exp().expand_as(answers), log_noise.exp().expand_as(answers))
    wide = _with_bias(shown)
    precision = torch.block_diag(torch.zeros(number, number, dtype=bias.dtype), torch.diag(scale.pow(-2)))
    start = precision.unsqueeze(0), torch.zeros(1, number + len(bias), dtype=bias.dtype)
    task = torch.zeros(len(answers), dtype=torch.long)
    _, _, both, shift = wide.weighed(torch.where(seen, answers - wide.mean, 0.0), seen, task, start)
    return Heard(instrument, both, shift)


def _fitted(rows: NormalRows, answers: Tensor, seen: Tensor, task: Tensor, before: tuple[Tensor, Tensor]) -> Instrument:
    """The most probable instrument of rows (N, M) of tasks (N,) with beliefs `before`, and the scale of its bias."""
    means, scales = torch.tensor([_BIAS, _LOG_GAIN, _LOG_NOISE, _LOG_DRIFT], dtype=torch.float64).T
    number, tasks = answers.shape[-1], len(before[1])
    centre = means.repeat_interleave(number)
    spread = scales.repeat_interleave(number)
    wide = F.pad(before[0], (0, number, 0, number)), F.pad(before[1], (0, number))

    def loss(theta: Tensor) -> Tensor:
        *shown, log_drift = theta.reshape(4, number)
        bias, log_gain, log_noise = (part.expand_as(answers) for part in shown)
        law = _with_bias(rows.through(bias, log_gain.exp(), log_noise.exp()))
        drift = F.pad((-2 * log_drift).exp(), (len(wide[1][0]) - number, 0)).diag_embed().expand(tasks, -1, -1)
        evidence = law.log_evidence(torch.where(seen, answers - law.mean, 0.0), seen, task, (wide[0] + drift, wide[1]))
        return 0.5 * ((theta - centre) / spread).square().sum() - evidence.sum()

    with torch.enable_grad():
        theta = centre.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([theta], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(theta)
            value.backward()
            return value

        optimizer.step(closure)
        curvature: Tensor = torch.autograd.functional.hessian(loss, theta.detach())
    covariance = torch.linalg.inv((curvature + curvature.mT) / 2)
    bias, log_gain, log_noise, log_drift = theta.detach().reshape(4, number)
    variance = covariance.diagonal()[:number].clamp(1e-12, _BIAS[1] ** 2) + (2 * log_drift).exp()
    return bias, variance.sqrt(), log_gain, log_noise
