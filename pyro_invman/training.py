"""Fitting: one loop for every learned part, seeded, resumable, stopped by held-out loss."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from pyro_invman.variables import DataError


class Schedule(NamedTuple):
    r"""How a network is trained: hidden (square) matrices by Muon, which orthogonalises their updates, the rest
    by AdamW.

    The learning rate rises over `warmup` steps and falls as a cosine over `steps`, or over the time allowed where that
    ends first. Every `evaluate_every` steps the running mean of the weights is scored on held-out rows; after
    `patience` scores without improvement it goes back to the best weights at a quarter of the rate, as often as there
    are `coolings`, and then training ends; the best weights are kept.

    What is None is chosen by the number of rows N (see `for_rows`): batches of N/4 rows, between 32 and 384; 2 N
    steps, between 600 and 12,000, a tenth of them (at most 200) to warm up; an evaluation about every 5 epochs, at
    most every 200 steps; a rate of 0.01 at batches of 384, falling with the square root of their size.

    References:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024.
        Loshchilov & Hutter, *Decoupled weight decay regularization*, ICLR 2019.
    """

    learning_rate: float | None = None
    weight_decay: float = 2e-2
    batch_size: int | None = None
    steps: int | None = None
    warmup: int | None = None
    evaluate_every: int | None = None
    patience: int = 12
    coolings: int = 0
    averaging: float = 0.998
    clip: float = 5.0

    def for_rows(self, num_rows: int) -> Plan:
        """The schedule with every choice made for `num_rows` rows."""
        batch = min(self.batch_size or min(max(num_rows // 4, 32), 384), num_rows)
        steps = self.steps if self.steps is not None else min(max(2 * num_rows, 600), 12_000)
        return Plan(
            learning_rate=self.learning_rate or 1e-2 * math.sqrt(batch / 384),
            batch_size=batch,
            steps=steps,
            warmup=max(1, min(200, steps // 10)) if self.warmup is None else max(1, self.warmup),
            evaluate_every=self.evaluate_every or min(max(round(5 * num_rows / batch), 20), 200),
        )


class Plan(NamedTuple):
    """What a schedule comes to for a given number of rows."""

    learning_rate: float
    batch_size: int
    steps: int
    warmup: int
    evaluate_every: int


class Record(NamedTuple):
    """One line of the history."""

    step: int
    train_loss: float
    validation_loss: float
    learning_rate: float
    seconds: float


class _Muon(torch.optim.Muon):
    """Torch's Muon with updates as large as AdamW's, orthogonalised in the precision of the weights.

    Torch does that in bfloat16, which takes twenty times as long on a processor without instructions for it. Matrices
    of one shape are orthogonalised together.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, weights, gradients, momenta)
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for size in {len(weight) for weight in weights}:
                alike = [i for i, weight in enumerate(weights) if len(weight) == size]
                update = _orthogonal(
                    torch.stack([ahead[i] for i in alike]), group["ns_coefficients"], group["ns_steps"]
                )
                rate = 0.2 * math.sqrt(size) * group["lr"]
                torch._foreach_add_([weights[i] for i in alike], list(update.unbind()), alpha=-rate)


def _orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Matrices (..., n, n) with their singular values moved to about one, by Newton–Schulz iterations."""
    a, b, c = coefficients
    found = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found


class _State:
    """All that a run is: what is saved, and what a resumed run goes on from."""

    def __init__(self, module: nn.Module, rate: float, decay: float, seed: int) -> None:
        self.module = module
        self.average = copy.deepcopy(module)
        self.best = {name: value.clone() for name, value in module.state_dict().items()}
        self.trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.averaged: list[Tensor] = [
            p for p, q in zip(self.average.parameters(), module.parameters(), strict=True) if q.requires_grad
        ]
        square = [p for p in self.trained if p.ndim == 2 and p.shape[0] == p.shape[1]]
        rest = [p for p in self.trained if not (p.ndim == 2 and p.shape[0] == p.shape[1])]
        self.optimizers: list[torch.optim.Optimizer] = []
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True))
        if square:
            self.optimizers.append(_Muon(square, lr=rate, weight_decay=decay))
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.stale, self.cooled, self.seconds, self.best_loss = 0, 0, 0, 0.0, math.inf
        self.running: list[float] = []
        self.history: list[Record] = []

    def cool(self) -> None:
        """Goes back to the best weights, from where smaller steps are taken."""
        self.module.load_state_dict(self.best)
        self.average.load_state_dict(self.best)
        self.stale, self.cooled = 0, self.cooled + 1

    def save(self, path: Path, fingerprint: str) -> None:
        """Writes the whole state to one file; a reader sees the old file or the new one, never a part."""
        tensors = {"generator": self.generator.get_state()}
        for prefix, state in (
            ("module", self.module.state_dict()),
            ("average", self.average.state_dict()),
            ("best", self.best),
        ):
            tensors |= {f"{prefix}/{name}": value for name, value in state.items()}
        for which, optimizer in enumerate(self.optimizers):
            for i, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{which}/{i}/{name}": torch.as_tensor(value) for name, value in moments.items()}
        scalars = {
            "step": self.step,
            "stale": self.stale,
            "cooled": self.cooled,
            "seconds": self.seconds,
            "best_loss": self.best_loss,
            "running": self.running,
            "history": [list(record) for record in self.history],
            "fingerprint": fingerprint,
        }
        tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        write_atomically(path, lambda part: save_file(tensors, part, metadata={"state": json.dumps(scalars)}))

    def load(self, path: Path, fingerprint: str) -> None:
        """Reads what `save` wrote."""
        try:
            with safe_open(path, framework="pt") as file:
                scalars = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise DataError(f"checkpoint {path}: cannot be read ({error}); delete it to start anew") from error
        if scalars.pop("fingerprint") != fingerprint:
            raise DataError(
                f"checkpoint {path} belongs to other data, settings or seed than this fit; resume with those it was "
                "started with, or delete it"
            )
        self.generator.set_state(tensors.pop("generator"))
        states: dict[str, dict[str, Tensor]] = {"module": {}, "average": {}, "best": {}}
        moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, value in tensors.items():
            prefix, _, rest = name.partition("/")
            if prefix == "optimizer":
                which, index, moment = rest.split("/")
                moments[int(which)].setdefault(int(index), {})[moment] = value
            else:
                states[prefix][rest] = value
        self.module.load_state_dict(states["module"])
        self.average.load_state_dict(states["average"])
        self.best = states["best"]
        for optimizer, moment_of in zip(self.optimizers, moments, strict=True):
            optimizer.load_state_dict({"state": moment_of, "param_groups": optimizer.state_dict()["param_groups"]})
        self.history = [Record(*line) for line in scalars.pop("history")]
        for name, value in scalars.items():
            setattr(self, name, value)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a neighbour of `path`, flushes it to disk and puts it in the place of `path` in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # one name: what a killed run left is overwritten
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@torch.enable_grad()
def train(
    module: nn.Module,
    loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor],
    validate: Callable[[nn.Module], float],
    num_rows: int,
    schedule: Schedule,
    *,
    seed: int = 0,
    max_seconds: float | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    fingerprint: str = "",
) -> list[Record]:
    """Trains `module` in place and returns the history.

    Arguments:
        loss: mean loss of the rows with the given indices (B,), drawing what it draws from the generator.
        validate: held-out loss of a module; it must be a function of the weights alone.
        num_rows: how many rows there are to index.
        max_seconds: wall time after which training ends, earlier runs of a resumed fit included.
        checkpoint: a file that is rewritten at every evaluation.
        resume: go on from `checkpoint` where it exists; otherwise it is overwritten.
        fingerprint: what data and settings the run belongs to; a checkpoint with another one is refused.
    """
    plan = schedule.for_rows(num_rows)
    state = _State(module, plan.learning_rate, schedule.weight_decay, seed)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and resume and path.exists():
        state.load(path, fingerprint)
    began = time.monotonic() - state.seconds
    if not state.history:
        _evaluate(state, validate, math.nan, 0.0, began)
    bar = tqdm(
        total=plan.steps,
        initial=state.step,
        disable=None if progress else True,
        file=sys.stderr,
        unit="step",
        leave=False,
    )
    while state.step < plan.steps and state.stale < schedule.patience:
        spent = state.step / plan.steps
        if max_seconds is not None:
            elapsed = time.monotonic() - began
            if elapsed >= max_seconds:
                break
            spent = max(spent, elapsed / max_seconds)
        rate = (
            plan.learning_rate
            * 0.25**state.cooled
            * min(1.0, (state.step + 1) / plan.warmup)
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * spent)))
        )
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        rows = torch.randint(num_rows, (plan.batch_size,), generator=state.generator)
        with torch.random.fork_rng(devices=[]):  # what is left out in a step depends on seed and step alone
            torch.manual_seed(seed + 1_000_003 * state.step)
            try:
                value = loss(module.train(), rows, state.generator)
            finally:  # a run that is interrupted must not go on leaving units out of its answers
                module.eval()
        if not torch.isfinite(value):
            raise FloatingPointError(f"training: the loss became {value.item()} at step {state.step + 1}")
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(state.trained, schedule.clip)
        for optimizer in state.optimizers:
            optimizer.step()
        state.step += 1
        state.running.append(value.item())
        with torch.no_grad():
            keep = min(schedule.averaging, (state.step + 1) / (state.step + 10))
            torch._foreach_lerp_(state.averaged, state.trained, 1 - keep)
        bar.update()
        if state.step % plan.evaluate_every == 0 or state.step == plan.steps:
            _evaluate(state, validate, sum(state.running) / len(state.running), rate, began)
            state.running = []
            if state.stale >= schedule.patience and state.cooled < schedule.coolings:
                state.cool()
            bar.set_postfix(held_out=f"{state.best_loss:.3f}")
            if path is not None:
                state.save(path, fingerprint)
    bar.close()
    if state.running:
        _evaluate(state, validate, sum(state.running) / len(state.running), rate, began)
    module.load_state_dict(state.best)
    return state.history


def _evaluate(
    state: _State, validate: Callable[[nn.Module], float], train_loss: float, rate: float, began: float
) -> None:
    state.average.eval()
    with torch.no_grad():
        held_out = validate(state.average)
    state.seconds = time.monotonic() - began
    state.history.append(Record(state.step, train_loss, held_out, rate, state.seconds))
    if held_out < state.best_loss:
        state.best_loss, state.stale = held_out, 0
        state.best = {name: value.clone() for name, value in state.average.state_dict().items()}
    else:
        state.stale += 1
