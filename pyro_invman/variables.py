r"""What the cells of a row are: names, roles, supports, units, and the coordinates in which densities work."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributions import constraints

ROLES = ("parameter", "observation", "condition")
SUPPORTS = ("real", "positive", "interval", "categorical")


class DataError(ValueError):
    """Data, or a question about data, that cannot be used as it is; the message names what and where."""


@dataclass(frozen=True)
class Variable:
    """What one column of a table is.

    Arguments:
        name: unique in its table.
        role: ``parameter`` (what is set or wanted), ``observation`` (what is measured) or ``condition``.
        support: ``real``, ``positive``, ``interval`` (then `lower` and `upper`) or ``categorical`` (then `levels`).
        units: free text; checked for agreement between fit and use.
        lower, upper: ends of the interval, in those units.
        levels: names of the categories; a cell holds their index.
        resolution: the step to which values were rounded when recorded (1 for counts); 0 if none.
        informative: a parameter or condition that is evidence about the task, too.

    Raises:
        DataError: unknown role or support, an interval without finite ordered ends, no or repeated levels.

    Example::

        >>> Variable("power_W", "parameter", "positive", units="W").constraint
        GreaterThan(lower_bound=0.0)
    """

    name: str
    role: str
    support: str = "real"
    units: str = ""
    lower: float | None = None
    upper: float | None = None
    levels: tuple[str, ...] = ()
    resolution: float = 0.0
    informative: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise DataError(f"variable name: found {self.name!r}, expected a text that is not blank")
        if self.role not in ROLES:
            raise DataError(f"{self.name}: unknown role {self.role!r}; expected one of {list(ROLES)}")
        if self.support not in SUPPORTS:
            raise DataError(f"{self.name}: unknown support {self.support!r}; expected one of {list(SUPPORTS)}")
        if not isinstance(self.units, str):
            raise DataError(f"{self.name}: units must be text, found {self.units!r}")
        self._plain("lower", None if self.lower is None else self._number("lower"))
        self._plain("upper", None if self.upper is None else self._number("upper"))
        self._plain("resolution", self._number("resolution"))
        self._plain("informative", bool(self.informative))
        self._plain("levels", tuple(str(level) for level in self.levels))
        if self.support == "interval":
            if self.lower is None or self.upper is None or not -math.inf < self.lower < self.upper < math.inf:
                found = f"found {self.lower} and {self.upper}"
                raise DataError(f"{self.name}: support 'interval' needs finite lower < upper, {found}")
        elif self.lower is not None or self.upper is not None:
            raise DataError(f"{self.name}: lower and upper belong to support 'interval', not {self.support!r}")
        if self.discrete and (len(set(self.levels)) < max(1, len(self.levels)) or "" in self.levels):
            raise DataError(f"{self.name}: found levels {list(self.levels)}, expected different names, at least one")
        if self.levels and not self.discrete:
            raise DataError(f"{self.name}: levels belong to support 'categorical', not {self.support!r}")
        if not 0.0 <= self.resolution < math.inf or (self.discrete and self.resolution):
            expected = "0, as categories are not rounded" if self.discrete else "0 or a positive step"
            raise DataError(f"{self.name}: found resolution {self.resolution:g}, expected {expected}")

    def _plain(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def _number(self, field: str) -> float:
        try:
            return float(getattr(self, field))
        except (TypeError, ValueError):
            raise DataError(f"{self.name}: {field} must be a number, found {getattr(self, field)!r}") from None

    @property
    def discrete(self) -> bool:
        return self.support == "categorical"

    @property
    def constraint(self) -> constraints.Constraint:
        """The support as a constraint on one cell."""
        if self.support == "positive":
            return constraints.positive
        if self.support == "interval":
            return constraints.interval(self.lower, self.upper)
        if self.support == "categorical":
            return constraints.integer_interval(0, len(self.levels) - 1)
        return constraints.real

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"levels": list(self.levels)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Variable:
        """The variable that `to_dict` described.

        Raises:
            DataError: a field is missing or unknown.
        """
        try:
            return cls(**fields)
        except TypeError:
            raise DataError(f"variable {fields!r}: expected the fields {list(cls.__dataclass_fields__)}") from None


class Variables(Sequence[Variable]):
    """The D variables of a row, in the order of its columns.

    Raises:
        DataError: none, or two of one name.
    """

    def __init__(self, variables: Iterable[Variable]) -> None:
        self._variables = tuple(variables)
        self.names = tuple(v.name for v in self._variables)
        if not self.names:
            raise DataError("variables: none given; a row needs at least one")
        for position, name in enumerate(self.names):
            if name in self.names[:position]:
                raise DataError(f"variables: {name} appears twice (columns {self.names.index(name)} and {position})")

    @overload
    def __getitem__(self, index: int) -> Variable: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Variable, ...]: ...

    def __getitem__(self, index: int | slice) -> Variable | tuple[Variable, ...]:
        return self._variables[index]

    def __len__(self) -> int:
        return len(self._variables)

    def __iter__(self) -> Iterator[Variable]:
        return iter(self._variables)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variables) and self._variables == other._variables

    def __hash__(self) -> int:
        return hash(self._variables)

    def __repr__(self) -> str:
        return f"Variables({', '.join(f'{v.name}: {v.role}' for v in self)})"

    def index(self, name: Any, *args: Any) -> int:
        """Column of `name`.

        Raises:
            DataError: there is no such variable.
        """
        if name not in self.names:
            close = difflib.get_close_matches(str(name), self.names, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(self.names)}"
            raise DataError(f"unknown variable {name!r}; {hint}")
        return self.names.index(name)

    def indices(self, names: Iterable[str]) -> list[int]:
        """Columns of `names`."""
        return [self.index(name) for name in names]

    def with_role(self, role: str) -> tuple[str, ...]:
        """Names of the variables in a role."""
        if role not in ROLES:
            raise DataError(f"unknown role {role!r}; expected one of {list(ROLES)}")
        return tuple(v.name for v in self if v.role == role)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, for JSON."""
        return [v.to_dict() for v in self]

    @classmethod
    def from_list(cls, items: Iterable[dict[str, Any]]) -> Variables:
        """The variables that `to_list` described."""
        return cls(Variable.from_dict(item) for item in items)


class Standardization(nn.Module):
    r"""Natural units to working coordinates, cell by cell:

    .. math:: u = (h(v) - m) / s, \qquad \log|du/dv| = \log h'(v) - \log s

    with h the logarithm for a positive variable and the identity for a real or interval one; m and s are the mean and
    standard deviation of h over the observed cells. A categorical cell keeps its code. NaN stays NaN, and gradients
    elsewhere stay finite. Inner arithmetic and the buffers `loc` and `scale` (D,) stay in double precision whatever
    the dtype of the module: a large mean would eat the digits of the cells. Results have the dtype of the argument.

    Every method takes `index`, the columns that the last dimension of its argument holds (default: all D).

    Arguments:
        variables: the D columns. A new instance has loc 0 and scale 1; see `fit`.

    Example::

        >>> variables = Variables([Variable("width_um", "observation", "positive", units="um")])
        >>> values = torch.tensor([[10.0], [float("nan")], [1000.0]], dtype=torch.float64)
        >>> Standardization.fit(variables, values)(values)[:, 0]
        tensor([-1.0000,     nan,  1.0000], dtype=torch.float64)
    """

    loc: Tensor
    scale: Tensor
    _log: Tensor
    _fixed: Tensor
    _ends: Tensor

    def __init__(self, variables: Variables) -> None:
        super().__init__()
        ends = [
            (-math.inf if v.lower is None else v.lower, math.inf if v.upper is None else v.upper) for v in variables
        ]
        self.names = variables.names
        self.register_buffer("loc", torch.zeros(len(variables), dtype=torch.float64))
        self.register_buffer("scale", torch.ones(len(variables), dtype=torch.float64))
        self.register_buffer("_log", torch.tensor([v.support == "positive" for v in variables]), persistent=False)
        self.register_buffer("_fixed", torch.tensor([v.discrete for v in variables]), persistent=False)
        self.register_buffer("_ends", torch.tensor(ends, dtype=torch.float64).T.contiguous(), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Standardization:
        """Moves with the module it is part of, but keeps its digits."""
        kept = {name: self._buffers[name] for name in ("loc", "scale", "_ends")}
        super()._apply(fn, recurse)
        for name, double in kept.items():
            if double is not None and self._buffers[name] is not None and not double.is_meta:
                self._buffers[name] = double.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self

    @classmethod
    def fit(cls, variables: Variables, values: Tensor) -> Standardization:
        """The standardization of rows (N, D) in natural units, NaN where not measured.

        A column without observed cells keeps loc 0; one without spread keeps scale 1.

        Raises:
            DataError: wrong shape, an infinite cell, or a positive variable with a cell that is not.
        """
        new = cls(variables)
        if values.dim() != 2 or values.shape[-1] != len(variables):
            raise DataError(f"values: found shape {tuple(values.shape)}, expected (N, {len(variables)})")
        values = values.to(new.loc)
        seen = ~values.isnan()
        bad = values.isinf() | (new._log & (values <= 0))
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            kind = "positive, finite" if new._log[column] else "finite"
            found = f"{values[row, column].item():g}"
            raise DataError(f"{new.names[column]}, row {row}: found {found}, expected a {kind} number or NaN")
        h = torch.where(seen, torch.where(new._log & seen, values, 1.0).log().where(new._log, values), 0.0)
        count = seen.sum(0).clamp_min(1)
        loc = h.sum(0) / count
        scale = ((h - loc).square().where(seen, 0.0).sum(0) / count).sqrt()
        # the mean of equal numbers is off by its rounding, which is not a spread
        spread = scale > 1e-14 * loc.abs()
        new.loc.copy_(loc.masked_fill(new._fixed, 0.0))
        new.scale.copy_(scale.where(spread & ~new._fixed, 1.0))
        return new

    @property
    def lower(self) -> Tensor:
        """Lower bounds (D,) in working coordinates, −inf where there is none."""
        return (self._ends[0] - self.loc) / self.scale

    @property
    def upper(self) -> Tensor:
        """Upper bounds (D,) in working coordinates, inf where there is none."""
        return (self._ends[1] - self.loc) / self.scale

    def _columns(self, index: Sequence[int] | Tensor | None, cells: Tensor) -> Tensor:
        device = self.loc.device
        columns = torch.arange(len(self.loc), device=device) if index is None else torch.as_tensor(index, device=device)
        if cells.dim() == 0 or cells.shape[-1] != len(columns):
            found = f"found shape {tuple(cells.shape)}"
            raise DataError(f"values: {found}, expected (..., {len(columns)}), a cell for each column")
        return columns.long()

    def forward(self, values: Tensor, index: Sequence[int] | Tensor | None = None) -> Tensor:
        """Natural units (..., D) to working coordinates (..., D)."""
        columns = self._columns(index, values)
        log, missing = self._log[columns], values.isnan()
        # fill before the logarithm, mask after: a NaN that only `where` hides still ruins the gradient
        v = torch.where(missing, 1.0, values.to(self.loc.dtype))
        u = (torch.where(log, torch.where(log, v, 1.0).log(), v) - self.loc[columns]) / self.scale[columns]
        return torch.where(missing, math.nan, u).to(torch.result_type(values, 1.0))

    def inverse(self, working: Tensor, index: Sequence[int] | Tensor | None = None) -> Tensor:
        """Working coordinates (..., D) to natural units (..., D).

        What lies past an end of its interval by rounding only (1e-5 of its length) is put on that end.
        """
        columns = self._columns(index, working)
        log, missing = self._log[columns], working.isnan()
        lower, upper = self._ends[:, columns]
        h = torch.where(missing, 0.0, working.to(self.loc.dtype)) * self.scale[columns] + self.loc[columns]
        rounding = 1e-5 * (upper - lower)
        h = torch.where((h < lower) & (h > lower - rounding), lower, h)
        h = torch.where((h > upper) & (h < upper + rounding), upper, h)
        v = torch.where(log, torch.where(log, h, 0.0).exp(), h)
        return torch.where(missing, math.nan, v).to(torch.result_type(working, 1.0))

    def log_abs_det_jacobian(self, values: Tensor, index: Sequence[int] | Tensor | None = None) -> Tensor:
        """log |du/dv| of each cell (..., D) of `values` in natural units; 0 for a categorical or missing one."""
        columns = self._columns(index, values)
        log, missing = self._log[columns], values.isnan()
        v = torch.where(log & ~missing, values.to(self.loc.dtype), 1.0)
        result = -v.log() - self.scale[columns].log()
        return torch.where(missing | self._fixed[columns], 0.0, result).to(torch.result_type(values, 1.0))


def unrounded(values: Tensor, variables: Variables, generator: torch.Generator) -> Tensor:
    """Cells (..., D) drawn anew, uniformly among the values that would have been recorded as they were."""
    half = values.new_tensor([v.resolution / 2 for v in variables])
    least = values.new_tensor([-math.inf if v.lower is None else v.lower for v in variables])
    most = values.new_tensor([math.inf if v.upper is None else v.upper for v in variables])
    positive = torch.tensor([v.support == "positive" for v in variables])
    low = (values - half).maximum(least)
    low = torch.where(positive, low.maximum(1e-3 * values), low)
    high = (values + half).minimum(most)
    return low + (high - low) * torch.rand(values.shape, generator=generator, dtype=values.dtype)
