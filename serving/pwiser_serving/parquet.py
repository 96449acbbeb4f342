"""Parquet: candidates from such a file, and scored rows to one. Only this module needs pyarrow."""

import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pwiser_serving import features
from pwiser_serving.candidates import BaseFile, CandidateError, require_columns
from pwiser_serving.errors import FeatureError
from pwiser_serving.protos import tensor_pb2

# Of the output. Enough for a fast reader, few enough for the memory.
_ROWS_PER_GROUP = 2**17


class Batch:
    """Some rows of the file, from row `first`, which counts from 1."""

    def __init__(self, path: pathlib.Path, first: int, table: pa.Table):
        self._path, self._first, self._table = path, first, table

    @property
    def rows(self) -> Sequence[int]:
        """The number of each row."""
        return range(self._first, self._first + len(self._table))

    def column(self, name: str) -> pa.ChunkedArray:
        """A column as it is in the file."""
        return _plain(self._table[name])

    def features(self, inputs: Mapping[str, tensor_pb2.TensorInfo]) -> dict[str, np.ndarray]:
        """What the model takes, by name. CandidateError: a column or value of another type."""
        return {name: self._values(name, info) for name, info in inputs.items()}

    def _values(self, name: str, info: tensor_pb2.TensorInfo) -> np.ndarray:
        column = self.column(name)
        try:
            values, _ = features.to_arrays({name: _numpy(column, info.dtype)}, {name: info})
        except FeatureError as error:
            row = found = None
            if error.row is not None:
                row, found = self._first + error.row, column[error.row].as_py()
            raise CandidateError(
                error.expected, file=self._path, row=row, column=name, found=found
            ) from None
        except pa.ArrowException:
            raise CandidateError(
                f"found the type {column.type}, expected numbers or text",
                file=self._path,
                column=name,
            ) from None
        values = values[name]
        if values.dtype.kind == "f" and np.isinf(values).any():
            row = int(np.argmax(np.isinf(values)))
            raise CandidateError(
                "a finite number",
                file=self._path,
                row=self._first + row,
                column=name,
                found=column[row].as_py(),
            )
        return values


class CandidateFile(BaseFile):
    """A Parquet file. CandidateError: no such file, or not in Parquet."""

    def __init__(self, path: pathlib.Path):
        self.path = path
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

    def no_rows(self) -> Batch:
        """A batch without rows."""
        return Batch(self.path, 1, self._schema.empty_table())

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
                yield Batch(self.path, skip + 1, table)
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


def _numpy(column: pa.ChunkedArray, data_type: int) -> np.ndarray:
    """A column as `features` takes it: numbers, or objects; missing values as in `features`.

    Raises:
      pa.ArrowException: a type that is neither number nor text.
    """
    kind = column.type
    if pa.types.is_boolean(kind):
        column, kind = column.cast(pa.uint8()), pa.uint8()
    if pa.types.is_integer(kind):
        if not column.null_count:
            return column.to_numpy()
        if data_type == tensor_pb2.DT_FLOAT:
            return column.cast(pa.float64(), safe=False).to_numpy()
        if not pa.types.is_uint64(kind):
            return column.cast(pa.int64()).fill_null(features.MISSING_INTEGER).to_numpy()
    elif pa.types.is_floating(kind):
        return column.cast(pa.float64()).to_numpy()
    elif any(test(kind) for test in _TEXTS):
        return column.cast(pa.binary()).fill_null(features.MISSING_STRING).to_numpy()
    elif not (pa.types.is_null(kind) or pa.types.is_decimal(kind)):
        raise pa.ArrowTypeError(f"no feature is a {kind}")
    return np.array(column.to_pylist(), object)


_TEXTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
)


def _unreadable(path: pathlib.Path, error: Exception) -> CandidateError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CandidateError(reason or "not a Parquet file", file=path)
