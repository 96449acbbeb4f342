"""The contract: what TensorFlow Serving answers, asked of our server or of a real one.

Codes, messages and the order of checks are those of tensorflow/serving at 9d981c5. Our own server
is asked by default. To ask a real one, write the model of serving_model.py as version 7 of model m,
serve it, and name its address (and, for the tests that reload its configuration, the base path as
the server sees it):

    cd serving/tests
    python -c "import pathlib, serving_model; serving_model.save(pathlib.Path('/tmp/m/7'), 0.0)"
    docker run --rm -p 8500:8500 -v /tmp/m:/models/m -e MODEL_NAME=m tensorflow/serving
    TFS_ADDRESS=localhost:8500 TFS_BASE_PATH=/models/m python -m pytest test_serving_contract.py
"""

import os

import grpc
import numpy as np
import pytest
import serving_model
import tensorflow as tf
from calls import (
    INVALID,
    NOT_FOUND,
    PRECONDITION,
    ROWS,
    SECONDS,
    WANTED,
    Caller,
    example,
    example_request,
    id_request,
    named,
    raw_request,
    refused,
    scores,
    status_request,
)
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    regression_pb2,
)

AVAILABLE = get_model_status_pb2.ModelVersionStatus.AVAILABLE


@pytest.fixture(scope="module")
def caller(request):
    address = os.environ.get("TFS_ADDRESS") or request.getfixturevalue("server").address
    caller = Caller(address)
    yield caller
    caller.channel.close()


def test_each_signature_answers_what_arithmetic_says(caller):
    for request in (raw_request(), id_request(), example_request()):
        found = scores(caller.predict(request))
        assert sorted(found) == ["ctcvr", "ctr", "cvr"]
        for name, values in found.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, WANTED[name], rtol=1e-5)


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


def test_a_version_may_benamed(caller):
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
    np.testing.assert_allclose(found["ctcvr"], WANTED["ctcvr"], rtol=1e-5)


def test_one_value_stands_for_all_rows(caller):
    price = tf.make_tensor_proto(0.5, tf.float32, [4])
    assert len(price.float_val) == 1
    found = scores(caller.predict(raw_request(price=price)))
    wanted = [serving_model.expected(b, i, 0.5, bias=0.0)["ctr"] for b, i, _ in ROWS]
    np.testing.assert_allclose(found["ctr"], wanted, rtol=1e-5)


def _tensor(dtype: tf.DType, shape, content: bytes = b"", **values):
    tensor = tensor_pb2.TensorProto(dtype=dtype.as_datatype_enum, tensor_content=content, **values)
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


_ITEMS, _PRICES = np.array([3, 3, 3, 3], "<i8"), np.array([0.5, 0.25, 0.25, 0.25], "<f4")


@pytest.mark.parametrize(
    ("item", "price"),
    [
        (
            _tensor(tf.int64, [4], int64_val=[3, 3, 3, 3]),
            _tensor(tf.float32, [4], float_val=[0.5, 0.25, 0.25, 0.25]),
        ),
        (
            _tensor(tf.int64, [4], _ITEMS.tobytes()),
            _tensor(tf.float32, [4], _PRICES.tobytes()),
        ),
        # Fewer values than elements: the last one is repeated.
        (_tensor(tf.int64, [4], int64_val=[3]), _tensor(tf.float32, [4], float_val=[0.5, 0.25])),
        # More: the rest is dropped.
        (
            _tensor(tf.int64, [4], int64_val=[3] * 4 + [1]),
            _tensor(tf.float32, [4], float_val=[0.5, 0.25, 0.25, 0.25, 9]),
        ),
        # Raw bytes win over values, and the sizes over unknown_rank.
        (
            _tensor(tf.int64, [4], _ITEMS.tobytes(), int64_val=[1]),
            _tensor(tf.float32, [4], _PRICES.tobytes(), float_val=[9]),
        ),
        # Values of another type's field are none at all; see the next test for what none are.
        (
            _tensor(tf.int64, [4], int64_val=[3], float_val=[7]),
            _tensor(tf.float32, [4], _PRICES.tobytes(), int_val=[7]),
        ),
    ],
    ids=("values", "bytes", "padded", "cut", "both", "foreign"),
)
def test_every_way_to_send_numbers(caller, item, price):
    found = scores(caller.predict(raw_request(item=item, price=price)))
    rows = [(brand, 3, price) for (brand, _, _), price in zip(ROWS, _PRICES, strict=True)]
    wanted = [serving_model.expected(*row, bias=0.0)["ctr"] for row in rows]
    np.testing.assert_allclose(found["ctr"], wanted, rtol=1e-5)


def test_no_values_are_zeros_and_empty_strings(caller):
    request = raw_request(
        brand=_tensor(tf.string, [4]),
        item=_tensor(tf.int64, [4]),
        price=_tensor(tf.float32, [4], int_val=[5]),
    )
    wanted = serving_model.expected("", 0, 0.0, bias=0.0)["ctr"]
    np.testing.assert_allclose(scores(caller.predict(request))["ctr"], [wanted] * 4, rtol=1e-5)


@pytest.mark.parametrize(
    "brand",
    [
        _tensor(tf.string, [4], string_val=[b"acme", b"zorg"]),
        _tensor(tf.string, [4], bytes([4, 4, 4, 4]) + b"acmezorgzorgzorg"),
    ],
    ids=("values, padded", "bytes"),
)
def test_every_way_to_send_strings(caller, brand):
    found = scores(caller.predict(raw_request(brand=brand)))
    names = ("acme", "zorg", "zorg", "zorg")
    rows = [(name, *row[1:]) for name, row in zip(names, ROWS, strict=True)]
    wanted = [serving_model.expected(*row, bias=0.0)["ctr"] for row in rows]
    np.testing.assert_allclose(found["ctr"], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "float",
        "double",
        "int32",
        "uint8",
        "int16",
        "int8",
        "string",
        "bool",
        "uint16",
        "half",
        "uint32",
        "uint64",
    ],
)
def test_every_other_type_is_named(caller, name):
    tensor = _tensor(tf.dtypes.as_dtype(name), [4])
    assert refused(caller.predict, raw_request(item=tensor)) == (
        INVALID,
        f"Expects arg[1] to be int64 but {name} is provided",
    )


@pytest.mark.parametrize(
    "tensor",
    [
        _tensor(tf.int64, [4], b"1234567"),
        _tensor(tf.int64, [4], bytes(40)),
        _tensor(tf.int64, [-4], int64_val=[1]),
        _tensor(tf.int64, [2**33, 2**33], int64_val=[1]),
        _tensor(tf.string, [4], b"\x05abc"),
        tensor_pb2.TensorProto(int64_val=[1, 2, 3, 4]),
    ],
    ids=("short", "long", "negative", "overflow", "strings", "no type"),
)
def test_a_tensor_that_cannot_be(caller, tensor):
    request = raw_request(item=tensor)
    assert refused(caller.predict, request) == (INVALID, "tensor parsing error: item")


def _infer_request(message, name="m", signature="", examples=(), version=None):
    request = message()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    if version is not None:
        request.model_spec.version.value = version
    for data in examples:
        request.input.example_list.examples.add().ParseFromString(data)
    return request


def _tasks(*tasks):
    request = inference_pb2.MultiInferenceRequest()
    for name, signature, method in tasks:
        task = request.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = name, signature
    request.input.example_list.examples.add()
    return request


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (_tasks(), INVALID, "ModelSpec has no name specified."),
        (
            _tasks(("other", "", "regress")),
            NOT_FOUND,
            "Servable not found for request: Latest(other)",
        ),
        (
            _tasks(("m", "none", "regress")),
            INVALID,
            "Requested signature not found in model graph: none",
        ),
        (
            _tasks(("m", "", "predict")),
            grpc.StatusCode.UNIMPLEMENTED,
            "Unsupported signature method_name: tensorflow/serving/predict",
        ),
        (_tasks(("m", "", "regress")), INVALID, "Expected one output Tensor."),
        (_tasks(("m", "", "classify")), INVALID, "Expected one or two output Tensors, found 3"),
    ],
)
def test_multi_inference_refuses_as_tf_serving_does(caller, request_, code, message):
    assert refused(caller.multi_inference, request_) == (code, message)


@pytest.mark.parametrize("method", ["classify", "regress"])
def test_classify_and_regress_refuse_our_signatures(caller, method):
    message = {
        "classify": classification_pb2.ClassificationRequest,
        "regress": regression_pb2.RegressionRequest,
    }[method]
    outputs = {
        "classify": "Expected one or two output Tensors, found 3",
        "regress": "Expected one output Tensor.",
    }[method]
    for request, code, text in (
        (message(), INVALID, "Missing ModelSpec"),
        (_infer_request(message, name=""), INVALID, "ModelSpec has no name specified."),
        (
            _infer_request(message, name="x"),
            NOT_FOUND,
            "Servable not found for request: Latest(x)",
        ),
        (
            _infer_request(message, version=3),
            NOT_FOUND,
            "Servable not found for request: Specific(m, 3)",
        ),
        (
            _infer_request(message, signature="x"),
            INVALID,
            "No signature was found with the name: x",
        ),
        (_infer_request(message, signature="predict"), INVALID, "Expected one input Tensor."),
        # The signature is looked at before the input, which is empty here.
        (_infer_request(message), INVALID, outputs),
        (_infer_request(message, examples=[example(*ROWS[0])]), INVALID, outputs),
    ):
        assert refused(getattr(caller, method), request) == (code, text)


def _reload_request(base_path, *, name="m", labels=(), twice=False):
    request = model_management_pb2.ReloadConfigRequest()
    for _ in range(2 if twice else 1):
        entry = request.config.model_config_list.config.add()
        entry.name, entry.base_path, entry.model_platform = name, base_path, "tensorflow"
        for label, version in labels:
            entry.version_labels[label] = version
    return request


@pytest.fixture
def base_path(request):
    """Where the asked server finds model m."""
    if "TFS_ADDRESS" not in os.environ:
        return request.getfixturevalue("server").base_path
    if "TFS_BASE_PATH" not in os.environ:
        pytest.skip("TFS_BASE_PATH does not say where the server at TFS_ADDRESS finds model m")
    return os.environ["TFS_BASE_PATH"]


def test_reload_refuses_and_changes_nothing(caller, base_path):
    other_kind = model_management_pb2.ReloadConfigRequest()
    other_kind.config.custom_model_config.SetInParent()
    for request, code, text in (
        (
            other_kind,
            INVALID,
            "ServerModelConfig type not supported by HandleReloadConfigRequest. "
            "Only ModelConfigList is currently supported",
        ),
        (
            _reload_request("models/m"),
            INVALID,
            "Expected model m to have an absolute path or URI; got base_path()=models/m",
        ),
        (
            _reload_request(str(base_path), twice=True),
            INVALID,
            "Illegal to list model m multiple times in config list",
        ),
        (
            _reload_request(str(base_path), labels=[("contract", 2)]),
            PRECONDITION,
            "Request to assign label to version 2 of model m, which is not currently available "
            "for inference",
        ),
    ):
        found = refused(caller.reload, request)
        assert found[0] is code
        assert found[1].startswith(text)
        assert caller.predict(raw_request()).model_spec.version.value == 7


def test_a_label_comes_and_goes_by_reload(caller, base_path):
    unknown = (INVALID, "Unrecognized servable version label: contract")
    assert refused(caller.predict, named(label="contract")) == unknown
    caller.reload(_reload_request(str(base_path), labels=[("contract", 7)]))
    assert caller.predict(named(label="contract")).model_spec.version.value == 7
    caller.reload(_reload_request(str(base_path)))
    assert refused(caller.predict, named(label="contract")) == unknown


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
    (named(""), INVALID, "ModelSpec has no name specified."),
    (named("other"), NOT_FOUND, "Servable not found for request: Latest(other)"),
    (named(version=99), NOT_FOUND, "Servable not found for request: Specific(m, 99)"),
    (named("n", version=0), NOT_FOUND, "Servable not found for request: Specific(n, 0)"),
    (named(label="stable"), INVALID, "Unrecognized servable version label: stable"),
    (named(signature="x"), PRECONDITION, 'Serving signature key "x" not found.'),
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
    request = named("other", version=99, signature="x")
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
    # In bytes; 1024 of such characters would be more than a client takes.
    code, message = refused(caller.predict, _filtered("🙂" * 3000))
    assert code is INVALID
    assert message == "output tensor alias not found in signature: " + "🙂" * 245 + "...TRUNCATED"


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


def test_status(caller):
    labelled = status_request()
    # A label chooses nothing here, known or not.
    labelled.model_spec.version_label = "x"
    for request in (status_request(), status_request(version=7), labelled):
        entries = caller.status(request).model_version_status
        assert [(entry.version, entry.state) for entry in entries] == [(7, AVAILABLE)]
        assert entries[0].status.error_code == 0
    assert refused(caller.status, get_model_status_pb2.GetModelStatusRequest()) == (
        INVALID,
        "Missing ModelSpec",
    )
    assert refused(caller.status, status_request("x")) == (
        NOT_FOUND,
        "Could not find any versions of model x",
    )
    assert refused(caller.status, status_request(version=99)) == (
        NOT_FOUND,
        "Could not find version 99 of model m",
    )
