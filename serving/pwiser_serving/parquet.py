"""Parquet: candidates from such a file, and scored rows to one. Only this module needs pyarrow."""

import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pwiser_serving import features, rules
from pwiser_serving.candidates import BaseFile, CandidateError, read_features, require_columns
from pwiser_serving.protos import tensor_pb2

# Of the output. Enough for a fast reader, few enough for the memory.
_ROWS_PER_GROUP = 2**17


class Batch:
    """Some rows of the file, from row `first`, which counts from 1."""

    def __init__(self, path: pathlib.Path, first: int, table: pa.Table, dialect: rules.Dialect):
        self._path, self._first, self._table, self._dialect = path, first, table, dialect

    @property
    def rows(self) -> Sequence[int]:
        """The number of each row."""
        return range(self._first, self._first + len(self._table))

    def column(self, name: str) -> pa.ChunkedArray:
        """A column as it is in the file."""
        return _plain(self._table[name])

    def features(self, inputs: Mapping[str, tensor_pb2.TensorInfo]) -> dict[str, np.ndarray]:
        """What the model takes, by name. CandidateError: a column or value of another type."""
        return read_features(self._cells, inputs, self._dialect, self._path, self.rows)

    def _cells(self, name: str, data_type: int) -> rules.Cells | None:
        if name not in self._table.column_names:
            return None
        column = self.column(name)
        try:
            if not any(test(column.type) for test in _LISTS):
                return _values(column, data_type)
            column = column.combine_chunks()
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            values = _plain(pa.chunked_array([column.flatten()]))
            return features.Ragged(_values(values, data_type), lengths.astype(np.int64))
        except pa.ArrowException:
            raise CandidateError(
                f"found the type {column.type}, expected numbers, text or lists of them",
                file=self._path,
                column=name,
            ) from None


class CandidateFile(BaseFile):
    """A Parquet file. CandidateError: no such file, or not in Parquet."""

    def __init__(self, path: pathlib.Path, dialect: rules.Dialect):
        self.path, self.dialect = path, dialect
        try:
            # Opened first: the system's error is shorter than Arrow's.
            with open(path, "rb"):
                self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from None
        self._schema = self._file.schema_arrow
        self._needed: set[str] = set()
        self.total = self._file.metadata.num_rows

    def require(self, names: Sequence[str], reason: str) -> None:
        """CandidateError if a column is missing or twice there; other columns are not read."""
        require_columns(self.path, None, self._schema.names, names, reason)
        self._needed.update(names)

    def use(self, name: str) -> None:
        """Reads this column too, if there is one."""
        self._needed.update({name} & set(self._schema.names))

    def no_rows(self) -> Batch:
        """A batch without rows."""
        return Batch(self.path, 1, self._schema.empty_table(), self.dialect)

    def batches(self, rows: int, *, skip: int = 0) -> Iterator[Batch]:
        """The rows after the first `skip`, in batches of at most `rows`."""
        metadata = self._file.metadata
        sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        groups = [n for n, end in enumerate(ends) if end > skip]
        if not groups:
            return
        try:
            read = self._file.iter_batches(
                batch_size=rows, row_groups=groups, columns=sorted(self._needed)
            )
            tables = (pa.Table.from_batches([batch]) for batch in read)
            # The first group that is read may hold rows to skip.
            first = ends[groups[0]] - sizes[groups[0]]
            for table in _regroup(tables, rows, skip=skip - first):
                yield Batch(self.path, skip + 1, table, self.dialect)
                skip += len(table)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(self.path, error) from None


def write(path: pathlib.Path, batches: Sequence[Mapping[str, Sequence]]) -> None:
    """Writes batches of columns (Arrow's, texts, NumPy arrays) as one Parquet file."""
    tables = [
        pa.table({name: _arrow(column) for name, column in columns.items()}) for columns in batches
    ]
    pq.write_table(pa.concat_tables(tables), path)


def join(parts: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Joins Parquet files with the same columns, with one at a time in memory."""
    with pq.ParquetWriter(path, pq.read_schema(parts[0])) as writer:
        for table in _regroup(map(_whole, parts), _ROWS_PER_GROUP):
            writer.write_table(table.combine_chunks())


def _whole(path: pathlib.Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read()


def _regroup(tables: Iterator[pa.Table], rows: int, *, skip: int = 0) -> Iterator[pa.Table]:
    """The tables' rows after the first `skip`, `rows` in each but the last.

    So a resumed command gives the same bytes as one that was not interrupted: the last digit of a
    score may depend on the other rows of its batch.
    """
    waiting: list[pa.Table] = []
    for table in tables:
        rest = table.slice(min(skip, len(table)))
        skip -= len(table) - len(rest)
        waiting.append(rest)
        if sum(map(len, waiting)) < rows:
            continue
        together = pa.concat_tables(waiting)
        while len(together) >= rows:
            yield together.slice(0, rows)
            together = together.slice(rows)
        waiting = [together]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _arrow(column: Sequence) -> pa.ChunkedArray | pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return column
    return pa.array(column, None if isinstance(column, np.ndarray) else pa.string())


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without a dictionary, which may differ from batch to batch."""
    kind = column.type
    return column.cast(kind.value_type) if pa.types.is_dictionary(kind) else column


def _values(column: pa.ChunkedArray, data_type: int) -> np.ndarray | list[str | None]:
    """A column's values where it has numbers and the model takes some, otherwise its texts, as the
    converter reads them.

    Raises:
      pa.ArrowException: a type that is neither number nor text.
    """
    kind = column.type
    whole, floating = pa.types.is_integer(kind), pa.types.is_floating(kind)
    if data_type == tensor_pb2.DT_INT64 and whole and not pa.types.is_uint64(kind):
        return column.cast(pa.int64()).fill_null(features.MISSING_INTEGER).to_numpy()
    if data_type == tensor_pb2.DT_FLOAT and (whole or floating):
        # Without NULLs an integer becomes a float32 in one step.
        plain = whole and not column.null_count
        return (column if plain else column.cast(pa.float64(), safe=False)).to_numpy()
    if floating:
        # As 18.0, not 18. A short float has the fewest digits that tell it from other short ones.
        array = column.to_numpy()
        if kind != pa.float64():
            array = array.astype(np.float32).astype(str).astype(np.float64)
        return array.astype(str).tolist()
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        return _times(column)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column.cast(pa.binary()).cast(pa.string()).to_pylist()
    return column.cast(pa.string()).to_pylist()


def _times(column: pa.ChunkedArray) -> list[str | None]:
    """Texts of times, in UTC if they have an offset, and without zeros behind the last digit."""
    zone = getattr(column.type, "tz", None)
    if zone:
        column = pc.local_timestamp(column.cast(pa.timestamp(column.type.unit, "UTC")))
    text = pc.replace_substring_regex(column.cast(pa.string()), r"(\.[0-9]*?)0+$", r"\1")
    text = pc.replace_substring_regex(text, r"\.$", "")
    return (pc.binary_join_element_wise(text, "+00", "") if zone else text).to_pylist()


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _unreadable(path: pathlib.Path, error: Exception) -> CandidateError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CandidateError(reason or "not a Parquet file", file=path)
