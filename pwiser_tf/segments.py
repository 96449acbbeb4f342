"""Metrics by segment: one line per value of a column, such as a country or a slot."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from pwiser_tf import metrics
from pwiser_tf.errors import DataError
from pwiser_tf.schema import OUT_OF_VOCABULARY, Categorical, Schema

# How many values are shown alone; the others are one entry.
LARGEST = 20


def check(schema: Schema, names: Sequence[str]) -> None:
    """Raises DataError for a name that is no segment column and no categorical feature."""
    have = [*schema.segments, *(feature.name for feature in schema.categorical)]
    for name in names:
        if name not in have:
            raise DataError(
                f"--segments={name}: expected a segment column or a categorical feature of the "
                f"data: {', '.join(dict.fromkeys(have)) or 'there is none'}"
            )
        if names.count(name) > 1:
            raise DataError(f"--segments: {name} is there twice")


def column(schema: Schema, name: str, features: dict) -> np.ndarray:
    """The values of a segment in a batch, as integers [B]; see `shown`.

    Args:
      name: a segment column or else a categorical feature.
      features: of data.batches, with the extra "segments" where the schema has segments.
    """
    if name in schema.segments:
        return features["segments"].numpy()[:, list(schema.segments).index(name)]
    position = [feature.name for feature in schema.categorical].index(name)
    return features["categorical"].numpy()[:, position]


def shown(schema: Schema, name: str) -> Callable[[int], str]:
    """The function from an integer of `column` to the value's text."""
    if name in schema.segments:
        values = schema.segments[name]
        return lambda code: values[code] if 0 <= code < len(values) else f"position {code}"
    feature = next(each for each in schema.categorical if each.name == name)
    return lambda code: _value_of_id(feature, code)


def _value_of_id(feature: Categorical, number: int) -> str:
    if number == OUT_OF_VOCABULARY:
        return "(unknown)"
    if feature.hash_buckets:
        return f"bucket {number}"
    if number > len(feature.vocabulary):
        return f"id {number}"
    return str(feature.vocabulary[number - 1])


def measure(
    grade: np.ndarray,
    predictions: dict[str, np.ndarray],
    codes: np.ndarray,
    text: Callable[[int], str],
    largest: int = LARGEST,
) -> dict:
    """The metrics of each value of a segment, ready for JSON.

    Args:
      grade: integers [n] in {0, 1, 2}. predictions: output to [n]. codes: integers [n].
      text: the text of a code. largest: how many values get an entry of their own.

    Returns:
      {"values": entries by falling number of rows, "rest": the entry of all other rows, or None}.
      An entry has value (its text; of the rest: how many values), rows, clicks, ctr_auc,
      ctr_pcoc and, where the predictions have ctcvr, conversions, ctcvr_auc, ctcvr_pcoc; None
      where undefined.
    """
    distinct, code, counts = np.unique(codes, return_inverse=True, return_counts=True)
    falling = np.argsort(-counts, kind="stable")
    kept, others = falling[:largest], falling[largest:]
    # Sorted once, so that a value's rows are a slice.
    order = np.argsort(code, kind="stable")
    ends = np.cumsum(counts)

    def entry(value: str | int, rows: np.ndarray) -> dict:
        of_rows = {name: np.asarray(values)[rows] for name, values in predictions.items()}
        return {"value": value, **_entry(grade[rows], of_rows)}

    values = [
        entry(text(int(distinct[i])), order[ends[i] - counts[i] : ends[i]]) for i in kept.tolist()
    ]
    rest = None
    if len(others):
        rest = entry(len(others), np.flatnonzero(np.isin(code, others)))
    return {"values": values, "rest": rest}


def _entry(grade: np.ndarray, predictions: dict[str, np.ndarray]) -> dict:
    found: dict[str, int | float | None] = {"rows": len(grade)}
    for task, label in (("ctr", "clicks"), ("ctcvr", "conversions")):
        if task in predictions:
            _, positive = metrics.task_labels(grade, task)
            found[label] = int(np.count_nonzero(positive))
            found[f"{task}_auc"] = metrics.auc(positive, predictions[task])
            found[f"{task}_pcoc"] = metrics.pcoc(positive, predictions[task])
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in found.items()
    }
