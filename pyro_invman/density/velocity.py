r"""Continuous flows: a velocity field learned by flow matching, its divergence, and the solvers that follow it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jvp

from pyro_invman.density.backbones import Block
from pyro_invman.variables import DataError

METHODS = ("dopri5", "adams", "midpoint", "euler")
DIVERGENCES = ("exact", "stochastic")
Velocity = Callable[[Tensor, Tensor], Tensor]  # (t (), x (..., D)) -> (..., D)


def waves(values: Tensor, frequencies: int) -> Tensor:
    r"""The values (..., K) beside :math:`\sin, \cos (2^{k - 2} \pi v)`, k < `frequencies`; (..., K (1 + 2 F))."""
    rates = 2.0 ** torch.arange(frequencies, dtype=values.dtype, device=values.device) * (math.pi / 4)
    angles = (values.unsqueeze(-1) * rates).flatten(-2)
    return torch.cat([values, angles.sin(), angles.cos()], -1)


class VelocityField(nn.Module):
    r"""A network :math:`v(t, x; c)`, zero when new, so that its flow is the identity before training.

    Arguments:
        event_dim: the number D of coordinates that move.
        context_dim: the number K of conditions, which stay; standardised. May be 0.
        width: hidden units.
        blocks: residual blocks.
        frequencies: waves that each condition is read through; 0 reads it as it is.
    """

    def __init__(
        self, event_dim: int, context_dim: int, width: int = 96, blocks: int = 2, frequencies: int = 4
    ) -> None:
        super().__init__()
        self.event_dim, self.context_dim, self.frequencies = event_dim, context_dim, frequencies
        self.enter = nn.Linear(event_dim + 9 + context_dim * (1 + 2 * frequencies), width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.out = nn.Linear(width, event_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor, x: Tensor, c: Tensor) -> Tensor:
        """Velocity (..., D) at times `t` (...) or (), places `x` (..., D) and conditions `c` (..., K)."""
        shape = x.shape[:-1]
        time = waves((4 * t).expand(shape).unsqueeze(-1), 4)  # half a turn to four turns over [0, 1]
        conditions = waves(c.expand(*shape, self.context_dim), self.frequencies)
        hidden = self.enter(torch.cat([x, time, conditions], -1))
        for block in self.blocks:
            hidden = block(hidden)
        velocity: Tensor = self.out(hidden)
        return velocity


def matching_loss(
    field: VelocityField,
    start: Tensor,
    end: Tensor,
    c: Tensor,
    generator: torch.Generator,
    *,
    width: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Conditional flow matching along straight paths,

    .. math:: E\, w\, \| v(t, x_t; c) - (x_1 - x_0) \|^2 / D, \qquad
              x_t \sim N((1 - t)\, x_0 + t\, x_1,\ \sigma^2), \quad t \sim U(0, 1).

    Arguments:
        start, end: the coupled points :math:`x_0, x_1` (B, D).
        c: conditions (B, K), at time t where they move.
        width: :math:`\sigma`.
        weight: :math:`w` (B,); 1 where None.

    References:
        Lipman et al., *Flow matching for generative modeling*, ICLR 2023.
        Tong et al., *Improving and generalizing flow-based generative models with minibatch optimal transport*, 2024.
    """
    t = stratified(len(start), generator).to(start)
    return matching_loss_at(field, t, start, end, c, generator, width=width, weight=weight)


def matching_loss_at(
    field: VelocityField,
    t: Tensor,
    start: Tensor,
    end: Tensor,
    c: Tensor,
    generator: torch.Generator,
    *,
    width: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """`matching_loss` at given times (B,)."""
    place = torch.lerp(start, end, t.unsqueeze(-1))
    if width > 0:
        place = place + width * torch.randn(place.shape, generator=generator).to(place)
    error = (field(t, place, c) - (end - start)).square().mean(-1)
    return error.mean() if weight is None else (weight * error).sum() / weight.sum()


def stratified(number: int, generator: torch.Generator) -> Tensor:
    """Times (B,) in [0, 1), one in each of B equal parts, in random order: uniform, and less noisy than independent."""
    parts = torch.randperm(number, generator=generator)
    return (parts + torch.rand(number, generator=generator)) / number


# ------------------------------------------------------------------ divergence
def exact_divergence(velocity: Velocity, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Velocity (..., D) and its divergence :math:`\sum_i \partial v_i / \partial x_i` (...), by D directional
    derivatives in one pass."""
    dim = x.shape[-1]
    basis = torch.eye(dim, dtype=x.dtype, device=x.device)
    along = basis.reshape(dim, *(1,) * (x.dim() - 1), dim).expand(dim, *x.shape)
    values, slopes = _directional(velocity, t, x.expand(dim, *x.shape), along)
    return values[0], (slopes * along).sum((0, -1))


def stochastic_divergence(velocity: Velocity, t: Tensor, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    r"""Velocity (..., D) and Hutchinson's unbiased estimate :math:`e^\top (\partial v / \partial x)\, e` (...) of its
    divergence, with `probe` :math:`e` (..., D) of random signs: one directional derivative whatever D.

    References:
        Grathwohl et al., *FFJORD: free-form continuous dynamics for scalable reversible generative models*, ICLR 2019.
    """
    values, slope = _directional(velocity, t, x, probe)
    return values, (slope * probe).sum(-1)


def _directional(velocity: Velocity, t: Tensor, x: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = jvp(lambda place: velocity(t, place), (x.contiguous(),), (along.contiguous(),))  # type: ignore[assignment]
    return found


# ------------------------------------------------------------------ solvers
class Solver(NamedTuple):
    """How a flow is followed.

    Arguments:
        method: ``"dopri5"`` (torchdiffeq's adaptive Dormand–Prince 5(4)) to `tolerance`; or a fixed number of
            `evaluations` of the network in equal steps: ``"adams"`` (Adams–Bashforth of order 2, one evaluation a
            step, a midpoint step first), ``"midpoint"`` (order 2, two a step), ``"euler"`` (order 1, one a step).
        evaluations: of the network, for the fixed methods.
        tolerance: relative and absolute, for the adaptive one.
        divergence: ``"exact"``, or ``"stochastic"`` where D is too large for it.
    """

    method: Literal["dopri5", "adams", "midpoint", "euler"] = "dopri5"
    evaluations: int = 10
    tolerance: float = 1e-5
    divergence: Literal["exact", "stochastic"] = "exact"

    def checked(self) -> Solver:
        """Itself.

        Raises:
            DataError: a setting is not one of those above.
        """
        if self.method not in METHODS:
            raise DataError(f"solver: method {self.method!r}, expected one of {METHODS}")
        if self.divergence not in DIVERGENCES:
            raise DataError(f"solver: divergence {self.divergence!r}, expected one of {DIVERGENCES}")
        least = {"dopri5": 0, "euler": 1}.get(self.method, 2)
        odd = self.method == "midpoint" and self.evaluations % 2 == 1
        if self.evaluations < least or odd:
            raise DataError(
                f"solver: {self.evaluations} evaluations by {self.method!r}, expected at least {least}"
                + (", and an even number" if self.method == "midpoint" else "")
            )
        if not 0 < self.tolerance < 1:
            raise DataError(f"solver: tolerance {self.tolerance}, expected one between 0 and 1")
        return self


def flow(
    velocity: Velocity, x: Tensor, solver: Solver, *, backwards: bool = False, volume: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Follows :math:`\dot x = v(t, x)` from t = 0 to 1 (or from 1 to 0), and the change of volume with it,

    .. math:: \log \left| \frac{\partial x_1}{\partial x_0} \right| = \int_0^1 \nabla \cdot v(t, x_t)\, dt .

    Differentiable in x and in all that `velocity` depends on; a row of x that is not finite ends at NaN, and does not
    disturb the others. One evaluation with `volume` costs D + 1 of those
    without where the divergence is exact, 2 where it is stochastic.

    Arguments:
        x: where to start from (..., D).

    Returns:
        where it ends (..., D), and the logarithm of the change of volume on that way (...), zero where `volume` is
        False.
    """
    lost = ~x.isfinite().all(-1)
    x = torch.where(lost.unsqueeze(-1), 0.0, x)
    probe = torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1) if solver.divergence == "stochastic" else None

    def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not volume:
            return (velocity(t, state[0]),)
        if probe is None:
            return exact_divergence(velocity, t, state[0])
        return stochastic_divergence(velocity, t, state[0], probe)

    still = x.new_zeros(x.shape[:-1])
    state = (x, still) if volume else (x,)
    ends = (1.0, 0.0) if backwards else (0.0, 1.0)
    if solver.method == "dopri5":
        from torchdiffeq import odeint

        times = x.new_tensor(ends)
        path = odeint(slope, state, times, rtol=solver.tolerance, atol=solver.tolerance, method="dopri5")
        end = tuple(values[-1] for values in path)
    else:
        end = _in_equal_steps(slope, state, ends, solver)
    change = end[1] if volume else still
    return torch.where(lost.unsqueeze(-1), math.nan, end[0]), torch.where(lost, math.nan, change)


def _in_equal_steps(
    slope: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    ends: tuple[float, float],
    solver: Solver,
) -> tuple[Tensor, ...]:
    steps = {"midpoint": solver.evaluations // 2, "adams": solver.evaluations - 1}.get(
        solver.method, solver.evaluations
    )
    step, before = (ends[1] - ends[0]) / steps, None

    def moved(by: float, *slopes: tuple[float, tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(value + by * sum(share * each[i] for share, each in slopes) for i, value in enumerate(state))

    for k in range(steps):
        t = state[0].new_tensor(ends[0] + k * step)
        now = slope(t, state)
        if solver.method == "adams" and before is not None:
            state, before = moved(step, (1.5, now), (-0.5, before)), now
        elif solver.method == "euler":
            state = moved(step, (1.0, now))
        else:
            half = slope(t + step / 2, moved(step / 2, (1.0, now)))
            state, before = moved(step, (1.0, half)), now
    return state
