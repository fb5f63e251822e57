r"""Annealing seen through sections that destroy the specimen: ``python -m benchmarks.unpaired_process``.

Grain size and hardness of 3,000 specimens before and of 3,000 others after an hour at 900 to 1,200 K
(`pyro_invman.simulators.grain_growth`); where each specimen would have gone is known here and not told. Recorded at
five temperatures: W2 between 2,000 mapped and 2,000 annealed specimens, its floor, and the root mean square error of
the map specimen by specimen, all in standard deviations pooled over both tables; for the map from unpaired rows alone,
from them and 20 specimens that were seen before and after, and for a regression on those 20 alone. Beside them stands
a guess that knows the law at the temperature and not the specimen. With rows, pairs and fits for each of ``--seeds``;
two fits differ, so that what pairs bring is told by the mean over them. Draws a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_invman as pim
from benchmarks.sbi import machine
from benchmarks.unpaired import problems
from pyro_invman.density.coupling import Anchor
from pyro_invman.simulators import grain_growth

ROOT = Path(__file__).resolve().parents[1]
ROWS, POINTS, PAIRS = 3_000, 2_000, 20
TEMPERATURES = (930.0, 1_000.0, 1_050.0, 1_100.0, 1_170.0)


def measure(move: Callable[[Tensor, Tensor], Tensor], length: Tensor, seed: int) -> dict[str, float]:
    """Law and error of a map of specimens (N, 2) at temperatures (N, 1), each averaged over the temperatures."""
    w2 = problems().w2
    found: dict[str, list[float]] = {"w2": [], "floor": [], "error": [], "error_of_a_guess": []}
    generator = torch.Generator().manual_seed(1_000 + seed)
    for temperature in TEMPERATURES:
        hot = torch.full((POINTS,), temperature)
        before, other, third = (grain_growth.unannealed(POINTS, generator) for _ in range(3))
        truth, fresh, again = (grain_growth.annealed(x, hot) / length for x in (before, other, third))
        with torch.no_grad():
            mapped = move(before, hot.unsqueeze(-1)) / length
        found["w2"].append(w2(mapped.double().numpy(), fresh.double().numpy()))
        found["floor"].append(w2(again.double().numpy(), fresh.double().numpy()))
        found["error"].append(_rms(mapped - truth))
        found["error_of_a_guess"].append(_rms(fresh - truth))
    return {name: float(np.mean(values)) for name, values in found.items()}


def regression(transport: pim.ConditionalTransport, pairs: tuple[Tensor, Tensor, Tensor]) -> Callable[..., Tensor]:
    """The map that the pairs alone teach, in the units of a fitted one: a Gaussian process of displacements."""
    before, after, hot = pairs

    def standard(temperature: Tensor) -> Tensor:
        return (temperature - transport.context_mean) / transport.context_scale

    length = transport.length
    anchor = Anchor(before / length, after / length, standard(hot), (transport.spread / length).mean().item())
    return lambda x, temperature: length * anchor.predict(x / length, standard(temperature))[0]


def compare(seed: int, picture: Path | None) -> dict[str, dict[str, float]]:
    """The three maps of one set of rows and pairs."""
    source, target = grain_growth.simulate(ROWS, seed)
    generator = torch.Generator().manual_seed(500 + seed)
    few = grain_growth.unannealed(PAIRS, generator)
    hot = torch.linspace(grain_growth.COLDEST, grain_growth.HOTTEST, PAIRS)
    known = few, grain_growth.annealed(few, hot), hot.unsqueeze(-1)
    found: dict[str, dict[str, float]] = {}
    for label, pairs in (("unpaired", None), (f"unpaired and {PAIRS} pairs", known)):
        transport = pim.ConditionalTransport(2, 1, seed=seed)
        began = time.process_time()
        transport.fit(source, target, pairs, seed, progress=False)
        spent = time.process_time() - began
        found[label] = measure(transport, transport.length, seed) | {"fit_cpu_s": spent}
        if pairs is None and picture is not None:
            draw(transport, picture)
    began = time.process_time()
    alone = regression(transport, known)
    spent = time.process_time() - began
    found[f"{PAIRS} pairs alone"] = measure(alone, transport.length, seed) | {"fit_cpu_s": spent}
    return found


def table(results: Mapping[str, Any]) -> str:
    """Each seed, and the mean over them, as Markdown."""
    seeds = results["seeds"]
    lines = [
        "| | W2 | floor | error of the map | " + " | ".join(f"seed {k}" for k in seeds) + " | of a guess | CPU s |"
    ]
    lines.append("|---" * (6 + len(seeds)) + "|")
    for label in next(iter(seeds.values())):
        cells = [of[label] for of in seeds.values()]
        mean = {name: float(np.mean([cell[name] for cell in cells])) for name in cells[0]}
        figures = [mean["w2"], mean["floor"], mean["error"], *(cell["error"] for cell in cells)]
        shown = " | ".join(f"{value:.3f}" for value in [*figures, mean["error_of_a_guess"]])
        lines.append(f"| {label} | {shown} | {mean['fit_cpu_s']:.0f} |")
    return "\n".join(lines) + "\n"


def _rms(difference: Tensor) -> float:
    return difference.square().sum(-1).mean().sqrt().item()


def draw(transport: pim.ConditionalTransport, path: Path) -> None:
    """Specimens before (grey), where the map sends them (blue) and where they would have gone (red), for a few."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharex=True, sharey=True, layout="constrained")
    generator = torch.Generator().manual_seed(5)
    for axis, temperature in zip(axes, TEMPERATURES[::2], strict=True):
        before = grain_growth.unannealed(400, generator)
        hot = torch.full((400,), temperature)
        with torch.no_grad():
            mapped = transport(before, hot.unsqueeze(-1))
        truth = grain_growth.annealed(before, hot)
        axis.scatter(*before.T, s=4, color="0.7", label="before")
        axis.scatter(*mapped.T, s=4, color="tab:blue", label="after, by the map")
        axis.scatter(*truth[:12].T, s=22, facecolors="none", edgecolors="tab:red", label="after, in truth")
        for start, end in zip(before[:12], mapped[:12], strict=True):
            axis.annotate("", end.tolist(), start.tolist(), arrowprops={"arrowstyle": "->", "lw": 0.6})
        axis.set(title=f"{temperature:g} K", xlabel="grain size, um")
    axes[0].set_ylabel("hardness, HV")
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.unpaired_process", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of specimens, pairs and fits")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "unpaired_process.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "transport.png", help="of the first seed")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "seeds": {}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        picture = None if results["seeds"] else arguments.picture
        results["seeds"][str(seed)] = compare(seed, picture)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
