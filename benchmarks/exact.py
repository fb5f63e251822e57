r"""The learned density beside the exact one, where there is one: ``python -m benchmarks.exact``.

A linear-Gaussian process of D = 8 variables, 20,000 rows of which half the cells are missing; every conditional is a
closed form. A flow is fitted with its defaults and asked the queries of a fixed law.

The law of queries (256 queries, seed 7; it is never changed):

* the number of targets n is uniform on 1 … D, the number of given cells uniform on 0 … D − n;
* which variables these are is the head of a uniform permutation of the D variables: targets first, then given;
* the given values are those of a row drawn from the joint, one row a query.

Measured over it, in nats per target dimension:

* divergence: :math:`KL(p(t \mid g) \,\|\, q(t \mid g)) / n`, the mean of :math:`\log p - \log q` over 4,000 exact draws
  a query in antithetic pairs, averaged over queries; bar 0.02;
* disagreement between orders, over the queries with n > 1: each of 64 exact draws is scored along 8 random orders of
  the chain; the standard deviation of the 8 log-densities (and their mean absolute deviation), over n, averaged over
  draws and queries; bar 0.02;
* total probability, on queries of the law cut down to their first one (64 queries) or two (16 queries) targets: a
  trapezoid rule over ± 10 exact conditional standard deviations, with 8,001 and 401² points; bar 1 ± 0.001, for each.

The bars are for cells missing completely at random. Beside it stands a variant without bars, missing at random given an
always observed variable, for which `fit` makes no promise: where that variable is not among the given cells, the rows
that show the others are a biased choice.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.sbi import ROOT, machine, versions
from pyro_invman import JointFlow
from pyro_invman.data import to_tensor
from pyro_invman.simulators.linear_gaussian import LinearGaussian

ROWS, MISSING = 20_000, 0.5
QUERIES, QUERY_SEED = 256, 7
DRAWS = 4_000
ORDERS, SCORED = 8, 64
ONE_DIMENSIONAL, TWO_DIMENSIONAL = 64, 16
BARS = {"kl_per_dimension": 0.02, "orders_sd_per_dimension": 0.02, "probability_error": 1e-3}


class Query(NamedTuple):
    """Names of the targets, and given cells by name."""

    targets: list[str]
    given: dict[str, Tensor]


def law(process: LinearGaussian, number: int = QUERIES, seed: int = QUERY_SEED) -> list[Query]:
    """The first `number` queries of the law in the module's docstring."""
    generator = torch.Generator().manual_seed(seed)
    names, dim = process.variables.names, len(process.variables)
    rows = to_tensor(process.sample(number, seed), process.variables)
    queries = []
    for row in rows:
        targets = int(torch.randint(1, dim + 1, (), generator=generator))
        given = int(torch.randint(dim - targets + 1, (), generator=generator))
        order = torch.randperm(dim, generator=generator).tolist()
        known = {names[j]: row[j] for j in order[targets : targets + given]}
        queries.append(Query([names[j] for j in order[:targets]], known))
    return queries


def divergence(process: LinearGaussian, flow: JointFlow, queries: Sequence[Query]) -> Tensor:
    """KL per target dimension of each query (Q,)."""
    found = []
    with torch.no_grad():
        for q, (targets, given) in enumerate(queries):
            d = flow.conditional(targets, given)
            found.append(process.kl_conditional(targets, given, d, DRAWS, seed=q) / len(targets))
    return torch.stack(found)


def disagreement(process: LinearGaussian, flow: JointFlow, queries: Sequence[Query]) -> tuple[Tensor, Tensor]:
    """Standard and mean absolute deviation between orders per target dimension, of each query with n > 1."""
    generator = torch.Generator().manual_seed(QUERY_SEED)
    spread, absolute = [], []
    density, dtype = flow.density, flow.density.dtype
    for targets, given in queries:
        if len(targets) < 2:
            continue
        exact = process.conditional(targets, given)
        noise = torch.randn(SCORED, len(targets), generator=generator, dtype=torch.float64)
        draws = exact.loc + noise @ exact.scale_tril.mT
        row = torch.full((len(flow.variables),), torch.nan, dtype=torch.float64)
        for name, cell in given.items():
            row[flow.variables.index(name)] = cell
        columns = flow.variables.indices(targets)
        working = flow.standardization(draws, index=columns).to(dtype)
        known, row = ~row.isnan(), flow.standardization(row).nan_to_num(0.0).to(dtype)
        scores = []
        with torch.no_grad():
            for _ in range(ORDERS):
                order = torch.randperm(len(targets), generator=generator)
                chain = [columns[k] for k in order]
                scores.append(density.log_prob(row, known, chain, working[:, order]).double())
        by_order = torch.stack(scores)
        spread.append(by_order.std(0).mean() / len(targets))
        absolute.append((by_order - by_order.mean(0)).abs().mean() / len(targets))
    return torch.stack(spread), torch.stack(absolute)


def probability(process: LinearGaussian, flow: JointFlow, queries: Sequence[Query], targets: int) -> Tensor:
    """Total probability (Q,) of each query cut down to its first one or two targets."""
    points = {1: 8_001, 2: 401}[targets]
    totals = []
    for query in queries:
        asked = query.targets[:targets]
        exact = process.conditional(asked, query.given)
        axes = [m + s * torch.linspace(-10, 10, points).double() for m, s in zip(exact.loc, exact.stddev, strict=True)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        with torch.no_grad():
            d = flow.conditional(asked, query.given)
            mass = torch.cat([d.log_prob(part) for part in grid.split(50)]).double().exp()
        for axis in reversed(axes):
            mass = torch.trapezoid(mass, axis, dim=-1)
        totals.append(mass)
    return torch.stack(totals)


def measure(mechanism: str, seed: int, max_seconds: float | None) -> dict[str, Any]:
    """Fits one flow to rows of the process and scores it."""
    process = LinearGaussian.random(num_parameters=4, num_observations=4, seed=seed)
    driver = process.variables.names[0]
    ds = process.sample(ROWS, seed + 1, missing=MISSING, mechanism=mechanism, driver=driver)
    values, queries = to_tensor(ds, process.variables), law(process)
    flow = JointFlow.from_dataset(ds, seed=seed)
    base = divergence(process, flow, queries)
    began, cpu = time.monotonic(), time.process_time()
    history = flow.fit(ds, seed=seed, max_seconds=max_seconds, progress=False)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    kl = divergence(process, flow, queries)
    spread, absolute = disagreement(process, flow, queries)
    single = [query for query in queries if query.targets][:ONE_DIMENSIONAL]
    pairs = [query for query in queries if len(query.targets) > 1][:TWO_DIMENSIONAL]
    masses = torch.cat([probability(process, flow, single, 1), probability(process, flow, pairs, 2)])
    with_driver = torch.tensor([driver in query.given for query in queries])

    def summary(per_query: Tensor) -> dict[str, float]:
        error = per_query.std() / len(per_query) ** 0.5
        return {"mean": per_query.mean().item(), "std_error": error.item(), "largest": per_query.max().item()}

    return {
        "missing_share": values.isnan().double().mean().item(),
        "fit": {"wall_s": wall, "cpu_s": cpu, "steps": int(history.step[-1])},
        "kl_per_dimension": summary(kl),
        "kl_per_dimension_of_base": summary(base),
        "kl_per_dimension_driver_given": summary(kl[with_driver]),
        "kl_per_dimension_driver_not_given": summary(kl[~with_driver]),
        "orders_sd_per_dimension": summary(spread),
        "orders_mean_absolute_per_dimension": summary(absolute),
        "probability_error": summary((masses - 1).abs()),
    }


def missed(found: dict[str, Any]) -> list[str]:
    """What does not reach its bar: means, and for total probability the largest error."""
    return [
        f"{name}: found {found[name][part]:.4g}, bar {bar:g}"
        for name, bar in BARS.items()
        for part in ["largest" if name == "probability_error" else "mean"]
        if not found[name][part] <= bar
    ]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = {
        "KL(exact ‖ learned), nats per target dimension": "kl_per_dimension",
        "… where the first variable is given": "kl_per_dimension_driver_given",
        "… where it is not": "kl_per_dimension_driver_not_given",
        "… of the Gaussian base before training": "kl_per_dimension_of_base",
        "disagreement between orders, standard deviation per dimension": "orders_sd_per_dimension",
        "… mean absolute deviation": "orders_mean_absolute_per_dimension",
        "error of the total probability": "probability_error",
    }
    cases = results["cases"]
    lines = [
        f"Linear-Gaussian, D = 8, {ROWS:,} rows, {QUERIES} queries; one thread; mean ± standard error (largest).",
        "",
        "| | bar | " + " | ".join(f"missing {mechanism.replace('_', ' ')}" for mechanism in cases) + " |",
        "|---|---|" + "---|" * len(cases),
    ]
    for label, name in rows.items():
        cells = [case[name] for case in cases.values()]
        bar = f"{BARS[name]:g}" if name in BARS else "–"
        shown = [f"{c['mean']:.2g} ± {c['std_error']:.1g} ({c['largest']:.2g})" for c in cells]
        lines.append(f"| {label} | {bar} | " + " | ".join(shown) + " |")
    lines.append("| fit, CPU s (steps) | – | " + " | ".join(
        f"{case['fit']['cpu_s']:.0f} ({case['fit']['steps']:,})" for case in cases.values()
    ) + " |")  # fmt: skip
    where = {name: str(value) for name, value in results["versions"].items()}
    where["machine"] = f"{results['machine']['cpu']}, {results['machine']['cores']} cores"
    lines += [
        "",
        "Bars are for cells missing completely at random; that of total probability is for the largest error.",
    ]
    lines += ["", "Measured with: " + "; ".join(f"{name} {value}" for name, value in sorted(where.items())) + "."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 where a bar is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.exact", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the process, its rows and the fit")
    parser.add_argument("--max-seconds", type=float, help="wall seconds a fit may take (no limit)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "exact.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "seed": arguments.seed,
        "max_seconds": arguments.max_seconds,
        "bars": BARS,
        "versions": versions("invman"),  # before the fits, should a source change meanwhile
        "cases": {
            mechanism: measure(mechanism, arguments.seed, arguments.max_seconds)
            for mechanism in ("completely_at_random", "at_random")
        },
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    results["missed"] = missed(results["cases"]["completely_at_random"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    part = arguments.out.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, arguments.out)
    text = table(results)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    for line in results["missed"]:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if results["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
