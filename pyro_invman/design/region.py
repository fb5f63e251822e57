r"""Where designs may lie: a box, and what else a projection keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.quasirandom import SobolEngine

from pyro_invman.variables import DataError

_CLOSE = 1e-5  # in units of the scale, how far a projection may be from keeping its word
_ROUNDS = 1000  # of projections onto one set, then the other


class Region:
    r"""The designs that are allowed: a box, intersected with the image of a projection.

    A step that leaves it is taken back to the nearest allowed design: in a box by clamping, otherwise by Dykstra's
    alternating projections, which find the nearest point of an intersection of convex sets. So a design at an end of
    its box is reached exactly. (A bijection from the real line would have put it at infinity.)

    Arguments:
        initial: (*design_shape), allowed.
        bounds: two ends, numbers or tensors that broadcast to the design, possibly infinite.
        constraint: takes designs (C, *design_shape) to the nearest ones that are allowed.

    Raises:
        DataError: ends that do not fit the design or each other; an initial design that is not allowed; a constraint
            that is no projection, or that no design of the box satisfies.

    References:
        Boyle & Dykstra, *A method for finding projections onto the intersection of convex sets in Hilbert spaces*,
        Advances in order restricted statistical inference, 1986.
    """

    def __init__(self, initial: Tensor, bounds: Any, constraint: Callable[[Tensor], Tensor] | None) -> None:
        if not isinstance(initial, Tensor) or not initial.is_floating_point():
            kind = str(initial.dtype) if isinstance(initial, Tensor) else type(initial).__name__
            raise DataError(
                f"initial_design: found {kind}, expected a tensor of real numbers, which a gradient can move"
            )
        if not initial.isfinite().all():
            raise DataError(f"initial_design: found {initial.tolist()}, expected finite numbers")
        if isinstance(constraint, Constraint):
            raise DataError(
                f"constraint: found {constraint}, expected a function that takes designs (C, *design_shape) to the "
                "nearest allowed ones; give intervals as bounds=(lower, upper)"
            )
        self.initial, self.constraint = initial, constraint
        self.lower, self.upper = self._ends(bounds)
        outside = (initial < self.lower) | (initial > self.upper)
        if outside.any():
            place = tuple(outside.nonzero()[0].tolist())
            raise DataError(
                f"initial_design{list(place)}: found {initial[place].item():g}, outside its bounds "
                f"[{self.lower[place].item():g}, {self.upper[place].item():g}]"
            )
        width = self.upper - self.lower
        self.boxed = bool(width.isfinite().all())
        self.scale = torch.where(width.isfinite() & (width > 0), width, initial.abs().clamp_min(1.0))
        if constraint is not None:
            # projections are the nearest points where every number is measured alike
            self.scale = torch.full_like(self.scale, self.scale.mean().item())
            self._check(initial.unsqueeze(0))
            self._check(
                initial.unsqueeze(0) + torch.linspace(-1, 1, initial.numel()).reshape(initial.shape) * self.scale
            )
            moved = self._constrained(initial.unsqueeze(0))[0]
            if (moved - initial).abs().max() > _CLOSE * self.scale.max():
                raise DataError(
                    f"initial_design: found {initial.tolist()}, which the constraint moves to {moved.tolist()}; start "
                    "from an allowed design"
                )

    def _ends(self, bounds: Any) -> tuple[Tensor, Tensor]:
        if bounds is None:
            bounds = (-torch.inf, torch.inf)
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise DataError(f"bounds: found {type(bounds).__name__}, expected a pair (lower, upper)")
        shape = self.initial.shape
        try:
            lower, upper = (torch.as_tensor(end).to(self.initial).expand(shape).clone() for end in bounds)
        except RuntimeError as error:
            found = [tuple(torch.as_tensor(end).shape) for end in bounds]
            raise DataError(
                f"bounds: found ends of shapes {found}, expected what broadcasts to the design's {tuple(shape)}"
            ) from error
        wrong = ~(lower <= upper)
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise DataError(
                f"bounds{list(place)}: found lower {lower[place]:g} and upper {upper[place]:g}, not in order"
            )
        return lower, upper

    def starts(self, num: int, seed: int) -> Tensor:
        """Designs (A, *design_shape) to start from: the initial one, then quasi-random ones of the box."""
        if num > 1 and not self.boxed:
            raise DataError(f"num_starts: found {num}, but starts are spread over a box; give finite bounds, or 1")
        size = self.initial.numel()
        if num == 1:
            return self.initial.unsqueeze(0)
        if size <= SobolEngine.MAXDIM:
            points = SobolEngine(size, scramble=True, seed=seed).draw(num - 1, dtype=torch.float64)
        else:
            points = torch.rand(num - 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        points = points.to(self.initial).reshape(num - 1, *self.initial.shape)
        spread = self.lower + points * (self.upper - self.lower)
        return torch.cat([self.initial.unsqueeze(0), self.projected(spread)])

    def projected(self, designs: Tensor) -> Tensor:
        """The nearest allowed designs (C, *design_shape)."""
        if self.constraint is None:
            return torch.minimum(torch.maximum(designs, self.lower), self.upper)
        found, first, second = designs, torch.zeros_like(designs), torch.zeros_like(designs)
        for _ in range(_ROUNDS):
            boxed = torch.minimum(torch.maximum(found + first, self.lower), self.upper)
            first = found + first - boxed
            found = self._constrained(boxed + second)
            second = boxed + second - found
            apart = (found - boxed).abs().max()
            if apart <= 0.1 * _CLOSE * self.scale.max():
                return boxed
        raise DataError(
            f"constraint: its designs stay {apart.item():.2g} away from the box; no design satisfies both, or it is no "
            "projection onto a convex set"
        )

    def _constrained(self, designs: Tensor) -> Tensor:
        assert self.constraint is not None
        return self.constraint(designs).detach()

    def _check(self, designs: Tensor) -> None:
        assert self.constraint is not None
        found = self.constraint(designs)
        if not isinstance(found, Tensor) or found.shape != designs.shape:
            kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DataError(
                f"constraint: found {kind}, expected designs {tuple(designs.shape)} like those it was given"
            )
        again = self.constraint(found)
        if not (again - found).abs().max() <= _CLOSE * self.scale.max():
            raise DataError(
                f"constraint: it moved its own answer {found[0].tolist()} to {again[0].tolist()}; expected a "
                "projection, which leaves allowed designs where they are"
            )
