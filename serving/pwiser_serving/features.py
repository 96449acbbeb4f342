"""Features: a caller's columns to the arrays that a signature expects."""

from collections.abc import Mapping, Sequence

import numpy as np

from pwiser_serving import tensors
from pwiser_serving.errors import FeatureError
from pwiser_serving.protos import tensor_pb2

# How a missing value is written: the exported graph reads these as missing.
MISSING_INTEGER = -(2**63)
MISSING_STRING = b""
MISSING_FLOAT = float("nan")


def to_arrays(
    features: Mapping[str, Sequence], inputs: Mapping[str, tensor_pb2.TensorInfo]
) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a request, checked against what the model says it takes.

    Args:
      features: columns by name: lists, NumPy arrays, a pandas frame. None, NaN and "" are missing
        values of any feature.
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
        array = _CONVERSIONS.get(info.dtype, _other)(name, _as_array(name, features[name]), info)
        _check_shape(name, array, info)
        rows, first = (len(array), name) if rows is None else (rows, first)
        if len(array) != rows:
            raise FeatureError(name, f"found {len(array)} rows, expected {rows} as {first} has")
        arrays[name] = array
    return arrays, rows or 0


def _as_array(name: str, values: Sequence) -> np.ndarray:
    try:
        # Text lies in an object array: NumPy would give all of a column the longest one's width,
        # and turn a number beside a text into text.
        array = np.asarray(values)
        return array if array.dtype.kind in "biufO" else np.asarray(values, object)
    except ValueError:
        raise FeatureError(name, "an array with rows of one length") from None


def _integers(name: str, array: np.ndarray, info: tensor_pb2.TensorInfo) -> np.ndarray:
    expected = "an integer of 64 bits"
    if array.dtype.kind in "bi":
        return array.astype("<i8")
    if array.dtype.kind == "f":
        missing = np.isnan(array)
        # 2**63 itself is a float, and the first that is too large.
        whole = (array == np.trunc(array)) & (array >= -(2.0**63)) & (array < 2.0**63)
        _refuse(name, array, ~(whole | missing), expected)
        return np.where(missing, MISSING_INTEGER, np.where(missing, 0, array).astype("<i8"))
    if array.dtype.kind == "u":
        _refuse(name, array, array > np.uint64(2**63 - 1), expected)
        return array.astype("<i8")
    values = np.empty(array.shape, "<i8")
    for place, value in np.ndenumerate(array):
        if _is_missing(value):
            values[place] = MISSING_INTEGER
        elif _is_number(value) and _int_or_none(value) is not None:
            values[place] = _int_or_none(value)
        else:
            raise FeatureError(name, expected, row=place[0] if place else 0, found=value)
    return values


def _floats(name: str, array: np.ndarray, info: tensor_pb2.TensorInfo) -> np.ndarray:
    with np.errstate(over="ignore"):
        if array.dtype.kind in "biuf":
            return array.astype("<f4")
        values = np.empty(array.shape, "<f4")
        for place, value in np.ndenumerate(array):
            if _is_missing(value):
                values[place] = MISSING_FLOAT
            elif _is_number(value):
                values[place] = value
            else:
                raise FeatureError(name, "a number", row=place[0] if place else 0, found=value)
        return values


def _strings(name: str, array: np.ndarray, info: tensor_pb2.TensorInfo) -> np.ndarray:
    values = array.ravel().tolist()
    try:
        encoded = [value.encode() for value in values]
    except (AttributeError, UnicodeEncodeError):
        # Not all of them are plain text: one by one, to allow what is missing and find the fault.
        encoded = [_string(name, row, value) for row, value in enumerate(values)]
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


def _other(name: str, array: np.ndarray, info: tensor_pb2.TensorInfo) -> np.ndarray:
    kind = tensors.data_type_name(info.dtype)
    raise FeatureError(name, f"int64, float or string; the model takes {kind} here")


_CONVERSIONS = {
    tensor_pb2.DT_INT64: _integers,
    tensor_pb2.DT_FLOAT: _floats,
    tensor_pb2.DT_STRING: _strings,
}


def _is_missing(value: object) -> bool:
    """None, "", NaN and pandas' NA, which is told by its type's name: pandas may be absent."""
    if value is None or (isinstance(value, str) and not value):
        return True
    if isinstance(value, float | np.floating):
        return bool(value != value)
    return type(value).__name__ in ("NAType", "NaTType")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


def _int_or_none(value: object) -> int | None:
    """The value as an integer of 64 bits; None where it is none."""
    try:
        number = int(value)
    except (OverflowError, ValueError):
        return None
    return number if number == value and -(2**63) <= number < 2**63 else None


def _refuse(name: str, array: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        raise FeatureError(name, expected, row=int(place[0]) if place else 0, found=array[place])


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
