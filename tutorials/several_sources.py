# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Several sources at different cost
#
# Measurements are dear; a formula, an older instrument or another laboratory is cheap and off. Such a **source** sees
# the same process through a bias, a gain and a noise of its own. A manifold with a `reference_source` learns the
# process from the reference, learns each other source as an instrument beside it, and hears its rows for what they are
# worth: much about differences, less about levels, since the tenth row of a biased source repeats its bias.
#
# Here tracks that were melted and cut stand beside an analytic formula (a point source of heat: no beam, no keyhole),
# computed with an absorptivity that a calorimeter found. Both come from one simulator, so that the truth is known.

# %%
import warnings

import matplotlib.pyplot as plt
import torch

import pyro_invman as pim
from pyro_invman import plots
from pyro_invman.simulators import melt_pool

TASKS = 80  # short: 12
STEPS = 400  # short: 15
OTHERS = 30  # short: 2
DRAWS = 1000  # short: 100
STEEL = dict(zip(melt_pool.VARIABLES.with_role("condition"), melt_pool.ALLOYS["316L"], strict=False))
SETTINGS, SIZES = ["power_W", "speed_mm_s"], ["depth_um", "width_um"]
UNITS = {"power_W": "W", "speed_mm_s": "mm/s", "depth_um": "um", "width_um": "um"}
NOISE = (0.08, 0.05)  # of the logarithms of an experiment's depth and width


def machines(tasks, rows, seed, missing=0.4, name="machine"):
    """Rows of either source for each machine, experiments first; machines differ in absorptivity and beam."""
    g = torch.Generator().manual_seed(seed)
    absorptivity, beam = 0.25 + 0.25 * torch.rand(tasks, 1, generator=g), 60 + 40 * torch.rand(tasks, 1, generator=g)
    power = 120 + 230 * torch.rand(tasks, 2 * rows, generator=g)
    speed = 300 + 1200 * torch.rand(tasks, 2 * rows, generator=g)
    found = absorptivity * (0.1 * torch.randn(tasks, rows, generator=g)).exp()  # the calorimeter's, each time anew
    track = melt_pool.forward(power[:, :rows], speed[:, :rows], beam, 40.0, **STEEL, absorptivity=absorptivity)
    formula = melt_pool.forward(
        power[:, rows:], speed[:, rows:], beam, 40.0, **STEEL, absorptivity=found, source="analytic"
    )
    cells = {"power_W": power, "speed_mm_s": speed}
    for size, noise in zip(SIZES, NOISE, strict=True):
        seen = getattr(track, size) * (noise * torch.randn(tasks, rows, generator=g)).exp()
        seen[torch.rand(tasks, rows, generator=g) < missing] = torch.nan
        cells[size] = torch.cat([seen, getattr(formula, size)], 1)
    return pim.from_columns(
        {column: values.flatten() for column, values in cells.items()},
        roles=dict.fromkeys(SETTINGS, "parameter") | dict.fromkeys(SIZES, "observation"),
        supports=dict.fromkeys(cells, "positive"),
        units=UNITS,
        task=[f"{name} {t}" for t in range(tasks) for _ in range(2 * rows)],
        source=[*["experiment"] * rows, *["formula"] * rows] * tasks,
    )


tables = machines(TASKS, 10, seed=0)
print(f"{tables.sizes['row']} rows:", {s: int((tables.source == s).sum()) for s in ("experiment", "formula")})
manifold = pim.ProcessManifold.from_dataset(tables, latent_dim=2, reference_source="experiment")
schedule = pim.Schedule(learning_rate=3e-3, batch_size=24, steps=STEPS, warmup=50, evaluate_every=25, patience=20)
history = manifold.fit(tables, seed=0, schedule=schedule, progress=False)
print("the formula beside the experiment, in standard deviations of the logarithms:")
for j, column in enumerate(manifold.network.columns):
    of = manifold.sources
    bias, gain, noise = of.bias[0, j], of.log_gain[0, j].exp(), of.log_noise[0, j].exp()
    print(f"  {manifold.variables[column].name}: bias {bias:+.2f}, gain {gain:.2f}, noise {noise:.2f}")

# %% [markdown]
# ## What cheap rows are worth
#
# Depths of ten further tracks on machines that were not learned from are predicted: knowing nothing of the machine;
# from two experiments; from ten rows of the formula; from both. And from the same ten rows where they are **taken for
# experiments**, which is what a table without a source column does.

# %%
torch.manual_seed(0)
WAYS = (
    "nothing",
    "2 experiments",
    "10 of the formula",
    "2 experiments and 10 of the formula",
    "10 taken for experiments",
)
losses, covered = {way: [] for way in WAYS}, {way: [] for way in WAYS}
for seed in range(500, 500 + OTHERS):
    rows = machines(1, 12, seed=seed, missing=0.0, name="other")
    two, asked, ten = (rows.isel(row=slice(*ends)) for ends in ((0, 2), (2, 12), (12, 22)))
    both = rows.isel(row=[0, 1, *range(12, 22)])
    mistaken = ten.assign_coords(source=("row", ["experiment"] * 10))
    given = {name: torch.tensor(asked[name].values) for name in SETTINGS}
    truth = torch.tensor(asked["depth_um"].values).unsqueeze(-1)
    for way, known in zip(WAYS, (None, two, ten, both, mistaken), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pim.UnfamiliarTask)
            answer = manifold.infer_task(known).conditional(["depth_um"], given)
        losses[way].append(-float((answer.log_prob(truth).detach() + truth[:, 0].log()).mean()))  # of a log-depth
        low, high = answer.sample((DRAWS,))[..., 0].quantile(torch.tensor([0.05, 0.95], dtype=truth.dtype), dim=0)
        covered[way].append(float(((truth[:, 0] > low) & (truth[:, 0] < high)).double().mean()))
means = {way: torch.tensor(values) for way, values in losses.items()}
for way in WAYS:
    error, share = means[way].std() / len(means[way]) ** 0.5, sum(covered[way]) / len(covered[way])
    print(f"{way}: {means[way].mean():+.2f} ± {error:.2f} nats a depth; 90 % intervals hold {share:.0%}")

# %% [markdown]
# ## What to pay for
#
# A track at a cost of 5, or a row of the formula at 1? The campaign divides what each is expected to tell by its cost,
# one suggestion after the other, each given those before it.

# %%
rows = machines(1, 20, seed=900, name="new machine")
candidates = rows[SETTINGS].assign_coords(cost=("row", [5.0] * 20 + [1.0] * 20)).drop_vars("task")
later = rows[SETTINGS].isel(row=slice(0, 5)).drop_vars(["task", "source"])
course = pim.design.Campaign(manifold, None, candidates, objective={"predict": ["depth_um"], "at": later}, shortlist=0)
batch = course.suggest(12)
for place in range(12):
    row = batch.isel(row=place)
    print(f"{place + 1:2d}. {row.source.values!s:10s} at a cost of {float(row.cost):2.0f}: {float(row.gain):.3f} nats")

# %% [markdown]
# ## Pictures

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.2), constrained_layout=True)
strength = tables.power_W / tables.speed_mm_s**0.5
for source, colour in (("experiment", "#20639b"), ("formula", "#e39f2d")):
    own = (tables.source == source).values
    left.plot(strength[own], tables.depth_um[own], ".", ms=3, alpha=0.6, color=colour, label=source)
left.set(xlabel=plots.label("power / sqrt(speed)", "W (s/mm)^0.5"), ylabel=plots.label("depth_um", "um"))
left.legend(frameon=False, fontsize=8)

place = range(len(WAYS))
errors = [float(means[way].std()) / OTHERS**0.5 for way in WAYS]
near = [float(means[way].mean()) for way in WAYS[:-1]]
middle.errorbar(near, place[:-1], xerr=errors[:-1], fmt="o", color="#20639b")
middle.text(
    0.97,
    place[-1],
    f"{means[WAYS[-1]].mean():+.1f} ± {errors[-1]:.1f}, far to the right →",
    ha="right",
    va="center",
    fontsize=8,
    color="#d1495b",
    transform=middle.get_yaxis_transform(),
)
middle.set_yticks(place, [way.replace(" and ", "\nand ") for way in WAYS], fontsize=8)
middle.set_ylim(len(WAYS) - 0.5, -0.5)
middle.set(xlabel=plots.label("negative log-density of a log-depth", "nat"), ylabel="what is known of the machine")

plots.gain_against_cost(course.history, ax=right)
plt.show()

# %% [markdown]
# **How to read them.** Left: the two sources over the same settings; the formula knows no keyhole, and its depths stay
# behind where the laser is strong. Middle: further left is better; bars are standard errors over machines. Ten rows of
# the formula tell much of a machine of which nothing is known, but less than two experiments, and beside these they add
# nothing here: their bias depends on the settings and on the machine, which a bias, a gain and a noise for each size do
# not describe, and answers from the formula alone are somewhat too sure (four in five truths in their 90 % intervals).
# Taken for experiments, the same rows are ruinous. Right: what the suggestions promise in all against what they cost;
# short steps are rows of the formula, long ones experiments: a few cheap rows first, then it pays to melt and cut.
