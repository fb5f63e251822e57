r"""Answers set right by held-out ones: wider or narrower, or intervals that hold as often as they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from pyro_invman.diagnostics.answers import Answers
from pyro_invman.variables import DataError, Variable

_DRAWS = 1024


# ---------------------------------------------------------------------------------------------- wider or narrower
class Temperature(NamedTuple):
    """What the variance of answers is to be multiplied by, with its standard error (over tasks, where there are some).

    `bias` (n,) is the mean error of each target in units of the answer's standard deviation, with `bias_error`; it is
    reported, not mended.
    """

    value: float
    std_error: float
    bias: tuple[float, ...]
    bias_error: tuple[float, ...]
    questions: int


def residuals(asked: Answers) -> Tensor:
    """Errors (N, n) in units of the answers' own standard deviation, of logarithms where positive; NaN for categories
    and missing truths."""
    truth, draws = asked.working()
    score = (truth - draws.mean(0)) / draws.std(0).clamp_min(1e-30)
    discrete = torch.tensor([v.discrete for v in asked.variables])
    # finitely many draws: errors of their mean and spread are part of the residual (exact for normal answers)
    number = max(4, len(draws))
    return score.masked_fill(discrete, math.nan) / math.sqrt((1 + 1 / number) * (number - 1) / (number - 3))


def temperature(asked: Answers) -> Temperature:
    r"""How much too narrow answers are, by held-out questions:

    .. math:: \tau = \frac{1}{N} \sum_n \left(\frac{t_n - m_n}{s_n}\right)^2,

    m and s the mean and standard deviation of an answer. Its expectation is 1 where answers are right, whatever their
    shape; for normal answers of the right mean it is the temperature of greatest likelihood.

    Raises:
        DataError: no target is a number.

    Example::

        >>> from pyro_invman.diagnostics import answers
        >>> d = torch.distributions.Normal(torch.zeros(2000), 1.0)
        >>> found = temperature(answers(d, 2.0 * d.sample()))
        >>> abs(found.value - 4.0) < 4 * found.std_error
        True
    """
    scores = residuals(asked)
    squares = scores.square()
    if not bool((~squares.isnan()).any()):
        raise DataError(f"{asked.name}: found no target that is a number, expected one to set right")
    value, error = _mean_over_tasks(squares.flatten(), _tasks(asked, scores.shape[-1]))
    each = [_mean_over_tasks(column, _tasks(asked, 1)) for column in scores.unbind(-1)]
    return Temperature(value, error, tuple(m for m, _ in each), tuple(e for _, e in each), len(asked))


def _tasks(asked: Answers, repeats: int) -> Tensor:
    names = asked.labels.get("task") or [str(i) for i in range(len(asked))]
    place = {name: t for t, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([place[name] for name in names]).repeat_interleave(repeats)


def _mean_over_tasks(values: Tensor, task: Tensor) -> tuple[float, float]:
    """Mean, and its standard error if whole tasks were drawn."""
    seen = ~values.isnan()
    values, task = values[seen], task[seen]
    if not len(values):
        return math.nan, math.nan
    mean = values.mean()
    sums = torch.zeros(int(task.max()) + 1, dtype=values.dtype).index_add(0, task, values - mean)
    number = len(task.unique())
    error = (sums.square().sum() * number / max(1, number - 1)).sqrt() / len(values)
    return float(mean), float(error) if number > 1 else math.nan


class Tempered(TorchDistribution):
    r"""An answer that is as wide as held-out questions say it should be.

    .. math:: q_\tau(t) = \tau^{-n/2}\, q\left(m + (t - m) / \sqrt\tau\right),

    m the mean of q (from 1,024 draws); in logarithms, for positive targets. For a normal q that is the density raised
    to the power 1/τ and normalised; for others it keeps the shape. Exact and normalised, since it moves points only.

    Arguments:
        answer: event shape (n,), with `variables` and `targets`, as a flow or a task gives it.
        value: τ, the variance's factor.

    Raises:
        DataError: τ is not positive, or a target is categorical or an interval, whose ends it would leave.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, answer: Any, value: float, validate_args: bool | None = None) -> None:
        if not 0 < value < math.inf:
            raise DataError(f"temperature: found {value:g}, expected a positive number")
        self.answer, self.value = answer, float(value)
        for v in self._variables():
            if v.support not in ("real", "positive"):
                raise DataError(f"{v.name}: found support {v.support!r}, expected 'real' or 'positive' to be widened")
        self._log = torch.tensor([v.support == "positive" for v in self._variables()])
        super().__init__(answer.batch_shape, answer.event_shape, validate_args=validate_args)

    def _variables(self) -> list[Variable]:
        known = self.answer.variables
        return [known[known.index(name)] for name in self.answer.targets]

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        """That of the answer."""
        return self.answer.support

    @lazy_property
    def _centre(self) -> Tensor:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return self._forth(self.answer.sample(torch.Size((_DRAWS,)))).mean(0)

    def _forth(self, cells: Tensor) -> Tensor:
        return torch.where(self._log, torch.where(self._log, cells, 1.0).log(), cells)

    def _back(self, cells: Tensor) -> Tensor:
        return torch.where(self._log, torch.where(self._log, cells, 0.0).exp(), cells)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density (*sample_shape, *batch_shape) of `value` (*sample_shape, *batch_shape, n)."""
        u = self._forth(value)
        inner = self._centre + (u - self._centre) / math.sqrt(self.value)
        narrow = self._back(inner)
        # d inner / d value: along logarithms, each positive target carries the ratio of the two
        logs = torch.where(self._log, inner - u, torch.zeros_like(u)) - math.log(self.value) / 2
        logs = logs.masked_fill(value.isnan(), 0.0)
        return self.answer.log_prob(narrow) + logs.sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (*sample_shape, *batch_shape, n), without gradient."""
        with torch.no_grad():
            u = self._forth(self.answer.sample(torch.Size(sample_shape)))
            return self._back(self._centre + math.sqrt(self.value) * (u - self._centre))

    def expand(self, batch_shape: Any, _instance: Tempered | None = None) -> Tempered:
        """The same law over a larger batch."""
        new = self._get_checked_instance(type(self), _instance)
        new.answer, new.value, new._log = self.answer.expand(torch.Size(batch_shape)), self.value, self._log
        new._centre = self._centre
        super(Tempered, new).__init__(new.answer.batch_shape, new.answer.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


# ---------------------------------------------------------------------------------------------- conformal intervals
class Conformal(NamedTuple):
    r"""Intervals that hold a new truth with probability at least `level`, if the question is exchangeable with those
    that they were set by; whatever the model's faults.

    `stretch` (n,) is what the central interval of an answer is lengthened by at each end, in units of its length (of
    logarithms, for positive targets); `tasks` is how many tasks it stands on.
    """

    level: float
    stretch: tuple[float, ...]
    positive: tuple[bool, ...]
    tasks: int

    def interval(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Ends (..., n) of the intervals of answers of which `draws` (S, ..., n) are at hand."""
        log, draws = torch.tensor(self.positive), draws.double()
        low, high = _central(torch.where(log, draws.clamp_min(1e-300).log(), draws), self.level)
        more = torch.tensor(self.stretch, dtype=torch.float64) * (high - low)
        ends = low - more, high + more
        return tuple(torch.where(log, end.exp(), end) for end in ends)  # type: ignore[return-value]


def conformal(asked: Answers, level: float = 0.9, seed: int = 0) -> Conformal:
    r"""Split-conformal intervals by held-out answers.

    With :math:`[l_n, h_n]` the central interval of an answer the score is
    :math:`\max(l_n - t_n, t_n - h_n) / (h_n - l_n)`, and the stretch is its
    :math:`\lceil (N + 1) c \rceil`-th smallest. Of each task one question is taken at random, since those of a task are
    not exchangeable with those of another.

    Raises:
        DataError: too few tasks for the level, or a categorical target.

    Example::

        >>> from pyro_invman.diagnostics import answers
        >>> d = torch.distributions.Normal(torch.zeros(500), 1.0)
        >>> found = conformal(answers(d, 3.0 * d.sample()), level=0.8)
        >>> low, high = found.interval(torch.randn(4000, 1))
        >>> float((3 * torch.randn(4000) < high).float().mean() - (3 * torch.randn(4000) < low).float().mean()) > 0.7
        True

    References:
        Romano, Patterson & Candès, *Conformalized quantile regression*, NeurIPS 2019.
        Dunn, Wasserman & Ramdas, *Distribution-free prediction sets for two-layer hierarchical models*, JASA 2023.
    """
    if any(v.discrete for v in asked.variables):
        raise DataError(f"{asked.name}: found a categorical target, expected numbers")
    truth, draws = asked.working()
    low, high = _central(draws, level)
    scores = torch.maximum(low - truth, truth - high) / (high - low).clamp_min(1e-30)
    generator = torch.Generator().manual_seed(seed)
    task = _tasks(asked, 1)
    stretch, fewest = [], len(asked)
    for v, column in zip(asked.variables, scores.unbind(-1), strict=True):
        order = torch.randperm(len(column), generator=generator)
        order = order[~column[order].isnan()]
        first = {int(task[i]): float(column[i]) for i in order.tolist()}
        needed = math.ceil((len(first) + 1) * level)
        if needed > len(first):
            least = math.ceil(level / (1 - level) - 1e-9)
            raise DataError(f"{v.name}: found {len(first)} held-out tasks, expected at least {least} for {level:.0%}")
        stretch.append(sorted(first.values())[needed - 1])
        fewest = min(fewest, len(first))
    return Conformal(level, tuple(stretch), tuple(v.support == "positive" for v in asked.variables), fewest)


def _central(draws: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Ends (..., n) of the central interval of draws (S, ..., n); NaN where they are."""
    ends: Sequence[float] = ((1 - level) / 2, (1 + level) / 2)
    low, high = draws.quantile(torch.tensor(ends, dtype=draws.dtype), dim=0)
    return low, high
