"""From a messy table to a posterior by the README alone: its own commands, run on a table with its own header."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from pyro_invman.cli import main
from pyro_invman.cli.parser import parser

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Your own table")[2].partition("\n### ")[0]
COMMANDS = re.findall(r"^\$ invman (.*?)\s*(?:#.*)?$", SECTION, re.MULTILINE)
ALLOYS = {
    "Ti64": 1.3,
    "316L": 0.7,
    "IN718": 0.9,
    "AlSi10Mg": 0.6,
    "CoCr": 1.1,
    "17-4PH": 0.8,
    "CuCrZr": 0.5,
    "H13": 1.0,
}


def rows_of(alloy: str, number: int, generator: torch.Generator) -> list[str]:
    """Tracks of an alloy: depth = absorptivity · 8 power / √speed, 5 % off; cells as a spreadsheet writes them."""
    found = []
    for n in range(number):
        power, speed, off, gas, hole = (float(u) for u in torch.rand(5, generator=generator, dtype=torch.float64))
        power, speed = 100 + 300 * power, 200 + 1800 * speed
        depth = ALLOYS.get(alloy, 1.2) * 8 * power / math.sqrt(speed) * math.exp(0.1 * (off - 0.5))
        cells = [alloy, f"{power:.1f}", f"{speed:.0f}", "Ar" if gas < 0.5 else "" if gas > 0.9 else "N2"]
        remark = "" if n % 3 else f"spatter seen, {n}"
        cells += [("n/a", "", f"{depth:.1f}")[0 if hole < 0.1 else 1 if hole < 0.2 else 2], remark]
        found.append(";".join(cells).replace(".", ","))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs.csv and new_alloy.csv: lines above the header, units in names, holes, blank lines, latin-1, \\r\\n."""
    generator = torch.Generator().manual_seed(0)
    above = SECTION.partition("```text\n")[2].partition("Remarks\n")[0] + "Remarks"
    lines = above.splitlines()
    for alloy in ALLOYS:
        lines += [*rows_of(alloy, 12, generator), ";;;;;"]
    folder = tmp_path_factory.mktemp("walk")
    (folder / "runs.csv").write_bytes("\r\n".join(lines).encode("latin1"))
    new = [above.splitlines()[-1], *rows_of("new", 4, generator)]
    (folder / "new_alloy.csv").write_bytes("\r\n".join(new).encode("latin1"))
    return folder


def test_the_readme_leads_from_a_messy_table_to_a_posterior_and_a_fingerprint(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert [command.split()[0] for command in COMMANDS] == [
        "describe", "fit", "infer", "predict", "impute", "report", "fingerprint", "predict", "design",
    ]  # fmt: skip
    answers = []
    for command in COMMANDS:
        words = shlex.split(command.replace("--max-seconds 60", "--max-seconds 4 --latent-dim 1"))
        words += ["--num-samples", "3"] if words[0] == "impute" else []
        words += ["--max-questions", "20"] if words[0] == "report" else []
        assert main([*words, "--json"]) == 0, f"{command}\n{capsys.readouterr().err}"
        answers.append(json.loads(capsys.readouterr().out))
    described, fitted, inferred, predicted, imputed, reported, finger, told, designed = answers

    columns = {column["name"]: (column["role"], column["units"]) for column in described["columns"]}
    assert columns == {
        "Alloy": ("task", ""), "power": ("parameter", "W"), "scan_speed": ("parameter", "mm/s"),
        "Gas": ("condition", ""), "depth": ("observation", "um"), "Remarks": ("left out", ""),
    }  # fmt: skip
    assert described["rows"] == 96 and not described["to_mend"] and not described["decide"]
    assert fitted["kind"] == "ProcessManifold" and fitted["held_out_rows"] == 12
    assert [line["target"] for line in inferred["targets"]] == ["power", "scan_speed"]
    wide, narrow = predicted["targets"][0], told["targets"][0]
    truth = 1.2 * 8 * 200 / 30
    assert wide["5 %"] < truth < wide["95 %"] and narrow["5 %"] < truth < narrow["95 %"]
    assert math.log(narrow["95 %"] / narrow["5 %"]) < 0.6 * math.log(wide["95 %"] / wide["5 %"])
    assert imputed["rows"] == 96 and Path("report.html").is_file() and len(reported["verdicts"]) == 3
    assert finger["nearest"][0]["task"] in ("Ti64", "CoCr")  # of absorptivity 1.3 and 1.1, where the new one has 1.2
    assert len(designed["suggested"]) == 3 and "power [W]" in designed["suggested"][0]
    with open("filled.csv", encoding="latin1") as file:
        filled = list(csv.DictReader(file, delimiter=";"))
    assert len(filled) == 3 * 96 and all(line["depth"] and line["Gas"] in ("Ar", "N2") for line in filled)


TYPED = re.findall(r"^(?:\$ |  )(?:python -m pyro_invman|invman) (.*?)\s*(?:#.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("command", TYPED)
def test_every_command_of_the_readme_can_be_typed(command):
    assert parser("invman").parse_args(shlex.split(command)).command == command.split()[0]
