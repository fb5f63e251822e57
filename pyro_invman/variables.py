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
    """A named column.

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
        DataError: unknown role or support, an interval without finite ordered ends, too few or repeated levels.
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
        if not isinstance(self.name, str) or not self.name:
            raise DataError(f"variable name: found {self.name!r}, expected a non-empty string")
        if self.role not in ROLES:
            raise DataError(f"{self.name}: unknown role {self.role!r}; expected one of {list(ROLES)}")
        if self.support not in SUPPORTS:
            raise DataError(f"{self.name}: unknown support {self.support!r}; expected one of {list(SUPPORTS)}")
        if self.support == "interval":
            if self.lower is None or self.upper is None or not -math.inf < self.lower < self.upper < math.inf:
                raise DataError(f"{self.name}: an interval needs finite lower < upper, found {self.lower} and {self.upper}")
        elif self.lower is not None or self.upper is not None:
            raise DataError(f"{self.name}: lower and upper belong to support 'interval', not {self.support!r}")
        object.__setattr__(self, "levels", tuple(str(level) for level in self.levels))
        if self.discrete and (len(self.levels) < 2 or len(set(self.levels)) < len(self.levels)):
            raise DataError(f"{self.name}: expected at least two different levels, found {list(self.levels)}")
        if self.levels and not self.discrete:
            raise DataError(f"{self.name}: levels belong to support 'categorical', not {self.support!r}")
        if not 0.0 <= self.resolution < math.inf:
            raise DataError(f"{self.name}: resolution must be zero or a positive step, found {self.resolution}")

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
        """What `to_dict` gave."""
        return cls(**{**fields, "levels": tuple(fields.get("levels", ()))})


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
        """What `to_list` gave."""
        return cls(Variable.from_dict(item) for item in items)


class Standardization(nn.Module):
    r"""Natural units to working coordinates, cell by cell:

    .. math:: u = (h(v) - m) / s, \qquad \log|du/dv| = \log h'(v) - \log s

    with h the logarithm for a positive variable and the identity for a real or interval one; m and s are the mean and
    standard deviation of h over the observed cells. A categorical cell keeps its code. NaN stays NaN, and gradients
    elsewhere stay finite.

    Every method takes `index`, the columns that the last dimension of its argument holds (default: all D).
    """

    loc: Tensor
    scale: Tensor
    _log: Tensor
    _fixed: Tensor

    def __init__(self, variables: Variables) -> None:
        super().__init__()
        self._ends = [(v.lower, v.upper) for v in variables]
        dim = len(variables)
        self.register_buffer("loc", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("_log", torch.tensor([v.support == "positive" for v in variables]), persistent=False)
        self.register_buffer("_fixed", torch.tensor([v.discrete for v in variables]), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the module, but stays in double precision: a large mean would eat the digits of the cells."""
        super()._apply(fn, recurse)
        self.loc, self.scale = self.loc.double(), self.scale.double()
        return self

    @classmethod
    def fit(cls, variables: Variables, values: Tensor) -> Standardization:
        """From rows (N, D) in natural units with NaN; a column with no spread keeps scale one."""
        new = cls(variables)
        values = values.to(new.loc)
        seen = ~values.isnan()
        h = torch.where(new._log, values.nan_to_num(1.0).clamp_min(torch.finfo(torch.float64).tiny).log(), values.nan_to_num(0.0))
        count = seen.sum(0).clamp_min(1)
        loc = (h * seen).sum(0) / count
        scale = (((h - loc).square() * seen).sum(0) / count).sqrt()
        new.loc.copy_(torch.where(new._fixed, 0.0, loc))
        new.scale.copy_(torch.where(new._fixed | (scale <= 0), 1.0, scale))
        return new

    @property
    def lower(self) -> Tensor:
        """Lower bounds (D,) in working coordinates, −inf where there is none."""
        ends = torch.tensor([-math.inf if low is None else low for low, _ in self._ends], dtype=torch.float64)
        return (ends.to(self.loc.device) - self.loc) / self.scale

    @property
    def upper(self) -> Tensor:
        """Upper bounds (D,) in working coordinates, inf where there is none."""
        ends = torch.tensor([math.inf if high is None else high for _, high in self._ends], dtype=torch.float64)
        return (ends.to(self.loc.device) - self.loc) / self.scale

    def _parts(self, index: Sequence[int] | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = (self._log, self._fixed, self.loc, self.scale)
        columns = list(range(len(self.loc))) if index is None else list(index)
        if like.shape[-1] != len(columns):
            raise DataError(f"values: the last dimension has {like.shape[-1]} cells, expected {len(columns)}")
        log, fixed, loc, scale = (part[columns] for part in parts)
        return log, fixed, loc, scale

    def forward(self, values: Tensor, index: Sequence[int] | None = None) -> Tensor:
        """Natural units (..., D) to working coordinates (..., D)."""
        log, _, loc, scale = self._parts(index, values)
        safe = torch.where(log & ~values.isnan(), values, 1.0)
        result = (torch.where(log, safe.log(), values.nan_to_num(0.0)) - loc) / scale
        return torch.where(values.isnan(), math.nan, result.to(values.dtype))

    def inverse(self, working: Tensor, index: Sequence[int] | None = None) -> Tensor:
        """Working coordinates (..., D) to natural units (..., D)."""
        log, _, loc, scale = self._parts(index, working)
        h = torch.where(working.isnan(), 0.0, working) * scale + loc
        natural = torch.where(log, torch.where(log, h, 0.0).exp(), h)
        return torch.where(working.isnan(), math.nan, natural.to(working.dtype))

    def log_abs_det_jacobian(self, values: Tensor, index: Sequence[int] | None = None) -> Tensor:
        """log |du/dv| of each cell (..., D); 0 for a categorical or missing one."""
        log, fixed, _, scale = self._parts(index, values)
        safe = torch.where(log & ~values.isnan(), values, 1.0)
        result = torch.where(log, -safe.log(), 0.0) - scale.log()
        return torch.where(values.isnan() | fixed, 0.0, result).to(values.dtype)
