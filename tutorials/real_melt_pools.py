# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Real melt pools
#
# MeltpoolNet (Akbari et al., *Additive Manufacturing* 2022) collects single laser tracks from 76 papers: 1,770 rows, of
# which a fifth has no depth, a third no width and four fifths no length. A paper and an alloy make a task: one machine,
# one powder, one way of measuring, much of it unreported. Its authors state no licence, so the table does not come with
# this project. Fetch
# `https://raw.githubusercontent.com/BaratiLab/MeltpoolNet/main/Data/meltpoolnet_regression.csv`
# and say where it is in the environment variable `MELTPOOLNET`; without it this tutorial ends here.

# %%
import os
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import pyro_invman as pim
from pyro_invman import plots

ADDRESS = "https://raw.githubusercontent.com/BaratiLab/MeltpoolNet/main/Data/meltpoolnet_regression.csv"
TABLE = Path(os.environ.get("MELTPOOLNET", "meltpoolnet_regression.csv"))
if not TABLE.exists():
    raise SystemExit(f"no table at {TABLE}; fetch {ADDRESS} and set MELTPOOLNET to where it is")

STEPS = 400  # short: 10
LARGEST = 60  # short: 10
HELD_OUT = 12  # short: 2
MOST = 60  # short: 12
DRAWS = 1000  # short: 50

# %% [markdown]
# ## A messy table
#
# Headers without units, question marks in numbers, zeros that mean "not known". Here each decision is a line; nothing
# is filled in, and what cannot be read as a number is NaN, and counted.

# %%
raw = pd.read_csv(TABLE, encoding="latin1", low_memory=False)
NAMES = {
    "Power": "power_W",
    "Velocity": "speed_mm_s",
    "beam D": "beam_um",
    "layer thickness": "layer_um",
    "density": "rho_kg_m3",
    "Cp": "cp_J_kgK",
    "k": "k_W_mK",
    "melting T": "tmelt_K",
    "depth of meltpool": "depth_um",
    "width of melt pool": "width_um",
    "paper ID": "paper_id",
    "Material": "alloy",
    "Process": "process",
}
UNITS = {"W": "W", "mm_s": "mm/s", "um": "um", "kg_m3": "kg/m3", "J_kgK": "J/(kg K)", "W_mK": "W/(m K)", "K": "K"}
raw = raw.rename(columns=NAMES)
columns = [name for name in NAMES.values() if name not in ("paper_id", "alloy", "process")]
numbers = raw[columns].apply(pd.to_numeric, errors="coerce")
unreadable = int((numbers.isna() & raw[columns].notna()).sum().sum())
numbers = numbers.where(numbers > 0)  # 0 stands for what is not known, or, of a layer, for a bare plate
numbers["beam_um"] = numbers["beam_um"].where(numbers["beam_um"] >= 5)  # slips of units
numbers["tmelt_K"] = numbers["tmelt_K"].where(numbers["tmelt_K"] > 300)  # place-holders
keep = (raw["process"] == "PBF") & numbers[["depth_um", "width_um"]].notna().any(axis=1)
numbers, labels = numbers[keep], (raw["paper_id"].astype(str) + " | " + raw["alloy"].astype(str))[keep]
same = pd.concat([numbers, labels], axis=1).duplicated()
numbers, labels = numbers[~same], labels[~same]
print(f"{unreadable} cells that are no numbers; {int(same.sum())} rows that are exact copies")

ds = pim.from_columns(
    numbers.reset_index(drop=True),
    roles={
        **dict.fromkeys(["power_W", "speed_mm_s", "beam_um", "layer_um"], "parameter"),
        **dict.fromkeys(["rho_kg_m3", "cp_J_kgK", "k_W_mK", "tmelt_K"], "condition"),
        **dict.fromkeys(["depth_um", "width_um"], "observation"),
    },
    supports=dict.fromkeys(columns, "positive"),
    units={name: UNITS[name.split("_", 1)[1]] for name in columns},
    task=labels.to_numpy(),
)
print(f"{ds.sizes['row']} rows of {len(set(ds.task.values))} papers and alloys")
print({name: f"{float(ds[name].isnull().mean()):.0%} missing" for name in ds.data_vars})

# %% [markdown]
# ## Held out are whole papers
#
# Rows of one paper resemble each other. What counts is a paper that was never seen, so papers are held out, not rows.
# (To keep this short, the sixty largest tasks are used, and at most sixty rows of each to learn from.)

# %%
names, counts = np.unique(ds.task.values, return_counts=True)
order = counts.argsort(kind="stable")[::-1][:LARGEST]
large = [n for n in order if counts[n] >= 12]
chosen = np.random.default_rng(0).permutation(large)[:HELD_OUT]
held_out = {str(names[n]) for n in chosen}
known = {str(names[n]) for n in order} - held_out
place = pd.Series(range(ds.sizes["row"])).groupby(ds.task.values).cumcount().to_numpy()
training = ds.isel(row=np.isin(ds.task.values, sorted(known)) & (place < MOST))
print(f"{training.sizes['row']} rows of {len(known)} tasks to learn from; {len(held_out)} tasks held out")

manifold = pim.ProcessManifold.from_dataset(training, latent_dim=3)
schedule = pim.Schedule(learning_rate=3e-3, batch_size=24, steps=STEPS, warmup=50, evaluate_every=25, patience=20)
history = manifold.fit(training, seed=0, schedule=schedule, progress=False)

# %% [markdown]
# ## A paper that was never seen, after none, one, two and five of its rows
#
# Depths of its other rows, given their settings: the loss (negative log-density of ln depth, in nats), by what factor
# medians are off, and how often the 90 % interval holds the truth.

# %%
torch.manual_seed(0)
settings = [v.name for v in manifold.variables if v.role != "observation"]
scores = {k: [] for k in (0, 1, 2, 5)}
shown = {}
for name in sorted(held_out):
    rows = ds.isel(row=ds.task.values == name)
    rows = rows.isel(row=np.random.default_rng(1).permutation(rows.sizes["row"]))
    first, rest = rows.isel(row=slice(0, 5)), rows.isel(row=slice(5, None))
    rest = rest.isel(row=rest.depth_um.notnull().values)
    if rest.sizes["row"] < 4:
        continue
    given = {name: torch.tensor(rest[name].values) for name in settings}
    truth = torch.tensor(rest.depth_um.values)
    for k, found in scores.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pim.UnfamiliarTask)
            constant = {c: float(rows[c][0]) for c in settings[4:] if not bool(rows[c].isnull().all())}
            task = manifold.infer_task(first.isel(row=slice(0, k)), conditions=constant)
        answer = task.conditional(["depth_um"], given)
        low, middle, high = answer.sample((DRAWS,))[..., 0].quantile(
            torch.tensor([0.05, 0.5, 0.95], dtype=truth.dtype), 0
        )
        loss = -(answer.log_prob(truth.unsqueeze(-1)).detach() + truth.log()).mean()
        inside = ((truth > low) & (truth < high)).double().mean()
        found.append([float(loss), float((middle / truth).log().abs().mean()), float(inside)])
        shown[name, k] = (truth, torch.stack([low, middle, high]))
for k, found in scores.items():
    mean, error = np.mean(found, 0), np.std(found, 0) / len(found) ** 0.5
    print(
        f"after {k} rows: loss {mean[0]:+.2f} ± {error[0]:.2f} nats, medians off by a factor {np.exp(mean[1]):.2f}, "
        f"90 % intervals hold {mean[2]:.0%} ({len(found)} papers)"
    )

# %% [markdown]
# ## Which power made this pool?
#
# The inverse, for one row of the paper that is drawn below (that of middling loss after five rows), from its depth and
# its other settings.

# %%
papers = [name for name, k in shown if k == 5]
example = papers[int(np.argsort([loss for loss, _, _ in scores[5]])[len(papers) // 2])]
rows = ds.isel(row=ds.task.values == example)
rows = rows.isel(row=np.random.default_rng(1).permutation(rows.sizes["row"]))
asked = rows.isel(row=slice(5, None)).isel(row=[0])
given = {name: float(asked[name][0]) for name in (*settings, "depth_um") if name != "power_W"}
for k in (0, 5):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pim.UnfamiliarTask)
        task = manifold.infer_task(rows.isel(row=slice(0, k)))
    low, middle, high = (
        task.conditional(["power_W"], given).sample((DRAWS,))[:, 0].quantile(torch.tensor([0.05, 0.5, 0.95]))
    )
    print(
        f"{example}, after {k} rows: {middle:.0f} W, 90 % in [{low:.0f}, {high:.0f}], "
        f"set was {float(asked.power_W[0]):.0f} W"
    )

# %% [markdown]
# ## Pictures

# %%
figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.4), constrained_layout=True)
plots.links(history.links, ax=axes[0])
for ax, k in zip(axes[1:], (0, 5), strict=True):
    truth, quantiles = shown[example, k]
    plots.predictive(truth.numpy(), quantiles.numpy(), "depth_um", "um", ax=ax, log=True)
    ax.set_title(f"{example}, after {k} rows: {ax.get_title()}", fontsize=9)
plt.show()

# %% [markdown]
# **How to read them.** Left: in how many rows two variables were measured together; an empty cell would be a pair that
# only others link. Middle and right: depths of a paper that was never seen, before any of its rows is known and after
# five. How often the bars hold the truth stands above each, and over all held-out papers in the numbers printed above.
# Medians come nearer with each row. The intervals hold about what they claim before any row, and too little after two
# and five (some three in four truths, where nine in ten are claimed): papers differ in more than fifty of them can
# teach, and one or two that are unlike all others make the mean loss rise, as its standard error says. Before such
# intervals are relied on, they should be recalibrated on held-out papers (`pim.diagnostics.temperature` or
# `.conformal`), and `pim.diagnostics.report` says for each direction whether it can be used at all.
