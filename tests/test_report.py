"""Reports: what is in the tree, what the page says, and that the page holds together in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import xarray as xr
from test_diagnostics import PROCESS, Changed

import pyro_invman as pim
from pyro_invman import diagnostics

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def of_tasks():
    """A manifold with a cell that is grossly wrong among the held-out rows, its history, and those rows."""
    ds = pim.simulators.linear_gaussian.HierarchicalLinearGaussian.random(seed=0).sample(24, 6, seed=1, missing=0.2)
    new = np.isin(ds.task.values, sorted(set(ds.task.values))[:6])
    manifold = pim.ProcessManifold.from_dataset(ds.isel(row=~new), latent_dim=2, contamination=True)
    history = manifold.fit(ds.isel(row=~new), schedule=pim.Schedule(steps=20), progress=False)
    held_out = ds.isel(row=new).copy(deep=True)
    name = manifold.variables.with_role("observation")[0]
    row = int(np.flatnonzero(held_out[name].notnull().values)[0])
    held_out[name].values[row] = 60.0
    return manifold, history, held_out, (row, name)


@pytest.fixture(scope="module")
def tree(of_tasks):
    manifold, history, held_out, _ = of_tasks
    return diagnostics.report(manifold, held_out, history=history, num_draws=39, max_questions=12, simulations=39)


def test_tree_holds_verdicts_and_what_they_rest_on(tree, of_tasks):
    _, history, held_out, (row, name) = of_tasks
    assert list(tree["verdicts"].direction.values) == ["forward", "inverse: x1", "inverse: x2"]
    said = tree["answers/forward"]
    seen = ~np.isnan(said.truth)
    np.testing.assert_array_equal(np.isnan(said.quantiles).any("quantile"), ~seen)
    rows = held_out.isel(row=said.row.values)
    for target in said.target.values:
        np.testing.assert_allclose(said.truth.sel(target=target), rows[str(target)])
    assert set(tree["calibration/forward"].children) == {"sbc", "coverage", "tarp", "check"}
    assert int(tree["tasks"].known.sum()) == 18 and int((~tree["tasks"].known).sum()) == 6
    assert np.isfinite(tree["tasks"].p_value[~tree["tasks"].known]).all()
    assert float(tree["cells"][name][row]) > 0.9
    xr.testing.assert_identical(tree["fit"].to_dataset(), history)


def test_inventory_counts_cells(tree, of_tasks):
    _, _, held_out, _ = of_tasks
    found = tree["inventory"]
    for name in held_out.data_vars:
        assert int(found.cells.sel(variable=name)) == int(held_out[name].notnull().sum())
    assert int(found.rows.sum()) == held_out.sizes["row"] and (found.rows.diff("pattern") <= 0).all()
    np.testing.assert_array_equal(found.cells_by_task.sum("task"), found.cells)
    np.testing.assert_array_equal((found.measured * found.rows).sum("pattern"), found.cells)


@pytest.mark.parametrize("kind", ["nc", "zarr"])
def test_a_tree_read_back_gives_the_same_page(tree, tmp_path, kind):
    path = tmp_path / f"report.{kind}"
    if kind == "nc":
        tree.to_netcdf(path)
        again = xr.open_datatree(path)
    else:
        tree.to_zarr(path, consolidated=False)
        again = xr.open_datatree(path, engine="zarr", consolidated=False)
    written = [re.sub(r"base64,[^\"]*", "", diagnostics.page(each)) for each in (tree, again)]
    assert written[0] == written[1]


def test_page_needs_nothing_else_and_escapes_names(tmp_path):
    odd = 'x <b>&"1"'
    ds = pim.from_columns(
        {odd: np.random.default_rng(0).normal(size=80), "y": np.random.default_rng(1).normal(size=80)},
        roles={odd: "parameter", "y": "observation"}, units={odd: "<W>"},
    )  # fmt: skip
    flow = pim.JointFlow.from_dataset(ds)
    diagnostics.report(flow, ds, out=tmp_path / "page.html", max_questions=40, title="<i>odd</i>", progress=False)
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and not re.findall(r"(?:src|href)=\"(?!data:|#)", text) and "url(" not in text
    assert "<b>" not in text and "<i>" not in text and html.escape(odd, quote=False).split("&amp;")[0] in text


@pytest.mark.parametrize("change", [{"spread": 0.6}, {"shift": 0.6}, {"blind": True}])
def test_broken_models_are_told_apart_from_a_right_one(change):
    ds = PROCESS.sample(150, seed=10)
    right, wrong = (diagnostics.report(m, ds, progress=False)["verdicts"] for m in (PROCESS, Changed(**change)))
    assert not right.flagged.any() and (right.verdict == "use it").all()
    assert wrong.flagged.all() and "do not use it" in wrong.verdict.values


def test_what_was_warned_of_is_noted():
    cells = {name: np.random.default_rng(k).normal(size=60) for k, name in enumerate(("x", "y"))}
    roles = {"x": "parameter", "y": "observation"}
    held_out = pim.from_columns(cells, roles=roles)
    first = np.arange(60) < 30
    apart = {"x": np.where(first, np.nan, cells["x"]), "y": np.where(first, cells["y"], np.nan)}
    flow = pim.JointFlow.from_dataset(pim.from_columns(apart, roles=roles))
    tree = diagnostics.report(flow, held_out, progress=False)
    assert any(note.startswith("UnidentifiedConditional") for note in tree.attrs["notes"])
    assert "UnidentifiedConditional" in diagnostics.page(tree)
    assert (tree["verdicts"].verdict == "use it with care").all()


def test_what_no_held_out_row_shows_is_noted_and_not_asked_for():
    ds = PROCESS.sample(40, seed=1)
    ds["x1"].values[:] = np.nan
    tree = diagnostics.report(PROCESS, ds, progress=False)
    assert list(tree["answers/inverse"].target.values) == ["x2"] and list(tree["answers"].children) == [
        "forward",
        "inverse",
    ]
    assert tree.attrs["notes"] == ["no held-out row shows x1, so nothing is said of asking for it"]
    ds["x2"].values[:] = np.nan
    assert list(diagnostics.report(PROCESS, ds, progress=False)["verdicts"].direction.values) == ["forward"]


def test_refusals():
    ds = PROCESS.sample(20, seed=1)
    with pytest.raises(pim.DataError, match="slash"):
        diagnostics.report(PROCESS, ds, directions={"a/b": (["y1"], ["x1"])}, progress=False)
    conditions = pim.from_columns({"c": np.arange(9.0)}, roles={"c": "condition"})
    with pytest.raises(pim.DataError, match="neither parameters nor observations"):
        diagnostics.report(pim.JointFlow.from_dataset(conditions), conditions, progress=False)


MEASURE = """<script>
function measure() {
  const page = document.querySelector('iframe').contentDocument;
  const shown = e => {
    let r = e.getBoundingClientRect(), w = e.closest('.wide');
    if (!w) return [r.left, r.top, r.right, r.bottom];
    w = w.getBoundingClientRect();
    return [Math.max(r.left, w.left), r.top, Math.min(r.right, w.right), r.bottom];
  };
  const parts = [...page.querySelectorAll('h1,h2,h3,p,li,td,th,dt,dd,figcaption,img,strong,nav a')];
  const boxes = parts.map(shown), overlaps = [];
  for (let i = 0; i < parts.length; i++) for (let j = i + 1; j < parts.length; j++) {
    if (parts[i].contains(parts[j])) continue;
    const a = boxes[i], b = boxes[j];
    if (Math.min(a[2], b[2]) - Math.max(a[0], b[0]) > 1 && Math.min(a[3], b[3]) - Math.max(a[1], b[1]) > 1)
      overlaps.push(parts[i].outerHTML.slice(0, 60) + ' / ' + parts[j].outerHTML.slice(0, 60));
  }
  const root = page.documentElement, unseen = [...page.images].filter(i => !i.naturalWidth).length;
  const found = {overlaps, unseen, parts: parts.length, beyond: root.scrollWidth - root.clientWidth};
  document.body.textContent = 'found:' + encodeURIComponent(JSON.stringify(found)) + ':';
}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1280])
def test_page_in_a_browser(tree, tmp_path, width):
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(diagnostics.page(tree))}"'
    file = tmp_path / "frame.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8">{MEASURE}<body>{frame} onload="measure()"></iframe></body>')
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    options += [
        "--no-first-run",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        f"--user-data-dir={tmp_path}/c",
    ]
    run = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(unquote(re.search(r"<body>found:(\S+):</body>", run.stdout).group(1)))
    assert found["parts"] > 100 and found["overlaps"] == [] and found["unseen"] == 0 and found["beyond"] <= 0
    assert "CONSOLE" not in run.stderr
