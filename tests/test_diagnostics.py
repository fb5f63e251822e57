"""Calibration, evidence and verdicts against closed forms, and on models that are broken on purpose."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyro.distributions import MultivariateNormal
from scipy.stats import binom

import pyro_invman as pim
from pyro_invman import diagnostics
from pyro_invman.data import to_tensor
from pyro_invman.diagnostics.reference import RowGaussian, evidence_against
from pyro_invman.diagnostics.uniform import POINTS, holm
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian, LinearGaussian

PROCESS = LinearGaussian.random(2, 2, seed=0)


class Changed:
    """An exact process whose answers are widened, shifted (in standard deviations), or ignore what is given."""

    def __init__(self, process=PROCESS, spread=1.0, shift=0.0, blind=False):
        self.process, self.variables, self.spread, self.shift, self.blind = (
            process, process.variables, spread, shift, blind,
        )  # fmt: skip

    def conditional(self, targets, given=None):
        given = given or {}
        if self.blind:
            shape = torch.broadcast_shapes(*(g.shape for g in given.values())) if given else ()
            return self.process.conditional(targets).expand(shape)
        d = self.process.conditional(targets, given)
        loc = d.loc + self.shift * d.variance.sqrt()
        return MultivariateNormal(loc, covariance_matrix=self.spread**2 * d.covariance_matrix)


class Tasks:
    """The exact posterior over tasks, as a manifold answers."""

    def __init__(self, process, **change):
        self.process, self.variables, self.change = process, process.variables, change

    def infer_task(self, rows=None, conditions=None):
        known = to_tensor(rows, self.variables)
        return Changed(self.process.row_given_rows(known), **self.change)


def asked_of(model, ds, seed=0, **how):
    """Answers in both directions, and the reference's densities."""
    held_out = diagnostics.HeldOut(model, ds, seed=seed, **how)
    reference = diagnostics.Reference(held_out)
    x, y = (list(model.variables.with_role(role)) for role in ("parameter", "observation"))
    asked = {"forward": held_out.ask(y, x), "inverse": held_out.ask(x, y)}
    return asked, {name: reference.log_prob(each) for name, each in asked.items()}


# ---------------------------------------------------------------------------------------------- uniformity
def test_p_values_and_bands_hold_at_their_level():
    generator = np.random.default_rng(1)
    draws = generator.random((2000, 60))
    p_values = np.array([diagnostics.uniformity(row) for row in draws])
    for level in (0.01, 0.05, 0.3):
        slack = 4 * math.sqrt(level / 2000)
        assert level - slack < (p_values <= level).mean() < level + slack
    band = diagnostics.simultaneous_band(60, 0.9)
    reached = (draws[:, :, None] <= POINTS).mean(1)
    outside = ((reached < band.lower - 1e-9) | (reached > band.upper + 1e-9)).any(-1)
    assert 0.1 - 0.025 < outside.mean() < 0.1 + 0.025
    assert ((p_values <= 0.1) == outside).mean() > 0.999  # the two are one test


def test_bands_are_binomial_intervals_at_each_point():
    band = diagnostics.simultaneous_band(40)
    counts = np.arange(41)[:, None]
    both = 2 * np.minimum(binom.cdf(counts, 40, POINTS), 1 - binom.cdf(counts - 1, 40, POINTS))
    inside = (counts >= 40 * band.lower - 1e-9) & (counts <= 40 * band.upper + 1e-9)
    assert both[~inside].max() < both[inside].min() < 0.05  # one tail probability for all points, less than for one
    np.testing.assert_allclose(band.lower, 1 - band.upper[::-1], atol=1e-12)


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.03, 0.01, 0.5])), [0.06, 0.03, 0.5])


# ---------------------------------------------------------------------------------------------- answers
def test_levels_and_credibility_of_known_draws():
    truth = torch.linspace(-2, 2, 9).double()
    d = torch.distributions.Normal(torch.zeros(9).double(), 1.0)
    asked = diagnostics.answers(d, truth, ["x"], num_draws=9_999)
    below = (asked.draws[..., 0] < truth).sum(0)
    levels = asked.levels()[:, 0]
    assert ((levels >= below / 10_000) & (levels <= (below + 1) / 10_000)).all()
    exact = torch.erf(truth.abs() / math.sqrt(2))
    torch.testing.assert_close(asked.credibility(), exact, atol=0.02, rtol=0)
    torch.testing.assert_close(asked.log_prob, d.log_prob(truth))


def test_ties_are_broken_at_random():
    """A law on one point, which says where everything is and is right, is calibrated."""
    d = torch.distributions.Categorical(torch.tensor([1.0, 0.0]).expand(400, 2))
    asked = diagnostics.answers(d, torch.zeros(400), ["level"])
    assert diagnostics.uniformity(asked.levels()[:, 0]) > 0.01 and diagnostics.uniformity(asked.credibility()) > 0.01


def test_missing_truths_are_marginalised():
    ds = PROCESS.sample(60, seed=3, missing=0.3)
    asked = diagnostics.ask(PROCESS, ds, ["y1", "y2"], ["x1"])
    values = to_tensor(ds, PROCESS.variables)[asked.rows]
    for n in range(len(asked)):
        names = [v for v, cell in zip(("y1", "y2"), values[n, 2:], strict=True) if not cell.isnan()]
        known = {"x1": values[n, 0]}
        exact = PROCESS.conditional(names, known).log_prob(values[n, [PROCESS.variables.index(v) for v in names]])
        torch.testing.assert_close(asked.log_prob[n], exact)
        exact = PROCESS.conditional(names).log_prob(values[n, [PROCESS.variables.index(v) for v in names]])
        torch.testing.assert_close(asked.nothing[n], exact)
    assert asked.draws.isnan().any(0).equal(asked.truth.isnan())
    assert set(asked.labels["pattern"]) == {"complete", "without x1"}


def test_a_row_of_a_task_is_asked_about_once_given_rows_before_it():
    process = HierarchicalLinearGaussian.random(seed=0)
    ds = process.sample(8, 12, seed=2, missing=0.3)
    held_out = diagnostics.HeldOut(Tasks(process), ds, context_sizes=(0, 1, 4))
    asked = held_out.ask(["y1"], ["x1", "x2"])
    values = to_tensor(ds, process.variables)
    assert len(set(asked.rows.tolist())) == len(asked)
    for task in held_out.tasks:
        order = held_out.rows_of(task)
        places = sorted(
            order.index(i) for i, name in zip(asked.rows.tolist(), asked.labels["task"], strict=True) if name == task
        )
        assert places  # each question stands on rows before it, and after the question before
        known = 0
        for place, size in zip(places, (0, 1, 4), strict=False):
            k = max(size, known)
            n = asked.rows.tolist().index(order[place])
            given = {"x1": values[order[place], 0], "x2": values[order[place], 1]}
            exact = process.posterior_predictive(["y1"], given, values[order[:k]])
            torch.testing.assert_close(asked.log_prob[n], exact.log_prob(values[order[place], 2:3]))
            known = place + 1


def test_rows_of_which_nothing_is_given_are_asked_about_all_the_same():
    ds = PROCESS.sample(30, seed=3)
    ds["x1"].values[10:] = np.nan
    asked = diagnostics.ask(PROCESS, ds, ["y1"], ["x1"])
    blind = torch.tensor([label == "without x1" for label in asked.labels["pattern"]])
    assert int(blind.sum()) == 20 and len(asked) == 30
    torch.testing.assert_close(asked.log_prob[blind], asked.nothing[blind])
    assert not torch.equal(asked.log_prob[~blind], asked.nothing[~blind])


def test_strata_count_their_questions():
    process = HierarchicalLinearGaussian.random(seed=0)
    ds = process.sample(40, 8, seed=2, missing=0.2)
    lab = np.where(np.arange(320) % 3 == 0, "b", "a").astype(object)
    found = diagnostics.sbc(diagnostics.ask(Tasks(process), ds.assign_coords(source=("row", lab)), ["y1"]))
    assert found.stratum.values[0] == "all" and {"k: 0", "k: 3–5", "source: a"} <= set(found.stratum.values)
    names = [str(s) for s in found.stratum.values if str(s).startswith("source")]
    assert int(found["count"].sel(stratum=names).sum()) == int(found["count"].sel(stratum="all").sum())
    assert (found.log_loss < found.log_loss_of_nothing).sel(stratum=["all", "k: 3–5"]).all()


def test_refusals():
    d = torch.distributions.Normal(torch.zeros(3), 1.0)
    with pytest.raises(pim.DataError, match="expected batch"):
        diagnostics.answers(d, torch.zeros(4))
    with pytest.raises(pim.DataError, match="both a target and given"):
        diagnostics.ask(PROCESS, PROCESS.sample(5, seed=0), ["y1"], ["y1"])
    with pytest.raises(pim.DataError, match="task column"):
        diagnostics.ask(Tasks(HierarchicalLinearGaussian.random()), PROCESS.sample(5, seed=0), ["y1"])
    with pytest.raises(pim.DataError, match="max_questions: found 0"):
        diagnostics.ask(PROCESS, PROCESS.sample(5, seed=0), ["y1"], max_questions=0)
    with pytest.raises(TypeError, match="truth"):
        diagnostics.sbc(d)
    with pytest.raises(pim.DataError, match="finite"):
        diagnostics.c2st(torch.zeros(3, 1), torch.full((3, 1), math.nan))


# ---------------------------------------------------------------------------------------------- curves
@pytest.mark.parametrize(
    ("curves", "wrong"),
    [(diagnostics.sbc, {"shift": 0.5}), (diagnostics.coverage, {"spread": 0.6}), (diagnostics.tarp, {"spread": 0.6})],
)
def test_curves_tell_wrong_from_right(curves, wrong):
    ds = PROCESS.sample(300, seed=5)
    right, broken = (curves(diagnostics.ask(m, ds, ["y1", "y2"], ["x1", "x2"])) for m in (PROCESS, Changed(**wrong)))
    assert float(right.p_value.min()) > 0.01 and float(broken.p_value.max()) < 0.001
    inside = (right.curve >= right.lower) & (right.curve <= right.upper)
    assert inside.all() and right.attrs["question"] == "y1, y2 | x1, x2"


def test_expected_coverage_of_a_narrow_normal_is_the_closed_form():
    d = torch.distributions.Normal(torch.zeros(4000).double(), 0.5)
    found = diagnostics.coverage(d, torch.randn(4000).double(), num_draws=999)
    content = torch.tensor([0.5, 0.9]).double()
    exact = torch.erf(0.5 * torch.erfinv(content))  # half as wide as it should be
    np.testing.assert_allclose(found.curve.sel(point=[0.5, 0.9], method="nearest")[0], exact, atol=0.03)


def test_predictive_checks_compare_tables():
    ds = PROCESS.sample(200, seed=6)
    right = diagnostics.predictive_check(diagnostics.ask(PROCESS, ds, ["y1"], ["x1"]))
    assert (right.p_value > 0.01).all() and (
        (right.measured > right.lower) & (right.measured < right.upper)
    ).mean() >= 0.6
    wide = diagnostics.predictive_check(diagnostics.ask(Changed(spread=1.5), ds, ["y1"], ["x1"]))
    assert float(wide.p_value.sel(statistic="standard deviation")[0, 0]) < 0.03
    of_all = {"span": lambda cells: cells.max(-1).values - cells.min(-1).values}
    d = torch.distributions.Normal(torch.zeros(100), 1.0)
    own = diagnostics.predictive_check(d, torch.full((100,), 0.1), of_all)
    assert own.statistic.values.tolist() == ["span"] and float(own.measured[0, 0, 0]) == 0


# ---------------------------------------------------------------------------------------------- evidence and verdicts
def test_row_gaussian_knows_its_conditionals():
    rows = to_tensor(PROCESS.sample(4000, seed=7, missing=0.1), PROCESS.variables)
    judge = RowGaussian(PROCESS.variables, rows)
    new = to_tensor(PROCESS.sample(200, seed=8), PROCESS.variables)
    exact = PROCESS.conditional(["y1", "y2"], {"x1": new[:, 0]}).log_prob(new[:, 2:])
    assert (judge.log_prob(new, [2, 3], [0]) - exact).abs().mean() < 0.05


def test_evidence_against_a_right_model_has_mean_at_most_one():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 5, generator=generator).double()
    right = torch.distributions.Normal(0.0, 1.0)
    shape = diagnostics.answers(torch.distributions.Normal(torch.zeros(5).double(), 1.0), draws[0])
    other = torch.distributions.Normal(torch.tensor(0.3).double(), 1.2)
    each = [evidence_against(replace(shape, log_prob=right.log_prob(row)), other.log_prob(row)) for row in draws]
    found = torch.tensor([evidence.log_evidence for evidence in each])
    assert found.exp().mean() < 1 + 4 * found.exp().std() / math.sqrt(4000)
    same = evidence_against(shape, shape.log_prob)
    assert same.log_evidence == pytest.approx(0.0, abs=1e-9) and same.p_value == pytest.approx(1.0)


def test_a_right_model_is_flagged_at_most_five_times_in_a_hundred():
    flagged = 0
    for seed in range(100):
        process = LinearGaussian.random(2, 2, seed=seed)
        asked, references = asked_of(process, process.sample(100, seed=1000 + seed), seed)
        flagged += any(v.flagged for v in diagnostics.judge(asked, references, seed=seed).values())
    assert flagged <= 5


def test_a_right_model_of_tasks_is_fit_for_use():
    process = HierarchicalLinearGaussian.random(seed=0)
    found = diagnostics.judge(*asked_of(Tasks(process), process.sample(40, 10, seed=9), max_questions=150))
    assert [v.verdict for v in found.values()] == ["use it", "use it"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spread": 0.6}, "over-confident"),
        ({"shift": 0.6}, "biased"),
        ({"blind": True}, "more to be known"),
        ({"spread": 1.7}, "too wide"),
    ],
)
def test_broken_models_are_flagged(change, words):
    ds = PROCESS.sample(200, seed=10)
    found = diagnostics.judge(*asked_of(Changed(**change), ds))
    assert all(v.flagged for v in found.values())
    assert words in " ".join(v.reasons for v in found.values())
    if words != "too wide":
        assert "do not use it" in {v.verdict for v in found.values()}
    tasks = HierarchicalLinearGaussian.random(seed=0)
    found = diagnostics.judge(*asked_of(Tasks(tasks, **change), tasks.sample(40, 10, seed=9), max_questions=150))
    assert found["forward"].flagged


def test_a_model_of_shifted_data_is_flagged():
    moved = LinearGaussian(PROCESS.variables, PROCESS.mean + torch.tensor([0.0, 0.0, 1.0, -1.0]), PROCESS.covariance)
    flow = pim.JointFlow.from_dataset(moved.sample(2000, seed=11))
    found = diagnostics.judge(*asked_of(flow, PROCESS.sample(200, seed=10)))
    assert all(v.flagged for v in found.values()) and found["forward"].verdict == "do not use it"


def test_one_held_out_task_tells_nothing_of_luck():
    process = HierarchicalLinearGaussian.random(seed=3)
    found = diagnostics.judge(*asked_of(Tasks(process), process.sample(1, 40, seed=9), max_questions=30))
    for verdict in found.values():
        assert math.isnan(verdict.gain_error)
        assert "of one task: no telling whether by luck" in verdict.reasons
        assert "no more than knowing nothing" not in verdict.reasons


def test_few_questions_call_for_care():
    found = diagnostics.judge(*asked_of(PROCESS, PROCESS.sample(12, seed=1)))
    assert {v.verdict for v in found.values()} == {"use it with care"} and "only 12" in found["forward"].reasons


# ---------------------------------------------------------------------------------------------- recalibration
def test_temperature_is_the_factor_of_the_variance():
    ds = PROCESS.sample(2000, seed=12)
    asked = diagnostics.ask(Changed(spread=0.5, shift=0.2), ds, ["y1"], ["x1"], max_questions=2000)
    found = diagnostics.temperature(asked)
    # errors of a normal half as wide: variance 4 of its own, and a shift of 0.2 of its own deviation, doubled by none
    assert abs(found.value - (4 + 0.2**2 * 1)) < 4 * found.std_error and found.std_error < 0.2
    assert abs(found.bias[0] + 0.4) < 4 * found.bias_error[0]


def test_tempered_normal_is_the_wider_normal():
    d = PROCESS.conditional(["y1", "y2"], {"x1": torch.zeros(3).double()})
    d.variables, d.targets = PROCESS.variables, ("y1", "y2")
    wide = diagnostics.Tempered(d, 2.5)
    centre = wide._centre
    torch.testing.assert_close(centre, d.loc, atol=0.2, rtol=0)
    exact = MultivariateNormal(centre + math.sqrt(2.5) * (d.loc - centre), covariance_matrix=2.5 * d.covariance_matrix)
    value = exact.sample((50,))
    torch.testing.assert_close(wide.log_prob(value), exact.log_prob(value))
    draws = wide.sample((20_000,))
    torch.testing.assert_close(draws.var(0) / d.variance, torch.full((3, 2), 2.5).double(), rtol=0.1, atol=0)
    assert wide.expand((4, 3)).log_prob(value[:4]).shape == (4, 3)


def test_tempered_density_of_a_positive_target_integrates_to_one():
    ds = pim.from_columns(
        {"x": torch.randn(200), "w": torch.randn(200).exp()},
        roles={"x": "parameter", "w": "observation"}, supports={"w": "positive"},
    )  # fmt: skip
    flow = pim.JointFlow.from_dataset(ds)
    wide = diagnostics.Tempered(flow.conditional(["w"], {"x": torch.tensor(0.3)}), 1.8)
    w = torch.linspace(-9, 9, 6001).double().exp()
    with torch.no_grad():
        density = wide.log_prob(w.unsqueeze(-1)).exp()
    assert float(torch.trapezoid(density, w)) == pytest.approx(1.0, abs=2e-3)
    with pytest.raises(pim.DataError, match="positive number"):
        diagnostics.Tempered(flow.conditional(["w"]), 0.0)


def test_conformal_stretch_by_hand_and_its_promise():
    d = torch.distributions.Normal(torch.zeros(99).double(), 1.0)
    truth = 3 * torch.randn(99).double()
    asked = diagnostics.answers(d, truth, num_draws=999)
    found = diagnostics.conformal(asked, 0.8)
    low, high = asked.draws[..., 0].quantile(torch.tensor([0.1, 0.9]).double(), dim=0)
    scores = torch.maximum(low - truth, truth - high) / (high - low)
    assert found.stretch[0] == pytest.approx(float(scores.sort().values[79])) and found.tasks == 99
    held = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        truth = 3 * torch.randn(60, generator=generator).double()
        few = torch.distributions.Normal(torch.zeros(60).double(), 1.0)
        low, high = diagnostics.conformal(diagnostics.answers(few, truth, seed=seed), 0.8).interval(
            torch.randn(199, 1, generator=generator)
        )
        held.append(float(torch.special.ndtr(high / 3) - torch.special.ndtr(low / 3)))
    assert 0.8 - 0.01 < np.mean(held) < 0.84
    with pytest.raises(pim.DataError, match="held-out tasks"):
        diagnostics.conformal(asked.select(torch.arange(99) < 5), 0.9)
