import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch.distributions import LogNormal, Normal, Uniform

from pyro_invman.variables import DataError, Standardization, Variable, Variables

VARIABLES = Variables(
    [
        Variable("shift", "parameter", units="mm"),
        Variable("power", "parameter", "positive", units="W"),
        Variable("share", "condition", "interval", lower=-0.1, upper=0.7),
        Variable("mode", "observation", "categorical", levels=("keyhole", "balling", "none")),
    ]
)
NAN = math.nan


def rows(n: int = 50, missing: float = 0.3, seed: int = 0) -> torch.Tensor:
    """Rows (n, 4) of the variables above in float64, with missing cells."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(n, 4, generator=generator, dtype=torch.float64)
    cells[:, 0] = 5 + 30 * cells[:, 0]
    cells[:, 1] = (3 * cells[:, 1]).exp()
    cells[:, 2] = -0.1 + 0.8 * cells[:, 2]
    cells[:, 3] = (cells[:, 3] * 3).floor()
    return cells.masked_fill(torch.rand(n, 4, generator=generator) < missing, NAN)


# ------------------------------------------------------------------------------------------------ Variable
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "variable name"),
        ({"name": "  "}, "variable name"),
        ({"name": 3}, "variable name: found 3"),
        ({"role": "target"}, "x: unknown role 'target'.*parameter.*observation.*condition"),
        ({"support": "count"}, "x: unknown support 'count'.*real.*positive.*interval.*categorical"),
        ({"units": None}, "x: units must be text, found None"),
        ({"support": "interval"}, "x: support 'interval' needs finite lower < upper"),
        ({"support": "interval", "lower": 0.0}, "x: .*found 0.0 and None"),
        ({"support": "interval", "lower": 1.0, "upper": 1.0}, "x: .*found 1.0 and 1.0"),
        ({"support": "interval", "lower": 0.0, "upper": math.inf}, "x: .*found 0.0 and inf"),
        ({"support": "interval", "lower": NAN, "upper": 1.0}, "x: .*found nan and 1.0"),
        ({"support": "interval", "lower": "low", "upper": 1.0}, "x: lower must be a number, found 'low'"),
        ({"support": "positive", "lower": 0.0}, "x: lower and upper belong to support 'interval'"),
        ({"support": "categorical"}, "x: found levels \\[\\]"),
        ({"support": "categorical", "levels": ("a", "a")}, "x: found levels \\['a', 'a'\\], expected different"),
        ({"support": "categorical", "levels": ("a", "")}, "x: found levels"),
        ({"levels": ("a", "b")}, "x: levels belong to support 'categorical', not 'real'"),
        ({"resolution": -1.0}, "x: found resolution -1, expected 0 or a positive step"),
        ({"resolution": math.inf}, "x: found resolution inf"),
        ({"support": "categorical", "levels": ("a", "b"), "resolution": 1.0}, "x: found resolution 1"),
    ],
)
def test_variable_refuses_with_name_found_and_expected(fields, message):
    with pytest.raises(DataError, match=message):
        Variable(**{"name": "x", "role": "parameter", **fields})


def test_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)


@pytest.mark.parametrize(
    ("variable", "inside", "outside"),
    [
        (VARIABLES[0], [-1e9, 0.0, 1e9], [NAN]),
        (VARIABLES[1], [1e-9, 1e9], [0.0, -1.0]),
        (VARIABLES[2], [-0.1, 0.0, 0.7], [-0.11, 0.71]),
        (VARIABLES[3], [0.0, 2.0], [-1.0, 0.5, 3.0]),
    ],
)
def test_constraint_is_the_support(variable, inside, outside):
    check = variable.constraint.check
    assert check(torch.tensor(inside, dtype=torch.float64)).all()
    assert not check(torch.tensor(outside, dtype=torch.float64)).any()


def test_variable_survives_json_with_numpy_numbers():
    variable = Variable("x", "condition", "interval", "K", np.float32(0.5), np.int64(2), (), np.float32(0.25), np.True_)
    assert (variable.lower, variable.upper, variable.resolution, variable.informative) == (0.5, 2.0, 0.25, True)
    for each in (variable, *VARIABLES):
        assert Variable.from_dict(json.loads(json.dumps(each.to_dict()))) == each


def test_from_dict_refuses_unknown_and_missing_fields():
    fields = VARIABLES[0].to_dict()
    with pytest.raises(DataError, match="expected the fields"):
        Variable.from_dict(fields | {"colour": "red"})
    with pytest.raises(DataError, match="expected the fields"):
        Variable.from_dict({"name": "x"})


# ------------------------------------------------------------------------------------------------ Variables
def test_variables_answer_by_name_and_role():
    assert VARIABLES.names == ("shift", "power", "share", "mode")
    assert VARIABLES.index("share") == 2
    assert VARIABLES.indices(["mode", "shift"]) == [3, 0]
    assert VARIABLES.with_role("parameter") == ("shift", "power")
    assert VARIABLES.with_role("condition") == ("share",)
    assert len(VARIABLES) == 4 and list(VARIABLES)[1] is VARIABLES[1]
    assert [v.discrete for v in VARIABLES] == [False, False, False, True]


def test_unknown_names_are_refused_with_what_is_close():
    with pytest.raises(DataError, match="unknown variable 'powr'; did you mean power"):
        VARIABLES.index("powr")
    with pytest.raises(DataError, match="unknown variable 'zzz'; known: shift, power, share, mode"):
        VARIABLES.indices(["shift", "zzz"])
    with pytest.raises(DataError, match="unknown role 'target'"):
        VARIABLES.with_role("target")


def test_duplicate_names_and_no_variables_are_refused():
    with pytest.raises(DataError, match=r"power appears twice \(columns 1 and 2\)"):
        Variables([VARIABLES[0], VARIABLES[1], VARIABLES[1]])
    with pytest.raises(DataError, match="none given"):
        Variables([])


def test_variables_survive_json_and_compare_by_content():
    again = Variables.from_list(json.loads(json.dumps(VARIABLES.to_list())))
    assert again == VARIABLES and hash(again) == hash(VARIABLES)
    assert again != Variables(list(VARIABLES)[:3])
    assert again != Variables([VARIABLES[1], VARIABLES[0], VARIABLES[2], VARIABLES[3]])


# ------------------------------------------------------------------------------------------------ Standardization
def test_statistics_are_those_of_the_observed_cells():
    values = rows()
    fitted = Standardization.fit(VARIABLES, values)
    cells = values.numpy().copy()
    cells[:, 1] = np.log(cells[:, 1])
    loc, scale = np.nanmean(cells, 0), np.nanstd(cells, 0)
    np.testing.assert_allclose(fitted.loc[:3], loc[:3], rtol=1e-13)
    np.testing.assert_allclose(fitted.scale[:3], scale[:3], rtol=1e-13)
    assert (fitted.loc[3], fitted.scale[3]) == (0.0, 1.0)
    padded = torch.cat([values, torch.full((7, 4), NAN, dtype=torch.float64)])
    torch.testing.assert_close(Standardization.fit(VARIABLES, padded).scale, fitted.scale, rtol=1e-14, atol=0)


def test_working_cells_have_mean_zero_and_spread_one():
    values = rows(missing=0.0)
    working = Standardization.fit(VARIABLES, values)(values)[:, :3]
    torch.testing.assert_close(working.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(working.std(0, correction=0), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("constant", [3.0, 0.1, 1e9 / 3, 1e-12])
def test_columns_without_spread_or_cells_keep_scale_one(constant):
    values = rows()
    values[:, 0], values[:, 1], values[:, 2] = constant, constant, NAN
    fitted = Standardization.fit(VARIABLES, values)
    assert fitted.scale.tolist() == [1.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(fitted.loc[0].item(), constant, rtol=1e-14, atol=0)
    assert fitted.loc[2] == 0.0


def test_log_jacobian_is_that_of_autograd():
    values = rows(missing=0.0).requires_grad_()
    fitted = Standardization.fit(VARIABLES, values.detach())
    jacobian = torch.autograd.functional.jacobian(lambda v: fitted(v).sum(0), values).diagonal(dim1=0, dim2=2)
    result = fitted.log_abs_det_jacobian(values)
    torch.testing.assert_close(result[:, :3], jacobian.log()[:, :3], rtol=1e-12, atol=1e-12)
    assert (result[:, 3] == 0).all()
    assert torch.autograd.gradcheck(fitted, rows(3, 0.0).requires_grad_())
    assert torch.autograd.gradcheck(fitted.inverse, fitted(rows(3, 0.0)).detach().requires_grad_())
    assert torch.autograd.gradcheck(fitted.log_abs_det_jacobian, rows(3, 0.0).requires_grad_())


def test_change_of_variables_gives_the_density_in_natural_units():
    values = rows(missing=0.0)
    fitted = Standardization.fit(VARIABLES, values)
    result = Normal(0.0, 1.0).log_prob(fitted(values)) + fitted.log_abs_det_jacobian(values)
    exact = LogNormal(fitted.loc[1], fitted.scale[1]).log_prob(values[:, 1])
    torch.testing.assert_close(result[:, 1], exact, rtol=1e-12, atol=1e-12)
    exact = Normal(fitted.loc[0], fitted.scale[0]).log_prob(values[:, 0])
    torch.testing.assert_close(result[:, 0], exact, rtol=1e-12, atol=1e-12)
    flat = Uniform(fitted.lower[2], fitted.upper[2]).log_prob(fitted(values)[:, 2])
    exact = torch.full_like(flat, -math.log(0.8))
    torch.testing.assert_close(flat + fitted.log_abs_det_jacobian(values)[:, 2], exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_inverse_undoes_forward_and_keeps_nan_and_dtype(dtype, rtol):
    values = rows().to(dtype).reshape(5, 10, 4)
    fitted = Standardization.fit(VARIABLES, rows())
    working = fitted(values)
    assert working.dtype == dtype and fitted.log_abs_det_jacobian(values).dtype == dtype
    assert torch.equal(working.isnan(), values.isnan())
    torch.testing.assert_close(fitted.inverse(working), values, rtol=rtol, atol=1e-6, equal_nan=True)
    assert torch.equal(working[..., 3].nan_to_num(-1), values[..., 3].nan_to_num(-1))


def test_missing_cells_have_no_gradient_and_spoil_none():
    fitted = Standardization.fit(VARIABLES, rows())
    for transform in (fitted.forward, fitted.inverse, fitted.log_abs_det_jacobian):
        values = rows().requires_grad_()
        missing = values.isnan()
        transform(values).masked_fill(missing, 0.0).square().sum().backward()
        assert values.grad.isfinite().all()
        assert (values.grad[missing] == 0).all()
    assert (fitted.log_abs_det_jacobian(rows())[rows().isnan()] == 0).all()


@pytest.mark.parametrize("index", [[2, 1], torch.tensor([2, 1]), [1], range(4)])
def test_index_chooses_the_columns(index):
    fitted = Standardization.fit(VARIABLES, rows())
    values, columns = rows(), [int(i) for i in index]
    for transform in (fitted.forward, fitted.inverse, fitted.log_abs_det_jacobian):
        expected = transform(values)[:, columns]
        torch.testing.assert_close(transform(values[:, columns], index=index), expected, equal_nan=True, rtol=0, atol=0)


def test_bounds_are_the_ends_in_working_coordinates():
    fitted = Standardization.fit(VARIABLES, rows())
    assert fitted.lower.tolist()[:2] == [-math.inf] * 2 and fitted.upper.tolist()[:2] == [math.inf] * 2
    ends = fitted(torch.tensor([[-0.1], [0.7]], dtype=torch.float64), index=[2])[:, 0]
    torch.testing.assert_close(torch.stack([fitted.lower[2], fitted.upper[2]]), ends, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_leave_the_interval_but_an_excess_is_not_hidden(dtype):
    fitted = Standardization.fit(VARIABLES, rows())
    ends = torch.stack([fitted.lower[2:3], fitted.upper[2:3]]).float()
    for nudged in (ends, ends * (1 + 1e-6), ends * (1 - 1e-6)):
        assert VARIABLES[2].constraint.check(fitted.inverse(nudged.to(dtype), index=[2])).all()
    outside = fitted.inverse((ends * 1.01).to(dtype), index=[2])
    assert not VARIABLES[2].constraint.check(outside).any()


def test_a_large_mean_keeps_its_digits_in_a_single_precision_module():
    variables = Variables([Variable("temperature", "condition", units="mK")])
    values = 1e9 + torch.randn(100, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fitted = Standardization.fit(variables, values)
    exact = fitted(values)
    module = torch.nn.Sequential(fitted, torch.nn.Linear(1, 1)).float()
    assert module[1].weight.dtype == torch.float32 and fitted.loc.dtype == torch.float64
    assert torch.equal(fitted(values), exact)
    torch.testing.assert_close(fitted.inverse(exact.float()).double(), values.float().double())


def test_integer_cells_are_not_truncated():
    fitted = Standardization.fit(VARIABLES, rows())
    codes = torch.ones(2, 4, dtype=torch.long)
    torch.testing.assert_close(fitted(codes), fitted(codes.double()).float())


def test_state_survives_state_dict_pickle_and_copy():
    fitted = Standardization.fit(VARIABLES, rows())
    assert set(fitted.state_dict()) == {"loc", "scale"}
    loaded = Standardization(VARIABLES)
    loaded.load_state_dict(fitted.state_dict())
    for again in (loaded, pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert torch.equal(again(rows()).nan_to_num(), fitted(rows()).nan_to_num())
        assert torch.equal(again.lower, fitted.lower) and torch.equal(again.upper, fitted.upper)


def test_wrong_shapes_and_cells_are_refused():
    fitted = Standardization(VARIABLES)
    for transform in (fitted.forward, fitted.inverse, fitted.log_abs_det_jacobian):
        with pytest.raises(DataError, match=r"found shape \(5, 3\), expected \(..., 4\)"):
            transform(torch.zeros(5, 3))
        with pytest.raises(DataError, match=r"found shape \(5, 4\), expected \(..., 2\)"):
            transform(torch.zeros(5, 4), index=[0, 1])
        with pytest.raises(DataError, match=r"found shape \(\)"):
            transform(torch.tensor(1.0))
    with pytest.raises(DataError, match=r"found shape \(5, 3\), expected \(N, 4\)"):
        Standardization.fit(VARIABLES, torch.zeros(5, 3))
    values = rows(missing=0.0)
    values[3, 1] = 0.0
    with pytest.raises(DataError, match="power, row 3: found 0, expected a positive"):
        Standardization.fit(VARIABLES, values)
    values[2, 0] = -math.inf
    with pytest.raises(DataError, match="shift, row 2: found -inf, expected a finite"):
        Standardization.fit(VARIABLES, values)
