import itertools
import shutil

import numpy as np
import pytest
import tensorflow as tf

from pwiser_tf import data
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema


def _rows(folder, **arguments):
    """All rows of the train split in their order, one tuple each, and the batch sizes."""
    schema = Schema.load(folder)
    arguments = {"batch_size": 64, **arguments}
    rows, sizes = [], []
    for features, grade in data.batches(folder, schema, "train", **arguments):
        sizes.append(len(grade))
        columns = [features["categorical"], features["numerical"], features["group"], grade]
        rows += [
            tuple(np.concatenate([np.atleast_1d(c) for c in row]))
            for row in zip(*(c.numpy() for c in columns), strict=True)
        ]
    return rows, sizes


def test_a_pass_gives_each_row_once_in_whole_batches(dataset):
    rows, sizes = _rows(dataset)
    assert len(rows) == 1000
    assert sizes == [64] * 15 + [40]
    assert len(set(rows)) == 1000


def test_shapes_and_types_are_those_of_the_contract(dataset):
    features, grade = next(iter(data.batches(dataset, Schema.load(dataset), "train", 64)))
    assert (features["categorical"].dtype, features["categorical"].shape) == (tf.int64, (64, 3))
    assert (features["numerical"].dtype, features["numerical"].shape) == (tf.float32, (64, 2))
    assert (features["group"].dtype, features["group"].shape) == (tf.int64, (64,))
    assert (grade.dtype, grade.shape) == (tf.int64, (64,))


def test_shuffling_permutes_and_follows_seed_and_epoch(dataset):
    plain, _ = _rows(dataset)
    first, _ = _rows(dataset, shuffle_seed=(0, 0))
    assert first != plain
    assert sorted(first) == sorted(plain)
    assert _rows(dataset, shuffle_seed=(0, 0))[0] == first
    assert _rows(dataset, shuffle_seed=(0, 1))[0] != first
    assert _rows(dataset, shuffle_seed=(1, 0))[0] != first


def test_shuffling_mixes_within_each_shard(dataset):
    """Rows keep their position only by chance: shards and the rows of a shard are permuted."""
    plain, _ = _rows(dataset)
    first, _ = _rows(dataset, shuffle_seed=(0, 0))
    assert sum(a == b for a, b in zip(plain, first, strict=True)) < 20


def _groups(rows):
    return [row[-2] for row in rows]


def test_whole_groups_are_shuffled_and_stay_together(dataset):
    plain, _ = _rows(dataset)
    first, sizes = _rows(dataset, shuffle_seed=(0, 0), keep_groups=True)
    assert sorted(first) == sorted(plain)
    assert sizes == [64] * 15 + [40]
    order = [group for group, _ in itertools.groupby(_groups(first))]
    # 250 groups of 4 rows: each occurs once, and not in the order of the files.
    assert len(order) == len(set(order)) == 250
    kept = sum(a == b for a, b in zip(_groups(first)[::4], _groups(plain)[::4], strict=True))
    assert kept < 10
    again = {"shuffle_seed": (0, 0), "keep_groups": True}
    assert _rows(dataset, **again)[0] == first
    assert _rows(dataset, **again, skip_rows=339)[0] == first[339:]
    assert _rows(dataset, shuffle_seed=(0, 1), keep_groups=True)[0] != first


@pytest.mark.parametrize("skip", [1, 64, 333, 334, 335, 700, 999, 1000])
def test_skipping_rows_keeps_the_order(dataset, skip):
    whole, _ = _rows(dataset, shuffle_seed=(3, 1))
    rest, _ = _rows(dataset, shuffle_seed=(3, 1), skip_rows=skip)
    assert rest == whole[skip:]


def test_drop_remainder_drops_the_odd_rows(dataset):
    _, sizes = _rows(dataset, drop_remainder=True)
    assert sizes == [64] * 15


@pytest.fixture
def copy(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    return tmp_path / "copy"


SHARD = "train-00001-of-00003.tfrecord"


def test_check_names_a_missing_file(copy):
    (copy / SHARD).unlink()
    with pytest.raises(DataError, match=f"{SHARD}: no such file"):
        data.check(copy, Schema.load(copy), "train")


def test_check_names_a_truncated_file(copy):
    content = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(content[:-7])
    with pytest.raises(DataError, match=f"{SHARD}: found {len(content) - 7} bytes, expected"):
        data.check(copy, Schema.load(copy), "train")


def test_check_refuses_a_missing_split(copy):
    with pytest.raises(DataError, match="no missing split; it has: train, validation, test"):
        data.check(copy, Schema.load(copy), "missing")


def _read_all(copy):
    schema = Schema.load(copy)
    data.check(copy, schema, "train")
    try:
        for _ in data.batches(copy, schema, "train", 64):
            pass
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        data.explain(error, copy, schema, "train")


def test_explain_names_the_file_with_a_flipped_byte(copy):
    content = bytearray((copy / SHARD).read_bytes())
    content[len(content) // 2 + 20] ^= 1
    (copy / SHARD).write_bytes(content)
    with pytest.raises(DataError, match=rf"{SHARD}: record \d+ has a wrong checksum"):
        _read_all(copy)


def test_explain_names_a_file_with_another_layout_and_the_same_size(copy):
    size = (copy / SHARD).stat().st_size
    frame = 16
    with tf.io.TFRecordWriter(str(copy / SHARD)) as writer:
        example = tf.train.Example()
        example.features.feature["x"].bytes_list.value.append(b"")
        overhead = frame + len(example.SerializeToString())
        # Lengths below 128 take one byte each: pad within that, and the last record takes the rest.
        while size:
            total = size if size <= 120 else min(100, size - overhead)
            example.features.feature["x"].bytes_list.value[0] = bytes(total - overhead)
            writer.write(example.SerializeToString())
            size -= total
    with pytest.raises(
        DataError, match=f"{SHARD}: record 1 does not have the layout of schema.json"
    ):
        _read_all(copy)


def test_explain_raises_the_original_error_if_the_files_are_correct(dataset):
    error = tf.errors.InvalidArgumentError(None, None, "something else")
    with pytest.raises(tf.errors.InvalidArgumentError, match="something else"):
        data.explain(error, dataset, Schema.load(dataset), "train")
