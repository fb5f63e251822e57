"""The joint flow: fit, ask, complete, keep; against a linear-Gaussian process, whose answers are closed forms."""

import hashlib
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import pyro_invman as pim
from pyro_invman.data import from_tensor, to_tensor
from pyro_invman.joint import JointFlow
from pyro_invman.simulators.linear_gaussian import LinearGaussian
from pyro_invman.variables import DataError, Variable, Variables

NAN = math.nan
SMALL = {"width": 32, "trunk_blocks": 1, "components": 6}
BRIEF = pim.Schedule(steps=60, batch_size=64, evaluate_every=20)


@pytest.fixture(scope="module")
def process() -> LinearGaussian:
    return LinearGaussian.random(num_parameters=2, num_observations=3, seed=3)


@pytest.fixture(scope="module")
def rows(process) -> xr.Dataset:
    return process.sample(4000, seed=1, missing=0.3)


@pytest.fixture(scope="module")
def fitted(rows) -> JointFlow:
    flow = JointFlow.from_dataset(rows, **SMALL)
    flow.fit(rows, progress=False, schedule=pim.Schedule(steps=600))
    return flow


def mixed_rows(number: int = 400, missing: float = 0.2) -> xr.Dataset:
    """One column of each support, in units of everyday size."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(number, generator=generator, dtype=torch.float64)

    def noise() -> Tensor:
        return 0.4 * torch.randn(number, generator=generator, dtype=torch.float64)

    columns = {
        "power": (5 + 0.3 * latent + 0.1 * noise()).exp(),
        "share": (latent + noise()).sigmoid(),
        "shift": 1000 + 50 * (latent + noise()),
    }
    for column in columns.values():
        column[torch.rand(number, generator=generator) < missing] = NAN
    names = np.where(latent + noise() > 0.5, "deep", np.where(latent + noise() < -0.5, "flat", "round")).astype(object)
    names[(torch.rand(number, generator=generator) < missing).numpy()] = None
    return pim.from_columns(
        columns | {"shape": names},
        roles={"power": "parameter", "share": "condition", "shift": "observation", "shape": "observation"},
        units={"power": "W", "shift": "um"},
        supports={"power": "positive", "share": ("interval", 0, 1), "shape": "categorical"},
    )


@pytest.fixture(scope="module")
def mixed() -> JointFlow:
    """Briefly fitted to a column of each support."""
    ds = mixed_rows()
    flow = JointFlow.from_dataset(ds, **SMALL)
    flow.fit(ds, progress=False, schedule=BRIEF)
    return flow


# ------------------------------------------------------------------------------------------------ what is learned
@torch.no_grad()
def test_conditionals_of_a_linear_gaussian_process_are_recovered(process, fitted):
    given = {"y1": torch.tensor([-1.0, 0.5, NAN]), "y3": 0.2}
    for targets in (["x1"], ["x2", "x1"], ["y2", "x1", "x2"]):
        divergence = process.kl_conditional(targets, given, fitted.conditional(targets, given), 2000)
        assert divergence.shape == (3,)
        assert (divergence < 0.03 * len(targets)).all()


@torch.no_grad()
def test_the_gaussian_base_alone_answers_before_training(process, rows):
    flow = JointFlow.from_dataset(rows)
    given = {"y1": 0.5, "y2": -0.3}
    assert process.kl_conditional(["x1", "x2"], given, flow.conditional(["x1", "x2"], given), 2000) < 0.03


@torch.no_grad()
def test_moments_of_draws_are_those_of_the_exact_conditional(process, fitted):
    given = {"y1": 0.5, "x2": -0.3}
    exact, draws = process.conditional(["x1", "y2"], given), fitted.conditional(["x1", "y2"], given).sample((20_000,))
    torch.testing.assert_close((draws.mean(0) - exact.mean) / exact.stddev, torch.zeros(2).double(), rtol=0, atol=0.15)
    torch.testing.assert_close(draws.std(0).double(), exact.stddev, rtol=0.1, atol=0)


@pytest.mark.parametrize("shape", ["linear", "bent"])
def test_300_rows_do_no_worse_than_the_gaussian_base(shape):
    def sample(number: int, seed: int) -> xr.Dataset:
        generator = torch.Generator().manual_seed(seed)
        x, z = torch.randn(2, number, generator=generator, dtype=torch.float64)
        y = x + 0.5 * z if shape == "linear" else x.square() + 0.3 * z
        hidden = torch.rand(number, generator=generator) < 0.2
        return pim.from_columns({"x": x, "y": y.where(~hidden, NAN)}, roles={"x": "parameter", "y": "observation"})

    few, fresh = sample(300, 0), sample(2000, 1)
    flow = JointFlow.from_dataset(few)
    flow.fit(few, progress=False)
    found = flow.log_prob(fresh).detach().double()
    base = flow.density.context.base.log_prob(flow.standardization(to_tensor(fresh, flow.variables)))
    base = base + flow.standardization.log_abs_det_jacobian(to_tensor(fresh, flow.variables)).sum(-1)
    gain = (found - base).mean()
    assert gain > (-0.02 if shape == "linear" else 0.3)


def test_history_says_what_happened(rows):
    flow = JointFlow.from_dataset(rows, **SMALL)
    history = flow.fit(rows, progress=False, schedule=BRIEF, validation=0.25)
    assert isinstance(history, xr.Dataset)
    assert set(history.data_vars) == {"train_loss", "validation_loss", "learning_rate", "seconds"}
    assert history.step.values.tolist() == [0, 20, 40, 60]
    assert history.seconds.attrs["units"] == "s"
    assert history.attrs["rows"] == 3000 and history.attrs["held_out_rows"] == 1000
    assert np.isnan(history.train_loss.values[0]) and np.isfinite(history.validation_loss.values).all()


def test_the_same_seed_gives_the_same_weights_and_a_second_fit_starts_anew(rows):
    first, second = (JointFlow.from_dataset(rows, seed=1, **SMALL) for _ in range(2))
    first.fit(rows, seed=2, progress=False, schedule=BRIEF)
    torch.rand(7)
    second.fit(rows.isel(row=slice(0, 500)), seed=5, progress=False, schedule=BRIEF)
    second.fit(rows, seed=2, progress=False, schedule=BRIEF)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    second.fit(rows, seed=3, progress=False, schedule=BRIEF)
    assert not torch.equal(first.density.out.weight, second.density.out.weight)


def test_a_checkpoint_of_other_rows_or_another_seed_is_refused(rows, tmp_path):
    path = tmp_path / "run.safetensors"
    flow = JointFlow.from_dataset(rows, **SMALL)
    flow.fit(rows, progress=False, schedule=BRIEF, checkpoint=path)
    weights = flow.density.out.weight.clone()
    flow.fit(rows, progress=False, schedule=BRIEF, checkpoint=path, resume=True)
    assert torch.equal(flow.density.out.weight, weights)
    one_cell = rows.copy(deep=True)
    one_cell["x1"][7] = 0.123
    for other in ({"ds": one_cell}, {"ds": rows, "seed": 1}, {"ds": rows, "schedule": BRIEF._replace(clip=4.0)}):
        with pytest.raises(DataError, match="other data, settings or seed"):
            flow.fit(**({"progress": False, "schedule": BRIEF, "checkpoint": path, "resume": True} | other))


def test_too_few_rows_are_refused(rows):
    flow = JointFlow.from_dataset(rows, **SMALL)
    with pytest.raises(DataError, match="at least 3"):
        flow.fit(process_rows_without_holes(2), progress=False)


def process_rows_without_holes(number: int) -> xr.Dataset:
    return LinearGaussian.random(num_parameters=2, num_observations=3, seed=3).sample(number, seed=1)


# ------------------------------------------------------------------------------------------------ questions
@torch.no_grad()
def test_units_and_supports_are_natural(mixed):
    """Total probability in natural units, and draws within the supports."""
    d = mixed.conditional(["power"], {"shift": 1010.0, "shape": "deep"})
    power = torch.linspace(1, 1500, 30_001).unsqueeze(-1)
    assert torch.trapezoid(d.log_prob(power).exp(), power[:, 0]).item() == pytest.approx(1, abs=1e-3)
    d = mixed.conditional(["share"], {"shift": 1010.0})
    share = torch.linspace(0, 1, 5001).unsqueeze(-1)
    assert torch.trapezoid(d.log_prob(share).exp(), share[:, 0]).item() == pytest.approx(1, abs=1e-3)
    draws = mixed.conditional(["power", "share", "shape"]).sample((4000,))
    assert (draws[:, 0] > 0).all() and ((draws[:, 1] >= 0) & (draws[:, 1] <= 1)).all()
    assert set(draws[:, 2].tolist()) == {0.0, 1.0, 2.0}


@torch.no_grad()
def test_levels_are_given_by_name_or_code(mixed):
    value = torch.tensor([[150.0], [200.0], [90.0]])
    levels = list(mixed.variables[mixed.variables.index("shape")].levels)
    assert levels == ["deep", "flat", "round"]
    by_name = mixed.conditional(["power"], {"shape": ["deep", "flat", "round"]}).log_prob(value)
    by_code = mixed.conditional(["power"], {"shape": torch.tensor([0, 1, 2])}).log_prob(value)
    one = mixed.conditional(["power"], {"shape": "flat"}).log_prob(value)
    assert torch.equal(by_name, by_code)
    torch.testing.assert_close(one[1], by_name[1])
    assert not torch.allclose(one, by_name)
    mass = mixed.conditional(["shape"], {"power": 150.0}).log_prob(torch.arange(3.0).unsqueeze(-1)).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_a_given_that_is_nan_is_one_that_is_not_given(fitted, mixed):
    value = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
    without = fitted.conditional(["x1", "y2"], {"y1": 0.4}).log_prob(value)
    for missing in (NAN, torch.tensor(NAN), torch.tensor([NAN, NAN])):
        found = fitted.conditional(["x1", "y2"], {"y1": 0.4, "y3": missing}).log_prob(value)
        torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-5)
    both = fitted.conditional(["x1", "y2"], {"y1": 0.4, "y3": torch.tensor([NAN, 0.7])}).log_prob(value)
    torch.testing.assert_close(both[0], without[0], rtol=1e-5, atol=1e-5)
    assert abs(both[1] - without[1]) > 1e-4
    without = mixed.conditional(["power"]).log_prob(torch.tensor([100.0]))
    found = mixed.conditional(["power"], {"shape": NAN, "share": NAN}).log_prob(torch.tensor([100.0]))
    torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_order_of_targets_orders_the_values_and_nothing_else(fitted):
    value = torch.randn(5, 3)
    first = fitted.conditional(["x1", "y2", "x2"], {"y1": 0.1}).log_prob(value)
    second = fitted.conditional(["y2", "x2", "x1"], {"y1": 0.1}).log_prob(value[:, [1, 2, 0]])
    torch.testing.assert_close(first, second)


@torch.no_grad()
def test_log_prob_of_rows_is_that_of_their_observed_cells(fitted, rows):
    some = rows.isel(row=slice(0, 20))
    values = to_tensor(some, fitted.variables)
    found = fitted.log_prob(some)
    assert found.shape == (20,)
    for row, log_prob in zip(values, found, strict=True):
        names = [n for n, cell in zip(fitted.variables.names, row, strict=True) if not cell.isnan()]
        expected = fitted.conditional(names).log_prob(row[~row.isnan()]) if names else torch.zeros(())
        torch.testing.assert_close(log_prob.double(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "given", "message"),
    [
        ([], {}, "targets: none named"),
        (["xx1"], {}, "unknown variable 'xx1'.*did you mean x1"),
        (["x1", "y1", "x1"], {}, "x1 is named twice"),
        (["x1"], {"x1": 0.0}, "x1 is both a target and given"),
        (["x1"], {"z": 0.0}, "unknown variable 'z'"),
        (["x1"], {"y1": math.inf}, "y1.*inf"),
        (["x1"], {"y1": torch.zeros(3), "y2": torch.zeros(4)}, r"\(3,\).*\(4,\).*broadcast"),
    ],
)
def test_questions_that_cannot_be_answered(fitted, targets, given, message):
    with pytest.raises(DataError, match=message):
        fitted.conditional(targets, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"power": torch.tensor([1.0, -3.0])}, r"power at \(1,\).*-3"),
        ({"power": 0.0}, "power.*0"),
        ({"share": 1.5}, "share.*1.5"),
        ({"shape": 1.5}, "shape.*1.5"),
        ({"shape": 3}, "shape.*3"),
        ({"shape": "square"}, "shape.*'square'.*deep"),
    ],
)
def test_givens_outside_their_support(mixed, given, message):
    with pytest.raises(DataError, match=message):
        mixed.conditional(["shift"], given)


def test_values_outside_their_support_or_of_another_shape(mixed):
    d = mixed.conditional(["power", "share"])
    with pytest.raises(DataError, match=r"share at \(1, 1\)|share at \(1,\)"):
        d.log_prob(torch.tensor([[1.0, 0.5], [1.0, 1.5]]))
    with pytest.raises(DataError, match="3 entries, expected 2"):
        d.log_prob(torch.ones(3))


# ------------------------------------------------------------------------------------------------ completing rows
def test_impute_fills_what_is_missing_and_nothing_else(fitted, process, rows):
    some = rows.isel(row=slice(0, 300))
    before = some.copy(deep=True)
    filled = fitted.impute(some, num_samples=50, seed=1)
    assert some.identical(before)
    assert dict(filled.sizes) == {"draw": 50, "row": 300}
    found, values = to_tensor_of_draws(filled, fitted), to_tensor(some, fitted.variables)
    assert found.isfinite().all()
    observed = ~values.isnan()
    assert torch.equal(found[:, observed], values[observed].expand(50, -1))
    # draws follow p(missing | observed): their standard scores under the exact law have mean 0 and variance 1
    scores = []
    for row, draws in zip(values, found.unbind(1), strict=True):
        names = [n for n, cell in zip(fitted.variables.names, row, strict=True) if cell.isnan()]
        if names:
            known = {n: c for n, c in zip(fitted.variables.names, row, strict=True) if not c.isnan()}
            exact = process.conditional(names, known)
            white = torch.linalg.solve_triangular(
                exact.scale_tril, (draws[:, row.isnan()] - exact.loc).unsqueeze(-1), upper=False
            )
            scores.append(white.flatten())
    pooled = torch.cat(scores)
    assert abs(pooled.mean()) < 0.05 and abs(pooled.var() - 1) < 0.1
    again = fitted.impute(some, num_samples=50, seed=1)
    assert again.identical(filled) and not fitted.impute(some, num_samples=50, seed=2).identical(filled)


def to_tensor_of_draws(ds: xr.Dataset, flow: JointFlow) -> Tensor:
    return torch.stack([torch.tensor(ds[name].transpose("draw", "row").values) for name in flow.variables.names], -1)


def test_impute_stays_within_supports_and_keeps_units_and_levels(mixed):
    ds = mixed_rows(60, missing=0.5)
    filled = mixed.impute(ds, num_samples=30)
    assert (filled["power"] > 0).all() and ((filled["share"] >= 0) & (filled["share"] <= 1)).all()
    assert set(np.unique(filled["shape"])) <= {0.0, 1.0, 2.0}
    assert filled["shape"].attrs["levels"] == ["deep", "flat", "round"] and filled["power"].attrs["units"] == "W"


def test_impute_refuses_what_it_does_not_know(mixed):
    ds = mixed_rows(20)
    for other, message in (
        (ds.rename(power="strength"), "unknown variable 'strength'"),
        (ds.assign(power=ds["power"].assign_attrs(units="kW")), "units 'kW'.*'W'"),
    ):
        with pytest.raises(DataError, match=message):
            mixed.impute(other)


# ------------------------------------------------------------------------------------------------ exchangeable
PAIRS = [[("a1", "b1"), ("a2", "b2"), ("a3", "b3")]]


def repeated(number: int = 300) -> xr.Dataset:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(number, generator=generator, dtype=torch.float64)
    columns, roles = {"theta": theta}, {"theta": "parameter"}
    for m in (1, 2, 3):
        noise = torch.randn(2, number, generator=generator, dtype=torch.float64)
        columns |= {f"a{m}": theta + noise[0], f"b{m}": theta * noise[1]}
        roles |= {f"a{m}": "observation", f"b{m}": "observation"}
    columns["b2"][::4] = NAN
    return pim.from_columns(columns, roles)


def test_the_order_of_exchangeable_measurements_does_not_matter_after_fitting():
    ds = repeated()
    flow = JointFlow.from_dataset(ds, exchangeable=PAIRS, **SMALL)
    flow.fit(ds, progress=False, schedule=BRIEF)
    flow.double()
    given = {"a1": 0.3, "b1": -0.5, "a2": 1.2, "b2": 0.1, "a3": NAN, "b3": 0.9}
    turned = {"a1": 1.2, "b1": 0.1, "a2": NAN, "b2": 0.9, "a3": 0.3, "b3": -0.5}
    theta = torch.linspace(-3, 3, 11).double().unsqueeze(-1)
    first, second = (flow.conditional(["theta"], g).log_prob(theta) for g in (given, turned))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)
    first = flow.conditional(["a3"], {"b3": 0.9, "a1": 0.3, "b1": -0.5}).log_prob(theta)
    second = flow.conditional(["a2"], {"b2": 0.9, "a3": 0.3, "b3": -0.5}).log_prob(theta)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


def variable(name: str, role: str = "observation", **fields) -> Variable:
    return Variable(name, role, **fields)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ([("a",)], "expected at least 2"),
        ([("a",), ("b", "c")], "has 2 variables"),
        ([("a",), ("a",)], "a is named twice"),
        ([("a",), ("t",)], "t and a differ in role"),
        ([("a",), ("p",)], "p and a differ"),
        ([("a",), ("u",)], "u and a differ"),
        ([("k",), ("l",)], "categorical"),
        ([("a",), ("zz",)], "unknown variable 'zz'"),
    ],
)
def test_exchangeable_groups_that_cannot_be(group, message):
    variables = Variables(
        [
            variable("a"),
            variable("b"),
            variable("c"),
            variable("t", "parameter"),
            variable("p", support="positive"),
            variable("u", units="um"),
            variable("k", support="categorical", levels=("x", "y")),
            variable("l", support="categorical", levels=("x", "y")),
        ]
    )
    with pytest.raises(DataError, match=message):
        JointFlow(variables, exchangeable=[group])


# ------------------------------------------------------------------------------------------------ keeping
@torch.no_grad()
def test_what_is_loaded_is_what_was_saved(mixed, tmp_path):
    mixed.save(tmp_path / "deep" / "model")
    loaded = pim.load(tmp_path / "deep" / "model")
    assert loaded.variables == mixed.variables
    ds = mixed_rows(50)
    assert torch.equal(loaded.log_prob(ds), mixed.log_prob(ds))
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == ["schema.json", "weights.safetensors"]
    for name, tensor in mixed.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]) and tensor.dtype == loaded.state_dict()[name].dtype


@torch.no_grad()
def test_double_precision_and_groups_are_kept(tmp_path):
    ds = repeated()
    flow = JointFlow.from_dataset(ds, exchangeable=PAIRS, head="spline", backbone="transformer", **SMALL).double()
    flow.save(tmp_path)
    loaded = pim.load(tmp_path)
    assert loaded.exchangeable == flow.exchangeable and loaded.density.dtype == torch.float64
    assert torch.equal(loaded.log_prob(ds), flow.log_prob(ds))


def test_a_model_can_be_saved_over_another(mixed, fitted, tmp_path):
    mixed.save(tmp_path)
    fitted.save(tmp_path)
    assert pim.load(tmp_path).variables == fitted.variables


def test_no_model(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no model in"):
            pim.load(folder)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_pickle_is_ever_loaded(mixed, tmp_path):
    mixed.save(tmp_path)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap)
    (tmp_path / "sprung").unlink()  # the trap works
    (tmp_path / "weights.safetensors").write_bytes(trap)
    rewrite_schema(tmp_path)
    with pytest.raises(DataError):
        pim.load(tmp_path)
    mixed.save(tmp_path)
    (tmp_path / "schema.json").write_bytes(trap)
    with pytest.raises(DataError):
        pim.load(tmp_path)
    assert not (tmp_path / "sprung").exists()


def rewrite_schema(folder: Path, **fields) -> None:
    """The schema with other fields and, as someone who tampers knowingly would, with checksums that agree."""
    schema = json.loads((folder / "schema.json").read_text()) | fields
    schema["weights_sha256"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    del schema["sha256"]
    schema["sha256"] = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()
    (folder / "schema.json").write_text(json.dumps(schema))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("name", ["schema.json", "weights.safetensors"])
def test_a_truncated_file_is_refused(mixed, tmp_path, name, share):
    mixed.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=f"{name}.*damaged"):
        pim.load(tmp_path)


@pytest.mark.parametrize("place", [0, 9, 200, -300, -1])
@pytest.mark.parametrize("name", ["schema.json", "weights.safetensors"])
def test_one_changed_byte_is_refused(mixed, tmp_path, name, place):
    mixed.save(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[place] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*damaged"):
        pim.load(tmp_path)


def test_missing_weights_are_said(mixed, tmp_path):
    mixed.save(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(DataError, match=r"weights.safetensors is missing"):
        pim.load(tmp_path)


def test_weights_of_another_model_are_refused(mixed, fitted, tmp_path):
    mixed.save(tmp_path / "one")
    fitted.save(tmp_path / "two")
    shutil.copy(tmp_path / "two" / "weights.safetensors", tmp_path / "one" / "weights.safetensors")
    with pytest.raises(DataError, match="checksum"):
        pim.load(tmp_path / "one")
    rewrite_schema(tmp_path / "one")
    with pytest.raises(DataError, match="weights"):
        pim.load(tmp_path / "one")


def test_a_model_of_a_future_version_is_refused(mixed, tmp_path):
    mixed.save(tmp_path)
    rewrite_schema(tmp_path, format=99, something_new=[1, 2])
    with pytest.raises(DataError, match=r"format 99.*update"):
        pim.load(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "one"},
        {"format": None},
        {"variables": []},
        {"variables": [{"name": "x"}]},
        {"variables": "x"},
        {"architecture": {"depth": 3}},
        {"architecture": []},
        {"architecture": {"head": "histogram"}},
        {"exchangeable": [[["power"], ["nothing"]]]},
        {"exchangeable": 3},
        {"kind": "SomethingElse"},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_a_schema_that_was_tampered_with_is_refused(mixed, tmp_path, fields):
    mixed.save(tmp_path)
    rewrite_schema(tmp_path, **fields)
    with pytest.raises(DataError):
        pim.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"sha256": "", "format": 1}', "\x00" * 50])
def test_something_else_in_place_of_the_schema(mixed, tmp_path, content):
    mixed.save(tmp_path)
    (tmp_path / "schema.json").write_text(content)
    with pytest.raises(DataError, match=r"schema\.json"):
        pim.load(tmp_path)


def test_a_schema_that_lacks_a_field_is_refused(mixed, tmp_path):
    mixed.save(tmp_path)
    whole = json.loads((tmp_path / "schema.json").read_text())
    for field in whole:
        schema = {name: value for name, value in whole.items() if name not in (field, "sha256")}
        if field != "sha256":
            schema["sha256"] = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).hexdigest()
        (tmp_path / "schema.json").write_text(json.dumps(schema))
        with pytest.raises(DataError):
            pim.load(tmp_path)


# ------------------------------------------------------------------------------------------------ from data
def test_data_that_cannot_be_learned_from_is_refused():
    x = torch.linspace(0, 1, 20)
    for column, message in ((torch.full((20,), NAN), "y"), (torch.ones(20), "y")):
        ds = pim.from_columns({"x": x, "y": column}, roles={"x": "parameter", "y": "observation"})
        with pytest.raises(DataError, match=message):
            JointFlow.from_dataset(ds)


def test_rows_to_fit_may_be_others_than_those_it_was_made_from(rows):
    flow = JointFlow.from_dataset(rows, **SMALL)
    shifted = from_tensor(to_tensor(rows, flow.variables) * 100 + 1e4, flow.variables)
    flow.fit(shifted, progress=False, schedule=BRIEF)
    with torch.no_grad():
        draws = flow.conditional(["x1"]).sample((2000,))
    assert abs(draws.mean() - float(shifted["x1"].mean())) < 0.2 * float(shifted["x1"].std())


def test_rounded_values_are_learned_as_spread_over_their_step():
    """Counts have the variance of what was rounded, and no density that piles up on the whole numbers."""
    generator = torch.Generator().manual_seed(0)
    x = (1.5 * torch.randn(3000, generator=generator, dtype=torch.float64)).round()
    y = x + 0.5 * torch.randn(3000, generator=generator, dtype=torch.float64)
    ds = pim.from_columns({"x": x, "y": y}, {"x": "parameter", "y": "observation"}, resolutions={"x": 1.0})
    flow = JointFlow.from_dataset(ds, **SMALL)
    expected = (x.var() + 1 / 12).sqrt()
    assert abs(flow.standardization.scale[0] / expected - 1) < 0.03
    flow.fit(ds, progress=False, schedule=pim.Schedule(steps=300))
    with torch.no_grad():
        whole, half = flow.conditional(["x"]).log_prob(torch.tensor([[[0.0], [1.0]], [[0.5], [0.5]]])).exp().sum(-1)
    assert abs(whole / half - 1) < 0.2
