"""Arrow batches of raw rows to the arrays that records.encode takes; refuses what is not valid."""

import dataclasses

import numpy as np
import pyarrow
import pyarrow.compute

from pwiser_tf import records
from pwiser_tf.convert import learn
from pwiser_tf.convert.csv_reader import Database
from pwiser_tf.convert.features import Feature
from pwiser_tf.convert.source import Features, Part, Source
from pwiser_tf.errors import DataError
from pwiser_tf.schema import (
    OUT_OF_VOCABULARY,
    SPLITS,
    UNKNOWN_INTEGER,
    Categorical,
    Numerical,
    missing_value,
)

_TRAIN = SPLITS.index("train")
_EXAMPLES = 3
# What is counted of a feature: rows; rows without a value; unknown values; lists that were cut;
# values (of a list, a row has several).
_ROWS, _MISSING, _UNKNOWN, _CUT, _VALUES = range(_KINDS := 5)
# A share of missing or unknown values that exceeds twice that of training by this is reported.
_ALARMING_SHARE = 0.1


class Coverage:
    """How many values of each feature were missing or unknown, and lists cut, by split.

    Attributes:
      counts: feature to int64 [splits, kinds], the kinds being _ROWS, _MISSING and so on.
      examples: (feature, split) to some unknown values.
    """

    def __init__(self):
        self.counts: dict[str, np.ndarray] = {}
        self.examples: dict[tuple[str, int], list[str]] = {}

    def add(self, name: str, kind: int, split: np.ndarray, hit: np.ndarray | None = None) -> None:
        """Counts the rows (or values) of those splits, where `hit`."""
        if hit is None or hit.any():
            chosen = split if hit is None else split[hit]
            self.add_all(name, kind, np.bincount(chosen, minlength=len(SPLITS)))

    def add_all(self, name: str, kind: int, counts: np.ndarray) -> None:
        """Adds counts, int64 [splits]."""
        if name not in self.counts:
            self.counts[name] = np.zeros((len(SPLITS), _KINDS), np.int64)
        self.counts[name][:, kind] += counts

    def shares(self) -> dict[str, dict[str, list[float]]]:
        """Feature to split to the shares of rows that are missing, of values that are unknown, and
        of rows whose list was cut."""
        shares, wholes = [_MISSING, _UNKNOWN, _CUT], [_ROWS, _VALUES, _ROWS]
        return {
            name: {
                split: (row[shares] / np.maximum(row[wholes], 1)).round(6).tolist()
                for split, row in zip(SPLITS, counts, strict=True)
                if row[_ROWS]
            }
            for name, counts in self.counts.items()
        }

    def warnings(self, training: dict[str, dict[str, list[float]]]) -> list[str]:
        """Shares that are far above those of training, which are the "train" of `training`."""
        found = []
        for name, by_split in self.shares().items():
            known = training.get(name, {}).get("train")
            for split, shares in by_split.items():
                if known is None:
                    continue
                for kind, word in enumerate(("missing", "unknown")):
                    if shares[kind] > 2 * known[kind] + _ALARMING_SHARE:
                        examples = self.examples.get((name, SPLITS.index(split)), [])
                        shown = ", ".join(map(repr, examples)) if word == "unknown" else ""
                        found.append(
                            f"{split}: {shares[kind]:.1%} of the values of {name} are {word}, in "
                            f"training {known[kind]:.1%}" + (f"; for example {shown}" * bool(shown))
                        )
        return found


class Encoder:
    """Encodes rows by the features learnt from training.

    Numbers that are written as they are ("identity") may come without statistics: these are then
    gathered on the way, since a scan of them would take a third of the whole time.

    Attributes:
      coverage: of the rows encoded so far.
    """

    def __init__(self, source: Source, features: Features):
        self._source = source
        self._features = features
        # The columns of the numerical array whose statistics the schema does not have yet.
        values = [feature for feature in features.numerical if feature.transform != "quantiles"]
        self._unmeasured = [i for i, feature in enumerate(values) if _is_unmeasured(feature)]
        self._moments = _Moments(len(self._unmeasured))
        log = source.log
        self._columns: dict[str, Feature] = {feature.name: feature for feature in log.features}
        self._segments: list[dict[str, int]] = [{} for _ in log.segments]
        self.coverage = Coverage()

    def project(self, database: Database, rows: str) -> str:
        """The SQL query whose batches `encode` takes, from one with a Part's columns and split."""
        features, log, types = self._features, self._source.log, database.types(rows)
        columns = []
        for i, feature in enumerate(features.categorical):
            column = f"categorical_{i}"
            if feature.dtype == "string":
                columns.append(f"CAST({column} AS VARCHAR) AS {column}")
            elif types[column] == "BIGINT":
                columns.append(column)
            else:
                columns.append(f"{learn.integer(column)} AS {column}")
                # So that a text that is no integer is told from a missing one.
                columns.append(f"{column} IS NULL AS missing_{i}")
        for i, feature in enumerate(features.lists):
            column = f"list_{i}"
            if feature.dtype == "string":
                column = f"CAST({column} AS VARCHAR[]) AS {column}"
            elif types[column] != "BIGINT[]":
                # No integer: unknown, whatever the vocabulary holds.
                text = f"coalesce({learn.integer('x')}, {UNKNOWN_INTEGER})"
                column = f"list_transform({column}, lambda x: {text}) AS {column}"
            columns += [column, f"list_length_{i} > {feature.max_length} AS cut_{i}"]
            if feature.weighted:
                columns.append(f"weights_{i}")
        columns += [f"numerical_{i}" for i in range(len(features.numerical))]
        columns += [f"vector_{i}" for i in range(len(features.vectors))]
        columns += ["click", "conversion", "CAST(split AS TINYINT) AS split"]
        columns += ["row_group"] if log.group else []
        columns += ["row_weight"] if log.weight else []
        columns += [f"segment_{i}" for i in range(len(log.segments))]
        return f"SELECT {', '.join(columns)} FROM ({rows})"

    def encode(
        self, batch: pyarrow.RecordBatch, part: Part, first_row: int
    ) -> tuple[records.Rows, np.ndarray]:
        """A batch to records.

        Args:
          batch: rows of `project`.
          part, first_row: where the batch comes from; its rows count from 0 in the part.

        Returns:
          The rows, and the position in schema.SPLITS of each, int8 [n]. A row with grade -1 has a
          conversion without a click, and is to be dropped.

        Raises:
          DataError: a cell that is not valid, with its place.
        """
        source, features, log = self._source, self._features, self._source.log
        size, split = batch.num_rows, batch["split"].to_numpy()
        rows_of_splits = np.bincount(split, minlength=len(SPLITS))

        def refuse_where(bad: np.ndarray, column: str, expected: str) -> None:
            if bad.any():
                raise part.fault(first_row + int(np.argmax(bad)), column, expected)

        click, conversion = (
            self._label(batch[name], column, refuse_where)
            for name, column in (("click", log.click), ("conversion", log.conversion or ""))
        )
        grade = click + conversion
        alone = conversion > click
        if log.conversion_without_click == "refuse":
            refuse_where(alone, log.conversion, "a conversion only where there is a click")
        else:
            grade[alone] = {"drop": -1, "click": 2, "exposure": 0}[log.conversion_without_click]
        group = None
        if log.group:
            refuse_where(_nulls(batch["row_group"]), log.group, "a group in every row")
            group = batch["row_group"].to_numpy(zero_copy_only=False)
        weight = None
        if log.weight:
            weight = batch["row_weight"].to_numpy(zero_copy_only=False).astype(np.float32)
            bad = ~(np.isfinite(weight) & (weight >= 0))
            refuse_where(bad, log.weight, "a weight of at least 0")
        ids = []
        for i, feature in enumerate(features.categorical):
            values = batch[f"categorical_{i}"]
            if not source.missing:
                refuse_where(_nulls(values), feature.name, "an integer")
            missing = batch[f"missing_{i}"] if f"missing_{i}" in batch.schema.names else None
            ids.append(self._ids(feature, values, split, missing))
        numbers = []
        for i, feature in enumerate(features.numerical):
            values = batch[f"numerical_{i}"].to_numpy(zero_copy_only=False)
            column = self._columns[feature.name].column
            bad = np.isinf(values) if source.missing else ~np.isfinite(values)
            refuse_where(bad, column, "a finite number")
            self.coverage.add_all(feature.name, _ROWS, rows_of_splits)
            self.coverage.add(feature.name, _MISSING, split, np.isnan(values))
            if feature.transform == "quantiles":
                ids.append(feature.buckets(values))
            else:
                numbers.append(feature.apply(values)[:, None])
        if self._unmeasured:
            measured = np.concatenate([numbers[i] for i in self._unmeasured], axis=1)
            self._moments.add(measured[(split == _TRAIN) & (grade >= 0)])
        for i, vector in enumerate(features.vectors):
            numbers.append(self._vector(vector, batch[f"vector_{i}"], refuse_where))
        lists = {
            feature.name: self._list(i, feature, batch, split, part, first_row)
            for i, feature in enumerate(features.lists)
        }
        segments = None
        if log.segments:
            segments = np.stack(
                [self._codes(i, batch[f"segment_{i}"]) for i in range(len(log.segments))], axis=1
            )
        rows = records.Rows(
            _columns(ids, size, np.int64),
            np.concatenate(numbers, axis=1) if numbers else np.empty((size, 0), np.float32),
            grade,
            group,
            weight,
            segments,
            lists,
        )
        return rows, split

    def _label(self, column: pyarrow.Array, name: str, refuse_where) -> np.ndarray:
        label = column.to_numpy(zero_copy_only=False)
        refuse_where((label != 0) & (label != 1), name, self._source.expected_label)
        return label.astype(np.int64)

    def _ids(self, feature: Categorical, values: pyarrow.Array, split, missing) -> np.ndarray:
        """The ids of a column, which are counted: int64 [n]."""
        absent = _nulls(values) if missing is None else _bools(missing)
        filled = pyarrow.compute.fill_null(values, missing_value(feature.dtype))
        found = _looked_up(feature, filled)
        unknown = (found == OUT_OF_VOCABULARY) & ~absent
        self.coverage.add(feature.name, _ROWS, split)
        self.coverage.add(feature.name, _MISSING, split, absent)
        self._count(feature.name, filled, split, unknown)
        return found

    def _count(self, name: str, values, split, unknown) -> None:
        coverage = self.coverage
        coverage.add(name, _VALUES, split)
        coverage.add(name, _UNKNOWN, split, unknown)
        for position in np.unique(split[unknown]).tolist():
            examples = coverage.examples.setdefault((name, position), [])
            if len(examples) < _EXAMPLES:
                rows = np.flatnonzero(unknown & (split == position))
                for value in values.take(pyarrow.array(rows)).unique().to_pylist():
                    no_integer = value in (missing_value("int64"), UNKNOWN_INTEGER)
                    text = "(no integer)" if no_integer else str(value)
                    if text not in examples and len(examples) < _EXAMPLES:
                        examples.append(text)

    def _list(self, i: int, feature, batch, split, part: Part, first_row: int) -> records.Lists:
        column = batch[f"list_{i}"]
        lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
        lengths = lengths.astype(np.int64)
        values = column.flatten()
        ids = _looked_up(feature, values)
        of_values = np.repeat(split, lengths)
        self._count(feature.name, values, of_values, ids == OUT_OF_VOCABULARY)
        self.coverage.add(feature.name, _ROWS, split)
        self.coverage.add(feature.name, _MISSING, split, lengths == 0)
        self.coverage.add(feature.name, _CUT, split, _bools(batch[f"cut_{i}"]))
        weights = None
        if feature.weighted:
            weights = batch[f"weights_{i}"].flatten().to_numpy(zero_copy_only=False)
            weights = weights.astype(np.float32)
            bad = ~(np.isfinite(weights) & (weights >= 0))
            if bad.any():
                row = int(np.searchsorted(np.cumsum(lengths), int(np.argmax(bad)), side="right"))
                named = self._columns[feature.name]
                column = named.weights or named.column
                expected = "weights that are numbers of at least 0, one for each value"
                raise part.fault(first_row + row, column, expected)
        return records.Lists(ids, lengths, weights)

    def _vector(self, vector, column: pyarrow.Array, refuse_where) -> np.ndarray:
        lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0)
        lengths = lengths.to_numpy(zero_copy_only=False)
        name = self._columns[vector.name].column
        wrong = (lengths != vector.length) & (lengths != 0)
        refuse_where(wrong, name, f"{vector.length} numbers")
        values = np.full((len(column), vector.length), np.nan, np.float32)
        flat = column.flatten().to_numpy(zero_copy_only=False)
        values[lengths > 0] = flat.reshape(-1, vector.length)
        refuse_where(np.isinf(values).any(axis=1), name, "finite numbers")
        return vector.apply(values)

    def _codes(self, i: int, column: pyarrow.Array) -> np.ndarray:
        """Positions of a segment's values among those seen so far: int64 [n]."""
        known = self._segments[i]
        encoded = pyarrow.compute.fill_null(column, "").dictionary_encode()
        codes = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
        if len(known) > records.MAX_ID:
            raise DataError(f"segment {self._source.log.segments[i]} has too many values")
        return np.array(codes, np.int64)[encoded.indices.to_numpy()]

    def segments(self) -> dict[str, tuple[str, ...]]:
        """The values of each segment column seen so far."""
        names = self._source.log.segments
        return {name: tuple(known) for name, known in zip(names, self._segments, strict=True)}

    def numerical(self) -> tuple[Numerical, ...]:
        """The numerical features, with the statistics of the training rows encoded so far."""
        moments, place, features = self._moments, 0, []
        for feature in self._features.numerical:
            if _is_unmeasured(feature):
                mean, std = learn.settled(float(moments.mean[place]), float(moments.std[place]))
                low, high = float(moments.low[place]), float(moments.high[place])
                statistics = {"mean": mean, "std": std, "low": low, "high": high}
                feature = dataclasses.replace(feature, fill_value=mean, **statistics)
                place += 1
            features.append(feature)
        return tuple(features)


def _is_unmeasured(feature: Numerical) -> bool:
    return feature.transform == "identity" and np.isnan(feature.low)


class _Moments:
    """Mean, deviation and range of columns, block by block (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, columns: int):
        self._count = 0
        self._squares = np.zeros(columns)  # of the differences from the mean, summed
        self.mean = np.zeros(columns)
        self.low, self.high = np.zeros(columns), np.zeros(columns)

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
        self.mean += difference * (len(block) / count)
        low, high = block.min(axis=0), block.max(axis=0)
        if self._count:
            low, high = np.minimum(low, self.low), np.maximum(high, self.high)
        self.low, self.high, self._count = low, high, count


def _columns(arrays: list[np.ndarray], rows: int, dtype) -> np.ndarray:
    return np.stack(arrays, axis=1) if arrays else np.empty((rows, 0), dtype)


def _nulls(column: pyarrow.Array) -> np.ndarray:
    """Where a column is NULL, bool [n]."""
    if column.null_count == 0:
        return np.zeros(len(column), bool)
    return column.is_null().to_numpy(zero_copy_only=False)


def _bools(column: pyarrow.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(bool)


def _looked_up(feature: Categorical, column: pyarrow.Array) -> np.ndarray:
    """The ids of a column without NULLs, int64 [n]; each distinct value is looked up once."""
    if feature.dtype == "int64" and not feature.hash_buckets:
        values = column.to_numpy(zero_copy_only=False)
        return feature.ids(values.astype(np.int64, copy=False))
    encoded = column.dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    kind = np.int64 if feature.dtype == "int64" else object
    ids = feature.ids(np.array(distinct, kind))
    return ids[encoded.indices.to_numpy()]
