"""NumPy arrays to Tensor messages and back, by TensorFlow's rules for a TensorProto."""

import math

import numpy as np

from pwiser_serving.protos import tensor_pb2

Tensor = tensor_pb2.Tensor

try:
    # TensorFlow's small types. A client does not need them: its scores have 32 bits.
    import ml_dtypes
except ImportError:
    ml_dtypes = None

_STRINGS = np.dtype(object)
# Data type: its NumPy type, and the field that holds values sent one by one.
_TYPES = {
    tensor_pb2.DT_FLOAT: (np.dtype("<f4"), "float_val"),
    tensor_pb2.DT_DOUBLE: (np.dtype("<f8"), "double_val"),
    tensor_pb2.DT_HALF: (np.dtype("<f2"), "half_val"),
    tensor_pb2.DT_COMPLEX64: (np.dtype("<c8"), "scomplex_val"),
    tensor_pb2.DT_COMPLEX128: (np.dtype("<c16"), "dcomplex_val"),
    tensor_pb2.DT_INT8: (np.dtype("i1"), "int_val"),
    tensor_pb2.DT_INT16: (np.dtype("<i2"), "int_val"),
    tensor_pb2.DT_INT32: (np.dtype("<i4"), "int_val"),
    tensor_pb2.DT_INT64: (np.dtype("<i8"), "int64_val"),
    tensor_pb2.DT_UINT8: (np.dtype("u1"), "int_val"),
    tensor_pb2.DT_UINT16: (np.dtype("<u2"), "int_val"),
    tensor_pb2.DT_UINT32: (np.dtype("<u4"), "uint32_val"),
    tensor_pb2.DT_UINT64: (np.dtype("<u8"), "uint64_val"),
    tensor_pb2.DT_BOOL: (np.dtype("?"), "bool_val"),
    tensor_pb2.DT_STRING: (_STRINGS, "string_val"),
    # Quantized numbers: a named field of the plain type, as TensorFlow has them in NumPy.
    tensor_pb2.DT_QINT8: (np.dtype([("qint8", "i1")]), "int_val"),
    tensor_pb2.DT_QUINT8: (np.dtype([("quint8", "u1")]), "int_val"),
    tensor_pb2.DT_QINT16: (np.dtype([("qint16", "<i2")]), "int_val"),
    tensor_pb2.DT_QUINT16: (np.dtype([("quint16", "<u2")]), "int_val"),
    tensor_pb2.DT_QINT32: (np.dtype([("qint32", "<i4")]), "int_val"),
}
_ML_FIELDS = {
    "bfloat16": "half_val",
    "float8_e5m2": "float8_val",
    "float8_e4m3fn": "float8_val",
    "float8_e4m3fnuz": "float8_val",
    "float8_e4m3b11fnuz": "float8_val",
    "float8_e5m2fnuz": "float8_val",
    "int4": "int_val",
    "uint4": "int_val",
    "int2": "int_val",
    "uint2": "int_val",
    "float4_e2m1fn": "float8_val",
}
# An older ml_dtypes has fewer of them.
_TYPES |= {
    tensor_pb2.DataType.Value(f"DT_{name.upper()}"): (np.dtype(getattr(ml_dtypes, name)), field)
    for name, field in _ML_FIELDS.items()
    if hasattr(ml_dtypes, name)
}
_DATA_TYPES = {dtype: data_type for data_type, (dtype, _) in _TYPES.items()}
# Data types whose repeated field has a fixed size a number: the field's tag.
_PACKED = {
    data_type: bytes([tensor_pb2.Tensor.DESCRIPTOR.fields_by_name[field].number << 3 | 2])
    for data_type, (_, field) in _TYPES.items()
    if field in ("float_val", "double_val", "scomplex_val", "dcomplex_val")
}

# A shape may claim this many elements more than were sent, and sizes up to this without elements:
# a few bytes must not fill the memory, here or in the model.
MAX_PADDING = 2**16


def numpy_type(data_type: int) -> np.dtype | None:
    """The NumPy type of a data type, object for strings; None if there is none."""
    return _TYPES.get(data_type, (None,))[0]


def data_type_name(data_type: int) -> str:
    """A data type as TensorFlow writes it in messages: "float", "int64", "string"."""
    if data_type not in tensor_pb2.DataType.values():
        return f"data type {data_type}"
    return tensor_pb2.DataType.Name(data_type).removeprefix("DT_").lower()


def data_type(array: np.ndarray) -> int:
    """The data type of an array that `decode` gave."""
    return _DATA_TYPES[array.dtype]


def encode(array: np.ndarray, *, as_content: bool = True) -> Tensor:
    """An array of any shape as a Tensor message.

    Args:
      array: numbers, booleans, or objects that are bytes.
      as_content: numbers as raw bytes, which is far faster, or one by one as TF Serving answers by
        default. Strings are always sent one by one.

    Raises:
      TypeError: the array has a type that TensorFlow does not know.
    """
    if array.dtype not in _DATA_TYPES:
        raise TypeError(f"no tensor holds NumPy's {array.dtype}")
    tensor = Tensor()
    fill(tensor, array, as_content=as_content)
    return tensor


def fill(tensor: Tensor, array: np.ndarray, *, as_content: bool = True) -> None:
    """Writes an array into an empty Tensor or tensorflow.TensorProto, as `encode` says.

    The array's type must be one that `encode` takes.
    """
    data_type = _DATA_TYPES[array.dtype]
    tensor.dtype = data_type
    dimensions = tensor.tensor_shape.dim
    for size in array.shape:
        dimensions.add(size=size)
    if as_content and data_type != tensor_pb2.DT_STRING:
        tensor.tensor_content = array.tobytes()
        return
    field = _TYPES[data_type][1]
    if field == "float8_val":
        tensor.float8_val = array.tobytes()
    elif data_type in _PACKED and array.size:
        # On the wire: a tag, the length, and the numbers as in memory.
        tensor.MergeFromString(_PACKED[data_type] + _varint(array.nbytes) + array.tobytes())
    else:
        if field == "half_val":
            array = array.view(np.uint16)
        elif array.dtype.names:
            array = array.view(array.dtype[0])
        elif field == "int_val":
            array = array.astype(np.int32)
        getattr(tensor, field).extend(array.ravel().tolist())


def decode(tensor: Tensor) -> np.ndarray:
    """A Tensor message as an array; numbers sent as raw bytes give a read-only view of them.

    As in TensorFlow, if there are fewer values than elements, the last one is repeated, or zero if
    there is none; if there are more, the rest is dropped.

    Raises:
      ValueError: unknown data type, impossible shape, a byte count that does not fit the shape,
        more than MAX_PADDING elements without a value, or an empty shape with a size above it.
    """
    if tensor.dtype not in _TYPES:
        raise ValueError(f"data type {tensor.dtype}")
    dtype, field = _TYPES[tensor.dtype]
    # TensorFlow too ignores unknown_rank.
    shape = [dimension.size for dimension in tensor.tensor_shape.dim]
    if shape and min(shape) < 0:
        raise ValueError("a shape that is not fully known")
    # The product of Python integers: it cannot overflow.
    count = math.prod(shape)
    if not count and max(shape) > MAX_PADDING:
        raise ValueError(f"no elements, but a size of {max(shape)}")
    content = tensor.tensor_content
    if count and content:
        if dtype is _STRINGS:
            values = np.fromiter(_split_strings(content, count), object, count)
        elif len(content) != count * dtype.itemsize:
            raise ValueError("a byte count that does not fit the shape")
        else:
            values = np.frombuffer(content, dtype)
    else:
        values = _pad(_listed(getattr(tensor, field), dtype), count)
    return values.reshape(shape)


def _varint(number: int) -> bytes:
    """A number as protocol buffers write it: seven bits a byte, the lowest first."""
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _listed(field, dtype: np.dtype) -> np.ndarray:
    """Values sent one by one, [n]."""
    if dtype.kind == "O":
        return np.fromiter(field, object, len(field))
    if isinstance(field, bytes):
        return np.frombuffer(field, dtype)
    if dtype.kind == "c":
        # Real and imaginary parts alternate; an incomplete pair is dropped.
        parts = np.array(field, f"<f{dtype.itemsize // 2}")
        return parts[: len(parts) // 2 * 2].view(dtype)
    if dtype.names or (dtype.itemsize < 4 and dtype.kind != "b"):
        # Small types are sent as 32 bits; TensorFlow too keeps the lower ones.
        narrow = np.dtype(f"u{dtype.itemsize}")
        return np.array(field, np.int32).astype(narrow).view(dtype)
    return np.array(field, dtype)


def _pad(values: np.ndarray, count: int) -> np.ndarray:
    missing = count - len(values)
    if missing <= 0:
        return values[:count]
    if missing > MAX_PADDING:
        raise ValueError(f"{count} elements, {len(values)} values")
    padded = np.zeros(count, values.dtype)
    padded[: len(values)] = values
    if len(values):
        padded[len(values) :] = values[-1]
    elif values.dtype == object:
        padded[:] = b""
    return padded


def _split_strings(content: bytes, count: int):
    """Strings sent as raw bytes: their lengths as varints, then their bytes."""
    lengths, position = [], 0
    # Each length takes at least a byte: a huge count fails before memory is allocated.
    if count > len(content):
        raise ValueError("fewer strings than the shape has elements")
    for _ in range(count):
        length = shift = 0
        while True:
            if position >= len(content) or shift > 63:
                raise ValueError("a string length that does not end")
            byte = content[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        lengths.append(length)
    if position + sum(lengths) != len(content):
        raise ValueError("string lengths that do not fit the bytes")
    strings = []
    for length in lengths:
        strings.append(content[position : position + length])
        position += length
    return strings
