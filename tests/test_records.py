import struct

import numpy as np
import pytest

from pwiser_tf import records
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Categorical, Numerical, Schema


def _rows(size=5, categories=3, numbers=2, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, records.MAX_ID, (size, categories), endpoint=True),
        rng.normal(size=(size, numbers)).astype(np.float32),
        rng.integers(0, 3, size),
        rng.integers(0, records.MAX_GROUP, size, endpoint=True),
    )


def _schema(categories=3, numbers=2, group="g"):
    return Schema(
        dataset="columns",
        categorical=tuple(Categorical(f"c{i}", "int64", range(5)) for i in range(categories)),
        numerical=tuple(Numerical(f"n{i}", "identity", 0, 1, 0) for i in range(numbers)),
        click="click",
        conversion="conversion",
        group=group,
    )


def _write(path, frames):
    path.write_bytes(frames.tobytes())
    return path


def test_tensorflow_reads_what_was_written(tmp_path):
    import tensorflow as tf

    categorical, numerical, grade, group = _rows(50)
    categorical[0], categorical[1] = 0, records.MAX_ID
    group[0], group[1] = 0, records.MAX_GROUP
    path = _write(tmp_path / "a", records.encode(categorical, numerical, grade, group))
    # TFRecordDataset checks both checksums of every record.
    data = next(iter(tf.data.TFRecordDataset(str(path)).batch(50)))
    parsed = tf.io.parse_example(data, records.parse_spec(_schema()))
    np.testing.assert_array_equal(parsed["categorical"], categorical)
    np.testing.assert_array_equal(parsed["numerical"], numerical)
    np.testing.assert_array_equal(parsed["grade"], grade)
    np.testing.assert_array_equal(parsed["group"], group)


def test_protobuf_reads_what_was_written(tmp_path):
    import tensorflow as tf

    categorical, numerical, grade, group = _rows(3)
    frames = records.encode(categorical, numerical, grade, group)
    for row, record in enumerate(records.read(_write(tmp_path / "a", frames))):
        feature = tf.train.Example.FromString(record).features.feature
        assert list(feature["categorical"].int64_list.value) == categorical[row].tolist()
        assert list(feature["numerical"].float_list.value) == numerical[row].tolist()
        assert list(feature["grade"].int64_list.value) == [grade[row]]
        assert list(feature["group"].int64_list.value) == [group[row]]


@pytest.mark.parametrize(
    ("categories", "numbers", "group"), [(0, 2, True), (3, 0, True), (3, 2, False), (1, 0, False)]
)
def test_empty_arrays_are_not_written_or_required(tmp_path, categories, numbers, group):
    import tensorflow as tf

    categorical, numerical, grade, groups = _rows(4, categories, numbers)
    frames = records.encode(categorical, numerical, grade, groups if group else None)
    schema = _schema(categories, numbers, "g" if group else None)
    assert frames.shape == (4, records.record_bytes(schema))
    data = list(records.read(_write(tmp_path / "a", frames)))
    parsed = tf.io.parse_example(data, records.parse_spec(schema))
    present = {"grade": True, "categorical": categories, "numerical": numbers, "group": group}
    assert set(parsed) == {name for name, there in present.items() if there}
    np.testing.assert_array_equal(parsed["grade"], grade)


def test_non_finite_numbers_keep_their_bits(tmp_path):
    import tensorflow as tf

    numerical = np.array([[np.nan, np.inf], [-np.inf, -0.0]], np.float32)
    frames = records.encode(np.zeros((2, 3), int), numerical, np.zeros(2, int), np.zeros(2, int))
    data = list(records.read(_write(tmp_path / "a", frames)))
    parsed = tf.io.parse_example(data, records.parse_spec(_schema()))
    assert parsed["numerical"].numpy().tobytes() == numerical.tobytes()


def test_no_rows():
    categorical, numerical, grade, group = _rows(0)
    frames = records.encode(categorical, numerical, grade, group)
    assert frames.shape == (0, records.record_bytes(_schema()))


@pytest.mark.parametrize("bad", [-1, records.MAX_ID + 1])
def test_an_id_that_does_not_fit_is_refused(bad):
    categorical, numerical, grade, group = _rows()
    categorical[2, 1] = bad
    with pytest.raises(ValueError, match=f"integers in 0..{records.MAX_ID}"):
        records.encode(categorical, numerical, grade, group)


def test_a_negative_group_is_refused():
    categorical, numerical, grade, group = _rows()
    group[3] = -1
    with pytest.raises(ValueError, match="integers in"):
        records.encode(categorical, numerical, grade, group)


def test_read_reports_file_and_record_of_any_corruption(tmp_path):
    frames = records.encode(*_rows(3))
    whole, length = frames.tobytes(), frames.shape[1]
    assert len(list(records.read(_write(tmp_path / "whole", frames)))) == 3
    # Any cut that is not between records is found.
    for cut in range(1, 3 * length):
        if cut % length:
            path = tmp_path / "cut"
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError, match=rf"cut: record {cut // length + 1} "):
                list(records.read(path))
    # Any changed byte is found too.
    for position in range(length, 2 * length):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path = tmp_path / "changed"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="changed: record 2 "):
            list(records.read(path))


def test_read_refuses_another_kind_of_file_at_once(tmp_path):
    path = tmp_path / "foreign"
    # Read as a header this announces a record of 2^62 bytes: the header's checksum comes first.
    path.write_bytes(struct.pack("<Q", 2**62) + b"user,item,click,conversion\n" * 10)
    with pytest.raises(DataError, match="foreign: record 1 has no TFRecord header"):
        list(records.read(path))
