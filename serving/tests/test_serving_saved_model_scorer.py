"""SavedModelScorer: a SavedModel on disk gives the scores and the errors that a server gives."""

import os
import pickle
import subprocess
import sys
import threading

import grpc
import numpy as np
import pytest
import serving_model
from pwiser_serving import (
    FeatureError,
    ModelNotFound,
    SavedModelScorer,
    Scorer,
    ScoringError,
    UsageError,
)

tf = pytest.importorskip("tensorflow")

NAN = float("nan")
RAW = {
    "brand": ["acme", "zorg", None, "", NAN, "new"],
    "item": [3, None, -1, 99, NAN, 0],
    "price": [0.5, None, NAN, -1, 2, 1e30],
}
# RAW's rows as the model reads them: what is missing, or no known brand or item, counts nothing.
ROWS = [
    ("acme", 3, 0.5),
    ("zorg", 0, NAN),
    ("", 0, NAN),
    ("", 0, -1),
    ("", 0, 2),
    ("", 0, 1e30),
]


def _wanted(rows, bias=0.0):
    scores = [serving_model.expected(*row, bias) for row in rows]
    return {name: [row[name] for row in scores] for name in ("ctr", "cvr", "ctcvr")}


def _require_close(found, wanted):
    assert list(found) == ["ctr", "cvr", "ctcvr"]
    for name, values in found.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, wanted[name], rtol=1e-6)


@pytest.fixture(scope="module")
def model_folder(models, tmp_path_factory):
    """A model's folder with the versions 9 and 10, whose bias is 1, and things that are none."""
    folder = tmp_path_factory.mktemp("exported") / "demo"
    folder.mkdir()
    os.symlink(models[0.0], folder / "9")
    os.symlink(models[1.0], folder / "10")
    (folder / "partial-11").mkdir()
    (folder / "12").write_text("a file")
    return folder


@pytest.fixture(scope="module")
def scorer(model_folder):
    with SavedModelScorer(model_folder / "9") as scorer:
        yield scorer


def test_raw_features_with_missing_values(scorer):
    found = scorer.score(RAW)
    _require_close(found, _wanted(ROWS))
    assert (found.version, found.versions) == (9, (9,))


def test_arrays_and_frames(scorer):
    pandas = pytest.importorskip("pandas")
    lists = {"brand": ["acme", "zorg"], "item": [3, 4], "price": [0.5, 0.25]}
    wanted = _wanted([("acme", 3, 0.5), ("zorg", 4, 0.25)])
    _require_close(scorer.score({n: np.array(values) for n, values in lists.items()}), wanted)
    _require_close(scorer.score(pandas.DataFrame(lists)[["price", "item", "brand"]]), wanted)


def test_ids(scorer):
    # The brands' ids, and items.
    ids = {"categorical": [[1, 3], [2, 4]], "numerical": [[0.5], [NAN]]}
    _require_close(scorer.score(ids), _wanted([("acme", 3, 0.5), ("zorg", 4, NAN)]))


def test_examples(scorer):
    example = tf.train.Example()
    example.features.feature["brand"].bytes_list.value.append(b"acme")
    example.features.feature["item"].int64_list.value.append(3)
    serialized = [example.SerializeToString(), b""]
    _require_close(
        scorer.score({"examples": serialized}), _wanted([("acme", 3, NAN), ("", 0, NAN)])
    )


def test_a_model_folder_stands_for_its_newest_version(model_folder):
    # 10 is newer than 9, though not as text; 12 is no folder.
    with SavedModelScorer(str(model_folder)) as scorer:
        found = scorer.score(RAW)
    assert (scorer.model, scorer.version, found.version) == ("demo", 10, 10)
    assert scorer.address == str(model_folder / "10")
    _require_close(found, _wanted(ROWS, bias=1.0))


def test_a_folder_that_is_named_by_no_number_has_no_version(models):
    with SavedModelScorer(models[1.0]) as scorer:
        found = scorer.score(RAW)
    assert (scorer.model, scorer.version, found.version) == ("bias1.0", None, None)
    _require_close(found, _wanted(ROWS, bias=1.0))


@pytest.mark.parametrize("rows_per_request", [1, 4, 6])
def test_large_calls_are_run_in_parts(model_folder, monkeypatch, rows_per_request):
    with SavedModelScorer(model_folder / "9", rows_per_request=rows_per_request) as scorer:
        sizes, predict = [], scorer._saved_model.predict

        def counted(signature, arrays, outputs):
            sizes.append(len(arrays["item"]))
            return predict(signature, arrays, outputs)

        monkeypatch.setattr(scorer._saved_model, "predict", counted)
        found = scorer.score(RAW)
    assert sizes == {1: [1] * 6, 4: [4, 2], 6: [6]}[rows_per_request]
    _require_close(found, _wanted(ROWS))
    assert found.version == 9


def test_no_rows(scorer):
    found = scorer.score({"brand": [], "item": [], "price": []})
    assert {name: len(values) for name, values in found.items()} == {"ctr": 0, "cvr": 0, "ctcvr": 0}


@pytest.mark.parametrize(
    "features",
    [
        {"brand": ["a"], "item": [1]},
        {"brand": ["a"], "item": [1], "price": [1], "colour": ["red"]},
        {"brand": ["a"], "item": [1.5], "price": [1]},
        {"brand": [7], "item": [1], "price": [1]},
        {"brand": ["a"], "item": [1], "price": [1, 2]},
        {"categorical": [[1, 2, 3]], "numerical": [[1]]},
        {"brand": "a", "item": [1], "price": [1]},
    ],
)
def test_features_are_refused_in_the_words_of_a_scorer(features, scorer, server):
    with pytest.raises(FeatureError) as here:
        scorer.score(features)
    with Scorer(server.address, "m", timeout=20) as remote, pytest.raises(FeatureError) as there:
        remote.score(features)
    assert str(here.value) == str(there.value)
    with pytest.raises(TypeError, match=r"^features: expected columns by name"):
        scorer.score([1])


def test_a_served_model_gives_the_same_bits(models, server):
    with SavedModelScorer(models[0.0]) as scorer, Scorer(server.address, "m", timeout=20) as remote:
        here, there = scorer.score(RAW), remote.score(RAW)
    for name in ("ctr", "cvr", "ctcvr"):
        np.testing.assert_array_equal(here[name], there[name])


def test_a_signature_by_name(model_folder):
    given = SavedModelScorer(model_folder / "9", signature="predict")
    with given as scorer, pytest.raises(FeatureError, match="feature categorical: missing"):
        scorer.score(RAW)


def test_a_signature_that_is_absent(model_folder):
    given = SavedModelScorer(model_folder / "9", signature="rank")
    with given as scorer, pytest.raises(ScoringError, match="no signature rank, only ") as raised:
        scorer.score(RAW)
    error = pickle.loads(pickle.dumps(raised.value))
    assert (error.model, error.version) == ("demo", 9)
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION


def test_a_path_without_a_saved_model(tmp_path):
    (tmp_path / "empty" / "3").mkdir(parents=True)
    (tmp_path / "file").write_text("no model")
    for path, where in (
        ("absent", "absent"),
        ("file", "file"),
        ("empty/3", "empty/3"),
        ("empty", "empty/3"),
        (".", ""),
    ):
        with pytest.raises(ModelNotFound) as raised:
            SavedModelScorer(tmp_path / path)
        assert str(raised.value).startswith(f"{tmp_path / where}, model ")
        assert "NOT_FOUND: found no saved_model.pb, expected a version's folder" in str(
            raised.value
        )
        assert "\n" not in str(raised.value)


def test_a_saved_model_that_does_not_load(tmp_path):
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "saved_model.pb").write_bytes(b"no message")
    with pytest.raises(ScoringError) as raised:
        SavedModelScorer(tmp_path)
    assert not isinstance(raised.value, ModelNotFound)
    assert raised.value.version == 5
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("outputs", "code", "message"),
    [
        (
            lambda price: dict.fromkeys(("ctr", "cvr", "ctcvr"), tf.reduce_sum(price)),
            grpc.StatusCode.INTERNAL,
            "the answer's ctr has the shape [], expected [3]",
        ),
        (
            lambda price: {"score": price},
            grpc.StatusCode.FAILED_PRECONDITION,
            "the signature predict_raw has no output ctr, only score",
        ),
        (
            lambda price: dict.fromkeys(("ctr", "cvr", "ctcvr"), price * [1, 2]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "ncompatible shapes",
        ),
        (
            lambda price: dict.fromkeys(("ctr", "cvr", "ctcvr"), tf.constant(["a", "b", "c"])),
            grpc.StatusCode.INTERNAL,
            "the answer's ctr cannot be read: could not convert string to float",
        ),
    ],
)
def test_a_model_that_fails_or_answers_otherwise(outputs, code, message, tmp_path):
    module = tf.Module()
    module.predict_raw = tf.function(
        outputs, input_signature=[tf.TensorSpec([None], tf.float32, "price")]
    )
    tf.saved_model.save(module, str(tmp_path), signatures={"predict_raw": module.predict_raw})
    with SavedModelScorer(tmp_path) as scorer, pytest.raises(ScoringError) as raised:
        scorer.score({"price": [1.0, 2.0, 3.0]})
    assert raised.value.code is code
    assert message in str(raised.value)


def test_the_scores_of_a_model_with_more_outputs(tmp_path):
    module = tf.Module()
    module.predict_raw = tf.function(
        lambda price: {"score": price * 4, "ctr": price, "interest": price * 2, "other": price},
        input_signature=[tf.TensorSpec([None], tf.float32, "price")],
    )
    tf.saved_model.save(module, str(tmp_path), signatures={"predict_raw": module.predict_raw})
    with SavedModelScorer(tmp_path) as scorer:
        scores = scorer.score({"price": [0.125, 0.25]})
        assert list(scores) == ["ctr", "interest", "score"]
        np.testing.assert_array_equal(scores["score"], [0.5, 1])
        assert list(scorer.score({"price": []})) == ["ctr", "interest", "score"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"rows_per_request": 0}, ValueError, "rows_per_request must be above 0, found 0"),
        ({"rows_per_request": 2.5}, TypeError, "rows_per_request: found 2.5, expected an int"),
        ({"rows_per_request": True}, TypeError, "rows_per_request: found True, expected an int"),
        ({"signature": b"predict"}, TypeError, "signature: found b'predict', expected a str"),
    ],
)
def test_arguments_out_of_range_and_of_other_types(arguments, kind, message, model_folder):
    with pytest.raises(kind, match=f"^{message}"):
        SavedModelScorer(model_folder, **arguments)


def test_several_threads(scorer):
    found = [None] * 8

    def score(thread):
        rows = {"brand": ["acme"] * 50, "item": [thread] * 50, "price": [0.5] * 50}
        found[thread] = [scorer.score(rows)["ctr"] for _ in range(20)]

    threads = [threading.Thread(target=score, args=[thread]) for thread in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread, scores in enumerate(found):
        wanted = serving_model.expected("acme", thread, 0.5, 0.0)["ctr"]
        np.testing.assert_allclose(scores, wanted, rtol=1e-6)


def test_once_closed_it_is_refused(model_folder):
    with SavedModelScorer(model_folder) as scorer:
        scorer.score(RAW)
    scorer.close()
    with pytest.raises(UsageError, match="closed"):
        scorer.score(RAW)
    with pytest.raises(UsageError, match="closed"), scorer:
        pass


def test_what_runs_when_it_is_closed_ends_with_an_error(model_folder, monkeypatch):
    scorer = SavedModelScorer(model_folder)
    predict = scorer._saved_model.predict

    def closed_meanwhile(*arguments):
        scorer.close()
        return predict(*arguments)

    monkeypatch.setattr(scorer._saved_model, "predict", closed_meanwhile)
    with pytest.raises(UsageError, match="closed"):
        scorer.score(RAW)


def test_without_tensorflow_it_says_what_to_install(model_folder):
    code = f"""
import sys
sys.modules["tensorflow"] = None
import pwiser_serving
try:
    pwiser_serving.SavedModelScorer({str(model_folder)!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(": pip install 'pwiser-serving[server]'\n")
    assert done.stdout.count("\n") == 1
