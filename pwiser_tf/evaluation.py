"""Evaluation: a model's predictions for a split, and their metrics."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from pwiser_tf import data, metrics, planted, runs, segments
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.records import empty_features
from pwiser_tf.schema import Schema
from pwiser_tf.score import SEARCH, Score, ranking, search

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
    predictions, grade, group, _ = _predict_with_segments(model, data_dir, schema, split, ())
    return predictions, grade, group


def _predict_with_segments(
    model: ClickConversionModel,
    data_dir: str | os.PathLike,
    schema: Schema,
    split: str,
    names: Sequence[str],
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    """What `predict` gives, and the values of segments: name to integers [rows]."""
    rows = data.check(data_dir, schema, split).rows
    predict_batch = tf.function(
        lambda features: model(features, training=False), reduce_retracing=True
    )
    predictions, grades, groups = [], [], []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    extras = ("group", "segments") if set(names) & set(schema.segments) else ("group",)
    try:
        bar = tqdm(total=rows, unit="row", unit_scale=True, desc=split, leave=False, disable=None)
        with bar:
            for features, grade in data.batches(
                data_dir, schema, split, _BATCH_SIZE, extras=extras
            ):
                group = features.pop("group", None)
                for name in names:
                    columns[name].append(segments.column(schema, name, features))
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
    found = {name: np.concatenate(values) for name, values in columns.items()}
    return joined, np.concatenate(grades), group, found


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model's predictions for a split, and their metrics.

    Attributes:
      name: the model's, in reports. grade: [rows]. predictions: output to values [rows].
      summary: see `metrics.summary`. truth: see `planted.measure`; None without a truth file.
      score: "outputs", `score.ranking` of each output; with a score "formula" and `score.ranking`
        of it; after a search "search", what it has tried on validation. None if the model has no
        output `interest` and no score was asked for.
      segments: name to `segments.measure`; None if none was asked for.
    """

    name: str
    split: str
    grade: np.ndarray
    predictions: dict[str, np.ndarray]
    summary: dict[str, dict]
    truth: dict[str, dict] | None = None
    score: dict | None = None
    segments: dict[str, dict] | None = None

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
        asked = {"truth": self.truth, "score": self.score, "segments": self.segments}
        asked = {name: found for name, found in asked.items() if found is not None}
        runs.write_json(path, {**content, self.split: {**self.summary, **asked}})


def evaluate(
    model: ClickConversionModel,
    data_dir: str | os.PathLike,
    schema: Schema,
    split: str,
    name: str,
    truth_file: str | os.PathLike | None = None,
    score: Score | str | None = None,
    segment_names: Sequence[str] = (),
) -> Evaluation:
    """Evaluates a model on one split; `name` is its name in reports.

    Args:
      truth_file: planted probabilities; see `planted`.
      score: what to add to the predictions as "score"; "search": the blend that is best for
        conversions on the validation split.
      segment_names: segment columns and categorical features for metrics by value.

    Raises:
      DataError: the records are damaged, `truth_file` is not the truth of their rows, the model
        lacks an output of the score, or there is no such segment.
    """
    # Before the predictions, which may take long.
    segments.check(schema, segment_names)
    if isinstance(score, Score):
        score.require(model(empty_features(schema)))
    truth = planted.Truth.read(truth_file, schema) if truth_file else None
    tried = None
    if score == SEARCH:
        predictions, grade, _ = predict(model, data_dir, schema, "validation")
        score, tried = search(grade, predictions)
    predictions, grade, group, codes = _predict_with_segments(
        model, data_dir, schema, split, segment_names
    )
    scored = None
    # Interest is no probability of a label, so it is measured as a ranking too.
    if score or "interest" in predictions:
        scored = {
            "outputs": {
                output: ranking(grade, predictions[output], group)
                for output in ("ctr", "ctcvr", "interest")
                if output in predictions
            }
        }
    if score:
        predictions["score"] = score.values(predictions)
        scored |= {"formula": str(score), **ranking(grade, predictions["score"], group)}
        scored |= {} if tried is None else {"search": tried}
    summary = metrics.summary(grade, predictions, group)
    by_segment = {
        column: segments.measure(grade, predictions, values, segments.shown(schema, column))
        for column, values in codes.items()
    }
    against = None
    if truth:
        rows = truth.of_records(group, grade, split)
        against = planted.measure(predictions, rows, group)
    return Evaluation(name, split, grade, predictions, summary, against, scored, by_segment or None)
