"""Design on a manifold: information by closed forms of a linear-Gaussian process, batches, sources, campaigns."""

import math

import pytest
import torch

import pyro_invman as pim
from pyro_invman import plots
from pyro_invman.data import from_tensor, to_tensor
from pyro_invman.density.joint_normal import JointNormal
from pyro_invman.design.campaign import Campaign
from pyro_invman.design.estimates import estimates
from pyro_invman.design.objectives import candidates_of, check_objective, targets_of
from pyro_invman.design.outlook import Candidates, Known, outlook
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian

PROCESS = HierarchicalLinearGaussian.random(seed=0)
SETTINGS, OBSERVED = ["x1", "x2"], ["y1", "y2", "y3", "y4"]


def exactly(process, ds, **settings) -> pim.ProcessManifold:
    """An untrained manifold that is the process: linear base at the truth, heads and beliefs at their base."""
    manifold = pim.ProcessManifold.from_dataset(
        ds, latent_dim=2, flow={"width": 16, "components": 1}, encoder={"width": 16}, **settings
    )
    network, scales = manifold.network, manifold.standardization
    effects = network.base.effects
    network.base.functions = None
    effects.mean.copy_((process.mean - scales.loc) / scales.scale)
    effects.loading.copy_(process.loading / scales.scale.unsqueeze(-1))
    effects.covariance.copy_(process.covariance / scales.scale.unsqueeze(-1) / scales.scale)
    mean, covariance = effects.joint()
    network.context.base.mean.copy_(mean)
    network.context.base.covariance.copy_(covariance)
    with torch.no_grad():
        network.flow.out.bias.copy_(torch.tensor([0.0, 0.0, math.log(1 - network.flow.min_scale)]))
        network.encoder.out.weight.zero_()
    return manifold


@pytest.fixture(scope="module")
def manifold():
    return exactly(PROCESS, PROCESS.sample(30, 8, seed=1))


@pytest.fixture(scope="module")
def rows():
    return PROCESS.sample(1, 3, seed=5, missing=0.2)


def asked(manifold, rows, objective, measured):
    """Known, candidates and targets for candidates that differ in which of the observations (C, 4) are measured."""
    settings = PROCESS.sample(1, len(measured), seed=7)[SETTINGS]
    names = [",".join(n for n, m in zip(OBSERVED, row, strict=True) if m) for row in measured.tolist()]
    found = candidates_of(settings.assign_coords(measure=("row", names)), manifold, {}, None)[0]
    known = Known.of(manifold, rows, None)
    return known, found, targets_of(check_objective(objective, manifold), known, {})


def some_measured(number=8):
    measured = torch.rand(number, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    measured[:, 0] |= ~measured.any(-1)
    return measured


def full(measured):
    """Which cells (C, 1, D) of one new row are observed: settings are known."""
    return torch.cat([torch.ones(len(measured), 2, dtype=torch.bool), measured], -1).unsqueeze(1)


def test_information_between_normal_cells():
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint = JointNormal(root @ root.mT)
    cells, seen = torch.tensor([[2, 3], [4, 2]]), torch.tensor([[True, True], [True, False]])
    found = joint.information(cells, seen, torch.tensor([[0, 1]]), torch.tensor([[True, False]]))[0]
    for value, index in zip(found, ([2, 3], [4]), strict=True):
        both = joint.covariance[[0, *index]][:, [0, *index]]
        apart = joint.covariance[0, 0].log() + torch.logdet(both[1:, 1:])
        torch.testing.assert_close(value, 0.5 * (apart - torch.logdet(both)), rtol=1e-6, atol=1e-7)
    after = joint.after(torch.tensor([2])).covariance
    exact = joint.covariance - torch.outer(joint.covariance[2], joint.covariance[2]) / joint.covariance[2, 2]
    torch.testing.assert_close(after[[0, 1, 3, 4]][:, [0, 1, 3, 4]], exact[[0, 1, 3, 4]][:, [0, 1, 3, 4]])


def exact_forward(rows, measured, output):
    """I(y*; row) of one predicted output, from the posterior predictive covariance."""
    latent = PROCESS.task_posterior(to_tensor(rows, PROCESS.variables)).covariance_matrix
    noise = torch.linalg.inv(torch.linalg.inv(PROCESS.covariance)[2:, 2:])
    loading = PROCESS.loading[2:]
    found = []
    for row in measured:
        u = loading[row]
        among = u @ latent @ u.mT + noise[row][:, row]
        target = loading[output]
        across = target @ latent @ u.mT
        alone = target @ latent @ target + noise[output, output]
        found.append(-0.5 * torch.log1p(-across @ torch.linalg.solve(among, across) / alone))
    return torch.stack(found)


@pytest.mark.parametrize("objective", ["task", "predict"])
def test_both_estimates_and_the_closed_form_beside_the_exact_gain(manifold, rows, objective):
    measured = some_measured()
    at = PROCESS.sample(1, 2, seed=9)[SETTINGS]
    exact = PROCESS.information_gain(full(measured), to_tensor(rows, PROCESS.variables))
    wanted = "task" if objective == "task" else {"predict": ["y2"], "at": at}
    if objective == "predict":
        exact = exact_forward(rows, measured, 1)
    known, candidates, targets = asked(manifold, rows, wanted, measured)
    closed = outlook(known, candidates, targets).gains(torch.arange(len(measured)))[0]
    torch.testing.assert_close(closed, exact, rtol=1e-4, atol=1e-6)
    nothing = Candidates(candidates.rows[:0], candidates.measured[:0], [])
    found = estimates(known, candidates, nothing, targets, draws=512, particles=128)
    for side, error in ((found.likelihood, found.likelihood_error), (found.posterior, found.posterior_error)):
        assert bool(((side - exact).abs() < 4 * error + 0.01).all())
        assert bool((error < 0.08).all())


def test_settings_of_a_row_are_learned_through_the_latent(manifold, rows):
    """I(x1; new row | y of a row), exact: latent and setting are jointly normal given what that row shows."""
    measured = some_measured(5)
    of = PROCESS.sample(1, 1, seed=11)
    known = Known.of(manifold, rows, None)
    with_row = Campaign(manifold, rows, of[["x2"]], objective={"parameters": ["x1"], "of": of})
    names = [",".join(n for n, m in zip(OBSERVED, row, strict=True) if m) for row in measured.tolist()]
    settings = PROCESS.sample(1, 5, seed=7)[SETTINGS].assign_coords(measure=("row", names))
    known = Known.of(manifold, with_row.rows, None)
    candidates = candidates_of(settings, manifold, {}, None)[0]
    view = outlook(known, candidates, targets_of(with_row.objective, known, {}))
    latent = PROCESS.task_posterior(to_tensor(rows, PROCESS.variables)).covariance_matrix
    loading, cov = PROCESS.loading, PROCESS.covariance
    joint = torch.zeros(8, 8, dtype=torch.float64)  # of latent and a row
    joint[:2, :2], joint[2:, 2:] = latent, cov + loading @ latent @ loading.mT
    joint[:2, 2:], joint[2:, :2] = latent @ loading.mT, loading @ latent
    given = [3, 4, 5, 6, 7]  # x2 and y
    kept = [0, 1, 2]
    left = joint[kept][:, kept] - joint[kept][:, given] @ torch.linalg.solve(
        joint[given][:, given], joint[given][:, kept]
    )
    noise = torch.linalg.inv(torch.linalg.inv(cov)[2:, 2:])
    exact = []
    for row in measured:
        u = torch.cat([loading[2:][row], torch.zeros(int(row.sum()), 1, dtype=torch.float64)], -1)
        among, across = u @ left @ u.mT + noise[row][:, row], u @ left[:, 2]
        exact.append(-0.5 * torch.log1p(-across @ torch.linalg.solve(among, across) / left[2, 2]))
    found = view.gains(torch.arange(5))[0]
    torch.testing.assert_close(found, torch.stack(exact), rtol=0.25, atol=0.004)  # slopes from 1,024 draws


def test_batches_are_those_of_the_exact_greedy_and_duplicates_do_not_count_twice(manifold, rows):
    measured = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0]]).bool()
    names = [",".join(n for n, m in zip(OBSERVED, row, strict=True) if m) for row in measured.tolist()]
    settings = PROCESS.sample(1, 6, seed=7)[SETTINGS].assign_coords(measure=("row", names))
    campaign = Campaign(manifold, rows, settings, None)
    chosen = campaign.suggest(4)
    values, picked, exact = to_tensor(rows, PROCESS.variables), [], []
    for _ in range(4):
        left = [c for c in range(6) if c not in picked]
        gains = []
        for c in left:
            batch = full(measured)[[*picked, c], 0]
            before = PROCESS.information_gain(full(measured)[picked, 0], values) if picked else 0.0
            gains.append(float(PROCESS.information_gain(batch, values) - before))
        picked.append(left[max(range(len(left)), key=gains.__getitem__)])
        exact.append(max(gains))
    assert chosen["candidate"].values.tolist() == picked
    assert chosen["closed_form"].values.tolist() == pytest.approx(exact, rel=1e-4)
    view = outlook(*asked(manifold, rows, "task", measured))  # the first two are alike
    once, twice = (PROCESS.information_gain(full(measured)[:n, 0], values) for n in (1, 2))
    again = view.after(0).gains(torch.tensor([1]))[0, 0]
    torch.testing.assert_close(again, twice - once, rtol=1e-4, atol=1e-7)
    assert float(again) < 0.9 * float(once)


def test_cost_decides_between_rows_alike(manifold):
    settings = PROCESS.sample(1, 3, seed=7)[SETTINGS].assign_coords(cost=("row", [3.0, 1.0, 2.0]))
    chosen = Campaign(manifold, None, settings).suggest(3)
    assert chosen["candidate"].values.tolist() == [1, 2, 0]
    assert chosen["cost"].values.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(pim.DataError, match="cost in row 1: found -1"):
        Campaign(manifold, None, settings.assign_coords(cost=("row", [3.0, -1.0, 2.0])))


def test_a_noisier_source_tells_less_and_its_bias_is_learned(rows):
    ds = PROCESS.sample(30, 8, seed=1)
    half = ["lab" if n % 2 else "cheap" for n in range(ds.sizes["row"])]
    manifold = exactly(PROCESS, ds.assign_coords(source=("row", half)), reference_source="lab")
    sources = manifold.sources
    sources.bias[0], sources.log_gain[0], sources.log_noise[0] = 0.0, 0.0, math.log(0.7)
    sources.bias_scale[0] = 0.5
    settings = PROCESS.sample(1, 4, seed=7)[SETTINGS].assign_coords(source=("row", ["lab", "cheap", "cheap", "lab"]))
    candidates, _ = candidates_of(settings, manifold, {}, None)
    known = Known.of(manifold, None, None)
    targets = targets_of(check_objective({"task": True, "bias": "cheap"}, manifold), known, {})
    view = outlook(known, candidates, targets)
    scale = manifold.standardization.scale[2:]
    noise = torch.linalg.inv(torch.linalg.inv(PROCESS.covariance)[2:, 2:]) / scale.unsqueeze(-1) / scale
    loading = PROCESS.loading[2:] / scale.unsqueeze(-1)
    eye, bias = torch.eye(4, dtype=torch.float64), 0.25 * torch.eye(4, dtype=torch.float64)
    shown = noise + 0.49 * eye

    def of_task(covariance):  # one row with that covariance given the latent
        return 0.5 * (torch.logdet(covariance + loading @ loading.mT) - torch.logdet(covariance))

    latent = loading @ loading.mT
    of_bias = 0.5 * (torch.logdet(shown + bias + latent) - torch.logdet(shown + latent))
    gains = view.gains(torch.arange(4))
    torch.testing.assert_close(gains[0, :2], torch.stack([of_task(noise), of_task(shown + bias)]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gains[1, :2], torch.stack([0 * of_bias, of_bias]), rtol=1e-4, atol=1e-6)
    assert float(gains[0, 1]) < float(gains[0, 0])
    after = view.after(1).gains(torch.tensor([0, 2]))
    assert float(after[1, 1]) < float(gains[1, 2])  # a second row by it says less of its bias than the first
    assert float(after[1, 0]) > 0.01  # and one by the reference tells its bias from the latent


def test_a_campaign_that_is_killed_goes_on(manifold, rows, tmp_path):
    settings = PROCESS.sample(1, 6, seed=7)[SETTINGS]
    campaign = Campaign(manifold, rows, settings, objective={"task": True, "predict": "y1", "at": settings})
    campaign.save(tmp_path)
    first = campaign.suggest(2)
    campaign.tell(first.assign(y1=("row", [0.1, math.nan], {"role": "observation", "support": "real", "units": ""})))
    campaign.tell(PROCESS.sample(1, 1, seed=3))
    second = campaign.suggest(1)
    again = Campaign.load(tmp_path)
    assert again.history.identical(campaign.history)
    assert again.rows.sizes["row"] == 6 and again.awaited == second["candidate"].values.tolist()
    third, same = campaign.suggest(3), again.suggest(3)
    assert third.identical(same)
    every = [*first["candidate"].values, *second["candidate"].values, *third["candidate"].values]
    assert sorted(every) == list(range(6))
    assert again.suggest(1).attrs["stop"] == "every candidate was suggested"
    assert again.history["measured_cells"].values.tolist() == [1, 0, 4]
    path = tmp_path / "campaign.json"
    path.write_text(path.read_text().replace("candidate", "candidatf", 1))
    with pytest.raises(pim.DataError, match="damaged or changed"):
        Campaign.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no campaign"):
        Campaign.load(tmp_path / "nowhere")


def test_malformed_rows_are_refused_and_nothing_is_taken_in(manifold, rows):
    settings = PROCESS.sample(1, 3, seed=7)[SETTINGS]
    campaign = Campaign(manifold, rows, settings)
    silent = PROCESS.sample(1, 2, seed=3)
    silent["y1"][:] = silent["y2"][:] = silent["y3"][:] = silent["y4"][:] = math.nan
    for bad, message in (
        (silent, "row 0: found no observation"),
        (PROCESS.sample(1, 2, seed=3).assign_coords(candidate=("row", [0, 9])), "candidate in row 1: found 9"),
        (PROCESS.sample(2, 1, seed=3).rename(y1="y9"), "y9"),
        (PROCESS.sample(2, 1, seed=3), "tasks"),
    ):
        with pytest.raises(pim.DataError, match=message):
            campaign.tell(bad)
    assert campaign.rows.sizes["row"] == 3 and not campaign.measured


def test_it_stops_where_little_is_to_be_gained_or_enough_is_known(manifold, rows):
    settings = PROCESS.sample(1, 3, seed=7)[SETTINGS]
    assert "nats for its cost" in Campaign(manifold, rows, settings, min_gain_per_cost=5.0).suggest(1).attrs["stop"]
    known = Campaign(manifold, rows, settings, width={"task": 0.9})
    widest = PROCESS.task_posterior(to_tensor(rows, PROCESS.variables)).covariance_matrix.diagonal().max().sqrt()
    assert known.widths()["task"] == pytest.approx(float(widest), rel=1e-3)
    assert (known.reason_to_stop() is not None) == bool(widest <= 0.9)
    assert Campaign(manifold, rows, settings, width={"task": 1e-3}).reason_to_stop() is None


def test_objectives_are_checked(manifold):
    settings = PROCESS.sample(1, 3, seed=7)[SETTINGS]
    for objective, message in (
        ("colour", "expected one or more of"),
        ({"parameters": ["x1"]}, "say of which rows"),
        ({"parameters": ["y1"]}, "is an observation"),
        ({"predict": ["x1"], "at": settings}, "what can be predicted is evidence"),
        ({"predict": ["y1"]}, 'without "at"'),
        ({"task": True, "weights": {"predict": 1.0}}, "one for each of"),
        ({"bias": "lab"}, "beside the reference"),
    ):
        with pytest.raises(pim.DataError, match=message):
            Campaign(manifold, None, settings, objective=objective)
    with pytest.raises(pim.DataError, match="is to be measured, but known"):
        Campaign(manifold, None, PROCESS.sample(1, 2, seed=3))


def test_forward_is_traded_for_inverse(manifold, rows):
    names = ["y1", "y2", "y3", "y4"]
    settings = from_tensor(to_tensor(PROCESS.sample(1, 4, seed=7), PROCESS.variables), PROCESS.variables)[SETTINGS]
    campaign = Campaign(
        manifold,
        rows,
        settings.assign_coords(measure=("row", names)),
        objective={"task": True, "predict": ["y1"], "at": settings},
    )
    curve = campaign.trade_off(1, steps=5)
    assert (curve["forward"].diff("weight") <= 1e-12).all() and (curve["inverse"].diff("weight") >= -1e-12).all()
    campaign.suggest(2)
    ax = plots.trade_off(curve)
    assert len(ax.get_lines()[0].get_xdata()) == 5
    ax = plots.gain_against_cost(campaign.history)
    assert ax.get_lines()[0].get_ydata()[-1] == pytest.approx(float(campaign.history["gain"].sum()))
