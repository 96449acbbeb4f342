"""Evaluates a trained run: exact metrics on the screen and in metrics.json, and a plot sheet.

python -m pwiser_tf.evaluate --workdir=runs/us
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import dataclasses
import os
import pathlib

import numpy as np
import tensorflow as tf
from absl import flags
from tqdm import tqdm

from pwiser_tf import data, metrics, report, workdir
from pwiser_tf.command_line import run
from pwiser_tf.errors import DataError
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.schema import SPLITS, Schema

# A choice of speed alone: predictions do not depend on the batch.
_BATCH_SIZE = 8192


def predict(
    model: ClickConversionModel, data_dir: str | os.PathLike, schema: Schema, split: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Predictions {"ctr", "cvr", "ctcvr"}, grades, and groups if there are any, all [rows]."""
    rows = data.check(data_dir, schema, split).rows
    predict_batch = tf.function(
        lambda features: model(features, training=False), reduce_retracing=True
    )
    predictions, grades, groups = [], [], []
    try:
        bar = tqdm(total=rows, unit="row", unit_scale=True, desc=split, leave=False, disable=None)
        with bar:
            for features, grade in data.batches(data_dir, schema, split, _BATCH_SIZE):
                group = features.pop("group", None)
                predictions.append({k: v.numpy() for k, v in predict_batch(features).items()})
                grades.append(grade.numpy())
                groups.append(None if group is None else group.numpy())
                bar.update(len(grade))
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        data.explain(error, data_dir, schema, split)
    joined = {
        name: np.concatenate([batch[name] for batch in predictions]) for name in predictions[0]
    }
    group = np.concatenate(groups) if schema.group else None
    return joined, np.concatenate(grades), group


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model predicts for a split, and how well (see metrics.summary)."""

    name: str
    split: str
    grade: np.ndarray
    predictions: dict[str, np.ndarray]
    summary: dict[str, dict]

    def write(self, folder: str | os.PathLike) -> None:
        """Writes the split's plot sheet, and its entry in the folder's metrics.json."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / workdir.METRICS_FILE
        content = workdir.read_json(path) if path.exists() else {}
        title = f"{self.name}, {self.split} split"
        plot = folder / f"report-{self.split}.png"
        report.plot(plot, self.grade, self.predictions, self.summary, title)
        workdir.write_json(path, {**content, self.split: self.summary})


def evaluate(
    model: ClickConversionModel,
    data_dir: str | os.PathLike,
    schema: Schema,
    split: str,
    name: str,
) -> Evaluation:
    """Evaluates a model, called `name`, on one split."""
    predictions, grade, group = predict(model, data_dir, schema, split)
    summary = metrics.summary(grade, predictions, group)
    return Evaluation(name, split, grade, predictions, summary)


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("workdir", None, "One or several folders of runs.", required=True)
    flags.DEFINE_enum("split", "test", SPLITS, "The split to evaluate.")
    flags.DEFINE_string(
        "data_dir", None, "A converted data set with the same schema; default: the run's own."
    )
    flags.DEFINE_string(
        "output_dir",
        None,
        "Where metrics and plots go; default: the workdir. Needed for several runs: each gets a "
        "folder of its name there, and comparison.png shows them side by side.",
    )


def main() -> None:
    """Evaluates as the flags say."""
    args = flags.FLAGS
    if len(args.workdir) > 1 and not args.output_dir:
        raise DataError("several runs need an --output_dir")
    with workdir.file_errors():
        evaluations = {}
        for folder in map(pathlib.Path, args.workdir):
            name = folder.resolve().name
            if name in evaluations:
                raise DataError(f"two runs are called {name}; their folders need different names")
            evaluations[name] = _evaluate_run(folder, name, args.split, args.data_dir)
        for (name, evaluation), folder in zip(evaluations.items(), args.workdir, strict=True):
            output = pathlib.Path(args.output_dir or folder)
            evaluation.write(output / name if len(evaluations) > 1 else output)
        summaries = {name: evaluation.summary for name, evaluation in evaluations.items()}
        print(report.table(summaries))
        if len(evaluations) > 1:
            first, *others = evaluations.values()
            if any(not np.array_equal(first.grade, other.grade) for other in others):
                raise DataError("the runs have different data: nothing is compared")
            predictions = {name: evaluation.predictions for name, evaluation in evaluations.items()}
            print()
            print(report.difference_table(first.grade, predictions))
            report.plot_comparison(pathlib.Path(args.output_dir) / "comparison.png", summaries)


def _evaluate_run(folder: pathlib.Path, name: str, split: str, data_dir: str | None) -> Evaluation:
    """Evaluates the best epoch of a run; on its own data set, or on another of its schema."""
    model, settings, schema = workdir.load_best(folder)
    data_dir = data_dir or settings.data_dir
    found = Schema.load(data_dir)
    if found.fingerprint != schema.fingerprint:
        raise DataError(
            f"not the schema of {folder / 'schema.json'}, with which the model was trained",
            file=pathlib.Path(data_dir) / "schema.json",
        )
    return evaluate(model, data_dir, found, split, name)


if __name__ == "__main__":
    define_flags()
    run(main)
