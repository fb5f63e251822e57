r"""What is learned from rows that hide cells: ``python -m benchmarks.missing``.

Parts, chosen with ``--parts``:

* `unlinked`: 10⁴ rows with x alone and 10⁴ with y alone, y bent in x. Mutual information that the flow reports of them
  (bar 0.02 nats), the same with a condition in every row that both depend on (given it: bar 0.02; not given it, beside
  the truth under independence given it), and of a manifold given the latent.
* `bivariate`: a normal pair with correlation 0.8, the second missing by the first. Intercept, slope and standard
  deviation of each given the other (bar: 0.03 from the truth), mean divergence over drawn givens (bar 0.02 nats a
  dimension), with `completion=False` and by default.
* `six`: the same for a linear-Gaussian process of 6 variables, five of them missing by the first, over all 186
  conditionals of one variable given some others, with a process and rows for each of ``--seeds``; 160,000 rows. With
  40,000 the bar is out of reach of any method in about a quarter of all samples: the largest error of the Gaussian of
  greatest likelihood, which is efficient, is then above it (:mod:`benchmarks.missing_best`).
* `by_own_value`: y is recorded with probability Φ(1 − 2 y); without and with that mechanism declared, beside the normal
  of greatest likelihood with that mechanism.
* `bent`: the same mechanism where y is bent in x, without and with it declared, and a flow fitted to all the values.
  Divergence of either conditional (bar 0.02 nats) and the mean of y; the truth by quadrature.
* `simulator`: 50 pairs, 10⁴ rows with x alone and 10⁴ with y alone; p(y | x) declared as a Pyro function, or as draws
  alone. Gain in held-out log-density over a flow fitted to the 50 pairs (bar 0.05 nats).

Coefficients are in standard scores: the least-squares line through the mean of the learned conditional over givens
drawn from the process, and the standard deviation about it. The Gaussian of greatest likelihood has them in closed
form, on all rows; a fit keeps a tenth of them apart. Fits take 3,000 steps, and 1,000 in each round.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_invman as pim
from benchmarks.missing_best import (
    attainable,
    coefficients,
    compare_normal,
    conditionals,
    greatest_likelihood,
    summary,
)
from benchmarks.sbi import ROOT, machine, versions
from pyro_invman.data import to_tensor
from pyro_invman.simulators.linear_gaussian import LinearGaussian

NAN = math.nan
ROWS, ROWS_OF_SIX, FEWER, MANY, PAIRS = 20_000, 160_000, 40_000, 10_000, 50
COEFFICIENT_BAR, KL_BAR, INFORMATION_BAR, GAIN_BAR = 0.03, 0.02, 0.02, 0.05
SCHEDULE = pim.Schedule(steps=3000)
PAIR = {"x1": "parameter", "x2": "observation"}
BENT_SD = 0.3


def fitted(ds: Any, seed: int, **settings: Any) -> tuple[pim.JointFlow, dict[str, Any]]:
    """A flow fitted to `ds`, and what its history says."""
    flow = pim.JointFlow.from_dataset(ds, seed=seed)
    began = time.process_time()
    history = flow.fit(ds, seed=seed, progress=False, schedule=SCHEDULE, **settings)
    said = {name: history.attrs[name] for name in ("completion", "missing_by") if name in history.attrs}
    said |= {"rounds": int(history["round"].max()), "fit_cpu_s": time.process_time() - began}
    if "effective_proposals" in history.attrs:
        said["effective_proposals"] = history.attrs["effective_proposals"][-1]
        said["smallest_effective_proposals"] = history.attrs["smallest_effective_proposals"][-1]
    return flow, said


# ------------------------------------------------------------------------------------------------ unlinked
def unlinked(seed: int) -> dict[str, Any]:
    """Mutual information of variables that no row shows together."""
    generator = torch.Generator().manual_seed(seed)
    x, c, noise = torch.randn(3, 2 * MANY, generator=generator, dtype=torch.float64)
    first = torch.arange(2 * MANY) < MANY
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pim.UnidentifiedConditional)
        for label, cause in (("nothing", x), ("a condition", 0.6 * x + 0.8 * c)):
            columns = {"x": cause.where(first, NAN), "y": (2 * cause + 0.3 * noise).where(~first, NAN)}
            roles = {"x": "parameter", "y": "observation"}
            if label == "a condition":
                columns, roles = columns | {"c": c}, roles | {"c": "condition"}
            flow, said = fitted(pim.from_columns(columns, roles=roles), seed)
            case = {"information": flow.mutual_information("x", "y")._asdict()} | said
            if "c" in columns:
                case["given it"] = flow.mutual_information("x", "y", given="c")._asdict()
                # corr(x, c) = 0.8, corr(y, c) = 1.6 / sqrt(4.09): of x and y, their product
                case["truth"] = -0.5 * math.log(1 - (0.8 * 1.6 / math.sqrt(4.09)) ** 2)
            found[label] = case
        found["manifold"] = of_a_manifold(seed)
    return found


def of_a_manifold(seed: int) -> dict[str, float]:
    """Mutual information of x and y given the latent of a task, no row showing both."""
    generator = torch.Generator().manual_seed(seed + 1)
    tasks, rows = 60, 40
    task = torch.arange(tasks * rows) // rows
    z = torch.randn(tasks, generator=generator, dtype=torch.float64)[task]
    x, noise = torch.randn(2, tasks * rows, generator=generator, dtype=torch.float64)
    first = torch.arange(tasks * rows) % 2 == 0
    columns = {
        "x": x.where(first, NAN),
        "y": (x + z + 0.3 * noise).where(~first, NAN),
        "w": (z + x.square() + 0.3 * noise).where(first, NAN),
    }
    ds = pim.from_columns(
        columns,
        roles={"x": "parameter", "y": "observation", "w": "observation"},
        task=[f"task {t}" for t in task.tolist()],
    )
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=1, seed=seed)
    manifold.fit(ds, seed=seed, progress=False, max_seconds=60)
    latent = torch.randn(2000, 1, generator=generator)
    row = torch.full((2000, 3), NAN, dtype=torch.float64)
    arguments = (manifold.network.flow, manifold.standardization, manifold.variables, ["y"])
    with torch.no_grad():
        told = row.clone()
        told[:, manifold.variables.index("x")] = torch.randn(2000, generator=generator, dtype=torch.float64)
        informed, alone = (pim.ConditionalFlow(*arguments, r, latent) for r in (told, row))
        value = informed.sample()
        gain = (informed.log_prob(value) - alone.log_prob(value)).double()
    return {"value": float(gain.mean()), "std_error": float(gain.std() / len(gain) ** 0.5)}


# ------------------------------------------------------------------------------------------------ coefficients
def line(mean: Tensor, variance: Tensor, given: Tensor) -> Tensor:
    """Intercept, slopes (G,) and standard deviation of a conditional with moments (N,) at givens (N, G)."""
    design = torch.cat([torch.ones(len(given), 1, dtype=torch.float64), given], -1)
    coefficients = torch.linalg.lstsq(design, mean.unsqueeze(-1)).solution[:, 0]
    left = (mean - design @ coefficients).square().mean() + variance.mean()
    return torch.cat([coefficients, left.sqrt().unsqueeze(0)])


def compare(process: LinearGaussian, flow: pim.JointFlow, seed: int, givens: int = 2000) -> dict[str, Any]:
    """Largest and mean error of the coefficients of every conditional of one variable, and divergences."""
    generator = torch.Generator().manual_seed(seed)
    names, dim = process.variables.names, len(process.variables)
    noise = torch.randn(givens, dim, generator=generator, dtype=torch.float64)
    rows = process.mean + noise @ torch.linalg.cholesky(process.covariance).mT
    size = process.covariance.diagonal().sqrt()
    scores = (rows - process.mean) / size
    truths = coefficients(process, process.mean, process.covariance)
    working = flow.standardization(rows).to(flow.density.dtype)
    errors, divergences, each = [], [], {}
    for (target, known), truth in zip(conditionals(dim), truths, strict=True):
        mask = torch.zeros(dim, dtype=torch.bool)
        mask[known] = True
        name, told = names[target], {names[j]: rows[:, j] for j in known}
        with torch.no_grad():
            head: Any = flow.density.head_of(working, mask, target)
            share = head.log_weights.exp().double()
            loc, scale = head.loc.double(), head.scale.double()
            middle = (share * loc).sum(-1)
            spread = (share * (scale.square() + loc.square())).sum(-1) - middle.square()
            middle = flow.standardization.inverse(_at(middle, target, dim))[:, target] - process.mean[target]
            unit = flow.standardization.scale[target] / size[target]
            asked, exact = flow.conditional([name], told), process.conditional([name], told)
            some = exact.sample((8,))
            divergences.append(float((exact.log_prob(some) - asked.log_prob(some)).mean()))
        found = line(middle / size[target], spread * unit**2, scores[:, known])
        errors.append(float((found - truth).abs().max()))
        if dim == 2:
            each[f"{name} given {names[known[0]]}"] = found.tolist()
    return summary(errors, divergences, COEFFICIENT_BAR) | ({"coefficients": each} if each else {})


def _at(column: Tensor, target: int, dim: int) -> Tensor:
    row = torch.zeros(len(column), dim, dtype=torch.float64)
    row[:, target] = column
    return row


def pair() -> LinearGaussian:
    """A normal pair with correlation 0.8."""
    variables = pim.Variables([pim.Variable(name, role) for name, role in PAIR.items()])
    return LinearGaussian(variables, torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))


def at_random(process: LinearGaussian, rows: int, seed: int, fewer: Sequence[int] = ()) -> dict[str, Any]:
    """The Gaussian of greatest likelihood, which is the best there is, the split alone, and the default; and how often
    the best is within the bar, with other numbers of rows too."""
    ds = process.sample(rows, seed, missing=0.5, mechanism="at_random")
    found: dict[str, Any] = {}
    for number in (*fewer, rows):
        some = to_tensor(process.sample(number, seed, missing=0.5, mechanism="at_random"), process.variables)
        best = compare_normal(process, greatest_likelihood(some, process), COEFFICIENT_BAR, seed)
        label = "" if number == rows else f", {number:,} rows"
        found["Gaussian of greatest likelihood" + label] = best | {
            "attainable": attainable(process, some, COEFFICIENT_BAR)
        }
    for label, completion in (("observed cells alone", False), ("default", None)):
        flow, said = fitted(ds, seed, completion=completion)
        found[label] = compare(process, flow, seed) | said
    return found


def greatest_with_mechanism(x1: Tensor, x2: Tensor) -> LinearGaussian:
    """The normal of greatest likelihood of rows whose NaN in `x2` (N,) has probability Φ(2 x2 − 1): by their integral,
    a row that hides x2 counts Φ((2 m − 1) / √(1 + 4 s²)), with m and s of x2 given x1."""
    theta = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss() -> Tensor:
        optimizer.zero_grad()
        mean, scale = theta[0] + theta[1] * x1, theta[2].exp()
        unseen = torch.special.log_ndtr((2 * mean - 1) / (1 + 4 * scale.square()).sqrt())
        seen = torch.distributions.Normal(mean, scale).log_prob(x2.nan_to_num())
        value = -torch.where(x2.isnan(), unseen, seen).mean()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    intercept, slope, scale = theta.detach()[0], theta.detach()[1], theta.detach()[2].exp()
    mean, variance = x1.mean(), x1.var(correction=0)
    covariance = torch.stack([variance, slope * variance, slope * variance, slope**2 * variance + scale**2])
    return LinearGaussian(pair().variables, torch.stack([mean, intercept + slope * mean]), covariance.reshape(2, 2))


def by_own_value(seed: int) -> dict[str, Any]:
    """High values go unrecorded."""
    process = pair()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    rows = noise @ torch.linalg.cholesky(process.covariance).mT
    hidden = torch.rand(ROWS, generator=generator, dtype=torch.float64) > torch.special.ndtr(1 - 2 * rows[:, 1])
    ds = pim.from_columns({"x1": rows[:, 0], "x2": rows[:, 1].where(~hidden, NAN)}, roles=PAIR)

    def recorded(row: Mapping[str, Tensor]) -> None:
        pyro.sample("x2", dist.Bernoulli(torch.special.ndtr(1 - 2 * row["x2"]).clamp(1e-12, 1 - 1e-12)))

    found: dict[str, Any] = {"hidden": float(hidden.double().mean())}
    best = greatest_with_mechanism(rows[:, 0], rows[:, 1].where(~hidden, NAN))
    found["declared, normal of greatest likelihood"] = compare_normal(process, best, COEFFICIENT_BAR, seed)
    for label, mechanism in (("at random", None), ("declared", recorded)):
        flow, said = fitted(ds, seed, mechanism=mechanism)
        found[label] = compare(process, flow, seed) | said
    return found


def bend(x: Tensor) -> Tensor:
    """The mean of y."""
    return torch.sin(2 * x) + 0.5 * x


def bent(seed: int, givens: int = 4000) -> dict[str, Any]:
    """High values of y go unrecorded, and y is bent in x: divergence of each conditional, and the mean of y."""
    generator = torch.Generator().manual_seed(seed)

    def rows(number: int) -> tuple[Tensor, Tensor]:
        x, noise = torch.randn(2, number, generator=generator, dtype=torch.float64)
        return x, bend(x) + BENT_SD * noise

    (x, y), (u, v) = rows(ROWS), rows(givens)
    hidden = torch.rand(ROWS, generator=generator, dtype=torch.float64) > torch.special.ndtr(1 - 2 * y)
    places = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    unit, cell = torch.distributions.Normal(0.0, 1.0), math.log(16 / 4000)
    forward = torch.distributions.Normal(bend(u), BENT_SD).log_prob(v)
    each = torch.distributions.Normal(bend(places), BENT_SD).log_prob(v.unsqueeze(-1)) + unit.log_prob(places)
    backward = forward + unit.log_prob(u) - each.logsumexp(-1) - cell

    def recorded(row: Mapping[str, Tensor]) -> None:
        pyro.sample("y", dist.Bernoulli(torch.special.ndtr(1 - 2 * row["y"]).clamp(1e-12, 1 - 1e-12)))

    truth = {
        "y given x": 0.0,
        "x given y": 0.0,
        "mean of y": float((unit.log_prob(places).exp() * bend(places)).sum() / 250),
    }
    found: dict[str, Any] = {"hidden": float(hidden.double().mean()), "truth": truth}
    for label, column, settings in (
        ("nothing hidden", y, {}),
        ("at random", y.where(~hidden, NAN), {}),
        ("declared", y.where(~hidden, NAN), {"mechanism": recorded}),
    ):
        ds = pim.from_columns({"x": x, "y": column}, roles={"x": "parameter", "y": "observation"})
        flow, said = fitted(ds, seed, **settings)
        with torch.no_grad():
            asked = {
                "y given x": forward - flow.conditional(["y"], {"x": u}).log_prob(v.unsqueeze(-1)),
                "x given y": backward - flow.conditional(["x"], {"y": v}).log_prob(u.unsqueeze(-1)),
            }
            drawn_y = flow.conditional(["y"], {"x": u}).sample((8,))
        found[label] = {name: float(score.double().mean()) for name, score in asked.items()} | said
        found[label]["mean of y"] = float(drawn_y.mean())
    return found


# ------------------------------------------------------------------------------------------------ simulator
def law(row: Mapping[str, Tensor]) -> None:
    """p(y | x) of the example."""
    pyro.sample("y", dist.Normal(torch.sin(2 * row["x"]) + 0.5 * row["x"], 0.3))


def drawn(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, as draws alone."""
    x = row["x"]
    return {"y": torch.sin(2 * x) + 0.5 * x + 0.3 * torch.randn_like(x)}


def simulated(seed: int) -> dict[str, Any]:
    """Held-out log-densities with 50 pairs alone, and with unpaired rows and the law of y given x."""
    generator = torch.Generator().manual_seed(seed)

    def rows(number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(number, generator=generator, dtype=torch.float64)
        x = torch.where(torch.rand(number, generator=generator) < 0.5, 0.5 * x - 1.0, 0.4 * x + 1.2)
        return x, torch.sin(2 * x) + 0.5 * x + 0.3 * torch.randn(number, generator=generator, dtype=torch.float64)

    (x, y), (a, _), (_, b), (u, v) = rows(PAIRS), rows(MANY), rows(MANY), rows(5000)
    none = torch.full((MANY,), NAN, dtype=torch.float64)
    roles = {"x": "parameter", "y": "observation"}
    pairs = pim.from_columns({"x": x, "y": y}, roles=roles)
    everything = pim.from_columns({"x": torch.cat([x, a, none]), "y": torch.cat([y, none, b])}, roles=roles)
    declare: Callable[[Any], pim.Simulator] = lambda f: pim.Simulator(f, given=["x"], targets=["y"])  # noqa: E731
    found: dict[str, Any] = {}
    for label, ds, settings in (
        ("50 pairs alone", pairs, {}),
        ("unpaired rows besides", everything, {}),
        ("and the law", everything, {"simulator": declare(law)}),
        ("and draws of the law", everything, {"simulator": declare(drawn)}),
    ):
        flow, said = fitted(ds, seed, **settings)
        with torch.no_grad():
            asked = {
                "joint": flow.conditional(["x", "y"]).log_prob(torch.stack([u, v], -1)),
                "x given y": flow.conditional(["x"], {"y": v}).log_prob(u.unsqueeze(-1)),
                "y given x": flow.conditional(["y"], {"x": u}).log_prob(v.unsqueeze(-1)),
            }
        found[label] = {name: float(score.double().mean()) for name, score in asked.items()} | said
    return found


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "unlinked": unlinked,
    "bivariate": lambda seed: at_random(pair(), ROWS, seed),
    "six": lambda seed: at_random(LinearGaussian.random(3, 3, seed=seed), ROWS_OF_SIX, seed + 1, [FEWER]),
    "by_own_value": by_own_value,
    "bent": bent,
    "simulator": simulated,
}


# ------------------------------------------------------------------------------------------------ reporting
def rows_of(parts: Mapping[str, Any], part: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Labels and results of the rows of one table; of `six` seed by seed."""
    if part not in parts:
        return []
    if part != "six":
        return [(label, found) for label, found in parts[part].items() if isinstance(found, Mapping)]
    return [(f"{label}, {seed}", found) for seed, of in parts[part].items() for label, found in of.items()]


def missed(parts: Mapping[str, Any]) -> list[str]:
    """What does not reach its bar."""
    lines = []
    if "unlinked" in parts:
        case = parts["unlinked"]
        for label, found in (
            ("nothing", case["nothing"]["information"]),
            ("given a condition", case["a condition"]["given it"]),
            ("manifold, given the latent", case["manifold"]),
        ):
            if not abs(found["value"]) <= INFORMATION_BAR:
                lines.append(f"unlinked, {label}: {found['value']:.3f} nats, bar {INFORMATION_BAR}")
    for part, label in (("bivariate", "default"), ("six", "default"), ("by_own_value", "declared")):
        for name, found in rows_of(parts, part):
            if name.split(", seed")[0] != label:
                continue
            if not found["largest_error"] <= COEFFICIENT_BAR:
                lines.append(f"{part}, {name}: largest error {found['largest_error']:.3f}, bar {COEFFICIENT_BAR}")
            if not found["kl"] <= KL_BAR:
                lines.append(f"{part}, {name}: KL {found['kl']:.4f}, bar {KL_BAR}")
    if "bent" in parts:
        for name in ("y given x", "x given y"):
            divergence = parts["bent"]["declared"][name]
            if not divergence <= KL_BAR:
                lines.append(f"bent, {name}: KL {divergence:.4f}, bar {KL_BAR}")
    if "simulator" in parts:
        case = parts["simulator"]
        for name in ("joint", "x given y", "y given x"):
            gain = case["and the law"][name] - case["50 pairs alone"][name]
            if not gain >= GAIN_BAR:
                lines.append(f"simulator, {name}: gain {gain:.3f}, bar {GAIN_BAR}")
    return lines


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts, lines = results["parts"], []
    if "unlinked" in parts:
        case = parts["unlinked"]

        def nats(found: Mapping[str, float]) -> str:
            return f"{found['value']:.4f} ± {found['std_error']:.4f}"

        lines += [
            "| x and y never measured together, linked by | information that is reported, nats | truth |",
            "|---|---|---|",
            f"| nothing | {nats(case['nothing']['information'])} | unknown |",
            f"| a condition | {nats(case['a condition']['information'])} | {case['a condition']['truth']:.4f} if "
            "independent given it |",
            f"| a condition, given it | {nats(case['a condition']['given it'])} | unknown |",
            f"| the task, given its latent | {nats(case['manifold'])} | unknown |",
            "",
        ]
    for part, title in (
        ("bivariate", "correlation 0.8, x2 missing by x1"),
        ("six", "6 variables, five missing by the first"),
        ("by_own_value", "x2 missing by its own value"),
    ):
        if part in parts:
            lines += [
                f"| {title} | largest error of a coefficient | mean of each conditional's largest | within 0.03 | KL, "
                "nats a dimension (largest) | rounds | fit, CPU s |",
                "|---|---|---|---|---|---|---|",
            ]
            for label, found in rows_of(parts, part):
                spent = f"{found['rounds']} | {found['fit_cpu_s']:.0f}" if "rounds" in found else "– | –"
                errors = f"{found['largest_error']:.3f} | {found['mean_error']:.3f} | {found['within']:.0%}"
                lines.append(f"| {label} | {errors} | {found['kl']:.4f} ({found['largest_kl']:.4f}) | {spent} |")
            lines.append("")
            best = [(label, f["attainable"]) for label, f in rows_of(parts, part) if "attainable" in f]
            if best:
                lines += [
                    "| by the observed Fisher information | rows | largest standard error | largest error: median | "
                    "95 % | share of samples within 0.03 |",
                    "|---|---|---|---|---|---|",
                ]
            for label, f in best:
                figures = (f["largest_standard_error"], f["largest_error_median"], f["largest_error_95"])
                shown = " | ".join(f"{figure:.3f}" for figure in figures)
                lines.append(f"| {label} | {f['rows']:,} | {shown} | {f['within_bar']:.1%} |")
            if best:
                lines.append("")
            for label, found in rows_of(parts, part):
                for name, values in found.get("coefficients", {}).items():
                    shown = " / ".join(f"{value:.3f}" for value in values)
                    lines.append(f"{label}, {name}: {shown} (truth 0 / 0.8 / 0.6).  ")
            lines.append("")
    if "bent" in parts:
        lines += [
            "| y bent in x, missing by its own value | KL of y given x, nats | of x given y | mean of y | rounds | "
            "fit, CPU s |",
            "|---|---|---|---|---|---|",
        ]
        for label, found in rows_of(parts, "bent"):
            spent = f"{found['rounds']} | {found['fit_cpu_s']:.0f}" if "rounds" in found else "– | –"
            scores = " | ".join(f"{found[name]:.4f}" for name in ("y given x", "x given y", "mean of y"))
            lines.append(f"| {label} | {scores} | {spent} |")
        lines.append("")
    if "simulator" in parts:
        lines += [
            "| held-out log-density, nats | joint | x given y | y given x | effective of 32 proposals | fit, CPU s |",
            "|---|---|---|---|---|---|",
        ]
        for label, found in parts["simulator"].items():
            scores = " | ".join(f"{found[name]:.3f}" for name in ("joint", "x given y", "y given x"))
            effective = found.get("effective_proposals", NAN)
            shown = "–" if math.isnan(effective) else f"{effective:.1f}"
            lines.append(f"| {label} | {scores} | {shown} | {found['fit_cpu_s']:.0f} |")
        lines.append("")
    where = {name: str(value) for name, value in results["versions"].items() if name != "pyro_invman sources"}
    where |= {f"pyro_invman sources of {part}": sources for part, sources in results["sources"].items()}
    lines.append("Measured with: " + "; ".join(f"{name} {value}" for name, value in sorted(where.items())) + ".")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; the exit status is 1 where a bar is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.missing", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="of rows and fits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of process, rows and fits of `six`")
    parser.add_argument("--resume", action="store_true", help="keep the parts that the result holds already")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "missing.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"parts": {}}
    if arguments.resume and arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    results |= {"seed": arguments.seed, "versions": versions("invman"), "machine": machine()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        for seed in arguments.seeds if part == "six" else [arguments.seed]:
            found = PARTS[part](seed)
            results["parts"][part] = (
                {**results["parts"].get("six", {}), f"seed {seed}": found} if part == "six" else found
            )
            label = f"six, seed {seed}" if part == "six" else part
            results.setdefault("sources", {})[label] = results["versions"]["pyro_invman sources"]
            results["missed"] = missed(results["parts"])
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))
    for found in results["missed"]:
        print(f"missed: {found}", file=sys.stderr)
    return 1 if results["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
