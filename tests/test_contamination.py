"""Gross errors on a manifold: found, left out, and without cost where there are none."""

import math

import pytest
import torch

import pyro_invman as pim
from pyro_invman.data import from_tensor, to_tensor
from pyro_invman.density.normal_rows import NormalRows
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian
from pyro_invman.tasks.contamination import Contamination, normal_rows
from pyro_invman.tasks.effects import TaskEffects
from pyro_invman.variables import Standardization

PROCESS = HierarchicalLinearGaussian.random(seed=0)
OBSERVED = PROCESS.variables.indices(PROCESS.variables.with_role("observation"))
SMALL = {"flow": {"width": 16, "components": 2}, "encoder": {"width": 16}}
BRIEF = pim.Schedule(steps=10, learning_rate=1e-4, batch_size=16, warmup=5, evaluate_every=10)


def tasks(number: int, rows: int, seed: int, share: float):
    """Rows of tasks, and which cells (N, D) are gross errors: draws five times as wide as the cells of their column."""
    ds = PROCESS.sample(number, rows, seed=seed, missing=0.3)
    values = to_tensor(ds, PROCESS.variables)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(values.shape, generator=generator) < share
    wrong &= ~values.isnan() & torch.tensor([c in OBSERVED for c in range(values.shape[1])])
    scale = (PROCESS.covariance.diagonal() + PROCESS.loading.square().sum(-1)).sqrt()
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    values = torch.where(wrong, PROCESS.mean + 5 * scale * noise, values)
    return from_tensor(values, PROCESS.variables).assign_coords(task=ds.task), wrong


@pytest.fixture(scope="module")
def corrupted():
    return tasks(60, 12, 1, 0.1)


@pytest.fixture(scope="module")
def manifold(corrupted) -> pim.ProcessManifold:
    manifold = pim.ProcessManifold.from_dataset(corrupted[0], latent_dim=2, contamination=True, **SMALL)
    manifold.fit(corrupted[0], progress=False, schedule=BRIEF)
    return manifold


def area(right: torch.Tensor, wrong: torch.Tensor) -> float:
    above = (wrong.unsqueeze(-1) > right).double() + 0.5 * (wrong.unsqueeze(-1) == right).double()
    return float(above.mean())


def excess(manifold: pim.ProcessManifold, context: torch.Tensor, rows: torch.Tensor, clean: torch.Tensor) -> float:
    """Loss a cell of rows (N, D) after `context`, over the exact one after what it was before it was corrupted."""
    names = list(PROCESS.variables.with_role("observation"))
    settings = {n: rows[:, PROCESS.variables.index(n)] for n in PROCESS.variables.with_role("parameter")}
    task = manifold.infer_task(from_tensor(context, PROCESS.variables))
    with torch.no_grad():
        found = task.conditional(names, settings).log_prob(rows[:, OBSERVED]).double().sum()
    before = clean.expand(len(rows), -1, -1)
    exact = PROCESS.log_evidence(torch.cat([before, rows.unsqueeze(1)], 1)) - PROCESS.log_evidence(before)
    return float((exact.sum() - found) / (~rows[:, OBSERVED].isnan()).sum())


# ------------------------------------------------------------------------------------------------ the closed form
def test_rows_of_the_linear_form_are_those_of_the_process():
    base = TaskEffects([v.role != "observation" for v in PROCESS.variables], PROCESS.latent_dim)
    base.effects.mean.copy_(PROCESS.mean)
    base.effects.loading.copy_(PROCESS.loading)
    base.effects.covariance.copy_(PROCESS.covariance)
    values = to_tensor(PROCESS.sample(6, 1, seed=3, missing=0.4), PROCESS.variables)
    found: NormalRows = normal_rows(base, values.nan_to_num(0.0), ~values.isnan())
    names = list(PROCESS.variables.with_role("observation"))
    z = torch.tensor([0.7, -1.2], dtype=torch.float64)
    for n, row in enumerate(values):
        known = {
            v.name: row[c] for c, v in enumerate(PROCESS.variables) if v.role == "parameter" and not row[c].isnan()
        }
        exact = PROCESS.row_given_latent(z).conditional(names, known)
        torch.testing.assert_close(found.mean[n] + found.directions[n] @ z, exact.mean)
        torch.testing.assert_close(found.covariance[n], exact.covariance_matrix)


def test_how_often_and_how_far_is_recovered(manifold):
    found = manifold.contamination
    scale = (PROCESS.covariance.diagonal() + PROCESS.loading.square().sum(-1)).sqrt()[OBSERVED]
    assert bool(((found.chance > 0.04) & (found.chance < 0.16)).all())
    ratio = found.scale * manifold.standardization.scale[OBSERVED] / (5 * scale)
    assert bool(((ratio > 0.6) & (ratio < 1.6)).all())


def test_the_closed_form_is_that_of_the_clean_cells(manifold, corrupted):
    """Scales of the columns within a fifth of those of rows that were never corrupted; well off without."""
    clean = to_tensor(tasks(60, 12, 1, 0.0)[0], PROCESS.variables)[:, OBSERVED]
    wanted = torch.stack([c[~c.isnan()].std() for c in clean.T])
    torch.testing.assert_close(manifold.standardization.scale[OBSERVED], wanted, rtol=0.2, atol=0)
    misled = Standardization.fit(PROCESS.variables, to_tensor(corrupted[0], PROCESS.variables)).scale[OBSERVED]
    assert bool((misled > 1.35 * wanted).all())


# ------------------------------------------------------------------------------------------------ tasks
def test_outliers_of_known_and_new_tasks_are_flagged(manifold, corrupted):
    ds, wrong = corrupted
    found = manifold.outliers(ds)
    assert list(found.data_vars) == list(PROCESS.variables.with_role("observation"))
    values = to_tensor(ds, PROCESS.variables)[:, OBSERVED]
    flags = torch.stack([torch.from_numpy(found[n].values) for n in found.data_vars], -1)
    assert torch.equal(flags.isnan(), values.isnan())
    hit, seen = wrong[:, OBSERVED], ~values.isnan()
    assert area(flags[seen & ~hit], flags[hit]) > 0.85
    fresh, wrong = tasks(1, 15, 9, 0.2)
    task = manifold.infer_task(fresh)
    rows = to_tensor(fresh, PROCESS.variables)
    assert task.outliers.shape == rows.shape and torch.equal(task.outliers.isnan(), rows.isnan())
    settings = [c for c in range(rows.shape[1]) if c not in OBSERVED]
    assert bool((task.outliers[:, settings].nan_to_num(0.0) == 0).all())
    assert torch.equal(task.rows.isnan(), rows.isnan() | (task.outliers > 0.5))
    assert area(task.outliers[~wrong & ~rows.isnan()][:], task.outliers[wrong]) > 0.85


def test_corruption_costs_little_and_its_absence_less(manifold, corrupted):
    plain = pim.ProcessManifold.from_dataset(tasks(60, 12, 1, 0.0)[0], latent_dim=2, **SMALL)
    robust = pim.ProcessManifold.from_dataset(tasks(60, 12, 1, 0.0)[0], latent_dim=2, contamination=True, **SMALL)
    losses = {"clean, plain": [], "clean, robust": [], "corrupted, robust": []}
    for seed in range(12):
        clean, dirty = (to_tensor(tasks(1, 25, 100 + seed, share)[0], PROCESS.variables) for share in (0.0, 0.15))
        rest = clean[10:]
        losses["clean, plain"].append(excess(plain, clean[:10], rest, clean[:10]))
        losses["clean, robust"].append(excess(robust, clean[:10], rest, clean[:10]))
        losses["corrupted, robust"].append(excess(manifold, dirty[:10], rest, clean[:10]))
    mean = {name: sum(found) / len(found) for name, found in losses.items()}
    assert mean["clean, robust"] < mean["clean, plain"] + 0.02
    assert mean["corrupted, robust"] < mean["clean, plain"] + 0.1


def test_no_rows_and_no_observation_are_the_prior(manifold):
    fresh = tasks(1, 4, 3, 0.0)[0]
    settings = fresh.assign({n: fresh[n] * math.nan for n in PROCESS.variables.with_role("observation")})
    for rows in (None, fresh.isel(row=slice(0, 0)), settings):
        task = manifold.infer_task(rows)
        torch.testing.assert_close(task.latent.mean, torch.zeros(2))
        assert task.outliers.shape == (task.num_rows, len(PROCESS.variables))


def test_a_manifold_without_contamination_takes_every_cell_as_it_is(corrupted):
    ds, _ = corrupted
    plain = pim.ProcessManifold.from_dataset(ds, latent_dim=2, **SMALL)
    task = plain.infer_task(ds.isel(row=slice(0, 10)))
    assert plain.contamination is None
    assert bool((task.outliers.nan_to_num(0.0) == 0).all())
    assert torch.equal(task.rows.isnan(), to_tensor(ds, PROCESS.variables)[:10].isnan())


def test_it_is_kept(manifold, corrupted, tmp_path):
    manifold.save(tmp_path / "manifold")
    again = pim.load(tmp_path / "manifold")
    rows = corrupted[0].isel(row=slice(0, 10))
    before, after = manifold.infer_task(rows), again.infer_task(rows)
    torch.testing.assert_close(before.outliers, after.outliers, equal_nan=True)
    torch.testing.assert_close(before.particles, after.particles)


def test_rows_that_join_later_and_a_datatree_are_heard_without_errors(manifold, corrupted):
    ds = corrupted[0].isel(row=slice(0, 48))
    new = ds.assign_coords(task=("row", ["new " + str(t) for t in ds.task.values]))
    tree = manifold.to_datatree(ds, num_draws=20)
    assert tree["posterior"]["z"].shape == (1, 20, 4, 2)
    known = len(manifold.memory.rows)
    manifold.extend(new, progress=False, schedule=BRIEF)
    joined = manifold.memory.rows[known:]
    assert bool((joined.nan_to_num(0.0).abs() < 6).all())
    assert manifold.typicality(ds.isel(row=slice(0, 10)), simulations=19) > 0


def test_categorical_observations_are_never_wrong():
    generator = torch.Generator().manual_seed(0)
    kind = pim.Variable("kind", "observation", "categorical", levels=("a", "b", "c"))
    variables = pim.Variables([pim.Variable("x", "parameter"), kind, pim.Variable("y", "observation")])
    x, y = torch.randn(2, 120, generator=generator, dtype=torch.float64)
    code = torch.randint(3, (120,), generator=generator).double()
    y[::15] += 40.0
    ds = from_tensor(torch.stack([x, code, y], -1), variables)
    ds = ds.assign_coords(task=("row", [f"t{i // 10}" for i in range(120)]))
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=1, contamination=True, **SMALL)
    assert isinstance(manifold.contamination, Contamination)
    found = manifold.outliers(ds)
    assert bool((found["kind"] == 0).all())
    assert bool((found["y"][::15] > 0.9).all()) and float((found["y"] > 0.5).sum()) < 12
