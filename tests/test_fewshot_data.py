"""Real tables for the few-shot benchmark: rows and splits, scores against integrals, paired errors by hand."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from benchmarks import fewshot_data as fd
from pyro_invman.data import to_tensor, validate, variables_of
from pyro_invman.variables import DataError

SETS = sorted(path.parent.name for path in fd.DATA.glob("*/meta.json"))
needs_data = pytest.mark.skipif(not SETS, reason=f"the real tables are not at {fd.DATA}")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with the set "made": 12 tasks, the last two of 3 rows; two sources, replicates, holes, a rare level."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for t in range(12):
        for i in range(20 if t < 10 else 3):
            x, source = float(rng.uniform(1, 10)), "cheap" if t < 10 and i % 5 == 4 else "lab"
            width = 3 * x ** (1 + 0.1 * t) * float(rng.lognormal(0, 0.1))
            mode = ("ab"[i % 2] if i else "rare" if t < 8 else "c") if len(rows) not in (6, 45) else None
            rows.append(
                {"job": f"t{t}", "x": x, "eta": float(t), "same": 7.0, "mode": mode}
                | {"width": width, "depth": float(rng.normal(t)), "by": source, "print": f"t{t}d{i // 2}"}
                | {"sim_width": 2 * x, "sim_other": x, "note": "a"}
            )
    table = pd.DataFrame(rows)
    table.loc[table.index % 4 == 1, "depth"] = math.nan
    table.loc[table.index % 7 == 2, "x"] = math.nan
    table.loc[[3, 30], "width"] = [0.0, -1.0]
    folder = tmp_path / "made"
    folder.mkdir()
    table.to_csv(folder / "made.csv", index=False)
    column = {"unit": "um", "transform": "lin"}
    meta = {
        "csv": "made.csv",
        "task": "job",
        "group": "print",
        "source": {"column": "by", "high": "lab"},
        "x": [column | {"col": "x", "transform": "log10+0.5"}],
        "eta": [column | {"col": "eta"}, column | {"col": "same"}],
        "categorical": ["mode"],
        "y": [column | {"col": "width", "transform": "log10"}, column | {"col": "depth"}],
        "inverse": {"col": "x"},
        "simulation_columns": ["sim_width", "sim_other"],
        "protocol": {
            "ks": [0, 1, 5, 50],
            "min_rows": 10,
            "n_splits": 2,
            "test_frac": 0.35,
            "test_min": 2,
            "test_max": 3,
        }
        | {"inv_rows": 4, "n_heldout": 3},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return tmp_path


class TestSet:
    def test_standardised_by_measured_rows_after_the_transform(self, made: Path) -> None:
        raw = pd.read_csv(made / "made" / "made.csv")
        real = fd.load("made", low_source=True, data=made)
        lab = (raw.by == "lab").to_numpy()
        logged = np.log10(raw.width.where(raw.width > 0))
        expected = (logged - logged[lab].mean()) / logged[lab].std(ddof=0)
        np.testing.assert_allclose(real.ds["width"].values, expected)
        shifted = np.log10(raw.x + 0.5)
        np.testing.assert_allclose(real.table.x[:, 0], (shifted - shifted[lab].mean()) / shifted[lab].std(ddof=0))
        attrs = real.ds["width"].attrs
        assert (attrs["transform"], attrs["natural_units"], attrs["support"], attrs["unusable"]) == (
            "log10",
            "um",
            "real",
            2,
        )
        assert attrs["mean"] == pytest.approx(logged[lab].mean())
        np.testing.assert_array_equal(real.measured, lab)
        variables = variables_of(real.ds)
        assert {v.name: v.role for v in variables} == {
            "x": "parameter",
            "eta": "condition",
            "mode": "condition",
            "width": "observation",
            "depth": "observation",
        }
        assert real.ds.attrs["left_out"] == ["same", "sim_width", "sim_other", "note"]
        assert real.tasks == tuple(f"t{t}" for t in range(12))
        assert list(real.ds["task"].values) == list(raw.job) and list(real.ds["source"].values) == list(raw.by)
        assert fd.load("made", data=made).measured.all()

    def test_levels_of_few_rows_are_pooled_and_missing_ones_stay_missing(self, made: Path) -> None:
        raw = pd.read_csv(made / "made" / "made.csv")
        real = fd.load("made", low_source=True, data=made)
        mode = real.ds["mode"]
        named = [mode.attrs["levels"][int(code)] if code == code else None for code in mode.values]
        assert named == ["other" if m in ("rare", "c") else m if isinstance(m, str) else None for m in raw["mode"]]
        assert real.columns == ("x", "eta", "mode=b", "mode=a", "source=lab", "source=cheap")
        np.testing.assert_array_equal(real.table.x[:, 3], raw["mode"] == "a")

    def test_what_is_declared_but_absent_is_named(self, made: Path) -> None:
        path = made / "made" / "meta.json"
        meta = json.loads(path.read_text())
        path.write_text(json.dumps(meta | {"categorical": ["machine"]}))
        with pytest.raises(DataError, match="no column 'machine'"):
            fd.load("made", data=made)
        path.write_text(json.dumps(meta | {"inverse": {"col": "same"}}))
        with pytest.raises(DataError, match="no values that vary in same"):
            fd.load("made", data=made)
        path.write_text(json.dumps(meta | {"y": [{"col": "width", "transform": "sqrt"}]}))
        with pytest.raises(DataError, match="width: found the transform 'sqrt'"):
            fd.load("made", data=made)

    def test_simulated_rows_share_settings_task_and_scale(self, made: Path) -> None:
        raw = pd.read_csv(made / "made" / "made.csv")
        real = fd.load("made", low_source=True, data=made)
        both = fd.with_simulated_source(real)
        number, new = len(raw), ~both.measured & (np.arange(len(both.measured)) >= len(raw))
        origin = both.origin[new]
        np.testing.assert_array_equal(origin, np.flatnonzero(real.measured & raw.sim_width.notna()))
        attrs = real.ds["width"].attrs
        expected = (np.log10(raw.sim_width) - attrs["mean"]) / attrs["sd"]
        np.testing.assert_allclose(both.ds["width"].values[new], expected.to_numpy()[origin])
        assert np.isnan(both.ds["depth"].values[new]).all()
        np.testing.assert_array_equal(both.table.y[new, 0], both.ds["width"].values[new])
        np.testing.assert_array_equal(both.table.x[new, :-1], real.table.x[origin])
        np.testing.assert_array_equal(both.table.x[:, -1], new)
        for name in ("x", "eta", "mode"):
            np.testing.assert_array_equal(both.ds[name].values[new], real.ds[name].values[origin])
        np.testing.assert_array_equal(both.ds["task"].values[new], real.ds["task"].values[origin])
        assert set(both.ds["source"].values[new]) == {"simulation"}
        assert both.ds.isel(row=slice(number)).equals(real.ds)
        assert both.ds.attrs["left_out"] == ["same", "sim_other", "note"]
        assert real.ds.attrs["left_out"] == ["same", "sim_width", "sim_other", "note"]
        with pytest.raises(DataError, match=r"no simulated column for \['depth'\]; known: \['width'\]"):
            fd.with_simulated_source(real, outputs=["depth"])

    @needs_data
    @pytest.mark.parametrize("name", SETS)
    def test_real_sets_hold_the_units_of_the_published_baselines(self, name: str, shared: Path) -> None:
        spec = importlib.util.spec_from_file_location("baselines", shared / "problems" / "realdata_baselines.py")
        assert spec is not None and spec.loader is not None
        baselines = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(baselines)
        theirs, ours = baselines.Data(str(fd.DATA / name)), fd.load(name)
        np.testing.assert_allclose(ours.table.y, theirs.Y, atol=1e-12)
        sought = ours.table.x[:, ours.columns.index(str(ours.sought))]
        np.testing.assert_allclose(sought[theirs.xinv_ok], theirs.X[theirs.xinv_ok, theirs.inv], atol=1e-12)
        np.testing.assert_array_equal(np.isnan(sought), ~theirs.xinv_ok)
        found = [c for c in ours.columns if "=" in c and not c.endswith("=not measured")]
        assert sorted(found) == sorted(c for c in theirs.names if "=" in c and not c.endswith("=nan"))
        variables = variables_of(ours.ds)
        cells = to_tensor(ours.ds, variables).numpy()
        np.testing.assert_array_equal(cells[:, variables.indices(ours.outputs)], ours.table.y)
        real = [v.name for v in variables if not v.discrete]
        np.testing.assert_allclose(np.nanmean(cells[:, variables.indices(real)], 0), 0, atol=1e-9)
        np.testing.assert_allclose(np.nanstd(cells[:, variables.indices(real)], 0), 1, atol=1e-9)


class TestFolds:
    @staticmethod
    def check(real: fd.RealSet) -> None:
        found = fd.folds(real, seed=3)
        names = {real.tasks[t] for t in real.eligible()}
        assert sorted(task for fold in found for task in fold.held_out) == sorted(names)
        for fold in found:
            assert not set(fold.training) & set(fold.held_out)
            assert set(fold.training) | set(fold.held_out) == set(real.tasks)
            assert {real.tasks[t] for t in real.table.task[fold.rows]} == set(fold.training)
            assert len(fold.episodes) == len(fold.held_out) * real.protocol["n_splits"]
            assert fold.grid.shape == (40,) and (np.diff(fold.grid) >= 0).all()
            for asked in fold.episodes:
                scored = np.concatenate([asked.pool, asked.test])
                assert asked.task in fold.held_out
                assert {real.tasks[t] for t in real.table.task[np.r_[scored, asked.cheap]]} == {asked.task}
                assert real.measured[scored].all() and not real.measured[asked.cheap].any()
                assert not set(asked.context_rows(len(asked.pool))) & set(asked.test)
                assert not set(real.group[asked.pool]) & set(real.group[asked.test])
                assert len(set(scored)) == len(scored) and len(asked.test) > 0
                assert set(asked.inverse) <= set(asked.test)
                assert not np.isnan(real.table.x[asked.inverse, real.columns.index(str(real.sought))]).any()
                assert not np.isnan(real.table.y[scored]).all(1).any()
                for k in asked.ks:
                    np.testing.assert_array_equal(asked.context_rows(k), asked.pool[:k])
                with pytest.raises(DataError, match="the pool of"):
                    asked.context_rows(len(asked.pool) + 1)

    def test_tasks_are_apart_and_complete(self, made: Path) -> None:
        real = fd.load("made", low_source=True, data=made)
        assert [real.tasks[t] for t in real.eligible()] == [f"t{t}" for t in range(10)]
        self.check(real)
        assert len(fd.folds(real, num_folds=99)) == 10

    def test_cheap_sources_change_no_split_and_what_would_peek_is_named(self, made: Path) -> None:
        alone, real = fd.load("made", data=made), fd.load("made", low_source=True, data=made)
        both = fd.with_simulated_source(real)
        self.check(both)
        kept = np.flatnonzero(real.measured)
        sources = both.ds["source"].values
        for task in real.eligible():
            first, second, third = (fd.episode(one, task, 1) for one in (alone, real, both))
            assert not len(first.cheap) and set(sources[second.cheap]) == {"cheap"}
            assert set(sources[third.cheap]) == {"cheap", "simulation"}
            for a, b, c in zip(first[2:5], second[2:5], third[2:5], strict=True):
                np.testing.assert_array_equal(kept[a], b)
                np.testing.assert_array_equal(b, c)
            assert set(sources[third.peeking]) == {"simulation"}
            np.testing.assert_array_equal(np.sort(both.origin[third.peeking]), np.sort(third.test))

    @needs_data
    @pytest.mark.parametrize("name", SETS)
    def test_real_sets_can_be_learned_from_in_every_fold(self, name: str) -> None:
        real = fd.load(name)
        self.check(real)
        for fold in fd.folds(real):
            validate(real.ds.isel(row=fold.rows), training=True)

    @needs_data
    @pytest.mark.parametrize("name", SETS)
    def test_splits_are_those_of_the_published_baselines(self, name: str, shared: Path) -> None:
        """Knowing nothing, a standard normal, has a score that tells which rows were the test; for the inverse, a grid
        from the other tasks, theirs from all but one and ours from all but a fold."""
        known = json.loads((shared / "data" / "baselines.json").read_text())[name]
        published = known["methods"]["prior"]["0"]["crps_by_task"]
        real, found = fd.load(name), []
        grids = {task: fold.grid for fold in fd.folds(real) for task in fold.held_out}
        for task in (real.tasks.index(task) for task in known["heldout"]):
            for split in range(real.protocol["n_splits"]):
                asked = fd.episode(real, task, split)
                scores = fd.mixture_scores(real.table.y[asked.test], *(np.array([part]) for part in (1.0, 0.0, 1.0)))
                found += fd.records(real, "prior", asked, 0, scores)
                truth = real.table.x[asked.inverse, real.columns.index(str(real.sought))]
                scores = fd.grid_scores(truth, np.full((len(truth), 40), 1 / 40), grids[asked.task])
                found += fd.records(real, "prior", asked, 0, scores)
        table = fd.by_task(found)["crps"].droplevel(["set", "method", "k"])
        for column, (direction, tolerance) in enumerate({"forward": 1e-4, "inverse": 0.03}.items()):
            ours = table[direction]
            assert sorted(ours.index) == sorted(published)
            theirs = np.array([published[task][column] for task in ours.index])
            np.testing.assert_allclose(ours, theirs, atol=tolerance)
            assert abs(ours.mean() - theirs.mean()) < 0.02


class TestScores:
    def test_mixture_against_numerical_integration(self) -> None:
        weights = np.array([[0.2, 0.5, 0.3], [0.0, 0.9, 0.1]])
        means = np.array([[-1.0, 0.5, 2.0], [7.0, 0.0, 3.0]])
        sds = np.array([[0.3, 1.0, 0.1], [1.0, 0.5, 2.0]])
        y = np.array([0.4, -3.0])
        found = fd.mixture_scores(y, weights, means, sds)
        for row in range(2):

            def below(x: float, row: int = row) -> float:
                return float((weights[row] * norm.cdf(x, means[row], sds[row])).sum())

            left = quad(lambda x: below(x) ** 2, -20, y[row], limit=400, points=[-1.0])[0]
            right = quad(lambda x: (1 - below(x)) ** 2, y[row], 20, limit=400, points=[0.5, 2.0, 3.0])[0]
            assert found["crps"][row] == pytest.approx(left + right, abs=1e-7)
            density = (weights[row] * norm.pdf(y[row], means[row], sds[row])).sum()
            assert found["nlpd"][row] == pytest.approx(-math.log(density))
            assert found["coverage90"][row] == (0.05 <= below(y[row]) <= 0.95)

    def test_one_normal_in_any_shape_and_missing_cells(self) -> None:
        y = np.array([[0.0, 2.0, math.nan], [1.0, -1.6448, -1.6449]])
        found = fd.mixture_scores(y, np.ones(1), np.zeros(1), np.ones(1))
        z = np.nan_to_num(y)
        exact = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi)
        np.testing.assert_allclose(found["crps"], np.where(np.isnan(y), math.nan, exact))
        np.testing.assert_allclose(found["nlpd"], -norm.logpdf(y))
        np.testing.assert_array_equal(found["coverage90"], [[1, 0, math.nan], [1, 1, 0]])
        with pytest.raises(DataError, match=r"weights, sum, row 0: found 0.5"):
            fd.mixture_scores(np.zeros(2), np.full(1, 0.5), np.zeros(1), np.ones(1))
        with pytest.raises(DataError, match=r"sds, smallest, row 1: found 0"):
            fd.mixture_scores(np.zeros(2), np.ones(1), np.zeros(1), np.array([[1.0], [0.0]]))

    def test_draws_have_the_scores_of_their_distribution(self) -> None:
        """Means over 4,000 sets of 20 draws; without bias though the sets are small (five standard errors)."""
        rng = np.random.default_rng(1)
        y = np.array([0.3, 2.0])
        found = fd.draw_scores(y, rng.normal(size=(4_000, 2, 20)))
        exact = fd.mixture_scores(y, np.ones(1), np.zeros(1), np.ones(1))["crps"]
        assert (np.abs(found["crps"].mean(0) - exact) < 5 * found["crps"].std(0) / math.sqrt(4_000)).all()
        covered = fd.draw_scores(rng.normal(size=20_000), rng.normal(size=(20_000, 20)))["coverage90"]
        assert abs(covered.mean() - 0.9) < 5 * math.sqrt(0.9 * 0.1 / 20_000)
        draws = rng.normal(size=20)
        pairs = np.abs(draws[:, None] - draws).sum() / (20 * 19) / 2
        scores = fd.draw_scores(np.array([0.3, math.nan]), np.stack([draws, draws]), width=0.15)
        assert scores["crps"][0] == pytest.approx(np.abs(draws - 0.3).mean() - pairs)
        assert scores["nlpd"][0] == pytest.approx(-math.log(norm.pdf(0.3, draws, 0.15).mean()))
        assert all(np.isnan(cells[1]) for cells in scores.values())
        with pytest.raises(DataError, match="found 19, expected at least 20"):
            fd.draw_scores(np.zeros(1), np.zeros((1, 19)))

    def test_grid_scores_are_the_sums_of_the_protocol(self) -> None:
        rng = np.random.default_rng(2)
        grid, truth = np.sort(rng.normal(size=40)), np.array([0.1, 40.0])
        weights = rng.dirichlet(np.ones(40), 2)
        found = fd.grid_scores(truth, weights, grid)
        for row, (w, x) in enumerate(zip(weights, truth, strict=True)):
            crps = (w * np.abs(grid - x)).sum() - 0.5 * w @ np.abs(grid[:, None] - grid) @ w
            assert found["crps"][row] == pytest.approx(crps)
            assert found["nlpd"][row] == pytest.approx(-math.log((w * norm.pdf(x, grid, 0.15)).sum() + 1e-12))


class TestComparison:
    @staticmethod
    def table() -> list[dict[str, object]]:
        """Three tasks at k = 1 and two of them at k = 5; task a has two splits, and a second output in one of them."""
        cells = [
            ("a", 0, "w", 1, 1.0, 2.0),
            ("a", 1, "w", 1, 3.0, 2.0),
            ("a", 0, "d", 1, 4.0, 6.0),
            ("b", 0, "w", 1, 1.0, 2.0),
            ("c", 0, "w", 1, 5.0, 9.0),
            ("a", 0, "w", 5, 1.0, 1.0),
            ("b", 0, "w", 5, 0.0, 4.0),
        ]
        return [
            {"set": "s", "method": method, "direction": "forward", "k": k, "task": task, "split": split, "seed": 0}
            | {"output": output, "crps": value}
            for task, split, output, k, *values in cells
            for method, value in zip(("ours", "peer"), values, strict=True)
        ]

    def test_means_over_splits_then_outputs_then_tasks(self) -> None:
        table = fd.aggregate(self.table())
        first, pooled = (table.loc[("s", "ours", "forward", k)] for k in (1, "pooled"))
        # tasks at k = 1: a ((1 + 3) / 2 + 4) / 2 = 3, b 1, c 5; at k = 5: a 1, b 0
        assert (first.crps, first.tasks) == (3.0, 3)
        assert first.crps_error == pytest.approx(2 / math.sqrt(3))
        assert pooled.crps == pytest.approx((2 + 0.5 + 5) / 3) and pooled.tasks == 3

    def test_paired_by_hand(self) -> None:
        # k = 1: ours 3, 1, 5, peer 4, 2, 9: differences -1, -1, -4, mean -2, variance 3; ratio 9/15 = 0.6
        found = fd.paired(self.table(), "ours", "peer", ks=[1])
        assert found[:3] == pytest.approx((-2.0, 1.0, 0.6)) and found.tasks == 3
        # residuals 3 - 2.4, 1 - 1.2, 5 - 5.4 have variance (0.36 + 0.04 + 0.16) / 2
        assert found.ratio_error == pytest.approx(math.sqrt(0.28 / 3) / 5)
        # pooled: a 2 and 2.5, b 0.5 and 3, c 5 and 9
        assert fd.paired(self.table(), "ours", "peer").mean == pytest.approx((-0.5 - 2.5 - 4) / 3)

    def test_only_the_same_episodes_are_paired(self) -> None:
        with pytest.raises(DataError, match="expected the same episodes"):
            fd.paired(self.table()[:-1], "ours", "peer")
        with pytest.raises(DataError, match="expected the same episodes"):
            fd.paired(self.table(), "ours", "theirs")

    def test_records_are_of_measured_cells_only(self, made: Path) -> None:
        real = fd.load("made", data=made)
        asked = next(e for f in fd.folds(real) for e in f.episodes if np.isnan(real.table.y[e.test]).any())
        y = real.table.y[asked.test]
        for record in fd.records(real, "ours", asked, 1, {"crps": y**2}):
            assert record["crps"] == pytest.approx(np.nanmean(y[:, real.outputs.index(record["output"])] ** 2))
        [inverse] = fd.records(real, "ours", asked, 1, {"crps": np.arange(float(len(asked.inverse)))})
        assert (inverse["direction"], inverse["output"]) == ("inverse", "x")
        assert inverse["crps"] == (len(asked.inverse) - 1) / 2
        with pytest.raises(DataError, match="found NaN where a cell is measured"):
            fd.records(real, "ours", asked, 1, {"crps": np.full(y.shape, math.nan)})
        with pytest.raises(DataError, match="found shape"):
            fd.records(real, "ours", asked, 1, {"crps": y[:1]})
