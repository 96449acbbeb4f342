"""The gRPC services: a request's checks and its answer, in TensorFlow Serving's own messages.

PredictionService, ModelService and, on request, the standard health service. Codes, messages and
the order of checks are those of tensorflow/serving.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from pwiser_serving import tensors
from pwiser_serving.server.calls import MAX_HELD, Call, Turns
from pwiser_serving.server.models import Models
from pwiser_serving.server.monitoring import Monitoring
from pwiser_serving.server.saved_model import DEFAULT_SIGNATURE
from pwiser_serving.server.status import Status, cancelled, internal, invalid_argument

_log = logging.getLogger("pwiser_serving")

# The one metadata field there is.
SIGNATURE_FIELD = "signature_def"
# Requests that are open at a time; one more is refused. MAX_HELD of them have a thread, which they
# hold before their bytes have arrived.
_MAX_REQUESTS = 512
# A caller whose machine is gone says nothing. It is asked after this time, and then dropped.
_KEEPALIVE_MILLISECONDS = 60_000
# How soon a health watch notices that its caller or the server has ended.
_TICK_SECONDS = 0.05


class Service:
    """Answers requests, messages in and out; mistakes are raised as Status.

    The methods of PredictionService and ModelService, under their names.

    Args:
      models: what is in service. Their servables have `signatures`, `predict`, `classify`, ... as
        saved_model.SavedModel has.
      monitoring: counts the requests.
      turns: how many requests of a model run at a time.
      as_content: numbers in answers as raw bytes instead of one by one.
    """

    def __init__(
        self, models: Models, monitoring: Monitoring, turns: Turns, *, as_content: bool = False
    ):
        self._models, self._monitoring, self._turns = models, monitoring, turns
        self._as_content = as_content

    def Predict(
        self, request: predict_pb2.PredictRequest, call: Call
    ) -> predict_pb2.PredictResponse:
        response = predict_pb2.PredictResponse()

        def fill(outputs):
            for alias, array in outputs.items():
                tensors.fill(response.outputs[alias], array, as_content=self._as_content)

        inputs = request.inputs, request.output_filter
        return self._answer("Predict", request, response, call, inputs, fill)

    def Classify(
        self, request: classification_pb2.ClassificationRequest, call: Call
    ) -> classification_pb2.ClassificationResponse:
        response = classification_pb2.ClassificationResponse()
        fill = response.result.CopyFrom
        return self._answer("Classify", request, response, call, [request.input], fill)

    def Regress(
        self, request: regression_pb2.RegressionRequest, call: Call
    ) -> regression_pb2.RegressionResponse:
        response = regression_pb2.RegressionResponse()
        fill = response.result.CopyFrom
        return self._answer("Regress", request, response, call, [request.input], fill)

    def MultiInference(
        self, request: inference_pb2.MultiInferenceRequest, call: Call
    ) -> inference_pb2.MultiInferenceResponse:
        # As in TF Serving, the first task names the model, and no such request is counted.
        spec = request.tasks[0].model_spec if request.tasks else model_pb2.ModelSpec()
        with self._turns.turn(spec.name, call), self._use(spec) as (version, model):
            results = model.multi_inference(request.tasks, request.input, call)
        for task, result in zip(request.tasks, results, strict=True):
            _name_model(result.model_spec, task.model_spec, version)
        return inference_pb2.MultiInferenceResponse(results=results)

    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, call: Call | None = None
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        spec = _model_spec(request)
        if not request.metadata_field:
            raise invalid_argument(
                "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in request.metadata_field:
            if field != SIGNATURE_FIELD:
                raise invalid_argument(f"Metadata field {field} is not supported")
        with self._use(spec) as (version, model):
            signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=model.signatures)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = spec.name
        response.model_spec.version.value = version
        response.metadata[SIGNATURE_FIELD].Pack(signatures)
        return response

    def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest, call: Call | None = None
    ) -> get_model_status_pb2.GetModelStatusResponse:
        spec = _model_spec(request)
        # As in TF Serving, a label chooses nothing here: all versions are listed.
        version = spec.version.value if spec.HasField("version") else None
        return get_model_status_pb2.GetModelStatusResponse(
            model_version_status=self._models.statuses(spec.name, version)
        )

    def HandleReloadConfigRequest(
        self, request: model_management_pb2.ReloadConfigRequest, call: Call | None = None
    ) -> model_management_pb2.ReloadConfigResponse:
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        try:
            self._models.reload(request.config)
        except Status as status:
            _log.error("the new configuration: %s", status.message, extra={"event": "reload"})
            raise
        _log.info("a new configuration is in force", extra={"event": "reload"})
        return response

    def run(self, api: str, name: str, method: Callable, *inputs, call: Call):
        """The result of a model's method, whose time is counted as `api` of the model `name`."""
        start = time.perf_counter()
        result = method(*inputs, call=call)
        self._monitoring.runtime(name, api, time.perf_counter() - start)
        return result

    def _answer(self, api: str, request, response, call: Call, inputs, fill: Callable):
        """The response of a method that runs the model, on `inputs`; `fill` takes the result."""
        name = request.model_spec.name
        with self._monitoring.request(name, api, "GRPC"):
            spec = _model_spec(request)
            with self._turns.turn(name, call), self._use(spec) as (version, model):
                key = spec.signature_name or DEFAULT_SIGNATURE
                result = self.run(api, name, getattr(model, api.lower()), key, *inputs, call=call)
            fill(result)
            _name_model(response.model_spec, spec, version)
        return response

    def _use(self, spec: model_pb2.ModelSpec):
        """The version that a request asks for, as Models.use gives it."""
        return self._models.use(
            spec.name,
            spec.version.value if spec.HasField("version") else None,
            spec.version_label if spec.HasField("version_label") else None,
        )


def _model_spec(request) -> model_pb2.ModelSpec:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")
    return request.model_spec


def _name_model(answered: model_pb2.ModelSpec, asked: model_pb2.ModelSpec, version: int) -> None:
    """Fills an answer's spec: the model that was asked, and the version that answered."""
    answered.name = asked.name
    answered.version.value = version
    answered.signature_name = asked.signature_name or DEFAULT_SIGNATURE


# The methods of each service, and their requests. Before tensorflow-serving-api 2.21 the modules
# that describe the services cannot be imported.
_SERVICES = {
    "PredictionService": {
        "Predict": predict_pb2.PredictRequest,
        "Classify": classification_pb2.ClassificationRequest,
        "Regress": regression_pb2.RegressionRequest,
        "MultiInference": inference_pb2.MultiInferenceRequest,
        "GetModelMetadata": get_model_metadata_pb2.GetModelMetadataRequest,
    },
    "ModelService": {
        "GetModelStatus": get_model_status_pb2.GetModelStatusRequest,
        "HandleReloadConfigRequest": model_management_pb2.ReloadConfigRequest,
    },
}


def grpc_server(
    service: Service, *, max_message_bytes: int, arguments: Mapping[str, int | str] | None = None
) -> grpc.Server:
    """A server with the service's methods, not yet bound to a port nor started.

    Args:
      max_message_bytes: the largest request accepted.
      arguments: gRPC's own, by name; they override ours.
    """
    options: dict[str, int | str] = {
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_send_message_length": -1,
        # Otherwise a second server on the same port gets no error.
        "grpc.so_reuseport": 0,
        "grpc.keepalive_time_ms": _KEEPALIVE_MILLISECONDS,
        "grpc.keepalive_permit_without_calls": 1,
    }
    server = grpc.server(
        # Threads do run side by side: TensorFlow works outside Python's lock.
        futures.ThreadPoolExecutor(MAX_HELD, thread_name_prefix="grpc"),
        maximum_concurrent_rpcs=_MAX_REQUESTS,
        options=list((options | dict(arguments or {})).items()),
    )
    for name, methods in _SERVICES.items():
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                _behaviour(method, request, getattr(service, method)),
                response_serializer=lambda response: response.SerializeToString(),
            )
            for method, request in methods.items()
        }
        handler = grpc.method_handlers_generic_handler(f"tensorflow.serving.{name}", handlers)
        server.add_generic_rpc_handlers([handler])
    return server


def _behaviour(name: str, request: type[Message], answer: Callable[[Message, Call], Message]):
    """gRPC's behaviour of a method: the request's bytes to the response; a Status is the call's."""

    def handle(data: bytes, context: grpc.ServicerContext):
        call = Call()
        gone = cancelled("its caller does not wait for the answer any more")
        try:
            # gRPC calls this when the call is over: its deadline has passed, it was cancelled, its
            # connection is gone, or it was answered (then `end` has no effect).
            if not context.add_callback(lambda: call.end(gone)):
                raise gone
            # Parsed here: gRPC would report wrong bytes as a fault of the server.
            return answer(request.FromString(data), call)
        except DecodeError:
            status = invalid_argument(f"the request's bytes are not a {name} request")
        except Status as raised:
            status = raised
        except Exception as error:
            _log.exception("%s failed", name, extra={"event": "fault", "method": name})
            status = internal(error)
        context.abort(status.code, status.message)

    return handle


class Health(health_pb2_grpc.HealthServicer):
    """The standard health service, which knows the names that TF Serving gives it.

    (The one of grpcio-health-checking may block: it holds a lock while it sends, and gRPC's thread
    takes the same lock.)

    Args:
      server: what it is added to, before that is started.
    """

    _NAMES = ("", "ModelService", "PredictionService")

    def __init__(self, server: grpc.Server):
        self._ended = threading.Event()
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def Check(self, request, context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._NAMES:
            context.abort(grpc.StatusCode.NOT_FOUND, "service name unknown")
        return self._state(request.service)

    def Watch(self, request, context) -> Iterator[health_pb2.HealthCheckResponse]:
        yield self._state(request.service)
        while context.is_active():
            if self._ended.wait(_TICK_SECONDS):
                yield self._state(request.service)
                return

    # Watches do not take the threads of other requests.
    Watch.experimental_thread_pool = futures.ThreadPoolExecutor(_MAX_REQUESTS)

    def end(self) -> None:
        """Reports from now on that nothing is served, and ends the watches: a stopping server waits
        for open calls."""
        self._ended.set()

    def _state(self, name: str) -> health_pb2.HealthCheckResponse:
        state = "NOT_SERVING" if self._ended.is_set() else "SERVING"
        return health_pb2.HealthCheckResponse(
            status=state if name in self._NAMES else "SERVICE_UNKNOWN"
        )
