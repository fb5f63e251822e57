"""What a table is guessed to be, from its text alone."""

from __future__ import annotations

import json
import re
import tomllib

import numpy as np
import pandas as pd
import pytest

from pyro_invman.cli import main
from pyro_invman.cli.dialect import guess_dialect
from pyro_invman.cli.guesses import column_of, guess_roles
from pyro_invman.cli.headers import name_and_units
from pyro_invman.cli.project import load_project
from pyro_invman.data import variables_of
from pyro_invman.variables import DataError

MESSY = """\
Exported by the furnace;;;;;;

Run;Heat no.;T [°C];Spot, µm;Nozzle;Porosity (%);Depth / µm

1;A;20,5;50;Ar;3,1;16,3
2;A;-3,0;80;N2;;n/a
;;;;;;
3;B;21,0;50;Ar;12,0;-
4;B;22,5;80;N2;9,9;205,1
5;C;19,0;50;;;44,0
6;C;20,0;80;Ar;7,0;51,5
7;D;20,0;80;Ar;7,0;51,5
8;D;20,0;80;N2;7,5;61,5
9;E;20,0;80;Ar;7,0;71,5
10;E;20,0;50;Ar;7,0;81,5
"""


@pytest.fixture
def messy(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes(MESSY.replace("\n", "\r\n").encode("latin1"))
    return path


# ------------------------------------------------------------------------------------------------ headers
@pytest.mark.parametrize(
    ("header", "name", "units"),
    [
        ("Power (W)", "power", "W"),
        ("width [um]", "width", "um"),
        ("Depth / µm", "depth", "um"),
        ("Spot, μm", "spot", "um"),
        ("Scan speed in mm/s", "scan_speed", "mm/s"),
        ("T_C", "T_C", "degC"),
        ("T (°C)", "t", "degC"),
        ("depth_um", "depth_um", "um"),
        ("speed_mm_s", "speed_mm_s", "mm/s"),
        ("rho [kg/m³]", "rho", "kg/m3"),
        ("Porosity (%)", "porosity", "%"),
        ("Yield", "Yield", ""),
        ("burn_in", "burn_in", ""),
        ("a = b, c", "a_b_c", ""),
        ("2nd pass (s)", "column_2nd_pass", "s"),
        ("Länge [mm]", "lange", "mm"),
        ("ratio (-)", "ratio", ""),
        ("x_C", "x_C", ""),
        ("t_s", "t_s", "s"),
        ("absorptivity_min", "absorptivity_min", ""),
        ("hold time_min", "hold_time_min", "min"),
        ("Cat. load / mol%", "cat_load", "mol%"),
        ("%", "column", ""),
    ],
)
def test_headers_are_taken_apart(header, name, units):
    assert name_and_units(header)[:2] == (name, units)


# ------------------------------------------------------------------------------------------------ dialect
def test_a_messy_csv_is_read_as_it_is_written(messy):
    found = guess_dialect(messy)
    assert found[:5] == (";", ",", "latin1", 1, False)
    assert set(found.reasons) == {"separator", "decimal", "encoding", "skip_lines"}


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("a,b\n1.5,2\n", "utf-8", (",", ".", "utf-8", 0, False)),
        ("a,b\n1.5,2\n", "utf-8-sig", (",", ".", "utf-8", 0, False)),
        ("µ;b\n1,5;2\n", "utf-16", (";", ",", "utf-16", 0, False)),
        ("a\tb\n1,5\t2\n", "utf-8", ("\t", ",", "utf-8", 0, False)),
        ('a,b\n"1,5","2,5"\n', "utf-8", (",", ",", "utf-8", 0, False)),
        ('a,b\n"1,500",2.5\n"2,000",3.5\n', "utf-8", (",", ".", "utf-8", 0, False)),
        ("a;b\n[W];[um]\n1,5;2\n2,5;3\n", "utf-8", (";", ",", "utf-8", 0, True)),
        ("a,b\nx,1\ny,2\n", "utf-8", (",", ".", "utf-8", 0, False)),
        ("power\n1.5\n2.5\n", "utf-8", (";", ".", "utf-8", 0, False)),
        ("a;“b”\n1;2\n", "cp1252", (";", ".", "cp1252", 0, False)),
    ],
)
def test_dialects(tmp_path, text, encoding, expected):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    assert guess_dialect(path)[:5] == expected


@pytest.mark.parametrize(("raw", "message"), [(b"", "empty table"), (b"a,b\n\x00\x01", "zero byte")])
def test_what_is_no_table_is_refused(tmp_path, raw, message):
    path = tmp_path / "t.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        guess_dialect(path)


# ------------------------------------------------------------------------------------------------ columns
def test_cells_tell_support_blanks_and_what_is_to_be_mended():
    column = column_of("depth (um)", ["1,5", "n/a", "", "<0,5", "2,5", "3,25", "1.234,5"], ",")
    assert column.values == (1.5, 2.5, 3.25)
    assert column.blanks == ("n/a", "") and column.missing == 2
    assert column.wrong == ((3, "<0,5"), (6, "1.234,5"))
    assert (column.support, column.units) == ("positive", "um")
    assert column_of("x", ["0", "1.5"], ".").support == "real"
    assert column_of("T [°C]", ["20", "25"], ".").support == "real"
    assert column_of("share", ["0", "0.7"], ".").support == "interval:0:1"
    assert column_of("humidity (%)", ["0", "70"], ".").support == "interval:0:100"
    assert column_of("x (%)", ["0", "170"], ".").support == "real"


def test_roles_by_header_by_blanks_and_the_rest_left_open():
    rows = [str(n) for n in range(1, 13)]
    columns = {
        "no": rows,
        "power (W)": [f"{n}.5" for n in range(12)],
        "aa": [f"{n}.25" for n in range(12)],
        "bb": ["", "", *(f"{n}.75" for n in range(10))],
        "remark": [f"remark {n}" for n in range(12)],
        "same": ["3"] * 12,
        "empty": ["-"] * 12,
        "gas": ["Ar", "N2"] * 6,
        "paper id": ["1", "7", "7"] * 4,
        "Remarks": ["good", "bad"] * 6,
    }
    found = {c.name: c for c in guess_roles([column_of(name, cells, ".") for name, cells in columns.items()]).columns}
    roles = {name: c.role for name, c in found.items()}
    assert roles == {
        "no": None, "power": "parameter", "aa": "parameter", "bb": "observation", "remark": None, "same": None,
        "empty": None, "gas": "condition", "paper_id": None, "Remarks": None,
    }  # fmt: skip
    assert {name for name, c in found.items() if "role" in c.doubt and c.role} == {"aa", "bb"}
    assert found["gas"].support == "categorical"


def test_something_is_observed_though_no_header_says_what():
    columns = [column_of(name, [f"{n}.{k}5" for n in range(9)], ".") for k, name in enumerate("abc")]
    assert [c.role for c in guess_roles(columns).columns] == ["parameter", "parameter", "observation"]


def test_names_that_dimensions_have_are_changed_and_twins_told_apart():
    headers = ["row", "task", "A (W)", "A [mm]"]
    columns = [column_of(name, [f"{n}.{k}5" for n in range(9)], ".") for k, name in enumerate(headers)]
    assert [c.name for c in guess_roles(columns).columns] == ["row_2", "task_2", "a", "a_2"]


# ------------------------------------------------------------------------------------------------ the command
def test_describe_writes_a_project_that_reads_the_table(messy, capsys):
    assert main(["describe", str(messy), "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["rows"], report["blank_lines"], report["task"]) == (10, 1, "heat_no")
    by_name = {column["name"]: column for column in report["columns"]}
    assert by_name["depth"]["missing"] == 2 and by_name["depth"]["range"] == "16.3 to 205.1"
    assert by_name["depth"]["units"] == "um" and by_name["Run"]["role"] == "left out"
    assert report["decide"] == ["t", "Nozzle"] and report["to_mend"] == []
    project = load_project(messy.parent / "invman.toml")
    ds = project.dataset(messy)
    np.testing.assert_array_equal(ds["depth"].values[:4], [16.3, np.nan, np.nan, 205.1])
    assert ds["spot"].attrs["units"] == "um" and ds["Nozzle"].attrs["levels"] == ["Ar", "N2"]
    assert ds["task"].values.tolist() == list("AABBCCDDEE")
    assert "DECIDE" in (messy.parent / "invman.toml").read_text()


def test_rows_that_repeat_are_told(messy, capsys):
    assert main(["describe", str(messy), "--look"]) == 0
    assert "cell by cell" not in capsys.readouterr().out
    lines = MESSY.splitlines()
    messy.write_bytes("\r\n".join([*lines, lines[5], lines[4], lines[5]]).encode("latin1"))
    assert main(["describe", str(messy), "--look"]) == 0
    assert "3 rows are an earlier one cell by cell (line 16 is line 6); each counts" in capsys.readouterr().out


def test_a_project_file_is_never_overwritten_unasked(messy, capsys):
    project = messy.parent / "invman.toml"
    project.write_text("# mine\n")
    assert main(["describe", str(messy)]) == 1
    assert "exists already" in capsys.readouterr().err and project.read_text() == "# mine\n"
    assert main(["describe", str(messy), "--look"]) == 0 and project.read_text() == "# mine\n"
    shown = capsys.readouterr().out
    assert "Depth / µm" in shown and "decide on t, Nozzle" in shown
    assert main(["describe", str(messy), "--force"]) == 0 and "task" in tomllib.loads(project.read_text())


def test_cells_to_mend_are_named(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("power,depth\n1,2\n2,<0.5\n3,4.5\n4,5\n")
    assert main(["describe", str(path)]) == 0
    assert "depth, row 1 (line 3): '<0.5'; mend the cell: a limit" in capsys.readouterr().out
    assert main(["fit", str(path), "--out", str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "depth, row 1: found text '<0.5'" in error and "censored" in error


def test_tabs_and_a_units_row(tmp_path, capsys):
    path = tmp_path / "t.tsv"
    path.write_text("Power\tDepth\n(W)\t[µm]\n100\t1.5\n200\t-\n300.5\t2.5\n", encoding="utf-8")
    assert main(["describe", str(path), "--json"]) == 0
    assert [c["units"] for c in json.loads(capsys.readouterr().out)["columns"]] == ["W", "um"]
    ds = load_project(tmp_path / "invman.toml").dataset(path)
    assert ds["Power"].values.tolist() == [100, 200, 300.5] and ds["Depth"].attrs["units"] == "um"


@pytest.mark.parametrize("kind", [".xlsx", ".parquet"])
def test_other_kinds_of_table(tmp_path, kind, capsys):
    path = tmp_path / f"t{kind}"
    frame = pd.DataFrame({"Power (W)": [100, 200, 300.5, 400], "Depth (um)": [1.5, None, 2.5, 3.5]})
    frame.to_excel(path, index=False) if kind == ".xlsx" else frame.to_parquet(path)
    assert main(["describe", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["columns"][1]["missing"] == 1
    ds = load_project(tmp_path / "invman.toml").dataset(path)
    assert ds["power"].values.tolist() == [100, 200, 300.5, 400] and ds["depth"].attrs["role"] == "observation"


def test_a_sheet_with_a_title_units_blank_rows_and_numbers_as_text(tmp_path, capsys):
    path = tmp_path / "t.xlsx"
    rows = [
        ["Runs of May", None, None, None], [None] * 4, ["Power", "Depth", "Gas", None], ["W", "µm", None, None],
        [100, "1,5", "Ar", None], [200.5, "n/a", "N2", None], [None] * 4, [300, 2.25, "Ar", None],
        [400, "<1", None, None],
    ]  # fmt: skip
    with pd.ExcelWriter(path) as book:
        pd.DataFrame({"a": [1]}).to_excel(book, sheet_name="first", index=False)
        pd.DataFrame(rows).to_excel(book, sheet_name="May", index=False, header=False)
    assert main(["describe", str(path), "--sheet", "May", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["blank_lines"]) == (4, 1)
    assert report["to_mend"] == [{"column": "Depth", "row": 3, "line": 9, "found": "<1"}]
    project = load_project(tmp_path / "invman.toml")
    assert (project.sheet, project.skip_lines, project.units_row, project.decimal) == ("May", 2, True, ",")
    with pytest.raises(DataError, match="Depth, row 3: found text '<1'"):
        project.dataset(path)
    rows[-1][1] = None
    pd.DataFrame(rows).to_excel(path, sheet_name="May", index=False, header=False)
    ds = project.dataset(path)
    np.testing.assert_array_equal(ds["Power"], [100, 200.5, 300, 400])
    np.testing.assert_array_equal(ds["Depth"], [1.5, np.nan, 2.25, np.nan])
    assert ds["Depth"].attrs["units"] == "um" and ds["Gas"].attrs["levels"] == ["Ar", "N2"]
    pd.DataFrame([["Power", "Gas"], [120, "Ar"]]).to_excel(path, sheet_name="May", index=False, header=False)
    asked = project.dataset(path, variables_of(ds), training=False)  # a new table, without title and units
    assert asked["Power"].values.tolist() == [120.0] and list(asked) == ["Power", "Gas"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "a,b\n", "names and no row"),
        ("t.csv", "a,b\n1,2\n3\n", "found one column|found 1 cells, expected 2"),
        ("t.txt", "a,b\n1,2\n", "expected one of"),
        ("t.nc", "", "says itself what it holds"),
    ],
)
def test_what_cannot_be_described(tmp_path, name, text, message, capsys):
    path = tmp_path / name
    path.write_text(text)
    assert main(["describe", str(path)]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error)
    assert main(["describe", str(tmp_path / "absent.csv")]) == 1
    assert "no table at" in capsys.readouterr().err
