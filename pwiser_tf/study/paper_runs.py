"""The runs behind a table: trained once each, several in a process, several processes at a time.

A run's folder is a workdir of pwiser_tf.train with three files more, which are here alone:

test_epochs.json   the test metrics of each epoch; nothing is chosen by them
predictions.npz    "ctr", "cvr" and "ctcvr" of the test split at the best epoch, float32 [rows]
result.json        what the table reads; once it is there, the run is over
log.txt            what the run printed
"""

import contextlib
import dataclasses
import gc
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
import traceback

import numpy as np
import tf_keras as keras
from tqdm import tqdm

from pwiser_tf import runs
from pwiser_tf.config import Config
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import predict
from pwiser_tf.metrics import summary
from pwiser_tf.schema import Schema
from pwiser_tf.training import fit, share_cores

_RESULT, _EPOCHS, _PREDICTIONS = "result.json", "test_epochs.json", "predictions.npz"
_GRADE = "test_grade.npy"
# What is left of a finished run's states would fill disks: an optimiser is twice the weights.
_STATES = "checkpoints"
# TensorFlow keeps some 30 MB of each model that it has trained, whatever is cleared: a process is
# ended, and another started, before they add up.
_RUNS_A_PROCESS = 10


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


def train_run(run: Run) -> None:
    """Trains a run, or goes on with it, and reads the test split of each epoch as it passes.

    The test metrics of an epoch are written down and looked at by no one: the epochs, and the
    best of them, follow from the validation split alone.
    """
    settings, path = run.settings, run.folder / _EPOCHS
    schema = Schema.load(settings.data_dir)

    def on_epoch(model, entry):
        known = runs.read_json(path) if path.exists() else {}
        predictions, grade, group = predict(model, settings.data_dir, schema, "test")
        known[str(entry["epoch"])] = summary(grade, predictions, group)
        runs.write_json(path, known)

    model, _, progress = fit(settings, run.folder, on_epoch=on_epoch)
    predictions, grade, group = predict(model, settings.data_dir, schema, "test")
    _save_whole(run.folder / _PREDICTIONS, lambda file: np.savez(file, **predictions))
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


def _keep_grade(run: Run, grade: np.ndarray) -> None:
    """Writes the data set's test grades, which are the same for all of its runs."""
    path = _data_folder(run) / _GRADE
    if not path.exists():
        _save_whole(path, lambda file: np.save(file, grade))
    elif not np.array_equal(np.load(path), grade):
        raise DataError(
            "the test rows are not those that earlier runs were judged on: the data set was "
            "made anew; give another --output_dir",
            file=path,
        )


def _save_whole(path: pathlib.Path, write) -> None:
    """Writes a file aside and moves it into place; several processes may do so at once."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            write(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def train_all(unfinished: list[Run], parallel: int) -> None:
    """Trains the runs, each in the order of the list, in so many processes; prints a line a run.

    Each process keeps to its share of the cores. It trains many runs in turn, since starting
    TensorFlow takes longer than a small run. Whatever ends this function ends the processes;
    runs that were under way go on from their last checkpoint when they are asked for again.

    Raises:
      DataError: what was wrong with a run, by its name. Others are not begun then.
    """
    cores = sorted(os.sched_getaffinity(0))
    parallel = min(parallel, len(unfinished))
    waiting, done, began = list(unfinished), 0, time.monotonic()
    workers = [
        _Worker(cores[number::parallel] or [cores[number % len(cores)]])
        for number in range(parallel)
    ]
    try:
        for worker in workers:
            worker.give(waiting.pop(0))
        busy = list(workers)
        while busy:
            ready = multiprocessing.connection.wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                run, shown = worker.run, worker.result()
                done += 1
                left = (time.monotonic() - began) / done * (len(unfinished) - done)
                print(
                    f"{done}/{len(unfinished)} {run.name}: {shown}; {_time(left)} left", flush=True
                )
                if waiting:
                    worker.give(waiting.pop(0))
                else:
                    busy.remove(worker)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """Trains the runs it is given, one at a time, in a process; seen from the parent."""

    def __init__(self, cores: list[int]):
        self._cores = cores
        self._process = self.connection = self.run = None

    def give(self, run: Run) -> None:
        if self._process is None or self._runs == _RUNS_A_PROCESS:
            self.end()
            self._start()
        self.run, self._began = run, time.monotonic()
        self._runs += 1
        self.connection.send(run)

    def _start(self) -> None:
        # Not forked: TensorFlow's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._cores), daemon=True)
        with _signals_held():
            process.start()
            self._process = process
        # With their end open here too, the end of the process would not be seen.
        theirs.close()
        self._runs = 0

    def result(self) -> str:
        """The finished run in a few words; DataError or RuntimeError where it failed."""
        try:
            kind, text = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise DataError(
                f"{self.run.name}: its process ended with exit code {self._process.exitcode} "
                "(-9: killed, most often for memory; lower --parallel)"
            ) from None
        if kind == "mistake":
            raise DataError(f"{self.run.name}: {text}")
        if kind == "fault":
            raise RuntimeError(f"{self.run.name}\n{text}")
        return f"{_time(time.monotonic() - self._began)}, {text}"

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _signals_held():
    """Holds Ctrl-C and SIGTERM back, so that a process is started whole or not at all.

    The process inherits the blocking, and never sees the Ctrl-C that a terminal sends to all: the
    parent alone acts on it, and kills its workers. In the parent, blocking is not enough: a signal
    blocked in one thread goes to another of TensorFlow's.
    """
    numbers, arrived = (signal.SIGINT, signal.SIGTERM), []
    handlers = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in numbers
    }
    # Python's helper process, started with the first worker, would end the blocking.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        raise KeyboardInterrupt


def _work(connection, cores: list[int]) -> None:
    """What the process does: trains what comes down the connection, and says how it went."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.sched_setaffinity(0, cores)
    share_cores()
    # Its own lock is one between processes, which Python calls leaked when this one is ended.
    tqdm.set_lock(threading.RLock())
    while True:
        run = connection.recv()
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        try:
            with runs.file_errors():
                train_run(run)
            answer = "done", _in_words(runs.read_json(run.folder / _RESULT))
        except (DataError, OSError) as error:
            answer = "mistake", str(error)
        except Exception:
            answer = "fault", traceback.format_exc()
        sys.stdout.flush()
        connection.send(answer)
        # What Keras keeps of one model would else add up over hundreds.
        keras.backend.clear_session()
        gc.collect()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, however that ended."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _in_words(result: dict) -> str:
    areas = ", ".join(
        f"{task} -" if values["auc"] is None else f"{task} {values['auc']:.4f}"
        for task, values in result["test"].items()
    )
    return f"best epoch {result['best_epoch']} of {len(result['epochs'])}, test AUC {areas}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
