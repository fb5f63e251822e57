"""``fingerprint``: what rows of a task say of it as a whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pyro_invman.cli.printed import answer, plain, say, table
from pyro_invman.cli.project import project_of
from pyro_invman.cli.questions import asked_task, model_of
from pyro_invman.tasks.manifold import ProcessManifold
from pyro_invman.variables import DataError


def fingerprint(arguments: argparse.Namespace) -> None:
    """Whether a task belongs to what was learned, which known tasks it is like, and where its latent lies."""
    manifold: ProcessManifold = model_of(arguments.model, ProcessManifold)
    project = project_of(arguments, arguments.model)
    if not arguments.rows:
        raise DataError("fingerprint: found no --rows, expected a table with rows of the task")
    task, rows = asked_task(manifold, arguments, project)
    if rows is None or not rows.sizes["row"]:
        raise DataError(f"{arguments.rows}: found no row, expected some of the task")
    found = manifold.fingerprint(task)
    p_value = manifold.typicality(rows, seed=arguments.seed)
    own = arguments.of if arguments.of in manifold.memory.names else None
    alike = [each for each in manifold.nearest(task, arguments.nearest + 1) if each.task != own][: arguments.nearest]
    latent = [
        {"latent": f"z{k + 1}", "units": "prior sd", "mean": float(mean), "sd": float(sd)}
        for k, (mean, sd) in enumerate(zip(found.mean, found.covariance.diagonal().sqrt(), strict=True))
    ]
    report: dict[str, Any] = {
        "rows": rows.sizes["row"],
        "typicality": p_value,
        "belongs": task.belongs,
        "information_nats": found.information,
        "nearest": [{"task": each.task, "likeness": each.similarity} for each in alike],
        "latent": latent,
    }
    if own is not None:
        say(f"{own} is among the tasks that were learned from; it is left out of its own neighbours")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    answer(report, arguments.json, lambda: _text(report))


def _text(report: dict[str, Any]) -> str:
    p = report["typicality"]
    verdict = "like those that were learned" if p > 0.05 else "unlike what was learned: trust answers about it less"
    return "\n".join([
        f"{report['rows']} rows, which tell {report['information_nats']:.2f} nats of the task",
        f"typicality p = {p:.3g}: {verdict}",
        "",
        "Known tasks by likeness (0: nothing in common or nothing known, 1: the same):",
        table([each | {"likeness": round(each["likeness"], 3)} for each in report["nearest"]]),
        "",
        "Its latent (before any row: mean 0, sd 1):",
        table(report["latent"]),
    ])  # fmt: skip
