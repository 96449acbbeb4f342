"""server: TF Serving's answers, asked by tensorflow-serving-api's own stubs.

Codes, messages and the order of checks are those of tensorflow/serving; set TFS_ADDRESS to the
address of a real server that serves the model of serving_model.save(folder, 0.0) as model m,
version 7, to hold it to the same tests.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import serving_model

pytest.importorskip("tensorflow_serving.apis.prediction_service_pb2_grpc")

import tensorflow as tf
import trustme
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pwiser_serving.server import __main__ as command
from pwiser_serving.server import config_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
ROWS = [("acme", 3, 0.5), ("zorg", 99, -2.0), ("", -(2**63), float("nan")), ("new", 0, 1e30)]
WANTED = {
    name: [serving_model.expected(*row, bias=0.0)[name] for row in ROWS]
    for name in ("ctr", "cvr", "ctcvr")
}
SECONDS = 20


class Caller:
    """Both services, over one channel."""

    def __init__(self, address: str):
        self.channel = grpc.insecure_channel(address)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self._model = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def predict(self, request):
        return self._prediction.Predict(request, timeout=SECONDS)

    def metadata(self, request):
        return self._prediction.GetModelMetadata(request, timeout=SECONDS)

    def status(self, request):
        return self._model.GetModelStatus(request, timeout=SECONDS)


@pytest.fixture(scope="module")
def caller(request):
    address = os.environ.get("TFS_ADDRESS") or request.getfixturevalue("server").address
    caller = Caller(address)
    yield caller
    caller.channel.close()


def raw_request(rows=ROWS, **tensors):
    """A Predict request for predict_raw; keywords replace or, with None, remove an input."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    request.model_spec.signature_name = "predict_raw"
    brands, items, prices = zip(*rows, strict=True) if rows else ((), (), ())
    inputs = {
        "brand": tf.make_tensor_proto(list(brands), tf.string, [len(rows)]),
        "item": tf.make_tensor_proto(list(items), tf.int64, [len(rows)]),
        "price": tf.make_tensor_proto(list(prices), tf.float32, [len(rows)]),
    }
    for name, tensor in (inputs | tensors).items():
        if tensor is not None:
            request.inputs[name].CopyFrom(tensor)
    return request


def id_request():
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    request.model_spec.signature_name = "predict"
    brands = [serving_model.BRANDS.get(brand, 0) for brand, _, _ in ROWS]
    categorical = np.array([brands, [item for _, item, _ in ROWS]], np.int64).T
    numerical = np.array([[price] for _, _, price in ROWS], np.float32)
    request.inputs["categorical"].CopyFrom(tf.make_tensor_proto(categorical))
    request.inputs["numerical"].CopyFrom(tf.make_tensor_proto(numerical))
    return request


def example_request(examples=None):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    if examples is None:
        examples = [_example(*row) for row in ROWS]
    request.inputs["examples"].CopyFrom(tf.make_tensor_proto(examples, tf.string))
    return request


def _example(brand, item, price):
    values = {
        "brand": tf.train.Feature(bytes_list=tf.train.BytesList(value=[brand.encode()])),
        "item": tf.train.Feature(int64_list=tf.train.Int64List(value=[item])),
        "price": tf.train.Feature(float_list=tf.train.FloatList(value=[price])),
    }
    return tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString()


def refused(call, request):
    """The code and message of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value.code(), caught.value.details()


def scores(response):
    return {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}


def test_each_signature_answers_what_arithmetic_says(caller):
    for request in (raw_request(), id_request(), example_request()):
        found = scores(caller.predict(request))
        assert sorted(found) == ["ctcvr", "ctr", "cvr"]
        for name, values in found.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, WANTED[name], rtol=1e-6)


def test_answers_are_those_of_a_session_over_the_saved_model(caller, models):
    random = np.random.default_rng(0)
    brands = random.choice(["acme", "zorg", "x", ""], 500)
    rows = [(str(b), int(random.integers(-5, 15)), float(random.normal())) for b in brands]
    found = scores(caller.predict(raw_request(rows)))
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(models[0.0]))
        signature = loaded.signature_def["predict_raw"]
        feeds = dict(
            zip(("brand", "item", "price"), map(list, zip(*rows, strict=True)), strict=True)
        )
        theirs = session.run(
            {name: info.name for name, info in signature.outputs.items()},
            {signature.inputs[name].name: values for name, values in feeds.items()},
        )
    for name, values in theirs.items():
        np.testing.assert_array_equal(found[name], values)


def test_the_answer_names_what_answered(caller):
    spec = caller.predict(raw_request()).model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("m", 7, "predict_raw")
    # A request without a signature is told which one it got.
    assert caller.predict(example_request()).model_spec.signature_name == "serving_default"


def test_numbers_are_answered_one_by_one_unless_told_otherwise(caller):
    tensor = caller.predict(raw_request()).outputs["ctr"]
    assert len(tensor.float_val) == len(ROWS)
    assert not tensor.tensor_content


def test_a_version_may_be_named(caller):
    request = raw_request()
    request.model_spec.version.value = 7
    assert caller.predict(request).model_spec.version.value == 7


def test_an_empty_batch_is_answered_with_nothing(caller):
    found = scores(caller.predict(raw_request(rows=[])))
    assert {name: values.shape for name, values in found.items()} == {
        "ctr": (0,),
        "cvr": (0,),
        "ctcvr": (0,),
    }


def test_output_filter_chooses(caller):
    request = raw_request()
    request.output_filter.extend(["ctcvr", "ctr"])
    found = scores(caller.predict(request))
    assert sorted(found) == ["ctcvr", "ctr"]
    np.testing.assert_allclose(found["ctcvr"], WANTED["ctcvr"], rtol=1e-6)


def test_one_value_stands_for_all_rows(caller):
    price = tf.make_tensor_proto(0.5, tf.float32, [4])
    assert len(price.float_val) == 1
    found = scores(caller.predict(raw_request(price=price)))
    wanted = [serving_model.expected(b, i, 0.5, bias=0.0)["ctr"] for b, i, _ in ROWS]
    np.testing.assert_allclose(found["ctr"], wanted, rtol=1e-6)


def _named(name="m", version=None, label=None, signature="predict_raw"):
    request = raw_request()
    request.model_spec.Clear()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    if version is not None:
        request.model_spec.version.value = version
    if label is not None:
        request.model_spec.version_label = label
    return request


def _filtered(*names):
    request = raw_request()
    request.output_filter.extend(names)
    return request


def _without_spec():
    request = raw_request()
    request.ClearField("model_spec")
    return request


BAD_PRICE = tf.make_tensor_proto([1.0])
BAD_PRICE.tensor_content, BAD_PRICE.tensor_shape.dim[0].size = b"123", 1

REFUSALS = [
    (_without_spec(), INVALID, "Missing ModelSpec"),
    (_named(""), INVALID, "ModelSpec has no name specified."),
    (_named("other"), NOT_FOUND, "Servable not found for request: Latest(other)"),
    (_named(version=99), NOT_FOUND, "Servable not found for request: Specific(m, 99)"),
    (_named("n", version=0), NOT_FOUND, "Servable not found for request: Specific(n, 0)"),
    (_named(label="stable"), INVALID, "Unrecognized servable version label: stable"),
    (_named(signature="x"), PRECONDITION, 'Serving signature key "x" not found.'),
    (
        raw_request(price=None),
        INVALID,
        "input size does not match signature: 2!=3 len({brand,item}) != len({brand,item,price}). "
        "Sent extra: {}. Missing but required: {price}.",
    ),
    (
        raw_request(more=tf.make_tensor_proto([1.0])),
        INVALID,
        "input size does not match signature: 4!=3 len({brand,item,more,price}) != "
        "len({brand,item,price}). Sent extra: {more}. Missing but required: {}.",
    ),
    (
        raw_request(price=None, cost=tf.make_tensor_proto([1.0])),
        INVALID,
        "Signature input alias: price(feed name: predict_raw_price:0) not found in request and no "
        "default value provided. Inputs expected to be in the request {brand,cost,item}, or "
        "default input alias set: ",
    ),
    (raw_request(price=BAD_PRICE), INVALID, "tensor parsing error: price"),
    (
        raw_request(item=tf.make_tensor_proto([1, 2, 3, 4], tf.int32)),
        INVALID,
        "Expects arg[1] to be int64 but int32 is provided",
    ),
    (
        raw_request(brand=tf.make_tensor_proto([1.0] * 4, tf.float32)),
        INVALID,
        "Expects arg[0] to be string but float is provided",
    ),
    (
        _filtered("ctr", "x"),
        INVALID,
        "output tensor alias not found in signature: x Outputs expected to be in the set "
        "{ctcvr,ctr,cvr}.",
    ),
    (_filtered("ctr", "ctr"), INVALID, "duplicate output tensor alias: ctr"),
]


@pytest.mark.parametrize(("request_", "code", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_predict_refuses_as_tf_serving_does(caller, request_, code, message):
    assert refused(caller.predict, request_) == (code, message)


def test_the_order_of_checks(caller):
    """A request with every fault is told of the first; each is mended in turn."""
    request = _named("other", version=99, signature="x")
    request.inputs["more"].CopyFrom(BAD_PRICE)
    request.inputs["price"].CopyFrom(BAD_PRICE)
    request.output_filter.append("x")
    told = [refused(caller.predict, request)[1]]
    request.model_spec.name = "m"
    told.append(refused(caller.predict, request)[1])
    request.model_spec.version.value = 7
    told.append(refused(caller.predict, request)[1])
    request.model_spec.signature_name = "predict_raw"
    told.append(refused(caller.predict, request)[1])
    del request.inputs["more"]
    told.append(refused(caller.predict, request)[1])
    request.inputs["price"].CopyFrom(tf.make_tensor_proto([1.0], tf.float64))
    told.append(refused(caller.predict, request)[1])
    request.output_filter[:] = ["ctr"]
    told.append(refused(caller.predict, request)[1])
    assert [text.split(":")[0] for text in told] == [
        "Servable not found for request",
        "Servable not found for request",
        'Serving signature key "x" not found.',
        "input size does not match signature",
        "tensor parsing error",
        "output tensor alias not found in signature",
        "Expects arg[2] to be float but double is provided",
    ]
    assert told[1].endswith("Specific(m, 99)")


def test_the_ops_own_messages_come_through(caller):
    code, message = refused(caller.predict, raw_request(price=tf.make_tensor_proto([1.0, 2.0])))
    assert code is INVALID
    assert "Incompatible shapes: [2] vs. [4]" in message
    wide = id_request()
    wide.inputs["numerical"].CopyFrom(tf.make_tensor_proto(np.zeros((4, 0), np.float32)))
    code, message = refused(caller.predict, wide)
    assert code is INVALID
    assert "slice index 0 of dimension 1 out of bounds" in message


def test_malformed_examples(caller):
    wrong_type = tf.train.Example(
        features=tf.train.Features(
            feature={"item": tf.train.Feature(float_list=tf.train.FloatList(value=[1]))}
        )
    )
    code, message = refused(caller.predict, example_request([wrong_type.SerializeToString()]))
    assert code is INVALID
    assert message.startswith("Name: <unknown>, Key: item, Index: 0.  Data types don't match.")
    code, message = refused(caller.predict, example_request([b"\xff\xff"]))
    assert code is INVALID
    assert "Could not parse example input" in message


def test_long_messages_are_cut(caller):
    code, message = refused(caller.predict, _filtered("x" * 3000))
    assert code is INVALID
    assert (
        message
        == ("output tensor alias not found in signature: " + "x" * 3000)[:1024] + "...TRUNCATED"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"dims": [-1]},
        {"dims": [2**62, 2**62]},
        {"dims": [2**40]},
        {"dims": [2**62, 2**62, 0]},
        {"dims": [1] * 300},
        {"dims": [4], "dtype": 14},
        {"dims": [4], "dtype": 20},
        {"dims": [4], "dtype": 999},
        {"dims": [4], "dtype": 0},
        {"dims": [2**31], "content": b"1234"},
        {"dims": [2**31], "content": b"1234", "dtype": 7},
    ],
    ids=str,
)
def test_impossible_tensors_are_refused_and_the_server_lives(caller, change):
    tensor = tf.make_tensor_proto([1.0])
    tensor.ClearField("float_val")
    del tensor.tensor_shape.dim[:]
    for size in change["dims"]:
        tensor.tensor_shape.dim.add(size=size)
    tensor.dtype = change.get("dtype", 1)
    tensor.tensor_content = change.get("content", b"")
    assert refused(caller.predict, raw_request(price=tensor))[0] is INVALID
    assert caller.predict(raw_request()).model_spec.version.value == 7


def test_bytes_that_are_no_request_are_refused(caller):
    for path in ("PredictionService/Predict", "ModelService/GetModelStatus"):
        call = caller.channel.unary_unary(f"/tensorflow.serving.{path}")
        # Truncated, and a model name that is not UTF-8.
        for data in (b"\x0a\xff", b"\x0a\x03\x0a\x01\xff"):
            with pytest.raises(grpc.RpcError) as caught:
                call(data, timeout=SECONDS)
            assert caught.value.code() in (INVALID, grpc.StatusCode.INTERNAL)
            if "TFS_ADDRESS" not in os.environ:
                assert "the request's bytes are not a" in caught.value.details()


def test_methods_that_are_not_served_say_so(caller):
    call = caller.channel.unary_unary("/tensorflow.serving.PredictionService/Guess")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def _metadata_request(*fields, name="m", version=None):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    return request


def test_metadata_is_the_models_own(caller, models):
    response = caller.metadata(_metadata_request("signature_def"))
    assert (response.model_spec.name, response.model_spec.version.value) == ("m", 7)
    found = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(found)
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString(
        (models[0.0] / "saved_model.pb").read_bytes()
    ).meta_graphs[0]
    assert sorted(found.signature_def) == sorted(saved.signature_def)
    for name, signature in saved.signature_def.items():
        assert found.signature_def[name] == signature


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (
            get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["x"]),
            INVALID,
            "Missing ModelSpec",
        ),
        (
            _metadata_request(name="other"),
            INVALID,
            "GetModelMetadataRequest must specify at least one metadata_field",
        ),
        (
            _metadata_request("signature_def", "x", name="other"),
            INVALID,
            "Metadata field x is not supported",
        ),
        (
            _metadata_request("signature_def", name="other"),
            NOT_FOUND,
            "Servable not found for request: Latest(other)",
        ),
        (
            _metadata_request("signature_def", version=2),
            NOT_FOUND,
            "Servable not found for request: Specific(m, 2)",
        ),
        (_metadata_request("signature_def", name=""), INVALID, "ModelSpec has no name specified."),
    ],
)
def test_metadata_refuses_as_tf_serving_does(caller, request_, code, message):
    assert refused(caller.metadata, request_) == (code, message)


def _status_request(name="m", version=None):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    return request


def test_status(caller):
    AVAILABLE = get_model_status_pb2.ModelVersionStatus.AVAILABLE
    for version in (None, 7):
        entries = caller.status(_status_request(version=version)).model_version_status
        assert [(entry.version, entry.state) for entry in entries] == [(7, AVAILABLE)]
        assert entries[0].status.error_code == 0
    assert refused(caller.status, get_model_status_pb2.GetModelStatusRequest()) == (
        INVALID,
        "Missing ModelSpec",
    )
    assert refused(caller.status, _status_request("x")) == (
        NOT_FOUND,
        "Could not find any versions of model x",
    )
    assert refused(caller.status, _status_request(version=99)) == (
        NOT_FOUND,
        "Could not find version 99 of model m",
    )


def _warm_up(folder: pathlib.Path, *requests) -> None:
    (folder / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(folder / "assets.extra/tf_serving_warmup_requests")) as writer:
        for request in requests:
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.CopyFrom(request)
            writer.write(log.SerializeToString())


def test_versions_come_go_and_break_while_serving(models, start_server, tmp_path):
    """One server through its life: no version yet, first, newer, broken, mended, rolled back."""
    base_path = tmp_path / "base"
    base_path.mkdir()
    wanted = {b: serving_model.expected(*ROWS[0], bias=b)["ctr"] for b in (0.0, 1.0)}
    with start_server(base_path, "--enable_serialization_as_tensor_content", wait=False) as server:
        server.wait_for_log("holds no version that loads yet; waiting")
        shutil.copytree(models[0.0], tmp_path / "aside")
        _warm_up(tmp_path / "aside", raw_request(), id_request())
        (tmp_path / "aside").rename(base_path / "1")
        server.wait_until_ready()
        assert server.version == 1
        caller = Caller(server.address)

        def answer():
            response = caller.predict(raw_request())
            assert response.outputs["ctr"].tensor_content
            return response.model_spec.version.value, scores(response)["ctr"][0]

        assert answer() == (1, pytest.approx(wanted[0.0], rel=1e-6))

        # Requests run all the while; none may fail, and versions only ever go up.
        seen, stop = [], threading.Event()

        def ask():
            while not stop.is_set():
                seen.append(answer())

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        os.symlink(models[1.0], base_path / "00002")
        server.wait_for_log("m version 1 is closed")
        time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join()
        assert answer() == (2, pytest.approx(wanted[1.0], rel=1e-6))
        assert {version for version, _ in seen} == {1, 2}
        for version, ctr in seen:
            assert ctr == pytest.approx(wanted[version - 1.0], rel=1e-6)

        # Broken in three ways: no model, a model cut short, warm-up requests that fail.
        (base_path / "3").mkdir()
        server.wait_for_log("m version 3 does not load")
        (tmp_path / "cut").mkdir()
        data = (models[0.0] / "saved_model.pb").read_bytes()
        (tmp_path / "cut/saved_model.pb").write_bytes(data[: len(data) // 2])
        (tmp_path / "cut").rename(base_path / "4")
        server.wait_for_log("m version 4 does not load")
        shutil.copytree(models[0.0], tmp_path / "cold")
        _warm_up(tmp_path / "cold", raw_request(price=None))
        (tmp_path / "cold").rename(base_path / "5")
        server.wait_for_log("m version 5 does not load: input size does not match signature")
        assert answer()[0] == 2
        State = get_model_status_pb2.ModelVersionStatus
        states = caller.status(_status_request()).model_version_status
        assert [(entry.version, entry.state) for entry in states] == [
            (5, State.END),
            (4, State.END),
            (3, State.END),
            (2, State.AVAILABLE),
            (1, State.END),
        ]
        assert [entry.status.error_code != 0 for entry in states] == [True] * 3 + [False] * 2

        # Mended in place: its files have changed, so it is tried again.
        shutil.rmtree(base_path / "5" / "assets.extra")
        server.wait_for_log("m version 5 is served now")
        assert answer() == (5, pytest.approx(wanted[0.0], rel=1e-6))
        # Rolled back by removing it.
        (base_path / "5").rename(tmp_path / "removed")
        server.wait_for_log("m version 5 is closed")
        assert answer()[0] == 2
        # A folder that disappears leaves what is in memory.
        base_path.rename(tmp_path / "gone")
        server.wait_for_log("No such file or directory")
        assert answer()[0] == 2
        caller.channel.close()
        assert server.stop() == 0
        assert "Traceback" not in server.log


def _run(*flags, seconds=60):
    return subprocess.run(
        [sys.executable, "-m", "pwiser_serving.server", *flags],
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def test_a_wrong_flag_is_one_line(tmp_path):
    for flags, told in (
        ([], "expected --model_base_path or --model_config_file"),
        (["--model_base_path", str(tmp_path / "none")], "is not a folder"),
        (["--model_base_path", str(tmp_path), "--port=70000"], "found 70000, expected 0 to 65535"),
        (["--model_base_path", str(tmp_path), "--port=x"], "invalid int value: 'x'"),
        (["--model_base_path", str(tmp_path), "--prot=1"], "--prot=1"),
    ):
        done = _run(*flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _run("--model_base_path", str(tmp_path), f"--port={port}")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: --port: {port} is in use, or may not be used"]
    assert "Traceback" not in done.stderr


SLOW_SERVER = """
import sys, time, types
import numpy as np
from pwiser_serving.server import __main__ as server

class Slow:
    signatures = {}
    def __init__(self, folder, monitoring, warm_up): pass
    def close(self): print("closed", flush=True)
    def predict(self, name, inputs, output_filter):
        if name == "fault":
            raise KeyError("a fault\\nin two lines")
        print("running", flush=True)
        time.sleep({"short": 0.5, "long": 600}[name])
        print("answered", flush=True)
        return {"ctr": np.zeros(1, np.float32)}

sys.modules["pwiser_serving.server.saved_model"] = types.SimpleNamespace(
    SavedModel=Slow, DEFAULT_SIGNATURE="serving_default")
import pwiser_serving.server.quiet
from pwiser_serving.server import service
service._MAX_REQUESTS = 2
server.main(sys.argv[1:])
"""


@contextlib.contextmanager
def _slow_server(base_path, *flags):
    """A server of a model that takes its time, and a function that asks it."""
    (base_path / "1").mkdir()
    flags = ["--port=0", "--model_name=m", "--model_base_path", str(base_path), *flags]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores it, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            port = process.stdout.readline().rsplit(":", 1)[1].strip()
            with grpc.insecure_channel(f"localhost:{port}") as channel:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
                yield (
                    process,
                    lambda name: stub.Predict.future(_named(signature=name), timeout=SECONDS),
                )
        finally:
            process.kill()


def test_faults_floods_and_the_end(tmp_path):
    with _slow_server(tmp_path, "--grpc_max_threads=1") as (process, ask):
        fault = ask("fault").exception()
        assert fault.code() is grpc.StatusCode.INTERNAL
        assert fault.details() == "KeyError: 'a fault\\nin two lines'"
        # One runs, one waits for its thread, one is too many.
        first = ask("short")
        assert process.stdout.readline() == "running\n"
        second, third = ask("short"), ask("short")
        answers = sorted(str(call.code()) for call in (second, third))
        assert answers == ["StatusCode.OK", "StatusCode.RESOURCE_EXHAUSTED"]
        assert first.code() is grpc.StatusCode.OK
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines == ["answered\n", "running\n", "answered\n"]
        # Whose caller has gone before its turn is not run.
        first = ask("short")
        assert process.stdout.readline() == "running\n"
        gone = ask("short")
        time.sleep(0.1)
        gone.cancel()
        assert first.code() is grpc.StatusCode.OK
        assert process.stdout.readline() == "answered\n"
        # What runs when it is told to end is answered.
        last = ask("short")
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        assert list(last.result().outputs) == ["ctr"]
        out, log = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "answered\nclosed\n")
    records = [json.loads(line) for line in log.splitlines()]
    assert [record["event"] for record in records] == ["served", "fault", "stopping", "closed"]
    assert [record["level"] for record in records] == ["INFO", "ERROR", "INFO", "INFO"]
    assert (records[0]["model"], records[0]["version"]) == ("m", 1)
    assert records[1]["method"] == "Predict"
    assert records[1]["traceback"].startswith("Traceback")
    assert "KeyError" in records[1]["traceback"]


def test_a_second_signal_ends_it_at_once(tmp_path):
    with _slow_server(tmp_path) as (process, ask):
        call = ask("long")
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        assert '"event": "served"' in process.stderr.readline()
        assert '"event": "stopping"' in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def _model_config(**base_paths: str) -> model_server_config_pb2.ModelServerConfig:
    """Models by their names, all of whose versions are served."""
    config = model_server_config_pb2.ModelServerConfig()
    config.model_config_list.SetInParent()
    for name, base_path in base_paths.items():
        entry = config.model_config_list.config.add(
            name=name, base_path=str(base_path), model_platform="tensorflow"
        )
        entry.model_version_policy.all.SetInParent()
    return config


def test_models_labels_reloads_and_health(models, start_server, tmp_path):
    """One server of a configuration file, to the end."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    os.symlink(models[0.0], tmp_path / "a/1")
    os.symlink(models[1.0], tmp_path / "a/2")
    os.symlink(models[1.0], tmp_path / "b/1")
    config = _model_config(a=tmp_path / "a", b=tmp_path / "b")
    config.model_config_list.config[0].version_labels["stable"] = 1
    file = tmp_path / "models.config"
    file.write_text(text_format.MessageToString(config))
    flags = [f"--model_config_file={file}", "--model_config_file_poll_wait_seconds=0.1"]
    done = _run(*flags, "--port=0")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --model_config_file: Request to assign label to version 1 of model a, which is "
        "not currently available for inference\n",
    )
    flags += ["--allow_version_labels_for_unavailable_models", "--enable_grpc_healthcheck_service"]
    with start_server(None, *flags) as server:
        assert server.line.startswith("pwiser_serving: serving a version 2, b version 1 on ")
        caller = Caller(server.address)
        wanted = {b: serving_model.expected(*ROWS[0], bias=b)["ctr"] for b in (0.0, 1.0)}

        def answer(name, version=None, label=None):
            response = caller.predict(_named(name, version, label))
            return response.model_spec.version.value, scores(response)["ctr"][0]

        assert answer("a") == (2, pytest.approx(wanted[1.0], rel=1e-6))
        assert answer("a", label="stable") == (1, pytest.approx(wanted[0.0], rel=1e-6))
        assert answer("a", version=1)[0] == 1
        assert answer("b") == (1, pytest.approx(wanted[1.0], rel=1e-6))
        both = caller.status(_status_request("a")).model_version_status
        assert [status.version for status in both] == [2, 1]

        # The label moves by request; the file has not changed, so that it comes back by itself.
        manage = model_service_pb2_grpc.ModelServiceStub(caller.channel)
        request = model_management_pb2.ReloadConfigRequest(config=config)
        request.config.model_config_list.config[0].version_labels["stable"] = 2
        response = manage.HandleReloadConfigRequest(request, timeout=SECONDS)
        assert (response.HasField("status"), response.status.error_code) == (True, 0)
        while answer("a", label="stable")[0] == 2:
            time.sleep(0.02)
        request.config.model_config_list.config[0].version_labels["stable"] = 3
        assert refused(manage.HandleReloadConfigRequest, request) == (
            PRECONDITION,
            "Request to assign label to version 3 of model a, which is not currently available "
            "for inference",
        )
        # A file that is wrong changes nothing, and is told once; one that is right does.
        file.write_text("model_config_list { config { nome: 'a' } }")
        server.wait_for_log("has no field named")
        assert answer("b")[0] == 1
        time.sleep(0.3)
        assert server.log.count("has no field named") == 1
        file.write_text(text_format.MessageToString(_model_config(b=tmp_path / "b")))
        server.wait_for_log("a version 2 is closed")
        assert refused(caller.predict, _named("a"))[0] is NOT_FOUND

        # Health, by every name that TF Serving gives it, and watched until the end.
        health = health_pb2_grpc.HealthStub(caller.channel)
        SERVING = health_pb2.HealthCheckResponse.SERVING
        for name in ("", "ModelService", "PredictionService"):
            asked = health_pb2.HealthCheckRequest(service=name)
            assert health.Check(asked, timeout=SECONDS).status == SERVING
        asked = health_pb2.HealthCheckRequest(service="x")
        assert refused(health.Check, asked)[0] is NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(watch).status == SERVING
        server.process.send_signal(signal.SIGTERM)
        # A watcher is told, and does not keep the server from ending.
        assert [update.status for update in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        assert server.process.wait(SECONDS) == 0
        caller.channel.close()
        assert [record["level"] for record in map(json.loads, server.log.splitlines())].count(
            "ERROR"
        ) == 2


def _pem(*blobs) -> bytes:
    return b"".join(blob.bytes() for blob in blobs)


def test_only_a_client_with_the_right_certificate_gets_anything(models, start_server, tmp_path):
    ours, theirs = trustme.CA(), trustme.CA()
    issued = ours.issue_cert("localhost")
    config = config_pb2.SSLConfig(
        server_key=_pem(issued.private_key_pem),
        server_cert=_pem(*issued.cert_chain_pems),
        custom_ca=_pem(ours.cert_pem),
        client_verify=True,
    )
    file = tmp_path / "ssl.config"
    file.write_text(text_format.MessageToString(config))
    base_path = tmp_path / "base"
    base_path.mkdir()
    os.symlink(models[0.0], base_path / "1")

    def answer(credentials=None):
        """The code of one call, with the client's key and certificate where it has one."""
        channel = (
            grpc.secure_channel(server.address, credentials)
            if credentials
            else grpc.insecure_channel(server.address)
        )
        with channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            return stub.Predict.future(raw_request(), timeout=SECONDS).code()

    def client(authority, certificate=None):
        pair = (None, None)
        if certificate:
            pair = _pem(certificate.private_key_pem), _pem(*certificate.cert_chain_pems)
        return grpc.ssl_channel_credentials(_pem(authority.cert_pem), *pair)

    good = client(ours, ours.issue_cert("client"))
    OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
    with start_server(base_path, f"--ssl_config_file={file}") as server:
        assert answer(good) is OK
        # None, another authority's, a server that is not trusted, and no TLS at all.
        assert answer(client(ours)) is UNAVAILABLE
        assert answer(client(ours, theirs.issue_cert("client"))) is UNAVAILABLE
        assert answer(client(theirs, ours.issue_cert("client"))) is UNAVAILABLE
        assert answer() is UNAVAILABLE
        assert answer(good) is OK
        assert server.stop() == 0
    # Without client_verify anybody is answered, over TLS. (And by a version whose warm-up fails.)
    config.client_verify = False
    file.write_text(text_format.MessageToString(config))
    (base_path / "1").unlink()
    shutil.copytree(models[0.0], base_path / "1")
    _warm_up(base_path / "1", raw_request(price=None))
    flags = [f"--ssl_config_file={file}", "--enable_model_warmup=false"]
    with start_server(base_path, *flags) as server:
        assert answer(client(ours)) is OK
        assert answer() is UNAVAILABLE


@pytest.fixture
def signals():
    """main takes the signals; here they are given back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_wrong_configuration_is_one_line(tmp_path, capsys):
    (tmp_path / "text").write_text("model_config_list { config { name: 'm' base_path: '/m' } }")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").touch()
    (tmp_path / "ssl").write_text("server_key: 'key' server_cert: 'certificate'")
    (tmp_path / "client").write_text("server_key: 'k' server_cert: 'c' client_verify: true")
    (tmp_path / "relative").write_text(
        "model_config_list { config { name: 'm' base_path: 'm' model_platform: 'tensorflow' } }"
    )
    (tmp_path / "away").write_text(
        "model_config_list { config { name: 'm' base_path: '/none' model_platform: 'tensorflow' } }"
    )
    models, ssl = "--model_config_file={}", "--ssl_config_file={}"
    for flag, name, told in (
        (models, "none", "No such file or directory"),
        (models, "bytes", "codec can't decode"),
        (models, "empty", "ServerModelConfig type not supported"),
        (models, "text", "Illegal setting neither"),
        (models, "relative", "to have an absolute path"),
        (models, "away", "model m: /none is not a folder"),
        (ssl, "none", "No such file or directory"),
        (ssl, "text", "has no field named"),
        (ssl, "client", "custom_ca is missing"),
        (ssl, "ssl", "not PEM texts that fit"),
    ):
        flags = [flag.format(tmp_path / name), "--port=0"]
        flags += [] if flag is models else ["--model_base_path", str(tmp_path)]
        with pytest.raises(SystemExit) as caught:
            command.main(flags)
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, ""), name
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, name
        assert told in lines[0]
        assert "Traceback" not in err
