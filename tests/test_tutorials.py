"""Tutorials in their short form: they end, print numbers and no "nan", and draw pictures with names on their axes."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER, SHARED = ROOT / "tutorials", ROOT.parent / "shared"
TUTORIALS = sorted(FOLDER.glob("*.py"))
SHORT = re.compile(r"^(\w+ = ).*# short: (.*)$", re.MULTILINE)
PROSE = re.compile(r"^# %% \[markdown\]\n((?:#.*\n)+)", re.MULTILINE)
every_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Figures that were shown."""
    shown: list[Any] = []

    def show(*_: Any, **__: Any) -> None:
        shown.extend(plt.figure(number) for number in plt.get_fignums() if plt.figure(number) not in shown)

    backend = matplotlib.get_backend()
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", show)
    yield shown
    plt.close("all")
    plt.switch_backend(backend)


@every_tutorial
def test_runs_in_its_short_form(
    path: Path, figures: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # what it writes is not left behind
    table = SHARED / "data" / "meltpoolnet" / "meltpoolnet.csv"
    if table.exists() and "MELTPOOLNET" not in os.environ:
        monkeypatch.setenv("MELTPOOLNET", str(table))
    source, replaced = SHORT.subn(r"\1\2", path.read_text())
    assert replaced, "no setting has a short form"
    torch.manual_seed(0)
    with warnings.catch_warnings():  # as in a notebook; a short fit is rightly warned of
        warnings.simplefilter("default")
        try:
            exec(compile(source, str(path), "exec"), {"__name__": "__main__"})
        except SystemExit as stop:  # it needs a public table that is not here, and says where it is
            pytest.skip(str(stop))
    printed = capsys.readouterr().out
    numbers = [float(found) for found in re.findall(r"-?\d+\.\d+", printed)]
    assert numbers and np.isfinite(numbers).all()
    assert not re.search(r"\b(nan|inf)\b", printed)
    assert figures, "it draws nothing"
    for figure in figures:
        named = [ax for ax in figure.axes if ax.axison and ax.get_visible()]
        assert any(ax.get_xlabel() for ax in named) and any(ax.get_ylabel() for ax in named)
        for ax in named:
            drawn = [*ax.lines, *ax.patches, *ax.collections, *ax.images]
            assert drawn, f"an empty picture: {ax.get_title()!r}"


@every_tutorial
def test_ends_with_how_to_read_its_pictures(path: Path) -> None:
    prose = PROSE.findall(path.read_text() + "\n")
    assert prose[0].startswith("# # ")
    assert "**How to read" in prose[-1]
