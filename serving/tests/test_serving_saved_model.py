"""saved_model: Classify and Regress on models that have signatures for them, and warm-up logs."""

import pytest
import tensorflow as tf
from pwiser_serving.server.saved_model import WARM_UP_FILE, SavedModel
from pwiser_serving.server.status import Status
from tensorflow_serving.apis import input_pb2, prediction_log_pb2

X = {"x": tf.io.FixedLenFeature([2], tf.float32)}


def _outputs(x):
    """Outputs of many shapes and types, of Examples' x, [batch, 2]."""
    return {
        "sum": tf.reduce_sum(x, axis=1),
        "column": tf.reduce_sum(x, axis=1, keepdims=True),
        "both": x,
        "labels": tf.strings.as_string(x, precision=1),
        "one_label": tf.strings.as_string(x[:, :1]),
        "whole": tf.cast(x[:, 0], tf.int64),
        "first": x[:1, 0],
        "first_rows": x[:1],
    }


# Signature name: its outputs, by the names they are served under.
SIGNATURES = {
    "regress": {"outputs": "sum"},
    "regress_column": {"outputs": "column"},
    "regress_wide": {"outputs": "both"},
    "regress_whole": {"outputs": "whole"},
    "regress_first": {"outputs": "first"},
    "regress_named": {"x": "sum"},
    "classify": {"classes": "labels", "scores": "both"},
    "scores": {"scores": "both"},
    "classes": {"classes": "labels", "other": "sum"},
    "classify_flat": {"scores": "sum"},
    "classify_types": {"classes": "both"},
    "classify_first": {"scores": "first_rows"},
    "classify_widths": {"classes": "one_label", "scores": "both"},
    "classify_named": {"x": "both"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "1"

    def function(wanted, alias="inputs"):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, alias)])
        def serve(examples):
            found = _outputs(tf.io.parse_example(examples, X)["x"])
            return {name: found[output] for name, output in wanted.items()}

        return serve

    signatures = {name: function(wanted) for name, wanted in SIGNATURES.items()}
    signatures["examples"] = function({"outputs": "sum"}, alias="examples")
    tf.saved_model.save(tf.Module(), str(folder), signatures=signatures)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    model = SavedModel(folder)
    yield model
    model.close()


def _example(*x):
    feature = {"x": tf.train.Feature(float_list=tf.train.FloatList(value=x))} if x else {}
    return tf.train.Example(features=tf.train.Features(feature=feature))


def _input(*rows):
    given = input_pb2.Input()
    given.example_list.examples.extend(_example(*row) for row in rows)
    return given


def _told(call, *arguments):
    with pytest.raises(Status) as caught:
        call(*arguments)
    return caught.value.code.name, caught.value.message


@pytest.mark.parametrize("name", ["regress", "regress_column"])
def test_regress(model, name):
    result = model.regress(name, _input((1, 2), (3, 4.5)))
    assert [regression.value for regression in result.regressions] == [3.0, 7.5]


def test_classify(model):
    def found(name):
        result = model.classify(name, _input((1, 2), (3, 4.5)))
        return [[(one.label, one.score) for one in row.classes] for row in result.classifications]

    assert found("classify") == [[("1.0", 1), ("2.0", 2)], [("3.0", 3), ("4.5", 4.5)]]
    assert found("scores") == [[("", 1), ("", 2)], [("", 3), ("", 4.5)]]
    assert found("classes") == [[("1.0", 0), ("2.0", 0)], [("3.0", 0), ("4.5", 0)]]


def test_a_context_is_part_of_each_example(model):
    given = input_pb2.Input()
    given.example_list_with_context.context.CopyFrom(_example(1, 2))
    given.example_list_with_context.examples.extend([_example(), _example()])
    result = model.regress("regress", given)
    assert [regression.value for regression in result.regressions] == [3.0, 3.0]


def test_no_examples(model):
    listed, with_context = input_pb2.Input(), input_pb2.Input()
    listed.example_list.SetInParent()
    with_context.example_list_with_context.context.CopyFrom(_example(1, 2))
    for given in (input_pb2.Input(), listed, with_context):
        for call, name in ((model.regress, "regress"), (model.classify, "classify")):
            assert _told(call, name, given) == ("INVALID_ARGUMENT", "Input is empty.")


def test_examples_that_the_model_refuses(model):
    code, message = _told(model.regress, "regress", _input((1,)))
    assert code == "INVALID_ARGUMENT"
    assert "Key: x" in message


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("regress", "none", "No signature was found with the name: none"),
        ("regress", "classify", "Expected one output Tensor."),
        ("regress", "examples", "No regression inputs found in SignatureDef: "),
        ("regress", "regress_named", "No regression outputs found in SignatureDef: "),
        (
            "regress",
            "regress_wide",
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
            "[2,2]",
        ),
        ("regress", "regress_whole", "Expected output Tensor of DT_FLOAT.  Got: DT_INT64"),
        (
            "regress",
            "regress_first",
            "Input batch size did not match output batch size: 2 vs. 1",
        ),
        ("classify", "none", "No signature was found with the name: none"),
        ("classify", "examples", "No classification inputs found in SignatureDef: "),
        (
            "classify",
            "classify_named",
            "Expected classification signature outputs to contain at least one of "
            '"classes" or "scores". Signature was: ',
        ),
        (
            "classify",
            "classify_flat",
            "Expected Tensor shape: [batch_size num_classes] but got [2]",
        ),
        ("classify", "classify_types", "Expected classes Tensor of DT_STRING. Got: DT_FLOAT"),
        ("classify", "classify_first", "Expected scores output batch size of 2. Got: 1"),
        (
            "classify",
            "classify_widths",
            "Tensors class and score should match in dim_size(1). Got 1 vs. 2",
        ),
    ],
)
def test_what_a_signature_must_be(model, method, name, message):
    code, found = _told(getattr(model, method), name, _input((1, 2), (3, 4)))
    assert code == "INVALID_ARGUMENT"
    assert found.startswith(message)
    if not message.endswith(": "):
        assert found == message


def test_outputs_that_cannot_be_had(model):
    # The one signature that every SavedModel of TensorFlow 2 has has an output that is no tensor.
    assert "__saved_model_init_op" in model.signatures
    code, message = _told(model.predict, "__saved_model_init_op", {})
    assert code == "OUT_OF_RANGE"
    assert "does not have output 0" in message


def _log(**members):
    log = prediction_log_pb2.PredictionLog()
    for name, (signature, given) in members.items():
        request = getattr(log, name).request
        request.model_spec.signature_name = signature
        request.input.CopyFrom(given)
    return log


def test_warm_up_takes_every_kind_of_request(folder):
    path = folder / WARM_UP_FILE
    path.parent.mkdir()

    def load(*logs):
        with tf.io.TFRecordWriter(str(path)) as writer:
            for log in logs:
                writer.write(log.SerializeToString())
        SavedModel(folder).close()

    good = _input((1, 2))
    load(_log(regress_log=("regress", good)), _log(classify_log=("classify", good)), _log())
    # That they are run is seen by those that fail.
    for log, told in (
        (_log(regress_log=("classify", good)), "Expected one output Tensor."),
        (_log(classify_log=("scores", _input())), "Input is empty."),
    ):
        assert _told(load, log) == ("INVALID_ARGUMENT", told)
    streamed = prediction_log_pb2.PredictionLog()
    streamed.session_run_log.SetInParent()
    assert _told(load, streamed) == ("UNIMPLEMENTED", "Unsupported log_type for warmup: 5")
