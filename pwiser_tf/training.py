"""The training loop: a run trained to its end, evaluated once on the test split.

Interrupted at any moment, even by kill -9, a run goes on when it is begun again, and ends with the
metrics of one that was not interrupted: the state of a checkpoint holds the weights, the optimiser,
the place in the data, the dropout masks' counters and the record of epochs, and every order and
mask follows from the seed.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
import tf_keras as keras

from pwiser_tf import data, machine, report, runs
from pwiser_tf.config import Config
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import evaluate, predict
from pwiser_tf.losses import strength
from pwiser_tf.metrics import summary
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.schema import Schema
from pwiser_tf.tasks import LOSSES, TASKS

_LOG_EVERY_STEPS = 100
# From about this strength on PWiseR was seen to harm: docs/explain/when-pwiser-helps.md.
_HARMFUL_STRENGTH = 1.0
# Below this share of rows in an epoch, training warns.
_FEWEST_ROWS_USED = 0.9


def share_cores() -> None:
    """Gives an operation half of the cores, so that two run side by side. Call it first of all.

    Experts, towers and the two products of a backward pass do not depend on each other, and two
    operations of one thread each are faster than each in turn with two: no waiting within an
    operation. benchmarks/training.py runs with it. TF_NUM_INTRAOP_THREADS overrules it.
    """
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        tf.config.threading.set_intra_op_parallelism_threads(max(1, cores // 2))


class Diverged(DataError):
    """The loss or a prediction is not finite, and no epoch was finished before."""


class Progress(tf.train.experimental.PythonState):
    """Where a run stands; saved inside the checkpoint, so that the two cannot disagree.

    Attributes:
      epoch: the one under way, from 0; step: batches of it already trained on.
      losses: the means over those batches, by name.
      history: of each finished epoch, its training losses and validation metrics.
      best_epoch, best_value: the best epoch so far by validation, and its monitored value.
    """

    _SAVED = ("epoch", "step", "losses", "history", "best_epoch", "best_value")

    def __init__(self):
        super().__init__()
        self.epoch = self.step = 0
        self.losses = {}
        self.history = []
        self.best_epoch, self.best_value = None, -math.inf

    def serialize(self) -> str:
        return json.dumps({name: getattr(self, name) for name in self._SAVED})

    def deserialize(self, string_value: str) -> None:
        vars(self).update(json.loads(string_value))


class Housekeeping(keras.callbacks.Callback):
    """Counts steps, saves the state every so many seconds, logs losses; one epoch a fit."""

    def __init__(self, progress: Progress, manager, writer, checkpoint_seconds: float):
        super().__init__()
        self._progress = progress
        self._manager = manager
        self._writer = writer
        self._checkpoint_seconds = checkpoint_seconds
        self._saved_at = time.monotonic()

    def on_train_begin(self, logs=None):
        self._means = [metric.get_weights() for metric in self.model.metrics]

    def on_epoch_begin(self, epoch, logs=None):
        # fit has just set the running means of the losses to 0; an epoch resumed goes on with them.
        if self._progress.step:
            for metric, mean in zip(self.model.metrics, self._means, strict=True):
                metric.set_weights(mean)

    def on_epoch_end(self, epoch, logs=None):
        # fit is told of all epochs, for its progress line, but runs one at a time.
        self.model.stop_training = True

    def on_train_batch_end(self, batch, logs=None):
        if not all(math.isfinite(value) for value in logs.values()):
            # Before anything of it is saved.
            raise Diverged(
                f"training diverged: the loss is not finite at step {self._progress.step + 1} of "
                f"epoch {self._progress.epoch + 1}; lower --learning_rate, and begin in another "
                "--workdir"
            )
        self._progress.step += 1
        self._progress.losses = {name: float(value) for name, value in logs.items()}
        step = int(self.model.optimizer.iterations)
        if step % _LOG_EVERY_STEPS == 0:
            with self._writer.as_default(step):
                for name, value in logs.items():
                    tf.summary.scalar(f"train/{name}", value)
        if time.monotonic() - self._saved_at > self._checkpoint_seconds:
            self._manager.save()
            self._saved_at = time.monotonic()


# (model, the epoch's entry in the history), after each epoch's validation; may raise to stop.
OnEpoch = Callable[[ClickConversionModel, dict], None]


def train(
    config: Config,
    folder: str | os.PathLike,
    checkpoint_seconds: float = 60,
    on_epoch: OnEpoch | None = None,
) -> dict:
    """Runs or resumes the run in `folder` to its end. Returns what metrics.json then holds.

    Args:
      config: the run's. folder: its workdir.
      checkpoint_seconds: how often the state is saved, besides after each epoch.
      on_epoch: see `fit`.

    Raises:
      DataError: data that is missing, damaged or of another schema; a folder of another run, or
      in which another process is at work; a damaged checkpoint; a model that predicts NaN.
    """
    folder = pathlib.Path(folder)
    schema = Schema.load(config.data_dir)
    if "test" in schema.splits:
        data.check(config.data_dir, schema, "test")
    with _begun(config, folder) as schema:
        model, progress = _fit(config, schema, folder, checkpoint_seconds, on_epoch)
        return _evaluate_best(model, config, schema, folder, progress)


def fit(
    config: Config,
    folder: str | os.PathLike,
    checkpoint_seconds: float = 60,
    on_epoch: OnEpoch | None = None,
) -> tuple[ClickConversionModel, Schema, Progress]:
    """Trains only: it never opens the test split, nor writes metrics.json.

    Args:
      on_epoch: called with the model and the epoch's entry in the history ({"epoch", "monitored",
        "train", "validation"}) after each epoch's validation. It may raise, which ends the run
        there. It is called again for an epoch that a killed run has to repeat.

    Returns:
      The model at its best epoch by validation, the schema, and the record of the epochs.
    """
    folder = pathlib.Path(folder)
    with _begun(config, folder) as schema:
        model, progress = _fit(config, schema, folder, checkpoint_seconds, on_epoch)
        return model, schema, progress


@contextlib.contextmanager
def _begun(config: Config, folder: pathlib.Path) -> Iterator[Schema]:
    """Checks the data and makes the folder this run's, locked for as long as the block runs."""
    schema = Schema.load(config.data_dir)
    for split in ("train", "validation"):
        data.check(config.data_dir, schema, split)
    if config.training.shuffle == "groups" and not schema.group:
        by_loss = LOSSES[config.loss.name].needs_groups
        asks = f"--loss={config.loss.name}" if by_loss else "--shuffle=groups"
        raise DataError(
            f"{asks} needs a group (a search or session) in the data; this data set has none",
            file=pathlib.Path(config.data_dir) / "schema.json",
        )
    if min(config.training.batch_size, schema.split("train").rows) == 1:
        raise DataError("a batch of 1 row: batch normalization needs a --batch_size of at least 2")
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder):
        runs.begin(folder, config, schema)
        _describe(config, schema)
        yield schema


def _fit(
    config, schema, folder, checkpoint_seconds, on_epoch
) -> tuple[ClickConversionModel, Progress]:
    """Trains until the last epoch, or until patience ends. The model is left at its best epoch."""
    model = runs.build_model(config, schema)
    # The legacy optimiser is the faster one: one fused operation a variable.
    model.compile(optimizer=keras.optimizers.legacy.Adam(config.training.learning_rate))
    progress = Progress()
    state = tf.train.Checkpoint(model=model, optimizer=model.optimizer, progress=progress)
    manager = runs.state_checkpoint(folder, state)
    best = runs.best_checkpoint(folder, model)
    if manager.latest_checkpoint:
        runs.restore_state(manager)
        print(f"going on at epoch {progress.epoch + 1}, step {progress.step}", flush=True)
    writer = tf.summary.create_file_writer(str(folder / "logs"))
    housekeeping = Housekeeping(progress, manager, writer, checkpoint_seconds)

    # A data set smaller than a batch is one batch. Otherwise the last, smaller batch of an epoch is
    # left out (other rows in each epoch): batch normalization needs batches of one size.
    rows = schema.split("train").rows
    batch_size = min(config.training.batch_size, rows)
    options = config.training
    while progress.epoch < options.epochs and not _waited_enough(progress, options.patience):
        batches = data.batches(
            config.data_dir,
            schema,
            "train",
            batch_size,
            shuffle_seed=(options.seed, progress.epoch),
            keep_groups=options.shuffle == "groups",
            skip_rows=progress.step * batch_size,
            drop_remainder=True,
        )
        try:
            if progress.step < rows // batch_size:
                model.fit(
                    batches,
                    initial_epoch=progress.epoch,
                    epochs=options.epochs,
                    steps_per_epoch=rows // batch_size - progress.step,
                    callbacks=[housekeeping],
                    verbose=1 if sys.stdout.isatty() else 2,
                )
            _finish_epoch(model, config, schema, progress, best, writer)
        except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
            data.explain(error, config.data_dir, schema, "train")
        except Diverged as error:
            if progress.best_epoch is None:
                raise
            print(
                f"warning: {error}; of the finished epochs the best, {progress.best_epoch + 1}, is "
                "the result",
                file=sys.stderr,
            )
            break
        if on_epoch:
            on_epoch(model, progress.history[-1])
        manager.save()
    runs.restore_best(best)
    return model, progress


def _evaluate_best(model, config, schema, folder, progress) -> dict:
    """Evaluates the best epoch on validation and, this once, test, if there is one; returns what
    it wrote."""
    content = {"best_epoch": progress.best_epoch + 1, "epochs": progress.history}
    runs.write_json(folder / runs.METRICS_FILE, {**content, "machine": machine.describe()})
    # A last training, on all that there is, has no test split.
    splits = [split for split in ("validation", "test") if split in schema.splits]
    for split in splits:
        evaluation = evaluate(model, config.data_dir, schema, split, folder.resolve().name)
        evaluation.write(folder)
    print(f"{splits[-1]} split, epoch {progress.best_epoch + 1} of {progress.epoch}")
    print(report.table({evaluation.name: evaluation.summary}))
    print(f"metrics and plots in {folder}", flush=True)
    return runs.read_json(folder / runs.METRICS_FILE)


def _finish_epoch(model, config, schema, progress, best, writer) -> None:
    """Validates; keeps the weights if they are the best so far; moves on to the next epoch."""
    predictions, grade, group = predict(model, config.data_dir, schema, "validation")
    if not all(np.isfinite(values).all() for values in predictions.values()):
        raise Diverged(
            f"training diverged: after epoch {progress.epoch + 1} the model predicts NaN; lower "
            "--learning_rate, and begin in another --workdir"
        )
    validation = summary(grade, predictions, group)
    value = _monitored(validation)
    epoch = progress.epoch
    with writer.as_default(int(model.optimizer.iterations)):
        for task, values in validation.items():
            for name in ("auc", "gauc", "log_loss", "pcoc", "calibration_error"):
                if values[name] is not None:
                    tf.summary.scalar(f"validation/{task}_{name}", values[name])
    writer.flush()
    if value > progress.best_value:
        progress.best_epoch, progress.best_value = epoch, value
        best.save(checkpoint_number=epoch + 1)
    progress.history.append(
        {
            "epoch": epoch + 1,
            "monitored": value,
            "train": progress.losses,
            "validation": validation,
        }
    )
    progress.epoch, progress.step, progress.losses = epoch + 1, 0, {}
    shown = ", ".join(
        f"{task} AUC {values['auc']:.4f}" if values["auc"] is not None else f"{task} AUC undefined"
        for task, values in validation.items()
    )
    print(f"epoch {epoch + 1}, validation: {shown}", flush=True)


def _monitored(validation: dict) -> float:
    """What an epoch is chosen by: the mean AUC of the two tasks (MTReclib's choice).

    A task whose validation labels are all alike has no AUC and is left out; if both are, the
    negative log loss decides.
    """
    aucs = [validation[task]["auc"] for task in TASKS if validation[task]["auc"] is not None]
    if aucs:
        return sum(aucs) / len(aucs)
    return -sum(validation[task]["log_loss"] for task in TASKS)


def _waited_enough(progress: Progress, patience: int) -> bool:
    """Whether `patience` epochs, at least 1, have passed since the best one, as Keras counts."""
    return progress.best_epoch is not None and progress.epoch - progress.best_epoch > max(
        1, patience
    )


def _describe(config: Config, schema: Schema) -> None:
    """Prints what will be trained on, how, and PWiseR's strength; warns where it is too strong."""
    split = schema.split("train")
    batch_size = min(config.training.batch_size, split.rows)
    used = split.rows // batch_size * batch_size
    print(
        f"{split.rows} exposures, {split.clicks} clicks, {split.conversions} conversions; "
        f"a batch of {batch_size} holds no conversion with probability "
        f"{(1 - split.conversions / split.rows) ** batch_size:.2f}; an epoch uses "
        f"{used / split.rows:.1%} of the rows"
    )
    if used < _FEWEST_ROWS_USED * split.rows:
        print(
            f"warning: batches of {batch_size} leave {split.rows - used} of {split.rows} rows out "
            "of each epoch (others each time); a smaller --batch_size leaves fewer",
            file=sys.stderr,
        )
    loss = config.loss
    formula = LOSSES[loss.name].formula.format_map(vars(loss))
    if loss.name == "bce" or not loss.loss_tasks:
        print("loss: BCE", flush=True)
        return
    if (loss.name, loss.score_space, loss.normalization) != ("pwiser", "probability", "pairs"):
        # Strength is defined for PWiseR on probabilities, as a mean over pairs.
        if loss.name == "pwiser":
            formula += f" (scores: {loss.score_space}, divided by {loss.normalization})"
        print(f"loss: {formula} on {', '.join(loss.loss_tasks)}", flush=True)
        return
    if not split.conversions:
        print("loss: BCE + PWiseR, but without conversions there are no pairs", flush=True)
        return
    # BCE pushes a conversion of the CTCVR head as hard as all its positives: there the CVR is 1.
    cvr = {"ctr": split.conversions / split.clicks, "ctcvr": 1.0}
    margins = loss.margin_click, loss.margin_nonclick
    strengths = {
        task: strength(loss.pwiser_weight, *margins, cvr[task]) for task in loss.loss_tasks
    }
    shown = ", ".join(f"{task} {value:.2f}" for task, value in strengths.items())
    print(
        f"loss: {formula}; strength {shown} (up to about 0.4 was harmless)",
        flush=True,
    )
    if max(strengths.values(), default=0) > _HARMFUL_STRENGTH:
        print(
            f"warning: strength {shown}: above {_HARMFUL_STRENGTH:g} expect worse AUC and "
            "calibration; lower --pwiser_weight or the margins",
            file=sys.stderr,
        )
