"""Many tasks on one manifold, against the closed forms of the hierarchical linear-Gaussian process."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy.stats import kstest

import pyro_invman as pim
from pyro_invman.data import from_tensor, to_tensor
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian
from pyro_invman.tasks.network import Aims

NAN = math.nan
PROCESS = HierarchicalLinearGaussian.random(seed=0)
BRIEF = pim.Schedule(steps=40, learning_rate=5e-4, batch_size=16, warmup=5, evaluate_every=20)
SMALL = {"flow": {"width": 32, "components": 4}, "encoder": {"width": 32}}


def tasks(number: int, rows: int, seed: int, missing: float = 0.4, names: str = ""):
    ds = PROCESS.sample(number, rows, seed=seed, missing=missing)
    return ds.assign_coords(task=("row", [names + str(t) for t in ds.task.values]))


@pytest.fixture(scope="module")
def manifold() -> pim.ProcessManifold:
    ds = tasks(80, 12, seed=1)
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=2, **SMALL)
    manifold.fit(ds, progress=False, schedule=BRIEF)
    return manifold


@pytest.fixture
def new():
    return tasks(1, 8, seed=77, missing=0.3)


def rows_of(ds) -> torch.Tensor:
    return to_tensor(ds, PROCESS.variables)


# ------------------------------------------------------------------------------------------------ against exact answers
@pytest.mark.parametrize("method", ["amortized", "importance", "svi", "nuts"])
def test_the_predictive_is_near_the_exact_one(manifold, new, method):
    """An empirical Bayes plug-in of the right class is within some hundredths of a nat; a wrong posterior is not."""
    names, given = ["y1", "y2"], {"x1": 0.3}
    exact = PROCESS.posterior_predictive(names, given, rows_of(new))
    values = exact.sample((3000,))
    found = manifold.infer_task(new, method=method).conditional(names, given)
    with torch.no_grad():
        assert float((exact.log_prob(values) - found.log_prob(values)).mean()) / 2 < 0.12


def test_a_given_observation_moves_the_belief(manifold, new):
    """x1 given y1, y2: z is integrated over its posterior given the rows *and* the given observations."""
    given = {"y1": 0.3, "y2": 1.0}
    exact = PROCESS.posterior_predictive(["x1"], given, rows_of(new))
    values = exact.sample((3000,))
    with torch.no_grad():
        for rows, bar in ((new, 0.08), (None, 0.08)):
            exact = PROCESS.posterior_predictive(["x1"], given, None if rows is None else rows_of(rows))
            values = exact.sample((3000,))
            found = manifold.infer_task(rows).conditional(["x1"], given)
            assert float((exact.log_prob(values) - found.log_prob(values)).mean()) < bar


def test_the_methods_agree(manifold, new):
    latents = {m: manifold.infer_task(new, method=m, num_particles=800) for m in ("importance", "svi", "nuts")}
    for task in latents.values():
        mean = task.log_weights.exp() @ task.particles
        torch.testing.assert_close(mean, latents["nuts"].particles.mean(0), atol=0.15, rtol=0)


def test_no_rows_give_the_prior(manifold):
    for rows in (None, tasks(1, 4, seed=3).isel(row=slice(0, 0))):
        latent = manifold.infer_task(rows).latent
        torch.testing.assert_close(latent.mean, torch.zeros(2))
        torch.testing.assert_close(latent.covariance_matrix, torch.eye(2))
        assert latent.event_shape == (2,)


def test_more_rows_say_more(manifold):
    rows = tasks(1, 20, seed=5)
    widths = [manifold.infer_task(rows.isel(row=slice(0, k))).latent.covariance_matrix.det() for k in (0, 1, 5, 20)]
    assert widths == sorted(widths, reverse=True)


def test_joint_log_prob_of_rows_is_the_evidence_ratio(manifold, new):
    more = tasks(1, 3, seed=78)
    together = torch.cat([rows_of(new), rows_of(more)])
    exact = PROCESS.log_evidence(together) - PROCESS.log_evidence(rows_of(new))
    found = manifold.infer_task(new).log_prob(more)
    assert abs(float(found - exact)) / int((~rows_of(more)[:, 2:].isnan()).sum()) < 0.25


# ------------------------------------------------------------------------------------------------ as a distribution
def test_it_integrates_to_one(manifold, new):
    d = manifold.infer_task(new).conditional(["y1"], {"x1": 0.3, "y2": 0.5})
    grid = torch.linspace(-30, 30, 20_001).unsqueeze(-1)
    with torch.no_grad():
        assert float(torch.trapezoid(d.log_prob(grid).exp(), grid[:, 0])) == pytest.approx(1.0, abs=1e-3)


def test_draws_have_the_density(manifold, new):
    d = manifold.infer_task(new).conditional(["y1"], {"x1": 0.3, "y2": 0.5})
    grid = torch.linspace(-30, 30, 8001)
    with torch.no_grad():
        reached = torch.cumulative_trapezoid(d.log_prob(grid.unsqueeze(-1)).exp(), grid)
        draws = d.sample((2000,))[:, 0]
    level = reached[torch.searchsorted(grid[1:].contiguous(), draws).clamp_max(len(reached) - 1)]
    assert kstest(level.numpy(), "uniform").pvalue > 1e-3


def test_shapes_expand_and_pickle(manifold, new):
    task = manifold.infer_task(new)
    d = task.conditional(["y1", "y3"], {"x1": torch.tensor([0.1, 0.2, 0.3])})
    assert (d.batch_shape, d.event_shape) == ((3,), (2,))
    assert d.sample((5,)).shape == (5, 3, 2)
    value = d.sample((5,))
    wide = d.expand((4, 3))
    assert wide.sample((2,)).shape == (2, 4, 3, 2)
    torch.testing.assert_close(wide.log_prob(value[0]), d.log_prob(value[0]).expand(4, 3))
    again = pickle.loads(pickle.dumps(d))
    torch.testing.assert_close(again.log_prob(value), d.log_prob(value))
    with pyro.plate("rows", 3):
        assert pyro.sample("y", d).shape == (3, 2)


def test_nan_in_a_value_marginalises_that_target(manifold, new):
    task = manifold.infer_task(new)
    both, one = task.conditional(["y1", "y2"], {"x1": 0.3}), task.conditional(["y1"], {"x1": 0.3})
    value = torch.tensor([[0.4, NAN], [1.0, NAN]])
    torch.testing.assert_close(both.log_prob(value), one.log_prob(value[:, :1]), atol=1e-4, rtol=1e-4)


def test_order_of_targets_permutes_columns(manifold, new):
    task = manifold.infer_task(new)
    a, b = task.conditional(["y1", "y2"]), task.conditional(["y2", "y1"])
    value = torch.randn(6, 2)
    torch.testing.assert_close(a.log_prob(value), b.log_prob(value.flip(-1)))


def test_batch_elements_marginalise_on_their_own(manifold, new):
    task = manifold.infer_task(new)
    givens = torch.tensor([0.0, 2.0])
    together = task.conditional(["x1"], {"y1": givens})
    value = torch.tensor([0.3])
    for b in range(2):
        alone = task.conditional(["x1"], {"y1": givens[b]})
        torch.testing.assert_close(together.log_prob(value)[b], alone.log_prob(value))


def test_gradients_in_value_and_given(manifold, new):
    given = torch.tensor(0.3, requires_grad=True)
    value = torch.tensor([0.4], requires_grad=True)
    manifold.infer_task(new).conditional(["x1"], {"y1": given}).log_prob(value).backward()
    assert given.grad.isfinite()
    assert value.grad.isfinite().all()
    assert given.grad != 0


def test_rsample_only_where_it_is_right(manifold, new):
    task = manifold.infer_task(new)
    setting = torch.tensor(0.3, requires_grad=True)
    forward = task.conditional(["y1"], {"x1": setting})
    assert forward.has_rsample
    forward.rsample((50,)).sum().backward()
    assert setting.grad.isfinite()
    inverse = task.conditional(["x1"], {"y1": 0.3})
    assert not inverse.has_rsample
    with pytest.raises(NotImplementedError, match="weights"):
        inverse.rsample()


def test_the_error_of_a_finite_mixture_is_reported(manifold):
    value = torch.tensor([[0.2, 0.1]])
    task = [manifold.infer_task(None, num_particles=s) for s in (64, 1024)]
    with torch.no_grad():
        errors = [float(t.conditional(["y1", "y2"]).log_prob_std_error(value)) for t in task]
        longest = manifold.infer_task(None, num_particles=16_384).conditional(["y1", "y2"]).log_prob(value)
        found = task[1].conditional(["y1", "y2"]).log_prob(value)
    assert errors[1] < errors[0] / 2
    assert abs(float(longest - found)) < 4 * errors[1]


def test_as_a_prior_in_a_users_model(manifold, new):
    """A learned predictive in a plain Pyro model: sampled, scored, trained beside."""
    d = manifold.infer_task(new).conditional(["y1"], {"x1": 0.3})

    def model():
        y = pyro.sample("y", d)
        return pyro.sample("seen", dist.Normal(y[..., 0], 0.5), obs=torch.tensor(0.7))

    draws = Predictive(model, num_samples=300)()["y"]
    assert draws.shape == (300, 1) or draws.shape == (300, 1, 1)
    guide = pyro.infer.autoguide.AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20])


# ------------------------------------------------------------------------------------------------ as Pyro functions
def test_model_and_guide_have_the_plates(manifold):
    rows, names = manifold.padded(tasks(5, 4, seed=6))
    assert rows.shape == (5, 4, 6)
    assert len(names) == 5
    trace = pyro.poutine.trace(manifold.model).get_trace(rows)
    assert trace.nodes["z"]["fn"].batch_shape == (5, 1)
    assert trace.nodes["rows"]["fn"].batch_shape == (5, 4)
    trace.compute_log_prob()
    assert trace.nodes["rows"]["log_prob"].shape == (5, 4)


def test_elbo_by_pyro_is_the_bound_that_is_trained(manifold):
    rows, _ = manifold.padded(tasks(6, 5, seed=6))
    network = manifold.network
    working = manifold.standardization(rows).float()
    jacobian = manifold.standardization.log_abs_det_jacobian(rows)[..., network.columns].sum()
    with torch.no_grad():
        before = network.before(torch.empty(6, 0))
        generator = torch.Generator().manual_seed(0)
        ours = [float(network.bound(working, before, 1, generator)[0].sum() + jacobian) for _ in range(150)]
        theirs = [-Trace_ELBO().loss(manifold.model, manifold.guide, rows) for _ in range(150)]
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    error = math.sqrt(float(ours.var() + theirs.var()) / 150)
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error + 1e-3


def test_subsampled_bounds_are_unbiased(manifold):
    rows, _ = manifold.padded(tasks(6, 5, seed=6))
    with torch.no_grad():
        whole = torch.tensor([Trace_ELBO().loss(manifold.model, manifold.guide, rows) for _ in range(100)])
        some = torch.tensor(
            [Trace_ELBO().loss(manifold.model, manifold.guide, rows, tasks=3, rows_a_task=2) for _ in range(400)]
        )
    assert abs(float(whole.mean() - some.mean())) < 4 * math.sqrt(float(whole.var() / 100 + some.var() / 400))


def test_it_trains_by_svi(manifold):
    rows, _ = manifold.padded(tasks(20, 6, seed=8))
    fresh = pim.ProcessManifold.from_dataset(tasks(20, 6, seed=8), latent_dim=2, **SMALL)
    before = [p.clone() for p in fresh.network.parameters()]
    svi = SVI(fresh.model, fresh.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    losses = [svi.step(rows, tasks=10) for _ in range(10)]
    assert all(math.isfinite(loss) for loss in losses)
    moved = [bool((p != q).any()) for p, q in zip(fresh.network.parameters(), before, strict=True)]
    assert sum(moved) > 0.8 * len(moved)


def test_importance_weighting_tightens_the_bound(manifold):
    rows, _ = manifold.padded(tasks(20, 6, seed=9))
    working = manifold.standardization(rows).float()
    with torch.no_grad():
        before = manifold.network.before(torch.empty(20, 0))
        generator = torch.Generator().manual_seed(0)
        bounds = [
            sum(float(manifold.network.bound(working, before, s, generator)[0].sum()) for _ in range(30))
            for s in (1, 256)
        ]
    assert bounds == sorted(bounds)


# ------------------------------------------------------------------------------------------------ likeness
def test_a_task_is_nearest_to_itself(manifold):
    one = tasks(80, 12, seed=1)
    rows = one.sel(row=one.task == "task 7")
    assert "task 7" in [likeness.task for likeness in manifold.nearest(rows, 8)]
    nothing = manifold.infer_task()
    assert manifold.similarity(nothing, nothing) < 0.01
    with pytest.raises(pim.DataError, match="task 700"):
        manifold.fingerprint("task 700")


def test_p_values_of_tasks_that_belong_and_of_one_that_does_not(manifold):
    """How often a fresh task is called strange varies with the 72 tasks that were learned: over several such fits."""
    fresh, manifolds = tasks(60, 6, seed=21), [manifold]
    for seed in (2, 3):
        ds = tasks(80, 12, seed=seed)
        manifolds.append(pim.ProcessManifold.from_dataset(ds, latent_dim=2, **SMALL))
        manifolds[-1].fit(ds, progress=False, schedule=BRIEF)
    found = torch.tensor(
        [
            each.typicality(fresh.sel(row=fresh.task == name), simulations=99)
            for each in manifolds
            for name in sorted(set(fresh.task.values))
        ]
    )
    assert float((found <= 0.05).float().mean()) < 0.15
    assert 0.3 < float(found.mean()) < 0.7
    assert manifold.typicality(fresh.isel(row=slice(0, 0))) == 1.0
    out = PROCESS.row_given_latent(torch.tensor([5.0, -5.0])).sample(10, seed=0)
    assert manifold.typicality(out) < 0.02


def test_a_task_like_none_is_said_and_answered_more_widely(manifold):
    out = PROCESS.row_given_latent(torch.tensor([5.0, -5.0])).sample(6, seed=0)
    with pytest.warns(pim.UnfamiliarTask, match="like none"):
        task = manifold.infer_task(out)
    assert not task.belongs
    assert task.inflation > 4
    assert manifold.infer_task(tasks(1, 6, seed=22)).belongs


def test_extend_learns_new_tasks_and_keeps_the_old(manifold, tmp_path):
    manifold.save(tmp_path)
    wider = pim.load(tmp_path)
    more = tasks(12, 10, seed=31, names="new ")
    history = wider.extend(more, progress=False, schedule=BRIEF)
    assert history.attrs["new_tasks"] == 12
    assert len(wider.memory.names) == 92
    assert wider.nearest(more.sel(row=more.task == "new task 3"), 5)
    with pytest.raises(pim.DataError, match="known already"):
        wider.extend(more, progress=False)
    with pytest.raises(pim.DataError, match="fit it first"):
        pim.ProcessManifold.from_dataset(more, latent_dim=2, **SMALL).extend(more)


# ------------------------------------------------------------------------------------------------ learning and keeping
def test_the_same_seed_gives_the_same_weights():
    ds = tasks(12, 6, seed=2)
    found = []
    for _ in range(2):
        manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=2, **SMALL)
        manifold.fit(ds, progress=False, schedule=BRIEF._replace(steps=6), seed=3)
        found.append(manifold.network.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_a_resumed_fit_ends_as_an_undisturbed_one(tmp_path):
    ds = tasks(12, 6, seed=2)
    plan = BRIEF._replace(steps=12, evaluate_every=4)
    whole = pim.ProcessManifold.from_dataset(ds, latent_dim=2, **SMALL)
    whole.fit(ds, progress=False, schedule=plan)
    parted = pim.ProcessManifold.from_dataset(ds, latent_dim=2, **SMALL)
    path = tmp_path / "run.safetensors"
    parted.fit(ds, progress=False, schedule=plan, checkpoint=path)
    parted.fit(ds, progress=False, schedule=plan, checkpoint=path, resume=True)
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(value, parted.network.state_dict()[name], rtol=0, atol=1e-6)
    with pytest.raises(pim.DataError, match="other data"):
        parted.fit(tasks(12, 6, seed=4), progress=False, schedule=plan, checkpoint=path, resume=True)


def test_a_saved_manifold_answers_the_same(manifold, new, tmp_path):
    manifold.save(tmp_path)
    again = pim.load(tmp_path)
    value = torch.randn(5, 2)
    for m in (manifold, again):
        m.eval()
    a, b = (m.infer_task(new).conditional(["y1", "x2"], {"x1": 0.3}).log_prob(value) for m in (manifold, again))
    assert torch.equal(a, b)
    assert again.nearest(new, 3) == manifold.nearest(new, 3)
    assert again.typicality(new) == manifold.typicality(new)


def test_a_damaged_manifold_is_refused(manifold, tmp_path):
    manifold.save(tmp_path)
    content = bytearray((tmp_path / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(pim.DataError, match="damaged"):
        pim.load(tmp_path)


def test_ragged_tasks_and_rounded_cells():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, generator=generator, dtype=torch.float64)
    y = (10 + 3 * x + torch.randn(60, generator=generator, dtype=torch.float64)).round()
    names = ["a"] * 30 + ["b"] * 2 + ["c"] * 20 + ["d"] * 8
    ds = pim.from_columns({"x": x, "y": y}, {"x": "parameter", "y": "observation"}, resolutions={"y": 1.0}, task=names)
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=1, **SMALL)
    history = manifold.fit(ds, progress=False, schedule=BRIEF._replace(steps=4))
    assert history.validation_loss.notnull().all()
    assert manifold.padded(ds)[0].shape == (4, 30, 2)


def test_a_gaussian_process_over_task_conditions():
    """z follows a condition: a new task without rows is foretold near conditions that were seen."""
    generator = torch.Generator().manual_seed(0)
    c = torch.linspace(-2, 2, 40, dtype=torch.float64).repeat_interleave(6)
    x = torch.randn(240, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * c) + 0.3 * x + 0.1 * torch.randn(240, generator=generator, dtype=torch.float64)
    ds = pim.from_columns(
        {"x": x, "c": c, "y": y},
        {"x": "parameter", "c": "condition", "y": "observation"},
        task=[f"{v:.3f}" for v in c.tolist()],
    )
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=1, task_prior="gp", **SMALL)
    assert manifold.task_conditions == ("c",)
    manifold.fit(ds, progress=False, schedule=BRIEF._replace(steps=200, learning_rate=5e-3))
    near, far = (manifold.infer_task(conditions={"c": value}).latent.variance for value in (0.8, 40.0))
    assert near < far
    torch.testing.assert_close(far, torch.ones(1), atol=0.02, rtol=0)
    with pytest.raises(pim.DataError, match="x is a parameter"):
        manifold.infer_task(conditions={"x": 1.0})


def test_results_come_back_with_plates_as_dimensions(manifold, tmp_path):
    ds = tasks(4, 5, seed=6)
    tree = manifold.to_datatree(ds, num_draws=400)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "task", "latent")
    assert list(tree["posterior"].task.values) == sorted(set(ds.task.values))
    assert tree["posterior_predictive"]["y1"].dims == ("chain", "draw", "task", "row")
    rows, names = manifold.padded(ds)
    assert (tree["observed_data"]["y1"].values[0] == rows[0, :, 2].numpy()).sum() == int((~rows[0, :, 2].isnan()).sum())
    one = manifold.infer_task(ds.sel(row=ds.task == names[0]))
    found = torch.from_numpy(tree["posterior"]["z"].values[0, :, 0]).mean(0)
    torch.testing.assert_close(found.float(), one.latent.mean, atol=0.15, rtol=0)
    tree.to_netcdf(tmp_path / "tree.nc")


# ------------------------------------------------------------------------------------------------ refusals
def test_bad_input_is_refused(manifold, new):
    with pytest.raises(pim.DataError, match="task"):
        pim.ProcessManifold.from_dataset(tasks(4, 4, seed=1).drop_vars("task"), latent_dim=2)
    with pytest.raises(pim.DataError, match="at least 3"):
        small = tasks(2, 4, seed=1, missing=0.0)
        pim.ProcessManifold.from_dataset(small, latent_dim=1, **SMALL).fit(small)
    with pytest.raises(pim.DataError, match="method"):
        manifold.infer_task(new, method="guess")
    with pytest.raises(pim.DataError, match="rows of one"):
        manifold.infer_task(tasks(2, 3, seed=1))
    with pytest.raises(pim.DataError, match="task_prior"):
        pim.ProcessManifold(PROCESS.variables, task_prior="flat")
    with pytest.raises(pim.DataError, match="latent_dim"):
        pim.ProcessManifold(PROCESS.variables, latent_dim=0)
    task = manifold.infer_task(new)
    for targets, given, message in (
        ([], {}, "none named"),
        (["y1", "y1"], {}, "twice"),
        (["y1"], {"y1": 0.0}, "both"),
        (["y9"], {}, "y9"),
        (["y1"], {"x1": math.inf}, "x1"),
    ):
        with pytest.raises(pim.DataError, match=message):
            task.conditional(targets, given)
    with pytest.raises(pim.DataError, match="observation"):
        pim.ProcessManifold(pim.Variables([pim.Variable("x", "parameter")]))


def test_aims_without_queries_or_dreams_still_train():
    ds = tasks(12, 6, seed=2)
    manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=2, **SMALL)
    history = manifold.fit(ds, progress=False, schedule=BRIEF._replace(steps=4), aims=Aims(queries=0.0, dreams=0.0))
    assert history.validation_loss.notnull().all()


def test_from_tensor_rows_need_no_task(manifold):
    row = torch.full((1, 6), NAN, dtype=torch.float64)
    row[0, 2] = 0.5
    assert manifold.infer_task(from_tensor(row, PROCESS.variables)).num_rows == 1


# ------------------------------------------------------------------------------------------------ a base that bends
def test_a_bent_process_is_known_before_training_and_kept(tmp_path):
    """Three rows place a new task on sin(2 x) + a x + b; the base alone predicts, and is saved with the manifold."""
    generator = torch.Generator().manual_seed(0)
    slope, offset = torch.randn(2, 61, generator=generator, dtype=torch.float64)
    x = 4 * torch.rand(61, 10, generator=generator, dtype=torch.float64) - 2
    y = (2 * x).sin() + slope[:, None] * x + offset[:, None]
    y = y + 0.1 * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    ds = pim.from_columns(
        {"x": x.flatten(), "y": y.flatten()},
        {"x": "parameter", "y": "observation"},
        task=[str(t) for t in range(61) for _ in range(10)],
    )
    manifold = pim.ProcessManifold.from_dataset(ds.isel(row=slice(0, 600)), latent_dim=2, **SMALL)
    assert manifold.network.base.functions is not None
    task = manifold.infer_task(ds.isel(row=slice(600, 603)))
    with torch.no_grad():
        d = task.conditional(["y"], {"x": x[60, 3:]})
        errors = d.sample((500,)).mean(0).squeeze(-1) - y[60, 3:]
        assert errors.abs().max() < 0.6
        assert d.log_prob(y[60, 3:, None]).mean() > -0.5
    manifold.save(tmp_path)
    with torch.no_grad():
        again = pim.load(tmp_path).infer_task(ds.isel(row=slice(600, 603))).conditional(["y"], {"x": x[60, 3:]})
        assert torch.equal(again.log_prob(y[60, 3:, None]), d.log_prob(y[60, 3:, None]))
