r"""Six problems of the sbi benchmark: simulators, priors, likelihoods, and the reference posteriors.

Written from their definitions (Lueckmann et al., *Benchmarking simulation-based inference*, AISTATS 2021).
Everything is vectorised over rows: ``theta: (N, D_theta)`` and ``x: (N, D_x)``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import (
    Binomial,
    Distribution,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    Uniform,
)

if TYPE_CHECKING:
    import xarray as xr

REFERENCES = Path(__file__).resolve().parents[2] / "shared" / "sbibm_ref"


@dataclass(frozen=True)
class Support:
    """The support of every variable on one side; `resolution` is the step of the recorded values."""

    kind: str
    lower: float | None = None
    upper: float | None = None
    resolution: float = 0.0


@dataclass(frozen=True)
class Problem:
    r"""A prior :math:`p(\theta)` and a simulator :math:`p(x \mid \theta)`.

    Arguments:
        parameters: names of the parameters, in the order of the columns of theta.
        observations: names of the observations, in the order of the columns of x.
        prior: of theta, event shape ``(D_theta,)``.
        simulator: theta ``(N, D_theta)`` to x ``(N, D_x)``, by torch's global generator.
        log_likelihood: ``log p(x | theta)``, shape ``(N,)``, of theta ``(N, D_theta)`` and x ``(N, D_x)``
        or ``(D_x,)``.
        log_posterior: ``log p(theta | x)``, normalised, where it is known; else None.
        exchangeable: groups of observations whose members may be swapped, each member a tuple of names.
    """

    name: str
    parameters: tuple[str, ...]
    observations: tuple[str, ...]
    prior: Distribution
    simulator: Callable[[Tensor], Tensor]
    log_likelihood: Callable[[Tensor, Tensor], Tensor]
    parameter_support: Support
    observation_support: Support = Support("real")
    log_posterior: Callable[[Tensor, Tensor], Tensor] | None = None
    exchangeable: tuple[tuple[tuple[str, ...], ...], ...] = ()

    def simulate(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """`rows` draws of theta from the prior and of x given it, in float32, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theta = self.prior.sample((rows,))
            return theta, self.simulator(theta).to(theta.dtype)

    def reference(self, observation: int) -> tuple[Tensor, Tensor, Tensor]:
        """Observation number `observation` (1 to 5), as x ``(D_x,)``, its true theta ``(D_theta,)``, and
        draws from its reference posterior ``(2000, D_theta)``.

        Raises:
            FileNotFoundError: the reference files are not there.
        """
        folder = REFERENCES / self.name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no reference posteriors of {self.name!r} at {folder}; expected, from the sbi benchmark: "
                "observation_1.csv, true_parameters_1.csv, reference_posterior_1.csv, ..."
            )
        x, theta, draws = (
            _read_table(folder / f"{kind}_{observation}.csv")
            for kind in ("observation", "true_parameters", "reference_posterior")
        )
        return x[0], theta[0], draws


def dataset(problem: Problem, theta: Tensor, x: Tensor) -> xr.Dataset:
    """The rows ``theta: (N, D_theta)``, ``x: (N, D_x)``, with their roles and supports.

    Raises:
        DataError: an observation is constant, as SIR's first nearly is: it takes some thousand rows to vary.
    """
    from pyro_invman.data import from_columns

    names = problem.parameters + problem.observations
    of_side = {"parameter": problem.parameter_support, "observation": problem.observation_support}
    roles = {name: "parameter" if name in problem.parameters else "observation" for name in names}
    supports = {name: of_side[role] for name, role in roles.items()}
    return from_columns(
        dict(zip(names, torch.cat([theta, x], -1).double().unbind(-1), strict=True)),
        roles=roles,
        supports={name: support.kind for name, support in supports.items()},
        bounds={
            name: (support.lower, support.upper)
            for name, support in supports.items()
            if support.lower is not None and support.upper is not None
        },
        resolutions={name: support.resolution for name, support in supports.items() if support.resolution},
    )


def _read_table(path: Path) -> Tensor:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return torch.tensor([[float(cell) for cell in row] for row in rows])


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}_{i + 1}" for i in range(count))


def _box(bound: float, dimension: int) -> Distribution:
    return Independent(Uniform(torch.full((dimension,), -bound), torch.full((dimension,), bound)), 1)


# ------------------------------------------------------------ gaussian_linear
_LINEAR_SCALE = math.sqrt(0.1)


def _linear_log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    return Normal(theta, _LINEAR_SCALE).log_prob(x).sum(-1)


def _linear_log_posterior(theta: Tensor, x: Tensor) -> Tensor:
    return Normal(x / 2, math.sqrt(0.05)).log_prob(theta).sum(-1)


# ------------------------------------------------------------ gaussian_mixture
_MIXTURE_SCALES = (1.0, 0.1)
_MIXTURE_BOUND = 10.0


def _mixture_simulator(theta: Tensor) -> Tensor:
    wide = torch.rand(theta.shape[0], 1) < 0.5
    return theta + torch.where(wide, *_MIXTURE_SCALES) * torch.randn_like(theta)


def _mixture_log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    parts = [Normal(theta, scale).log_prob(x).sum(-1) for scale in _MIXTURE_SCALES]
    return torch.stack(parts).logsumexp(0) - math.log(2)


def _mixture_log_posterior(theta: Tensor, x: Tensor) -> Tensor:
    bound = torch.tensor(_MIXTURE_BOUND)
    laws = [Normal(x, scale) for scale in _MIXTURE_SCALES]
    inside = torch.stack([(law.cdf(bound) - law.cdf(-bound)).prod(-1) for law in laws])
    return _mixture_log_likelihood(theta, x) - inside.mean(0).log()


# ------------------------------------------------------------ two_moons
_MOON_RADIUS, _MOON_WIDTH, _MOON_SHIFT = 0.1, 0.01, 0.25


def _moons_simulator(theta: Tensor) -> Tensor:
    angle = math.pi * (torch.rand(theta.shape[0]) - 0.5)
    radius = _MOON_RADIUS + _MOON_WIDTH * torch.randn(theta.shape[0])
    along, across = theta.sum(-1).abs() / math.sqrt(2), (theta[:, 1] - theta[:, 0]) / math.sqrt(2)
    return torch.stack([radius * angle.cos() + _MOON_SHIFT - along, radius * angle.sin() + across], -1)


def _moons_log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    p = x[..., 0] - _MOON_SHIFT + theta.sum(-1).abs() / math.sqrt(2)
    q = x[..., 1] - (theta[..., 1] - theta[..., 0]) / math.sqrt(2)
    radius = torch.hypot(p, q)
    inside = Normal(_MOON_RADIUS, _MOON_WIDTH).log_prob(radius) - (math.pi * radius).log()
    return torch.where(p > 0, inside, -math.inf)


def _moons_log_posterior(theta: Tensor, x: Tensor, angles: int = 400, radii: int = 41) -> Tensor:
    """Each x and noise (angle, radius) come from at most two theta, with unit Jacobian; the evidence is the
    expected number of those inside the prior's box, over its area. Noise by the midpoint rule."""
    angle = math.pi * ((torch.arange(angles) + 0.5) / angles - 0.5)
    level = (torch.arange(radii) + 0.5) / radii
    radius = _MOON_RADIUS + _MOON_WIDTH * Normal(0.0, 1.0).icdf(level)[:, None]
    along = (radius * angle.cos()).flatten() + _MOON_SHIFT - x[..., :1]
    across = x[..., 1:] - (radius * angle.sin()).flatten()
    count = torch.zeros(x.shape[:-1])
    for sign in (-1, 1):
        first, second = (sign * along - across) / math.sqrt(2), (sign * along + across) / math.sqrt(2)
        count = count + ((along > 0) & (first.abs() < 1) & (second.abs() < 1)).float().mean(-1)
    return _moons_log_likelihood(theta, x) - count.log()


# ------------------------------------------------------------ slcp
def _slcp_scales(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return theta[..., 2].square(), theta[..., 3].square(), theta[..., 4].tanh()


def _slcp_simulator(theta: Tensor) -> Tensor:
    first, second, correlation = (s[:, None] for s in _slcp_scales(theta))
    noise = torch.randn(2, theta.shape[0], 4)
    rest = (1 - correlation.square()).clamp(min=0).sqrt()
    return torch.stack(
        [
            theta[:, :1] + first * noise[0],
            theta[:, 1:2] + second * (correlation * noise[0] + rest * noise[1]),
        ],
        -1,
    ).flatten(1)


def _slcp_log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    first, second, correlation = (s[..., None] for s in _slcp_scales(theta))
    draws = x.unflatten(-1, (4, 2))
    u = (draws[..., 0] - theta[..., 0, None]) / first
    v = (draws[..., 1] - theta[..., 1, None]) / second
    rest = 1 - correlation.square()
    quadratic = (u.square() - 2 * correlation * u * v + v.square()) / rest
    return (-0.5 * quadratic - math.log(2 * math.pi) - (first * second).log() - 0.5 * rest.log()).sum(-1)


# ------------------------------------------------------------ differential equations
def _runge_kutta(field: Callable[[Tensor], Tensor], state: Tensor, gap: float, steps: int, times: int) -> Tensor:
    """States at ``0, gap, ..., (times - 1) gap``, ``(times, *state.shape)``, `steps` to a gap."""
    h = gap / steps
    path = [state]
    for _ in range(times - 1):
        for _ in range(steps):
            a = field(state)
            b = field(state + 0.5 * h * a)
            c = field(state + 0.5 * h * b)
            d = field(state + h * c)
            state = state + (h / 6) * (a + 2 * b + 2 * c + d)
        path.append(state)
    return torch.stack(path)


# ------------------------------------------------------------ sir
_PEOPLE, _TESTED = 1e6, 1000


def infected_fraction(theta: Tensor, steps: int = 170) -> Tensor:
    r"""Infected share at t = 0, 17, ..., 153, ``(N, 10)``, of theta = (contact, recovery) rates.

    .. math:: \dot S = -\beta S I / N, \quad \dot I = \beta S I / N - \gamma I.
    """
    contact, recovery = theta.double().unbind(-1)

    def field(state: Tensor) -> Tensor:
        susceptible, infected = state
        new = contact * susceptible * infected
        return torch.stack([-new, new - recovery * infected])

    start = torch.ones_like(contact) / _PEOPLE
    path = _runge_kutta(field, torch.stack([1 - start, start]), gap=17.0, steps=steps, times=10)
    return path[:, 1].movedim(0, -1).clamp(0, 1)


def _sir_simulator(theta: Tensor) -> Tensor:
    share = infected_fraction(theta)
    return torch.binomial(torch.full_like(share, _TESTED), share).to(theta.dtype)


def _sir_log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    return Binomial(_TESTED, probs=infected_fraction(theta)).log_prob(x.double()).sum(-1).to(theta.dtype)


# ------------------------------------------------------------ lotka_volterra
_POPULATION_NOISE = 0.1


def log_populations(theta: Tensor, steps: int = 420) -> Tensor:
    r"""Logarithms of prey, then predators, at t = 0, 2.1, ..., 18.9: ``(N, 20)``.

    .. math:: \dot x = \alpha x - \beta x y, \quad \dot y = -\gamma y + \delta x y,

    solved for the logarithms, which keeps both positive; the benchmark holds both within 1e-10 and 1e4.
    """
    alpha, beta, gamma, delta = theta.double().unbind(-1)

    def field(state: Tensor) -> Tensor:
        prey, predators = state.exp()
        return torch.stack([alpha - beta * predators, delta * prey - gamma])

    start = torch.stack([torch.full_like(alpha, math.log(30.0)), torch.zeros_like(alpha)])
    path = _runge_kutta(field, start, gap=2.1, steps=steps, times=10)
    return path.permute(2, 1, 0).flatten(1).clamp(math.log(1e-10), math.log(1e4))


def _predator_simulator(theta: Tensor) -> Tensor:
    loc = log_populations(theta)
    return (loc + _POPULATION_NOISE * torch.randn_like(loc)).exp().to(theta.dtype)


def _predator_log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
    return LogNormal(log_populations(theta), _POPULATION_NOISE).log_prob(x.double()).sum(-1).to(theta.dtype)


def _log_normal(medians_log: tuple[float, ...], scales: tuple[float, ...]) -> Distribution:
    return Independent(LogNormal(torch.tensor(medians_log), torch.tensor(scales)), 1)


_SLCP_X = _numbered("x", 8)

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem(
            "two_moons",
            _numbered("theta", 2),
            _numbered("x", 2),
            _box(1.0, 2),
            _moons_simulator,
            _moons_log_likelihood,
            Support("interval", -1.0, 1.0),
            log_posterior=_moons_log_posterior,
        ),
        Problem(
            "gaussian_mixture",
            _numbered("theta", 2),
            _numbered("x", 2),
            _box(_MIXTURE_BOUND, 2),
            _mixture_simulator,
            _mixture_log_likelihood,
            Support("interval", -_MIXTURE_BOUND, _MIXTURE_BOUND),
            log_posterior=_mixture_log_posterior,
        ),
        Problem(
            "gaussian_linear",
            _numbered("theta", 10),
            _numbered("x", 10),
            MultivariateNormal(torch.zeros(10), 0.1 * torch.eye(10)),
            lambda theta: theta + _LINEAR_SCALE * torch.randn_like(theta),
            _linear_log_likelihood,
            Support("real"),
            log_posterior=_linear_log_posterior,
        ),
        Problem(
            "slcp",
            _numbered("theta", 5),
            _SLCP_X,
            _box(3.0, 5),
            _slcp_simulator,
            _slcp_log_likelihood,
            Support("interval", -3.0, 3.0),
            exchangeable=(tuple(_SLCP_X[i : i + 2] for i in (0, 2, 4, 6)),),
        ),
        Problem(
            "sir",
            ("beta", "gamma"),
            tuple(f"infected_{17 * i}" for i in range(10)),
            _log_normal((math.log(0.4), math.log(0.125)), (0.5, 0.2)),
            _sir_simulator,
            _sir_log_likelihood,
            Support("positive"),
            Support("interval", -0.5, _TESTED + 0.5, resolution=1.0),
        ),
        Problem(
            "lotka_volterra",
            ("alpha", "beta", "gamma", "delta"),
            _numbered("prey", 10) + _numbered("predators", 10),
            _log_normal((-0.125, -3.0, -0.125, -3.0), (0.5, 0.5, 0.5, 0.5)),
            _predator_simulator,
            _predator_log_likelihood,
            Support("positive"),
            Support("positive"),
        ),
    )
}
