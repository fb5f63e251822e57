"""The project file, and names and values as they are typed."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest

from pyro_invman.cli.project import Project, load_project, project_file, with_options
from pyro_invman.cli.typed import Names, names, pairs
from pyro_invman.variables import DataError, Variable, Variables

WHOLE = Project(
    task="alloy", source="lab", separator=";", decimal=",", encoding="latin1", missing=("", "n/a"), skip_lines=2,
    units_row=True, sheet="runs", columns={"Power (W)": "power", 'a "b" = c, d': "odd"},
    roles={"power": "parameter", "odd": "observation"}, supports={"power": "positive"}, units={"power": "W"},
    levels={"gas": ["Ar", "N2"]}, resolutions={"odd": 0.5}, informative={"power": True},
)  # fmt: skip


def test_a_project_survives_its_file(tmp_path):
    path = tmp_path / "invman.toml"
    notes = {"roles.power": "its header says so", "roles.note": "left out", "task": "by its header"}
    path.write_text(WHOLE.to_toml(notes), encoding="utf-8")
    again = load_project(path)
    assert again.columns == WHOLE.columns and again.roles == WHOLE.roles and again.levels == WHOLE.levels
    assert {**vars(again), "missing": tuple(again.missing)} == vars(WHOLE)
    assert "# note: left out" in path.read_text()
    path.write_text(Project().to_toml())
    assert load_project(path) == Project()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[roles", "not a TOML file"),
        ("tsak = 'a'", "found the key 'tsak'; did you mean 'task'"),
        ("[rolse]\na = 'parameter'", "did you mean 'roles'"),
        ("skip_lines = 'two'", "expected a whole number"),
        ("skip_lines = true", "expected a whole number"),
        ("units_row = 1", "expected true or false"),
        ("roles = 'all'", r"expected a table \[...\]"),
        ("missing = 'n/a'", "expected a list"),
        ("task = 3", "expected text in quotes"),
    ],
)
def test_project_files_that_mean_nothing_are_refused(tmp_path, text, message):
    path = tmp_path / "invman.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_project(path)
    with pytest.raises(FileNotFoundError, match="describe"):
        load_project(tmp_path / "absent.toml")


def test_the_file_beside_the_table_goes_before_that_of_the_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = argparse.Namespace(project=None, table="data/runs.csv")
    assert project_file(arguments) is None and not capsys.readouterr().err
    (tmp_path / "invman.toml").write_text("")
    assert project_file(arguments).parts == ("invman.toml",)
    (tmp_path / "data" / "invman.toml").write_text("")
    assert project_file(arguments).parts == ("data", "invman.toml")
    assert "data/invman.toml says" in capsys.readouterr().err
    arguments.project = "other.toml"
    assert str(project_file(arguments)) == "other.toml"


def test_options_go_before_the_file():
    arguments = argparse.Namespace(decimal=".", sep=None, missing="x,y", roles="power=condition,new=observation")
    found = with_options(WHOLE, arguments)
    assert (found.decimal, found.separator, list(found.missing)) == (".", ";", ["x", "y"])
    assert found.roles == {"power": "condition", "odd": "observation", "new": "observation"}


# ------------------------------------------------------------------------------------------------ names and values
KNOWN = ("power", "a=b", "P, max (W)", "alloy", "y, out")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("power=1,alloy=Ti", {"power": "1", "alloy": "Ti"}),
        (["power=1", "alloy=Ti"], {"power": "1", "alloy": "Ti"}),
        ("a=b=3", {"a=b": "3"}),
        ("y, out=1,a=b=3", {"y, out": "1", "a=b": "3"}),
        ("P, max (W)=200,power=1", {"P, max (W)": "200", "power": "1"}),
        ("alloy=Ti, grade 5, power=1", {"alloy": "Ti, grade 5", "power": "1"}),
        ("power=1, P, max (W)=200", {"power": "1", "P, max (W)": "200"}),
        ("depht=2,power=1", {"depht": "2", "power": "1"}),
        ("power=1,depht=2", {"power": "1", "depht": "2"}),
        ("power=1,", {"power": "1"}),
        (None, {}),
    ],
)
def test_pairs_with_names_of_any_letters(texts, expected):
    assert pairs(texts, "given", KNOWN) == expected


@pytest.mark.parametrize("text", ["power", "power=", "=1", "alloy=Ti,power", "1,2"])
def test_what_is_no_pair_is_refused(text):
    with pytest.raises(DataError, match=r"--given: found .*expected name=value"):
        pairs(text, "given", ["power"] if text != "alloy=Ti,power" else ())


def test_names_may_hold_commas():
    assert names("power, P, max (W),alloy", KNOWN) == ["power", "P, max (W)", "alloy"]
    assert names("unknown,power", KNOWN) == ["unknown", "power"]


def test_a_variable_goes_by_its_header_too_and_in_letters_of_any_size():
    variables = Variables([Variable(name, "parameter") for name in ("power", "Gas", "a", "A")])
    called = Names(variables, {"Power, max (W)": "power", "Gas": "gas", "no": "left_out"})
    assert called.pairs("Power, max (W)=3,GAS=1,A=2", "given") == {
        "power": "3", "Gas": "1", "A": "2",
    }  # fmt: skip
    assert called.list("Power, max (W),gas,a") == ["power", "Gas", "a"] and called.of("POWER, MAX (W)") == "power"
    with pytest.raises(DataError, match="unknown variable 'no'"):
        called.of("no")
    with pytest.raises(DataError, match="power is given twice"):
        called.pairs("power=1,Power, max (W)=3", "given")
    both = Names(Variables([Variable("ab", "parameter"), Variable("AB", "parameter")]), {})
    with pytest.raises(DataError, match="'Ab' may be AB or ab"):
        both.of("Ab")


# ------------------------------------------------------------------------------------------------ tables for a model
VARIABLES = Variables(
    [
        Variable("power", "parameter", "positive", "W"),
        Variable("gas", "condition", "categorical", levels=("Ar", "N2")),
        Variable("depth", "observation", units="um"),
    ]
)
LIKE = Project(
    task="alloy",
    separator=";",
    decimal=",",
    skip_lines=1,
    units_row=True,
    columns={"Power (W)": "power", "Alloy": "alloy"},
)


@pytest.mark.parametrize(
    "text",
    [
        "exported\nPower (W);gas;Alloy\nW;;\n1,5;N2;x\n;Ar;y\n",
        "Power (W);gas;Alloy\n1,5;N2;x\n;Ar;y\n",  # neither a line above nor units below
        "power;gas;alloy\n1,5;N2;x\n;Ar;y\n",  # names of the model instead of headers
        "exported\npower;gas;alloy;more\n1,5;N2;x;1\n;Ar;y;2\n",
    ],
)
def test_new_tables_for_a_model_may_lack_what_the_first_had(tmp_path, text):
    path = tmp_path / "new.csv"
    path.write_text(text)
    ds = LIKE.dataset(path, VARIABLES, training=False)
    assert list(ds) == ["power", "gas"] and ds["task"].values.tolist() == ["x", "y"]
    np.testing.assert_array_equal(ds["power"], [1.5, math.nan])
    np.testing.assert_array_equal(ds["gas"], [1.0, 0.0])
    assert ds.attrs["left_out"] == (["more"] if "more" in text else [])


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "out.csv"
    LIKE.write_csv(path, ["power", "gas", "depth"], [[1.25, "N2", math.nan], [None, "Ar", 3.0]])
    assert path.read_text() == "power;gas;depth\n1,25;N2;\n;Ar;3\n"
    ds = LIKE.dataset(path, VARIABLES, training=False)
    np.testing.assert_array_equal(ds["depth"], [math.nan, 3.0])


def test_a_table_of_other_things_is_refused(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match=r"found columns \['a', 'b'\], expected some of \['power', 'gas', 'depth'\]"):
        Project(separator=";").dataset(path, VARIABLES, training=False)
