"""Bijections of points that a condition chooses: linear maps, flows, and one after another as a transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_invman.density.velocity import Solver, VelocityField, flow
from pyro_invman.variables import DataError


class Linear(NamedTuple):
    """x ↦ after + matrix (x − before), its inverse, and log |matrix|."""

    before: Tensor
    matrix: Tensor
    inverse: Tensor
    after: Tensor
    log_det: Tensor

    @property
    def dim(self) -> int:
        """D."""
        return self.before.shape[-1]

    @property
    def inv(self) -> Linear:
        """The way back."""
        return Linear(self.after, self.inverse, self.matrix, self.before, -self.log_det)

    def go(self, x: Tensor, back: bool, volume: bool) -> tuple[Tensor, Tensor]:
        """Where `x` (..., D) goes, or comes from where `back`, and the logarithm of the change of volume (...)."""
        start, matrix, end = self.before, self.matrix, self.after
        if back:
            start, matrix, end = self.after, self.inverse, self.before
        moved = end + (matrix @ (x - start).unsqueeze(-1)).squeeze(-1)
        return moved, (-self.log_det if back else self.log_det).expand(moved.shape[:-1])


class Flowed(NamedTuple):
    """The flow of a field at conditions c; from 1 to 0 where `reverse`."""

    field: VelocityField
    c: Tensor
    solver: Solver
    reverse: bool = False

    @property
    def dim(self) -> int:
        """D."""
        return self.field.event_dim

    def go(self, x: Tensor, back: bool, volume: bool) -> tuple[Tensor, Tensor]:
        """As `Linear.go`; the change of volume is zero unless `volume` asks for it."""
        shape = torch.broadcast_shapes(x.shape[:-1], self.c.shape[:-1])
        return flow(
            lambda t, place: self.field(t, place, self.c),
            x.expand(*shape, x.shape[-1]),
            self.solver,
            backwards=back != self.reverse,
            volume=volume,
        )


class TransportMap(Transform):
    r"""The bijection :math:`x \mapsto T(x; c)` at given conditions, a transform for torch and Pyro.

    ``T.inv`` goes from the target to the source; `log_abs_det_jacobian` is :math:`\log |\partial T / \partial x|`,
    integrated with the flow. All are differentiable in x, in c and in the weights; nothing is cached. With a solver of
    fixed steps the inverse is that of the flow itself, and differs from the map's by the solver's error.

    A row that is not finite goes to NaN.

    Arguments:
        stages: what x goes through, in this order.
        dtype: of the stages; what comes in is cast, and what goes out cast back.

    Raises:
        DataError: x has another dimension than the map.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, stages: Sequence[Linear | Flowed], dtype: torch.dtype) -> None:
        super().__init__(cache_size=0)
        self._stages, self._dtype = tuple(stages), dtype
        self._dim = self._stages[0].dim

    def _through(self, x: Tensor, back: bool, volume: bool = False) -> tuple[Tensor, Tensor]:
        if x.shape[-1:] != (self._dim,):
            raise DataError(
                f"{'y' if back else 'x'}: shape {tuple(x.shape)}, expected {self._dim} in the last dimension, which "
                "the map was made for"
            )
        place, total = x.to(self._dtype), x.new_zeros(())
        for stage in reversed(self._stages) if back else self._stages:
            place, change = stage.go(place, back, volume)
            total = total + change.to(x)
        return place.to(x), total

    def _call(self, x: Tensor) -> Tensor:
        return self._through(x, back=False)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._through(y, back=True)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |∂y/∂x| (...) at `x` (..., D); `y` is not read."""
        return self._through(x, back=False, volume=True)[1]

    def with_cache(self, cache_size: int = 1) -> TransportMap:
        """Itself: it keeps no cache."""
        return self


def standardised(middle: Tensor, scale: Tensor) -> Linear:
    """x ↦ (x − middle) / scale, coordinate by coordinate (D,)."""
    return Linear(middle, (1 / scale).diag(), scale.diag(), torch.zeros_like(middle), -scale.log().sum())
