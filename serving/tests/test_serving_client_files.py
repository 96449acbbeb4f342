"""client: candidates in TFRecord, Parquet, gzip and standard input; scores in all formats."""

import csv
import datetime
import decimal
import gzip
import json
import math
import os
import pathlib
import struct
import subprocess
import sys

import crc32c
import numpy as np
import pwiser_serving
import pytest
import serving_model
from fake_server import FEATURES, FakeModel, serve
from pwiser_serving import client, rules
from pwiser_serving.protos import tensor_pb2

NAN = float("nan")
ROWS = [("acme", 3, 0.5), ("", -1, NAN), ("zorg", 99, 1e-3), ("new", 4, NAN)]
WANTED = [serving_model.expected(*row, bias=0.0) for row in ROWS]


@pytest.fixture
def run(server, tmp_path, capsys):
    """A function that scores an input into an output: exit code, stdout, stderr."""

    def score(path, *flags, address=server.address):
        code = 0
        try:
            client.main(["score", "--server", address, "--model=m", f"--input={path}", *flags])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return score


def _check(rows):
    assert len(rows) == len(WANTED)
    for row, wanted in zip(rows, WANTED, strict=True):
        for name, value in wanted.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-6)


def _varint(number: int) -> bytes:
    parts = []
    number &= 2**64 - 1
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _example(**features) -> bytes:
    """A tf.train.Example: text, whole numbers and others are its three kinds of list."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, str):
            kind = _field(1, _field(1, value.encode()))
        elif isinstance(value, float):
            kind = _field(2, _field(1, struct.pack("<f", value)))
        else:
            kind = _field(3, _field(1, _varint(value)))
        entries += _field(1, _field(1, name.encode()) + _field(2, kind))
    return _field(1, entries)


def _masked(data: bytes) -> bytes:
    checksum = crc32c.crc32c(data)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _frame(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    return length + _masked(length) + record + _masked(record)


EXAMPLES = [
    _frame(_example(brand="acme", item=3, price=0.5)),
    _frame(_example(item=-1)),
    _frame(_example(brand="zorg", item=99, price=1e-3, unread="x")),
    _frame(_example(brand="new", item=4)),
]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_tfrecords_are_sent_as_they_are(run, tmp_path, batch_size):
    path, output = tmp_path / "c.tfrecord", tmp_path / "s.jsonl"
    path.write_bytes(b"".join(EXAMPLES))
    flags = f"--output={output}", f"--batch_size={batch_size}"
    assert run(path, *flags) == (0, "", f"{output}: 4 rows scored by m, version 7\n")
    _check([json.loads(line) for line in output.read_text().splitlines()])


def test_a_tfrecord_of_no_records(run, tmp_path):
    path = tmp_path / "c.tfrecords"
    path.write_bytes(b"")
    assert run(path)[:2] == (0, "ctr  cvr  ctcvr\n")
    assert run(path, f"--output={tmp_path / 's.jsonl'}")[0] == 0
    assert (tmp_path / "s.jsonl").read_text() == ""


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


GOOD = b"".join(EXAMPLES[:2])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (GOOD + EXAMPLES[2][:5], "row 3: the record is cut off"),
        (GOOD + EXAMPLES[2][:20], "row 3: the record is cut off"),
        (GOOD + EXAMPLES[2][:-1], "row 3: the record is cut off"),
        (_flipped(GOOD, len(EXAMPLES[0]) + 12), "row 2: the record does not match its checksum"),
        (_flipped(GOOD, len(GOOD) - 1), "row 2: the record does not match its checksum"),
        (_flipped(GOOD, 7), "row 1: the record's length does not match its checksum"),
        (b"price,item,brand\n1,2,a\n", "row 1: the record's length does not match its checksum"),
        (
            GOOD + _frame(_example(categorical=1, numerical=0.5)),
            "row 3: the record holds none of the model's features: brand, item, price",
        ),
        (GOOD + _frame(_example(brand=3)), "row 3 to 3: the model refuses these rows: "),
    ],
)
def test_a_broken_tfrecord_is_one_line_and_leaves_nothing(run, tmp_path, data, told):
    path = tmp_path / "c.tfrecord"
    path.write_bytes(data)
    code, out, err = run(path, f"--output={tmp_path / 's.csv'}", "--batch_size=1")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}, {told}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.tfrecord"]


def test_a_tfrecord_has_no_columns_to_keep(run, tmp_path):
    path = tmp_path / "c.tfrecord"
    path.write_bytes(GOOD)
    code, _, err = run(path, "--keep=brand")
    assert code == 2
    assert "column brand: a TFRecord file has no columns to take, which --keep names" in err


TEXT = b"id,price,item,brand\n" + b"".join(b"%d,%d.5,3,acme\n" % (n, n) for n in range(300))
SCORES = b"id,ctr,cvr,ctcvr\n" + b"".join(b"%d,%d.5,%d.5,%d.5\n" % (n, n, n, n) for n in range(300))


@pytest.fixture
def fake():
    """A server's address and its model, whose scores are the price. It reads messages of up to
    10,000 bytes."""
    model = FakeModel(**FEATURES)
    with serve(model, options=[("grpc.max_receive_message_length", 10_000)]) as port:
        yield f"localhost:{port}", model


@pytest.mark.parametrize("name", ["c.csv.gz", "c.csv", "c"])
def test_a_zipped_csv_is_known_by_its_content(run, fake, tmp_path, name):
    path, output = tmp_path / name, tmp_path / "s.csv"
    # Also several, one after another.
    path.write_bytes(gzip.compress(TEXT[:1000]) + gzip.compress(TEXT[1000:]))
    flags = f"--output={output}", "--keep=id", "--batch_size=7"
    assert run(path, *flags, address=fake[0])[0] == 0
    assert output.read_bytes() == SCORES


def test_a_plain_csv_that_is_called_zipped(run, fake, tmp_path):
    path, output = tmp_path / "c.csv.gz", tmp_path / "s.csv"
    path.write_bytes(TEXT)
    assert run(path, f"--output={output}", "--keep=id", address=fake[0])[0] == 0
    assert output.read_bytes() == SCORES


def test_zipped_tfrecords(run, tmp_path):
    path, output = tmp_path / "c.tfrecord.gz", tmp_path / "s.jsonl"
    path.write_bytes(gzip.compress(b"".join(EXAMPLES)))
    assert run(path, f"--output={output}", "--batch_size=3")[0] == 0
    _check([json.loads(line) for line in output.read_text().splitlines()])


@pytest.mark.parametrize("suffix", ["csv.gz", "tfrecord.gz"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[:-9], "Compressed file ended before the end-of-stream marker"),
        (lambda data: data[:5], "Compressed file ended before the end-of-stream marker"),
        (lambda data: data[:10] + b"\xff" + data[11:], "invalid block type"),
        (lambda data: data[:-8] + b"\0" * 4 + data[-4:], "CRC check failed"),
        (lambda data: data + b"more", "Not a gzipped file (b'mo')"),
    ],
)
def test_a_damaged_gzip_file_is_one_line_and_leaves_nothing(run, tmp_path, suffix, damage, told):
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(damage(gzip.compress(TEXT if "csv" in suffix else b"".join(EXAMPLES))))
    flags = f"--output={tmp_path / 's.csv'}", "--batch_size=1"
    code, out, err = run(path, *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: not readable as gzip: ")
    assert told in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_parquet_in_gzip_is_refused(run, tmp_path):
    reason = "Parquet is compressed in itself, expected a name without .gz"
    path, output = tmp_path / "c.parquet.gz", tmp_path / "s.parquet.gz"
    path.write_bytes(gzip.compress(TEXT))
    assert run(path) == (2, "", f"error: {path}: {reason}\n")
    path = path.rename(tmp_path / "c.csv.gz")
    assert run(path, f"--output={output}") == (2, "", f"error: {output}: {reason}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv.gz"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_zipped_scores_are_the_plain_ones(run, fake, tmp_path, suffix):
    path, plain, zipped = (tmp_path / name for name in ("c.csv", f"s.{suffix}", f"s.{suffix}.gz"))
    for text in (TEXT, TEXT[: TEXT.index(b"\n") + 1]):
        path.write_bytes(text)
        for output in (plain, zipped):
            assert run(path, f"--output={output}", "--keep=id", address=fake[0])[0] == 0
        assert gzip.decompress(zipped.read_bytes()) == plain.read_bytes()
        # Neither a name nor a time: the flags and the four bytes of the time are zero.
        assert zipped.read_bytes()[3:8] == bytes(5)


def _piped(address, content, *flags):
    """The command in a process of its own, given the content: exit code, stdout, stderr."""
    command = [sys.executable, "-m", "pwiser_serving.client", "score", f"--server={address}"]
    command += ["--model=m", "--input=-", *flags]
    done = subprocess.run(command, input=content, capture_output=True, timeout=60)
    return done.returncode, done.stdout, done.stderr.decode()


def test_from_standard_input_to_standard_output(fake, tmp_path):
    for content in (TEXT, gzip.compress(TEXT)):
        found = _piped(fake[0], content, "--output=-", "--keep=id", "--batch_size=7")
        assert found == (0, SCORES, "standard output: 300 rows scored by m, version 1\n")
    output = tmp_path / "s.csv"
    found = _piped(fake[0], TEXT, f"--output={output}", "--keep=id")
    assert found == (0, b"", f"{output}: 300 rows scored by m, version 1\n")
    assert output.read_bytes() == SCORES


def test_a_regular_file_as_standard_input_is_read_where_it_stands(fake, tmp_path):
    path, output = tmp_path / "c.csv", tmp_path / "s.csv"
    path.write_bytes(b"a line that another program has read\n" + TEXT)
    command = [sys.executable, "-m", "pwiser_serving.client", "score", f"--server={fake[0]}"]
    command += ["--model=m", "--input=-", "--keep=id"]
    with open(path, "rb") as file:
        os.lseek(file.fileno(), path.stat().st_size - len(TEXT), os.SEEK_SET)
        assert subprocess.run([*command, f"--output={output}"], stdin=file).returncode == 0
    assert output.read_bytes() == SCORES
    # It is the input too: not to be replaced.
    with open(path, "rb") as file:
        done = subprocess.run(
            [*command, f"--output={path}"], stdin=file, capture_output=True, text=True
        )
    assert done.returncode == 2
    assert f"--output: {path} is the input" in done.stderr


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "standard input: the file is empty, expected a header"),
        (b"price,item,brand\nx,1,a\n", "standard input, row 2, column price: found 'x'"),
        (gzip.compress(TEXT)[:-9], "standard input: not readable as gzip: "),
    ],
)
def test_wrong_standard_input(fake, content, told):
    code, out, err = _piped(fake[0], content, "--output=-")
    assert (code, out) == (2, b"")
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", ["--output=-", ""])
def test_closed_standard_output_is_one_line(flags):
    command = f'"$0" -m pwiser_serving.client score --model=m --input=- {flags} >&-'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable], stderr=subprocess.PIPE, input=b"", timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: standard output is closed, expected a file")
    assert done.stderr.count(b"\n") == 1


def test_standard_output_without_rows(run, fake, tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("id,price,item,brand\n")
    code, out, err = run(path, "--output=-", "--keep=id", address=fake[0])
    assert (code, out) == (0, "id,ctr,cvr,ctcvr\n")
    assert err == "standard output: 0 rows scored by m, version 1\n"


def test_standard_output_is_of_one_version(run, fake, tmp_path):
    """A new version during the command does not change who scores it."""
    address, model = fake
    path = tmp_path / "c.csv"
    path.write_bytes(TEXT)
    left = iter(range(20))

    def before():
        if next(left, None) is None:
            model.set_version(2, keep=True)

    model.before = before
    flags = "--output=-", "--keep=id", "--batch_size=7"
    code, out, err = run(path, *flags, address=address)
    assert (code, out.encode()) == (0, SCORES)
    assert err == "standard output: 300 rows scored by m, version 1\n"
    assert model.version == 2


def test_requests_above_the_servers_limit_are_split(run, fake, tmp_path):
    path, output = tmp_path / "c.csv", tmp_path / "s.csv"
    rows = [f"{n},{n}.5,3,{'a' * 3000}\n" for n in range(20)]
    path.write_text("id,price,item,brand\n" + "".join(rows))
    assert run(path, f"--output={output}", "--keep=id", address=fake[0])[0] == 0
    assert output.read_bytes() == b"".join(SCORES.splitlines(keepends=True)[:21])


@pytest.mark.parametrize("output", ["s.csv", "-"])
def test_a_row_above_the_servers_limit_is_named(run, fake, tmp_path, output):
    path = tmp_path / "c.csv"
    rows = [f"{n},{n}.5,3,{'a' * (20_000 if n == 4 else 3000)}\n" for n in range(9)]
    path.write_text("id,price,item,brand\n" + "".join(rows))
    flags = f"--output={tmp_path / output if output != '-' else output}", "--batch_size=3"
    code, out, err = run(path, *flags, address=fake[0])
    assert code == 2
    assert out.count("\n") == (4 if output == "-" else 0)
    # The header is row 1, and the first row of candidates is row 2.
    told = "row 6: this row alone is above the server's message limit: "
    assert err.startswith(f"error: {path}, {told}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


def test_a_record_above_the_servers_limit_is_named(run, tmp_path):
    path = tmp_path / "c.tfrecord"
    path.write_bytes(GOOD + _frame(_example(brand="a" * 20_000)))
    model = FakeModel(**FEATURES)
    model.signatures["serving_default"] = tensor_pb2.Signature()
    model.signatures["serving_default"].inputs["examples"].dtype = tensor_pb2.DT_STRING
    model.signatures["serving_default"].inputs["examples"].tensor_shape.dim.add(size=-1)
    model.signatures["serving_default"].outputs["ctr"].dtype = tensor_pb2.DT_FLOAT
    with serve(model, options=[("grpc.max_receive_message_length", 10_000)]) as port:
        code, _, err = run(path, address=f"localhost:{port}")
    assert code == 2
    assert err.startswith(f"error: {path}, row 3: this row alone is above the server's message")


pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COLUMNS = {
    "brand": [row[0] or None for row in ROWS],
    "item": [None if row[1] < 0 else row[1] for row in ROWS],
    "price": [None if math.isnan(row[2]) else row[2] for row in ROWS],
}


def test_numbers_that_json_does_not_know(run, tmp_path):
    path, output = tmp_path / "c.parquet", tmp_path / "s.jsonl"
    kept = {"a": [NAN, 1.5, None, math.inf]}
    pq.write_table(pa.table(COLUMNS | kept), path)
    assert run(path, f"--output={output}", "--keep=a")[0] == 0

    def unknown(word):
        raise AssertionError(word)

    rows = [json.loads(text, parse_constant=unknown) for text in output.read_text().splitlines()]
    assert [row["a"] for row in rows] == [None, 1.5, None, None]


def test_large_decimals_are_exact_ids():
    from pwiser_serving import parquet

    info = tensor_pb2.TensorInfo(dtype=tensor_pb2.DT_INT64)
    info.tensor_shape.dim.add(size=-1)
    column = pa.array([decimal.Decimal(2**53 + 1), None], pa.decimal128(20, 0))
    batch = parquet.Batch(pathlib.Path("c.parquet"), 1, pa.table({"id": column}), rules.Dialect())
    assert batch.features({"id": info})["id"].tolist() == [2**53 + 1, -(2**63)]


@pytest.mark.parametrize(
    "types",
    [
        {},
        {"brand": pa.large_string(), "item": pa.int32(), "price": pa.float32()},
        {"brand": pa.binary(), "item": pa.uint64(), "price": pa.float64()},
        {"brand": pa.dictionary(pa.int32(), pa.string()), "item": pa.float64()},
        {"item": pa.dictionary(pa.int8(), pa.int16()), "brand": pa.string_view()},
        {"item": pa.decimal128(20, 0), "price": pa.float32()},
    ],
)
def test_parquet_of_any_type(run, tmp_path, types):
    path, output = tmp_path / "c.parquet", tmp_path / "s.csv"
    arrays = {name: pa.array(values, types.get(name)) for name, values in COLUMNS.items()}
    table = pa.table({"unread": pa.array([{"a": 1}] * 4), **arrays})
    pq.write_table(table, path, row_group_size=3)
    for batch_size in (1, 2, 100):
        assert run(path, f"--output={output}", f"--batch_size={batch_size}", "--keep=item")[0] == 0
        with open(output, newline="") as file:
            rows = list(csv.DictReader(file))
        _check(rows)
        kept = [row["item"] for row in rows]
        wanted = ["3", "", "99", "4"]
        assert (
            kept == [t + ".0" * bool(t) for t in wanted]
            if types.get("item") == pa.float64()
            else kept == wanted
        )


def test_whole_numbers_where_the_model_takes_others(run, tmp_path):
    """A missing one among them is missing, not a very small number."""
    path, output = tmp_path / "c.parquet", tmp_path / "s.jsonl"
    for kind in (pa.int64(), pa.uint64(), pa.decimal128(5, 2), pa.null()):
        prices = [decimal.Decimal(2) if pa.types.is_decimal(kind) else 2, None]
        prices = [None, None] if pa.types.is_null(kind) else prices
        pq.write_table(
            pa.table({"brand": ["acme"] * 2, "item": [1, None], "price": pa.array(prices, kind)}),
            path,
        )
        assert run(path, f"--output={output}")[0] == 0
        found = [json.loads(line) for line in output.read_text().splitlines()]
        price = NAN if pa.types.is_null(kind) else 2.0
        for row, values in zip(found, (("acme", 1, price), ("acme", -1, NAN)), strict=True):
            wanted = serving_model.expected(*values, bias=0.0)
            assert row == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ({"price": ["1", "x"]}, "row 2, column price: found 'x', expected a finite number"),
        ({"price": [True, False]}, "row 1, column price: found 'true', expected a finite number"),
        ({"price": [1.0, 1e39]}, "row 2, column price: found inf, expected a finite number"),
        (
            {"brand": [{"a": 1}] * 2},
            "column brand: found the type struct<a: int64>, expected numbers, text or lists of",
        ),
        ({"brand": [[1], [2]]}, "column brand: found lists, expected one value in each row"),
    ],
)
def test_parquet_values_that_the_model_does_not_take(run, tmp_path, column, told):
    path = tmp_path / "c.parquet"
    columns = {"brand": ["a", "b"], "item": [1, 2], "price": [1.0, 2.0]} | column
    pq.write_table(pa.table(columns), path)
    code, out, err = run(path, f"--output={tmp_path / 's.csv'}")
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.parquet"]


def test_parquet_columns_and_files_that_are_wrong(run, tmp_path):
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"brand": ["a"], "item": [1]}), path)
    for flags, told in (
        ((), "column price: the file has no such column, which model m needs; it has: brand, item"),
        (("--keep=id",), "column id: the file has no such column, which --keep names"),
    ):
        code, _, err = run(path, *flags)
        assert (code, told in err) == (2, True)
    path.write_bytes(b"price,item,brand\n1,2,a\n")
    code, _, err = run(path)
    assert code == 2
    assert err.startswith(f"error: {path}: ")
    assert err.count("\n") == 1


def test_kept_columns_in_each_output(run, tmp_path):
    path = tmp_path / "c.parquet"
    kept = {
        "id": pa.array([1, None, 3, 4], pa.int32()),
        "day": [datetime.date(2024, 1, n) for n in (1, 2, 3, 4)],
        "name": pa.array(["a", "b,c", None, 'd"é'], pa.dictionary(pa.int32(), pa.string())),
    }
    pq.write_table(pa.table(COLUMNS | kept), path, row_group_size=3)
    flags = "--keep=id,day,name", "--batch_size=2"
    outputs = {suffix: tmp_path / f"s.{suffix}" for suffix in ("csv", "jsonl", "parquet")}
    for output in outputs.values():
        assert run(path, f"--output={output}", *flags)[0] == 0
    with open(outputs["csv"], newline="", encoding="utf-8") as file:
        texts = list(csv.DictReader(file))
    _check(texts)
    assert [row["id"] for row in texts] == ["1", "", "3", "4"]
    assert [row["name"] for row in texts] == ["a", "b,c", "", 'd"é']
    lines = [json.loads(line) for line in outputs["jsonl"].read_text("utf-8").splitlines()]
    _check(lines)
    assert list(lines[1]) == ["id", "day", "name", "ctr", "cvr", "ctcvr"]
    assert lines[1]["id"] is None
    assert lines[1]["day"] == "2024-01-02"
    table = pq.read_table(outputs["parquet"])
    _check(table.to_pylist())
    assert table.schema.field("id").type == pa.int32()
    assert table.schema.field("day").type == pa.date32()
    assert table.schema.field("ctr").type == pa.float32()
    assert table["id"].to_pylist() == [1, None, 3, 4]
    # All three formats hold the same numbers, to the last digit.
    for row, text, line in zip(table.to_pylist(), texts, lines, strict=True):
        assert np.float32(text["ctr"]) == np.float32(line["ctr"]) == np.float32(row["ctr"])


def test_parquet_of_a_csv_and_of_no_rows(run, tmp_path):
    path, output = tmp_path / "c.csv", tmp_path / "s.parquet"
    path.write_text("id,price,item,brand\n1,0.5,3,acme\n")
    assert run(path, f"--output={output}", "--keep=id")[0] == 0
    assert pq.read_table(output)["id"].to_pylist() == ["1"]
    path.write_text("id,price,item,brand\n")
    assert run(path, f"--output={output}", "--keep=id")[0] == 0
    table = pq.read_table(output)
    assert (table.num_rows, table.column_names) == (0, ["id", "ctr", "cvr", "ctcvr"])
    assert table.schema.field("id").type == pa.string()
    pq.write_table(pa.table({"id": [1], **{name: c[:1] for name, c in COLUMNS.items()}}), path)
    path = path.rename(tmp_path / "c.parquet")
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert run(path, f"--output={output}", "--keep=id")[0] == 0
    assert pq.read_table(output).schema.field("id").type == pa.int64()


def test_without_pyarrow_it_is_named(run, tmp_path, monkeypatch):
    monkeypatch.delattr(pwiser_serving, "parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pwiser_serving.parquet", None)
    path = tmp_path / "c.parquet"
    path.write_bytes(b"")
    code, _, err = run(path)
    assert (code, "pip install 'pwiser-serving[parquet]'" in err) == (2, True)
    path = tmp_path / "c.csv"
    path.write_text("price,item,brand\n")
    code, _, err = run(path, f"--output={tmp_path / 's.parquet'}")
    assert (code, "pip install 'pwiser-serving[parquet]'" in err) == (2, True)


def test_a_text_of_a_model_with_another_signature(run, tmp_path):
    """A model that takes no serialized Examples says so."""
    path = tmp_path / "c.tfrecord"
    path.write_bytes(GOOD)
    with serve(FakeModel(brand=tensor_pb2.DT_STRING)) as port:
        code, _, err = run(path, address=f"localhost:{port}")
    assert code == 2
    assert "the model has no signature serving_default, only predict_raw" in err


def test_parquet_values_are_read_as_their_texts(run, tmp_path):
    """As the converter reads them; an integer feature has 18.0 as 18, and 2.5 as unknown."""
    path, output = tmp_path / "c.parquet", tmp_path / "s.jsonl"
    columns = {"brand": pa.array(["acme"] * 2), "price": ["0.5", "NA"]}
    for item in (
        ["3", "A77"],
        [3.0, 2.5],
        [3.0, NAN],
        pa.array([3, 2**64 - 1], pa.uint64()),
        ["3.0", "003"],
    ):
        pq.write_table(pa.table(columns | {"item": item}), path)
        assert run(path, f"--output={output}")[0] == 0
        found = [json.loads(line) for line in output.read_text().splitlines()]
        for row, values in zip(found, (("acme", 3, 0.5), ("acme", -1, NAN)), strict=True):
            assert row == pytest.approx(serving_model.expected(*values, bias=0.0), rel=1e-6)


def test_zstd_is_known_by_its_content(run, fake, tmp_path):
    path, output = tmp_path / "c.csv", tmp_path / "s.csv"
    packed = pa.compress(TEXT, "zstd", asbytes=True)
    path.write_bytes(packed)
    assert run(path, f"--output={output}", "--keep=id", address=fake[0])[0] == 0
    assert output.read_bytes() == SCORES
    path.write_bytes(packed[:-9])
    code, _, err = run(path, address=fake[0])
    assert (code, err) == (2, f"error: {path}: not readable as zstd: Truncated compressed stream\n")
