r"""A plain verdict on each direction: use it, use it with care, do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_invman.diagnostics.answers import Answers
from pyro_invman.diagnostics.recalibration import residuals, temperature
from pyro_invman.diagnostics.reference import Evidence, evidence_against
from pyro_invman.diagnostics.uniform import holm, uniformity

USE, CARE, DO_NOT = "use it", "use it with care", "do not use it"
FEWEST = 20
"""Questions below which no direction is called fit for use."""
_BIAS = 0.4  # in standard deviations of an answer, above which it is not a blemish but an error
_COVERED = 0.8  # share of truths in 90 % intervals, below which it is an error


class Verdict(NamedTuple):
    """What is to be thought of one direction.

    Arguments:
        verdict: "use it", "use it with care" or "do not use it".
        reasons: in plain words.
        flagged: whether a test found it wrong, at the level of all tests together.
        questions: N.
        p_calibration: least p-value of its ranks and its coverage, adjusted for all tests of all directions.
        p_reference: of the evidence that a reference knew better, adjusted too.
        log_loss, log_loss_of_nothing: nats a question.
        gain, gain_error: how much less the loss is than that of knowing nothing, and its standard error over tasks.
        reference_gain: how much less the reference's loss is than the model's, on the same questions; NaN where none.
        covered: share of truths in central 90 % intervals; NaN without numbers.
        temperature, temperature_error: what the variance of answers should be multiplied by.
        bias: mean error in standard deviations of an answer, of the target that is worst.
    """

    verdict: str
    reasons: str
    flagged: bool
    questions: int
    p_calibration: float
    p_reference: float
    log_loss: float
    log_loss_of_nothing: float
    gain: float
    gain_error: float
    reference_gain: float
    covered: float
    temperature: float
    temperature_error: float
    bias: float


def judge(
    asked: Mapping[str, Answers], references: Mapping[str, Tensor] | None = None, level: float = 0.02, seed: int = 0
) -> dict[str, Verdict]:
    r"""Verdicts on directions, by tests that together cry wolf with probability at most `level`.

    Of each direction are tested, on held-out questions: that ranks of each target are uniform
    (:func:`pyro_invman.diagnostics.sbc`), that the content of the highest-density region that holds the truth is
    (:func:`pyro_invman.diagnostics.coverage`), and that no reference knew better
    (:func:`pyro_invman.diagnostics.reference.evidence_against`), which finds a model that is calibrated because it says
    little. All p-values are adjusted for their number by Holm's procedure. A direction that fails a test is not to be
    used if it is materially wrong (90 % intervals that cover less than 80 %, a bias above 0.4 standard deviations, a
    reference that knew better) and to be used with care otherwise. With care, too, is what fewer than 20 questions
    speak for, and what does not surely say more than knowing nothing.

    Arguments:
        asked: answers by name of the direction.
        references: log-densities (N,) that a reference gave the truths; NaN where it gave none.
        level: probability that a model that is right is flagged in any direction. Ranks are of independent questions.

    Example::

        >>> from pyro_invman.diagnostics import answers
        >>> d = torch.distributions.Normal(torch.zeros(200), 1.0)
        >>> right, narrow = (answers(d, s * d.sample(), nothing=torch.full((200,), -3.0)) for s in (1.0, 2.0))
        >>> found = judge({"right": right, "narrow": narrow})
        >>> found["right"].verdict, found["narrow"].verdict
        ('use it', 'do not use it')
    """
    if not asked:
        raise ValueError("asked: found no direction, expected at least one")
    tests: list[tuple[str, str, float]] = []
    evidence: dict[str, Evidence] = {}
    for name, each in asked.items():
        for column in each.levels(seed).unbind(-1):
            tests.append((name, "calibration", uniformity(column[~column.isnan()])))
        tests.append((name, "calibration", uniformity(each.credibility(seed))))
        log_prob = None if references is None else references.get(name)
        nobody = torch.full_like(each.log_prob, math.nan)
        evidence[name] = evidence_against(each, nobody if log_prob is None else log_prob)
        if evidence[name].questions:
            tests.append((name, "reference", evidence[name].p_value))
    adjusted = holm(np.array([p for _, _, p in tests]))
    least = {(name, kind): 1.0 for name in asked for kind in ("calibration", "reference")}
    for (name, kind, _), p in zip(tests, adjusted, strict=True):
        least[name, kind] = min(least[name, kind], float(p))
    return {
        name: _judged(each, evidence[name], least[name, "calibration"], least[name, "reference"], level, seed)
        for name, each in asked.items()
    }


def covered(asked: Answers, level: float = 0.9, seed: int = 0) -> float:
    """Share of truths in central intervals of that content, over all targets that are numbers; NaN without any."""
    levels = asked.levels(seed)[:, [not v.discrete for v in asked.variables]]
    seen = ~levels.isnan()
    return float(((levels - 0.5).abs() <= level / 2)[seen].double().mean()) if bool(seen.any()) else math.nan


def gain_over_nothing(asked: Answers) -> tuple[float, float]:
    """Mean of log q(truth) − log p(truth) with nothing known, in nats, and its standard error over tasks."""
    difference = asked.log_prob - asked.nothing
    names = asked.labels.get("task") or [str(i) for i in range(len(asked))]
    place = {name: t for t, name in enumerate(dict.fromkeys(names))}
    task = torch.tensor([place[name] for name in names])
    mean = difference.mean()
    sums = torch.zeros(len(place), dtype=torch.float64).index_add(0, task, difference - mean)
    number = len(place)
    error = float(sums.square().sum().sqrt()) / len(difference) * math.sqrt(number / max(1, number - 1))
    return float(mean), error if number > 1 else math.nan


def _judged(
    asked: Answers, evidence: Evidence, p_calibration: float, p_reference: float, level: float, seed: int
) -> Verdict:
    gain, error = gain_over_nothing(asked)
    share = covered(asked, seed=seed)
    scores = residuals(asked)
    numbers = bool((~scores.isnan()).any())
    heat = temperature(asked) if numbers else None
    bias = max((b for b in heat.bias if not math.isnan(b)), key=abs, default=math.nan) if heat else math.nan
    wrong, knew = p_calibration <= level, p_reference <= level
    material = share < _COVERED or abs(bias) > _BIAS
    reasons = []
    if wrong:
        reasons.append(_how_wrong(asked, share, bias, heat.value if heat else math.nan))
    if knew:
        more = evidence.reference - evidence.model
        reasons.append(f"there is more to be known: a reference is {more:.2f} nats a question better")
    if len(asked) < FEWEST:
        reasons.append(f"only {len(asked)} held-out questions to judge by")
    silent = not gain > 2 * error
    if silent:
        if math.isnan(gain):
            reasons.append("nothing known of it to compare with")
        elif math.isnan(error):
            reasons.append(f"{gain:+.2f} nats a question on knowing nothing, of one task: no telling whether by luck")
        elif gain > 0:
            reasons.append(f"not surely better than knowing nothing ({gain:.2f} ± {error:.2f} nats a question)")
        else:
            reasons.append("says no more than knowing nothing")
    verdict = DO_NOT if knew or (wrong and material) else CARE if reasons else USE
    if not reasons:
        interval = "" if math.isnan(share) else f"; 90 % intervals held {share:.0%}"
        reasons.append(f"{gain:.2f} nats a question better than knowing nothing{interval}")
    return Verdict(
        verdict,
        "; ".join(reasons),
        wrong or knew,
        len(asked),
        p_calibration,
        p_reference,
        -float(asked.log_prob.mean()),
        -float(asked.nothing.mean()),
        gain,
        error,
        evidence.reference - evidence.model,
        share,
        heat.value if heat else math.nan,
        heat.std_error if heat else math.nan,
        bias,
    )


def _how_wrong(asked: Answers, share: float, bias: float, heat: float) -> str:
    said = []
    if abs(bias) > 0.15:
        said.append(
            f"biased: truths lie {abs(bias):.2f} standard deviations {'above' if bias > 0 else 'below'} answers"
        )
    if share < 0.87:
        said.append(f"over-confident: 90 % intervals held {share:.0%}")
    elif share > 0.93:
        said.append(f"too wide: 90 % intervals held {share:.0%}")
    return (
        "; ".join(said)
        or f"ranks are not uniform (variance off by a factor {heat:.2f}, 90 % intervals held {share:.0%})"
    )
