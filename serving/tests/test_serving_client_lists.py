"""client: lists, weights and vectors, in Python and in each kind of file; a model of CTR only."""

import csv
import json

import numpy as np
import pytest
from fake_server import FakeModel, serve
from pwiser_serving import FeatureError, Scorer, client, features, tensors
from pwiser_serving.protos import tensor_pb2

MISSING = -(2**63)
UNKNOWN = MISSING + 1


def _info(data_type, *sizes):
    info = tensor_pb2.TensorInfo(dtype=data_type)
    for size in (-1, *sizes):
        info.tensor_shape.dim.add(size=size)
    return info


INPUTS = {
    "history": _info(tensor_pb2.DT_INT64, 3),
    "history.weights": _info(tensor_pb2.DT_FLOAT, 3),
    "image": _info(tensor_pb2.DT_FLOAT, 2),
    "words": _info(tensor_pb2.DT_STRING, 2),
}
GOOD = {
    "history": [[1, 2], [], [3, None, 4, 5, 6]],
    "history.weights": [[0.5, 2], None, [1, 9, 1, 0, 2]],
    "image": [[1, None], None, np.array([3, 4])],
    "words": [["a", "", "ö", "c"], (), np.array(["d"], object)],
}


def _to_arrays(changes, **options):
    return features.to_arrays({**GOOD, **changes}, INPUTS, **options)


def test_lists_are_cut_and_filled_up():
    arrays, rows = _to_arrays({})
    assert rows == 3
    assert arrays["history"].tolist() == [[1, 2, MISSING], [MISSING] * 3, [3, 4, 5]]
    assert arrays["history.weights"].tolist() == [[0.5, 2, 0], [0, 0, 0], [1, 1, 0]]
    np.testing.assert_array_equal(arrays["image"], [[1, np.nan], [np.nan] * 2, [3, 4]])
    assert arrays["words"].tolist() == [[b"a", "ö".encode()], [b"", b""], [b"d", b""]]
    # What is right already stays.
    again, _ = features.to_arrays(arrays, INPUTS)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)


def test_the_newest_values_may_be_the_last():
    arrays, _ = _to_arrays({}, newest_last=["history"])
    assert arrays["history"].tolist() == [[1, 2, MISSING], [MISSING] * 3, [4, 5, 6]]
    assert arrays["history.weights"].tolist() == [[0.5, 2, 0], [0, 0, 0], [1, 0, 2]]
    assert arrays["words"][0].tolist() == [b"a", "ö".encode()]


def test_weights_may_be_left_out():
    without = {name: values for name, values in GOOD.items() if name != "history.weights"}
    arrays, _ = features.to_arrays(without, INPUTS)
    assert arrays["history.weights"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_large_integers_beside_a_gap_stay_exact():
    history = [[2**53 + 1, float("nan"), 2**62 + 1], None, None]
    arrays, _ = _to_arrays({"history": history, "history.weights": [[1, 1, 1], [], []]})
    assert arrays["history"][0].tolist() == [2**53 + 1, 2**62 + 1, MISSING]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"history": [[1], [2], ["x"]]}, "feature history, row 2: found 'x', expected an integer"),
        ({"history": [1, 2, 3]}, "feature history, row 0: found 1, expected a list"),
        ({"history": ["1|2", [], []]}, "feature history, row 0: found '1|2', expected a list"),
        ({"history": [[1], []]}, "feature history.weights: found 3 rows, expected 2"),
        ({"image": [[1, 2]] * 2}, "feature image: found 2 rows, expected 3 as history has"),
        ({"image": [[], [1, 2], [1]]}, "feature image, row 2: found 1 numbers, expected 2"),
        ({"image": np.zeros((3, 5))}, "feature image, row 0: found 5 numbers, expected 2"),
        ({"history.weights": [[1], [], []]}, "history.weights, row 0: found 1 weights, expected 2"),
        (
            {"history.weights": [[1, -1], [], [1] * 5]},
            "history.weights, row 0: found -1.0, expected a number of at least 0",
        ),
        ({"history": [[[1]], [], []]} | {"history.weights": [[1], [], []]}, "found lists of lists"),
    ],
)
def test_lists_that_the_model_does_not_take(changes, told):
    with pytest.raises(FeatureError) as raised:
        _to_arrays(changes)
    assert told in str(raised.value)


class Noted(FakeModel):
    """Notes what it is asked; its score is the sum of the image."""

    def __init__(self, *outputs):
        super().__init__()
        signature = self.signatures["predict_raw"]
        for fields, infos in ((signature.inputs, INPUTS), (signature.outputs, outputs)):
            fields.clear()
            for name in infos:
                fields[name].CopyFrom(INPUTS.get(name, _info(tensor_pb2.DT_FLOAT)))
        self.seen = []

    def predict(self, request, context):
        self.seen.append({name: tensors.decode(t).tolist() for name, t in request.inputs.items()})
        del request.inputs["words"]
        request.inputs["words"].CopyFrom(tensors.encode(np.zeros(len(self.seen[-1]["words"]))))
        return super().predict(request, context)


@pytest.fixture
def score(tmp_path, capsys):
    """A function that scores a file with a model of CTR only: exit code, stderr, what the model
    was asked, and the output."""

    def run(name, content, *flags):
        model, path, output = Noted("ctr"), tmp_path / name, tmp_path / "scores.csv"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        code = 0
        with serve(model) as port:
            try:
                command = "score", f"--server=localhost:{port}", "--model=m", f"--input={path}"
                client.main([*command, f"--output={output}", *flags])
            except SystemExit as end:
                code = end.code
        written = output.read_text() if output.exists() else None
        return code, capsys.readouterr().err, model.seen, written

    return run


WANTED = {
    "history": [[1, UNKNOWN, 3], [MISSING] * 3, [7, 8, MISSING]],
    "history.weights": [[0.5, 1, 2], [0] * 3, [1, 1, 0]],
    "words": [[b"a", b"b"], [b"", b""], [b"c", b""]],
}
TEXT = (
    "id,words,image,history\n"
    "x,a| b |c,1|2,1:0.5|A77|\\N:x|3.0:2|4:1\n"
    "y,NULL,,\n\n"
    "z,|c|NA,3|4,7|8,\n"
)
JSON = [
    {"id": "x", "words": ["a", "b", "c"], "image": [1, 2], "history": [1, "A77", None, 3.0, 4]},
    {"id": "y", "words": None, "history": []},
    {"id": "z", "words": ["", "c", "NA"], "image": [3, 4], "history": "7|8"},
]
WEIGHTS = [[0.5, 1, 0, 2, 1], None, [1, 1]]


def _check(found, kept="id"):
    code, err, seen, written = found
    assert (code, len(seen)) == (0, 1), err
    np.testing.assert_array_equal(seen[0].pop("image"), [[1, 2], [np.nan] * 2, [3, 4]])
    assert seen[0] == WANTED
    rows = list(csv.DictReader(written.splitlines()))
    assert list(rows[0]) == [kept, "ctr"]
    assert [row[kept] for row in rows] == ["x", "y", "z"]


def test_lists_of_a_csv(score):
    _check(score("c.csv", TEXT, "--keep=id"))
    other = TEXT.replace("|", ";").replace(":", "=")
    _check(score("c.csv", other, "--keep=id", "--separator=;", "--weight_separator=="))


def test_a_csv_without_header_or_quotes(score):
    lines = TEXT.replace("NULL", '"').replace(",", "\x01").split("\n", 1)[1]
    flags = (
        "--header=id,words,image,history",
        "--quote=",
        r"--delimiter=\x01",
        '--missing=,",NA,\\N',
    )
    _check(score("c.csv", lines, "--keep=id", *flags))


def test_lists_of_json_lines(score):
    rows = [{**row, "history.weights": w} for row, w in zip(JSON, WEIGHTS, strict=True)]
    text = "\n\n".join(map(json.dumps, rows))
    _check(score("c.jsonl", text, "--keep=id"))


def test_lists_of_parquet(score, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {name: [row.get(name) for row in JSON] for name in ("id", "words", "image")}
    histories = [["1", "A77", None, "3.0", "4"], None, ["7", "8"]]
    for history in (pa.array(histories), pa.array(histories, pa.large_list(pa.string()))):
        table = pa.table(columns | {"history": history, "history.weights": WEIGHTS})
        # Named as a CSV: the content counts.
        pq.write_table(table, tmp_path / "c.csv")
        _check(score("c.csv", None, "--keep=id"))
    image = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2))
    history = pa.array([[1, UNKNOWN, None, 3, 4], [], [7, 8]], pa.list_(pa.int64()))
    table = pa.table(columns | {"image": image, "history": history, "history.weights": WEIGHTS})
    pq.write_table(table, tmp_path / "c.parquet")
    _check(score("c.parquet", None, "--keep=id"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "c.csv",
            "words,image,history\na,1|2,1\na,1|2|3,1\n",
            "row 3, column image: found 3 numbers, expected 2",
        ),
        (
            "c.csv",
            "words,image,history\na,1|x,1\n",
            "row 2, column image: found 'x', expected a finite number",
        ),
        (
            "c.csv",
            "words,image,history\na,1|inf,1\n",
            "row 2, column image: found 'inf', expected a finite",
        ),
        (
            "c.csv",
            "words,image,history\na,,1:x\n",
            "row 2, column history.weights: found 'x', expected a finite",
        ),
        (
            "c.csv",
            "words,image,history\na,,1:2:3\n",
            "row 2, column history.weights: found '2:3', expected a finite",
        ),
        (
            "c.csv",
            "words,image,history\na,,1:-1\n",
            "column history.weights: found -1.0, expected a number of at",
        ),
        ("c.csv", "words,image\na,\n", "column history: the file has no such column"),
        (
            "c.jsonl",
            '{"words": "a", "image": [1]}\n',
            "column history: the file has no such column",
        ),
        ("c.jsonl", '{"words": "a"\n', "row 1: not JSON"),
        (
            "c.jsonl",
            '{"words": [], "history": [], "image": [[1], 2]}',
            "row 1, column image: found '[\"1\"]', expected a finite number",
        ),
        ("c.jsonl", "\n[1]\n", "row 2: found '[1]\\n', expected a JSON object"),
    ],
)
def test_lists_that_are_wrong(score, name, content, told):
    code, err, _, written = score(name, content)
    assert (code, written) == (2, None)
    assert told in err
    assert err.count("\n") == 1


def test_a_model_of_ctr_only():
    model = Noted("ctr")
    with serve(model) as port, Scorer(f"localhost:{port}", "m", newest_last=["history"]) as scorer:
        assert scorer.outputs("predict_raw") == ("ctr",)
        assert list(scorer.score(GOOD)) == ["ctr"]
        assert list(scorer.score({name: [] for name in INPUTS})) == ["ctr"]
        (scores,) = scorer.score_batches([GOOD])
        assert list(scores) == ["ctr"]
    assert model.seen[0]["history"][2] == [4, 5, 6]
    with pytest.raises(TypeError, match="newest_last: found 'history', expected a list of names"):
        Scorer("localhost:1", "m", newest_last="history")


def _entry(name, column, **keys):
    keys = {"separator": None, "weights": None, "weight_separator": None} | keys
    return {"name": name, "column": column} | keys


SCHEMA = {
    "format_version": 2,
    "categorical": [],
    "numerical": [],
    "lists": [{"name": "history", "newest": "last"}, {"name": "words", "newest": "first"}],
    "vectors": [{"name": "image"}],
    "source": {
        "missing": ["", "-"],
        "features": [
            _entry("history", "last items", separator="; ", weight_separator="="),
            _entry("words", "w", separator="|"),
            _entry("image", "pixels", separator=","),
        ],
    },
}
RAW = 'id;last items;w;pixels\nx;"1=0.5; 2; -=9; A77=3; 4";a|-|NA|c;1,2\ny;-;;-\nz;7;|d;3,4\n'


def _schema(tmp_path, **changes):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA | changes))
    return f"--schema={path}"


def test_a_schema_says_how_each_feature_is_read(score, tmp_path):
    schema = _schema(tmp_path)
    for flag in (schema, f"--schema={tmp_path}"):
        code, err, seen, _ = score("c.csv", RAW, flag, "--delimiter=;")
        assert code == 0, err
        assert seen[0]["history"] == [[2, UNKNOWN, 4], [MISSING] * 3, [7, MISSING, MISSING]]
        assert seen[0]["history.weights"] == [[1, 3, 1], [0] * 3, [1, 0, 0]]
        assert seen[0]["words"] == [[b"a", b"NA"], [b"", b""], [b"d", b""]]
        np.testing.assert_array_equal(seen[0]["image"], [[1, 2], [np.nan] * 2, [3, 4]])


def test_a_schema_names_the_column_of_weights(score, tmp_path):
    source = {"features": [_entry("history", "h", weights="hw"), *SCHEMA["source"]["features"][1:]]}
    schema = _schema(tmp_path, source=source)
    rows = [{"h": [1, 2, 3, 4], "hw": [4, 3, 2, 1], "w": "NA", "pixels": [1, 2]}]
    code, err, seen, _ = score("c.jsonl", json.dumps(rows[0]), schema)
    assert code == 0, err
    assert seen[0]["history"] == [[2, 3, 4]]
    assert seen[0]["history.weights"] == [[3, 2, 1]]
    # No marks are stated: the usual ones.
    assert seen[0]["words"] == [[b"", b""]]
    del rows[0]["hw"]
    code, err, *_ = score("c.jsonl", json.dumps(rows[0]), schema)
    assert code == 2
    assert "column hw: the file has no such column" in err
    code, err, *_ = score("c.csv", "h,hw,w,pixels\n1|2,1|1,,\n", schema)
    assert code == 2
    assert "row 2, column h: found '1|2', expected a list: no separator is known" in err


def test_names_of_folders_are_columns(score, tmp_path):
    folder = tmp_path / "w=a%7Cb" / "pixels=__HIVE_DEFAULT_PARTITION__"
    folder.mkdir(parents=True)
    path = f"{folder.relative_to(tmp_path)}/c.csv"
    code, err, seen, _ = score(path, "last items,x\n1,2\n", _schema(tmp_path))
    assert code == 0, err
    assert seen[0]["words"] == [[b"a", b"b"]]
    assert np.isnan(seen[0]["image"]).all()


def test_a_schema_of_format_1_means_the_defaults(score, tmp_path):
    old = {key: value for key, value in SCHEMA.items() if key not in ("source", "lists")}
    names = [{"name": name} for name in ("history", "words")]
    (tmp_path / "schema.json").write_text(
        json.dumps(old | {"format_version": 1, "categorical": names})
    )
    text = TEXT.replace(",1:0.5", ",9|1:0.5").split("\n")[:2]
    code, err, seen, _ = score("c.csv", "\n".join(text), f"--schema={tmp_path}")
    assert code == 0, err
    assert seen[0]["history"] == [[9, 1, UNKNOWN]]
    assert seen[0]["history.weights"] == [[1, 0.5, 1]]


@pytest.mark.parametrize(
    ("changes", "flags", "told"),
    [
        ({}, ["--separator=|"], "--separator beside --schema, which says it"),
        ({}, ["--missing="], "--missing beside --schema, which says it"),
        ({}, ["--newest_last=history"], "--newest_last beside --schema, which says it"),
        ({"format_version": 3}, [], "found format_version 3, expected 1 or 2"),
        ({"lists": 7}, [], "not a schema of pwiser convert"),
        (
            {"lists": [], "source": {}},
            [],
            "feature history: the model takes it; the schema has: image",
        ),
        (
            {"source": {"features": [{"name": "history"}]}},
            [],
            "not a schema of pwiser convert (no 'column')",
        ),
        ({}, ["--schema=absent.json"], "absent.json: No such file or directory"),
    ],
)
def test_schemas_that_cannot_be_used(score, tmp_path, changes, flags, told):
    code, err, _, written = score("c.csv", RAW, _schema(tmp_path, **changes), *flags)
    assert (code, written) == (2, None)
    assert told in err
    assert err.count("\n") == 1


def test_messages_name_the_column_of_the_file(score, tmp_path):
    schema = _schema(tmp_path)
    for found, wanted, told in (
        ("3,4", "3,x", "row 4, column pixels: found 'x', expected a finite number"),
        ("1=0.5", "1=y", "row 2, column last items: found 'y', expected a finite number"),
        ("last items", "history", "row 1, column last items: the file has no such column"),
    ):
        code, err, *_ = score("c.csv", RAW.replace(found, wanted), schema, "--delimiter=;")
        assert code == 2
        assert told in err
