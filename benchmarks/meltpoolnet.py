"""The published melt pools as the project file beside this reads them.

    python -m benchmarks.meltpoolnet meltpoolnet_regression.csv meltpoolnet.csv

The authors' table (https://raw.githubusercontent.com/BaratiLab/MeltpoolNet/main/Data/meltpoolnet_regression.csv) has
headers without units, question marks among numbers, and numbers that stand for "not known". Columns get names with
units, what is no number or no possible one becomes a blank cell, rows without any of the three sizes and exact copies
are left out, and a paper and an alloy make a task. What was left out is said on standard error.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd

NAMES = {
    "Material": "alloy",
    "Sub-process": "subprocess",
    "Power": "power_W",
    "Velocity": "speed_mm_s",
    "layer thickness": "layer_um",
    "beam D": "beam_um",
    "Hatch spacing": "hatch_um",
    "density": "rho_kg_m3",
    "Cp": "cp_J_kgK",
    "k": "k_W_mK",
    "melting T": "tmelt_K",
    "minimum absorptivity": "absorptivity_min",
    "depth of meltpool": "depth_um",
    "width of melt pool": "width_um",
    "length of melt pool": "length_um",
    "paper ID": "paper_id",
}
WORDS = ("alloy", "subprocess", "paper_id")
SIZES = ["depth_um", "width_um", "length_um"]
LEAST = {
    "beam_um": 5.0,
    "tmelt_K": 274.0,
}  # slips of units below, and 273 K, which holds the place of what is not known


def prepared(raw: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """The table with a column ``task``, and how many cells and rows of `raw` were left out, by reason."""
    raw = raw[list(NAMES)].rename(columns=NAMES)
    numbers = [name for name in raw if name not in WORDS]
    table = raw.copy()
    table[numbers] = raw[numbers].apply(pd.to_numeric, errors="coerce")
    unreadable = int((table[numbers].isna() & raw[numbers].notna()).sum().sum())
    possible = pd.DataFrame({name: table[name] >= LEAST.get(name, 0) for name in numbers})
    for name in set(numbers) - {"layer_um"}:  # a layer of 0 is a bare plate
        possible[name] &= table[name] > 0
    impossible = int((~possible & table[numbers].notna()).sum().sum())
    table[numbers] = table[numbers].where(possible)
    empty = table[SIZES].isna().all(axis=1)
    copies = table[~empty].duplicated()
    table = table[~empty][~copies].reset_index(drop=True)
    table.insert(0, "task", "p" + table["paper_id"].astype(str) + "|" + table["alloy"].astype(str))
    counts = {
        "cells that are no numbers": unreadable,
        "cells with impossible numbers": impossible,
        "rows without any size": int(empty.sum()),
        "rows that are copies": int(copies.sum()),
    }
    return table, counts


def main() -> int:
    """Reads one table, writes the other."""
    parser = argparse.ArgumentParser("python -m benchmarks.meltpoolnet", description=str(__doc__).splitlines()[0])
    parser.add_argument("raw", help="meltpoolnet_regression.csv, as its authors publish it")
    parser.add_argument("out", help="the table to write")
    asked = parser.parse_args()
    table, counts = prepared(pd.read_csv(asked.raw, encoding="latin1", low_memory=False))
    table.to_csv(asked.out, index=False)
    print(f"{len(table)} rows of {table['task'].nunique()} tasks; left out:", counts, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
