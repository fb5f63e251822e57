import gc
import importlib.util
import math
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import pyro_invman as pim
from pyro_invman.data import from_columns, from_tensor, read, to_tensor, validate, variables_of
from pyro_invman.variables import DataError, Variable, Variables

NAN = math.nan
ROLES = {"power_W": "parameter", "share": "condition", "mode": "observation", "depth_um": "observation"}
UNITS = {"power_W": "W", "depth_um": "um"}
SUPPORTS = {"power_W": "positive", "share": ("interval", 0.0, 1.0), "mode": "categorical"}
COLUMNS = {
    "power_W": [200.0, 250.0, NAN, 300.0],
    "share": [0.0, 0.5, 1.0, NAN],
    "mode": ["keyhole", "", "balling", "keyhole"],
    "depth_um": [84.0, NAN, -3.0, 120.5],
}
TASKS = ["p1", "p1", "p2", "p2"]
CELLS = torch.tensor(
    [[200, 0, 1, 84], [250, 0.5, NAN, NAN], [NAN, 1, 0, -3], [300, NAN, 1, 120.5]], dtype=torch.float64
)
VARIABLES = Variables(
    [
        Variable("power_W", "parameter", "positive", "W"),
        Variable("share", "condition", "interval", lower=0, upper=1),
        Variable("mode", "observation", "categorical", levels=("balling", "keyhole")),
        Variable("depth_um", "observation", units="um", resolution=0.5, informative=True),
    ]
)


def dataset(**changes) -> xr.Dataset:
    """Four rows of four variables; `changes` replace columns."""
    return from_columns(
        COLUMNS | changes, ROLES, UNITS, SUPPORTS, task=TASKS, source="lab",
        resolutions={"depth_um": 0.5}, informative={"depth_um": True, "power_W": False},
    )  # fmt: skip


def raw(values, dims=("row",), name="x", **attrs) -> xr.Dataset:
    """A dataset made by hand, with one variable beside a good one."""
    return xr.Dataset({"good": ("row", [1.0, 2.0, 3.0], {"role": "parameter"}), name: (dims, values, attrs)})


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------ the convention
def test_columns_become_the_convention():
    ds = dataset()
    assert dict(ds.sizes) == {"row": 4}
    assert ds["share"].attrs == {"role": "condition", "support": "interval", "units": "", "lower": 0.0, "upper": 1.0}
    assert ds["mode"].attrs == {
        "role": "observation", "support": "categorical", "units": "", "levels": ["balling", "keyhole"],
    }  # fmt: skip
    assert ds["depth_um"].attrs["resolution"] == 0.5 and ds["depth_um"].attrs["informative"] == 1
    assert "informative" not in ds["power_W"].attrs
    assert ds["task"].values.tolist() == TASKS and ds["source"].values.tolist() == ["lab"] * 4
    assert ds.attrs == {"left_out": []}
    assert all(array.dtype == np.float64 for array in ds.values())
    assert variables_of(ds) == VARIABLES
    same(to_tensor(ds, VARIABLES), CELLS)


def test_validate_returns_what_it_was_given_where_that_is_in_order():
    ds = dataset()
    assert validate(ds) is ds
    assert pim.validate(ds, training=False) is ds


def test_validate_codes_names_and_leaves_its_argument_alone():
    ds = raw(np.array(["b", None, "a"], dtype=object), role="condition", support="categorical", long_name="Mode")
    before = ds.copy(deep=True)
    coded = validate(ds)
    assert ds.identical(before)
    np.testing.assert_array_equal(coded["x"], [1.0, NAN, 0.0])
    expected = {"role": "condition", "support": "categorical", "units": "", "levels": ["a", "b"], "long_name": "Mode"}
    assert coded["x"].attrs == expected
    assert variables_of(ds) == variables_of(coded)
    same(to_tensor(ds, variables_of(ds)), to_tensor(coded, variables_of(coded)))


def test_integers_and_single_precision_become_double():
    ds = raw(np.array([1, 2, 3]), role="parameter")
    assert validate(ds)["x"].dtype == np.float64
    assert ds["x"].dtype == np.int64


def test_index_of_rows_and_other_attributes_are_kept():
    ds = dataset().assign_coords(row=["r1", "r2", "r3", "r4"]).assign_attrs(author="ann")
    assert validate(ds) is ds
    text = ds.assign(
        mode=("row", ["keyhole", "", "balling", "keyhole"], {"role": "observation", "support": "categorical"})
    )
    assert validate(text)["row"].values.tolist() == ["r1", "r2", "r3", "r4"]
    assert validate(text).attrs["author"] == "ann"


def test_tensors_and_their_datasets_agree():
    ds = from_tensor(CELLS, VARIABLES)
    same(to_tensor(ds, VARIABLES), CELLS)
    assert variables_of(ds) == VARIABLES
    assert validate(ds) is ds
    draws = from_tensor(CELLS.expand(5, 4, 4).clone().requires_grad_(), VARIABLES, dims=("draw", "row"))
    assert draws["mode"].dims == ("draw", "row") and draws["mode"].attrs["levels"] == ["balling", "keyhole"]
    with pytest.raises(DataError, match=r"power_W: found dimensions \('draw', 'row'\) of sizes \(5, 4\)"):
        validate(draws)
    same(to_tensor(draws.isel(draw=2), VARIABLES), CELLS)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 4, 4)])
def test_tensors_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(DataError, match=r"values: found shape .*, expected \(row, 4\)"):
        from_tensor(torch.zeros(shape), VARIABLES)


def test_to_tensor_orders_by_the_variables_and_fills_what_is_lacking_with_nan():
    ds = dataset()[["depth_um", "power_W"]]
    expected = CELLS.clone()
    expected[:, 1:3] = NAN
    same(to_tensor(ds, VARIABLES), expected)


# ------------------------------------------------------------------------------------------------ bad datasets
@pytest.mark.parametrize(
    ("values", "attrs", "message"),
    [
        ([1.0, 2.0, 3.0], {}, "x: found no role, expected 'parameter', 'observation' or 'condition'"),
        ([1.0, 2.0, 3.0], {"role": "output"}, "x: unknown role 'output'"),
        ([1.0, 2.0, 3.0], {"support": "count"}, "x: unknown support 'count'"),
        ([1.0, 2.0, 3.0], {"support": "interval"}, "x: support 'interval' needs finite lower < upper"),
        ([1.0, 2.0, 3.0], {"support": "real", "levels": ["a"]}, "x: levels belong to support 'categorical'"),
        (["1", "low", "3"], {}, "x, row 1: found text 'low', expected a number"),
        ([1.0, math.inf, 3.0], {}, "x, row 1: found inf, expected a finite number"),
        ([1.0, 2.0, -math.inf], {}, "x, row 2: found -inf, expected a finite number"),
        ([1.0, NAN, 0.0], {"support": "positive"}, "x, row 2: found 0, expected a number above 0"),
        ([1.0, -2.0, 0.0], {"support": "positive"}, r"x, row 1: found -2, expected a number above 0 .*\(and 1 more\)"),
        ([0.0, 1.0, 1.1], {"support": "interval", "lower": 0, "upper": 1}, "x, row 2: found 1.1, expected .* 0 to 1"),
        ([0.0, 1.0, 2.0], {"support": "categorical", "levels": ["a", "b"]}, "x, row 2: found 2, expected a whole"),
        (["a", "b", "c"], {"support": "categorical", "levels": ["a", "b"]}, "x, row 2: found category 'c'"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_variables_are_refused(values, attrs, message, training):
    attrs = attrs if message.startswith("x: found no role") else {"role": "observation"} | attrs
    with pytest.raises(DataError, match=message):
        validate(raw(values, **attrs), training=training)


@pytest.mark.parametrize(
    ("values", "attrs", "message"),
    [
        ([NAN, NAN, NAN], {}, "x: found no observed cell in 3 rows"),
        ([None, None, None], {"support": "categorical"}, "x: found no observed cell and no declared levels"),
        ([NAN] * 3, {"support": "categorical", "levels": ["a", "b"]}, "x: found no observed cell in 3 rows"),
        ([2.0, NAN, 2.0], {}, "x: found the constant 2 in all 2 observed cells"),
        ([NAN, NAN, 2.0], {}, "x: found the constant 2 in all 1 observed cells"),
        (["a", "", "a"], {"support": "categorical"}, "x: found the constant 'a' in all 2 observed cells"),
        ([1.0, NAN, 1.0], {"support": "categorical", "levels": ["a", "b"]}, "x: found the constant 'b'"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_training_only(values, attrs, message):
    ds = raw(np.array(values, dtype=object if {"a", None} & set(values) else float), role="observation", **attrs)
    with pytest.raises(DataError, match=message):
        validate(ds)
    if "declared" not in message:
        assert validate(ds, training=False)["x"].count() == sum(pd.notna(value) and value != "" for value in values)


def test_an_empty_table_is_refused_in_training_only():
    empty = dataset().isel(row=slice(0, 0))
    with pytest.raises(DataError, match=r"empty table \(no row\)"):
        validate(empty)
    assert validate(empty, training=False).sizes["row"] == 0
    assert to_tensor(empty, VARIABLES).shape == (0, 4)
    with pytest.raises(DataError, match="found no variable"):
        validate(xr.Dataset())
    with pytest.raises(DataError, match="found no variable"):
        from_columns({}, {})


@pytest.mark.parametrize(
    ("ds", "message"),
    [
        (raw([[1.0, 2.0]] * 3, ("row", "side"), role="parameter"), r"x: found dimensions \('row', 'side'\)"),
        (raw([1.0, 2.0], ("run",), role="parameter"), r"x: found dimensions \('run',\) of sizes \(2,\)"),
        (raw(1.0, (), role="parameter"), r"x: found dimensions \(\)"),
        (xr.Dataset({"x": ("run", [1.0, 2.0])}), r"found dimensions \['run'\], expected 'row'"),
        (raw([1.0, 2.0, 3.0], name="draw", role="parameter"), "draw: the name of a dimension"),
        (raw([1.0, 2.0, 3.0], name="task", role="parameter"), "task: the name of a dimension or label"),
        (dataset().assign_coords(task=("row", ["a", "b", "", "c"])), "task, row 2: found a blank cell"),
        (dataset().assign_coords(source="lab"), r"source: found dimensions \(\)"),
        (pd.DataFrame({"x": [1.0]}), "found DataFrame, expected an xarray.Dataset"),
        (dataset()["mode"], "found DataArray, expected an xarray.Dataset"),
    ],
)
def test_bad_shapes_and_names_are_refused(ds, message):
    with pytest.raises(DataError, match=message):
        validate(ds)


# ------------------------------------------------------------------------------------------------ bad columns
@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": [1.0], "y": [1.0, 2.0]}, {}, "y: found 2 rows, expected 1, as in x"),
        ({"x": [[1.0], [2.0]], "y": [1.0, 2.0]}, {}, r"x: found shape \(2, 1\), expected \(N,\)"),
        ({"row": [1.0, 2.0]}, {"roles": {"row": "parameter"}}, "row: the name of a dimension"),
        ({"draw": [1.0, 2.0]}, {"roles": {"draw": "parameter"}}, "draw: the name of a dimension"),
        ({"x": [1.0, 2.0]}, {}, "roles: no column 'y'; expected one of"),
        ({"x": [1.0], "yy": [1.0]}, {}, "roles: no column 'y'; did you mean 'yy'"),
        ({"x": [1.0], "y": [1.0]}, {"units": {"z": "m"}}, "units: no column 'z'"),
        ({"x": [1.0], "y": [1.0]}, {"supports": {"z": "real"}}, "supports: no column 'z'"),
        ({"x": [1.0], "y": [1.0]}, {"bounds": {"z": (0, 1)}}, "bounds: no column 'z'"),
        ({"x": [1.0], "y": [1.0]}, {"levels": {"z": ("a", "b")}}, "levels: no column 'z'"),
        ({"x": [1.0], "y": [1.0]}, {"resolutions": {"z": 1}}, "resolutions: no column 'z'"),
        ({"x": [1.0], "y": [1.0]}, {"informative": {"z": True}}, "informative: no column 'z'"),
        ({"x": [1.0], "y": [1.0]}, {"informative": ["x"]}, "informative: found list, expected a mapping"),
        ({"x": [1.0], "y": [1.0]}, {"roles": {"x": "input"}}, "x: unknown role 'input'"),
        ({"x": [1.0], "y": [1.0]}, {"supports": {"x": ("interval", 0)}}, "x: found support .*expected 'real'"),
        ({"x": [1.0], "y": [1.0]}, {"supports": {"x": 3}}, "x: found support 3"),
        ({"x": [1.0], "y": [1.0]}, {"supports": {"x": ("interval", "a", "b")}}, "x: lower must be a number"),
        ({"x": [1.0], "y": [1.0]}, {"bounds": {"x": (0, 2)}}, "x: lower and upper belong to support 'interval'"),
        ({"x": [1.0], "y": [1.0]}, {"task": ["a", "b"]}, "task: found 2 labels, expected 1"),
        ({"x": [1.0], "y": [1.0]}, {"task": [None]}, "task, row 0: found a blank cell"),
        ({"x": [1.0], "y": ["low"]}, {}, "y, row 0: found text 'low'"),
    ],
)
def test_bad_columns_are_refused(columns, options, message):
    with pytest.raises(DataError, match=message):
        from_columns(columns, **{"roles": {"x": "parameter", "y": "observation"}, **options})


def test_a_frame_with_one_name_twice_is_refused():
    frame = pd.DataFrame([[1.0, 2.0], [3.0, 4.0]], columns=["x", "x"])
    with pytest.raises(DataError, match=r"columns: found 'x' twice \(columns 0 and 1\)"):
        from_columns(frame, {"x": "parameter"})


def test_columns_may_be_tensors_frames_bounded_or_without_a_role():
    ds = from_columns(
        {"x": torch.tensor([0.5, NAN], requires_grad=True), "n": [1, 2], "m": [1, 0], "note": ["a", "b"]},
        roles={"x": "parameter", "n": "observation", "m": "condition"},
        supports={"x": "interval", "m": "categorical"},
        bounds={"x": (0, 1)},
        levels={"m": ("no", "yes")},
        task=[7, 8],
    )
    assert variables_of(ds)[0] == Variable("x", "parameter", "interval", lower=0, upper=1)
    np.testing.assert_array_equal(ds["m"], [1.0, 0.0])
    assert ds["m"].attrs["levels"] == ["no", "yes"] and ds["task"].values.tolist() == ["7", "8"]
    assert ds.attrs["left_out"] == ["note"]
    assert from_columns(pd.DataFrame({"x": [1, 2]}), {"x": "parameter"})["x"].values.tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------ use after fit
def test_levels_are_matched_by_name_not_by_code():
    one = dataset(mode=["keyhole"] * 4)
    assert one["mode"].attrs["levels"] == ["keyhole"] and (one["mode"] == 0).all()
    assert to_tensor(one, VARIABLES)[:, 2].tolist() == [1.0] * 4
    named = one.assign(mode=("row", ["keyhole", "balling", "", "keyhole"]))
    same(to_tensor(named, VARIABLES)[:, 2], torch.tensor([1.0, 0.0, NAN, 1.0], dtype=torch.float64))


def test_unseen_categories_are_refused():
    with pytest.raises(DataError, match=r"mode, row 2: found category 'keyhol', not seen .*did you mean 'keyhole'"):
        to_tensor(dataset(mode=["keyhole", "", "keyhol", "balling"]), VARIABLES)
    numbers = dataset().assign(mode=("row", [0.0, 1.0, NAN, 1.0]))
    with pytest.raises(DataError, match="mode, row 0: found category '0', not seen before"):
        to_tensor(numbers, VARIABLES)
    # a level that is declared, but occurs in no cell
    ds = from_columns(
        {"m": ["a", "b"]}, {"m": "condition"}, supports={"m": "categorical"}, levels={"m": ("a", "b", "c")}
    )
    known = Variables([Variable("m", "condition", "categorical", levels=("a", "b"))])
    assert to_tensor(ds, known)[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("units", ["mm", "", None])
def test_units_that_disagree_are_refused(units):
    ds = dataset()
    ds["depth_um"].attrs = {"role": "observation"} if units is None else {"role": "observation", "units": units}
    found = units or ""
    with pytest.raises(DataError, match=f"depth_um: found units {found!r}, expected 'um', as when fitted"):
        to_tensor(ds, VARIABLES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"power_W": [1.0, 0.0, 1.0, NAN]}, "power_W, row 1: found 0, expected a number above 0"),
        ({"share": [0.0, 0.0, 0.0, 1.5]}, "share, row 3: found 1.5, expected a number from 0 to 1"),
        ({"depth_um": [0.0, 0.0, math.inf, 1.5]}, "depth_um, row 2: found inf"),
        ({"depth_um": [0.0, "deep", 2.0, 1.5]}, "depth_um, row 1: found text 'deep'"),
    ],
)
def test_cells_are_checked_against_the_fitted_variables(changes, message):
    plain = {
        name: ("row", np.array(cells, dtype=object), {"units": UNITS.get(name, "")}) for name, cells in changes.items()
    }
    with pytest.raises(DataError, match=message):
        to_tensor(xr.Dataset(plain), VARIABLES)


def test_unknown_variables_and_wrong_shapes_are_refused():
    with pytest.raises(DataError, match="unknown variable 'dpeth_um'; did you mean depth_um"):
        to_tensor(dataset().rename(depth_um="dpeth_um"), VARIABLES)
    with pytest.raises(DataError, match=r"found dimensions .*expected 'row'"):
        to_tensor(dataset().rename(row="run"), VARIABLES)
    with pytest.raises(DataError, match="power_W: found dimensions"):
        to_tensor(dataset().expand_dims(draw=2), VARIABLES)


def test_what_cannot_be_trained_on_can_be_asked_about():
    ds = from_columns({"depth_um": [5.0], "power_W": [NAN]}, {"depth_um": "observation", "power_W": "parameter"}, UNITS)
    same(to_tensor(ds, VARIABLES), torch.tensor([[NAN, NAN, NAN, 5.0]], dtype=torch.float64))
    ds = xr.Dataset({"mode": ("row", np.array([None, None], dtype=object))})
    assert to_tensor(ds, VARIABLES).isnan().all()


# ------------------------------------------------------------------------------------------------ files
FRAME = pd.DataFrame(
    {**COLUMNS, "mode": ["keyhole", None, "balling", "keyhole"], "run": [1, 2, 3, 4], "by": ["a", "b", "a", "b"]}
)
FRAME["task"] = ["01", "1", "01", "2"]


def write(frame: pd.DataFrame, path) -> None:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".xlsx":
        frame.to_excel(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        text = [name for name in ("mode", "task", "by") if name in frame]
        ds = xr.Dataset({name: ("row", frame[name].to_numpy()) for name in frame if name not in text})
        ds = ds.assign({name: ("row", frame[name].fillna("").to_numpy(object)) for name in text})
        if path.suffix == ".nc":
            ds.to_netcdf(path)
        else:
            ds.to_zarr(path, consolidated=False)


@pytest.mark.parametrize("kind", [".csv", ".xlsx", ".parquet", ".nc", ".zarr", ".CSV"])
def test_every_kind_of_table_gives_the_same_dataset(tmp_path, kind):
    path = tmp_path / f"table{kind.lower()}"
    write(FRAME, path)
    path = path.rename(tmp_path / f"table{kind}")
    ds = pim.read(path, ROLES, task="task", source="by", units=UNITS, supports=SUPPORTS, resolutions={"depth_um": 0.5})
    assert ds.attrs["left_out"] == ["run"]
    assert ds["task"].values.tolist() == ["01", "1", "01", "2"]
    assert ds["source"].values.tolist() == ["a", "b", "a", "b"]
    assert [v.to_dict() | {"informative": True} for v in variables_of(ds)][3] == VARIABLES[3].to_dict()
    assert variables_of(ds)[:3] == VARIABLES[:3]
    same(to_tensor(ds, variables_of(ds)), CELLS)


@pytest.mark.parametrize("kind", [".nc", ".zarr"])
@pytest.mark.parametrize("left_out", [[], ["a"], ["a", "b"]])
@pytest.mark.parametrize("index", [False, True])
def test_datasets_survive_netcdf_and_zarr(tmp_path, kind, left_out, index):
    ds = dataset().assign_attrs(left_out=left_out)
    ds["share"].attrs["units"] = "seconds"  # which xarray would take for a duration
    ds["power_W"].attrs["units"] = "days since 2000-01-01"  # and this for a date
    if index:
        ds = ds.assign_coords(row=[3, 1, 4, 2])
    path = tmp_path / f"table{kind}"
    ds.to_netcdf(path) if kind == ".nc" else ds.to_zarr(path, consolidated=False)
    again = read(path)
    assert again.identical(ds)
    names = list(ds) if kind == ".nc" else sorted(ds)  # Zarr keeps no order
    assert variables_of(again) == variables_of(ds[names])
    # as xarray itself opens it, with attributes as the format gives them back
    how = {} if kind == ".nc" else {"engine": "zarr", "consolidated": False}
    with xr.open_dataset(path, decode_times=False, **how) as opened:
        assert validate(opened.load()).identical(ds)


@pytest.mark.parametrize("kind", [".nc", ".zarr"])
def test_a_single_level_survives_netcdf_and_zarr(tmp_path, kind):
    ds = dataset(mode=["keyhole", "", "keyhole", "keyhole"])
    path = tmp_path / f"table{kind}"
    ds.to_netcdf(path) if kind == ".nc" else ds.to_zarr(path, consolidated=False)
    again = read(path, training=False)
    assert again.identical(ds) and again["mode"].attrs["levels"] == ["keyhole"]


def test_arguments_go_before_what_a_file_says(tmp_path):
    dataset().to_netcdf(tmp_path / "t.nc")
    ds = read(
        tmp_path / "t.nc",
        roles={"share": "observation", "mode": "condition"},
        supports={"share": "real"},
        units={"share": "%"},
    )
    assert list(ds) == ["share", "mode"] and ds.attrs["left_out"] == ["power_W", "depth_um"]
    assert ds["share"].attrs == {"role": "observation", "support": "real", "units": "%"}
    assert ds["mode"].attrs["levels"] == ["balling", "keyhole"]
    assert ds["task"].values.tolist() == TASKS


def test_variables_of_a_file_must_lie_along_rows(tmp_path):
    xr.Dataset({"a": ("row", [1.0, 2.0]), "b": ("run", [1.0, 2.0])}).to_netcdf(tmp_path / "t.nc")
    with pytest.raises(DataError, match=r"b: found dimensions \('run',\), expected \('row',\)"):
        read(tmp_path / "t.nc", roles={"a": "parameter", "b": "observation"})


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n3,low\n", {}, "b, row 1: found text 'low', expected a number.*categorical"),
        ("a;b\n1,5;2\n2,5;3\n", {"sep": ";"}, "a, row 0: found text '1,5'.*pass decimal=\",\""),
        ("a;b\n1,5;2\n2,5;3\n", {}, "found one column, 'a;b'; .*pass sep=';'"),
        ("a,b\n1,inf\n2,3\n", {}, "b, row 0: found inf"),
        ("a,b\n1,1e400\n2,3\n", {}, "b, row 0: found inf"),
        ("a,b\n1,2\n0,3\n", {"supports": {"a": "positive"}}, "a, row 1: found 0, expected a number above 0"),
        ("a,b\n1,2\n-1,3\n", {"supports": {"a": ("interval", 0, 1)}}, "a, row 1: found -1, expected .* 0 to 1"),
        ("a,b,a\n1,2,3\n", {}, "found 'a' twice"),
        ("a,b\n", {}, "empty table"),
        ("", {}, "empty table"),
        ("a,b\n1,\n2,NA\n", {}, "b: found no observed cell in 2 rows"),
        ("a,b\n1,2\n1,3\n", {}, "a: found the constant 1"),
        ("a,b\n1,2\n3\n", {}, "row 1: found 1 cells, expected 2"),
        ("a,b\nTrue,2\nFalse,3\n", {}, "a, row 0: found True"),
        ("a,b\n1,2\n2,3\n", {"task": "alloy"}, "task: no column 'alloy'"),
        ("a,b,aloy\n1,2,x\n2,3,x\n", {"task": "alloy"}, "task: no column 'alloy'; did you mean 'aloy'"),
        ("a,b\n1,2\n2,3\n", {"source": "lab"}, "source: no column 'lab'"),
        ("a,b,t\n1,2,x\n2,3,\n", {"task": "t"}, "task, row 1: found a blank cell"),
        ("a,b\n1,2\n2,3\n", {"roles": {"a": "parameter", "bb": "observation"}}, "no column 'bb'; did you mean 'b'"),
        ("a,b\n1,2\n2,3\n", {"roles": {"a": "paramter"}}, "a: unknown role 'paramter'"),
        ("a,b\n1,2\n2,3\n", {"roles": ["a"]}, "roles: found list, expected a mapping"),
        ("a,b\n1,2\n2,3\n", {"roles": None}, r"roles: table.csv says nothing about roles.*\['a', 'b'\]"),
        ("a,b\n1,2\n2,3\n", {"roles": {}}, "found no variable"),
        ("row,b\n1,2\n2,3\n", {"roles": {"row": "parameter"}}, "row: the name of a dimension"),
        ("a,b\n1,2\n2,3\n", {"sep": "::"}, "cannot be read as .csv"),
        ("a,b\n1,2\n2,3\n", {"encoding": "latin-99"}, "cannot be read as .csv"),
        ("µ,b\n1,2\n2,3\n", {"encoding": "ascii"}, "not ascii text .*pass its encoding="),
    ],
)
def test_bad_files_are_refused_and_let_go(tmp_path, text, options, message):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=message):
            read(path, **{"roles": {"a": "parameter", "b": "observation"}, **options})
        gc.collect()  # a file left open would warn
    assert [each.name for each in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("kind", [".csv", ".xlsx", ".parquet", ".nc"])
def test_damaged_files_are_refused(tmp_path, kind):
    path = tmp_path / f"table{kind}"
    path.write_bytes(b'a,b\n1,"2\n\x00\x01\x02')
    with pytest.raises(DataError, match=f"table{kind}: cannot be read as {kind}|table.csv"):
        read(path, ROLES)


def test_kinds_and_paths_that_are_unknown_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"found the ending '.txt', expected one of .*'.csv'.*'.zarr'"):
        read(tmp_path / "table.txt", ROLES)
    with pytest.raises(FileNotFoundError, match=r"no table at .*table.csv"):
        read(tmp_path / "table.csv", ROLES)


@pytest.mark.parametrize(
    ("kind", "package"), [(".xlsx", "openpyxl"), (".parquet", "pyarrow"), (".nc", "netCDF4"), (".zarr", "zarr")]
)
def test_a_package_that_is_absent_is_named(tmp_path, monkeypatch, kind, package):
    path = tmp_path / f"table{kind}"
    write(FRAME, path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(DataError, match=f"reading {kind} needs the package {package}; run: pip install {package}"):
        read(path, ROLES)


def test_text_levels_of_a_table_can_be_declared(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("grade,b\n2,1\n1,2\n,3\n")
    roles, supports = {"grade": "condition", "b": "observation"}, {"grade": "categorical"}
    ds = read(path, roles, supports=supports, levels={"grade": ("1", "2", "3")})
    np.testing.assert_array_equal(ds["grade"], [1.0, 0.0, NAN])
    with pytest.raises(DataError, match="grade, row 0: found category '2', not seen before"):
        read(path, roles, supports=supports, levels={"grade": ("1", "3")})


def test_rows_to_be_asked_about_need_not_vary(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,\n")
    ds = read(path, {"a": "parameter", "b": "observation"}, training=False)
    assert ds["a"].values.tolist() == [1.0] and ds["b"].isnull().all()


# ------------------------------------------------------------------------------------------------ headers, models
def test_columns_may_be_renamed(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("Power (W),mode = m,n\n[W],,\n1,x,7\n2,y,8\n")
    ds = read(
        path, {"power": "parameter", "mode": "observation"}, supports={"mode": "categorical"}, units_row=True,
        columns={"Power (W)": "power", "mode = m": "mode"}, beside=["n"],
    )  # fmt: skip
    assert list(ds) == ["power", "mode"] and ds["power"].attrs["units"] == "W"
    assert ds["n"].values.tolist() == [7, 8] and ds.attrs["left_out"] == []
    with pytest.raises(DataError, match=r"columns: no column 'Power'; did you mean 'Power \(W\)'"):
        read(path, {"power": "parameter"}, columns={"Power": "power"}, units_row=True)
    with pytest.raises(DataError, match="found 'n' twice"):
        read(path, {"n": "parameter"}, columns={"Power (W)": "n"}, units_row=True)
    with pytest.raises(DataError, match="beside: no column 'm'"):
        read(path, {"n": "parameter"}, beside=["m"], units_row=True)


@pytest.mark.parametrize("kind", [".csv", ".nc"])
def test_rows_are_read_as_the_variables_of_a_model(tmp_path, kind):
    path = tmp_path / f"table{kind}"
    write(FRAME[["mode", "depth_um", "task", "run"]], path)
    ds = read(path, variables=VARIABLES, task="task", source="by", beside=["cost"], training=False)
    assert list(ds) == ["mode", "depth_um"] and "source" not in ds.coords and ds.attrs["left_out"] == ["run"]
    expected = CELLS.clone()
    expected[:, :2] = NAN
    same(to_tensor(ds, VARIABLES), expected)
    with pytest.raises(DataError, match=r"found columns .*expected some of \['power_W'"):
        write(FRAME[["run"]], path)
        read(path, variables=VARIABLES)


def test_what_a_file_says_of_its_cells_stands_beside_a_model(tmp_path):
    ds = dataset()
    ds["mode"].attrs["levels"] = ["keyhole", "balling"]  # codes of another order
    ds["mode"].values[:] = [0, NAN, 1, 0]
    ds.to_netcdf(tmp_path / "t.nc")
    same(to_tensor(read(tmp_path / "t.nc", variables=VARIABLES, training=False), VARIABLES), CELLS)
    ds["power_W"].attrs["units"] = "kW"
    ds.to_netcdf(tmp_path / "u.nc")
    with pytest.raises(DataError, match="power_W: found units 'kW', expected 'W'"):
        to_tensor(read(tmp_path / "u.nc", variables=VARIABLES, training=False), VARIABLES)


def test_a_million_rows_take_seconds_not_minutes():
    random = np.random.default_rng(0)
    n = 10**6
    columns = {f"x{i}": np.where(random.random(n) < 0.5, NAN, random.normal(size=n)) for i in range(4)}
    columns["mode"] = np.array(["a", "b", None], dtype=object)[random.integers(0, 3, n)]
    roles = dict.fromkeys(columns, "observation")
    start = time.process_time()
    ds = from_columns(
        columns, roles, supports={"mode": "categorical"}, task=np.array(["s", "t"], object)[random.integers(0, 2, n)]
    )
    cells = to_tensor(validate(ds), variables_of(ds))
    assert time.process_time() - start < 10  # about one second; a loop over cells takes a minute
    same(cells[:, 0], torch.from_numpy(columns["x0"]))
