"""What reads the known cells, and what shapes a target, at equal wall time: ``python -m benchmarks.backbones``.

The default (masked residual MLP, mixture heads on a Gaussian base) against one change at a time, on problems of the sbi
benchmark: the same simulations, one thread, the same seconds. Scored by log loss on fresh simulations, of the posterior
and over all kinds of query. A learning rate each is chosen among two on the held-out rows of a shorter fit, so that
no variant runs at another's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.sbi import ROOT, machine, versions
from benchmarks.sbi_problems import PROBLEMS, dataset
from pyro_invman import JointFlow, Schedule

VARIANTS: dict[str, dict[str, Any]] = {
    "masked MLP, mixture": {},
    "masked MLP, spline": {"head": "spline"},
    "token transformer, mixture": {"backbone": "transformer"},
}
RATES = (3e-3, 1e-2)


def _fit(problem: str, variant: dict[str, Any], rate: float, seconds: float, seed: int) -> tuple[JointFlow, float, int]:
    theta, x = PROBLEMS[problem].simulate(10_000, seed)
    ds = dataset(PROBLEMS[problem], theta, x)
    groups = [[list(member) for member in group] for group in PROBLEMS[problem].exchangeable]
    flow = JointFlow.from_dataset(ds, seed=seed, exchangeable=groups or None, **variant)
    history = flow.fit(ds, seed=seed, max_seconds=seconds, progress=False, schedule=Schedule(learning_rate=rate))
    return flow, float(history.validation_loss.min()), int(history.step[-1])


def measure(problem: str, variant: dict[str, Any], seconds: float, seed: int) -> dict[str, Any]:
    """Log losses of one variant on one problem."""
    torch.set_num_threads(1)
    trials = {rate: _fit(problem, variant, rate, seconds / 5, seed)[1] for rate in RATES}
    rate = min(trials, key=lambda r: trials[r])
    flow, held_out, steps = _fit(problem, variant, rate, seconds, seed)
    definition = PROBLEMS[problem]
    theta, x = definition.simulate(2_000, 1_000_000 + seed)
    with torch.no_grad():
        d = flow.conditional(definition.parameters, dict(zip(definition.observations, x.unbind(-1), strict=True)))
        scores = torch.cat([d.log_prob(theta)])
    return {
        "learning_rate": rate,
        "steps": steps,
        "log_loss": -scores.mean().item(),
        "std_error": (scores.std() / len(scores) ** 0.5).item(),
        "all_queries": held_out,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.backbones", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--problems", nargs="+", choices=PROBLEMS, default=["gaussian_mixture", "slcp", "lotka_volterra"]
    )
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "backbones.json")
    arguments = parser.parse_args(argv)
    found: dict[str, Any] = {
        "seconds": arguments.seconds,
        "machine": machine(),
        "versions": versions("invman"),
    }
    lines = [
        f"One thread, {arguments.seconds:g} s of wall time a fit; posterior log loss on 2,000 fresh simulations.",
        "",
        "| problem | variant | −log q(θ given x) | held-out loss a cell, all kinds of query | learning rate | steps |",
        "|---|---|---|---|---|---|",
    ]
    for problem in arguments.problems:
        for name, variant in VARIANTS.items():
            cell = measure(problem, variant, arguments.seconds, arguments.seed)
            found[f"{problem}/{name}"] = cell
            lines.append(
                f"| {problem} | {name} | {cell['log_loss']:.3f} ± {cell['std_error']:.3f} | {cell['all_queries']:.3f} "
                f"| {cell['learning_rate']:g} | {cell['steps']} |"
            )
            print(lines[-1], flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
