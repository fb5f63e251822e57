# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # From a simulator: for people who come from `sbi`
#
# Simulation-based inference draws parameters θ from a prior, runs a simulator, and learns p(θ | x) from the pairs. A
# `JointFlow` does the same from a table of simulations, and the table is all it needs: parameters are columns of the
# role `parameter`, outputs columns of the role `observation`. What differs: it learns **every** conditional at once
# (posterior, likelihood, marginals), simulations and observations may have **holes**, and what comes back is a Pyro
# distribution.
#
# | in `sbi` | here |
# |---|---|
# | `prior.sample((N,))`, `simulator(theta)` | the same, then `pim.from_columns({...}, roles={...})` |
# | `NPE(prior).append_simulations(theta, x).train()` | `flow = pim.JointFlow.from_dataset(ds); flow.fit(ds)` |
# | `posterior = inference.build_posterior()` | `flow.conditional(["theta1", "theta2"], {"x1": ..., "x2": ...})` |
# | `posterior.sample((1000,), x=x_o)`, `posterior.log_prob(theta, x=x_o)` | `.sample((1000,))`, `.log_prob(theta)` |
# | `NLE`, then MCMC | `flow.conditional(["x1", "x2"], {"theta1": ..., ...})` in a Pyro model, then NUTS |
# | `run_sbc`, coverage | `pim.diagnostics.ask`, `.sbc`, `.coverage`, `.tarp`, `.judge` |
#
# The simulator is the benchmark's *two moons*, whose posterior is known.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

import pyro_invman as pim
from pyro_invman import plots

SIMULATIONS = 5000  # short: 600
STEPS = 2500  # short: 60
DRAWS = 300  # short: 16
MANY = 3000  # short: 200
GRID = 600  # short: 200
FRESH = 400  # short: 60
THETA, X = ["theta1", "theta2"], ["x1", "x2"]
generator = torch.Generator().manual_seed(0)


def simulator(theta):
    """x in the plane: a thin crescent, shifted by |θ1 + θ2| and θ2 − θ1."""
    angle = math.pi * (torch.rand(len(theta), generator=generator) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta), generator=generator)
    shift = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], -1) / math.sqrt(2)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1) + shift


def log_likelihood(theta, x):
    """log p(x | θ), exact, for the comparison alone."""
    shift = torch.stack([-(theta[..., 0] + theta[..., 1]).abs(), theta[..., 1] - theta[..., 0]], -1) / math.sqrt(2)
    a = x - shift - torch.tensor([0.25, 0.0])
    radius = a.norm(dim=-1)
    value = dist.Normal(0.1, 0.01).log_prob(radius) - (math.pi * radius).log()
    return torch.where(a[..., 0] > 0, value, torch.tensor(-math.inf))


def table_of(theta, x):
    """Simulations as a table; the box of the prior is said once, as the support of the parameters."""
    cells = torch.cat([theta, x], -1)
    return pim.from_columns(
        dict(zip(THETA + X, cells.unbind(-1), strict=True)),
        roles=dict.fromkeys(THETA, "parameter") | dict.fromkeys(X, "observation"),
        supports=dict.fromkeys(THETA, ("interval", -1.0, 1.0)),
    )


theta = 2 * torch.rand(SIMULATIONS, 2, generator=generator) - 1
ds = table_of(theta, simulator(theta))
flow = pim.JointFlow.from_dataset(ds, seed=0)
history = flow.fit(ds, seed=0, schedule=pim.Schedule(steps=STEPS), progress=False)

# %% [markdown]
# ## The posterior, beside the exact one

# %%
torch.manual_seed(0)
observed = torch.zeros(2)
posterior = flow.conditional(THETA, given={"x1": observed[0], "x2": observed[1]})
draws = posterior.sample((MANY,))

edges = torch.linspace(-1, 1, GRID + 1)
centres = (edges[1:] + edges[:-1]) / 2
grid = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1)
exact = log_likelihood(grid, observed).flatten().softmax(0)
with torch.no_grad():
    learned = posterior.log_prob(grid.reshape(-1, 2))
cell = (2 / GRID) ** 2
reference = grid.reshape(-1, 2)[torch.multinomial(exact, MANY, replacement=True, generator=generator)]
seen = exact > 0
divergence = (exact[seen] * (exact[seen].log() - math.log(cell) - learned[seen])).sum()
print(f"probability that the flow puts into the box: {(learned.exp() * cell).sum():.3f}")
print(f"KL(exact || learned): {divergence:.2f} nats;  C2ST: {pim.diagnostics.c2st(reference, draws):.3f}")

# %% [markdown]
# ## Other conditionals, from the same fit
#
# An output that was not recorded is NaN, and is marginalised; one parameter that is known is given like an output.

# %%
half = flow.conditional(THETA, given={"x1": 0.0, "x2": torch.nan}).sample((MANY,))
one = flow.conditional(["theta2"], given={"theta1": 0.2, "x1": 0.0, "x2": 0.0})
print("with x2 unknown, spread of the parameters:", half.std(0).tolist(), "with both:", draws.std(0).tolist())
print("theta2 given theta1 = 0.2 and both outputs:", one.sample((1000,)).quantile(torch.tensor([0.05, 0.95])).tolist())

# %% [markdown]
# ## Several observations, another prior: the likelihood in a Pyro model
#
# Three independent outputs of the *same* θ, and a prior that is not the one that was simulated from. The learned
# likelihood is an ordinary factor of a model, in a plate; NUTS does the rest. It starts where a single observation
# says that there is mass, since a chain does not cross between two moons.

# %%
true_theta = torch.tensor([0.3, 0.4])
three = simulator(true_theta.expand(3, 2))
flow.requires_grad_(False)


def model(outputs):
    t = pyro.sample("theta", dist.Normal(torch.tensor([0.2, 0.2]), 0.3).to_event(1))
    given = {"theta1": t[..., 0].clamp(-0.999, 0.999), "theta2": t[..., 1].clamp(-0.999, 0.999)}
    with pyro.plate("repeat", 3):
        pyro.sample("x", flow.conditional(X, given), obs=outputs)


pyro.set_rng_seed(0)
start = {"theta": flow.conditional(THETA, {"x1": three[0, 0], "x2": three[0, 1]}).sample((50,))}
best = torch.stack(
    [flow.conditional(X, dict(zip(THETA, t, strict=True))).log_prob(three).sum() for t in start["theta"]]
)
mcmc = MCMC(
    NUTS(model), DRAWS, DRAWS // 2, initial_params={"theta": start["theta"][best.argmax()]}, disable_progbar=True
)
mcmc.run(three)
shared = mcmc.get_samples()["theta"]
log_exact = sum(log_likelihood(grid, x) for x in three) + dist.Normal(0.2, 0.3).log_prob(grid).sum(-1)
weights = log_exact.flatten().softmax(0)
own = weights * (grid.sum(-1).flatten() > 0)  # the moon that the chain is in; the prior leaves little to the other
print(f"share of the exact posterior in the chain's moon: {own.sum():.2f}")
mean = (own.unsqueeze(-1) * grid.reshape(-1, 2)).sum(0) / own.sum()
print("there: NUTS", shared.mean(0).tolist(), "exact mean", mean.tolist(), "truth", true_theta.tolist())

# %% [markdown]
# ## Is it calibrated?
#
# Fresh simulations are questions whose answers are known. `ask` puts them, `judge` says in plain words what is to be
# thought of the direction; a calibrated posterior can still say little, hence the losses beside it.

# %%
fresh = 2 * torch.rand(FRESH, 2, generator=generator) - 1
asked = pim.diagnostics.ask(flow, table_of(fresh, simulator(fresh)), THETA, X)
verdict = pim.diagnostics.judge({asked.name: asked})[asked.name]
print(f"{asked.name}: {verdict.verdict} ({verdict.reasons})")
covered = pim.diagnostics.coverage(asked)

# %% [markdown]
# ## Pictures

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
left.plot(*half.T, ".", ms=2, color="#b0b7bf", label="x1 alone is known")
left.plot(*draws.T, ".", ms=2, color="#20639b", label="x1 and x2 are known")
left.contour(centres, centres, exact.reshape(GRID, GRID).T, levels=[float(exact.max()) / 5], colors="k", linewidths=0.8)
left.set(xlabel=plots.label("theta1", "1"), ylabel=plots.label("theta2", "1"), xlim=(-1, 1), ylim=(-1, 1))
left.legend(frameon=False, fontsize=8, loc="upper left", markerscale=4)

middle.plot(*shared.T, ".", ms=3, color="#20639b", label="NUTS, three outputs")
levels = weights.max() * torch.tensor([0.05, 0.5])
middle.contour(centres, centres, weights.reshape(GRID, GRID).T, levels=levels, colors="k", linewidths=0.8)
middle.plot(*true_theta, "+", ms=12, mew=2, color="#d1495b", label="truth")
middle.set(xlabel=plots.label("theta1", "1"), ylabel=plots.label("theta2", "1"), xlim=(0.2, 0.4), ylim=(0.3, 0.5))
middle.legend(frameon=False, fontsize=8)

for ax in (left, middle):
    ax.locator_params(nbins=5)
plots.calibration(covered, ax=right)
plt.show()

# %% [markdown]
# **How to read them.** Left: the black lines are the exact two moons; blue points should fill them evenly, and few
# should lie beside them. With x2 unknown the moons are drawn out along the direction that x2 would have fixed. Middle:
# black lines are the exact posterior of three outputs under the other prior (5 and 50 % of its peak). The chain follows
# them, but runs too far up: its mean is about a standard deviation too high in theta2, since the errors of a learned
# likelihood add up over outputs. Right: the curve of a right posterior stays within the grey band; below 0 it claims
# too much, above too little.
