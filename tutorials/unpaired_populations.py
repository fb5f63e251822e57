# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Two populations that were never measured together
#
# To see the grains of a piece of metal it has to be cut. So a specimen is seen before it is annealed, or after, never
# both: two tables, no row of one belonging to a row of the other. What would *this* specimen have become?
#
# First, what such data cannot tell; then, what a stated assumption adds to them.

# %%
import warnings

import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch

import pyro_invman as pim
from pyro_invman import plots
from pyro_invman.simulators import grain_growth

ROWS = 2000  # short: 300
STEPS = 600  # short: 9
SPECIMENS = 1000  # short: 40
GROUPS = 512  # short: 8
(before, plan_before), (after, plan_after) = grain_growth.simulate(ROWS, seed=0)
print("before:", before.shape, "planned temperatures:", plan_before.shape, "  after:", after.shape, plan_after.shape)

# %% [markdown]
# ## Without an assumption: nothing
#
# As one table, the two states are variables that no row shows together. A joint flow learns each, and reports no link
# between them: it does not invent one, and says so when it is asked.

# %%
blank = torch.full((300,), torch.nan)
table = pim.from_columns(
    {"before_um": torch.cat([before[:300, 0], blank]), "after_um": torch.cat([blank, after[:300, 0]])},
    roles={"before_um": "parameter", "after_um": "observation"},
    supports=dict.fromkeys(["before_um", "after_um"], "positive"),
    units=dict.fromkeys(["before_um", "after_um"], "um"),
)
flow = pim.JointFlow.from_dataset(table)
flow.fit(table, schedule=pim.Schedule(steps=STEPS // 3), progress=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", pim.UnidentifiedConditional)
    flow.conditional(["after_um"], given={"before_um": 20.0})
    shared = flow.mutual_information("before_um", "after_um")
print(caught[0].message)
print(f"information they share: {shared.value:.4f} nats")

# %% [markdown]
# ## With one: the map that moves as little as it can
#
# `ConditionalTransport` learns the law of each population as a function of the temperature, and the map between them of
# least mean squared displacement at each. That is an **assumption**: many maps take one law to the other, and unpaired
# rows cannot tell which is the true one. For grains that only grow, in an order that annealing keeps, it is close.

# %%
transport = pim.ConditionalTransport(event_dim=2, context_dim=1, groups=GROUPS, seed=0)
schedule = pim.Schedule(steps=STEPS, batch_size=256)
transport.fit((before, plan_before), (after, plan_after), seed=0, schedule=schedule, progress=False)

generator = torch.Generator().manual_seed(1)


def errors(moved, temperature, specimens):
    """Root mean square error of moved specimens, in standard deviations, and that of any other specimen's state."""
    truth = grain_growth.annealed(specimens, temperature)
    other = grain_growth.annealed(grain_growth.unannealed(len(specimens), generator), temperature)
    scale = transport.length
    return [((x - truth) / scale).square().sum(-1).mean().sqrt().item() for x in (moved, other)]


for kelvin in (950.0, 1050.0, 1150.0):
    specimens = grain_growth.unannealed(SPECIMENS, generator)
    hot = torch.full((SPECIMENS,), kelvin)
    with torch.no_grad():
        mapped = transport(specimens, hot.unsqueeze(-1))
    ours, guess = errors(mapped, hot, specimens)
    print(f"{kelvin:.0f} K: error of the map {ours:.2f}, of a guess by the law alone {guess:.2f} standard deviations")

# %% [markdown]
# ## The map is a transform of Pyro's
#
# `transport.condition(c)` is a bijection with log |det J|. Pushed through it, what is known of one specimen becomes a
# law of what it turns into, with a density; `inv` leads back.

# %%
at = transport.condition(torch.tensor([1100.0]))
specimen = dist.Normal(torch.tensor([15.0, 150.0]), torch.tensor([0.5, 3.0])).to_event(1)  # measured, with its errors
becomes = dist.TransformedDistribution(specimen, [at])
draws = becomes.sample((2 * SPECIMENS,)).detach()
print("becomes, at 1,100 K:", draws.mean(0).tolist(), "±", draws.std(0).tolist())
print("in truth:", grain_growth.annealed(torch.tensor([[15.0, 150.0]]), torch.tensor([1100.0]))[0].tolist())
print("and back:", at.inv(at(torch.tensor([15.0, 150.0]))).tolist())

# %% [markdown]
# ## Where the assumption is wrong
#
# A round cloud turned by a quarter looks the same as before. The map of least displacement leaves it as it is: it fits
# both laws perfectly and is wrong at every point. Ten known pairs repair it; no number of unpaired rows would.

# %%
turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
cloud, turned = torch.randn(SPECIMENS, 2, generator=generator), torch.randn(SPECIMENS, 2, generator=generator) @ turn.T
nothing = torch.zeros(SPECIMENS, 0)
seen = torch.randn(10, 2, generator=generator)
pairs = (seen, seen @ turn.T + 0.05 * torch.randn(10, 2, generator=generator), torch.zeros(10, 0))
points = torch.randn(SPECIMENS, 2, generator=generator)
maps = {}
for name, known in (("unpaired", None), ("and 10 pairs", pairs)):
    guess = pim.ConditionalTransport(event_dim=2, context_dim=0, groups=GROUPS, seed=0)
    guess.fit((cloud, nothing), (turned, nothing), known, schedule=pim.Schedule(steps=STEPS // 3), progress=False)
    with torch.no_grad():
        maps[name] = guess(points, torch.zeros(SPECIMENS, 0))
    print(f"{name}: root mean square error {(maps[name] - points @ turn.T).square().sum(-1).mean().sqrt():.2f}")

# %% [markdown]
# ## Pictures

# %%
figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
for ax, kelvin in zip(axes, (950.0, 1050.0, 1150.0), strict=False):
    specimens = grain_growth.unannealed(SPECIMENS // 3, generator)
    hot = torch.full((SPECIMENS // 3,), kelvin)
    with torch.no_grad():
        mapped = transport(specimens, hot.unsqueeze(-1))
    truth = grain_growth.annealed(specimens, hot)
    ax.plot(*specimens.T, ".", ms=3, color="#b0b7bf", label="before")
    ax.plot(*mapped.T, ".", ms=3, color="#20639b", label="after, by the map")
    ax.plot(*truth[:12].T, "o", ms=6, mfc="none", color="#d1495b", label="after, in truth")
    for start, end in zip(specimens[:12], mapped[:12], strict=True):
        ax.annotate("", end.tolist(), start.tolist(), arrowprops={"arrowstyle": "->", "lw": 0.6})
    ax.set(xlabel=plots.label("grain size", "um"), ylabel=plots.label("hardness", "HV"), title=f"{kelvin:.0f} K")
axes[0].legend(frameon=False, fontsize=8)
for colour, (name, moved) in zip(("#b0b7bf", "#20639b"), maps.items(), strict=True):
    for start, end in zip(points[:15], moved[:15], strict=True):
        arrow = {"arrowstyle": "->", "color": colour}
        axes[3].annotate("", end.tolist(), start.tolist(), arrowprops=arrow)
    axes[3].plot([], [], color=colour, label=name)
axes[3].plot(*(points[:15] @ turn.T).T, "o", ms=6, mfc="none", color="#d1495b", label="truth")
axes[3].set(xlabel="first coordinate [1]", ylabel="second coordinate [1]", title="a cloud turned by a quarter")
axes[3].set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
axes[3].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# **How to read them.** In the first three, an arrow should end in a red ring: that is where the specimen it starts from
# would have gone, which the fit was never told. Blue as a whole should have the shape of the annealed population. In
# the last, grey arrows (unpaired rows alone) are too short to be seen, though the truth is a quarter turn; blue ones
# (with ten pairs) end near the rings. Without pairs, or a physical reason to expect the least displacement, a map
# between unpaired populations is a picture of the laws, not of specimens.
