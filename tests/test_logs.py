"""Logs as they are: lists, Parquet, dirt, a second day; from files to ids and back."""

import json
import time
import tomllib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pwiser_tf import records
from pwiser_tf.convert.inspect import inspect
from pwiser_tf.errors import DataError
from tests.test_convert import convert, read

LOG = r"""
[labels]
click = "clicked"
conversion = "bought"
weight = "w"
[columns]
segments = ["country"]
[features.item]
min_count = 1
[features.history]
type = "sequence"
separator = "|"
weight_separator = ":"
vocabulary = "item"
max_length = 2
newest = "last"
[features.tags]
type = "list"
separator = "|"
min_count = 1
max_length = 2
[features.price]
type = "numerical"
transform = "log"
[features.age]
type = "numerical"
transform = "quantiles"
buckets = 2
[features.point]
type = "vector"
length = 2
separator = ";"
"""
ROWS = [
    # item, history, tags, price, age, point, country, w, clicked, bought
    ["1", "1:0.5|2|3:2", "a|b|c", "0", "10", "1;2", "FR", "1", "true", "0.0"],
    ["2", "NULL", "", "e", "20", "", "US", "2", "1", "1"],
    ["18.0", "18", "b | a", "1.718281828", "30", "-1;0.5", "FR", "0.5", "no", "False"],
    ["NA", "\\N|1:0", "b", "NA", "40", "0;0", "US", "1", "0", "0"],
]
ROWS[1][3] = "-1.718281828"
HEADER = ["item", "history", "tags", "price", "age", "point", "country", "w", "clicked", "bought"]
FLAGS = ["--format=columns", "--validation_fraction=0", "--test_fraction=0"]


@pytest.fixture
def log(tmp_path):
    """The folder, with the feature file."""
    (tmp_path / "log.toml").write_text(LOG)
    return tmp_path


def _csv(path, rows=ROWS, header=HEADER, delimiter=",", end="\n"):
    lines = [delimiter.join(cells) for cells in ([header, *rows] if header else rows)]
    path.write_text(end.join([*lines, ""]), newline="")
    return path


def _convert(log, *arguments, name="out"):
    schema = convert(log / name, f"--features={log / 'log.toml'}", *FLAGS, *arguments)
    return schema, read(log / name, schema, next(iter(schema.splits)))


def _same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_every_type_row_by_row(log):
    schema, rows = _convert(log, f"--train={_csv(log / 'log.csv')}")
    (item,), (history, tags) = schema.categorical, schema.lists
    # Items and the histories' values, NULL and \N no values: 1 three times, 2 and 18 twice, 3 once.
    assert item.dtype == "int64"
    assert item.vocabulary == history.vocabulary == (1, 2, 18, 3)
    assert (history.shares, history.kind, history.weighted) == ("item", "sequence", True)
    np.testing.assert_array_equal(rows["categorical"][:, 0], [1, 2, 3, 0])
    # The last two of a sequence, with their weights.
    assert rows["ids/history"].tolist() == [[2, 4], [-1, -1], [3, -1], [1, -1]]
    assert rows["weights/history"].tolist() == [[1, 2], [0, 0], [1, 0], [0, 0]]
    # The first two of a list; what is cut off is not learnt; blanks around a value do not count.
    assert tags.vocabulary == ("b", "a")
    assert rows["ids/tags"].tolist() == [[2, 1], [-1, -1], [1, 2], [1, -1]]
    price, age = schema.numerical
    log_of_price = [0, -1, 1]
    assert (price.mean, price.std) == pytest.approx((0, np.std(log_of_price)), abs=1e-6)
    np.testing.assert_allclose(
        rows["numerical"],
        [[0, 1, 2], [-1 / price.std, 0, 0], [1 / price.std, -1, 0.5], [0, 0, 0]],
        atol=1e-5,
    )
    assert age.boundaries == (20.0,)
    np.testing.assert_array_equal(rows["categorical"][:, 1], [1, 2, 2, 2])
    np.testing.assert_array_equal(rows["grade"], [1, 2, 0, 0])
    np.testing.assert_array_equal(rows["weight"], [1, 2, 0.5, 1])
    assert schema.segments == {"country": ("FR", "US")}
    np.testing.assert_array_equal(rows["segments"][:, 0], [0, 1, 0, 1])
    assert schema.coverage["item"]["train"] == [0.25, 0.0, 0.0]
    assert schema.coverage["history"]["train"][2] == 0.25


@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_how_a_file_is_packed_is_told_by_its_content(log, packed):
    _, expected = _convert(log, f"--train={_csv(log / 'log.csv')}")
    content = (log / "log.csv").read_bytes()
    with pyarrow.output_stream(str(log / "packed.csv"), compression=packed) as stream:
        stream.write(content)
    _, found = _convert(log, f"--train={log / 'packed.csv'}", name="packed")
    _same(found, expected)


def test_a_hive_export_without_header_and_quotes(log):
    _, expected = _convert(log, f"--train={_csv(log / 'log.csv')}")
    rows = [[r"\N" if cell in ("NA", "NULL", "") else cell for cell in row] for row in ROWS]
    rows[2][6] = 'F"R'
    path = _csv(log / "000000_0", rows, header=None, delimiter="\x01")
    flags = [r"--delimiter=\x01", "--quote=", f"--header={','.join(HEADER)}"]
    schema, found = _convert(log, f"--train={path}", *flags, name="hive")
    assert schema.segments == {"country": ("FR", "US", 'F"R')}
    del expected["segments"], found["segments"]
    _same(found, expected)


def test_mixed_line_endings_and_a_trailing_delimiter(log):
    _, expected = _convert(log, f"--train={_csv(log / 'log.csv')}")
    lines = (log / "log.csv").read_text().splitlines()
    mixed = "".join(line + ("\r\n" if k % 2 else "\n") for k, line in enumerate(lines))
    (log / "mixed.csv").write_text(mixed, newline="")
    _same(_convert(log, f"--train={log / 'mixed.csv'}", name="mixed")[1], expected)
    (log / "trailing.csv").write_text("".join(f"{line},\n" for line in lines))
    _same(_convert(log, f"--train={log / 'trailing.csv'}", name="trailing")[1], expected)


def test_mixed_line_endings_do_not_hide_a_wrong_quote(tmp_path):
    for cell, row in (('"2"x', 3), ('"2', 5)):
        (tmp_path / "log.csv").write_text(f"item,c\r\n1,0\n{cell},1\n3,0\n4,1\n", newline="")
        with pytest.raises(DataError, match=f"row {row}: a closing quote at the end of the cell"):
            convert(
                *(tmp_path / "out", f"--train={tmp_path / 'log.csv'}", "--categorical=item"),
                *("--click=c", *FLAGS),
            )


def test_quantiles_are_of_clipped_numbers(log, capsys):
    (log / "log.toml").write_text(
        '[labels]\nclick = "c"\n[features.n]\ntype = "numerical"\ntransform = "quantiles"\n'
        "buckets = 4\nclip = [10, 20]\n"
    )
    path = _csv(log / "log.csv", [[str(n), str(n % 2)] for n in range(100)], ["n", "c"])
    schema, rows = _convert(log, f"--train={path}")
    assert schema.numerical[0].boundaries == (20.0,)
    assert rows["categorical"][:, 0].tolist() == [1] * 20 + [2] * 80
    printed = capsys.readouterr().out
    assert "no column of conversions: the model will have CTR only" in printed
    assert printed.splitlines()[0].split() == ["split", "rows", "clicks", "CTR", "%"]
    assert printed.splitlines()[1].split() == ["train", "100", "50", "50.000"]


def test_parquet_with_lists_and_partitions(log):
    _, expected = _convert(log, f"--train={_csv(log / 'log.csv')}")
    (log / "log.toml").write_text(
        LOG.replace('separator = "|"\nweight_separator = ":"', 'weights = "history_weights"')
    )
    items = [1, 2, 18, None]
    columns = {
        "item": items,
        "history": [[1, 2, 3], None, [18], [None, 1]],
        "history_weights": [[0.5, 1, 2], None, [1], [7, 0]],
        "tags": [["a", "b", "c"], [], ["b", "a"], ["b"]],
        "price": [0, -1.718281828, 1.718281828, None],
        "age": [10, 20, 30, 40],
        "point": [[1, 2], None, [-1, 0.5], [0, 0]],
        "w": [1, 2, 0.5, 1],
        "clicked": [True, True, False, False],
        "bought": [0, 1, 0, 0],
    }
    for part, rows in (("country=FR", [0, 2]), ("country=US", [1, 3])):
        folder = log / "lake" / part
        folder.mkdir(parents=True)
        table = pyarrow.table({name: [values[k] for k in rows] for name, values in columns.items()})
        pyarrow.parquet.write_table(table, folder / "part-0.parquet")
        (folder / "_SUCCESS").write_text("")
    schema, found = _convert(log, f"--train={log / 'lake'}", name="parquet")
    assert schema.segments == {"country": ("FR", "US")}
    order = [0, 2, 1, 3]
    _same(found, {key: values[order] for key, values in expected.items()})


@pytest.mark.parametrize("dtype", ["int64", "string"])
def test_texts_and_integers_of_several_files_are_the_same_values(tmp_path, dtype):
    """One feature in a CSV and in Parquet files of several types."""
    (tmp_path / "log.toml").write_text(
        '[labels]\nclick = "clicked"\n'
        f'[features.item]\ndtype = "{dtype}"\nmin_count = 1\n'
        '[features.past]\ntype = "list"\nseparator = "|"\nvocabulary = "item"\n'
    )
    items, past = [5, None, 7, 9], [[7, 5], [None], None, [1, 7]]
    cells = [["5", "7|5"], ["", "NA"], ["7", ""], ["9", "1|7"]]
    _csv(
        tmp_path / "a.csv",
        [[*cell, str(i % 2)] for i, cell in enumerate(cells)],
        ["item", "past", "clicked"],
    )
    clicked = pyarrow.array([0, 1, 0, 1])
    for name, kind in {"b": "int32", "c": "uint64", "d": "string"}.items():
        cast = (lambda value: None if value is None else str(value)) if kind == "string" else int
        table = {
            "item": pyarrow.array([cast(i) if i is not None else None for i in items], kind),
            "past": pyarrow.array(
                [p and [v if v is None else cast(v) for v in p] for p in past],
                pyarrow.list_(pyarrow.type_for_alias(kind)),
            ),
            "clicked": clicked,
        }
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{name}.parquet")
    found = [
        _convert(tmp_path, f"--train={tmp_path / file}", name=f"out-{file}")[1]
        for file in ("a.csv", "b.parquet", "c.parquet", "d.parquet")
    ]
    for other in found[1:]:
        _same(found[0], other)
    every = ",".join(str(tmp_path / f) for f in ("a.csv", "b.parquet", "c.parquet", "d.parquet"))
    schema, rows = _convert(tmp_path, f"--train={every}", "--shards=1", name="out-every")
    ids = rows["categorical"][:, 0].tolist()
    assert ids == ids[:4] * 4
    values = np.array([5, 7, 9]) if dtype == "int64" else np.array(["5", "7", "9"], object)
    five, seven, nine = schema.categorical[0].ids(values)
    assert ids[:4] == [five, 0, seven, nine]
    assert min(five, seven, nine) > 0


def test_a_fault_in_one_of_many_parquet_files_has_its_place(tmp_path):
    for k, clicks in enumerate([[0, 1], [1, 0, 0], [0, 2]]):
        table = pyarrow.table({"item": ["a"] * len(clicks), "clicked": clicks})
        pyarrow.parquet.write_table(table, tmp_path / f"{k}.parquet")
    flags = ["--categorical=item", "--click=clicked", *FLAGS]
    with pytest.raises(DataError, match=r"2\.parquet, row 2, column clicked: found '?2'?, exp"):
        convert(tmp_path / "out", f"--train={tmp_path / '*.parquet'}", *flags)


def test_parquet_faults_have_their_place(log):
    table = pyarrow.table({"item": [1, 2], "clicked": [0, 7], "bought": [0, 0]})
    pyarrow.parquet.write_table(table, log / "log.parquet")
    flags = ["--categorical=item", "--click=clicked", "--conversion=bought", *FLAGS]
    with pytest.raises(DataError, match=r"log\.parquet, row 2, column clicked: found '?7'?, exp"):
        convert(log / "out", f"--train={log / 'log.parquet'}", *flags)
    missing = r"log\.parquet, column price: the file has no such column; found: item, clicked, boug"
    with pytest.raises(DataError, match=missing):
        convert(log / "out", f"--train={log / 'log.parquet'}", "--numerical=price", *flags)
    (log / "torn.parquet").write_bytes((log / "log.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"torn\.parquet: expected a whole Parquet file"):
        convert(log / "out", f"--train={log / 'torn.parquet'}", *flags)


def test_a_damaged_page_of_parquet_is_named(log):
    path = log / "log.parquet"
    table = pyarrow.table({"item": ["a", "b", "c"] * 99, "clicked": [0, 1, 0] * 99})
    pyarrow.parquet.write_table(table, path, compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    with pytest.raises(DataError, match=r"log\.parquet: expected a whole Parquet file"):
        convert(log / "out", f"--train={path}", "--categorical=item", "--click=clicked", *FLAGS)


@pytest.mark.parametrize(
    ("column", "cell", "found"),
    [
        ("price", 1e300, r"column price: found 1e\+300, expected a finite number"),
        ("weights", [1e300, 1], r"column weights: found \[1e\+300, 1.0\], expected weights"),
        ("weights", [1.0], r"column weights: found \[1.0\], expected weights .*, one for each"),
        ("weights", [1.0, 1, 1], r"column weights: found \[1.0, 1.0, 1.0\], expected weights"),
    ],
)
def test_wrong_numbers_of_parquet_have_their_place(log, column, cell, found):
    columns = {"price": [1.0, 2.0], "tags": [["a", "b"]] * 2, "weights": [[0.5, 1.0]] * 2}
    columns[column][1] = cell
    pyarrow.parquet.write_table(pyarrow.table({"c": [0, 1], **columns}), log / "log.parquet")
    (log / "log.toml").write_text(
        '[labels]\nclick = "c"\n[features.price]\ntype = "numerical"\n'
        '[features.tags]\ntype = "list"\nweights = "weights"\n'
    )
    with pytest.raises(DataError, match=rf"log\.parquet, row 2, {found}"):
        _convert(log, f"--train={log / 'log.parquet'}")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pyarrow.array([{"a": 1}, {"a": 2}]), "struct"),
        (pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())), "map"),
        (pyarrow.array([[{"a": 1}], []]), "list of struct"),
        (pyarrow.array([[[1]], []]), "list of list"),
    ],
)
def test_structs_and_maps_are_refused(log, values, kind):
    table = pyarrow.table({"item": values, "clicked": [0, 1], "bought": [0, 0]})
    pyarrow.parquet.write_table(table, log / "log.parquet")
    flags = ["--categorical=item", "--click=clicked", "--conversion=bought", *FLAGS]
    with pytest.raises(DataError, match=rf"column item: found the type {kind}, expected numbers,"):
        convert(log / "out", f"--train={log / 'log.parquet'}", *flags)
    assert f"# item is left out: the type {kind} is not read." in inspect(
        str(log / "log.parquet"), 10
    )


@pytest.mark.parametrize(
    ("choice", "grades", "dropped"),
    [("drop", [1, 0], 1), ("click", [1, 2, 0], 0), ("exposure", [1, 0, 0], 0)],
)
def test_a_conversion_without_a_click_becomes_what_the_user_chose(log, choice, grades, dropped):
    text = LOG.replace("[columns]", f'conversion_without_click = "{choice}"\n[columns]')
    (log / "log.toml").write_text(text)
    rows = [ROWS[0], [*ROWS[1][:-2], "0", "1"], ROWS[2]]
    schema, found = _convert(log, f"--train={_csv(log / 'log.csv', rows)}")
    assert found["grade"].tolist() == grades
    assert schema.split("train").dropped == dropped


def test_a_conversion_without_a_click_can_be_refused(log):
    (log / "log.toml").write_text(
        LOG.replace("[columns]", 'conversion_without_click = "refuse"\n[columns]')
    )
    path = _csv(log / "log.csv", [ROWS[0], [*ROWS[1][:-2], "0", "1"]])
    with pytest.raises(DataError, match="row 3, column bought: found '1', expected a conversion o"):
        _convert(log, f"--train={path}")


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        (1, "1:x", "column history: found '1:x', expected weights that are numbers of at least 0"),
        (1, "1:-2", "column history: found '1:-2', expected weights"),
        (1, "1:2:3", "column history: found '1:2:3', expected weights"),
        (3, "12 EUR", "column price: found '12 EUR', expected a number"),
        (5, "1;2;3", "column point: found '1;2;3', expected 2 numbers"),
        (5, "1;x", "column point: found '1;x', expected finite numbers"),
        (7, "-1", "column w: found '-1', expected a weight of at least 0"),
        (7, "", "column w: found an empty cell, expected a weight of at least 0"),
        (8, "maybe", "column clicked: found 'maybe', expected 0 or 1"),
    ],
)
def test_a_wrong_cell_is_named(log, column, cell, message):
    rows = [list(row) for row in ROWS]
    rows[2][column] = cell
    with pytest.raises(DataError, match=f"row 4, {message}"):
        _convert(log, f"--train={_csv(log / 'log.csv', rows)}")
    assert not (log / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\nitem,clicked\n1,0\n", "row 1: found an empty line before the header"),
        ("sep=,\nitem,clicked\n1,0\n", "row 1: found the line 'sep=,', which a spreadsheet"),
        ("item ,clicked\n1,0\n", r"column item: found no such column \(but 'item ': blanks count"),
        (b"PK\x03\x04....", "found a zip or Excel file, expected CSV"),
        (b"BZh91AY", "found a bzip2 file"),
        (b"\xef\xbb\xbf", "found an empty file, expected CSV"),
        (
            pyarrow.compress(b"item,clicked\n" + b"1,0\n" * 99, "zstd", asbytes=True)[:-9],
            r"log\.csv: expected a whole zstd file",
        ),
    ],
)
def test_messages_name_the_cause(tmp_path, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert(
            *(tmp_path / "out", f"--train={tmp_path / 'log.csv'}", "--categorical=item"),
            *("--click=clicked", *FLAGS),
        )


def test_one_file_twice_is_refused(log):
    path = _csv(log / "log.csv")
    (log / "link.csv").symlink_to(path)
    with pytest.raises(DataError, match="this file is in --test, but also in --train as"):
        _convert(log, f"--train={path}", f"--test={log / 'link.csv'}")
    with pytest.raises(DataError, match="this file is in --train, but also in --train as"):
        _convert(log, f"--train={path},{path}")


# --- the second day ------------------------------------------------------------------------------


def test_a_second_day_has_the_ids_of_the_first(log, capsys):
    first, _ = _convert(log, f"--train={_csv(log / 'log.csv')}")
    day = [
        ["2", "3|99", "z", "100", "5", "9;9", "IT", "1", "0", "0"],
        ["77", "", "c", "", "", "", "FR", "1", "1", "0"],
        ["A7", "2.5", "", "0", "20", "1;2", "FR", "1", "0", "0"],
    ]
    path = _csv(log / "day2.csv", day)
    second = convert(log / "day2", f"--schema={log / 'out'}", f"--test={path}")
    assert second.fingerprint == first.fingerprint
    assert list(second.splits) == ["test"]
    rows = read(log / "day2", second, "test")
    np.testing.assert_array_equal(rows["categorical"], [[2, 1], [0, 0], [0, 2]])
    assert rows["ids/history"].tolist() == [[4, 0], [-1, -1], [0, -1]]
    # 100 lies above the prices of the first day: it counts as the greatest of them.
    np.testing.assert_allclose(rows["numerical"][0], [1 / first.numerical[0].std, 2, 2], atol=1e-5)
    told = capsys.readouterr().err
    assert "test: 66.7% of the values of item are unknown, in training 0.0%" in told
    assert "for example '77', '(no integer)'" in told

    grown = convert(
        *(log / "grown", f"--schema={log / 'out'}", "--grow", f"--train={path}"),
        *("--validation_fraction=0", "--test_fraction=0"),
    )
    (item,), (history, tags) = grown.categorical, grown.lists
    assert item.vocabulary == history.vocabulary == (1, 2, 18, 3, 77, 99)
    assert tags.vocabulary == ("b", "a", "c", "z")
    assert grown.numerical == first.numerical
    assert grown.fingerprint != first.fingerprint


def test_what_the_schema_says_cannot_be_said_again(log):
    _convert(log, f"--train={_csv(log / 'log.csv')}")
    path = _csv(log / "day2.csv")
    arguments = [f"--schema={log / 'out'}", f"--test={path}"]
    with pytest.raises(DataError, match="--click beside --schema, which says it"):
        convert(log / "day2", *arguments, "--click=clicked")
    with pytest.raises(DataError, match="this is a schema of columns"):
        convert(log / "day2", *arguments, "--format=aliccp")
    with pytest.raises(DataError, match="--grow goes with --schema"):
        convert(log / "day2", f"--train={path}", "--grow", "--format=columns", "--click=clicked")


# --- nothing is misread in silence ----------------------------------------------------------------


def _simple(tmp_path, lines, *flags):
    (tmp_path / "log.csv").write_text("\n".join(["item,price,c,day,g", *lines, ""]))
    return convert(
        *(tmp_path / "out", "--format=columns", f"--train={tmp_path / 'log.csv'}", "--overwrite"),
        *("--categorical=item", "--numerical=price", "--click=c", *(flags or FLAGS[1:])),
    )


def test_one_dirty_cell_does_not_change_the_type(tmp_path, capsys):
    lines = [f"{k % 9},1,{k % 2},1,1" for k in range(99)]
    schema = _simple(tmp_path, [*lines, "n.a.,2,0,1,1"])
    assert schema.categorical[0].dtype == "int64"
    told = capsys.readouterr().err
    assert "feature item: 1 of 100 values are no integers: 'n.a.' (1)" in told
    text = _simple(tmp_path, [*lines, *["A7,2,0,1,1"] * 30]).categorical[0]
    assert text.dtype == "string"
    told = capsys.readouterr().err
    assert "30 of 129 values are no integers: 'A7' (30); all are read as texts" in told
    assert "A7" in text.vocabulary


def test_a_constant_number_contributes_nothing_and_is_named(tmp_path, capsys):
    schema = _simple(tmp_path, [f"{k % 9},{'' if k % 2 else '33'},{k % 2},1,1" for k in range(50)])
    assert "feature price: 33 or no value in every training row" in capsys.readouterr().err
    (price,) = schema.numerical
    assert price.apply(np.array([33, 1e9, -1e9, np.nan])).tolist() == [0, 0, 0, 0]


def test_missing_marks_are_no_categories(tmp_path):
    marks = ["NA", "N/A", "NULL", "null", "None", "nan", "NaN", "\\N", ""]
    lines = [f"{mark},{mark},{k % 2},1,1" for k, mark in enumerate(marks)] * 3
    schema = _simple(tmp_path, [*lines, *["5,1,0,1,1"] * 3, *["5,2,1,1,1"] * 3])
    assert schema.categorical[0].vocabulary == (5,)
    assert (schema.numerical[0].low, schema.numerical[0].high) == (1, 2)
    assert schema.coverage["item"]["train"][0] == pytest.approx(27 / 33, abs=1e-5)


def test_few_days_give_whole_days_to_every_split(tmp_path):
    lines = [f"1,2,{k % 2},{day},1" for day in range(5) for k in range(20)]
    by_time = ("--time=day", "--conversion=")
    schema = _simple(tmp_path, lines, *by_time)
    assert {name: split.rows for name, split in schema.splits.items()} == {
        "train": 60, "validation": 20, "test": 20,
    }  # fmt: skip
    schema = _simple(tmp_path, lines[:60], *by_time)
    assert [split.rows for split in schema.splits.values()] == [20, 20, 20]
    with pytest.raises(DataError, match="has 2 different times; a split by time needs 3"):
        _simple(tmp_path, lines[:40], *by_time)


def test_validation_has_its_share_though_many_rows_have_the_last_time(tmp_path):
    lines = [f"1,2,{k % 2},{min(k, 70)},1" for k in range(100)]
    schema = _simple(tmp_path, lines, "--time=day", "--conversion=")
    assert [split.rows for split in schema.splits.values()] == [60, 10, 30]


def test_lists_that_are_read_as_one_category_are_told(tmp_path, capsys):
    # Words with such a sign here and there are no lists.
    _simple(tmp_path, [f"a{'|' * (k % 9 == 0)}{k % 9},{k},{k % 2},1,1" for k in range(30)])
    assert "look like lists" not in capsys.readouterr().err
    _simple(tmp_path, [f"a|{k % 9},{k},{k % 2},1,1" for k in range(30)])
    told = capsys.readouterr().err
    assert "feature item: its values look like lists, as 'a|0': each is one category" in told


def test_utc_offsets_are_respected(tmp_path):
    # The second is the earliest of these moments, the third the latest.
    times = ["2024-01-01T10:00:00Z", "2024-01-01T11:00:00+05:00", "2024-01-01T09:00:00-08:00"]
    lines = [f"{k},2,{k % 2},{time},1" for k, time in enumerate(times) for _ in range(5)]
    schema = _simple(tmp_path, lines, "--time=day", "--min_count=1")
    assert schema.categorical[0].vocabulary == (1,)
    assert (
        "validation from 2024-01-01 10:00:00, test from 2024-01-01 17:00:00"
        in (schema.notes["held_out"])
    )


def test_a_time_without_offset_is_in_utc_wherever_the_machine_stands(tmp_path, monkeypatch):
    moments = ["2024-01-01T10:00:00Z", "2024-01-01T09:00:00", "2024-01-01T14:00:00"]
    lines = [f"{k},2,{k % 2},{m},1" for k, m in enumerate(moments) for _ in range(5)]
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        schema = _simple(tmp_path, lines, "--time=day", "--min_count=1")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert schema.categorical[0].vocabulary == (1,)
    assert "test from 2024-01-01 14:00:00" in schema.notes["held_out"]


def test_a_split_without_rows_is_an_error_and_not_a_warning(tmp_path):
    lines = [f"1,2,{k % 2},1,1" for k in range(50)]
    with pytest.raises(DataError, match="no row is in the validation split: there are few groups"):
        _simple(tmp_path, lines, "--group=g")
    assert not (tmp_path / "out").exists()
    # The advice works.
    _simple(tmp_path, lines, "--group=g", "--validation_split=random")
    with pytest.raises(DataError, match="found 1 training rows, expected at least 2"):
        _simple(tmp_path, lines[:1], "--test_fraction=0", "--validation_fraction=0")


def test_rows_that_are_there_twice_are_told(tmp_path, capsys):
    lines = [f"{k % 50},{k}.5,{k % 2},1,1" for k in range(400)]
    _simple(tmp_path, lines)
    assert "equal another one" not in capsys.readouterr().err
    _simple(tmp_path, lines * 2)
    assert "50% of the rows equal another one in all features" in capsys.readouterr().err


def test_groups_in_two_splits_are_counted(tmp_path, capsys):
    lines = [f"1,2,{k % 2},{k // 10},{k % 7}" for k in range(100)]
    _simple(tmp_path, lines, "--group=g", "--time=day")
    assert "7 of 7 groups (g) have rows in several splits" in capsys.readouterr().err


def test_a_feature_without_values_and_clicks_everywhere_are_told(tmp_path, capsys):
    _simple(tmp_path, [f"{k},{k},1,1,1" for k in range(20)])
    told = capsys.readouterr().err
    assert "feature item: no value was seen 2 times in training: all rows have id 0" in told
    assert "train: every row has a click" in told
    assert "there is no validation split" in told


# --- one rule for every reader of values ----------------------------------------------------------


def test_hashes_are_those_of_tensorflow(log):
    import tensorflow as tf

    from pwiser_tf.layers import RawFeatures

    (log / "log.toml").write_text(
        '[labels]\nclick = "c"\n[features.word]\nhash_buckets = 97\ndtype = "string"\n'
        '[features.number]\nhash_buckets = 1000\ndtype = "int64"\n'
        '[features.tags]\ntype = "list"\nseparator = "|"\nhash_buckets = 50\ndtype = "string"\n'
    )
    words = ["a", "Köln", "x" * 100, "", "日本", "0", "NULL", "a b"] * 3
    numbers = ["1", "-5", "9007199254740993", "18.0", "x", "", "007", "2.5"] * 3
    tags = ["a|b", "", "ü|NA|z", "q", "a", "b|b|b", "c", "d"] * 3
    rows = [
        [w, n, t, str(k % 2)] for k, (w, n, t) in enumerate(zip(words, numbers, tags, strict=True))
    ]
    path = _csv(log / "hashed.csv", rows, ["word", "number", "tags", "c"])
    schema, found = _convert(log, f"--train={path}")
    assert schema.categorical[0].size == 98
    missing = -(2**63)
    parsed = [1, -5, 9007199254740993, 18, missing, missing, missing, missing] * 3
    raw = {
        "word": tf.constant([w if w != "NULL" else "" for w in words]),
        "number": tf.constant(parsed, tf.int64),
        "tags": tf.constant(
            [[*(v for v in t.split("|") if v != "NA"), *[""] * 3][:3] for t in tags]
        ),
    }
    served = RawFeatures(schema)(raw)
    np.testing.assert_array_equal(served["categorical"], found["categorical"])
    assert (found["categorical"][:, 1] == 0).tolist() == [False] * 4 + [True] * 4 + (
        [False] * 4 + [True] * 4
    ) * 2
    np.testing.assert_array_equal(served["ids/tags"][:, :3], found["ids/tags"][:, :3])


def test_what_is_served_is_what_was_converted(log):
    """Raw lists, vectors and numbers, to the bit of the id."""
    import tensorflow as tf

    from pwiser_tf.layers import RawFeatures

    schema, found = _convert(log, f"--train={_csv(log / 'log.csv')}")
    missing = -(2**63)
    raw = {
        "item": tf.constant([1, 2, 18, missing], tf.int64),
        "history": tf.constant([[2, 3], [missing] * 2, [18, missing], [1, missing]], tf.int64),
        "history.weights": tf.constant([[1, 2], [0, 0], [1, 0], [0, 0]], tf.float32),
        "tags": tf.constant([["a", "b"], ["", ""], ["b", "a"], ["b", ""]]),
        "price": tf.constant([0, -1.718281828, 1.718281828, np.nan], tf.float32),
        "age": tf.constant([10, 20, 30, 40], tf.float32),
        "point": tf.constant([[1, 2], [np.nan] * 2, [-1, 0.5], [0, 0]], tf.float32),
    }
    served = RawFeatures(schema)(raw)
    for name in served:
        if name.startswith("numerical"):
            np.testing.assert_allclose(served[name], found[name], rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(served[name], found[name], err_msg=name)


def test_padding_changes_nothing_and_an_empty_list_is_zero(log):
    import tensorflow as tf

    from pwiser_tf.layers import Encoder

    schema, found = _convert(log, f"--train={_csv(log / 'log.csv')}")
    encoder = Encoder(schema, 3)
    features = {name: tf.constant(v) for name, v in found.items() if "/" in name or name in
                ("categorical", "numerical")}  # fmt: skip
    expected = encoder(features).numpy()
    wider = dict(features)
    for name, value in features.items():
        if "/" in name:
            fill = records.PADDING if name.startswith("ids/") else 5
            wider[name] = tf.pad(value, [[0, 0], [0, 4]], constant_values=fill)
    np.testing.assert_allclose(encoder(wider), expected, rtol=1e-6)
    table = encoder.embeddings.numpy()
    start = 5 + 3  # the ids of item, then those of age
    # The fields are item, age, history, tags, numbers.
    np.testing.assert_allclose(expected[0, 6:9], (table[2] + 2 * table[4]) / 3, rtol=1e-5)
    np.testing.assert_allclose(
        expected[0, 9:12], (table[start + 2] + table[start + 1]) / 2, rtol=1e-5
    )
    np.testing.assert_array_equal(expected[1, 6:12], np.zeros(6))
    # Weights that are all 0 are as no values.
    np.testing.assert_array_equal(expected[3, 6:9], np.zeros(3))


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_proposes_a_feature_file_that_converts(tmp_path):
    random = np.random.default_rng(0)
    lines = [
        f"{k // 5};{random.integers(9)};{'a|b' if k % 3 else 'c'};{random.random():.3f};7;"
        f"{'NA' if k % 4 else 33};{k % 2};{k % 10 == 0:d};2024-01-{1 + k // 50:02d}"
        for k in range(500)
    ]
    header = "session;item_id;tags;price;constant;age;clicked;bought;day"
    (tmp_path / "log.csv").write_text("\n".join([header, *lines, ""]))
    text = inspect(str(tmp_path / "log.csv"), 1000)
    assert 'click = "clicked"' in text
    assert "# constant is left out: it is constant or empty." in text
    assert 'missing marks found: "NA"' in text
    (tmp_path / "log.toml").write_text(text)
    schema = convert(
        *(tmp_path / "out", f"--features={tmp_path / 'log.toml'}", "--delimiter=;"),
        f"--train={tmp_path / 'log.csv'}",
    )
    assert [feature.name for feature in schema.categorical] == ["item_id"]
    assert [feature.name for feature in schema.lists] == ["tags"]
    assert [feature.name for feature in schema.numerical] == ["price"]
    assert (schema.click, schema.conversion, schema.group) == ("clicked", "bought", "session")


def test_inspect_of_lists_in_parquet(tmp_path):
    """Floats of one length are a vector; missing ones do not count."""
    columns = {
        "vector": [[0.5, 1], None, [], [2, 3.5]],
        "lengths": [[0.5, 1], [1.5], None, [2]],
        "single": [[0.5], [1], [2], [3]],
        "ids": [[1, 2], [3, 4], [5, 6], [7, 8]],
        "click": [0, 1, 0, 1],
    }
    table = pyarrow.table(columns)
    fixed = pyarrow.array([[1, 2], [3, 4], None, [5, 6]], pyarrow.list_(pyarrow.float32(), 2))
    table = table.append_column("fixed", fixed)
    pyarrow.parquet.write_table(table, tmp_path / "log.parquet")
    text = inspect(str(tmp_path / "log.parquet"), 100)
    features = tomllib.loads(text)["features"]
    vector = {"type": "vector", "length": 2}
    assert features == {
        **{name: {"type": "list"} for name in ("lengths", "single", "ids")},
        **dict.fromkeys(("vector", "fixed"), vector),
    }
    (tmp_path / "log.toml").write_text(text)
    train = f"--train={tmp_path / 'log.parquet'}"
    schema = convert(tmp_path / "out", f"--features={tmp_path / 'log.toml'}", train, *FLAGS)
    assert [(v.name, v.length) for v in schema.vectors] == [("vector", 2), ("fixed", 2)]


def test_inspect_without_quotes(tmp_path):
    lines = [f'{k},5" disk {k % 3},{k % 2}' for k in range(20)]
    (tmp_path / "log.csv").write_text("\n".join(['n,"text,click', *lines, ""]))
    text = inspect(str(tmp_path / "log.csv"), 100, quote="")
    assert tomllib.loads(text)["features"]['"text'] == {"dtype": "string"}
    assert f"--train={tmp_path / 'log.csv'} --quote=\n" in text


def test_format_1_is_still_read(tmp_path):
    """A schema and records as they were written before lists."""
    from pwiser_tf.schema import Schema

    content = {
        "format_version": 1,
        "dataset": "columns",
        "fingerprint": "",
        "notes": {"held_out": "none"},
        "labels": {"click": "c", "conversion": "b"},
        "group": None,
        "out_of_vocabulary": {"id": 0, "rule": ""},
        "categorical": [
            {"name": "u", "dtype": "int64", "vocabulary": {"integers_below": 3}, "minimum_count": 1}
        ],
        "numerical": [
            {"name": "p", "transform": "standardize", "mean": 1.0, "std": 2.0, "fill_value": 1.0}
        ],
        "splits": {},
    }
    content["fingerprint"] = "a191b0d8d666140c"
    (tmp_path / "schema.json").write_text(json.dumps(content))
    schema = Schema.load(tmp_path)
    assert schema.categorical[0].size == 4
    np.testing.assert_allclose(schema.numerical[0].apply(np.array([1e6])), [(1e6 - 1) / 2])
