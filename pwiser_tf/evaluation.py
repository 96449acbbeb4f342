"""Evaluation: a model's predictions for a split, and their metrics."""

import dataclasses
import os
import pathlib

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from pwiser_tf import data, metrics, planted, runs
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.schema import Schema

# It affects only the speed: predictions do not depend on the batch.
_BATCH_SIZE = 8192


def plots_module():
    """pwiser_tf.plots, or None if matplotlib (the extra `plots`) is not installed."""
    try:
        from pwiser_tf import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    return plots


def predict(
    model: ClickConversionModel, data_dir: str | os.PathLike, schema: Schema, split: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
    """Predictions (output to values), grades, and groups if there are any, all [rows]."""
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
    """A model's predictions for a split, and their metrics.

    Attributes:
      name: the model's, in reports. grade: [rows]. predictions: output to values [rows].
      summary: see `metrics.summary`. truth: see `planted.measure`; None without a truth file.
    """

    name: str
    split: str
    grade: np.ndarray
    predictions: dict[str, np.ndarray]
    summary: dict[str, dict]
    truth: dict[str, dict] | None = None

    def write(self, folder: str | os.PathLike) -> None:
        """Writes the split's entry in metrics.json and, if matplotlib is installed, its plots."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / runs.METRICS_FILE
        content = runs.read_json(path) if path.exists() else {}
        title = f"{self.name}, {self.split} split"
        if plots := plots_module():
            path_of_plot = folder / f"report-{self.split}.png"
            plots.plot_evaluation(path_of_plot, self.grade, self.predictions, self.summary, title)
        truth = {} if self.truth is None else {"truth": self.truth}
        runs.write_json(path, {**content, self.split: {**self.summary, **truth}})


def evaluate(
    model: ClickConversionModel,
    data_dir: str | os.PathLike,
    schema: Schema,
    split: str,
    name: str,
    truth_file: str | os.PathLike | None = None,
) -> Evaluation:
    """Evaluates a model on one split; `name` is its name in reports.

    Raises:
      DataError: the records are damaged, or `truth_file` is not the truth of their rows.
    """
    # Before the predictions, which may take long.
    truth = planted.Truth.read(truth_file, schema) if truth_file else None
    predictions, grade, group = predict(model, data_dir, schema, split)
    summary = metrics.summary(grade, predictions, group)
    against = None
    if truth:
        rows = truth.of_records(group, grade, split)
        against = planted.measure(predictions, rows, group)
    return Evaluation(name, split, grade, predictions, summary, against)
