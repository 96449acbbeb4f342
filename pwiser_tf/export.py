"""Exports a trained run as a SavedModel that TF Serving loads.

    python -m pwiser_tf.export --workdir=runs/us --export_dir=models --model_name=us

It writes <export_dir>/<model_name>/<version>/; the version is the highest one there plus 1. The
model has three signatures, which all return ctr, cvr and ctcvr, float [batch], and with --score a
score:

    serving_default  examples: string [batch], serialized tf.train.Examples of raw features
    predict_raw      one tensor [batch] per raw feature: int64, string or float; of a list [batch,
                     max_length], or any other length
    predict          categorical: int64 [batch, C] and numerical: float [batch, N], as in the
                     records (ids, transformed values): the fast path

A missing raw value is NaN, "" or the smallest int64. An Example may leave the feature out.

In Python, predict_raw also takes the features by name. A name that is not an identifier goes into
a dictionary:

    predict_raw = tf.saved_model.load("models/us/1").signatures["predict_raw"]
    predict_raw(item=[3, 4], **{"price (€)": [0.5, 2.0]})["ctcvr"]

In Python, TensorFlow replaces each character that is not a letter or digit by "_", and puts "arg_"
before a name that does not begin with a letter. This does not work for four kinds of names. Their
features are named feature_N, where N is the position in the schema, from 0.
`structured_input_signature` lists the names to use. A server takes every feature by its own name.

    "a b" and "a_b"         names that become equal
    "class", "from"         Python's keywords
    "self"                  Python uses it for the function itself
    "m²"                    a character that Python does not allow in a name
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
from pwiser_tf.records import PADDING, empty_features, feature_shapes
from pwiser_tf.schema import Categorical, Schema, missing_value
from pwiser_tf.score import Score

OUTPUTS = ("ctr", "cvr", "ctcvr", "interest", "score")
# Prefix of a version that is being written. The next export removes one that a killed export left.
_PARTIAL = "partial-"
# Files next to the graph. TF Serving reads only the warm-up requests among them.
_EXTRA_ASSETS = "assets.extra"
_WARM_UP_FILE = "tf_serving_warmup_requests"
# The batch sizes of warm-up requests, which make a server's first answers as fast as later ones.
_WARM_UP_BATCHES = (1, 64, 512)
# The largest relative difference between the outputs of an export and the model. A logit or a power
# of a probability magnifies its rounding errors.
_TOLERANCE, _DERIVED_TOLERANCE = 1e-5, 1e-3
# A variable with at most this many elements becomes a constant of the graph.
_LARGEST_CONSTANT = 2**16

# From tensors by name to tensors by name.
Function = Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]


class ServedModel(tf.Module):
    """A model with its preprocessing, and one function per signature.

    It tracks only the variables that its functions read, not the Keras model: saving the model
    would trace every layer again, also in training mode.
    """

    def __init__(self, model: ClickConversionModel, schema: Schema, score: Score | None = None):
        super().__init__(name="served_model")
        self._schema = schema
        self._raw_features = RawFeatures(schema)
        # Whether outputs are computed from the model's probabilities.
        self.derived = bool(score or getattr(model, "calibration", None))
        shapes = feature_shapes(schema)
        self.feature_aliases = _feature_aliases(shapes)
        features = {
            name: _spec(self.feature_aliases[name], dtype, width)
            for name, (dtype, width) in shapes.items()
        }
        self._widths = {name: spec.shape[1] for name, spec in features.items()}
        self._call_model, self.read_variables = _with_constants(
            lambda inputs: _outputs(model, score, inputs), features
        )
        # Of predict_raw's lists and weights. The graph takes any; a client cuts and fills up
        # to this one, which the SignatureDef states.
        self.lengths = {
            name: feature.max_length
            for feature in schema.lists
            for name in (feature.name, *([f"{feature.name}.weights"] if feature.weighted else []))
        }
        example_spec = self._example_spec()
        self.python_names = _python_names(example_spec)
        self.aliases = _aliases(self.python_names)
        raw = {
            name: _spec(
                self.aliases[name], spec.dtype, *([None] if name in self.lengths else spec.shape)
            )
            for name, spec in example_spec.items()
        }
        self.functions = {
            name: tf.function(function).get_concrete_function(inputs)
            for name, function, inputs in (
                ("serving_default", self._examples, {"examples": _spec("examples", tf.string)}),
                ("predict_raw", self._raw, raw),
                ("predict", self._features, features),
            )
        }

    def _example_spec(self) -> dict:
        schema, spec = self._schema, {}
        for feature in schema.categorical:
            missing = missing_value(feature.dtype)
            spec[feature.name] = tf.io.FixedLenFeature([], tf.as_dtype(feature.dtype), missing)
        for feature in schema.numerical:
            spec[feature.name] = tf.io.FixedLenFeature([], tf.float32, np.nan)
        for vector in schema.vectors:
            missing = np.full(vector.length, np.nan)
            spec[vector.name] = tf.io.FixedLenFeature([vector.length], tf.float32, missing)
        for feature in schema.lists:
            spec[feature.name] = tf.io.FixedLenSequenceFeature(
                [], tf.as_dtype(feature.dtype), True, missing_value(feature.dtype)
            )
            if feature.weighted:
                name = f"{feature.name}.weights"
                spec[name] = tf.io.FixedLenSequenceFeature([], tf.float32, True, 0.0)
        return spec

    def _examples(self, inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return self._raw(tf.io.parse_example(inputs["examples"], self._example_spec()))

    def _raw(self, raw: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return self._features(self._raw_features(raw))

    def _features(self, features: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # A server does not check shapes against the signature, and one column would be broadcast.
        for name in (feature.name for feature in self._schema.lists if feature.weighted):
            tf.debugging.assert_equal(
                tf.shape(features[f"weights/{name}"]),
                tf.shape(features[f"ids/{name}"]),
                f"the weights of list {name} have another shape than its values",
            )
        outputs = self._call_model(
            {
                name: tf.ensure_shape(values, [None, self._widths[name]])
                for name, values in features.items()
            }
        )
        return {name: outputs[name] for name in OUTPUTS if name in outputs}


def _outputs(
    model: ClickConversionModel, score: Score | None, features: dict[str, tf.Tensor]
) -> dict[str, tf.Tensor]:
    """The model's outputs and, if one is asked for, the score."""
    outputs = model(features, training=False)
    return score.add_to(outputs) if score else outputs


def _with_constants(
    function: Function, inputs: dict[str, tf.TensorSpec]
) -> tuple[Function, list[tf.Variable]]:
    """The function with its small variables as constants of its graph, and the other variables.

    A server looks up every variable for every request, which takes longer than the arithmetic of a
    small batch. What depends only on constants (most of batch normalisation) is computed once,
    when the model is loaded. Large variables stay variables, as a graph has a limit of 2 GB.
    """
    traced = tf.function(function).get_concrete_function(inputs)
    variables = {variable.handle.ref(): variable for variable in traced.variables}
    graph = traced.graph.as_graph_def()
    read_otherwise = {
        name for node in graph.node if node.op != "ReadVariableOp" for name in node.input
    }
    # By the name of the placeholder of a captured tensor.
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
        feeds = {f"{inputs[name].name}:0": tensor for name, tensor in features.items()}
        here = tf.compat.v1.get_default_graph()
        feeds |= {name: here.capture(tensor) for name, tensor in captured.items()}
        found = tf.graph_util.import_graph_def(graph, feeds, list(outputs.values()), name="model")
        return dict(zip(outputs, found, strict=True))

    # One concrete function, which all signatures share.
    return imported.get_concrete_function(inputs), kept


def _constant(name: str, value: np.ndarray) -> tf.compat.v1.NodeDef:
    """A graph node with a constant value."""
    node = tf.compat.v1.NodeDef(name=name, op="Const")
    node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    return node


def export(
    folder: str | os.PathLike,
    export_dir: str | os.PathLike,
    model_name: str,
    score: Score | None = None,
) -> pathlib.Path:
    """Exports the best epoch of the run in `folder` as the model's next version.

    Before the version's folder appears, the export is loaded through a Session, as TF Serving
    does, and in Python, and its outputs are compared with those of the Keras model. Then the
    folder appears in one rename.

    Args:
      score: what to export as the additional output `score`.

    Returns:
      The new version's folder, <export_dir>/<model_name>/<version>.

    Raises:
      DataError: the folder holds no run, or the score needs an output that the model lacks.
    """
    model, _, schema = runs.load_run(folder)
    if score:
        score.require(model(empty_features(schema)))
    served = ServedModel(model, schema, score)
    row = _one_row(schema)
    base = pathlib.Path(export_dir) / model_name
    base.mkdir(parents=True, exist_ok=True)
    with runs.locked(base):
        expected = {name: tf.constant(value) for name, value in row["predict"].items()}
        expected = _outputs(model, score, expected)
        return _write_version(base, expected, served, schema, model_name, row)


def _write_version(base, expected, served, schema, model_name, row) -> pathlib.Path:
    """Writes the folder of the next version; see `export`. The caller holds the lock of `base`."""
    for abandoned in base.glob(f"{_PARTIAL}*"):
        shutil.rmtree(abandoned)
    versions = [int(path.name) for path in base.iterdir() if path.name.isdecimal()]
    version = max(versions, default=0) + 1
    # In the same folder, so that a rename is enough. Servers ignore names that are not numbers.
    partial = base / f"{_PARTIAL}{version}"
    partial.mkdir()
    try:
        tf.saved_model.save(served, str(partial), signatures=served.functions)
        _restore_names(partial, served)
        extra = partial / _EXTRA_ASSETS
        extra.mkdir()
        schema.save(extra)
        _write_warm_up(extra / _WARM_UP_FILE, model_name, row)
        _compare_with_model(partial, expected, row, served)
        partial.rename(base / str(version))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return base / str(version)


def _spec(name: str, dtype: tf.DType | type, *inner: int | None) -> tf.TensorSpec:
    return tf.TensorSpec([None, *inner], dtype, name)


def _python_names(names: Iterable[str]) -> dict[str, str]:
    """Maps raw feature names, in order, to the parameter names that TensorFlow uses in Python.

    A name that is not a valid or not a unique parameter becomes `feature_N`; see the module.
    """
    sanitized = {name: _sanitized(name) for name in names}
    counts = collections.Counter(sanitized.values())
    result = {}
    for position, (name, parameter) in enumerate(sanitized.items()):
        possible = parameter.isidentifier() and not keyword.iskeyword(parameter)
        if counts[parameter] > 1 or parameter == "self" or not possible:
            parameter = f"feature_{position}"
            # Another feature may already have that name.
            while parameter in counts:
                parameter += "_"
        result[name] = parameter
    return result


def _sanitized(name: str) -> str:
    """A name as TensorFlow writes it as a keyword argument (sanitize_arg_name in its source)."""
    plain = "".join(character if character.isalnum() else "_" for character in name)
    return plain if plain[:1].isalpha() else f"arg_{plain}"


def _aliases(python_names: dict[str, str]) -> dict[str, str]:
    """Maps raw feature names to names that TensorFlow accepts for a tensor.

    It does not accept blanks, `self`, or two names that differ only by case. The tensors of a
    function are ordered by name, so the aliases have the order of the names in Python.
    """
    ordered = sorted(python_names, key=python_names.__getitem__)
    return {name: f"input_{position:06}" for position, name in enumerate(ordered)}


def _feature_aliases(names: Iterable[str]) -> dict[str, str]:
    """Names that TensorFlow takes, in the same order: "ids_000" for "ids/NAME"."""
    aliases = {}
    for position, name in enumerate(sorted(names)):
        kind, slash, _ = name.partition("/")
        aliases[name] = f"{kind}_{position:03d}" if slash else name
    return aliases


def _restore_names(folder: pathlib.Path, served: ServedModel) -> None:
    """Replaces the aliases of predict_raw's inputs by the features' names in the saved file, and
    states the lengths of lists.

    A server reads them from the SignatureDef. tf.saved_model.load reads the parameters of a
    function and their types from the object graph.
    """
    path = folder / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    (graph,) = saved_model.meta_graphs
    own = {alias: name for name, alias in served.aliases.items()}
    python = {alias: served.python_names[name] for alias, name in own.items()}
    inputs = graph.signature_def["predict_raw"].inputs
    _rename(inputs, own)
    for name, length in served.lengths.items():
        inputs[name].tensor_shape.dim[1].size = length
    features = {alias: name for name, alias in served.feature_aliases.items()}
    _rename(graph.signature_def["predict"].inputs, features)

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
    """Renames the keys of a protocol buffer's map; `names` maps old keys to new ones."""
    # Copied first, because a feature may have the name of another feature's alias.
    copies = {}
    for old, message in messages.items():
        copies[names[old]] = type(message).FromString(message.SerializeToString())
    messages.clear()
    for new, message in copies.items():
        messages[new].CopyFrom(message)


def _one_row(schema: Schema) -> dict[str, dict[str, np.ndarray]]:
    """One row as the inputs of each signature: signature to name to array [1, ...]."""
    raw, ids, values, features = {}, [], [], {}
    for feature in schema.categorical:
        raw[feature.name] = _some_value(feature)
        ids.append(feature.ids(raw[feature.name]))
    for feature in schema.numerical:
        raw[feature.name] = np.array([feature.mean], np.float32)
        if feature.transform == "quantiles":
            ids.append(feature.buckets(raw[feature.name]))
        else:
            values.append(feature.apply(raw[feature.name])[:, None])
    for vector in schema.vectors:
        raw[vector.name] = np.full((1, vector.length), vector.fill_value, np.float32)
        values.append(vector.apply(raw[vector.name]))
    if ids:
        features["categorical"] = np.stack(ids, axis=1)
    if values:
        features["numerical"] = np.concatenate(values, axis=1)
    for feature in schema.lists:
        value = _some_value(feature)
        rest = np.full(feature.max_length - 1, missing_value(feature.dtype), value.dtype)
        raw[feature.name] = np.concatenate([value, rest])[None]
        place = np.arange(feature.max_length)[None]
        known = (place == 0) & (value != missing_value(feature.dtype))
        features[f"ids/{feature.name}"] = np.where(known, feature.ids(value)[:, None], PADDING)
        if feature.weighted:
            weights = np.float32(known)
            raw[f"{feature.name}.weights"] = features[f"weights/{feature.name}"] = weights
    example = tf.train.Example()
    for name, value in raw.items():
        kinds = example.features.feature[name]
        if value.dtype == object:
            kinds.bytes_list.value.extend(text.encode() for text in value.ravel())
        elif value.dtype == np.int64:
            kinds.int64_list.value.extend(value.ravel())
        else:
            kinds.float_list.value.extend(value.ravel())
    serialized = np.array([example.SerializeToString()], object)
    return {"serving_default": {"examples": serialized}, "predict_raw": raw, "predict": features}


def _some_value(feature: Categorical) -> np.ndarray:
    """A known raw value of the feature, where there is one: [1]."""
    value = next(iter(feature.vocabulary), missing_value(feature.dtype))
    return np.array([value], "int64" if feature.dtype == "int64" else object)


def _write_warm_up(path: pathlib.Path, model_name: str, row: dict) -> None:
    """Writes a request of each signature and batch size; TF Serving runs them when it loads."""
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


def _compare_with_model(
    folder: pathlib.Path, expected: dict[str, tf.Tensor], row: dict, served: ServedModel
) -> None:
    """Loads an export through a Session, as TF Serving does, and compares every signature with the
    outputs that are expected for the row.

    tf.saved_model.load is not enough: it can succeed where a Session fails. It is used too, to
    check the parameters of predict_raw.
    """
    tolerance = _DERIVED_TOLERANCE if served.derived else _TOLERANCE

    def compare(outputs: dict[str, np.ndarray], name: str) -> None:
        for key, found in outputs.items():
            message = f"{name} {key}"
            np.testing.assert_allclose(found, expected[key], tolerance, err_msg=message)

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(folder))
        for name, inputs in row.items():
            signature = loaded.signature_def[name]
            feed = {signature.inputs[key].name: value for key, value in inputs.items()}
            fetch = {key: value.name for key, value in signature.outputs.items()}
            compare(session.run(fetch, feed), name)
    predict_raw = tf.saved_model.load(str(folder)).signatures["predict_raw"]
    arguments = {
        served.python_names[name]: tf.constant(v) for name, v in row["predict_raw"].items()
    }
    compare(predict_raw(**arguments), "predict_raw in Python")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("workdir", None, "The folder of a run of pwiser_tf.train.", required=True)
    flags.DEFINE_string("export_dir", None, "The folder of exported models.", required=True)
    flags.DEFINE_string("model_name", "pwiser", "The name of the model and of its folder.")
    flags.DEFINE_string(
        "score",
        None,
        "An additional output, score, to rank by: a product of powers of ctr, cvr, ctcvr and, if "
        "the model has it, interest, such as ctr^0.75*ctcvr^0.25.",
    )


def main() -> None:
    """Exports the run that the flags name."""
    args = flags.FLAGS
    score = Score.parse(args.score) if args.score else None
    with runs.file_errors():
        print("exported", export(args.workdir, args.export_dir, args.model_name, score))


if __name__ == "__main__":
    define_flags()
    run(main)
