"""Rows of other sources: instruments found again, and what their rows say of a task, against closed forms."""

import math

import pytest
import torch

import pyro_invman as pim
from pyro_invman.data import from_tensor, to_tensor
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian
from pyro_invman.tasks.encoder import Belief

PROCESS = HierarchicalLinearGaussian.random(seed=0)
OBSERVED = PROCESS.variables.indices(PROCESS.variables.with_role("observation"))
SMALL = {"flow": {"width": 16, "components": 2}, "encoder": {"width": 16}}
BRIEF = pim.Schedule(steps=10, learning_rate=1e-4, batch_size=16, warmup=5, evaluate_every=10)
SPREAD = (PROCESS.covariance.diagonal() + PROCESS.loading.square().sum(-1)).sqrt()[OBSERVED]
BIAS, GAIN, NOISE = 0.7 * SPREAD, 1.4, 0.5 * SPREAD


def seen_by_cheap(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows (..., D) whose observations the cheap source shows."""
    noise = torch.randn(*rows.shape[:-1], len(OBSERVED), generator=torch.Generator().manual_seed(seed)).double()
    shown = rows.clone()
    shown[..., OBSERVED] = PROCESS.mean[OBSERVED] + BIAS + GAIN * (rows[..., OBSERVED] - PROCESS.mean[OBSERVED])
    shown[..., OBSERVED] += NOISE * noise
    return shown


def two_sources(tasks: int, rows: int, seed: int, cheap: str = "cheap"):
    """Half of the rows of each task by "lab", the other half by another source."""
    ds = PROCESS.sample(tasks, rows, seed=seed, missing=0.2)
    values = to_tensor(ds, PROCESS.variables)
    first = torch.arange(len(values)) % rows < rows // 2
    values = torch.where(first.unsqueeze(-1), values, seen_by_cheap(values, seed))
    labels = ["lab" if own else cheap for own in first.tolist()]
    return from_tensor(values, PROCESS.variables).assign_coords(task=ds.task, source=("row", labels))


def through_cheap() -> HierarchicalLinearGaussian:
    """The process as the cheap source shows it."""
    turn = torch.ones(len(PROCESS.mean), dtype=torch.float64)
    turn[OBSERVED] = GAIN
    mean, covariance = PROCESS.mean.clone(), turn.unsqueeze(-1) * turn * PROCESS.covariance
    mean[OBSERVED] += BIAS
    covariance[OBSERVED, OBSERVED] += NOISE.square()
    return HierarchicalLinearGaussian(PROCESS.variables, mean, turn.unsqueeze(-1) * PROCESS.loading, covariance)


@pytest.fixture(scope="module")
def manifold() -> pim.ProcessManifold:
    """On the true process, in natural units, with its sources learned from 60 tasks."""
    ds = two_sources(60, 12, 1)
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=2, reference_source="lab", **SMALL)
    return on_the_truth(manifold, ds)


def on_the_truth(manifold: pim.ProcessManifold, ds) -> pim.ProcessManifold:
    effects, scales = manifold.network.base.effects, manifold.standardization
    manifold.network.base.functions = None
    effects.mean.copy_((PROCESS.mean - scales.loc) / scales.scale)
    effects.loading.copy_(PROCESS.loading / scales.scale.unsqueeze(-1))
    effects.covariance.copy_(PROCESS.covariance / scales.scale.unsqueeze(-1) / scales.scale)
    manifold._learn_sources(ds)
    return manifold


def informed(manifold: pim.ProcessManifold, other, own=None, source: str = "cheap") -> Belief:
    """The belief after rows (K, D) of another source, in double precision."""
    none = torch.empty(0, len(PROCESS.variables), dtype=torch.float64)
    rows, mine = (manifold.standardization(none if r is None else r) for r in (other, own))
    start = Belief(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    return manifold.sources.inform(manifold.network, rows, [source] * len(rows), start, mine)


def test_the_instrument_is_found_again(manifold):
    found, scale = manifold.sources, manifold.standardization.scale[OBSERVED]
    loc = manifold.standardization.loc[OBSERVED]
    assert found.names == ("cheap",)
    gain = found.log_gain[0].exp()
    bias = found.bias[0] * scale + loc - PROCESS.mean[OBSERVED] + gain * (PROCESS.mean[OBSERVED] - loc)
    torch.testing.assert_close(gain, torch.full_like(gain, GAIN), rtol=0.15, atol=0)
    torch.testing.assert_close(bias / SPREAD, BIAS / SPREAD, rtol=0, atol=0.15)
    torch.testing.assert_close(found.log_noise[0].exp() * scale, NOISE, rtol=0.35, atol=0)
    assert bool((found.bias_scale < 0.2).all())


def test_its_rows_say_what_they_do_when_the_instrument_is_known(manifold):
    """The belief of `inform` against the exact posterior, with the instrument set to the truth."""
    sources, scales = manifold.sources, manifold.standardization
    kept = {name: value.clone() for name, value in sources.state_dict().items()}
    loc, scale = scales.loc[OBSERVED], scales.scale[OBSERVED]
    sources.bias[0] = (PROCESS.mean[OBSERVED] + BIAS - loc - GAIN * (PROCESS.mean[OBSERVED] - loc)) / scale
    sources.bias_scale[0], sources.log_gain[0], sources.log_noise[0] = 1e-6, math.log(GAIN), (NOISE / scale).log()
    rows = seen_by_cheap(to_tensor(PROCESS.sample(1, 6, seed=5, missing=0.3), PROCESS.variables), 5)
    belief, exact = informed(manifold, rows), through_cheap().task_posterior(rows)
    sources.load_state_dict(kept)
    torch.testing.assert_close(belief.precision, exact.precision_matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(belief.mean(), exact.loc, rtol=1e-5, atol=1e-5)


def test_a_learned_source_says_nearly_what_a_known_one_would(manifold):
    off, moved = [], []
    for seed in range(20):
        rows = seen_by_cheap(to_tensor(PROCESS.sample(1, 6, seed=50 + seed, missing=0.3), PROCESS.variables), seed)
        belief, exact = informed(manifold, rows), through_cheap().task_posterior(rows)
        found = torch.distributions.MultivariateNormal(belief.mean(), precision_matrix=belief.precision)
        off.append(torch.distributions.kl_divergence(exact, found))
        moved.append(torch.distributions.kl_divergence(exact, PROCESS.task_posterior(rows[:0])))
    assert float(torch.stack(off).mean()) < 0.1 * float(torch.stack(moved).mean())


def test_a_source_never_met_says_less_and_more_beside_rows_of_the_reference(manifold):
    rows = to_tensor(PROCESS.sample(1, 16, seed=7, missing=0.2), PROCESS.variables)
    own, other = rows[:8], seen_by_cheap(rows[8:], 7)
    known, new = informed(manifold, other), informed(manifold, other, source="unknown")
    assert float(new.precision.logdet()) < float(known.precision.logdet()) - 0.3
    assert bool((torch.linalg.eigvalsh(new.precision - torch.eye(2)) > -1e-9).all())
    beside = informed(manifold, other, own, "unknown")
    truth = PROCESS.task_posterior(rows)
    for belief in (new, beside):  # honest: the well-informed posterior's mean lies within the belief
        off = belief.mean() - truth.loc
        assert float(off @ belief.precision @ off) < 9.0


def test_a_task_is_inferred_from_both(manifold):
    ds = two_sources(1, 12, 9)
    plain = manifold.infer_task(ds.isel(row=slice(0, 6)))
    both = manifold.infer_task(ds)
    assert both.num_rows == 6
    assert float(both.latent.covariance_matrix.det()) < float(plain.latent.covariance_matrix.det())
    cheap = manifold.infer_task(ds.isel(row=slice(6, 12)))
    assert cheap.num_rows == 0
    assert float(cheap.latent.covariance_matrix.det()) < 0.9


def test_what_a_source_is_off_by_in_a_task_stays_however_many_rows_it_shows(manifold):
    """An instrument that is set up anew for each task, off by 0.3 of each observation's spread."""
    drift = 0.3 * SPREAD

    def set_up(rows: torch.Tensor, task: torch.Tensor, seed: int) -> torch.Tensor:
        off = torch.randn(int(task.max()) + 1, len(OBSERVED), generator=torch.Generator().manual_seed(seed)).double()
        shown = seen_by_cheap(rows, seed)
        shown[:, OBSERVED] += drift * off[task]
        return shown

    ds = PROCESS.sample(60, 24, seed=3, missing=0.2)
    values, task = to_tensor(ds, PROCESS.variables), torch.arange(60).repeat_interleave(24)
    cheap = torch.arange(len(values)) % 24 >= 12
    values = torch.where(cheap.unsqueeze(-1), set_up(values, task, 3), values)
    labels = ["cheap" if other else "lab" for other in cheap.tolist()]
    ds = from_tensor(values, PROCESS.variables).assign_coords(task=ds.task, source=("row", labels))
    kept = manifold.sources
    try:
        manifold._learn_sources(ds)
        found = manifold.sources.bias_scale[0] * manifold.standardization.scale[OBSERVED]
        torch.testing.assert_close(found, drift, rtol=0.4, atol=0)
        off = []
        for seed in range(40):
            row = PROCESS.sample(1, 40, seed=100 + seed)
            rows = to_tensor(row, PROCESS.variables)
            belief = informed(manifold, set_up(rows, torch.zeros(40, dtype=torch.long), 100 + seed))
            away = belief.mean() - PROCESS.task_posterior(to_tensor(row, PROCESS.variables)).loc
            off.append(away @ belief.precision @ away / len(away))
        assert 0.5 < float(torch.stack(off).mean()) < 1.6
    finally:
        manifold.sources = kept


def test_it_is_kept_and_the_history_is_the_references(tmp_path):
    ds = two_sources(12, 8, 3)
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=2, reference_source="lab", **SMALL)
    manifold.fit(ds, progress=False, schedule=BRIEF)
    assert len(manifold.memory.rows) <= 12 * 4
    manifold.save(tmp_path / "manifold")
    again = pim.load(tmp_path / "manifold")
    rows = two_sources(1, 8, 4)
    before, after = manifold.infer_task(rows), again.infer_task(rows)
    torch.testing.assert_close(before.particles, after.particles)
    assert again.sources.names == ("cheap",) and 0 < manifold.typicality(rows, simulations=19) <= 1


def test_one_source_changes_nothing_and_a_misspelt_one_is_said():
    ds = PROCESS.sample(12, 6, seed=3)
    one = ds.assign_coords(source=("row", ["lab"] * ds.sizes["row"]))
    plain = pim.ProcessManifold.from_dataset(ds, latent_dim=2, **SMALL)
    named = pim.ProcessManifold.from_dataset(one, latent_dim=2, reference_source="lab", **SMALL)
    first = plain.infer_task(ds.isel(row=slice(0, 3))).particles
    torch.testing.assert_close(named.infer_task(one.isel(row=slice(0, 3))).particles, first)
    with pytest.raises(pim.DataError, match="found no row of 'labs'"):
        pim.ProcessManifold.from_dataset(one, latent_dim=2, reference_source="labs", **SMALL)
