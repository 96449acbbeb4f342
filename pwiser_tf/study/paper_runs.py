"""The runs behind a table: trained once each, several in a process, several processes at a time.

A run's folder is a workdir of pwiser_tf.train with three files more, which are here alone:

test_epochs.json   the test metrics of each epoch; nothing is chosen by them
predictions.npz    "ctr", "cvr" and "ctcvr" of the test split at the best epoch, float32 [rows]
result.json        what the table reads; once it is there, the run is over
log.txt            what the run printed
"""

import dataclasses
import json
import pathlib
import shutil
import time

import numpy as np

from pwiser_tf import runs
from pwiser_tf.config import Config
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import predict
from pwiser_tf.files import whole_file
from pwiser_tf.metrics import summary
from pwiser_tf.report import number
from pwiser_tf.schema import Schema
from pwiser_tf.study.workers import Job, Pool
from pwiser_tf.training import fit

_RESULT, _EPOCHS, _PREDICTIONS = "result.json", "test_epochs.json", "predictions.npz"
_GRADE = "test_grade.npy"
# What is left of a finished run's states would fill disks: an optimiser is twice the weights.
_STATES = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its data set, model and loss by their names in the table, and where it lies."""

    data: str
    model: str
    loss: str
    settings: Config
    folder: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.data} {self.model} {self.loss} seed {self.settings.training.seed}"


def read_result(run: Run, schema: Schema) -> dict | None:
    """What a finished run left: {"best_epoch", "test", "epochs"}; None where it is not over.

    Raises:
      DataError: the folder holds the result of other flags or data.
    """
    path = run.folder / _RESULT
    if not path.exists():
        return None
    content = runs.read_json(path)
    found, wanted = content.get("identity", {}), _identity(run.settings, schema)
    for name in (name for name in wanted if found.get(name) != wanted[name]):
        raise DataError(
            f"the finished run in this folder has {name} {found.get(name)}, not {wanted[name]}; "
            "give another --output_dir",
            file=path,
        )
    return content


def read_predictions(run: Run) -> dict[str, np.ndarray]:
    """A finished run's test predictions at its best epoch: "ctr", "cvr", "ctcvr", each [rows]."""
    with np.load(run.folder / _PREDICTIONS) as arrays:
        return {name: arrays[name] for name in arrays.files}


def read_grade(run: Run) -> np.ndarray:
    """The grades of the test rows, int64 [rows], in the order of the predictions."""
    return np.load(_data_folder(run) / _GRADE)


def _data_folder(run: Run) -> pathlib.Path:
    return run.folder.parents[2]


def _identity(settings: Config, schema: Schema) -> dict:
    """What a result belongs to: its flags and data; the data may have been moved since."""
    counts = {
        name: [split.rows, split.clicks, split.conversions] for name, split in schema.splits.items()
    }
    values = {f"--{name}": value for name, value in settings.values().items()}
    del values["--data_dir"]
    content = {**values, "fingerprint": schema.fingerprint, "rows, clicks, conversions": counts}
    # As JSON gives it back: lists in place of tuples.
    return json.loads(json.dumps(content))


def train_run(run: Run) -> str:
    """Trains or resumes a run and evaluates each epoch on the test split; returns a line about it.

    The test metrics of an epoch are recorded and used by nothing: the number of epochs and the
    best one follow from the validation split alone.
    """
    began = time.monotonic()
    settings, path = run.settings, run.folder / _EPOCHS
    schema = Schema.load(settings.data_dir)

    def on_epoch(model, entry):
        known = runs.read_json(path) if path.exists() else {}
        predictions, grade, group = predict(model, settings.data_dir, schema, "test")
        known[str(entry["epoch"])] = summary(grade, predictions, group)
        runs.write_json(path, known)

    model, _, progress = fit(settings, run.folder, on_epoch=on_epoch)
    predictions, grade, group = predict(model, settings.data_dir, schema, "test")
    with whole_file(run.folder / _PREDICTIONS) as aside:
        np.savez(aside, **predictions)
    _keep_grade(run, grade)
    by_epoch = runs.read_json(path)
    result = {
        "identity": _identity(settings, schema),
        "best_epoch": progress.best_epoch + 1,
        "test": summary(grade, predictions, group),
        "epochs": [
            {
                "epoch": entry["epoch"],
                "monitored": entry["monitored"],
                "train": entry["train"],
                "test": by_epoch[str(entry["epoch"])],
            }
            for entry in progress.history
        ],
    }
    runs.write_json(run.folder / _RESULT, result)
    shutil.rmtree(run.folder / _STATES, ignore_errors=True)
    return f"{_time(time.monotonic() - began)}, {_in_words(result)}"


def _keep_grade(run: Run, grade: np.ndarray) -> None:
    """Writes the data set's test grades, which are the same for all of its runs."""
    path = _data_folder(run) / _GRADE
    if not path.exists():
        with whole_file(path) as aside:
            np.save(aside, grade)
    elif not np.array_equal(np.load(path), grade):
        raise DataError(
            "the test rows are not those that earlier runs were judged on: the data set was "
            "made anew; give another --output_dir",
            file=path,
        )


def train_all(unfinished: list[Run], parallel: int) -> None:
    """Trains the runs, each in the order of the list, in worker processes; prints a line a run.

    Whatever ends this function ends the processes; a run that was interrupted goes on from its
    last checkpoint when it is asked for again.

    Raises:
      DataError: what was wrong with a run, by its name. Others are not begun then.
    """
    jobs = [Job(run.name, run.folder / "log.txt", train_run, (run,)) for run in unfinished]
    began = time.monotonic()
    with Pool(min(parallel, len(jobs))) as pool:
        for done, (job, shown) in enumerate(pool.run(jobs), start=1):
            left = (time.monotonic() - began) / done * (len(jobs) - done)
            print(f"{done}/{len(jobs)} {job.name}: {shown}; {_time(left)} left", flush=True)


def _in_words(result: dict) -> str:
    areas = ", ".join(
        f"{task} {number(values['auc'], '.4f')}" for task, values in result["test"].items()
    )
    return f"best epoch {result['best_epoch']} of {len(result['epochs'])}, test AUC {areas}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
