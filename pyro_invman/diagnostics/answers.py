r"""Questions whose answer is known, and what a model says to them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_invman.data import labels_of, to_tensor
from pyro_invman.tasks.typicality import UnfamiliarTask
from pyro_invman.variables import DataError, Variable, Variables

if TYPE_CHECKING:
    import xarray as xr

CONTEXT_SIZES = (0, 1, 2, 3, 5, 8, 13)
_AT_ONCE = 256  # questions to a flow in one pass
_TIES = 1e-9


class Conditionals(Protocol):
    """Whatever hands out p(targets | given): a `JointFlow`, a `TaskPosterior`, an exact process."""

    def conditional(self, targets: Sequence[str], given: Any = None) -> Any:
        """p(targets | given)"""


@dataclass(frozen=True, eq=False)
class Answers:
    """What was said to N questions with known answers, and the answers.

    Arguments:
        variables: the n targets.
        given: names of what may be given.
        truth: (N, n) in natural units, NaN where a target was not measured.
        draws: (S, N, n), NaN where `truth` is.
        log_prob: of the truth (N,), in nats.
        log_prob_of_draws: (S, N).
        nothing: log-density (N,) of the truth where nothing is known of its row or task, NaN where that was not asked.
        labels: the stratum of each question, by kind: `k` (rows known of the task), `pattern` (what is missing among
            the givens), `source`, `task`.
        rows: which row of the table each question is about (N,).
    """

    variables: tuple[Variable, ...]
    given: tuple[str, ...]
    truth: Tensor
    draws: Tensor
    log_prob: Tensor
    log_prob_of_draws: Tensor
    nothing: Tensor
    labels: dict[str, list[str]]
    rows: Tensor

    @property
    def name(self) -> str:
        """ "targets | given"."""
        return f"{', '.join(v.name for v in self.variables)} | {', '.join(self.given) or 'nothing'}"

    def __len__(self) -> int:
        return len(self.truth)

    def select(self, which: Tensor) -> Answers:
        """Those questions of which `which` (N,) is true."""
        index = which.nonzero()[:, 0]
        labels = {kind: [labels[i] for i in index.tolist()] for kind, labels in self.labels.items()}
        return replace(
            self,
            truth=self.truth[index],
            draws=self.draws[:, index],
            log_prob=self.log_prob[index],
            log_prob_of_draws=self.log_prob_of_draws[:, index],
            nothing=self.nothing[index],
            labels=labels,
            rows=self.rows[index],
        )

    def strata(self, fewest: int = 10) -> dict[str, Tensor]:
        """Masks (N,) by name: "all", then each stratum of `k`, `pattern` and `source` with enough questions that is
        not all of them."""
        found = {"all": torch.ones(len(self), dtype=torch.bool)}
        for kind in ("k", "pattern", "source"):
            labels = self.labels.get(kind, [])
            for label in dict.fromkeys(sorted(labels, key=_in_order)):
                which = torch.tensor([each == label for each in labels])
                if fewest <= int(which.sum()) < len(self):
                    found[f"{kind}: {label}"] = which
        return found

    def levels(self, seed: int = 0) -> Tensor:
        """Probability integral transforms (N, n) of the truths by their ranks among the draws, ties and the last
        digit at random: uniform where the model is right, NaN where a truth is missing."""
        below = (self.draws < self.truth).sum(0)
        ties = (self.draws == self.truth).sum(0)
        return _level(below, ties, len(self.draws), seed).masked_fill(self.truth.isnan(), math.nan)

    def credibility(self, seed: int = 0) -> Tensor:
        """Content (N,) of the least highest-density region that holds the truth: uniform where the model is right."""
        slack = _TIES * self.log_prob.abs().clamp_min(1.0)
        above = (self.log_prob_of_draws > self.log_prob + slack).sum(0)
        ties = ((self.log_prob_of_draws - self.log_prob).abs() <= slack).sum(0)
        return _level(above, ties, len(self.draws), seed)

    def working(self) -> tuple[Tensor, Tensor]:
        """Truth (N, n) and draws (S, N, n) in logarithms, for positive targets."""
        log = torch.tensor([v.support == "positive" for v in self.variables])
        return tuple(torch.where(log, cells.clamp_min(1e-300).log(), cells) for cells in (self.truth, self.draws))  # type: ignore[return-value]


def _in_order(label: str) -> tuple[bool, float, str]:
    digits = label.split("–")[0].removeprefix("> ")
    return (not digits.isdigit(), float(digits) + 0.5 * label.startswith(">") if digits.isdigit() else 0.0, label)


def _level(below: Tensor, ties: Tensor, draws: int, seed: int) -> Tensor:
    uniform = torch.rand(below.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (below + uniform * (ties + 1)) / (draws + 1)


# ---------------------------------------------------------------------------------------------- from a distribution
def answers(
    distribution: Distribution,
    truth: Tensor,
    names: Sequence[str] | None = None,
    *,
    units: Sequence[str] | None = None,
    num_draws: int = 199,
    nothing: Tensor | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> Answers:
    """What a distribution says to N questions, its batch, whose answers are known.

    Arguments:
        distribution: batch shape (N,), event shape (n,) or ().
        truth: (N, n), or (N,) where the event shape is (); NaN where not measured, if the distribution takes that.
        names, units: of the n targets; by default those that the distribution carries, or target_1, …
        num_draws: S; ranks have S + 1 values.
        nothing: log-density (N,) of the truth under what is known before the question.
        labels: strata, a label for each question by kind.

    Raises:
        DataError: shapes that do not fit.

    Example::

        >>> mean = torch.randn(300, 1)
        >>> d = torch.distributions.Independent(torch.distributions.Normal(mean, torch.ones(300, 1)), 1)
        >>> asked = answers(d, d.sample(), ["x"])
        >>> len(asked), asked.draws.shape
        (300, torch.Size([199, 300, 1]))
    """
    event = distribution.event_shape
    if len(distribution.batch_shape) != 1 or len(event) > 1 or truth.shape != distribution.batch_shape + event:
        raise DataError(
            f"distribution, truth: found batch {tuple(distribution.batch_shape)}, event {tuple(event)} and truth "
            f"{tuple(truth.shape)}; expected batch (N,), event (n,) or (), and a truth for each question"
        )
    variables = _targets(distribution, event[0] if event else 1, names, units)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        draws = distribution.sample(torch.Size((num_draws,)))
        draws = draws.to(torch.promote_types(draws.dtype, torch.float32)).masked_fill(truth.isnan(), math.nan)
        log_prob = distribution.log_prob(truth.to(draws)).double()
        of_draws = distribution.log_prob(draws).double()
    shape = (len(truth), len(variables))
    if nothing is not None and nothing.shape != truth.shape[:1]:
        raise DataError(f"nothing: found shape {tuple(nothing.shape)}, expected ({len(truth)},)")
    return Answers(
        variables,
        (),
        truth.double().reshape(shape),
        draws.double().reshape(num_draws, *shape),
        log_prob,
        of_draws,
        torch.full_like(log_prob, math.nan) if nothing is None else nothing.double(),
        {kind: list(map(str, each)) for kind, each in (labels or {}).items()},
        torch.arange(len(truth)),
    )


def _targets(
    distribution: Distribution, number: int, names: Sequence[str] | None, units: Sequence[str] | None
) -> tuple[Variable, ...]:
    known, targets = getattr(distribution, "variables", None), getattr(distribution, "targets", None)
    if names is None and isinstance(known, Variables) and targets is not None:
        return tuple(known[known.index(name)] for name in targets)
    names = [f"target_{i + 1}" for i in range(number)] if names is None else list(names)
    units = [""] * number if units is None else list(units)
    if len(names) != number or len(units) != number:
        raise DataError(f"names, units: found {len(names)} and {len(units)}, expected {number}, one for each target")
    return tuple(Variable(name, "observation", units=unit) for name, unit in zip(names, units, strict=True))


# ---------------------------------------------------------------------------------------------- from held-out rows
class HeldOut:
    """Held-out rows and who answers about them: a flow about rows, a manifold about a row given others of its task.

    Of a task, a question is about a row given rows before it, and no row is asked about twice; so for a right model
    the ranks of the answers are independent, though rows of a task are not.

    Arguments:
        model: with `variables`, and `conditional(targets, given)` or `infer_task(rows)`, which gives what has that.
        ds: rows that the model was not fitted to, of tasks that it was not fitted to if it infers tasks.
        context_sizes: how many rows of a task are known, at least, when the next is asked about.
        num_draws: S.
        max_questions: of a direction, at most; drawn at random.

    Raises:
        DataError: a number below 1, rows that do not fit the model's variables, or no task column for one that infers
            tasks.
    """

    def __init__(
        self,
        model: Any,
        ds: xr.Dataset,
        context_sizes: Sequence[int] = CONTEXT_SIZES,
        num_draws: int = 99,
        max_questions: int = 200,
        seed: int = 0,
    ) -> None:
        for name, number in (("num_draws", num_draws), ("max_questions", max_questions)):
            if number < 1:
                raise DataError(f"{name}: found {number}, expected at least 1")
        self.model, self.num_draws, self.max_questions, self.seed = model, num_draws, max_questions, seed
        self.context_sizes = tuple(context_sizes)
        self.variables: Variables = model.variables
        self.ds, self.values = ds, to_tensor(ds, self.variables)
        self.sources = labels_of(ds, "source")
        self.by_task = hasattr(model, "infer_task")
        names = labels_of(ds, "task")
        if self.by_task and names is None:
            raise DataError("held_out: found no task column, expected one, as the model infers tasks")
        self.task_names = names if names is not None else [str(i) for i in range(len(self.values))]
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(self.values), generator=generator).tolist()
        reference = getattr(model, "reference_source", None)
        if reference is not None and self.sources is not None:  # what the others show is context only
            shuffled = [i for i in shuffled if self.sources[i] == reference]
        self._of_task: dict[str, list[int]] = {}
        for i in shuffled:
            self._of_task.setdefault(self.task_names[i], []).append(i)
        self._posteriors: dict[tuple[str, int], Any] = {}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return sorted(self._of_task)

    def rows_of(self, task: str) -> list[int]:
        """Rows of a task, in the order in which they become known."""
        return self._of_task[task]

    def posterior(self, task: str, k: int) -> Any:
        """What the model makes of the first k rows of a task."""
        if (task, k) not in self._posteriors:
            rows = self._of_task[task]
            known = {"conditions": self._conditions(rows[0])} if k == 0 else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnfamiliarTask)  # counted among the flagged tasks instead
                self._posteriors[task, k] = self.model.infer_task(self.ds.isel(row=rows[:k]), **known)
        return self._posteriors[task, k]

    def _conditions(self, row: int) -> dict[str, float]:
        """What the prior over tasks goes by, of which zero rows tell nothing."""
        names = getattr(self.model, "task_conditions", ())
        cells = {name: float(self.values[row, self.variables.index(name)]) for name in names}
        return {name: cell for name, cell in cells.items() if not math.isnan(cell)}

    def ask(self, targets: Sequence[str], given: Sequence[str] | None = None) -> Answers:
        """Answers about `targets` by what of `given` (default: all other variables) is known of each row.

        Raises:
            DataError: names that are unknown or both asked and given, or no row that shows a target.
        """
        targets = list(targets)
        given = [v.name for v in self.variables if v.name not in targets] if given is None else list(given)
        columns, known = self.variables.indices(targets), self.variables.indices(given)
        both = [name for name in targets if name in given]
        if both:
            raise DataError(f"{both[0]} is both a target and given; take it out of one")
        shown = (~self.values[:, columns].isnan()).any(-1)
        questions: list[tuple[int | None, int]] = [(None, i) for i in shown.nonzero()[:, 0].tolist()]
        if self.by_task:
            questions = self._questions_by_task(shown)
        if not questions:
            raise DataError(f"held_out: found no row that shows any of {targets}, expected some to ask about")
        generator = torch.Generator().manual_seed(self.seed)
        kept = torch.randperm(len(questions), generator=generator)[: self.max_questions].sort().values.tolist()
        questions = [questions[i] for i in kept]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            found = self._answered(questions, columns, known)
        rows = torch.tensor([i for _, i in questions])
        truth = self.values[rows][:, columns]
        return Answers(
            tuple(self.variables[c] for c in columns),
            tuple(given),
            truth,
            *found,
            self._nothing(targets, truth),
            self._labels(questions, known),
            rows,
        )

    def _questions_by_task(self, shown: Tensor) -> list[tuple[int | None, int]]:
        questions: list[tuple[int | None, int]] = []
        for task in self.tasks:
            rows, start = self._of_task[task], 0
            for size in self.context_sizes:
                k = max(size, start)
                asked = next((place for place in range(k, len(rows)) if shown[rows[place]]), None)
                if asked is None:
                    break
                questions.append((k, rows[asked]))
                start = asked + 1
        return questions

    def _answered(
        self, questions: list[tuple[int | None, int]], columns: list[int], known: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws (S, N, n), log-density of the truths (N,) and of the draws (S, N)."""
        truth = self.values[[i for _, i in questions]][:, columns]
        draws = truth.new_full((self.num_draws, *truth.shape), math.nan)
        scores = truth.new_empty(1 + self.num_draws, len(truth))
        for places, shown in passes(truth, 1 if self.by_task else _AT_ONCE):
            rows = self.values[[questions[n][1] for n in places]]
            k, first = questions[places[0]]
            answerer = self.model if k is None else self.posterior(self.task_names[first], k)
            given = {self.variables[c].name: rows[:, c] for c in known if not bool(rows[:, c].isnan().all())}
            d = answerer.conditional([self.variables[columns[j]].name for j in shown], given)
            if not d.batch_shape:  # nothing is given
                d = d.expand(torch.Size((len(rows),)))
            found = d.sample(torch.Size((self.num_draws,))).reshape(self.num_draws, len(rows), -1)
            both = torch.cat([truth[places][:, shown].to(found).unsqueeze(0), found])
            scores[:, places] = d.log_prob(both).to(scores)
            draws[:, torch.tensor(places).unsqueeze(-1), torch.tensor(shown)] = found.to(draws)
        return draws, scores[0], scores[1:]

    def _nothing(self, targets: list[str], truth: Tensor) -> Tensor:
        """Log-density (N,) of the truths where neither row nor task is known."""
        answerer = self.model.infer_task(self.ds.isel(row=slice(0, 0))) if self.by_task else self.model
        scores = truth.new_empty(len(truth))
        with torch.no_grad():
            for places, shown in passes(truth, 32):
                d = answerer.conditional([targets[j] for j in shown], {})
                scores[places] = d.log_prob(truth[places][:, shown].to(d.sample())).to(scores)
        return scores

    def _labels(self, questions: list[tuple[int | None, int]], known: list[int]) -> dict[str, list[str]]:
        rows = [i for _, i in questions]
        absent = self.values[rows][:, known].isnan()
        names = [self.variables[c].name for c in known]
        labels = {
            "task": [self.task_names[i] for i in rows],
            "pattern": [
                "without " + ", ".join(n for n, gone in zip(names, row, strict=True) if gone)
                if any(row)
                else "complete"
                for row in absent.tolist()
            ],
        }
        if self.by_task:
            labels["k"] = [_k_label(k or 0) for k, _ in questions]
        if self.sources is not None:
            labels["source"] = [self.sources[i] for i in rows]
        return labels


def passes(truth: Tensor, size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Questions about the same targets, up to `size` at once, and those targets: not all densities take NaN."""
    patterns, member = (~truth.isnan()).unique(dim=0, return_inverse=True)
    for p, pattern in enumerate(patterns):
        for places in (member == p).nonzero()[:, 0].split(size):
            yield places.tolist(), pattern.nonzero()[:, 0].tolist()


def _k_label(k: int) -> str:
    return next((label for most, label in ((2, str(k)), (5, "3–5"), (10, "6–10")) if k <= most), "> 10")


def ask(
    model: Any, held_out: xr.Dataset, targets: Sequence[str], given: Sequence[str] | None = None, **how: Any
) -> Answers:
    """What a flow or a manifold says about `targets` of held-out rows, by `given` and, of a manifold, by other rows of
    their task; see :class:`HeldOut` for the model and the keywords.

    Raises:
        DataError: names that are unknown or both asked and given, or no row that shows a target.

    Example::

        >>> import pyro_invman as pim
        >>> process = pim.simulators.linear_gaussian.LinearGaussian.random(1, 1, seed=0)
        >>> asked = ask(process, process.sample(50, seed=1), ["y1"], ["x1"])
        >>> asked.name, len(asked)
        ('y1 | x1', 50)
    """
    return HeldOut(model, held_out, **how).ask(targets, given)
