r"""Maps between unpaired populations, by law and by cost: ``python -m benchmarks.unpaired``.

The toy problems and their scorer stand beside the project (``shared/problems/unpaired.py``). Every method learns from
the same 20,000 rows of each population. Recorded at each of a problem's conditions and averaged, on fresh points:

- the law: the 2-Wasserstein distance W2 between 2,000 mapped points and 2,000 of the target; its floor is that between
  two exact samples;
- the cost of the map, :math:`(E |x - T|^2 - optimal) / (independent - optimal)`, with the optimal cost between 1,000
  exact points of each law and that of an independent coupling: 0 is optimal, 1 ignores the source.

Methods: ``optimal`` and ``base`` are engines of this package's `ConditionalTransport`, ``base`` with the laws that
``optimal`` learned; ``(10)`` spends ten network evaluations, the others as many as a tolerance takes. ``cvfm``,
``ot-cfm`` and ``cfm`` are settings of its engine ``batch``: minibatch coupling by POT, or none, and a network that
reads the target's condition; ``torchcfm ot-cfm`` and ``torchcfm cfm`` are that library's own, where it is installed
(`benchmarks.unpaired_peers`).

A second part, `semi_paired`, turns a normal law by a quarter: nothing but pairs can show it. The error of the map
learned from 1,500 unpaired rows on each side, of a regression on 10 pairs alone, and of both together.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_invman as pim
from benchmarks import unpaired_peers
from benchmarks.sbi import machine
from pyro_invman.density.coupling import Anchor

ROOT = Path(__file__).resolve().parents[1]
PROBLEM_FILE = ROOT.parent / "shared" / "problems" / "unpaired.py"
ROWS = 20_000
COST_POINTS = 1_000
PUBLISHED = {"8gauss-8gauss": 0.507, "8gauss-moons": 0.318, "moons-moons": 0.308}
LAW_BARS = {
    ("8gauss-8gauss", False): 0.10,
    ("8gauss-moons", False): 0.11,
    ("moons-moons", False): 0.28,
    ("moons-moons", True): 0.11,
    ("moons-rotation", True): 0.35,
}
COST_BARS = {("moons-rotation", True): 0.15}
FIT_SECONDS = 120.0
# of the paper, in the units of the problems: sigma_c, eta
CVFM = {
    "8gauss-8gauss": (0.01, 10.0),
    "8gauss-moons": (0.01, 100.0),
    "moons-moons": (0.5, 5.0),
    "moons-rotation": (0.1, 10.0),
}

Array = np.ndarray[Any, np.dtype[np.float64]]
Map = Callable[[Array, Array], Array]


def problems() -> ModuleType:
    """The problems and their scorer."""
    spec = importlib.util.spec_from_file_location("unpaired_problems", PROBLEM_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def excess_cost(problem: Any, transport: Map, w2: Callable[[Array, Array], float], seed: int = 7) -> float:
    """(cost − optimal) / (independent − optimal), each averaged over the problem's conditions."""
    rng, total = np.random.default_rng(seed), np.zeros(3)
    for c in problem.conditions:
        at = np.full(COST_POINTS, c)
        x, y = problem.source_given(at, rng), problem.target_given(at, rng)
        moved = ((transport(x, at[:, None]) - x) ** 2).sum(1).mean()
        apart = ((x[:, None] - y[None]) ** 2).sum(-1).mean()
        total += [moved, w2(x, y) ** 2, apart]
    return float((total[0] - total[1]) / (total[2] - total[1]))


def as_map(transport: torch.nn.Module, evaluations: int | None) -> Map:
    """The transport between arrays; conditions that the training rows just missed are no concern here."""

    def mapped(x: Array, c: Array) -> Array:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", pim.UnfamiliarCondition)
            return transport(torch.tensor(x).float(), torch.tensor(c).float(), evaluations).double().numpy()

    return mapped


def settings(method: str, name: str, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """How `method` is built for a problem; widths and costs of the paper, in units of this package."""
    if method == "optimal":
        return {"engine": "optimal", "scales": (1.0, 1.0)}
    if method in ("ot-cfm", "cfm"):
        return {"engine": "batch", "coupling": pim.Coupling(0.0, None, optimal=method == "ot-cfm")}
    length = ((source[0].var(0) + target[0].var(0)) / 2).mean().sqrt().item()
    scale = torch.cat([source[1], target[1]]).std().item()
    width, cost = CVFM[name]
    coupling = pim.Coupling(cost * (scale / length) ** 2, width / scale, 0.1 / length)
    return {"engine": "batch", "scales": (length, length), "coupling": coupling}


def measure(name: str, methods: Sequence[str], stochastic: bool, seed: int) -> dict[str, Any]:
    """Fits the methods to a problem and scores each."""
    module = problems()
    problem, rng = module.PROBLEMS[name], np.random.default_rng(seed)
    x0, c0, x1, c1 = (
        torch.tensor(part).float() for draw in (problem.source, problem.target) for part in draw(ROWS, rng)
    )
    source, target = (x0, c0), (x1, c1)
    cells: dict[str, Any] = {}

    def judge(key: str, transport: torch.nn.Module, evaluations: int | None, fit: dict[str, float]) -> None:
        torch.manual_seed(seed)
        mapped = as_map(transport, evaluations)
        found = module.score(problem, mapped, floor=False)
        cost = excess_cost(problem, mapped, module.w2)
        cells[key] = {"w2": found["w2"], "w2_worst": found["w2_worst"], "excess_cost": cost} | fit
        print(f"{name} {key}: W2 {found['w2']:.4f}, excess cost {cost:.3f}, {fit}", flush=True)

    for method in methods:
        if method in unpaired_peers.KINDS:
            began = time.process_time()
            peer = unpaired_peers.TorchCFM(method, seed)
            peer.fit(source, target)
            judge(method, peer, None, {"fit_cpu_s": time.process_time() - began})
            continue
        wide = stochastic and method == "optimal"
        transport = pim.ConditionalTransport(2, 1, wide, seed=seed, **settings(method, name, source, target))
        began = time.process_time()
        history = transport.fit(source, target, seed=seed, progress=False)
        fit = {"fit_cpu_s": time.process_time() - began}
        if method != "optimal":
            judge(method, transport, None, fit)
            continue
        judge("optimal", transport, None, fit)
        judge("optimal (10)", transport, 10, fit | {"solver_error": history.attrs["solver_error_10"]})
        base = pim.ConditionalTransport(2, 1, wide, engine="base", scales=(1.0, 1.0))
        mine = {key: value for key, value in transport.state_dict().items() if not key.startswith("fields")}
        base.load_state_dict(mine)
        part = history.seconds.values[history.part.values == "map"]
        fit = {"fit_cpu_s": fit["fit_cpu_s"] * float(part[0] / part[-1])}
        judge("base", base.eval(), None, fit)
        judge("base (10)", base, 10, fit)
    return cells


def semi_paired(seed: int) -> dict[str, float]:
    """Root mean square errors of the map, for a normal law turned by a quarter."""
    generator = torch.Generator().manual_seed(seed)
    none, turn = torch.zeros(1500, 0), torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    source, target = (torch.randn(1500, 2, generator=generator) for _ in range(2))
    before, x = torch.randn(10, 2, generator=generator), torch.randn(2000, 2, generator=generator)
    after = before @ turn.mT + 0.2 * torch.randn(10, 2, generator=generator)

    def error(y: Tensor) -> float:
        return (y - x @ turn.mT).square().sum(-1).mean().sqrt().item()

    found = {}
    for label, pairs in (("unpaired rows alone", None), ("both", (before, after, none[:10]))):
        transport = pim.ConditionalTransport(2, 0, seed=seed)
        transport.fit(
            (source, none),
            (target, none),
            pairs,
            seed,
            progress=False,
            schedule=pim.Schedule(steps=600, batch_size=256),
        )
        with torch.no_grad():
            found[label] = error(transport(x, torch.zeros(2000, 0)))
    found["pairs alone"] = error(Anchor(before, after, none[:10], 1.0).predict(x, torch.zeros(2000, 0))[0])
    return found


def missed(cells: dict[str, Any]) -> list[str]:
    """What does not reach its bar."""
    lines = []
    for (name, stochastic), bar in LAW_BARS.items():
        case = cells.get(_key(name, stochastic), {})
        for method in ("optimal", "optimal (10)"):
            if method not in case:
                continue
            if case[method]["w2"] > bar:
                lines.append(f"{_key(name, stochastic)}, {method}: W2 {case[method]['w2']:.3f}, bar {bar}")
            cost = COST_BARS.get((name, stochastic))
            if cost is not None and case[method]["excess_cost"] > cost:
                lines.append(f"{_key(name, stochastic)}, {method}: cost {case[method]['excess_cost']:.3f}, bar {cost}")
            for rival in ("ot-cfm", "torchcfm ot-cfm"):
                found = cells.get(_key(name, False), {}).get(rival) or case.get(rival)
                if found and case[method]["w2"] > found["w2"] / 2:
                    lines.append(
                        f"{_key(name, stochastic)}, {method}: more than half of {rival}'s W2 {found['w2']:.3f}"
                    )
            if case[method]["fit_cpu_s"] > FIT_SECONDS:
                lines.append(
                    f"{_key(name, stochastic)}: fit of {case[method]['fit_cpu_s']:.0f} CPU s, bar {FIT_SECONDS:.0f}"
                )
    return lines


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{ROWS:,} rows of each population; one thread; W2 on 2,000 fresh points a condition (worst condition).",
        "",
        "| problem | method | W2 | bar | CVFM, its authors' code | excess cost | fit, CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, case in results["cells"].items():
        name, stochastic = key.removesuffix(", stochastic"), key.endswith(", stochastic")
        bar = LAW_BARS.get((name, stochastic))
        for method, cell in case.items():
            lines.append(
                f"| {key} | {method} | {cell['w2']:.3f} ({cell['w2_worst']:.3f}) | {'–' if bar is None else bar} "
                f"| {PUBLISHED.get(name, '–')} | {cell['excess_cost']:.3f} | {cell['fit_cpu_s']:.0f} |"
            )
    if "semi_paired" in results:
        shown = ", ".join(f"{label} {value:.2f}" for label, value in results["semi_paired"].items())
        lines += ["", f"Semi-paired, root mean square error of the map: {shown}."]
    where = {name: str(value) for name, value in results["versions"].items()}
    where["machine"] = f"{results['machine']['cpu']}, {results['machine']['cores']} cores"
    lines += ["", "Measured with: " + "; ".join(f"{name} {value}" for name, value in sorted(where.items())) + "."]
    return "\n".join(lines) + "\n"


def _key(name: str, stochastic: bool) -> str:
    return f"{name}, stochastic" if stochastic else name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, adding to what is kept; the exit status is 1 where a bar is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.unpaired", description=(__doc__ or "").split("\n\n")[0])
    cases = [_key(*case) for case in LAW_BARS]
    every = [*cases, "moons-rotation", "semi-paired"]
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    methods = ["optimal", "cvfm", "ot-cfm", "cfm", *unpaired_peers.KINDS]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seed", type=int, default=0, help="of the rows and the fits")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "unpaired.json")
    arguments = parser.parse_args(argv)
    if not PROBLEM_FILE.is_file():
        print(f"the problems are not at {PROBLEM_FILE}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    results: dict[str, Any] = {"cells": {}}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    packages = ["torch", "numpy", "pot", "torchdiffeq", "pyro-ppl", *["torchcfm"] * unpaired_peers.is_there()]
    versions = {name: importlib.metadata.version(name) for name in packages}
    results |= {
        "versions": results.get("versions", {}) | versions,  # what is kept may be of a library that is not here now
        "machine": machine(),
        "seed": arguments.seed,
    }
    for case in arguments.cases:
        if case == "semi-paired":
            results["semi_paired"] = semi_paired(arguments.seed)
        else:
            name, stochastic = case.removesuffix(", stochastic"), case.endswith(", stochastic")
            chosen = [m for m in arguments.methods if m == "optimal" or case != "moons-moons, stochastic"]
            if not unpaired_peers.is_there() and set(chosen) & set(unpaired_peers.KINDS):
                print("torchcfm is not installed, its methods are left out", file=sys.stderr)
                chosen = [m for m in chosen if m not in unpaired_peers.KINDS]
            results["cells"].setdefault(case, {}).update(measure(name, chosen, stochastic, arguments.seed))
        results["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        results["missed"] = missed(results["cells"])
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        part = arguments.out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, arguments.out)
        arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))
    for line in results["missed"]:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if results["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
