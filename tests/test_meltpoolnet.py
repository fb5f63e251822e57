"""The published melt pools as their authors write them, made into the table that the project file reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.meltpoolnet import NAMES, prepared
from pyro_invman.cli.project import load_project

PROJECT = Path(__file__).resolve().parents[1] / "benchmarks" / "meltpoolnet.toml"
ROW = {
    "Material": "Ti-6Al-4V", "Process": "PBF", "Sub-process": "SLM", "Power": "280", "Velocity": "1200",
    "layer thickness": "0", "beam D": "100", "Hatch spacing": "140", "density": "4470.5", "Cp": "?", "k": "7.2",
    "melting T": "273", "minimum absorptivity": "0.26", "depth of meltpool": "84", "width of melt pool": None,
    "length of melt pool": None, "paper ID": "1", "paper": "https://…",
}  # fmt: skip


def test_prepared_leaves_blank_what_is_not_known_and_says_how_much() -> None:
    rows = [ROW, ROW, ROW | {"depth of meltpool": None}, ROW | {"beam D": "0.1", "Power": "0", "paper ID": "2"}]
    table, counts = prepared(pd.DataFrame(rows))
    assert table["task"].tolist() == ["p1|Ti-6Al-4V", "p2|Ti-6Al-4V"]
    first = table.iloc[0]
    assert (first["power_W"], first["speed_mm_s"], first["layer_um"], first["depth_um"]) == (280, 1200, 0, 84)
    assert np.isnan(first[["cp_J_kgK", "tmelt_K", "width_um"]].astype(float)).all()
    assert np.isnan(table.iloc[1][["beam_um", "power_W"]].astype(float)).all()
    assert counts == {
        "cells that are no numbers": 4,
        "cells with impossible numbers": 6,  # a melting point in each row, a beam and a power in the last
        "rows without any size": 1,
        "rows that are copies": 1,
    }


def test_the_project_file_names_what_is_prepared() -> None:
    project = load_project(PROJECT)
    assert project.task == "task" and set(project.roles) <= set(NAMES.values())
