import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import pytest
import tensorflow as tf

from pwiser_tf import runs
from pwiser_tf.errors import DataError
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.training import Progress, _monitored_value, train
from tests.conftest import wait_for, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unrendered")]

TRAIN = [sys.executable, "-m", "pwiser_tf.train"]


def _arguments(settings, folder, *more):
    """The command's arguments that give these settings."""
    arguments = [f"--workdir={folder}"]
    for name, value in settings.read().items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        arguments.append(f"--{name}={text}")
    return [*arguments, *more]


def _process(arguments):
    return subprocess.run([*TRAIN, *arguments], capture_output=True, text=True, check=False)


def test_a_run_writes_its_files(trained, settings):
    assert {path.name for path in trained.iterdir()} >= {
        "flags.json",
        "schema.json",
        "vocabularies",
        "checkpoints",
        "best",
        "logs",
        "metrics.json",
        "calibration.json",
        "report-validation.png",
        "report-test.png",
    }
    assert not list(trained.glob(".*"))
    metrics = json.loads((trained / "metrics.json").read_text())
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2]
    values = [epoch["monitored"] for epoch in metrics["epochs"]]
    assert metrics["best_epoch"] == 1 + values.index(max(values))
    best = metrics["epochs"][metrics["best_epoch"] - 1]
    # Calibration does not change the order by ctr.
    assert metrics["validation"]["ctr"]["auc"] == pytest.approx(best["validation"]["ctr"]["auc"])
    assert metrics["test"]["ctr"]["rows"] == 300
    assert runs.load(trained)[0].read() == settings.read()
    assert set(metrics["machine"]) >= {"processor", "cores", "intra_op_threads", "tensorflow"}


def test_an_epochs_losses_are_its_means(trained):
    for epoch in json.loads((trained / "metrics.json").read_text())["epochs"]:
        train = epoch["train"]
        tasks = 0.5 * train["ctr_loss"] + 0.5 * train["ctcvr_loss"]
        assert train["loss"] == pytest.approx(tasks, rel=1e-5)
        total = train["loss"] + train["regularization_loss"]
        assert train["total_loss"] == pytest.approx(total, rel=1e-5)
        term = train["ctr_cross_entropy"] + 0.1 * train["ctr_ranking"]
        assert train["ctr_loss"] == pytest.approx(term, rel=1e-5)


def test_it_learns(trained):
    """The planted clicks depend on `page`, the conversions on the price: AUC far from 0.5."""
    test = json.loads((trained / "metrics.json").read_text())["test"]
    assert test["ctr"]["auc"] > 0.62
    assert test["ctcvr"]["auc"] > 0.7


def test_tensorboard_has_losses_and_validation_metrics(dataset, settings, tmp_path):
    train(settings.replace(batch_size=8, epochs=1), tmp_path / "run")
    tags = set()
    for file in (tmp_path / "run" / "logs").iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            tags |= {value.tag for value in event.summary.value}
    assert {"train/ctr_loss", "train/ctcvr_loss", "validation/ctr_auc"} <= tags


def test_equal_seeds_give_equal_results(trained, settings, tmp_path):
    first = json.loads((trained / "metrics.json").read_text())
    assert train(settings, tmp_path / "again") == first


# Each flag with a value that must change the result of a run.
CHANGES = {
    "model": "mmoe",
    "conversion_head": "product",
    "embedding_dim": 6,
    "bottom_units": (6,),
    "tower_units": (8,),
    "dropout": 0.5,
    "weight_decay": 0.01,
    "mixed_precision": True,
    "batch_size": 32,
    "learning_rate": 0.001,
    "ctr_weight": 1.0,
    "ctcvr_weight": 1.0,
    "conversion_weight": 4.0,
    "loss": "bce",
    "loss_tasks": ("ctcvr",),
    "pwiser_weight": 0.0,
    "margin_click": 0.5,
    "margin_nonclick": 0.5,
    "score_space": "logit",
    "normalization": "negatives",
    "shuffle": "groups",
    "seed": 1,
}
# Flags that only other models or losses read: (settings with these, a change).
ELSEWHERE = {
    "experts": ({"model": "mmoe"}, 3),
    "critics": ({"model": "metaheac"}, 3),
    "auxiliary_weight": ({"model": "aitm", "auxiliary_weight": 0.6}, 100.0),
    "ranking_weight": ({"loss": "ranknet"}, 1.0),
    "focal_gamma": ({"loss": "focal"}, 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_flag_changes_the_result(name, trained, settings, tmp_path):
    first = json.loads((trained / "metrics.json").read_text())
    changed = settings.replace(epochs=1, **{name: CHANGES[name]})
    losses = [
        metrics["epochs"][0]["train"]["total_loss"]
        for metrics in (first, train(changed, tmp_path / "run"))
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_flags_of_other_models_and_losses_change_the_result(name, settings, tmp_path):
    more, value = ELSEWHERE[name]
    first = settings.replace(epochs=1, **more)
    other = first.replace(**{name: value})
    runs = [train(run, tmp_path / str(n)) for n, run in enumerate((first, other))]
    assert runs[0]["epochs"][0]["train"] != runs[1]["epochs"][0]["train"]


def test_every_setting_is_tested(settings):
    # test_calibration.py tests calibration, which follows the training; test_click_noise.py what
    # needs data with accidental clicks.
    free = {"data_dir", "epochs", "patience", "calibration", "click_noise_fields"}
    assert {*CHANGES, *ELSEWHERE} | free == set(settings.values()) | free


def test_patience_stops_the_run(settings, tmp_path):
    """Without learning no epoch is better: the run ends `patience` epochs after the first."""
    patient = settings.replace(learning_rate=0.0, epochs=9, patience=2, dropout=0.0)
    metrics = train(patient, tmp_path / "run")
    # Batch normalisation's statistics still move, so the best epoch may not be the first.
    assert len(metrics["epochs"]) == metrics["best_epoch"] + 2 < 9


def test_clicks_only(settings, tmp_path, capsys):
    """PWiseR, the default, is BCE there; losses that compare clicks are not."""
    folder = tmp_path / "data"
    schema = write_dataset(folder, {"train": 400, "validation": 100, "test": 100})
    dataclasses.replace(schema, conversion=None).save(folder)
    options = {"data_dir": str(folder), "model": "shared_bottom", "epochs": 1}
    ctr = {}
    for loss, told in (
        ("bce", "loss: BCE\n"),
        ("pwiser", "loss: BCE, since the data have CTR only: --loss=pwiser needs conversions\n"),
        ("ranknet", "loss: BCE + 0.1 x ranknet on ctr\n"),
    ):
        metrics = train(settings.replace(loss=loss, **options), tmp_path / loss)
        printed = capsys.readouterr()
        assert told in printed.out
        assert "convers" not in printed.out.lower().replace("needs conversions", "")
        assert "cvr" not in printed.out.lower()
        assert list(metrics["test"]) == ["ctr"]
        assert ("ctr_ranking" in metrics["epochs"][0]["train"]) == (loss == "ranknet")
        ctr[loss] = metrics["epochs"][0]["train"]["ctr_loss"], metrics["test"]["ctr"]["log_loss"]
    assert ctr["bce"] == ctr["pwiser"] != ctr["ranknet"]


def test_a_data_set_smaller_than_a_batch_trains(tmp_path, settings, capsys):
    write_dataset(tmp_path / "data", {"train": 40, "validation": 20, "test": 20})
    small = settings.replace(data_dir=str(tmp_path / "data"), batch_size=2048)
    assert train(small, str(tmp_path / "run"))["test"]["ctr"]["rows"] == 20
    assert "an epoch uses 100.0% of the rows" in capsys.readouterr().out
    train(small.replace(batch_size=30, epochs=1), tmp_path / "other")
    printed = capsys.readouterr()
    assert "an epoch uses 75.0% of the rows" in printed.out
    assert "warning: batches of 30 leave 10 of 40 rows out" in printed.err
    with pytest.raises(DataError, match="a batch of 1 row"):
        train(small.replace(batch_size=1), tmp_path / "one")


def test_a_killed_run_ends_like_an_uninterrupted_run(settings, tmp_path):
    long = settings.replace(epochs=3, patience=9, batch_size=16, model="mmoe")
    whole = _process(_arguments(long, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    expected = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    arguments = _arguments(long, tmp_path / "killed", "--checkpoint_seconds=0")
    resumed = 0
    # Once in the first epoch, once in the second: as soon as so many states were saved.
    for states in (5, 70):
        process = subprocess.Popen(
            [*TRAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        checkpoint = tmp_path / "killed" / "checkpoints" / "checkpoint"

        def saved(checkpoint=checkpoint, states=states):
            text = checkpoint.read_text() if checkpoint.exists() else ""
            return text and int(text.split('"')[1].rsplit("-", 1)[1]) >= states

        wait_for(lambda process=process: process.poll() is not None or saved(), seconds=300)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].decode()
        assert process.returncode == -signal.SIGKILL, output
        resumed += "continuing at epoch" in output
    result = _process(arguments)
    assert result.returncode == 0, result.stderr
    assert "continuing at epoch" in result.stdout
    assert resumed == 1
    found = json.loads((tmp_path / "killed" / "metrics.json").read_text())
    assert found == expected


def test_a_finished_run_is_not_trained_again(trained, settings, capsys):
    before = (trained / "checkpoints" / "checkpoint").read_text()
    train(settings, trained)
    assert "continuing at epoch 3" in capsys.readouterr().out
    assert (trained / "checkpoints" / "checkpoint").read_text() == before


def test_two_processes_do_not_share_a_folder(trained, settings):
    with runs.locked(trained), pytest.raises(DataError, match="another process is using"):
        train(settings, trained)


def test_divergence_is_reported(settings, tmp_path):
    told = "diverged: the loss is not finite at step 2 of epoch 1; lower --learning_rate"
    with pytest.raises(DataError, match=told):
        train(settings.replace(learning_rate=1e30), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*.index"))


def test_a_run_that_diverges_later_ends_with_its_best_epoch(
    settings, tmp_path, monkeypatch, capsys
):
    """From some step of the second epoch on, the loss is NaN."""
    whole = train(settings.replace(epochs=1), tmp_path / "one")
    compute = ClickConversionModel.compute_loss

    def poisoned(self, inputs, training=False):
        broken = tf.cast(self.optimizer.iterations >= steps + 3, tf.float32)
        return compute(self, inputs, training) / (1.0 - broken)

    steps = 1000 // settings.training.batch_size
    monkeypatch.setattr(ClickConversionModel, "compute_loss", poisoned)
    found = train(settings.replace(epochs=5), tmp_path / "run")
    error = capsys.readouterr().err
    assert "the loss is not finite at step 4 of epoch 2" in error
    assert "the result is epoch 1, the best finished epoch" in error
    assert len(found["epochs"]) == found["best_epoch"] == 1
    assert found["test"] == whole["test"]


def test_training_needs_no_test_split(settings, tmp_path, capsys):
    write_dataset(tmp_path / "data", {"train": 200, "validation": 100})
    found = train(settings.replace(epochs=1, data_dir=str(tmp_path / "data")), tmp_path / "run")
    assert found["validation"]["ctr"]["rows"] == 100
    assert "test" not in found
    assert "validation split, epoch 1 of 1" in capsys.readouterr().out
    assert not (tmp_path / "run" / "report-test.png").exists()


def test_more_epochs_and_patience_extend_a_run(settings, tmp_path, capsys):
    short = settings.replace(epochs=1, patience=1)
    long = settings.replace(epochs=3, patience=4)
    train(short, tmp_path / "run")
    extended = train(long, tmp_path / "run")
    assert "continuing at epoch 2, step 0" in capsys.readouterr().out
    assert extended == train(long, tmp_path / "whole")
    assert runs.load(tmp_path / "run")[0].read() == long.read()
    # A run cannot be shortened.
    with pytest.raises(DataError, match="the run in this folder has --epochs=3, not 1"):
        train(short, tmp_path / "run")


def test_patience_0_is_patience_1_as_in_keras(settings, tmp_path):
    histories = [
        train(settings.replace(epochs=4, patience=patience), tmp_path / str(patience))
        for patience in (0, 1)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]["epochs"]) > 1


def test_a_corrupt_checkpoint_is_refused(trained, settings, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*.data*"):
        # In the optimiser's tensors, which a simple restore would not read.
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(DataError, match="corrupt checkpoint"):
        train(settings, tmp_path / "run")


def test_another_run_in_the_folder_is_refused(trained, settings, tmp_path):
    with pytest.raises(DataError, match=r"has --learning_rate=0\.01, not 0\.5"):
        train(settings.replace(learning_rate=0.5), trained)


def test_another_data_set_for_the_run_is_refused(trained, settings, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    path = tmp_path / "data" / "schema.json"
    content = json.loads(path.read_text())
    content["labels"]["click"] = "tapped"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="fingerprint"):
        train(settings.replace(data_dir=str(tmp_path / "data")), trained)


def test_other_rows_of_the_same_features_are_another_data_set(trained, settings, tmp_path):
    write_dataset(tmp_path / "data", {"train": 990, "validation": 300, "test": 300})
    with pytest.raises(DataError, match="trained on other rows than those in"):
        train(settings.replace(data_dir=str(tmp_path / "data")), trained)


def test_monitored_is_the_mean_auc_and_falls_back_to_log_loss():
    def values(auc, log_loss):
        return {"auc": auc, "log_loss": log_loss}

    assert _monitored_value({"ctr": values(0.6, 1), "ctcvr": values(0.8, 1)}) == pytest.approx(0.7)
    assert _monitored_value({"ctr": values(0.6, 1), "ctcvr": values(None, 1)}) == 0.6
    assert _monitored_value({"ctr": values(None, 1), "ctcvr": values(None, 2)}) == -3


def test_progress_survives_its_round_trip():
    progress, other = Progress(), Progress()
    progress.epoch, progress.step, progress.best_epoch, progress.best_value = 3, 5, 2, 0.75
    progress.history.append({"epoch": 1})
    other.deserialize(progress.serialize())
    assert vars(other) == vars(progress)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--modell=mmoe", "Unknown command line flag 'modell'"),
        ("--model=mmmoe", "value should be one of <single_task|shared_bottom|omoe|mmoe|ple"),
        ("--batch_size=many", "flag --batch_size=many"),
        ("--loss_tasks=ctr,cvrr", "expected names out of ctr,ctcvr"),
        ("--auxiliary_weight=0.5", "--model=shared_bottom has no auxiliary loss"),
        ("--model=esmm", "--conversion_head=direct: --model=esmm only supports product"),
        ("--loss=jrc", "--shuffle=rows: --loss=jrc compares the rows of a group"),
        ("--tower_units=64,x", "expected positive integers"),
        ("--learning_rate=nan", "--learning_rate=nan: expected a finite number"),
        ("--data_dir=/no/such/folder", "/no/such/folder/schema.json: no such file"),
        ("--workdir=/proc/run", "/proc/run: No such file or directory"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    argument, message, command, settings, tmp_path
):
    result = command("train", *_arguments(settings, tmp_path / "run", argument))
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_trains_and_exports(command, settings, tmp_path):
    result = command(
        "train",
        *_arguments(
            settings.replace(epochs=1, pwiser_weight=5.0),
            tmp_path / "run",
            f"--export_dir={tmp_path / 'models'}",
            "--model_name=shop",
        ),
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "models" / "shop" / "1" / "saved_model.pb").exists()
    assert "strength" in result.stdout
    assert "warning: strength" in result.stderr
    assert (tmp_path / "run" / "metrics.json").exists()
