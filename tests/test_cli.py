"""The command line, in process."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
import xarray as xr

from pyro_invman import load
from pyro_invman.cli import held_out_report, main, quantile_rows
from pyro_invman.cli.parser import parser
from pyro_invman.results import from_record

ROLES = "power_W=parameter,alloy=condition,depth_um=observation"
SUPPORTS = "alloy=categorical"
COMMANDS = ("demo", "describe", "fit", "infer", "predict", "impute", "fingerprint", "design", "report")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """300 rows of depth = power / 2 (+ 20 for alloy B), a fifth of the depths blank."""
    generator = torch.Generator().manual_seed(0)
    power = 100 + 200 * torch.rand(300, generator=generator)
    other = torch.rand(300, generator=generator) < 0.5
    depth = power / 2 + 20 * other + 2 * torch.randn(300, generator=generator)
    hidden = torch.rand(300, generator=generator) < 0.2
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["power_W", "alloy", "depth_um", "note"])
        for p, o, d, h in zip(power.tolist(), other.tolist(), depth.tolist(), hidden.tolist(), strict=True):
            writer.writerow([f"{p:.3f}", "B" if o else "A", "" if h else f"{d:.3f}", "x"])
    return path


@pytest.fixture(scope="module")
def model(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    options = ["--roles", ROLES, "--supports", SUPPORTS, "--units", "power_W=W,depth_um=um", "--json"]
    assert main(["fit", str(table), *options, "--out", str(folder)]) == 0
    return folder


def test_fit_reports_on_rows_it_has_not_seen(table, tmp_path, capsys):
    options = ["--roles", ROLES, "--supports", SUPPORTS, "--max-seconds", "3", "--json", "--out", str(tmp_path)]
    assert main(["fit", str(table), *options]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["held_out_rows"] == 30
    depth = next(line for line in report["held_out"] if line["variable"] == "depth_um")
    assert depth["log loss"] < depth["knowing nothing"] - 1.0  # ± 2 um of a spread of 30
    assert "left out: ['note']" in printed.err
    assert load(tmp_path).variables.names == ("power_W", "alloy", "depth_um")
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_infer_finds_the_setting(model, capsys, tmp_path):
    out = tmp_path / "draws.csv"
    asked = [
        "infer",
        str(model),
        "--given",
        "depth_um=100,alloy=A",
        "--targets",
        "power_W",
        "--out",
        str(out),
        "--json",
    ]
    assert main(asked) == 0
    (row,) = json.loads(capsys.readouterr().out)["targets"]
    assert row["5 %"] < 200 < row["95 %"] and row["95 %"] - row["5 %"] < 40 and row["units"] == "W"
    lines = out.read_text().splitlines()
    assert lines[0] == "power_W" and len(lines) == 2001


def test_infer_names_levels(model, capsys):
    assert main(["infer", str(model), "--given", "depth_um=100,power_W=160", "--targets", "alloy"]) == 0
    share = capsys.readouterr().out.split("B ")[1].split("%")[0]
    assert int(share) >= 90  # ten standard deviations from A


def test_impute_keeps_what_was_measured(table, model, tmp_path):
    out = tmp_path / "filled.csv"
    assert main(["impute", str(model), str(table), "--out", str(out), "--num-samples", "3"]) == 0
    with open(table) as file:
        before = list(csv.DictReader(file))
    with open(out) as file:
        after = list(csv.DictReader(file))
    assert len(after) == 3 * len(before)
    for line in after:
        was = before[int(line["row"])]["depth_um"]
        assert line["depth_um"] and (not was or float(line["depth_um"]) == pytest.approx(float(was), rel=1e-6))
        assert line["alloy"] in ("A", "B")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["infer", "MODEL", "--given", "depth=1", "--targets", "power_W"], "did you mean depth_um"),
        (["infer", "MODEL", "--given", "depth_um", "--targets", "power_W"], "expected name=value"),
        (["infer", "MODEL", "--given", "depth_um=deep", "--targets", "power_W"], "expected a number"),
        (["infer", "MODEL", "--given", "alloy=C", "--targets", "power_W"], "C"),
        (["infer", "NOWHERE", "--targets", "power_W"], "no model"),
        (["fit", "NOWHERE.csv", "--roles", "x=parameter", "--out", "OUT"], "NOWHERE.csv"),
        (["fit", "TABLE", "--out", "OUT"], "no roles"),
        (["fit", "TABLE", "--roles", "power_W=parameter", "--out", "TABLE"], "is a file, expected a folder"),
        (["fit", "TABLE", "--roles", "power=parameter", "--out", "OUT"], "power_W"),
        (["fit", "TABLE", "--roles", "power_W=knob", "--out", "OUT"], "knob"),
        (["fit", "TABLE", "--roles", "note=parameter", "--out", "OUT"], "row 0"),
        (["fit", "TABLE", "--roles", "power_W=parameter", "--supports", "power_W=interval:1", "--out", "OUT"], "LOWER"),
    ],
)
def test_failure_is_one_line(arguments, words, table, model, tmp_path, capsys):
    places = {"MODEL": str(model), "TABLE": str(table), "OUT": str(tmp_path / "out"), "NOWHERE": str(tmp_path / "no")}
    assert main([places.get(a, a) for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0]
    assert not (tmp_path / "out" / "schema.json").exists()


def test_debug_shows_where(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--debug", "infer", str(tmp_path), "--targets", "x"])


def test_project_file(table, tmp_path, capsys):
    project = tmp_path / "project.toml"
    project.write_text('[roles]\npower_W = "parameter"\ndepth_um = "observation"\n[supports]\npower_W = "positive"\n')
    options = ["--project", str(project), "--max-seconds", "1", "--json", "--out", str(tmp_path / "model")]
    assert main(["fit", str(table), *options]) == 0
    assert load(tmp_path / "model").variables.to_list()[0]["support"] == "positive"
    project.write_text("[roles")
    assert main(["fit", str(table), *options]) == 1
    assert "not a TOML file" in capsys.readouterr().err


def test_held_out_report_of_the_exact_law(model):
    """On rows of another law than the training rows' the loss is larger: it is measured, not assumed."""
    import pyro_invman as pim

    flow = load(model)
    power = torch.linspace(120, 280, 60, dtype=torch.float64)
    level = torch.zeros(60, dtype=torch.float64)

    def rows(shift: float):
        return pim.from_columns(
            {"power_W": power, "alloy": level, "depth_um": power / 2 + shift},
            roles={"power_W": "parameter", "alloy": "condition", "depth_um": "observation"},
            supports={"alloy": "categorical"},
            levels={"alloy": ("A", "B")},
            units={"power_W": "W", "depth_um": "um"},
        )

    near, far = (held_out_report(flow, rows(s)) for s in (0.0, 12.0))
    assert far[-2]["log loss"] > near[-2]["log loss"] + 2.0
    assert near[-2]["90 % coverage"] == 1.0 and far[-2]["90 % coverage"] < 0.5


def test_quantiles_of_known_draws(model):
    draws = torch.stack([torch.arange(1001.0), torch.ones(1001)], -1)
    number, level = quantile_rows(load(model).variables, ["power_W", "alloy"], draws)
    assert (number["5 %"], number["median"], number["95 %"]) == (50.0, 500.0, 950.0)
    assert level["median"].startswith("B 100%")


# ------------------------------------------------------------------------------------------------ rows of questions
def test_rows_of_a_table_are_answered_each_by_its_own_cells(model, tmp_path, capsys):
    asked = tmp_path / "asked.csv"
    asked.write_text("depth_um,alloy,comment\n100,A,x\n120,B,y\n,,z\n")
    out = tmp_path / "draws.csv"
    arguments = ["infer", str(model), "--table", str(asked), "--targets", "power_W", "--out", str(out), "--json"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["targets"]
    assert [row["row"] for row in rows] == [0, 1, 2] and "comment" in printed.err
    for row in rows[:2]:
        assert row["5 %"] < 200 < row["95 %"] and row["95 %"] - row["5 %"] < 40
    assert rows[2]["95 %"] - rows[2]["5 %"] > 120  # nothing given: between 100 and 300
    lines = out.read_text().splitlines()
    assert lines[0] == "row,power_W" and len(lines) == 6001 and lines[-1].startswith("2,")
    assert main(["infer", str(model), "--table", str(asked), "--given", "depth_um=90", "--targets", "power_W"]) == 1
    assert "row 0 says 100" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [".nc", ".zarr"])
def test_draws_keep_their_units(model, tmp_path, kind, capsys):
    asked, out = tmp_path / "asked.csv", tmp_path / f"draws{kind}"
    asked.write_text("power_W\n200\n250\n")
    ask = ["predict", str(model), "--given", "alloy=A", "--num-samples", "50"]
    assert main([*ask, "--table", str(asked), "--out", str(out)]) == 0
    how = {} if kind == ".nc" else {"engine": "zarr", "consolidated": False}
    with xr.open_dataset(out, **how) as ds:
        assert dict(ds.sizes) == {"draw": 50, "row": 2} and ds["depth_um"].attrs["units"] == "um"
        assert ds["depth_um"].mean("draw").values == pytest.approx([100, 125], abs=3)
    assert main([*ask, "--out", str(tmp_path / "draws.txt")]) == 1
    assert "expected .csv, .nc or .zarr" in capsys.readouterr().err


def test_predict_asks_for_what_is_observed(model, capsys):
    assert main(["predict", str(model), "--given", "power_W=200", "--given", "alloy=B", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["targets"]
    assert row["target"] == "depth_um" and row["units"] == "um" and row["5 %"] < 120 < row["95 %"]
    assert row["95 %"] - row["5 %"] == pytest.approx(2 * 1.645 * 2, rel=0.5)  # noise of 2 um


def test_the_same_seed_gives_the_same_answer(model, capsys):
    found = []
    for seed in ("0", "0", "1"):
        assert main(["predict", str(model), "--given", "power_W=200", "--seed", seed, "--json"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


# ------------------------------------------------------------------------------------------------ tasks
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """40 tasks of 6 rows, y = level + x + noise of 0.1; levels −2 to 2, a decimal comma and odd headers."""
    generator = torch.Generator().manual_seed(0)
    lines = ["Furnace;x, set (mm);Reading [V]"]
    for t in range(40):
        level = -2 + 4 * t / 39
        for _ in range(6):
            x = 2 * torch.rand((), generator=generator) - 1
            y = level + x + 0.1 * torch.randn((), generator=generator)
            lines.append(f"F{t:02d};{x:.4f};{y:.4f}".replace(".", ","))
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    (path.parent / "invman.toml").write_text(
        'task = "Furnace"\nseparator = ";"\ndecimal = ","\n'
        '[columns]\n"x, set (mm)" = "x"\n"Reading [V]" = "y"\n[roles]\nx = "parameter"\ny = "observation"\n'
        '[units]\nx = "mm"\ny = "V"\n'
    )
    return path


@pytest.fixture(scope="module")
def manifold(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifold")
    options = ["--latent-dim", "1", "--max-seconds", "3", "--out", str(folder), "--json"]
    assert main(["fit", str(runs), *options]) == 0
    return folder


@pytest.fixture
def new(tmp_path):
    """Three rows of a task of level 1."""
    path = tmp_path / "new.csv"
    path.write_text("x;y\n-0,5;0,52\n0;0,97\n0,8;1,83\n")
    return path


def test_a_task_column_makes_a_manifold(runs, tmp_path, capsys):
    options = ["--latent-dim", "1", "--max-seconds", "1", "--out", str(tmp_path / "m"), "--json"]
    assert main(["fit", str(runs), *options]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["kind"] == "ProcessManifold" and report["held_out_rows"] == 24 == 6 * len(report["held_out_tasks"])
    y = next(line for line in report["held_out"] if line["variable"] == "y")
    assert y["units"] == "V" and y["log loss"] < y["knowing nothing"] - 1.0 and y["rows"] == 16
    assert "invman.toml says" in printed.err
    assert f"kept from the fit, to ask about afterwards: {', '.join(report['held_out_tasks'])};" in printed.err
    assert (tmp_path / "m" / "invman.toml").is_file()
    assert main(["fit", str(runs), "--model", "flow", *options[2:]]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "JointFlow"


def test_rows_of_a_task_sharpen_its_answers(manifold, new, capsys):
    ask = ["predict", str(manifold), "--given", "x=0.5", "--json"]
    assert main([*ask, "--rows", str(new)]) == 0
    (known,) = json.loads(capsys.readouterr().out)["targets"]
    assert main(ask) == 0
    printed = capsys.readouterr()
    (unknown,) = json.loads(printed.out)["targets"]
    assert "nothing is known" in printed.err
    assert known["5 %"] < 1.5 < known["95 %"] and known["95 %"] - known["5 %"] < 0.8
    assert unknown["95 %"] - unknown["5 %"] > 2.5
    assert main(["infer", str(manifold), "--given", "y=1.5", "--rows", str(new), "--json"]) == 0
    (x,) = json.loads(capsys.readouterr().out)["targets"]
    assert x["target"] == "x" and x["5 %"] < 0.5 < x["95 %"] and x["95 %"] - x["5 %"] < 0.9


def test_rows_must_be_of_one_task(manifold, runs, capsys):
    ask = ["predict", str(manifold), "--given", "x=0.5", "--rows", str(runs)]
    assert main(ask) == 1
    assert "rows of 40 tasks" in capsys.readouterr().err
    assert main([*ask, "--of", "F40"]) == 1
    assert "did you mean" in capsys.readouterr().err
    assert main([*ask, "--of", "F39", "--json"]) == 0
    (y,) = json.loads(capsys.readouterr().out)["targets"]
    assert y["5 %"] < 2.5 < y["95 %"]


def test_a_task_is_no_variable(manifold, runs, capsys):
    assert main(["predict", str(manifold), "--given", "x=0.5,Furnace=F 3"]) == 1
    assert "'Furnace' names the task" in (said := capsys.readouterr().err) and "--rows TABLE --of 'F 3'" in said


def test_impute_says_which_task_is_strange(manifold, tmp_path, capsys):
    table, out = tmp_path / "strange.csv", str(tmp_path / "filled.csv")
    table.write_text("Furnace;x;y\nodd;-0,5;19,5\nodd;0;20\nodd;0,8;\nodd;0,7;\nfine;0;1\nfine;0,5;\n")
    assert main(["impute", str(manifold), str(table), "--out", out, "--num-samples", "2"]) == 0
    said = capsys.readouterr().err
    assert said.count("like none that was learned") == 1 and "note: odd: the task" in said


def test_fingerprint(manifold, runs, new, capsys, tmp_path):
    assert main(["fingerprint", str(manifold), "--rows", str(new), "--nearest", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["belongs"] and report["typicality"] > 0.05 and report["information_nats"] > 0.5
    levels = [-2 + 4 * int(each["task"][1:]) / 39 for each in report["nearest"]]
    assert len(levels) == 3 and all(0.5 < level < 1.5 for level in levels)
    assert len(report["latent"]) == 1 and 0 < report["latent"][0]["sd"] < 0.5
    strange = tmp_path / "strange.csv"
    strange.write_text("x;y\n-0,5;19,5\n0;20\n0,8;20,8\n")
    assert main(["fingerprint", str(manifold), "--rows", str(strange), "--out", str(tmp_path / "f.json")]) == 0
    printed = capsys.readouterr()
    assert "unlike what was learned" in printed.out and "note: the task is like none" in printed.err
    assert json.loads((tmp_path / "f.json").read_text())["belongs"] is False
    assert main(["fingerprint", str(manifold), "--rows", str(runs), "--of", "F20"]) == 0
    printed = capsys.readouterr()
    assert "F20" not in printed.out and "left out of its own neighbours" in printed.err


def test_impute_completes_rows_by_the_others_of_their_task(manifold, tmp_path, capsys):
    holes = tmp_path / "holes.csv"
    rows = [f"high;{x};{2 + x:.2f}" for x in (-0.5, 0.0, 0.5)] + [f"low;{x};{x - 2:.2f}" for x in (-0.5, 0.0, 0.5)]
    holes.write_text("\n".join(["Furnace;x;y", *rows, "high;0.25;", "low;0.25;"]).replace(".", ",") + "\n")
    out = tmp_path / "filled.csv"
    arguments = ["impute", str(manifold), str(holes), "--out", str(out), "--num-samples", "50", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["variables"][1] == {"variable": "y [V]", "measured": 6, "completed": 2}
    with open(out) as file:
        found = list(csv.DictReader(file, delimiter=";"))
    mean = {
        row: sum(float(line["y"].replace(",", ".")) for line in found if line["row"] == row) / 50
        for row in ("6", "7", "0")
    }
    assert mean["6"] == pytest.approx(2.25, abs=0.2) and mean["7"] == pytest.approx(-1.75, abs=0.2)
    assert mean["0"] == 1.5 and {line["Furnace"] for line in found} == {"high", "low"}


# ------------------------------------------------------------------------------------------------ design
def test_design_weighs_gain_and_cost(manifold, new, tmp_path, capsys):
    candidates = tmp_path / "could.csv"
    candidates.write_text("x;hours\n0;5\n0,1;1\n-0,1;5\n")
    ask = ["design", str(manifold), "--candidates", str(candidates), "--cost", "hours", "--json"]
    assert main(ask) == 0
    report = json.loads(capsys.readouterr().out)
    (first,) = report["suggested"]
    assert first["candidate"] == 1 and first["x [mm]"] == pytest.approx(0.1) and first["cost"] == 1.0
    before = first["gain [nat]"]
    assert main([*ask, "--rows", str(new)]) == 0
    assert json.loads(capsys.readouterr().out)["suggested"][0]["gain [nat]"] < before - 1.0  # the level is known by now


def test_design_over_a_grid_is_written_to_be_filled_in(manifold, new, tmp_path, capsys):
    out = tmp_path / "next.csv"
    ask = ["design", str(manifold), "--rows", str(new), "--grid", "x=-1:1:5", "--objective", "predict=y"]
    assert main([*ask, "--n", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "2 of 5 candidates" in printed.out and "x [mm]" in printed.out and "at the candidates" in printed.err
    lines = out.read_text().splitlines()
    assert lines[0] == "x;y" and len(lines) == 3 and all(line.endswith(";") for line in lines[1:])
    filled = tmp_path / "filled.csv"
    filled.write_text("\n".join([lines[0], *(f"{line}1,2" for line in lines[1:])]) + "\n")
    assert main(["fingerprint", str(manifold), "--rows", str(filled)]) == 0


def test_design_for_settings_that_are_sought(manifold, new, tmp_path, capsys):
    """Where x of a row with a known y is asked for, rows that tell the level are worth most before any is known."""
    of = tmp_path / "of.csv"
    of.write_text("x;y\n;0,9\n")
    ask = ["design", str(manifold), "--grid", "x=-1:1:3", "--objective", "parameters=x", "--parameters-of", str(of)]
    gains = []
    for more in ([], ["--rows", str(new)]):
        assert main([*ask, *more, "--json"]) == 0
        gains.append(json.loads(capsys.readouterr().out)["suggested"][0]["gain [nat]"])
    assert gains[0] > 0.5 and gains[1] < 0.5 * gains[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "either --candidates TABLE or --grid"),
        (["--grid", "x=1:0:3"], "LOW < HIGH"),
        (["--grid", "x=a:b:3"], "LOW:HIGH:COUNT"),
        (["--grid", "y=0:1:3"], "is an observation"),
        (["--grid", "z=0:1:3"], "unknown variable"),
        (["--grid", "x=0:1:30000"], "at most"),
        (["--grid", "x=0:1:3", "--objective", "fame"], "expected task, parameters"),
        (["--grid", "x=0:1:3", "--objective", "parameters=x"], "--parameters-of"),
    ],
)
def test_designs_that_cannot_be(manifold, options, words, capsys):
    assert main(["design", str(manifold), *options]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "no --rows" not in line]
    assert len(error) == 1 and words in error[0]


# ------------------------------------------------------------------------------------------------ report
def test_report_on_rows_that_were_kept_from_the_fit(model, table, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", str(model), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {line["direction"]: line for line in report["verdicts"]}
    assert found["forward"]["questions"] == int(load_held_out(model)["depth_um"].notnull().sum()) < 31
    assert found["forward"]["log loss [nat]"] < found["forward"]["knowing nothing [nat]"] - 1
    assert out.read_text().startswith("<!") and "forward" in out.read_text()
    tree = tmp_path / "report.nc"
    assert main(["report", str(model), "--table", str(table), "--max-questions", "40", "--out", str(tree)]) == 0
    assert "use it" in capsys.readouterr().out
    with xr.open_datatree(tree) as opened:
        assert "fit" in opened.children and opened["verdicts"].sizes["direction"] == len(found)
    assert main(["report", str(model), "--out", str(tmp_path / "report.pdf")]) == 1
    assert "expected .html" in capsys.readouterr().err
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "held_out.json").write_text("{}")
    assert main(["report", str(tmp_path / "m")]) == 1
    assert "held_out.json: damaged" in capsys.readouterr().err
    (tmp_path / "m" / "held_out.json").unlink()
    assert main(["report", str(tmp_path / "m")]) == 1
    assert "kept no rows" in capsys.readouterr().err


def load_held_out(model):
    return from_record(json.loads((model / "held_out.json").read_text()))


# ------------------------------------------------------------------------------------------------ demo
def test_the_demo_answers_an_inverse_question(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--seconds", "1", "--tracks", "10", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    power = report["answer"][0]
    assert power["target"] == "power_W" and power["units"] == "W"
    before, after = power["before: 95 %"] / power["before: 5 %"], power["95 %"] / power["5 %"]
    assert after < before  # a width says something of the power
    assert all((out / f"{name}.png").stat().st_size > 10_000 for name in ("posterior", "history", "predictive"))
    assert main(["infer", str(out / "model"), "--given", "depth_um=120,width_um=150", "--targets", "power_W"]) == 0


# ------------------------------------------------------------------------------------------------ failures
def test_a_model_of_another_kind_is_refused(model, manifold, new, capsys):
    assert main(["fingerprint", str(model), "--rows", str(new)]) == 1
    assert "holds a JointFlow, expected a ProcessManifold" in capsys.readouterr().err
    assert main(["predict", str(model), "--given", "power_W=200", "--rows", str(new)]) == 1
    assert "knows no tasks" in capsys.readouterr().err
    assert main(["fingerprint", str(manifold)]) == 1
    assert "found no --rows" in capsys.readouterr().err


def test_a_damaged_model_is_one_line(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "weights.safetensors").write_bytes(b"no")
    assert main(["predict", str(tmp_path / "m"), "--given", "power_W=200"]) == 1
    assert "damaged or changed" in _one_line(capsys)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("two\nlines"), 1, "unexpected RuntimeError in test_cli.py: two lines (--debug shows where)"),
        (OSError(28, "No space left on device", "model"), 1, "model: No space left on device"),
        (MemoryError(), 1, "unexpected MemoryError"),
    ],
)
def test_whatever_happens_is_one_line(error, status, words, model, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("pyro_invman.cli.asking.model_of", fails)
    assert main(["predict", str(model)]) == status
    assert words in _one_line(capsys)
    with pytest.raises(type(error)):
        main(["predict", str(model), "--debug"])


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["infer", "m", "--num-samples", "0"], "--num-samples: found '0', expected a whole number of at least 1"),
        (["design", "m", "--n", "0"], "--n: found '0', expected a whole number of at least 1"),
        (["fit", "t.csv"], "the following arguments are required: --out"),
        (["guess"], "invalid choice: 'guess'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_what_cannot_be_typed_is_one_line(typed, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(typed)
    assert stopped.value.code == 2 and words in _one_line(capsys)


def test_a_fit_that_is_interrupted_goes_on(runs, tmp_path):
    """As by Ctrl-C, which here comes as soon as the first checkpoint is written: status 130, one line; what was learned
    by then is kept for --resume."""
    code = """
import os, signal, sys
from pyro_invman import training
from pyro_invman.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs start without
write = training.write_atomically
def written(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGINT)
training.write_atomically = written
sys.exit(main(sys.argv[1:]))
"""
    fit = ["fit", str(runs), "--out", str(tmp_path / "m"), "--model", "flow"]
    run = subprocess.run([sys.executable, "-c", code, *fit], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 130 and not run.stdout
    assert run.stderr.strip().splitlines()[-1] == "invman fit: interrupted; --resume goes on with it"
    assert (tmp_path / "m" / "checkpoint.safetensors").exists() and not (tmp_path / "m" / "schema.json").exists()
    assert main([*fit, "--resume", "--max-seconds", "2"]) == 0
    assert not (tmp_path / "m" / "checkpoint.safetensors").exists()


def test_a_reader_that_has_enough_is_no_failure_to_speak_of(model):
    command = [sys.executable, "-c", "import sys; from pyro_invman.cli import main; sys.exit(main(sys.argv[1:]))"]
    run = subprocess.Popen(
        [*command, "predict", str(model), "--given", "power_W=200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.close()
    error = run.stderr.read()
    run.stderr.close()
    assert run.wait() == 141 and error == b""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*filter(None, [command]), "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "90 %%" not in shown
    examples = [line.split("pyro_invman ", 1)[1] for line in shown.splitlines() if line.startswith("  python -m")]
    assert examples
    for example in examples:
        parsed = parser("invman").parse_args(example.split("   ")[0].split())
        assert command in ("", parsed.command)


def test_every_answer_comes_as_json(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--json" in capsys.readouterr().out


def _one_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]
