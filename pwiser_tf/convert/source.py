"""What a format must give: its features, its labels, and its rows as SQL. See `Source`.

A format is one file that makes a Source (aliccp.py, aliexpress.py, columns.py); nothing else knows
formats.
"""

import dataclasses
import glob
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

from pwiser_tf.convert.csv_reader import CsvFile, Database
from pwiser_tf.convert.features import Log
from pwiser_tf.convert.parquet_reader import ParquetFile
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Categorical, IdList, Numerical, Vector

# Up to here an integer read as DOUBLE is exact.
_EXACT = 2**53


class Part(Protocol):
    """A piece of a split: rows in a fixed order, and the way back from a row to its file."""

    @property
    def name(self) -> str:
        """Its file, for messages."""

    @property
    def size(self) -> int:
        """Its bytes, for progress bars."""

    def relation(self) -> str:
        """An SQL query with these columns, whose rows come in the order of the files:

        categorical_0, ...   BIGINT or VARCHAR, NULL where missing
        list_0, ...          BIGINT[] or VARCHAR[] without missing values, cut to its max_length
        list_length_0, ...   BIGINT, its length before the cut
        weights_0, ...       FLOAT[] beside list_0, where it has weights
        numerical_0, ...     FLOAT, NULL where missing
        vector_0, ...        FLOAT[], empty where missing
        click, conversion    numbers; the pipeline checks that they are 0 or 1
        row_group            BIGINT, where the log has a group
        moment               VARCHAR, where the log has a time
        row_weight           FLOAT, where the log has a weight
        segment_0, ...       VARCHAR, NULL where missing
        """

    def fault(self, row: int, column: str, expected: str) -> DataError:
        """The error that a cell is not what was expected; `row` counts from 0."""


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a schema, as learnt from training rows."""

    categorical: tuple[Categorical, ...]
    numerical: tuple[Numerical, ...]
    lists: tuple[IdList, ...] = ()
    vectors: tuple[Vector, ...] = ()


# (database, SQL query of the kept training rows, log) to the features, as learnt from those rows.
Learn = Callable[[Database, str, Log], Features]


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set before conversion.

    Attributes:
      dataset: the format's name.
      log: its features, labels and other columns.
      train, validation, test: the parts; the last two are empty where they are to be cut from
        `train`.
      learn: learns vocabularies and statistics from the training rows.
      missing: whether a feature may be missing; if not, an empty cell is an error.
      expected_label: what a message calls a right label.
      source: for the schema's: what reads more such data.
      notes: for the schema's notes.
    """

    dataset: str
    log: Log
    train: tuple[Part, ...]
    validation: tuple[Part, ...]
    test: tuple[Part, ...]
    learn: Learn
    missing: bool
    expected_label: str = "0 or 1"
    source: dict = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, those to learn from first."""
        return (*self.train, *self.validation, *self.test)


@dataclasses.dataclass(frozen=True)
class FilePart:
    """A part that is one CSV file; `expressions` maps a relation's columns to SQL."""

    file: CsvFile
    expressions: dict[str, str]

    @property
    def name(self) -> str:
        return str(self.file.shown)

    @property
    def size(self) -> int:
        return self.file.size

    def relation(self) -> str:
        return select(self.expressions, self.file.table())

    def fault(self, row: int, column: str, expected: str) -> DataError:
        return self.file.fault(row, column, expected)


@dataclasses.dataclass(frozen=True)
class ParquetPart:
    """A part that is one or several Parquet files with the same types; one query reads them."""

    files: tuple[ParquetFile, ...]
    expressions: dict[str, str]

    @property
    def name(self) -> str:
        return str(self.files[0].shown)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def relation(self) -> str:
        first, *more = self.files
        return select(self.expressions, first.table(more))

    def fault(self, row: int, column: str, expected: str) -> DataError:
        for file in self.files:
            if row < file.rows:
                break
            row -= file.rows
        return file.fault(row, column, expected)


@dataclasses.dataclass(frozen=True)
class JoinedPart:
    """A part that is a table of two joined files; `keys` are its columns that only say which rows.

    A format adds `fault`: it knows which file a column came from.
    """

    table: str
    files: tuple[CsvFile, CsvFile]
    keys: str

    @property
    def name(self) -> str:
        return " joined with ".join(str(file.shown) for file in self.files)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def relation(self) -> str:
        return f"SELECT * EXCLUDE ({self.keys}) FROM {self.table}"


def select(expressions: dict[str, str], table: str) -> str:
    """SELECT expression AS name, ... FROM table."""
    return (
        f"SELECT {', '.join(f'{sql} AS {name}' for name, sql in expressions.items())} FROM {table}"
    )


def paths(patterns: Sequence[str]) -> list[str]:
    """Each pattern's files in order; a path that exists is taken as it is, whatever its name. Of a
    folder: all files in it and below, but those with names that begin with "." or "_"."""
    found = []
    for pattern in patterns:
        files = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
        files = [
            file for path in files for file in (_below(path) if os.path.isdir(path) else [path])
        ]
        if not files:
            raise DataError("no such file", file=pattern)
        found += files
    return found


def _below(folder: str) -> list[str]:
    files = (path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file())
    return [str(p) for p in files if not any(q[0] in "._" for q in p.relative_to(folder).parts)]


def integer(column: str) -> str:
    """SQL: an INTEGER column as BIGINT, NULL where it is no integer."""
    return (
        f"CASE WHEN {column} = trunc({column}) AND abs({column}) < {_EXACT} "
        f"THEN CAST({column} AS BIGINT) END"
    )


def group_key(text: str) -> str:
    """SQL: a group's text to an integer in 0..2^63 - 1, the same in every split and run.

    A number in that range that is written plainly is kept, anything else is hashed (MD5, because
    DuckDB's own hash may change with its version).
    """
    number = f"TRY_CAST({text} AS BIGINT)"
    return (
        f"CASE WHEN {number} >= 0 AND CAST({number} AS VARCHAR) = {text} THEN {number} "
        f"ELSE CAST(md5_number_lower({text}) >> 1 AS BIGINT) END"
    )
