"""JSON to arrays and back, as TensorFlow Serving's REST API defines it.

What is accepted, the messages, the digits of numbers and the layout of answers are those of
tensorflow/serving (util/json_tensor.cc), except:

- after `JSON Parse error:` comes the message of Python's parser, unless a number is too big;
- a key that occurs twice in an object is refused;
- a document may be nested only as deeply as Python's parser can read;
- a data type that JSON does not have (half, bfloat16, complex, quantized, ...) is INVALID_ARGUMENT
  in requests as in answers (TF Serving answers requests with UNIMPLEMENTED).

orjson parses plain JSON. What it refuses, and what has a key twice, is parsed again by Python's
slower parser, which accepts NaN and Inf and says what is wrong.
"""

import base64
import binascii
import itertools
import json
import math
import operator
import re
import struct
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import orjson
from tensorflow.core.example import example_pb2, feature_pb2
from tensorflow_serving.apis import classification_pb2, input_pb2, regression_pb2

from pwiser_serving import tensors
from pwiser_serving.protos import tensor_pb2
from pwiser_serving.server.status import Status, invalid_argument

_BOM = b"\xef\xbb\xbf"
_START = re.compile("\ufeff?[ \t\r\n]*")
# A string, or the pattern: matches within strings are skipped.
_STRING = r'"(?:[^"\\]|\\.)*"|'
_CONSTANT = re.compile(_STRING + "-?(?:Inf(?:inity)?|NaN)", re.DOTALL)
_NUMBER = re.compile(_STRING + r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", re.DOTALL)

# The most characters of a value in a message.
_QUOTED = 256
# Outputs with such a name hold bytes, not text.
_BYTES_SUFFIX = "_bytes"
# The dimensions that every version of NumPy can have.
_MAX_RANK = 32

_WIDE = (-(2**31), 2**31 - 1)
# The whole numbers that JSON may have for a data type. TF Serving reads the small types as 32 bits
# and keeps the lower bits.
_BOUNDS = {
    tensor_pb2.DT_INT8: _WIDE,
    tensor_pb2.DT_INT16: _WIDE,
    tensor_pb2.DT_INT32: _WIDE,
    tensor_pb2.DT_UINT8: _WIDE,
    tensor_pb2.DT_INT64: (-(2**63), 2**63 - 1),
    tensor_pb2.DT_UINT32: (0, 2**32 - 1),
    tensor_pb2.DT_UINT64: (0, 2**64 - 1),
}
_FLOATS = {tensor_pb2.DT_FLOAT, tensor_pb2.DT_DOUBLE}
_KNOWN = {*_BOUNDS, *_FLOATS, tensor_pb2.DT_BOOL, tensor_pb2.DT_STRING}


# ---- requests


def parse(body: bytes) -> dict:
    """A request's body, which must be a JSON object. What follows it is ignored.

    Bytes that are not UTF-8 are kept, as surrogate escapes.

    Raises:
      Status: INVALID_ARGUMENT.
    """
    try:
        document = orjson.loads(body.removeprefix(_BOM))
    except orjson.JSONDecodeError:
        document = _parse_strictly(body)
    else:
        # orjson keeps the last of two equal keys: then the text has more colons than the document
        # has keys. If there are more, those in strings are not counted.
        if not any(_has_keys(document, count(body)) for count in (_colons, _colons_but_in_strings)):
            document = _parse_strictly(body)
    if type(document) is not dict:
        raise _format_error(document, "Is not object")
    return document


def signature_name(document: dict) -> str:
    """The signature that a request names, or ""."""
    name = document.get("signature_name", "")
    if type(name) is not str:
        raise _format_error(
            document, "not formatted correctly. 'signature_name' key must be a string value."
        )
    return name.encode("utf-8", "replace").decode()


def inputs(document: dict, data_types: Mapping[str, int]) -> tuple[dict[str, np.ndarray], bool]:
    """The arrays of a Predict request.

    Args:
      document: what `parse` gave; data_types: of the signature's inputs, by name.

    Returns:
      The arrays by name, and whether the request is in the row format ("instances").

    Raises:
      Status: INVALID_ARGUMENT.
    """
    if not data_types:
        name = signature_name(document) or "DEFAULT"
        raise invalid_argument(f"Failed to get input map for signature: {name}")
    try:
        if "instances" in document:
            if "inputs" in document:
                raise _format_error(
                    document,
                    "Not formatted correctly expecting only one of 'inputs' or 'instances' keys "
                    "to exist ",
                )
            return _rows(document, data_types), True
        if "inputs" in document:
            return _columns(document["inputs"], data_types), False
    except RecursionError:
        raise _too_deep() from None
    raise invalid_argument("Missing 'inputs' or 'instances' key")


def examples(document: dict) -> input_pb2.Input:
    """The Examples of a Classify or Regress request, with their context if there is one.

    Raises:
      Status: INVALID_ARGUMENT.
    """
    result = input_pb2.Input()
    listed = result.example_list
    if "context" in document:
        listed = result.example_list_with_context
        _fill_example(document["context"], listed.context)
        # Set, even if it is empty.
        listed.context.SetInParent()
    # TF Serving says classify for both.
    if "examples" not in document:
        raise _format_error(
            document, "When method is classify, key 'examples' is expected and was not found"
        )
    rows = document["examples"]
    if type(rows) is not list:
        raise _format_error(document, "Expecting 'examples' value to be an list/array")
    if not rows:
        raise _format_error(document, "'examples' value is an empty array")
    for row in rows:
        _fill_example(row, listed.examples.add())
    return result


def _has_keys(document: object, count: int) -> bool:
    """Whether the objects of a document have `count` keys in all. They never have more."""
    level = [document]
    while level:
        count -= sum(len(value) for value in level if type(value) is dict)
        # A usual request returns here.
        if not count:
            return True
        level = [
            item
            for value in level
            for item in (value.values() if type(value) is dict else value)
            if type(item) is dict or type(item) is list
        ]
    return False


def _colons(body: bytes) -> int:
    # Several times faster than bytes.count if there are many.
    return int(np.count_nonzero(np.frombuffer(body, np.uint8) == ord(":")))


def _colons_but_in_strings(body: bytes) -> int:
    if b"\\" in body:
        # A quote after two backslashes ends a string; after one backslash it does not.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(body, np.uint8)
    quotes, colons = (np.flatnonzero(characters == ord(mark)) for mark in '":')
    # An even number of quotes stands before what is outside strings.
    return int(np.count_nonzero(np.searchsorted(quotes, colons) % 2 == 0))


def _parse_strictly(body: bytes) -> object:
    """The first JSON value in a body, by all the rules of TF Serving's parser."""
    text = body.decode("utf-8", "surrogateescape")
    start = _START.match(text).end()
    if start == len(text):
        raise invalid_argument("JSON Parse error: The document is empty")
    constants = []

    def hide(match: re.Match) -> str:
        token = match[0]
        if token.startswith('"'):
            return token
        constants.append(float(token))
        return "NaN".rjust(len(token))

    # Python's parser does not know Inf, -Inf and -NaN. It reads NaN, padded to the same length, in
    # place of each constant, and asks for the values in the same order.
    readable = text
    if "Inf" in text or "-NaN" in text:
        readable = _CONSTANT.sub(hide, text)
    values = iter(constants)
    decoder = json.JSONDecoder(
        object_pairs_hook=_unique,
        # Integers of more than 64 bits become doubles; those too big for a double are refused.
        parse_float=orjson.loads,
        parse_int=orjson.loads,
        parse_constant=lambda name: next(values, float(name)),
    )
    try:
        return decoder.raw_decode(readable, start)[0]
    except orjson.JSONDecodeError as error:
        message = "Number too big to be stored in double."
        place = next(match.start() for match in _NUMBER.finditer(text) if match[0] == error.doc)
    except json.JSONDecodeError as error:
        message, place = error.msg, error.pos
    except RecursionError:
        raise _too_deep() from None
    # Bytes from the start of the body, as TF Serving counts.
    offset = len(text[:place].encode("utf-8", "surrogateescape"))
    raise invalid_argument(f"JSON Parse error: {message} at offset: {offset}")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise invalid_argument("JSON Parse error: a key occurs twice in an object")
    return result


def _too_deep() -> Status:
    return invalid_argument("JSON Parse error: The document is nested too deeply")


def _rows(document: dict, data_types: Mapping[str, int]) -> dict[str, np.ndarray]:
    rows = document["instances"]
    if type(rows) is not list:
        raise _format_error(document, "Expecting 'instances' to be an list/array")
    if not rows:
        raise _format_error(document, "No values in 'instances' array")
    if type(rows[0]) is not dict and len(data_types) > 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    named = _is_object(rows[0])
    if named:
        arrays = _named_rows(rows, data_types)
    else:
        name = min(data_types)
        arrays = {name: _array(rows, data_types[name])}
    if any(array is None for array in arrays.values()):
        raise _wrong_rows(rows, named, data_types)
    return arrays


def _named_rows(rows: list, data_types: Mapping[str, int]) -> dict[str, np.ndarray | None]:
    """Rows that are objects as arrays by name; None for a wrong one."""
    if set(map(type, rows)) != {dict} or set(map(len, rows)) != {len(data_types)}:
        return dict.fromkeys(data_types)
    arrays = {}
    for data_type in set(data_types.values()):
        names = [name for name in data_types if data_types[name] == data_type]
        # The first name twice: with a single name, itemgetter would not give tuples.
        values = map(operator.itemgetter(*names, names[0]), rows)
        width = len(names) + 1
        try:
            leaves = list(itertools.chain.from_iterable(values))
        except KeyError:
            return dict.fromkeys(data_types)
        # Usual case: plain values of all inputs of a type are converted at once.
        table = _values(leaves, data_type)
        if table is not None:
            columns = np.ascontiguousarray(table.reshape(-1, width).T)
        else:
            columns = [_array(leaves[place::width], data_type) for place in range(width)]
        arrays.update(zip(names, columns[:-1], strict=True))
    return arrays


def _columns(value: object, data_types: Mapping[str, int]) -> dict[str, np.ndarray]:
    if _is_object(value):
        columns = {}
        for name in data_types:
            if name not in value:
                raise invalid_argument(f"Missing named input: {name} in 'inputs' object.")
            columns[name] = value[name]
    elif len(data_types) > 1:
        raise invalid_argument(
            "inputs is a plain value/list, but expecting an object as multiple input tensors "
            "required as per tensorinfo_map"
        )
    else:
        columns = {min(data_types): value}
    arrays = {}
    for name, column in columns.items():
        arrays[name] = _array(column, data_types[name])
        if arrays[name] is None:
            _check(column, 0, _shape(column), data_types[name])
            raise invalid_argument(f"tensor parsing error: {name}")
    return arrays


def _shape(value: object) -> list[int]:
    """The shape of nested lists, by their first elements."""
    shape = []
    while type(value) is list:
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def _array(value: object, data_type: int) -> np.ndarray | None:
    """Nested lists as an array, or None if anything is wrong with them: `_check` says what."""
    shape = _shape(value)
    if len(shape) > _MAX_RANK:
        return None
    leaves = [value]
    for size in shape:
        if set(map(type, leaves)) - {list} or set(map(len, leaves)) - {size}:
            return None
        leaves = leaves[0] if len(leaves) == 1 else list(itertools.chain.from_iterable(leaves))
    array = _values(leaves, data_type)
    return None if array is None else array.reshape(shape)


def _values(leaves: list, data_type: int) -> np.ndarray | None:
    """Values as an array, [n], or None if one does not fit the data type."""
    if data_type in _FLOATS:
        array = _numbers(leaves, "d")
        # A value that is too big for a float becomes infinite.
        with np.errstate(over="ignore"):
            return None if array is None else array.astype(tensors.numpy_type(data_type))
    if data_type in _BOUNDS:
        low, high = _BOUNDS[data_type]
        array = _numbers(leaves, "q" if high < 2**63 else "Q")
        if array is None or (leaves and not low <= array.min() <= array.max() <= high):
            return None
        return array.astype(tensors.numpy_type(data_type))
    kinds = set(map(type, leaves))
    if data_type == tensor_pb2.DT_BOOL and kinds <= {bool}:
        return np.array(leaves, bool)
    if data_type == tensor_pb2.DT_STRING and kinds <= {str, dict}:
        try:
            return np.fromiter(map(_bytes, leaves), object, len(leaves))
        except Status:
            return None
    return None


def _numbers(leaves: list, kind: str) -> np.ndarray | None:
    """Numbers as an array, [n], or None if one does not fit the type code `kind`."""
    try:
        # Twice as fast as NumPy's conversion, and as strict as JSON except for booleans.
        array = np.frombuffer(struct.pack(f"{len(leaves)}{kind}", *leaves), kind)
    except struct.error:
        return None
    # In Python, but not here, a boolean is a number.
    places = np.flatnonzero((array == 0) | (array == 1)).tolist()
    return None if bool in set(map(type, map(leaves.__getitem__, places))) else array


def _bytes(value: str | dict) -> bytes:
    """A string's bytes; an object must be {"b64": ...}."""
    if type(value) is dict:
        return _decode_base64(value)
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise invalid_argument(
            "JSON Parse error: The surrogate pair in string is invalid."
        ) from None


def _is_base64(value: object) -> bool:
    return type(value) is dict and value.keys() == {"b64"} and type(value["b64"]) is str


def _is_object(value: object) -> bool:
    """Whether a value is an object, and not {"b64": ...}."""
    return type(value) is dict and not _is_base64(value)


def _decode_base64(value: dict) -> bytes:
    if not _is_base64(value):
        raise _format_error(value, "not formatted correctly for base64 data")
    text = "".join(value["b64"].split())
    bare = text.rstrip("=")
    padding = -len(bare) % 4 * "="
    try:
        if text not in (bare, bare + padding):
            raise ValueError
        return base64.b64decode(bare + padding, validate=True)
    except (binascii.Error, ValueError):
        raise invalid_argument("Unable to base64 decode") from None


# What follows finds the error, in TF Serving's order. It is slow.


def _wrong_rows(rows: list, named: bool, data_types: Mapping[str, int]) -> Status:
    """The error of the first wrong row."""
    shapes: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if named and not _is_object(row):
            return invalid_argument(f"Expecting object but got list at item {number} of input list")
        if not named and _is_object(row):
            return invalid_argument(
                f"Expecting value/list but got object at item {number} of input list"
            )
        for name, value in row.items() if named else [(min(data_types), row)]:
            try:
                _check_item(name, value, shapes, data_types)
            except Status as status:
                key = f" key: {name}" if named else ""
                return invalid_argument(
                    f"Failed to process element: {number}{key} of 'instances' list. "
                    f"Error: {status.code.name}: {status.message}"
                )
        if named and row.keys() != data_types.keys():
            return invalid_argument(
                f"Failed to process element: {number} of 'instances' list. "
                f"JSON object: {_quote(row)} keys must be equal to: {','.join(sorted(data_types))}"
            )
    return invalid_argument(f"tensor parsing error: {','.join(sorted(data_types))}")


def _check_item(
    name: str, value: object, shapes: dict[str, list[int]], data_types: Mapping[str, int]
) -> None:
    """Raises Status if one row's value of one input is wrong. `shapes` are the first row's."""
    if name not in data_types:
        raise invalid_argument(f"JSON object: does not have named input: {name}")
    shape = _shape(value)
    _check(value, 0, shape, data_types[name])
    first = shapes.setdefault(name, shape)
    if math.prod(first) != math.prod(shape):
        raise invalid_argument(
            f"Expecting tensor size: {math.prod(first)} but got: {math.prod(shape)}"
        )
    if first != shape:
        raise invalid_argument(f"Expecting shape {_joined(first)} but got: {_joined(shape)}")


def _check(value: object, level: int, shape: list[int], data_type: int) -> None:
    """Raises Status for the first value with a wrong place or type."""
    if type(value) is not list:
        if level != len(shape):
            raise invalid_argument(
                f"JSON Value: {_quote(value)} found at incorrect level: {level + 1} in the JSON "
                f"DOM. Expected at level: {len(shape)}"
            )
        _check_leaf(value, data_type)
        return
    if level >= len(shape):
        raise invalid_argument(
            f"Encountered list at unexpected level: {level} expected < {len(shape)}"
        )
    if len(value) != shape[level]:
        raise invalid_argument(
            f"Encountered list at unexpected size: {len(value)} at level: {level} "
            f"expected size: {shape[level]}"
        )
    for item in value:
        _check(item, level + 1, shape, data_type)


def _check_leaf(value: object, data_type: int) -> None:
    if data_type == tensor_pb2.DT_STRING and type(value) in (str, dict):
        _bytes(value)
        return
    name = tensors.data_type_name(data_type)
    if type(value) is not dict and data_type not in _KNOWN:
        raise invalid_argument(f"Conversion of JSON Value: {_quote(value)} to type: {name}")
    if _values([value], data_type) is None:
        raise invalid_argument(
            f"JSON Value: {_quote(value)} Type: {_type_name(value)} is not of expected type: {name}"
        )


def _format_error(value: object, message: str) -> Status:
    return invalid_argument(f"JSON Value: {_quote(value)} {message}")


def _type_name(value: object) -> str:
    if value is None or type(value) is bool:
        return {None: "Null", True: "True", False: "False"}[value]
    return {dict: "Object", list: "Array", str: "String"}.get(type(value), "Number")


def _joined(shape: list[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _quote(value: object) -> str:
    """A value's JSON for a message, cut if it is long."""
    text = ""
    for piece in _pieces(value, 0):
        if len(text) >= _QUOTED:
            break
        text += piece
    return text


def _pieces(value: object, depth: int, before: str = "") -> Iterator[str]:
    line = "\n" + "    " * depth
    if type(value) is dict and value:
        yield before + "{"
        for number, (key, item) in enumerate(value.items()):
            yield ("," if number else "") + line + "    " + _dump(key)
            yield from _pieces(item, depth + 1, ": ")
        yield line + "}"
    elif type(value) is list and value:
        yield before + "["
        for number, item in enumerate(value):
            yield from _pieces(item, depth + 1, ", " if number else "")
        yield "]"
    else:
        yield before + _dump(value)


# ---- Examples


def _fill_example(row: object, example: example_pb2.Example) -> None:
    if type(row) is not dict:
        raise invalid_argument(f"Example must be JSON object but got JSON {_type_name(row)}")
    for name, values in row.items():
        text = _bytes(name).decode("utf-8", "replace")
        feature = example.features.feature[text]
        for value in values if type(values) is list else [values]:
            _add_value(value, text, feature)


def _add_value(value: object, name: str, feature: feature_pb2.Feature) -> None:
    if value is None or type(value) is list or _is_object(value):
        raise invalid_argument(
            f"Feature: {name} has element with unexpected JSON type: {_type_name(value)}"
        )
    kind = {bool: "int64_list", int: "int64_list", float: "float_list"}.get(
        type(value), "bytes_list"
    )
    found = feature.WhichOneof("kind")
    if found not in (None, kind):
        expected = found.removesuffix("_list")
        raise invalid_argument(
            f"Unexpected element type in feature: {name} expecting type: {expected}"
        )
    if kind == "int64_list" and value >= 2**63:
        raise invalid_argument(f"Feature: {name} has uint64_t element. Only int64_t is supported.")
    if kind == "bytes_list":
        value = _bytes(value)
    elif type(value) is bool:
        value = int(value)
    getattr(feature, kind).value.append(value)


# ---- answers


def predictions(arrays: Mapping[str, np.ndarray], *, row: bool) -> bytes:
    """The answer to a Predict request, in the row or the column format, from outputs by name.

    Raises:
      Status: INVALID_ARGUMENT for outputs that this format cannot hold.
    """
    if not arrays:
        raise invalid_argument("Cannot convert empty tensor map to JSON")
    return _encode(_row_answer(arrays) if row else _column_answer(arrays))


def classifications(result: classification_pb2.ClassificationResult) -> bytes:
    """The answer to a Classify request."""
    if not result.classifications:
        raise invalid_argument("Cannot convert empty ClassificationResults to JSON")
    rows = []
    for row in result.classifications:
        scores = _decimals(np.array([one.score for one in row.classes], np.float32))
        pairs = zip(row.classes, scores, strict=True)
        rows.append("[" + ", ".join(f"[{_dump(one.label)}, {score}]" for one, score in pairs) + "]")
    return _encode('{\n    "results": [' + ", ".join(rows) + "\n    ]\n}")


def regressions(result: regression_pb2.RegressionResult) -> bytes:
    """The answer to a Regress request."""
    if not result.regressions:
        raise invalid_argument("Cannot convert empty RegressionResults to JSON")
    values = _decimals(np.array([one.value for one in result.regressions], np.float32))
    return _encode('{\n    "results": [' + ", ".join(values) + "]\n}")


def error(message: str) -> bytes:
    """The answer to a request that failed, always valid UTF-8."""
    return f'{{\n    "error": {_dump(message)}\n}}'.encode("utf-8", "replace")


def _row_answer(arrays: Mapping[str, np.ndarray]) -> str:
    size = None
    for name, array in arrays.items():
        if not array.ndim:
            raise invalid_argument(f"Tensor name: {name} has no shape information ")
        if size not in (None, len(array)):
            raise invalid_argument(
                f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {size}"
            )
        size = len(array)
    columns = [_nest(_texts(name, array), array.shape, 1) for name, array in arrays.items()]
    if len(columns) == 1:
        rows = ", ".join(columns[0])
    else:
        keys = [_dump(name).replace("%", "%%") + ": %s" for name in arrays]
        row = "\n        {\n            " + ",\n            ".join(keys) + "\n        }"
        rows = ",".join(row % values for values in zip(*columns, strict=True))
    return '{\n    "predictions": [' + rows + ("\n    ]\n}" if size else "]\n}")


def _column_answer(arrays: Mapping[str, np.ndarray]) -> str:
    indent = 1 if len(arrays) == 1 else 2
    texts = {
        name: _nest(_texts(name, array), array.shape, 0, indent)[0]
        for name, array in arrays.items()
    }
    if len(texts) == 1:
        return f'{{\n    "outputs": {next(iter(texts.values()))}\n}}'
    lines = ",\n".join(f"        {_dump(name)}: {text}" for name, text in texts.items())
    return f'{{\n    "outputs": {{\n{lines}\n    }}\n}}'


def _texts(name: str, array: np.ndarray) -> list[str]:
    """The elements of an output as JSON, in order."""
    data_type = tensors.data_type(array)
    if data_type in _FLOATS:
        return _decimals(array.ravel())
    values = array.ravel().tolist()
    if data_type in _BOUNDS:
        return list(map(str, values))
    if data_type == tensor_pb2.DT_BOOL:
        return ["true" if value else "false" for value in values]
    if data_type != tensor_pb2.DT_STRING:
        raise invalid_argument(
            "Failed to write JSON value for tensor type: " + tensors.data_type_name(data_type)
        )
    if name.endswith(_BYTES_SUFFIX):
        return [f'{{"b64": "{base64.b64encode(value).decode()}"}}' for value in values]
    return [_dump(value.decode("utf-8", "surrogateescape")) for value in values]


def _nest(
    texts: list[str], shape: tuple[int, ...], first: int, indent: int | None = None
) -> list[str]:
    """Joins an array's elements to nested lists.

    Args:
      texts: the elements; shape: the array's; first: the axis of the outermost lists; indent: how
      deep they are, for one line an element, or None for a single line.

    Returns:
      The outermost lists, or the elements if the array has no such axis.
    """
    for axis in range(len(shape) - 1, first - 1, -1):
        start, between, end = "[", ", ", "]"
        if indent is not None and shape[axis]:
            line = "\n" + "    " * (indent + axis)
            start, between, end = f"[{line}    ", f",{line}    ", f"{line}]"
        size = shape[axis]
        texts = [
            start + between.join(texts[row * size : (row + 1) * size]) + end
            for row in range(math.prod(shape[:axis]))
        ]
    return texts


def _decimals(array: np.ndarray) -> list[str]:
    """Floats, [n], as TF Serving writes them: with six digits if exact, otherwise in full."""
    digits = 9 if array.dtype == np.float32 else 17
    values = array.tolist()
    # One formatting of all values is faster than one of each.
    texts = (f"%.{digits}g " * len(values) % tuple(values)).split()
    for place in np.flatnonzero(_may_be_short(array)).tolist():
        text = f"{values[place]:.6g}"
        if array.dtype.type(text) == values[place]:
            texts[place] = text
    # Only a whole number may have neither point nor exponent.
    for place in np.flatnonzero(array == np.rint(array)).tolist():
        if "." not in texts[place] and "e" not in texts[place]:
            texts[place] += ".0"
    for place in np.flatnonzero(~np.isfinite(array)).tolist():
        texts[place] = _dump(values[place])
    return texts


def _may_be_short(array: np.ndarray) -> np.ndarray:
    """False for numbers that six digits do not give exactly; true for the others and a few more."""
    limits = np.finfo(array.dtype)
    with np.errstate(all="ignore"):
        sizes = np.abs(array, dtype=np.float64)
        # At least six digits before the point, a seventh where the logarithm is rounded up.
        scaled = sizes * 10.0 ** (5 - np.floor(np.log10(sizes) - 1e-6))
        distances = np.abs(scaled - np.rint(scaled))
    # A number stands for all within half of its last bit, eps / 2 of it at most; 1e-14 for what is
    # rounded here. NaN gives true: of zero, of what is not finite, of a scale that overflows.
    return ~(distances > (limits.eps / 2 + 1e-14) * scaled) | (sizes < limits.tiny)


def _encode(text: str) -> bytes:
    # Strings that are not UTF-8 are sent as the bytes that the model gave.
    return text.encode("utf-8", "surrogateescape")


_dump: Callable[[object], str] = json.JSONEncoder(ensure_ascii=False).encode
