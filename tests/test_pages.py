"""The code of the pages runs as it stands there, in a short form, and gives what the text around it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
QUICK = "schedule=pim.Schedule(steps=20), progress=False"


def run(text: str, short: dict[str, str], space: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs the Python blocks of `text` one after the other, each of `short` put in place of what it is short for."""
    code = "\n".join(BLOCK.findall(text))
    for long, quick in short.items():
        assert long in code, f"{long!r} is no longer there"
        code = code.replace(long, quick)
    space = {} if space is None else space
    pyro.set_rng_seed(0)
    exec(compile(code, "page", "exec"), space)
    return space


def sections(page: str) -> dict[str, str]:
    """Text by heading of the second level."""
    parts = re.split(r"^## (.*)\n", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def ours(text: str) -> str:
    """The blocks that say that they are this package's."""
    return "\n".join(f"```python\n{code}```" for code in BLOCK.findall(text) if code.startswith("# pyro_invman"))


ELSEWHERE = sections("docs/coming_from.md")


def test_every_section_of_coming_from_stands_side_by_side() -> None:
    for name, text in ELSEWHERE.items():
        theirs, here = BLOCK.findall(text)
        assert theirs.startswith(f"# {name}") and here.startswith("# pyro_invman"), name


def test_coming_from_sbi() -> None:
    found = run(ours(ELSEWHERE["sbi"]), {"flow.fit(ds)": f"flow.fit(ds, {QUICK})"})
    draws = found["draws"]
    assert draws.shape == (1000, 2) and found["log_prob"].shape == (1000,)
    torch.testing.assert_close(draws.mean(0), torch.zeros(2), atol=0.1, rtol=0)  # N(0, .3²) in each, by symmetry
    torch.testing.assert_close(draws.std(0), torch.full((2,), 0.3), atol=0.1, rtol=0)


def test_coming_from_bayesflow() -> None:
    found = run(ours(ELSEWHERE["BayesFlow"]), {"manifold.fit(ds)": f"manifold.fit(ds, {QUICK})"})
    assert found["latent"].shape == (1000, 1)
    forward = found["forward"]  # of y at x = 1, where a line of slope 1 ± .5 was seen to be .9 at .5, ± .1
    precision = 1 / 0.5**2 + 0.5**2 / 0.1**2
    slope = (1 / 0.5**2 + 0.5 * 0.9 / 0.1**2) / precision
    assert abs(float(forward.mean) - slope) < 0.35
    assert float(forward.variance) ** 0.5 == pytest.approx((1 / precision + 0.1**2) ** 0.5, rel=0.4)


def test_coming_from_pyro() -> None:
    """Both blocks, since Pyro is here: ours takes the model that was written for the other as it is."""
    found = run(ELSEWHERE["pyro.contrib.oed"], {"num_steps=500": "num_steps=20"})["found"]
    exact = 0.5 * torch.log1p(torch.tensor([0.5, 1.0, 3.0]).double() ** 2)
    assert (torch.tensor(found.lower.values) <= exact).all() and (exact <= torch.tensor(found.upper.values)).all()


def test_code_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    short = {
        "flow.fit(ds, max_seconds=20": f"flow.fit(ds, {QUICK}",
        "num_samples=200, warmup_steps=100": "num_samples=10, warmup_steps=5",
        "manifold.fit(alloys, max_seconds=60)": f"manifold.fit(alloys, {QUICK})",
        "simulate(num_tasks=60": "simulate(num_tasks=10",
        "pim.Schedule(steps=200))": "pim.Schedule(steps=3), progress=False)",
        "torch.rand(2000, 1), torch.rand(2000, 1)": "torch.rand(300, 1), torch.rand(300, 1)",
        "torch.randn(2000, 2), 1 + c1 + (1 + c1)": "torch.randn(300, 2), 1 + c1 + (1 + c1)",
        "c1) * torch.randn(2000, 2)": "c1) * torch.randn(300, 2)",
        "max_seconds=5": "num_samples=2000",
        "max_seconds=30": "num_starts=2, num_steps=5",
        "mechanism=recorded": "completion=pim.Completion(rounds=1, steps=5, proposals=4), mechanism=recorded",
    }
    found = run((ROOT / "README.md").read_text(encoding="utf-8"), short)
    eig = found["told"].eig.values
    assert eig[0] > eig[1], "three different doses tell more than one three times"
    best = found["best"]
    assert float(best.lower) <= float(best.eig) <= float(best.upper)
    assert ((best.design >= 0.1) & (best.design <= 10)).all()
    assert not re.search(r"\bnan\b", capsys.readouterr().out)
