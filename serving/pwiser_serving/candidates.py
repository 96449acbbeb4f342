"""Candidates: a file of raw features, read in batches. Here a CSV, whose text becomes values;
parquet.py and tfrecord.py read the other formats in the same way."""

import csv
import dataclasses
import decimal
import gzip
import io
import itertools
import pathlib
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, Self

import numpy as np

from pwiser_serving import tensors
from pwiser_serving.errors import shorten
from pwiser_serving.features import MISSING_FLOAT, MISSING_INTEGER
from pwiser_serving.protos import tensor_pb2
from pwiser_serving.scorer import RAW_SIGNATURE

_LARGEST_FLOAT = float(np.finfo(np.float32).max)
# Stands for standard input, or output, in place of a file's path.
STANDARD = pathlib.Path("-")
# The first bytes of a gzip file; no text in UTF-8 begins with them.
_GZIP = b"\x1f\x8b\x08"
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
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


class _Unzipped(gzip.GzipFile):
    """The content of a gzip file. CandidateError, when it is read: the file is damaged."""

    def __init__(self, file: BinaryIO, path: pathlib.Path):
        super().__init__(fileobj=file, mode="rb")
        self._file, self._path = file, path

    def close(self) -> None:
        super().close()
        self._file.close()

    def readinto(self, buffer) -> int:
        try:
            return super().readinto(buffer)
        except (EOFError, OSError, zlib.error) as error:
            raise CandidateError(f"not readable as gzip: {error}", file=self._path) from None


def open_file(path: pathlib.Path) -> BinaryIO:
    """A candidate file's content, or that of standard input; unzipped if its first bytes are those
    of gzip, whatever its name.

    Raises:
      CandidateError: it cannot be opened.
    """
    standard = path == STANDARD
    try:
        file = open(0 if standard else path, "rb", closefd=not standard)  # noqa: SIM115
        if file.peek(len(_GZIP)).startswith(_GZIP):
            return io.BufferedReader(_Unzipped(file, path), 2**16)
    except OSError as error:
        raise CandidateError(error.strerror, file=path) from None
    return file


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some rows of a CSV: the line of each, and their text by column."""

    file: pathlib.Path
    rows: Sequence[int]
    columns: Mapping[str, Sequence[str]]

    def column(self, name: str) -> Sequence[str]:
        """A column as it is in the file."""
        return self.columns[name]

    def features(self, inputs: Mapping[str, tensor_pb2.TensorInfo]) -> dict[str, Sequence]:
        """What the model takes, by name. CandidateError: a text that is not such a value."""
        return {name: self._values(name, info.dtype) for name, info in inputs.items()}

    def _values(self, name: str, data_type: int) -> np.ndarray | Sequence[str]:
        """A column as int64, float32 or string values, empty text as missing."""
        texts = self.columns[name]
        if data_type == tensor_pb2.DT_STRING:
            return texts
        if data_type not in _PARSERS:
            raise CandidateError(
                f"the model takes {tensors.data_type_name(data_type)} here, which no CSV gives",
                file=self.file,
                column=name,
            )
        parse, dtype, expected = _PARSERS[data_type]
        values = np.empty(len(texts), dtype)
        for row, text in enumerate(texts):
            try:
                values[row] = parse(text)
            except (ValueError, OverflowError):
                raise CandidateError(
                    expected, file=self.file, row=self.rows[row], column=name, found=text
                ) from None
        return values


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
      path: the file; signature: the one that its rows go to; total: the number of rows, if known.
    """

    path: pathlib.Path
    signature = RAW_SIGNATURE
    total: int | None = None
    _file: BinaryIO

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()


class CandidateFile(BaseFile):
    """A CSV with a header, in UTF-8, its cells separated by the delimiter.

    Raises:
      CandidateError: no such file, no header, text that is not UTF-8.
    """

    def __init__(self, path: pathlib.Path, delimiter: str = ","):
        self.path = path
        self._file = open_file(path)
        self._reader = csv.reader(self._lines(), strict=True, delimiter=delimiter)
        try:
            self.header: list[str] = next(self._rows(), [])
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
        return Batch(self.path, [], dict.fromkeys(self.header, ()))

    def batches(self, rows: int, *, skip: int = 0) -> Iterator[Batch]:
        """The rows after the header and after the first `skip`, in batches of at most `rows`.

        Blank lines are skipped.
        """
        numbered = self._numbered(skip)
        while found := list(itertools.islice(numbered, rows)):
            lines, cells = zip(*found, strict=True)
            columns = dict(zip(self.header, zip(*cells, strict=True), strict=True))
            yield Batch(self.path, lines, columns)

    def _numbered(self, skip: int) -> Iterator[tuple[int, list[str]]]:
        """The rows after the first `skip`, each with its line."""
        for row in itertools.islice(self._rows(), skip, None):
            line = self._reader.line_num
            if len(row) != len(self.header):
                raise CandidateError(
                    f"found {len(row)} columns, expected {len(self.header)} as in the header",
                    file=self.path,
                    row=line,
                )
            yield line, row

    def _rows(self) -> Iterator[list[str]]:
        try:
            yield from filter(None, self._reader)
        except csv.Error as error:
            raise CandidateError(
                f"not well-formed CSV ({error})", file=self.path, row=self._reader.line_num
            ) from None

    def _lines(self) -> Iterator[str]:
        # Decoded line by line, so that the message can name the line.
        for number, line in enumerate(self._file, 1):
            try:
                text, found = line.decode("utf-8-sig" if number == 1 else "utf-8"), None
            except UnicodeDecodeError as error:
                text, found = "", f"byte 0x{line[error.start]:02x}"
            if found or "\0" in text:
                expected = f"found {found or 'a zero byte'}, expected text in UTF-8"
                raise CandidateError(expected, file=self.path, row=number)
            yield text


def _integer(text: str) -> int:
    if not text:
        return MISSING_INTEGER
    if text.lstrip("-").isdecimal():
        return int(text)
    # A column with gaps is often written as 3.0. The float only finds numbers that are too big.
    _finite(text)
    number = decimal.Decimal(text)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def _float(text: str) -> float:
    return _finite(text) if text and text.lower() != "nan" else MISSING_FLOAT


def _finite(text: str) -> float:
    number = float(text)
    # Python reads 1_000 as a number, which a file hardly means.
    if "_" in text or not abs(number) <= _LARGEST_FLOAT:
        raise ValueError(text)
    return number


_PARSERS = {
    tensor_pb2.DT_INT64: (_integer, np.int64, "an integer of 64 bits"),
    tensor_pb2.DT_FLOAT: (_float, np.float32, "a finite number"),
}
