"""scorer and features: what is sent, what is refused before, and what failures look like."""

import asyncio
import decimal
import pickle
import re
import threading
import time

import fake_server
import grpc
import numpy as np
import pytest
import serving_model
from fake_server import FakeModel, Refused, serve, server_credentials
from pwiser_serving import (
    TLS,
    DeadlineExceeded,
    FeatureError,
    Hedge,
    ModelNotFound,
    RequestTooLarge,
    Scorer,
    ScoringError,
    ServerUnavailable,
    UsageError,
    connection,
    features,
    tensors,
)
from pwiser_serving.protos import service_pb2, tensor_pb2
from waiting import wait_for

RAW = {
    "brand": ["acme", "zorg", None, "", float("nan"), "new"],
    "item": [3, None, -1, 99, float("nan"), 0],
    "price": [0.5, None, float("nan"), -1, 2, 1e30],
}
MISSING = serving_model.MISSING_INTEGER
NAN = float("nan")


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
        ({"price": np.array(1)}, "price", None, "found the shape [], expected the shape [rows]"),
        ({"price": 1.0}, "price", None, "found 1.0, expected a column: a list, NumPy array or"),
        ({"price": np.float32(1)}, "price", None, "found 1.0, expected a column"),
        ({"brand": "ab"}, "brand", None, "found 'ab', expected a column"),
        ({"brand": b"ab"}, "brand", None, "found b'ab', expected a column"),
        ({"item": {1, 2}}, "item", None, "found {1, 2}, expected a column"),
        ({"item": {0: 1, 1: 2}}, "item", None, "found {0: 1, 1: 2}, expected a column"),
        ({"item": {0: 1}.values()}, "item", None, "found dict_values([1]), expected a column"),
        ({"item": (n for n in (1, 2))}, "item", None, "found <generator object <genexpr>"),
        ({"price": [[1.0], [2.0]]}, "price", None, "found the shape [2, 1], expected the shape"),
        (
            {"price": [[1.0], [2.0, 3.0]]},
            "price",
            None,
            "found no array, or rows of several lengths",
        ),
        ({"price": [1.0, 10**400]}, "price", 1, "expected a number"),
        ({"price": np.array([1.0, np.complex64(2)], object)}, "price", 1, "expected a number"),
        ({"item": np.array([1, np.complex64(2)], object)}, "item", 1, "expected an integer of 64"),
        ({"item": np.array([5, 6], "m8[ns]")}, "item", 0, "found 5 nanoseconds, expected an int"),
        ({"item": np.array(["2020-01-01"] * 2, "M8[ns]")}, "item", 0, "found 2020-01-01T00:00"),
        ({"price": np.array(["2020-01-01"] * 2, "M8[ns]")}, "price", 0, "found 2020-01-01T00:00"),
        ({"item": np.array([1.0, 2.0**53])}, "item", 1, "expected an integer of 64 bits (below"),
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


ROWS = [{"brand": "acme", "item": 1, "price": 0.5}]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (None, "found None"),
        (3, "found the type int"),
        ([], "found the type list"),
        (ROWS, "found a list of rows: give pandas.DataFrame(rows), or {name: [row[name] for row"),
        (
            np.array([(b"acme", 1, 0.5)], [("brand", "S4"), ("item", "i8"), ("price", "f4")]),
            "found a structured NumPy array: give {name: array[name] for name in array.dtype",
        ),
    ],
)
def test_features_that_are_no_columns_by_name(scorer, wrong, told):
    for call in (
        lambda: scorer.score(wrong),
        lambda: scorer.score_future(wrong).result(20),
        lambda: asyncio.run(scorer.score_async(wrong)),
        lambda: list(scorer.score_batches([wrong])),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value).startswith(
            f"features: expected columns by name, as a dict or pandas.DataFrame, {told}"
        )


def test_the_advised_forms_of_rows_are_features(scorer):
    wanted = scorer.score({"brand": ["acme"], "item": [1], "price": [0.5]})["ctr"]
    records = np.array([("acme", 1, 0.5)], [("brand", "U4"), ("item", "i8"), ("price", "f4")])
    pandas = pytest.importorskip("pandas")
    for columns in (
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
        {name: records[name] for name in records.dtype.names},
        pandas.DataFrame(ROWS),
    ):
        np.testing.assert_array_equal(scorer.score(columns)["ctr"], wanted)


def test_two_columns_of_one_name(scorer):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([["acme", 1, 2, 0.5]], columns=["brand", "item", "item", "price"])
    with pytest.raises(FeatureError, match="feature item: found 2 columns of this name"):
        scorer.score(frame)


@pytest.mark.parametrize("wrong", [RAW, None, 3])
def test_one_batch_in_place_of_a_stream(scorer, wrong):
    with pytest.raises(TypeError, match=r"expected a stream of features, .* call score\("):
        scorer.score_batches(wrong)


def test_ids_of_a_wrong_width(scorer):
    with pytest.raises(FeatureError, match=r"found the shape \[1, 3\], expected .* \[rows, 2\]"):
        scorer.score({"categorical": [[1, 2, 3]], "numerical": [[0.5]]})


def _integers(values) -> list[int]:
    info = tensor_pb2.TensorInfo(
        dtype=tensor_pb2.DT_INT64, tensor_shape=tensor_pb2.TensorShape(unknown_rank=True)
    )
    return features.to_arrays({"id": values}, {"id": info})[0]["id"].tolist()


def test_large_ids_beside_a_missing_one_are_not_rounded():
    """NumPy makes floats of them, which hold 53 bits."""
    pandas = pytest.importorskip("pandas")
    large = 2**53 + 1
    for values in (
        [large, None],
        [large, NAN],
        (large, NAN),
        pandas.Series([large, None], dtype="Int64"),
        pandas.Series([large, None], dtype="int64[pyarrow]"),
        np.ma.array([large, 7], mask=[False, True]),
        np.array([decimal.Decimal(large), decimal.Decimal("nan")]),
    ):
        assert _integers(values) == [large, MISSING]
    assert _integers([large, 1.0]) == [large, 1]
    # Rounded before they came: refused.
    for values in (
        pandas.Series([large, None], dtype="category"),
        pandas.DataFrame({"id": [large, None]})["id"],
        np.array([large, NAN]),
    ):
        with pytest.raises(FeatureError, match=r"below 2\*\*53 as a float"):
            _integers(values)


def test_what_is_masked_is_missing(scorer):
    masked = {
        "brand": np.ma.array(["zorg", "acme"], mask=[True, False]),
        "item": np.ma.array([3, 4], mask=[True, False]),
        "price": np.ma.array([0.5, 0.25], mask=[True, False]),
    }
    plain = {"brand": [None, "acme"], "item": [None, 4], "price": [None, 0.25]}
    for name, values in scorer.score(masked).items():
        np.testing.assert_array_equal(values, scorer.score(plain)[name])


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


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"timeout": 0}, "must be above 0"),
        ({"timeout": np.nan}, "must be above 0"),
        ({"timeout": np.inf}, "timeout must be at most 1e[+]09, found inf"),
        ({"rows_per_request": 0}, "must be above 0"),
        ({"version": -1}, "version must be from 0 to"),
        ({"version": 2**63}, "version must be from 0 to"),
        ({"address": ""}, "address and model are needed"),
        ({"model": ""}, "address and model are needed"),
    ],
)
def test_arguments_out_of_range(wrong, told):
    with pytest.raises(ValueError, match=told):
        Scorer(**({"address": "localhost:1", "model": "m"} | wrong))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"address": ("localhost", 1)}, "address: found ('localhost', 1), expected a str"),
        ({"address": None}, "address: found None, expected a str"),
        ({"model": b"m"}, "model: found b'm', expected a str"),
        ({"version": 7.0}, "version: found 7.0, expected an int, a label (str) or None"),
        ({"version": True}, "version: found True, expected an int, a label"),
        ({"timeout": None}, "timeout: found None, expected a number of seconds"),
        ({"timeout": "5"}, "timeout: found '5', expected a number of seconds"),
        ({"rows_per_request": 1.5}, "rows_per_request: found 1.5, expected an int"),
        ({"requests_in_flight": "4"}, "requests_in_flight: found '4', expected an int"),
        ({"signature": b"predict"}, "signature: found b'predict', expected a str or None"),
        ({"tls": True}, "tls: found True, expected a pwiser_serving.TLS or None"),
        ({"hedge": 0.05}, "hedge: found 0.05, expected a pwiser_serving.Hedge or None"),
    ],
)
def test_arguments_of_another_type(wrong, told):
    with pytest.raises(TypeError) as caught:
        Scorer(**({"address": "localhost:1", "model": "m"} | wrong))
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("version", ["7", ""])
def test_a_label_is_no_number_and_not_empty(version):
    with pytest.raises(ValueError, match=f"version: found '{version}', expected the number of a"):
        Scorer("localhost:1", "m", version=version)


def test_numbers_of_numpy_are_arguments_too(fake):
    """A float32 too, which would round a deadline, in seconds since 1970, to two minutes."""
    more = {"version": np.int64(1), "timeout": np.float32(20), "rows_per_request": np.int32(1)}
    with Scorer(fake[0], "m", **more) as scorer:
        assert scorer.score({"x": [0.5, 2]})["ctr"].tolist() == [0.5, 2]


@pytest.fixture
def fake():
    """A server in this process, without TensorFlow: (its address, its model)."""
    model = FakeModel()
    with serve(model, options=[("grpc.max_receive_message_length", 10_000)]) as port:
        yield f"localhost:{port}", model


def _failing(times: int, code: grpc.StatusCode):
    left = iter(range(times))

    def before():
        if next(left, None) is not None:
            raise Refused(code, "not now")

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


def test_a_batch_without_rows_has_its_result_in_a_stream(fake):
    """Whoever goes through batches and results side by side stays in step."""
    address, model = fake
    batches = [{"x": []}, {"x": [1]}, {"x": []}, {"x": [2, 3]}, {"x": []}]
    with Scorer(address, "m", timeout=20) as scorer:
        found = [scores["ctr"].tolist() for scores in scorer.score_batches(batches)]
    assert found == [[], [1], [], [2, 3], []]
    assert model.calls == 2


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


def _calls(scorer):
    """Each way to score: features to a list of the results."""
    return (
        lambda features: [scorer.score(features)],
        lambda features: [scorer.score_future(features).result(20)],
        lambda features: [asyncio.run(scorer.score_async(features))],
        lambda features: list(scorer.score_batches([features])),
    )


# A text's score is its length, and the server reads messages of up to 10,000 bytes.
LENGTHS = [3000, 3001, 3002, 3003, 3004, 3005, 3006, 3007]


def test_a_request_above_the_servers_limit_is_halved(fake):
    address, model = fake
    model.set_inputs(x=tensor_pb2.DT_STRING)
    with Scorer(address, "m", timeout=20) as scorer:
        for call in _calls(scorer):
            model.calls = 0
            (scores,) = call({"x": ["a" * length for length in LENGTHS]})
            assert scores["ctr"].tolist() == LENGTHS
            assert scores.version == 1
            # 8 rows and 4 rows are too many, 2 are not: as many requests are read.
            assert model.calls == 4


def test_a_row_above_the_servers_limit(fake):
    address, model = fake
    model.set_inputs(x=tensor_pb2.DT_STRING)
    texts = ["a"] * 5 + ["a" * 20_000] + ["a"] * 2
    # Of several requests of a call too, the row is the call's.
    for rows_per_request in (8, 3):
        with Scorer(address, "m", rows_per_request=rows_per_request, timeout=20) as scorer:
            for call in _calls(scorer)[: 4 if rows_per_request == 8 else 3]:
                with pytest.raises(RequestTooLarge) as caught:
                    call({"x": texts})
                assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert caught.value.row == 5
                assert str(caught.value).endswith(
                    "; row 5 alone is above the server's message limit"
                )
            assert scorer.score({"x": ["ab"]})["ctr"].tolist() == [2]


def test_another_resource_that_is_exhausted_is_no_reason_to_split(fake):
    address, model = fake
    with Scorer(address, "m", timeout=20) as scorer:
        for call in _calls(scorer):
            model.calls, model.before = 0, _failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED)
            with pytest.raises(ScoringError, match="not now"):
                call({"x": [1, 2]})
            assert model.calls == 1


def test_a_model_of_another_type_is_refused(fake):
    address, model = fake
    model.set_inputs(x=tensor_pb2.DT_INT32)
    with Scorer(address, "m") as scorer, pytest.raises(FeatureError, match="takes int32 here"):
        scorer.score({"x": [1]})


def test_a_large_request_too_is_tried_again(fake):
    """gRPC forgets a request of more than 256 KiB, unless told otherwise."""
    model = FakeModel()
    model.before = _failing(2, grpc.StatusCode.UNAVAILABLE)
    with serve(model) as port, Scorer(f"localhost:{port}", "m", rows_per_request=10**6) as scorer:
        assert scorer.score({"x": np.ones(200_000)})["ctr"].shape == (200_000,)
    assert model.calls == 3


def test_the_version_that_answered(fake):
    address, model = fake
    with Scorer(address, "m", rows_per_request=1) as scorer:
        scores = scorer.score({"x": [0.5, 0.25]})
        assert (scores.version, scores.versions) == (1, (1,))
        model.set_version(2)
        assert scorer.score({"x": [0.5]}).version == 2
        assert scorer.score({"x": []}).versions == ()


def _change_after_first(model, *, keep):
    first = threading.Lock()

    def before():
        if first.acquire(blocking=False):
            return
        model.set_version(2, keep=keep)

    model.before = before


@pytest.mark.parametrize("keep", [True, False])
def test_a_split_call_is_answered_by_one_version(fake, keep):
    address, model = fake
    _change_after_first(model, keep=keep)
    with Scorer(address, "m", rows_per_request=1, requests_in_flight=1) as scorer:
        scores = scorer.score({"x": [0.5, 0.25, 0.125, 1.0]})
    assert scores.version == 2
    assert scores["ctr"].tolist() == [0.5, 0.25, 0.125, 1.0]
    # The first request saw version 1, and so did the second before it changed the model.
    assert model.calls == 8


def test_a_split_call_of_two_versions_says_so_where_one_is_gone(fake):
    address, model = fake
    left = iter((1, 1, 3, 2))

    def before():
        model.set_version(next(left))

    # After each request another version answers the next one, and the newest is gone at the end.
    model.before = before
    with Scorer(address, "m", rows_per_request=1, requests_in_flight=1) as scorer:
        scores = scorer.score({"x": [0.5, 0.25, 0.125, 1.0]})
    assert scores.versions == (1, 3)
    assert scores.version is None
    assert scores["ctr"].tolist() == [0.5, 0.25, 0.125, 1.0]


def test_a_label_names_the_version(fake):
    address, model = fake
    model.set_version(2, keep=True)
    model.labels["stable"] = 1
    with Scorer(address, "m", version="stable") as scorer:
        assert scorer.score({"x": [0.5]}).version == 1
        assert [status.version for status in scorer.status()] == [99, 1]
    with Scorer(address, "m", version="canary") as scorer:
        for call in (scorer.status, scorer.metadata, lambda: scorer.score({"x": [0.5]})):
            with pytest.raises(
                ModelNotFound, match="m, label canary: INVALID_ARGUMENT: "
            ) as caught:
                call()
            assert caught.value.version == "canary"


def test_a_version_that_takes_other_features_is_asked_once(fake):
    address, model = fake
    with Scorer(address, "m") as scorer:
        for _ in range(3):
            scorer.score({"x": [0.5]})
        assert model.metadata_calls == 1
        # The server refuses what the old version took: the client finds out and says which.
        model.set_version(2)
        model.set_inputs(y=tensor_pb2.DT_FLOAT)
        with pytest.raises(FeatureError, match="feature y: missing; the model takes y"):
            scorer.score({"x": [0.5]})
        assert scorer.score({"y": [0.5]}).version == 2
        assert model.metadata_calls == 2
        # And what is only added: the version in the answer tells.
        model.set_version(3)
        scorer.score({"y": [0.5]})
        assert scorer.score({"y": [0.5]}).version == 3
        assert model.metadata_calls == 3


def test_a_refusal_of_the_same_model_is_not_sent_again(fake):
    address, model = fake
    with Scorer(address, "m") as scorer:
        scorer.score({"x": [0.5]})
        model.calls, model.before = 0, _failing(1, grpc.StatusCode.INVALID_ARGUMENT)
        with pytest.raises(ScoringError, match="not now"):
            scorer.score({"x": [0.5]})
        assert model.calls == 1


def test_threads_share_a_scorer_while_versions_change(fake):
    address, model = fake
    stop, errors = threading.Event(), []

    def work():
        while not stop.is_set():
            try:
                assert scorer.score({"x": [0.5]})["ctr"].tolist() == [0.5]
            except Exception as error:
                errors.append(error)

    with Scorer(address, "m", timeout=20) as scorer:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for version in range(2, 30):
            model.set_version(version, keep=True)
            calls = model.calls
            wait_for(lambda calls=calls: model.calls >= calls + 4 or errors)
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def test_futures_and_asyncio(fake):
    with Scorer(fake[0], "m", rows_per_request=1) as scorer:
        found = [scorer.score_future({"x": [n, n]}) for n in range(10)]
        assert [f.result(20)["ctr"].tolist() for f in found] == [[n, n] for n in range(10)]
        with pytest.raises(FeatureError):
            scorer.score_future({"y": [1]}).result(20)

        async def several():
            return await asyncio.gather(*(scorer.score_async({"x": [n]}) for n in range(10)))

        assert [s["ctr"].tolist() for s in asyncio.run(several())] == [[n] for n in range(10)]


def test_a_cancelled_future_ends_its_requests(fake):
    address, model = fake
    release, came = threading.Event(), threading.Semaphore(0)

    def before():
        came.release()
        release.wait(20)

    with Scorer(address, "m", rows_per_request=1, requests_in_flight=2, timeout=20) as scorer:
        scorer.inputs("predict_raw")
        model.before = before
        future = scorer.score_future({"x": [1, 2, 3, 4]})
        assert came.acquire(timeout=20)
        assert came.acquire(timeout=20)
        assert future.cancel()
        release.set()
        model.before = lambda: None
        assert scorer.score({"x": [1]})["ctr"].tolist() == [1]
        # Neither the third nor the fourth was sent.
        assert model.calls == 3


def test_hedging_sends_a_second_copy_within_its_budget(fake):
    slow, quick = FakeModel(), FakeModel()
    release = threading.Event()
    slow.before = lambda: release.wait(20)
    with serve(slow) as one, serve(quick) as two:
        address = f"ipv4:127.0.0.1:{one},127.0.0.1:{two}"
        with Scorer(address, "m", hedge=Hedge(0.05, budget=1), timeout=20) as scorer:
            for number in range(6):
                assert scorer.score({"x": [number]})["ctr"].tolist() == [number]
            # Round robin sent some of them to the slow server first.
            assert slow.calls
            assert quick.calls == 6
        release.set()
        slow.calls = quick.calls = 0
        slow.before = quick.before = lambda: time.sleep(0.1)
        with Scorer(address, "m", hedge=Hedge(0.01, budget=0.25), timeout=20) as scorer:
            for _ in range(8):
                scorer.score({"x": [1]})
        assert slow.calls + quick.calls == 10


def test_the_question_what_the_model_takes_is_hedged_too():
    """Else a server that hangs takes the first call, and each after a new version, with it."""
    model, release, first = FakeModel(), threading.Event(), iter([1])
    answer = model.get_model_metadata

    def hangs_once(request, context):
        if next(first, None):
            release.wait(20)
        return answer(request, context)

    model.get_model_metadata = hangs_once
    with serve(model) as port:
        with Scorer(f"localhost:{port}", "m", hedge=Hedge(0.05, budget=1), timeout=10) as scorer:
            assert scorer.score({"x": [1]})["ctr"].tolist() == [1]
        release.set()


def test_a_hedged_call_that_fails_is_an_error(fake):
    address, model = fake
    with Scorer(address, "m", hedge=Hedge(0.01, budget=1), timeout=0.3) as scorer:
        model.before = lambda: time.sleep(0.05) or _failing(1, grpc.StatusCode.INTERNAL)()
        with pytest.raises(ScoringError, match="not now") as caught:
            scorer.score({"x": [1]})
        assert caught.value.code is grpc.StatusCode.INTERNAL
        release = threading.Event()
        model.before = lambda: release.wait(20)
        with pytest.raises(DeadlineExceeded):
            scorer.score({"x": [1]})
        release.set()
    assert model.calls == 4
    for wrong in ((0, 0.1), (1, 0), (1, 2), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="after_seconds must be above 0"):
            Hedge(*wrong)


def test_a_killed_server_is_a_typed_error_in_each_thread():
    features = {"brand": ["acme"], "item": [1], "price": [0.5]}
    met, scored = [], threading.Semaphore(0)

    def work():
        try:
            while True:
                assert scorer.score(features)["ctr"].tolist() == [0.5]
                scored.release()
        except Exception as error:
            met.append((error, time.monotonic()))

    with (
        fake_server.process() as (server, port),
        Scorer(f"localhost:{port}", "m", timeout=10) as scorer,
    ):
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            assert scored.acquire(timeout=20)
        server.kill()
        killed = time.monotonic()
        for thread in threads:
            thread.join(30)
    assert [type(error) for error, _ in met] == [ServerUnavailable] * 8
    # Within the deadline; not a measurement: the last try comes long before.
    assert max(when for _, when in met) < killed + 10
    with fake_server.process(port), Scorer(f"localhost:{port}", "m", timeout=10) as scorer:
        assert scorer.score(features)["ctr"].tolist() == [0.5]


def test_status_and_metadata_in_plain_python(fake):
    address, model = fake
    model.signatures["predict_raw"].method_name = "tensorflow/serving/predict"
    with Scorer(address, "m") as scorer:
        assert scorer.status() == [
            (99, "END", grpc.StatusCode.NOT_FOUND, "no\nsuch file"),
            (1, "AVAILABLE", grpc.StatusCode.OK, ""),
        ]
        metadata = scorer.metadata()
    assert metadata.version == 1
    assert metadata.signatures == {
        "predict_raw": {
            "inputs": {"x": {"type": "float", "shape": [None]}},
            "outputs": {n: {"type": "float", "shape": []} for n in ("ctr", "cvr", "ctcvr")},
            "method": "tensorflow/serving/predict",
        }
    }


def test_status_and_metadata_of_a_server(server):
    with Scorer(server.address, "m", timeout=20) as scorer:
        assert scorer.status() == [(7, "AVAILABLE", grpc.StatusCode.OK, "")]
        metadata = scorer.metadata()
        assert scorer.score(RAW).version == metadata.version == 7
    inputs = metadata.signatures["predict"]["inputs"]
    assert inputs["categorical"] == {"type": "int64", "shape": [None, 2]}
    with (
        Scorer(server.address, "other", timeout=20) as other,
        pytest.raises(ModelNotFound, match="Could not find any versions of model other"),
    ):
        other.status()


def test_serialized_examples_go_to_the_default_signature(scorer):
    tensorflow = pytest.importorskip("tensorflow")
    example = tensorflow.train.Example()
    example.features.feature["brand"].bytes_list.value.append(b"acme")
    example.features.feature["item"].int64_list.value.append(3)
    found = scorer.score({"examples": [example.SerializeToString()] * 2})
    wanted = _wanted(["acme"] * 2, [3] * 2, [float("nan")] * 2)
    np.testing.assert_allclose(found["ctr"], wanted["ctr"], rtol=1e-6)


def _waits(scorer):
    """Each way to wait for an answer."""
    return (
        lambda: scorer.score({"x": [1]}),
        lambda: next(scorer.score_batches([{"x": [1]}])),
        lambda: scorer.inputs("predict_raw"),
        scorer.metadata,
        scorer.status,
        lambda: scorer.score_future({"x": [1]}).result(20),
        lambda: scorer.score_future({"x": [1]}).exception(20),
    )


@pytest.mark.parametrize("hedge", [None, Hedge(10)])
def test_a_callback_that_waits_is_refused(fake, hedge):
    """It would wait for what its own thread has to receive, and the Scorer with it, for good."""
    address, model = fake
    with Scorer(address, "m", hedge=hedge, timeout=20) as scorer:
        scorer.score({"x": [1]})
        # Begun elsewhere, gone on with inside the callback.
        stream = scorer.score_batches([{"x": [1]}])
        errors, later, ended = [], [], threading.Event()

        def callback(future):
            # The result that is there can be had, and another be asked for.
            later.append(future.result()["ctr"].tolist())
            later.append(scorer.score_future({"x": [3]}))
            for wait in (*_waits(scorer), lambda: next(stream)):
                try:
                    wait()
                except Exception as error:
                    errors.append(error)
            ended.set()

        # Of a new version it is not known what it takes: inputs() too has to ask.
        model.set_version(2)
        # Not answered before the callback is there, so that gRPC's thread runs it.
        added = threading.Event()
        model.before = lambda: added.wait(20)
        scorer.score_future({"x": [2]}).add_done_callback(callback)
        added.set()
        assert ended.wait(20)
        assert [type(error) for error in errors] == [UsageError] * 8
        assert "use score_future, or call it in another thread" in str(errors[0])
        assert later[0] == [2]
        assert later[1].result(20)["ctr"].tolist() == [3]
        assert scorer.score({"x": [4]})["ctr"].tolist() == [4]


def test_a_callback_in_the_callers_thread_may_wait(fake):
    """As that of a future which is done already."""
    found = []
    with Scorer(fake[0], "m", timeout=20) as scorer:
        future = scorer.score_future({"x": [1]})
        future.result(20)
        future.add_done_callback(lambda _: found.append(scorer.score({"x": [2]})["ctr"].tolist()))
    assert found == [[2]]


@pytest.mark.parametrize("hedge", [None, Hedge(10)])
def test_a_closed_scorer_says_so(fake, hedge):
    with Scorer(fake[0], "m", hedge=hedge, timeout=20) as scorer:
        scorer.score({"x": [1]})
        stream = scorer.score_batches([{"x": [1]}])
    scorer.close()
    for call in (
        *_waits(scorer)[:-1],
        lambda: asyncio.run(scorer.score_async({"x": [1]})),
        lambda: next(stream),
        lambda: scorer.score_batches([]),
        lambda: scorer.score(None),
        scorer.__enter__,
    ):
        with pytest.raises(UsageError, match="this Scorer is closed: open another one"):
            call()
    assert isinstance(scorer.score_future({"x": [1]}).exception(20), UsageError)


@pytest.mark.parametrize("hedge", [None, Hedge(10)])
def test_a_call_that_runs_when_the_scorer_is_closed(fake, hedge):
    address, model = fake
    release, came = threading.Event(), threading.Event()
    model.before = lambda: came.set() or release.wait(20)
    scorer = Scorer(address, "m", hedge=hedge, timeout=20)
    future = scorer.score_future({"x": [1]})
    assert came.wait(20)
    scorer.close()
    with pytest.raises(UsageError, match="closed"):
        future.result(20)
    release.set()


PROXY = {"http_proxy": "http://user:pass@127.0.0.1:1"}


@pytest.mark.parametrize(
    ("address", "environment", "told"),
    [
        ("model:8500", {}, None),
        ("model:8500", PROXY, "http_proxy=http://127.0.0.1:1"),
        ("dns:///model:8500", PROXY, "http_proxy=http://127.0.0.1:1"),
        ("dns://8.8.8.8/model:8500", PROXY, "http_proxy=http://127.0.0.1:1"),
        ("10.0.0.1", {"https_proxy": "http://p:3128"}, "https_proxy=http://p:3128"),
        ("model:1", PROXY | {"grpc_proxy": "http://p:1"}, "grpc_proxy=http://p:1"),
        # Set, and empty: no proxy. Another scheme: one that gRPC does not speak.
        ("model:1", PROXY | {"grpc_proxy": ""}, None),
        ("model:1", {"https_proxy": "https://p:1"}, None),
        ("a.example:1", PROXY | {"no_proxy": "b.example, .example"}, None),
        ("a.example:1", PROXY | {"no_proxy": "b.example"}, "http_proxy=http://127.0.0.1:1"),
        ("model:1", PROXY | {"no_proxy": "", "no_grpc_proxy": "model"}, None),
        ("localhost:8500", PROXY, None),
    ],
)
def test_the_proxy_that_grpc_uses(monkeypatch, address, environment, told):
    _only_these_proxies(monkeypatch, environment)
    assert connection.proxy(address) == told


def _only_these_proxies(monkeypatch, environment):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("localhost:8500", True),
        ("LOCALHOST", True),
        ("127.0.0.1:8500", True),
        ("127.9.9.9:1", True),
        ("[::1]:8500", True),
        ("dns:///localhost:8500", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv6:[::1]:1", True),
        ("unix:/tmp/socket", True),
        ("unix:///tmp/socket", True),
        ("unix-abstract:name", True),
        ("localhost.example:1", False),
        ("127.example:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("[::2]:1", False),
        ("model:8500", False),
    ],
)
def test_which_addresses_are_local(address, local):
    assert connection.is_local(address) is local


def test_no_proxy_stands_before_a_local_server(fake, monkeypatch):
    _only_these_proxies(monkeypatch, PROXY)
    with Scorer(fake[0], "m", timeout=20) as scorer:
        assert scorer.score({"x": [0.5]})["ctr"].tolist() == [0.5]


def test_an_error_names_the_proxy(monkeypatch):
    _only_these_proxies(monkeypatch, PROXY)
    # An address for documentation: but for the proxy, which is not there, nothing is contacted.
    with (
        Scorer("192.0.2.1:8500", "m", timeout=20) as scorer,
        pytest.raises(ServerUnavailable) as caught,
    ):
        scorer.score({"x": [0.5]})
    assert str(caught.value).endswith(
        "; the connection goes through the proxy of the environment's http_proxy=http://127.0.0.1:1"
    )
    assert "pass" not in str(caught.value)


def _too_large(row):
    error = RequestTooLarge("host:1", "m", 7, grpc.StatusCode.RESOURCE_EXHAUSTED, "2 vs. 1")
    error.row = row
    return error


def test_errors_can_be_sent_to_another_process():
    for error in (
        FeatureError("item", "an integer", row=3, found="x"),
        _too_large(row=3),
        UsageError("closed"),
        ModelNotFound("host:1", "m", "canary", grpc.StatusCode.NOT_FOUND, "two\nlines"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert again.__dict__ == error.__dict__
    assert again.code is grpc.StatusCode.NOT_FOUND


def _client(folder, roots="ours", client=None, **more):
    if client:
        more["private_key"] = folder / f"{client}-client-key.pem"
        more["certificate_chain"] = folder / f"{client}-client.pem"
    return TLS(root_certificates=folder / f"{roots}.pem", **more)


def test_tls(certificates):
    model = FakeModel()
    with serve(model, credentials=server_credentials(certificates, mutual=False)) as port:
        address = f"localhost:{port}"
        with Scorer(address, "m", tls=_client(certificates)) as scorer:
            assert scorer.score({"x": [0.5]})["ctr"].tolist() == [0.5]
        assert model.calls == 1
        for tls in (_client(certificates, roots="stranger"), TLS(), None):
            with (
                Scorer(address, "m", tls=tls) as scorer,
                pytest.raises(ServerUnavailable) as caught,
            ):
                scorer.score({"x": [0.5]})
            assert "\n" not in str(caught.value)
            if tls:
                # gRPC 1.74 may name the other address of localhost, where nobody listens.
                assert re.search("CERTIFICATE_VERIFY_FAILED|refused", str(caught.value))
        assert model.metadata_calls == 1


def test_tls_checks_the_servers_name(certificates):
    model = FakeModel()
    with serve(model, credentials=server_credentials(certificates, "named", mutual=False)) as port:
        address = f"localhost:{port}"
        right = _client(certificates, server_name="model.example")
        with Scorer(address, "m", tls=right) as scorer:
            scorer.score({"x": [0.5]})
        for wrong in (_client(certificates), _client(certificates, server_name="other.example")):
            with Scorer(address, "m", tls=wrong) as scorer, pytest.raises(ServerUnavailable):
                scorer.score({"x": [0.5]})
    assert (model.calls, model.metadata_calls) == (1, 1)


def test_mutual_tls(certificates):
    model = FakeModel()
    with serve(model, credentials=server_credentials(certificates, mutual=True)) as port:
        address = f"localhost:{port}"
        with Scorer(address, "m", tls=_client(certificates, client="ours")) as scorer:
            scorer.score({"x": [0.5]})
        for wrong in (_client(certificates), _client(certificates, client="stranger")):
            with Scorer(address, "m", tls=wrong) as scorer, pytest.raises(ServerUnavailable):
                scorer.score({"x": [0.5]})
    assert (model.calls, model.metadata_calls) == (1, 1)


def test_tls_files_that_are_none(certificates):
    ours, key = certificates / "ours-client.pem", certificates / "ours-client-key.pem"
    for tls, told in (
        (TLS(root_certificates=certificates / "none"), "root_certificates .*none: No such file"),
        (TLS(root_certificates=certificates), "root_certificates .*: Is a directory"),
        (TLS(root_certificates=certificates / "empty.pem"), "empty.pem: found no PEM"),
        (TLS(private_key=key), "go together, found one of them"),
        (TLS(private_key=ours, certificate_chain=ours), "expected a private key without"),
        (
            TLS(private_key=certificates / "stranger-client-key.pem", certificate_chain=ours),
            "the certificate that belongs to it",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            Scorer("localhost:1", "m", tls=tls)
