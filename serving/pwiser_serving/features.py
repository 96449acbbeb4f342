"""Features: from a caller's columns to the arrays that a signature expects."""

import decimal
import itertools
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pwiser_serving import tensors
from pwiser_serving.errors import FeatureError
from pwiser_serving.protos import tensor_pb2

# How a missing value is written: the exported graph reads these as missing.
MISSING_INTEGER = -(2**63)
MISSING_STRING = b""
MISSING_FLOAT = float("nan")

# From here on, not every integer is a float.
_INEXACT = 2**53
_INTEGER = "an integer of 64 bits (below 2**53 as a float)"


class Ragged(NamedTuple):
    """Lists of several lengths: all their values, one list after the other, and the lengths."""

    values: Sequence
    lengths: np.ndarray

    def in_its_row(self, error: FeatureError) -> FeatureError:
        """An error whose row is the position of a value, now that of its list."""
        if error.row is not None:
            ends = np.cumsum(self.lengths)
            error.row = int(np.searchsorted(ends, error.row, side="right"))
        return error


def width(info: tensor_pb2.TensorInfo) -> int | None:
    """The number of columns of an input that is a list or a vector; None for one value a row."""
    sizes = [dimension.size for dimension in info.tensor_shape.dim]
    return sizes[1] if len(sizes) == 2 and sizes[1] >= 0 else None


def optional(inputs: Mapping[str, tensor_pb2.TensorInfo]) -> set[str]:
    """The inputs that may be left out: the weights of lists, which are then 1."""
    lists = (n for n, info in inputs.items() if width(info) and info.dtype != tensor_pb2.DT_FLOAT)
    return {f"{name}.weights" for name in lists} & inputs.keys()


def to_arrays(
    features: Mapping[str, Sequence],
    inputs: Mapping[str, tensor_pb2.TensorInfo],
    *,
    newest_last: Collection[str] = (),
    raw: bool = True,
) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a request, checked against what the model says it takes.

    Args:
      features: columns by name: lists, NumPy arrays, a pandas frame. None, NaN, "" and what is
        masked are missing values of any feature. A list or a vector has a sequence in each row.
      inputs: a signature's inputs by name; the first axis of each is the batch.
      newest_last: the lists of which the last values are kept where there are more than the
        model takes; of the others the first ones are.
      raw: whether inputs with two axes are lists, which are cut and filled up, and vectors.

    Returns:
      The arrays by name, with the types and shapes of `inputs`, and the number of rows.

    Raises:
      FeatureError: a feature is missing, unknown, of another type, shape or length.
    """
    names = set(features.keys())
    weights = optional(inputs) if raw else set()
    if names | weights != inputs.keys():
        for name in sorted(inputs.keys() - weights - names):
            raise FeatureError(name, f"missing; the model takes {listed(inputs)}")
        for name in sorted(map(str, names - inputs.keys())):
            raise FeatureError(name, f"unknown to the model, which takes {listed(inputs)}")
    arrays, rows, first = {}, None, None
    for name, info in sorted(inputs.items()):
        if name in weights:
            continue
        if info.dtype not in _CONVERSIONS:
            kind = tensors.data_type_name(info.dtype)
            raise FeatureError(name, f"int64, float or string; the model takes {kind} here")
        if not raw or width(info) is None:
            arrays[name] = _CONVERSIONS[info.dtype](name, features[name])
            _check_shape(name, arrays[name], info)
        elif info.dtype == tensor_pb2.DT_FLOAT:
            arrays[name] = _vectors(name, _ragged(name, features[name]), width(info))
        else:
            arrays |= _lists(name, features, inputs, name in newest_last)
        count = len(arrays[name])
        rows, first = (count, name) if rows is None else (rows, first)
        if count != rows:
            raise FeatureError(name, f"found {count} rows, expected {rows} as {first} has")
    return arrays, rows or 0


def _ragged(name: str, values: Sequence) -> Ragged:
    if isinstance(values, Ragged):
        return values
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return Ragged(values.reshape(-1), np.full(len(values), values.shape[1]))
    rows = [() if _is_missing(row) else row for row in values]
    for number, row in enumerate(rows):
        if isinstance(row, str | bytes | Mapping) or not hasattr(row, "__len__"):
            raise FeatureError(name, "a list", row=number, found=row)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return Ragged(list(itertools.chain.from_iterable(rows)), lengths)


def _flat(name: str, column: Ragged, data_type: int) -> np.ndarray:
    """The values of all rows, [n]."""
    try:
        values = _CONVERSIONS[data_type](name, column.values)
    except FeatureError as error:
        raise column.in_its_row(error) from None
    if values.ndim != 1:
        raise FeatureError(name, "found lists of lists, expected a list in each row")
    return values


def _vectors(name: str, column: Ragged, length: int) -> np.ndarray:
    """Float32 [rows, length]; a missing vector has NaNs."""
    lengths = column.lengths
    for row in np.flatnonzero((lengths != length) & (lengths != 0))[:1].tolist():
        raise FeatureError(name, f"found {lengths[row]} numbers, expected {length}", row=row)
    array = np.full((len(lengths), length), MISSING_FLOAT, "<f4")
    array[lengths > 0] = _flat(name, column, tensor_pb2.DT_FLOAT).reshape(-1, length)
    return array


def _lists(name: str, features, inputs, newest_last: bool) -> dict[str, np.ndarray]:
    """A list and its weights, if it has some: [rows, width], cut and filled up."""
    info, column = inputs[name], _ragged(name, features[name])
    values, size = _flat(name, column, info.dtype), width(info)
    missing = MISSING_INTEGER if info.dtype == tensor_pb2.DT_INT64 else MISSING_STRING
    present = values != missing
    rows = np.repeat(np.arange(len(column.lengths)), column.lengths)[present]
    counts = np.bincount(rows, minlength=len(column.lengths))
    first = np.cumsum(counts) - counts
    if newest_last:
        first += np.maximum(counts - size, 0)
    position = np.arange(len(rows)) - first[rows]
    kept = (position >= 0) & (position < size)
    place = rows[kept], position[kept]

    def padded(values: np.ndarray, filler) -> np.ndarray:
        array = np.full((len(counts), size), filler, values.dtype)
        array[place] = values[kept]
        return array

    found = {name: padded(values[present], missing)}
    if (of_weights := f"{name}.weights") in optional(inputs):
        weights = np.ones(len(rows), "<f4")
        if of_weights in features:
            weights = _weights(name, column, _ragged(of_weights, features[of_weights]))[present]
            for place_of in np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))[:1]:
                row, value = int(rows[place_of]), weights[place_of]
                raise FeatureError(of_weights, "a number of at least 0", row=row, found=value)
        found[of_weights] = padded(weights, 0)
    return found


def _weights(name: str, column: Ragged, weights: Ragged) -> np.ndarray:
    """The weights of a list's values, float32 [n]."""
    of_weights, wanted, found = f"{name}.weights", column.lengths, weights.lengths
    if len(found) != len(wanted):
        message = f"found {len(found)} rows, expected {len(wanted)} as {name} has"
        raise FeatureError(of_weights, message)
    for row in np.flatnonzero(found != wanted)[:1].tolist():
        message = f"found {found[row]} weights, expected {wanted[row]}, one for each value"
        raise FeatureError(of_weights, message, row=row)
    return _flat(of_weights, weights, tensor_pb2.DT_FLOAT)


def _as_array(name: str, values: Sequence) -> np.ndarray:
    try:
        if isinstance(values, np.ma.MaskedArray):
            return np.where(np.ma.getmaskarray(values), None, values.data.astype(object))
        array = np.asarray(values)
        if array.dtype.kind in "mM":
            # One by one: astype(object) would turn nanoseconds into integers.
            return np.fromiter(array.flat, object, array.size).reshape(array.shape)
        # Objects: NumPy would pad all texts to the longest one, and turn numbers into text.
        return array if array.dtype.kind in "biufO" else np.asarray(values, object)
    except (TypeError, ValueError):
        raise FeatureError(name, "found no array, or rows of several lengths") from None


def _integers(name: str, values: Sequence) -> np.ndarray:
    array = _as_array(name, values)
    if array.dtype.kind in "bi":
        return array.astype("<i8")
    if array.dtype.kind == "u":
        _refuse(name, array, array > np.uint64(2**63 - 1))
        return array.astype("<i8")
    if array.dtype.kind == "f":
        missing = np.isnan(array)
        if np.all(missing | (np.abs(array) < np.float64(_INEXACT))):
            _refuse(name, array, ~missing & (array != np.trunc(array)))
            return np.where(missing, MISSING_INTEGER, np.where(missing, 0, array).astype("<i8"))
        # NumPy makes floats of integers with a gap; as objects they stay exact.
        array = np.asarray(values, object)
    return _one_by_one(name, array, np.empty(array.shape, "<i8"), _int_or_none, _INTEGER)


def _floats(name: str, values: Sequence) -> np.ndarray:
    array = _as_array(name, values)
    with np.errstate(over="ignore"):
        if array.dtype.kind in "biuf":
            return array.astype("<f4")
        return _one_by_one(name, array, np.empty(array.shape, "<f4"), _float_or_none, "a number")


def _one_by_one(
    name: str,
    array: np.ndarray,
    result: np.ndarray,
    convert: Callable[[object], float | None],
    expected: str,
) -> np.ndarray:
    """Fills the result with the objects of the array."""
    missing = MISSING_INTEGER if result.dtype.kind == "i" else MISSING_FLOAT
    for place, value in np.ndenumerate(array):
        number = missing if _is_missing(value) else convert(value)
        if number is None:
            raise FeatureError(name, expected, row=place[0] if place else 0, found=value)
        result[place] = number
    return result


def _strings(name: str, values: Sequence) -> np.ndarray:
    array = _as_array(name, values)
    texts = array.ravel().tolist()
    try:
        encoded = [text.encode() for text in texts]
    except (AttributeError, UnicodeEncodeError):
        # One by one, to accept missing values and find the wrong one.
        encoded = [_string(name, row, value) for row, value in enumerate(texts)]
    result = np.empty(len(encoded), object)
    result[:] = encoded
    return result.reshape(array.shape)


def _string(name: str, row: int, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if _is_missing(value):
        return MISSING_STRING
    try:
        return value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise FeatureError(name, "a string", row=row, found=value) from None


_CONVERSIONS = {
    tensor_pb2.DT_INT64: _integers,
    tensor_pb2.DT_FLOAT: _floats,
    tensor_pb2.DT_STRING: _strings,
}


def _is_missing(value: object) -> bool:
    """None, "", NaN and pandas' NA, which is found by its type's name without importing pandas."""
    if value is None or (isinstance(value, str) and not value):
        return True
    if _is_number(value):
        return bool(value != value)
    return type(value).__name__ in ("NAType", "NaTType")


def _is_number(value: object) -> bool:
    # Python's types first, as the most frequent. To NumPy a timedelta is an integer.
    return isinstance(value, int | float | numbers.Real | decimal.Decimal | np.bool_) and (
        not isinstance(value, np.timedelta64)
    )


def _int_or_none(value: object) -> int | None:
    """The value as an integer of 64 bits; None if it is not one."""
    if not _is_number(value):
        return None
    try:
        number = int(value)
    except (OverflowError, ValueError):
        return None
    if isinstance(value, float | np.floating) and abs(number) >= _INEXACT:
        return None
    return number if number == value and -(2**63) <= number < 2**63 else None


def _float_or_none(value: object) -> float | None:
    try:
        return float(value) if _is_number(value) else None
    except OverflowError:
        return None


def _refuse(name: str, array: np.ndarray, wrong: np.ndarray) -> None:
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        raise FeatureError(name, _INTEGER, row=int(place[0]) if place else 0, found=array[place])


def _check_shape(name: str, array: np.ndarray, info: tensor_pb2.TensorInfo) -> None:
    expected = [dimension.size for dimension in info.tensor_shape.dim]
    if info.tensor_shape.unknown_rank:
        expected = [-1] * max(1, array.ndim)
    fits = array.ndim == len(expected) and all(
        wanted < 0 or size == wanted for size, wanted in zip(array.shape, expected, strict=True)
    )
    if not fits:
        text = ", ".join("rows" if size < 0 else str(size) for size in expected)
        raise FeatureError(
            name, f"found the shape {list(array.shape)}, expected the shape [{text}]"
        )


def listed(inputs: Mapping[str, object]) -> str:
    """The first names, for a message."""
    names = sorted(inputs)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
