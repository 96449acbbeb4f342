"""The folder of one training run: its files, and how its model is rebuilt.

flags.json         the options that define the run
schema.json        the schema of the data set (and vocabularies/) when training started
click_noise.json   the estimate of accidental clicks, with --click_noise_fields
checkpoints/       the newest state, from which an interrupted run continues
best/              the weights of the best epoch by validation
logs/              TensorBoard
calibration.json   Platt scaling of the best epoch's outputs, if the run is calibrated
metrics.json       epochs, validation and test metrics
report-SPLIT.png   plots of an evaluation
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator

import tensorflow as tf
import tf_keras as keras

from pwiser_tf.calibration import Calibration
from pwiser_tf.click_noise import ClickNoise
from pwiser_tf.config import VERSION, Config
from pwiser_tf.errors import DataError
from pwiser_tf.files import write_text
from pwiser_tf.models import MODELS, ClickConversionModel
from pwiser_tf.models.base import RUNNING_MEANS
from pwiser_tf.records import empty_features
from pwiser_tf.schema import Schema

FLAGS_FILE = "flags.json"
METRICS_FILE = "metrics.json"
CLICK_NOISE_FILE = "click_noise.json"
CALIBRATION_FILE = "calibration.json"
_CHECKPOINTS = "checkpoints"
_EXTENDABLE = ("epochs", "patience")
# What is done after training.
_CHANGEABLE = ("calibration",)


def build_model(
    config: Config, schema: Schema, noise: ClickNoise | None = None
) -> ClickConversionModel:
    """A model with all its variables, initialised from the seed; it corrects clicks by `noise`."""
    keras.utils.set_random_seed(config.training.seed)
    model = MODELS[config.model.name](schema, config.model, config.loss)
    if noise:
        model.correct_clicks(noise)
    model(empty_features(schema))
    return model


def begin(workdir: str | os.PathLike, config: Config, schema: Schema) -> None:
    """Prepares an existing folder for a run, or checks that it already holds this run.

    Raises:
      DataError: the folder holds a run with other options or data. More epochs or patience are
        allowed, since they extend the run, and another calibration, which follows the training.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / FLAGS_FILE
    if not path.exists():
        if (workdir / _CHECKPOINTS).exists():
            raise DataError(
                "no such file, but there are checkpoints next to it, and it is unknown which run "
                "wrote them; give another --workdir",
                file=path,
            )
        schema.save(workdir)
        write_json(path, {"version": VERSION, **config.read()})
        return
    old_config, old_schema = load(workdir)
    # Options that are not read are not part of a run. More epochs or patience extend it, and the
    # calibration may change.
    old, new = old_config.read(), config.read()
    extended = {name: new[name] for name in _EXTENDABLE if new[name] > old[name]}
    extended |= {name: new[name] for name in _CHANGEABLE if new[name] != old[name]}
    for name in (name for name in new if name != "data_dir" and new[name] != old.get(name)):
        if name in extended:
            continue
        raise DataError(
            f"the run in this folder has --{name}={old.get(name)}, not {new[name]}: give the same "
            "flags to continue it, or another --workdir",
            file=path,
        )
    if old_schema.data_fingerprint != schema.data_fingerprint:
        what = "rows" if old_schema.fingerprint == schema.fingerprint else "features"
        raise DataError(
            f"the run in this folder was trained on other {what} than those in {config.data_dir}: "
            "give its --data_dir to continue it, or another --workdir",
            file=path,
        )
    if extended:
        write_json(path, {"version": VERSION, **old, **extended})


def load(workdir: str | os.PathLike) -> tuple[Config, Schema]:
    """The config and schema of a run; DataError if the folder holds no run."""
    path = pathlib.Path(workdir) / FLAGS_FILE
    if not path.exists():
        raise DataError("no such file; --workdir must be a run of pwiser_tf.train", file=path)
    try:
        config = Config.from_json(read_json(path))
    except DataError as error:
        raise DataError(f"not written by pwiser_tf.train ({error})", file=path) from None
    return config, Schema.load(workdir)


def click_noise(workdir: str | os.PathLike, config: Config) -> ClickNoise | None:
    """The estimate of click noise of a run; None if its config has no fields for it.

    Raises:
      DataError: the run's file is missing or not what training wrote.
    """
    if not config.loss.click_noise_fields:
        return None
    path = pathlib.Path(workdir) / CLICK_NOISE_FILE
    try:
        return ClickNoise.from_json(read_json(path))
    except FileNotFoundError:
        raise DataError("no such file; training writes it", file=path) from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not written by pwiser_tf.train ({error!r})", file=path) from None


def state_checkpoint(workdir: str | os.PathLike, state: tf.train.Checkpoint):
    """The checkpoint manager of the newest states."""
    return _manager(pathlib.Path(workdir) / _CHECKPOINTS, state, keep=2, name="ckpt")


def best_checkpoint(workdir: str | os.PathLike, model: ClickConversionModel):
    """The manager of the weights of the best epoch."""
    # Without the tasks' running means: these are no weights, and differ between versions of this
    # package.
    children = tf.train.TrackableView(model).children(model)
    weights = {name: child for name, child in children.items() if name not in RUNNING_MEANS}
    state = tf.train.Checkpoint(model=tf.train.Checkpoint(**weights))
    return _manager(pathlib.Path(workdir) / "best", state, keep=1, name="epoch")


def _manager(folder: pathlib.Path, state: tf.train.Checkpoint, keep: int, name: str):
    try:
        return tf.train.CheckpointManager(state, str(folder), keep, checkpoint_name=name)
    except ValueError as error:
        raise DataError(f"not written by pwiser_tf.train ({error})", file=folder) from None


def restore_state(manager: tf.train.CheckpointManager) -> None:
    """Restores the newest state; DataError if the checkpoint is corrupt."""
    with _newest_checkpoint(manager) as path:
        manager.checkpoint.restore(path).expect_partial()


def restore_best(manager: tf.train.CheckpointManager) -> None:
    """Restores the best epoch's weights.

    Raises:
      DataError: the checkpoint is missing, corrupt, or of a model with other options.
    """
    with _newest_checkpoint(manager) as path:
        manager.checkpoint.restore(path).expect_partial().assert_existing_objects_matched()


@contextlib.contextmanager
def _newest_checkpoint(manager: tf.train.CheckpointManager) -> Iterator[str]:
    """Yields the newest checkpoint's path; DataError if reading or restoring it fails."""
    path = manager.latest_checkpoint
    if not path:
        raise DataError(
            "no model: no epoch has been finished yet, or files were removed",
            file=manager.directory,
        )
    try:
        # Read every tensor now: otherwise a corrupt optimizer state would fail only in the middle
        # of training.
        reader = tf.train.load_checkpoint(path)
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
        yield path
    except AssertionError:
        raise DataError(
            f"a checkpoint of another model than {FLAGS_FILE} describes", file=path
        ) from None
    except (tf.errors.OpError, IndexError, RuntimeError, ValueError) as error:
        detail = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"a corrupt checkpoint, or of another model than {FLAGS_FILE} describes ({detail})",
            file=path,
        ) from None


def load_run(workdir: str | os.PathLike) -> tuple[ClickConversionModel, Config, Schema]:
    """The model of a run with the weights of its best epoch, and its calibration, if it has one."""
    config, schema = load(workdir)
    model = build_model(config, schema, click_noise(workdir, config))
    restore_best(best_checkpoint(workdir, model))
    model.calibration = load_calibration(workdir)
    return model, config, schema


def load_calibration(workdir: str | os.PathLike) -> Calibration | None:
    """The calibration of a run, or None if it has none; DataError for a damaged file."""
    path = pathlib.Path(workdir) / CALIBRATION_FILE
    if not path.exists():
        return None
    content = read_json(path)
    try:
        return Calibration.from_json(content)
    except ValueError as error:
        raise DataError(f"not written by pwiser_tf.train ({error})", file=path) from None


def save_calibration(workdir: str | os.PathLike, calibration: Calibration | None) -> None:
    """Writes the calibration of a run; None removes one that is there."""
    path = pathlib.Path(workdir) / CALIBRATION_FILE
    if calibration is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, calibration.to_json())


@contextlib.contextmanager
def locked(folder: str | os.PathLike):
    """Locks a folder for this process. The lock also ends when the process is killed.

    Raises:
      DataError: another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError("another process is using this folder", file=folder) from None
    finally:
        os.close(descriptor)


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON object; DataError if the file holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"not JSON ({error})", file=path) from None
    if not isinstance(content, dict):
        raise DataError(f"not a JSON object but a {type(content).__name__}", file=path)
    return content


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def file_errors():
    """Turns TensorFlow's errors for a full or unwritable disk into an OSError with one line."""
    try:
        yield
    except tf.errors.OpError as error:
        kinds = (tf.errors.PermissionDeniedError, tf.errors.ResourceExhaustedError)
        if isinstance(error, kinds) or "No space left" in error.message:
            raise OSError(error.message.split("\n")[0][:300]) from None
        raise
