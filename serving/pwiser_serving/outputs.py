"""Outputs: scored rows in a file that appears whole or not at all, and that can be resumed."""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import gzip
import io
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pwiser_serving.candidates import NO_PYARROW, CandidateError, format_suffix
from pwiser_serving.errors import FeatureError

# [name of a column]: texts, a NumPy array, or a column of Arrow's
Columns = Mapping[str, Sequence]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PART = re.compile(r"rows-(\d+)-(\d+)")


class OutputError(ValueError):
    """An output that cannot be written, or that this command cannot resume."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How a file of rows is written: each part, and the whole from the parts."""

    write: Callable[[pathlib.Path, Sequence[Columns]], None]
    join: Callable[[Sequence[pathlib.Path], pathlib.Path, Sequence[str]], None]


def output_format(path: pathlib.Path) -> Format:
    """The format by the file's suffix, CSV for an unknown one; text also within gzip.

    Raises:
      OutputError: Parquet without pyarrow, or within gzip.
    """
    suffix, zipped = format_suffix(path), path.suffix == ".gz"
    if suffix in JSON_SUFFIXES:
        return Format(_write_json, functools.partial(_join_text, header=False, zipped=zipped))
    if suffix == ".parquet":
        if zipped:
            raise OutputError(f"{path}: {NO_ZIPPED_PARQUET}")
        try:
            from pwiser_serving import parquet
        except ImportError:
            raise OutputError(NO_PARQUET) from None
        return Format(parquet.write, lambda parts, whole, names: parquet.join(parts, whole))
    return Format(_write_csv, functools.partial(_join_text, header=True, zipped=zipped))


NO_ZIPPED_PARQUET = "Parquet is compressed in itself, expected a name without .gz"
NO_PARQUET = f"Parquet {NO_PYARROW}"


class Partial:
    """The part of a command's output that is done: the folder OUTPUT.partial beside it.

    The folder holds the command's description and parts, files of whole rows that are complete on
    disk before they get their names. However a command ends, the next one continues after exactly
    these rows; at the end the parts are joined and moved into place in one rename. Only the same
    command, on the same input, with the same version of the model, resumes a partial; another one
    is refused, so that rows do not mix and no work is lost by a mistyped flag. Use it in a `with`,
    which keeps the partial after an error, and removes it if the input was wrong.

    Args:
      output: the file to write.
      command: what must be equal when it is resumed, by a name for messages.
      resumable: False if the input cannot be read again: nothing is resumed or kept.

    Attributes:
      folder: where it is; rows: how many rows are done; version: the model's version that scored
      them, or None if there are none.

    Raises:
      OutputError: the partial is another command's, or one is writing it now; OSError.
    """

    def __init__(
        self,
        output: pathlib.Path,
        command: Mapping[str, object],
        *,
        resumable: bool,
    ):
        self.folder = output.with_name(f"{output.name}.partial")
        self._description, self._aside = self.folder / "command.json", self.folder / "unfinished"
        self.rows, self.version = 0, None
        self._output, self._command = output, dict(command)
        self._resumable = resumable
        self._format = output_format(output)
        self._parts: list[pathlib.Path] = []
        self._lock = None

    def __enter__(self) -> "Partial":
        self.folder.mkdir(exist_ok=True)
        # Released when the process ends.
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                raise OutputError(f"{self.folder}: another command is writing it") from None
            raise
        return self

    def __exit__(self, kind, error, _) -> None:
        try:
            if not self.keeps(error):
                self.discard()
        finally:
            os.close(self._lock)

    def keeps(self, error: BaseException | None) -> bool:
        """Whether a command that ends with this error leaves rows for the next one."""
        wrong_input = isinstance(error, CandidateError | FeatureError)
        return self._resumable and self.rows > 0 and not wrong_input

    def begin(self, version: int | None) -> None:
        """Notes which version scores the rows, before the first one is saved."""
        self.version = version
        described = {"command": self._command, "version": version, "resumable": self._resumable}
        self._put(self._description, lambda path: path.write_text(json.dumps(described)))

    def save(self, batches: Sequence[Columns], rows: int) -> None:
        """Keeps the batches, which have so many rows."""
        part = self.folder / f"rows-{self.rows:012d}-{self.rows + rows:012d}"
        self._put(part, lambda path: self._format.write(path, batches))
        self._parts.append(part)
        self.rows += rows

    def finish(self, no_rows: Columns) -> None:
        """Moves the whole output into place; `no_rows` are its columns without rows."""
        if not self._parts:
            self.save([no_rows], 0)
        names = list(no_rows)
        self._put(self._output, lambda path: self._format.join(self._parts, path, names))
        self.discard()

    def _put(self, path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
        """Writes a file under another name, to disk, and renames it."""
        try:
            write(self._aside)
            with open(self._aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self._aside, path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._output)) from None

    def _read(self) -> None:
        """Reads what an earlier command has left."""
        if not self._description.exists():
            self._clear()
            return
        try:
            left = json.loads(self._description.read_text(encoding="utf-8"))
            before, version = dict(left["command"]), left["version"]
            if not left["resumable"]:
                self._clear()
                return
        except (ValueError, KeyError, TypeError):
            raise self._refusal("its command.json cannot be read") from None
        for name, value in self._command.items():
            if before.get(name) != value:
                raise self._refusal(f"it was begun with another {name}")
        parts = sorted(path for path in self.folder.iterdir() if _PART.fullmatch(path.name))
        rows = 0
        for part in parts:
            first, end = map(int, _PART.fullmatch(part.name).groups())
            if first != rows:
                raise self._refusal(f"rows {rows} to {first - 1} are missing from it")
            rows = end
        self._parts, self.rows, self.version = parts, rows, version

    def _refusal(self, reason: str) -> OutputError:
        return OutputError(
            f"{self.folder}: cannot be resumed, {reason}; remove this folder to begin again"
        )

    def _clear(self) -> None:
        # The description first: without it the rest is ignored. Only our files.
        for path in (self._description, self._aside, *self.folder.iterdir()):
            if path in (self._description, self._aside) or _PART.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the partial, if it is there."""
        if not self.folder.exists():
            return
        self._clear()
        with contextlib.suppress(OSError):
            # Somebody else's file is there.
            self.folder.rmdir()


def texts(column: Sequence) -> Sequence[str]:
    """A column as text: the shortest that gives the float32 again, "" for a missing value."""
    if isinstance(column, np.ndarray):
        return column.astype(str).tolist()
    if hasattr(column, "to_pylist"):
        return ["" if value is None else _text(value) for value in column.to_pylist()]
    return column


def _text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _values(column: Sequence) -> Sequence[object]:
    """A column as JSON writes it."""
    if isinstance(column, np.ndarray):
        # From the float32's text: as a double it would have twice the digits.
        column = [float(text) for text in texts(column)]
    elif hasattr(column, "to_pylist"):
        column = column.to_pylist()
    # JSON has no NaN and no infinities.
    return [
        None if isinstance(value, float) and not math.isfinite(value) else value for value in column
    ]


def csv_header(names: Sequence[str]) -> str:
    """The header of a CSV."""
    return _csv_text([names])


def csv_rows(columns: Columns) -> str:
    """The columns' rows as lines of a CSV."""
    return _csv_text(zip(*map(texts, columns.values()), strict=True))


def _csv_text(rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write_csv(path: pathlib.Path, batches: Sequence[Columns]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(map(csv_rows, batches))


def _write_json(path: pathlib.Path, batches: Sequence[Columns]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for columns in batches:
            for row in zip(*map(_values, columns.values()), strict=True):
                line = dict(zip(columns, row, strict=True))
                file.write(json.dumps(line, ensure_ascii=False, default=_text) + "\n")


def _join_text(
    parts: Sequence[pathlib.Path],
    whole: pathlib.Path,
    names: Sequence[str],
    *,
    header: bool,
    zipped: bool,
) -> None:
    """Joins the parts. With gzip too, the bytes depend only on the rows: one compressed stream,
    without a name or time."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(whole, "wb"))
        if zipped:
            file = stack.enter_context(
                gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0)
            )
        if header:
            file.write(csv_header(names).encode())
        for part in parts:
            with open(part, "rb") as content:
                shutil.copyfileobj(content, file)
