"""tensors: the rules of a TensorProto, held against TensorFlow's own reader."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from pwiser_serving import tensors
from pwiser_serving.protos import tensor_pb2
from pwiser_serving.protos.tensor_pb2 import Tensor, TensorShape

NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")
# Those that TensorFlow has and NumPy alone has not, or that no score is.
OTHERS = ["c8", "c16", *(dtype for dtype, _ in tensors._TYPES.values() if dtype.kind == "V")]


def _newer_types() -> set[int]:
    """The types that an older TensorFlow does not have."""
    from tensorflow.core.framework import types_pb2

    return set(tensor_pb2.DataType.values()) - set(types_pb2.DataType.values())


def _shape(*sizes):
    return TensorShape(dim=[TensorShape.Dimension(size=size) for size in sizes])


@pytest.mark.parametrize(("dtype", "as_content"), list(itertools.product(NUMBERS, (True, False))))
def test_numbers_survive_and_tensorflow_reads_the_same(dtype, as_content):
    import tensorflow as tf

    array = np.array([[0, 1, 3], [5, 7, 100]]).astype(dtype)
    tensor = tensors.encode(array, as_content=as_content)
    assert bool(tensor.tensor_content) == as_content
    back = tensors.decode(tensor)
    theirs = tf.make_ndarray(
        tf.compat.v1.make_tensor_proto(0).FromString(tensor.SerializeToString())
    )
    for found in (back, theirs):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("as_content", [True, False])
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_every_type_of_tensorflow_survives_and_its_own_reader_reads_the_same(dtype, as_content):
    import tensorflow as tf

    dtype = np.dtype(dtype)
    plain = dtype[0] if dtype.names else dtype
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(plain).view(dtype)
    tensor = tensors.encode(array, as_content=as_content)
    assert bool(tensor.tensor_content) == as_content
    back = tensors.decode(tensor)
    assert back.dtype == dtype
    assert back.tolist() == array.tolist()
    # The reader in C++.
    if tensor.dtype not in _newer_types():
        theirs = tf.io.parse_tensor(tensor.SerializeToString(), tf.dtypes.DType(tensor.dtype))
        assert theirs.numpy().tobytes() == array.tobytes()
    # Fewer values than elements: the last one is repeated.
    if not as_content:
        tensor = tensors.encode(array[0, :2], as_content=False)
        tensor.tensor_shape.dim[0].size = 4
        assert tensors.decode(tensor).tobytes() == array[0, [0, 1, 1, 1]].tobytes()


def test_all_types_are_there_but_those_of_tensorflow_alone():
    names = {tensors.data_type_name(data_type) for data_type in tensor_pb2.DataType.values()}
    # NumPy's types are those of ml_dtypes, whose older versions have not all.
    newer = {name for name in tensors._ML_FIELDS if not hasattr(ml_dtypes, name)}
    without = {"invalid", "resource", "variant"} | newer
    for data_type in tensor_pb2.DataType.values():
        name = tensors.data_type_name(data_type)
        assert (tensors.numpy_type(data_type) is None) == (name in without), name
    assert len(names) == 34


@pytest.mark.parametrize("dtype", NUMBERS)
def test_tensors_that_tensorflow_writes_are_read(dtype):
    import tensorflow as tf

    # One value for six elements, and six values one by one.
    for array in (np.full((2, 3), 1, dtype), np.arange(6).reshape(2, 3).astype(dtype)):
        theirs = tf.compat.v1.make_tensor_proto(array.tolist(), dtype=array.dtype, shape=(2, 3))
        np.testing.assert_array_equal(
            tensors.decode(Tensor.FromString(theirs.SerializeToString())), array
        )


def test_extreme_numbers_are_exact():
    for values in (
        np.array([-(2**63), 2**63 - 1], np.int64),
        np.array([2**64 - 1], np.uint64),
        np.array([np.inf, -np.inf, np.finfo(np.float32).max, 1e-45, -0.0], np.float32),
    ):
        for as_content in (True, False):
            back = tensors.decode(tensors.encode(values, as_content=as_content))
            np.testing.assert_array_equal(back, values)
    assert np.isnan(tensors.decode(tensors.encode(np.array([np.nan], np.float32)))[0])


def test_strings_are_any_bytes():
    array = np.array([[b"", b"a\0b"], [b"\xff", "é".encode()]], object)
    assert tensors.decode(tensors.encode(array)).tolist() == array.tolist()


def test_strings_as_raw_bytes_are_lengths_then_text():
    content = bytes([1, 0, 0x80 | 2, 1]) + b"x" + b"y" * 130
    tensor = Tensor(dtype=tensor_pb2.DT_STRING, tensor_shape=_shape(3), tensor_content=content)
    assert tensors.decode(tensor).tolist() == [b"x", b"", b"y" * 130]


def test_too_few_values_repeat_the_last_one():
    tensor = Tensor(dtype=tensor_pb2.DT_INT64, tensor_shape=_shape(2, 2), int64_val=[4, 7])
    assert tensors.decode(tensor).tolist() == [[4, 7], [7, 7]]


def test_no_values_are_zeros_or_empty_strings():
    assert tensors.decode(Tensor(dtype=tensor_pb2.DT_FLOAT, tensor_shape=_shape(3))).tolist() == [
        0.0,
        0.0,
        0.0,
    ]
    assert tensors.decode(Tensor(dtype=tensor_pb2.DT_STRING, tensor_shape=_shape(2))).tolist() == [
        b"",
        b"",
    ]


def test_too_many_values_are_cut():
    tensor = Tensor(dtype=tensor_pb2.DT_FLOAT, tensor_shape=_shape(1), float_val=[1, 2, 3])
    assert tensors.decode(tensor).tolist() == [1.0]


def test_values_too_large_for_a_small_type_keep_their_lower_bits():
    tensor = Tensor(dtype=tensor_pb2.DT_INT8, tensor_shape=_shape(2), int_val=[300, -129])
    assert tensors.decode(tensor).tolist() == [300 - 256, 256 - 129]


def test_no_dimensions_are_a_scalar_and_a_zero_is_empty():
    assert tensors.decode(Tensor(dtype=tensor_pb2.DT_FLOAT, float_val=[2])).shape == ()
    assert tensors.decode(Tensor(dtype=tensor_pb2.DT_FLOAT, tensor_shape=_shape(0, 5))).shape == (
        0,
        5,
    )


@pytest.mark.parametrize(
    ("reason", "tensor"),
    [
        ("data type 0", Tensor(float_val=[1])),
        ("data type 20", Tensor(dtype=20, tensor_shape=_shape(1))),
        ("not fully known", Tensor(dtype=1, tensor_shape=_shape(-1))),
        ("not fully known", Tensor(dtype=1, tensor_shape=_shape(-2, -3))),
        ("no elements, but a size", Tensor(dtype=1, tensor_shape=_shape(2**40, 0))),
        ("byte count", Tensor(dtype=1, tensor_shape=_shape(2), tensor_content=b"123")),
        ("byte count", Tensor(dtype=1, tensor_shape=_shape(2), tensor_content=bytes(12))),
        ("byte count", Tensor(dtype=1, tensor_shape=_shape(2**40), tensor_content=b"1234")),
        ("elements, 0 values", Tensor(dtype=1, tensor_shape=_shape(2**62, 2**62))),
        (
            "elements, 1 values",
            Tensor(dtype=9, tensor_shape=_shape(tensors.MAX_PADDING + 2), int64_val=[1]),
        ),
        ("elements, 0 values", Tensor(dtype=7, tensor_shape=_shape(2**40))),
        ("fewer strings", Tensor(dtype=7, tensor_shape=_shape(2**40), tensor_content=b"1234")),
        ("does not end", Tensor(dtype=7, tensor_shape=_shape(1), tensor_content=b"\xff\xff")),
        (
            "does not end",
            Tensor(dtype=7, tensor_shape=_shape(2), tensor_content=b"\x01" + b"\xff" * 12),
        ),
        ("fit the bytes", Tensor(dtype=7, tensor_shape=_shape(1), tensor_content=b"\x05abc")),
        ("dimension", Tensor(dtype=1, tensor_shape=_shape(*[1] * 200), float_val=[1])),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(reason, tensor):
    with pytest.raises(ValueError, match=reason):
        tensors.decode(tensor)


def test_padding_up_to_the_bound_is_allowed():
    size = tensors.MAX_PADDING + 1
    array = tensors.decode(Tensor(dtype=tensor_pb2.DT_INT8, tensor_shape=_shape(size), int_val=[3]))
    assert array.shape == (size,)
    assert (array == 3).all()


def test_an_array_without_a_data_type_is_a_type_error():
    with pytest.raises(TypeError, match="datetime64"):
        tensors.encode(np.zeros(2, "M8[s]"))


def _random_tensor(random):
    """A TensorProto of any type, with values in some field, or raw bytes, that fit or do not."""
    from tensorflow.core.framework import tensor_pb2 as theirs

    tensor = theirs.TensorProto(dtype=random.choice([*tensors._TYPES, 0, 20, 99]))
    for _ in range(random.choice([0, 1, 1, 2, 3])):
        tensor.tensor_shape.dim.add(size=random.choice([1, 2, 3, 4, 1, 2, 3, 4, 0, -1]))
    tensor.tensor_shape.unknown_rank = random.random() < 0.1
    _, field = tensors._TYPES.get(tensor.dtype, (None, "float_val"))
    values = {
        "float_val": [0.0, -1.5, float("inf")],
        "double_val": [0.0, 0.1, -1e300],
        "int_val": [0, -1, 127, 128, -129, 300, 65535, 65536, 2**31 - 1, -(2**31)],
        "int64_val": [0, -1, 2**63 - 1, -(2**63)],
        "uint32_val": [0, 2**32 - 1],
        "uint64_val": [0, 2**64 - 1],
        "half_val": [0, 0x3C00, 0x7C00, 65536 + 0x3C00, -1],
        "bool_val": [False, True],
        "string_val": [b"", b"a", b"\xff\0"],
        "scomplex_val": [0.0, -1.5, float("inf")],
        "dcomplex_val": [0.0, 0.1, -1e300],
        "float8_val": [0, 1, 0x38, 0xB8],
    }
    if random.random() < 0.1:
        field = random.choice(list(values))
    chosen = random.choices(values[field], k=random.randrange(13))
    if field == "float8_val":
        tensor.float8_val = bytes(chosen)
    else:
        getattr(tensor, field).extend(chosen)
    if random.random() < 0.4:
        sizes = [dim.size for dim in tensor.tensor_shape.dim]
        count = max(0, int(np.prod(sizes)))
        dtype, _ = tensors._TYPES.get(tensor.dtype, (np.dtype("f4"), None))
        if tensor.dtype == tensor_pb2.DT_STRING:
            lengths = [random.randrange(3) for _ in range(count)]
            content = bytes(lengths) + random.randbytes(sum(lengths))
        elif tensor.dtype == tensor_pb2.DT_BOOL:
            content = bytes(random.randrange(2) for _ in range(count))
        else:
            content = random.randbytes(count * dtype.itemsize)
        if random.random() < 0.2:
            content = content[: random.randrange(len(content) + 1)] + b"\1" * random.randrange(3)
        tensor.tensor_content = content
    return tensor


def test_any_tensor_is_read_as_by_tensorflows_own_reader():
    """Against Tensor::FromProto, which is what TF Serving reads with: the op ParseTensor."""
    import random

    import tensorflow as tf

    source = random.Random(0)
    read = refused = 0
    for _ in range(3000):
        tensor = _random_tensor(source)
        if tensor.dtype in _newer_types():
            continue
        try:
            found = tensors.decode(tensor)
        except ValueError:
            found = None
        try:
            wanted = tf.io.parse_tensor(
                tensor.SerializeToString(), tf.dtypes.DType(tensor.dtype)
            ).numpy()
        except (tf.errors.OpError, TypeError):
            wanted = None
        assert (found is None) == (wanted is None), tensor
        if found is None:
            refused += 1
            continue
        read += 1
        wanted = np.asarray(wanted, found.dtype)
        assert found.shape == wanted.shape, tensor
        if found.dtype == object:
            assert found.tolist() == wanted.tolist(), tensor
        else:
            assert found.tobytes() == wanted.tobytes(), tensor
    assert read > 1000
    assert refused > 300
