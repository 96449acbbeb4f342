"""The TFRecord layout: how rows become Example bytes, and the parse spec that reads them.

One tf.train.Example a row (docs/reference/records.md):

    categorical   int64 [C]       ids of the categorical features, then of numbers in buckets
    numerical     float [N]       numbers after the schema's transform, then the vectors
    ids/NAME      int64 [length]  ids of a list or sequence; any length up to its max_length
    weights/NAME  float [length]  where the list has weights
    grade         int64 []        0 exposure only, 1 click, 2 conversion
    group         int64 []        where the schema names a group column
    weight        float []        where the schema names a column of row weights
    segments      int64 [S]       positions in the schema's segment values

An integer is written as a varint of fixed width (padded with continuation bytes, which protobuf
readers accept), so that a block of rows becomes a block of bytes by array assignment alone: no
Python work per value. TensorFlow is imported only by `parse_spec`.
"""

import dataclasses
import functools
import os
import struct
from collections.abc import Collection, Iterator

import crc32c
import numpy as np

from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema

_ID_BYTES = 4
_GROUP_BYTES = 9
# The width of a length that differs between rows: lists of up to 2^26 bytes.
_LENGTH_BYTES = 4
MAX_ID = 2 ** (7 * _ID_BYTES) - 1
MAX_GROUP = 2 ** (7 * _GROUP_BYTES) - 1
# The id that fills up shorter lists of a batch; no record holds it.
PADDING = -1
# The features of a record that no model takes.
EXTRAS = ("group", "weight", "segments")

# TFRecord frame: length (uint64), its masked CRC32C, the data, the data's masked CRC32C.
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
# Fields of the Feature message.
_FLOATS, _INTEGERS = 2, 3


@dataclasses.dataclass(frozen=True)
class Lists:
    """The lists of one feature, of n rows.

    Attributes:
      ids: int64 [values], row after row, in 0..MAX_ID.
      lengths: int64 [n].
      weights: float32 [values], or None.
    """

    ids: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "Lists":
        """The lists of those rows, in that order."""
        lengths = self.lengths[rows]
        starts = (np.cumsum(self.lengths) - self.lengths)[rows]
        place = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        place += np.arange(lengths.sum())
        weights = None if self.weights is None else self.weights[place]
        return Lists(self.ids[place], lengths, weights)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Encoded rows, as arrays.

    Attributes:
      categorical: ids, int64 [n, C]. numerical: float32 [n, N]. grade: int64 [n].
      group: int64 [n] in 0..MAX_GROUP, or None. weight: float32 [n], or None.
      segments: int64 [n, S]. lists: name to Lists.
    """

    categorical: np.ndarray
    numerical: np.ndarray
    grade: np.ndarray
    group: np.ndarray | None = None
    weight: np.ndarray | None = None
    segments: np.ndarray | None = None
    lists: dict[str, Lists] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.grade)

    def take(self, rows: np.ndarray) -> "Rows":
        """Those rows, in that order."""
        arrays = ("categorical", "numerical", "grade", "group", "weight", "segments")
        taken = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in arrays
        }
        return Rows(**taken, lists={name: each.take(rows) for name, each in self.lists.items()})


def parse_spec(schema: Schema, extras: Collection[str] = EXTRAS) -> dict:
    """The spec for tf.io.parse_example, by feature name. Imports TensorFlow.

    Args:
      extras: which of EXTRAS to read, where the schema has them. Reading costs time.
    """
    import tensorflow as tf

    spec = {
        "categorical": tf.io.FixedLenFeature([len(schema.id_features)], tf.int64),
        "numerical": tf.io.FixedLenFeature([schema.numerical_width], tf.float32),
        "grade": tf.io.FixedLenFeature([], tf.int64),
        "segments": tf.io.FixedLenFeature([len(schema.segments)], tf.int64),
    }
    if schema.group:
        spec["group"] = tf.io.FixedLenFeature([], tf.int64)
    if schema.weight:
        spec["weight"] = tf.io.FixedLenFeature([], tf.float32)
    for feature in schema.lists:
        of_list = functools.partial(tf.io.FixedLenSequenceFeature, [], allow_missing=True)
        spec[f"ids/{feature.name}"] = of_list(tf.int64, default_value=PADDING)
        if feature.weighted:
            spec[f"weights/{feature.name}"] = of_list(tf.float32, default_value=0.0)
    # An array of no columns is not written, and cannot be required.
    return {
        name: feature
        for name, feature in spec.items()
        if 0 not in feature.shape and (name in extras or name not in EXTRAS)
    }


def feature_shapes(schema: Schema) -> dict[str, tuple[type, int | None]]:
    """What a model is called with, by name: NumPy's type and the columns; None: a list's length."""
    shapes: dict[str, tuple[type, int | None]] = {}
    if schema.id_features:
        shapes["categorical"] = np.int64, len(schema.id_features)
    if schema.numerical_width:
        shapes["numerical"] = np.float32, schema.numerical_width
    for feature in schema.lists:
        shapes[f"ids/{feature.name}"] = np.int64, None
        if feature.weighted:
            shapes[f"weights/{feature.name}"] = np.float32, None
    return shapes


def empty_features(schema: Schema) -> dict[str, np.ndarray]:
    """Features of one row of zeros, to call a model with for the first time."""
    shapes = feature_shapes(schema).items()
    return {name: np.zeros((1, width or 1), dtype) for name, (dtype, width) in shapes}


def encode(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Rows to framed TFRecord bytes.

    Returns:
      The bytes, uint8 [total], and where each row begins and the last one ends, int64 [n + 1]:
      bytes [place[r], place[r + 1]) are one whole TFRecord, ready to be appended to a file.
    """
    count = len(rows)
    fixed = [
        (b"categorical", _INTEGERS, _padded_varints(rows.categorical, _ID_BYTES)),
        (b"numerical", _FLOATS, _floats(rows.numerical)),
        (b"grade", _INTEGERS, _padded_varints(rows.grade[:, None], 1)),
    ]
    if rows.group is not None:
        fixed.append((b"group", _INTEGERS, _padded_varints(rows.group[:, None], _GROUP_BYTES)))
    if rows.weight is not None:
        fixed.append((b"weight", _FLOATS, _floats(rows.weight[:, None])))
    if rows.segments is not None:
        fixed.append((b"segments", _INTEGERS, _padded_varints(rows.segments, _ID_BYTES)))
    blocks = [_fixed_entry(*entry) for entry in fixed if entry[2].shape[1]]
    values, lengths = [], []
    for name, lists in rows.lists.items():
        pieces = [(f"ids/{name}", _INTEGERS, _padded_varints(lists.ids[:, None], _ID_BYTES))]
        if lists.weights is not None:
            pieces.append((f"weights/{name}", _FLOATS, _floats(lists.weights[:, None])))
        for key, kind, content in pieces:
            blocks.append(_list_entry(key.encode(), kind, 4 * lists.lengths))
            values.append(content)
            lengths.append(lists.lengths)
    # Each row: header, tag and length of the features, the fixed entries, and for each list its
    # entry and its values; then the footer.
    fixed_block = np.concatenate(blocks[: len(blocks) - len(values)], axis=1)
    list_blocks = blocks[len(blocks) - len(values) :]
    size = np.full(count, fixed_block.shape[1], np.int64)
    for block, length in zip(list_blocks, lengths, strict=True):
        size += block.shape[1] + 4 * length
    data = size + 1 + _LENGTH_BYTES
    place = np.concatenate([[0], np.cumsum(data + _HEADER.size + _FOOTER.size)])
    out = np.empty(place[-1], np.uint8)
    at = place[:-1]

    def put(block: np.ndarray) -> None:
        """Writes row r of block, uint8 [n, width], at `at[r]`, and moves `at` behind it."""
        nonlocal at
        _scatter(out, at, block)
        at = at + block.shape[1]

    put(_headers(data))
    put(np.full((count, 1), 1 << 3 | 2, np.uint8))
    put(_padded_varints(size[:, None], _LENGTH_BYTES))
    put(fixed_block)
    for block, content, length in zip(list_blocks, values, lengths, strict=True):
        put(block)
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        _scatter(out, np.repeat(at, length) + 4 * within, content)
        at = at + 4 * length
    if list_blocks:
        view, start = memoryview(out), place[:-1] + _HEADER.size
        contents = (view[a:b] for a, b in zip(start.tolist(), at.tolist(), strict=True))
    else:
        # All of one length: slicing them is then NumPy's work.
        contents = out.reshape(count, -1)[:, _HEADER.size : -_FOOTER.size] if count else ()
    checksums = np.fromiter(map(crc32c.crc32c, contents), np.uint32, count)
    put(_mask(checksums).astype("<u4")[:, None].view(np.uint8))
    return out, place


def checksums(encoded: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The checksum of each row, uint32 [n], from what `encode` returned."""
    footers = place[1:, None] - _FOOTER.size + np.arange(_FOOTER.size)
    return encoded[footers].view("<u4")[:, 0]


def _scatter(out: np.ndarray, places: np.ndarray, block: np.ndarray) -> None:
    """Writes row r of block, uint8 [n, width], into out at places[r]."""
    width = block.shape[1]
    if not len(block):
        return
    windows = np.ndarray((len(out) - width + 1,), f"V{width}", out, strides=(1,))
    windows[places] = np.ascontiguousarray(block).view(f"V{width}")[:, 0]


def _headers(lengths: np.ndarray) -> np.ndarray:
    """TFRecord headers of data of those lengths, uint8 [n, 12]."""
    distinct, index = np.unique(lengths, return_inverse=True)
    packed = (struct.pack("<Q", length) for length in distinct.tolist())
    headers = b"".join(p + _FOOTER.pack(_mask(crc32c.crc32c(p))) for p in packed)
    return np.frombuffer(headers, np.uint8).reshape(-1, _HEADER.size)[index]


def _fixed_entry(name: bytes, kind: int, content: np.ndarray) -> np.ndarray:
    """A feature with values of one size, uint8 [n, size], as an entry of the features' map."""
    values = bytes(content.shape[1])
    entry = _field(1, _field(1, name) + _field(2, _field(kind, _field(1, values))))
    prefix = np.frombuffer(entry[: len(entry) - len(values)], np.uint8)
    return np.concatenate([np.tile(prefix, (len(content), 1)), content], axis=1)


def _list_entry(name: bytes, kind: int, sizes: np.ndarray) -> np.ndarray:
    """The bytes before the values of a list, uint8 [n, k], where the values take `sizes` bytes."""
    step = 1 + _LENGTH_BYTES
    key = _field(1, name)
    # From the inside: the values, the list, the Feature, the map's entry.
    inner = [sizes, sizes + step, sizes + 2 * step, sizes + 3 * step + len(key)]
    lengths = [_padded_varints(size[:, None], _LENGTH_BYTES) for size in inner]

    def constant(content: bytes) -> np.ndarray:
        return np.tile(np.frombuffer(content, np.uint8), (len(sizes), 1))

    tags = [bytes([field << 3 | 2]) for field in (1, kind, 2, 1)]
    parts = [constant(tags[3]), lengths[3], constant(key)]
    for level in (2, 1, 0):
        parts += [constant(tags[level]), lengths[level]]
    return np.concatenate(parts, axis=1)


def _floats(values: np.ndarray) -> np.ndarray:
    """Floats [n, k] as bytes, uint8 [n, 4 k]."""
    values = np.ascontiguousarray(values, "<f4")
    return values.view(np.uint8).reshape(len(values), 4 * values.shape[1])


def read(path: str | os.PathLike) -> Iterator[bytes]:
    """The records of a TFRecord file, checksums verified; DataError names file and record."""
    with open(path, "rb") as file:
        number = 0
        while header := file.read(_HEADER.size):
            number += 1
            length, checksum = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, None)
            if checksum != _mask(crc32c.crc32c(header[:8])):
                raise DataError(f"record {number} has no TFRecord header", file=path)
            data, footer = file.read(length), file.read(_FOOTER.size)
            if len(footer) < _FOOTER.size:
                raise DataError(f"record {number} is truncated", file=path)
            if _FOOTER.unpack(footer)[0] != _mask(crc32c.crc32c(data)):
                raise DataError(f"record {number} has a wrong checksum", file=path)
            yield data


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    length, size = bytearray(), len(content)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + content


def _padded_varints(values: np.ndarray, width: int) -> np.ndarray:
    """Integers [n, k] to varints of exactly `width` bytes each, uint8 [n, k * width]."""
    values = np.asarray(values, np.int64)
    if values.size and (values.min() < 0 or values.max() >= 2 ** (7 * width)):
        raise ValueError(f"expected integers in 0..{2 ** (7 * width) - 1}")
    out = np.empty((*values.shape, width), np.uint8)
    for position in range(width):
        more = 0x80 if position < width - 1 else 0
        out[..., position] = (values >> (7 * position) & 0x7F) | more
    return out.reshape(len(values), values.shape[1] * width)


def _mask(checksum):
    """TFRecord's masked CRC32C, of a Python int or a uint32 array."""
    if isinstance(checksum, int):
        return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return (checksum >> np.uint32(15) | checksum << np.uint32(17)) + np.uint32(0xA282EAD8)
