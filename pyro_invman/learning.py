"""How a joint density learns from rows: from what they show, and then, where that is a biased choice, completed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_invman.completion import Completer, Completion, rounds
from pyro_invman.declared import Row, Simulator
from pyro_invman.density.anyorder import AnyOrderFlow
from pyro_invman.density.missingness import Dependence, dependences
from pyro_invman.density.queries import QueryMix, query_loss
from pyro_invman.training import Record, Schedule, train
from pyro_invman.variables import DataError, Standardization, Variables, unrounded

_DRAWS = 20_000  # completed rows in a round, or one a row


@dataclass(frozen=True)
class Lesson:
    """What is to be learned, and how; as in :meth:`pyro_invman.JointFlow.fit`.

    Arguments:
        learned, held_out: natural rows (N, D) and (H, D).
        roles: 0, 1, 2 for parameter, observation, condition (D,).
        shuffle: columns (B, D) with exchangeable members in random order, of B rows.
    """

    learned: Tensor
    held_out: Tensor
    roles: Tensor
    shuffle: Callable[[int, torch.Generator], Tensor]
    queries: QueryMix
    schedule: Schedule
    completion: Completion | bool | None
    mechanism: Callable[[Row], Any] | None
    simulator: Simulator | None

    @property
    def plan(self) -> Completion:
        """How missing cells are drawn, if they are."""
        return self.completion if isinstance(self.completion, Completion) else Completion()

    def reasons(self, density: AnyOrderFlow, found: list[Dependence]) -> list[str]:
        """Why missing cells are to be drawn and learned from; none: they are left out."""
        declared = self.mechanism is not None or self.simulator is not None
        if self.completion is False and declared:
            raise DataError("completion is False, but a mechanism or simulator is declared; leave one of them out")
        holds = {
            "asked for": bool(self.completion),
            "the mask depends on observed values": bool(found),
            "variables are linked through others alone": density.links is not None and density.links.chained,
            "a mechanism is declared": self.mechanism is not None,
            "a simulator is declared": self.simulator is not None,
        }
        holes = bool(self.learned.isnan().any()) and self.completion is not False
        return [reason for reason, true in holds.items() if true and holes]


class Run(NamedTuple):
    """How a fit is run: as in :meth:`pyro_invman.JointFlow.fit`, and what data and settings a checkpoint belongs to."""

    seed: int
    max_seconds: float | None
    progress: bool
    checkpoint: str | os.PathLike[str] | None
    resume: bool
    fingerprint: str


def learn(
    density: AnyOrderFlow, standardization: Standardization, variables: Variables, lesson: Lesson, run: Run
) -> tuple[list[Record], list[int], dict[str, Any]]:
    """Trains `density` in place; the records, which round of completion each is of (0 before the first), and what was
    found and done, by name."""
    dtype, plan = density.dtype, lesson.plan
    working = standardization(lesson.learned).to(dtype)
    found = dependences(working, density.layout.levels, plan.false_alarm)
    why = lesson.reasons(density, found)
    said: dict[str, Any] = {
        "rows": len(working),
        "held_out_rows": len(lesson.held_out),
        "missing_by": [f"{variables[d.hidden].name} by {variables[d.on].name}" for d in found],
        "missing_by_p_values": [d.p_value for d in found],
        "false_alarm": plan.false_alarm,
        "completion": "; ".join(why) or "none",
    }
    completer = None
    if why:
        completer = Completer(
            density, standardization, variables, lesson.mechanism, lesson.simulator, plan.proposals, lesson.learned[:64]
        )
    base = density.as_base()
    learner = Learner(density, lesson, run, bool(why))
    rounded = any(v.resolution > 0 for v in variables)

    def batch(rows: Tensor, generator: torch.Generator) -> Tensor:
        if not rounded:
            return working[rows]
        return standardization(unrounded(lesson.learned[rows], variables, generator)).to(dtype)

    held_out = unrounded(lesson.held_out, variables, torch.Generator().manual_seed(run.seed + 1))
    # the same held-out questions at every evaluation, several a row where rows are few
    repeats = max(1, min(16, 2000 // len(held_out)))
    learner(batch, len(working), standardization(held_out).to(dtype).repeat(repeats, 1), 0)
    if completer is not None:
        steps = plan.steps or max(200, lesson.schedule.for_rows(len(working)).steps // 3)
        brief = lesson.schedule._replace(steps=steps, evaluate_every=max(1, steps // 8))

        def run_round(number: int, pool: Tensor, checked: Tensor) -> list[Record]:
            def drawn(rows: Tensor, generator: torch.Generator) -> Tensor:
                return pool[torch.randint(len(pool), rows.shape, generator=generator), rows]

            return learner(drawn, pool.shape[1], checked.flatten(0, 1), number, brief)

        def learned(generator: torch.Generator) -> Tensor:
            return unrounded(lesson.learned, variables, generator)

        copies = max(1, min(16, _DRAWS // len(working)))
        done = rounds(completer, learned, held_out, run_round, plan, (copies, repeats), run.seed, base)
        said["evidence"] = [each.evidence for each in done]
        said["kept"] = [int(each.kept) for each in done]
        if completer.declared:
            said["effective_proposals"] = [each.effective for each in done]
            said["smallest_effective_proposals"] = [each.smallest for each in done]
    return learner.records, learner.phases, said


class Learner:
    """Trains a density by any-order queries, in one phase or several, each with a checkpoint of its own.

    Arguments:
        density: what is trained, in place.
        lesson, run: of the fit.
        shared: whether phases share the time allowed; each then takes half of what is left.
    """

    def __init__(self, density: AnyOrderFlow, lesson: Lesson, run: Run, shared: bool) -> None:
        self.density, self.lesson, self.run, self.shared = density, lesson, run, shared
        self.records: list[Record] = []
        self.phases: list[int] = []
        self._began = time.monotonic()
        self._earlier = 0.0  # seconds that runs before this one spent

    @property
    def seconds(self) -> float:
        """Spent so far, by earlier runs of a resumed fit too."""
        return time.monotonic() - self._began + self._earlier

    def __call__(
        self,
        batch: Callable[[Tensor, torch.Generator], Tensor],
        num_rows: int,
        checked: Tensor,
        phase: int,
        schedule: Schedule | None = None,
    ) -> list[Record]:
        """Trains in one phase, 0 or a later round; `batch` gives working rows (B, D) of indices (B,), `checked` is held
        out."""
        run, most, lesson = self.run, self.run.max_seconds, self.lesson
        if most is not None and self.shared:
            most = 0.5 * max(0.0, most - self.seconds)

        def loss(module: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
            order = lesson.shuffle(len(rows), generator)
            asked = batch(rows, generator).gather(1, order)
            return query_loss(module, asked, lesson.queries, lesson.roles, generator)

        def validate(module: nn.Module) -> float:
            generator = torch.Generator().manual_seed(run.seed + 1)
            return query_loss(module, checked, lesson.queries, lesson.roles, generator).item()

        path = run.checkpoint
        if path is not None and phase:
            path = Path(path).with_name(f"{Path(path).name}.{phase}")
        began = time.monotonic()
        records = train(
            self.density,
            loss,
            validate,
            num_rows,
            schedule or lesson.schedule,
            seed=run.seed + 2 + phase,
            max_seconds=most,
            progress=run.progress,
            checkpoint=path,
            resume=run.resume,
            fingerprint=run.fingerprint,
        )
        before, spent = (self.records[-1].step, self.records[-1].seconds) if self.records else (0, 0.0)
        self._earlier += max(0.0, records[-1].seconds - (time.monotonic() - began))
        for record in records[1:] if before else records:
            self.records.append(record._replace(step=record.step + before, seconds=record.seconds + spent))
            self.phases.append(phase)
        return records
