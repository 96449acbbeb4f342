"""saved_model: Classify and Regress on models that have signatures for them, and warm-up logs."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
from pwiser_serving import tensors
from pwiser_serving.server.saved_model import (
    CLASSIFY,
    REGRESS,
    WARM_UP_FILE,
    LoadOptions,
    SavedModel,
)
from pwiser_serving.server.status import Status
from tensorflow_serving.apis import inference_pb2, input_pb2, prediction_log_pb2

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


def _task(signature, method, name="m"):
    task = inference_pb2.InferenceTask(method_name=method)
    task.model_spec.name, task.model_spec.signature_name = name, signature
    return task


def test_several_tasks_are_answered_in_order(model):
    tasks = [_task("regress", REGRESS), _task("classify", CLASSIFY), _task("scores", CLASSIFY)]
    sums, both, scores = model.multi_inference(tasks, _input((1, 2), (3, 4)))
    assert [one.value for one in sums.regression_result.regressions] == [3, 7]
    for result in (both, scores):
        rows = result.classification_result.classifications
        assert [[one.score for one in row.classes] for row in rows] == [[1, 2], [3, 4]]
    assert both.classification_result.classifications[0].classes[0].label == "1.0"
    assert not model.multi_inference([], _input())


@pytest.mark.parametrize(
    ("tasks", "code", "message"),
    [
        ([_task("regress", REGRESS, "")], "INVALID_ARGUMENT", "with an empty model name."),
        (
            [_task("regress", REGRESS), _task("scores", CLASSIFY, "n")],
            "INVALID_ARGUMENT",
            "must access the same model name.",
        ),
        (
            [_task("regress", REGRESS), _task("regress", CLASSIFY)],
            "INVALID_ARGUMENT",
            "Duplicate evaluation of signature: regress",
        ),
        (
            [_task("none", REGRESS)],
            "INVALID_ARGUMENT",
            "Requested signature not found in model graph: none",
        ),
        (
            [_task("regress", "tensorflow/serving/predict")],
            "UNIMPLEMENTED",
            "Unsupported signature method_name: tensorflow/serving/predict",
        ),
        # All are looked at before any is run.
        (
            [_task("regress", REGRESS), _task("classify", REGRESS)],
            "INVALID_ARGUMENT",
            "Expected one output Tensor.",
        ),
        ([_task("regress", REGRESS)], "INVALID_ARGUMENT", "Input is empty."),
    ],
)
def test_tasks_that_cannot_be_done(model, tasks, code, message):
    found = _told(model.multi_inference, tasks, _input())
    assert found[0] == code
    assert found[1].endswith(message)


TYPES = ["half", "bfloat16", "float8_e5m2", "int4", "uint16", "complex64", "qint8", "quint16"]


def test_every_type_goes_in_and_comes_out(tmp_path):
    specs = {name: tf.TensorSpec([None], tf.as_dtype(name), name) for name in TYPES}
    same = tf.function(lambda **inputs: {f"{name}_out": inputs[name] for name in inputs})
    signature = same.get_concrete_function(**specs)
    tf.saved_model.save(tf.Module(), str(tmp_path / "1"), signatures={"same": signature})
    model = SavedModel(tmp_path / "1")
    arrays = {}
    for name in TYPES:
        dtype = tensors.numpy_type(tf.as_dtype(name).as_datatype_enum)
        plain = dtype[0] if dtype.names else dtype
        arrays[name] = np.array([0, 1, 3]).astype(plain).view(dtype)
    messages = {name: tensors.encode(array) for name, array in arrays.items()}
    for given in (arrays, messages):
        found = model.predict("same", given)
        for name, array in arrays.items():
            assert found[f"{name}_out"].dtype == array.dtype
            assert found[f"{name}_out"].tolist() == array.tolist()
            assert tensors.encode(found[f"{name}_out"]) == messages[name]
    model.close()


def test_what_is_no_tensor_of_numpy_is_refused(tmp_path):
    items = tf.function(
        lambda x: {"list": tf.raw_ops.TensorListFromTensor(tensor=x, element_shape=tf.range(0))},
        input_signature=[tf.TensorSpec([None], tf.float32, "x")],
    )
    tf.saved_model.save(tf.Module(), str(tmp_path / "1"), signatures={"list": items})
    model = SavedModel(tmp_path / "1")
    code, message = _told(model.predict, "list", {"x": np.zeros(2, np.float32)})
    assert code == "UNIMPLEMENTED"
    assert message.endswith("is a variant, which this server cannot hold")
    model.close()


def test_a_folder_that_does_not_load_is_told_as_tf_serving_tells_it(folder, tmp_path):
    def load(spoil):
        broken = tmp_path / spoil.__name__
        shutil.copytree(folder, broken)
        spoil(broken)
        return _told(SavedModel, broken)

    def absent(broken):
        (broken / "saved_model.pb").unlink()

    def garbage(broken):
        (broken / "saved_model.pb").write_bytes(b"\xff" * 100)

    def cut(broken):
        path = broken / "saved_model.pb"
        path.write_bytes(path.read_bytes()[:5000])

    def empty(broken):
        (broken / "saved_model.pb").write_bytes(b"")

    where = "Could not find SavedModel .pb or .pbtxt at supplied export directory path: "
    assert load(absent)[0] == "NOT_FOUND"
    assert _told(SavedModel, tmp_path / "absent")[1].startswith(f"{where}{tmp_path}/absent. ")
    assert load(garbage) == (
        "DATA_LOSS",
        f"Can't parse {tmp_path}/garbage/saved_model.pb as binary proto",
    )
    assert load(cut) == ("OUT_OF_RANGE", "Read less bytes than requested")
    code, message = load(empty)
    assert code == "NOT_FOUND"
    assert message.startswith("Could not find meta graph def matching supplied tags: { serve }.")


def test_a_folder_without_its_variables_does_not_load(tmp_path):
    module = tf.Module()
    module.weight = tf.Variable(2.0)
    times = tf.function(lambda x: {"y": x * module.weight})
    signature = times.get_concrete_function(tf.TensorSpec([None], tf.float32, "x"))
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"serving_default": signature})
    data = tmp_path / "1" / "variables" / "variables.data-00000-of-00001"
    data.unlink()
    code, message = _told(SavedModel, tmp_path / "1")
    assert code == "NOT_FOUND"
    assert message.startswith(f"{data}; No such file or directory")
    # TF Serving would load this one, and fail each request.
    shutil.rmtree(tmp_path / "1" / "variables")
    code, message = _told(SavedModel, tmp_path / "1")
    assert code == "FAILED_PRECONDITION"
    assert "not a valid checkpoint" in message


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
    several = prediction_log_pb2.PredictionLog()
    request = several.multi_inference_log.request
    request.tasks.extend([_task("regress", REGRESS), _task("scores", CLASSIFY)])
    request.input.CopyFrom(good)
    load(several)
    request.tasks[1].model_spec.signature_name = "classify_widths"
    assert _told(load, several)[1].startswith("Tensors class and score should match")
    streamed = prediction_log_pb2.PredictionLog()
    streamed.session_run_log.SetInParent()
    assert _told(load, streamed) == ("UNIMPLEMENTED", "Unsupported log_type for warmup: 5")


def test_warm_up_is_repeated_or_left_out(folder):
    def count(iterations):
        counted = []

        class Counting(SavedModel):
            def regress(self, *arguments):
                counted.append(arguments)
                return super().regress(*arguments)

        Counting(folder, options=LoadOptions(warm_up_iterations=iterations)).close()
        return len(counted)

    with tf.io.TFRecordWriter(str(folder / WARM_UP_FILE)) as writer:
        for _ in range(2):
            writer.write(_log(regress_log=("regress", _input((1, 2)))).SerializeToString())
    assert [count(iterations) for iterations in (0, 1, 3)] == [0, 2, 6]
