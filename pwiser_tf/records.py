"""The TFRecord layout: writes rows as Example bytes, and gives the spec to parse them.

One tf.train.Example per row, with four features:

    categorical  int64 [C]   ids, 0 = out-of-vocabulary
    numerical    float [N]   after the schema's transform
    grade        int64 []    0 exposure only, 1 click, 2 conversion
    group        int64 []    only where the schema names a group column

Every integer is written as a varint of fixed width (padded with continuation bytes, which
protobuf readers accept). So all records of a data set have the same length, and NumPy array
assignments turn a block of rows into bytes, without Python work per value. Only `parse_spec`
imports TensorFlow.
"""

import dataclasses
import os
import struct
from collections.abc import Iterator

import crc32c
import numpy as np

from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema

_ID_BYTES = 4
_GROUP_BYTES = 9
MAX_ID = 2 ** (7 * _ID_BYTES) - 1
MAX_GROUP = 2 ** (7 * _GROUP_BYTES) - 1

# TFRecord frame: length (uint64), masked CRC32C of the length, data, masked CRC32C of the data.
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def parse_spec(schema: Schema) -> dict:
    """The spec for tf.io.parse_example, by feature name. Imports TensorFlow."""
    import tensorflow as tf

    spec = {
        "categorical": tf.io.FixedLenFeature([len(schema.categorical)], tf.int64),
        "numerical": tf.io.FixedLenFeature([len(schema.numerical)], tf.float32),
        "grade": tf.io.FixedLenFeature([], tf.int64),
    }
    if schema.group:
        spec["group"] = tf.io.FixedLenFeature([], tf.int64)
    # An array without columns is not written, so it cannot be required.
    return {name: feature for name, feature in spec.items() if 0 not in feature.shape}


def encode(
    categorical: np.ndarray,
    numerical: np.ndarray,
    grade: np.ndarray,
    group: np.ndarray | None = None,
) -> np.ndarray:
    """Encodes rows as framed TFRecord bytes.

    Args:
      categorical: ids, integers [n, C] in 0..MAX_ID.
      numerical: float32 [n, N].
      grade: integers [n] in {0, 1, 2}.
      group: integers [n] in 0..MAX_GROUP, or None if the data set has no group.

    Returns:
      uint8 [n, length]: row r is one complete TFRecord, which can be appended to a file.
    """
    layout = _Layout.of(categorical.shape[1], numerical.shape[1], group is not None)
    rows = np.tile(layout.frame, (len(grade), 1))
    if categorical.shape[1]:
        rows[:, layout.categorical] = _padded_varints(categorical, _ID_BYTES)
    if numerical.shape[1]:
        values = np.ascontiguousarray(numerical, "<f4")
        rows[:, layout.numerical] = values.view(np.uint8).reshape(
            len(grade), 4 * numerical.shape[1]
        )
    rows[:, layout.grade] = np.asarray(grade)[:, None]
    if group is not None:
        rows[:, layout.group] = _padded_varints(np.asarray(group)[:, None], _GROUP_BYTES)
    data = rows[:, _HEADER.size : -_FOOTER.size]
    checksums = np.fromiter(map(crc32c.crc32c, data), np.uint32, len(grade))
    rows[:, -_FOOTER.size :] = _mask(checksums).astype("<u4")[:, None].view(np.uint8)
    return rows


def record_bytes(schema: Schema) -> int:
    """The length of each framed record of the data set, in bytes."""
    layout = _Layout.of(len(schema.categorical), len(schema.numerical), schema.group is not None)
    return len(layout.frame)


def read(path: str | os.PathLike) -> Iterator[bytes]:
    """The records of a TFRecord file, with checksums verified; DataError names file and record."""
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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A framed record with zeros as values, and the positions of the values in it."""

    frame: np.ndarray
    categorical: slice
    numerical: slice
    grade: slice
    group: slice

    @classmethod
    def of(cls, categorical: int, numerical: int, group: bool) -> "_Layout":
        """The layout for these numbers of categorical and numerical features."""
        body = bytearray()
        places = {}
        # name, kind (field number in the Feature message: 2 float_list, 3 int64_list), bytes
        for name, kind, size in (
            ("categorical", 3, categorical * _ID_BYTES),
            ("numerical", 2, numerical * 4),
            ("grade", 3, 1),
            ("group", 3, _GROUP_BYTES if group else 0),
        ):
            # An array without values is left out: readers then see no value, not an empty list.
            if not size:
                places[name] = slice(0, 0)
                continue
            values = bytes(size)
            feature = _field(kind, _field(1, values))
            entry = _field(1, _field(1, name.encode()) + _field(2, feature))
            body += entry
            places[name] = slice(len(body) - size, len(body))
        prefix = _field(1, bytes(body))[: -len(body)]
        data = prefix + bytes(body)
        length = struct.pack("<Q", len(data))
        header = length + struct.pack("<I", _mask(crc32c.crc32c(length)))
        shift = len(header) + len(prefix)
        return cls(
            np.frombuffer(header + data + bytes(_FOOTER.size), np.uint8),
            **{n: slice(p.start + shift, p.stop + shift) for n, p in places.items()},
        )


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
