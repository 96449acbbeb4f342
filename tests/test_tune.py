import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types

import optuna
import pandas as pd
import pytest
from absl import flags
from optuna.trial import TrialState

from pwiser_tf import config, plots, runs, training
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema
from pwiser_tf.study import tune, tune_report, workers
from pwiser_tf.tasks import LOSSES, TASKS
from tests.conftest import group_of, wait_for, write_dataset

TRIALS = 3


@pytest.fixture(scope="module")
def untested(tmp_path_factory):
    """A data set whose test split is gone: what tunes on it cannot have looked there."""
    folder = tmp_path_factory.mktemp("converted") / "data"
    write_dataset(folder, {"train": 600, "validation": 300, "test": 300})
    for file in folder.glob("test-*"):
        file.unlink()
    return folder


@pytest.fixture(scope="module")
def base(settings, untested):
    return settings.replace(data_dir=str(untested), batch_size=32, epochs=3)


def _command(base, folder, *more):
    arguments = [sys.executable, "-m", "pwiser_tf.tune", f"--workdir={folder}"]
    for name, value in base.read().items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        arguments.append(f"--{name}={text}")
    return [*arguments, f"--trials={TRIALS}", "--model_name=shop", *more]


@pytest.fixture(scope="module")
def studied(base, tmp_path_factory):
    """The study of a finished command, and what the command printed."""
    folder = tmp_path_factory.mktemp("studied")
    result = subprocess.run(
        _command(base, folder / "run"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return folder / "run-tune", result.stdout


def _search(folder, base, loss):
    """What the study in the folder holds of a loss."""
    schema = Schema.load(base.data_dir)
    return tune.Search(folder, base.replace(loss=loss), tune.searched(loss, None), schema)


# --- the command -------------------------------------------------------------------------------


def test_a_study_leaves_what_the_module_says(studied):
    folder, _ = studied
    assert {path.name for path in folder.iterdir()} == {
        "study.db",
        "trials",
        "train.log",
        "best.flags",
        "best-bce.flags",
        "trials.csv",
        "tune.png",
    }


def test_both_losses_get_the_same_number_of_trials(studied, base):
    folder, output = studied
    rows = pd.read_csv(folder / "trials.csv")
    assert rows["loss"].value_counts().to_dict() == {"bce": TRIALS, "pwiser": TRIALS}
    assert sum(line.startswith(("bce ", "pwiser ")) and ": " in line for line in
               output.split("validation split")[0].splitlines()) == 2 * TRIALS  # fmt: skip
    # The first trial is of the flags; the learning rates of both losses are drawn alike.
    rates = rows.pivot(index="trial", columns="loss", values="learning_rate")
    assert rates.loc[1].tolist() == [base.training.learning_rate] * 2
    assert rates["bce"].tolist() == rates["pwiser"].tolist()
    assert rates["bce"].nunique() == TRIALS


def test_a_trial_is_worth_its_best_epoch_by_validation(studied, base):
    folder, _ = studied
    rows = pd.read_csv(folder / "trials.csv")
    complete = rows[rows["outcome"] == "complete"]
    assert (complete["monitored"] - (complete["ctr_auc"] + complete["ctcvr_auc"]) / 2).abs().max() \
        < 1e-12  # fmt: skip
    for loss in ("bce", "pwiser"):
        search = _search(folder, base, loss)
        for trial in search.study.get_trials(states=(TrialState.COMPLETE,)):
            values = list(trial.intermediate_values.values())
            assert trial.value == max(values)
            assert trial.user_attrs["best_epoch"] == 1 + values.index(max(values))


def test_the_best_runs_alone_are_kept(studied, base):
    folder, _ = studied
    kept = {path.name for path in (folder / "trials").iterdir()}
    searches = [_search(folder, base, loss) for loss in ("bce", "pwiser")]
    assert kept == {search.folder(search.best()).name for search in searches}


@pytest.mark.parametrize(("name", "loss"), [("best.flags", "pwiser"), ("best-bce.flags", "bce")])
def test_the_flagfile_trains_the_winner_again(name, loss, studied, base, tmp_path):
    folder, _ = studied
    values = flags.FlagValues()
    config.define_flags(values)
    config.define_run_flags(values)
    values(["train", f"--flagfile={folder / name}"])
    settings = config.config_from_flags(values)
    search = _search(folder, base, loss)
    assert settings.read() == search.settings(search.best()).read()
    assert settings.loss.name == loss
    # What was not searched is the base's.
    same = set(base.read()) & set(settings.read()) - set(search.names) - {"loss"}
    assert all(settings.values()[name] == base.values()[name] for name in same)
    assert values["model_name"].value == "shop"
    assert values["workdir"].value == str(folder / f"run-{loss}")
    # And it gives the very value again.
    assert training.fit(settings, tmp_path / "run")[2].best_value == search.best().value


def test_the_flagfiles_header_says_where_it_comes_from(studied, base):
    folder, _ = studied
    text = (folder / "best.flags").read_text()
    comments = " ".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    best = _search(folder, base, "pwiser").best()
    assert f"--loss=pwiser --trials={TRIALS}" in comments
    assert f"{best.user_attrs['ctr_auc']:.4f} (CTR)" in comments
    assert f"{best.user_attrs['ctcvr_auc']:.4f} (CTCVR)" in comments
    assert "the test split was not opened" in comments
    assert max(map(len, text.splitlines())) <= 100


def test_killed_anywhere_it_finds_the_same(studied, base, tmp_path):
    folder = tmp_path / "run-tune"
    command = _command(base, tmp_path / "run", "--checkpoint_seconds=0")
    log = folder / "train.log"
    # In the first trial, by a terminal, which signals the worker process too; after a few trials.
    for epochs, number, code in ((1, signal.SIGINT, 130), (8, signal.SIGKILL, -signal.SIGKILL)):
        with group_of(command) as process:
            wait_for(
                lambda epochs=epochs: (
                    log.exists() and log.read_text().count("validation: ctr AUC") >= epochs
                ),
                600,
            )
            os.killpg(process.pid, number) if code == 130 else process.kill()
            _, error = process.communicate()
            assert process.returncode == code, error
            assert ("interrupted" in error) == (code == 130)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "continuing at epoch" in (folder / "train.log").read_text()
    for name in ("trials.csv", "best.flags", "best-bce.flags"):
        found = (folder / name).read_text().replace(str(folder), str(studied[0]))
        assert found == (studied[0] / name).read_text(), name
    # What was done before the second kill was not done again.
    assert "bce 1:" in studied[1]
    assert "bce 1:" not in result.stdout


def test_a_finished_study_only_reports_and_can_be_made_longer(studied, base, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(studied[0], folder)
    before = (folder / "train.log").read_text()
    tune.tune(base, folder, TRIALS)
    assert (folder / "train.log").read_text() == before
    searches = tune.tune(base, folder, TRIALS + 1)
    assert [len(search.finished()) for search in searches.values()] == [TRIALS + 1] * 2
    with pytest.raises(DataError, match=f"the study has {TRIALS + 1} already"):
        tune.tune(base, folder, TRIALS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trials=0", "--trials=0"),
        ("--tune=learning_rate,dropout", "expected names out of learning_rate,pwiser_weight"),
        ("--tune=pwiser_weight", "nothing of it applies to bce"),
        ("--data_dir=/no/such/folder", "/no/such/folder/schema.json: no such file"),
        ("--study_dir=/proc/study", "/proc/study: No such file or directory"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(argument, message, base, tmp_path):
    result = subprocess.run(
        _command(base, tmp_path / "run", argument), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not list(tmp_path.iterdir())


# --- a study's folder --------------------------------------------------------------------------


def test_a_study_of_other_flags_is_refused(studied, base, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(studied[0], folder)
    with pytest.raises(DataError, match=r"study of bce in this folder has --epochs=3, not 4"):
        tune.tune(base.replace(epochs=4), folder, TRIALS)
    with pytest.raises(DataError, match=r"has --tune=\['learning_rate'\], not"):
        tune.tune(base, folder, TRIALS, ["conversion_weight"])


def test_a_moved_data_set_is_the_same_and_another_is_not(studied, base, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(studied[0], folder)
    shutil.copytree(base.data_dir, tmp_path / "moved")
    moved = base.replace(data_dir=str(tmp_path / "moved"))
    tune.tune(moved, folder, TRIALS)
    schema = dataclasses.replace(Schema.load(tmp_path / "moved"), click="tapped")
    schema.save(tmp_path / "moved")
    with pytest.raises(DataError, match="has --data_dir="):
        tune.tune(moved, folder, TRIALS)


def test_a_file_that_is_no_study_is_refused(base, tmp_path):
    (tmp_path / "study.db").write_text("trial,value\n" * 100)
    with pytest.raises(DataError, match=r"study\.db: not a study of pwiser_tf\.tune"):
        tune.tune(base, tmp_path, TRIALS)


def test_two_processes_do_not_share_a_study(base, tmp_path):
    with runs.locked(tmp_path), pytest.raises(DataError, match="another process is using"):
        tune.tune(base, tmp_path, TRIALS)


# --- trials, with a training that takes no time --------------------------------------------------


@pytest.fixture
def curves(monkeypatch):
    """Replaces training: settings to the monitored values of its epochs; NaN diverges.

    A value None kills the process there, after the epoch was reported.
    """

    def play(curve):
        def fit(settings, folder, checkpoint_seconds, on_epoch):
            folder.mkdir(parents=True, exist_ok=True)
            values = curve(settings)
            best = -math.inf
            for epoch, value in enumerate(values, start=1):
                if value is None:
                    raise KeyboardInterrupt
                if math.isnan(value):
                    raise training.Diverged("training diverged")
                best = max(best, value)
                validation = {task: {"auc": value} for task in TASKS}
                on_epoch(None, {"epoch": epoch, "monitored": value, "validation": validation})
            return None, None, types.SimpleNamespace(best_value=best)

        monkeypatch.setattr(tune, "fit", fit)
        monkeypatch.setattr(tune, "Pool", lambda size: contextlib.nullcontext(InProcess()))

    class InProcess:
        def run(self, jobs, answer):
            monkeypatch.setattr(workers, "ask", answer)
            return [(job, job.function(*job.arguments)) for job in jobs]

    return play


def _outcomes(search):
    return [tune_report.outcome(trial) for trial in search.finished()]


def test_what_falls_behind_the_median_is_pruned(base, curves, tmp_path):
    """Five flat trials at .70 to .74, then one at .60: stopped once its second epoch is done."""
    levels = iter([0.70, 0.71, 0.72, 0.73, 0.74, 0.60, 0.80])
    curves(lambda settings: [next(levels)] * 3)
    search = tune.tune(base.replace(loss="bce"), tmp_path, 7)["bce"]
    assert _outcomes(search) == ["complete"] * 5 + ["pruned", "complete"]
    assert search.finished()[5].intermediate_values == {0: 0.60, 1: 0.60}
    assert search.best().number == 6


def test_nothing_is_pruned_at_its_last_epoch(base, curves, tmp_path):
    levels = iter([0.70, 0.71, 0.72, 0.73, 0.74, 0.60])
    curves(lambda settings: [next(levels)] * 2)
    short = base.replace(loss="bce", epochs=2)
    assert _outcomes(tune.tune(short, tmp_path, 6)["bce"]) == ["complete"] * 6


def test_a_diverged_trial_is_counted_and_not_chosen(base, curves, tmp_path, capsys):
    levels = iter([0.7, math.nan, 0.6])
    curves(lambda settings: [0.9, math.nan] if math.isnan(level := next(levels)) else [level])
    search = tune.tune(base.replace(loss="bce"), tmp_path, 3)["bce"]
    assert _outcomes(search) == ["complete", "diverged", "complete"]
    assert search.best().number == 0
    assert "bce 2: diverged; learning_rate" in capsys.readouterr().out


def test_all_trials_diverged(base, curves, tmp_path):
    curves(lambda settings: [math.nan])
    search = tune.tune(base.replace(loss="bce"), tmp_path, 2)["bce"]
    with pytest.raises(DataError, match=r"every trial of bce diverged: lower --learning_rate"):
        search.best()


def test_an_interrupted_trial_goes_on_with_its_own_values(base, curves, tmp_path):
    seen = []

    def interrupted(settings):
        seen.append(settings)
        return [0.7, None] if len(seen) == 2 else [0.7, 0.8]

    curves(interrupted)
    plain = base.replace(loss="bce")
    with pytest.raises(KeyboardInterrupt):
        tune.tune(plain, tmp_path, 3)
    search = tune.tune(plain, tmp_path, 3)["bce"]
    assert seen[2] == seen[1]
    assert [trial.number for trial in search.study.trials] == [0, 1, 2]
    # Its first epoch came twice, and counts once.
    assert search.finished()[1].intermediate_values == {0: 0.7, 1: 0.8}


def test_killed_after_its_verdict_a_trial_is_pruned_without_training(base, curves, tmp_path):
    curves(lambda settings: [0.7] * 3)
    plain = base.replace(loss="bce")
    tune.tune(plain, tmp_path, 5)
    search = _search(tmp_path, plain, "bce")
    trial = search.study.ask()
    tune.draw(trial, plain, search.names)
    trial.report(0.1, 0)
    trial.report(0.1, 1)
    trial.set_user_attr("best_epoch", 1)
    curves(lambda settings: pytest.fail("trained"))
    search = tune.tune(plain, tmp_path, 6)["bce"]
    assert _outcomes(search)[5] == "pruned"


def test_equal_trials_choose_the_first(base, curves, tmp_path):
    curves(lambda settings: [0.7])
    search = tune.tune(base.replace(loss="bce"), tmp_path, 3)["bce"]
    assert search.best().number == 0
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["bce-001"]


@pytest.mark.slow
def test_the_search_finds_a_planted_optimum(base, curves, tmp_path):
    """It is best at weight .03 and learning rate 3e-3; late trials come nearer than early ones."""

    def curve(settings):
        distance = abs(math.log10(settings.loss.ranking_weight / 0.03))
        return [1 - distance / 4 - abs(math.log10(settings.training.learning_rate / 3e-3)) / 4]

    curves(curve)
    searches = tune.tune(base.replace(loss="ranknet", epochs=1), tmp_path, 25)
    assert searches["ranknet"].best().value > 0.93
    values = [trial.value for trial in searches["ranknet"].finished()]
    assert sum(values[-10:]) > sum(values[:10])


@pytest.mark.slow
def test_the_seed_changes_the_draws(base, curves, tmp_path):
    curves(lambda settings: [0.7])
    drawn = [
        [
            trial.params
            for trial in tune.tune(base.replace(loss="bce", seed=seed), tmp_path / str(seed), 3)[
                "bce"
            ].finished()
        ]
        for seed in (0, 100)
    ]
    assert drawn[0][0] == drawn[1][0]  # the flags' own
    assert drawn[0][1:] != drawn[1][1:]


# --- the space that is searched ------------------------------------------------------------------


def _drawn(base, loss, names, count=40):
    """Settings of so many random trials, and their parameters."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    shuffle = "groups" if loss in ("jrc", "listce") else "rows"
    base = base.replace(loss=loss, shuffle=shuffle)
    trials = [study.ask() for _ in range(count)]
    return [(tune.draw(trial, base, names), trial.params) for trial in trials], base


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_searches_its_own_settings(loss, base):
    expected = {
        "bce": {"learning_rate"},
        "pwiser": {"learning_rate", "pwiser_weight", "loss_tasks", "score_space", "margin_click",
                   "margin_nonclick"},
        "focal": {"learning_rate", "focal_gamma"},
    }.get(loss, {"learning_rate", "ranking_weight"})  # fmt: skip
    drawn, own = _drawn(base, loss, tune.searched(loss, None))
    changed = {
        name
        for settings, _ in drawn
        for name, value in settings.values().items()
        if value != own.values()[name]
    }
    assert changed == expected


def test_margins_have_the_range_of_their_space(base):
    drawn, _ = _drawn(base, "pwiser", tune.searched("pwiser", None))
    for space, low, high in (("probability", 0.005, 0.5), ("logit", 0.1, 5.0)):
        chosen = [settings for settings, _ in drawn if settings.loss.score_space == space]
        for name in ("margin_click", "margin_nonclick"):
            margins = [getattr(settings.loss, name) for settings in chosen]
            assert low <= min(margins) < 3 * low
            assert high >= max(margins) > high / 3
    assert {settings.loss.loss_tasks for settings, _ in drawn} == {("ctr",), ("ctcvr",), TASKS}


def test_margins_of_a_fixed_space(base):
    names = tune.searched("pwiser", ["margin_click"])
    drawn, _ = _drawn(base.replace(score_space="logit"), "pwiser", names)
    assert all(set(parameters) == {"margin_click_logit"} for _, parameters in drawn)
    assert {settings.loss.score_space for settings, _ in drawn} == {"logit"}


def test_tune_chooses_what_is_searched():
    wanted = ["conversion_weight", "learning_rate", "pwiser_weight"]
    assert tune.searched("bce", wanted) == ("learning_rate", "conversion_weight")
    assert tune.searched("pwiser", wanted) == (
        "learning_rate", "pwiser_weight", "conversion_weight",
    )  # fmt: skip
    assert tune.searched("focal", ["loss_tasks", "ranking_weight"]) == ("loss_tasks",)
    with pytest.raises(DataError, match="score_space needs margin_click and margin_nonclick"):
        tune.searched("pwiser", ["score_space", "margin_click"])


def test_the_first_trial_is_of_the_flags_moved_into_the_ranges(base):
    names = tune.searched("pwiser", None)
    own = base.replace(learning_rate=1.0, pwiser_weight=0.0, loss_tasks=("ctr",))
    assert tune.first_values(own, names) == {
        "learning_rate": 1e-2,
        "pwiser_weight": 3e-3,
        "loss_tasks": "ctr",
        "score_space": "probability",
        "margin_click": 0.05,
        "margin_nonclick": 0.1,
    }
    logit = own.replace(score_space="logit", loss_tasks=())
    assert tune.first_values(logit, ("loss_tasks", "margin_click")) == {
        "loss_tasks": "both",
        "margin_click_logit": 0.1,
    }


# --- what is written -----------------------------------------------------------------------------


def _study(values, pruned=()):
    """A study over `x` (logarithmic) and `space`, whose trials were worth the values."""
    study = optuna.create_study(direction="maximize")
    for number, value in enumerate(values):
        study.add_trial(
            optuna.create_trial(
                state=TrialState.PRUNED if number in pruned else TrialState.COMPLETE,
                value=value,
                params={"x": 10.0 ** -(number % 4), "space": "ab"[number % 2]},
                distributions={
                    "x": optuna.distributions.FloatDistribution(1e-3, 1.0, log=True),
                    "space": optuna.distributions.CategoricalDistribution(["a", "b"]),
                },
                intermediate_values={0: value - 0.1, 1: value},
                user_attrs={"best_epoch": 2, "ctr_auc": value - 0.1, "ctcvr_auc": value + 0.1},
            )
        )
    return study


def test_the_csv_has_a_row_a_trial(tmp_path):
    tune_report.write_csv(tmp_path / "trials.csv", {"bce": _study([0.5, 0.75], pruned=[1])})
    assert (tmp_path / "trials.csv").read_text() == (
        "loss,trial,outcome,monitored,ctr_auc,ctcvr_auc,best_epoch,epochs,x,space\n"
        "bce,1,complete,0.5,0.4,0.6,2,2,1.0,a\n"
        "bce,2,pruned,0.75,0.65,0.85,2,2,0.1,b\n"
    )


def _panels(studies, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    tune_report.plot_studies(tmp_path / "tune.png", studies)
    return [axes for axes in figures[0].axes if axes.get_title()]


def test_the_plot_has_course_importance_and_settings(tmp_path, monkeypatch):
    values = [0.6, 0.7, 0.65, 0.72, 0.1, 0.71, 0.69, 0.7, 0.73, 0.7, 0.68, 0.66]
    studies = {"bce": _study(values[:3]), "pwiser": _study(values, pruned=[2])}
    course, importance, *settings = _panels(studies, tmp_path, monkeypatch)
    assert course.get_title() == "The course of the search"
    assert [axes.get_title() for axes in settings] == ["x", "space"]
    # Of bce's three trials there is no importance to tell.
    names = [label.get_text() for label in importance.get_yticklabels()]
    assert sorted(names) == ["space (pwiser)", "x (pwiser)"]
    assert sum(bar.get_width() for bar in importance.patches) == pytest.approx(1)
    # Trial 5, at .1, lies far below the rest: drawn hollow at the panel's edge. The upper median
    # of the 14 complete trials is .7.
    edge = 0.73 - 4 * (0.73 - 0.7)
    for axes in (course, *settings):
        heights = [line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) == 1]
        assert len(heights) == 15
        assert min(heights) == pytest.approx(edge)
    assert settings[0].get_xscale() == "log"
    assert [label.get_text() for label in settings[1].get_xticklabels()] == ["a", "b"]
    steps = max((line for line in course.lines), key=lambda line: len(line.get_ydata()))
    assert list(steps.get_ydata()) == pytest.approx([edge, *[0.7] * 2, *[0.72] * 5, *[0.73] * 4])


def test_the_plot_of_two_trials(tmp_path, monkeypatch):
    _, importance, *_ = _panels({"bce": _study([0.7, 0.7])}, tmp_path, monkeypatch)
    assert "needs two options and 10" in importance.texts[0].get_text()
    monkeypatch.undo()
    tune_report.plot_studies(tmp_path / "tune.png", {"bce": _study([0.7, 0.7])})
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


def test_a_best_value_at_the_edge_is_told(base, curves, tmp_path):
    """The first trial has the highest learning rate there is to search, and wins."""
    levels = iter([0.9, 0.7])
    curves(lambda settings: [next(levels)])
    plain = base.replace(loss="bce", learning_rate=1e-2)
    search = tune.tune(plain, tmp_path, 2)["bce"]
    assert tune.warnings_about(search) == [
        "warning: bce: learning_rate 0.01 lies at the edge of the searched range, 0.0001 to 0.01"
    ]
    assert json.loads(json.dumps(search.study.user_attrs))["asked"]["tune"] == ["learning_rate"]
