"""Reading CSV through DuckDB, and saying in one line what is wrong with a file.

DuckDB streams, types and parallelises; this module decides how files are named to it and turns its
errors into ours. Inside SQL a column is `column_<position>`: its real name, however odd, never
becomes part of a query.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import errno
import gzip
import io
import math
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import duckdb
import pyarrow
import tqdm

from pwiser_tf.errors import DataError

# What DuckDB's buffers may hold, in MB (--memory_mb). What it and Python hold besides brings the
# process to 300 MB for processed files, and to 450 MB for a join of raw files that spills.
MEMORY_MB = 200
# A wider file needs more: each thread holds a block of rows of all columns.
_NARROW, _MB_A_COLUMN = 300, 0.75
# Larger buffers are not faster, and each thread holds a few.
BUFFER_BYTES = 8_000_000
# A batch's arrays should fit into the processor's cache.
BATCH_ROWS = 8192
# So that DuckDB works on while a batch is encoded.
STREAMING_BYTES = 20_000_000
# Enough rejected rows to find the first one although several threads report them.
REJECTED_ROWS = 1000

# What a file that is no CSV begins with.
_NOT_CSV = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip or Excel file",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"BZh": "a bzip2 file (gzip and zstd can be read)",
}
_LINE_ENDINGS = {b"\r\n": "CRLF", b"\r": "CR alone", b"\n": "LF"}

# A cell that DuckDB reads must not be too long for the module that names its place.
csv.field_size_limit(sys.maxsize)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a column's cells are: the SQL type they are read as, and what a message calls them."""

    sql: str
    expected: str


TEXT = Kind("VARCHAR", "text")
# DOUBLE, because SQL's integers silently round 1.5; whoever reads the column checks.
INTEGER = Kind("DOUBLE", "an integer")
NUMBER = Kind("FLOAT", "a number")
LABEL = Kind("FLOAT", "0 or 1")


class CsvFile:
    """One CSV file (UTF-8, plain, gzip or zstd): its columns, its SQL, and the place of a fault.

    Args:
      path: the file; its content, not its name, tells how it is compressed.
      kinds: the columns that will be read, by name. Others are ignored.
      delimiter: one character.
      names: the names of all columns, for a file without a header.
      quote: the character around a cell that holds a delimiter; "": there is none.
      missing: the texts that stand for a missing value.
      shown: what messages call the file, where its path tells a user nothing.

    Raises:
      DataError: the file is empty or not UTF-8 text, or a wanted column is absent or twice there.
      OSError: the file cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        kinds: Mapping[str, Kind],
        *,
        delimiter: str = ",",
        names: Sequence[str] | None = None,
        quote: str = '"',
        missing: Sequence[str] = ("",),
        shown: str | os.PathLike | None = None,
    ):
        self.path = pathlib.Path(path)
        self.shown = shown or self.path
        self.kinds = dict(kinds)
        self.delimiter = delimiter
        self.quote = quote
        self.missing = tuple(missing)
        self.has_header = names is None
        self._compression = _compression(self.path)
        self._mixed_endings = False
        first = self._first_record()
        self.names = first if names is None else list(names)
        if names is not None and len(first) != len(names):
            raise DataError(
                f"found {len(first)} columns, expected {len(names)}", file=self.shown, row=1
            )
        check_columns(self.kinds, self.names, self.delimiter, self.shown)
        self._position = {name: self.names.index(name) for name in self.kinds}

    @property
    def size(self) -> int:
        """The bytes of the file on disk."""
        return self.path.stat().st_size

    def column(self, name: str) -> str:
        """What SQL calls the column of that name."""
        return f"column_{self._position[name]}"

    def table(self, extra: str = "") -> str:
        """The SQL table function that reads the file, with `column(name)` for each wanted name."""
        kind_at = {position: self.kinds[name] for name, position in self._position.items()}
        columns = ", ".join(
            f"'column_{position}': '{kind_at.get(position, TEXT).sql}'"
            for position in range(len(self.names))
        )
        # DuckDB expands *, ? and [ in a path; a bracket expression of one character is itself.
        path = "".join(f"[{c}]" if c in "*?[" else c for c in str(self.path))
        return (
            f"read_csv({literal(path)}, columns={{{columns}}}, auto_detect=false, "
            f"header={str(self.has_header).lower()}, delim={literal(self.delimiter)}, "
            f"quote={literal(self.quote)}, escape={literal(self.quote)}, "
            f"nullstr={literals(self.missing)}, compression={literal(self._compression)}, "
            f"strict_mode={str(not self._mixed_endings).lower()}, "
            f"buffer_size={BUFFER_BYTES}{extra})"
        )

    def fault(self, row: int, column: str, expected: str) -> DataError:
        """The error that the cell is not what was expected.

        Args:
          row: which record, counted from 0 without the header.
          column: the column's name.
          expected: what the cell should have held.
        """
        line, found = self.cell(row, column)
        place = {"file": self.shown, "row": line, "column": column}
        if not found:
            return DataError(f"found an empty cell, expected {expected}", **place)
        return DataError(expected, found=found, **place)

    def cell(self, row: int, column: str) -> tuple[int, str]:
        """The line at which a record starts, and its cell; arguments as `fault`."""
        line, record = self._record(row)
        return line, record[self._position[column]]

    def find_fault(self, connection: duckdb.DuckDBPyConnection) -> DataError | None:
        """The first thing in the file that DuckDB cannot read, or None."""
        wanted = ", ".join(f"max({self.column(name)})" for name in self.kinds)
        # A connection of its own: the tables of rejected rows are named, and temporary.
        with connection.cursor() as cursor:
            try:
                table = self.table(f", store_rejects=true, rejects_limit={REJECTED_ROWS}")
                cursor.execute(f"SELECT {wanted} FROM {table}").fetchall()
                rejected = cursor.execute(
                    "SELECT line, line_byte_position, column_idx, CAST(error_type AS VARCHAR), "
                    "csv_line, error_message FROM reject_errors ORDER BY line_byte_position"
                ).fetchone()
            except duckdb.Error as error:
                return self._mixed_line_endings() or _first_line(error, self.shown)
        return self._rejected(*rejected) if rejected else None

    def _rejected(self, line, start, number, kind, text, message) -> DataError:
        """One row of DuckDB's table of rejected rows, as our error."""
        line, undecodable = self._line_at(start - 1, line)
        place = {"file": self.shown, "row": line}
        if undecodable or kind == "INVALID ENCODING":
            return DataError("UTF-8 text", found=undecodable or text, **place)
        records = list(self._reader(io.StringIO(text.lstrip("\r\n"))))
        record = records[0] if records else []
        if kind in ("MISSING COLUMNS", "TOO MANY COLUMNS"):
            found = len(record)
            return DataError(f"found {found} columns, expected {len(self.names)}", **place)
        position = (number or 1) - 1
        place["column"] = self.names[position] if position < len(self.names) else number
        if kind == "CAST":
            found = record[position] if position < len(record) else text
            expected = self.kinds.get(self.names[position], TEXT).expected
            return DataError(expected, found=found, **place)
        if kind == "UNQUOTED VALUE":
            return DataError("a closing quote at the end of the cell", found=text, **place)
        return DataError("a row that can be read: " + message, found=text, **place)

    def _line_at(self, start: int, line: int) -> tuple[int, bytes | None]:
        """The line that holds the byte at that offset, and what in it is not UTF-8, if anything.

        Args:
          start: the offset of a record.
          line: its number counted in records, right for files whose lines end in CR alone.
        """
        count, left = 0, start
        with self._open() as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                count += block.count(b"\n")
                left -= len(block)
            text = file.readline()
            # Where lines end in CRLF, DuckDB's offset is that of the LF before the record.
            while text and not text.strip(b"\r\n"):
                count += text.count(b"\n")
                text = file.readline()
        try:
            text.decode()
            undecodable = None
        except UnicodeDecodeError as error:
            undecodable = text[max(error.start - 8, 0) : error.end + 8]
        return (count + 1 if count else line), undecodable

    def _record(self, row: int) -> tuple[int, list[str]]:
        """The line at which record `row` starts, and its cells."""
        with self._open() as file:
            text = io.TextIOWrapper(file, "utf-8-sig", "replace", newline="")
            reader = self._reader(text)
            row += self.has_header
            start = 1
            for record in reader:
                # Blank lines are no records, here as in DuckDB.
                if record and row == 0:
                    return start, record
                row -= bool(record)
                start = reader.line_num + 1
        raise IndexError(f"{self.shown} has fewer records than were read from it")

    def _first_record(self) -> list[str]:
        with self._open() as file:
            start = file.read(1 << 16)
        if not start.removeprefix(b"\xef\xbb\xbf").strip():
            raise DataError("found an empty file, expected CSV", file=self.shown)
        for magic, kind in _NOT_CSV.items():
            if start.startswith(magic):
                raise DataError(f"found {kind}, expected CSV", file=self.shown)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
            raise DataError("found UTF-16 or binary data, expected UTF-8 text", file=self.shown)
        first_line = start.removeprefix(b"\xef\xbb\xbf").split(b"\n")[0].strip()
        if self.has_header and not first_line:
            raise DataError(
                "found an empty line before the header: delete it", file=self.shown, row=1
            )
        if self.has_header and first_line.lower().startswith(b"sep="):
            raise DataError(
                f"found the line {first_line.decode(errors='replace')!r}, which a spreadsheet "
                "wrote before the header: delete it",
                file=self.shown,
                row=1,
            )
        # What a quoted cell holds ends no line.
        endings = set(re.findall(rb"\r\n|\n", re.sub(rb'"[^"]*"', b"", start)))
        # DuckDB reads both in one file only where it is less strict about quotes.
        self._mixed_endings = len(endings) > 1
        if self._mixed_endings:
            self._check_quotes()
        try:
            with self._open() as file:
                # Decoding goes ahead of the first record: what follows is DuckDB's to check.
                text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
                record = next(r for r in self._reader(text) if r)
            "".join(record).encode()
        except UnicodeEncodeError:
            found = self.delimiter.join(record).encode("utf-8", "surrogateescape")
            raise DataError("UTF-8 text", file=self.shown, row=1, found=found) from None
        except csv.Error as error:
            raise DataError(f"expected a CSV file ({error})", file=self.shown, row=1) from None
        return record

    def _check_quotes(self) -> None:
        """DataError where a quoted cell goes on behind its closing quote, or has none."""
        with self._open() as file:
            text = io.TextIOWrapper(file, "utf-8-sig", "replace", newline="")
            reader = self._reader(text, strict=True)
            try:
                for _ in reader:
                    pass
            except csv.Error as error:
                raise DataError(
                    f"a closing quote at the end of the cell ({error})",
                    file=self.shown,
                    row=reader.line_num,
                ) from None

    def _mixed_line_endings(self) -> DataError | None:
        first, quoted = None, False
        with self._open() as file:
            for number, line in enumerate(file, 1):
                # What a quoted cell holds ends no line.
                parts = line.split(b'"')
                outside = parts[quoted::2]
                quoted ^= len(parts) % 2 == 0
                for ending in re.findall(rb"\r\n|\r|\n", b"".join(outside)):
                    first = first or ending
                    if ending != first:
                        found, expected = _LINE_ENDINGS[ending], _LINE_ENDINGS[first]
                        return DataError(
                            f"found a line ending in {found}, expected {expected} as in line 1",
                            file=self.shown,
                            row=number,
                        )
        return None

    @contextlib.contextmanager
    def _open(self) -> Iterator[io.BufferedIOBase]:
        with contextlib.ExitStack() as stack:
            if self._compression == "gzip":
                file = stack.enter_context(gzip.open(self.path, "rb"))
            elif self._compression == "zstd":
                raw = stack.enter_context(pyarrow.input_stream(str(self.path), "zstd"))
                file = stack.enter_context(io.BufferedReader(raw))
            else:
                file = stack.enter_context(open(self.path, "rb"))
            try:
                yield file
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"expected a whole gzip file ({error})", file=self.shown) from None
            except OSError as error:
                if self._compression != "zstd" or error.errno:
                    raise
                raise DataError(f"expected a whole zstd file ({error})", file=self.shown) from None

    def _reader(self, text: Iterable[str], strict: bool = False):
        """Python's reader of the same dialect."""
        if not self.quote:
            return csv.reader(text, delimiter=self.delimiter, quoting=csv.QUOTE_NONE)
        return csv.reader(text, delimiter=self.delimiter, quotechar=self.quote, strict=strict)


def check_columns(
    wanted: Iterable[str], names: Sequence[str], delimiter: str, file, *, header: bool = True
) -> None:
    """DataError where a wanted column is absent, or twice among the names, which are a header."""
    for name in wanted:
        if (count := names.count(name)) == 1:
            continue
        shown = delimiter.join(names)
        shown = shown if len(shown) <= 200 else shown[:197] + "..."
        found = "no such column" if count == 0 else f"{count} columns of that name"
        similar = [repr(other) for other in names if other.strip() == name.strip()]
        if count == 0 and similar:
            found += f" (but {similar[0]}: blanks count)"
        if not header:
            message = f"the file has {found}; found: {shown}"
            raise DataError(message, file=file, column=name)
        raise DataError(
            f"found {found}, expected one in the header, which is: {shown}",
            file=file,
            row=1,
            column=name,
        )


def _compression(path: pathlib.Path) -> str:
    """DuckDB's name for how a file is compressed, from its first bytes."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if start == b"\x28\xb5\x2f\xfd" else "none"


class Database:
    """A DuckDB database in a folder of its own, where it also spills what memory cannot hold.

    Use as a context manager. `files` are the files its queries read: when a query fails they are
    searched for the fault. `warnings` are what was found odd.
    """

    def __init__(self, folder: str | os.PathLike, memory_mb: int | None = None):
        folder = pathlib.Path(folder)
        self._is_given, self._memory_mb = memory_mb is not None, memory_mb or MEMORY_MB
        if "?" in str(folder):
            raise DataError(
                "expected an output path without '?', which DuckDB cannot open", file=folder
            )
        self.files: list[CsvFile] = []
        self.warnings: list[str] = []
        self._connection = duckdb.connect(
            str(folder / "rows.duckdb"),
            config={
                "memory_limit": f"{self._memory_mb}MB",
                "temp_directory": str(folder / "spill"),
                "threads": min(os.cpu_count() or 1, 4),
            },
        )
        # A time without an offset is taken as UTC, wherever the machine stands.
        self._connection.execute("SET GLOBAL TimeZone = 'UTC'")

    def expect_columns(self, columns: int) -> None:
        """Raises the memory limit for wide files, unless a limit was given."""
        if columns > _NARROW and not self._is_given:
            self._memory_mb = MEMORY_MB + math.ceil((columns - _NARROW) * _MB_A_COLUMN)
            self._connection.execute(f"SET memory_limit = '{self._memory_mb}MB'")

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()

    def query(self, sql: str, label: str) -> list[tuple]:
        """Runs a query to its end, with a progress bar of that label; returns its rows."""
        # In a thread of its own: DuckDB does not hear SIGTERM while it works, this thread does.
        with self._cursor() as cursor, concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(lambda: cursor.execute(sql).fetchall())
            try:
                with _progress(label, 100, "%") as bar:
                    while not future.done():
                        concurrent.futures.wait([future], timeout=0.1)
                        bar.update(max(0.0, round(cursor.query_progress()) - bar.n))
                return future.result()
            except BaseException:
                cursor.interrupt()
                raise

    def types(self, sql: str) -> dict[str, str]:
        """The columns of a query and their SQL types."""
        with self._cursor() as cursor:
            return {name: kind for name, kind, *_ in cursor.execute(f"DESCRIBE {sql}").fetchall()}

    def batches(self, sql: str, label: str, size: int) -> Iterator[pyarrow.RecordBatch]:
        """The rows of a query in order, in batches; the bar goes to `size` bytes."""
        with self._cursor() as cursor, _progress(label, size, "B") as bar:
            for batch in cursor.sql(sql).to_arrow_reader(BATCH_ROWS):
                yield batch
                bar.update(max(0, int(size * cursor.query_progress() / 100) - bar.n))

    @contextlib.contextmanager
    def _cursor(self):
        """A connection to run one query on, whose failure is explained."""
        with self._connection.cursor() as cursor:
            cursor.execute(f"SET streaming_buffer_size = '{STREAMING_BYTES}B'")
            cursor.execute("SET enable_progress_bar = true")
            cursor.execute("SET enable_progress_bar_print = false")
            try:
                yield cursor
            except (
                duckdb.IOException,
                duckdb.OutOfMemoryException,
                duckdb.FatalException,
            ) as error:
                if os.strerror(errno.ENOSPC) in str(error):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
                if isinstance(error, duckdb.OutOfMemoryException):
                    raise DataError(
                        f"{self._memory_mb} MB do not suffice for so many columns or so long "
                        "cells: raise --memory_mb"
                    ) from None
                raise _first_line(error) from None
            except duckdb.Error as error:
                for file in self.files:
                    if fault := file.find_fault(self._connection):
                        raise fault from None
                raise error


def _progress(label: str, total: int, unit: str) -> tqdm.tqdm:
    """A bar on stderr, where that is a terminal; it disappears when done."""
    return tqdm.tqdm(
        desc=label, total=total, unit=unit, unit_scale=unit == "B", leave=False, disable=None
    )


def _first_line(error: duckdb.Error, file=None) -> DataError:
    """DuckDB's message without its advice, which is about DuckDB's options."""
    return DataError(str(error).strip().split("\n")[0], file=file)


def literal(text: str) -> str:
    """Text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def literals(texts: Iterable[str]) -> str:
    """Texts as an SQL list."""
    return f"[{', '.join(map(literal, texts))}]"
