"""``demo``: an inverse problem from start to end, on a simulated process."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyro_invman.cli.fitting import held_out_report
from pyro_invman.cli.printed import LEVELS, answer, quantile_rows, say, table
from pyro_invman.data import to_tensor
from pyro_invman.joint import JointFlow


def demo(arguments: argparse.Namespace) -> None:
    """Fits a simulated laser-melting process and asks it an inverse question."""
    from pyro_invman import plots
    from pyro_invman.simulators import melt_pool

    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    tracks = arguments.tracks
    say(f"Simulating 40 alloys × machines, {tracks} tracks each; cells are missing as they are in practice.")
    ds = melt_pool.simulate(40, tracks, seed=arguments.seed)
    whole = melt_pool.simulate(40, tracks, seed=arguments.seed, missing=False, reveal_hidden=1.0)
    order = torch.randperm(ds.sizes["row"], generator=torch.Generator().manual_seed(arguments.seed)).numpy()
    held_out, training = order[: len(order) // 10], order[len(order) // 10 :]
    train, test = ds.isel(row=training), ds.isel(row=held_out)
    missing = float(sum(int(ds[name].isnull().sum()) for name in ds.data_vars)) / (len(ds.data_vars) * ds.sizes["row"])
    say(f"{len(training)} rows to learn from, {missing:.0%} of all cells missing; fitting for {arguments.seconds:g} s.")
    flow = JointFlow.from_dataset(train, seed=arguments.seed)
    history = flow.fit(train, seed=arguments.seed, max_seconds=arguments.seconds)
    flow.save(out / "model")

    # a held-out track of which only the width was measured: which settings made it?
    seen = to_tensor(test, flow.variables)
    truth = to_tensor(whole.isel(row=held_out), flow.variables)
    names = list(flow.variables.with_role("parameter")[:2])
    names = [n for n in ("power_W", "speed_mm_s", "beam_um", "layer_um") if n in flow.variables.names] or names
    width = flow.variables.index("width_um")
    conditions = list(flow.variables.with_role("condition"))
    row = int((~seen[:, width].isnan()).nonzero()[0, 0])
    known = {name: truth[row, flow.variables.index(name)] for name in (*conditions, "width_um")}
    torch.manual_seed(arguments.seed)
    after = flow.conditional(names, known).sample(torch.Size((4000,)))
    before = flow.conditional(names, {name: known[name] for name in conditions}).sample(torch.Size((4000,)))
    right = [float(truth[row, flow.variables.index(name)]) for name in names]
    rows = quantile_rows(flow.variables, names, after)
    for line, prior, value in zip(rows, quantile_rows(flow.variables, names, before), right, strict=True):
        line["before: 5 %"], line["before: 95 %"], line["truth"] = prior["5 %"], prior["95 %"], value
    held_out_scores = held_out_report(flow, test)

    units = [flow.variables[flow.variables.index(name)].units for name in names]
    plots.save(plots.corner(after.numpy(), names, units, right, before.numpy()), out / "posterior.png")
    plots.save(plots.history(history), out / "history.png")
    depth = flow.variables.index("depth_um")
    measured = (~seen[:, depth].isnan()).nonzero()[:, 0]
    context = {v.name: seen[measured, j] for j, v in enumerate(flow.variables) if v.role != "observation"}
    draws = flow.conditional(["depth_um"], context).sample(torch.Size((1000,)))[..., 0]
    quantiles = draws.double().quantile(torch.tensor(LEVELS, dtype=torch.float64), dim=0)
    plots.save(
        plots.predictive(seen[measured, depth].numpy(), quantiles.numpy(), "depth_um", "um", log=True),
        out / "predictive.png",
    )
    report = {
        "question": f"Which settings made a pool {float(known['width_um']):.0f} µm wide in this alloy?",
        "answer": rows,
        "held_out": held_out_scores,
        "folder": str(out),
    }
    answer(report, arguments.json, lambda: _text(report, arguments.prog))


def _text(report: Mapping[str, Any], prog: str) -> str:
    ask = f"  {prog} infer {report['folder']}/model"
    return "\n".join([
        "",
        f"{report['question']} (nothing else measured)",
        "",
        table(report["answer"]),
        "",
        "Held-out rows, each variable given the rest of its row; log loss in nats a cell, of standardised values:",
        "",
        table(report["held_out"]),
        "",
        f"Pictures and the model are in {report['folder']}/. Next, ask it something else:",
        f"{ask} --given depth_um=120,width_um=150 --targets power_W,speed_mm_s",
        f"{ask} --given power_W=200,speed_mm_s=800 --targets depth_um",
        f"or start on your own table: {prog} describe --help",
    ])  # fmt: skip
