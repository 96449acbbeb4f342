"""What several test files use: a data set, a trained run, a command run here, a wait."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import absl.logging
import numpy as np
import pytest
from absl import app, flags

import pwiser_tf  # noqa: F401 (binds tf.keras to Keras 2 before any test imports TensorFlow)
from pwiser_tf import __main__, records
from pwiser_tf.schema import Categorical, Numerical, Schema, Shard, Split

# Some of the names are difficult for TensorFlow.
SCHEMA = Schema(
    dataset="columns",
    categorical=(
        Categorical("page", "int64", range(6)),
        Categorical("user city", "string", ("Paris", "Köln", "a,b")),
        Categorical("shop", "int64", (70, -3, 12)),
    ),
    numerical=(
        Numerical("price (€)", "standardize", mean=10.0, std=4.0, fill_value=10.0),
        Numerical("discount", "identity", mean=0.3, std=0.2, fill_value=0.3),
    ),
    click="click",
    conversion="bought",
    group="session",
)


def write_dataset(folder: pathlib.Path, rows: dict[str, int], shards: int = 3) -> Schema:
    """Writes a data set with SCHEMA's layout; its features explain clicks and conversions."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(7)
    splits = {}
    for name, count in rows.items():
        sizes = [feature.size for feature in SCHEMA.categorical]
        categorical = random.integers(0, sizes, (count, len(sizes)))
        numerical = random.normal(size=(count, 2)).astype(np.float32)
        click = random.random(count) < 0.1 + 0.1 * categorical[:, 0]
        conversion = click & (numerical[:, 0] > 0.3)
        grade = click.astype(np.int64) + conversion
        made = records.Rows(categorical, numerical, grade, np.arange(count) // 4)
        written = []
        for shard in range(shards):
            file = f"{name}-{shard:05d}-of-{shards:05d}.tfrecord"
            part = made.take(np.flatnonzero(np.arange(count) // 4 % shards == shard))
            content, _ = records.encode(part)
            content.tofile(folder / file)
            written.append(Shard(file, len(part), content.nbytes))
        splits[name] = Split(count, int(click.sum()), int(conversion.sum()), 0, tuple(written))
    schema = dataclasses.replace(SCHEMA, splits=splits)
    schema.save(folder)
    return schema


def pytest_collection_modifyitems(items):
    """Marks as slow what needs runs: a trained one, a tuned one, those of the paper's table."""
    for item in items:
        if {"trained", "studied", "table"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def wait_for(condition, seconds: float = 60):
    """Polls until the condition is true, and returns its value; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return found


@contextlib.contextmanager
def group_of(arguments):
    """A command as a terminal starts it, in a process group of its own, which must end with it."""
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A job in the background inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def ended():
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    try:
        yield process
        wait_for(ended)
    finally:
        if not ended():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs `pwiser ...` in this process: exit code, stdout and stderr.

    A process of its own would spend four seconds on importing TensorFlow.
    """

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pwiser", *map(str, arguments)])
        # TensorFlow runs already: too late to choose its threads.
        monkeypatch.setattr("pwiser_tf.training.share_cores", lambda: None)
        app.define_help_flags()
        before, level = set(flags.FLAGS), logging.root.level
        capsys.readouterr()
        code = 0
        try:
            __main__.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            # absl takes the root logger for itself.
            logging.root.removeHandler(absl.logging.get_absl_handler())
            logging.root.setLevel(level)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture
def unrendered(monkeypatch):
    """Plots become empty files: to draw them is half of a small run's time."""
    monkeypatch.setattr("pwiser_tf.plots.save", lambda figure, path: pathlib.Path(path).touch())


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> pathlib.Path:
    """The folder of a small data set: 1000 rows in train, 300 in validation, 300 in test."""
    folder = tmp_path_factory.mktemp("converted") / "data"
    write_dataset(folder, {"train": 1000, "validation": 300, "test": 300})
    return folder


@pytest.fixture(scope="session")
def settings(dataset):
    """Settings of a small, fast run on it."""
    from pwiser_tf.config import Config

    return Config.of(
        data_dir=str(dataset),
        model="shared_bottom",
        embedding_dim=4,
        bottom_units=(8,),
        tower_units=(8, 4),
        experts=2,
        critics=2,
        dropout=0.1,
        batch_size=64,
        epochs=2,
        learning_rate=0.01,
    )


@pytest.fixture(scope="session")
def trained(settings, tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run with those settings."""
    from pwiser_tf.training import train

    folder = tmp_path_factory.mktemp("run") / "workdir"
    train(settings, folder)
    return folder
