r"""A campaign of measurements on one task: what to measure next, what came back, and what it was worth."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_invman.data import to_tensor
from pyro_invman.design.objectives import (
    KINDS,
    Objective,
    candidates_of,
    check_objective,
    choose,
    conditions_known,
    targets_of,
)
from pyro_invman.design.outlook import Candidates, Known, outlook
from pyro_invman.results import campaign_history, from_record, joined_rows, to_record, trade_off_dataset
from pyro_invman.saved import load as load_model
from pyro_invman.tasks.manifold import ProcessManifold
from pyro_invman.tasks.typicality import UnfamiliarTask
from pyro_invman.training import write_atomically
from pyro_invman.variables import DataError

if TYPE_CHECKING:
    import xarray as xr

    from pyro_invman.tasks.posterior import TaskPosterior

_UNSUGGESTED = -1


class Campaign:
    r"""Which of some candidate rows of a task to measure next, by information gained for what it costs,

    .. math:: \arg\max_Y \; \sum_k \lambda_k \, I(T_k; Y \mid \text{rows}, \text{awaited}) / \text{cost}(Y),

    one row of a batch after the other, each given those before it. Gains are expected, in nats, by the manifold's own
    account: a closed form for every candidate, corrected by the flow's two estimates for the best. The manifold was
    learned, so none of them is a bound; how far the two sides are apart is reported beside them.

    Arguments:
        manifold: fitted.
        task_rows: what is known of the task, rows with or without observations; None for none.
        candidates: rows that could be measured, with their settings. Observations that they have as columns, with NaN
            cells, would be measured; all of them where there is no such column. A column or coordinate ``measure``
            names instead those of each row, separated by commas; ``source`` says by which source.
        cost: name of a column or coordinate of the candidates, or one positive number for all.
        objective: "task" (the latent), or a mapping with one or more of ``"task": True``; ``"parameters": names`` with
            ``"of": rows`` where they vary within a task (these rows' observations are taken for known);
            ``"predict": names`` with ``"at": rows``; ``"bias": source``; and ``"weights"``, λ by kind, equal if not
            given, so that a nat forward is worth a nat inverse. Gains are means over the rows of ``of`` and ``at``.
        conditions: what is known of the task as a whole, by name.
        min_gain_per_cost: stop where no candidate promises as much, in nats.
        width: stop where the target is known so well: the largest standard deviation, by name in natural units (a mean
            over rows), "task" in prior standard deviations, "bias" in working coordinates.
        shortlist: candidates a pick that the flow's estimates are worked out for; 0: the closed form alone.
        draws: joint draws that these are means of.
        seed: the same gives the same suggestions.

    Raises:
        DataError: an objective, candidates or rows that do not fit the manifold or each other.

    Example:
        >>> import pyro_invman as pim
        >>> process = pim.simulators.linear_gaussian.HierarchicalLinearGaussian.random(seed=0)
        >>> manifold = pim.ProcessManifold.from_dataset(process.sample(7, 6, seed=0), latent_dim=2, flow={"width": 16})
        >>> candidates = process.sample(1, 5, seed=1)[["x1", "x2"]]
        >>> campaign = pim.design.Campaign(manifold, None, candidates, cost=2.0)
        >>> chosen = campaign.suggest(2)
        >>> chosen.sizes["row"], float(chosen["cost"].sum())
        (2, 4.0)

    References:
        Lindley, *On a measure of the information provided by an experiment*, Annals of Mathematical Statistics 1956.
        Kirsch & Gal, *Unifying approaches in active learning and active sampling*, TMLR 2022.
    """

    def __init__(
        self,
        manifold: ProcessManifold,
        task_rows: xr.Dataset | None,
        candidates: xr.Dataset,
        cost: str | float | None = "cost",
        objective: Objective = "task",
        *,
        conditions: Mapping[str, float] | None = None,
        min_gain_per_cost: float = 0.0,
        width: Mapping[str, float] | None = None,
        shortlist: int = 8,
        draws: int = 64,
        seed: int = 0,
    ) -> None:
        if cost == "cost" and "cost" not in candidates.variables:
            cost = None
        self.manifold, self.candidates, self.cost = manifold, candidates, cost
        self.objective = check_objective(objective, manifold)
        self.rows = joined_rows(task_rows, self.objective.get("of"), self.objective.get("parameters", ()))
        self.conditions = dict(conditions or {})
        self.min_gain_per_cost, self.width = min_gain_per_cost, dict(width or {})
        self.shortlist, self.draws, self.seed = shortlist, draws, seed
        self.suggested: list[dict[str, Any]] = []
        self.measured: list[dict[str, Any]] = []
        self._folder: Path | None = None
        unknown = [name for name in self.width if name not in self._asked()]
        if unknown:
            raise DataError(f"width: found {unknown[0]!r}, expected some of {self._asked()}")
        self._prepared()

    def _asked(self) -> list[str]:
        asked = [kind for kind in ("task", "bias") if kind in self.objective]
        return [*asked, *self.objective.get("parameters", ()), *self.objective.get("predict", ())]

    # ------------------------------------------------------------------ what is known
    def _known(self) -> tuple[Known, dict[str, float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfamiliarTask)  # said by `task`
            known = Known.of(self.manifold, self.rows, self.conditions)
        stated = conditions_known(self.manifold, to_tensor(self.rows, self.manifold.variables)) if self.rows else {}
        return known, stated | self.conditions

    def _prepared(self) -> tuple[Known, Any, Candidates, torch.Tensor, list[Any]]:
        known, stated = self._known()
        rows, costs = candidates_of(self.candidates, self.manifold, stated, self.cost)
        targets = targets_of(self.objective, known, stated)
        return known, outlook(known, rows, targets, self.seed), rows, costs, targets

    @property
    def task(self) -> TaskPosterior:
        """What is known of the task by now."""
        return self.manifold.infer_task(self.rows, conditions=self.conditions)

    @property
    def awaited(self) -> list[int]:
        """Candidates that were suggested and have not come back, in order."""
        back = {m["candidate"] for m in self.measured}
        return [s["candidate"] for s in self.suggested if s["candidate"] not in back]

    @property
    def available(self) -> list[int]:
        """Candidates that were neither suggested nor measured."""
        gone = {entry["candidate"] for entry in (*self.suggested, *self.measured)}
        return [c for c in range(self.candidates.sizes["row"]) if c not in gone]

    def widths(self) -> dict[str, float]:
        """How well each part of the target is known, as the argument `width` counts it."""
        known, _ = self._known()
        found: dict[str, float] = {}
        task = self.manifold.infer_task(self.rows, conditions=self.conditions)
        if "task" in self.objective:
            found["task"] = float(known.belief.scale_tril()[1].square().sum(-1).max().sqrt())
        if "bias" in self.objective:
            slope, _, spread = known.heard(str(self.objective["bias"])).bias_given_latent()
            through = slope @ known.belief.scale_tril()[1].double()
            found["bias"] = float((spread + through @ through.mT).diagonal().max().sqrt())
        for kind, companion in (("parameters", "of"), ("predict", "at")):
            names = self.objective.get(kind, ())
            given = self.objective.get(companion)
            if names:
                cells = {} if given is None else _given(given, self.manifold, names, kind == "parameters")
                spread = task.conditional(list(names), cells).variance.sqrt()
                found |= dict(zip(names, spread.reshape(-1, len(names)).mean(0).tolist(), strict=True))
        return found

    def reason_to_stop(self) -> str | None:
        """Why there is nothing more to suggest, or None."""
        if not self.available:
            return "every candidate was suggested"
        if self.width:
            found = self.widths()
            if all(found[name] <= enough for name, enough in self.width.items()):
                return f"the target is known to {', '.join(f'{n} {found[n]:.3g}' for n in self.width)}"
        if self.min_gain_per_cost > 0:
            best = self._best(1)[0]
            if best["gain"] / best["cost"] < self.min_gain_per_cost:
                return f"no candidate promises more than {best['gain'] / best['cost']:.3g} nats for its cost"
        return None

    # ------------------------------------------------------------------ asking and telling
    def _best(self, number: int) -> list[dict[str, Any]]:
        known, view, rows, costs, targets = self._prepared()
        found = choose(
            known,
            view,
            rows,
            costs,
            targets,
            self.awaited,
            self.available,
            number,
            shortlist=self.shortlist,
            draws=self.draws,
            seed=self.seed + 104_729 * len(self.suggested),
        )
        kinds = [kind for kind in KINDS if kind in self.objective]
        return [
            choice._asdict()
            | {"cost": float(costs[choice.candidate]), "by_target": dict(zip(kinds, choice.by_target, strict=True))}
            for choice in found
        ]

    def suggest(self, n: int = 1) -> xr.Dataset:
        """The `n` candidates to measure next as rows, none of them suggested before; fewer where fewer are left.

        Coordinates ``candidate``, ``cost``, ``gain`` (by which it was chosen), ``closed_form``, ``likelihood``,
        ``posterior``, ``gap`` of the two and their ``error`` stand beside them, gains in nats given the rows before;
        ``attrs["stop"]`` says why none is suggested where `reason_to_stop` finds a reason.

        Raises:
            DataError: `n` is not at least 1.
        """
        if n < 1:
            raise DataError(f"n: found {n}, expected at least 1")
        stop = self.reason_to_stop()
        found = [] if stop else self._best(n)
        batch = 1 + max((s["batch"] for s in self.suggested), default=-1)
        self.suggested += [entry | {"batch": batch} for entry in found]
        self._keep()
        chosen = self.candidates.isel(row=[entry["candidate"] for entry in found])
        names = ("candidate", "cost", "gain", "closed_form", "likelihood", "posterior", "error")
        beside: dict[str, Any] = {name: ("row", [entry[name] for entry in found]) for name in names}
        beside["gap"] = ("row", [entry["likelihood"] - entry["posterior"] for entry in found])
        chosen = chosen.drop_vars([str(self.cost)], errors="ignore").assign_coords(beside)
        return chosen.assign_attrs(stop=stop or "")

    def tell(self, rows: xr.Dataset) -> None:
        """Takes in rows that were measured, suggested or not, however incomplete.

        A coordinate ``candidate``, as `suggest` gives it, says which suggestion a row answers; a row of which nothing
        could be measured is an answer too.

        Raises:
            DataError: cells outside their support, unknown columns, rows of another task, a candidate that is none, a
                row that answers nothing and says nothing; the message names the row, and nothing is taken in.
        """
        answers = _answers(rows, self.candidates.sizes["row"])
        told = rows.drop_vars([str(n) for n in rows.data_vars if n in (self.cost, "measure")])
        natural = to_tensor(told, self.manifold.variables)
        evidence = ~natural[:, self.manifold.network.columns].isnan()
        for n, candidate in enumerate(answers):
            if candidate == _UNSUGGESTED and not bool(evidence[n].any()):
                raise DataError(f"row {n}: found no observation and no suggestion that it answers, expected either")
        joined = joined_rows(self.rows, told, ())
        Known.of(self.manifold, joined, self.conditions)  # refuses what cannot be inferred from
        _, costs = candidates_of(self.candidates, self.manifold, {}, self.cost)
        own = rows["cost"].values if "cost" in rows.variables else None
        for n, candidate in enumerate(answers):
            spent = float(costs[candidate]) if candidate != _UNSUGGESTED else math.nan
            if candidate == _UNSUGGESTED and own is not None:
                spent = float(own[n])
            elif candidate == _UNSUGGESTED and isinstance(self.cost, (int, float)):
                spent = float(self.cost)
            self.measured.append({"candidate": candidate, "cost": spent, "cells": int(evidence[n].sum())})
        self.rows = joined
        self._keep()

    @property
    def history(self) -> xr.Dataset:
        """What was suggested, over ``suggestion``, and what came back, over ``measurement``."""
        kinds = [kind for kind in KINDS if kind in self.objective]
        return campaign_history(self.suggested, self.measured, kinds)

    def trade_off(self, n: int = 1, steps: int = 11) -> xr.Dataset:
        """What batches of `n` would gain forward and inverse, over ``weight``, that of the inverse; by the closed form.

        Forward is "predict", inverse "parameters", or "task" without these.

        Raises:
            DataError: the objective has not one of each.
        """
        known, view, rows, costs, targets = self._prepared()
        kinds = [target.kind for target in targets]
        inverse = "parameters" if "parameters" in kinds else "task"
        if "predict" not in kinds or inverse not in kinds:
            raise DataError(f'trade_off: found {kinds}, expected "predict" and one of "parameters" and "task"')
        found = []
        for step in range(steps):
            share = step / (steps - 1)
            weight = {"predict": 1 - share, inverse: share}
            tilted = [t._replace(weight=weight.get(t.kind, 0.0)) for t in targets]
            batch = choose(known, view, rows, costs, tilted, self.awaited, self.available, n, shortlist=0)
            forward, back = (
                math.fsum(choice.by_target[kinds.index(kind)] for choice in batch) for kind in ("predict", inverse)
            )
            found.append((share, forward, back, math.fsum(float(costs[choice.candidate]) for choice in batch)))
        return trade_off_dataset(found, inverse)

    # ------------------------------------------------------------------ keeping
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes manifold and campaign to `folder`, which every later `suggest` and `tell` brings up to date before it
        returns: a campaign that is killed goes on from `load` where it was."""
        self._folder = Path(folder)
        self.manifold.save(self._folder / "manifold")
        self._keep()

    def _keep(self) -> None:
        if self._folder is None:
            return
        objective = {k: to_record(v) if k in ("of", "at") else v for k, v in self.objective.items()}
        state = {
            "objective": objective,
            "candidates": to_record(self.candidates),
            "rows": None if self.rows is None else to_record(self.rows),
            "suggested": self.suggested,
            "measured": self.measured,
        }
        names = ("cost", "conditions", "min_gain_per_cost", "width", "shortlist", "draws", "seed")
        state |= {name: getattr(self, name) for name in names}
        text = json.dumps(state, sort_keys=True)
        whole = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "campaign": text})
        write_atomically(self._folder / "campaign.json", lambda part: part.write_text(whole))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Campaign:
        """The campaign in `folder`, as it was after the last `suggest` or `tell`.

        Raises:
            FileNotFoundError: there is none.
            DataError: it is damaged, or was changed.
        """
        path = Path(folder) / "campaign.json"
        if not path.is_file():
            raise FileNotFoundError(f"no campaign in {folder}: campaign.json is not there")
        try:
            whole = json.loads(path.read_text())
            text = whole["campaign"]
            if hashlib.sha256(text.encode()).hexdigest() != whole["sha256"]:
                raise ValueError("its checksum does not agree with its content")
            state = json.loads(text)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged or changed, it cannot be read as a campaign ({error})") from error
        manifold = load_model(Path(folder) / "manifold")
        if not isinstance(manifold, ProcessManifold):
            raise DataError(f"{folder}/manifold: found {type(manifold).__name__}, expected a ProcessManifold")
        objective = {k: from_record(v) if k in ("of", "at") else v for k, v in state.pop("objective").items()}
        rows, suggested, measured = (state.pop(name) for name in ("rows", "suggested", "measured"))
        campaign = cls(manifold, None, from_record(state.pop("candidates")), objective=objective, **state)
        campaign.rows = None if rows is None else from_record(rows)
        campaign.suggested, campaign.measured, campaign._folder = suggested, measured, Path(folder)
        return campaign


def _answers(rows: xr.Dataset, number: int) -> list[int]:
    """Which candidate each row answers, −1 for none."""
    if "candidate" not in rows.variables:
        return [_UNSUGGESTED] * rows.sizes.get("row", 0)
    found = [int(c) for c in rows["candidate"].values.reshape(-1)]
    for n, candidate in enumerate(found):
        if not _UNSUGGESTED <= candidate < number:
            raise DataError(f"candidate in row {n}: found {candidate}, expected one of 0 to {number - 1}, or −1")
    return found


def _given(rows: xr.Dataset, manifold: ProcessManifold, names: Sequence[str], with_evidence: bool) -> dict[str, Any]:
    """Cells of rows (G,) that are given where `names` are asked."""
    natural = to_tensor(rows, manifold.variables)
    return {
        v.name: natural[:, c]
        for c, v in enumerate(manifold.variables)
        if v.name not in names and (with_evidence or c not in manifold.network.columns)
        if not bool(natural[:, c].isnan().all())
    }
