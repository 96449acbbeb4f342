"""The training loop: trains a run to its end and evaluates it once on the test split.

A run may be interrupted at any moment, even by kill -9. It continues when it is started again, and
ends with the metrics of a run that was not interrupted. For this, a checkpoint holds the weights,
the optimiser, the position in the data, the counters of the dropout masks and the history of
epochs; every order and mask follows from the seed.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
import tf_keras as keras

from pwiser_tf import calibration, click_noise, data, machine, metrics, report, runs
from pwiser_tf.click_noise import ClickNoise
from pwiser_tf.config import Config
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import evaluate, plots_module, predict
from pwiser_tf.losses import strength
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.schema import Schema
from pwiser_tf.tasks import LOSSES, TASKS

_LOG_EVERY_STEPS = 100
# Click noise is estimated from about this many exposures without click.
_NOISE_ROWS, _NOISE_BATCH = 2_000_000, 65_536
# Above about this strength PWiseR did harm: docs/explain/when-pwiser-helps.md.
_HARMFUL_STRENGTH = 1.0
# Below this share of rows in an epoch, training warns.
_FEWEST_ROWS_USED = 0.9


def share_cores() -> None:
    """Gives each operation half of the cores, so that two operations run in parallel.

    It must be called before TensorFlow runs its first operation. Experts, towers and the two
    products of a backward pass are independent. Two operations in parallel with one thread each
    are faster than one after the other with two threads, because the threads of an operation wait
    for each other. benchmarks/training.py uses it too. TF_NUM_INTRAOP_THREADS overrides it.
    """
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        tf.config.threading.set_intra_op_parallelism_threads(max(1, cores // 2))


class Diverged(DataError):
    """The loss or a prediction is not finite."""


class Progress(tf.train.experimental.PythonState):
    """The progress of a run. It is saved in the checkpoint, so it always matches the weights.

    Attributes:
      epoch: the current epoch, from 0. step: the number of its batches that are done.
      losses: the means over these batches, by name.
      history: the training losses and validation metrics of each finished epoch.
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
    """Counts steps, saves the state at an interval, logs losses, ends `fit` after one epoch."""

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
        # fit has just reset the running means of the losses; a resumed epoch needs them again.
        if self._progress.step:
            for metric, mean in zip(self.model.metrics, self._means, strict=True):
                metric.set_weights(mean)

    def on_epoch_end(self, epoch, logs=None):
        # fit gets the number of all epochs, for its progress line, but runs one epoch per call.
        self.model.stop_training = True

    def on_train_batch_end(self, batch, logs=None):
        if not all(math.isfinite(value) for value in logs.values()):
            # Raised before this step is counted or saved.
            raise Diverged(
                f"training diverged: the loss is not finite at step {self._progress.step + 1} of "
                f"epoch {self._progress.epoch + 1}; lower --learning_rate and use another "
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


# Called with (model, the epoch's entry in the history); see `fit`.
OnEpoch = Callable[[ClickConversionModel, dict], None]


def train(
    config: Config,
    folder: str | os.PathLike,
    checkpoint_seconds: float = 60,
    on_epoch: OnEpoch | None = None,
) -> dict:
    """Starts or resumes the run in `folder`, and evaluates it. Returns the content of metrics.json.

    Args:
      config: the config of the run. folder: its workdir.
      checkpoint_seconds: the interval at which the state is saved; it is also saved after each
        epoch.
      on_epoch: see `fit`.

    Raises:
      DataError: data that is missing, damaged or of another schema; a folder of another run, or
      one that another process uses; a corrupt checkpoint; a loss or prediction that is not finite
      in the first epoch.
    """
    folder = pathlib.Path(folder)
    schema = Schema.load(config.data_dir)
    if "test" in schema.splits:
        data.check(config.data_dir, schema, "test")
    with _locked_run(config, folder) as schema:
        model, progress = _fit(config, schema, folder, checkpoint_seconds, on_epoch)
        _calibrate(model, config, schema, folder)
        return _evaluate_best(model, config, schema, folder, progress)


def fit(
    config: Config,
    folder: str | os.PathLike,
    checkpoint_seconds: float = 60,
    on_epoch: OnEpoch | None = None,
) -> tuple[ClickConversionModel, Schema, Progress]:
    """Trains without calibration and final evaluation: does not read the test split or write
    metrics.json.

    Args:
      on_epoch: called with the model and the epoch's entry in the history ({"epoch", "monitored",
        "train", "validation"}) after each epoch's validation. It may raise an exception, which
        ends the run. It is called again for an epoch that a killed run has to repeat.

    Returns:
      The model with the weights of its best epoch by validation, the schema, and the progress.
    """
    folder = pathlib.Path(folder)
    with _locked_run(config, folder) as schema:
        model, progress = _fit(config, schema, folder, checkpoint_seconds, on_epoch)
        return model, schema, progress


@contextlib.contextmanager
def _locked_run(config: Config, folder: pathlib.Path) -> Iterator[Schema]:
    """Checks the data and prepares the folder, which is locked until the block ends."""
    schema = Schema.load(config.data_dir)
    for split in ("train", "validation"):
        data.check(config.data_dir, schema, split)
    if config.training.shuffle == "groups" and not schema.group:
        by_loss = LOSSES[config.loss.name].needs_groups
        flag = f"--loss={config.loss.name}" if by_loss else "--shuffle=groups"
        raise DataError(
            f"{flag} needs a group (a search or session) in the data; this data set has none",
            file=pathlib.Path(config.data_dir) / "schema.json",
        )
    _check_noise_fields(config.loss.click_noise_fields, schema)
    if min(config.training.batch_size, schema.split("train").rows) == 1:
        raise DataError("a batch of 1 row: batch normalization needs a --batch_size of at least 2")
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder):
        runs.begin(folder, config, schema)
        _print_description(config, schema)
        yield schema


def _fit(
    config, schema, folder, checkpoint_seconds, on_epoch
) -> tuple[ClickConversionModel, Progress]:
    """Trains until the last epoch or until patience ends, then restores the best epoch."""
    model = runs.build_model(config, schema, _click_noise(config, schema, folder))
    # The legacy optimiser is faster: one fused operation per variable.
    model.compile(optimizer=keras.optimizers.legacy.Adam(config.training.learning_rate))
    progress = Progress()
    state = tf.train.Checkpoint(model=model, optimizer=model.optimizer, progress=progress)
    manager = runs.state_checkpoint(folder, state)
    best = runs.best_checkpoint(folder, model)
    if manager.latest_checkpoint:
        runs.restore_state(manager)
        print(f"continuing at epoch {progress.epoch + 1}, step {progress.step}", flush=True)
    writer = tf.summary.create_file_writer(str(folder / "logs"))
    housekeeping = Housekeeping(progress, manager, writer, checkpoint_seconds)

    # A data set smaller than a batch is one batch. Otherwise the last, smaller batch of an epoch is
    # left out (different rows in each epoch), because batch normalization needs equal batch sizes.
    rows = schema.split("train").rows
    batch_size = min(config.training.batch_size, rows)
    options = config.training
    extras = ("group",) if LOSSES[config.loss.name].needs_groups else ()
    while progress.epoch < options.epochs and not _patience_ended(progress, options.patience):
        batches = data.batches(
            config.data_dir,
            schema,
            "train",
            batch_size,
            shuffle_seed=(options.seed, progress.epoch),
            keep_groups=options.shuffle == "groups",
            skip_rows=progress.step * batch_size,
            drop_remainder=True,
            extras=extras,
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
                f"warning: {error}; the result is epoch {progress.best_epoch + 1}, the best "
                "finished epoch",
                file=sys.stderr,
            )
            break
        if on_epoch:
            on_epoch(model, progress.history[-1])
        manager.save()
    runs.restore_best(best)
    return model, progress


def _check_noise_fields(features: Sequence[str], schema: Schema) -> None:
    """Raises DataError if click noise cannot be estimated by these features."""
    known = [feature.name for feature in schema.categorical]
    if unknown := [name for name in features if name not in known]:
        raise DataError(
            f"--click_noise_fields={','.join(features)}: {', '.join(unknown)} is no categorical "
            f"feature; these are: {', '.join(known)}"
        )
    if features and not schema.conversion:
        raise DataError("--click_noise_fields needs conversions, which the data set does not have")


def estimate_click_noise(
    data_dir: str | os.PathLike,
    schema: Schema,
    features: Sequence[str],
    expect: Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]] | None = None,
) -> ClickNoise:
    """Estimates the click noise by these categorical features from the training split.

    All clicks count; of a long log, exposures without a click are sampled. What is expected of a
    cell's items follows from the other categorical features and the numbers, the latter in bins.

    Args:
      expect: features of a batch to {"ctr", "cvr"} of a model that does not see `features`, from
        which clicks and conversions are expected too.

    Raises:
      DataError: a feature is not categorical, or the data have no conversions.
    """
    _check_noise_fields(features, schema)
    column = {feature.name: k for k, feature in enumerate(schema.categorical)}
    step = math.ceil(schema.split("train").rows / _NOISE_ROWS)
    ids, numbers, grades = [], [], []
    for inputs, grade in data.batches(data_dir, schema, "train", _NOISE_BATCH, extras=()):
        grade = grade.numpy()
        kept = np.flatnonzero((grade >= 1) | (np.arange(len(grade)) % step == 0))
        grades.append(grade[kept].astype(np.int8))
        ids.append(inputs["categorical"].numpy()[kept].astype(np.int32))
        values = np.empty((len(kept), 0), np.float32)
        if schema.value_features:
            values = inputs["numerical"].numpy()[kept, : len(schema.value_features)]
        if expect:
            outputs = expect(inputs)
            expected = np.stack([outputs[name].numpy()[kept] for name in ("ctr", "cvr")], axis=1)
            values = np.concatenate([values, expected], axis=1)
        numbers.append(values)
    ids, grade = np.concatenate(ids), np.concatenate(grades)
    chosen = [column[name] for name in features]
    return click_noise.estimate(
        tuple(features),
        ids[:, chosen],
        [schema.categorical[k].size for k in chosen],
        click_noise.other_columns(ids, np.concatenate(numbers), chosen),
        grade,
        np.where(grade >= 1, 1.0, step),
    )


def _model_without(
    config: Config, schema: Schema, fields: Sequence[str]
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """The run's architecture, trained for one epoch by cross-entropy, without these features."""
    seen = np.array([feature.name not in fields for feature in schema.id_features], np.int64)

    def hidden(features: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # Id 0 is unknown.
        return {**features, "categorical": features["categorical"] * seen}

    options = config.training
    plain = config.replace(loss="bce", conversion_weight=1.0, click_noise_fields=())
    model = runs.build_model(plain, schema)
    model.compile(optimizer=keras.optimizers.legacy.Adam(options.learning_rate))
    batches = data.batches(
        config.data_dir,
        schema,
        "train",
        min(options.batch_size, schema.split("train").rows),
        shuffle_seed=(options.seed, 0),
        drop_remainder=True,
        extras=(),
    )
    model.fit(batches.map(lambda features, grade: (hidden(features), grade)), verbose=0)
    return tf.function(lambda features: model(hidden(features), training=False))


def _click_noise(config: Config, schema: Schema, folder: pathlib.Path) -> ClickNoise | None:
    """The run's estimate of click noise, made where there is none yet, and printed."""
    if not config.loss.click_noise_fields:
        return None
    path = folder / runs.CLICK_NOISE_FILE
    if not path.exists():
        fields = config.loss.click_noise_fields
        try:
            noise = estimate_click_noise(config.data_dir, schema, fields)
            if noise.items_differ:
                print("click noise: cells show different items; a first model expects what they do")
                expect = _model_without(config, schema, fields)
                noise = estimate_click_noise(config.data_dir, schema, fields, expect)
        except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
            data.explain(error, config.data_dir, schema, "train")
        runs.write_json(path, noise.to_json())
    noise = runs.click_noise(folder, config)
    values = {
        feature.name: feature.texts()
        for feature in schema.categorical
        if feature.name in config.loss.click_noise_fields
    }
    print(noise.table(values), flush=True)
    for warning in noise.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return noise


def _calibrate(model, config, schema, folder) -> None:
    """Calibrates the best epoch on validation, if the config asks for it; stores it in the run."""
    loss = config.loss if schema.conversion else config.loss.without_conversions()
    method = config.training.calibration
    if method == "none" or (method == "auto" and loss.is_cross_entropy):
        runs.save_calibration(folder, None)
        return
    predictions, grade, _ = predict(model, config.data_dir, schema, "validation")
    fitted, reasons = calibration.fit_heads(grade, predictions)
    shown = [f"{head} not calibrated: {reason} in validation" for head, reason in reasons.items()]
    if fitted.heads:
        calibrated = {k: np.asarray(v) for k, v in fitted.apply(predictions).items()}
        for head, platt in fitted.heads.items():
            _, labels = metrics.task_labels(grade, head)
            before, after = (metrics.pcoc(labels, p[head]) for p in (predictions, calibrated))
            shown.append(
                f"{head} slope {platt.slope:.3f}, intercept {platt.intercept:+.3f}, PCOC "
                f"{before:.3f} -> {after:.3f}"
            )
        model.calibration = fitted
    runs.save_calibration(folder, model.calibration)
    print(f"calibration on validation: {'; '.join(shown)}", flush=True)


def _evaluate_best(model, config, schema, folder, progress) -> dict:
    """Evaluates the best epoch on validation and, if there is one, test; returns metrics.json."""
    content = {"best_epoch": progress.best_epoch + 1, "epochs": progress.history}
    runs.write_json(folder / runs.METRICS_FILE, {**content, "machine": machine.describe()})
    # A final training on all data has no test split.
    splits = [split for split in ("validation", "test") if split in schema.splits]
    for split in splits:
        evaluation = evaluate(model, config.data_dir, schema, split, folder.resolve().name)
        evaluation.write(folder)
    print(f"{splits[-1]} split, epoch {progress.best_epoch + 1} of {progress.epoch}")
    print(report.table({evaluation.name: evaluation.summary}))
    print(f"{'metrics and plots' if plots_module() else 'metrics'} in {folder}", flush=True)
    return runs.read_json(folder / runs.METRICS_FILE)


def _finish_epoch(model, config, schema, progress, best, writer) -> None:
    """Validates, saves the weights if they are the best so far, and moves to the next epoch."""
    predictions, grade, group = predict(model, config.data_dir, schema, "validation")
    if not all(np.isfinite(values).all() for values in predictions.values()):
        raise Diverged(
            f"training diverged: after epoch {progress.epoch + 1} the model predicts NaN; lower "
            "--learning_rate and use another --workdir"
        )
    validation = metrics.summary(grade, predictions, group)
    value = _monitored_value(validation)
    epoch = progress.epoch
    with writer.as_default(int(model.optimizer.iterations)):
        for task, values in validation.items():
            for name in ("auc", "gauc", "log_loss", "pcoc", "calibration_error"):
                if values[name] is not None:
                    tf.summary.scalar(f"validation/{task}_{name}", values[name])
    writer.flush()
    if value > progress.best_value:
        progress.best_epoch, progress.best_value = epoch, value
        # Of an earlier best epoch, where the run was extended.
        runs.save_calibration(pathlib.Path(best.directory).parent, None)
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


def _monitored_value(validation: dict) -> float:
    """The value that chooses the best epoch: the mean AUC of the two tasks, as in MTReclib.

    A task with only one class in validation has no AUC and is left out. If no task has an AUC, the
    value is the negative log loss.
    """
    tasks = [task for task in TASKS if task in validation]
    aucs = [validation[task]["auc"] for task in tasks if validation[task]["auc"] is not None]
    if aucs:
        return sum(aucs) / len(aucs)
    return -sum(validation[task]["log_loss"] for task in tasks)


def _patience_ended(progress: Progress, patience: int) -> bool:
    """Whether `patience` epochs (at least 1) have passed since the best epoch, as Keras counts."""
    return progress.best_epoch is not None and progress.epoch - progress.best_epoch > max(
        1, patience
    )


def _print_description(config: Config, schema: Schema) -> None:
    """Prints the training data, the loss and PWiseR's strength, with warnings."""
    split = schema.split("train")
    batch_size = min(config.training.batch_size, split.rows)
    used = split.rows // batch_size * batch_size
    counts = f"{split.rows} exposures, {split.clicks} clicks"
    if schema.conversion:
        counts += (
            f", {split.conversions} conversions; a batch of {batch_size} holds no conversion with "
            f"probability {(1 - split.conversions / split.rows) ** batch_size:.2f}"
        )
    print(f"{counts}; an epoch uses {used / split.rows:.1%} of the rows")
    if used < _FEWEST_ROWS_USED * split.rows:
        print(
            f"warning: batches of {batch_size} leave {split.rows - used} of {split.rows} rows out "
            "of each epoch (different rows each time); a smaller --batch_size leaves out fewer",
            file=sys.stderr,
        )
    loss = config.loss if schema.conversion else config.loss.without_conversions()
    if loss.name != config.loss.name:
        print(
            f"loss: BCE, since the data have CTR only: --loss={config.loss.name} needs conversions",
            flush=True,
        )
        return
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
    # All positives of the CTCVR head are conversions, so the CVR in its strength is 1.
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
