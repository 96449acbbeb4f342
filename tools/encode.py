"""Arrow batches of raw rows to the arrays that records.encode takes; refuses what is not valid."""

import dataclasses

import numpy as np
import pyarrow
import pyarrow.compute

from pwiser_tf import records
from pwiser_tf.schema import MISSING_INTEGER, MISSING_STRING, Categorical, Numerical
from tools.source import Part, Source


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch's valid rows.

    Attributes:
      split: position in schema.SPLITS, int8 [n].
      grade: int64 [n]; -1 where the row has a conversion without a click, and is to be dropped.
      frames: framed records, uint8 [n, length].
    """

    split: np.ndarray
    grade: np.ndarray
    frames: np.ndarray


class Encoder:
    """Encodes rows by the features learnt from training."""

    def __init__(
        self,
        source: Source,
        categorical: tuple[Categorical, ...],
        numerical: tuple[Numerical, ...],
    ):
        self._source = source
        self._categorical = categorical
        self._numerical = numerical

    def project(self, rows: str) -> str:
        """The SQL query whose batches `encode` takes, from one with a Part's columns and split."""
        columns = []
        for i, feature in enumerate(self._categorical):
            # A text that is no integer is an unknown value of an integer feature: NULL.
            integer = feature.dtype == "int64"
            columns.append(
                f"TRY_CAST(categorical_{i} AS BIGINT) AS categorical_{i}"
                if integer
                else f"categorical_{i}"
            )
        columns += [f"numerical_{i}" for i in range(len(self._numerical))]
        columns += ["click", "conversion", "CAST(split AS TINYINT) AS split"]
        if self._source.group:
            columns.append("row_group")
        return f"SELECT {', '.join(columns)} FROM ({rows})"

    def encode(self, batch: pyarrow.RecordBatch, part: Part, first_row: int) -> Rows:
        """A batch to records.

        Args:
          batch: rows of `project`.
          part, first_row: where the batch comes from; its rows count from 0 in the part.

        Raises:
          DataError: a cell that is not valid, with its place.
        """
        source, size = self._source, batch.num_rows

        def refuse_where(bad: np.ndarray, column: str, expected: str) -> None:
            if bad.any():
                raise part.fault(first_row + int(np.argmax(bad)), column, expected)

        labels = []
        for name, column in (("click", source.click), ("conversion", source.conversion)):
            label = batch[name].to_numpy(zero_copy_only=False)
            refuse_where((label != 0) & (label != 1), column, source.expected_label)
            labels.append(label.astype(np.int64))
        click, conversion = labels
        group = None
        if source.group:
            refuse_where(_nulls(batch["row_group"]), source.group, "a group in every row")
            group = batch["row_group"].to_numpy(zero_copy_only=False)
        categorical = np.empty((size, len(self._categorical)), np.int64)
        for i, feature in enumerate(self._categorical):
            values = batch[f"categorical_{i}"]
            if not source.missing:
                refuse_where(_nulls(values), feature.name, "an integer")
            categorical[:, i] = _ids(feature, values)
        numerical = np.empty((size, len(self._numerical)), np.float32)
        for i, feature in enumerate(self._numerical):
            values = batch[f"numerical_{i}"].to_numpy(zero_copy_only=False)
            bad = np.isinf(values) if source.missing else ~np.isfinite(values)
            refuse_where(bad, feature.name, "a finite number")
            numerical[:, i] = feature.apply(values)
        grade = np.where(conversion > click, -1, click + conversion)
        return Rows(
            batch["split"].to_numpy(),
            grade,
            records.encode(categorical, numerical, np.maximum(grade, 0), group),
        )


def _nulls(column: pyarrow.Array) -> np.ndarray:
    if column.null_count == 0:
        return np.zeros(1, bool)
    return column.is_null().to_numpy(zero_copy_only=False)


def _ids(feature: Categorical, column: pyarrow.Array) -> np.ndarray:
    if feature.dtype == "int64":
        return feature.ids(pyarrow.compute.fill_null(column, MISSING_INTEGER).to_numpy())
    # Each distinct text is looked up once.
    encoded = pyarrow.compute.fill_null(column, MISSING_STRING).dictionary_encode()
    distinct = np.array(encoded.dictionary.to_pylist(), object)
    return feature.ids(distinct)[encoded.indices.to_numpy()]
