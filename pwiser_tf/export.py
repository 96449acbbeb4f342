"""Exports a trained run as a SavedModel that TF Serving loads.

    python -m pwiser_tf.export --workdir=runs/us --export_dir=models --model_name=us

It writes <export_dir>/<model_name>/<version>/, the version one above the highest there, with
three signatures that all give ctr, cvr and ctcvr, float [batch]:

    serving_default  examples: string [batch], serialized tf.train.Examples of raw features
    predict_raw      one tensor [batch] a raw feature: int64, string or float
    predict          categorical: int64 [batch, C] and numerical: float [batch, N], as records
                     hold them (ids, transformed values): the fast path

A missing raw value is NaN, "" or the smallest int64; an Example may leave the feature out.

In Python too, predict_raw takes the features' own names, odd ones in a dictionary:

    predict_raw = tf.saved_model.load("models/us/1").signatures["predict_raw"]
    predict_raw(item=[3, 4], **{"price (€)": [0.5, 2.0]})["ctcvr"]

TensorFlow replaces each character there that is no letter and no digit by "_", and puts "arg_"
before what then begins with no letter. Four kinds of names cannot work so. These features are
called feature_N instead, N being the position in the schema, from 0; `structured_input_signature`
lists the names that are taken. A server takes every feature by its own name.

    "a b" beside "a_b"      names that become the same one
    "class", "from"         Python's keywords
    "self"                  Python passes the function itself under it
    "m²"                    a character that Python does not take in a name
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import collections
import keyword
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, MutableMapping

import numpy as np
import tensorflow as tf
from absl import flags
from google.protobuf.message import Message
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from pwiser_tf import runs
from pwiser_tf.command_line import run
from pwiser_tf.layers import RawFeatures
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.schema import MISSING_INTEGER, MISSING_STRING, Schema

OUTPUTS = ("ctr", "cvr", "ctcvr")
_MISSING = {"int64": MISSING_INTEGER, "string": MISSING_STRING}
# A version being written; a killed export leaves it behind, and the next one removes it.
_PARTIAL = "partial-"
# Files beside the graph, which TF Serving leaves alone but for the warm-up requests.
_EXTRA_ASSETS = "assets.extra"
_WARM_UP_FILE = "tf_serving_warmup_requests"
# Warmed up with these, a server answers its first requests as fast as the later ones.
_WARM_UP_BATCHES = (1, 64, 512)
# Elements of a variable that is looked up in each request no more.
_LARGEST_CONSTANT = 2**16

# Tensors by name to tensors by name.
Function = Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]


class ServedModel(tf.Module):
    """A model with its preprocessing, and a function a signature.

    It tracks the variables that its functions read, and not the Keras model itself: saving that
    would trace every layer again, in training mode too.
    """

    def __init__(self, model: ClickConversionModel, schema: Schema):
        super().__init__(name="served_model")
        self._schema = schema
        self._raw_features = RawFeatures(schema)
        features = {}
        if schema.categorical:
            features["categorical"] = _spec("categorical", tf.int64, len(schema.categorical))
        if schema.numerical:
            features["numerical"] = _spec("numerical", tf.float32, len(schema.numerical))
        self._call_model, self.read_variables = _with_constants(
            lambda inputs: model(inputs, training=False), features
        )
        example_spec = self._example_spec()
        self.python_names = _python_names(example_spec)
        self.aliases = _aliases(self.python_names)
        raw = {name: _spec(self.aliases[name], spec.dtype) for name, spec in example_spec.items()}
        self.functions = {
            name: tf.function(function).get_concrete_function(inputs)
            for name, function, inputs in (
                ("serving_default", self._examples, {"examples": _spec("examples", tf.string)}),
                ("predict_raw", self._raw, raw),
                ("predict", self._features, features),
            )
        }

    def _example_spec(self) -> dict[str, tf.io.FixedLenFeature]:
        spec = {}
        for feature in self._schema.categorical:
            dtype, missing = tf.as_dtype(feature.dtype), _MISSING[feature.dtype]
            spec[feature.name] = tf.io.FixedLenFeature([], dtype, missing)
        for feature in self._schema.numerical:
            spec[feature.name] = tf.io.FixedLenFeature([], tf.float32, np.nan)
        return spec

    def _examples(self, inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return self._raw(tf.io.parse_example(inputs["examples"], self._example_spec()))

    def _raw(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return self._features(self._raw_features(raw))

    def _features(self, features: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # A server does not hold requests to a signature's shapes, and one column would broadcast.
        widths = {"categorical": self._schema.categorical, "numerical": self._schema.numerical}
        outputs = self._call_model(
            {
                name: tf.ensure_shape(values, [None, len(widths[name])])
                for name, values in features.items()
            }
        )
        return {name: outputs[name] for name in OUTPUTS}


def _with_constants(
    function: Function, inputs: dict[str, tf.TensorSpec]
) -> tuple[Function, list[tf.Variable]]:
    """The function with its small variables as constants of its graph, and the other variables.

    A server looks every variable up for every request, which for a small batch takes longer than
    the arithmetic; and what follows from constants alone (most of batch normalisation) it works
    out once, when it loads the model. Large variables stay what they are: a graph holds 2 GB.
    """
    traced = tf.function(function).get_concrete_function(inputs)
    variables = {variable.handle.ref(): variable for variable in traced.variables}
    graph = traced.graph.as_graph_def()
    read_otherwise = {
        name for node in graph.node if node.op != "ReadVariableOp" for name in node.input
    }
    # By the placeholders of what is captured: [name of a placeholder]
    constants, captured, kept = {}, {}, []
    for tensor, placeholder in traced.graph.captures:
        variable, name = variables.get(tensor.ref()), placeholder.op.name
        small = variable is not None and variable.shape.num_elements() <= _LARGEST_CONSTANT
        if small and name not in read_otherwise:
            constants[name] = variable.numpy()
            continue
        captured[placeholder.name] = tensor
        kept += [variable] if variable is not None else []
    nodes = []
    for node in graph.node:
        if node.op == "ReadVariableOp" and node.input[0] in constants:
            node = _constant(node.name, constants[node.input[0]])
        if node.name not in constants:
            nodes.append(node)
    graph = tf.compat.v1.GraphDef(node=nodes, versions=graph.versions, library=graph.library)
    outputs = {name: tensor.name for name, tensor in traced.structured_outputs.items()}

    @tf.function
    def imported(features: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        feeds = {f"{name}:0": tensor for name, tensor in features.items()}
        here = tf.compat.v1.get_default_graph()
        feeds |= {name: here.capture(tensor) for name, tensor in captured.items()}
        found = tf.graph_util.import_graph_def(graph, feeds, list(outputs.values()), name="model")
        return dict(zip(outputs, found, strict=True))

    # One function, which the signatures share.
    return imported.get_concrete_function(inputs), kept


def _constant(name: str, value: np.ndarray) -> tf.compat.v1.NodeDef:
    """A graph's node that holds a value."""
    node = tf.compat.v1.NodeDef(name=name, op="Const")
    node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    return node


def export(
    folder: str | os.PathLike, export_dir: str | os.PathLike, model_name: str
) -> pathlib.Path:
    """Exports the best epoch of the run in `folder` as the model's next version.

    The version's folder appears whole, in one rename, and only after it was loaded through a
    Session, as TF Serving does, and in Python, and gave the Keras model's numbers.

    Returns:
      The new version's folder, <export_dir>/<model_name>/<version>.
    """
    model, _, schema = runs.load_run(folder)
    served = ServedModel(model, schema)
    row = _one_row(schema)
    base = pathlib.Path(export_dir) / model_name
    base.mkdir(parents=True, exist_ok=True)
    with runs.locked(base):
        return _write_version(base, model, served, schema, model_name, row)


def _write_version(base, model, served, schema, model_name, row) -> pathlib.Path:
    """Writes the next version's folder; see export. Nobody else does while the base is locked."""
    for abandoned in base.glob(f"{_PARTIAL}*"):
        shutil.rmtree(abandoned)
    versions = [int(path.name) for path in base.iterdir() if path.name.isdecimal()]
    version = max(versions, default=0) + 1
    # In the same folder, so that a rename suffices; servers look at numbers alone.
    aside = base / f"{_PARTIAL}{version}"
    aside.mkdir()
    try:
        tf.saved_model.save(served, str(aside), signatures=served.functions)
        _restore_names(aside, served)
        extra = aside / _EXTRA_ASSETS
        extra.mkdir()
        schema.save(extra)
        _write_warm_up(extra / _WARM_UP_FILE, model_name, row)
        _check(aside, model, row, served.python_names)
        aside.rename(base / str(version))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return base / str(version)


def _spec(name: str, dtype: tf.DType, *inner: int) -> tf.TensorSpec:
    return tf.TensorSpec([None, *inner], dtype, name)


def _python_names(names: Iterable[str]) -> dict[str, str]:
    """Raw feature names, in order, to the parameters that TensorFlow makes of them in Python.

    A name that cannot be a parameter, or not alone, becomes `feature_N`: see above.
    """
    sanitized = {name: _sanitized(name) for name in names}
    counts = collections.Counter(sanitized.values())
    result = {}
    for position, (name, parameter) in enumerate(sanitized.items()):
        possible = parameter.isidentifier() and not keyword.iskeyword(parameter)
        if counts[parameter] > 1 or parameter == "self" or not possible:
            parameter = f"feature_{position}"
            # Another feature may have that name as its own.
            while parameter in counts:
                parameter += "_"
        result[name] = parameter
    return result


def _sanitized(name: str) -> str:
    """A keyword argument's name as TensorFlow reads it (sanitize_arg_name in its sources)."""
    plain = "".join(character if character.isalnum() else "_" for character in name)
    return plain if plain[:1].isalpha() else f"arg_{plain}"


def _aliases(python_names: dict[str, str]) -> dict[str, str]:
    """Raw feature names to names that TensorFlow takes for a tensor.

    It takes few: no blanks, no `self`, no two that differ by case alone. A function's tensors lie
    in the order of their names: the aliases have the order of the names in Python.
    """
    ordered = sorted(python_names, key=python_names.__getitem__)
    return {name: f"input_{position:06}" for position, name in enumerate(ordered)}


def _restore_names(folder: pathlib.Path, served: ServedModel) -> None:
    """Gives predict_raw's inputs the features' own names, which TensorFlow would not take.

    A server reads them in the SignatureDef; tf.saved_model.load reads a function's parameters and
    their types in the object graph.
    """
    path = folder / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    (graph,) = saved_model.meta_graphs
    own = {alias: name for name, alias in served.aliases.items()}
    python = {alias: served.python_names[name] for alias, name in own.items()}
    _rename(graph.signature_def["predict_raw"].inputs, own)

    nodes, node = graph.object_graph_def.nodes, graph.object_graph_def.nodes[0]
    for step in ("signatures", "predict_raw"):
        node = nodes[next(child.node_id for child in node.children if child.local_name == step)]
    function = node.bare_concrete_function
    function.argument_keywords[:] = [python[alias] for alias in function.argument_keywords]
    for field in function.function_spec.fullargspec.named_tuple_value.values:
        if field.key == "kwonlyargs":
            for parameter in field.value.list_value.values:
                parameter.string_value = python[parameter.string_value]
    concrete = graph.object_graph_def.concrete_functions[function.concrete_function_name]
    _, parameters = concrete.canonicalized_input_signature.tuple_value.values
    for parameter in parameters.dict_value.fields.values():
        parameter.tensor_spec_value.name = python[parameter.tensor_spec_value.name]
    _rename(parameters.dict_value.fields, python)
    path.write_bytes(saved_model.SerializeToString(deterministic=True))


def _rename(messages: MutableMapping[str, Message], names: dict[str, str]) -> None:
    """Gives the messages of a protocol buffer's map other keys: old ones to new ones."""
    # Taken out first: a feature may have the name of another one's alias.
    taken = {}
    for old, message in messages.items():
        taken[names[old]] = type(message).FromString(message.SerializeToString())
    messages.clear()
    for new, message in taken.items():
        messages[new].CopyFrom(message)


def _one_row(schema: Schema) -> dict[str, dict[str, np.ndarray]]:
    """Inputs of each signature for one row, the same row in all: signature to input to [1, ...]."""
    raw, ids, values, example = {}, [], [], tf.train.Example()
    for feature in schema.categorical:
        value = next(iter(feature.vocabulary), _MISSING[feature.dtype])
        raw[feature.name] = np.array([value], "int64" if feature.dtype == "int64" else object)
        ids.append(feature.ids(raw[feature.name]))
        kinds = example.features.feature[feature.name]
        if feature.dtype == "int64":
            kinds.int64_list.value.append(value)
        else:
            kinds.bytes_list.value.append(value.encode())
    for feature in schema.numerical:
        raw[feature.name] = np.array([feature.mean], np.float32)
        values.append(feature.apply(raw[feature.name]))
        example.features.feature[feature.name].float_list.value.append(feature.mean)
    features = {}
    if ids:
        features["categorical"] = np.stack(ids, axis=1)
    if values:
        features["numerical"] = np.stack(values, axis=1)
    serialized = np.array([example.SerializeToString()], object)
    return {"serving_default": {"examples": serialized}, "predict_raw": raw, "predict": features}


def _write_warm_up(path: pathlib.Path, model_name: str, row: dict) -> None:
    """Writes one request of each signature and batch size, which TF Serving replays on loading."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in row.items():
            for batch in _WARM_UP_BATCHES:
                log = prediction_log_pb2.PredictionLog()
                request = log.predict_log.request
                request.model_spec.name = model_name
                request.model_spec.signature_name = signature
                for name, value in inputs.items():
                    repeated = np.repeat(value, batch, axis=0)
                    request.inputs[name].CopyFrom(tf.make_tensor_proto(repeated))
                writer.write(log.SerializeToString())


def _check(
    folder: pathlib.Path, model: ClickConversionModel, row: dict, python_names: dict[str, str]
) -> None:
    """Loads an export through a Session, as TF Serving does, and compares every signature.

    tf.saved_model.load succeeding would prove nothing: it can where a Session fails. It is tried
    too, for predict_raw's parameters.
    """
    features = {name: tf.constant(value) for name, value in row["predict"].items()}
    expected = model(features, training=False)

    def compare(outputs: dict[str, np.ndarray], name: str) -> None:
        for key, found in outputs.items():
            np.testing.assert_allclose(found, expected[key], rtol=1e-5, err_msg=f"{name} {key}")

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(folder))
        for name, inputs in row.items():
            signature = loaded.signature_def[name]
            feed = {signature.inputs[key].name: value for key, value in inputs.items()}
            fetch = {key: value.name for key, value in signature.outputs.items()}
            compare(session.run(fetch, feed), name)
    predict_raw = tf.saved_model.load(str(folder)).signatures["predict_raw"]
    arguments = {python_names[name]: tf.constant(v) for name, v in row["predict_raw"].items()}
    compare(predict_raw(**arguments), "predict_raw in Python")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("workdir", None, "The folder of a run of pwiser_tf.train.", required=True)
    flags.DEFINE_string("export_dir", None, "Where models are kept.", required=True)
    flags.DEFINE_string("model_name", "pwiser", "The model's name, and its folder's.")


def main() -> None:
    """Exports as the flags say."""
    args = flags.FLAGS
    with runs.file_errors():
        print("exported", export(args.workdir, args.export_dir, args.model_name))


if __name__ == "__main__":
    define_flags()
    run(main)
