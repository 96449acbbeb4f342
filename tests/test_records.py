import dataclasses
import struct

import numpy as np
import pytest

from pwiser_tf import records
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Categorical, IdList, Numerical, Schema


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


def _encode(categorical, numerical, grade, group=None, **more):
    content, place = records.encode(records.Rows(categorical, numerical, grade, group, **more))
    assert place[-1] == len(content)
    return content


def _write(path, content):
    path.write_bytes(content.tobytes())
    return path


def test_tensorflow_reads_what_was_written(tmp_path):
    import tensorflow as tf

    categorical, numerical, grade, group = _rows(50)
    categorical[0], categorical[1] = 0, records.MAX_ID
    group[0], group[1] = 0, records.MAX_GROUP
    path = _write(tmp_path / "a", _encode(categorical, numerical, grade, group))
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
    frames = _encode(categorical, numerical, grade, group)
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
    frames = _encode(categorical, numerical, grade, groups if group else None)
    schema = _schema(categories, numbers, "g" if group else None)
    data = list(records.read(_write(tmp_path / "a", frames)))
    parsed = tf.io.parse_example(data, records.parse_spec(schema))
    present = {"grade": True, "categorical": categories, "numerical": numbers, "group": group}
    assert set(parsed) == {name for name, there in present.items() if there}
    np.testing.assert_array_equal(parsed["grade"], grade)


def test_non_finite_numbers_keep_their_bits(tmp_path):
    import tensorflow as tf

    numerical = np.array([[np.nan, np.inf], [-np.inf, -0.0]], np.float32)
    frames = _encode(np.zeros((2, 3), int), numerical, np.zeros(2, int), np.zeros(2, int))
    data = list(records.read(_write(tmp_path / "a", frames)))
    parsed = tf.io.parse_example(data, records.parse_spec(_schema()))
    assert parsed["numerical"].numpy().tobytes() == numerical.tobytes()


def test_no_rows():
    categorical, numerical, grade, group = _rows(0)
    frames = _encode(categorical, numerical, grade, group)
    assert not len(frames)


@pytest.mark.parametrize("bad", [-1, records.MAX_ID + 1])
def test_an_id_that_does_not_fit_is_refused(bad):
    categorical, numerical, grade, group = _rows()
    categorical[2, 1] = bad
    with pytest.raises(ValueError, match=f"integers in 0..{records.MAX_ID}"):
        _encode(categorical, numerical, grade, group)


def test_a_negative_group_is_refused():
    categorical, numerical, grade, group = _rows()
    group[3] = -1
    with pytest.raises(ValueError, match="integers in"):
        _encode(categorical, numerical, grade, group)


def test_read_reports_file_and_record_of_any_corruption(tmp_path):
    frames = _encode(*_rows(3))
    whole, length = frames.tobytes(), len(frames) // 3
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


def test_lists_weights_and_segments_of_any_length(tmp_path):
    import tensorflow as tf

    random = np.random.default_rng(3)
    rows, names = 40, ("history", "Köln \u2028")
    lists = {}
    for name in names:
        lengths = random.integers(0, 9, rows) * (np.arange(rows) % 3 > 0)
        ids = random.integers(0, records.MAX_ID, lengths.sum(), endpoint=True)
        weights = random.random(lengths.sum()).astype(np.float32) if name == "history" else None
        lists[name] = records.Lists(ids, lengths, weights)
    schema = dataclasses.replace(
        _schema(),
        weight="w",
        segments={"country": ("FR", "US")},
        lists=tuple(IdList(name, "int64", range(9), weighted=name == "history") for name in names),
    )
    weight, segments = random.random(rows).astype(np.float32), random.integers(0, 2, (rows, 1))
    made = records.Rows(*_rows(rows), weight, segments, lists)
    content, place = records.encode(made)
    assert [len(record) + 16 for record in records.read(_write(tmp_path / "a", content))] == (
        np.diff(place).tolist()
    )
    data = next(iter(tf.data.TFRecordDataset(str(tmp_path / "a")).batch(rows)))
    parsed = tf.io.parse_example(data, records.parse_spec(schema))
    np.testing.assert_array_equal(parsed["weight"], weight)
    np.testing.assert_array_equal(parsed["segments"], segments)
    for name, each in lists.items():
        ids, start = parsed[f"ids/{name}"].numpy(), 0
        for row, length in enumerate(each.lengths.tolist()):
            stop = start + length
            assert ids[row, :length].tolist() == each.ids[start:stop].tolist()
            assert (ids[row, length:] == records.PADDING).all()
            if each.weights is not None:
                found = parsed[f"weights/{name}"].numpy()[row]
                assert found[:length].tolist() == each.weights[start:stop].tolist()
                assert not found[length:].any()
            start = stop
    # Any rows in any order are the same records.
    order = random.permutation(rows)[:25]
    taken, taken_place = records.encode(made.take(order))
    for k, row in enumerate(order):
        expected = content[place[row] : place[row + 1]]
        assert (taken[taken_place[k] : taken_place[k + 1]] == expected).all()


def test_records_of_other_programs_are_read(tmp_path):
    """As Spark, Beam or BigQuery write them: fields in any order, integers of any width."""
    import tensorflow as tf

    schema = dataclasses.replace(_schema(2, 1, None), lists=(IdList("genres", "string", ("a",)),))
    example = tf.train.Example()
    for name, values in (("grade", [2]), ("ids/genres", [1, 0]), ("categorical", [3, 4])):
        example.features.feature[name].int64_list.value.extend(values)
    example.features.feature["numerical"].float_list.value.append(0.5)
    absent = tf.train.Example.FromString(example.SerializeToString())
    del absent.features.feature["ids/genres"]
    data = [example.SerializeToString(), absent.SerializeToString()]
    parsed = tf.io.parse_example(data, records.parse_spec(schema))
    assert parsed["ids/genres"].numpy().tolist() == [[1, 0], [-1, -1]]
    assert parsed["categorical"].numpy().tolist() == [[3, 4], [3, 4]]
