"""What the data do not say: ignored, said, and counted in the history."""

import math
import warnings

import pytest
import torch

import pyro_invman as pim
from pyro_invman.joint import JointFlow, _held_out_first
from pyro_invman.simulators.linear_gaussian import LinearGaussian

NAN = math.nan
SMALL = {"width": 32, "trunk_blocks": 1, "components": 6}
BRIEF = pim.Schedule(steps=150, batch_size=128)
ROLES = {"x": "parameter", "c": "condition", "y": "observation"}


def unpaired(number: int = 1000, with_condition: bool = False):
    """Rows with x alone and rows with y alone, y strongly bent in x; with c in every row where it is wanted."""
    generator = torch.Generator().manual_seed(0)
    x, c, noise = torch.randn(3, number, generator=generator, dtype=torch.float64)
    x = x + c if with_condition else x
    y = (2 * x).sin() + 0.3 * noise
    half = torch.arange(number) < number // 2
    columns = {"x": x.where(half, NAN), "y": y.where(~half, NAN)} | ({"c": c} if with_condition else {})
    return pim.from_columns(columns, roles={name: ROLES[name] for name in columns})


@pytest.fixture(scope="module")
def apart() -> JointFlow:
    ds = unpaired()
    flow = JointFlow.from_dataset(ds, **SMALL)
    flow.fit(ds, progress=False, schedule=BRIEF)
    return flow


@torch.no_grad()
def test_without_a_pair_nothing_is_said_of_each_other(apart):
    value = torch.linspace(-1, 1, 7).unsqueeze(-1)
    with pytest.warns(pim.UnidentifiedConditional, match="y is ignored for x"):
        given = apart.conditional(["x"], {"y": torch.linspace(-2, 2, 7)})
    torch.testing.assert_close(given.log_prob(value), apart.conditional(["x"]).log_prob(value))
    with pytest.warns(pim.UnidentifiedConditional, match="y is ignored for x"):
        information = apart.mutual_information(["x"], ["y"], num_samples=2000)
    assert abs(information.value) < 1e-5
    with pytest.warns(pim.UnidentifiedConditional, match="taken to be independent"):
        apart.conditional(["x", "y"])


def test_what_is_asked_within_the_data_is_asked_in_silence(apart):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apart.conditional(["x"])
        apart.conditional(["y"], {"x": NAN})
        apart.log_prob(unpaired(10))


def test_links_survive_keeping(apart, tmp_path):
    apart.save(tmp_path / "flow")
    again = pim.load(tmp_path / "flow")
    assert torch.equal(again.links, apart.links)
    with pytest.warns(pim.UnidentifiedConditional, match="y is ignored"):
        again.conditional(["x"], {"y": 0.0})


@torch.no_grad()
def test_through_a_linking_variable_they_are_independent_given_it():
    ds = unpaired(with_condition=True)
    flow = JointFlow.from_dataset(ds, **SMALL)
    flow.fit(ds, progress=False, schedule=BRIEF)
    with pytest.warns(pim.UnidentifiedConditional, match="x and y .* independent given c"):
        both = flow.conditional(["x"], {"c": 0.5, "y": torch.tensor([-1.0, 1.0])})
    value = torch.zeros(2, 1)
    torch.testing.assert_close(both.log_prob(value), flow.conditional(["x"], {"c": 0.5}).log_prob(value).expand(2))
    with pytest.warns(pim.UnidentifiedConditional):
        assert abs(flow.mutual_information("x", "y", given="c", num_samples=2000).value) < 1e-5


def test_the_history_says_how_many_rows_link_each_pair():
    ds = unpaired(with_condition=True)
    history = JointFlow.from_dataset(ds, **SMALL).fit(ds, progress=False, schedule=BRIEF._replace(steps=5))
    assert history.links.sel(variable="x", other="y") == 0
    assert history.links.sel(variable="x", other="c") == history.links.sel(variable="y", other="y") == 500


def test_rows_that_alone_show_a_pair_are_learned_from():
    observed = torch.tensor([[True, False]] * 40 + [[False, True]] * 40 + [[True, True]] * 2)
    for seed in range(20):
        order = torch.randperm(82, generator=torch.Generator().manual_seed(seed))
        order = torch.cat([torch.tensor([80, 81]), order[order < 80]])  # both would be held out
        learned = _held_out_first(order, 8, observed)[8:]
        assert observed[learned].all(-1).any() and sorted(_held_out_first(order, 8, observed).tolist()) == list(
            range(82)
        )
    whole = torch.ones(10, 2, dtype=torch.bool)
    assert torch.equal(_held_out_first(torch.arange(10), 3, whole), torch.arange(10))


# ------------------------------------------------------------------------------------------------ mutual information
@torch.no_grad()
def test_mutual_information_is_that_of_the_process():
    process = LinearGaussian.random(num_parameters=2, num_observations=2, seed=3)
    flow = JointFlow.from_dataset(process.sample(20_000, seed=1))  # its Gaussian base alone
    for a, b, given in ((["x1"], ["y1"], []), (["x1", "x2"], ["y2", "y1"], []), (["x1"], ["y1"], ["y2", "x2"])):
        found = flow.mutual_information(a, b, given, num_samples=8000)
        assert abs(found.value - process.mutual_information(a, b, given)) < 4 * found.std_error + 0.01
        assert 0 < found.std_error < 0.02
    assert flow.mutual_information("x1", "y1") == flow.mutual_information(["x1"], ["y1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["y"]), "targets: none named"),
        ((["x"], ["x"]), "x is both"),
        ((["x"], ["y"], ["y"]), "y is both"),
        ((["q"], ["y"]), "unknown variable 'q'"),
    ],
)
def test_questions_that_have_no_information(apart, arguments, message):
    with pytest.raises(pim.DataError, match=message):
        apart.mutual_information(*arguments)
    with pytest.raises(pim.DataError, match="num_samples: found 1"):
        apart.mutual_information("x", "y", num_samples=1)


# ------------------------------------------------------------------------------------------------ tasks
@torch.no_grad()
def test_given_the_task_unlinked_variables_of_a_manifold_are_independent():
    generator = torch.Generator().manual_seed(0)
    task = torch.arange(400) // 20
    latent = torch.randn(20, generator=generator, dtype=torch.float64)[task]
    x, noise, other = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    first = torch.arange(400) % 2 == 0
    columns = {
        "x": x.where(first, NAN),
        "y": (x + latent + 0.3 * noise).where(~first, NAN),
        "w": latent + x + 0.5 * other,
    }
    columns["w"] = columns["w"].where(first, NAN)
    ds = pim.from_columns(
        columns, roles={"x": "parameter", "y": "observation", "w": "observation"}, task=[f"t{t}" for t in task.tolist()]
    )
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=1, flow={"width": 16, "components": 3})
    history = manifold.fit(ds, progress=False, schedule=pim.Schedule(steps=10, batch_size=8))
    assert history.links.sel(variable="x", other="y") == 0 < history.links.sel(variable="x", other="w")
    z = torch.zeros(1, 1)
    row = torch.tensor([[-1.0, NAN, NAN], [1.0, NAN, NAN]], dtype=torch.float64)
    arguments = (manifold.network.flow, manifold.standardization, manifold.variables, ["y"])
    at = pim.ConditionalFlow(*arguments, row, z)
    nothing = pim.ConditionalFlow(*arguments, torch.full((2, 3), NAN, dtype=torch.float64), z)
    value = torch.tensor([[0.3], [-0.4]])
    assert torch.equal(at.log_prob(value), nothing.log_prob(value))
    with pytest.warns(pim.UnidentifiedConditional, match="y and x .* independent given the task"):
        manifold.infer_task().conditional(["y"], {"x": 0.5})
    effects = manifold.network.base.effects
    x, y, w = (manifold.variables.index(name) for name in "xyw")
    assert abs(torch.linalg.inv(effects.covariance)[x, y]) < 1e-8
    assert abs(torch.linalg.inv(effects.covariance)[x, w]) > 0.1


def test_observations_that_no_row_shows_together_leave_functions_their_bends() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(400, generator=generator) - 2
    level = torch.randn(20, generator=generator).repeat_interleave(20)
    y = torch.stack([torch.sin(2 * x) + level, torch.cos(2 * x) - level])
    y = y + 0.1 * torch.randn(y.shape, generator=generator)
    shown = torch.rand(400, generator=generator) < 0.5  # one of the two in each row
    ds = pim.from_columns(
        {"x": x, "a": y[0].masked_fill(shown, math.nan), "b": y[1].masked_fill(~shown, math.nan)},
        roles={"x": "parameter", "a": "observation", "b": "observation"},
        task=[str(t // 20) for t in range(400)],
    )
    base = pim.ProcessManifold.from_dataset(ds, latent_dim=1).network.base
    assert base.functions is not None
    assert base.functions.residuals.covariance[0, 1] == 0
    assert base.effects.covariance.inverse()[1, 2].abs() < 1e-8
