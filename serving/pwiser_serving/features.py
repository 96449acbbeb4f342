"""Features: from a caller's columns to the arrays that a signature expects."""

import decimal
import numbers
from collections.abc import Callable, Mapping, Sequence

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


def to_arrays(
    features: Mapping[str, Sequence], inputs: Mapping[str, tensor_pb2.TensorInfo]
) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a request, checked against what the model says it takes.

    Args:
      features: columns by name: lists, NumPy arrays, a pandas frame. None, NaN, "" and what is
        masked are missing values of any feature.
      inputs: a signature's inputs by name; the first axis of each is the batch.

    Returns:
      The arrays by name, with the types and shapes of `inputs`, and the number of rows.

    Raises:
      FeatureError: a feature is missing, unknown, of another type, shape or length.
    """
    names = set(features.keys())
    if names != inputs.keys():
        for name in sorted(inputs.keys() - names):
            raise FeatureError(name, f"missing; the model takes {_listed(inputs)}")
        for name in sorted(map(str, names - inputs.keys())):
            raise FeatureError(name, f"unknown to the model, which takes {_listed(inputs)}")
    arrays, rows, first = {}, None, None
    for name, info in sorted(inputs.items()):
        if info.dtype not in _CONVERSIONS:
            kind = tensors.data_type_name(info.dtype)
            raise FeatureError(name, f"int64, float or string; the model takes {kind} here")
        array = _CONVERSIONS[info.dtype](name, features[name])
        _check_shape(name, array, info)
        rows, first = (len(array), name) if rows is None else (rows, first)
        if len(array) != rows:
            raise FeatureError(name, f"found {len(array)} rows, expected {rows} as {first} has")
        arrays[name] = array
    return arrays, rows or 0


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


def _listed(inputs: Mapping[str, object]) -> str:
    names = sorted(inputs)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
