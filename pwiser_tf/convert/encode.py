"""Arrow batches of raw rows to the arrays that records.encode takes; refuses what is not valid."""

import dataclasses

import numpy as np
import pyarrow
import pyarrow.compute

from pwiser_tf import records
from pwiser_tf.convert import learn
from pwiser_tf.convert.source import Part, Source
from pwiser_tf.schema import MISSING_INTEGER, MISSING_STRING, SPLITS, Categorical, Numerical

_TRAIN = SPLITS.index("train")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch's valid rows.

    Attributes:
      split: position in schema.SPLITS, int8 [n].
      grade: int64 [n]; -1 where the row has a conversion without a click, and is to be dropped.
      group: int64 [n], or None where the source has none.
      frames: framed records, uint8 [n, length].
    """

    split: np.ndarray
    grade: np.ndarray
    group: np.ndarray | None
    frames: np.ndarray


class Encoder:
    """Encodes rows by the features learnt from training.

    Numbers that are written as they are ("identity") need no statistics beforehand, so theirs are
    gathered on the way: a scan of them would take a third of the whole time.
    """

    def __init__(
        self,
        source: Source,
        categorical: tuple[Categorical, ...],
        numerical: tuple[Numerical, ...],
    ):
        self._source = source
        self._categorical = categorical
        self._numerical = numerical
        self._moments = _Moments(len(numerical))

    def project(self, rows: str) -> str:
        """The SQL query whose batches `encode` takes, from one with a Part's columns and split."""
        columns = []
        for i, feature in enumerate(self._categorical):
            column = f"categorical_{i}"
            if feature.dtype == "int64" and self._source.missing:
                # A text that is no integer ("x", and "2.5", which a cast alone would round) is an
                # unknown value of an integer feature: NULL. "7.0" is the integer 7.
                integer = f"TRY_CAST({column} AS BIGINT)"
                whole = f"{integer} = TRY_CAST({column} AS DOUBLE)"
                columns.append(f"CASE WHEN {whole} THEN {integer} END AS {column}")
            else:
                columns.append(column)
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
        split = batch["split"].to_numpy()
        grade = np.where(conversion > click, -1, click + conversion)
        self._moments.add(numerical[(split == _TRAIN) & (grade >= 0)])
        return Rows(
            split,
            grade,
            group,
            records.encode(categorical, numerical, np.maximum(grade, 0), group),
        )

    def numerical(self) -> tuple[Numerical, ...]:
        """The numerical features, with the statistics of the training rows encoded so far."""
        features = []
        for feature, mean, std in zip(
            self._numerical, self._moments.mean.tolist(), self._moments.std.tolist(), strict=True
        ):
            if feature.transform == "identity":
                mean, std = learn.settled(mean, std)
                feature = dataclasses.replace(feature, mean=mean, std=std, fill_value=mean)
            features.append(feature)
        return tuple(features)


class _Moments:
    """Mean and standard deviation of columns, block by block (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, columns: int):
        self._count = 0
        self._squares = np.zeros(columns)  # of the differences from the mean, summed
        self.mean = np.zeros(columns)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self._squares / max(self._count, 1))

    def add(self, block: np.ndarray) -> None:
        """Adds rows, float32 [n, columns]."""
        if not len(block):
            return
        mean = block.mean(axis=0, dtype=np.float64)
        count, difference = self._count + len(block), mean - self.mean
        centred = block - mean
        self._squares += np.einsum("ij,ij->j", centred, centred)
        self._squares += difference**2 * (self._count * len(block) / count)
        self.mean = self.mean + difference * (len(block) / count)
        self._count = count


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
