"""SavedModel: one exported version in a TF 1 Session, which is how TF Serving holds it.

Checks, their order and their messages are those of TF Serving (servables/tensorflow/
predict_util.cc, classifier.cc, regressor.cc, multi_inference.cc).
"""

import dataclasses
import logging
import pathlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import tensor_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    prediction_log_pb2,
    regression_pb2,
)

from pwiser_serving import tensors
from pwiser_serving.server.calls import Call
from pwiser_serving.server.loader import load_error
from pwiser_serving.server.monitoring import Monitoring
from pwiser_serving.server.status import (
    Status,
    failed_precondition,
    invalid_argument,
    unimplemented,
)
from pwiser_serving.server.stoppable import Run, StoppableSession

WARM_UP_FILE = pathlib.Path("assets.extra", "tf_serving_warmup_requests")
MAX_WARM_UP_REQUESTS = 1000
DEFAULT_SIGNATURE = "serving_default"
CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"
# How many pairs of signature and outputs get their own part of the graph. Requests may name any
# outputs, so the number of pairs has no bound; further pairs compute all outputs.
_PARTS = 64

tf.get_logger().setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How versions are loaded.

    Attributes:
      tags: of the graph to load; warm_up_iterations: how often each warm-up request is answered,
      0 for never; session: the threads of a session and so on.
    """

    tags: Sequence[str] = (tf.saved_model.SERVING,)
    warm_up_iterations: int = 1
    session: config_pb2.ConfigProto = dataclasses.field(default_factory=config_pb2.ConfigProto)


class SavedModel:
    """A loaded version. Thread-safe. Methods raise Status as TF Serving answers the same mistake.

    When a `call` is ended, the method that runs for it stops and raises the call's Status.

    Args:
      folder: the version's folder, with `saved_model.pb` in it.
      monitoring: counts the load and the warm-up.
      options: see LoadOptions.

    Raises:
      Status: it does not load, or one of its warm-up requests fails.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        monitoring: Monitoring | None = None,
        options: LoadOptions | None = None,
    ):
        monitoring, options = monitoring or Monitoring(), options or LoadOptions()
        start, success = time.perf_counter(), False
        graph = tf.Graph()
        config = config_pb2.ConfigProto()
        # A spinning thread takes a core from the threads that bring work.
        config.experimental.disable_thread_spinning = True
        config.MergeFrom(options.session)
        session = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default():
                loaded = tf.compat.v1.saved_model.loader.load(
                    session, list(options.tags), str(folder)
                )
            self._session = StoppableSession(session)
            self.signatures: dict[str, meta_graph_pb2.SignatureDef] = dict(loaded.signature_def)
            # By the signature's name and its outputs.
            self._parts: dict[tuple[str, tuple[str, ...]], _Part] = {}
            self._making_parts = threading.Lock()
            success = True
            monitoring.loaded(str(folder), time.perf_counter() - start, success=True)
            start = time.perf_counter()
            records = self._warm_up(folder / WARM_UP_FILE, options.warm_up_iterations)
            if records:
                monitoring.warmed_up(str(folder), time.perf_counter() - start, records)
        except Status:
            session.close()
            raise
        except (tf.errors.OpError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            session.close()
            if isinstance(error, tf.errors.OpError):
                status = Status(error.error_code, error.message)
            else:
                # What the loader raises for a folder that is not a SavedModel.
                status = failed_precondition(f"{type(error).__name__}: {error}")
            # TensorFlow's C++ loader accepts a model without its variables, whose requests all
            # fail: then Python's reason is the one.
            raise (not success and load_error(folder, options.tags)) or status from None
        finally:
            if not success:
                monitoring.loaded(str(folder), time.perf_counter() - start, success=False)

    def close(self) -> None:
        """Frees the model. No method may be running."""
        self._session.close()

    def predict(
        self,
        name: str,
        inputs: Mapping[str, tensor_pb2.TensorProto | np.ndarray],
        output_filter: Sequence[str] = (),
        call: Call | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
          name: the signature's; inputs: its inputs by name; output_filter: the outputs wanted, or
          empty for all; call: for whom.

        Returns:
          The outputs by name.
        """
        signature = self.signatures.get(name)
        if signature is None:
            raise failed_precondition(f'Serving signature key "{name}" not found.')
        arrays = _inputs(signature, inputs)
        return self._run(name, _outputs(signature, output_filter), arrays, call)

    def classify(
        self, name: str, given: input_pb2.Input, call: Call | None = None
    ) -> classification_pb2.ClassificationResult:
        """Runs a signature from `inputs`, Examples, to `classes` or `scores` or both."""
        return self._infer(CLASSIFY, name, given, call)

    def regress(
        self, name: str, given: input_pb2.Input, call: Call | None = None
    ) -> regression_pb2.RegressionResult:
        """Runs a signature from `inputs`, Examples, to `outputs`, one number each."""
        return self._infer(REGRESS, name, given, call)

    def multi_inference(
        self,
        tasks: Sequence[inference_pb2.InferenceTask],
        given: input_pb2.Input,
        call: Call | None = None,
    ) -> list[inference_pb2.InferenceResult]:
        """Classifies and regresses the same Examples by several signatures, one after the other.

        Args:
          tasks: each names a signature, and `classify` or `regress` as its method; given: the
          request's Examples; call: for whom.

        Returns:
          The result of each task, without the model's name and version.
        """
        names = [_signature_name(task) for task in tasks]
        for position, (task, name) in enumerate(zip(tasks, names, strict=True)):
            if not task.model_spec.name:
                raise invalid_argument("Found ModelSpec with an empty model name.")
            if task.model_spec.name != tasks[0].model_spec.name:
                raise invalid_argument(
                    "All ModelSpecs in a MultiInferenceRequest must access the same model name."
                )
            if name in names[:position]:
                raise invalid_argument(f"Duplicate evaluation of signature: {name}")
            if name not in self.signatures:
                raise invalid_argument(f"Requested signature not found in model graph: {name}")
            if task.method_name not in (CLASSIFY, REGRESS):
                raise unimplemented(f"Unsupported signature method_name: {task.method_name}")
            self._example_outputs(task.method_name, name)
        results = []
        for task, name in zip(tasks, names, strict=True):
            result = self._infer(task.method_name, name, given, call)
            kind = "classification" if task.method_name == CLASSIFY else "regression"
            results.append(inference_pb2.InferenceResult(**{f"{kind}_result": result}))
        return results

    def _infer(self, method: str, name: str, given: input_pb2.Input, call: Call | None):
        """The result of CLASSIFY or REGRESS."""
        outputs, examples = self._example_outputs(method, name), _examples(given)
        found = self._run(name, outputs, {"inputs": examples}, call)
        if method == CLASSIFY:
            return _classification(found, len(examples))
        return _regression(found["outputs"], len(examples))

    def _example_outputs(self, method: str, name: str) -> tuple[str, ...]:
        """The outputs of a signature that classifies or regresses; Status if it cannot."""
        if name not in self.signatures:
            raise invalid_argument(f"No signature was found with the name: {name}")
        signature = self.signatures[name]
        if len(signature.inputs) != 1:
            raise invalid_argument("Expected one input Tensor.")
        count, classifies = len(signature.outputs), method == CLASSIFY
        if classifies and count not in (1, 2):
            raise invalid_argument(f"Expected one or two output Tensors, found {count}")
        if not classifies and count != 1:
            raise invalid_argument("Expected one output Tensor.")
        kind = "classification" if classifies else "regression"
        if "inputs" not in signature.inputs:
            raise invalid_argument(f"No {kind} inputs found in SignatureDef: {signature}")
        expected = ("classes", "scores") if classifies else ("outputs",)
        wanted = tuple(alias for alias in expected if alias in signature.outputs)
        if not wanted and classifies:
            raise invalid_argument(
                "Expected classification signature outputs to contain at least one of "
                f'"classes" or "scores". Signature was: {signature}'
            )
        if not wanted:
            raise invalid_argument(f"No regression outputs found in SignatureDef: {signature}")
        return wanted

    def _warm_up(self, path: pathlib.Path, iterations: int) -> int:
        """Answers the requests of a warm-up file, if there is one, and returns their number."""
        records = 0
        for log in _warm_up_logs(path) if iterations else ():
            records += 1
            for _ in range(iterations):
                self._answer_log(log)
        return records

    def _answer_log(self, log: prediction_log_pb2.PredictionLog) -> None:
        kind = log.WhichOneof("log_type")
        request = getattr(getattr(log, kind), "request", None) if kind else None
        if kind == "predict_log":
            self.predict(_signature_name(request), request.inputs, request.output_filter)
        elif kind == "classify_log":
            self.classify(_signature_name(request), request.input)
        elif kind == "regress_log":
            self.regress(_signature_name(request), request.input)
        elif kind == "multi_inference_log":
            self.multi_inference(request.tasks, request.input)
        elif kind is not None:
            number = log.DESCRIPTOR.fields_by_name[kind].number
            raise unimplemented(f"Unsupported log_type for warmup: {number}")

    def _run(
        self,
        name: str,
        outputs: tuple[str, ...],
        arrays: Mapping[str, np.ndarray],
        call: Call | None,
    ) -> dict[str, np.ndarray]:
        """Runs a signature to some of its outputs, by name."""
        part = self._parts.get((name, outputs)) or self._make_part(name, outputs)
        found = part(arrays, call or Call())
        return found if len(found) == len(outputs) else {alias: found[alias] for alias in outputs}

    def _make_part(self, name: str, outputs: tuple[str, ...]) -> "_Part":
        """The part of the graph from a signature's inputs to some of its outputs, or to all."""
        signature = self.signatures[name]
        with self._making_parts:
            if len(self._parts) >= _PARTS:
                outputs = tuple(sorted(signature.outputs))
            if (name, outputs) in self._parts:
                return self._parts[name, outputs]
            # Sorted by the tensor's name: TF Serving's messages count the arguments so.
            feeds = sorted(signature.inputs.items(), key=lambda item: item[1].name)
            infos = [signature.outputs[alias] for alias in outputs]
            for info in (*signature.inputs.values(), *infos):
                # The session refuses a tensor without a type.
                if info.dtype and _numpy_type(info) is None:
                    kind = tensors.data_type_name(info.dtype)
                    raise unimplemented(f"{info.name} is a {kind}, which this server cannot hold")
            fetches = sorted({info.name for info in infos})
            try:
                run = self._session.part([info.name for _, info in feeds], fetches)
            except tf.errors.OpError as error:
                raise Status(error.error_code, error.message) from None
            part = self._parts[name, outputs] = _Part(
                run=run,
                inputs=[(alias, info.dtype) for alias, info in feeds],
                outputs=[
                    (alias, fetches.index(info.name), _numpy_type(info))
                    for alias, info in zip(outputs, infos, strict=True)
                ],
            )
            return part


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A part of a graph, called with arrays by input name; gives arrays by output name.

    Attributes:
      run: from arrays to values; inputs: (alias, data type) of each argument, in order; outputs:
      (alias, position in the result, NumPy type) of each output.
    """

    run: Run
    inputs: Sequence[tuple[str, int]]
    outputs: Sequence[tuple[str, int, np.dtype | None]]

    def __call__(self, arrays: Mapping[str, np.ndarray], call: Call) -> dict[str, np.ndarray]:
        arguments = []
        for alias, expected in self.inputs:
            array = arrays[alias]
            found = tensors.data_type(array)
            if found != expected:
                raise invalid_argument(
                    f"Expects arg[{len(arguments)}] to be {tensors.data_type_name(expected)} "
                    f"but {tensors.data_type_name(found)} is provided"
                )
            arguments.append(array)
        try:
            results = self.run(arguments, call)
        except tf.errors.OpError as error:
            raise Status(error.error_code, error.message) from None
        except UnicodeDecodeError as error:
            # The op quotes bytes of the request, and TensorFlow cannot make a Python exception of
            # them, so its code is lost; only a request brings bytes that are no text.
            raise invalid_argument(error.object.decode("utf-8", "replace")) from None
        outputs = {}
        for alias, position, dtype in self.outputs:
            array = np.asarray(results[position])
            # TensorFlow gives quantized numbers as plain ones.
            quantized = dtype is not None and dtype.names and dtype != array.dtype
            outputs[alias] = array.view(dtype) if quantized else array
        return outputs


def _inputs(
    signature: meta_graph_pb2.SignatureDef,
    given: Mapping[str, tensor_pb2.TensorProto | np.ndarray],
) -> dict[str, np.ndarray]:
    """The arrays of a request, by input name, with the signature's defaults."""
    aliases = sorted(signature.inputs)
    if len(given) > len(aliases) or (len(given) < len(aliases) and not signature.defaults):
        expected, sent = set(aliases), set(given)
        raise invalid_argument(
            f"input size does not match signature: {len(sent)}!={len(expected)} "
            f"len({_names(sent)}) != len({_names(expected)}). "
            f"Sent extra: {_names(sent - expected)}. "
            f"Missing but required: {_names(expected - sent)}."
        )
    arrays, used = {}, 0
    for alias in aliases:
        # Not `given[alias]`: a message's map would add an entry.
        tensor = given.get(alias)
        if tensor is not None:
            used += 1
        elif alias in signature.defaults:
            tensor = signature.defaults[alias]
        else:
            raise invalid_argument(
                f"Signature input alias: {alias}(feed name: {signature.inputs[alias].name}) not "
                "found in request and no default value provided. Inputs expected to be in the "
                f"request {_names(given)}, or default input alias set: "
                + ",".join(sorted(signature.defaults))
            )
        try:
            # What came as JSON is an array already.
            arrays[alias] = tensor if isinstance(tensor, np.ndarray) else tensors.decode(tensor)
        except ValueError:
            raise invalid_argument(f"tensor parsing error: {alias}") from None
    if used < len(given):
        known = ",".join(alias for alias in aliases if alias in given)
        raise invalid_argument(
            f"Inputs contains invalid name. Used request inputs: {known}, "
            f"request input: {','.join(sorted(given))}"
        )
    return arrays


def _outputs(signature: meta_graph_pb2.SignatureDef, wanted: Sequence[str]) -> tuple[str, ...]:
    """The names of the outputs to answer with."""
    for position, alias in enumerate(wanted):
        if alias not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {alias} "
                f"Outputs expected to be in the set {_names(signature.outputs)}."
            )
        if alias in wanted[:position]:
            raise invalid_argument(f"duplicate output tensor alias: {alias}")
    return tuple(sorted(wanted or signature.outputs))


def _classification(
    found: Mapping[str, np.ndarray], rows: int
) -> classification_pb2.ClassificationResult:
    """The answer for so many Examples out of the outputs wanted."""
    for alias, data_type in (("classes", "DT_STRING"), ("scores", "DT_FLOAT")):
        if alias not in found:
            continue
        values = found[alias]
        if values.ndim != 2:
            raise invalid_argument(
                f"Expected Tensor shape: [batch_size num_classes] but got {_shape_text(values)}"
            )
        if _data_type_text(values) != data_type:
            raise invalid_argument(
                f"Expected {alias} Tensor of {data_type}. Got: {_data_type_text(values)}"
            )
        if len(values) != rows:
            raise invalid_argument(
                f"Expected {alias} output batch size of {rows}. Got: {len(values)}"
            )
    widths = [values.shape[1] for values in found.values()]
    if len(set(widths)) > 1:
        raise invalid_argument(
            f"Tensors class and score should match in dim_size(1). Got {widths[0]} vs. {widths[1]}"
        )
    result = classification_pb2.ClassificationResult()
    for row in range(rows):
        classes = result.classifications.add().classes
        for column in range(widths[0]):
            one = classes.add()
            if "classes" in found:
                # The field is text: other bytes are an error of the model.
                one.label = found["classes"][row, column].decode("utf-8", "replace")
            if "scores" in found:
                one.score = found["scores"][row, column]
    return result


def _regression(values: np.ndarray, rows: int) -> regression_pb2.RegressionResult:
    """The answer for so many Examples out of the output."""
    if not (values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)):
        raise invalid_argument(
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
            f"{_shape_text(values)}"
        )
    if len(values) != rows:
        raise invalid_argument(
            f"Input batch size did not match output batch size: {rows} vs. {len(values)}"
        )
    if _data_type_text(values) != "DT_FLOAT":
        raise invalid_argument(
            f"Expected output Tensor of DT_FLOAT.  Got: {_data_type_text(values)}"
        )
    result = regression_pb2.RegressionResult()
    for value in values.ravel().tolist():
        result.regressions.add(value=value)
    return result


def _examples(given: input_pb2.Input) -> np.ndarray:
    """The serialized Examples of a Classify or Regress request, [n] of bytes, n at least 1."""
    kind = given.WhichOneof("kind")
    examples = getattr(given, kind).examples if kind else ()
    if not examples:
        raise invalid_argument("Input is empty.")
    # Concatenated messages are read as one: so each Example gets the context.
    context = given.example_list_with_context.context.SerializeToString()
    serialized = (context + example.SerializeToString() for example in examples)
    return np.fromiter(serialized, object, len(examples))


def _numpy_type(info: meta_graph_pb2.TensorInfo) -> np.dtype | None:
    """A tensor's NumPy type; of a reference to a variable, which TF 1 has, the variable's."""
    return tensors.numpy_type(info.dtype % 100)


def _shape_text(array: np.ndarray) -> str:
    return "[" + ",".join(map(str, array.shape)) + "]"


def _data_type_text(array: np.ndarray) -> str:
    return "DT_" + tensors.data_type_name(tensors.data_type(array)).upper()


def _signature_name(request) -> str:
    return request.model_spec.signature_name or DEFAULT_SIGNATURE


def _names(names) -> str:
    return "{" + ",".join(sorted(names)) + "}"


def _warm_up_logs(path: pathlib.Path) -> Iterator[prediction_log_pb2.PredictionLog]:
    """The records of a warm-up file, a TFRecord; none without a file."""
    if not path.exists():
        return
    # One more than is allowed: enough to know that there are too many.
    records = tf.data.TFRecordDataset(str(path)).take(MAX_WARM_UP_REQUESTS + 1)
    for number, record in enumerate(records.as_numpy_iterator(), 1):
        if number > MAX_WARM_UP_REQUESTS:
            raise invalid_argument(
                f"Number of warmup records exceeds the maximum ({MAX_WARM_UP_REQUESTS}) at {path}"
            )
        try:
            yield prediction_log_pb2.PredictionLog.FromString(record)
        except DecodeError:
            raise invalid_argument(f"Failed to parse warmup record {number} from {path}") from None
