r"""Conditionals of a learned density as ordinary Pyro distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_invman.density.anyorder import AnyOrderFlow
from pyro_invman.variables import DataError, Standardization, Variable, Variables

_QUASI_DRAWS = 1024
_BLOCK = 2_500  # rows a block of draws


class ConditionalFlow(TorchDistribution):
    r"""p(targets | given), read off an any-order flow, in natural units.

    .. math:: \log p(t \mid g) = \sum_k \log p(t_k \mid g, t_{<k}) + \sum_k \log \left| \frac{d u_k}{d t_k} \right|

    with :math:`u` the working coordinates of the flow. Exact and normalised; differentiable in the value, in the given
    cells and in the weights. `rsample` inverts each factor and is differentiable too, unless a target is categorical.
    The density is with respect to Lebesgue measure on real targets times counting measure on categorical ones.

    Arguments:
        density: the flow.
        standardization: natural units to working coordinates.
        variables: all D variables of a row.
        targets: names of the n targets, which order the last dimension.
        given: the row in natural units (*batch_shape, D), NaN where a cell is not given.
        latent: the task's latent (*batch_shape, L), for a flow whose last L columns it is; always known. It broadcasts
            against `given`.
        anchor: what the flow's base has worked out for `given`, if no target changes it.

    Shapes:
        batch_shape is that of `given` without its last dimension, event_shape is (n,). A NaN in the value handed to
        `log_prob` marginalises that target.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        density: AnyOrderFlow,
        standardization: Standardization,
        variables: Variables,
        targets: Sequence[str],
        given: Tensor,
        latent: Tensor | None = None,
        validate_args: bool | None = None,
        anchor: Any = None,
    ) -> None:
        self.anchor = anchor
        self.density, self.standardization, self.variables = density, standardization, variables
        self.targets = tuple(targets)
        self.columns = variables.indices(self.targets)
        self.given, self.latent = given, latent
        # the chain runs in the order of the variables, whatever order they were asked for in
        self._chain = sorted(self.columns)
        self._to_chain = [self.columns.index(c) for c in self._chain]
        self._from_chain = [self._chain.index(c) for c in self.columns]
        self.has_rsample = not self._discrete
        shape = given.shape[:-1]
        if latent is not None:
            shape = torch.broadcast_shapes(shape, latent.shape[:-1])
        super().__init__(shape, torch.Size((len(self.columns),)), validate_args=validate_args)

    @property
    def _discrete(self) -> bool:
        return any(self.variables[c].discrete for c in self.columns)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        """The product of the targets' supports."""
        each = [self.variables[c].constraint for c in self.columns]
        if all(c is each[0] for c in each):
            return constraints.independent(each[0], 1)
        return constraints.independent(constraints.cat(each, -1, [1] * len(each)), 1)

    def _working(self) -> tuple[Tensor, Tensor]:
        weights = self.density.out.weight
        known = ~self.given.isnan()
        row = self.standardization(self.given).nan_to_num(0.0).to(weights.dtype)
        if self.latent is None:
            return row, known
        latent = self.latent.to(weights.dtype)
        shape = torch.broadcast_shapes(row.shape[:-1], latent.shape[:-1])
        row = torch.cat([row.expand(*shape, -1), latent.expand(*shape, -1)], -1)
        # not expanded: rows that know the same cells share an inverse
        return row, torch.nn.functional.pad(known, (0, latent.shape[-1]), value=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*sample_shape, *batch_shape) of `value` (*sample_shape, *batch_shape, n)."""
        if self._validate_args:
            self._validate_sample(value)
        given, known = self._working()
        value = value[..., self._to_chain]
        missing = value.isnan()
        working = self.standardization(value, index=self._chain)
        jacobian = self.standardization.log_abs_det_jacobian(value, index=self._chain)
        wanted = None if not _any(missing) else ~missing
        answers = working.nan_to_num(0.0).to(given.dtype)
        result = self.density.log_prob(given, known, self._chain, answers, wanted, self.anchor).to(jacobian.dtype)
        result = result + jacobian.masked_fill(missing, 0.0).sum(-1)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    def _draw(self, shape: torch.Size, uniform: Tensor | None) -> Tensor:
        given, known = self._working()
        working = self.density.draw(given, known, self._chain, shape, uniform, anchor=self.anchor)
        natural = self.standardization.inverse(working.to(self.given.dtype), index=self._chain)
        low, high = self._ends(natural)
        return natural.clamp(low, high)[..., self._from_chain]

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the supports along the chain; going back to natural units may round a draw across one."""
        tiny = torch.finfo(like.dtype).tiny
        ends = [self.variables[c] for c in self._chain]
        low = [tiny if v.support == "positive" else -math.inf if v.lower is None else v.lower for v in ends]
        high = [math.inf if v.upper is None else v.upper for v in ends]
        return like.new_tensor(low), like.new_tensor(high)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Differentiable draws (*sample_shape, *batch_shape, n): each factor's quantile at a uniform draw."""
        if self._discrete:
            raise NotImplementedError("rsample: a categorical target has no differentiable draw; use sample")
        shape = torch.Size(sample_shape) + self.batch_shape
        weights = self.density.out.weight
        uniform = torch.rand(*shape, len(self.columns), dtype=weights.dtype, device=weights.device)
        tiny = torch.finfo(weights.dtype).eps
        return self._draw(shape, uniform.clamp(tiny, 1 - tiny))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (*sample_shape, *batch_shape, n), without gradient; made in blocks, which stay in cache."""
        sample_shape = torch.Size(sample_shape)
        number, block = sample_shape.numel(), max(1, _BLOCK // max(1, self.batch_shape.numel()))
        with torch.no_grad():
            sizes = [block] * (number // block) + [number % block] * (number % block > 0) or [0]
            blocks = [self._draw(torch.Size((size, *self.batch_shape)), None) for size in sizes]
        return torch.cat(blocks).reshape(sample_shape + self.batch_shape + self.event_shape)

    def expand(self, batch_shape: Any, _instance: ConditionalFlow | None = None) -> ConditionalFlow:
        """The same law over a larger batch; the given cells are not copied."""
        new = self._get_checked_instance(type(self), _instance)
        for name in (
            "density",
            "standardization",
            "variables",
            "targets",
            "columns",
            "given",
            "latent",
            "anchor",
            "_chain",
            "_to_chain",
            "_from_chain",
            "has_rsample",
        ):
            setattr(new, name, getattr(self, name))
        batch_shape = torch.Size(batch_shape)
        if torch.broadcast_shapes(self.batch_shape, batch_shape) != batch_shape:
            raise ValueError(f"expand: batch_shape {tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}")
        super(ConditionalFlow, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _validate_sample(self, value: Tensor) -> None:
        if value.shape[-1:] != self.event_shape:
            raise DataError(
                f"value: the last dimension has {value.shape[-1] if value.dim() else 'no'} entries, expected "
                f"{len(self.columns)}, one for each of {list(self.targets)}"
            )
        try:
            torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        except RuntimeError as error:
            raise DataError(
                f"value: shape {tuple(value.shape[:-1])} before the last dimension does not broadcast against "
                f"batch_shape {tuple(self.batch_shape)}"
            ) from error
        for position, column in enumerate(self.columns):
            variable, cells = self.variables[column], value[..., position]
            bad = ~(variable.constraint.check(cells) | cells.isnan()) | cells.isinf()
            if bool(bad.any()):
                where = tuple(bad.nonzero()[0].tolist())
                raise DataError(
                    f"value of {variable.name} at {where}: found {cells[where].item():g}, outside its support "
                    f"{variable.support}"
                )

    # ------------------------------------------------------------------ moments, by quasi-Monte Carlo
    @lazy_property
    def _quasi_draws(self) -> Tensor:
        with torch.no_grad():
            if self._discrete:
                return self.sample(torch.Size((_QUASI_DRAWS,)))
            weights = self.density.out.weight
            points = (
                torch.quasirandom.SobolEngine(len(self.columns), scramble=True, seed=0).draw(_QUASI_DRAWS).to(weights)
            )
            points = points.clamp(1e-6, 1 - 1e-6).reshape(_QUASI_DRAWS, *[1] * len(self.batch_shape), len(self.columns))
            return self._draw(
                torch.Size((_QUASI_DRAWS, *self.batch_shape)),
                points.expand(_QUASI_DRAWS, *self.batch_shape, -1),
            )

    @property
    def mean(self) -> Tensor:
        """Mean (*batch_shape, n), from 1,024 quasi-random draws."""
        return self._quasi_draws.mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance (*batch_shape, n), from 1,024 quasi-random draws."""
        return self._quasi_draws.var(0)

    def __repr__(self) -> str:
        known = [v.name for i, v in enumerate(self.variables) if not bool(self.given[..., i].isnan().all())]
        given = ", ".join(known) or "nothing"
        return f"ConditionalFlow({', '.join(self.targets)} | {given}; batch_shape={tuple(self.batch_shape)})"


def _any(mask: Tensor) -> bool:
    if torch._C._get_tracing_state():  # a trace must not depend on values: always take the masked path
        return True
    return bool(mask.any())


def stack_given(variables: Variables, given: dict[str, Any] | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The row (*batch_shape, D) in natural units that holds the given cells, NaN elsewhere.

    Raises:
        DataError: unknown names, values outside a support, shapes that do not broadcast.
    """
    cells: dict[int, Tensor] = {}
    for name, value in (given or {}).items():
        column = variables.index(name)
        variable = variables[column]
        cell = value if isinstance(value, Tensor) else _cells(variable, value, dtype)
        cell = cell.to(dtype) if not cell.is_floating_point() else cell
        bad = ~(variable.constraint.check(cell) | cell.isnan()) | cell.isinf()
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            raise DataError(
                f"given {name} at {where}: found {cell[where].item():g}, outside its support {variable.support}"
            )
        cells[column] = cell
    try:
        # the empty shape stands for no givens, of which torch's jit can make nothing
        shape = torch.broadcast_shapes(torch.Size(), *(cell.shape for cell in cells.values()))
    except RuntimeError as error:
        shapes = {variables[c].name: tuple(cell.shape) for c, cell in cells.items()}
        raise DataError(f"given: shapes {shapes} do not broadcast against each other") from error
    for cell in cells.values():
        dtype = torch.promote_types(dtype, cell.dtype)
    absent = torch.full(shape, math.nan, dtype=dtype)
    return torch.stack([cells[c].to(dtype).expand(shape) if c in cells else absent for c in range(len(variables))], -1)


def _cells(variable: Variable, value: Any, dtype: torch.dtype) -> Tensor:
    """Numbers, level names, sequences and arrays of them as a tensor; plain numbers get `dtype`."""
    code = _code(variable, value)
    try:
        return torch.as_tensor(code, dtype=None if hasattr(code, "dtype") else dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"given {variable.name}: found {value!r}, expected numbers or a tensor of them") from error


def _code(variable: Variable, value: Any) -> Any:
    """Level names of a categorical variable to codes; everything else as it is."""
    if not variable.discrete:
        return value
    if hasattr(value, "tolist"):  # arrays of texts have no other way to a tensor
        value = value.tolist()
    if isinstance(value, str):
        if value not in variable.levels:
            raise DataError(f"given {variable.name}: unseen level {value!r}; known: {list(variable.levels)}")
        return float(variable.levels.index(value))
    if isinstance(value, (list, tuple)):
        return [_code(variable, v) for v in value]
    return value
