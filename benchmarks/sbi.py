r"""This package beside the peers of the library ``sbi`` on six problems: ``python -m benchmarks.sbi``.

Every method is fitted to the same simulations, in a process of its own with one thread. Recorded for each
problem and method: the classifier two-sample test (`benchmarks.c2st`) of 2,000 draws against the reference
posteriors of observations 1 to 5; seconds (of the processor, and of the wall) to fit, to draw 10,000 times
from one posterior, and to evaluate 10,000 log-densities of it; and the log loss
:math:`-\log q(\theta \mid x)`, averaged over fresh simulations, beside its exact value where that is known.

Methods: ``npe`` is sbi's NPE with a neural spline flow, else its defaults; ``fmpe`` is sbi's FMPE with its
defaults; ``invman`` is this package's `JointFlow`, one flow to a problem, which is also asked for other
conditionals. NPE's log-densities are taken without its leakage correction (``norm_posterior=False``), which
would draw 10,000 times first.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sbi_problems import PROBLEMS, REFERENCES, Problem, dataset

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("npe", "fmpe", "invman")
PROTOCOL = 1
OBSERVATIONS = (1, 2, 3, 4, 5)
DRAWS = 2_000
TIMED = 10_000
HELD_OUT = 1_000
HELD_OUT_SLOW = 200
AFFORDABLE_SECONDS = 30.0
_HELD_OUT_SEED = 1_000_000

Cell = dict[str, Any]


@dataclass(frozen=True)
class Fitted:
    """What is asked of a fitted method.

    Arguments:
        sample: ``(x (D_x,), S) -> (S, D_theta)``, draws from q(theta | x).
        log_prob: ``(theta (S, D_theta), x (D_x,)) -> (S,)``, log q(theta | x).
        paired: ``(theta (N, D_theta), x (N, D_x)) -> (N,)``, log q(theta | x) row by row.
        others: log loss per cell of other conditionals on such rows, by the conditional's name.
        slow: `log_prob` is so slow that fewer are asked for.
    """

    sample: Callable[[Tensor, int], Tensor]
    log_prob: Callable[[Tensor, Tensor], Tensor]
    paired: Callable[[Tensor, Tensor], Tensor]
    others: Callable[[Tensor, Tensor], dict[str, float]] | None = None
    slow: bool = False


# ------------------------------------------------------------ methods
def fit_npe(problem: Problem, theta: Tensor, x: Tensor, seed: int, fit_seconds: float | None) -> Fitted:
    """sbi's NPE with a neural spline flow, trained until 20 epochs bring nothing."""
    from sbi.inference import NPE

    trainer = NPE(prior=problem.prior, density_estimator="nsf", show_progress_bars=False)
    trainer.append_simulations(theta, x).train()
    posterior = trainer.build_posterior()
    return Fitted(
        lambda given, n: posterior.sample((n,), x=given, show_progress_bars=False),
        lambda values, given: posterior.log_prob(values, x=given, norm_posterior=False),
        lambda values, given: posterior.log_prob_batched(values, given, norm_posterior=False).flatten(),
    )


def fit_fmpe(problem: Problem, theta: Tensor, x: Tensor, seed: int, fit_seconds: float | None) -> Fitted:
    """sbi's FMPE with its defaults."""
    from sbi.inference import FMPE

    trainer = FMPE(prior=problem.prior, show_progress_bars=False)
    trainer.append_simulations(theta, x).train()
    posterior = trainer.build_posterior()

    def paired(values: Tensor, given: Tensor) -> Tensor:
        rows = zip(values, given, strict=True)
        return torch.cat([posterior.log_prob(value[None], x=condition) for value, condition in rows])

    return Fitted(
        lambda given, n: posterior.sample((n,), x=given, show_progress_bars=False),
        lambda values, given: posterior.log_prob(values, x=given),
        paired,
        slow=True,
    )


def fit_invman(problem: Problem, theta: Tensor, x: Tensor, seed: int, fit_seconds: float | None) -> Fitted:
    """This package's joint flow over parameters and observations."""
    from pyro_invman.joint import JointFlow

    ds = dataset(problem, theta, x)
    groups = [[list(member) for member in group] for group in problem.exchangeable]
    flow = JointFlow.from_dataset(ds, seed=seed, exchangeable=groups or None)
    flow.fit(ds, seed=seed, max_seconds=fit_seconds, progress=False)

    def density(values: Tensor, targets: Sequence[str], given: Tensor, names: Sequence[str]) -> Tensor:
        """log q(targets | names), in blocks of rows, where `given` holds one row or as many as `values`."""
        if given.ndim == 1:
            given = given.expand(1, -1)
        scores = []
        for block in torch.arange(len(values)).split(2_000):
            known = given if len(given) == 1 else given[block]
            d = flow.conditional(targets, dict(zip(names, known.unbind(-1), strict=True)))
            scores.append(d.log_prob(values[block]))
        return torch.cat(scores)

    def others(values: Tensor, given: Tensor) -> dict[str, float]:
        forward = -density(given, problem.observations, values, problem.parameters)
        losses = {"x | theta": forward.mean().item() / len(problem.observations)}
        generator = torch.Generator().manual_seed(seed)
        total, cells = 0.0, 0
        for block in torch.arange(len(values)).split(len(values) // 10):
            order = torch.randperm(len(problem.parameters), generator=generator)
            size = int(torch.randint(1, len(order), (), generator=generator))
            asked, told = order[:size], order[size:]
            names = [problem.parameters[i] for i in told] + list(problem.observations)
            known = torch.cat([values[block][:, told], given[block]], -1)
            scores = density(values[block][:, asked], [problem.parameters[i] for i in asked], known, names)
            total, cells = total - scores.sum().item(), cells + len(block) * size
        return losses | {"part of theta | rest of theta, x": total / cells}

    def sample(given: Tensor, n: int) -> Tensor:
        d = flow.conditional(problem.parameters, dict(zip(problem.observations, given, strict=True)))
        return d.sample(torch.Size((n,)))

    return Fitted(
        sample,
        lambda values, given: density(values, problem.parameters, given, problem.observations),
        lambda values, given: density(values, problem.parameters, given, problem.observations),
        others,
    )


_FIT = {"npe": fit_npe, "fmpe": fit_fmpe, "invman": fit_invman}


# ------------------------------------------------------------ one cell
@contextlib.contextmanager
def _timed(cell: Cell, name: str) -> Iterator[None]:
    """Notes processor and wall seconds of the block under `name`."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    cell[name] = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def measure(problem: Problem, method: str, simulations: int, seed: int, fit_seconds: float | None = None) -> Cell:
    """Fits `method` to `simulations` rows of `problem` and measures it, in this process."""
    from benchmarks.c2st import c2st

    torch.set_num_threads(1)
    theta, x = problem.simulate(simulations, seed)
    torch.manual_seed(seed)
    cell: Cell = {"load_average_at_start": os.getloadavg()[0]}
    with _timed(cell, "fit"):
        fitted = _FIT[method](problem, theta, x, seed, fit_seconds)

    with torch.no_grad():
        first = problem.reference(OBSERVATIONS[0])[0]
        fitted.sample(first, 10)
        with _timed(cell, "draws_10000"):
            draws = fitted.sample(first, TIMED)
        fitted.log_prob(draws[:10], first)
        cell["log_densities_10000"] = _time_log_densities(fitted, draws, first)

        rows = HELD_OUT_SLOW if fitted.slow else HELD_OUT
        theta, x = (values[:rows] for values in problem.simulate(HELD_OUT, _HELD_OUT_SEED + seed))
        cell["log_loss"] = _summary(-fitted.paired(theta, x))
        if problem.log_posterior is not None:
            cell["log_loss_exact"] = _summary(-problem.log_posterior(theta, x))
        if fitted.others is not None:
            cell["other_log_losses_per_cell"] = fitted.others(theta, x)
            exact = -problem.log_likelihood(theta, x).mean().item() / len(problem.observations)
            cell["other_log_losses_per_cell_exact"] = {"x | theta": exact}

        cell["c2st"] = []
        with _timed(cell, "c2st_time"):
            for number in OBSERVATIONS:
                observation, _, reference = problem.reference(number)
                draws = fitted.sample(observation, len(reference)).to(reference.dtype)
                cell["c2st"].append(c2st(reference, draws))
    cell["c2st_mean"] = sum(cell["c2st"]) / len(cell["c2st"])
    return cell


def _time_log_densities(fitted: Fitted, values: Tensor, x: Tensor) -> dict[str, Any]:
    """Seconds for all `values`; by a tenth of them, times ten and marked, where that takes too long."""
    if fitted.slow:
        part: Cell = {}
        with _timed(part, "tenth"):
            fitted.log_prob(values[: TIMED // 10], x)
        if part["tenth"]["cpu_s"] > AFFORDABLE_SECONDS:
            tenfold = {name: 10 * seconds for name, seconds in part["tenth"].items()}
            return tenfold | {"extrapolated_from": TIMED // 10}
    whole: Cell = {}
    with _timed(whole, "all"):
        fitted.log_prob(values, x)
    return whole["all"]


def _summary(losses: Tensor) -> dict[str, float]:
    return {
        "mean": losses.double().mean().item(),
        "std_error": (losses.double().std() / len(losses) ** 0.5).item(),
        "rows": len(losses),
    }


# ------------------------------------------------------------ results on disk
def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "threads_per_process": 1}


def versions(method: str) -> dict[str, str]:
    """What `method` was measured with; for this package also a digest of the sources that matter."""
    packages = ["torch", "numpy", "scikit-learn"] + (["pyro-ppl"] if method == "invman" else ["sbi"])
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in packages}
    if method == "invman":
        package, digest = ROOT / "pyro_invman", hashlib.sha256()
        for path in sorted([*package.glob("*.py"), *package.glob("density/*.py")]):
            if path.stem not in {"__init__", "__main__", "cli", "plots", "results"}:
                digest.update(path.read_bytes())
        found["pyro_invman sources"] = digest.hexdigest()[:12]
    return found


def read_results(path: Path) -> dict[str, Any]:
    """The results kept at `path`; none, where nothing is there."""
    return json.loads(path.read_text()) if path.exists() else {"protocol": PROTOCOL, "cells": {}}


def keep(path: Path, key: str, cell: Cell) -> None:
    """Adds `cell` to the results at `path`, to which other runs may be adding too; the file is never torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = read_results(path)
        results["cells"][key] = cell
        results["cells"] = dict(sorted(results["cells"].items()))
        part = path.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, path)
    finally:
        os.close(folder)


def table(results: dict[str, Any], simulations: int, seed: int) -> str:
    """The cells at `simulations` and `seed` as one Markdown table, with what they were measured with."""
    lines = [
        f"Simulations: {simulations}; seed {seed}; one thread a process; seconds are of the processor.",
        "",
        "| problem | method | C2ST mean | C2ST, observations 1–5 | log loss (exact) | fit, s | 10⁴ draws, s "
        "| 10⁴ log-densities, s | −log q(x given θ) per cell (exact) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found: dict[str, str] = {}
    for name in PROBLEMS:
        for method in METHODS:
            cell = results["cells"].get(_key(name, method, simulations, seed))
            if cell is None:
                continue
            lines.append(f"| {name} | {method} | " + " | ".join(_row(cell)) + " |")
            found |= cell["versions"]
            found["machine"] = f"{cell['machine']['cpu']}, {cell['machine']['cores']} cores"
    notes = [f"{name} {value}" for name, value in sorted(found.items())]
    return "\n".join([*lines, "", "Measured with: " + "; ".join(notes) + ".", "", _NOTES]) + "\n"


_NOTES = """\
Log loss: mean −log q(θ | x) over 1,000 fresh simulations (FMPE: the first 200 of them), ± one standard error.
NPE's log-densities are without leakage correction. `~`: ten times the seconds for a tenth as many."""


def _row(cell: Cell) -> list[str]:
    def loss(summary: dict[str, float]) -> str:
        return f"{summary['mean']:.3f} ± {summary['std_error']:.3f}"

    exact = f" ({cell['log_loss_exact']['mean']:.3f})" if "log_loss_exact" in cell else ""
    densities = cell["log_densities_10000"]
    other = cell.get("other_log_losses_per_cell", {}).get("x | theta")
    other_exact = cell.get("other_log_losses_per_cell_exact", {}).get("x | theta")
    return [
        f"{cell['c2st_mean']:.3f}",
        " ".join(f"{value:.3f}" for value in cell["c2st"]),
        loss(cell["log_loss"]) + exact,
        f"{cell['fit']['cpu_s']:.0f}",
        f"{cell['draws_10000']['cpu_s']:.2f}",
        ("~" if "extrapolated_from" in densities else "") + f"{densities['cpu_s']:.2f}",
        "–" if other is None else f"{other:.3f} ({other_exact:.3f})",
    ]


def _key(problem: str, method: str, simulations: int, seed: int) -> str:
    return f"{problem}/{method}/{simulations}/{seed}"


# ------------------------------------------------------------ command line
def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.sbi", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--simulations", type=int, default=10_000, help="rows that every method is fitted to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit-seconds", type=float, help="wall seconds that invman may fit (no limit)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sbi.json")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each")
    parser.add_argument("--resume", action="store_true", help="skip what equal settings and versions gave")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _settings(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "simulations": arguments.simulations,
        "seed": arguments.seed,
        "fit_seconds": arguments.fit_seconds if method == "invman" else None,
    }


def _run(arguments: argparse.Namespace, problem: str, method: str) -> bool:
    """Measures one cell in a process of its own and keeps it; whether that worked."""
    environment = os.environ | {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = versions(method)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        answer = Path(folder) / "cell.json"
        command = [sys.executable, "-m", "benchmarks.sbi", "--cell", str(answer), "--problems", problem]
        command += ["--methods", method, "--seed", str(arguments.seed)]
        command += ["--simulations", str(arguments.simulations)]
        if arguments.fit_seconds is not None:
            command += ["--fit-seconds", str(arguments.fit_seconds)]
        done = subprocess.run(command, cwd=folder, env=environment, check=False)
        if done.returncode:
            print(f"{problem}/{method}: failed, exit status {done.returncode}", file=sys.stderr, flush=True)
            return False
        cell = json.loads(answer.read_text())
    cell |= {
        "settings": _settings(arguments, method),
        "versions": found,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    keep(arguments.out, _key(problem, method, arguments.simulations, arguments.seed), cell)
    print(f"{problem}/{method}: " + " | ".join(_row(cell)), flush=True)
    return True


def _is_kept(arguments: argparse.Namespace, problem: str, method: str) -> bool:
    key = _key(problem, method, arguments.simulations, arguments.seed)
    cell = read_results(arguments.out)["cells"].get(key)
    return (
        cell is not None and cell["settings"] == _settings(arguments, method) and cell["versions"] == versions(method)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status."""
    arguments = _arguments(argv)
    if not REFERENCES.is_dir():
        message = f"the reference posteriors are not at {REFERENCES}; without them nothing can be compared"
        print(message, file=sys.stderr)
        return 2
    if arguments.cell is not None:
        problem, method = PROBLEMS[arguments.problems[0]], arguments.methods[0]
        cell = measure(problem, method, arguments.simulations, arguments.seed, arguments.fit_seconds)
        arguments.cell.write_text(json.dumps(cell))
        return 0
    arguments.out = arguments.out.resolve()
    pairs = [(problem, method) for problem in arguments.problems for method in arguments.methods]
    if arguments.resume:
        pairs = [pair for pair in pairs if not _is_kept(arguments, *pair)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        worked = list(pool.map(lambda pair: _run(arguments, *pair), pairs))
    text = table(read_results(arguments.out), arguments.simulations, arguments.seed)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
