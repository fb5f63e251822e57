"""Completing rows by draws, weighted by what is declared: closed forms first, then short fits."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import pyro_invman as pim
from pyro_invman import completion
from pyro_invman.completion import Completer
from pyro_invman.joint import JointFlow
from pyro_invman.simulators.linear_gaussian import LinearGaussian

NAN = math.nan
SMALL = {"width": 32, "trunk_blocks": 1, "components": 6}
PAIR = {"x1": "parameter", "x2": "observation"}


def pair(number: int, seed: int, hide: str) -> tuple[Tensor, Tensor]:
    """A normal pair with correlation 0.8, the second missing by the first or by itself."""
    generator = torch.Generator().manual_seed(seed)
    x1, noise = torch.randn(2, number, generator=generator, dtype=torch.float64)
    x2 = 0.8 * x1 + 0.6 * noise
    score = {"first": 2 * x1, "itself": 2 * x2 - 1, "chance": torch.zeros(number)}[hide]
    hidden = torch.rand(number, generator=generator, dtype=torch.float64) < torch.special.ndtr(score)
    return x1, x2.where(~hidden, NAN)


def recorded(row):
    pyro.sample("x2", dist.Bernoulli(torch.special.ndtr(1 - 2 * row["x2"]).clamp(1e-12, 1 - 1e-12)))


def dataset(x1: Tensor, x2: Tensor):
    return pim.from_columns({"x1": x1, "x2": x2}, roles=PAIR)


def gaussian_flow(process: LinearGaussian) -> JointFlow:
    """A flow that stands on the exact Gaussian and was not trained."""
    flow = JointFlow.from_dataset(process.sample(500, seed=0), head="mixture", **SMALL).double()
    base, scales = flow.density.context.base, flow.standardization
    base.mean.copy_((process.mean - scales.loc) / scales.scale)
    base.covariance.copy_(process.covariance / torch.outer(scales.scale, scales.scale))
    with torch.no_grad():  # one component, as wide as the base
        raw = torch.tensor([[0.0] + [-30.0] * 5, [0.0] * 6, [math.log(1 - 1e-3)] * 6])
        flow.density.out.bias.copy_(raw.flatten())
    return flow


def completer(flow: JointFlow, mechanism=None, simulator=None, proposals: int = 32) -> Completer:
    like = torch.zeros(4, len(flow.variables), dtype=torch.float64)
    return Completer(flow.density, flow.standardization, flow.variables, mechanism, simulator, proposals, like)


# ------------------------------------------------------------------------------------------------ closed forms
def test_completed_cells_follow_the_conditional_given_the_observed_ones():
    process = LinearGaussian.random(2, 2, seed=1)
    flow = gaussian_flow(process)
    rows = torch.tensor([[0.5, NAN, -0.2, NAN], [NAN, NAN, 0.3, 1.0], [NAN] * 4, [0.1, 0.2, 0.3, 0.4]]).double()
    drawn = completer(flow)(rows.repeat(20_000, 1), 1, torch.Generator().manual_seed(0)).rows[0]
    natural = flow.standardization.inverse(drawn).unflatten(0, (20_000, 4))
    names = process.variables.names
    for row, draws in zip(rows, natural.unbind(1), strict=True):
        seen = ~row.isnan()
        torch.testing.assert_close(draws[:, seen], row[seen].expand(20_000, -1))
        if bool(seen.all()):
            continue
        asked = [n for n, s in zip(names, seen, strict=True) if not s]
        exact = process.conditional(asked, {n: c for n, c, s in zip(names, row, seen, strict=True) if s})
        error = (draws[:, ~seen].mean(0) - exact.mean) / exact.stddev
        assert error.abs().max() < 4 / math.sqrt(20_000)
        torch.testing.assert_close(draws[:, ~seen].T.cov(), exact.covariance_matrix, rtol=0.05, atol=0.02)


def test_categorical_and_bounded_cells_are_completed_within_their_supports():
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(300, generator=generator, dtype=torch.float64)
    kind = np.where(torch.rand(300, generator=generator).numpy() < share.numpy(), "a", "b").astype(object)
    kind[::3] = None
    ds = pim.from_columns(
        {"share": share.where(torch.arange(300) % 5 > 0, NAN), "kind": kind},
        roles={"share": "parameter", "kind": "observation"},
        supports={"share": ("interval", 0, 1), "kind": "categorical"},
    )
    flow = JointFlow.from_dataset(ds, **SMALL)
    rows = torch.full((2000, 2), NAN, dtype=torch.float64)
    drawn = flow.standardization.inverse(completer_of(flow)(rows, 1, generator).rows[0])
    assert ((drawn[:, 0] >= 0) & (drawn[:, 0] <= 1)).all()
    assert set(drawn[:, 1].tolist()) == {0.0, 1.0}
    both = drawn[:, 1] == 0
    assert drawn[both, 0].mean() > drawn[~both, 0].mean() + 0.1  # b is rarer where the share is high


def completer_of(flow: JointFlow) -> Completer:
    like = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    return Completer(flow.density, flow.standardization, flow.variables, None, None, 8, like)


def test_a_mechanism_weights_draws_as_bayes_rule_does():
    """p(x2 | x1, x2 unrecorded) is a skew normal: mean m + s δ φ(a) / Φ(a), with a = (2 m - 1) / √(1 + 4 s²)."""
    process = LinearGaussian(
        pim.Variables([pim.Variable(n, r) for n, r in PAIR.items()]),
        torch.zeros(2),
        torch.tensor([[1.0, 0.8], [0.8, 1.0]]),
    )
    work = completer(gaussian_flow(process), recorded, proposals=4000)
    x1 = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    found = work(torch.stack([x1, torch.full_like(x1, NAN)], -1), 4000, torch.Generator().manual_seed(0))
    mean, s = 0.8 * x1, 0.6
    a = (2 * mean - 1) / math.sqrt(1 + 4 * s**2)
    exact = mean + s * (2 * s / math.sqrt(1 + 4 * s**2)) * Normal(0, 1).log_prob(a).exp() / torch.special.ndtr(a)
    drawn = work.standardization.inverse(found.rows)[..., 1].mean(0)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.06)
    torch.testing.assert_close(found.log_weight, torch.special.ndtr(a).log(), rtol=0, atol=0.1)
    assert (found.effective < 4000).all() and (found.effective.diff() > 0).all()  # best where it is likely unrecorded
    seen = work(torch.tensor([[0.3, 0.4]], dtype=torch.float64), 5, torch.Generator())
    assert bool(seen.effective.isnan().all())


def test_draws_of_the_law_among_recorded_values_are_weighted_to_that_of_hidden_ones():
    """p(x2 | x1, hidden) ∝ p(x2 | x1, recorded) Φ(x2) / Φ(-x2), its mean by quadrature."""
    process = LinearGaussian(
        pim.Variables([pim.Variable(n, r) for n, r in PAIR.items()]),
        torch.zeros(2),
        torch.tensor([[1.0, 0.8], [0.8, 1.0]]),
    )

    def mildly(row):
        pyro.sample("x2", dist.Bernoulli(torch.special.ndtr(-row["x2"]).clamp(1e-12, 1 - 1e-12)))

    work = completer(gaussian_flow(process), mildly, proposals=4000)
    work.learned_from_recorded = True
    x1 = torch.tensor([-2.0, -1.0, 0.0], dtype=torch.float64)
    found = work(torch.stack([x1, torch.full_like(x1, NAN)], -1), 4000, torch.Generator().manual_seed(0))
    places = torch.linspace(-6, 4, 4001, dtype=torch.float64)
    log = Normal(0.8 * x1, 0.6).log_prob(places.unsqueeze(-1))
    log = log + (torch.special.log_ndtr(places) - torch.special.log_ndtr(-places)).unsqueeze(-1)
    exact = (log.softmax(0) * places.unsqueeze(-1)).sum(0)
    drawn = work.standardization.inverse(found.rows)[..., 1].mean(0)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.1)
    assert float((exact - 0.8 * x1).min()) > 0.3


def test_rounds_of_the_base_alone_reach_the_greatest_likelihood():
    """Of x2 given x1, hidden with probability Φ(2 x2 − 1), the likelihood is closed: log N of a cell that is seen,
    log Φ((2 m − 1) / √(1 + 4 s²)) of one that is not. From a fit to the observed cells, which is far off."""
    x1, x2 = pair(4000, 1, "itself")
    flow = JointFlow.from_dataset(dataset(x1, x2), **SMALL)
    seen = ~x2.isnan()
    theta = torch.tensor([0.0, 0.8, math.log(0.6)], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        mean, s = theta[0] + theta[1] * x1, theta[2].exp()
        hidden = torch.special.log_ndtr((2 * mean - 1) / (1 + 4 * s.square()).sqrt())
        value = -(torch.where(seen, Normal(mean, s).log_prob(x2.nan_to_num()), hidden)).mean()
        value.backward()
        return value

    optimizer.step(loss)
    best = torch.cat([theta[:2], theta[2:].exp()]).detach()

    def of_base(density) -> Tensor:
        scales, base = flow.standardization, density.context.base
        mean = scales.loc + scales.scale * base.mean
        spread = base.covariance * torch.outer(scales.scale, scales.scale)
        slope = spread[0, 1] / spread[0, 0]
        return torch.stack([mean[1] - slope * mean[0], slope, (spread[1, 1] - slope * spread[0, 1]).sqrt()])

    work = completer(flow, recorded)
    work.density = flow.density.as_base()
    assert (of_base(work.density) - best).abs().max() > 0.15
    completion._settle(work, torch.stack([x1, x2], -1), 4, seed=0)
    torch.testing.assert_close(of_base(work.density).float(), best.float(), rtol=0, atol=0.02)


def test_a_round_that_describes_held_out_cells_worse_is_taken_back():
    process = LinearGaussian.random(2, 2, seed=1)
    flow, rows = gaussian_flow(process), pim.data.to_tensor(process.sample(400, seed=3, missing=0.4), process.variables)
    before = {name: value.clone() for name, value in flow.density.state_dict().items()}

    def ruin(number: int, pool: Tensor, checked: Tensor) -> list:
        flow.density.out.bias.data.add_(0.5)
        return []

    def leave(number: int, pool: Tensor, checked: Tensor) -> list:
        return []

    for run, kept in ((ruin, [False]), (leave, [True, True])):
        done = completion.rounds(
            completer(flow), lambda _: rows[:200], rows[200:], run, completion.Completion(), (1, 1), 0,
            flow.density.as_base(),
        )  # fmt: skip
        assert [each.kept for each in done] == kept
        for name, value in flow.density.state_dict().items():
            assert torch.equal(value, before[name])


def test_no_round_is_taken_back_where_the_evidence_knows_nothing_of_what_is_declared():
    """A simulator that only draws; with the density the round goes."""
    variables = pim.Variables([pim.Variable("x", "parameter"), pim.Variable("y", "observation")])
    flow = gaussian_flow(LinearGaussian(variables, torch.zeros(2), torch.diag(torch.tensor([1.0, 5.0]))))
    x, noise = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = torch.arange(400) % 2 == 0
    rows = torch.stack([x.where(half, NAN), (2 * x + noise).where(~half, NAN)], -1)

    def ruin(number: int, pool: Tensor, checked: Tensor) -> list:
        flow.density.out.bias.data.add_(0.5)
        return []

    found = []
    for function in (
        lambda row: {"y": 2 * row["x"] + torch.randn_like(row["x"])},
        lambda row: pyro.sample("y", dist.Normal(2 * row["x"], 1.0)),
    ):
        work = completer(flow, None, pim.Simulator(function, ["x"], ["y"]))
        done = completion.rounds(
            work, lambda _: rows[:200], rows[200:], ruin, completion.Completion(), (1, 1), 0, flow.density.as_base()
        )
        found.append([each.kept for each in done])
    assert all(found[0])
    assert found[1] == [False]


def test_a_trained_flow_without_what_it_learned_is_its_base():
    process = LinearGaussian.random(2, 2, seed=1)
    flow = gaussian_flow(process)
    torch.manual_seed(0)
    for parameter in flow.density.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    names, rows = process.variables.names, process.mean + 0.5 * torch.randn(20, 4).double()
    given = {names[0]: rows[:, 0], names[3]: rows[:, 3]}
    exact = process.conditional(names[1:3], given).log_prob(rows[:, 1:3])
    assert (flow.conditional(names[1:3], given).log_prob(rows[:, 1:3]) - exact).abs().max() > 0.1
    flow.density = flow.density.as_base()
    torch.testing.assert_close(flow.conditional(names[1:3], given).log_prob(rows[:, 1:3]), exact, rtol=0, atol=1e-6)


def test_a_simulator_completes_forwards_and_weights_backwards():
    """x ~ N(0, 1), y = 2 x + N(0, 1) declared; the flow knows nothing of the link: x | y is N(2 y / 5, 1 / 5)."""
    variables = pim.Variables([pim.Variable("x", "parameter"), pim.Variable("y", "observation")])
    flow = gaussian_flow(LinearGaussian(variables, torch.zeros(2), torch.diag(torch.tensor([1.0, 5.0]))))
    simulator = pim.Simulator(lambda row: pyro.sample("y", dist.Normal(2 * row["x"], 1.0)), ["x"], ["y"])
    work = completer(flow, None, simulator, proposals=4000)
    rows = torch.tensor([[1.5, NAN], [NAN, 2.0], [NAN, -1.0]], dtype=torch.float64)
    found = work(rows, 4000, torch.Generator().manual_seed(1))
    natural = flow.standardization.inverse(found.rows)
    assert abs(natural[:, 0, 1].mean() - 3.0) < 0.06 and abs(natural[:, 0, 1].std() - 1.0) < 0.05
    y = rows[1:, 1]
    torch.testing.assert_close(natural[:, 1:, 0].mean(0), 2 * y / 5, rtol=0, atol=0.04)
    torch.testing.assert_close(natural[:, 1:, 0].std(0), torch.full((2,), 0.2**0.5).double(), rtol=0, atol=0.03)
    evidence = work.evidence(rows, torch.Generator().manual_seed(1)) + torch.stack(
        [flow.standardization.log_abs_det_jacobian(row).where(~row.isnan(), 0.0).sum() for row in rows]
    )
    exact = torch.stack([Normal(0.0, 1.0).log_prob(rows[0, 0]), *Normal(0.0, 5**0.5).log_prob(y)])
    torch.testing.assert_close(evidence, exact, rtol=0, atol=0.05)


def test_draws_of_which_none_can_be_are_said():
    process = LinearGaussian.random(1, 1, seed=0)

    def always(row):
        pyro.sample("y1", dist.Delta(torch.ones_like(row["y1"])))

    work = completer(gaussian_flow(process), always, proposals=8)
    with pytest.raises(pim.DataError, match="no weight to any of 8 draws"):
        work(torch.tensor([[0.0, NAN]]).double(), 1, torch.Generator())


# ------------------------------------------------------------------------------------------------ fits
def line_of(flow: JointFlow, target: str, given: str) -> tuple[float, float, float]:
    """Intercept, slope and standard deviation of a conditional, over standard normal givens."""
    at = torch.randn(400, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        draws = flow.conditional([target], {given: at}).sample((500,))[..., 0].double()
    mean = draws.mean(0)
    slope = float((mean * (at - at.mean())).sum() / (at - at.mean()).square().sum())
    intercept = float(mean.mean()) - slope * float(at.mean())
    left = mean - intercept - slope * at
    return intercept, slope, float((left.square().mean() + draws.var(0).mean()).sqrt())


@pytest.fixture(scope="module")
def by_the_first():
    return dataset(*pair(4000, 0, "first"))


STEPS = pim.Schedule(steps=400)


def test_missing_by_an_observed_value_is_found_said_and_put_right(by_the_first):
    alone = JointFlow.from_dataset(by_the_first, **SMALL)
    history = alone.fit(by_the_first, progress=False, schedule=STEPS, completion=False)
    assert history.attrs["completion"] == "none" and history.attrs["missing_by"] == ["x2 by x1"]
    flow = JointFlow.from_dataset(by_the_first, **SMALL)
    history = flow.fit(by_the_first, progress=False, schedule=STEPS)
    assert history.attrs["completion"] == "the mask depends on observed values"
    assert len(history.attrs["evidence"]) == history["round"].max() >= 1
    assert history.attrs["kept"][0] == 1
    assert history.step.values.tolist() == sorted(set(history.step.values.tolist()))
    truth = torch.tensor([0.0, 0.8, 0.6])
    for target, given in (("x1", "x2"), ("x2", "x1")):
        found = torch.tensor(line_of(flow, target, given))
        assert (found - truth).abs().max() < 0.06
    biased = torch.tensor(line_of(alone, "x1", "x2"))
    assert (biased - truth).abs().max() > 0.15


def test_missing_by_chance_changes_nothing():
    ds = dataset(*pair(600, 3, "chance"))
    one, other = JointFlow.from_dataset(ds, **SMALL), JointFlow.from_dataset(ds, **SMALL)
    history = one.fit(ds, progress=False, schedule=STEPS._replace(steps=20))
    assert history.attrs["completion"] == "none" and history.attrs["missing_by"] == []
    assert not history["round"].any()
    other.fit(ds, progress=False, schedule=STEPS._replace(steps=20), completion=False)
    assert torch.equal(one.density.out.weight, other.density.out.weight)


def test_missing_by_its_own_value_is_put_right_by_a_mechanism():
    ds = dataset(*pair(4000, 1, "itself"))
    flow = JointFlow.from_dataset(ds, **SMALL)
    history = flow.fit(ds, progress=False, schedule=STEPS, mechanism=recorded)
    assert "a mechanism is declared" in history.attrs["completion"]
    assert 1 < history.attrs["smallest_effective_proposals"][-1] <= history.attrs["effective_proposals"][-1] < 32
    truth = torch.tensor([0.0, 0.8, 0.6])
    assert (torch.tensor(line_of(flow, "x2", "x1")) - truth).abs().max() < 0.06
    without = JointFlow.from_dataset(ds, **SMALL)
    without.fit(ds, progress=False, schedule=STEPS, completion=False)
    assert (torch.tensor(line_of(without, "x2", "x1")) - truth).abs().max() > 0.15


def test_a_simulator_links_what_no_row_shows_together(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    half = torch.arange(1000) < 500
    columns = {"x": x.where(half, NAN), "y": (x.square() + 0.2 * noise).where(~half, NAN)}
    ds = pim.from_columns(columns, roles={"x": "parameter", "y": "observation"})
    law = pim.Simulator(lambda row: pyro.sample("y", dist.Normal(row["x"].square(), 0.2)), ["x"], ["y"])
    flow = JointFlow.from_dataset(ds, **SMALL)
    flow.fit(ds, progress=False, schedule=STEPS, simulator=law)
    with torch.no_grad():
        mean = flow.conditional(["y"], {"x": torch.tensor([-1.5, 0.0, 1.5])}).mean[:, 0]
    assert (mean - torch.tensor([2.25, 0.0, 2.25])).abs().max() < 0.5
    assert flow.links[0, 1] == 0
    flow.save(tmp_path)
    again = pim.load(tmp_path)
    assert torch.equal(again.conditional(["y"], {"x": 1.0}).log_prob(torch.tensor([1.0])),
                       flow.conditional(["y"], {"x": 1.0}).log_prob(torch.tensor([1.0])))  # fmt: skip


def test_an_interrupted_round_goes_on_as_if_undisturbed(by_the_first, tmp_path, monkeypatch):
    settings = {"progress": False, "schedule": STEPS._replace(steps=60), "seed": 3}
    settings["completion"] = pim.Completion(rounds=2, steps=30)
    whole = JointFlow.from_dataset(by_the_first, **SMALL)
    history = whole.fit(by_the_first, **settings)
    assert history["round"].max() == 2
    flow = JointFlow.from_dataset(by_the_first, **SMALL)
    times, mean = [], completion._mean

    def interrupted(values):
        times.append(0)
        if len(times) == 2:
            raise KeyboardInterrupt
        return mean(values)

    monkeypatch.setattr(completion, "_mean", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flow.fit(by_the_first, **settings, checkpoint=tmp_path / "run")
    monkeypatch.undo()
    again = flow.fit(by_the_first, **settings, checkpoint=tmp_path / "run", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, flow.state_dict()[name]), name
    assert again.step.values.tolist() == history.step.values.tolist()


def test_what_does_not_go_together_is_refused(by_the_first):
    flow = JointFlow.from_dataset(by_the_first, **SMALL)
    with pytest.raises(pim.DataError, match="completion is False, but"):
        flow.fit(by_the_first, progress=False, mechanism=recorded, completion=False)
    with pytest.raises(pim.DataError, match="unknown variable 'z'"):
        flow.fit(by_the_first, progress=False, simulator=pim.Simulator(recorded, ["x1"], ["z"]))
    with pytest.raises(pim.DataError, match="no sample site"):
        flow.fit(by_the_first, progress=False, mechanism=lambda row: None)
