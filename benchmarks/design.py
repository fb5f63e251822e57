r"""Expected information gain of classic models: ``python -m benchmarks.design``.

Three linear-Gaussian problems with closed forms, each in one second: an A/B test, a regression in 20 dimensions, and
mixed effects whose fixed effects alone are asked for. Two others in ten: a preference heard through a censored sigmoid,
whose truth is an integral over one normal, and a choice that is to tell about another choice, by quadrature over two.
Beside them, in the same run, `pyro.contrib.oed`: its nested Monte Carlo for as many seconds of the processor, and on
the linear-Gaussian problems its four guided estimators for ten, untuned and tuned by hand (see `design_peers`). Every
problem is asked here as it stands. Then designs are climbed to, beside optima that are known (see `design_optima`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import design_optima, design_peers
from benchmarks.sbi import machine, versions
from pyro_invman.design import expected_information_gain

RESULTS = Path(__file__).resolve().parent / "results"
EFFECTS = torch.tensor([10.0, 1 / 0.55])
PEOPLE = 10
CENSORED = math.log(2.0**24 - 1)  # of the logit
_F64 = torch.float64


class Problem(NamedTuple):
    """A model at designs (C, ...), what is asked of it, the truth (C,), and seconds allowed; the spread of its prior
    where it is linear, and what its nuisances add."""

    model: Callable[[Tensor], None]
    designs: Tensor
    target: str
    exact: Tensor
    seconds: float
    prior: Tensor | None = None
    nuisances: Tensor | None = None


def _linear(x: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
    """½ log det Cov[y] − ½ log det Cov[y | θ] (C,) of y = x θ + noise, x (C, n, p), covariances (p, p) and (n, n)."""
    x, prior, noise = x.double(), prior.double(), noise.double()
    return 0.5 * (torch.logdet(x @ prior @ x.mT + noise) - torch.logdet(noise))


def ab_test() -> Problem:
    x = torch.zeros(11, PEOPLE, 2)
    for n in range(11):
        x[n, :n, 0] = x[n, n:, 1] = 1

    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:-2]):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(2), EFFECTS).to_event(1))
            pyro.sample("y", dist.Normal((designs @ theta.unsqueeze(-1)).squeeze(-1), 1.0).to_event(1))

    return Problem(model, x, "theta", _linear(x, EFFECTS.square().diag(), torch.eye(PEOPLE)), 1.0, EFFECTS)


def regression() -> Problem:
    rows = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)) / math.sqrt(20)
    x = torch.stack([(1 - 0.9 * i / 11) * rows + 0.9 * i / 11 * rows[:1] for i in range(12)])

    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:-2]):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(20), 1.0).to_event(1))
            pyro.sample("y", dist.Normal((designs @ theta.unsqueeze(-1)).squeeze(-1), 0.5).to_event(1))

    return Problem(model, x, "theta", _linear(x, torch.eye(20), 0.25 * torch.eye(10)), 1.0, torch.ones(20))


def mixed_effects() -> Problem:
    x, person = torch.zeros(11, 2 * PEOPLE, 2), torch.eye(PEOPLE).repeat_interleave(2, 0)
    for d in range(11):
        for p in range(PEOPLE):
            first, second = (0, 1) if p < d else ((p - d) % 2, (p - d) % 2)
            x[d, 2 * p, first] = x[d, 2 * p + 1, second] = 1

    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:-2]):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(2), EFFECTS).to_event(1))
            own = pyro.sample("person", dist.Normal(torch.zeros(PEOPLE), 3.0).to_event(1))
            mean = (designs @ theta.unsqueeze(-1)).squeeze(-1) + own @ person.mT
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1))

    noise = 9 * person @ person.mT + torch.eye(2 * PEOPLE)
    return Problem(model, x, "theta", _linear(x, EFFECTS.square().diag(), noise), 1.0, EFFECTS, person)


class CensoredSigmoid(dist.TorchDistribution):
    """sigmoid(η) of a normal η, with what is beyond ± CENSORED at two atoms."""

    arg_constraints = {"loc": dist.constraints.real, "scale": dist.constraints.positive}  # noqa: RUF012
    support = dist.constraints.unit_interval

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.edge = 2.0**-24
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CensoredSigmoid:
        return CensoredSigmoid(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return dist.Normal(self.loc, self.scale).sample(sample_shape).sigmoid().clamp(self.edge, 1 - self.edge)

    def log_prob(self, value: Tensor) -> Tensor:
        within = value.clamp(2 * self.edge, 1 - 2 * self.edge)
        inside = dist.Normal(self.loc, self.scale).log_prob(within.logit()) - within.log() - (-within).log1p()
        low = torch.special.log_ndtr((-CENSORED - self.loc) / self.scale)
        high = torch.special.log_ndtr((self.loc - CENSORED) / self.scale)
        return torch.where(value <= self.edge, low, torch.where(value >= 1 - self.edge, high, inside))


def _censored_entropy(mean: Tensor, scale: Tensor) -> Tensor:
    """Of a normal η censored at ± CENSORED, with respect to Lebesgue and two atoms."""
    a, b = (-CENSORED - mean) / scale, (CENSORED - mean) / scale
    low, high = torch.special.ndtr(a), torch.special.ndtr(-b)
    inside = 1 - low - high

    def density(z: Tensor) -> Tensor:
        return z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)

    body = inside * (scale * math.sqrt(2 * math.pi)).log() + 0.5 * (inside + density(a) - density(b))
    return body - torch.xlogy(low, low) - torch.xlogy(high, high)


def preference() -> Problem:
    designs = torch.linspace(-80, 80, 20)

    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape):
            theta = pyro.sample("theta", dist.Normal(-20.0, 20.0))
            pyro.sample("y", CensoredSigmoid(designs - theta, 0.25 * (1 + designs.abs()).sqrt()))

    return Problem(model, designs, "theta", preference_gain(designs), 10.0)


def preference_gain(designs: Tensor) -> Tensor:
    """The exact gain (C,), in double precision."""
    d, z = designs.double(), torch.linspace(-9, 9, 20_001, dtype=_F64)
    weight = torch.exp(-0.5 * z.square())
    scale = 0.25 * (1 + d.abs()).sqrt()
    each = _censored_entropy(d - (20 * z - 20).unsqueeze(-1), scale)
    given = (weight.unsqueeze(-1) * each).sum(0) / weight.sum()
    return _censored_entropy(d + 20, (400 + scale.square()).sqrt()) - given


def extrapolation() -> Problem:
    designs = torch.linspace(-5, 5, 20)

    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape):
            w = pyro.sample("w", dist.Normal(torch.ones(2), 1.0).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=w[..., 1] * designs - w[..., 0]))
            pyro.sample("z", dist.Bernoulli(logits=w[..., 0] - w[..., 1] / 2))

    grid = torch.linspace(-7, 9, 801, dtype=_F64)
    weight = torch.exp(-0.5 * (grid - 1).square())
    joint = weight.unsqueeze(-1) * weight / weight.sum().square()
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    z, exact = torch.sigmoid(a - b / 2), []
    for d in designs.double():
        y = torch.sigmoid(b * d - a)
        table = torch.stack([(joint * p * q).sum() for p in (y, 1 - y) for q in (z, 1 - z)]).reshape(2, 2)
        exact.append((table * (table / (table.sum(1, keepdim=True) * table.sum(0, keepdim=True))).log()).sum())
    return Problem(model, designs, "z", torch.stack(exact), 10.0)


PROBLEMS = {
    "A/B test": ab_test,
    "regression": regression,
    "mixed effects": mixed_effects,
    "preference": preference,
    "extrapolation": extrapolation,
}


def ours(problem: Problem, seed: int, seconds: float) -> dict[str, float]:
    began = time.process_time()
    found = expected_information_gain(
        problem.model, problem.designs, "y", problem.target, max_seconds=seconds, tolerance=1e-3, seed=seed
    )
    eig, lower, upper = (torch.as_tensor(found[name].values) for name in ("eig", "lower", "upper"))
    return {
        "rmse": float((eig - problem.exact).square().mean().sqrt()),
        "inside": float(((lower <= problem.exact) & (problem.exact <= upper)).double().mean()),
        "width": float((upper - lower).mean()),
        "widest": float((upper - lower).max()),
        "seconds": float(found.attrs["seconds"]),
        "cpu_seconds": time.process_time() - began,
    }


def rivals(problem: Problem, estimators: list[str], seeds: int, seconds: float) -> dict[str, Any]:
    """`pyro.contrib.oed`; on linear-Gaussian problems with its guided estimators."""
    nested = [design_peers.nested(problem, seed, problem.seconds) for seed in range(seeds)]
    if problem.nuisances is not None:
        nested += [design_peers.nested(problem, seed, problem.seconds, True) for seed in range(seeds)]
    if problem.prior is None:
        return {"nested": nested}
    linear = design_peers.Linear(problem.model, problem.designs, problem.prior, problem.nuisances, problem.exact)
    return {"nested": nested} | design_peers.contest(linear, estimators, seeds, seconds)


def merged(before: dict[str, Any], now: dict[str, Any], estimators: list[str]) -> dict[str, Any]:
    """A problem's records with those of other estimators that were kept."""
    kept = {
        kind: [one for one in before.get(kind, []) if one["estimator"] not in estimators] + now[kind]
        for kind in ("untuned", "by hand")
        if kind in now
    }
    return now | kept


def _mean(records: list[dict[str, float]], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def gain_table(cells: dict[str, Any]) -> str:
    """Means over seeds."""
    lines = ["| problem | RMSE, nats | truth inside the limits | mean width, nats | widest | seconds (CPU) "
             "| pyro, nested Monte Carlo: RMSE | CPU s |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, cell in cells.items():
        own = {k: _mean(cell["ours"], k) for k in cell["ours"][0]}
        plain = [one for one in cell["nested"] if one["setting"] == "as it stands"]
        lines.append(
            f"| {name} | {own['rmse']:.4f} | {own['inside']:.1%} | {own['width']:.4f} | {own['widest']:.4f} "
            f"| {own['seconds']:.1f} ({own['cpu_seconds']:.1f}) | {_mean(plain, 'rmse'):.3f} "
            f"| {_mean(plain, 'cpu_seconds'):.1f} |"
        )
    return "\n".join(lines) + f"\n\n{len(cell['ours'])} seeds, {len(plain)} of the rival's.\n"


def contest_table(cells: dict[str, Any]) -> str:
    """Each guided estimator of `pyro.contrib.oed`, the better of its untuned settings and the one tuned by hand."""
    told = {name: cell for name, cell in cells.items() if "by hand" in cell}
    head = "| RMSE over designs, nats | " + " | ".join(f"{name}, untuned | by hand" for name in told) + " |"
    lines = [head, "|---" * (1 + 2 * len(told)) + "|"]
    best: dict[str, list[float]] = {name: [math.inf, math.inf] for name in told}
    for estimator in design_peers.ESTIMATORS:
        row = []
        for name, cell in told.items():
            for k, kind in enumerate(("untuned", "by hand")):
                settings = design_peers.errors(cell[kind], estimator)
                if not settings:
                    row.append("–")
                    continue
                setting = min(settings, key=lambda s: settings[s])
                best[name][k] = min(best[name][k], settings[setting])
                row.append(f"{settings[setting]:.3g} ({setting})")
        lines.append(f"| `{estimator}_eig` | " + " | ".join(row) + " |")
    nested = []
    for cell in told.values():
        found = design_peers.errors(cell["nested"], "nmc")
        nested += [", ".join(f"{error:.3g} ({setting})" for setting, error in found.items()), "–"]
    lines.append("| `nmc_eig` | " + " | ".join(nested) + " |")
    lines.append("| best | " + " | ".join(f"{error:.3g}" for name in told for error in best[name]) + " |")
    theirs = " | ".join(
        f"{_mean(cell[k], 'cpu_seconds'):.1f}" for cell in told.values() for k in ("untuned", "by hand")
    )
    lines.append(f"| CPU s | {theirs} |")
    kinds = {"ours": "here, untuned", "ours_long": "here, untuned, longer"}
    for kind, name in kinds.items():
        if not all(kind in cell for cell in told.values()):
            continue
        own = [(_mean(cell[kind], "rmse"), _mean(cell[kind], "cpu_seconds")) for cell in told.values()]
        lines.append(
            f"| {name} (CPU s) | " + " | ".join(f"{error:.2g} ({spent:.1f}) | –" for error, spent in own) + " |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the problems; the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.design", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--optima", nargs="*", choices=design_optima.OPTIMA, default=list(design_optima.OPTIMA))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rivals", nargs="*", choices=design_peers.ESTIMATORS, default=list(design_peers.ESTIMATORS))
    parser.add_argument("--rival-seeds", type=int, default=2)
    parser.add_argument("--rival-seconds", type=float, default=10.0, help="of the processor, for a guided estimator")
    parser.add_argument("--out", type=Path, default=RESULTS / "design.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"cells": {}, "optima": {}}
    if arguments.out.exists():
        found |= json.loads(arguments.out.read_text())
    found |= {"machine": machine(), "versions": versions("invman")}

    def keep() -> None:
        order = {k: found["cells"][k] for k in PROBLEMS if k in found["cells"]}
        told = [gain_table(order)] if order else []
        told += [contest_table(order)] if any("by hand" in cell for cell in order.values()) else []
        told += [design_optima.table(found["optima"])] if found["optima"] else []
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text("\n".join(told))
        print("\n".join(told), flush=True)

    for name in arguments.problems:
        problem = PROBLEMS[name]()
        own = {"ours": [ours(problem, seed, problem.seconds) for seed in range(arguments.seeds)]}
        if problem.prior is not None:
            own["ours_long"] = [ours(problem, seed, arguments.rival_seconds) for seed in range(arguments.rival_seeds)]
        theirs = rivals(problem, arguments.rivals, arguments.rival_seeds, arguments.rival_seconds)
        before = found["cells"].get(name, {})
        found["cells"][name] = merged(before, own | theirs, arguments.rivals)
        keep()
    gains = {"preference": (preference, preference_gain)}
    for name in arguments.optima:
        found["optima"][name] = design_optima.climbed(name, gains, arguments.seeds)
        keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
