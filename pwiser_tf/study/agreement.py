"""Test AUC of MMoE over seeds: ours against MTReclib's in PyTorch (mtreclib.py).

    python -m pwiser_tf.study.agreement
    python -m pwiser_tf.study.agreement --data=data/us --embedding_dim=128 --bottom_units=512,256 \\
        --tower_units=128,64 --experts=8 --epochs=2

Both read the same converted data set (without --data a generated one) in batches of the same size,
have the same sizes, and train for the same number of epochs with Adam, L2 and the mean of two BCEs,
without early stopping. Ours is trained by pwiser_tf.training.fit. PyTorch runs on the CPU. What
differs, and in which row of the table it does not:

    first bias     our towers start at the base rates, MTReclib's at 0; equal in the second row
    first weights  ours are Glorot's, PyTorch's layers draw from +-1/sqrt(inputs), biases too (the
                   embeddings are Glorot's in both); in the third row MTReclib's model starts with
                   weights and biases that ours drew
    Adam           our epsilon is 1e-7 beside the raw second moment, PyTorch's 1e-8 beside the
                   corrected one; our L2 is of kernels and embeddings, MTReclib's of all parameters;
                   MTReclib's layers have a bias before a normalization, which only drifts; as ours
                   in the third row
    seeds          no run of MTReclib's has the seed of one of ours: the two are independent
                   samples, as Welch's t-test needs
    small          our running variances divide by n, PyTorch's by n - 1; our dropout of 0.2 is
                   51/256

So the third row shows whether the two programs are the same; the rows above it, how much the start
alone matters at this number of steps.

CTCVR is measured by the second tower's own probability, as in MTReclib; what ours serves,
min(it, CTR), is measured beside it. Before the table two deterministic comparisons are printed:
the probabilities of both with the same trained weights, where a difference above 1e-5 ends the
program, because the table would mean nothing; and the probabilities after some steps of training,
as in the third row, without dropout.
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import contextlib
import math
import os
import pathlib
import sys
import tempfile
import typing
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import flags
from scipy import stats

from pwiser_tf import command_line, data, metrics, runs
from pwiser_tf.config import Config, config_from_arguments
from pwiser_tf.errors import DataError
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.models.base import TOWERS
from pwiser_tf.schema import SPLITS, Schema
from pwiser_tf.tasks import POSITIVE_GRADE, TASKS
from pwiser_tf.training import fit, share_cores

OURS = "pwiser-tf"
THEIRS = "MTReclib's"
THEIRS_AT_RATES = "MTReclib's, towers starting at the base rates"
THEIRS_AS_OURS = "MTReclib's, first weights and Adam as ours"
# CTCVR as it is served.
SERVED = "served"

_LEVEL = 0.95
_EVALUATION_ROWS = 8192
_SAME_FUNCTION = 1e-5
_STEPS = 5

# Of a batch of features, the probabilities of a click, and of a click with a conversion, each [B].
Predictor = Callable[[dict[str, tf.Tensor]], Sequence[np.ndarray]]


class Epoch(typing.NamedTuple):
    """AUCs after an epoch: {"ctr", "ctcvr", "served"} of the validation and of the test split."""

    validation: dict[str, float]
    test: dict[str, float]

    @property
    def monitored(self) -> float:
        """The value by which the best epoch is chosen, in both programs."""
        return sum(self.validation[task] for task in TASKS) / len(TASKS)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of this command line."""
    for name, default, text, low in (
        ("data", None, "A converted data set; default: one is generated.", None),
        ("rows", 200_000, "Training rows of the generated data set.", 1000),
        ("seeds", 5, "Runs of each program.", 2),
        # As pwiser_tf.train has them, where their values are checked.
        ("epochs", 3, "Epochs of a run.", None),
        ("batch_size", 2048, "Rows in a batch.", None),
        ("embedding_dim", 16, "Size of an embedding.", None),
        ("bottom_units", "128,64", "MLP sizes of an expert.", None),
        ("tower_units", "32", "MLP sizes of a tower.", None),
        ("experts", 4, "Experts.", None),
    ):
        if isinstance(default, int):
            flags.DEFINE_integer(name, default, text, lower_bound=low, flag_values=values)
        else:
            flags.DEFINE_string(name, default, text, flag_values=values)


def settings_of(values: flags.FlagValues, folder: str) -> Config:
    """The settings of all runs, for the data set in `folder`; the rest is train's default.

    Raises:
      DataError: a value that pwiser_tf.train does not take.
    """
    names = ("epochs", "batch_size", "embedding_dim", "bottom_units", "tower_units", "experts")
    arguments = [f"--{name}={values[name].value}" for name in names]
    # No run stops early.
    arguments += [f"--patience={values.epochs}", f"--data_dir={folder}"]
    return config_from_arguments(
        ["--model=mmoe", "--conversion_head=direct", "--loss=bce", *arguments]
    )


def generate(folder: pathlib.Path, rows: int) -> str:
    """Generates and converts a data set of about `rows` training rows; returns its folder."""
    from pwiser_tf.convert import aliexpress
    from pwiser_tf.convert.command import convert
    from pwiser_tf.synthetic.command import make_sample

    # A quarter as many rows to validate on, and half as many to test.
    (folder / "csv").mkdir()
    made = make_sample(folder / "csv", rows=7 * rows // 4, test_fraction=2 / 7)
    print(
        "generated data (pwiser sample); its planted probabilities have a test AUC of "
        f"CTR {made['ctr_auc']:.4f}, CTCVR {made['ctcvr_auc']:.4f}"
    )
    output = str(folder / "data")
    convert(
        lambda database, scratch: aliexpress.open_folder(
            database, str(folder / "csv"), None, scratch
        ),
        output,
        validation_fraction=0.2,
    )
    return output


def check(folder: str, schema: Schema) -> None:
    """DataError where the data set is not one on which the two can be compared."""
    path = pathlib.Path(folder) / "schema.json"
    for name, features in (("categorical", schema.categorical), ("numerical", schema.numerical)):
        if not features:
            raise DataError(f"no {name} features, of which MTReclib's MMoE needs some", file=path)
    for name in SPLITS:
        if not data.check(folder, schema, name).conversions:
            raise DataError(f"the {name} split holds no conversion: CTCVR has no AUC", file=path)


def our_predictor(model: ClickConversionModel) -> Predictor:
    """Reads both towers of a model with the direct head."""

    @tf.function(reduce_retracing=True)
    def towers(features):
        logits = model.tower_logits(features, training=False)
        return [tf.sigmoid(logits[tower][:, 0]) for tower in TOWERS]

    return lambda features: [probabilities.numpy() for probabilities in towers(features)]


def predict(predictor: Predictor, folder: str, schema: Schema, split: str):
    """Probabilities {task: [rows]}, "served" among them, and the grades [rows] of a split."""
    columns, grades = [], []
    for features, grade in data.batches(folder, schema, split, _EVALUATION_ROWS):
        columns.append(predictor(features))
        grades.append(grade.numpy())
    click, conversion = (np.concatenate(column) for column in zip(*columns, strict=True))
    served = np.minimum(conversion, click)
    return {"ctr": click, "ctcvr": conversion, SERVED: served}, np.concatenate(grades)


def aucs(predictor: Predictor, folder: str, schema: Schema, split: str) -> dict[str, float]:
    """The AUC of each task on a split, and of CTCVR as it is served."""
    predictions, grade = predict(predictor, folder, schema, split)
    positive = {**POSITIVE_GRADE, SERVED: POSITIVE_GRADE["ctcvr"]}
    return {
        name: metrics.auc((grade >= positive[name]).astype(np.int64), probabilities)
        for name, probabilities in predictions.items()
    }


def _epoch(predictor: Predictor, settings: Config, schema: Schema) -> Epoch:
    return Epoch(*(aucs(predictor, settings.data_dir, schema, n) for n in ("validation", "test")))


def train_ours(settings: Config, folder: pathlib.Path) -> tuple[list[Epoch], keras.Model]:
    """One of our runs, in `folder`: its epochs, and the model of the best one."""
    epochs = []
    schema = Schema.load(settings.data_dir)

    def on_epoch(model, _):
        epochs.append(_epoch(our_predictor(model), settings, schema))

    # The output of training is not part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        model, _, _ = fit(settings, folder, checkpoint_seconds=math.inf, on_epoch=on_epoch)
    return epochs, model


def train_theirs(name: str, settings: Config, schema: Schema) -> list[Epoch]:
    """A run of MTReclib's in the variant `name`: its epochs."""
    from pwiser_tf.study import mtreclib

    theirs = mtreclib.Trainer(settings, schema, name == THEIRS_AT_RATES, name == THEIRS_AS_OURS)
    epochs = []
    for number in range(settings.training.epochs):
        for batch in _batches(settings, schema, number):
            theirs.step(*batch)
        epochs.append(_epoch(theirs.predict, settings, schema))
        shown = ", ".join(f"{task} {epochs[-1].validation[task]:.4f}" for task in TASKS)
        print(f"{name}, epoch {number + 1}, validation AUC: {shown}", file=sys.stderr, flush=True)
    return epochs


def _batches(settings: Config, schema: Schema, epoch: int) -> tf.data.Dataset:
    """The batches of an epoch as training.fit reads them: those of one size."""
    return data.batches(
        settings.data_dir,
        schema,
        "train",
        min(settings.training.batch_size, schema.split("train").rows),
        shuffle_seed=(settings.training.seed, epoch),
        drop_remainder=True,
    )


def _print_deterministic(model: ClickConversionModel, settings: Config, schema: Schema) -> None:
    """Prints the two comparisons without chance; RuntimeError where the functions differ."""
    from pwiser_tf.study import mtreclib

    def largest_difference(ours, theirs) -> float:
        (found, _), (expected, _) = (
            predict(predictor, settings.data_dir, schema, "test")
            for predictor in (our_predictor(ours), theirs.predict)
        )
        return max(float(np.abs(found[task] - expected[task]).max()) for task in TASKS)

    theirs = mtreclib.Trainer(settings, schema)
    mtreclib.copy_weights(model, theirs.model)
    difference = largest_difference(model, theirs)
    print(
        "largest difference of a probability on the test rows: with the same trained weights "
        f"{difference:.0e}",
        flush=True,
    )
    if not difference <= _SAME_FUNCTION:
        raise RuntimeError(f"the two models are not the same function: {difference}")
    settings = settings.replace(dropout=0.0)
    ours = runs.build_model(settings, schema)
    theirs = mtreclib.Trainer(settings, schema, as_ours=True)
    batches = _batches(settings, schema, 0).take(_STEPS)
    ours.compile(optimizer=keras.optimizers.legacy.Adam(settings.training.learning_rate))
    ours.fit(batches, verbose=0)
    for batch in batches:
        theirs.step(*batch)
    print(
        f"with the same first weights, after {_STEPS} steps on the same batches without dropout, "
        f"Adam as ours: {largest_difference(ours, theirs):.0e}\n",
        flush=True,
    )


def welch(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The difference of two means, ours less theirs, and its 95 percent interval by Welch's t.

    Args:
      ours, theirs: independent samples, [n] each, n of at least 2. Their variances may differ.

    Returns:
      (difference, low, high); of samples that do not vary the interval is a point.
    """
    difference = float(np.mean(ours) - np.mean(theirs))
    if not np.ptp(ours) and not np.ptp(theirs):
        return difference, difference, difference
    found = stats.ttest_ind(ours, theirs, equal_var=False)
    return difference, *map(float, found.confidence_interval(_LEVEL))


def best(run: Sequence[Epoch]) -> Epoch:
    """The epoch of a run that is best by validation."""
    return max(run, key=lambda epoch: epoch.monitored)


def table(programs: dict[str, list[list[Epoch]]]) -> str:
    """Of each epoch, and of the best one, each program's test AUC, and ours less it, in Markdown.

    Args:
      programs: {name: a list of epochs a run}, OURS first.
    """
    lines = [
        "| epoch | program | CTR AUC (sd) | ours less it [95%] | CTCVR AUC (sd) "
        "| ours less it [95%] |",
        "|---|---|---|---|---|---|",
    ]
    choices = [(str(n + 1), lambda run, n=n: run[n]) for n in range(len(programs[OURS][0]))]
    for shown, choose in [*choices, ("best", best)]:
        for name in programs:
            cells = [shown, name]
            for task in TASKS:
                values = _test_aucs(programs[name], choose, task)
                cells.append(f"{np.mean(values):.4f} ({np.std(values, ddof=1):.4f})")
                ours = _test_aucs(programs[OURS], choose, task)
                cells.append("" if name == OURS else _shown(welch(ours, values)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(programs: dict[str, list[list[Epoch]]]) -> str:
    """Whether ours agrees with each of the others at the epoch best by validation; a line each."""
    lines = []
    for name in list(programs)[1:]:
        found = {
            task: welch(*(_test_aucs(programs[who], best, task) for who in (OURS, name)))
            for task in TASKS
        }
        reach = max(abs(end) for _, *ends in found.values() for end in ends)
        apart = " and ".join(
            f"{task.upper()} by {_shown(estimate)}"
            for task, estimate in found.items()
            if not estimate[1] <= 0 <= estimate[2]
        )
        lines.append(
            f"{name}: ours differs in {apart}"
            if apart
            else f"{name}: no difference from ours beyond seed noise: the intervals of CTR and "
            f"CTCVR hold 0, and rule out one beyond {reach:.4f}"
        )
    return "\n".join(lines)


def _test_aucs(runs: list[list[Epoch]], choose: Callable, task: str) -> list[float]:
    return [choose(run).test[task] for run in runs]


def _shown(estimate: tuple[float, float, float]) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*estimate)


def main() -> None:
    """Trains all runs; prints what was run, the table and the verdict."""
    values = flags.FLAGS
    try:
        import torch
    except ImportError:
        raise DataError("this command needs PyTorch: pip install -e '.[bench]'") from None
    share_cores()
    # Waiting threads spin: on cores that others use too, a thread a core took six times as long.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    with runs.file_errors(), tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        settings = settings_of(values, values.data or str(scratch / "data"))
        if not values.data:
            generate(scratch, values.rows)
        schema = Schema.load(settings.data_dir)
        check(settings.data_dir, schema)
        _print_what_runs(settings, schema, values.seeds)
        programs = {name: [] for name in (OURS, THEIRS, THEIRS_AT_RATES, THEIRS_AS_OURS)}
        for seed in range(values.seeds):
            run = settings.replace(seed=seed)
            epochs, model = train_ours(run, scratch / f"run-{seed}")
            programs[OURS].append(epochs)
            if seed == 0:
                _print_deterministic(model, run, schema)
            for name in list(programs)[1:]:
                run = settings.replace(seed=values.seeds + seed)
                programs[name].append(train_theirs(name, run, schema))
            # Otherwise every model stays in memory.
            keras.backend.clear_session()
    print(f"{table(programs)}\n\n{verdict(programs)}")
    served = [best(run).test[SERVED] - best(run).test["ctcvr"] for run in programs[OURS]]
    print(
        "CTCVR AUC of min(it, CTR), which ours serves, less that of the tower alone: "
        f"{np.mean(served):+.4f}, in no run beyond {max(served, key=abs):+.4f}"
    )


def _print_what_runs(settings: Config, schema: Schema, seeds: int) -> None:
    splits = "; ".join(
        f"{name} {split.rows:,} rows, {split.clicks:,} clicks, {split.conversions:,} conversions"
        for name, split in schema.splits.items()
    )
    print(splits)
    model, training = settings.model, settings.training
    print(
        f"MMoE, embedding {model.embedding_dim}, {model.experts} experts of "
        f"{model.bottom_units}, towers of {model.tower_units}, dropout {model.dropout}; "
        f"Adam {training.learning_rate:g}, L2 {model.weight_decay:g}; {training.epochs} epochs "
        f"of batches of {training.batch_size}; seeds 0 to {seeds - 1} for ours, {seeds} to "
        f"{2 * seeds - 1} for MTReclib's",
        flush=True,
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
