"""A served model with lists, a sequence with weights and a vector: one score for one row, whatever
the format in which it comes."""

import contextlib
import csv
import json
import pathlib
import subprocess
import sys

import numpy as np
import pwiser_serving
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow as tf
from pwiser_serving import client

from pwiser_tf import data, runs
from pwiser_tf.config import Config
from pwiser_tf.export import export
from pwiser_tf.training import train
from tests.test_convert import convert

FEATURES = """
[features.item]
[features.price]
type = "numerical"
[features.genres]
type = "list"
separator = "|"
max_length = 3
[features.history]
type = "sequence"
separator = "|"
weight_separator = ":"
vocabulary = "item"
max_length = 4
newest = "last"
[features.image]
type = "vector"
length = 2
separator = "|"
"""
GENRES = ["drama", "comedy", "crime", "köln", "unknown"]
ROWS = 400


def make_rows() -> dict[str, list]:
    """Columns of Python values; None is missing, as is a list without values."""
    random = np.random.default_rng(3)
    columns = {name: [] for name in ("item", "price", "genres", "history", "history.weights")}
    columns |= {"image": [], "click": [], "buy": []}
    for row in range(ROWS):
        length = int(random.integers(0, 7))
        columns["item"].append(int(random.integers(1, 20)) if row % 7 else None)
        columns["price"].append(float(random.normal()) if row % 5 else None)
        columns["genres"].append(random.choice(GENRES, random.integers(0, 6)).tolist())
        columns["history"].append(random.integers(1, 30, length).tolist())
        columns["history.weights"].append(random.integers(0, 9, length).astype(float).tolist())
        columns["image"].append(random.normal(size=2).tolist() if row % 3 else None)
        columns["click"].append(int(random.random() < 0.5))
        columns["buy"].append(int(columns["click"][-1] and random.random() < 0.5))
    return columns


def texts_of(columns: dict[str, list]) -> list[dict[str, str]]:
    """The rows of a CSV; missing values and values of a list in several spellings."""
    rows = []
    for place in range(ROWS):
        row = {name: values[place] for name, values in columns.items()}
        pairs = zip(row["history"], row.pop("history.weights"), strict=True)
        history = [f" {item}{'.0' * (place % 2)}:{weight}" for item, weight in pairs]
        row["history"] = "|".join([*history, r"\N:3"])
        row["genres"] = "|".join(["NA", *row["genres"]]) if place % 4 else "|".join(row["genres"])
        row["image"] = "|".join(map(str, row["image"] or []))
        for name in ("item", "price"):
            row[name] = ("null", "")[place % 2] if row[name] is None else str(row[name])
        rows.append(row)
    return rows


def make_model(
    folder: pathlib.Path, feature_file: str, conversion: bool, *flags: str
) -> dict[str, np.ndarray]:
    """Converts a log, trains and exports (folder / "models" / "m"); the scores of its records."""
    labels = '[labels]\nclick = "click"\n' + 'conversion = "buy"\n' * conversion
    (folder / "log.toml").write_text(labels + feature_file)
    (folder / "day.csv").write_bytes((folder / "log.csv").read_bytes())
    schema = convert(
        folder / "data",
        *(f"--features={folder / 'log.toml'}", f"--train={folder / 'log.csv'}"),
        *("--validation_fraction=0.2", f"--test={folder / 'day.csv'}", *flags),
    )
    settings = Config.of(
        data_dir=str(folder / "data"),
        model="shared_bottom",
        **({} if conversion else {"loss": "bce"}),
        embedding_dim=4,
        bottom_units=(8,),
        tower_units=(4,),
        batch_size=64,
        epochs=1,
        learning_rate=0.05,
    )
    train(settings, folder / "run")
    export(folder / "run", folder / "models", "m")
    model, _, _ = runs.load_run(folder / "run")
    batches = data.batches(folder / "data", schema, "test", 100)
    parts = [model(features, training=False) for features, _ in batches]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_widths(version: pathlib.Path, raw: dict[str, list], ctr: np.ndarray) -> None:
    """predict_raw takes lists of any number of columns, in Python and through a Session."""
    lists = {"genres": "", "history": -(2**63), "history.weights": 0.0}
    missing = lists | {"item": -(2**63), "price": np.nan, "image": [np.nan] * 2}
    lengths = [max(map(len, row)) for row in zip(raw["genres"], raw["history"], strict=True)]
    requests = []
    for width in (1, 2, 9):
        rows = [row for row, length in enumerate(lengths) if length <= width]
        sent = {}
        for name, filler in missing.items():
            values = [raw[name][row] for row in rows]
            if name in lists:
                sent[name] = [value + [filler] * (width - len(value)) for value in values]
            else:
                sent[name] = [filler if value is None else value for value in values]
        requests.append((sent, ctr[rows]))
    predict_raw = tf.saved_model.load(str(version)).signatures["predict_raw"]
    for sent, wanted in requests:
        found = predict_raw(**{name.replace(".", "_"): values for name, values in sent.items()})
        np.testing.assert_allclose(found["ctr"], wanted, rtol=1e-5)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(version))
        signature = loaded.signature_def["predict_raw"]
        # What a client cuts and fills up to.
        sizes = {name: signature.inputs[name].tensor_shape.dim[1].size for name in lists}
        assert sizes == {"genres": 3, "history": 4, "history.weights": 4}

        def run(sent):
            feed = {signature.inputs[name].name: values for name, values in sent.items()}
            return session.run(signature.outputs["ctr"].name, feed)

        for sent, wanted in requests:
            np.testing.assert_allclose(run(sent), wanted, rtol=1e-5)
        # One column of weights would be broadcast.
        sent["history.weights"] = [row[:1] for row in sent["history.weights"]]
        with pytest.raises(tf.errors.InvalidArgumentError, match="history have another shape"):
            run(sent)


@contextlib.contextmanager
def serving(folder: pathlib.Path):
    """The port of a local server of the model."""
    command = [sys.executable, "-m", "pwiser_serving.server", "--port=0", "--model_name=m"]
    command += [f"--model_base_path={folder / 'models' / 'm'}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            yield server.stdout.readline().split(":")[-1].strip()
        finally:
            server.terminate()


def score_file(port: str, file: pathlib.Path, *flags: str) -> list[dict[str, str]]:
    """The rows that the command writes."""
    output = file.with_name("scores.csv")
    command = "score", f"--server=localhost:{port}", "--model=m", f"--input={file}"
    client.main([*command, f"--output={output}", *flags])
    with open(output, newline="") as written:
        return list(csv.DictReader(written))


@pytest.mark.slow
@pytest.mark.parametrize("conversion", [True, False])
def test_scores_do_not_depend_on_the_format(tmp_path, conversion):
    columns = make_rows()
    with open(tmp_path / "log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, texts_of(columns)[0])
        writer.writeheader()
        writer.writerows(texts_of(columns))
    wanted = make_model(tmp_path, FEATURES, conversion)
    outputs = ["ctr", "cvr", "ctcvr"] if conversion else ["ctr"]
    assert list(wanted) == outputs

    raw = {name: v for name, v in columns.items() if name not in ("click", "buy")}
    with pwiser_serving.SavedModelScorer(
        tmp_path / "models" / "m", newest_last=["history"], rows_per_request=64
    ) as scorer:
        scores = scorer.score(raw)
        assert list(scores) == outputs
        assert list(scorer.score({name: [] for name in raw})) == outputs
    for name in outputs:
        np.testing.assert_allclose(scores[name], wanted[name], rtol=1e-5)
    check_widths(tmp_path / "models" / "m" / "1", raw, scores["ctr"])

    pyarrow.parquet.write_table(pyarrow.table(raw), tmp_path / "rows.parquet")
    lines = (dict(zip(raw, row, strict=True)) for row in zip(*raw.values(), strict=True))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    packed = pyarrow.compress((tmp_path / "log.csv").read_bytes(), "zstd", asbytes=True)
    (tmp_path / "rows.csv").write_bytes(packed)
    with serving(tmp_path) as port:
        with pwiser_serving.Scorer(f"localhost:{port}", "m", newest_last=["history"]) as scorer:
            again = scorer.score(raw)
        for file in ("rows.csv", "rows.parquet", "rows.jsonl"):
            rows = score_file(port, tmp_path / file, "--newest_last=history", "--keep=item")
            assert list(rows[0]) == ["item", *outputs]
            for name in outputs:
                found = np.array([row[name] for row in rows], np.float32)
                np.testing.assert_array_equal(found, again[name], file)
                np.testing.assert_allclose(found, scores[name], rtol=1e-6)
    assert len(np.unique(again["ctr"])) > ROWS // 2


RAW_FEATURES = """
[columns]
missing = ["", "-", "none"]
[features.item]
column = "article no"
[features.price]
type = "numerical"
column = "p"
[features.price_bucket]
type = "numerical"
column = "p"
transform = "quantiles"
buckets = 4
[features.genres]
type = "list"
column = "kinds"
separator = "/"
max_length = 3
[features.history]
type = "sequence"
column = "bought before"
separator = " "
weight_separator = "="
vocabulary = "item"
max_length = 4
newest = "last"
[features.image]
type = "vector"
length = 2
separator = ";"
"""


@pytest.mark.slow
def test_a_raw_log_is_scored_by_its_schema(tmp_path):
    """Other names, separators that differ, weights, the newest last, marks of its own."""
    columns = make_rows()
    with open(tmp_path / "log.csv", "w", newline="", encoding="utf-8") as file:
        names = ["article no", "p", "kinds", "bought before", "image", "click", "buy"]
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(names)
        for row in range(ROWS):
            item, price, genres, history, weights, image, *labels = (
                values[row] for values in columns.values()
            )
            pairs = zip(history, weights, strict=True)
            history = " ".join(["-", *(f"{i}={w}" if w != 1 else str(i) for i, w in pairs)])
            image = ";".join(map(str, image)) if image else "none"
            cells = "-" if item is None else item, "none" if price is None else price
            # NA is a value here.
            writer.writerow([*cells, "/".join([*genres, "NA"]), history, image, *labels])
    wanted = make_model(tmp_path, RAW_FEATURES, True, "--delimiter=\\t")
    with serving(tmp_path) as port:
        (version,) = (tmp_path / "models" / "m").iterdir()
        for source in (version / "assets.extra", tmp_path / "run", tmp_path / "data/schema.json"):
            flags = f"--schema={source}", "--delimiter=\\t", "--keep=article no"
            rows = score_file(port, tmp_path / "log.csv", *flags)
            assert [row["article no"] for row in rows][:2] == ["-", str(columns["item"][1])]
            for name, scores in wanted.items():
                found = np.array([row[name] for row in rows], np.float32)
                np.testing.assert_allclose(found, scores, rtol=1e-5)
    assert len(np.unique(found)) > ROWS // 2
