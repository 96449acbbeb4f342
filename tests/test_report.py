import errno
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.image import imread

from pwiser_tf import metrics, plots, report


def sample(rows=3000, click_rate=0.1, conversion_rate=0.3, seed=0):
    """Grades, and predictions that are correlated with them."""
    generator = np.random.default_rng(seed)
    ctr = click_rate * np.exp(generator.normal(scale=0.7, size=rows)).clip(0.1, 5)
    cvr = conversion_rate * np.exp(generator.normal(scale=0.7, size=rows)).clip(0.1, 3)
    clicked = generator.random(rows) < ctr
    converted = clicked & (generator.random(rows) < cvr)
    grade = clicked.astype(int) + converted
    return grade, {"ctr": ctr, "cvr": cvr, "ctcvr": ctr * cvr}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plots would have saved, in order."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def draw(drawn, grade, predictions):
    summary = metrics.summary(grade, predictions)
    plots.plot_evaluation("unused", grade, predictions, summary, "a title")
    return drawn[-1].axes


# --- table -------------------------------------------------------------------------------------


def result(**changes):
    known = {
        "rows": 27_000_000,
        "positives": 543_000,
        "auc": 0.72591,
        "auc_low": 0.72049,
        "auc_high": 0.73101,
        "gauc": 0.6512,
        "gauc_groups": 4000,
        "gauc_groups_skipped": 12345,
        "log_loss": 0.0912348,
        "pcoc": 1.0123,
        "calibration_error": 0.000123,
    }
    return {**known, **changes}


def test_table_shows_every_number_of_every_task_and_model():
    summaries = {
        "BCE": {task: result(auc=0.5 + 0.1 * k) for k, task in enumerate(metrics.TASKS)},
        "PWiseR": {task: result(auc=0.55 + 0.1 * k) for k, task in enumerate(metrics.TASKS)},
    }
    lines = report.table(summaries).splitlines()
    assert lines[0] == "CTR: P(click given exposure); GAUC: 4,000 groups, 12,345 skipped"
    assert lines[2].split() == [
        "BCE", "0.5000", "[0.7205,", "0.7310]", "0.6512", "0.091235", "1.012", "0.000123",
        "27,000,000", "543,000",
    ]  # fmt: skip
    starts = [line.split()[:2] for line in lines if line.startswith(("BCE", "PWiseR"))]
    assert starts == [
        ["BCE", "0.5000"], ["PWiseR", "0.5500"],
        ["BCE", "0.6000"], ["PWiseR", "0.6500"],
        ["BCE", "0.7000"], ["PWiseR", "0.7500"],
    ]  # fmt: skip
    assert [line.split(":")[0] for line in lines if ":" in line] == ["CTR", "CTCVR", "CVR"]


def test_table_columns_line_up_across_tasks():
    lines = report.table(
        {
            "BCE": {task: result() for task in metrics.TASKS},
            "weighted BCE": {task: result(positives=7, rows=9, auc=None, auc_low=None)
                             for task in metrics.TASKS},
        }
    ).splitlines()  # fmt: skip
    cells = [line for line in lines if line and ":" not in line]
    assert len(cells) == 9
    assert len({len(line) for line in cells}) == 1


@pytest.mark.parametrize("name", ["m", "a name much longer than any table has room for"])
def test_table_fits_100_columns(name):
    # The widest numbers: the largest public data set, and very wrong predictions.
    wide = result(rows=84_000_000, positives=3_400_000, log_loss=34.5, pcoc=12345.678)
    text = report.table({name: dict.fromkeys(metrics.TASKS, wide)})
    assert max(map(len, text.splitlines())) <= 100
    assert ("a name" in text) == name.startswith("a name")


def test_table_shows_what_is_undefined_as_a_dash():
    nothing = dict.fromkeys(result(), None) | {"rows": 0, "positives": 0}
    separated = result(auc=1.0, auc_low=None, auc_high=None)
    text = report.table({"x": {"ctr": nothing, "ctcvr": separated, "cvr": nothing}})
    lines = [line.split() for line in text.splitlines() if line.startswith("x")]
    assert lines[0] == ["x", "-", "-", "-", "-", "-", "0", "0"]
    assert lines[1][:5] == ["x", "1.0000", "[", "-,", "-]"]


def test_table_takes_a_real_summary():
    grade, predictions = sample()
    text = report.table({"mmoe": metrics.summary(grade, predictions, np.arange(3000) // 10)})
    assert f"{metrics.auc(grade >= 1, predictions['ctr']):.4f}" in text
    assert text.count("mmoe") == 3


# --- the sheet ---------------------------------------------------------------------------------


def test_roc_panel_draws_each_curve_with_its_auc(drawn):
    grade, predictions = sample()
    axes = draw(drawn, grade, predictions)[0]
    area, low, high = metrics.auc_interval(grade >= 1, predictions["ctr"])
    assert legend(axes)[0] == f"CTR: AUC {area:.4f} [{low:.4f}, {high:.4f}]"
    clicked = grade >= 1
    for line, (labels, scores) in zip(
        axes.lines[1:],
        [
            (clicked, predictions["ctr"]),
            (grade == 2, predictions["ctcvr"]),
            ((grade == 2)[clicked], predictions["cvr"][clicked]),
        ],
        strict=True,
    ):
        np.testing.assert_array_equal(line.get_xydata().T, metrics.roc_curve(labels, scores))


def test_score_panels_count_each_grade_and_are_densities(drawn):
    grade, predictions = sample()
    axes = draw(drawn, grade, predictions)[1]
    counts = np.bincount(grade)
    assert legend(axes) == [
        f"exposure only ({counts[0]:,})",
        f"click, no conversion ({counts[1]:,})",
        f"conversion ({counts[2]:,})",
    ]
    assert axes.get_xscale() == "log"
    for outline in axes.patches:
        density, edges, _ = outline.get_data()
        assert np.sum(density * np.diff(np.log10(edges))) == pytest.approx(1)


def test_clicks_only_are_drawn_without_conversions(drawn):
    grade, predictions = sample()
    grade = np.minimum(grade, 1)
    roc, scores, reliability = draw(drawn, grade, {"ctr": predictions["ctr"]})
    assert [text.split(":")[0] for text in legend(roc)] == ["CTR"]
    clicks = int(grade.sum())
    assert legend(scores) == [f"exposure only ({3000 - clicks:,})", f"click ({clicks})"]
    assert reliability.get_title().startswith("Reliability of CTR")
    (_, counts) = drawn[-1].get_suptitle().split("\n")
    assert counts == f"3,000 exposures, {clicks} clicks"


def test_score_panels_draw_scores_of_zero_at_the_left_edge(drawn):
    # A quarter of each grade is predicted 0, which has no logarithm.
    scores = np.tile(np.float32([0, 1e-4, 0.3, 0.9]), 300)
    axes = draw(drawn, np.repeat([0, 1, 2], 400), dict.fromkeys(metrics.TASKS, scores))[1]
    assert len(axes.patches) == 6
    for outline in axes.patches:
        density, edges, _ = outline.get_data()
        assert edges[0] == pytest.approx(1e-4)
        # The first bin holds these and the lowest that can be drawn.
        assert density[0] * np.log10(edges[1] / edges[0]) == pytest.approx(0.5)


def test_score_panels_draw_a_tick_for_each_row_of_a_small_grade(drawn):
    grade, predictions = sample(rows=2000, click_rate=0.05, conversion_rate=0.1)
    conversions = int(np.sum(grade == 2))
    assert 0 < conversions < 30
    axes = draw(drawn, grade, predictions)[2]
    assert legend(axes)[2] == f"conversion ({conversions}): one tick per row"
    np.testing.assert_allclose(axes.lines[0].get_xdata(), predictions["ctcvr"][grade == 2])


def test_reliability_panels_draw_bins_and_intervals(drawn):
    grade, predictions = sample()
    axes = draw(drawn, grade, predictions)[3]
    curve = metrics.reliability(grade >= 1, predictions["ctr"], bins=20)
    points = axes.lines[1].get_xydata()
    np.testing.assert_allclose(points, np.stack([curve.predicted, curve.observed], axis=1))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    # Every interval is inside the axes, except for values without a logarithm.
    assert axes.get_ylim()[1] >= curve.high.max()
    assert axes.get_xlim() == axes.get_ylim()


def test_reliability_panels_are_linear_where_rates_are_large(drawn):
    generator = np.random.default_rng(0)
    grade = generator.integers(0, 3, size=3000)
    predictions = {task: generator.uniform(0.2, 0.8, 3000) for task in metrics.TASKS}
    axes = draw(drawn, grade, predictions)[3]
    assert (axes.get_xscale(), axes.get_xlim()[0]) == ("linear", 0)


def test_reliability_uses_fewer_bins_where_positives_are_few(drawn):
    grade, predictions = sample(rows=2000, conversion_rate=0.2)
    bins = int(np.sum(grade == 2)) // 5
    assert 2 < bins < 20
    panels = draw(drawn, grade, predictions)
    assert f"{bins} bins of " in legend(panels[4])[1]
    assert "20 bins of 100 rows" in legend(panels[3])[1]


def grades(*counts):
    return np.repeat([0, 1, 2], counts)


def assert_a_sheet_is_written(path, grade, scores):
    predictions = dict.fromkeys(metrics.TASKS, np.asarray(scores, np.float32))
    summary = metrics.summary(grade, predictions)
    with np.errstate(all="raise", under="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_evaluation(path, grade, predictions, summary, "odd")
    height, width, _ = imread(path).shape
    assert (width, height) == (1650, 1045)


@pytest.mark.slow
@pytest.mark.parametrize(
    "counts", [(0, 0, 0), (1, 0, 0), (12, 5, 3), (500, 40, 0), (0, 0, 50), (900, 50, 2)]
)
def test_unusual_labels_still_give_plots(tmp_path, counts):
    scores = np.random.default_rng(0).random(sum(counts))
    assert_a_sheet_is_written(tmp_path / "sheet.png", grades(*counts), scores)


@pytest.mark.slow
@pytest.mark.parametrize("values", [[0.01], [0], [1], [0, 1], [0, 1e-38, 1e-9, 0.5, 1]])
def test_unusual_scores_still_give_plots(tmp_path, values):
    scores = np.random.default_rng(0).choice(values, 650)
    assert_a_sheet_is_written(tmp_path / "sheet.png", grades(500, 140, 10), scores)


def test_undefined_metrics_are_labelled_undefined(drawn):
    axes = draw(drawn, grades(50, 40, 0), dict.fromkeys(metrics.TASKS, np.linspace(0, 1, 90)))
    assert legend(axes[0])[1:] == ["CTCVR: AUC undefined", "CVR: AUC undefined"]
    assert axes[4].get_title() == "Reliability of CTCVR: PCOC undefined"


# --- comparison --------------------------------------------------------------------------------


def test_comparison_draws_each_model_with_its_interval(drawn):
    summaries = {
        "BCE": {task: result(auc=0.71, auc_low=0.70, auc_high=0.73) for task in metrics.TASKS},
        "PWiseR": {task: result(auc=0.74, auc_low=None) for task in metrics.TASKS},
        "none": {task: result(auc=None, auc_low=None) for task in metrics.TASKS},
    }
    plots.plot_comparison("unused", summaries)
    panels = drawn[0].axes
    assert [axes.get_title().split(":")[0] for axes in panels] == ["CTR", "CTCVR", "CVR"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(summaries)
    for axes in panels:
        points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
        assert points == [[[0.71, 0]], [[0.74, 1]]]
        (interval,) = axes.collections
        np.testing.assert_array_equal(interval.get_segments(), [[[0.70, 0], [0.73, 0]]])
        assert [text.get_text() for text in axes.texts] == ["0.7100", "0.7400", "undefined"]
        low, high = axes.get_xlim()
        assert low < 0.70 < 0.74 < high


# --- files -------------------------------------------------------------------------------------


def test_plots_are_written_atomically(tmp_path, monkeypatch):
    summaries = {"BCE": {task: result() for task in metrics.TASKS}}
    path = tmp_path / "comparison.png"
    plots.plot_comparison(path, summaries)
    before = path.read_bytes()
    assert imread(path).std() > 0.01

    def disk_full(figure, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", disk_full)
    with pytest.raises(OSError, match="No space left"):
        plots.plot_comparison(path, summaries)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_os_error(tmp_path):
    summaries = {"BCE": {task: result() for task in metrics.TASKS}}
    with pytest.raises(FileNotFoundError, match="absent"):
        plots.plot_comparison(tmp_path / "absent" / "comparison.png", summaries)


@pytest.mark.slow
def test_plots_do_not_change_matplotlib_or_import_tensorflow(tmp_path):
    program = f"""
import sys, matplotlib
# Not "backend": to read that one is to choose it.
names = sorted(set(matplotlib.rcParams) - {{"backend"}})
before = [matplotlib.rcParams[name] for name in names]
import numpy as np
from pwiser_tf import metrics, plots, report
grade = np.arange(60) % 3
predictions = dict.fromkeys(metrics.TASKS, np.linspace(0.1, 0.9, 60))
plots.plot_evaluation({str(tmp_path / "x.png")!r}, grade, predictions,
            metrics.summary(grade, predictions), "x")
print([name for name in ("matplotlib.pyplot", "tensorflow") if name in sys.modules])
assert [matplotlib.rcParams[name] for name in names] == before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_difference_table_has_the_paired_test_of_each_task_against_the_first():
    grade = np.array([0, 0, 0, 1, 1, 2, 2, 0, 1, 2] * 2)
    random = np.random.default_rng(0)
    predictions = {
        name: {task: random.random(20) for task in ("ctr", "ctcvr", "cvr")} for name in ("a", "b")
    }
    lines = report.difference_table(grade, predictions).split("\n")
    assert len(lines) == 1 + 3
    assert "minus that of a" in lines[0]
    clicked = grade >= 1
    rows = {"CTR": (clicked, slice(None)), "CTCVR": (grade == 2, slice(None))}
    rows["CVR"] = ((grade == 2)[clicked], clicked)
    for line in lines[1:]:
        task, name, *cells = line.split()
        labels, chosen = rows[task]
        scores = [predictions[model][task.lower()][chosen] for model in ("b", "a")]
        difference, low, high, p = metrics.auc_difference(labels, *scores)
        assert name == "b"
        assert cells == [f"{difference:+.4f}", f"[{low:+.4f},", f"{high:+.4f}]", "p", f"{p:.3f}"]


def test_a_difference_of_few_rows_has_no_interval():
    scores = {"a": [0.1, 0.2, 0.3, 0.4], "b": [0.1, 0.4, 0.3, 0.2]}
    predictions = {
        name: dict.fromkeys(metrics.TASKS, np.array(values)) for name, values in scores.items()
    }
    for grade, shown in (
        ([0, 1, 2, 2], "-1.0000 [      -,       -]  p     -"),
        ([0, 1, 1, 1], "-"),
    ):
        line = report.difference_table(np.array(grade), predictions).split("\n")[-1]
        assert line.split(maxsplit=2) == ["CVR", "b", shown]


def test_a_full_disk_names_the_file_and_leaves_no_partial_file(tmp_path, monkeypatch):
    def fill(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plots.Figure, "savefig", fill)
    with pytest.raises(OSError, match=r"No space left on device: '.*sheet\.png'"):
        plots.save(plots.Figure(), tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []
