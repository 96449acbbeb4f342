"""Ali-CCP, from its raw text and from processed files, through the converter."""

import gzip
import os
import tarfile
import zipfile

import numpy as np
import pytest

from pwiser_tf import records
from pwiser_tf.convert import aliccp, csv_reader
from pwiser_tf.errors import DataError
from pwiser_tf.synthetic.command import make_sample
from tests.test_convert import convert, digest, write_csv

# One shard keeps the rows' order; by hand, every row is wanted.
WHOLE = ["--format=aliccp", "--shards=1", "--validation_fraction=0"]
FILES = [f"{stem}_{split}" for split in ("train", "test")
         for stem in ("sample_skeleton", "common_features")]  # fmt: skip


def features(*triples):
    """A feature list in the real separators."""
    return "\x01".join(f"{field}\x02{key}\x03{value}" for field, key, value in triples)


def line(*cells_then_triples):
    """A raw row: its cells, how many features, the list."""
    cells = [c for c in cells_then_triples if not isinstance(c, tuple)]
    triples = [c for c in cells_then_triples if isinstance(c, tuple)]
    return ",".join([*map(str, cells), str(len(triples)), features(*triples)]) + "\n"


# fmt: off
COMMON = [
    line("u1", ("109_14", 7, 1.5), ("109_14", 8, 0.2), ("101", 11, 1.0), ("124", 3, 1.0)),
    # Its 508 and its value override the exposures' own; 127_14 is not 127.
    line("u2", ("101", 12, 1.0), ("508", 90, 0.5), ("127_14", 1, 1.0)),
    line("u3"),
]
SKELETON = [
    line(1, 1, 0, "u1", ("205", 50, 1.0), ("508", 91, "2.0"), ("210", 5, 1.0), ("210", 4, 1.0)),
    line(2, 0, 0, "u2", ("205", 50, 1.0), ("508", 91, "2.5"), ("124", 3, 1.0)),
    line(3, 0, 1, "u1", ("205", 77, 1.0)),  # a conversion without a click
    line(4, 1, 1, "lost", ("508", 91, "1e-1"), ("210", 4, 1.0), ("1205", 9, 1.0)),
    line(5, 0, 0, "u3"),
]
TEST_SKELETON = [line(1, 0, 0, "t1", ("205", 50, 1.0), ("210", 6, 1.0), ("508", 91, 4.0))]
TEST_COMMON = [line("t1", ("101", 12, 1.0), ("124", 99, 1.0))]
# fmt: on


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, lines in zip(FILES, (SKELETON, COMMON, TEST_SKELETON, TEST_COMMON), strict=True):
        (folder / f"{name}.csv").write_text("".join(lines))
    return folder


def read(folder, schema, split):
    """A split's rows in order, which with one shard is that of the file."""
    import tensorflow as tf

    (shard,) = schema.split(split).shards
    parsed = tf.io.parse_example(
        list(records.read(folder / shard.file)), records.parse_spec(schema)
    )
    return {name: values.numpy() for name, values in parsed.items()}


def test_raw_row_by_row(raw, tmp_path, capsys):
    schema = convert(
        *(tmp_path / "out", *WHOLE, f"--input={raw}", "--min_count=1"),
        "--fields=101,124,205,210,508,D508",
    )
    vocabularies = {feature.name: feature.vocabulary for feature in schema.categorical}
    # By falling count, then by value; row 3 is dropped, and takes no part.
    assert vocabularies == {
        "101": (11, 12), "124": (3,), "205": (50,), "210": (4, 5), "508": (91, 90),
    }  # fmt: skip
    assert {feature.dtype for feature in schema.categorical} == {"int64"}
    train = read(tmp_path / "out", schema, "train")
    np.testing.assert_array_equal(
        train["categorical"],
        [
            [1, 1, 1, 2, 1],  # u1; 210 is 5, the first of two
            [2, 1, 1, 0, 2],  # u2; 124 is the exposure's own, 508 the common 90
            [0, 0, 0, 1, 1],  # without common features; 1205 is not 205
            [0, 0, 0, 0, 0],  # u3 has nothing, nor has the exposure
        ],
    )
    # The values of 508: 2, .5 (the common one), .1, and 0 where it is absent.
    mean, std = 0.65, np.std([2, 0.5, 0.1, 0])
    np.testing.assert_allclose(
        train["numerical"][:, 0], (np.array([2, 0.5, 0.1, 0]) - mean) / std, rtol=1e-5
    )
    assert schema.numerical[0].fill_value == 0
    np.testing.assert_array_equal(train["grade"], [1, 0, 2, 0])
    assert len(set(train["group"])) == 4
    test = read(tmp_path / "out", schema, "test")
    np.testing.assert_array_equal(test["categorical"], [[2, 0, 1, 0, 1]])
    # 4 lies above the range of training, which ends at 2.
    np.testing.assert_allclose(test["numerical"], [[(2 - mean) / std]], rtol=1e-5)
    assert (schema.dataset, schema.group) == ("aliccp", "common_feature_id")
    assert schema.split("train").dropped == 1
    assert schema.notes["train_rows_without_common_features"] == "1"
    assert schema.notes["test_rows_without_common_features"] == "0"
    assert "train rows without common features: 1\n" in capsys.readouterr().out


def test_histories_are_weighted_lists_that_share_vocabularies(raw, tmp_path):
    (raw / "sample_skeleton_train.csv").write_text(
        "".join([*SKELETON, line(6, 0, 0, "u1", ("206", 8, 1.0))])
    )
    schema = convert(
        *(tmp_path / "out", *WHOLE, f"--input={raw}", "--min_count=1"),
        "--fields=206,109_14,127_14",
    )
    history, brands = schema.lists
    # 8 was seen twice in histories and once as an item's category, 7 twice in histories.
    assert history.vocabulary == schema.categorical[0].vocabulary == (8, 7)
    assert (history.shares, brands.shares, brands.vocabulary) == ("206", None, (1,))
    train = read(tmp_path / "out", schema, "train")
    assert train["ids/109_14"].tolist() == [[2, 1], [-1, -1], [-1, -1], [-1, -1], [2, 1]]
    np.testing.assert_allclose(train["weights/109_14"][[0, 4]], [[1.5, 0.2]] * 2, rtol=1e-6)
    assert train["ids/127_14"].tolist() == [[-1], [1], [-1], [-1], [-1]]
    assert train["categorical"][:, 0].tolist() == [0, 0, 0, 0, 1]


def test_what_is_chosen_by_default(raw, tmp_path):
    schema = convert(tmp_path / "out", *WHOLE, f"--input={raw}")
    # AITM's 18, each seen ten times: here none is.
    assert [feature.name for feature in schema.categorical] == (
        [field for field in HEADER[2:21] if field != "210"]
    )
    assert {(f.dtype, f.vocabulary, f.minimum_count) for f in schema.categorical} == {
        ("int64", (), 10)
    }
    assert schema.numerical == ()


def test_rows_keep_the_order_of_the_skeleton_and_their_own_user(tmp_path):
    """Beyond what one thread reads at a time, with users in no order."""
    users, rows = 3000, 60_000
    user = np.random.default_rng(0).integers(0, users, rows)
    for split in ("train", "test"):
        with open(tmp_path / f"common_features_{split}.csv", "w") as file:
            file.writelines(line(f"u{u:05d}", ("101", u + 1, 1.0)) for u in range(users))
        with open(tmp_path / f"sample_skeleton_{split}.csv", "w") as file:
            file.writelines(
                line(i, i % 2, 0, f"u{u:05d}", ("205", i % 500 + 1, 1.0), ("508", 1, i))
                for i, u in enumerate(user)
            )
    schema = convert(
        *(tmp_path / "out", *WHOLE, f"--input={tmp_path}", "--fields=101,205,D508"),
        "--min_count=1",
    )
    train = read(tmp_path / "out", schema, "train")
    who, what = (np.array(feature.vocabulary) for feature in schema.categorical)
    np.testing.assert_array_equal(who[train["categorical"][:, 0] - 1], user + 1)
    np.testing.assert_array_equal(what[train["categorical"][:, 1] - 1], np.arange(rows) % 500 + 1)
    feature = schema.numerical[0]
    number = train["numerical"][:, 0].astype(float) * feature.std + feature.mean
    np.testing.assert_allclose(number, np.arange(rows), atol=0.1)
    np.testing.assert_array_equal(train["grade"], np.arange(rows) % 2)


# ---- generated, in both layouts


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The same generated rows in both layouts."""
    folder = tmp_path_factory.mktemp("sample")
    for layout in ("aliccp_processed", "aliccp_raw"):
        (folder / layout).mkdir()
        make_sample(folder / layout, rows=12_000, ctr=0.3, cvr=0.3, layout=layout)
    return folder


ALL = ["--fields=" + ",".join((*aliccp.CATEGORIES, *aliccp.VALUES))]


def processed_files(sample):
    folder = sample / "aliccp_processed"
    return [f"--{split}={folder}/ali_ccp_{split}.csv" for split in ("train", "test")]


def test_both_layouts_give_the_same_ids(sample, tmp_path):
    raw = convert(
        tmp_path / "raw", *WHOLE, *ALL, f"--input={sample / 'aliccp_raw'}", "--min_count=3"
    )
    processed = convert(
        tmp_path / "processed", *WHOLE, *ALL, *processed_files(sample), "--min_count=3"
    )
    assert raw.categorical == processed.categorical
    assert raw.numerical == processed.numerical
    for split, rows in (("train", 9600), ("test", 2400)):
        first, second = (
            read(tmp_path / name, schema, split)
            for name, schema in (("raw", raw), ("processed", processed))
        )
        for name in ("categorical", "numerical", "grade"):
            np.testing.assert_array_equal(first[name], second[name])
        found = raw.split(split)
        assert found.rows + found.dropped == rows
        assert found.dropped > 0
        assert found.conversions > 0
    # Known ids, unknown ones and missing ones are among them.
    assert (first["categorical"] == 0).any(axis=0).all() < first["categorical"].max()


def test_validation_is_cut_by_common_feature(sample, tmp_path):
    arguments = ["--format=aliccp", "--shards=1", f"--input={sample / 'aliccp_raw'}"]
    schema = convert(tmp_path / "out", *arguments)
    train, validation = (
        set(read(tmp_path / "out", schema, split)["group"]) for split in ("train", "validation")
    )
    assert not train & validation
    assert 40 < len(validation) < len(train)
    convert(tmp_path / "again", *arguments)
    assert digest(tmp_path / "out") == digest(tmp_path / "again")


@pytest.mark.slow
def test_a_join_larger_than_memory_gives_the_same(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    make_sample(tmp_path / "in", rows=150_000, layout="aliccp_raw")
    arguments = ["--format=aliccp", *ALL, f"--input={tmp_path / 'in'}"]
    convert(tmp_path / "large", *arguments)
    # 150,000 rows of 24 columns of 8 bytes are 29 MB, and are sorted.
    monkeypatch.setattr(csv_reader, "MEMORY_MB", 28)
    # Each thread holds buffers.
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    convert(tmp_path / "small", *arguments)
    assert digest(tmp_path / "large") == digest(tmp_path / "small")


# ---- where the files may lie


@pytest.mark.parametrize(
    "form", ["tar.gz", "tgz of a folder", "zip", "zips", "csv.gz", "folders", "mixed"]
)
def test_files_as_they_are_distributed(raw, tmp_path, form):
    target = tmp_path / "in"
    target.mkdir()
    for name in FILES:
        split = name.rsplit("_", 1)[1]
        source = raw / f"{name}.csv"
        if form == "zips":
            with zipfile.ZipFile(target / f"{name}.zip", "w") as archive:
                archive.write(source, source.name)
        elif form == "csv.gz" or (form == "mixed" and split == "train"):
            with gzip.open(target / f"{name}.csv.gz", "wb") as file:
                file.write(source.read_bytes())
        elif form == "folders":
            (target / f"sample_{split}").mkdir(exist_ok=True)
            (target / f"sample_{split}" / source.name).write_bytes(source.read_bytes())
    for split in ("train", "test"):
        both = [raw / f"{name}.csv" for name in FILES if name.endswith(split)]
        if form == "zip":
            with zipfile.ZipFile(target / f"sample_{split}.zip", "w") as archive:
                for path in both:
                    archive.write(path, f"some/folder/{path.name}")
        elif "tar" in form or "tgz" in form or (form == "mixed" and split == "test"):
            suffix = "tgz" if "tgz" in form else "tar.gz"
            with tarfile.open(target / f"sample_{split}.{suffix}", "w:gz") as archive:
                for path in both:
                    inside = f"sample_{split}/" if "folder" in form else ""
                    archive.add(path, inside + path.name)
    fields = ["--fields=101,205,508,D508", "--min_count=1"]
    convert(tmp_path / "out", *WHOLE, *fields, f"--input={target}")
    convert(tmp_path / "plain", *WHOLE, *fields, f"--input={raw}")
    assert digest(tmp_path / "out") == digest(tmp_path / "plain")


# ---- processed

# The header of the processed files, as torch-rechub reads them.
# fmt: off
HEADER = [
    "click", "purchase", "101", "121", "122", "124", "125", "126", "127", "128", "129", "205",
    "206", "207", "210", "216", "508", "509", "702", "853", "301", "109_14", "110_14", "127_14",
    "150_14", "D109_14", "D110_14", "D127_14", "D150_14", "D508", "D509", "D702", "D853",
]
# fmt: on


def processed_rows(count, start=0):
    """Rows in which column number c of row r holds (r + c) % 4, labels and numbers apart."""
    rows = []
    for r in range(start, start + count):
        cells = [str((r + c) % 4) for c in range(len(HEADER))]
        cells[0], cells[1] = str(int(r % 5 == 0)), str(int(r % 10 == 0))
        cells[25:] = [str(r / 10)] * 8
        rows.append(cells)
    return rows


@pytest.fixture
def processed(tmp_path):
    for name, rows in (
        ("train", processed_rows(40)),
        ("val", processed_rows(12, 40)),
        ("test", processed_rows(8, 60)),
    ):
        write_csv(tmp_path / f"{name}.csv", rows, HEADER)
    return [f"--{split}={tmp_path / name}.csv" for split, name in
            (("train", "train"), ("validation", "val"), ("test", "test"))]  # fmt: skip


def test_processed_row_by_row(processed, tmp_path):
    schema = convert(
        tmp_path / "out", "--format=aliccp", "--shards=1", *processed, "--fields=101,301,D853"
    )
    # Each of 0..3 is seen ten times in 40 rows, but 0 stands for a missing or rare id.
    assert [feature.vocabulary for feature in schema.categorical] == [(1, 2, 3), (1, 2, 3)]
    assert {name: split.rows for name, split in schema.splits.items()} == {
        "train": 40, "validation": 12, "test": 8,
    }  # fmt: skip
    for split, start in (("train", 0), ("validation", 40), ("test", 60)):
        rows = read(tmp_path / "out", schema, split)
        r = start + np.arange(len(rows["grade"]))
        # 101 is column 2 and 301 column 20; ids 1, 2, 3 are at places 1, 2, 3.
        np.testing.assert_array_equal(rows["categorical"][:, 0], (r + 2) % 4)
        np.testing.assert_array_equal(rows["categorical"][:, 1], (r + 20) % 4)
        np.testing.assert_array_equal(rows["grade"], (r % 5 == 0) * 1 + (r % 10 == 0))
        # Statistics are of training alone: 0, .1, ..., 3.9.
        std = np.std(np.arange(40) / 10)
        value = np.minimum(r / 10, 3.9)
        np.testing.assert_allclose(rows["numerical"][:, 0], (value - 1.95) / std, atol=1e-4)
    assert schema.group is None
    assert schema.conversion == "purchase"
    fewer = convert(
        *(tmp_path / "more", "--format=aliccp", *processed, "--fields=101", "--min_count=11")
    )
    assert fewer.categorical[0].vocabulary == ()


def test_without_validation_files_it_is_cut_by_row(processed, tmp_path):
    schema = convert(tmp_path / "out", "--format=aliccp", processed[0], "--validation_fraction=.3")
    assert list(schema.splits) == ["train", "validation", "test"]
    assert "rows by hash" in schema.notes["held_out"]
    # Given files are neither cut nor learnt from.
    given = convert(tmp_path / "given", "--format=aliccp", *processed[:2])
    assert given.split("validation").rows == 12
    assert given.split("train").rows + given.split("test").rows == 40


# ---- what is refused


def damaged(raw, name, row, text):
    """Replaces a raw row's text; `row` counts from 1."""
    path = raw / f"{name}.csv"
    lines = path.read_text().splitlines(keepends=True)
    lines[row - 1] = text
    path.write_text("".join(lines))


DAMAGE = [
    ("sample_skeleton_train", "2,0,0,u2,1,205\x0250\n", "column feature_list: found '205\\x0250', "
     "expected field \\x02 id \\x03 value as feature 1 of the list"),
    ("sample_skeleton_train", "2,0,0,u2,2,205\x0250\x031.0\x01\n",
     "column feature_list: found '', expected field \\x02 id \\x03 value as feature 2 of the list"),
    ("sample_skeleton_train", line(2, 0, 0, "u2", ("205", "x", 1)), "found '205\\x02x\\x031'"),
    ("sample_skeleton_train", line(2, 0, 0, "u2", ("205", "1" * 19, 1)), "expected field"),
    ("sample_skeleton_train", line(2, 0, 0, "u2", ("205", 1, "high")), "found '205\\x021\\x03high"),
    ("sample_skeleton_train", line(2, 0, 0, "u2", ("508", 1, "1e39")), "expected field"),
    ("sample_skeleton_train", "2,0,0,u2,1,205:50:1.0\n", "found '205:50:1.0'"),
    ("sample_skeleton_train", line(2, 0, 0, "u2", ("205", 1, 1)).replace("u2,1", "u2,2"),
     "column n_features: found '2', expected 1, the number of features in feature_list"),
    ("sample_skeleton_train", "2,0,0,u2,,\n", "column n_features: found an empty cell, expected 0"),
    ("sample_skeleton_train", "2,0,0,u2,many,\n", "column n_features: found 'many', expected an"),
    ("sample_skeleton_train", "2,0,0,u2,0\n", "found 5 columns, expected 6"),
    ("sample_skeleton_train", line(2, 2, 0, "u2"), "column click: found '2', expected 0 or 1"),
    ("sample_skeleton_test", line(2, "", 0, "t1"), "column click: found an empty cell"),
    ("sample_skeleton_test", line(2, 0, "yes", "t1"), "column conversion: found 'yes', expected 0"),
    ("sample_skeleton_train", line(2, 0, 0, ""),
     "column common_feature_id: found an empty cell, expected a group"),
    ("common_features_train", line("u2", ("101", 12, "")), "column feature_list: found '101"),
    ("common_features_train", "u2,1\n", "found 2 columns, expected 3"),
    ("common_features_train", line("u1"), "column common_feature_id: found 'u1', expected an id "
     "that no other row has; row 1 has it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), DAMAGE)
def test_a_damaged_raw_row_is_named(raw, tmp_path, name, text, message):
    row = 1 if name.endswith("test") else 2
    damaged(raw, name, row, text)
    arguments = [*WHOLE, f"--input={raw}", "--fields=101,205,D508"]
    with pytest.raises(DataError) as error:
        convert(tmp_path / "out", *arguments)
    assert str(error.value).startswith(f"{raw / name}.csv, row {row}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["raw"]


def test_files_of_different_splits_are_not_joined(raw, tmp_path):
    (raw / "common_features_test.csv").write_text("".join(COMMON))
    with pytest.raises(DataError, match=r"common_feature_id of no row of .*_test\.csv in"):
        convert(tmp_path / "out", *WHOLE, f"--input={raw}")
    assert os.listdir(tmp_path) == ["raw"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fields=D150_14", "--fields: found 'D150_14', expected some of 101, .*, 150_14"),
        ("--fields=101,999", "--fields: found '999', expected some of 101, 121, .*, D853"),
        ("--fields=101,205,101", "--fields: found 101 twice"),
        ("--fields=", "--fields: found none"),
    ],
)
def test_fields_that_are_not_offered(raw, processed, tmp_path, arguments, message):
    for files in ([f"--input={raw}"], processed):
        with pytest.raises(DataError, match=message):
            convert(tmp_path / "out", *WHOLE, *files, arguments)
    assert not (tmp_path / "out").exists()


def test_processed_files_have_no_histories(processed, tmp_path):
    with pytest.raises(DataError, match="processed files have no histories"):
        convert(tmp_path / "out", *WHOLE, *processed, "--fields=101,109_14")


@pytest.mark.parametrize("damage", ["missing", "truncated tar", "no csv", "wrong archive"])
def test_files_that_cannot_be_used(raw, tmp_path, damage):
    path = raw / "sample_test.tar.gz"
    if damage == "missing":
        (raw / "common_features_test.csv").unlink()
        message = "raw: found no common_features_test.csv, .csv.gz, .zip or sample_test.tar.gz"
    else:
        members = [] if damage == "no csv" else sorted(raw.glob("*_test.csv"))
        with tarfile.open(path, "w:gz") as archive:
            for member in members:
                archive.add(member, member.name)
        for member in raw.glob("*_test.csv"):
            member.unlink()
        message = r"sample_test\.tar\.gz: expected a whole tar file"
        if damage == "truncated tar":
            path.write_bytes(path.read_bytes()[:-20])
        elif damage == "wrong archive":
            path.write_bytes(b"1,0,0\n" * 1000)
        else:
            message = r"sample_test\.tar\.gz: found no sample_skeleton_test\.csv in it"
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "out", *WHOLE, f"--input={raw}")
    assert os.listdir(tmp_path) == ["raw"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("101", "1.5", "found '1.5', expected an integer"),
        ("301", "", "found an empty cell, expected an integer"),
        ("205", "a", "found 'a', expected an integer"),
        ("D508", "", "found an empty cell, expected a finite number"),
        ("purchase", "2", "found '2', expected 0 or 1"),
    ],
)
@pytest.mark.parametrize("name", ["train", "val"])
def test_a_wrong_processed_cell_is_named(processed, tmp_path, column, value, message, name):
    rows = processed_rows(12)
    rows[3][HEADER.index(column)] = value
    write_csv(tmp_path / f"{name}.csv", rows, HEADER)
    with pytest.raises(DataError) as error:
        convert(tmp_path / "out", *WHOLE, *processed, "--fields=101,205,301,D508")
    place = f"{tmp_path / name}.csv, row 5, column {column}: "
    assert str(error.value) == place + message


def test_a_processed_column_is_absent(processed, tmp_path):
    rows = [row[:-1] for row in processed_rows(12)]
    write_csv(tmp_path / "val.csv", rows, HEADER[:-1])
    with pytest.raises(DataError, match="column D853: found no such column, expected one in the"):
        convert(tmp_path / "out", *WHOLE, *processed, "--fields=101,D853")
