"""REST: the JSON rules against a model that only looks on, HTTP itself, and the whole server.

The rules are those of tensorflow/serving's util/json_tensor.cc and http_rest_api_handler.cc. Set
REST_ADDRESS to the host:port of a real server that serves the model of serving_model.save(folder,
0.0) as model m, version 7, to hold it to the tests of `TestServer`.
"""

import base64
import contextlib
import gzip
import http.client
import io
import json
import os
import random
import socket
import threading
from concurrent import futures

import numpy as np
import pytest
import serving_model

pytest.importorskip("tensorflow_serving.apis.predict_pb2")
pytest.importorskip("waitress")

import prometheus_client.parser
import tensorflow as tf
from pwiser_serving.server import json_tensors, rest
from pwiser_serving.server.calls import Turns
from pwiser_serving.server.monitoring import Monitoring
from pwiser_serving.server.service import Service
from pwiser_serving.server.status import Status, not_found
from tensorflow.core.example import example_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_status_pb2,
    regression_pb2,
)
from waiting import wait_for

ROWS = [("acme", 3, 0.5), ("zorg", 99, -2.0), ("", -5, 0.0), ("ünbekannt", 0, 30.25)]
WANTED = [serving_model.expected(*row, bias=0.0) for row in ROWS]
F, L, S = tf.float32.as_datatype_enum, tf.int64.as_datatype_enum, tf.string.as_datatype_enum
FREE = 0
# As JSON: with colons, quotes and backslashes; the first two are the same.
STRINGS = [r'"a"', r'"\u0061"', r'"b"', r'""', r'":"', r'"\":"', r'"\\"', r'"\\\":"', r'":\\"']
# TensorFlow's types that TF Serving's JSON does not have.
OTHER_TYPES = ["half", "bfloat16", "float8_e5m2", "complex64", "complex128", "uint16", "int4"]
OTHER_TYPES += ["qint8", "quint8", "qint16", "quint16", "qint32"]


# ---- what a request's JSON becomes


def arrays(body: str | dict, **data_types):
    if not isinstance(body, str):
        body = json.dumps(body)
    return json_tensors.inputs(json_tensors.parse(body.encode()), data_types)


def refusal(body, **data_types) -> str:
    with pytest.raises(Status) as raised:
        arrays(body, **data_types)
    assert raised.value.code.name == "INVALID_ARGUMENT"
    return raised.value.message


def same(found: np.ndarray, wanted, dtype) -> bool:
    wanted = np.array(wanted, dtype)
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and found.tolist() == wanted.tolist()
    )


class TestInputs:
    def test_one_input_takes_bare_values_as_rows(self):
        found, row = arrays({"instances": [1, 2.5, 3]}, x=F)
        assert row
        assert list(found) == ["x"]
        assert same(found["x"], [1, 2.5, 3], np.float32)

    def test_each_row_may_be_a_list_of_any_depth(self):
        found, _ = arrays({"instances": [[[1, 2]], [[3, 4]], [[5, 6]]]}, x=L)
        assert same(found["x"], [[[1, 2]], [[3, 4]], [[5, 6]]], np.int64)

    def test_rows_as_objects(self):
        body = {"instances": [{"a": [1], "b": "x"}, {"b": "ü", "a": [2]}]}
        found, row = arrays(body, a=L, b=S)
        assert row
        assert same(found["a"], [[1], [2]], np.int64)
        assert same(found["b"], [b"x", "ü".encode()], object)

    def test_columns(self):
        found, row = arrays({"inputs": {"a": [[1], [2]], "b": ["x", "y"], "extra": 1}}, a=L, b=S)
        assert not row
        assert list(found) == ["a", "b"]
        assert same(found["a"], [[1], [2]], np.int64)

    def test_one_column_may_come_bare_or_be_a_scalar(self):
        assert same(arrays({"inputs": [1, 2]}, x=L)[0]["x"], [1, 2], np.int64)
        assert same(arrays({"inputs": {"x": [1, 2]}}, x=L)[0]["x"], [1, 2], np.int64)
        assert same(arrays({"inputs": 5}, x=L)[0]["x"], 5, np.int64)

    def test_bytes(self):
        value = {"b64": base64.b64encode(b"\xff\x00").decode()}
        assert same(arrays({"instances": [value, "t"]}, x=S)[0]["x"], [b"\xff\x00", b"t"], object)
        assert same(arrays({"inputs": value}, x=S)[0]["x"], b"\xff\x00", object)
        assert same(arrays({"instances": [{"x": value}]}, x=S)[0]["x"], [b"\xff\x00"], object)
        # Padding may be left out, but not be wrong.
        assert same(arrays({"inputs": {"b64": "/wA"}}, x=S)[0]["x"], b"\xff\x00", object)
        for text in ("/wA==", "/w$", "ü"):
            assert refusal({"inputs": {"b64": text}}, x=S) == "Unable to base64 decode"

    def test_bytes_that_are_no_text_pass_unchanged(self):
        body = b'{"inputs": ["\xff\xfe", "\xc3\xbc"]}'
        found, _ = json_tensors.inputs(json_tensors.parse(body), {"x": S})
        assert same(found["x"], [b"\xff\xfe", b"\xc3\xbc"], object)

    @pytest.mark.parametrize(
        ("name", "value", "wanted"),
        [
            ("float32", 7, 7.0),
            ("float32", 1435774380, 1435774336.0),
            ("float32", 1.7976931348623157e308, float("inf")),
            ("float64", 2**64, 2.0**64),
            ("float64", 0.1, 0.1),
            ("int64", -(2**63), -(2**63)),
            ("int32", 2**31 - 1, 2**31 - 1),
            # The small types keep the lower bits.
            ("int8", 300, 44),
            ("uint8", -1, 255),
            ("int16", 2**16 + 5, 5),
            ("uint32", 2**32 - 1, 2**32 - 1),
            ("uint64", 2**64 - 1, 2**64 - 1),
            ("bool", True, True),
        ],
    )
    def test_numbers_by_data_type(self, name, value, wanted):
        found, _ = arrays({"inputs": [value]}, x=tf.dtypes.as_dtype(name).as_datatype_enum)
        assert same(found["x"], [wanted], name)

    def test_numbers_that_are_none(self):
        found, _ = arrays('{"inputs": [NaN, -NaN, Inf, -Inf, 1, Infinity,-Infinity]}', x=F)
        assert np.isnan(found["x"][:2]).all()
        assert found["x"][2:].tolist() == [np.inf, -np.inf, 1, np.inf, -np.inf]

    def test_names_of_such_numbers_in_strings_stay(self):
        body = r'{"Inf": 0, "inputs": {"a": ["-Inf", "NaN\\", "\"Inf", "Infinity"], "b": [Inf, 2]}}'
        found, _ = arrays(body, a=S, b=F)
        assert same(found["a"], [b"-Inf", b"NaN\\", b'"Inf', b"Infinity"], object)
        assert found["b"].tolist() == [np.inf, 2]

    @pytest.mark.parametrize("text", ["nan", "inf", "-inf", "infinity", "Infinit", "I", "-", "Nan"])
    def test_what_is_no_number(self, text):
        assert "JSON Parse error: " in refusal(f'{{"inputs": [{text}]}}', x=F)

    def test_an_error_is_where_the_body_has_it(self):
        # In bytes: ü and the mark before the document have 2 and 3.
        for before in ("", "\ufeff"):
            for text in ("Inf", "-NaN", '"ü"'):
                body = f'{before}{{"inputs": [{text}, x]}}'
                place = body.encode().index(b"x")
                assert refusal(body, x=F).endswith(f" at offset: {place}")

    @pytest.mark.parametrize(
        "number", ["1e400", "-1e400", "1.8e308", "9" * 400, "-" + "9" * 400, "9" * 5000]
    )
    def test_a_number_too_big_for_a_double(self, number):
        words = "JSON Parse error: Number too big to be stored in double. at offset:"
        body = f'{{"inputs": ["{number}", 1, Inf, {number}, {number}]}}'
        place = body.index(f", {number}") + 2
        assert refusal(body, x=F) == f"{words} {place}"
        # Also where nothing reads it.
        assert refusal(f'{{"n": {number}, "inputs": [1]}}', x=F) == f"{words} 6"

    @pytest.mark.parametrize(
        ("name", "value", "quoted"),
        [
            ("int64", "1.0", "1.0 Type: Number"),
            ("int64", "9223372036854775808", "9223372036854775808 Type: Number"),
            ("int32", "2147483648", "2147483648 Type: Number"),
            ("uint8", "true", "true Type: True"),
            ("uint32", "-1", "-1 Type: Number"),
            # What 64 bits do not hold is a double.
            ("uint64", "18446744073709551616", "1.8446744073709552e+19 Type: Number"),
            ("uint64", "-1", "-1 Type: Number"),
            ("uint64", "1.0", "1.0 Type: Number"),
            ("int64", "[null]", "null Type: Null"),
            ("float", "true", "true Type: True"),
            ("float", "false", "false Type: False"),
            ("double", '"1"', '"1" Type: String'),
            ("bool", "0", "0 Type: Number"),
            ("string", "null", "null Type: Null"),
            ("string", "1", "1 Type: Number"),
            ("float", '{"b64": "eA=="}', '{\n    "b64": "eA=="\n} Type: Object'),
        ],
    )
    def test_values_of_another_type(self, name, value, quoted):
        data_type = tf.dtypes.as_dtype(name).as_datatype_enum
        message = f"JSON Value: {quoted} is not of expected type: {name}"
        assert refusal(f'{{"inputs": [{value}]}}', x=data_type) == message
        place = "Failed to process element: 0 of 'instances' list."
        in_rows = f"{place} Error: INVALID_ARGUMENT: {message}"
        assert refusal(f'{{"instances": [{value}]}}', x=data_type) == in_rows

    @pytest.mark.parametrize("name", OTHER_TYPES)
    def test_a_type_that_json_does_not_give(self, name):
        data_type = tf.dtypes.as_dtype(name).as_datatype_enum
        message = f"Conversion of JSON Value: 1 to type: {name}"
        assert refusal({"inputs": [1]}, x=data_type) == message
        assert refusal({"instances": [{"x": 1, "y": 2}]}, x=data_type, y=L) == (
            "Failed to process element: 0 key: x of 'instances' list. "
            f"Error: INVALID_ARGUMENT: {message}"
        )

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            # The first elements tell the shape.
            ([1, [2]], "Encountered list at unexpected level: 1 expected < 1"),
            (
                [[1], 2],
                "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
            ),
            (
                [[1, 2], [3]],
                "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
            ),
            ([[], [1]], "Encountered list at unexpected size: 1 at level: 1 expected size: 0"),
        ],
    )
    def test_lists_that_are_no_tensor(self, value, message):
        assert refusal({"inputs": value}, x=L) == message
        assert refusal({"inputs": {"x": value}}, x=L) == message

    @pytest.mark.parametrize(
        ("rows", "place", "message"),
        [
            ([[1], [1, 2]], "", "Expecting tensor size: 1 but got: 2"),
            ([[[1, 2]], [[1], [2]]], "", "Expecting shape [1,2] but got: [2,1]"),
            ([{"x": 1}, {"y": 1}], " key: y", "JSON object: does not have named input: y"),
        ],
    )
    def test_rows_that_do_not_fit_each_other(self, rows, place, message):
        assert refusal({"instances": rows}, x=L) == (
            f"Failed to process element: 1{place} of 'instances' list. "
            f"Error: INVALID_ARGUMENT: {message}"
        )

    def test_a_row_that_lacks_an_input(self):
        assert refusal({"instances": [{"x": 1, "y": 2}, {"x": 1}]}, x=L, y=L) == (
            "Failed to process element: 1 of 'instances' list. "
            'JSON object: {\n    "x": 1\n} keys must be equal to: x,y'
        )

    def test_rows_of_several_kinds(self):
        assert (
            refusal({"instances": [{"x": 1}, 2]}, x=L)
            == "Expecting object but got list at item 1 of input list"
        )
        assert (
            refusal({"instances": [1, {"x": 2}]}, x=L)
            == "Expecting value/list but got object at item 1 of input list"
        )
        assert refusal({"instances": [1]}, x=L, y=L).startswith(
            "instances is a plain list, but expecting list of objects as multiple input tensors"
        )
        assert refusal({"inputs": [1]}, x=L, y=L).startswith(
            "inputs is a plain value/list, but expecting an object as multiple input tensors"
        )
        assert (
            refusal({"inputs": {"x": 1}}, x=L, y=L) == "Missing named input: y in 'inputs' object."
        )

    def test_the_document(self):
        quoted = 'JSON Value: {\n    "instances": [],\n    "n": 1\n}'
        assert refusal({"instances": [], "n": 1}, x=L) == f"{quoted} No values in 'instances' array"
        assert refusal({"instances": 1}, x=L).endswith(" Expecting 'instances' to be an list/array")
        assert "expecting only one of 'inputs' or 'instances'" in refusal(
            {"instances": [1], "inputs": [1]}, x=L
        )
        assert refusal({}, x=L) == "Missing 'inputs' or 'instances' key"
        assert refusal("[1, 2]", x=L) == "JSON Value: [1, 2] Is not object"
        assert refusal({"inputs": [1]}) == "Failed to get input map for signature: DEFAULT"
        for body in ("", " \n"):
            assert refusal(body, x=L) == "JSON Parse error: The document is empty"
        assert refusal('{"inputs": tru}', x=L).endswith(" at offset: 11")
        # What follows the document is ignored.
        assert same(arrays('{"inputs": [1]} trailing', x=L)[0]["x"], [1], np.int64)
        assert same(arrays('\ufeff{"inputs": [1]}', x=L)[0]["x"], [1], np.int64)

    def test_a_long_value_is_cut_in_the_message(self):
        message = refusal({"inputs": {"x": ["a"] * 100_000, "z": 1}, "instances": 1}, x=L)
        assert len(message) < 400

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("[" * 100_000, "nested too deeply"),
            ('{"inputs": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
            ('{"inputs": ' + "[" * 700 + "]" * 700 + "}", "tensor parsing error: x"),
            ('{"inputs": ' + "[" * 700 + "1, []" + "]" * 700 + "}", ""),
            ('{"a":' * 100_000, "nested too deeply"),
            (r'{"inputs": ["\ud800"]}', "is not of expected type"),
            ("nul", "JSON Parse error"),
            ('{"inputs": ["', "JSON Parse error"),
        ],
    )
    def test_hostile_documents(self, body, message):
        assert message in refusal(body, x=L)

    def test_half_a_surrogate_pair_is_no_string(self):
        assert "surrogate pair" in refusal(r'{"inputs": ["\ud800"]}', x=S)

    @pytest.mark.parametrize(
        "body",
        [
            '{"inputs": [1], "inputs": [2]}',
            '{"instances": [{"x": 1}, {"x": 1, "x": 1}]}',
            '{"instances": [{"x": {"b64": "", "b64": ""}}]}',
            # What is lost with the first value counts too.
            '{"inputs": {"x": [1]}, "inputs": [2]}',
            '{"inputs": [1], "y": [[{"a": [], "a": []}]]}',
            r'{"inputs": [1], "a": 1, "\u0061": 2}',
            r'{"inputs": [1], "a\"": 1, "a\"": 2}',
            r'{"inputs": [1], "\\": 1, "\\": 2}',
            r'{"inputs": [1], "\\\"": 1, "\\\"": 2}',
            # A colon that is missing in a key must not stand for one in a string.
            '{"inputs": [1], ":": 1, ":": 2}',
            '{"inputs": [1], "a": ":", "a" : "::"}',
            '{"inputs": [NaN], "a": 1, "a": 2}',
        ],
    )
    def test_a_key_that_occurs_twice(self, body):
        assert refusal(body, x=F) == "JSON Parse error: a key occurs twice in an object"

    def test_a_key_counts_as_twice_only_within_one_object(self):
        def text(draw, depth):
            kind = draw.choice(["string", "number", "list", "object"] if depth else ["string"])
            if kind == "number":
                return draw.choice(["1", "-2.5e3", "null", "true"])
            if kind == "string":
                return draw.choice(STRINGS)
            values = [text(draw, depth - 1) for _ in range(draw.randint(0, 3))]
            if kind == "list":
                return f"[{','.join(values)}]"
            return "{" + ",".join(f"{draw.choice(STRINGS)}:{value}" for value in values) + "}"

        def unique(pairs):
            twice.append(len(dict(pairs)) < len(pairs))
            return dict(pairs)

        draw = random.Random(3)
        refused = accepted = 0
        for _ in range(3000):
            body, twice = f'{{"x":{text(draw, 4)}}}', []
            document = json.loads(body, object_pairs_hook=unique)
            if any(twice):
                with pytest.raises(Status, match="a key occurs twice in an object"):
                    json_tensors.parse(body.encode())
                refused += 1
            else:
                assert json_tensors.parse(body.encode()) == document
                accepted += 1
        assert refused > 100
        assert accepted > 1000

    def test_signature_name(self):
        assert json_tensors.signature_name({"signature_name": "a"}) == "a"
        assert json_tensors.signature_name({}) == ""
        with pytest.raises(Status, match="'signature_name' key must be a string"):
            json_tensors.signature_name({"signature_name": 100})


class TestExamples:
    def found(self, body) -> list[example_pb2.Example]:
        return json_tensors.examples(json_tensors.parse(json.dumps(body).encode()))

    def test_kinds_by_their_values(self):
        body = {"examples": [{"f": 1.5, "i": [1, True], "s": ["a", {"b64": "/w=="}], "e": []}]}
        (example,) = self.found(body).example_list.examples
        feature = example.features.feature
        assert feature["f"].float_list.value == [1.5]
        assert feature["i"].int64_list.value == [1, 1]
        assert feature["s"].bytes_list.value == [b"a", b"\xff"]
        assert feature["e"].WhichOneof("kind") is None

    def test_context(self):
        found = self.found({"context": {"c": 1}, "examples": [{}, {}]}).example_list_with_context
        assert found.context.features.feature["c"].int64_list.value == [1]
        assert len(found.examples) == 2

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({}, "When method is classify, key 'examples' is expected and was not found"),
            ({"examples": 1}, "Expecting 'examples' value to be an list/array"),
            ({"examples": []}, "'examples' value is an empty array"),
            ({"examples": [1]}, "Example must be JSON object but got JSON Number"),
            ({"examples": [{}], "context": []}, "Example must be JSON object but got JSON Array"),
            (
                {"examples": [{"x": None}]},
                "Feature: x has element with unexpected JSON type: Null",
            ),
            (
                {"examples": [{"x": [[1]]}]},
                "Feature: x has element with unexpected JSON type: Array",
            ),
            (
                {"examples": [{"x": {"y": 1}}]},
                "Feature: x has element with unexpected JSON type: Object",
            ),
            (
                {"examples": [{"x": [1.5, 1]}]},
                "Unexpected element type in feature: x expecting type: float",
            ),
            (
                {"examples": [{"x": [1, "a"]}]},
                "Unexpected element type in feature: x expecting type: int64",
            ),
            (
                {"examples": [{"x": 2**63}]},
                "Feature: x has uint64_t element. Only int64_t is supported.",
            ),
        ],
    )
    def test_refusals(self, body, message):
        with pytest.raises(Status) as raised:
            self.found(body)
        assert raised.value.message.endswith(message)


class TestAnswers:
    def rows(self, **outputs) -> str:
        return json_tensors.predictions(outputs, row=True).decode()

    def columns(self, **outputs) -> str:
        return json_tensors.predictions(outputs, row=False).decode()

    def test_rows_of_one_output(self):
        # The last line's break is TF Serving's.
        text = self.rows(y=np.array([2.5, 3, 4.5], np.float32))
        assert text == '{\n    "predictions": [2.5, 3.0, 4.5\n    ]\n}'

    def test_rows_of_several_outputs(self):
        text = self.rows(a=np.array([1, 2]), b=np.array([[1.5, 0], [2, 3]]))
        assert text == (
            '{\n    "predictions": [\n        {\n            "a": 1,\n            "b": [1.5, 0.0]\n'
            '        },\n        {\n            "a": 2,\n            "b": [2.0, 3.0]\n        }\n'
            "    ]\n}"
        )

    def test_columns(self):
        assert self.columns(y=np.array([1, 2])) == (
            '{\n    "outputs": [\n        1,\n        2\n    ]\n}'
        )
        assert self.columns(y=np.array(1)) == '{\n    "outputs": 1\n}'
        found = json.loads(self.columns(a=np.array([[1], [2]]), b=np.zeros([2, 0]), c=np.array(1)))
        assert found == {"outputs": {"a": [[1], [2]], "b": [[], []], "c": 1}}

    def test_no_rows(self):
        assert json.loads(self.rows(y=np.zeros([0, 3]))) == {"predictions": []}
        assert json.loads(self.rows(y=np.zeros(0), z=np.zeros(0))) == {"predictions": []}
        assert json.loads(self.rows(y=np.zeros([2, 0, 3]))) == {"predictions": [[], []]}
        assert json.loads(self.rows(y=np.zeros([2, 2, 0]))) == {"predictions": [[[], []]] * 2}

    def test_a_deep_array_keeps_its_order(self):
        array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
        assert json.loads(self.rows(y=array))["predictions"] == array.tolist()
        assert json.loads(self.columns(y=array))["outputs"] == array.tolist()

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.2, "0.2"),
            (1 / 3, "0.333333343"),
            (1.0, "1.0"),
            (9e6, "9e+06"),
            (3e-5, "3e-05"),
            (16777216, "16777216.0"),
            (-0.0, "-0.0"),
            (float("nan"), "NaN"),
            (float("inf"), "Infinity"),
            (float("-inf"), "-Infinity"),
            (1.1754944e-38, "1.17549435e-38"),
        ],
    )
    def test_floats_have_six_digits_or_all(self, value, text):
        assert self.columns(y=np.float32([value])).split()[-3] == text

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_digits_by_the_plain_rule(self, dtype):
        draw = np.random.default_rng(2)
        size = np.dtype(dtype).itemsize
        exact = draw.integers(-999_999, 999_999, 5000) * 10.0 ** draw.integers(-12, 12, 5000)
        numbers = np.concatenate(
            [
                exact.astype(dtype),
                np.nextafter(exact.astype(dtype), dtype(1)),
                np.frombuffer(draw.bytes(5000 * size), dtype),
                dtype(2) ** np.arange(-149, 127, dtype=dtype),
            ]
        )
        numbers = numbers[np.isfinite(numbers)]

        def plain(number):
            text = f"{number:.6g}"
            if dtype(text) != number:
                text = f"{number:.{9 if size == 4 else 17}g}"
            return text if "." in text or "e" in text else text + ".0"

        lines = self.columns(y=numbers).splitlines()[2:-2]
        assert [line.strip(" ,") for line in lines] == [plain(number) for number in numbers]

    def test_doubles(self):
        lines = self.columns(y=np.array([0.1, 1 / 3])).split()
        assert lines[3:5] == ["0.1,", "0.33333333333333331"]

    def test_every_float_comes_back(self):
        numbers = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32).view(np.float32)
        numbers = numbers[np.isfinite(numbers)]
        found = json.loads(self.columns(y=numbers))["outputs"]
        assert (np.array(found, np.float32) == numbers).all()

    def test_strings_booleans_and_bytes(self):
        strings = np.array([b'a"\n', "ü".encode()], object)
        assert json.loads(self.rows(y=strings)) == {"predictions": ['a"\n', "ü"]}
        assert json.loads(self.rows(y_bytes=strings[:1])) == {"predictions": [{"b64": "YSIK"}]}
        assert json.loads(self.rows(y=np.array([True, False]))) == {"predictions": [True, False]}
        invalid = json_tensors.predictions({"y": np.array([b"\xff"], object)}, row=True)
        assert b'"\xff"' in invalid

    def test_a_name_with_a_percent_sign(self):
        found = json.loads(self.rows(**{"a%s": np.array([1]), "b": np.array([2])}))
        assert found == {"predictions": [{"a%s": 1, "b": 2}]}

    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            ({}, "Cannot convert empty tensor map to JSON"),
            ({"y": np.array(1)}, "Tensor name: y has no shape information "),
            (
                {"y": np.zeros(2), "z": np.zeros(3)},
                "Tensor name: z has inconsistent batch size: 3 expecting: 2",
            ),
        ],
    )
    def test_outputs_that_json_cannot_hold(self, outputs, message):
        with pytest.raises(Status) as raised:
            json_tensors.predictions(outputs, row=True)
        assert raised.value.message == message

    @pytest.mark.parametrize("name", OTHER_TYPES)
    def test_types_that_json_does_not_hold(self, name):
        array = np.zeros(2, tf.dtypes.as_dtype(name).as_numpy_dtype)
        for row in (True, False):
            with pytest.raises(Status) as raised:
                json_tensors.predictions({"y": array}, row=row)
            assert raised.value.code.name == "INVALID_ARGUMENT"
            assert raised.value.message == f"Failed to write JSON value for tensor type: {name}"

    def test_classes_and_regressions(self):
        result = classification_pb2.ClassificationResult()
        for scores in ([("a", 0.5), ("b", 2.0)], [("", 12.0)]):
            row = result.classifications.add()
            for label, score in scores:
                row.classes.add(label=label, score=score)
        assert json_tensors.classifications(result) == (
            b'{\n    "results": [[["a", 0.5], ["b", 2.0]], [["", 12.0]]\n    ]\n}'
        )
        result = regression_pb2.RegressionResult()
        result.regressions.add(value=42)
        result.regressions.add(value=0.1)
        assert json_tensors.regressions(result) == b'{\n    "results": [42.0, 0.1]\n}'


# ---- HTTP, with a model that only looks on


class Echo:
    """A servable that gives its inputs back, twice the number; and waits where a test asks."""

    def __init__(self):
        self.signatures = {"serving_default": meta_graph_pb2.SignatureDef()}
        self.signatures["serving_default"].inputs["x"].dtype = F
        self.running, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.fault = None

    def predict(self, name, inputs, call):
        self.running.set()
        assert self.go_on.wait(20)
        if self.fault is not None:
            raise self.fault
        return {"y": inputs["x"] * 2}

    def classify(self, name, given, call):
        result = classification_pb2.ClassificationResult()
        for example in given.example_list.examples:
            for value in example.features.feature["x"].float_list.value:
                result.classifications.add().classes.add(label=name, score=value)
        return result

    def regress(self, name, given, call):
        result = regression_pb2.RegressionResult()
        for example in given.example_list.examples:
            result.regressions.add(value=example.features.feature["x"].float_list.value[0])
        return result


class OneModel:
    """Models with model "m", version 7, label "stable", alone."""

    def __init__(self):
        self.model = Echo()

    @contextlib.contextmanager
    def use(self, name, version=None, label=None):
        if (name, version or 7, label or "stable") != ("m", 7, "stable"):
            raise not_found("Servable not found for request")
        yield 7, self.model

    def statuses(self, name, version=None):
        status = get_model_status_pb2.ModelVersionStatus(version=7, state=30)
        status.status.SetInParent()
        if name != "m":
            raise not_found(f"Could not find any versions of model {name}")
        return [status]


def application(models, monitoring, calls, **options):
    """The WSGI application in front of the models, for two requests at a time."""
    service = Service(models, monitoring, Turns(2))
    options = {"max_bytes": 100_000} | options
    return rest.Application(models, service, monitoring, Turns(2), calls, **options)


class Site:
    """A running HTTP server in front of OneModel, and calls to it."""

    def __init__(self, seconds=20, **options):
        self.models, self.monitoring = OneModel(), Monitoring()
        calls = rest.Calls(seconds)
        options = {"monitoring_path": "/metrics"} | options
        wsgi = application(self.models, self.monitoring, calls, **options)
        self.server = rest.Server(wsgi, calls, FREE, max_bytes=100_000)
        self.server.start()

    def call(self, method, path, body=None, headers=None, **options):
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers or {}, **options)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def connect(self):
        return http.client.HTTPConnection("localhost", self.server.port, timeout=20)

    def predict(self, body=b'{"instances": [1]}', path="/v1/models/m:predict", **options):
        status, _, answer = self.call("POST", path, body, **options)
        return status, json.loads(answer)

    def socket(self):
        return socket.create_connection(("localhost", self.server.port), timeout=20)


@pytest.fixture(scope="module")
def site():
    site = Site()
    yield site
    site.server.stop(1)


class TestHttp:
    @pytest.mark.parametrize(
        "path",
        [
            "/v1/models/m:predict",
            "/v1/models/m/versions/7:predict",
            "/v1/models/m/labels/stable:predict",
            "/V1/MODELS/%6d/Labels/st%61ble:predict",
            "http://localhost/v1/models/m:predict",
        ],
    )
    def test_paths_that_name_the_model(self, site, path):
        assert site.predict(path=path) == (200, {"predictions": [2.0]})

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/v1/foo"),
            ("POST", "/v1/foo"),
            ("GET", "/v1/models/debug/model_name"),
            ("POST", "/v1/models"),
            ("GET", "/v1/models/m:predict"),
            ("POST", "/v1/models/m:PREDICT"),
            ("POST", "/v1/models/m/version/7:predict"),
            ("POST", "/v1/models/m/versions/HELLO:predict"),
            ("POST", "/v1/models/m/versions/7/labels/stable:predict"),
            ("POST", "/v1/models/m/metadata"),
            ("POST", "/v1/models/m:predict?query"),
            ("DELETE", "/v1/models/m"),
            ("PUT", "/v1/models/m:predict"),
        ],
    )
    def test_malformed_requests(self, site, method, path):
        status, headers, body = site.call(method, path, "{}")
        assert status == 400
        assert headers["Content-Type"] == "application/json"
        assert json.loads(body) == {"error": f"Malformed request: {method} {path}"}

    def test_classify_and_regress(self, site):
        body = b'{"examples": [{"x": 1.5}, {"x": [2.5]}]}'
        found = site.predict(body, path="/v1/models/m:classify")
        assert found == (200, {"results": [[["serving_default", 1.5]], [["serving_default", 2.5]]]})
        body = b'{"signature_name": "s", "examples": [{"x": 1.5}, {"x": [2.5]}]}'
        found = site.predict(body, path="/v1/models/m/versions/7:regress")
        assert found == (200, {"results": [1.5, 2.5]})
        assert site.predict(body, path="/v1/models/x:regress")[0] == 404
        status, answer = site.predict(b'{"examples": []}', path="/v1/models/m:classify")
        assert (status, "is an empty array" in answer["error"]) == (400, True)

    def test_what_is_not_there(self, site):
        assert site.predict(path="/v1/models/x:predict")[0] == 404
        assert site.predict(path="/v1/models/m/versions/8:predict")[0] == 404
        assert site.call("GET", "/")[0] == 404
        status, _, body = site.call("GET", "/v1/models")
        assert (status, json.loads(body)) == (400, {"error": "Missing model name in request."})
        version = "9223372036854775808"
        assert site.predict(path=f"/v1/models/m/versions/{version}:predict") == (
            400,
            {"error": f"Failed to convert version: {version} to numeric."},
        )

    def test_the_body_is_read_before_the_model_is_sought(self, site):
        assert site.predict(b"{", path="/v1/models/x:predict")[0] == 400

    def test_head_has_no_body(self, site):
        status, _, body = site.call("HEAD", "/v1/models/m")
        assert (status, body) == (400, b"")

    def test_the_server_does_not_say_what_it_is(self, site):
        _, headers, _ = site.call("GET", "/v1/models/m")
        assert "Server" not in headers
        assert "Via" not in headers

    def test_one_connection_takes_many_requests(self, site):
        with contextlib.closing(site.connect()) as connection:
            for number in range(3):
                connection.request("POST", "/v1/models/m:predict", f'{{"instances": [{number}]}}')
                answer = connection.getresponse()
                assert json.load(answer) == {"predictions": [2.0 * number]}
                assert not answer.will_close

    def test_a_body_in_chunks(self, site):
        pieces = iter([b'{"instances"', b": [1", b", 2]}"])
        assert site.predict(
            pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        ) == (
            200,
            {"predictions": [2.0, 4.0]},
        )

    def test_a_body_in_gzip(self, site):
        headers = {"Content-Encoding": "gzip"}
        packed = gzip.compress(b'{"instances": [3]}')
        assert site.predict(packed, headers=headers) == (200, {"predictions": [6.0]})
        for wrong in (b"no gzip", packed[:-5], gzip.compress(b" " * 1_000_000)):
            status, answer = site.predict(wrong, headers=headers)
            assert status == 400
            assert answer["error"].startswith("Failed to uncompress the gzipped body")

    def test_a_body_that_is_too_large(self, site):
        body = b'{"instances": [' + b"1," * 100_000 + b"1]}"
        with contextlib.suppress(ConnectionError):
            assert site.call("POST", "/v1/models/m:predict", body)[0] == 413
        pieces = iter([body])
        with contextlib.suppress(ConnectionError):
            assert site.call("POST", "/v1/models/m:predict", pieces, encode_chunked=True)[0] == 413
        assert site.predict() == (200, {"predictions": [2.0]})

    @pytest.mark.parametrize(
        "text",
        [
            b"GARBAGE\r\n\r\n",
            b"POST /v1/models/m:predict HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            b"POST /v1/models/m:predict HTTP/1.1\r\nTransfer-Encoding: rot13\r\n\r\n",
            b"POST /v1/models/m:predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /v1/models/\xff\xfe HTTP/1.1\r\n\r\n",
            b"GET /v1/models/%ff%00 HTTP/1.1\r\n\r\n",
            b"GET http://[/v1/ HTTP/1.1\r\n\r\n",
            b"GET /" + b"x" * 400_000 + b" HTTP/1.1\r\n\r\n",
        ],
    )
    def test_bytes_that_are_no_good_request(self, site, text):
        with site.socket() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            line = connection.makefile("rb").readline()
            assert not line or int(line.split()[1]) in (400, 404, 431, 501)
        assert site.predict() == (200, {"predictions": [2.0]})

    def test_a_client_that_goes_away_disturbs_nobody(self, site):
        for _ in range(20):
            with site.socket() as connection:
                connection.sendall(
                    b"POST /v1/models/m:predict HTTP/1.1\r\nContent-Length: 18\r\n\r\n"
                )
                connection.sendall(b'{"instances": [1]}')
        assert site.predict() == (200, {"predictions": [2.0]})

    @pytest.mark.parametrize(
        ("fault", "status"),
        [
            (Status(8, "full"), 429),
            (Status(14, "away"), 503),
            (Status(13, "broken"), 500),
            (Status(15, "lost"), 500),
            (KeyError("a fault\nin two lines"), 500),
        ],
    )
    def test_faults_of_the_model(self, site, fault, status):
        site.models.model.fault = fault
        try:
            found, answer = site.predict()
        finally:
            site.models.model.fault = None
        assert found == status
        assert list(answer) == ["error"]
        assert "\n" not in answer["error"]

    def test_mutated_bodies_never_fail_the_server(self, site):
        draw = random.Random(5)
        good = [
            b'{"signature_name": "serving_default", "instances": [[1.5, 2], [3, -4e3]]}',
            b'{"inputs": {"x": [[1], [NaN], [{"b64": "AA=="}]]}}',
            b'{"instances": [{"x": 1}, {"x": true}], "\\u00fc": null, "y": {"a": [{}, []]}}',
        ]
        pieces = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\u", b"1e999", b"-", b"\xff", b"\0"]
        answering = application(site.models, site.monitoring, rest.Calls(None))
        found = set()
        for _ in range(3000):
            body = bytearray(draw.choice(good))
            for _ in range(draw.randint(1, 6)):
                place = draw.randrange(len(body) + 1)
                body[place : place + draw.randint(0, 3)] = draw.choice(pieces)
            status, answer = wsgi(answering, bytes(body))
            found.add(status)
            assert status in (200, 400), (bytes(body), answer)
            json.loads(answer.decode("utf-8", "replace"))
        assert found == {200, 400}


def wsgi(application, body: bytes, path="/v1/models/m:predict") -> tuple[int, bytes]:
    """A call without a socket."""
    lines = []
    environ = {
        "REQUEST_METHOD": "POST",
        "REQUEST_URI": path,
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "waitress.client_disconnected": lambda: False,
    }
    answer = b"".join(application(environ, lambda line, headers: lines.append(line)))
    return int(lines[0].split()[0]), answer


def test_requests_are_counted_under_their_names(site):
    def counts():
        text = site.call("GET", "/metrics")[2].decode()
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in prometheus_client.parser.text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = counts()
    site.predict()
    site.predict(b"{")
    site.predict(path="/v1/models/other:predict")
    site.call("GET", "/v1/models/m")
    after = counts()

    def more(*key):
        return after.get(key, 0) - before.get(key, 0)

    count = ":tensorflow:serving:request_count_total"
    assert more(count, "OK", "m") == 2
    assert more(count, "INVALID_ARGUMENT", "m") == 1
    assert more(count, "NOT_FOUND", "other") == 1
    latency = ":tensorflow:serving:request_latency_count"
    assert more(latency, "REST", "m", "predict") == 1
    assert more(latency, "", "REST", "m") == 1
    assert more(":tensorflow:serving:runtime_latency_count", "Predict", "TF1", "m") == 1


def test_the_metrics_path_is_there_only_where_it_is_asked_for(site):
    status, headers, _ = site.call("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    bare = application(site.models, site.monitoring, rest.Calls(None), max_bytes=1)
    assert wsgi(bare, b"", "/metrics")[0] == 404


def test_a_browser_may_ask_whether_it_may_ask():
    for cors in (False, True):
        site = Site(cors=cors)
        path, origin = "/v1/models/m:predict", {"Origin": "http://example.com"}
        allowed = {"*"} if cors else set()
        status, headers, body = site.call("OPTIONS", path, None, origin)
        assert (status, body) == (200, b"")
        assert set(headers.get_all("Access-Control-Allow-Origin", [])) == allowed
        assert headers["Access-Control-Allow-Methods"] == ("POST, GET" if cors else None)
        # On an answer too, or the page could not read it; but not on the metrics.
        _, headers, _ = site.call("POST", path, b'{"instances": [1]}', origin)
        assert set(headers.get_all("Access-Control-Allow-Origin", [])) == allowed
        assert "Access-Control-Allow-Origin" not in site.call("GET", "/metrics")[1]
        status, _, body = site.call("OPTIONS", path)
        assert status == 400
        assert json.loads(body) == {"error": "Origin header is missing in CORS preflight"}
        site.server.stop(5)


def test_requests_wait_for_their_turn_and_for_no_other_models(site):
    model = site.models.model
    model.go_on.clear()
    with futures.ThreadPoolExecutor(5) as pool:
        # Two at a time run; the others wait.
        answers = [pool.submit(site.predict) for _ in range(4)]
        assert model.running.wait(20)
        # Another model, here one that is not there, is answered.
        assert site.predict(path="/v1/models/other:predict")[0] == 404
        assert site.call("GET", "/v1/models/m")[0] == 200
        assert not any(answer.done() for answer in answers)
        model.go_on.set()
        assert [answer.result()[0] for answer in answers] == [200] * 4


def test_a_stop_answers_what_runs_and_takes_nothing_new():
    site = Site()
    model = site.models.model
    model.go_on.clear()
    answers = []
    caller = threading.Thread(target=lambda: answers.append(site.predict()))
    caller.start()
    assert model.running.wait(20)
    idle = site.socket()
    stopper = threading.Thread(target=site.server.stop, args=(20,))
    stopper.start()

    def refuses():
        try:
            site.socket().close()
        except ConnectionRefusedError:
            return True

    # The listening socket is closed while the request still runs, and so is an idle connection.
    wait_for(refuses)
    assert idle.recv(1) == b""
    idle.close()
    assert stopper.is_alive()
    model.go_on.set()
    stopper.join(20)
    caller.join(20)
    assert not stopper.is_alive()
    assert answers == [(200, {"predictions": [2.0]})]


def test_a_stop_waits_no_longer_than_told():
    site = Site()
    site.models.model.go_on.clear()
    with site.socket() as connection:
        body = b'{"instances": [1]}'
        connection.sendall(
            b"POST /v1/models/m:predict HTTP/1.1\r\nContent-Length: 18\r\n\r\n" + body
        )
        assert site.models.model.running.wait(20)
        site.server.stop(0.2)
        assert connection.recv(1) == b""
    site.models.model.go_on.set()


def test_a_port_in_use_is_told(site):
    with pytest.raises(OSError, match="in use"):
        rest.Server(print, rest.Calls(None), site.server.port, max_bytes=1)


# ---- the whole server


@pytest.fixture(scope="module")
def running(models, start_server, tmp_path_factory):
    """A server of model m, version 7, with REST and metrics."""
    folder = tmp_path_factory.mktemp("rest")
    os.makedirs(folder / "base")
    os.symlink(models[0.0], folder / "base" / "7")
    config = folder / "monitoring.config"
    config.write_text('prometheus_config { enable: true path: "/numbers" }')
    with socket.socket() as free:
        free.bind(("0.0.0.0", 0))
        port = free.getsockname()[1]
    flags = (f"--rest_api_port={port}", f"--monitoring_config_file={config}")
    with start_server(folder / "base", *flags) as server:
        server.rest_address = f"localhost:{port}"
        yield server


@pytest.fixture(scope="module")
def ask(request):
    """A function from a method, a path below /v1/models/m and a body to (status, JSON)."""
    address = os.environ.get("REST_ADDRESS") or request.getfixturevalue("running").rest_address
    with contextlib.closing(http.client.HTTPConnection(address, timeout=20)) as connection:

        def ask(method, path, body=None):
            connection.request(method, "/v1/models/m" + path, body and json.dumps(body))
            response = connection.getresponse()
            return response.status, json.load(response)

        yield ask


def example(brand: str, item: int, price: float) -> bytes:
    result = example_pb2.Example()
    feature = result.features.feature
    feature["brand"].bytes_list.value.append(brand.encode())
    feature["item"].int64_list.value.append(item)
    feature["price"].float_list.value.append(price)
    return result.SerializeToString()


RAW = [dict(zip(("brand", "item", "price"), row, strict=True)) for row in ROWS]
COLUMNS = {name: [row[name] for row in RAW] for name in RAW[0]}


class TestServer:
    """What any TF Serving answers."""

    def raw(self, **change):
        return {"signature_name": "predict_raw", **change}

    def check(self, rows):
        assert len(rows) == len(WANTED)
        for row, wanted in zip(rows, WANTED, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)

    @pytest.mark.parametrize("path", [":predict", "/versions/7:predict"])
    def test_rows(self, ask, path):
        status, answer = ask("POST", path, self.raw(instances=RAW))
        assert status == 200
        assert list(answer) == ["predictions"]
        self.check(answer["predictions"])

    def test_columns(self, ask):
        status, answer = ask("POST", ":predict", self.raw(inputs=COLUMNS))
        assert status == 200
        assert list(answer) == ["outputs"]
        names = list(answer["outputs"])
        values = zip(*answer["outputs"].values(), strict=True)
        self.check([dict(zip(names, row, strict=True)) for row in values])

    def test_ids(self, ask):
        # As ids: acme is 1, zorg 2, an unknown brand 0.
        brands = {"acme": 1, "zorg": 2}
        rows = [
            {"categorical": [brands.get(brand, 0), item], "numerical": [price]}
            for brand, item, price in ROWS
        ]
        status, answer = ask("POST", ":predict", {"signature_name": "predict", "instances": rows})
        assert status == 200
        self.check(answer["predictions"])

    def test_examples_as_bytes(self, ask):
        rows = [{"b64": base64.b64encode(example(*row)).decode()} for row in ROWS]
        self.check(ask("POST", ":predict", {"instances": rows})[1]["predictions"])

    @pytest.mark.parametrize(
        ("path", "body", "status", "message"),
        [
            (
                ":predict",
                {"signature_name": "x", "instances": [1]},
                400,
                'Serving signature name: "x" not found in signature def',
            ),
            (
                "/versions/8:predict",
                {"instances": [1]},
                404,
                "Servable not found for request: Specific(m, 8)",
            ),
            (
                "/labels/x:predict",
                {"instances": [1]},
                400,
                "Unrecognized servable version label: x",
            ),
            (
                ":predict",
                {"signature_name": "predict_raw", "instances": [RAW[0] | {"item": 1.5}]},
                400,
                "Failed to process element: 0 key: item of 'instances' list. Error: "
                "INVALID_ARGUMENT: JSON Value: 1.5 Type: Number is not of expected type: int64",
            ),
            (
                ":predict",
                {"signature_name": "predict_raw", "inputs": {"brand": [""], "item": [1]}},
                400,
                "Missing named input: price in 'inputs' object.",
            ),
        ],
    )
    def test_refusals(self, ask, path, body, status, message):
        assert ask("POST", path, body) == (status, {"error": message})

    def test_an_example_that_the_model_refuses(self, ask):
        status, answer = ask("POST", ":predict", {"instances": ["no Example"]})
        assert status == 400
        assert "Could not parse example" in answer["error"]

    @pytest.mark.parametrize("path", ["", "/versions/7"])
    def test_status(self, ask, path):
        assert ask("GET", path) == (
            200,
            {
                "model_version_status": [
                    {
                        "version": "7",
                        "state": "AVAILABLE",
                        "status": {"error_code": "OK", "error_message": ""},
                    }
                ]
            },
        )

    def test_status_of_what_is_not_there(self, ask):
        assert ask("GET", "/versions/8") == (
            404,
            {"error": "Could not find version 8 of model m"},
        )
        assert ask("GET", "x") == (404, {"error": "Could not find any versions of model mx"})

    def test_metadata(self, ask):
        status, answer = ask("GET", "/metadata")
        assert status == 200
        assert answer["model_spec"] == {"name": "m", "signature_name": "", "version": "7"}
        signatures = answer["metadata"]["signature_def"]["signature_def"]
        assert {"serving_default", "predict_raw", "predict"} <= set(signatures)
        assert signatures["predict"]["method_name"] == "tensorflow/serving/predict"
        numerical = signatures["predict"]["inputs"]["numerical"]
        assert numerical["dtype"] == "DT_FLOAT"
        assert numerical["tensor_shape"] == {
            "dim": [{"size": "-1", "name": ""}, {"size": "1", "name": ""}],
            "unknown_rank": False,
        }


def test_the_metrics_of_a_running_server(running):
    connection = http.client.HTTPConnection(running.rest_address, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/models/m:predict", json.dumps({"instances": ["x"]}))
        assert connection.getresponse().read()
        connection.request("GET", "/numbers")
        text = connection.getresponse().read().decode()
    families = prometheus_client.parser.text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    (loads,) = (sample for sample in samples if "load_attempt_count" in sample.name)
    assert loads.labels["model_path"].endswith("/base/7")
    assert loads.labels["status"] == "success"
    assert loads.value == 1
    counted = [sample.labels for sample in samples if "request_count" in sample.name]
    assert {"model_name": "m", "status": "INVALID_ARGUMENT"} in counted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rest_api_port=70000"], "--rest_api_port: found 70000, expected 0 to 65535"),
        (["--rest_api_num_threads=0"], "--rest_api_num_threads: found 0, expected 1 or more"),
        (["--monitoring_config_file=x"], "the metrics are on the REST port"),
        (
            ["--rest_api_port=8501", "--monitoring_config_file=/nowhere"],
            "--monitoring_config_file: /nowhere: No such file or directory",
        ),
    ],
)
def test_wrong_flags(tmp_path, capsys, flags, message):
    from pwiser_serving.server import __main__ as server

    with pytest.raises(SystemExit) as stopped:
        server.main(["--model_base_path", str(tmp_path), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_stop_before_the_start():
    site = OneModel()
    monitoring = Monitoring()
    calls = rest.Calls(None)
    server = rest.Server(application(site, monitoring, calls), calls, FREE, max_bytes=1)
    server.stop(5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("localhost", server.port))
