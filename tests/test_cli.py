"""The command line, in process."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from pyro_invman import load
from pyro_invman.cli import held_out_report, main, quantile_rows

ROLES = "power_W=parameter,alloy=condition,depth_um=observation"
SUPPORTS = "alloy=categorical"


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

    near, far = (held_out_report(flow, rows(s), rows(s)) for s in (0.0, 12.0))
    assert far[-2]["log loss"] > near[-2]["log loss"] + 2.0
    assert near[-2]["90 % coverage"] == 1.0 and far[-2]["90 % coverage"] < 0.5


def test_quantiles_of_known_draws(model):
    draws = torch.stack([torch.arange(1001.0), torch.ones(1001)], -1)
    number, level = quantile_rows(load(model).variables, ["power_W", "alloy"], draws)
    assert (number["5 %"], number["median"], number["95 %"]) == (50.0, 500.0, 950.0)
    assert level["median"].startswith("B 100%")
