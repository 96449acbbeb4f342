"""server: TF Serving's answers, asked by tensorflow-serving-api's own stubs.

Codes, messages and the order of checks are those of tensorflow/serving; set TFS_ADDRESS to the
address of a real server that serves the model of serving_model.save(folder, 0.0) as model m,
version 7, to hold it to the same tests.
"""

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
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

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
    def __init__(self, folder): pass
    def close(self): print("closed", flush=True)
    def predict(self, name, inputs, output_filter):
        print("running", flush=True)
        time.sleep(1)
        return {"ctr": np.zeros(1, np.float32)}

sys.modules["pwiser_serving.server.saved_model"] = types.SimpleNamespace(
    SavedModel=Slow, DEFAULT_SIGNATURE="serving_default")
server.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_that_runs_is_answered_before_the_server_ends(tmp_path, number):
    (tmp_path / "1").mkdir()
    flags = ["--port=0", "--model_name=m", "--model_base_path", str(tmp_path)]
    command = [sys.executable, "-c", SLOW_SERVER, *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            port = process.stdout.readline().rsplit(":", 1)[1].strip()
            channel = grpc.insecure_channel(f"localhost:{port}")
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            call = stub.Predict.future(raw_request(), timeout=SECONDS)
            assert process.stdout.readline() == "running\n"
            process.send_signal(number)
            assert list(call.result().outputs) == ["ctr"]
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    # Closed after the answer, and nothing else said.
    assert (process.returncode, out) == (0, "closed\n")
    assert "Traceback" not in err
    channel.close()
