# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Learned flows as primitives of Pyro models
#
# A `JointFlow` hands out conditionals as Pyro distributions. So a model can be written where one factor is known from
# physics, another is one's own prior, and a third is learned from a table. Here the same flow serves as a
# **likelihood**, as a **prior**, and beside a **Gaussian process**; inference is Pyro's own, NUTS and SVI.
#
# The table comes from a formula, so each posterior can be held against the exact one.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_invman as pim
from pyro_invman import plots

ROWS = 3000
STEPS = 2000  # short: 60
DRAWS = 400  # short: 20
WARMUP = 200  # short: 10
SVI_STEPS = 800  # short: 20
COMPILED = {"jit_compile": True, "ignore_jit_warnings": True}  # short: {}


def depth_law(power, speed):
    """Log-depth of a melted track: a keyhole opens where the laser is strong for its speed, and is less steady."""
    strength = power / speed.sqrt()
    keyhole = torch.sigmoid(2 * (strength - 8))
    return dist.LogNormal((5 * strength).log() + 0.5 * keyhole, 0.06 + 0.12 * keyhole)


def speed_law(power):
    """How the laboratory chose its speeds: faster, and ever faster, with power."""
    return dist.LogNormal((300 + 1200 * ((power - 100) / 300) ** 2).log(), 0.35)


generator = torch.Generator().manual_seed(0)
torch.manual_seed(1)
power = 100 + 300 * torch.rand(ROWS, generator=generator)
speed = speed_law(power).sample()
depth = depth_law(power, speed).sample()
depth[torch.rand(ROWS, generator=generator) < 0.3] = torch.nan  # never cut

ds = pim.from_columns(
    {"power_W": power, "speed_mm_s": speed, "depth_um": depth},
    roles={"power_W": "parameter", "speed_mm_s": "parameter", "depth_um": "observation"},
    supports=dict.fromkeys(["power_W", "speed_mm_s", "depth_um"], "positive"),
    units={"power_W": "W", "speed_mm_s": "mm/s", "depth_um": "um"},
)
flow = pim.JointFlow.from_dataset(ds, seed=0)
flow.fit(ds, seed=0, schedule=pim.Schedule(steps=STEPS), progress=False)
_ = flow.requires_grad_(False)  # learned; from here on only the models' own unknowns are inferred

# %% [markdown]
# ## As a likelihood
#
# A scanner is out of order: it runs at one unknown speed, whatever is typed in. Four tracks at known powers were cut.
# What the laboratory *usually* chooses must not enter here: the prior over the speed is our own, and the flow gives
# p(depth | power, speed) only, which holds wherever the laboratory has been. (Where it never was, at settings that no
# row is near, a learned likelihood is a guess like any extrapolation.) A conditional has an event dimension even for
# one target, hence the trailing 1.

# %%
tracks = torch.tensor([240.0, 260.0, 280.0, 300.0])
true_speed = 700.0
cut = depth_law(tracks, torch.tensor(true_speed)).sample().unsqueeze(-1)


def scanner(depths):
    v = pyro.sample("speed", dist.Uniform(300.0, 1500.0))
    with pyro.plate("track", 4):
        pyro.sample("depth", flow.conditional(["depth_um"], {"power_W": tracks, "speed_mm_s": v}), obs=depths)


pyro.set_rng_seed(0)
by_nuts = MCMC(NUTS(scanner, **COMPILED), num_samples=DRAWS, warmup_steps=WARMUP, disable_progbar=True)
by_nuts.run(cut)
speeds = by_nuts.get_samples()["speed"]

line = torch.linspace(305, 1495, 400)
exact = depth_law(tracks.unsqueeze(-1), line).log_prob(cut).sum(0).softmax(0)
exact_mean = (exact * line).sum()
exact_sd = (exact * (line - exact_mean) ** 2).sum().sqrt()
print(f"speed, mm/s: NUTS {speeds.mean():.0f} ± {speeds.std():.0f}, exact {exact_mean:.0f} ± {exact_sd:.0f}, true 700")

# %% [markdown]
# ## As a prior
#
# Now nothing is broken, and what the laboratory usually does *is* knowledge: p(power, speed) as a whole, straight from
# the table. A photodiode, of which we know the physics, reads the power to ± 10 %. The reading says nothing about the
# speed; the prior does, because of two habits that go together. NUTS and a normal guide (SVI) answer the same model.

# %%
reading = 2.6  # volts, at 10 mV for each watt


def photodiode(volts):
    settings = pyro.sample("settings", flow.conditional(["power_W", "speed_mm_s"]))
    pyro.sample("volts", dist.Normal(0.01 * settings[..., 0], 0.26), obs=volts)


pyro.clear_param_store()
pyro.set_rng_seed(1)
volts = torch.tensor(reading)
mcmc = MCMC(NUTS(photodiode, **COMPILED), num_samples=DRAWS, warmup_steps=WARMUP, disable_progbar=True)
mcmc.run(volts)
nuts_settings = mcmc.get_samples()["settings"]

guide = AutoMultivariateNormal(photodiode)
svi = SVI(photodiode, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=8, vectorize_particles=True))
losses = [svi.step(volts) for _ in range(SVI_STEPS)]
svi_settings = Predictive(guide, num_samples=DRAWS)(volts)["settings"]

grid_power, grid_speed = torch.meshgrid(torch.linspace(101, 399, 120), torch.linspace(150, 2200, 160), indexing="ij")
log_exact = speed_law(grid_power).log_prob(grid_speed) + dist.Normal(0.01 * grid_power, 0.26).log_prob(volts)
exact_settings = log_exact.flatten().softmax(0).reshape(grid_power.shape)
for name, values in (("power", grid_power), ("speed", grid_speed)):
    column = 0 if name == "power" else 1
    mean = (exact_settings * values).sum()
    sd = (exact_settings * (values - mean) ** 2).sum().sqrt()
    print(
        f"{name}: exact {mean:.0f} ± {sd:.0f}, NUTS {nuts_settings[:, column].mean():.0f} ± "
        f"{nuts_settings[:, column].std():.0f}, SVI {svi_settings[..., column].mean():.0f} ± "
        f"{svi_settings[..., column].std():.0f}"
    )

# %% [markdown]
# ## Beside a Gaussian process
#
# Over a day the laser drifts: of the 260 W that are set, 260 e^f(t) W arrive, with f an unknown smooth function of
# time, a Gaussian process. Thirty tracks of the day were cut. The learned conditional is the link between the latent
# function and what was measured; it bends where the keyhole opens, and a linear instrument model would not do. The same
# model with the true law in the flow's place shows what the learned link costs.

# %%
hours = torch.linspace(0, 8, 30)
drift = 0.18 * torch.sin(2 * math.pi * hours / 7) - 0.02 * hours
set_power, set_speed = 260.0, 640.0
measured = depth_law(set_power * drift.exp(), torch.tensor(set_speed)).sample().unsqueeze(-1)

kernel = 0.2**2 * torch.exp(-0.5 * ((hours.unsqueeze(-1) - hours) / 1.5) ** 2)
root = torch.linalg.cholesky(kernel + 1e-5 * torch.eye(len(hours)))


def learned_law(power):
    return flow.conditional(["depth_um"], {"power_W": power, "speed_mm_s": set_speed})


def true_law(power):
    return dist.Independent(depth_law(power.unsqueeze(-1), torch.tensor(set_speed)), 1)


def drifting(depths, law):
    white = pyro.sample("white", dist.Normal(torch.zeros(len(hours)), 1.0).to_event(1))
    f = pyro.deterministic("drift", (root @ white.unsqueeze(-1)).squeeze(-1), event_dim=1)
    with pyro.plate("track", len(hours)):
        pyro.sample("depth", law(set_power * f.exp()), obs=depths)


bands = {}
for name, law in (("learned", learned_law), ("true", true_law)):
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    guide = AutoMultivariateNormal(drifting)
    svi = SVI(drifting, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(measured, law) for _ in range(SVI_STEPS)]
    draws = Predictive(drifting, guide=guide, num_samples=400, return_sites=["drift"])(measured, law)["drift"]
    bands[name] = draws.reshape(400, -1).quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=0)
    inside = ((drift >= bands[name][0]) & (drift <= bands[name][4])).float().mean()
    error = (bands[name][2] - drift).square().mean().sqrt()
    print(f"{name} law: truth inside the 90 % band at {inside:.0%} of the times, median off by {error:.3f}")

# %% [markdown]
# ## Learning the weights in the model
#
# `flow.conditional(…)` uses the weights as they are. *Called*, `flow(targets, given)`, the flow registers them in
# Pyro's parameter store, and SVI trains them with everything else. (A flow held by a plain closure would silently not
# be trained; this is what the second way is for.)

# %%
flow.requires_grad_(True)
pyro.clear_param_store()
pyro.poutine.trace(lambda: pyro.sample("settings", flow(["power_W", "speed_mm_s"]))).get_trace()
print(f"{len(pyro.get_param_store())} tensors of weights in the parameter store")

# %% [markdown]
# ## Pictures

# %%
figure, (left, middle_axis, right) = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
left.hist(speeds, 30, density=True, color="#b0b7bf", label="NUTS, learned likelihood")
left.plot(line, exact / (line[1] - line[0]), color="k", lw=1, label="exact")
left.axvline(true_speed, color="#d1495b", label="truth")
left.set(xlabel=plots.label("speed", "mm/s"), ylabel=plots.label("density", "s/mm"), xlim=(300, 1500))
left.legend(frameon=False, fontsize=8)

middle_axis.plot(*nuts_settings.T, ".", ms=3, color="#20639b", label="NUTS")
middle_axis.plot(*svi_settings.reshape(-1, 2).T, ".", ms=3, color="#e39f2d", alpha=0.7, label="SVI, normal guide")
levels = exact_settings.max() * torch.tensor([0.02, 0.2, 0.6])
middle_axis.contour(grid_power, grid_speed, exact_settings, levels=levels, colors="k", linewidths=0.8)
middle_axis.set(xlabel=plots.label("power_W", "W"), ylabel=plots.label("speed_mm_s", "mm/s"))
middle_axis.set(xlim=(150, 410), ylim=(150, 2300))
middle_axis.legend(frameon=False, fontsize=8, loc="upper left")

plots.bands(
    hours.numpy(),
    bands["learned"].numpy(),
    ("time", "drift, ln(arrived / set power)"),
    ("h", "1"),
    truth=drift.numpy(),
    ax=right,
)
for edge in (0, 4):
    right.plot(hours, bands["true"][edge], color="k", lw=0.8, label="90 %, true law" if edge == 0 else None)
right.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# **How to read them.** Left: the bars should follow the black line, which is the posterior of someone who knows the
# formula; where they do not, the learned likelihood is off. Middle: black lines are the exact posterior at 2, 20 and
# 60 % of its peak. The photodiode bounds the power, and the prior turns the bound into a region of speeds; the points
# of NUTS fill it, while those of the normal guide show how well one normal (in the logarithms that Pyro uses for
# positive numbers) can stand for it: too widely, at the high speeds. Right: red is the truth, blue what the model with
# the learned law says of it; thin black lines bound what it would say with the true one. They nearly agree, so that
# where the truth leaves both, in the second hour and the third, it is the tracks of those hours that mislead, not the
# flow.
