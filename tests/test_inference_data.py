"""Labelled results: plates as dimensions, units kept, there and back through NetCDF and Zarr, and to ArviZ."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS

import pyro_invman as pim
from pyro_invman.variables import DataError

T, N = 3, 4


def model(x, y=None, mask=None):
    """y = z of the task + x, noise 0.5; a factor that says nothing, a vector of two, and what is deterministic."""
    pyro.sample("pair", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("nothing", torch.tensor(0.0))
    with pyro.plate("task", T, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        with pyro.plate("row", N, dim=-1):
            return pyro.sample("y", dist.Normal(z + x, 0.5), obs=y, obs_mask=mask)


@pytest.fixture(scope="module")
def case():
    """Draws of the exact posterior of z given y, with one cell that was not observed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, N).expand(T, N)
    y = torch.tensor([[-1.0], [0.0], [2.0]]) + x + 0.5 * torch.randn(T, N, generator=generator)
    mask = torch.ones(T, N, dtype=torch.bool)
    mask[1, 2] = False
    precision = 1 + mask.sum(-1) / 0.25
    mean = ((y - x) * mask).sum(-1) / 0.25 / precision
    z = (mean + torch.randn(4000, T, generator=generator) / precision.sqrt()).unsqueeze(-1)
    missing = z + x + 0.5 * torch.randn(4000, T, N, generator=generator)
    samples = {"pair": torch.randn(4000, 2, generator=generator), "z": z, "y_unobserved": missing}
    return x, y, mask, mean, samples


@pytest.fixture(scope="module")
def tree(case):
    x, y, mask, _, samples = case
    return pim.to_datatree(
        model, samples, x, y=y, mask=mask, units={"z": "um", "y": "um", "x": "W"},
        coords={"task": ["Ti64", "316L", "IN718"]}, constant={"x": x}, parallel=True,
    )  # fmt: skip


def test_plates_are_dimensions_and_factors_are_no_data(tree):
    assert set(tree.children) == {"posterior", "posterior_predictive", "observed_data", "constant_data"}
    posterior = tree["posterior"]
    assert posterior["z"].dims == ("chain", "draw", "task") and posterior["z"].shape == (1, 4000, T)
    assert posterior["pair"].dims == ("chain", "draw", "pair_dim_0")
    assert posterior["twice"].dims == ("chain", "draw", "task")
    assert set(posterior.data_vars) == {"z", "pair", "twice", "y"}
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "task", "row")
    assert list(tree["observed_data"].data_vars) == ["y"] and tree["observed_data"]["y"].dims == ("task", "row")
    assert tree["constant_data"]["x"].dims == ("task", "row")
    assert tree["observed_data"].task.values.tolist() == ["Ti64", "316L", "IN718"]
    assert tree["posterior"]["z"].attrs["units"] == "um" and tree["constant_data"]["x"].attrs["units"] == "W"
    assert tree["posterior_predictive"]["y"].attrs["units"] == "um"


def test_values_are_those_of_the_closed_form(case, tree):
    x, y, mask, mean, samples = case
    observed = tree["observed_data"]["y"].values
    np.testing.assert_array_equal(np.isnan(observed), ~mask.numpy())
    np.testing.assert_allclose(observed[mask.numpy()], y[mask].numpy())
    np.testing.assert_array_equal(tree["posterior"]["z"].values[0], samples["z"][..., 0].double().numpy())
    np.testing.assert_allclose(tree["posterior"]["twice"].values, 2 * tree["posterior"]["z"].values)
    # observed cells stay, the others are the draws that were imputed
    imputed = tree["posterior"]["y"].values[0]
    np.testing.assert_allclose(imputed[:, 0, 0], float(y[0, 0]))
    np.testing.assert_allclose(imputed[:, 1, 2], samples["y_unobserved"][:, 1, 2].double().numpy())
    predicted = tree["posterior_predictive"]["y"].values[0]
    np.testing.assert_allclose(predicted.mean(0), (mean.unsqueeze(-1) + x).numpy(), atol=0.05)
    variance = 0.25 + 1 / (1 + mask.sum(-1) / 0.25)
    np.testing.assert_allclose(predicted.var(0), variance.unsqueeze(-1).expand(T, N).numpy(), atol=0.05)


def test_chains_of_mcmc_are_kept(case):
    x, y, *_ = case
    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(x, y)
    tree = pim.to_datatree(model, mcmc, x, y=y)
    assert tree["posterior"]["z"].shape == (1, 20, T)
    np.testing.assert_allclose(tree["posterior"]["z"].values[0], mcmc.get_samples()["z"][..., 0].double().numpy())
    assert not np.isnan(tree["observed_data"]["y"].values).any() and "constant_data" not in tree.children


def test_the_same_seed_gives_the_same_predictions(case):
    x, y, _, _, samples = case
    few = {name: values[:10] for name, values in samples.items() if name != "y_unobserved"}
    first, again, other = (pim.to_datatree(model, few, x, y=y, seed=seed) for seed in (0, 0, 1))
    assert first.identical(again)
    assert not first["posterior_predictive"]["y"].identical(other["posterior_predictive"]["y"])


def test_draws_at_once_and_one_by_one_say_the_same(case):
    x, y, mask, _, samples = case
    few = {name: values[:200] for name, values in samples.items()}
    loop, whole = (pim.to_datatree(model, few, x, y=y, mask=mask, parallel=parallel) for parallel in (False, True))
    assert loop["posterior"].to_dataset().identical(whole["posterior"].to_dataset())
    assert loop["posterior_predictive"]["y"].dims == whole["posterior_predictive"]["y"].dims
    difference = loop["posterior_predictive"]["y"].mean("draw") - whole["posterior_predictive"]["y"].mean("draw")
    assert float(abs(difference).max()) < 0.25  # twelve means of 200 draws each


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coords": {"task": ["a"]}}, "found 1 names for 'task', expected plates and sizes {'task': 3, 'row': 4}"),
        ({"coords": {"plot": ["a"]}}, "found 1 names for 'plot'"),
        ({"constant": {"x": torch.zeros(5)}}, "constant x: found size 5, which 0 of the plates"),
        ({"samples": {}}, "samples: found no site"),
        ({"samples": {"z": torch.zeros(3, T, 1), "pair": torch.zeros(2, 2)}}, "as many of each site"),
    ],
)
def test_what_does_not_fit_is_refused(case, changes, message):
    x, y, _, _, samples = case
    few = {"z": samples["z"][:3], "pair": samples["pair"][:3]}
    with pytest.raises(DataError, match=message):
        pim.to_datatree(model, changes.pop("samples", few), x, y=y, **changes)


def test_constants_may_say_along_what_they_lie(case):
    x, y, _, _, samples = case
    few = {"z": samples["z"][:3], "pair": samples["pair"][:3]}
    tree = pim.to_datatree(model, few, x, y=y, constant={"grid": (("point",), torch.arange(7))})
    assert tree["constant_data"]["grid"].dims == ("point",) and tree["constant_data"]["grid"].dtype == np.int64


# ------------------------------------------------------------------------------------------------ of a flow
@pytest.fixture(scope="module")
def of_flow():
    """A Gaussian base of y = 2 x + c + noise 0.1, and rows one of which has no y."""
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 500, generator=generator)
    y = 2 * x + c + 0.1 * torch.randn(500, generator=generator)
    roles = {"x": "parameter", "c": "condition", "mode": "condition", "y": "observation"}
    columns = {"x": x, "c": c, "mode": ["a, b", "c"] * 250, "y": y}
    ds = pim.from_columns(columns, roles, {"x": "mm", "y": "um"}, {"mode": "categorical"})
    flow = pim.JointFlow.from_dataset(ds)
    rows = ds.isel(row=slice(0, 5)).copy(deep=True)
    rows["y"][4] = np.nan
    return rows, flow.to_datatree(rows, num_draws=500)


def test_a_flow_tells_both_directions_of_each_row(of_flow):
    rows, tree = of_flow
    assert tree["posterior"]["x"].dims == ("chain", "draw", "row") and list(tree["posterior"].data_vars) == ["x"]
    x, y, c = (rows[name].values for name in ("x", "y", "c"))
    inferred, predicted = tree["posterior"]["x"].values[0], tree["posterior_predictive"]["y"].values[0]
    np.testing.assert_allclose(inferred.mean(0)[:4], ((y - c) / 2)[:4], atol=0.06)
    assert inferred.std(0)[4] > 0.7  # without y its own marginal
    np.testing.assert_allclose(predicted.mean(0), 2 * x + c, atol=0.06)
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, y)
    assert set(tree["constant_data"].data_vars) == {"x", "c", "mode"}
    assert tree["constant_data"]["mode"].attrs["levels"] == ["a, b", "c"]


# ------------------------------------------------------------------------------------------------ there and back
@pytest.mark.parametrize("which", ["model", "flow"])
@pytest.mark.parametrize("kind", [".nc", ".zarr"])
def test_trees_survive_netcdf_and_zarr(tmp_path, tree, of_flow, which, kind):
    tree = {"model": tree, "flow": of_flow[1]}[which]
    path = tmp_path / f"tree{kind}"
    how = {"engine": "netcdf4"} if kind == ".nc" else {"engine": "zarr", "consolidated": False}
    tree.to_netcdf(path) if kind == ".nc" else tree.to_zarr(path, consolidated=False)
    with xr.open_datatree(path, **how) as opened:
        again = opened.load()
    assert set(again.children) == set(tree.children)
    for name, group in tree.children.items():
        xr.testing.assert_identical(again[name].to_dataset(), group.to_dataset())


def test_arviz_reads_what_was_written(tmp_path, tree):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 warns of ArviZ 1, and both of a single chain
        az = pytest.importorskip("arviz", reason="ArviZ is not installed; it is no dependency")
        tree.to_netcdf(tmp_path / "tree.nc")
        read = az.from_netcdf(tmp_path / "tree.nc")
        summary = az.summary(read, var_names=["z"])
    assert list(summary.index) == ["z[Ti64]", "z[316L]", "z[IN718]"]
    mean = tree["posterior"]["z"].values[0].mean(0)
    np.testing.assert_allclose(summary["mean"].to_numpy(float), mean, atol=0.01)
    assert read["observed_data"]["y"].attrs["units"] == "um"
