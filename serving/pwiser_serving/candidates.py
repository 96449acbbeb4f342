"""Candidates: a file of raw features, read in batches. Here a CSV or JSON lines, whose texts become
values; parquet.py and tfrecord.py read the other formats in the same way."""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import re
import sys
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, Self

import numpy as np

from pwiser_serving import features, rules
from pwiser_serving.base_scorer import RAW_SIGNATURE
from pwiser_serving.errors import FeatureError, shorten
from pwiser_serving.protos import tensor_pb2

# Stands for standard input, or output, in place of a file's path.
STANDARD = pathlib.Path("-")
# The first bytes of a compressed file; no text in UTF-8 begins with them.
_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
NO_PYARROW = "needs pyarrow: pip install 'pwiser-serving[parquet]'"
# A folder's name that is a column (Hive), and its value where there is none.
_PARTITION, _NO_PARTITION = re.compile(r"([^=/]+)=([^/]*)"), "__HIVE_DEFAULT_PARTITION__"
# No limit for the length of a text: the converter has none either.
csv.field_size_limit(sys.maxsize)


class CandidateError(ValueError):
    """A candidate file that cannot be scored. The message, one line, names the file, the row (the
    line of a CSV, otherwise counted from 1), the column, what was found and what was expected."""

    def __init__(self, expected: str, *, file, row=None, column=None, found=None):
        place = ["standard input" if file == STANDARD else str(file)]
        place += [f"row {row}"] if row is not None else []
        place += [f"column {column}"] if column is not None else []
        text = expected if found is None else f"found {shorten(found)}, expected {expected}"
        super().__init__(f"{', '.join(place)}: {text}")


def format_suffix(path: pathlib.Path) -> str:
    """The suffix that names a file's format: ".csv" of "x.csv" and of "x.csv.gz"."""
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix


class _Unpacked(io.RawIOBase):
    """The content of a compressed file. CandidateError, when it is read: the file is damaged."""

    def __init__(self, content: BinaryIO, file: BinaryIO, path: pathlib.Path, format: str):
        super().__init__()
        self._content, self._file, self._path, self._format = content, file, path, format

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._content.close()
            self._file.close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            return self._content.readinto(buffer)
        except (EOFError, OSError, zlib.error) as error:
            raise CandidateError(
                f"not readable as {self._format}: {error}", file=self._path
            ) from None


def open_file(path: pathlib.Path) -> BinaryIO:
    """A candidate file's content, or that of standard input; unpacked if its first bytes are those
    of gzip or zstd, whatever its name.

    Raises:
      CandidateError: it cannot be opened.
    """
    standard = path == STANDARD
    try:
        file = open(0 if standard else path, "rb", closefd=not standard)  # noqa: SIM115
        start = file.peek(len(_ZSTD))
    except OSError as error:
        raise CandidateError(error.strerror, file=path) from None
    if start.startswith(_GZIP):
        content, format = gzip.GzipFile(fileobj=file, mode="rb"), "gzip"
    elif start.startswith(_ZSTD):
        try:
            import pyarrow
        except ImportError:
            file.close()
            raise CandidateError(f"zstd {NO_PYARROW}", file=path) from None
        content, format = pyarrow.input_stream(file, "zstd"), "zstd"
    else:
        return file
    return io.BufferedReader(_Unpacked(content, file, path, format), 2**16)


def partitions(path: pathlib.Path) -> dict[str, str]:
    """The columns that stand in the names of a file's folders, as dt=2026-01-01, and their texts;
    they come before columns in the file, as for the converter."""
    found = {n: urllib.parse.unquote(text) for n, text in _PARTITION.findall(str(path.parent))}
    return {name: "" if text == _NO_PARTITION else text for name, text in found.items()}


def read_features(
    read: Callable[[str, int], rules.Cells | None],
    inputs: Mapping[str, tensor_pb2.TensorInfo],
    dialect: rules.Dialect,
    path: pathlib.Path,
    rows: Sequence[int],
) -> dict[str, np.ndarray]:
    """What the model takes, by name, from the columns that `read` gives (see rules.columns).

    Raises:
      CandidateError: a column or value of another type; `rows` are their numbers.
    """
    of_folders = partitions(path)

    def cells(name: str, data_type: int) -> rules.Cells | None:
        return [of_folders[name]] * len(rows) if name in of_folders else read(name, data_type)

    try:
        columns = rules.columns(cells, inputs, dialect)
        arrays, _ = features.to_arrays(columns, inputs, newest_last=dialect.newest_last_of(inputs))
        for name, array in arrays.items():
            infinite = np.isinf(array) if array.dtype.kind == "f" else np.zeros(1, bool)
            if infinite.any():
                place = tuple(np.argwhere(infinite)[0])
                found = array[place]
                raise FeatureError(name, "a finite number", row=int(place[0]), found=found)
    except FeatureError as error:
        text = error.expected
        if error.found is not None:
            text = f"found {error.found}, expected {text}"
        row = None if error.row is None else rows[error.row]
        column = dialect.column(error.feature)
        raise CandidateError(text, file=path, row=row, column=column) from None
    return arrays


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some rows of a CSV or of JSON lines: the line of each, and their texts by column; a JSON
    array is a list of texts."""

    file: pathlib.Path
    rows: Sequence[int]
    columns: Mapping[str, Sequence[str | list[str | None]]]
    dialect: rules.Dialect

    def column(self, name: str) -> Sequence[str]:
        """A column as it is in the file."""
        cells = self.columns.get(name) or [""] * len(self.rows)
        return [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]

    def features(self, inputs: Mapping[str, tensor_pb2.TensorInfo]) -> dict[str, np.ndarray]:
        """What the model takes, by name. CandidateError: a text that is not such a value."""
        return read_features(
            lambda name, _: self.columns.get(name), inputs, self.dialect, self.file, self.rows
        )


def require_columns(path, row: int | None, have: Sequence[str], names: Sequence[str], reason: str):
    """CandidateError if one of the names is missing in a header, or twice in it."""
    for name in names:
        if have.count(name) > 1:
            raise CandidateError("each column once", file=path, row=row, found=name)
        if name not in have:
            raise CandidateError(
                f"the file has no such column, which {reason}; it has: {', '.join(have)}",
                file=path,
                row=row,
                column=name,
            )


class BaseFile:
    """A candidate file that is used in a `with`.

    Attributes:
      path: the file; dialect: how it writes its values; signature: the one that its rows go to;
      total: the number of rows, if known.
    """

    path: pathlib.Path
    dialect: rules.Dialect
    signature = RAW_SIGNATURE
    total: int | None = None
    _file: BinaryIO

    def use(self, name: str) -> None:
        """Reads this column too, if there is one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


class CandidateFile(BaseFile):
    """A CSV in UTF-8.

    Raises:
      CandidateError: no such file, no header, text that is not UTF-8.
    """

    def __init__(self, path: pathlib.Path, dialect: rules.Dialect):
        self.path, self.dialect = path, dialect
        self._file = open_file(path)
        self._reader = csv.reader(
            _lines(self._file, path),
            strict=True,
            delimiter=dialect.delimiter,
            quotechar=dialect.quote or None,
            quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
        )
        try:
            self.header = dialect.header or next(filter(None, self._rows()), [])
            if not any(self.header):
                raise CandidateError("the file is empty, expected a header", file=path)
        except CandidateError:
            self._file.close()
            raise

    def require(self, names: Sequence[str], reason: str) -> None:
        """CandidateError if a column is missing or twice there; the reason says who needs it."""
        require_columns(self.path, 1, self.header, names, reason)

    def no_rows(self) -> Batch:
        """A batch without rows."""
        return Batch(self.path, [], {}, self.dialect)

    def batches(self, rows: int, *, skip: int = 0) -> Iterator[Batch]:
        """The rows after the header and after the first `skip`, in batches of at most `rows`.

        Blank lines are skipped; where there is one column, they are missing values.
        """
        numbered = self._numbered(skip)
        while found := list(itertools.islice(numbered, rows)):
            lines, cells = zip(*found, strict=True)
            columns = dict(zip(self.header, zip(*cells, strict=True), strict=True))
            yield Batch(self.path, lines, columns, self.dialect)

    def _numbered(self, skip: int) -> Iterator[tuple[int, list[str]]]:
        """The rows after the first `skip`, each with its line."""
        wanted = len(self.header)
        rows = (row or [""] for row in self._rows() if row or wanted == 1)
        for row in itertools.islice(rows, skip, None):
            line = self._reader.line_num
            # A delimiter at the end of a row begins no cell of its own.
            if len(row) < wanted or any(text not in self.dialect.missing for text in row[wanted:]):
                raise CandidateError(
                    f"found {len(row)} columns, expected {wanted} as in the header",
                    file=self.path,
                    row=line,
                )
            yield line, row[:wanted]

    def _rows(self) -> Iterator[list[str]]:
        try:
            yield from self._reader
        except csv.Error as error:
            raise CandidateError(
                f"not well-formed CSV ({error})", file=self.path, row=self._reader.line_num
            ) from None


class JsonFile(BaseFile):
    """JSON lines: an object in each line; a key that is absent is a missing value."""

    def __init__(self, path: pathlib.Path, dialect: rules.Dialect):
        self.path, self.dialect = path, dialect
        self._file = open_file(path)
        self._required: list[tuple[Sequence[str], str]] = []

    def require(self, names: Sequence[str], reason: str) -> None:
        """Lets `batches` raise CandidateError if no row of the first batch has a column."""
        self._required.append((names, reason))

    def no_rows(self) -> Batch:
        """A batch without rows."""
        return Batch(self.path, [], {}, self.dialect)

    def batches(self, rows: int, *, skip: int = 0) -> Iterator[Batch]:
        """The rows after the first `skip`, in batches of at most `rows`. Blank lines are skipped.

        Raises:
          CandidateError: a line that is no JSON object, or a column that is not there.
        """
        numbered = itertools.islice(self._objects(), skip, None)
        while found := list(itertools.islice(numbered, rows)):
            lines, objects = zip(*found, strict=True)
            names = list(dict.fromkeys(itertools.chain.from_iterable(objects)))
            for required, reason in self._required:
                require_columns(self.path, None, names, required, reason)
            self._required = []
            columns = {name: [_cell(row.get(name)) for row in objects] for name in names}
            yield Batch(self.path, lines, columns, self.dialect)

    def _objects(self) -> Iterator[tuple[int, dict]]:
        for line, text in enumerate(_lines(self._file, self.path), 1):
            if not text.strip():
                continue
            try:
                # Numbers as their texts, to which the rules for texts apply.
                found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
            except (ValueError, RecursionError) as error:
                raise CandidateError(f"not JSON ({error})", file=self.path, row=line) from None
            if not isinstance(found, dict):
                raise CandidateError("a JSON object", file=self.path, row=line, found=text)
            yield line, found


def _cell(value) -> str | list[str | None]:
    """A value of JSON as texts."""
    if isinstance(value, list):
        return [v if isinstance(v, str | None) else json.dumps(v) for v in value]
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value)


def _lines(file: BinaryIO, path: pathlib.Path) -> Iterator[str]:
    # Decoded line by line, so that the message can name the line.
    for number, line in enumerate(file, 1):
        try:
            text, found = line.decode("utf-8-sig" if number == 1 else "utf-8"), None
        except UnicodeDecodeError as error:
            text, found = "", f"byte 0x{line[error.start]:02x}"
        if found or "\0" in text:
            expected = f"found {found or 'a zero byte'}, expected text in UTF-8"
            raise CandidateError(expected, file=path, row=number)
        # A file whose lines end in CR alone is one line here.
        yield from io.StringIO(text, newline="") if "\r" in text[:-2] else [text]
