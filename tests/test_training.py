"""The loop that fits: seeded, stopped by held-out loss and by the clock, never torn, resumed as if undisturbed."""

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyro_invman.training import Record, Schedule, _Muon, train, write_atomically
from pyro_invman.variables import DataError

ROOT = Path(__file__).resolve().parents[1]
X = torch.linspace(-2, 2, 256).unsqueeze(-1)
Y = (2 * X).sin()
SHORT = Schedule(learning_rate=1e-2, batch_size=32, steps=60, warmup=5, evaluate_every=10, averaging=0.9)


def network(seed: int = 0) -> nn.Module:
    """One square matrix, which Muon trains, and others, which AdamW does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def loss(module: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
    noise = 0.1 * torch.randn(len(rows), 1, generator=generator)
    return (module(X[rows]) - Y[rows] - noise).square().mean()


def held_out(module: nn.Module) -> float:
    return (module(X) - Y).square().mean().item()


def run(module: nn.Module | None = None, schedule: Schedule = SHORT, **settings) -> tuple[nn.Module, list[Record]]:
    module = network() if module is None else module
    history = train(module, loss, held_out, len(X), schedule, progress=False, **settings)
    return module, history


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Interrupted(Exception):
    pass


def interrupted_at(step: int) -> Callable[..., Tensor]:
    """A loss that stops the run like a signal would, at a step."""
    calls = iter(range(1, 10**6))

    def stopping(module: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        if next(calls) > step:
            raise Interrupted
        return loss(module, rows, generator)

    return stopping


# ------------------------------------------------------------------------------------------------ what a run ends with
def test_the_same_seed_gives_the_same_weights_whatever_the_global_state():
    first, _ = run(seed=3)
    torch.manual_seed(12345)
    second, _ = run(seed=3)
    other, _ = run(seed=4)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_it_learns_and_the_best_weights_are_kept():
    module, history = run(schedule=SHORT._replace(steps=400))
    assert history[0].step == 0 and math.isnan(history[0].train_loss)
    assert [record.step for record in history] == list(range(0, 401, 10))
    best = min(record.validation_loss for record in history)
    assert held_out(module) == best < 0.1 * history[0].validation_loss
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(history))


def test_a_run_that_only_gets_worse_ends_with_what_it_began_with():
    start = network()
    before = weights(start).clone()
    schedule = SHORT._replace(patience=3, steps=1000)
    history = train(start, lambda m, rows, g: -loss(m, rows, g), held_out, len(X), schedule, progress=False)
    assert history[-1].step == 30  # stopped after three evaluations without improvement
    assert torch.equal(weights(start), before)


def test_cooling_goes_back_to_the_best_weights_and_takes_smaller_steps():
    worse, schedule = network(), SHORT._replace(patience=3, steps=1000, coolings=2)
    before = weights(worse).clone()
    history = train(worse, lambda m, rows, g: -loss(m, rows, g), held_out, len(X), schedule, progress=False)
    assert [record.step for record in history] == list(range(0, 91, 10))  # three times three without improvement
    assert torch.equal(weights(worse), before)
    rate = {record.step: record.learning_rate for record in history}
    assert rate[40] < 0.26 * rate[30] and rate[70] < 0.26 * rate[60]
    after = [record.validation_loss for record in history]
    assert after[4] < after[3]  # from the best weights again, not from where it had gone astray
    noisy = SHORT._replace(learning_rate=0.1, steps=3000, patience=4)
    ended, cooled = (run(schedule=noisy._replace(coolings=number))[1] for number in (0, 3))
    assert min(r.validation_loss for r in cooled) < 0.7 * min(r.validation_loss for r in ended)


def test_a_clock_that_has_run_out_ends_the_run():
    started = time.monotonic()
    _, history = run(schedule=Schedule(steps=10**7, patience=10**6, warmup=1), max_seconds=1.0)
    spent = time.monotonic() - started
    assert spent < 1 + 10  # a loose margin for a busy machine; the run itself would last for hours
    assert 0 < history[-1].step < 10**7
    assert history[-1].learning_rate < 0.5 * max(record.learning_rate for record in history)  # it fell with the time


def test_a_loss_that_is_not_finite_is_said():
    def broken(module: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        return loss(module, rows, generator) * math.nan

    with pytest.raises(FloatingPointError, match="step 1"):
        train(network(), broken, held_out, len(X), SHORT, progress=False)


def test_weights_that_are_frozen_stay():
    module = network()
    module[2].requires_grad_(False)
    before = module[2].weight.clone()
    run(module)
    assert torch.equal(module[2].weight, before)


def test_the_schedule_follows_the_number_of_rows():
    small, large = Schedule().for_rows(300), Schedule().for_rows(10**6)
    assert small.batch_size <= 300 and small.steps < large.steps and small.learning_rate < large.learning_rate
    assert small.warmup <= small.steps // 10
    assert Schedule(batch_size=512).for_rows(100).batch_size == 100
    assert Schedule(steps=7, learning_rate=0.5, warmup=2, evaluate_every=3).for_rows(300)[2:] == (7, 2, 3)


# ------------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("step", [1, 9, 10, 11, 35, 59])
def test_an_interrupted_run_resumed_is_an_undisturbed_run(tmp_path, step):
    expected, history = run(seed=1)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Interrupted):
        train(
            network(),
            interrupted_at(step),
            held_out,
            len(X),
            SHORT,
            seed=1,
            progress=False,
            checkpoint=path,
            resume=True,
        )
    assert path.exists() == (step >= 10)
    module, resumed = run(network(seed=99) if step >= 10 else network(), seed=1, checkpoint=path, resume=True)
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=1e-6)
    for found, record in zip(resumed, history, strict=True):
        assert found.step == record.step
        assert found.validation_loss == pytest.approx(record.validation_loss, abs=1e-6)
        assert found.train_loss == pytest.approx(record.train_loss, abs=1e-6, nan_ok=True)


def test_a_run_interrupted_after_a_cooling_resumes_cooled(tmp_path):
    schedule, path = SHORT._replace(learning_rate=0.1, steps=1000, patience=2, coolings=2), tmp_path / "run.safetensors"
    expected, history = run(schedule=schedule)
    rates = [record.learning_rate for record in history[1:]]
    cooled = next(i for i, (a, b) in enumerate(itertools.pairwise(rates), 1) if b < 0.5 * a)
    with pytest.raises(Interrupted):
        train(
            network(), interrupted_at(history[cooled].step + 5), held_out, len(X), schedule, progress=False,
            checkpoint=path,
        )  # fmt: skip
    module, resumed = run(network(seed=9), schedule, checkpoint=path, resume=True)
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=1e-6)
    assert [record.step for record in resumed] == [record.step for record in history]


def test_resuming_a_run_that_is_over_changes_nothing(tmp_path):
    path = tmp_path / "run.safetensors"
    first, history = run(checkpoint=path)
    content = path.read_bytes()
    second, again = run(network(seed=5), checkpoint=path, resume=True)
    assert torch.equal(weights(first), weights(second))
    assert [record.step for record in again] == [record.step for record in history]
    assert path.read_bytes() == content


def test_the_clock_of_a_resumed_run_counts_what_was_spent(tmp_path):
    path = tmp_path / "run.safetensors"
    schedule = Schedule(steps=10**7, patience=10**6, evaluate_every=5)
    _, history = run(schedule=schedule, max_seconds=0.3, checkpoint=path)
    _, resumed = run(schedule=schedule, max_seconds=0.01, checkpoint=path, resume=True)
    assert 0 < resumed[-1].step <= history[-1].step  # that of the checkpoint: there is no time for another step


def test_without_resume_a_checkpoint_is_overwritten(tmp_path):
    path = tmp_path / "run.safetensors"
    run(seed=1, checkpoint=path)
    first, _ = run(seed=2, checkpoint=path)
    second, _ = run(seed=2)
    assert torch.equal(weights(first), weights(second))


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    run(checkpoint=path, fingerprint="these rows")
    content = path.read_bytes()
    with pytest.raises(DataError, match="other data, settings or seed"):
        run(checkpoint=path, fingerprint="other rows", resume=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "pickle", "without state"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    run(checkpoint=path)
    content = path.read_bytes()
    if damage == "pickle":
        torch.save({"step": torch.zeros(1)}, path)
    elif damage == "without state":
        save_file({"generator": torch.zeros(1)}, path)
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": os.urandom(500)}[damage])
    with pytest.raises(DataError, match=r"cannot be read.*delete it"):
        run(checkpoint=path, resume=True)


def test_no_part_of_a_file_is_left_where_writing_fails(tmp_path):
    path = tmp_path / "kept"
    path.write_text("old")

    def failing(part: Path) -> None:
        part.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, failing)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_a_torn_checkpoint(tmp_path):
    """Read over and over while a run rewrites it at every step."""
    path = tmp_path / "run.safetensors"
    seen, over = [], threading.Event()

    def read() -> None:
        while not over.is_set():
            if path.exists():
                seen.append(len(load_file(path)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        run(schedule=SHORT._replace(evaluate_every=1, steps=150), checkpoint=path)
    finally:
        over.set()
        reader.join()
    assert len(seen) > 5 and len(set(seen)) == 1


# ------------------------------------------------------------------------------------------------ killed
FIT = """
import os, sys
import torch
import pyro_invman as pim
from pyro_invman import training

torch.set_num_threads(1)
folder, stall_at, share = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if stall_at:  # that writing of the checkpoint stops after a share of the file, and waits to be killed
    import itertools, time
    from safetensors.torch import save_file
    count = itertools.count(1)
    def stalling(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        if next(count) == stall_at:
            os.truncate(path, int(share * os.path.getsize(path)))
            print("stalled", flush=True)
            time.sleep(600)
    training.save_file = stalling
generator = torch.Generator().manual_seed(0)
x = torch.randn(200, generator=generator)
y = x.square() + 0.3 * torch.randn(200, generator=generator)
y[::3] = float("nan")
ds = pim.from_columns({"x": x, "y": y}, roles={"x": "parameter", "y": "observation"})
flow = pim.JointFlow.from_dataset(ds, width=16, trunk_blocks=1, components=4)
schedule = pim.Schedule(steps=120, batch_size=32, evaluate_every=2, patience=1000)
print("begin", flush=True)
flow.fit(ds, seed=3, progress=False, schedule=schedule, checkpoint=folder + "/run.safetensors", resume=True)
flow.save(folder + "/model")
"""


def fit_in_a_process(folder: Path, stall_at: int, share: float) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FIT, str(folder), str(stall_at), str(share)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begin\n"
    return process


def fit_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["fit", str(folder), "0", "0"])
    try:
        exec(FIT, {})
    finally:
        torch.set_num_threads(threads)
    return load_file(folder / "model" / "weights.safetensors")


def wait_for_change(path: Path, content: bytes) -> None:
    deadline = time.monotonic() + 120
    while path.read_bytes() == content:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_run(tmp_path, monkeypatch):
    """SIGKILL within the first writing of the checkpoint, within a later one, and at a random moment."""
    disturbed = tmp_path / "disturbed"
    checkpoint = disturbed / "run.safetensors"
    disturbed.mkdir()
    moments = torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
    for stall_at, moment in zip([1, 4, 0], moments, strict=True):
        before = checkpoint.read_bytes() if checkpoint.exists() else b""
        process = fit_in_a_process(disturbed, stall_at, moment)
        with process:
            assert process.stdout is not None
            if stall_at:
                assert process.stdout.readline() == "stalled\n"
            else:
                wait_for_change(checkpoint, before)
                time.sleep(0.1 * moment)
            process.send_signal(signal.SIGKILL)
            assert process.wait(timeout=60) == -signal.SIGKILL
        if stall_at:
            assert (disturbed / ".run.safetensors.part").exists()  # the writing was cut short
        if stall_at == 1:
            assert not checkpoint.exists()
        else:
            assert load_file(checkpoint) and checkpoint.read_bytes() != before  # whole, and further than before
    found = fit_here(disturbed, monkeypatch)
    expected = fit_here(tmp_path / "undisturbed", monkeypatch)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_hidden_matrices_move_as_torchs_muon_moves_them():
    """Up to the rounding of torch's bfloat16, a hundredth of a step."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(n, n, generator=generator)) for n in (16, 24, 16)]
    torchs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.01, "weight_decay": 0.02}
    optimizers = _Muon(ours, **settings), torch.optim.Muon(torchs, adjust_lr_fn="match_rms_adamw", **settings)
    start = ours[0].detach().clone()
    for _ in range(5):
        for p, q in zip(ours, torchs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (ours[0] - start).abs().mean()
    for p, q in zip(ours, torchs, strict=True):
        assert (p - q).abs().mean() < 0.02 * moved
