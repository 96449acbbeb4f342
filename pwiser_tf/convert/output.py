"""The output folder, which appears whole or not at all, and the shards in it."""

import collections
import contextlib
import ctypes
import errno
import io
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

import crc32c
import numpy as np

from pwiser_tf import records, schema
from pwiser_tf.errors import DataError


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, overwrite: bool) -> Iterator[pathlib.Path]:
    """A folder to write into, which becomes `path` when the block ends well, and vanishes if not.

    It lies beside `path`, so that the last step is one rename.

    Args:
      path: absent, or an empty folder, or with `overwrite` an earlier data set.
      overwrite: replace an earlier data set; it stays until the new one is complete.

    Raises:
      DataError: `path` is in use.
      OSError: it cannot be written.
    """
    path = pathlib.Path(path).resolve()
    _check_free(path, overwrite)
    made = _make_parents(path.parent)
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            _sync(file)
        # Looked at again: this may be hours later.
        _check_free(path, overwrite)
        if path.exists():
            _exchange(folder, path)
            shutil.rmtree(folder)
        else:
            folder.rename(path)
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            # The partial folder's name tells a user nothing.
            name = str(error.filename or folder)
            error.filename = str(path) if name.startswith(str(folder)) else name
        raise


def _exchange(a: pathlib.Path, b: pathlib.Path) -> None:
    """Exchanges the names of two folders in one step, so that a kill cannot leave one nameless."""
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = current_folder, os.fsencode(a), current_folder, os.fsencode(b), exchange
    if libc.renameat2(*arguments):
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
        # Some network file systems cannot.
        aside = a.with_suffix(".old")
        for source, target in ((b, aside), (a, b), (aside, a)):
            source.rename(target)


def _check_free(path: pathlib.Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise DataError("expected a folder, or nothing, to write to; it is a file", file=path)
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise DataError("expected an empty or absent folder; --overwrite replaces it", file=path)
    # A folder of anything else may be the user's raw data.
    if not (path / schema.FILE_NAME).exists():
        raise DataError(
            f"expected an earlier data set to overwrite, with {schema.FILE_NAME}", file=path
        )


def _make_parents(path: pathlib.Path) -> list[pathlib.Path]:
    """Makes a folder and its parents; returns those that were absent, the deepest first."""
    absent = []
    while not path.exists():
        absent.append(path)
        path = path.parent
    for folder in reversed(absent):
        folder.mkdir()
    return absent


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# So many rows are compared with each other.
_SAMPLED_ROWS = 100_000


class Writer:
    """Writes the records of all splits to shards: row i of a split goes to its shard i % shards, or
    its group decides.

    Each shard is thus a sample of the whole split, in its order, and holds groups whole. Few rows
    make fewer shards.

    Args:
      folder: of the shards. shards: the files of each split.
    """

    def __init__(self, folder: pathlib.Path, shards: int):
        self._folder = folder
        self._shards = shards
        # A shard's number is that of its split times `shards`, plus its own.
        self._files: dict[int, io.BufferedWriter] = {}
        self._rows_in, self._checksums = collections.Counter(), collections.Counter()
        # Of each split: rows, clicks, conversions, dropped rows.
        self._counts = np.zeros((len(schema.SPLITS), 4), np.int64)
        self._sampled, self._distinct = 0, set()

    def write(self, rows: records.Rows, split: np.ndarray) -> None:
        """Appends rows; drops those with grade -1. split: positions in SPLITS, int8 [n]."""
        counts = self._counts
        dealt = np.empty(len(rows), np.uint64)
        for position, rows_before in enumerate(counts[:, 0].tolist()):
            here = split == position
            kept = np.flatnonzero(here & (rows.grade >= 0))
            grade = rows.grade[kept]
            dealt[kept] = rows_before + np.arange(len(kept))
            clicks, conversions = np.count_nonzero(grade >= 1), np.count_nonzero(grade == 2)
            dropped = np.count_nonzero(here) - len(kept)
            counts[position] += len(kept), clicks, conversions, dropped
        if rows.group is not None:
            dealt = scattered(rows.group)
        shard_of = split.astype(np.int64) * self._shards + (dealt % self._shards).astype(np.int64)
        order = np.argsort(shard_of, kind="stable")
        order = order[rows.grade[order] >= 0]
        encoded, place = records.encode(rows.take(order))
        if self._sampled < _SAMPLED_ROWS:
            self._distinct.update(records.checksums(encoded, place).tolist())
            self._sampled += len(order)
        numbers, starts = np.unique(shard_of[order], return_index=True)
        ends = np.append(starts, len(order))[1:]
        for number, start, end in zip(
            *map(np.ndarray.tolist, (numbers, starts, ends)), strict=True
        ):
            if number not in self._files:
                self._files[number] = open(self._path(number), "wb")  # noqa: SIM115
            content = encoded[place[start] : place[end]].data
            self._files[number].write(content)
            self._checksums[number] = crc32c.crc32c(content, self._checksums[number])
            self._rows_in[number] += end - start

    @property
    def copies(self) -> float:
        """The share of rows that equal an earlier one, among the first ones of all splits."""
        return 1 - len(self._distinct) / max(self._sampled, 1)

    def close(self) -> dict[str, schema.Split]:
        """Names the shards by their final count and returns the splits, also those without rows."""
        splits = {}
        for position, name in enumerate(schema.SPLITS):
            mine = sorted(number for number in self._files if number // self._shards == position)
            shards = []
            for k, number in enumerate(mine):
                self._files[number].close()
                file = f"{name}-{k:05d}-of-{len(mine):05d}.tfrecord"
                size = self._path(number).rename(self._folder / file).stat().st_size
                found = file, self._rows_in[number], size, self._checksums[number]
                shards.append(schema.Shard(*found))
            splits[name] = schema.Split(*self._counts[position].tolist(), tuple(shards))
        return splits

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / f"shard-{number:05d}"


def scattered(group: np.ndarray) -> np.ndarray:
    """Groups int64 [n] to numbers uint64 [n] whose remainders are even, by any divisor.

    The groups' own would not be: ids may all be even, or rise with time. (SplitMix64's last
    step, Steele et al. 2014.)
    """
    x = group.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
