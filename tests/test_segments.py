"""--segments: metrics by value, by arithmetic, and what batches read for them."""

import dataclasses
import json

import numpy as np
import pytest

from pwiser_tf import data, metrics, records, report, segments
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Categorical, Schema, Shard, Split

GRADE = np.array([1, 0, 2, 0, 0, 1, 0])
PREDICTIONS = {
    "ctr": np.array([0.5, 0.1, 0.9, 0.5, 0.2, 0.2, 0.3]),
    "ctcvr": np.array([0.1, 0.1, 0.3, 0.1, 0.0, 0.2, 0.3]),
}
CODES = np.array([3, 3, 3, 3, 0, 0, 7])


def test_each_value_is_measured_on_its_rows():
    found = segments.measure(GRADE, PREDICTIONS, CODES, "value {}".format)
    assert [entry["value"] for entry in found["values"]] == ["value 3", "value 0", "value 7"]
    assert found["rest"] is None
    first, second, third = found["values"]
    # Clicks .5 and .9 against .1 and .5: three wins and a tie. 2.0 predicted, 2 clicks.
    assert first == {
        "value": "value 3",
        "rows": 4,
        "clicks": 2,
        "ctr_auc": 3.5 / 4,
        "ctr_pcoc": 1.0,
        "conversions": 1,
        "ctcvr_auc": 1.0,
        "ctcvr_pcoc": pytest.approx(0.6),
    }
    assert (second["ctr_auc"], second["ctr_pcoc"]) == (0.5, pytest.approx(0.4))
    assert second["ctcvr_auc"] is None
    assert third["ctr_auc"] is third["ctr_pcoc"] is None
    json.dumps(found, allow_nan=False)


def test_small_values_are_one_entry():
    found = segments.measure(GRADE, PREDICTIONS, CODES, str, largest=1)
    assert [entry["value"] for entry in found["values"]] == ["3"]
    rest = CODES != 3
    assert found["rest"]["value"] == 2
    assert found["rest"]["rows"] == 3
    assert found["rest"]["ctr_auc"] == metrics.auc(GRADE[rest] >= 1, PREDICTIONS["ctr"][rest])
    text = report.segment_table("slot", found)
    assert text.split("\n")[0] == "By slot"
    assert text.split("\n")[-1].split()[:5] == ["2", "other", "values", "3", "1"]


def test_clicks_only():
    found = segments.measure(np.minimum(GRADE, 1), {"ctr": PREDICTIONS["ctr"]}, CODES, str)
    assert set(found["values"][0]) == {"value", "rows", "clicks", "ctr_auc", "ctr_pcoc"}
    assert "CTCVR" not in report.segment_table("slot", found)


SCHEMA = Schema(
    dataset="columns",
    categorical=(
        Categorical("page", "int64", range(5)),
        Categorical("city", "string", ("Paris", "Köln")),
        Categorical("user", "int64", (), hash_buckets=9),
    ),
    numerical=(),
    click="click",
    conversion="bought",
    group="session",
    weight="w",
    segments={"country": ("FR", ""), "slot": ("1", "2", "3")},
)


def test_values_are_shown_as_in_the_log():
    assert segments.shown(SCHEMA, "country")(0) == "FR"
    assert segments.shown(SCHEMA, "country")(1) == ""
    assert [segments.shown(SCHEMA, "page")(code) for code in (0, 1, 5)] == ["(unknown)", "0", "4"]
    assert segments.shown(SCHEMA, "city")(2) == "Köln"
    assert segments.shown(SCHEMA, "user")(7) == "bucket 7"
    found = segments.measure(GRADE, PREDICTIONS, GRADE * 0 + 1, segments.shown(SCHEMA, "country"))
    assert report.segment_table("country", found).split("\n")[-1].split()[0] == "''"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["foo"],
            "--segments=foo: expected a segment column or a categorical feature of the data: "
            "country, slot, page, city, user",
        ),
        (["slot", "slot"], "--segments: slot is there twice"),
    ],
)
def test_refusals(names, message):
    with pytest.raises(DataError) as caught:
        segments.check(SCHEMA, names)
    assert str(caught.value) == message


@pytest.fixture
def segmented(tmp_path):
    """A data set with groups, weights and segments: its folder, schema and rows."""
    random = np.random.default_rng(1)
    rows = records.Rows(
        random.integers(0, 3, (60, 3)),
        np.zeros((60, 0), np.float32),
        random.integers(0, 3, 60),
        np.arange(60) // 3,
        np.ones(60, np.float32),
        random.integers(0, 2, (60, 2)),
    )
    content, _ = records.encode(rows)
    content.tofile(tmp_path / "test.tfrecord")
    split = Split(60, 1, 1, 0, (Shard("test.tfrecord", 60, content.nbytes),))
    return tmp_path, dataclasses.replace(SCHEMA, splits={"test": split}), rows


@pytest.mark.parametrize("extras", [(), ("group",), ("segments",), ("group", "weight", "segments")])
def test_batches_read_what_the_caller_uses(segmented, extras):
    folder, schema, rows = segmented
    ((features, grade),) = data.batches(folder, schema, "test", 60, extras=extras)
    assert set(features) == {"categorical", *extras}
    np.testing.assert_array_equal(grade, rows.grade)
    if "segments" in extras:
        np.testing.assert_array_equal(
            segments.column(schema, "slot", features), rows.segments[:, 1]
        )
    np.testing.assert_array_equal(segments.column(schema, "city", features), rows.categorical[:, 1])
    # Groups can be shuffled whole without being read.
    shuffled = data.batches(
        folder, schema, "test", 60, shuffle_seed=(0, 0), keep_groups=True, extras=extras
    )
    ((_, order),) = shuffled
    assert sorted(order.numpy()) == sorted(rows.grade)


def test_the_command_writes_and_prints_them(command, trained, tmp_path):
    arguments = ("evaluate", f"--workdir={trained}", f"--output_dir={tmp_path / 'out'}")
    result = command(*arguments, "--segments=page,user city")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]
    assert list(found["segments"]) == ["page", "user city"]
    for measured in found["segments"].values():
        assert sum(entry["rows"] for entry in measured["values"]) == 300
        assert sum(entry["clicks"] for entry in measured["values"]) == found["ctr"]["positives"]
    assert "Köln" in {entry["value"] for entry in found["segments"]["user city"]["values"]}
    assert "By page" in result.stdout
    assert "Paris" in result.stdout
    result = command(*arguments, "--segments=price (€)")
    assert result.returncode == 2
    assert "expected a segment column or a categorical feature" in result.stderr
