import ctypes
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2
from tensorflow_serving.apis import prediction_log_pb2

from pwiser_tf import export, records, runs
from pwiser_tf.errors import DataError
from pwiser_tf.models import MODELS
from pwiser_tf.schema import MISSING_INTEGER, Categorical, Schema

RAW = {
    "page": np.array([0, 5, 99, MISSING_INTEGER]),
    "user city": np.array([b"Paris", "Köln".encode(), b"Rome", b""], object),
    "shop": np.array([70, -3, -1, 12]),
    "price (€)": np.array([10, 14.5, np.nan, np.inf], np.float32),
    "discount": np.array([0, 0.5, np.nan, 1], np.float32),
}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export.export(trained, tmp_path_factory.mktemp("models"), "shop")


def _features(schema):
    """RAW after the preprocessing of the schema: the input of the Keras model."""
    ids = []
    for feature in schema.categorical:
        values = RAW[feature.name]
        if feature.dtype == "string":
            values = np.array([value.decode() for value in values], object)
        ids.append(feature.ids(values))
    numerical = [feature.apply(RAW[feature.name]) for feature in schema.numerical]
    return {"categorical": np.stack(ids, axis=1), "numerical": np.stack(numerical, axis=1)}


def _examples():
    examples = []
    for row in range(4):
        example = tf.train.Example()
        for name, values in RAW.items():
            feature = example.features.feature[name]
            if values.dtype == object:
                feature.bytes_list.value.append(values[row])
            elif values.dtype == np.int64:
                feature.int64_list.value.append(values[row])
            elif np.isfinite(values[row]):  # A missing value may be left out.
                feature.float_list.value.append(values[row])
        examples.append(example.SerializeToString())
    return examples


IN_A_SESSION = """
import json, sys
import numpy as np
import tensorflow as tf
folder, inputs = sys.argv[1], np.load(sys.argv[2], allow_pickle=True).item()
with tf.compat.v1.Session() as session:
    graph = tf.compat.v1.saved_model.loader.load(session, ["serve"], folder)
    answers = {}
    for name, given in inputs.items():
        signature = graph.signature_def[name]
        feed = {signature.inputs[key].name: value for key, value in given.items()}
        fetch = {key: value.name for key, value in signature.outputs.items()}
        answers[name] = {k: v.tolist() for k, v in session.run(fetch, feed).items()}
    handles = sum(node.op == "VarHandleOp" for node in graph.graph_def.node)
print(json.dumps([answers, handles]))
"""


@pytest.fixture(scope="module")
def in_a_session(exported, trained, tmp_path_factory):
    """The outputs of each signature for RAW, from a Session in a process without pwiser_tf."""
    schema = Schema.load(trained)
    inputs = {
        "serving_default": {"examples": np.array(_examples(), object)},
        "predict_raw": RAW,
        "predict": _features(schema),
    }
    file = tmp_path_factory.mktemp("inputs") / "inputs.npy"
    np.save(file, np.array(inputs, object), allow_pickle=True)
    output = subprocess.run(
        [sys.executable, "-c", IN_A_SESSION, str(exported), str(file)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(output.stdout)


@pytest.mark.parametrize("signature", ["serving_default", "predict_raw", "predict"])
def test_a_session_gives_what_the_keras_model_gives(signature, in_a_session, trained):
    model, _, schema = runs.load_run(trained)
    features = {name: tf.constant(value) for name, value in _features(schema).items()}
    expected = model(features)
    answers = in_a_session[0][signature]
    assert set(answers) == {"ctr", "cvr", "ctcvr"}
    for name, values in answers.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6)
    assert len(set(np.round(answers["ctr"], 6))) > 1


def test_the_embeddings_are_stored_once_and_the_rest_is_constant(in_a_session, exported, trained):
    model, _, _ = runs.load_run(trained)
    file = str(exported / "variables" / "variables")
    stored = [
        tf.train.load_variable(file, name)
        for name, _ in tf.train.list_variables(file)
        if name.endswith("VARIABLE_VALUE")
    ]
    # The model is small: all other variables are constants, and each table is read in one place.
    expected = [weight for weight in model.weights if "embeddings" in weight.name]
    assert len(stored) == len(expected) == in_a_session[1]
    for weight in expected:
        assert any(np.array_equal(weight, value) for value in stored)


@pytest.mark.parametrize("largest", [0, 3, 4])
def test_small_variables_become_constants(monkeypatch, largest):
    monkeypatch.setattr(export, "_LARGEST_CONSTANT", largest)
    table = tf.Variable([10.0, 20.0])
    small, large = tf.Variable([1.0, 2.0, 3.0]), tf.Variable([1.0, 2.0, 3.0, 4.0])
    neither = tf.constant([0.5])

    def function(inputs):
        # One read twice; the table is not read but looked up.
        total = tf.reduce_sum(small) + tf.reduce_sum(small * small) + tf.reduce_sum(large)
        return {"y": inputs["x"] * total, "z": tf.gather(table, inputs["i"]) + neither}

    inputs = {"x": tf.TensorSpec([None], name="x"), "i": tf.TensorSpec([None], tf.int64, name="i")}
    converted, kept = export._with_constants(function, inputs)
    assert {v.ref() for v in kept} == {
        v.ref() for v in (table, small, large) if v is table or v.shape[0] > largest
    }
    given = {"x": tf.constant([1.0, -2.0]), "i": tf.constant([1, 0], tf.int64)}
    # 1 + 2 + 3, 1 + 4 + 9, 1 + 2 + 3 + 4
    np.testing.assert_array_equal(converted(given)["y"], [30, -60])
    np.testing.assert_array_equal(converted(given)["z"], [20.5, 10.5])
    # Only what is still a variable can change.
    small.assign([0.0, 0.0, 0.0])
    large.assign([0.0, 0.0, 0.0, 1.0])
    expected = (0 if largest < 3 else 20) + (1 if largest < 4 else 10)
    np.testing.assert_array_equal(converted(given)["y"], [expected, -2 * expected])


def test_the_cpp_loader_loads_it(exported):
    """The loader that TF Serving links, from the wheel, by its C interface."""
    library = ctypes.CDLL(str(pathlib.Path(tf.__file__).parent / "libtensorflow_cc.so.2"))
    for name in ("TF_NewStatus", "TF_NewGraph", "TF_NewSessionOptions"):
        getattr(library, name).restype = ctypes.c_void_p
    library.TF_LoadSessionFromSavedModel.restype = ctypes.c_void_p
    library.TF_Message.restype = ctypes.c_char_p
    status = ctypes.c_void_p(library.TF_NewStatus())
    session = library.TF_LoadSessionFromSavedModel(
        ctypes.c_void_p(library.TF_NewSessionOptions()),
        None,
        str(exported).encode(),
        (ctypes.c_char_p * 1)(b"serve"),
        1,
        ctypes.c_void_p(library.TF_NewGraph()),
        None,
        status,
    )
    assert library.TF_GetCode(status) == 0, library.TF_Message(status)
    assert session


def test_no_compiled_function_and_no_label_in_the_graph(exported):
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes())
    (graph,) = model.meta_graphs
    for function in graph.graph_def.library.function:
        assert not function.attr["_XlaMustCompile"].b, function.signature.name
    inputs = {name: set(s.inputs) for name, s in graph.signature_def.items()}
    assert inputs["serving_default"] == {"examples"}
    assert inputs["predict"] == {"categorical", "numerical"}
    assert inputs["predict_raw"] == set(RAW)


def test_the_schema_is_an_asset(exported, trained):
    asset = Schema.load(exported / "assets.extra")
    assert asset.fingerprint == Schema.load(trained).fingerprint


def test_warm_up_requests_cover_signatures_and_batch_sizes(exported):
    requests = set()
    for record in records.read(exported / "assets.extra" / "tf_serving_warmup_requests"):
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        assert request.model_spec.name == "shop"
        sizes = {t.tensor_shape.dim[0].size for t in request.inputs.values()}
        assert len(sizes) == 1
        requests.add((request.model_spec.signature_name, sizes.pop()))
    signatures = ("serving_default", "predict_raw", "predict")
    assert requests == {(name, size) for name in signatures for size in (1, 64, 512)}


def test_versions_count_up_past_gaps_and_other_folders(trained, tmp_path):
    (tmp_path / "shop" / "7").mkdir(parents=True)
    (tmp_path / "shop" / "notes").mkdir()
    assert export.export(trained, tmp_path, "shop").name == "8"
    assert {path.name for path in (tmp_path / "shop").iterdir()} == {"7", "8", "notes"}


def test_an_export_that_fails_its_check_leaves_no_files(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export.ServedModel,
        "_raw",
        lambda self, raw: self._features(
            {name: value + 1 for name, value in self._raw_features(raw).items()}
        ),
    )
    with pytest.raises(AssertionError, match="serving_default"):
        export.export(trained, tmp_path, "shop")
    assert list((tmp_path / "shop").iterdir()) == []


def test_the_command_exports(command, trained, tmp_path):
    result = command(
        "export", f"--workdir={trained}", f"--export_dir={tmp_path}", "--model_name=shop"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"exported {tmp_path}/shop/1\n"
    assert result.stderr == ""


# TensorFlow accepts none of these as tensor names: blanks, `self`, two that differ only by case.
# The second name equals the name of the first one's tensor. TensorFlow sorts names in another order
# than Python: the "_" of "a/b" and "a b" is after "C" and before "b".
ODD_NAMES = ["zoo", "input_000000", "Click", "click", "日本", "a b", "aC", "ab", "a/c:d", "_x", "0"]
# Names that Python does not accept, and the names that it accepts instead.
IMPOSSIBLE_NAMES = {
    "self": "feature_11",
    "class": "feature_12",
    "m²": "feature_13_",
    "n o": "feature_14",
    "n_o": "feature_15",
}
ALL_NAMES = [*ODD_NAMES, *IMPOSSIBLE_NAMES, "feature_13"]


def _save_bits(names, folder):
    """Saves a model with the sum of 2**i over the columns i that have the value i as its score."""
    schema = Schema(
        "columns",
        tuple(Categorical(name, "int64", (position,)) for position, name in enumerate(names)),
        (),
        "clicked",
        "bought",
        None,
    )

    def model(features, training):
        bits = 2.0 ** np.arange(len(names))[:, None]
        scores = tf.cast(features["categorical"], tf.float32) @ bits
        return dict.fromkeys(export.OUTPUTS, scores[:, 0])

    served = export.ServedModel(model, schema)
    tf.saved_model.save(served, str(folder), signatures=served.functions)
    export._restore_names(folder, served)


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd_names")
    _save_bits(ALL_NAMES, folder)
    return folder


def test_columns_of_any_name_are_served_under_it(odd_names):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(odd_names))
        signature = loaded.signature_def["predict_raw"]
        assert set(signature.inputs) == set(ALL_NAMES)
        for position, name in enumerate(ALL_NAMES):
            feed = {signature.inputs[other].name: [-1] for other in ALL_NAMES}
            feed[signature.inputs[name].name] = [position]
            assert session.run(signature.outputs["ctr"].name, feed).tolist() == [2.0**position]


def test_python_takes_columns_of_nearly_any_name(odd_names):
    predict_raw = tf.saved_model.load(str(odd_names)).signatures["predict_raw"]
    names = [IMPOSSIBLE_NAMES.get(name, name) for name in ALL_NAMES]
    for position, name in enumerate(names):
        given = {other: [-1] for other in names} | {name: [position]}
        assert predict_raw(**given)["ctr"].numpy().tolist() == [2.0**position], name
    taken = predict_raw.structured_input_signature[1]
    # As TensorFlow writes a name that is not an identifier in Python.
    python_names = {"a b": "a_b", "a/c:d": "a_c_d", "_x": "arg__x", "0": "arg_0"}
    assert set(taken) == {python_names.get(name, name) for name in names}
    assert {spec.name for spec in taken.values()} == set(taken)


@pytest.mark.parametrize("name", IMPOSSIBLE_NAMES)
def test_python_refuses_a_replaced_name(name, odd_names):
    predict_raw = tf.saved_model.load(str(odd_names)).signatures["predict_raw"]
    given = {IMPOSSIBLE_NAMES.get(other, other): [-1] for other in ALL_NAMES}
    del given[IMPOSSIBLE_NAMES[name]]
    with pytest.raises(TypeError):
        predict_raw(**given, **{name: [-1]})


def test_python_takes_the_only_column_by_name_and_by_position(tmp_path):
    _save_bits(["price (€)"], tmp_path)
    predict_raw = tf.saved_model.load(str(tmp_path)).signatures["predict_raw"]
    assert predict_raw(**{"price (€)": [0, 1]})["ctr"].numpy().tolist() == [1, 0]
    assert predict_raw(tf.constant([0, 1], tf.int64))["ctr"].numpy().tolist() == [1, 0]


@pytest.mark.parametrize("signature", ["serving_default", "predict_raw", "predict"])
def test_python_gives_what_a_session_gives(signature, in_a_session, exported, trained):
    inputs = {
        "serving_default": {"examples": _examples()},
        "predict_raw": RAW,
        "predict": _features(Schema.load(trained)),
    }
    function = tf.saved_model.load(str(exported)).signatures[signature]
    outputs = function(**{name: tf.constant(value) for name, value in inputs[signature].items()})
    assert set(outputs) == {"ctr", "cvr", "ctcvr"}
    for name, values in outputs.items():
        np.testing.assert_allclose(values, in_a_session[0][signature][name], rtol=1e-6)


def test_a_killed_export_is_removed_and_concurrent_exports_are_refused(trained, tmp_path):
    base = tmp_path / "m"
    (base / "partial-7" / "variables").mkdir(parents=True)
    with runs.locked(base), pytest.raises(DataError, match="another process is using"):
        export.export(trained, tmp_path, "m")
    export.export(trained, tmp_path, "m")
    assert [path.name for path in base.iterdir()] == ["1"]


@pytest.mark.parametrize("name", ["categorical", "numerical"])
def test_one_column_is_not_broadcast(name, exported):
    """Fed as by a server, which unlike Session.run does not check the shapes of a signature."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(exported))
        signature = loaded.signature_def["predict"]
        arrays = {"categorical": np.ones([2, 3], np.int64), "numerical": np.ones([2, 2], "float32")}
        options = config_pb2.CallableOptions(
            feed=[signature.inputs[key].name for key in arrays],
            fetch=[signature.outputs["ctr"].name],
        )
        run = session._make_callable_from_options(options)
        assert run(*arrays.values())[0].shape == (2,)
        arrays[name] = arrays[name][:, :1]
        with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible"):
            run(*arrays.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head"),
    [(name, head) for name, model in MODELS.items() for head in model.conversion_heads],
)
def test_every_architecture_is_exported(name, head, settings, dataset, tmp_path):
    """Untrained; export compares every signature in a Session with the Keras model."""
    settings = settings.replace(
        model=name,
        conversion_head=head,
        auxiliary_weight=MODELS[name].auxiliary_weight or 0.0,
        # A second output of the tower, the energy, which is not served.
        loss="jrc",
        shuffle="groups",
    )
    schema = Schema.load(dataset)
    run = tmp_path / "run"
    run.mkdir()
    runs.begin(run, settings, schema)
    model = runs.build_model(settings, schema)
    runs.best_checkpoint(run, model).save(checkpoint_number=1)
    version = export.export(run, tmp_path / "models", name)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(version))
        signature = loaded.signature_def["predict_raw"]
        feed = {signature.inputs[key].name: value for key, value in RAW.items()}
        fetch = {key: value.name for key, value in signature.outputs.items()}
        found = session.run(fetch, feed)
    expected = model({key: tf.constant(value) for key, value in _features(schema).items()})
    for key, values in found.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-5)
    assert (found["ctcvr"] <= found["ctr"]).all()
    assert len(set(np.round(found["ctr"], 6))) > 1
