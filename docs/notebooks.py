"""Tutorials as notebooks for the site: ``python docs/notebooks.py`` executes them, ``conf.py`` converts the others.

A notebook knows which text it was made from and whether it was executed; one that is not up to date is made anew,
unexecuted, with a line that says so.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]
SOURCES, NOTEBOOKS = ROOT / "tutorials", ROOT / "docs" / "tutorials"
ORDER = (
    "first_inverse_problem",
    "pyro_models",
    "many_tasks",
    "unpaired_populations",
    "which_measurement_next",
    "several_sources",
    "real_melt_pools",
    "from_a_simulator",
)
NOT_EXECUTED = "*This page shows the code without its results; `make tutorials` runs it.*"


def notebook(name: str) -> Any:
    """The tutorial as a notebook without results, and the digest of its text in its metadata."""
    text = (SOURCES / f"{name}.py").read_text()
    made = jupytext.reads(text, fmt="py:percent")
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    made.metadata["source"] = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "executed": False}
    return made


def execute(name: str) -> None:
    """Runs the tutorial on one thread from the root of the project, and keeps it with its results."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # widgets are of no use on a page
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    made = notebook(name)
    client = NotebookClient(made, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    try:
        client.execute()
    except CellExecutionError as error:
        if error.ename != "SystemExit":
            raise
        print(f"{name}: {error.evalue}", file=sys.stderr)  # it needs a public table that is not here
        return
    made.metadata["source"]["executed"] = True
    _write(name, made)


def convert_others() -> list[str]:
    """Makes unexecuted notebooks of tutorials whose notebook is missing or of another text; their names."""
    found = []
    for name in ORDER:
        made, path = notebook(name), NOTEBOOKS / f"{name}.ipynb"
        if path.exists():
            kept = nbformat.read(path, as_version=4).metadata.get("source", {})
            if kept.get("sha256") == made.metadata["source"]["sha256"]:
                continue
        first = made.cells[0]
        first.source += f"\n\n{NOT_EXECUTED}"
        _write(name, made)
        found.append(name)
    return found


def _write(name: str, made: Any) -> None:
    NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, NOTEBOOKS / f"{name}.ipynb")


def main() -> int:
    """Executes the tutorials named, or all."""
    parser = argparse.ArgumentParser("python docs/notebooks.py", description="Executes tutorials to docs/tutorials.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ORDER)}; all by default")
    for name in parser.parse_args().names or ORDER:
        began = time.monotonic()
        execute(name)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
