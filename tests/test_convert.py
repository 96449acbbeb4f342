import csv
import glob
import gzip
import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
from absl import flags

from pwiser_tf import records
from pwiser_tf.convert import aliexpress, learn, output
from pwiser_tf.convert import command as csv_to_tfrecord
from pwiser_tf.errors import DataError
from pwiser_tf.schema import MISSING_INTEGER, Schema
from pwiser_tf.synthetic.command import make_sample
from tests.conftest import wait_for

ROOT = pathlib.Path(__file__).parent.parent
HEADER = ["user", "junk", "price", "click", "item", "buy", "day", "search"]
# fmt: off
TRAIN = [
    ["ann", "x", "1.0", "1", "7",  "0", "2024-01-01", "s1"],
    ["ann", "x", "3.0", "0", "7",  "0", "2024-01-02", "s1"],
    ["bob", "x", "",    "1", "9",  "1", "2024-01-03", "s2"],
    ["bob", "x", "5.0", "0", "",   "0", "2024-01-04", "s2"],
    ["cid", "x", "3.0", "0", "12", "1", "2024-01-05", "s3"],  # a conversion without a click
    ["",    "x", "nan", "0", "-4", "0", "2024-01-06", "s3"],
]
TEST = [
    ["bob", "x", "7.0", "1.0", "9", "0.0", "2024-01-07", "s9"],
    ["eve", "x", "",    "0",   "abc", "0", "2024-01-08", "s9"],
    ["cid", "x", "-1",  "0",   "7.0", "0", "2024-01-09", "s1"],
]
# fmt: on
COLUMNS = [
    "--format=columns",
    "--categorical=user,item",
    "--numerical=price",
    "--click=click",
    "--conversion=buy",
    "--validation_fraction=0",
]


def write_csv(path, rows, header=HEADER, **options):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows([header, *rows] if header else rows)
    return path


def convert(output_dir, *arguments) -> Schema:
    """Runs the command's own flags and functions in this process; returns the written schema."""
    values = flags.FlagValues()
    csv_to_tfrecord.define_flags(values)
    arguments = ["--shards=1", f"--output_dir={output_dir}", *map(str, arguments)]
    values(["csv_to_tfrecord", *arguments])
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        csv_to_tfrecord.main(values)
    finally:
        signal.signal(signal.SIGTERM, terminate)
    return Schema.load(output_dir)


def read(folder, schema, split) -> dict[str, np.ndarray]:
    """A split's rows in the order of the CSV, which is that of its one shard."""
    (shard,) = schema.split(split).shards
    rows = list(records.read(folder / shard.file))
    assert len(rows) == shard.rows == schema.split(split).rows
    return tf_parse(rows, schema)


def tf_parse(rows, schema) -> dict[str, np.ndarray]:
    """Serialized records, parsed by TensorFlow."""
    import tensorflow as tf

    parsed = tf.io.parse_example(rows, records.parse_spec(schema))
    return {name: values.numpy() for name, values in parsed.items()}


@pytest.fixture
def files(tmp_path):
    write_csv(tmp_path / "train.csv", TRAIN)
    write_csv(tmp_path / "test.csv", TEST)
    return tmp_path


def columns(folder, *more, test=True):
    arguments = [f"--train={folder / 'train.csv'}", *COLUMNS, *more]
    return arguments + ([f"--test={folder / 'test.csv'}"] if test else [])


# ---- columns: values


def csv_text(rows):
    return "".join(",".join(row) + "\n" for row in (["a", "b", "x", "y"], *rows))


def test_columns_row_by_row(files):
    schema = convert(files / "out", *columns(files, "--min_count=1", "--group=search"))
    # The dropped row takes no part: cid and 12 are unknown, and the mean is of 1, 3 and 5.
    user, item = schema.categorical
    assert (user.dtype, user.vocabulary) == ("string", ("ann", "bob"))
    assert (item.dtype, item.vocabulary) == ("int64", (7, -4, 9))
    (price,) = schema.numerical
    std = np.sqrt(8 / 3)
    assert (price.mean, price.fill_value) == pytest.approx((3, 3), abs=1e-5)
    assert price.std == pytest.approx(std, abs=1e-6)
    train = read(files / "out", schema, "train")
    np.testing.assert_array_equal(train["categorical"], [[1, 1], [1, 1], [2, 3], [2, 0], [0, 2]])
    np.testing.assert_allclose(train["numerical"][:, 0], [-2 / std, 0, 0, 2 / std, 0], atol=1e-5)
    np.testing.assert_array_equal(train["grade"], [1, 0, 2, 0, 0])
    test = read(files / "out", schema, "test")
    # "abc" is no integer and eve was never seen; 7.0 is the integer 7.
    np.testing.assert_array_equal(test["categorical"], [[2, 3], [0, 0], [0, 1]])
    # 7 and -1 lie outside of the range of training, 1 to 5.
    np.testing.assert_allclose(test["numerical"][:, 0], [2 / std, 0, -2 / std], atol=1e-5)
    np.testing.assert_array_equal(test["grade"], [1, 0, 0])
    # The same search has the same number in both files.
    assert train["group"][0] == train["group"][1] == test["group"][2]
    assert len({*train["group"], *test["group"]}) == 4
    counts = {
        name: (s.rows, s.clicks, s.conversions, s.dropped) for name, s in schema.splits.items()
    }
    assert counts == {"train": (5, 2, 1, 1), "test": (3, 1, 0, 0)}
    assert (schema.click, schema.conversion, schema.group) == ("click", "buy", "search")


def test_a_fraction_is_no_integer_category(tmp_path):
    rows = [[str(i % 3 + 1), "1", "0", "0"] for i in range(6)]
    (tmp_path / "train.csv").write_text(csv_text(rows))
    odd = [[text, "1", "0", "0"] for text in ("2.5", "2.0", "1e0", "1.4", " ")]
    (tmp_path / "test.csv").write_text(csv_text(odd))
    schema = convert(
        *(tmp_path / "out", "--format=columns", f"--train={tmp_path / 'train.csv'}"),
        *(f"--test={tmp_path / 'test.csv'}", "--categorical=a", "--numerical=b"),
        *("--click=x", "--conversion=y", "--validation_fraction=0"),
    )
    assert schema.categorical[0].vocabulary == (1, 2, 3)
    ids = read(tmp_path / "out", schema, "test")["categorical"][:, 0]
    np.testing.assert_array_equal(ids, [0, 2, 0, 0, 0])


def test_records_agree_with_the_schema_rules(files):
    """What is served applies the schema to raw values: training must have seen the same."""
    schema = convert(files / "out", *columns(files))
    test = read(files / "out", schema, "test")
    user, item = schema.categorical
    np.testing.assert_array_equal(
        test["categorical"][:, 0], user.ids(np.array(["bob", "eve", "cid"], object))
    )
    np.testing.assert_array_equal(
        test["categorical"][:, 1], item.ids(np.array([9, MISSING_INTEGER, 7]))
    )
    np.testing.assert_array_equal(
        test["numerical"][:, 0], schema.numerical[0].apply(np.array([7, np.nan, -1]))
    )


def test_minimum_count_leaves_rare_values_out(files):
    assert convert(files / "one", *columns(files, "--min_count=1")).categorical[1].size == 4
    schema = convert(files / "two", *columns(files))
    assert schema.categorical[1].vocabulary == (7,)
    assert schema.categorical[1].minimum_count == 2


def test_one_text_makes_a_column_of_strings(files):
    for value in ("007", "1.5", "+3", "9223372036854775808", str(MISSING_INTEGER), " 7"):
        rows = [[*TRAIN[0][:4], value, *TRAIN[0][5:]], *TRAIN[1:]]
        write_csv(files / "train.csv", rows)
        arguments = columns(files, "--min_count=1", "--overwrite")
        item = convert(files / "out", *arguments).categorical[1]
        assert (item.dtype, value in item.vocabulary) == ("string", True), value


def test_vocabulary_order_is_count_then_value(tmp_path):
    users = ["b"] * 3 + ["c"] * 5 + ["a"] * 3 + ["ü"] * 4
    rows = [[user, str(i % 2), "0"] for i, user in enumerate(users)]
    write_csv(tmp_path / "train.csv", rows, ["user", "click", "buy"])
    arguments = (
        f"--format=columns --train={tmp_path / 'train.csv'} --categorical=user --click=click "
        "--conversion=buy --validation_fraction=0 --test_fraction=0"
    ).split()
    schema = convert(tmp_path / "out", *arguments)
    assert schema.categorical[0].vocabulary == ("c", "ü", "a", "b")
    assert schema.numerical == ()
    assert read(tmp_path / "out", schema, "train")["categorical"][:, 0].tolist() == [
        {"c": 1, "ü": 2, "a": 3, "b": 4}[user] for user in users
    ]


def test_features_without_any_value(tmp_path):
    rows = [["", "", str(i % 2), "0"] for i in range(10)]
    write_csv(tmp_path / "train.csv", rows, ["user", "price", "click", "buy"])
    arguments = (
        f"--format=columns --train={tmp_path / 'train.csv'} --categorical=user --numerical=price "
        "--click=click --conversion=buy --validation_fraction=0 --test_fraction=0"
    ).split()
    schema = convert(tmp_path / "out", *arguments)
    assert schema.categorical[0].vocabulary == ()
    price = schema.numerical[0]
    assert (price.mean, price.std, price.fill_value) == (0, 0, 0)
    train = read(tmp_path / "out", schema, "train")
    assert not train["categorical"].any()
    assert not train["numerical"].any()


def test_odd_names_dialects_and_files(tmp_path):
    names = ['user "id"; DROP TABLE x--', "Price", "price", "größe", "c'lick", "buy"]
    rows = [
        ["a;b", "1", "10", "1", "1", "0"],
        ["two\nlines", "2", "20", "1", "0", "0"],
        ["a;b", "3", "30", "1", "1", "1"],
        ["two\nlines", "4", "40", "1", "0", "0"],
    ]
    folder = tmp_path / "it's [a] *star*"
    folder.mkdir()
    path = write_csv(
        folder / "the [1] file?.csv", rows, names, delimiter=";", lineterminator="\r\n"
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    schema = convert(
        folder / "out",
        f"--train={path}",
        "--format=columns",
        '--categorical=user "id"; DROP TABLE x--',
        "--numerical=price,Price,größe",
        "--click=c'lick",
        "--conversion=buy",
        "--delimiter=;",
        "--validation_fraction=0",
        "--test_fraction=0",
    )
    assert schema.categorical[0].vocabulary == ("a;b", "two\nlines")
    assert [round(feature.mean, 3) for feature in schema.numerical] == [25, 2.5, 1]
    assert schema.split("train").clicks == 2


def test_several_files_gzip_and_different_headers(files):
    import gzip

    order = [7, 3, 0, 5, 4, 2, 6]  # Another order, and no junk column.
    rows = [[row[i] for i in order] for row in TRAIN[3:]]
    write_csv(files / "part-0.csv", TRAIN[:3])
    write_csv(files / "b.csv", rows, [HEADER[i] for i in order])
    with gzip.open(files / "part-1.csv.gz", "wb") as file:
        file.write((files / "b.csv").read_bytes())
    test = f"--test={files / 'test.csv'}"
    whole = convert(files / "whole", *columns(files, "--group=search"))
    parts = convert(files / "parts", f"--train={files}/part-*", test, *COLUMNS, "--group=search")
    assert parts == whole
    assert digest(files / "parts") == digest(files / "whole")


def digest(folder):
    return {
        path.name: hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_shards_are_samples_of_the_whole(files):
    schema = convert(files / "out", *columns(files, "--shards=2"))
    names = sorted(path.name for path in (files / "out").glob("*.tfrecord"))
    assert names == [
        *(f"test-0000{i}-of-00002.tfrecord" for i in range(2)),
        *(f"train-0000{i}-of-00002.tfrecord" for i in range(2)),
    ]
    assert [shard.rows for shard in schema.split("train").shards] == [3, 2]
    (three, two) = (shard.bytes for shard in schema.split("train").shards)
    assert three * 2 == two * 3
    # Fewer files than asked for where there are fewer rows.
    assert len(convert(files / "many", *columns(files, "--shards=16")).split("train").shards) == 5


def test_groups_are_dealt_to_shards_whole(tmp_path):
    """2000 rows of 400 interleaved groups, all of whose numbers are multiples of 4."""
    row = ["ann", "x", "2.5", "1", "7", "0", "2024-01-02"]
    rows = [[*row, f"{4 * (i % 400)}"] for i in range(2000)]
    path = write_csv(tmp_path / "train.csv", rows)
    arguments = [f"--train={path}", *COLUMNS, "--group=search"]
    schema = convert(tmp_path / "out", *arguments, "--test_fraction=0", "--shards=4")
    groups = []
    for shard in schema.split("train").shards:
        serialized = list(records.read(tmp_path / "out" / shard.file))
        parsed = tf_parse(serialized, schema)["group"]
        assert len(parsed) == shard.rows
        groups.append(set(parsed.tolist()))
        # In the file's order.
        assert (np.diff(parsed.reshape(5, -1)) > 0).all()
    assert sum(map(len, groups)) == len(set.union(*groups)) == 400
    assert all(70 < len(part) < 130 for part in groups)
    # Fewer groups than files: no file is empty.
    few = write_csv(tmp_path / "few.csv", rows[:2])
    arguments = [f"--train={few}", *COLUMNS, "--group=search"]
    shards = convert(tmp_path / "few", *arguments, "--test_fraction=0", "--shards=16").split(
        "train"
    )
    assert sum(shard.rows for shard in shards.shards) == 2
    assert all(shard.rows for shard in shards.shards)


# ---- columns: what is held out


def big_rows(count=3000):
    """Rows of 10 a search, 60 a day, whose price says which row it is."""
    return [
        [f"u{i % 7}", "x", str(i), str(i % 2), str(i % 5), "0", str(100 + i // 60), str(i // 10)]
        for i in range(count)
    ]


def held_out(tmp_path, name, *arguments):
    """Row numbers and groups of each split."""
    path = write_csv(tmp_path / "big.csv", big_rows())
    columns = {"--group": "group", "--time": "time"}
    given = {a.partition("=")[0]: a.partition("=")[2] for a in arguments}
    stated = [f'{columns[flag]} = "{given[flag]}"' for flag in columns if flag in given]
    (tmp_path / "log.toml").write_text(
        # A weight is stored as it is: here it says which row it is.
        '[labels]\nclick = "click"\nconversion = "buy"\nweight = "price"\n[columns]\n'
        + "\n".join(stated)
        + '\n[features.user]\n[features.price]\ntype = "numerical"\n'
    )
    schema = convert(
        tmp_path / name,
        f"--train={path}",
        "--format=columns",
        f"--features={tmp_path / 'log.toml'}",
        *(argument for argument in arguments if argument.partition("=")[0] not in columns),
    )
    found = {}
    for split in schema.splits:
        rows = read(tmp_path / name, schema, split)
        found[split] = rows["weight"].astype(int), rows.get("group")
    everything = np.concatenate([rows for rows, _ in found.values()])
    np.testing.assert_array_equal(np.sort(everything), np.arange(3000))
    return found, schema


def test_random_rows(tmp_path):
    found, schema = held_out(tmp_path, "a", "--validation_fraction=.2", "--test_fraction=.1")
    sizes = {name: len(rows) for name, (rows, _) in found.items()}
    # Four standard deviations.
    assert abs(sizes["validation"] - 600) < 4 * np.sqrt(3000 * 0.2 * 0.8)
    assert abs(sizes["test"] - 300) < 4 * np.sqrt(3000 * 0.1 * 0.9)
    assert "rows by hash" in schema.notes["held_out"]
    again, _ = held_out(tmp_path, "b", "--validation_fraction=.2", "--test_fraction=.1")
    other, _ = held_out(tmp_path, "c", "--validation_fraction=.2", "--test_fraction=.1", "--seed=1")
    np.testing.assert_array_equal(found["validation"][0], again["validation"][0])
    assert set(found["validation"][0]) != set(other["validation"][0])
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_groups_stay_together(tmp_path):
    found, _ = held_out(tmp_path, "a", "--group=search", "--validation_fraction=.3")
    groups = [set(group) for _, group in found.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 300
    for rows, group in found.values():
        np.testing.assert_array_equal(group, rows // 10)
    assert abs(len(found["validation"][0]) - 900) < 10 * 4 * np.sqrt(300 * 0.3 * 0.7)
    other, _ = held_out(tmp_path, "b", "--group=search", "--validation_fraction=.3", "--seed=5")
    assert set(found["validation"][0]) != set(other["validation"][0])


def test_the_last_in_time(tmp_path):
    found, schema = held_out(
        tmp_path, "a", "--time=day", "--group=search", "--validation_fraction=.2",
        "--test_fraction=.1",
    )  # fmt: skip
    # 50 days of 60 rows: the last 5 are test, the 10 before validation.
    assert found["train"][0].tolist() == list(range(2100))
    assert found["validation"][0].tolist() == list(range(2100, 2700))
    assert found["test"][0].tolist() == list(range(2700, 3000))
    assert "validation from 135" in schema.notes["held_out"]


def test_the_rule_can_be_chosen(tmp_path):
    found, _ = held_out(tmp_path, "a", "--time=day", "--group=search", "--validation_split=group")
    assert found["validation"][0].min() < 1500
    found, _ = held_out(tmp_path, "b", "--group=search", "--validation_split=random")
    assert set(found["validation"][1]) & set(found["train"][1])


def test_statistics_come_from_training_rows_alone(tmp_path):
    found, schema = held_out(tmp_path, "a", "--time=day", "--test_fraction=0")
    assert len(found["train"][0]) == 2700
    assert schema.numerical[0].mean == pytest.approx(np.arange(2700).mean(), rel=1e-6)
    assert schema.numerical[0].std == pytest.approx(np.arange(2700).std(), rel=1e-6)
    assert "test" not in schema.splits


def test_a_fault_below_a_very_long_cell_is_placed(files):
    rows = [["a" * 200_000, *TRAIN[0][1:]], [*TRAIN[1][:3], "5", *TRAIN[1][4:]]]
    write_csv(files / "long.csv", rows)
    with pytest.raises(DataError, match=r"long\.csv, row 3, column click: found '5', expected 0"):
        convert(files / "out", *COLUMNS, f"--train={files / 'long.csv'}")


@pytest.mark.parametrize("rows", [20, 200_000])
def test_a_damaged_gzip_file_is_named(files, rows):
    text = write_csv(files / "plain.csv", TRAIN[:1] * rows).read_bytes()
    damaged = files / "damaged.csv.gz"
    damaged.write_bytes(gzip.compress(text)[:-20])
    with pytest.raises(DataError, match=r"(?i)gzip .*damaged\.csv|damaged\.csv.* gzip"):
        convert(files / "out", *COLUMNS, f"--train={damaged}")
    assert not (files / "out").exists()


def test_a_carriage_return_alone_is_told_from_one_in_a_quoted_cell(files):
    lines = [",".join(HEADER), ",".join(TRAIN[0]), '"a\r\nb",' + ",".join(TRAIN[1][1:])]
    (files / "cr.csv").write_text(
        "\n".join([*lines, "a\rb," + ",".join(TRAIN[2][1:]), ""]), newline=""
    )
    with pytest.raises(DataError, match="row 5: found a line ending in CR alone, expected LF"):
        convert(files / "out", *COLUMNS, f"--train={files / 'cr.csv'}")


def test_iso_times_of_mixed_precision(files):
    rows = [
        [*row[:6], day, row[7]]
        for row, day in zip(
            TRAIN,
            ["2024-01-01", "2024-02-01T10:00:00", "2024-01-02 11:30:00", "2023-12-31",
             "2024-01-20", "2024-03-01"],
            strict=True,
        )
    ]  # fmt: skip
    write_csv(files / "train.csv", rows)
    arguments = columns(files, "--time=day", "--validation_fraction=.3")
    schema = convert(files / "out", *arguments)
    # The last two of the six in time: rows 2 and 6.
    assert read(files / "out", schema, "validation")["grade"].tolist() == [0, 0]
    assert schema.split("validation").rows == 2
    assert schema.split("train").rows == 3


# ---- AliExpress


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The same generated rows in both layouts."""
    folder = tmp_path_factory.mktemp("sample")
    for layout in ("processed", "raw"):
        (folder / layout).mkdir()
        make_sample(folder / layout, rows=2000, ctr=0.3, cvr=0.3, layout=layout)
    return folder


@pytest.fixture(scope="module")
def processed(sample, tmp_path_factory):
    """The processed layout converted, and its schema."""
    out = tmp_path_factory.mktemp("processed") / "out"
    return out, convert(out, "--format=aliexpress", f"--input={sample / 'processed'}")


def test_aliexpress_row_by_row(sample, processed):
    out, schema = processed
    with open(sample / "processed" / "AliExpress_XX" / "test.csv") as file:
        expected = list(csv.DictReader(file))
    test = read(out, schema, "test")
    assert len(expected) == schema.split("test").rows == 400
    for row, cells in enumerate(expected):
        assert test["group"][row] == int(cells["search_id"])
        assert test["grade"][row] == int(cells["click"]) + int(cells["conversion"])
        for i, feature in enumerate(schema.categorical):
            value = int(cells[f"categorical_{i + 1}"])
            known = value < len(feature.vocabulary)
            assert test["categorical"][row, i] == (value + 1 if known else 0)
        np.testing.assert_array_equal(
            test["numerical"][row],
            [np.float32(cells[f"numerical_{i}"]) for i in range(1, 64)],
        )


def test_aliexpress_schema(sample, processed):
    out, schema = processed
    with open(sample / "processed" / "AliExpress_XX" / "train.csv") as file:
        rows = list(csv.DictReader(file))
    training = set(read(out, schema, "train")["group"])
    kept = [row for row in rows if int(row["search_id"]) in training]
    assert len(kept) == schema.split("train").rows < len(rows) == 1600
    for feature in schema.categorical:
        assert feature.vocabulary == range(max(int(row[feature.name]) for row in kept) + 1)
    for feature in schema.numerical:
        values = np.array([float(row[feature.name]) for row in kept])
        assert feature.transform == "identity"
        assert feature.mean == feature.fill_value == pytest.approx(values.mean(), abs=1e-5)
        assert feature.std == pytest.approx(values.std(), abs=1e-5)
    validation = set(read(out, schema, "validation")["group"])
    assert not validation & training
    assert schema.dataset == "aliexpress"
    assert schema.group == "search_id"


def records_of(folder):
    return {name: value for name, value in digest(folder).items() if name.endswith(".tfrecord")}


def zipped(source, target, bundle):
    """The raw layout's zips, as files or nested in one."""
    target.mkdir()
    for path in sorted(source.glob("*.csv")):
        with zipfile.ZipFile(target / f"{path.stem}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, f"some/folder/{path.name}")
    if bundle:
        with zipfile.ZipFile(target / "aliexpress_XX_datasets.zip", "w") as archive:
            for path in sorted(target.glob("xx_*.zip")):
                archive.write(path, f"aliexpress_XX_datasets/{path.name}")
                path.unlink()
    return target


@pytest.mark.parametrize("form", ["folder", "parent", "zips", "bundle", "bundle file"])
def test_raw_gives_the_records_of_processed(sample, processed, tmp_path, form):
    raw = sample / "raw" / "XX"
    if form == "folder":
        path = raw
    elif form == "parent":
        path = raw.parent
    else:
        path = zipped(raw, tmp_path / "aliexpress_XX_datasets", form.startswith("bundle"))
        if form == "bundle file":
            path = path / "aliexpress_XX_datasets.zip"
    schema = convert(tmp_path / "out", "--format=aliexpress", f"--input={path}")
    assert records_of(tmp_path / "out") == records_of(processed[0])
    assert schema.fingerprint == processed[1].fingerprint
    assert schema.notes["country"] == "XX"
    assert schema.notes["train_item_rows_without_user"] == "0"


def test_two_runs_write_the_same_bytes(sample, tmp_path):
    for name in ("a", "b"):
        convert(tmp_path / name, "--format=aliexpress", f"--input={sample / 'raw'}")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_join_drops_and_counts_items_without_user(sample, tmp_path, capsys):
    folder = tmp_path / "XX"
    folder.mkdir()
    for path in (sample / "raw" / "XX").glob("*.csv"):
        lines = path.read_text().splitlines(keepends=True)
        if path.name == "xx_user_train.csv":
            first, *lines = lines
        (folder / path.name).write_text("".join(lines))
    search = first.split(",")[0]
    items = (folder / "xx_item_train.csv").read_text().splitlines()
    orphans = sum(line.split(",")[0] == search for line in items)
    schema = convert(
        tmp_path / "out", "--format=aliexpress", f"--input={folder}", "--validation_fraction=0"
    )
    assert orphans > 0
    assert schema.notes["train_item_rows_without_user"] == str(orphans)
    assert schema.split("train").rows == 1600 - orphans
    assert f"train item rows without user: {orphans}\n" in capsys.readouterr().out


def test_column_order_and_extra_columns_do_not_matter(sample, processed, tmp_path):
    for split in ("train", "test"):
        with open(sample / "processed" / "AliExpress_XX" / f"{split}.csv") as file:
            header, *rows = csv.reader(file)
        order = np.random.default_rng(0).permutation(len(header))
        shuffled = [[row[i] for i in order] + ["extra, text"] for row in rows]
        names = [header[i] for i in order] + ["note"]
        write_csv(tmp_path / f"{split}.csv", shuffled, names)
    convert(tmp_path / "out", "--format=aliexpress", f"--input={tmp_path}")
    assert records_of(tmp_path / "out") == records_of(processed[0])


def test_several_countries_need_a_choice(sample, tmp_path):
    for country in ("NL", "US"):
        os.symlink(sample / "processed" / "AliExpress_XX", tmp_path / f"AliExpress_{country}")
    with pytest.raises(DataError, match="found NL, US; choose one with --country"):
        convert(tmp_path / "out", "--format=aliexpress", f"--input={tmp_path}")
    convert(tmp_path / "out", "--format=aliexpress", f"--input={tmp_path}", "--country=nl")
    with pytest.raises(DataError, match="no AliExpress data for country ES"):
        convert(tmp_path / "o2", "--format=aliexpress", f"--input={tmp_path}", "--country=ES")


def edited(sample, target, column, value, line=5, split="train"):
    """The processed files with one cell changed."""
    target.mkdir(exist_ok=True)
    for name in ("train", "test"):
        with open(sample / "processed" / "AliExpress_XX" / f"{name}.csv") as file:
            rows = list(csv.reader(file))
        if name == split:
            rows[line - 1][rows[0].index(column)] = value
        write_csv(target / f"{name}.csv", rows, None)
    return target


@pytest.mark.parametrize("value", ["-3", str(2**40)])
def test_odd_integers_get_a_listed_vocabulary(sample, tmp_path, value):
    folder = edited(sample, tmp_path / "in", "categorical_2", value)
    arguments = ["--format=aliexpress", f"--input={folder}", "--validation_fraction=0"]
    schema = convert(tmp_path / "out", *arguments)
    assert isinstance(schema.categorical[0].vocabulary, range)
    assert set(schema.categorical[1].vocabulary) == {int(value), *range(5)}
    train = read(tmp_path / "out", schema, "train")
    assert train["categorical"][3, 1] == schema.categorical[1].vocabulary.index(int(value)) + 1


# ---- what is refused

REFUSED_CELLS = [
    ("categorical_2", "abc", "found 'abc', expected an integer"),
    ("categorical_2", "1.5", "found '1.5', expected an integer"),
    ("categorical_2", "1e30", "found '1e30', expected an integer"),
    ("categorical_2", "", "found an empty cell, expected an integer"),
    ("numerical_3", "abc", "found 'abc', expected a number"),
    ("numerical_3", "", "found an empty cell, expected a finite number"),
    ("numerical_3", "nan", "found 'nan', expected a finite number"),
    ("numerical_3", "-inf", "found '-inf', expected a finite number"),
    ("numerical_3", "1e300", "found '1e300', expected a finite number"),
    ("click", "2", "found '2', expected 0 or 1"),
    ("click", "yes", "found 'yes', expected 0 or 1"),
    ("conversion", "", "found an empty cell, expected 0 or 1"),
    ("conversion", "0.5", "found '0.5', expected 0 or 1"),
    ("search_id", "", "found an empty cell, expected a group"),
]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("column", "value", "message"), REFUSED_CELLS)
def test_a_wrong_cell_is_named(sample, tmp_path, column, value, message, split):
    folder = edited(sample, tmp_path / "in", column, value, 37, split)
    with pytest.raises(DataError) as error:
        convert(tmp_path / "out", "--format=aliexpress", f"--input={folder}")
    place = f"{folder / split}.csv, row 37, column {column}: "
    assert str(error.value).startswith(place + message)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("file", "column", "value", "message"),
    [
        ("xx_item_train.csv", 49, "3", "found '3', expected 0, 1 or 2"),
        ("xx_item_test.csv", 19, "1.5", "found '1.5', expected an integer"),
        ("xx_user_train.csv", 9, "", "found an empty cell, expected a finite number"),
        ("xx_user_test.csv", 33, "x", "found 'x', expected an integer"),
        ("xx_item_train.csv", 2, "x", "found 'x', expected a number"),
    ],
)
def test_a_wrong_raw_cell_is_named(sample, tmp_path, file, column, value, message):
    folder = tmp_path / "XX"
    folder.mkdir()
    for path in (sample / "raw" / "XX").glob("*.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        if path.name == file:
            rows[20][column - 1] = value
        write_csv(folder / path.name, rows, None)
    with pytest.raises(DataError) as error:
        convert(tmp_path / "out", "--format=aliexpress", f"--input={folder}")
    assert str(error.value) == f"{folder / file}, row 21, column {column}: {message}"
    assert os.listdir(tmp_path) == ["XX"]


def damage(lines, kind):
    """Bytes of a CSV file, damaged; the header is line 1, the damage in line 4."""
    text, row = list(lines), lines[3]
    if kind == "few":
        text[3] = row.rsplit(",", 1)[0]
    elif kind == "many":
        text[3] = row + ",1"
    elif kind == "quote":
        text[3] = '"' + row
    elif kind == "text after quote":
        text[3] = '"ann"x' + row[3:]
    elif kind == "missing column":
        text[0] = text[0].replace("price", "cost")
    elif kind == "double column":
        text[0] = text[0].replace("junk", "price")
    elif kind == "header only":
        text = text[:1]
    elif kind == "latin-1":
        text[3] = row.replace("bob", "böb")
        return ("\n".join(text) + "\n").encode("latin-1")
    elif kind == "utf-16":
        return ("\n".join(text) + "\n").encode("utf-16")
    elif kind == "empty":
        return b""
    elif kind == "binary":
        return bytes(range(256)) * 20
    elif kind == "blank lines, then a wrong cell":
        text[2:2] = ["", ""]
        text[5] = row.replace(",1,", ",7,", 1)
    elif kind == "lines in quotes, then a wrong cell":
        text[2] = '"an\nn\n"' + text[2][3:]
        text[3] = row.replace(",1,", ",seven,", 1)
    return ("\n".join(text) + "\n").encode()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("few", "row 4: found 7 columns, expected 8"),
        ("many", "row 4: found 9 columns, expected 8"),
        ("quote", "row 4, column user: .*expected a closing quote"),
        ("text after quote", "row 4, column user: .*expected a closing quote"),
        ("missing column", "row 1, column price: found no such column, .*user,junk,cost,click"),
        ("double column", "row 1, column price: found 2 columns of that name"),
        ("header only", "found no rows"),
        ("latin-1", r"row 4.*: found b'b\\xf6b.*', expected UTF-8"),
        ("utf-16", "found UTF-16 or binary data, expected UTF-8"),
        ("empty", "found an empty file"),
        ("binary", "found UTF-16 or binary data"),
        ("blank lines, then a wrong cell", "row 6, column click: found '7', expected 0 or 1"),
        ("lines in quotes, then a wrong cell", "row 6, column click: found 'seven', expected 0"),
    ],
)
@pytest.mark.parametrize("which", ["train", "test"])
def test_a_damaged_file_is_named(files, kind, message, which):
    path = files / f"{which}.csv"
    lines = (files / "train.csv").read_text().splitlines()
    path.write_bytes(damage(lines, kind))
    before = sorted(os.listdir(files))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{message}") as error:
        convert(files / "out", *columns(files))
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(files)) == before


def test_the_right_line_far_down_a_large_file(tmp_path):
    """Beyond the first buffers, where another thread reads."""
    rows = [[f"u{i % 7}", "x" * 90, str(i), "0", "1", "0", "1", "1"] for i in range(200_000)]
    rows[150_000][2] = "oops"
    path = write_csv(tmp_path / "train.csv", rows)
    with pytest.raises(DataError, match="row 150002, column price: found 'oops'"):
        convert(tmp_path / "out", *columns(tmp_path, test=False))
    rows[150_000][2] = "inf"
    write_csv(path, rows)
    with pytest.raises(DataError, match="row 150002, column price: found 'inf'"):
        convert(tmp_path / "out", *columns(tmp_path, test=False))


def test_infinite_numbers_are_refused_where_missing_ones_are_not(files):
    rows = [[*row[:2], "inf", *row[3:]] for row in TEST]
    write_csv(files / "test.csv", rows)
    with pytest.raises(DataError, match="row 2, column price: found 'inf', expected a finite"):
        convert(files / "out", *columns(files))


def test_times_are_refused_when_unreadable_or_all_alike(files):
    write_csv(files / "train.csv", [*TRAIN, [*TRAIN[0][:6], "soon", "s9"]])
    arguments = columns(files, "--time=day", "--validation_fraction=.2")
    with pytest.raises(DataError, match="row 8, column day: found 'soon', expected an ISO date"):
        convert(files / "out", *arguments)
    write_csv(files / "train.csv", [[*row[:6], "2024-01-01", "s9"] for row in TRAIN])
    with pytest.raises(DataError, match=r"column day has 1 different times; .* needs 2"):
        convert(files / "out", *arguments)


def test_nothing_to_train_on(files):
    write_csv(files / "train.csv", TRAIN[4:5] * 3)
    with pytest.raises(DataError, match=r"found 0 training rows, .*: 3 have a conversion without"):
        convert(files / "out", *columns(files))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format=columns --train=a.csv --conversion=b --numerical=c", "needs --click"),
        ("--format=columns --train=a.csv --click=a --conversion=b", "needs --categorical or --num"),
        ("--format=columns --input=a --train=a.csv --click=a", "--input says nothing"),
        ("--format=columns --train=a,b --delimiter=ab --numerical=c --click=d --conversion=e",
         "--delimiter: found 'ab'"),
        ("--format=aliexpress", "either --input or --train"),
        ("--format=aliexpress --input=a --train=b", "either --input or --train"),
        ("--format=aliexpress --input=a --test=b", "--test goes with --train"),
        ("--format=aliexpress --train=a --time=b", "--time says nothing"),
        ("--format=aliexpress --input=a --validation=b", "--validation goes with --train"),
        ("--format=aliexpress --train=a --fields=b", "--fields says nothing"),
        ("--format=aliexpress --train=a --min_count=2", "--min_count says nothing"),
        ("--format=columns --train=a --fields=b", "--fields says nothing"),
        ("--format=aliccp", "either --input or --train"),
        ("--format=aliccp --input=a --train=b", "either --input or --train"),
        ("--format=aliccp --input=a --country=b", "--country says nothing"),
        ("--format=aliccp --input=absent", "absent: no such folder"),
        ("--format=aliccp --train=absent.csv", "absent.csv: no such file"),
        ("--format=aliexpress --input=absent", "absent: no such folder"),
        ("--format=aliexpress --input=. --validation_fraction=1", "--validation_fraction: found 1"),
        ("--format=aliexpress --input=. --validation_fraction=.5 --test_fraction=.5", "found 1.0"),
        ("--train=a", "--format is needed"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "out", *arguments.split())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--numerical=price,click"], "click is the label of a click"),
        (["--categorical=user,price"], "feature price is named twice"),
        (["--categorical=user,user"], "feature user is named twice"),
        (["--conversion=click"], "click and conversion are both column click"),
        (["--validation_split=time", "--validation_fraction=.1"], "needs a time column"),
        (["--validation_split=group", "--validation_fraction=.1"], "needs a group column"),
    ],
)
def test_columns_with_two_roles(files, more, message):
    with pytest.raises(DataError, match=message):
        convert(files / "out", *columns(files, *more))


def test_a_group_may_be_a_feature_too(files):
    schema = convert(files / "out", *columns(files, "--group=search", "--categorical=user,search"))
    assert schema.group == schema.categorical[1].name == "search"


@pytest.mark.parametrize("damage", ["missing", "truncated", "not a zip", "no csv"])
def test_broken_raw_data(sample, tmp_path, damage):
    folder = zipped(sample / "raw" / "XX", tmp_path / "XX", False)
    path = folder / "xx_user_test.zip"
    if damage == "missing":
        path.unlink()
        message = f"{folder}: found no xx_user_test.csv or xx_user_test.zip"
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
        message = f"{path}: expected a whole zip file"
    elif damage == "not a zip":
        path.write_bytes(b"search,1,2\n" * 100)
        message = f"{path}: expected a whole zip file"
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "nothing")
        message = f"{path}: found 0 CSV files in it"
    with pytest.raises(DataError, match=re.escape(message)):
        convert(tmp_path / "out", "--format=aliexpress", f"--input={folder}")
    assert os.listdir(tmp_path) == ["XX"]


@pytest.mark.parametrize("bundle", [False, True])
def test_a_wrong_cell_in_a_zip_is_named_by_the_zip(sample, tmp_path, bundle):
    source = tmp_path / "source"
    source.mkdir()
    for path in (sample / "raw" / "XX").glob("*.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        if path.name == "xx_user_test.csv":
            rows[20][9] = "x"
        write_csv(source / path.name, rows, None)
    folder = zipped(source, tmp_path / "XX", bundle)
    shown = f"{folder}/aliexpress_XX_datasets.zip/" if bundle else f"{folder}/"
    with pytest.raises(DataError) as error:
        convert(tmp_path / "out", "--format=aliexpress", f"--input={folder}")
    place = f"{shown}xx_user_test.zip, row 21, column 10: "
    assert str(error.value) == place + "found 'x', expected a number"


def test_a_raw_file_of_another_width(sample, tmp_path):
    folder = tmp_path / "XX"
    folder.mkdir()
    for path in (sample / "raw" / "XX").glob("*.csv"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "xx_user_train.csv").write_bytes((folder / "xx_item_train.csv").read_bytes())
    with pytest.raises(
        DataError, match=r"xx_user_train\.csv, row 1: found 49 columns, expected 33"
    ):
        convert(tmp_path / "out", "--format=aliexpress", f"--input={folder}")


def test_one_file_of_the_processed_layout_is_missing(sample, tmp_path):
    train = sample / "processed" / "AliExpress_XX" / "train.csv"
    (tmp_path / "train.csv").write_bytes(train.read_bytes())
    with pytest.raises(DataError, match=r"test\.csv: no such file"):
        convert(tmp_path / "out", "--format=aliexpress", f"--input={tmp_path}")
    # As a file it is enough: test is cut from it.
    schema = convert(tmp_path / "out", "--format=aliexpress", f"--train={tmp_path / 'train.csv'}")
    assert list(schema.splits) == ["train", "validation", "test"]


# ---- the output folder


def test_output_is_not_overwritten_unasked(files):
    convert(files / "out", *columns(files))
    before = digest(files / "out")
    with pytest.raises(DataError, match="--overwrite replaces it"):
        convert(files / "out", *columns(files, "--shards=1"))
    assert digest(files / "out") == before
    # A failure leaves the earlier data set.
    (files / "test.csv").write_text("user\n1\n")
    with pytest.raises(DataError, match="found no such column"):
        convert(files / "out", *columns(files, "--overwrite"))
    assert digest(files / "out") == before
    write_csv(files / "test.csv", TEST)
    convert(files / "out", *columns(files, "--shards=1", "--overwrite"))
    assert len(list((files / "out").glob("train*"))) == 1
    assert sorted(os.listdir(files)) == ["out", "test.csv", "train.csv"]


def test_an_overwritten_data_set_is_there_at_every_moment(tmp_path):
    """Killed at any moment, it is the old one or the new one."""
    path = tmp_path / "out" / "schema.json"
    missing, done = [], threading.Event()

    def watch():
        while not done.is_set():
            missing.append(not path.exists())

    with output.whole_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "schema.json").write_text("0")
    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(1, 300):
        with output.whole_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "schema.json").write_text(str(number))
    done.set()
    watcher.join()
    assert len(missing) > 300
    assert not any(missing)
    assert path.read_text() == "299"
    assert os.listdir(tmp_path) == ["out"]


def test_only_a_data_set_is_ever_overwritten(files):
    with pytest.raises(DataError, match="an earlier data set to overwrite"):
        convert(files, *columns(files, "--overwrite"))
    assert (files / "train.csv").exists()


def test_output_that_cannot_be_written(files):
    with pytest.raises(DataError, match=r"without '\?'"):
        convert(files / "why?" / "out", *columns(files))
    assert not (files / "why?").exists()
    with pytest.raises(DataError, match="it is a file"):
        convert(files / "train.csv", *columns(files))
    with pytest.raises(OSError, match=r"train\.csv"):
        convert(files / "train.csv" / "below", *columns(files))


def test_parents_are_made_and_removed_again_on_failure(files):
    (files / "test.csv").write_text("")
    with pytest.raises(DataError, match="empty file"):
        convert(files / "a" / "b" / "out", *columns(files))
    assert not (files / "a").exists()
    write_csv(files / "test.csv", TEST)
    convert(files / "a" / "b" / "out", *columns(files))


def test_report_and_warnings(files, capsys):
    convert(files / "out", *columns(files))
    captured = capsys.readouterr()
    # 5 rows, 2 clicks, 1 conversion, 1 dropped: 40 %, 20 %, 50 %.
    assert re.search(r"train +5 +2 +1 +1 +40\.000 +20\.000 +50\.000\n", captured.out)
    assert re.search(r"test +3 +1 +0 +0 +33\.333 +0\.000 +0\.000\n", captured.out)
    assert "user (string, 3 ids)" in captured.out
    assert "train: dropped 1 rows with a conversion but no click" in captured.err
    assert "test holds no conversions" in captured.err


# ---- the command itself


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "pwiser_tf.convert", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, **options,
    )  # fmt: skip


def test_command_ends_with_0_or_with_one_line_and_2(files):
    done = command(*columns(files), f"--output_dir={files / 'out'}")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"wrote {files / 'out'}")
    for arguments, message in (
        (
            [*columns(files), f"--output_dir={files / 'out'}"],
            "an empty or absent folder; --overwrite replaces it",
        ),
        ([*columns(files), "--nonsense=1"], "Unknown command line flag 'nonsense'"),
        (["--format=columns", "--train=absent.csv", *COLUMNS], "absent.csv: no such file"),
    ):
        done = command(f"--output_dir={files / 'other'}", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr


@pytest.mark.slow
def test_tensorflow_is_not_imported(files):
    code = (
        "import sys; from pwiser_tf.convert import command as c, columns, features;"
        "log = features.from_flags(categorical=['user'], numerical=['price'], click='click', "
        "conversion='buy');"
        f"c.convert(lambda d, s: columns.open_files(d, log, [{str(files / 'train.csv')!r}], "
        f"[], []), {str(files / 'out')!r}, validation_fraction=0, test_fraction=0);"
        "assert not [m for m in sys.modules if 'tensorflow' in m or 'keras' in m]; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path, number):
    path = write_csv(tmp_path / "train.csv", big_rows(1) * 400_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "pwiser_tf.convert", *columns(tmp_path, test=False),
         f"--output_dir={tmp_path / 'out'}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # A job in the background inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    # The signal comes while it works: its partial folder is there.
    wait_for(lambda: glob.glob(f"{tmp_path}/.out.*.partial/*") or process.poll() is not None)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == [path.name]


# ---- statistics


def test_settled_cuts_a_millionth_of_the_deviation():
    mean, std = learn.settled(1_700_000_000.123456789, 3.3)
    assert abs(mean - 1_700_000_000.123456789) < 3.3e-6
    assert std == pytest.approx(3.3, rel=1e-6)
    assert learn.settled(mean + 1e-9, std * (1 + 1e-12)) == (mean, std)
    assert learn.settled(0.1, 0.0) == (0.1, 0.0)
    assert learn.settled(None, None) == (0.0, 0.0)


def test_raw_columns_are_those_of_the_data_set():
    """16 categories and 63 numbers, each raw column once."""
    user = (*aliexpress.USER_CATEGORICAL, *aliexpress.USER_NUMERICAL)
    item = (*aliexpress.ITEM_CATEGORICAL, *aliexpress.ITEM_NUMERICAL)
    assert sorted(user) == list(range(2, 34))
    assert sorted(item) == list(range(2, 49))
    assert len(aliexpress.USER_CATEGORICAL + aliexpress.ITEM_CATEGORICAL) == 16
    assert len(aliexpress.USER_NUMERICAL + aliexpress.ITEM_NUMERICAL) == 63
