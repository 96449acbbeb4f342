"""tensors: the rules of a TensorProto, held against TensorFlow's own reader."""

import itertools

import numpy as np
import pytest
from pwiser_serving import tensors
from pwiser_serving.protos import tensor_pb2
from pwiser_serving.protos.tensor_pb2 import Tensor, TensorShape

NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")


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
        ("data type 14", Tensor(dtype=14, tensor_shape=_shape(1))),
        ("data type 20", Tensor(dtype=20, tensor_shape=_shape(1))),
        ("not fully known", Tensor(dtype=1, tensor_shape=_shape(-1))),
        ("not fully known", Tensor(dtype=1, tensor_shape=_shape(-2, -3))),
        ("not fully known", Tensor(dtype=1, tensor_shape=TensorShape(unknown_rank=True))),
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
    with pytest.raises(TypeError, match="complex64"):
        tensors.encode(np.zeros(2, np.complex64))
