"""Reading Parquet through DuckDB; see csv_reader, whose CsvFile this stands beside."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import duckdb
import pyarrow
import pyarrow.parquet

from pwiser_tf.convert.csv_reader import Kind, check_columns, literals
from pwiser_tf.errors import DataError

_MAGIC = b"PAR1"


def is_parquet(path: str | os.PathLike) -> bool:
    """Whether the file's content is Parquet, whatever its name."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class ParquetFile:
    """One Parquet file: its columns, its SQL, and the place of a fault.

    Args:
      path: the file.
      kinds: the columns that will be read, by name; which types they may have is checked when
        they are read.

    Raises:
      DataError: it is no whole Parquet file, or a wanted column is absent, or holds structs or
        maps.
      OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike, kinds: Mapping[str, Kind]):
        self.path = self.shown = pathlib.Path(path)
        self.kinds = dict(kinds)
        try:
            schema = pyarrow.parquet.read_schema(self.path)
        except pyarrow.ArrowException as error:
            detail = str(error).split("\n")[0]
            raise DataError(f"expected a whole Parquet file ({detail})", file=self.shown) from None
        self.names: Sequence[str] = schema.names
        self.types = dict(zip(schema.names, schema.types, strict=True))
        check_columns(self.kinds, self.names, ", ", self.shown, header=False)
        for name in self.kinds:
            if kind := self.nested(name):
                message = f"found the type {kind}, expected numbers, texts or lists of them"
                raise DataError(message, file=self.shown, column=name)

    @property
    def size(self) -> int:
        """The bytes of the file on disk."""
        return self.path.stat().st_size

    def is_list(self, name: str) -> bool:
        """Whether a column holds lists."""
        kind = self.types[name]
        return (
            pyarrow.types.is_list(kind)
            or pyarrow.types.is_large_list(kind)
            or pyarrow.types.is_fixed_size_list(kind)
        )

    def element(self, name: str) -> pyarrow.DataType:
        """The type of a column's values; of lists, of what is in them."""
        kind = self.types[name]
        return kind.value_type if self.is_list(name) else kind

    def nested(self, name: str) -> str | None:
        """The type, in short, of a column of structs, maps, or lists of such or of lists, which is
        not read; None of another."""
        element = self.element(name)
        if not pyarrow.types.is_nested(element):
            return None
        short = str(element).split("<")[0]
        return f"list of {short}" if self.is_list(name) else short

    def is_number(self, name: str) -> bool:
        """Whether a column holds integers or floats."""
        return self.is_integer(name) or pyarrow.types.is_floating(self.types[name])

    def is_integer(self, name: str, or_list: bool = False) -> bool:
        """Whether a column holds integers, or lists of them, that fit into 64 bits with a sign."""
        kind = self.types[name]
        if or_list and self.is_list(name):
            kind = kind.value_type
        return pyarrow.types.is_integer(kind) and not pyarrow.types.is_uint64(kind)

    def column(self, name: str) -> str:
        """What SQL calls the column of that name, in `table`."""
        return f"column_{list(self.kinds).index(name)}"

    @property
    def rows(self) -> int:
        """The number of rows."""
        return pyarrow.parquet.read_metadata(self.path).num_rows

    def table(self, more: Sequence["ParquetFile"] = ()) -> str:
        """The SQL table that reads the wanted columns of the file, and of more such files."""
        # DuckDB expands *, ? and [ in a path; a bracket expression of one character is itself.
        paths = [
            "".join(f"[{c}]" if c in "*?[" else c for c in str(file.path)) for file in (self, *more)
        ]
        columns = ", ".join(
            '"{}" AS {}'.format(name.replace('"', '""'), self.column(name)) for name in self.kinds
        )
        source = f"read_parquet({literals(paths)}, hive_partitioning=false)"
        return f"(SELECT {columns or '1 AS column_0'} FROM {source})"

    def fault(self, row: int, column: str, expected: str) -> DataError:
        """The error that the cell in `row`, counted from 0, is not what was expected."""
        line, found = self.cell(row, column)
        place = {"file": self.shown, "row": line, "column": column}
        if found is None:
            return DataError(f"found a missing value, expected {expected}", **place)
        return DataError(expected, found=found, **place)

    def cell(self, row: int, column: str) -> tuple[int, object]:
        """The number of a row, from 1, and its cell."""
        with pyarrow.parquet.ParquetFile(self.path) as file:
            before = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row < before + rows:
                    values = file.read_row_group(group, [column])[column]
                    return row + 1, values[row - before].as_py()
                before += rows
        raise IndexError(f"{self.shown} has fewer rows than were read from it")

    def find_fault(self, connection: duckdb.DuckDBPyConnection) -> DataError | None:
        """The first thing in the file that DuckDB cannot read, or None."""
        with connection.cursor() as cursor:
            try:
                # Neither count nor max, for which the statistics of the file may suffice.
                wanted = ", ".join(f"max(hash({self.column(name)}))" for name in self.kinds)
                cursor.execute(f"SELECT {wanted or 'count(*)'} FROM {self.table()}").fetchall()
            except duckdb.Error as error:
                detail = str(error).strip().split("\n")[0]
                return DataError(f"expected a whole Parquet file ({detail})", file=self.shown)
        return None
