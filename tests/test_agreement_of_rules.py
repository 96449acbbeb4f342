"""One log of odd texts, as the converter, NumPy, the served graph and the client read it."""

import csv
import datetime
import decimal
import gzip
import itertools

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from pwiser_serving import parquet, rules
from pwiser_serving.candidates import CandidateError, CandidateFile
from pwiser_serving.protos import tensor_pb2

from pwiser_tf.convert import columns, features
from pwiser_tf.layers import RawFeatures
from pwiser_tf.schema import Schema
from tests.test_convert import convert, read

LENGTH = 4
FEATURES = """
[labels]
click = "click"
[features.integer]
dtype = "int64"
[features.hashed]
column = "integer"
dtype = "int64"
hash_buckets = 1000
[features.text]
dtype = "string"
[features.hashed_text]
column = "text"
dtype = "string"
hash_buckets = 1000
[features.number]
type = "numerical"
transform = "identity"
[features.log]
type = "numerical"
column = "number"
transform = "log"
[features.bucket]
type = "numerical"
column = "number"
transform = "quantiles"
[features.vector]
type = "vector"
length = 2
separator = "|"
"""
LISTS = {
    "integers": 'type = "list"\ndtype = "int64"',
    "hashed_integers": 'type = "list"\ndtype = "int64"\nhash_buckets = 1000\ncolumn = "integers"',
    "texts": 'type = "list"\ndtype = "string"',
    "newest": 'type = "sequence"\ndtype = "string"\nnewest = "last"\ncolumn = "texts"',
    "weighted": 'type = "sequence"\ndtype = "int64"\nweight_separator = ":"',
    "weighted_texts": 'type = "list"\ndtype = "string"\nweight_separator = ":"',
}

# fmt: off
INTEGERS = [
    0, 1, -1, 7, 18, 70, 10**9, 2**31, 2**53, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64,
    -(2**53) - 1, 2 - 2**63, 1 - 2**63, -(2**63), -(2**63) - 1, 10**18, 10**19, 10**400,
]
WORDS = [
    "A77", "acme", "Köln", "東京", "🙂", "e\u0301", "\u00e9", "ß", "İ", "\u200b", "\ufeff",
    "\u0663", "\uff11\uff18", "\u22125",
    "1\u0660", "a,b", "a b", " a", "a ", "\u00a07", "7\u00a0",
    "\u20037", "\t7", "7\t", "7\r", "\r\n", "\n", "a\nb", 'a"b', '"', "'", "''", "a'b", "--", "-",
    "+", ".", "..", "1.2.3", "1,5", "1 000", "1_000", "1e3", "1E3", "1e+3", "1e-3", "1e400",
    "1e-400", "0x1F", "0b1", "1f", "true", "True", "inf", "-inf", "Infinity", "infinity", "iNf",
    "+inf", "NAN", "-nan", "+nan", "Nan", "na", "Na", "n/a", "NULL ", " NULL", "Null", "none",
    "NONE", r"\n", r"\\N", "#N/A", "<NA>", "missing", "\x1c7", "7\x1f", "\x0b7", "7\x0c", "\x7f",
    "\u2028", "a\u2029b", "\u3000", "x" * 5000,
]
NUMBERS = [
    ".5", "-.5", "5.", "+5", "+5.5", "5.5", "2.5", "-2.5", "0.1",
    "1.00000005960464477539062500000001", "1.0000000596046448", "16777217", "16777217.0000000001",
    "33554435", "0.30000000000000004", "3.4028235e38",
    "3.40282356779733661637539395458142568447e38", "3.4028236e38", "1e38", "1e39", "-1e39",
    "1.4e-45", "7e-46", "8e-46", "1e-60", "5e-324", "1e0400", "1e1_0", "1.5_5", "1__0", "_1",
    "1_", " 1.5", "1.5 ", "\t1.5\n", "++1", "- 1", "1 2", "1e", "1e+", "1d",
    "123456789012345678901234567890",
]
# fmt: on


def odd_texts() -> list[str]:
    """Texts that programs read in different ways, without repetition."""
    found = [*features.MISSING_MARKS, *WORDS, *NUMBERS]
    for number in INTEGERS:
        found += [f"{number}{end}" for end in ("", ".", ".0", ".000", ".5", ".0e0", " ")]
        found += [f"{start}{number}" for start in ("0", "00", "+", "-", " ", "-0")]
    random = np.random.default_rng(0)
    found += [repr(float(x)) for x in random.normal(size=40) * 10.0 ** random.integers(-44, 38, 40)]
    found += [repr(np.float64(np.float32(x)) * (1 + 2**-24)) for x in random.random(40)]
    alphabet = [*"01789-+._eE ,;|:NAn\\/", "\u00a0", "\u0661"]
    found += ["".join(random.choice(alphabet, random.integers(1, 8))) for _ in range(200)]
    # DuckDB reads +-1 as the number -1, which the client refuses.
    return [text for text in dict.fromkeys(found) if "+-" not in text]


def is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(rules.number(text))) or text in features.MISSING_MARKS
    except ValueError:
        return text in features.MISSING_MARKS


def test_texts_that_are_numbers():
    """The client and the converter refuse the same texts, and read the others to the bit."""
    texts = odd_texts()
    found = duckdb.execute(
        f"SELECT {columns._parsed('text')} FROM (SELECT unnest(?) AS text)", [texts]
    ).fetchnumpy()
    (converted,) = found.values()
    for text, wanted in zip(texts, np.ma.filled(converted, np.nan), strict=True):
        try:
            read_here = np.float32(rules.number(text))
        except ValueError:
            read_here = np.float32(np.inf)
        np.testing.assert_array_equal(
            read_here, np.abs(wanted) if np.isinf(wanted) else wanted, text
        )


def rows_of(texts: list[str]) -> list[dict[str, str]]:
    rows = []
    for place, text in enumerate(texts):
        others = [texts[(place + k) % len(texts)] for k in range(1, 2 + place % 5)]
        several = "|".join([text, "18", *others])
        weighted = "|".join(
            f"{value.replace(':', ';').replace('|', '/')}{mark}"
            for value, mark in zip(
                [text, "18", *others], itertools.cycle((":0.5", "", ":2", ": 1 "))
            )
        )
        parts = [part for part in (text, "1") if is_number(part) and part not in ("", "NA")]
        rows.append(
            {
                "integer": text,
                "text": text,
                "number": text if is_number(text) else "",
                "integers": several,
                "texts": several,
                "weighted": weighted,
                "weighted_texts": weighted,
                "vector": "|".join(parts)
                if len(parts) == 2 and text[:1] not in "N\\n"
                else text[:0],
                "click": str(place % 2),
            }
        )
    return rows


def info(dtype: int, *width: int) -> tensor_pb2.TensorInfo:
    found = tensor_pb2.TensorInfo(dtype=dtype)
    for size in (-1, *width):
        found.tensor_shape.dim.add(size=size)
    return found


def inputs_of(schema: Schema) -> dict[str, tensor_pb2.TensorInfo]:
    kinds = {"int64": tensor_pb2.DT_INT64, "string": tensor_pb2.DT_STRING}
    found = {f.name: info(kinds[f.dtype]) for f in schema.categorical}
    found |= {f.name: info(tensor_pb2.DT_FLOAT) for f in schema.numerical}
    found |= {f.name: info(tensor_pb2.DT_FLOAT, f.length) for f in schema.vectors}
    for f in schema.lists:
        found[f.name] = info(kinds[f.dtype], f.max_length)
        if f.weighted:
            found[f"{f.name}.weights"] = info(tensor_pb2.DT_FLOAT, f.max_length)
    return found


@pytest.mark.slow
def test_converter_numpy_graph_and_client_agree(tmp_path):
    texts = odd_texts()
    assert len(texts) >= 300
    rows = rows_of(texts)
    for name, chosen in (("train", rows[::2] * 2), ("test", rows)):
        with open(tmp_path / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(chosen)
    lists = (
        f"[features.{name}]\n{keys}\nmax_length = {LENGTH}\n" + 'separator = "|"\n'
        for name, keys in LISTS.items()
    )
    (tmp_path / "log.toml").write_text(FEATURES + "".join(lists))
    schema = convert(
        tmp_path / "out",
        *(f"--features={tmp_path / 'log.toml'}", f"--train={tmp_path / 'train.csv'}"),
        *(f"--test={tmp_path / 'test.csv'}", "--validation_fraction=0"),
    )
    wanted = read(tmp_path / "out", schema, "test")

    path = tmp_path / "candidates"
    path.write_bytes(gzip.compress((tmp_path / "test.csv").read_bytes()))
    inputs = inputs_of(schema)
    with CandidateFile(path, rules.Dialect(**rules.of_schema(tmp_path / "out"))) as file:
        found = [batch.features(inputs) for batch in file.batches(100)]
    raw = {name: np.concatenate([part[name] for part in found]) for name in inputs}

    graph = RawFeatures(schema)({name: tf.constant(values) for name, values in raw.items()})
    np.testing.assert_array_equal(graph["categorical"], wanted["categorical"])
    np.testing.assert_array_equal(graph["numerical"][:, 0], wanted["numerical"][:, 0])
    np.testing.assert_allclose(graph["numerical"][:, 1], wanted["numerical"][:, 1], rtol=1e-6)
    for position, feature in enumerate(schema.categorical):
        values = [v.decode() for v in raw[feature.name]] if feature.dtype == "string" else None
        values = np.array(values, object) if values else raw[feature.name]
        np.testing.assert_array_equal(feature.ids(values), wanted["categorical"][:, position])
    for position, feature in enumerate(schema.value_features):
        values = feature.apply(raw[feature.name])
        np.testing.assert_array_equal(values, wanted["numerical"][:, position])
    np.testing.assert_array_equal(
        schema.vectors[0].apply(raw["vector"]), wanted["numerical"][:, 2:]
    )
    for feature in schema.lists:
        name = feature.name
        np.testing.assert_array_equal(graph[f"ids/{name}"], wanted[f"ids/{name}"], name)
        values = raw[name].ravel()
        missing = values == (b"" if feature.dtype == "string" else rules.MISSING_INTEGER)
        if feature.dtype == "string":
            values = np.array([value.decode() for value in values], object)
        ids = np.where(missing, -1, feature.ids(values)).reshape(raw[name].shape)
        np.testing.assert_array_equal(ids, wanted[f"ids/{name}"], name)
        if feature.weighted:
            weights = graph[f"weights/{name}"]
            np.testing.assert_array_equal(weights, wanted[f"weights/{name}"], name)
    # Not all the same: some texts are known, some are not.
    for ids in (*wanted["categorical"].T, *(wanted[f"ids/{f.name}"] for f in schema.lists)):
        assert len(np.unique(ids)) > 10


FILES = {
    "a trailing delimiter": (b"a,text\n1,x,\n2,y,\n", ["x", "y"]),
    "a trailing delimiter of some rows": (b"a,text\n1,x\n2,y,,\n", ["x", "y"]),
    "a trailing value": (b"a,text\n1,x,z\n", None),
    "too few": (b"a,text\n1\n", None),
    "blank lines": (b"a,text\n\n1,x\n\n\n2,y\n\n", ["x", "y"]),
    "blank lines of one column": (b"text\nx\n\ny\n", ["x", "", "y"]),
    "mixed line endings": (b"a,text\r\n1,x\n2,y\r\n", ["x", "y"]),
    "CR alone": (b"a,text\r1,x\r2,y\r", ["x", "y"]),
    "a byte order mark": (b"\xef\xbb\xbfa,text\n1,x\n", ["x"]),
    "quoted marks": (b'a,text\n1,"NA"\n"2","\\N"\n', ["", ""]),
    "a quote within": (b'a,text\n1,x"y\n2,"x""y"\n', ['x"y', 'x"y']),
    "a quote that is not closed": (b'a,text\n1,"x\n', None),
    "no UTF-8": (b"a,text\n1,\xe9\n", None),
}


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, "zstd"])
@pytest.mark.parametrize("name", FILES)
def test_files_are_read_alike(name, pack, tmp_path):
    data, texts = FILES[name]
    if pack == "zstd":
        import pyarrow

        data = pyarrow.compress(data, "zstd", asbytes=True)
    else:
        data = pack(data)
    path = tmp_path / "log"
    path.write_bytes(data)
    from pwiser_tf.convert.csv_reader import TEXT, CsvFile, Database
    from pwiser_tf.errors import DataError

    converted = found = None
    with Database(tmp_path) as database:
        try:
            file = CsvFile(path, {"text": TEXT}, missing=features.MISSING_MARKS)
            database.files.append(file)
            rows = database.query(f"SELECT {file.column('text')} FROM {file.table()}", "reading")
            converted = [text or "" for (text,) in rows]
        except DataError:
            pass
    try:
        with CandidateFile(path, rules.Dialect()) as file:
            parts = [b.features({"text": info(tensor_pb2.DT_STRING)}) for b in file.batches(2)]
        found = [text.decode() for part in parts for text in part["text"]]
    except CandidateError:
        pass
    assert converted == found == texts


def test_types_of_parquet_are_read_alike(tmp_path):
    """As texts: for whoever trains on times, decimals or short floats as categories."""
    moments = [datetime.datetime(2026, 1, 1, 0, 0, s, f) for s, f in ((0, 0), (1, 500), (59, 0))]
    floats = [0.1, 16777216.0, None, 1e10, 3.4e38, 1e-5, -0.0, 1e16, 123456.79, 2.0]
    arrays = {
        "moment": pa.array(moments, pa.timestamp("us")),
        "of_millis": pa.array([0, 1500, None], pa.timestamp("ms")),
        "in_utc": pa.array(moments, pa.timestamp("us", "UTC")),
        "in_paris": pa.array(moments, pa.timestamp("us", "Europe/Paris")),
        "hour": pa.array([moment.time() for moment in moments]),
        "day": pa.array([datetime.date(2026, 1, day) for day in (1, 2, 31)]),
        "short": pa.array(floats, pa.float32()),
        "half": pa.array(np.array([0.1, 2.0, 600.0], np.float16)),
        "double": pa.array([*floats, 1.5e300, float("nan")]),
        "decimal": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("-0.25")]),
        "large": pa.array([2**64 - 1, 2, None], pa.uint64()),
        "flag": pa.array([True, None, False]),
        "dictionary": pa.array(["a", None, "b"]).dictionary_encode(),
    }
    rows = max(map(len, arrays.values()))
    kinds = "".join(f'[features.{name}]\ndtype = "string"\nmin_count = 1\n' for name in arrays)
    (tmp_path / "log.toml").write_text('[labels]\nclick = "click"\n' + kinds)
    columns = {name: pa.concat_arrays([array] * rows)[:rows] for name, array in arrays.items()}
    pq.write_table(pa.table({"click": [0, 1] * (rows // 2), **columns}), tmp_path / "log.parquet")
    schema = convert(
        *(tmp_path / "out", f"--features={tmp_path / 'log.toml'}"),
        *(f"--train={tmp_path / 'log.parquet'}", "--validation_fraction=0", "--test_fraction=0"),
    )
    wanted = read(tmp_path / "out", schema, "train")["categorical"]
    file = parquet.CandidateFile(tmp_path / "log.parquet", rules.Dialect())
    for name in arrays:
        file.use(name)
    (batch,) = file.batches(rows)
    found = batch.features(inputs_of(schema))
    for feature, ids in zip(schema.categorical, wanted.T, strict=True):
        texts = np.array([text.decode() for text in found[feature.name]], object)
        np.testing.assert_array_equal(feature.ids(texts), ids, feature.name)
        assert len(set(ids)) >= 2


def test_marks_are_the_converters():
    assert rules.MISSING_MARKS == features.MISSING_MARKS
