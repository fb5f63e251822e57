"""Imports point down only, and rooms stay rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_invman"
# from the ground up; a module may import from floors below its own, and within a floor only as listed in BESIDE
FLOORS = [
    ["variables"],
    [
        "training",
        "density.univariate",
        "density.gaussian",
        "density.queries",
        "density.hyperparameters",
        "density.mixed_model",
        "density.normal_rows",
        "density.joint_normal",
    ],
    [
        "density.context",
        "density.links",
        "density.missingness",
        "density.random_effects",
        "density.outliers",
        "storage",
    ],
    ["density.backbones", "density.random_functions"],
    ["density.anyorder", "density.remainder", "density.velocity"],
    ["density.bijections", "density.conditional_gaussian"],
    ["density.conditional_law"],
    ["density.coupling"],
    ["populations", "distributions", "identification", "information", "declared", "tables", "data", "results"],
    ["completion", "inference_data"],
    ["learning"],
    ["joint", "transport", "simulators"],
    ["tasks.rows", "tasks.prior", "tasks.effects", "tasks.fingerprint"],
    ["tasks.encoder", "tasks.predictive"],
    ["tasks.network"],
    ["tasks.designs"],
    ["tasks.inverse"],
    ["tasks.learning", "tasks.typicality", "tasks.inference", "tasks.posterior", "tasks.contamination"],
    ["tasks.generative", "tasks.memory", "tasks.sources"],
    ["tasks.evidence", "tasks.keeping"],
    ["tasks.manifold"],
    ["saved", "plots"],
    ["design.outlook"],
    ["design.estimates"],
    ["design.objectives"],
    ["design.campaign"],
    ["diagnostics.uniform", "diagnostics.two_sample", "diagnostics.answers"],
    ["diagnostics.calibration", "diagnostics.recalibration", "diagnostics.reference"],
    ["diagnostics.predictive", "diagnostics.verdict"],
    ["design.limits", "design.quasi", "design.region"],
    ["diagnostics.page"],
    ["diagnostics.report"],
    ["design.experiment", "design.readings", "design.particles", "design.mixtures"],
    ["design.guides"],
    ["design.proposals"],
    ["design.nested", "design.variational"],
    ["design.enumerated"],
    ["design.gain", "design.gains", "design.slope"],
    ["design.optimum"],
    ["design.told"],
    ["design.sequential"],
    ["cli.printed", "cli.dialect", "cli.headers", "cli.typed"],
    ["cli.project", "cli.guesses"],
    ["cli.questions", "cli.fitting", "cli.describe"],
    ["cli.asking", "cli.tasks", "cli.designs", "cli.demo", "cli.reporting"],
    ["cli.parser"],
    ["cli.run"],
    ["cli"],
    ["__main__"],
]
BESIDE = {("data", "tables")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _floor(name: str) -> int:
    for floor, rooms in enumerate(FLOORS):
        if any(name == room or name.startswith(f"{room}.") for room in rooms):
            return floor
    pytest.fail(f"{name} stands on no floor: say where in FLOORS")


def _imports(path: Path) -> list[tuple[str, bool]]:
    """Modules imported, and whether only for types."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name}: relative import of {node.module}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {f"pyro_invman.{_name(p)}" for p in MODULES}
            found += [(name if name in known else node.module, id(node) in typing_only) for name in names]
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=_name)
def test_arrows_point_down(path: Path) -> None:
    here = _name(path)
    for module, typing_only in _imports(path):
        if typing_only or not module.startswith("pyro_invman."):
            continue
        there = module.removeprefix("pyro_invman.")
        same_room = here.split(".")[0] == there.split(".")[0] == "simulators"
        allowed = _floor(there) < _floor(here) or (here, there) in BESIDE or same_room
        assert allowed, f"{here} imports {there}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    here = _name(path)
    for module, typing_only in _imports(path):
        library = module.split(".")[0]
        if library == "pyro":
            assert not here.startswith("density") and here not in ("variables", "training", "storage"), (
                f"{here} imports pyro"
            )
        if library == "xarray" and not typing_only:
            assert here in ("data", "results"), f"{here} imports xarray"
        if library == "matplotlib":
            assert here == "plots", f"{here} imports matplotlib"
        if library == "gpytorch":
            assert here == "tasks.prior", f"{here} imports gpytorch"
        if library == "ot":
            assert here == "density.coupling", f"{here} imports POT"
        if library == "torchdiffeq":
            assert here == "density.velocity", f"{here} imports torchdiffeq"
        if library == "sklearn":
            assert here == "diagnostics.two_sample", f"{here} imports scikit-learn"
        assert library not in ("zuko", "sbi"), f"{here} imports {library}"


def test_rooms_hold_one_idea() -> None:
    for path in MODULES:
        lines = len(path.read_text().splitlines())
        assert lines <= 480, f"{_name(path)} has {lines} lines"
        assert path.stem not in ("utils", "util", "helpers", "common", "misc", "base"), f"{_name(path)} names no idea"


def test_import_is_light() -> None:
    heavy = ("matplotlib", "sklearn", "sbi", "zuko", "gpytorch", "ot", "torchdiffeq")
    code = f"import sys, pyro_invman; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
