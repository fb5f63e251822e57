r"""The design that tells most: ascent on a bound of the expected information gain."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_invman.design.experiment import Experiment, isolated
from pyro_invman.design.gain import expected_information_gain
from pyro_invman.design.region import Region
from pyro_invman.design.slope import METHODS, Slope
from pyro_invman.results import optimum_dataset
from pyro_invman.variables import DataError

if TYPE_CHECKING:
    import xarray as xr

_STARTS = (8, 32)  # in a box: the first, and one more for each number of the design, at most the second
_EXPLORING = 0.6  # share of the steps that all starts take; the best go on
_KEPT = 4  # of so many starts one goes on, with as many times the draws
_STEP = (0.05, 0.00625)  # first steps of the two, in widths of the box; they fall to nothing along a half cosine
_DECAY = (0.9, 0.99)  # of the means of gradients and of their squares
_CLIMBING = 0.6  # share of the time, before ends are compared
_COMPARING = 0.5  # share of the time that is left then
_COMPARED = 4096  # draws by which ends are compared
_SEEDS = (0x5EED, 0xF0E5)  # of what ends are compared by, and of the bracket: neither saw the ascent


def optimize(
    model: Callable[..., Any],
    initial_design: Tensor,
    observation_labels: str | Sequence[str],
    target_labels: str | Sequence[str] | None = None,
    *,
    bounds: tuple[Any, Any] | None = None,
    constraint: Callable[[Tensor], Tensor] | None = None,
    num_starts: int | None = None,
    num_steps: int = 200,
    num_samples: int = 64,
    max_seconds: float | None = None,
    method: str = "auto",
    tolerance: float = 0.01,
    seed: int = 0,
    vectorized: bool = True,
    guide: Callable[..., Any] | None = None,
) -> xr.Dataset:
    r"""The design of the highest expected information gain, with a lower and an upper limit of that.

    .. math:: d^* = \arg\max_{d \in D} I(d), \qquad d_{k+1} = P_D\left( d_k + \eta_k\, A_k(\nabla \hat I_k(d_k)) \right)

    A are the moving means of Adam, P the projection onto the allowed designs D, :math:`\hat I` a lower bound on I
    from fresh quasi-random draws at each step, the same for all starts; its gradient is exact where outcomes can be
    counted, pathwise where they can be differentiated through, and a score with a control variate
    elsewhere (see :class:`pyro_invman.design.slope.Slope`). All starts climb in one pass of the model; after three
    fifths of the steps the best quarter goes on, with four times the draws and an eighth of the step. Where they ended
    is compared by :func:`expected_information_gain` on fresh draws, and the best is asked again on others, so that
    neither the ascent nor the choice makes its gain look higher than it is.

    A batch of q points is one design of shape (q, ...): its gain is joint, so that near duplicates count once.

    Arguments:
        model: a Pyro model, called with designs (S, C, *design_shape); each site's batch shape begins with (S, C).
        initial_design: (*design_shape), allowed; the first start.
        observation_labels: the site or sites that would be observed.
        target_labels: the site or sites to learn about; None for all latents.
        bounds: ends (lower, upper), each a number or a tensor that broadcasts to the design. Steps are clamped, so
            that an optimum at an end is reached exactly, which a bijection onto the real line could not do.
        constraint: a projection, from designs (C, *design_shape) to the nearest allowed ones, onto a convex set; with
            bounds the nearest design of both is taken (Dykstra's algorithm). Every number of the design is measured
            alike then, so units should be comparable.
        num_starts: how many starts, quasi-random in the box but for the first; with finite bounds 8 and one for each
            number of the design, 32 at most, else 1.
        num_steps: steps at most.
        num_samples: draws a design and step, at first.
        max_seconds: wall time at most, for the ascent and both evaluations. Without it the result depends on the seed
            alone.
        method: of the ascent: ``auto``, ``enumeration``, ``vnmc``, ``contrastive``, ``posterior`` or ``infonce``.
        tolerance: nats; the width of the bracket at which the last evaluation ends.
        seed: of everything that is drawn; generators and Pyro's parameter store are left as found.
        vectorized: False calls the model with one design (*design_shape) at a time.
        guide: proposes latents under past data (see :class:`pyro_invman.design.Experiment`).

    Returns:
        ``design`` (*design_shape) with its ``eig``, ``lower``, ``upper``, ``std_error`` and ``non_finite``, as
        :func:`expected_information_gain` has them; over ``start`` where each ``began`` and ``ended``, ``ended_eig``
        with ``ended_std_error``, and ``non_finite_gradients``, the steps that were not taken; over ``step`` and
        ``start`` the ``bound`` (NaN where a start was given up) and the ``path``. In its attributes the methods, and
        what was spent.

    Raises:
        DataError: see :class:`pyro_invman.design.Experiment` and :class:`pyro_invman.design.region.Region`; a design
            that no gradient reaches, or whose gradient is never finite.

    Example::

        >>> import pyro, torch, pyro.distributions as dist
        >>> import pyro_invman as pim
        >>> def model(designs):  # the noise grows with the dose
        ...     with pyro.plate_stack("designs", designs.shape[:2]):
        ...         slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(slope * designs, 0.2 + 0.1 * designs**2))
        >>> found = pim.design.optimize(model, torch.tensor(0.5), "y", "slope", bounds=(0.0, 5.0), num_steps=60)
        >>> bool(abs(found.design - 2**0.5) < 0.05)  # d / (0.2 + 0.1 d²) is highest there
        True

    References:
        Foster et al., *A unified stochastic gradient approach to designing Bayesian-optimal experiments*, AISTATS 2020.
        Kingma & Ba, *Adam: a method for stochastic optimization*, ICLR 2015.
    """
    began = time.monotonic()
    if method not in METHODS:
        raise DataError(f"method: found {method!r}, expected one of {list(METHODS)}")
    for name, value, least in (
        ("num_starts", num_starts, 1),
        ("num_steps", num_steps, 1),
        ("num_samples", num_samples, 8),
    ):
        if value is not None and value < least:
            raise DataError(f"{name}: found {value}, expected at least {least}")
    if max_seconds is not None and not max_seconds > 0:
        raise DataError(f"max_seconds: found {max_seconds}, expected more than 0")
    region = Region(initial_design, bounds, constraint)
    several = min(_STARTS[0] + initial_design.numel(), _STARTS[1]) if region.boxed else 1
    starts = region.starts(num_starts or several, seed)
    asked: dict[str, Any] = {"vectorized": vectorized, "guide": guide}
    experiment = Experiment(model, starts, observation_labels, target_labels, seed=seed, **asked)
    with isolated(seed):
        slope = Slope(experiment, method, num_samples)
        climbed = _climbed(slope, region, starts, num_steps, math.inf if max_seconds is None else max_seconds, began)

    def evaluated(designs: Tensor, share: float, stream: int, **more: Any) -> xr.Dataset:
        if max_seconds is not None:
            more = {"max_seconds": max(share * (began + max_seconds - time.monotonic()), 0.02 * max_seconds)}
        return expected_information_gain(
            model, designs, observation_labels, target_labels, tolerance=tolerance, seed=seed ^ stream, **asked, **more
        )

    ends, best = climbed.path[-1], 0
    compared = None
    if len(ends) > 1:
        compared = evaluated(ends, _COMPARING, _SEEDS[0], num_samples=_COMPARED if vectorized else 256)
        eig = torch.as_tensor(compared.eig.values).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        gone_on = climbed.bounds[-1].isfinite()
        best = int((torch.where(gone_on, eig, -torch.inf) if gone_on.any() else eig).argmax())
    bracket = evaluated(ends[best : best + 1], 1.0, _SEEDS[1])
    compared = bracket if compared is None else compared
    attrs = {
        "method": slope.name,
        "steps": len(climbed.bounds),
        "samples": num_samples,
        "inner_points": slope.points,
        "best_start": best,
        "gain_method": bracket.attrs["method"],
        "bounds": bracket.attrs["bounds"],
        "model_runs": slope.runs + compared.attrs["model_runs"] + (len(ends) > 1) * bracket.attrs["model_runs"],
        "seconds": time.monotonic() - began,
    }
    return optimum_dataset(
        {name: bracket[name].values[0] for name in ("eig", "lower", "upper", "std_error", "non_finite")},
        ends[best],
        {
            "began": starts,
            "ended": ends,
            "ended_eig": torch.as_tensor(compared.eig.values),
            "ended_std_error": torch.as_tensor(compared.std_error.values),
            "non_finite_gradients": climbed.non_finite,
        },
        {"bound": climbed.bounds, "path": climbed.path[:-1]},
        attrs,
    )


class _Climbed(NamedTuple):
    """Bounds (K, A), designs (K + 1, A, *design_shape), and steps not taken (A,)."""

    bounds: Tensor
    path: Tensor
    non_finite: Tensor


def _climbed(
    slope: Slope, region: Region, starts: Tensor, num_steps: int, max_seconds: float, began: float
) -> _Climbed:
    """All starts climb, then the best of them on, by smaller steps and more draws."""
    exploring = max(1, round(_EXPLORING * num_steps))
    limit = _CLIMBING * max_seconds
    first = _ascent(slope, region, starts, exploring, _STEP[0], began, _EXPLORING * limit)
    last = first.bounds[-max(1, len(first.bounds) // 5) :].mean(0).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    kept = last.topk(math.ceil(len(starts) / _KEPT)).indices.sort().values
    if num_steps == exploring:
        return first
    best = first.path[-1, kept]
    slope.focus(best, slope.num_samples * len(starts) // len(kept))
    left = max(limit - (time.monotonic() - began), 1e-9)
    second = _ascent(slope, region, best, num_steps - exploring, _STEP[1], time.monotonic(), left)
    bounds = second.bounds.new_full((len(second.bounds), len(starts)), torch.nan)
    bounds[:, kept] = second.bounds
    path = first.path[-1].repeat(len(second.bounds), *[1] * starts.dim())
    path[:, kept] = second.path[1:]
    non_finite = first.non_finite.index_add(0, kept, second.non_finite)
    return _Climbed(torch.cat([first.bounds, bounds]), torch.cat([first.path, path]), non_finite)


def _ascent(
    slope: Slope, region: Region, designs: Tensor, num_steps: int, step_size: float, began: float, limit: float
) -> _Climbed:
    path, bounds = [designs], []
    mean, square = torch.zeros_like(designs), torch.zeros_like(designs)
    taken = torch.zeros(len(designs), dtype=torch.long)
    lead = (-1, *[1] * (designs.dim() - 1))
    reached = False
    for step in range(num_steps):
        bound, gradient = slope(designs)
        bounds.append(bound)
        finite = gradient.isfinite().reshape(len(bound), -1).all(1) & bound.isfinite()
        reached = reached or bool((gradient[finite] != 0).any())
        if not reached and bool(finite.any()):
            raise DataError(
                f"{', '.join(slope.experiment.outcomes)}: the gradient in the design is zero at every start; does the "
                "model round the design, or look it up?"
            )
        taken += finite
        move = finite.reshape(lead)
        gradient = torch.where(move, gradient, 0.0) * region.scale
        mean = torch.where(move, _DECAY[0] * mean + (1 - _DECAY[0]) * gradient, mean)
        squared = gradient.square()
        if region.constraint is not None:  # one length a design, lest a step not be along its gradient
            squared = squared.reshape(len(bound), -1).mean(1).reshape(lead).expand_as(gradient)
        square = torch.where(move, _DECAY[1] * square + (1 - _DECAY[1]) * squared, square)
        count = taken.clamp_min(1).to(designs).reshape(lead)
        height = mean / (1 - _DECAY[0] ** count)
        length = (square / (1 - _DECAY[1] ** count)).sqrt().clamp_min(1e-12)
        progress = max(step / num_steps, (time.monotonic() - began) / limit)
        size = step_size * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        designs = region.projected(torch.where(move, designs + size * region.scale * height / length, designs))
        path.append(designs)
        if progress >= 1:
            break
    if not taken.any():
        raise DataError(f"initial_design: in none of {len(bounds)} steps was the gradient finite at any start")
    return _Climbed(torch.stack(bounds), torch.stack(path), len(bounds) - taken)
