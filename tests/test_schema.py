import dataclasses
import json

import numpy as np
import pytest

from pwiser_tf import schema
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Categorical, Numerical, Schema, Shard, Split


def _example() -> Schema:
    return Schema(
        dataset="columns",
        categorical=(
            Categorical("user", "string", ("b", "a", "line\nbreak", "\u2028", "ü"), 2),
            Categorical("item", "int64", (-5, 900_000_000_000, 7)),
            Categorical("slot", "int64", range(4)),
        ),
        numerical=(
            Numerical("price", "standardize", mean=3.0, std=2.0, fill_value=3.0),
            Numerical("ratio", "identity", mean=0.25, std=0.5, fill_value=0.25),
        ),
        click="clicked",
        conversion="bought",
        group="search",
        splits={"train": Split(10, 4, 2, 1, (Shard("train-00000-of-00001.tfrecord", 10, 900),))},
        notes={"held_out": "none"},
    )


def test_round_trip(tmp_path):
    made = _example()
    made.save(tmp_path)
    assert Schema.load(tmp_path) == made


def test_ids_of_a_range():
    feature = Categorical("slot", "int64", range(4))
    values = np.array([0, 3, 4, -1, schema.MISSING_INTEGER, 2**62])
    np.testing.assert_array_equal(feature.ids(values), [1, 4, 0, 0, 0, 0])
    assert feature.size == 5


def test_ids_of_listed_integers():
    feature = Categorical("item", "int64", (-5, 900_000_000_000, 7))
    values = np.array([7, -5, 900_000_000_000, 0, schema.MISSING_INTEGER])
    np.testing.assert_array_equal(feature.ids(values), [3, 1, 2, 0, 0])


def test_ids_of_strings():
    feature = Categorical("user", "string", ("b", "a", "ü"))
    values = np.array(["a", "ü", "", None, "A", "b"], object)
    np.testing.assert_array_equal(feature.ids(values), [2, 3, 0, 0, 0, 1])


@pytest.mark.parametrize("dtype", ["int64", "string"])
def test_an_empty_vocabulary_gives_id_0(dtype):
    values = np.array([1, 2]) if dtype == "int64" else np.array(["a", None], object)
    np.testing.assert_array_equal(Categorical("x", dtype, ()).ids(values), [0, 0])


def test_standardize():
    feature = Numerical("price", "standardize", mean=3.0, std=2.0, fill_value=5.0)
    values = feature.apply(np.array([3.0, 7.0, np.nan, np.inf, -np.inf]))
    # (3-3)/2, (7-3)/2, and the fill value's (5-3)/2.
    np.testing.assert_array_equal(values, [0, 2, 1, 1, 1])
    assert values.dtype == np.float32


def test_a_constant_number_is_not_divided_by_zero():
    feature = Numerical("price", "standardize", mean=3.0, std=0.0, fill_value=3.0)
    np.testing.assert_array_equal(feature.apply(np.array([3.0, 5.0])), [0, 2])


def test_identity_changes_only_missing_values():
    feature = Numerical("ratio", "identity", mean=3.0, std=2.0, fill_value=0.5)
    np.testing.assert_array_equal(feature.apply(np.array([0.25, np.nan])), [0.25, 0.5])


def test_fingerprint_follows_what_a_model_depends_on():
    made = _example()
    same = dataclasses.replace(made, notes={"held_out": "other"}, splits={})
    assert same.fingerprint == made.fingerprint
    assert same.data_fingerprint != made.data_fingerprint
    (shard,) = made.splits["train"].shards
    changed = dataclasses.replace(shard, crc32c=7)
    split = dataclasses.replace(made.splits["train"], shards=(changed,))
    other_rows = dataclasses.replace(made, splits={"train": split})
    assert other_rows.fingerprint == made.fingerprint
    assert other_rows.data_fingerprint != made.data_fingerprint
    user, *others = made.categorical
    for changed in (
        dataclasses.replace(made, click="other"),
        dataclasses.replace(made, group=None),
        dataclasses.replace(made, numerical=made.numerical[::-1]),
        dataclasses.replace(
            made, categorical=(dataclasses.replace(user, vocabulary=("a", "b")), *others)
        ),
    ):
        assert changed.fingerprint != made.fingerprint


def test_a_missing_split_is_reported_with_the_existing_ones():
    with pytest.raises(DataError, match="no test split; it has: train"):
        _example().split("test")


def test_load_says_where_the_schema_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"schema\.json: no such file"):
        Schema.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a schema"),
        ("{", "not a schema"),
        ("[1]", "not a schema"),
        ("null", "not a schema"),
        ('{"format_version": 99}', "found 99, expected format version 2 or 1"),
        ('{"format_version": 1}', "not a schema"),
        ("\x00\xff", "not a schema"),
    ],
)
def test_load_refuses_a_file_that_is_not_a_schema(tmp_path, text, message):
    (tmp_path / "schema.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        Schema.load(tmp_path)


def test_load_refuses_a_changed_vocabulary(tmp_path):
    _example().save(tmp_path)
    file = tmp_path / "vocabularies" / "001.jsonl"
    file.write_text("-5\n900000000000\n8\n")
    with pytest.raises(DataError, match="fingerprint"):
        Schema.load(tmp_path)
    file.write_text("-5\n")
    with pytest.raises(DataError, match="found 1, expected 3 values"):
        Schema.load(tmp_path)
    file.write_text("{\n")
    with pytest.raises(DataError, match="not a schema"):
        Schema.load(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"001\.jsonl: no such file"):
        Schema.load(tmp_path)


def test_load_refuses_changed_statistics(tmp_path):
    _example().save(tmp_path)
    content = json.loads((tmp_path / "schema.json").read_text())
    content["numerical"][0]["mean"] = 4.0
    (tmp_path / "schema.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="fingerprint"):
        Schema.load(tmp_path)
