"""The paper's table: its statistics by hand, its entries, and the command itself on a small data
set, interrupted and not."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from pwiser_tf import metrics, runs
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema, Split
from pwiser_tf.study import paired, paper_report, paper_results, paper_runs, paper_table
from pwiser_tf.training import train
from tests.conftest import SCHEMA, group_of, wait_for, write_dataset

# --- statistics --------------------------------------------------------------------------------


def test_the_t_test_over_seeds_by_hand():
    """1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3); with 2 degrees of freedom the two-sided p is
    1 - t / sqrt(2 + t^2), and the 97.5 percent quantile 4.302653."""
    found = paired.over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.p_value == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)
    reach = 4.302652729911275 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - reach, 2 + reach))
    assert paired.over_seeds([-1.0, -2.0, -3.0]).p_value == found.p_value


def test_seeds_without_spread():
    assert paired.over_seeds([0.5]) == paired.Estimate(0.5, None, None, None)
    assert paired.over_seeds([0.0, 0.0]) == paired.Estimate(0.0, 0.0, 0.0, 1.0)
    assert paired.over_seeds([0.5, 0.5]) == paired.Estimate(0.5, 0.5, 0.5, 0.0)


def test_wilcoxon_by_hand():
    """All of 5 differences of one sign: 2 of the 2^5 signs are as extreme."""
    assert paired.wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 32)
    assert paired.wilcoxon([0.0, 0.0, 0.0]) == 1
    assert paired.wilcoxon([1.0]) is None


def _scores(seed, rows=300):
    random = np.random.default_rng(seed)
    labels = np.random.default_rng(99).random(rows) < 0.2
    a, b = labels + random.normal(size=rows), 0.5 * labels + random.normal(size=rows)
    return labels, a, b


def test_delong_of_one_seed_is_that_of_the_metrics():
    labels, a, b = _scores(1)
    found = paired.over_rows([metrics.placements(labels, a)], [metrics.placements(labels, b)])
    expected = metrics.auc_difference(labels, a, b)
    assert (found.mean, found.low, found.high, found.p_value) == pytest.approx(expected)


def test_delong_over_seeds_is_of_the_mean_difference():
    """Seeds that agree row by row add nothing; independent ones average their rows' noise."""
    labels, a, b = _scores(1)
    pairs = [[metrics.placements(labels, scores) for scores in _scores(s)[1:]] for s in range(4)]
    found = paired.over_rows(*zip(*pairs, strict=True))
    single = [paired.over_rows([x], [y]) for x, y in pairs]
    assert found.mean == pytest.approx(np.mean([one.mean for one in single]))
    of_a, of_b = metrics.placements(labels, a), metrics.placements(labels, b)
    one, twice = paired.over_rows([of_a], [of_b]), paired.over_rows([of_a] * 2, [of_b] * 2)
    assert twice == one
    # Scores of independent noise around the same labels: the standard error halves with 4 seeds.
    ratio = (found.high - found.low) / np.mean([s.high - s.low for s in single])
    assert 0.35 < ratio < 0.65


def test_delong_where_it_says_nothing():
    labels = [0] * 5 + [1] * 5
    same = metrics.placements(labels, np.arange(10))
    assert paired.over_rows([same], [same]) == paired.Estimate(0.0, 0.0, 0.0, 1.0)
    # With fewer than 5 rows of a class there is no interval.
    best, worst = (metrics.placements(labels[1:], sign * np.arange(9)) for sign in (1, -1))
    assert paired.over_rows([best], [worst]) == paired.Estimate(1.0, None, None, None)


def test_holm_by_hand():
    """0.01 x 3, then 0.03 x 2, then 0.04 x 1, but never less than the one before."""
    assert paired.holm([0.04, 0.01, None, 0.03]) == pytest.approx([0.06, 0.03, None, 0.06])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_a_verdict_needs_both_tests():
    assert paired.both(0.01, 0.2) == 0.2
    assert paired.both(0.01, None) is None
    assert paired.verdict(0.1, 0.04) == "win"
    assert paired.verdict(-0.1, 0.04) == "loss"
    assert paired.verdict(0.1, 0.05) == "win"
    assert paired.verdict(0.1, 0.06) == "tie"
    assert paired.verdict(0.0, 0.0) == "tie"
    assert paired.verdict(0.1, None) is None


# --- entries -----------------------------------------------------------------------------------


def test_entries():
    assert paper_table.split_entry("bce", "losses") == ("bce", [])
    found = paper_table.split_entry("mmoe:experts=4:bottom_units=64+32:dropout=0", "models")
    assert found == ("mmoe", ["--experts=4", "--bottom_units=64,32", "--dropout=0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected name"),
        ("pwiser:", "found ''"),
        ("pwiser:margin_click", "found 'margin_click'"),
        ("pwiser:margin_click=", "found 'margin_click='"),
        ("pwiser:margin=1", "out of conversion_head, "),
        ("pwiser:seed=1", "found 'seed=1'"),
        ("pwiser:data_dir=x", "found 'data_dir=x'"),
        ("pwiser:workdir=x", "found 'workdir=x'"),
    ],
)
def test_wrong_entries_are_one_line(text, message):
    with pytest.raises(DataError, match=message) as error:
        paper_table.split_entry(text, "losses")
    assert "\n" not in str(error.value)


def test_settings_of_entries(tmp_path):
    """The flagfile, then the model, then the loss; the flagfile's data and seed do not count."""
    file = tmp_path / "base.flags"
    file.write_text("--data_dir=elsewhere\n--seed=7\n--epochs=9\n--learning_rate=0.5\n--loss=bce\n")
    found = paper_table.settings_of(
        f"{file}:batch_size=32:dropout=0.3",
        "data",
        "mmoe:experts=4:dropout=0.1:embedding_dim=6",
        "pwiser:dropout=0.2:loss_tasks=ctr",
        ["--seed=3"],
    )
    assert found.data_dir == str(pathlib.Path("data").resolve())
    assert (found.model.name, found.model.experts, found.model.embedding_dim) == ("mmoe", 4, 6)
    assert (found.loss.name, found.loss.loss_tasks) == ("pwiser", ("ctr",))
    training = found.training
    assert (training.epochs, training.batch_size, training.learning_rate) == (9, 32, 0.5)
    assert (training.seed, found.model.dropout) == (3, 0.2)
    assert found.model.bottom_units == (512, 256)


@pytest.mark.parametrize(
    ("base", "model", "loss", "message"),
    [
        (None, "nmoe", "bce", "model nmoe with loss bce.*--model=nmoe"),
        (None, "mmoe", "bse", "--loss=bse"),
        (None, "mmoe", "bce:dropout=2", "--dropout=2"),
        (None, "mmoe", "bce:dropout=x", "--dropout=x"),
        ("absent.flags", "mmoe", "bce", "absent.flags"),
    ],
)
def test_wrong_settings_are_one_line(base, model, loss, message):
    with pytest.raises(DataError, match=message):
        paper_table.settings_of(base, "data", model, loss, [])


def test_data_sets_need_different_names(tmp_path):
    found = paper_table._data_folders(["a/data", "other=b/data"])
    assert list(found) == ["data", "other"]
    with pytest.raises(DataError, match="NAME=DIR gives one"):
        paper_table._data_folders(["a/data", "b/data"])


# --- the report, of made-up runs ----------------------------------------------------------------


def _finished(folder, settings, loss, seed, scores, grade, best_epoch=1, epochs=2):
    """A run whose test predictions of every task are `scores` [rows]."""
    run = paper_runs.Run(
        "made",
        "mmoe:experts=2",
        loss,
        settings.replace(seed=seed),
        folder / "runs" / "made" / "mmoe" / loss / f"seed-{seed}",
    )
    run.folder.mkdir(parents=True)
    predictions = dict.fromkeys(metrics.TASKS, scores)
    np.savez(run.folder / "predictions.npz", **predictions, grade=grade)
    test = metrics.summary(grade, predictions, None)
    entries = [{"epoch": k + 1, "test": test} for k in range(epochs)]
    return paper_results.Finished(run, {"best_epoch": best_epoch, "test": test, "epochs": entries})


@pytest.fixture
def made(settings, tmp_path):
    """Makes up runs of two losses: scores of the labels plus noise, less of it for "good"."""

    def make(noise, seeds=3, rows=3000, conversions=True, **losses_epochs):
        random = np.random.default_rng(0)
        grade = (random.random(rows) < 0.3).astype(np.int64)
        if conversions:
            grade += (grade == 1) & (random.random(rows) < 0.4)
        schema = dataclasses.replace(
            SCHEMA, group=None, splits={"test": Split(rows, int((grade > 0).sum()),
                                                      int((grade > 1).sum()), 0, ())}
        )  # fmt: skip
        finished = []
        for seed in range(seeds):
            for loss, deviation in noise.items():
                scores = grade + deviation * np.random.default_rng([seed, 5]).normal(size=rows)
                scores += 0.02 * np.random.default_rng([seed, ord(loss[0])]).normal(size=rows)
                scores = (1 / (1 + np.exp(-scores))).astype(np.float32)
                epochs = losses_epochs.get(loss, 2)
                finished.append(
                    _finished(tmp_path, settings, loss, seed, scores, grade, epochs=epochs)
                )
        return finished, {"made": schema}

    return make


def test_a_win_a_tie_and_a_loss(made, tmp_path):
    finished, schemas = made({"bce": 1.0, "better": 0.5, "alike": 1.0, "worse": 2.0})
    found = paper_results.results(finished, schemas, "command", None)
    verdicts = {
        row["loss"]: row["verdict"]
        for row in found["comparisons"]
        if (row["kind"], row["task"]) == ("auc", "ctr")
    }
    assert verdicts == {"better": "win", "alike": "tie", "worse": "loss"}
    row = next(row for row in found["comparisons"] if row["loss"] == "better")
    areas = [
        [entry.result["test"]["ctr"]["auc"] for entry in finished if entry.run.loss == loss]
        for loss in ("better", "bce")
    ]
    np.testing.assert_allclose(row["differences"], np.subtract(*areas))
    assert row["mean"] == pytest.approx(np.mean(np.subtract(*areas)))
    assert (row["seeds_for"], row["seeds_against"]) == (3, 0)
    assert row["p_value"] == max(row["p_seeds"], row["p_rows"])
    # Nine comparisons of AUC: Holm's p-value is at most nine times as large.
    assert row["p_value"] < row["p_holm"] <= 9 * row["p_value"]
    count = {
        (entry["loss"], entry["task"]): (entry["wins"], entry["ties"], entry["losses"])
        for entry in found["counts"]
        if entry["corrected"]
    }
    assert count["better", "ctr"] == (1, 0, 0)
    assert count["worse", "ctr"] == (0, 0, 1)
    text = paper_report.markdown(found)
    assert f"| mmoe:experts=2 | better | CTR | {1e4 * row['mean']:+.0f} [" in text
    assert "all 9 AUC comparisons" in text
    paper_report.write(found, tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "differences.png",
        "calibration.png",
        "epochs.png",
    }
    assert json.loads((tmp_path / "results.json").read_text())["comparisons"][0] == row


def test_less_log_loss_is_a_win():
    rows = [
        {"kind": kind, "task": "ctr", "mean": -0.5, "p_value": 0.001}
        for kind in ("log_loss", "auc", "pcoc")
    ]
    paper_results._correct(rows)
    assert [row["verdict"] for row in rows] == ["win", "loss", "win"]


def test_pcoc_is_compared_by_its_distance_from_1():
    measure = paper_results.Measure("pcoc", "ctr")
    twice, half = ({"ctr": {"pcoc": value}} for value in (2.0, 0.5))
    assert measure.compared(twice) == measure.compared(half) == pytest.approx(math.log(2))
    assert measure.value(half) == 0.5
    assert measure.compared({"ctr": {"pcoc": 0.0}}) is None


def test_without_conversions_their_tasks_are_undefined(made, tmp_path):
    finished, schemas = made({"bce": 1.0, "other": 1.2}, conversions=False)
    found = paper_results.results(finished, schemas, "command", None)
    text = paper_report.markdown(found)
    assert "| mmoe:experts=2 | other | CTCVR | - | - | - | - | - | - |" in text
    undefined = {row["task"]: row["undefined"] for row in found["counts"]}
    assert undefined == {"ctr": 0, "ctcvr": 1, "cvr": 1}
    paper_report.write(found, tmp_path)


def test_one_seed_has_differences_but_no_verdict(made, tmp_path):
    finished, schemas = made({"bce": 1.0, "better": 0.5}, seeds=1)
    found = paper_results.results(finished, schemas, "command", None)
    row = found["comparisons"][0]
    assert row["mean"] > 0
    assert (row["low"], row["p_seeds"], row["verdict"]) == (None, None, None)
    assert row["p_rows"] < 0.001
    assert "[-, -]" in paper_report.markdown(found)
    paper_report.write(found, tmp_path)


def test_one_loss_alone_has_no_differences(made, tmp_path):
    finished, schemas = made({"bce": 1.0})
    found = paper_results.results(finished, schemas, "command", None)
    paper_report.write(found, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "±" in text
    assert "verdict |" not in text
    assert not list(tmp_path.glob("*.png"))


def test_only_epochs_that_all_reached_are_compared(made):
    finished, schemas = made({"bce": 1.0, "better": 0.5}, bce=4, better=3)
    found = paper_results.results(finished, schemas, "command", None)
    epochs = [row["epoch"] for row in found["fixed_epochs"] if row["task"] == "ctr"]
    assert epochs == [1, 2, 3]
    assert found["fixed_epochs"][0]["mean"] == found["comparisons"][0]["mean"]


def test_published_numbers_stand_beside_their_country(made):
    finished, schemas = made({"bce": 1.0, "better": 0.5})
    assert "MTReclib" not in _table(finished, schemas)
    french = dataclasses.replace(schemas["made"], dataset="aliexpress", notes={"country": "FR"})
    assert "| 0.7216 / 0.8811 |" in _table(finished, {"made": french})
    assert "| 0.7043 / 0.8758 |" in _table(finished, schemas, "US")
    elsewhere = dataclasses.replace(french, notes={"country": "XX"})
    assert "MTReclib" not in _table(finished, {"made": elsewhere})


def _table(finished, schemas, published=None):
    text = paper_report.markdown(paper_results.results(finished, schemas, "command", published))
    return text[text.index("## made") :]


def test_runs_that_ended_at_the_limit_are_told(made):
    finished, schemas = made({"bce": 1.0})
    limit = finished[0].run.settings.training.epochs
    finished = [
        dataclasses.replace(entry, result={**entry.result, "best_epoch": limit})
        for entry in finished
    ]
    assert f"| {limit:.1f} (3 at the limit) |" in _table(finished, schemas)


# --- the command -------------------------------------------------------------------------------

SMALL = (
    "--bottom_units=8\n--tower_units=8,4\n--embedding_dim=4\n--batch_size=64\n--epochs=3\n"
    "--learning_rate=0.01\n--patience=3\n"
)


def _arguments(folder, dataset, *more):
    file = folder / "small.flags"
    file.write_text(SMALL)
    return [
        *(sys.executable, "-m", "pwiser_tf.study.paper_table", f"--data={dataset}"),
        *(f"--settings={file}", "--models=shared_bottom", "--losses=bce,pwiser:margin_click=0.2"),
        *("--seeds=2", "--parallel=2", f"--output_dir={folder / 'table'}", *more),
    ]


def _call(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def table(dataset, tmp_path_factory):
    """(folder, what the command printed) of a finished table."""
    folder = tmp_path_factory.mktemp("table")
    done = _call(_arguments(folder, dataset))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_command_writes_the_table(table):
    folder, printed = table
    text = (folder / "table" / "table.md").read_text()
    assert text in printed
    assert "4/4 " in printed
    assert "| shared_bottom | pwiser:margin_click=0.2 | CTCVR | " in text
    assert "| test | 300 |" in text
    results = json.loads((folder / "table" / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [0, 0, 1, 1]
    assert results["data"]["data"]["groups"]
    assert "GAUC CTR" in text


def test_a_run_of_the_table_is_a_run_of_train(table, dataset, tmp_path):
    """The same flags give the same test metrics; the best epoch's are those of that epoch."""
    folder, _ = table
    run = folder / "table" / "runs" / "data" / "shared_bottom" / "pwiser,margin_click=0.2"
    found = json.loads((run / "seed-1" / "result.json").read_text())
    settings = paper_table.settings_of(
        str(folder / "small.flags"),
        str(dataset),
        "shared_bottom",
        "pwiser",
        ["--margin_click=0.2", "--seed=1"],
    )
    # The table compares losses as they were learnt.
    expected = train(settings.replace(calibration="none"), tmp_path / "run")
    assert found["best_epoch"] == expected["best_epoch"]
    for task in metrics.TASKS:
        for name in ("auc", "gauc", "log_loss", "pcoc"):
            assert found["test"][task][name] == pytest.approx(expected["test"][task][name], 1e-5)
    assert found["test"] == found["epochs"][found["best_epoch"] - 1]["test"]
    assert not (run / "seed-1" / "checkpoints").exists()


@pytest.mark.slow
def test_seeds_are_paired(dataset):
    """All losses of a seed begin with the same weights; another seed's are others."""
    schema = Schema.load(dataset)

    def weights(loss, seed):
        settings = paper_table.settings_of(
            None, str(dataset), "shared_bottom:embedding_dim=4", loss, [f"--seed={seed}"]
        )
        return np.concatenate(
            [weight.ravel() for weight in runs.build_model(settings, schema).get_weights()]
        )

    first = weights("bce", 0)
    np.testing.assert_array_equal(weights("pwiser:margin_click=0.2", 0), first)
    assert not np.array_equal(weights("bce", 1), first)


def test_a_second_call_trains_nothing_and_gives_the_same_files(table, dataset):
    folder, _ = table
    before = {path.name: path.read_bytes() for path in (folder / "table").iterdir()
              if path.is_file()}  # fmt: skip
    results = list((folder / "table").glob("runs/*/*/*/*/result.json"))
    times = [path.stat().st_mtime_ns for path in results]
    done = _call(_arguments(folder, dataset))
    assert done.returncode == 0, done.stderr
    assert "4 runs, 4 of them finished" in done.stdout
    assert [path.stat().st_mtime_ns for path in results] == times
    after = {path.name: path.read_bytes() for path in (folder / "table").iterdir()
             if path.is_file()}  # fmt: skip
    assert after == before


def test_a_killed_call_goes_on(table, dataset, tmp_path):
    """Ended again and again: no process outlives the command, and the last call ends with what an
    uninterrupted one gave."""
    arguments = _arguments(tmp_path, dataset, "--seeds=1")

    def epochs():
        files = (tmp_path / "table").glob("runs/*/*/*/*/test_epochs.json")
        return sum(len(json.loads(file.read_text())) for file in files)

    # When the processes are only just started; in the middle of the runs, by a terminal, which
    # signals the whole group; and by what no process can catch.
    ways = [
        (lambda process: process.terminate(), 0),
        (lambda process: os.killpg(process.pid, signal.SIGINT), 1),
        (lambda process: process.kill(), 1),
    ]
    for end, more_epochs in ways:
        before = epochs()
        with group_of(arguments) as process:
            assert process.stdout.readline() == "2 runs, 0 of them finished\n"
            wait_for(lambda before=before, more=more_epochs: epochs() >= before + more, 600)
            end(process)
            _, error = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 130, error
            assert error == "interrupted\n"
        assert not (tmp_path / "table" / "table.md").exists()
    assert epochs() >= 2
    done = _call(arguments)
    assert done.returncode == 0, done.stderr
    for loss in ("bce", "pwiser,margin_click=0.2"):
        place = pathlib.Path("table", "runs", "data", "shared_bottom", loss, "seed-0")
        for file in ("result.json", "predictions.npz"):
            assert (tmp_path / place / file).read_bytes() == (table[0] / place / file).read_bytes()


def test_other_settings_in_the_same_folder_are_refused(table, dataset):
    folder, _ = table
    arguments = _arguments(folder, dataset)
    place = next(k for k, text in enumerate(arguments) if text.startswith("--settings"))
    arguments[place] += ":dropout=0.4"
    done = _call(arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "has --dropout 0.2, not 0.4; give another --output_dir" in done.stderr


@pytest.mark.slow
def test_a_run_that_fails_is_named(dataset, tmp_path):
    """A learning rate at which training diverges; nothing is left running."""
    arguments = _arguments(tmp_path, dataset, "--seeds=1", "--parallel=1",
                           "--losses=bce,bce:learning_rate=1e30")  # fmt: skip
    done = _call(arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "error: data shared_bottom bce:learning_rate=1e30 seed 0: training diverged"
    )


def test_a_loss_over_groups_gives_all_runs_its_batches(dataset, tmp_path):
    file = tmp_path / "small.flags"
    file.write_text(SMALL)
    entries = [("bce", "rows"), ("bce,listce", "groups")]
    for losses, expected in entries:
        args = type("Args", (), {"settings": str(file), "seeds": 2})
        runs = paper_table._plan(
            args, {"data": dataset}, ["mmoe"], losses.split(","), tmp_path / "runs"
        )
        assert {run.settings.training.shuffle for run in runs} == {expected}
        assert len({run.folder for run in runs}) == len(runs)


@pytest.mark.slow
def test_a_data_set_without_a_split_is_refused_before_training(tmp_path):
    write_dataset(tmp_path / "data", {"train": 100, "validation": 50})
    done = _call(_arguments(tmp_path, tmp_path / "data"))
    assert done.returncode == 2
    assert "no test split" in done.stderr
    assert not (tmp_path / "table").exists()
