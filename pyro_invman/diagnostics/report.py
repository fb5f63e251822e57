r"""All that can be said about the trust a fitted model deserves, as a tree of arrays and as a page."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import binomtest
from tqdm import tqdm

from pyro_invman.data import labels_of, validate
from pyro_invman.diagnostics.answers import CONTEXT_SIZES, Answers, Conditionals, HeldOut
from pyro_invman.diagnostics.calibration import coverage, sbc, tarp
from pyro_invman.diagnostics.page import page
from pyro_invman.diagnostics.predictive import predictive_check
from pyro_invman.diagnostics.reference import Reference
from pyro_invman.diagnostics.verdict import judge
from pyro_invman.results import answers_dataset, fingerprint_dataset, inventory_dataset, named_dataset, tree_of
from pyro_invman.variables import DataError, Variables

if TYPE_CHECKING:
    import xarray as xr

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_UNUSUAL = 0.05
_ROWS_JUDGED = 24  # of a task, when it is asked whether it belongs

Direction = tuple[Sequence[str], Sequence[str]]


def report(
    model: Any,
    held_out: xr.Dataset,
    *,
    history: xr.Dataset | None = None,
    directions: Mapping[str, Direction] | None = None,
    reference: Conditionals | None = None,
    out: str | os.PathLike[str] | None = None,
    title: str = "Can the answers be trusted?",
    level: float = 0.02,
    context_sizes: Sequence[int] = CONTEXT_SIZES,
    num_draws: int = 99,
    max_questions: int = 200,
    simulations: int = 199,
    seed: int = 0,
    progress: bool = True,
) -> xr.DataTree:
    """What held-out rows say about a flow or a manifold; a verdict on each direction, and what it rests on.

    Arguments:
        model: a :class:`pyro_invman.JointFlow` or :class:`pyro_invman.ProcessManifold`; or whatever has `variables`
            and `conditional(targets, given)`, or `infer_task(rows)` which gives what has that.
        held_out: rows it was not fitted to; of a manifold, of tasks it was not fitted to.
        history: what `fit` returned.
        directions: name to (targets, given). By default "forward", observations by parameters and conditions; of a
            flow "inverse", parameters by observations and conditions; of a manifold, which answers by Bayes' rule on
            its forward law where one setting is sought, "inverse: NAME" for each parameter by all else. What no
            held-out row shows is not asked for, and noted.
        reference: a model that may have known better, as in :class:`pyro_invman.diagnostics.Reference`.
        out: where to write the page, one HTML file that needs no other and no network.
        level: probability that a model that is right is flagged in any direction.
        context_sizes, num_draws, max_questions: as in :class:`pyro_invman.diagnostics.HeldOut`.
        simulations: of tasks, for the p-value of each held-out task.
        progress: a bar on standard error.

    Returns:
        A tree with the groups

        - ``verdicts`` over "direction": fields of :class:`pyro_invman.diagnostics.Verdict`;
        - ``answers/NAME`` over ("question", "target", "quantile"): truths and what was said;
        - ``calibration/NAME/sbc``, ``coverage``, ``tarp`` and ``check`` (predictive), by stratum;
        - ``inventory``: what is measured where, and what links which variables;
        - ``fit``: the history, where one was handed over;
        - ``tasks``, of a manifold: beliefs about known and held-out tasks, p-values of the held-out;
        - ``cells``, of a manifold: probability that each held-out cell is a gross error.

        Its attribute `notes` lists what was warned of on the way.

    Raises:
        DataError: rows that do not fit, a direction that no held-out row shows, or a model without directions.

    Example::

        >>> import pyro_invman as pim
        >>> process = pim.simulators.linear_gaussian.LinearGaussian.random(2, 2, seed=0)
        >>> found = report(process, process.sample(60, seed=1), progress=False)
        >>> found["verdicts"].verdict.sel(direction="inverse").item()
        'use it'
    """
    ds = validate(held_out, training=False)
    variables: Variables = model.variables
    questions = HeldOut(model, ds, context_sizes, num_draws, max_questions, seed)
    measured = (~questions.values.isnan()).any(0).tolist()
    shown = [v.name for v, seen in zip(variables, measured, strict=True) if seen]
    unseen = [v.name for v in variables if v.role != "condition" and v.name not in shown]
    asked_of = dict(directions or _directions(variables, shown, hasattr(model, "infer_task")))
    for name in asked_of:
        if "/" in name or not name:
            raise DataError(f"directions: found the name {name!r}, expected one without a slash")
    judge_of = Reference(questions, reference)
    bar = tqdm(total=len(asked_of) + len(questions.tasks) * questions.by_task, disable=not progress, desc="report")
    with warnings.catch_warnings(record=True) as warned, bar:
        warnings.simplefilter("always")
        asked: dict[str, Answers] = {}
        for name, (targets, given) in asked_of.items():
            bar.set_postfix_str(name)
            asked[name] = questions.ask(targets, given)
            bar.update()
        references = {name: judge_of.log_prob(each) for name, each in asked.items()}
        verdicts = judge(asked, references, level, seed)
        groups: dict[str, Any] = {
            "/verdicts": named_dataset("direction", {k: v._asdict() for k, v in verdicts.items()}, {"level": level})
        }
        for name, each in asked.items():
            groups[f"/answers/{name}"] = _said(each)
            for kind, of in (("sbc", sbc), ("coverage", coverage), ("tarp", tarp), ("check", predictive_check)):
                groups[f"/calibration/{name}/{kind}"] = of(each, seed=seed)
        labels = {kind: labels_of(ds, kind) for kind in ("task", "source")}
        links = getattr(model, "links", None)
        groups["/inventory"] = inventory_dataset(
            variables, questions.values, {kind: each for kind, each in labels.items() if each is not None}, links
        )
        if history is not None:
            groups["/fit"] = history
        if hasattr(model, "typicality"):
            groups["/tasks"] = _tasks(questions, simulations, seed, bar)
        if hasattr(model, "outliers"):
            groups["/cells"] = model.outliers(ds)
    notes = list(dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in warned))
    if unseen and directions is None:
        notes.append(f"no held-out row shows {', '.join(unseen)}, so nothing is said of asking for it")
    tree = tree_of(groups, {"title": title, "notes": notes, "model": type(model).__name__, "seed": seed})
    if out is not None:
        Path(out).write_text(page(tree), encoding="utf-8")
    return tree


def _directions(variables: Variables, shown: Sequence[str], apart: bool) -> dict[str, Direction]:
    x, y = ([n for n in variables.with_role(role) if n in shown] for role in ("parameter", "observation"))
    found: dict[str, Direction] = {}
    if y:
        found["forward"] = (y, [v.name for v in variables if v.role != "observation"])
    if apart:
        found |= {f"inverse: {name}": ([name], [v.name for v in variables if v.name != name]) for name in x}
    elif x:
        found["inverse"] = (x, [v.name for v in variables if v.role != "parameter"])
    if not found:
        raise DataError("held_out: shows neither parameters nor observations, expected some to ask about")
    return found


def _said(asked: Answers) -> xr.Dataset:
    levels = torch.tensor(_QUANTILES, dtype=asked.draws.dtype)
    quantiles = torch.quantile(asked.draws, levels, dim=0).permute(1, 2, 0)
    numbers = {"log_prob": asked.log_prob.numpy(), "nothing": asked.nothing.numpy(), "row": asked.rows.numpy()}
    cells = {"truth": asked.truth.numpy(), "quantiles": quantiles.numpy()}
    attrs = {"question": asked.name, "units_of_log_prob": "nat"}
    return answers_dataset(asked.variables, cells, _QUANTILES, numbers, asked.labels, attrs)


def _tasks(questions: HeldOut, simulations: int, seed: int, bar: tqdm[Any]) -> xr.Dataset:
    """Beliefs about known tasks and held-out ones, by up to 24 of their rows, and p-values of the latter."""
    model = questions.model
    known = list(model.memory.names)
    beliefs = [model.fingerprint(name) for name in known]
    p_values, nearest, similarity = [math.nan] * len(known), [""] * len(known), [math.nan] * len(known)
    bar.set_postfix_str("tasks")
    for name in questions.tasks:
        rows = questions.ds.isel(row=questions.rows_of(name)[:_ROWS_JUDGED])
        posterior = model.infer_task(rows)
        beliefs.append(model.fingerprint(posterior))
        p_values.append(model.typicality(rows, simulations=simulations, seed=seed))
        alike = model.nearest(posterior, 1)
        nearest.append(alike[0].task if alike else "")
        similarity.append(alike[0].similarity if alike else math.nan)
        bar.update()
    new = p_values[len(known) :]
    unusual = sum(p <= _UNUSUAL for p in new)
    chance = float(binomtest(unusual, len(new), _UNUSUAL, "greater").pvalue) if new else math.nan
    return fingerprint_dataset(
        [*known, *questions.tasks],
        [True] * len(known) + [False] * len(new),
        torch.stack([belief.mean for belief in beliefs]),
        torch.stack([belief.covariance for belief in beliefs]),
        {"p_value": p_values, "nearest": nearest, "similarity": similarity},
        {"unusual_below": _UNUSUAL, "unusual": unusual, "p_value_of_so_many": chance},
    )
