r"""Sequential design on location finding: ``python -m benchmarks.sequential``.

Two sources :math:`\theta_k \sim N(0, I)` in the plane are heard at a place :math:`\xi` that each step chooses,
:math:`\log y \sim N(\log(0.1 + \sum_k 1/(10^{-4} + |\theta_k - \xi|^2)), 0.5^2)`. All ways of choosing meet the same
sources and the same noise, so that their difference is paired:

- ``sequential``: this package's `Sequential`, all experiments stepped at once;
- ``greedy``: a myopic search as it is usually written, one experiment at a time: 2,000 weighted particles, resampled
  and moved by random walks when half of them are spent; a nested contrastive bound (100 outer, 400 inner particles) at
  200 candidates around the particles' sources and from the prior, then at 100 around the best;
- ``random``: places from N(0, I).

Recorded: the contrastive lower bound (sPCE) and the nested upper bound (sNMC) on what T outcomes told, with the same L
prior draws for all; the same two bounds by draws near a belief about each history, which close where the
prior's are empty; and, since a draw's own information varies much, the sum of the information *expected* of each
design, given the outcomes before it, by one and the same referee (a belief of 4,000 particles) for all ways: its mean
is the same quantity with a third of the spread, as far as the referee's belief is right. CPU seconds a design, one
thread. Finished parts are kept beside the result and not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.sbi import machine
from pyro_invman.design.gains import expected_gains
from pyro_invman.design.sequential import Sequential
from pyro_invman.design.told import total_information

RESULTS = Path(__file__).resolve().parent / "results"
NOISE = 0.5
PUBLISHED = {10: {"random": 4.68, "greedy": 8.87, "DAD": 8.0, "iDAD": 7.7}, 30: {"DAD": 10.9, "RL-BOED": 11.7}}
NEAR = 5_000  # contrastive draws near the belief
PLACES = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def location_finding(designs: Tensor) -> None:
    """The model, of places (R, N, 2)."""
    with pyro.plate_stack("leading", designs.shape[:-1]):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        pyro.sample("log_y", dist.Normal(loudness(theta, designs), NOISE))


def loudness(theta: Tensor, designs: Tensor) -> Tensor:
    """Logarithm of what sources (..., 2, 2) sound like at places (..., 2)."""
    across, along = theta[..., 0] - designs[..., :1], theta[..., 1] - designs[..., 1:]
    each = 1 / (1e-4 + across * across + along * along)
    return torch.log(0.1 + each[..., 0] + each[..., 1])


class Truth(NamedTuple):
    """Sources (R, 2, 2) and noise (R, T) of R experiments."""

    theta: Tensor
    noise: Tensor

    def outcome(self, step: int, designs: Tensor) -> Tensor:
        return loudness(self.theta, designs) + NOISE * self.noise[:, step]


class History(NamedTuple):
    """Places (R, T, 2), log-loudness heard there (R, T), and CPU seconds a design (R,)."""

    designs: Tensor
    observations: Tensor
    seconds: Tensor


def truths(rollouts: int, steps: int, seed: int) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    return Truth(torch.randn(rollouts, 2, 2, generator=generator), torch.randn(rollouts, steps, generator=generator))


def experiments(rollouts: int, seed: int, particles: int = 2000) -> Sequential:
    return Sequential(
        location_finding,
        PLACES,
        "log_y",
        num_rollouts=rollouts,
        num_particles=particles,
        propose=lambda latents: latents["theta"].flatten(1, 2),
        seed=seed,
    )


def sequential(truth: Truth, seed: int) -> History:
    rollouts, steps = truth.noise.shape
    start = time.process_time()
    running = experiments(rollouts, seed)
    design = running.step()
    for step in range(steps):
        outcome = truth.outcome(step, design)
        # nobody chooses after the last outcome, whose assimilation is counted all the same
        design = running.step(outcome)
    seconds = (time.process_time() - start) / rollouts / (steps + 1)
    return History(running.designs, running.observations["log_y"], torch.full((rollouts,), seconds))


def random(truth: Truth, seed: int) -> History:
    rollouts, steps = truth.noise.shape
    designs = torch.randn(rollouts, steps, 2, generator=torch.Generator().manual_seed(seed))
    outcomes = torch.stack([truth.outcome(step, designs[:, step]) for step in range(steps)], 1)
    return History(designs, outcomes, torch.zeros(rollouts))


def greedy(truth: Truth, seed: int) -> History:
    rollouts, steps = truth.noise.shape
    parts = []
    for row in range(rollouts):
        own = Truth(truth.theta[row : row + 1], truth.noise[row : row + 1])
        start = time.process_time()
        designs, outcomes = _greedy_one(own, steps, torch.Generator().manual_seed(seed * 100_003 + row))
        parts.append((designs, outcomes, torch.tensor((time.process_time() - start) / steps)))
    return History(*(torch.stack(column) for column in zip(*parts, strict=True)))


def _greedy_one(truth: Truth, steps: int, generator: torch.Generator, particles: int = 2000) -> tuple[Tensor, Tensor]:
    theta = torch.randn(particles, 2, 2, generator=generator)
    log_weight = torch.zeros(particles)
    designs, outcomes = torch.zeros(0, 2), torch.zeros(0)

    def log_target(at: Tensor) -> Tensor:
        residual = (outcomes - loudness(at.unsqueeze(1), designs)) / NOISE
        return -0.5 * at.square().sum((-2, -1)) - 0.5 * residual.square().sum(-1)

    for step in range(steps):
        design = _greedy_design(theta, log_weight, generator)
        outcome = truth.outcome(step, design)
        designs, outcomes = torch.cat([designs, design[None]]), torch.cat([outcomes, outcome])
        log_weight = log_weight - 0.5 * ((outcome - loudness(theta, design)) / NOISE).square()
        weight = torch.softmax(log_weight, 0)
        if 1 / weight.square().sum() < particles / 2:
            theta = theta[torch.multinomial(weight, particles, replacement=True, generator=generator)]
            log_weight = torch.zeros(particles)
            current = log_target(theta)
            spread = theta.std(0)
            for sweep in range(30):  # random walks of many lengths, in turn
                length = (1.0, 0.3, 0.1, 0.03, 0.01)[sweep % 5]
                proposed = theta + length * spread * torch.randn(theta.shape, generator=generator)
                there = log_target(proposed)
                accept = torch.rand(particles, generator=generator).log() < there - current
                theta[accept], current[accept] = proposed[accept], there[accept]
    return designs, outcomes


def _greedy_design(theta: Tensor, log_weight: Tensor, generator: torch.Generator) -> Tensor:
    weight = torch.softmax(log_weight, 0)
    outer, inner = (theta[torch.multinomial(weight, n, replacement=True, generator=generator)] for n in (100, 400))
    noise = NOISE * torch.randn(len(outer), generator=generator)

    def bound(places: Tensor) -> Tensor:
        own = loudness(outer.unsqueeze(1), places)  # outer, places
        heard = own + noise.unsqueeze(-1)
        others = loudness(inner.unsqueeze(1), places)  # inner, places
        log_own = -0.5 * ((heard - own) / NOISE).square()
        log_others = -0.5 * ((heard.unsqueeze(1) - others) / NOISE).square()
        mixed = torch.logaddexp(log_own, log_others.logsumexp(1)) - math.log(len(inner) + 1)
        return (log_own - mixed).mean(0)

    sources = theta[torch.multinomial(weight, 150, replacement=True, generator=generator)][:, 0]
    spread = theta.flatten(0, 1).std(0)
    length = 10 ** (-2 * torch.rand(150, 1, generator=generator))
    around = sources + length * spread * torch.randn(150, 2, generator=generator)
    candidates = torch.cat([around, torch.randn(50, 2, generator=generator)])
    best = candidates[bound(candidates).argmax()]
    length = 10 ** (-2 * torch.rand(99, 1, generator=generator))
    nearer = torch.cat([best[None], best + 0.3 * length * spread * torch.randn(99, 2, generator=generator)])
    return nearer[bound(nearer).argmax()]


def refereed(history: History, seed: int) -> Tensor:
    """Information expected of each design before its outcome, (R, T), by a belief of its own."""
    referee = experiments(len(history.designs), seed, particles=4000)
    gains = []
    for step in range(history.designs.shape[1]):
        design = history.designs[:, step]
        gains.append(
            expected_gains(
                location_finding, ["log_y"], referee.positions, design.unsqueeze(1), torch.Generator().manual_seed(0)
            )
        )
        referee.record(history.observations[:, step], design)
    return torch.cat(gains, 1)


WAYS: dict[str, Callable[[Truth, int], History]] = {"sequential": sequential, "greedy": greedy, "random": random}


def believed(history: History, seed: int) -> Tensor:
    """Particles of a belief about each history, whoever chose its designs."""
    belief = experiments(len(history.designs), seed, particles=4000)
    for step in range(history.designs.shape[1]):
        belief.record(history.observations[:, step], history.designs[:, step])
    return belief.positions


def part(
    folder: Path, way: str, rollouts: int, steps: int, contrastive: int, seed: int, referee: bool
) -> dict[str, Tensor]:
    """One way of choosing on one set of experiments, from disk where it was run before."""
    file = folder / f"{way}-{steps}-{rollouts}-{contrastive}-{seed}.safetensors"
    if file.is_file():
        return load_file(file)
    truth = truths(rollouts, steps, seed)
    history = WAYS[way](truth, seed + 1)
    lower, upper = total_information(
        location_finding, {"theta": truth.theta}, history.designs, {"log_y": history.observations}, contrastive, seed=7
    )
    found = {**history._asdict(), "lower": lower, "upper": upper}
    found["near_lower"], found["near_upper"] = total_information(
        location_finding,
        {"theta": truth.theta},
        history.designs,
        {"log_y": history.observations},
        NEAR,
        seed=8,
        belief=believed(history, seed + 3),
    )
    if referee:
        found["expected"] = refereed(history, seed + 2).sum(-1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in found.items()}, file)
    return found


def summary(values: Tensor) -> dict[str, float]:
    """Mean, and half the width of its 95 % interval."""
    return {"mean": float(values.mean()), "half_width": float(1.96 * values.std() / math.sqrt(len(values)))}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "published": PUBLISHED,
        "problems": [],
    }
    for steps, contrastive, ways in (
        (10, arguments.contrastive_10, ["sequential", "greedy", "random"]),
        (30, arguments.contrastive_30, ["sequential", "random"]),
    ):
        if steps not in arguments.steps:
            continue
        found: dict[str, dict[str, Tensor]] = {}
        for way in ways:
            blocks = []
            for seed in range(0, arguments.rollouts, arguments.block):
                size = min(arguments.block, arguments.rollouts - seed)
                blocks.append(part(arguments.parts, way, size, steps, contrastive, 1000 + seed, steps == 10))
                print(f"T = {steps}, {way}, {seed + size} experiments", flush=True)
            found[way] = {k: torch.cat([b[k] for b in blocks]) for k in blocks[0]}
        problem: dict[str, Any] = {
            "steps": steps,
            "contrastive": contrastive,
            "rollouts": arguments.rollouts,
            "ways": {},
        }
        for way, columns in found.items():
            kept = ("lower", "upper", "near_lower", "near_upper", "expected", "seconds")
            problem["ways"][way] = {k: summary(columns[k]) for k in kept if k in columns}
        if "greedy" in found:
            problem["sequential less greedy"] = {
                k: summary(found["sequential"][k] - found["greedy"][k]) for k in ("lower", "near_lower", "expected")
            }
        record["problems"].append(problem)
    return record


def table(record: dict[str, Any]) -> str:
    lines = []
    for problem in record["problems"]:
        ceiling = math.log(problem["contrastive"] + 1)
        lines += [
            f"T = {problem['steps']}, {problem['rollouts']} experiments, L = {problem['contrastive']:,} "
            f"(the lower bound cannot exceed {ceiling:.1f}); 95 % intervals; nats",
            "",
            "| | sPCE (lower) | sNMC (upper) | lower, draws near the belief | upper | expected, by the referee "
            "| CPU s a design |",
            "|---|---|---|---|---|---|---|",
        ]
        for way, columns in problem["ways"].items():
            cells = [
                f"{columns[k]['mean']:.2f} ± {columns[k]['half_width']:.2f}" if k in columns else "–"
                for k in ("lower", "upper", "near_lower", "near_upper", "expected")
            ]
            lines.append(f"| {way} | {' | '.join(cells)} | {columns['seconds']['mean']:.3f} |")
        difference = problem.get("sequential less greedy")
        if difference:
            cells = [f"{d['mean']:+.2f} ± {d['half_width']:.2f}" for d in difference.values()]
            lines.append(f"| sequential less greedy, paired | {cells[0]} | – | {cells[1]} | – | {cells[2]} | – |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--block", type=int, default=64, help="experiments run at once")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--contrastive-10", type=int, default=100_000)
    parser.add_argument("--contrastive-30", type=int, default=1_000_000)
    parser.add_argument(
        "--parts", type=Path, default=RESULTS / "parts" / "sequential", help="where finished parts are kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "sequential.json")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    record = run(arguments)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
