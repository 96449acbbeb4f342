"""All commands as a user gives them, from a CSV file to scores over gRPC."""

import csv
import json
import pathlib
import re
import subprocess
import sys

import grpc
import numpy as np
import pytest
import tensorflow as tf

pytestmark = pytest.mark.slow

SMALL = (
    *("--model=mmoe", "--experts=2", "--embedding_dim=4", "--bottom_units=8", "--tower_units=8"),
    *("--batch_size=128", "--epochs=2"),
)
# An independent client: TF Serving's own stubs, in a process without ours.
STUBS = """
import sys
import grpc, numpy as np, tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
inputs = np.load(sys.argv[2], allow_pickle=True).item()
with grpc.insecure_channel(sys.argv[1]) as channel:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "chain"
    request.model_spec.signature_name = "predict_raw"
    for name, values in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values))
    answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, 30)
np.save(sys.argv[3], {k: tf.make_ndarray(v) for k, v in answer.outputs.items()})
"""


def _run(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A CSV with string categories, missing values, extra columns and an odd header."""
    path = tmp_path_factory.mktemp("chain") / "log.csv"
    random = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["bought", "price (€)", "note", "city", "clicked", "shop id", "session"])
        for row in range(3000):
            city = random.choice(["Köln", "a,b", 'say "hi"', ""])
            shop, price = int(random.integers(0, 9)), random.gamma(2, 20)
            clicked = random.random() < 0.05 + 0.03 * shop
            bought = clicked and price < 30 and random.random() < 0.8
            price = "" if random.random() < 0.1 else f"{price:.2f}"
            shop = "" if random.random() < 0.1 else shop
            writer.writerow([int(bought), price, "x", city, int(clicked), shop, f"s{row // 5}"])
    return path


@pytest.fixture(scope="module")
def chain(log):
    """The folder in which all commands up to the export have run."""
    folder = log.parent
    _run(
        *("pwiser_tf.convert", "--format=columns", f"--train={log}"),
        *(f"--output_dir={folder / 'data'}", "--categorical=city,shop id"),
        *("--numerical=price (€)", "--click=clicked", "--conversion=bought", "--group=session"),
    )
    _run(
        *("pwiser_tf.train", f"--data_dir={folder / 'data'}", f"--workdir={folder / 'run'}"),
        *(f"--export_dir={folder / 'models'}", "--model_name=chain", *SMALL),
    )
    return folder


@pytest.fixture(scope="module")
def address(chain):
    """Where the local server serves the exported model."""
    command = [sys.executable, "-m", "pwiser_serving.server", "--port=0", "--model_name=chain"]
    server = subprocess.Popen(
        [*command, f"--model_base_path={chain / 'models' / 'chain'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ready = None
    while ready is None and (line := server.stdout.readline()):
        ready = re.search(r"serving chain version 1 on 0\.0\.0\.0:(\d+)", line)
    assert ready
    yield f"localhost:{ready[1]}"
    server.terminate()
    assert server.wait(30) == 0


def _raw(log):
    """The log's features as predict_raw takes them."""
    with log.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:50]
    return {
        "city": np.array([row["city"].encode() for row in rows], object),
        "shop id": np.array([int(row["shop id"] or -(2**63)) for row in rows]),
        "price (€)": np.array([float(row["price (€)"] or "nan") for row in rows], np.float32),
    }


def test_training_learnt_something_and_reported_it(chain):
    metrics = json.loads((chain / "run" / "metrics.json").read_text())
    assert metrics["test"]["ctr"]["auc"] > 0.55
    assert metrics["test"]["ctr"]["gauc_groups"] > 0


def test_client_scores_the_csv_over_grpc(chain, address, log):
    output = chain / "scores.csv"
    _run(
        *("pwiser_serving.client", "score", f"--server={address}", "--model=chain"),
        *(f"--input={log}", f"--output={output}", "--keep=session"),
    )
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["session", "ctr", "cvr", "ctcvr"]
    assert [row["session"] for row in rows] == [f"s{row // 5}" for row in range(3000)]
    ctr, cvr, ctcvr = (np.array([float(r[n]) for r in rows]) for n in ("ctr", "cvr", "ctcvr"))
    assert (ctcvr <= ctr).all()
    np.testing.assert_allclose(ctcvr, ctr * cvr, atol=2e-6)
    assert len(np.unique(ctr)) > 100


def test_tf_servings_own_stubs_get_what_a_session_gives(chain, address, log):
    inputs = _raw(log)
    np.save(chain / "inputs.npy", np.array(inputs, object), allow_pickle=True)
    files = [str(chain / "inputs.npy"), str(chain / "outputs.npy")]
    subprocess.run([sys.executable, "-c", STUBS, address, *files], check=True, capture_output=True)
    found = np.load(chain / "outputs.npy", allow_pickle=True).item()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        path = str(chain / "models" / "chain" / "1")
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], path)
        signature = loaded.signature_def["predict_raw"]
        feed = {signature.inputs[name].name: value for name, value in inputs.items()}
        fetch = {name: value.name for name, value in signature.outputs.items()}
        expected = session.run(fetch, feed)
    assert set(found) == {"ctr", "cvr", "ctcvr"}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def _examples(raw):
    """Features of `_raw` as serialized Examples."""
    examples = []
    for row in zip(*raw.values(), strict=True):
        example = tf.train.Example()
        for name, value in zip(raw, row, strict=True):
            feature = example.features.feature[name]
            lists = {bytes: feature.bytes_list, np.int64: feature.int64_list}
            lists.get(type(value), feature.float_list).value.append(value)
        examples.append(example.SerializeToString())
    return examples


def test_scorer_gives_what_the_keras_model_gives(chain, address, log):
    """For raw features, ids and Examples of one model that is trained, exported and served."""
    import pwiser_serving

    from pwiser_tf import runs

    raw = _raw(log)
    model, _, schema = runs.load_run(chain / "run")
    texts = np.array([value.decode() for value in raw["city"]], object)
    ids = [schema.categorical[0].ids(texts), schema.categorical[1].ids(raw["shop id"])]
    numerical = schema.numerical[0].apply(raw["price (€)"])[:, None]
    features = {"categorical": np.stack(ids, axis=1), "numerical": numerical}
    wanted = model({name: tf.constant(values) for name, values in features.items()})
    with pwiser_serving.Scorer(address, "chain") as scorer:
        for asked in ({**raw, "city": texts}, features, {"examples": _examples(raw)}):
            found = scorer.score(asked)
            for name in ("ctr", "cvr", "ctcvr"):
                np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, err_msg=name)


def test_an_unknown_model_is_reported(address):
    import pwiser_serving

    with (
        pwiser_serving.Scorer(address, "other") as scorer,
        pytest.raises(pwiser_serving.ScoringError, match="other") as raised,
    ):
        scorer.score({"city": ["x"]})
    assert raised.value.code == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("path", sorted(pathlib.Path("configs").glob("*.flags")), ids=str)
def test_the_configs_parse_and_name_flags_that_exist(path, command):
    result = command("train", f"--flagfile={path}", "--data_dir=/no", "--workdir=/no")
    assert result.returncode == 2
    assert result.stderr.startswith("error: /no/schema.json")
