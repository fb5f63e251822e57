"""The site names every public name, and its tutorials are those that there are."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import pyro_invman
from pyro_invman import design, diagnostics

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"^\.\. (currentmodule|autofunction|autoclass|autoexception):: (\S+)", re.MULTILINE)


def documented() -> dict[str, set[str]]:
    """Names by module, as the page lists them."""
    found: dict[str, set[str]] = {}
    module = ""
    for kind, name in ENTRY.findall((ROOT / "docs" / "api.rst").read_text()):
        if kind == "currentmodule":
            module = name
        else:
            found.setdefault(module, set()).add(name)
    return found


@pytest.mark.parametrize("module", [pyro_invman, design, diagnostics], ids=lambda module: module.__name__)
def test_every_public_name_is_looked_up(module: ModuleType) -> None:
    public = {name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)}
    assert documented()[module.__name__] == public


def test_every_tutorial_is_on_the_site() -> None:
    listed = re.findall(r"^tutorials/(\w+)$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "tutorials").glob("*.py"))
    order = re.findall(r'^    "(\w+)",$', (ROOT / "docs" / "notebooks.py").read_text(), re.MULTILINE)
    assert order == listed


def test_extras_have_reasons() -> None:
    """Each dependency that setup.cfg names stands in the README's table."""
    lines = (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1].split("[")[0].splitlines()
    names = {re.split("[><=]", line.strip())[0] for line in lines if line.startswith("    ")}
    table = (ROOT / "README.md").read_text()
    assert {name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)} == set()
