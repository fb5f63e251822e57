r"""What a design is for: targets, what information about them costs, and batches chosen one row after the other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_invman.data import labels_of, to_tensor
from pyro_invman.design.estimates import estimates
from pyro_invman.design.outlook import Candidates, Known, Outlook, Target
from pyro_invman.tasks.rows import first_known
from pyro_invman.variables import DataError

if TYPE_CHECKING:
    import xarray as xr

    from pyro_invman.tasks.manifold import ProcessManifold

KINDS = ("task", "parameters", "predict", "bias")
_COMPANIONS = {"of": "parameters", "at": "predict"}
Objective = str | Mapping[str, Any]


class Choice(NamedTuple):
    """A candidate of a batch, what it adds to those before it, in weighted nats: the `gain` that it was chosen by, the
    `closed_form` under the manifold, the flow's `likelihood` and `posterior` side with a standard `error`, NaN where
    they were not worked out; and the closed-form gain about each target alone."""

    candidate: int
    gain: float
    closed_form: float
    likelihood: float
    posterior: float
    error: float
    by_target: tuple[float, ...]


# ------------------------------------------------------------------------------------------------ reading
def check_objective(objective: Objective, manifold: ProcessManifold) -> dict[str, Any]:
    """`objective` as a mapping from kind to what is asked, with "of", "at" and "weights", the latter by kind.

    Raises:
        DataError: unknown kinds or names, "of" without "parameters" and the like, weights that are negative or name no
            kind of the objective.
    """
    asked: dict[str, Any] = {objective: True} if isinstance(objective, str) else dict(objective)
    weights = asked.pop("weights", None)
    unknown = [key for key in asked if key not in (*KINDS, *_COMPANIONS)]
    kinds = [kind for kind in KINDS if kind in asked]
    if unknown or not kinds:
        raise DataError(f"objective: found {unknown or 'nothing'}, expected one or more of {KINDS}")
    for companion, kind in _COMPANIONS.items():
        if companion in asked and kind not in asked:
            raise DataError(f"objective: found {companion!r} without {kind!r}, expected both")
    variables, evidence = manifold.variables, manifold.network.columns
    for kind in ("parameters", "predict"):
        if kind not in asked:
            continue
        names = asked[kind] = [asked[kind]] if isinstance(asked[kind], str) else list(asked[kind])
        if not names:
            raise DataError(f"objective: {kind!r} names no variable, expected some of {list(variables.names)}")
        for column in variables.indices(names):
            name, observed = variables[column].name, variables[column].role == "observation"
            if kind == "predict" and column not in evidence:
                raise DataError(f"objective: {name} is a {variables[column].role}; what can be predicted is evidence")
            if kind == "parameters" and observed:
                raise DataError(f'objective: {name} is an observation; ask {{"predict": [{name!r}], "at": rows}}')
            apart = not observed and column not in evidence and not bool(manifold.network.constant[column])
            if kind == "parameters" and apart and "of" not in asked:
                raise DataError(f'objective: {name} varies within a task; say of which rows, {{"of": rows}}')
    if "predict" in asked and "at" not in asked:
        raise DataError('objective: found "predict" without "at", expected rows with the settings to predict at')
    if "bias" in asked and manifold.reference_source in (None, asked["bias"]):
        raise DataError(f"objective: found the bias of {asked['bias']!r}, expected a source beside the reference")
    weights = dict.fromkeys(kinds, 1 / len(kinds)) if weights is None else {k: float(v) for k, v in weights.items()}
    if set(weights) != set(kinds) or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise DataError(f"objective: found weights {weights}, expected one for each of {kinds}, none negative")
    return asked | {"weights": weights}


def targets_of(asked: Mapping[str, Any], known: Known, conditions: Mapping[str, float]) -> list[Target]:
    """The targets of a checked objective, in the order of their kinds; errors as of rows to be inferred from."""
    manifold, found = known.manifold, []
    for kind, weight in ((k, asked["weights"][k]) for k in KINDS if k in asked):
        if kind == "task":
            found.append(Target(kind, weight))
        elif kind == "bias":
            found.append(Target(kind, weight, source=str(asked[kind])))
        else:
            columns = manifold.variables.indices(asked[kind])
            rows = asked.get("of" if kind == "parameters" else "at")
            natural = torch.full((1, len(manifold.variables)), torch.nan, dtype=torch.float64)
            if rows is not None:
                natural = to_tensor(rows, manifold.variables)
            if not len(natural):
                raise DataError(f"objective: found no row for {kind!r}, expected at least one")
            natural[:, list(columns) if kind == "parameters" else manifold.network.columns] = torch.nan
            working = working_rows(manifold, natural, conditions)
            found.append(Target(kind, weight, tuple(columns), working))
    return found


def candidates_of(
    ds: xr.Dataset, manifold: ProcessManifold, conditions: Mapping[str, float], cost: str | float | None
) -> tuple[Candidates, Tensor]:
    """Candidates, and what each costs (C,).

    Raises:
        DataError: no row, a cell to be measured that is known already, nothing to be measured, a cost that is not a
            positive number, and all that rows to be inferred from are refused for.
    """
    if not ds.sizes.get("row", 0):
        raise DataError("candidates: found no row, expected at least one")
    variables, number = manifold.variables, ds.sizes["row"]
    costs = torch.ones(number, dtype=torch.float64)
    if isinstance(cost, str):
        if cost not in ds.variables:
            raise DataError(f"cost: found no column {cost!r} among the candidates, expected one or a number")
        costs = torch.as_tensor(ds[cost].values.astype(float))
    elif cost is not None:
        costs = costs * float(cost)
    bad = (~(costs > 0) | costs.isinf()).nonzero()
    if len(bad):
        raise DataError(f"cost in row {int(bad[0])}: found {float(costs[bad[0]]):g}, expected a positive number")
    told = ds.drop_vars([str(name) for name in ds.data_vars if name in (cost, "measure")])
    natural = to_tensor(told, variables)
    observed = [c for c in manifold.network.columns if variables[c].role == "observation"]
    shown = torch.zeros(natural.shape, dtype=torch.bool)
    shown[:, [c for c in observed if variables[c].name in told] or observed] = True
    if "measure" in ds.variables:
        shown = torch.zeros_like(shown)
        for row, text in enumerate(map(str, ds["measure"].values)):
            for name in filter(None, re.split(r"[,;\s]+", text)):
                if name not in variables.names or variables.index(name) not in manifold.network.columns:
                    raise DataError(f"measure in row {row}: found {name!r}, expected observations, separated by commas")
                shown[row, variables.index(name)] = True
    known = (shown & ~natural.isnan()).nonzero()
    if len(known):
        row, column = known[0].tolist()
        raise DataError(f"{variables[column].name} in row {row}: is to be measured, but known; leave its cell NaN")
    nothing = (~shown.any(-1)).nonzero()
    if len(nothing):
        raise DataError(f"measure in row {int(nothing[0])}: found nothing to measure, expected an observation")
    natural[:, manifold.network.columns] = torch.nan
    source = [""] * number
    if manifold.reference_source is not None:
        names = labels_of(ds, "source") or source
        source = ["" if name == manifold.reference_source else name for name in names]
    return Candidates(working_rows(manifold, natural, conditions), shown, source), costs


def working_rows(manifold: ProcessManifold, natural: Tensor, conditions: Mapping[str, float]) -> Tensor:
    """Natural rows (N, D) in working coordinates, what is known of the task as a whole filled in."""
    natural = natural.clone()
    for name, value in conditions.items():
        column = manifold.variables.index(name)
        natural[:, column] = torch.where(natural[:, column].isnan(), value, natural[:, column])
    return manifold.standardization(natural).to(manifold.network.flow.dtype)


def conditions_known(manifold: ProcessManifold, natural: Tensor) -> dict[str, float]:
    """What rows (K, D) of a task say of it as a whole: conditions that were constant in every task."""
    constant = manifold.network.constant.tolist()
    names = [v.name for v, c in zip(manifold.variables, constant, strict=True) if c and v.role == "condition"]
    return first_known(natural, names, manifold.variables)


# ------------------------------------------------------------------------------------------------ choosing
def choose(
    known: Known,
    view: Outlook,
    candidates: Candidates,
    costs: Tensor,
    targets: Sequence[Target],
    pending: Sequence[int],
    available: Sequence[int],
    number: int,
    *,
    shortlist: int = 8,
    draws: int = 64,
    seed: int = 0,
) -> list[Choice]:
    r"""A batch of `number` available candidates, each that of most gain for its cost given those before it.

    The closed form ranks all; of the `shortlist` best, the flow's two estimates are worked out, and the gain is

    .. math:: g = c + \frac{\tau^2}{\tau^2 + s^2} (e - c), \qquad \tau^2 = \max(0, \overline{(e - c)^2 - s^2}),

    between the closed form c and the estimates' mean e with standard error s, nearer to e the more the two differ
    beyond what chance does. Rows of other sources and biases are normal in the manifold itself: there the closed form
    stands.

    Arguments:
        view: of the candidates and targets, nothing pending.
        pending: candidates that were suggested and are awaited.

    References:
        Kirsch, van Amersfoort & Gal, *BatchBALD*, NeurIPS 2019.
    """
    taken, found = list(pending), list[Choice]()
    for candidate in pending:
        view = view.after(candidate)
    weights = torch.tensor([t.weight for t in targets], dtype=torch.float64)
    flow = [t for t in targets if t.kind != "bias" and t.weight > 0]
    for turn in range(min(number, len(available))):
        left = torch.tensor([c for c in available if c not in taken])
        apart = view.gains(left)
        closed = weights @ apart
        best = (closed / costs[left]).argsort(descending=True, stable=True)[: max(1, shortlist)]
        asked = [i for i in best.tolist() if not candidates.source[int(left[i])]] if shortlist and flow else []
        if any(candidates.source[c] for c in taken):  # the flow draws no rows of other sources: the closed form stands
            asked = []
        nothing = torch.full_like(closed, torch.nan)
        gain, sides = closed.clone(), [nothing.clone() for _ in range(3)]
        if asked:
            some, awaited = _some(candidates, left[asked].tolist()), _some(candidates, taken)
            told = estimates(known, some, awaited, flow, draws, seed=seed + 7919 * turn)
            both = torch.stack([told.likelihood, told.posterior]).double()
            errors = torch.stack([told.likelihood_error, told.posterior_error]).double().mean(0)
            off = both.mean(0) - closed[asked] + _unasked(weights, targets, apart[:, asked])
            spread = (off.square() - errors.square()).mean().clamp_min(0.0)
            gain[asked] = closed[asked] + off * spread / (spread + errors.square()).clamp_min(1e-12)
            for side, values in zip(sides, (*both, errors), strict=True):
                side[asked] = values
        place = best[int((gain[best] / costs[left][best]).argmax())]
        candidate = int(left[place])
        likelihood, posterior, error = (float(side[place]) for side in sides)
        own = tuple(apart[:, place].tolist())
        found.append(Choice(candidate, float(gain[place]), float(closed[place]), likelihood, posterior, error, own))
        taken.append(candidate)
        view = view.after(candidate)
    return found


def _unasked(weights: Tensor, targets: Sequence[Target], apart: Tensor) -> Tensor:
    """What of the closed form the flow was not asked about."""
    silent = torch.tensor([t.kind == "bias" for t in targets])
    return (weights * silent) @ apart


def _some(candidates: Candidates, which: Sequence[int]) -> Candidates:
    index = torch.tensor(list(which), dtype=torch.long)
    return Candidates(candidates.rows[index], candidates.measured[index], [candidates.source[c] for c in which])
