# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Which measurement next
#
# A design is good if its outcome is expected to tell much about what is asked. That is the expected information gain,
#
# $$I(d) = E_{p(y, \theta \mid d)}\left[\log \frac{p(\theta \mid y, d)}{p(\theta)}\right]$$
#
# in nats: e^I is by what factor the outcome is expected to narrow the answer down. What θ stands for is our choice:
# hidden parameters (inverse), a future outcome (forward), or what is special about a task. First for a Pyro model that
# is known, then on a learned manifold.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch

import pyro_invman as pim
from pyro_invman import plots
from pyro_invman.simulators import melt_pool

SAMPLES = 6000  # short: 400
SECONDS = 12.0  # short: 0.7
PARTICLES = 2000  # short: 200
CLIMB = 150  # short: 15
TASKS = 80  # short: 12
STEPS = 500  # short: 15
ROUNDS = 6  # short: 2


# %% [markdown]
# ## A known model
#
# Where the answer is a closed form, it lies between the two limits: a line y = slope · d + noise, whose information
# gain is ½ ln(1 + d²).


# %%
def line(designs):
    with pyro.plate_stack("designs", designs.shape[:2]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * designs, 1.0))


at = torch.tensor([0.5, 1.0, 2.0, 4.0])
found = pim.design.expected_information_gain(line, at, "y", "slope", num_samples=SAMPLES, seed=0)
for d, low, high in zip(at, found.lower.values, found.upper.values, strict=True):
    print(f"d = {d:g}: between {low:.3f} and {high:.3f}, exact {0.5 * torch.log1p(d**2):.3f} nats")

# %% [markdown]
# ## When to draw blood
#
# A drug is taken up at rate ka, leaves at rate ke, and spreads over a volume V. One blood sample may be drawn: when?
# It depends on what for. All three parameters; the rate ke alone, the others being nuisances; or, forward, the level
# that will be left after 24 hours. Only `target_labels` changes.


# %%
def level(hours, ka, ke, volume):
    """Concentration, mg/l, after a dose of 100 mg."""
    return 100 * ka / (volume * (ka - ke)) * ((-ke * hours).exp() - (-ka * hours).exp())


def patient(hours):
    with pyro.plate_stack("designs", hours.shape[:2]):
        ka = pyro.sample("ka", dist.LogNormal(0.0, 0.4))
        ke = pyro.sample("ke", dist.LogNormal(-2.3, 0.4))
        volume = pyro.sample("volume", dist.LogNormal(3.0, 0.2))
        drawn = level(hours, ka, ke, volume)
        pyro.sample("blood", dist.Normal(drawn, 0.1 + 0.1 * drawn))
        last = level(torch.tensor(24.0), ka, ke, volume)
        pyro.sample("left", dist.Normal(last, 0.02 + 0.02 * last))


hours = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 20.0, 24.0, 30.0])
questions = {"ka, ke and V": ["ka", "ke", "volume"], "ke": ["ke"], "the level after 24 h": ["left"]}
gains = {}
for name, targets in questions.items():
    gains[name] = pim.design.expected_information_gain(patient, hours, "blood", targets, max_seconds=SECONDS, seed=0)
    best = int(gains[name].eig.values.argmax())
    print(
        f"{name}: at {hours[best]:g} h, {float(gains[name].eig[best]):.2f} nats "
        f"(between {float(gains[name].lower[best]):.2f} and {float(gains[name].upper[best]):.2f})"
    )

# %% [markdown]
# The time need not be one of a list: `optimize` climbs along the gradient of a bound, from several starts, also for
# several samples at once, whose gain is joint: near duplicates count once.


# %%
def three_samples(hours):
    """Three samples of one patient, hours (S, C, 3)."""
    with pyro.plate_stack("designs", hours.shape[:2]):
        ka = pyro.sample("ka", dist.LogNormal(0.0, 0.4)).unsqueeze(-1)
        ke = pyro.sample("ke", dist.LogNormal(-2.3, 0.4)).unsqueeze(-1)
        volume = pyro.sample("volume", dist.LogNormal(3.0, 0.2)).unsqueeze(-1)
        drawn = level(hours, ka, ke, volume)
        pyro.sample("blood", dist.Normal(drawn, 0.1 + 0.1 * drawn).to_event(1))


best = pim.design.optimize(
    three_samples,
    torch.tensor([1.0, 6.0, 24.0]),
    "blood",
    bounds=(0.1, 36.0),
    num_starts=4,
    num_steps=CLIMB,
    max_seconds=2 * SECONDS,
    seed=0,
)
print(
    f"three samples at {[round(h, 1) for h in sorted(best.design.values.tolist())]} h: {float(best.eig):.2f} nats "
    f"(between {float(best.lower):.2f} and {float(best.upper):.2f})"
)

# %% [markdown]
# Several samples, each chosen by what the earlier ones showed: `Sequential` carries the belief about the patient by
# particles. Here a patient whose rates are known to us plays along.

# %%
truth = {"ka": torch.tensor(1.4), "ke": torch.tensor(0.07), "volume": torch.tensor(23.0)}
generator = torch.Generator().manual_seed(0)
experiment = pim.design.Sequential(
    lambda h: pyro.poutine.block(patient, hide=["left"])(h), hours, "blood", num_particles=PARTICLES, seed=0
)
hour = experiment.step()
for _ in range(4):
    exact_level = level(hour, *truth.values())
    blood = exact_level + (0.1 + 0.1 * exact_level) * torch.randn((), generator=generator)
    asked, hour = hour, experiment.step(blood)
    ke = experiment.latents["ke"]
    print(f"blood at {asked:g} h: ke = {ke.mean():.3f} ± {ke.std():.3f} per hour, true {truth['ke']:.3f}")

# %% [markdown]
# ## On a learned manifold
#
# Now no formula is known to the model, but eighty machines have been seen that melt the same steel, each with an
# absorptivity and a width of the beam of its own (see *Many tasks*; the process is the same).

# %%
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


tables, _, _ = machines(TASKS, 10, seed=0)
manifold = pim.ProcessManifold.from_dataset(tables, latent_dim=2)
schedule = pim.Schedule(learning_rate=3e-3, batch_size=24, steps=STEPS, warmup=50, evaluate_every=25, patience=20)
history = manifold.fit(tables, seed=0, schedule=schedule, progress=False)

# %% [markdown]
# Of a new machine, tracks can be melted at twenty-five settings and looked at in two ways: cut (the depth, at a cost of
# 4) or from above (the width, at a cost of 1). A `Campaign` suggests what tells most **for its cost**. Again what is
# asked is our choice.

# %%
settings = ["power_W", "speed_mm_s"]
powers, speeds = torch.meshgrid(torch.linspace(130, 340, 5), torch.linspace(400, 1400, 5), indexing="ij")
powers, speeds = powers.flatten(), speeds.flatten()
candidates = pim.from_columns(
    {"power_W": powers.repeat(2), "speed_mm_s": speeds.repeat(2)},
    roles=dict.fromkeys(settings, "parameter"),
    supports=dict.fromkeys(settings, "positive"),
    units={"power_W": "W", "speed_mm_s": "mm/s"},
)
candidates = candidates.assign_coords(
    measure=("row", ["depth_um"] * 25 + ["width_um"] * 25), cost=("row", [4.0] * 25 + [1.0] * 25)
)
later = candidates.isel(row=[0, 6, 12, 18, 24]).drop_vars(["measure", "cost"])  # where depths are to be predicted


def campaign(objective, cost="cost", shortlist=4):
    return pim.design.Campaign(manifold, None, candidates, cost=cost, objective=objective, shortlist=shortlist)


objectives = {
    "task": "task",
    "inverse": {"parameters": ["absorptivity"]},
    "forward": {"predict": ["depth_um"], "at": later},
}
for name, objective in objectives.items():
    for what, cost in (("for its cost", "cost"), ("whatever it costs", 1.0)):
        first = campaign(objective, cost).suggest(1)
        print(
            f"{name}, {what}: {first.measure.values[0]!s} at {float(first.power_W[0]):.0f} W, "
            f"{float(first.speed_mm_s[0]):.0f} mm/s; {float(first.gain[0]):.2f} nats expected; the two sides "
            f"{float(first.posterior[0]):.2f} and {float(first.likelihood[0]):.2f} ± {float(first.error[0]):.2f}"
        )

# %% [markdown]
# The model is learned, so neither side is a bound; how far the two lie apart is an estimate of how wrong they may be.
# For the task and the absorptivity they agree to some tenths of a nat. For the predictions they do not: there the
# campaign below goes by the closed form under the manifold alone (`shortlist=0`).
#
# It goes row by row. What was suggested is measured (here: simulated) and told, and the next suggestion knows it.

# %%
generator = torch.Generator().manual_seed(5)
_, true_absorptivity, true_beam = machines(1, 1, seed=77, name="new machine")
true_depth = pool(
    torch.tensor(later.power_W.values), torch.tensor(later.speed_mm_s.values), *(true_absorptivity, true_beam)
)[0]
course = campaign(objectives["forward"], shortlist=0)
torch.manual_seed(0)


def prediction():
    given = {name: torch.tensor(later[name].values) for name in settings}
    return course.task.conditional(["depth_um"], given).sample((1000,))[..., 0]


widths, errors, spent = [], [], [0.0]
for turn in range(ROUNDS + 1):
    draws = prediction()
    widths.append(float(draws.log().std(0).mean()))
    errors.append(float((draws.median(0).values / true_depth).log().square().mean().sqrt()))
    print(f"spent {spent[-1]:4.0f}: depths known to ± {widths[-1]:.0%}, medians off by {errors[-1]:.0%}")
    if turn == ROUNDS:
        break
    chosen = course.suggest(1)
    name = str(chosen.measure.values[0])
    at = (float(chosen.power_W[0]), float(chosen.speed_mm_s[0]))
    exact = pool(torch.tensor([at[0]]), torch.tensor([at[1]]), true_absorptivity, true_beam)[name == "width_um"]
    noise = {"depth_um": 0.08, "width_um": 0.05}[name]
    seen = exact * (noise * torch.randn(1, generator=generator)).exp()
    answer = pim.from_columns(
        {"power_W": [at[0]], "speed_mm_s": [at[1]], name: seen},
        roles=dict.fromkeys(settings, "parameter") | {name: "observation"},
        supports=dict.fromkeys([*settings, name], "positive"),
        units={"power_W": "W", "speed_mm_s": "mm/s", name: "um"},
    )
    course.tell(answer.assign_coords(candidate=("row", chosen.candidate.values)))
    spent.append(spent[-1] + float(chosen.cost[0]))
    print(f"  measured: {name} at {at[0]:.0f} W, {at[1]:.0f} mm/s: {float(seen):.0f} um")

promised = float(course.history.gain.sum())
gained = float(torch.tensor(widths[0] / widths[-1]).log())
print(
    f"promised in all {promised:.2f} nats a depth; the logarithm of how much narrower predictions became: {gained:.2f}"
)

# %% [markdown]
# ## Pictures

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), constrained_layout=True)
for (name, gain), colour in zip(gains.items(), ("#20639b", "#e39f2d", "#3c8d53"), strict=True):
    axes[0, 0].fill_between(hours, gain.lower, gain.upper, color=colour, alpha=0.25)
    axes[0, 0].plot(hours, gain.eig, ".-", color=colour, label=name)
axes[0, 0].set(xlabel=plots.label("time of the blood sample", "h"), ylabel=plots.label("expected gain", "nat"))
axes[0, 0].legend(frameon=False, fontsize=8, title="asked about")

axes[0, 1].plot(spent, widths, ".-", color="#20639b", label="standard deviation, as the manifold says")
axes[0, 1].plot(spent, errors, ".-", color="#d1495b", label="error of the medians, in truth")
axes[0, 1].set(xlabel=plots.label("total cost", "1"), ylabel=plots.label("ln depth, mean of five settings", "1"))
axes[0, 1].set(ylim=(0, None))
axes[0, 1].legend(frameon=False, fontsize=8)
plots.gain_against_cost(course.history, ax=axes[1, 0])
both = campaign({"predict": ["depth_um"], "at": later, "parameters": ["absorptivity"]}, cost=1.0)
plots.trade_off(both.trade_off(n=2, steps=9), ax=axes[1, 1])
plt.show()

# %% [markdown]
# **How to read them.** Upper left: each curve is a question to the same model, and the best time is where it is
# highest; the shading runs from the lower to the upper limit, error of sampling included. An early sample tells about
# ka and V, and nothing about the rate ke. Upper right: what the manifold says is left to be known of five depths as
# measurements come in, of which .08 are the scatter of a single track, which no measurement takes away; and how far off
# it is in truth. Lower left: what the suggestions promised in all against what they cost. Lower right: two rows that
# are best for predictions need not be best for the hidden absorptivity; each point is the best pair at one weight λ of
# the inverse, whatever it costs.
