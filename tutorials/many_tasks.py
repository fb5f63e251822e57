# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Many tasks: recognising a new one from a handful of rows
#
# The same process is met again and again: another alloy, another machine, another patient. Every **task** has something
# of its own that nobody measures directly, and too few rows to learn it from scratch. A `ProcessManifold` learns what
# tasks have in common, and a **latent** z per task that says where they differ. A new task is then a point on a map,
# with its uncertainty, and a few partial rows are enough to place it.
#
# Here the tasks are machines that melt the same steel. Each has its own absorptivity (the share of the light that heats
# the metal) and its own true width of the beam. They are simulated, so that the truth is known.

# %%
import warnings

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import Trace_ELBO

import pyro_invman as pim
from pyro_invman import plots
from pyro_invman.simulators import melt_pool

TASKS = 80  # short: 12
STEPS = 600  # short: 15
GRID = 40  # short: 12
OTHERS = 30  # short: 1
DRAWS = 4000  # short: 200
STEEL = dict(zip(melt_pool.VARIABLES.with_role("condition"), melt_pool.ALLOYS["316L"], strict=False))


def pool(power, speed, absorptivity, beam):
    """Depth and width of a track, um, without noise."""
    return melt_pool.forward(power, speed, beam, 40.0, **STEEL, absorptivity=absorptivity)[:2]


def machines(tasks, rows, seed, known=0.5, name="machine"):
    """Tracks on machines with, for a share of them, the absorptivity that a calorimeter found; and the hidden truth."""
    g = torch.Generator().manual_seed(seed)
    absorptivity, beam = 0.25 + 0.25 * torch.rand(tasks, 1, generator=g), 60 + 40 * torch.rand(tasks, 1, generator=g)
    power = 120 + 230 * torch.rand(tasks, rows, generator=g)
    speed = 300 + 1200 * torch.rand(tasks, rows, generator=g)
    depth, width = pool(power, speed, absorptivity, beam)
    depth = depth * (0.08 * torch.randn(tasks, rows, generator=g)).exp()
    width = width * (0.05 * torch.randn(tasks, rows, generator=g)).exp()
    for size in (depth, width):
        size[torch.rand(tasks, rows, generator=g) < 0.4] = torch.nan  # not cut, not looked at
    found = absorptivity.repeat(1, rows)
    found[round(known * tasks) :] = torch.nan
    cells = {"power_W": power, "speed_mm_s": speed, "absorptivity": found, "depth_um": depth, "width_um": width}
    ds = pim.from_columns(
        {column: values.flatten() for column, values in cells.items()},
        roles={column: "observation" if column.endswith("_um") else "parameter" for column in cells},
        supports=dict.fromkeys(cells, "positive") | {"absorptivity": ("interval", 0.0, 1.0)},
        units={"power_W": "W", "speed_mm_s": "mm/s", "absorptivity": "1", "depth_um": "um", "width_um": "um"},
        informative={"absorptivity": True},
        task=[f"{name} {t}" for t in range(tasks) for _ in range(rows)],
    )
    return ds, absorptivity[:, 0], beam[:, 0]


tables, absorptivity, beam = machines(TASKS, 10, seed=0)
print(f"{tables.sizes['row']} rows of {TASKS} machines")
print({name: f"{float(tables[name].isnull().mean()):.0%} missing" for name in tables.data_vars})

# %% [markdown]
# What was *set* is no evidence about a task, since someone chose it; what was *measured* is. The absorptivity is a
# parameter, but nobody chose it: it belongs to the machine, and where a calorimeter found it, it tells which machine
# this is. `informative=True` says so, and makes the latent carry it.

# %%
manifold = pim.ProcessManifold.from_dataset(tables, latent_dim=2)
schedule = pim.Schedule(learning_rate=3e-3, batch_size=24, steps=STEPS, warmup=50, evaluate_every=25, patience=20)
history = manifold.fit(tables, seed=0, schedule=schedule, progress=False)
print(
    f"loss on held-out machines {float(history.validation_loss[0]):.2f} -> {float(history.validation_loss.min()):.2f}"
)

# %% [markdown]
# ## Plates
#
# The manifold is plain Pyro: a model with plates `task` (dim −2) and `row` (dim −1), and a guide that reads all rows of
# a task at once. Both take rows (T, N, D), NaN where nothing was measured, and go into any of Pyro's tools.

# %%
rows, names = manifold.padded(tables)
trace = pyro.poutine.trace(manifold.model).get_trace(rows[:5])
print("five tasks of ten rows: latents", tuple(trace.nodes["z"]["value"].shape), "rows", tuple(rows[:5].shape))
bound = -Trace_ELBO().loss(manifold.model, manifold.guide, rows[:5])
print(f"evidence lower bound of these, by Pyro's own Trace_ELBO: {bound:.1f} nats")

# %% [markdown]
# ## A few rows of a new machine
#
# Rows of a machine that was not among those learned come in one after the other; `infer_task` takes any number of them,
# also none. Its absorptivity was never measured. With the simulator at hand the exact answer can be worked out, on a
# grid of absorptivities and beams, and stands beside.

# %%
new, true_absorptivity, true_beam = machines(1, 8, seed=77, known=0.0, name="new machine")
grid_a, grid_b = torch.meshgrid(torch.linspace(0.25, 0.5, 2 * GRID), torch.linspace(60, 100, GRID // 2), indexing="ij")


def exact_answer(seen):
    """p(absorptivity | rows) on the grid, by Bayes' rule with the simulator itself."""
    log = torch.zeros_like(grid_a)
    for row in range(seen.sizes["row"]):
        power, speed, depth, width = (float(seen[c][row]) for c in ("power_W", "speed_mm_s", "depth_um", "width_um"))
        for size, measured, noise in zip(pool(power, speed, grid_a, grid_b), (depth, width), (0.08, 0.05), strict=True):
            if measured == measured:
                log -= 0.5 * ((measured / size).log() / noise) ** 2
    return log.exp().sum(1) / log.exp().sum()


torch.manual_seed(0)
tasks, answers = {}, {}
levels = torch.tensor([0.05, 0.95])
for k in (0, 1, 2, 4, 8):
    seen = new.isel(row=slice(0, k))
    tasks[k] = manifold.infer_task(seen)
    answers[k] = tasks[k].conditional(["absorptivity"]).sample((DRAWS,))[:, 0]
    low, high = answers[k].quantile(levels)
    exact = grid_a[:, 0][torch.searchsorted(exact_answer(seen).cumsum(0), levels)]
    print(f"k = {k}: absorptivity in [{low:.3f}, {high:.3f}], exactly [{exact[0]:.3f}, {exact[1]:.3f}]")
print(f"truth {float(true_absorptivity):.3f}")

# %% [markdown]
# One machine may be lucky. Over thirty others, the error of the mean after eight rows, beside that of knowing nothing
# and that of the exact answer:

# %%
missed = {0: [], 8: []}
exactly = []
for seed in range(200, 200 + OTHERS):
    other, truth, _ = machines(1, 8, seed=seed, known=0.0, name="other")
    for k, found in missed.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pim.UnfamiliarTask)
            task = manifold.infer_task(other.isel(row=slice(0, k)))
        found.append(float(task.conditional(["absorptivity"]).sample((DRAWS // 8,)).mean() - truth))
    exactly.append(float((exact_answer(other) * grid_a[:, 0]).sum() - truth))
for k, found in missed.items():
    print(f"root mean square error after {k} rows: {torch.tensor(found).square().mean().sqrt():.3f}")
print(f"of the exact answer after 8 rows: {torch.tensor(exactly).square().mean().sqrt():.3f}")

# %% [markdown]
# And a question to one track of *this* machine: it is 100 µm deep at a speed of 800 mm/s; which power made it? The
# latent is integrated out, so that what is not known of the machine makes the answer wider.

# %%
for k in (0, 8):
    draws = tasks[k].conditional(["power_W"], {"depth_um": 100.0, "speed_mm_s": 800.0}).sample((DRAWS,))[:, 0]
    low, middle, high = draws.quantile(torch.tensor([0.05, 0.5, 0.95]))
    print(f"after {k} rows: {middle:.0f} W, 90 % in [{low:.0f}, {high:.0f}]")
candidates = torch.linspace(100, 400, 301)
made = candidates[(pool(candidates, 800.0, true_absorptivity, true_beam)[0] - 100).abs().argmin()]
print(f"truth, without noise: {made:.0f} W")

# %% [markdown]
# ## The map of tasks
#
# A fingerprint is what is known of a task's latent, as a normal. `nearest` compares fingerprints (two tasks of which
# nothing is known are not alike).

# %%
for found in manifold.nearest(tasks[8], 3):
    t = int(found.task.split()[-1])
    print(f"{found.task}: likeness {found.similarity:.2f}, absorptivity {absorptivity[t]:.3f}, beam {beam[t]:.0f} um")
print(f"the new one: absorptivity {float(true_absorptivity):.3f}, beam {float(true_beam):.0f} um")

# %% [markdown]
# ## A task out of range
#
# A machine whose depths are written down as if they were twice as large. No single number is impossible, yet no machine
# of the manifold looks like that. `infer_task` warns and widens what it says; `typicality` gives a p-value, which for
# the ordinary machine is not small.

# %%
odd = new.copy(deep=True)
odd["depth_um"] = 2 * odd.depth_um
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", pim.UnfamiliarTask)
    odd_task = manifold.infer_task(odd)
print("the ordinary machine belongs:", tasks[8].belongs, f"(p = {manifold.typicality(new):.3f})")
print("the odd one belongs:", odd_task.belongs, f"(p = {manifold.typicality(odd):.3f})")
print([str(w.message) for w in caught if issubclass(w.category, pim.UnfamiliarTask)])

# %% [markdown]
# ## Pictures

# %%
powers = torch.linspace(120, 350, 40)
figure, axes = plt.subplots(2, 2, figsize=(11, 8.4), constrained_layout=True)
shades = {0: "#b0b7bf", 2: "#e39f2d", 8: "#20639b"}
for k, colour in shades.items():
    draws = tasks[k].conditional(["depth_um"], {"power_W": powers, "speed_mm_s": 800.0}).sample((DRAWS // 2,))[..., 0]
    low, high = draws.quantile(levels, dim=0)
    axes[0, 0].fill_between(powers, low, high, color=colour, alpha=0.4, label=f"90 %, after {k} rows")
axes[0, 0].plot(powers, pool(powers, 800.0, true_absorptivity, true_beam)[0], color="#d1495b", label="truth, no noise")
axes[0, 0].set(xlabel=plots.label("power_W", "W"), ylabel=plots.label("depth_um", "um"), title="at 800 mm/s")
axes[0, 0].legend(frameon=False, fontsize=8)

for k, colour in shades.items():
    axes[0, 1].hist(
        answers[k], 40, range=(0.2, 0.55), density=True, histtype="step", color=colour, label=f"after {k} rows"
    )
axes[0, 1].plot(grid_a[:, 0], exact_answer(new) / (grid_a[1, 0] - grid_a[0, 0]), "k--", lw=1, label="exact, after 8")
axes[0, 1].axvline(true_absorptivity, color="#d1495b", label="truth")
axes[0, 1].set(xlabel=plots.label("absorptivity", "1"), ylabel=plots.label("density", "1"))
axes[0, 1].legend(frameon=False, fontsize=8)

fingerprints = {name: manifold.fingerprint(name) for name in names}
plots.task_map(
    fingerprints, {"new": manifold.fingerprint(tasks[8]), "odd": manifold.fingerprint(odd_task)}, ax=axes[1, 0]
)
means = torch.stack([fingerprints[f"machine {t}"].mean for t in range(TASKS)])
design = torch.cat([means, torch.ones(TASKS, 1).double()], -1)
read = design @ torch.linalg.lstsq(design, absorptivity.double().unsqueeze(-1)).solution
half = round(0.5 * TASKS)
axes[1, 1].plot(absorptivity[:half], read[:half], ".", color="#b0b7bf", label="a calorimeter found it")
axes[1, 1].plot(absorptivity[half:], read[half:], ".", color="#20639b", label="never measured")
axes[1, 1].legend(frameon=False, fontsize=8)
axes[1, 1].plot([0.25, 0.5], [0.25, 0.5], color="0.3", lw=0.8)
axes[1, 1].set(xlabel=plots.label("true absorptivity", "1"), ylabel="its reading off the map, a linear one [1]")
plt.show()

# %% [markdown]
# **How to read them.** Upper left: before any row (grey) the band is as wide as machines differ; rows narrow it around
# the red line, which was never shown. Upper right: the same for the hidden absorptivity. The dashed answer is that of
# someone who knows the simulator; what was learned from eighty machines (blue) is right, and some four times as wide:
# over thirty machines its mean misses by about .020 where the exact one misses by .013 and knowing nothing by .066.
# Lower left: each ring is a learned machine, one standard deviation wide; "new" lies among them, "odd" far out. The
# directions of the map have no names of their own, but, lower right, the absorptivity can be read off it, also for the
# half of the machines where it was never measured.
