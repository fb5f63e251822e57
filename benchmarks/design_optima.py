r"""Designs that `pyro_invman.design.optimize` climbs to, beside optima that are known.

- *quadratic*: a parabola's three coefficients, N(0, 2²) each, heard with noise 0.5 at six points of [−1, 1].
- *surface*: the six coefficients of a quadratic surface, heard at eight points of [−1, 1]², sixteen numbers in all.
- *preference*: the censored sigmoid of `benchmarks.design`, one number in [−80, 80].

The gain of the first two is a closed form, and its maximum that of five hundred starts that climb the closed form
itself; the preference's is an integral over one normal, and its maximum that of a grid of 4,001. Nothing is
tuned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_invman.design import optimize

NOISE, PRIOR = 0.5, 2.0
_F64 = torch.float64


def parabola(points: Tensor) -> Tensor:
    """Features (..., q, 3) of points (..., q, 1)."""
    return torch.cat([torch.ones_like(points), points, points.square()], -1)


def surface(points: Tensor) -> Tensor:
    """Features (..., q, 6) of points (..., q, 2)."""
    a, b = points[..., :1], points[..., 1:]
    return torch.cat([torch.ones_like(a), a, b, a * b, a.square(), b.square()], -1)


OPTIMA: dict[str, tuple[Callable[[Tensor], Tensor] | None, tuple[int, ...]]] = {
    "quadratic": (parabola, (6, 1)),
    "surface": (surface, (8, 2)),
    "preference": (None, ()),
}


def closed_form(features: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """½ log det(I + X Λ Xᵀ / σ²) (...) of batches of points (..., q, d), in double precision."""
    x = features(points.double())
    return 0.5 * torch.logdet(torch.eye(x.shape[-2], dtype=_F64) + (PRIOR / NOISE) ** 2 * x @ x.mT)


def best(features: Callable[[Tensor], Tensor], shape: tuple[int, ...], starts: int = 500, steps: int = 1500) -> float:
    """The highest closed form of designs in the box, by as many starts that climb it."""
    points = 2 * torch.rand(starts, *shape, dtype=_F64, generator=torch.Generator().manual_seed(0)) - 1
    points.requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-closed_form(features, points).sum()).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            points.clamp_(-1, 1)
    return float(closed_form(features, points.detach()).max())


def model_of(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def model(designs: Tensor) -> None:
        with pyro.plate_stack("designs", designs.shape[:2]):
            x = features(designs)
            theta = pyro.sample("theta", dist.Normal(torch.zeros(x.shape[-1]), PRIOR).to_event(1))
            pyro.sample("y", dist.Normal((x @ theta.unsqueeze(-1)).squeeze(-1), NOISE).to_event(1))

    return model


def climbed(name: str, gains: dict[str, Any], seeds: int) -> dict[str, Any]:
    """How far below the maximum the gain of each seed's design lies, exactly; and of the best of random ones."""
    features, shape = OPTIMA[name]
    if features is None:
        problem, exact = gains[name]
        model, ends, initial = problem().model, (-80.0, 80.0), torch.tensor(40.0)
        top = float(exact(torch.linspace(*ends, 4001)).max())
    else:
        model, ends, initial = model_of(features), (-1.0, 1.0), torch.zeros(shape)
        top = best(features, shape)

        def exact(points: Tensor) -> Tensor:
            return closed_form(features, points)

    runs = []
    for seed in range(seeds):
        began = time.process_time()
        found = optimize(model, initial, "y", "theta", bounds=ends, seed=seed)
        spent = time.process_time() - began
        told = float(exact(torch.as_tensor(found.design.values).unsqueeze(0))[0])
        drawn = ends[0] + (ends[1] - ends[0]) * torch.rand(1000, *shape, generator=torch.Generator().manual_seed(seed))
        ended = exact(torch.as_tensor(found.ended.values))
        runs.append(
            {
                "gap": top - told,
                "starts_at_the_top": float((top - ended < 0.01).double().mean()),
                "random_gap": top - float(exact(drawn).max()),
                "inside": float(found.lower) <= told <= float(found.upper),
                "width": float(found.upper - found.lower),
                "steps": found.sizes["step"],
                "method": found.attrs["method"],
                "seconds": found.attrs["seconds"],
                "cpu_seconds": spent,
            }
        )
    return {"maximum": top, "runs": runs}


def table(optima: dict[str, Any]) -> str:
    """Means over seeds, and the worst."""
    lines = ["| optimum | numbers of the design | gain there, nats | below it, mean (worst) "
             "| best of 1,000 random | starts within .01 | gain inside the limits | their width | ascent by | CPU s |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in optima.items():
        runs = found["runs"]
        size = torch.Size(OPTIMA[name][1]).numel()

        def mean(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return sum(one[key] for one in runs) / len(runs)

        lines.append(
            f"| {name} | {size} | {found['maximum']:.3f} | {mean('gap'):.4f} ({max(r['gap'] for r in runs):.4f}) "
            f"| {mean('random_gap'):.3f} | {mean('starts_at_the_top'):.0%} | {mean('inside'):.0%} "
            f"| {mean('width'):.3f} | {runs[0]['method']} | {mean('cpu_seconds'):.1f} |"
        )
    return "\n".join(lines) + f"\n\n{len(runs)} seeds.\n"
