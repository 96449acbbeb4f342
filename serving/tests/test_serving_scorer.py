"""scorer and features: what is sent, what is refused before, and what failures look like."""

import threading
from concurrent import futures

import grpc
import numpy as np
import pytest
import serving_model
from pwiser_serving import (
    FeatureError,
    Scorer,
    ScoringError,
    ServerUnavailable,
    features,
    services,
    tensors,
)
from pwiser_serving.protos import service_pb2, tensor_pb2

RAW = {
    "brand": ["acme", "zorg", None, "", float("nan"), "new"],
    "item": [3, None, -1, 99, float("nan"), 0],
    "price": [0.5, None, float("nan"), -1, 2, 1e30],
}
MISSING = serving_model.MISSING_INTEGER


def _wanted(brands, items, prices, bias=0.0):
    rows = [serving_model.expected(*row, bias) for row in zip(brands, items, prices, strict=True)]
    return {name: [row[name] for row in rows] for name in ("ctr", "cvr", "ctcvr")}


@pytest.fixture(scope="module")
def scorer(server):
    with Scorer(server.address, "m", timeout=20) as scorer:
        yield scorer


def test_raw_features_with_missing_values(scorer):
    found = scorer.score(RAW)
    nan = float("nan")
    wanted = _wanted(
        ["acme", "zorg", "", "", "", "new"], [3, -1, -1, 99, -1, 0], [0.5, nan, nan, -1, 2, 1e30]
    )
    assert list(found) == ["ctr", "cvr", "ctcvr"]
    for name, values in found.items():
        assert (values.dtype, values.shape) == (np.float32, (6,))
        np.testing.assert_allclose(values, wanted[name], rtol=1e-6)


def test_arrays_and_frames_are_features_too(scorer):
    pandas = pytest.importorskip("pandas")
    lists = {"brand": ["acme", "zorg"], "item": [3, 4], "price": [0.5, 0.25]}
    wanted = scorer.score(lists)
    for other in (
        {name: np.array(values) for name, values in lists.items()},
        {"brand": np.array([b"acme", b"zorg"]), "item": np.array([3.0, 4.0]), "price": (0.5, 0.25)},
        pandas.DataFrame(lists)[["price", "item", "brand"]],
        pandas.DataFrame(lists).astype({"brand": "category", "item": "Int64", "price": "Float64"}),
    ):
        for name, values in scorer.score(other).items():
            np.testing.assert_array_equal(values, wanted[name])
    gaps = pandas.DataFrame(
        {
            "brand": pandas.Series(["acme", None], dtype="str"),
            "item": pandas.Series([3, None], dtype="Int64"),
            "price": pandas.Series([None, 1.0], dtype="Float64"),
        }
    )
    wanted = _wanted(["acme", ""], [3, -1], [float("nan"), 1.0])
    np.testing.assert_allclose(scorer.score(gaps)["ctcvr"], wanted["ctcvr"], rtol=1e-6)


def test_ids_go_to_the_fast_signature(scorer):
    found = scorer.score({"categorical": [[1, 3], [2, 99]], "numerical": [[0.5], [-1.0]]})
    wanted = _wanted(["acme", "zorg"], [3, 99], [0.5, -1.0])
    np.testing.assert_allclose(found["ctr"], wanted["ctr"], rtol=1e-6)


def test_a_large_call_is_split_and_keeps_its_order(server):
    random = np.random.default_rng(1)
    rows = 1003
    features = {
        "brand": random.choice(["acme", "zorg", ""], rows),
        "item": random.integers(-3, 12, rows),
        "price": random.normal(size=rows).astype(np.float32),
    }
    with Scorer(server.address, "m", rows_per_request=100, timeout=20) as small:
        split = small.score(features)
    wanted = _wanted(features["brand"].tolist(), features["item"].tolist(), features["price"])
    for name, values in split.items():
        np.testing.assert_allclose(values, wanted[name], rtol=2e-6)


def test_no_rows_give_no_scores(scorer):
    found = scorer.score({"brand": [], "item": [], "price": []})
    assert {name: values.shape for name, values in found.items()} == {
        "ctr": (0,),
        "cvr": (0,),
        "ctcvr": (0,),
    }


@pytest.mark.parametrize(
    ("change", "feature", "row", "told"),
    [
        ({"price": None}, "price", None, "missing; the model takes brand, item, price"),
        ({"cost": [1, 2]}, "cost", None, "unknown to the model, which takes brand, item, price"),
        ({"item": [1, "x"]}, "item", 1, "found 'x', expected an integer of 64 bits"),
        ({"item": ["1", "2"]}, "item", 0, "found '1', expected an integer of 64 bits"),
        ({"item": [1, 2.5]}, "item", 1, "found 2.5, expected an integer of 64 bits"),
        ({"item": [1, 2**70]}, "item", 1, "expected an integer of 64 bits"),
        ({"item": [1, 2**63]}, "item", 1, "expected an integer of 64 bits"),
        ({"item": [1.0, float("inf")]}, "item", 1, "found inf, expected an integer of 64 bits"),
        ({"item": [None, float("inf")]}, "item", 1, "found inf, expected an integer of 64 bits"),
        ({"price": [1.0, "2.0"]}, "price", 1, "found '2.0', expected a number"),
        ({"price": [1.0, 2j]}, "price", 1, "found 2j, expected a number"),
        ({"brand": ["acme", 5]}, "brand", 1, "found 5, expected a string"),
        ({"brand": [1.5, 2.5]}, "brand", 0, "found 1.5, expected a string"),
        ({"brand": ["acme", "\udc80"]}, "brand", 1, r"found '\udc80', expected a string"),
        ({"price": [1.0]}, "price", None, "found 1 rows, expected 2 as brand has"),
        ({"price": 1.0}, "price", None, "found the shape [], expected the shape [rows]"),
        ({"price": [[1.0], [2.0]]}, "price", None, "found the shape [2, 1], expected the shape"),
        ({"price": [[1.0], [2.0, 3.0]]}, "price", None, "an array with rows of one length"),
    ],
)
def test_features_that_the_model_does_not_take(scorer, change, feature, row, told):
    columns = {"brand": ["acme", "zorg"], "item": [1, 2], "price": [0.5, 0.5]} | change
    columns = {name: values for name, values in columns.items() if values is not None}
    with pytest.raises(FeatureError) as caught:
        scorer.score(columns)
    assert (caught.value.feature, caught.value.row) == (feature, row)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_of_a_wrong_width(scorer):
    with pytest.raises(FeatureError, match=r"found the shape \[1, 3\], expected .* \[rows, 2\]"):
        scorer.score({"categorical": [[1, 2, 3]], "numerical": [[0.5]]})


def test_missing_values_are_written_as_the_model_reads_them():
    inputs = {
        name: tensor_pb2.TensorInfo(
            dtype=data_type, tensor_shape=tensor_pb2.TensorShape(unknown_rank=True)
        )
        for name, data_type in (("brand", 7), ("item", 9), ("price", 1))
    }
    arrays, rows = features.to_arrays(RAW, inputs)
    assert rows == 6
    assert arrays["brand"].tolist() == [b"acme", b"zorg", b"", b"", b"", b"new"]
    assert arrays["item"].tolist() == [3, MISSING, -1, 99, MISSING, 0]
    assert np.isnan(arrays["price"]).tolist() == [False, True, True, False, False, False]
    assert [array.dtype.str for array in arrays.values()] == ["|O", "<i8", "<f4"]


def test_an_unknown_model_and_version(server):
    with (
        Scorer(server.address, "other", timeout=20) as other,
        pytest.raises(ScoringError) as caught,
    ):
        other.score(RAW)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert (caught.value.model, caught.value.version) == ("other", None)
    assert str(caught.value) == (
        f"{server.address}, model other: NOT_FOUND: Servable not found for request: Latest(other)"
    )
    with (
        Scorer(server.address, "m", version=3, timeout=20) as old,
        pytest.raises(ScoringError, match=r"model m, version 3: NOT_FOUND: .*Specific\(m, 3\)"),
    ):
        old.score(RAW)
    with Scorer(server.address, "m", version=7, timeout=20) as named:
        assert named.score(RAW)["ctr"].shape == (6,)


def test_an_unknown_signature(server):
    with (
        Scorer(server.address, "m", signature="x", timeout=20) as scorer,
        pytest.raises(ScoringError, match=r"no signature x, only .*predict_raw, serving_default"),
    ):
        scorer.score(RAW)


def test_no_server():
    with (
        Scorer("localhost:1", "m", timeout=20) as scorer,
        pytest.raises(ServerUnavailable) as caught,
    ):
        scorer.score(RAW)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert str(caught.value).startswith("localhost:1, model m: UNAVAILABLE: no server answers")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"rows_per_request": 0}])
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be above 0"):
        Scorer("localhost:1", "m", **wrong)


class FakeModel:
    """A servable of one feature, x; its answer is x everywhere, whatever `before` does first."""

    def __init__(self):
        self.signatures = {"predict_raw": tensor_pb2.Signature()}
        self.calls = 0
        self.before = lambda: None
        self.answer = tensors.encode
        self.set_inputs(x=tensor_pb2.DT_FLOAT)

    def set_inputs(self, **data_types):
        inputs = self.signatures["predict_raw"].inputs
        inputs.clear()
        for name, data_type in data_types.items():
            inputs[name].dtype = data_type
            inputs[name].tensor_shape.dim.add(size=-1)

    def predict(self, request, context):
        self.calls += 1
        try:
            self.before()
        except _Refused as refused:
            context.abort(*refused.args)
        values = tensors.decode(next(iter(request.inputs.values()))).astype(np.float32)
        outputs = {name: self.answer(values) for name in request.output_filter}
        return service_pb2.PredictResponse(outputs=outputs)

    def get_model_metadata(self, request, context):
        signatures = service_pb2.SignatureMap(signature_def=self.signatures)
        response = service_pb2.GetModelMetadataResponse()
        response.metadata[services.SIGNATURE_FIELD].value = signatures.SerializeToString()
        return response


class _Refused(Exception):
    """The code and the message of a call's end."""


@pytest.fixture
def fake():
    """A server in this process, without TensorFlow: (its address, its model)."""
    model = FakeModel()
    server = grpc.server(
        futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 10_000)]
    )
    for method, answer in (
        (services.PREDICT, model.predict),
        (services.GET_MODEL_METADATA, model.get_model_metadata),
    ):
        handler = grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(method.service, {method.name: handler})]
        )
    port = server.add_insecure_port("localhost:0")
    server.start()
    yield f"localhost:{port}", model
    server.stop(None).wait()


def _failing(times: int, code: grpc.StatusCode):
    left = iter(range(times))

    def before():
        if next(left, None) is not None:
            raise _Refused(code, "not now")

    return before


def test_only_an_unavailable_server_is_tried_again(fake):
    address, model = fake
    with Scorer(address, "m") as scorer:
        model.before = _failing(2, grpc.StatusCode.UNAVAILABLE)
        assert scorer.score({"x": [0.5]})["ctr"].tolist() == [0.5]
        assert model.calls == 3
        for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED):
            model.calls, model.before = 0, _failing(1, code)
            with pytest.raises(ScoringError, match="not now") as caught:
                scorer.score({"x": [0.5]})
            assert (caught.value.code, model.calls) == (code, 1)
        model.before = _failing(9, grpc.StatusCode.UNAVAILABLE)
        with pytest.raises(ServerUnavailable, match="not now"):
            scorer.score({"x": [0.5]})


def test_a_slow_answer_ends_at_the_deadline(fake):
    address, model = fake
    release = threading.Event()
    model.before = lambda: release.wait(20)
    with Scorer(address, "m", timeout=0.2) as scorer:
        with pytest.raises(ScoringError, match=r"no answer within 0\.2 seconds") as caught:
            scorer.score({"x": [0.5]})
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    release.set()


def test_several_requests_are_on_their_way_but_not_all(fake):
    address, model = fake
    running, most, lock = 0, 0, threading.Lock()
    full = threading.Event()

    def before():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 3:
                full.set()
        # No request is answered before three of them have come.
        assert full.wait(20)
        with lock:
            running -= 1

    model.before = before
    taken = []

    def batches():
        for number in range(10):
            taken.append(number)
            yield {"x": [float(number)] * 2}

    with Scorer(address, "m", requests_in_flight=3, timeout=20) as scorer:
        results = scorer.score_batches(batches())
        assert next(results)["ctr"].tolist() == [0.0, 0.0]
        # Three were sent before the first answer was needed: the stream is not read ahead of that.
        assert taken == [0, 1, 2]
        assert [part["ctr"].tolist() for part in results] == [[n, n] for n in range(1, 10)]
    assert most == 3


def test_raw_features_that_are_called_as_ids_are(fake):
    address, model = fake
    model.set_inputs(numerical=tensor_pb2.DT_FLOAT)
    ids = model.signatures["predict"] = tensor_pb2.Signature()
    ids.inputs["numerical"].dtype = tensor_pb2.DT_FLOAT
    for size in (-1, 1):
        ids.inputs["numerical"].tensor_shape.dim.add(size=size)
    with Scorer(address, "m") as scorer:
        assert scorer.score({"numerical": [0.5]})["ctr"].tolist() == [0.5]
    with Scorer(address, "m", signature="predict") as scorer, pytest.raises(FeatureError):
        scorer.score({"numerical": [0.5]})


def test_a_model_that_was_replaced_is_asked_again(fake):
    address, model = fake
    with Scorer(address, "m") as scorer:
        scorer.score({"x": [0.5]})
        model.set_inputs(y=tensor_pb2.DT_INT64)
        assert scorer.score({"y": [2]})["ctr"].tolist() == [2.0]
        with pytest.raises(FeatureError, match="feature y: missing; the model takes y"):
            scorer.score({"x": [0.5]})


def test_an_answer_that_does_not_fit_is_an_error(fake):
    address, model = fake
    with Scorer(address, "m") as scorer:
        model.answer = lambda values: tensors.encode(values[:1])
        with pytest.raises(ScoringError, match=r"ctr has the shape \[1\], expected \[2\]"):
            scorer.score({"x": [0.5, 0.5]})
        model.answer = lambda values: service_pb2.PredictResponse().outputs["x"]
        with pytest.raises(ScoringError, match="ctr cannot be read"):
            scorer.score({"x": [0.5, 0.5]})


def test_a_request_above_the_servers_limit(fake):
    address, _ = fake
    with (
        Scorer(address, "m", rows_per_request=5000) as scorer,
        pytest.raises(ScoringError) as caught,
    ):
        scorer.score({"x": np.zeros(5000)})
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with Scorer(address, "m", rows_per_request=2000) as scorer:
        assert scorer.score({"x": np.zeros(5000)})["ctr"].shape == (5000,)


def test_a_model_of_another_type_is_refused(fake):
    address, model = fake
    model.set_inputs(x=tensor_pb2.DT_INT32)
    with Scorer(address, "m") as scorer, pytest.raises(FeatureError, match="takes int32 here"):
        scorer.score({"x": [1]})
