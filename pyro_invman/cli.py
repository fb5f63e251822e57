"""The command line: ``python -m pyro_invman demo | fit | infer | impute``."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_invman.data import read, to_tensor
from pyro_invman.joint import JointFlow
from pyro_invman.saved import load
from pyro_invman.variables import DataError, Variables

if TYPE_CHECKING:
    import xarray as xr

_LEVELS = (0.05, 0.5, 0.95)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, or 1 with one line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (DataError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if arguments.debug:
            raise
        print(f"invman {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


# ---------------------------------------------------------------------------------------------- commands
def _fit(arguments: argparse.Namespace) -> None:
    settings = _settings(arguments)
    ds = read(arguments.table, **settings, sep=arguments.sep, decimal=arguments.decimal, encoding=arguments.encoding)
    _say(f"{arguments.table}: {ds.sizes['row']} rows, {len(ds.data_vars)} variables; left out: {ds.attrs['left_out']}")
    order = torch.randperm(ds.sizes["row"], generator=torch.Generator().manual_seed(arguments.seed))
    count = round(arguments.test_share * len(order))
    training, held_out = ds.isel(row=order[count:].numpy()), ds.isel(row=order[:count].numpy())
    flow = JointFlow.from_dataset(training, seed=arguments.seed)
    checkpoint = Path(arguments.out) / "checkpoint.safetensors"
    history = flow.fit(training, arguments.seed, arguments.max_seconds, checkpoint=checkpoint, resume=arguments.resume)
    flow.save(arguments.out)
    checkpoint.unlink(missing_ok=True)
    report: dict[str, Any] = {"model": str(arguments.out), "steps": int(history.step[-1]), "held_out_rows": count}
    if count:
        report["held_out"] = held_out_report(flow, held_out, training)
    _print(report, arguments.json, lambda: _fit_text(report))


def _flow(folder: str) -> JointFlow:
    model = load(folder)
    if not isinstance(model, JointFlow):
        raise DataError(f"{folder}: holds a {type(model).__name__}, expected a JointFlow")
    return model


def _infer(arguments: argparse.Namespace) -> None:
    flow = _flow(arguments.model)
    given = _pairs(arguments.given, "given")
    known = {name: _value(flow.variables, name, text) for name, text in given.items()}
    targets = [name.strip() for name in arguments.targets.split(",") if name.strip()]
    torch.manual_seed(arguments.seed)
    draws = flow.conditional(targets, known).sample(torch.Size((arguments.num_samples,)))
    rows = quantile_rows(flow.variables, targets, draws)
    if arguments.out:
        lines = [",".join(targets), *(",".join(f"{v:.8g}" for v in row) for row in draws.tolist())]
        Path(arguments.out).write_text("\n".join(lines) + "\n")
    _print({"given": given, "targets": rows}, arguments.json, lambda: _table(rows))


def _impute(arguments: argparse.Namespace) -> None:
    flow = _flow(arguments.model)
    roles = {v.name: v.role for v in flow.variables}
    ds = read(
        arguments.table,
        roles=roles,
        units={v.name: v.units for v in flow.variables},
        supports={
            v.name: ("interval", v.lower, v.upper) if v.support == "interval" else v.support for v in flow.variables
        },
        levels={v.name: v.levels for v in flow.variables if v.discrete},
        training=False,
        sep=arguments.sep,
        decimal=arguments.decimal,
        encoding=arguments.encoding,
    )
    filled = flow.impute(ds, arguments.num_samples, seed=arguments.seed)
    frame = filled.to_dataframe()
    for v in flow.variables:
        if v.discrete:
            frame[v.name] = [v.levels[int(code)] for code in frame[v.name]]
    frame.to_csv(arguments.out)
    _say(f"{arguments.out}: {arguments.num_samples} completed copies of {ds.sizes['row']} rows")


def _demo(arguments: argparse.Namespace) -> None:
    from pyro_invman import plots
    from pyro_invman.simulators import melt_pool

    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    _say("Simulating 40 alloys × machines, 60 tracks each; cells are missing as they are in practice.")
    ds = melt_pool.simulate(40, 60, seed=arguments.seed)
    whole = melt_pool.simulate(40, 60, seed=arguments.seed, missing=False, reveal_hidden=1.0)
    order = torch.randperm(ds.sizes["row"], generator=torch.Generator().manual_seed(arguments.seed)).numpy()
    held_out, training = order[:240], order[240:]
    train, test = ds.isel(row=training), ds.isel(row=held_out)
    missing = float(sum(int(ds[name].isnull().sum()) for name in ds.data_vars)) / (len(ds.data_vars) * ds.sizes["row"])
    _say(
        f"{len(training)} rows to learn from, {missing:.0%} of all cells missing; fitting for {arguments.seconds:g} s."
    )
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
    print(
        f"\nWhich settings made a pool {float(known['width_um']):.0f} µm wide in this alloy? (nothing else measured)\n"
    )
    print(_table(rows))
    print("\nHeld-out rows, each variable given the rest of its row:\n")
    print(_table(held_out_report(flow, test, train)))

    units = [flow.variables[flow.variables.index(name)].units for name in names]
    plots.save(plots.corner(after.numpy(), names, units, right, before.numpy()), out / "posterior.png")
    plots.save(plots.history(history), out / "history.png")
    depth = flow.variables.index("depth_um")
    measured = (~seen[:, depth].isnan()).nonzero()[:, 0]
    context = {v.name: seen[measured, j] for j, v in enumerate(flow.variables) if v.role != "observation"}
    draws = flow.conditional(["depth_um"], context).sample(torch.Size((1000,)))[..., 0]
    quantiles = draws.double().quantile(torch.tensor(_LEVELS, dtype=torch.float64), dim=0)
    plots.save(
        plots.predictive(seen[measured, depth].numpy(), quantiles.numpy(), "depth_um", "um", log=True),
        out / "predictive.png",
    )
    print(f"\nPictures and the model are in {out}/. Next, ask it something else:")
    print(
        f"  python -m pyro_invman infer {out / 'model'} --given depth_um=120,width_um=150 --targets power_W,speed_mm_s"
    )
    print(f"  python -m pyro_invman infer {out / 'model'} --given power_W=200,speed_mm_s=800 --targets depth_um")
    print("or fit your own table: python -m pyro_invman fit --help")


# ---------------------------------------------------------------------------------------------- what is reported
def held_out_report(flow: JointFlow, held_out: xr.Dataset, training: xr.Dataset) -> list[dict[str, Any]]:
    """For each variable, over held-out rows that show it: log loss given the rest of the row, in nats, in units of the
    training rows' standard deviation in working coordinates, beside that of knowing nothing (its own learned marginal),
    and the share of truths inside the central 90 % interval."""
    values = to_tensor(held_out, flow.variables)
    scores = []
    for column, variable in enumerate(flow.variables):
        shown = values[~values[:, column].isnan()]
        if not len(shown):
            continue
        rest = {v.name: shown[:, j] for j, v in enumerate(flow.variables) if j != column}
        target = shown[:, column : column + 1]
        with torch.no_grad():
            informed, alone = flow.conditional([variable.name], rest), flow.conditional([variable.name])
            unit = (
                0.0 if variable.discrete else flow.standardization.log_abs_det_jacobian(target, index=[column]).mean()
            )
            line: dict[str, Any] = {
                "variable": variable.name,
                "rows": len(shown),
                "log loss": float(-informed.log_prob(target).mean() + unit),
                "knowing nothing": float(-alone.log_prob(target).mean() + unit),
                "90 % coverage": math.nan,
            }
            if not variable.discrete:
                draws = informed.sample(torch.Size((500,)))
                low, high = draws.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
                line["90 % coverage"] = float(((target >= low) & (target <= high)).double().mean())
        scores.append(line)
    cells = [line for line in scores if not math.isnan(line["90 % coverage"])]
    total = sum(line["rows"] for line in cells)
    if total:
        means = {
            key: sum(line["rows"] * line[key] for line in cells) / total
            for key in ("log loss", "knowing nothing", "90 % coverage")
        }
        scores.append({"variable": "all numbers", "rows": total, **means})
    return scores


def quantile_rows(variables: Variables, targets: Sequence[str], draws: Tensor) -> list[dict[str, Any]]:
    """Median and 90 % interval of each target (shares of the levels, where it is categorical)."""
    rows: list[dict[str, Any]] = []
    for k, name in enumerate(targets):
        variable = variables[variables.index(name)]
        if variable.discrete:
            shares = torch.bincount(draws[..., k].long(), minlength=len(variable.levels)) / len(draws)
            likely = shares.argsort(descending=True)[:3].tolist()
            text = ", ".join(f"{variable.levels[c]} {shares[c]:.0%}" for c in likely)
            rows.append({"target": name, "units": "", "5 %": "", "median": text, "95 %": ""})
            continue
        low, middle, high = draws[..., k].double().quantile(torch.tensor(_LEVELS, dtype=torch.float64)).tolist()
        rows.append({"target": name, "units": variable.units, "5 %": low, "median": middle, "95 %": high})
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = list(rows[0])
    cells = [[f"{row[h]:.4g}" if isinstance(row[h], float) else str(row[h]) for h in heads] for row in rows]
    widths = [max(len(h), *(len(line[k]) for line in cells)) for k, h in enumerate(heads)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in [heads, *cells]]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _fit_text(report: Mapping[str, Any]) -> str:
    head = f"model: {report['model']}   steps: {report['steps']}   held-out rows: {report['held_out_rows']}"
    if "held_out" not in report:
        return head
    return (
        f"{head}\n\nEach variable given the rest of its row, on rows that were kept from the fit;\n"
        f"log loss in nats a cell, of standardised values:\n\n{_table(report['held_out'])}"
    )


def _print(report: Mapping[str, Any], as_json: bool, text: Any) -> None:
    print(json.dumps(report, indent=1) if as_json else text())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- what is asked
def _pairs(text: str | None, what: str) -> dict[str, str]:
    pairs = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise DataError(f"--{what}: found {part!r}, expected name=value, separated by commas")
        pairs[name.strip()] = value.strip()
    return pairs


def _value(variables: Variables, name: str, text: str) -> float | str:
    if variables[variables.index(name)].discrete:
        return text
    try:
        return float(text)
    except ValueError as error:
        raise DataError(f"--given {name}: found {text!r}, expected a number") from error


def _support(name: str, text: str) -> Any:
    kind, *ends = text.split(":")
    if kind != "interval":
        return text
    try:
        lower, upper = map(float, ends)
    except ValueError as error:
        raise DataError(f"--supports {name}: found {text!r}, expected interval:LOWER:UPPER") from error
    return ("interval", lower, upper)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Roles, units, supports, task and source columns: from the project file, then from the options."""
    project: dict[str, Any] = {}
    if arguments.project:
        try:
            project = tomllib.loads(Path(arguments.project).read_text())
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{arguments.project}: not a TOML file ({error})") from error
    roles = {**project.get("roles", {}), **_pairs(arguments.roles, "roles")}
    supports = {**project.get("supports", {}), **_pairs(arguments.supports, "supports")}
    if not roles:
        raise DataError("no roles: name them by --roles column=parameter,… or in a project file")
    return {
        "roles": roles,
        "units": {**project.get("units", {}), **_pairs(arguments.units, "units")},
        "supports": {name: _support(name, text) for name, text in supports.items()},
        "task": arguments.task or project.get("task"),
        "source": arguments.source or project.get("source"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m pyro_invman", description="Inverse problems, learned from incomplete tables."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, epilog=f"example:\n  python -m pyro_invman {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument("--seed", type=int, default=0)
        return command

    def reads(command: argparse.ArgumentParser) -> None:
        command.add_argument("--sep", default=",", help="what separates the cells of a .csv")
        command.add_argument("--decimal", default=".", help="the decimal mark of a .csv")
        command.add_argument("--encoding", default="utf-8")

    demo = add("demo", _demo, "fit a simulated laser-melting process and ask it an inverse question", "demo --out demo")
    demo.add_argument("--out", default="demo")
    demo.add_argument("--seconds", type=float, default=75.0, help="wall time of the fit")

    fit = add(
        "fit", _fit, "learn one joint density from a table with holes",
        "fit runs.csv --roles power_W=parameter,depth_um=observation --supports power_W=positive --out model",
    )  # fmt: skip
    fit.add_argument("table")
    fit.add_argument("--out", required=True, help="folder of the model")
    fit.add_argument("--project", help="TOML file with tables [roles], [units], [supports] and keys task, source")
    fit.add_argument("--roles", help="column=parameter|observation|condition,…")
    fit.add_argument("--supports", help="column=real|positive|categorical|interval:LOWER:UPPER,…")
    fit.add_argument("--units", help="column=units,…")
    fit.add_argument("--task", help="column that names the task")
    fit.add_argument("--source", help="column that names the source")
    fit.add_argument("--max-seconds", type=float)
    fit.add_argument("--test-share", type=float, default=0.1, help="rows kept from the fit, for the report")
    fit.add_argument("--resume", action="store_true", help="go on with a fit that was interrupted")
    fit.add_argument("--json", action="store_true")
    reads(fit)

    infer = add(
        "infer", _infer, "p(targets | given): median and 90 %% interval",
        "infer model --given depth_um=120 --targets power_W,speed_mm_s",
    )  # fmt: skip
    infer.add_argument("model")
    infer.add_argument("--given", help="name=value,…; what is not named is unknown")
    infer.add_argument("--targets", required=True, help="name,…")
    infer.add_argument("--num-samples", type=int, default=2000)
    infer.add_argument("--out", help=".csv for the draws")
    infer.add_argument("--json", action="store_true")

    impute = add(
        "impute", _impute, "complete a table's missing cells by draws", "impute model runs.csv --out filled.csv"
    )
    impute.add_argument("model")
    impute.add_argument("table")
    impute.add_argument("--out", required=True, help=".csv with one completed copy a draw")
    impute.add_argument("--num-samples", type=int, default=20)
    reads(impute)
    return parser
