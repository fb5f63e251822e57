"""What is declared of a process or its records: read from Pyro functions, and refused where it does not fit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal

import pyro_invman as pim
from pyro_invman.declared import log_recorded, spoken_of

VARIABLES = pim.Variables(
    [pim.Variable("x", "parameter"), pim.Variable("y", "observation"), pim.Variable("w", "observation", "positive")]
)
F64 = torch.float64
ROWS = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 3.0]], dtype=F64)


def law(row):
    y = pyro.sample("y", dist.Normal(2 * row["x"], 0.5))
    pyro.sample("w", dist.LogNormal(y, 0.1))


def recorded(row):
    with pyro.plate("row", len(row["y"])):
        pyro.sample("y", dist.Bernoulli(logits=row["y"] + row["x"]))


def test_the_density_of_a_simulator_is_that_of_its_sites():
    simulator = pim.Simulator(law, given="x", targets=["y", "w"])
    expected = Normal(2 * ROWS[:, 0], 0.5).log_prob(ROWS[:, 1]) + dist.LogNormal(ROWS[:, 1], 0.1).log_prob(ROWS[:, 2])
    torch.testing.assert_close(simulator.log_prob(VARIABLES, ROWS), expected)
    one = pim.Simulator(law, given="x", targets=["w"])  # y is then a site that nothing observes
    assert one.log_prob(VARIABLES, ROWS) is None


@pytest.mark.parametrize("form", ["sites", "mapping"])
def test_draws_of_a_simulator_are_the_functions_and_the_generators(form):
    def mapping(row):
        return {"y": 2 * row["x"] + 0.5 * torch.randn_like(row["x"])}

    simulator = pim.Simulator(law if form == "sites" else mapping, given=["x"], targets=["y"])
    rows = torch.ones(20_000, 3, dtype=F64)
    first = simulator.draw(VARIABLES, rows, torch.Generator().manual_seed(1))
    assert first.shape == (20_000, 1)
    assert abs(first.mean() - 2) < 0.02 and abs(first.std() - 0.5) < 0.02
    assert torch.equal(first, simulator.draw(VARIABLES, rows, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, simulator.draw(VARIABLES, rows, torch.Generator().manual_seed(2)))


def test_a_mechanism_says_how_likely_a_mask_is():
    assert spoken_of(recorded, VARIABLES, ROWS) == ("y",)
    observed = torch.tensor([[True, True, True], [True, False, True]])
    chance = (ROWS[:, 1] + ROWS[:, 0]).sigmoid()
    expected = torch.stack([chance[0].log(), (1 - chance[1]).log()])
    torch.testing.assert_close(log_recorded(recorded, VARIABLES, ROWS, observed, ["y"]), expected)


def site(name, law):
    return lambda row: pyro.sample(name, law(row))


@pytest.mark.parametrize(
    ("mechanism", "message"),
    [
        (lambda row: None, "no sample site"),
        (site("q", lambda row: dist.Bernoulli(logits=row["y"])), "unknown variable 'q'"),
        (site("y", lambda row: dist.Normal(row["y"], 1.0)), "site y drew .* Bernoulli"),
        (site("y", lambda row: dist.Bernoulli(torch.full((2, 1), 0.5))), r"site y .*shape \(2, 2\), expected \(2,\)"),
    ],
)
def test_mechanisms_that_say_nothing(mechanism, message):
    with pytest.raises(pim.DataError, match=message):
        log_recorded(mechanism, VARIABLES, ROWS, torch.ones(2, 3), spoken_of(mechanism, VARIABLES, ROWS))


@pytest.mark.parametrize(
    ("simulator", "message"),
    [
        (pim.Simulator(lambda row: None, ["x"], ["y"]), "no draw of y"),
        (pim.Simulator(lambda row: {"y": torch.zeros(3)}, ["x"], ["y"]), r"shape \(3,\), expected \(2,\)"),
        (pim.Simulator(lambda row: {"w": -torch.ones(2)}, ["x"], ["w"]), "found w = -1, outside its support"),
        (pim.Simulator(lambda row: {"q": torch.ones(2)}, ["x"], ["q"]), "unknown variable 'q'"),
    ],
)
def test_simulators_that_give_no_draws(simulator, message):
    with pytest.raises(pim.DataError, match=message):
        simulator.draw(VARIABLES, ROWS, torch.Generator())


@pytest.mark.parametrize(("given", "targets"), [([], ["y"]), (["x"], []), (["x", "y"], ["y"])])
def test_a_simulator_needs_givens_and_targets(given, targets):
    with pytest.raises(pim.DataError, match="expected two sets of names"):
        pim.Simulator(law, given, targets)
