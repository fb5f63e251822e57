"""Files to raw columns, and raw cells to numbers."""

import datetime
import decimal
import re

import numpy as np
import pandas as pd
import pytest

from pyro_invman import tables
from pyro_invman.variables import DataError, Variable

NAN = np.nan


def csv(tmp_path, text, as_text=(), sep=",", decimal=".", encoding="utf-8", missing=tables.MISSING, **above):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    return tables.csv_columns(path, as_text, missing, sep, decimal, encoding, **above)


# ------------------------------------------------------------------------------------------------ csv
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a,b\n1.5,x\n,y\n-2e3,\n", {}),
        ("a;b\n1,5;x\n;y\n-2e3;\n", {"sep": ";", "decimal": ","}),
        ("a\tb\n1.5\tx\nNA\ty\n-2e3\tN/A\n", {"sep": "\t"}),
        ("\ufeffa, b\r\n1.5, x\r\nnan, y\r\n\r\n-2e3,\r\n\r\n", {}),
        ('"a","b"\n"1.5","x"\n"","y"\n-2000,""', {"encoding": "latin1"}),
        ("\ufeffa,b\n1.5,x\n,y\n-2e3,\n", {"encoding": "utf-16"}),
    ],
)
def test_dialects_give_the_same_columns(tmp_path, text, options):
    columns = csv(tmp_path, text.replace("\ufeff", "") if "encoding" in options else text, as_text={"b"}, **options)
    assert list(columns) == ["a", "b"]
    np.testing.assert_array_equal(columns["a"], [1.5, NAN, -2000.0])
    assert columns["b"].fillna("").tolist() == ["x", "y", ""]


def test_text_columns_are_kept_as_written(tmp_path):
    columns = csv(tmp_path, "task,x\n001,001\n1.0,1.0\n1e2,1e2\n", as_text={"task"})
    assert columns["task"].tolist() == ["001", "1.0", "1e2"]
    assert columns["x"].tolist() == [1.0, 1.0, 100.0]


def test_only_the_stated_texts_are_missing(tmp_path):
    columns = csv(tmp_path, "mode,x\nNone,1\nnull,2\nNA,3\n", as_text={"mode"})
    assert columns["mode"].fillna("").tolist() == ["None", "null", ""]
    columns = csv(tmp_path, "mode,x\nNone,1\n-,2\nNA,-\n", as_text={"mode"}, missing=("-",))
    assert columns["mode"].fillna("").tolist() == ["None", "", "NA"]
    np.testing.assert_array_equal(columns["x"], [1.0, 2.0, NAN])


def test_numbers_are_read_to_the_last_digit(tmp_path):
    exact = np.random.default_rng(0).lognormal(0, 30, 1000)
    columns = csv(tmp_path, "a\n" + "\n".join(map(repr, exact.tolist())))
    np.testing.assert_array_equal(columns["a"], exact)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty table"),
        ("\n\n", "empty table"),
        ("a,b,a\n1,2,3\n", r"found 'a' twice \(columns 0 and 2\)"),
        ("a, a \n1,2\n", r"found 'a' twice \(columns 0 and 1\)"),
        ("a,b\n1,2\n\n1\n1,2\n", "row 1: found 1 cells, expected 2"),
        ("a,b\n1,2\n3,4,5\n", "row 1: found 3 cells, expected 2"),
        ("a,b\n1,2,3\n3,4,5\n", "row 0: found 3 cells, expected 2"),
        ("a;b\n1,5;2,5\n", "found one column, 'a;b'; .*sep=';'"),
        ("a\tb\n1\t2\n", r"found one column, 'a\\tb'; .*sep='\\t'"),
    ],
)
def test_tables_that_cannot_be_what_was_meant_are_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=f"table.csv.*{message}"):
        csv(tmp_path, text)


def test_names_left_blank_are_told_apart(tmp_path):
    assert list(csv(tmp_path, "a,,\n1,2,3\n")) == ["a", "Unnamed: 1", "Unnamed: 2"]


def test_lines_of_separators_only_are_no_rows(tmp_path):
    columns = csv(tmp_path, "a;b;c\n\n1;x;\n;;\n   \n;y;\n;\n", as_text={"b"}, sep=";")
    np.testing.assert_array_equal(columns["a"], [1.0, NAN])
    assert columns["b"].tolist() == ["x", "y"]
    with pytest.raises(DataError, match="row 1: found 2 cells, expected 3"):
        csv(tmp_path, "a;b;c\n1;x;\n;;\n2;y\n", sep=";")


def test_lines_above_the_header_and_units_below_it(tmp_path):
    text = "Log of May;;\n\npower;depth;mode\n[W];(µm);\n1,5;2;x\n;3,5;y\n"
    how = {"sep": ";", "decimal": ",", "skip_lines": 1, "units_row": True}
    columns = csv(tmp_path, text, as_text={"mode"}, **how)
    np.testing.assert_array_equal(columns["power"], [1.5, NAN])
    assert columns["mode"].tolist() == ["x", "y"]
    assert tables.csv_head(tmp_path / "table.csv", ";", "utf-8", 1, True) == (
        ["power", "depth", "mode"],
        ["W", "µm", ""],
    )
    with pytest.raises(DataError, match="found '1,5' in the units row under 'power'"):
        csv(tmp_path, text.replace("[W];(µm);\n", ""), **how)
    assert csv(tmp_path, "log\na,b\n", skip_lines=1)["a"].tolist() == []


def test_what_is_no_number_under_a_decimal_comma_is_what_is_named(tmp_path):
    columns = csv(tmp_path, "a;b\n1,5;1.5\n<0,5;2.5\n2,5;3\n", sep=";", decimal=",")
    with pytest.raises(DataError, match=r"a, row 1: found text '<0,5'.*censored"):
        tables.numbers("a", tables.column("a", columns["a"]))
    with pytest.raises(DataError, match=r"b, row 0: found text '1\.5', expected a number"):
        tables.numbers("b", tables.column("b", columns["b"]))


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("<0.5", "a limit of detection"),
        (">= 100", "a limit of detection"),
        ("1,5", 'pass decimal=","'),
        ("1.234,5", "take out the thousands separators .'1234,5'"),
        ("1,234", "if it separates thousands, take it out .'1234'"),
        ("1,234.5", "take out the thousands separators"),
        ("1 234.5", "take out the thousands separators"),
        ("200 W", "units belong into units="),
        ("low", "name it in missing="),
    ],
)
def test_what_to_do_about_a_cell_is_said(text, advice):
    with pytest.raises(DataError, match=f"x, row 1: found text '{re.escape(text)}', expected a number; .*{advice}"):
        tables.numbers("x", tables.column("x", ["1", text]))


# ------------------------------------------------------------------------------------------------ xlsx, parquet
def test_xlsx_cells_come_as_they_are(tmp_path):
    path = tmp_path / "table.xlsx"
    frame = pd.DataFrame({"a": [1, 2.5, None], "mode": ["x", None, "None"], "n": [1, "NA", 3], 2024: [True, 5, "6"]})
    with pd.ExcelWriter(path) as book:
        pd.DataFrame({"other": [1]}).to_excel(book, sheet_name="first", index=False)
        frame.to_excel(book, sheet_name="runs", index=False)
    columns = tables.xlsx_columns(path, tables.MISSING, "runs")
    assert list(columns) == ["a", "mode", "n", "2024"]
    np.testing.assert_array_equal(tables.numbers("a", columns["a"]), [1, 2.5, NAN])
    np.testing.assert_array_equal(tables.numbers("n", columns["n"]), [1, NAN, 3])
    assert columns["2024"].tolist() == [True, 5, "6"]
    cells, levels = tables.codes("mode", columns["mode"])
    assert levels == ["None", "x"]
    np.testing.assert_array_equal(cells, [1, NAN, 0])
    assert list(tables.xlsx_columns(path, tables.MISSING, 0)) == ["other"]


def test_xlsx_with_one_name_twice_or_nothing_is_refused(tmp_path):
    path = tmp_path / "table.xlsx"
    pd.DataFrame([[1, 2]], columns=["a", "a"]).to_excel(path, index=False)
    with pytest.raises(DataError, match="found 'a' twice"):
        tables.xlsx_columns(path, tables.MISSING, 0)
    pd.DataFrame().to_excel(path, index=False)
    with pytest.raises(DataError, match="empty sheet 0"):
        tables.xlsx_columns(path, tables.MISSING, 0)


def test_parquet_keeps_missing_cells_and_the_columns_of_an_index(tmp_path):
    path = tmp_path / "table.parquet"
    frame = pd.DataFrame(
        {"n": pd.array([1, None, 3], "Int64"), "mode": pd.Categorical(["x", None, "y"]), "id": [7, 8, 9]}
    )
    frame.set_index("id").to_parquet(path)
    columns = tables.parquet_columns(path, {"n"})
    assert sorted(columns) == ["id", "mode", "n"]
    assert tables.labels("id", tables.column("id", columns["id"])).tolist() == ["7", "8", "9"]
    cells, levels = tables.codes("n", tables.column("n", columns["n"]))
    assert levels == ["1", "3"]
    np.testing.assert_array_equal(cells, [0, NAN, 1])
    assert tables.codes("mode", tables.column("mode", columns["mode"]))[1] == ["x", "y"]


# ------------------------------------------------------------------------------------------------ cells
@pytest.mark.parametrize(
    "cells",
    [
        [1, 2.5, NAN],
        (1, 2.5, None),
        np.array([1, 2.5, NAN], dtype=np.float32),
        np.array([1, 2.5, None], dtype=object),
        np.ma.masked_array([1, 2.5, 99.0], [False, False, True]),
        pd.Series([1, 2.5, None], dtype="Float64"),
        [decimal.Decimal(1), decimal.Decimal("2.5"), None],
    ],
)
def test_numbers_of_any_make(cells):
    result = tables.numbers("x", tables.column("x", cells))
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, [1, 2.5, NAN])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1", "2", "low"], "x, row 2: found text 'low', expected a number"),
        ([1.0, "2"], "x, row 1: found text '2', expected a number"),
        ([1.0, "", 2.0], "x, row 1: found text '', expected a number; a cell that was not measured is NaN"),
        (["1,5", "2,5"], "x, row 0: found text '1,5'.*pass decimal=\",\""),
        ([NAN, "-1.234,5e3"], 'x, row 1: found text .*pass decimal=","'),
        (["1,234.5"], "x, row 0: found text '1,234.5', expected a number; mend the cell"),
        ([True, False], "x, row 0: found True"),
        ([1.0, None, True], "x, row 2: found bool True"),
        ([1.0, datetime.date(2024, 1, 2)], "x, row 1: found date"),
        (np.array(["2024-01-02"], "datetime64[s]"), "x, row 0: found 2024-01-02"),
        ([1.0, 1j], "x, row 0: found .*complex"),
        ([1.0, np.inf, -np.inf], "x, row 1: found inf, expected a finite number"),
        ([None, float("-inf")], "x, row 1: found -inf, expected a finite number"),
        ([[1.0], [2.0]], r"x: found shape \(2, 1\), expected \(N,\)"),
        ([[1.0], [2.0, 3.0]], "x: found cells of different lengths"),
        (3.0, r"x: found shape \(\), expected \(N,\)"),
    ],
)
def test_what_is_not_a_number_is_refused(cells, message):
    with pytest.raises(DataError, match=message):
        tables.numbers("x", tables.column("x", cells))


@pytest.mark.parametrize(
    ("cells", "levels", "expected"),
    [
        (["b", "a", None, "b"], ["a", "b"], [1, 0, NAN, 1]),
        (["b", "a", NAN, "b"], ["a", "b"], [1, 0, NAN, 1]),
        (["b", "a", "", "b"], ["a", "b"], [1, 0, NAN, 1]),
        (["b", "a", "  ", "b"], ["a", "b"], [1, 0, NAN, 1]),
        (pd.Categorical(["b", "a", None, "b"]), ["a", "b"], [1, 0, NAN, 1]),
        (pd.Series(["b", "a", None, "b"], dtype="string"), ["a", "b"], [1, 0, NAN, 1]),
        ([10, 9, NAN, 10], ["9", "10"], [1, 0, NAN, 1]),
        ([0.5, -1.0, NAN, 0.5], ["-1", "0.5"], [1, 0, NAN, 1]),
        ([True, False, None, True], ["False", "True"], [1, 0, NAN, 1]),
        ([None, None], [], [NAN, NAN]),
    ],
)
def test_names_become_codes(cells, levels, expected):
    result, found = tables.codes("m", tables.column("m", cells))
    assert found == levels
    np.testing.assert_array_equal(result, expected)


def test_levels_given_keep_their_order_and_admit_no_other():
    values = tables.column("m", ["low", "high", None])
    np.testing.assert_array_equal(tables.codes("m", values, ["none", "low", "high"])[0], [1, 2, NAN])
    with pytest.raises(DataError, match="m, row 1: found category 'high', not seen before; did you mean 'hihg'"):
        tables.codes("m", values, ["low", "hihg"])


def test_names_that_differ_by_blanks_only_are_refused():
    with pytest.raises(DataError, match="m, row 2: found 'a ', which differs from 'a' by blanks only"):
        tables.codes("m", tables.column("m", ["a", "b", "a "]))


@pytest.mark.parametrize("wrong", [2.0, -1.0, 0.5, np.inf])
def test_codes_that_are_none_are_refused(wrong):
    np.testing.assert_array_equal(tables.check_codes("m", np.array([0, NAN, 1]), ["a", "b"]), [0, NAN, 1])
    with pytest.raises(DataError, match=f"m, row 2: found {wrong:g}, expected a whole number from 0 to 1"):
        tables.check_codes("m", np.array([0.0, NAN, wrong]), ["a", "b"])


def test_labels_are_text_and_never_blank():
    assert tables.labels("task", tables.column("task", [3, 1.0, 2.5])).tolist() == ["3", "1", "2.5"]
    for blank in (None, NAN, "", " "):
        with pytest.raises(DataError, match="task, row 1: found a blank cell"):
            tables.labels("task", tables.column("task", ["a", blank]))


def test_support_is_checked_and_offenders_counted():
    positive = Variable("x", "parameter", "positive")
    tables.check_support(positive, np.array([1e-300, NAN]))
    with pytest.raises(DataError, match=r"x, row 1: found 0, expected a number above 0 .*\(and 1 more\)"):
        tables.check_support(positive, np.array([1.0, 0.0, -1.0]))
    interval = Variable("x", "parameter", "interval", lower=0, upper=1)
    tables.check_support(interval, np.array([0.0, NAN, 1.0]))
    with pytest.raises(DataError, match=r"x, row 2: found 1.5, expected a number from 0 to 1"):
        tables.check_support(interval, np.array([0.0, NAN, 1.5]))
