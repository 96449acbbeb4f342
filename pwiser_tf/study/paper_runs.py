"""The runs of a table; each is trained once, in a worker process.

A run's folder is a workdir of pwiser_tf.train with these files more:

test_epochs.json   the test metrics of each epoch; nothing is chosen by them
predictions.npz    "ctr", "cvr" and "ctcvr" of the test split at the best epoch, and its "grade"
result.json        what the table reads; the run is finished when it exists
log.txt            the output of the run
"""

import dataclasses
import pathlib
import shutil
import time

import numpy as np

from pwiser_tf import runs
from pwiser_tf.config import Config, changed_options
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import predict
from pwiser_tf.files import whole_file
from pwiser_tf.metrics import summary
from pwiser_tf.report import number
from pwiser_tf.schema import Schema
from pwiser_tf.study.workers import Job, Pool
from pwiser_tf.training import fit

_RESULT, _EPOCHS, _PREDICTIONS = "result.json", "test_epochs.json", "predictions.npz"
# Deleted when a run is finished: the states of the optimizer would fill the disk.
_STATES = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its data set, model and loss by their names in the table, and its folder."""

    data: str
    model: str
    loss: str
    settings: Config
    folder: pathlib.Path

    @property
    def name(self) -> str:
        return f"{self.data} {self.model} {self.loss} seed {self.settings.training.seed}"


def read_result(run: Run, schema: Schema) -> dict | None:
    """The result of a finished run: {"best_epoch", "test", "epochs"}; otherwise None.

    Raises:
      DataError: the folder holds the result of other flags or data.
    """
    path = run.folder / _RESULT
    if not path.exists():
        return None
    content = runs.read_json(path)
    changed = changed_options(content.get("identity", {}), _identity(run.settings, schema))
    for name, (old, new) in changed.items():
        raise DataError(
            f"the finished run in this folder has --{name} {old}, not {new}; give another "
            "--output_dir",
            file=path,
        )
    return content


def read_predictions(run: Run) -> dict[str, np.ndarray]:
    """The test split at the best epoch of a finished run: "ctr", "cvr", "ctcvr" and "grade"."""
    with np.load(run.folder / _PREDICTIONS) as arrays:
        return dict(arrays)


def _identity(settings: Config, schema: Schema) -> dict:
    """The flags and data of a result; the data may be moved."""
    return {**settings.read(), "data_dir": schema.data_fingerprint}


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
        np.savez(aside, **predictions, grade=grade.astype(np.int8))
    by_epoch = runs.read_json(path)
    result = {
        "identity": _identity(settings, schema),
        "best_epoch": progress.best_epoch + 1,
        "test": summary(grade, predictions, group),
        "epochs": [
            {key: entry[key] for key in ("epoch", "monitored", "train")}
            | {"test": by_epoch[str(entry["epoch"])]}
            for entry in progress.history
        ],
    }
    runs.write_json(run.folder / _RESULT, result)
    shutil.rmtree(run.folder / _STATES, ignore_errors=True)
    return f"{_time(time.monotonic() - began)}, {_in_words(result)}"


def train_all(unfinished: list[Run], parallel: int) -> None:
    """Trains the runs in the order of the list, in worker processes; prints a line a run.

    The processes end with this function; interrupted runs are resumed by the next call.

    Raises:
      DataError: of a run, with its name. No further run is started then.
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
