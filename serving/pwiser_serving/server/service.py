"""The gRPC services: a request's checks and its answer, in TensorFlow Serving's own messages.

PredictionService, ModelService and, where it is asked for, the standard health service. Codes,
messages and the order of checks are those of tensorflow/serving.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
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
# Requests that are open at a time; one more is refused. Of these MAX_HELD have a thread, which they
# have before their bytes have come.
_MAX_REQUESTS = 512
# A caller whose machine is gone says nothing more. After so long it is asked, and then dropped.
_KEEPALIVE_MILLISECONDS = 60_000


class Service:
    """Answers requests, messages in and out; mistakes are raised as Status.

    Args:
      models: what is in service. Their servables have `signatures` and `predict`, as
        saved_model.SavedModel.
      monitoring: counts the requests.
      turns: how many requests of a model run at a time.
      as_content: numbers in answers as raw bytes instead of one by one.
    """

    def __init__(
        self,
        models: Models,
        monitoring: Monitoring,
        turns: Turns,
        *,
        as_content: bool = False,
    ):
        self._models = models
        self._monitoring = monitoring
        self._turns = turns
        self._as_content = as_content

    def predict(
        self, request: predict_pb2.PredictRequest, call: Call
    ) -> predict_pb2.PredictResponse:
        response = predict_pb2.PredictResponse()

        def fill(outputs):
            for alias, array in outputs.items():
                tensors.fill(response.outputs[alias], array, as_content=self._as_content)

        return self._answer(
            request,
            response,
            "Predict",
            call,
            lambda model, name: model.predict(name, request.inputs, request.output_filter, call),
            fill,
        )

    def classify(
        self, request: classification_pb2.ClassificationRequest, call: Call
    ) -> classification_pb2.ClassificationResponse:
        response = classification_pb2.ClassificationResponse()
        return self._answer(
            request,
            response,
            "Classify",
            call,
            lambda model, name: model.classify(name, request.input, call),
            response.result.CopyFrom,
        )

    def regress(
        self, request: regression_pb2.RegressionRequest, call: Call
    ) -> regression_pb2.RegressionResponse:
        response = regression_pb2.RegressionResponse()
        return self._answer(
            request,
            response,
            "Regress",
            call,
            lambda model, name: model.regress(name, request.input, call),
            response.result.CopyFrom,
        )

    def multi_inference(
        self, request: inference_pb2.MultiInferenceRequest, call: Call
    ) -> inference_pb2.MultiInferenceResponse:
        # The first task says which model, as with TF Serving; which counts no such request.
        spec = request.tasks[0].model_spec if request.tasks else model_pb2.ModelSpec()
        with self._turns.turn(spec.name, call), self._use(spec) as (version, model):
            results = model.multi_inference(request.tasks, request.input, call)
        for task, result in zip(request.tasks, results, strict=True):
            _name_model(result.model_spec, task.model_spec, version)
        return inference_pb2.MultiInferenceResponse(results=results)

    def _answer(self, request, response, method: str, call: Call, run: Callable, fill: Callable):
        """The response of a method that runs the model.

        Args:
          run: (model, signature's name) to a result; fill: puts the result into the response.
        """
        name = request.model_spec.name
        with self._monitoring.request(name, method, "GRPC"):
            spec = _model_spec(request)
            with self._turns.turn(name, call), self._use(spec) as (version, model):
                start = time.perf_counter()
                result = run(model, spec.signature_name or DEFAULT_SIGNATURE)
                self._monitoring.runtime(name, method, time.perf_counter() - start)
            fill(result)
            _name_model(response.model_spec, spec, version)
        return response

    def get_model_metadata(
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

    def get_model_status(
        self, request: get_model_status_pb2.GetModelStatusRequest, call: Call | None = None
    ) -> get_model_status_pb2.GetModelStatusResponse:
        spec = _model_spec(request)
        # As with TF Serving, a label chooses nothing here: all versions are told.
        version = spec.version.value if spec.HasField("version") else None
        return get_model_status_pb2.GetModelStatusResponse(
            model_version_status=self._models.statuses(spec.name, version)
        )

    def handle_reload_config(
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


def grpc_server(
    service: Service, *, max_message_bytes: int, arguments: Mapping[str, int | str] | None = None
) -> grpc.Server:
    """A server with the service's methods, not yet bound to a port nor started.

    Args:
      max_message_bytes: the largest request accepted.
      arguments: gRPC's own, by name, before ours.
    """
    options: dict[str, int | str] = {
        "grpc.max_receive_message_length": max_message_bytes,
        "grpc.max_send_message_length": -1,
        # Without this a second server on the same port is accepted in silence.
        "grpc.so_reuseport": 0,
        "grpc.keepalive_time_ms": _KEEPALIVE_MILLISECONDS,
        "grpc.keepalive_permit_without_calls": 1,
    }
    server = grpc.server(
        # TensorFlow works outside Python's lock, so that threads do run side by side.
        futures.ThreadPoolExecutor(MAX_HELD, thread_name_prefix="grpc"),
        maximum_concurrent_rpcs=_MAX_REQUESTS,
        options=list((options | dict(arguments or {})).items()),
    )
    methods = {
        "tensorflow.serving.PredictionService": (
            _Method("Predict", predict_pb2.PredictRequest, service.predict),
            _Method("Classify", classification_pb2.ClassificationRequest, service.classify),
            _Method("Regress", regression_pb2.RegressionRequest, service.regress),
            _Method("MultiInference", inference_pb2.MultiInferenceRequest, service.multi_inference),
            _Method(
                "GetModelMetadata",
                get_model_metadata_pb2.GetModelMetadataRequest,
                service.get_model_metadata,
            ),
        ),
        "tensorflow.serving.ModelService": (
            _Method(
                "GetModelStatus",
                get_model_status_pb2.GetModelStatusRequest,
                service.get_model_status,
            ),
            _Method(
                "HandleReloadConfigRequest",
                model_management_pb2.ReloadConfigRequest,
                service.handle_reload_config,
            ),
        ),
    }
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                service_name,
                {
                    method.name: grpc.unary_unary_rpc_method_handler(
                        _handler(method),
                        response_serializer=lambda response: response.SerializeToString(),
                    )
                    for method in members
                },
            )
            for service_name, members in methods.items()
        ]
    )
    return server


class Health(health_pb2_grpc.HealthServicer):
    """The standard health service, which knows the names that TF Serving gives it.

    Not grpcio-health-checking's own servicer: that one holds a lock while it sends, which gRPC's
    one thread may wait for at that moment, and then no call of the server is answered any more.

    Args:
      server: what it is added to, before that is started.
    """

    _NAMES = ("", "ModelService", "PredictionService")

    def __init__(self, server: grpc.Server):
        self._ended = False
        # Held for an instant, and never while something is sent.
        self._lock = threading.Lock()
        # The names that are watched, by what sends to the watching call.
        self._watched: dict[Callable, str] = {}
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def Check(self, request, context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._NAMES:
            context.abort(grpc.StatusCode.NOT_FOUND, "service name unknown")
        return self._state(request.service)

    def Watch(self, request, context, send: Callable) -> None:
        send(self._state(request.service))
        with self._lock:
            self._watched[send] = request.service
            ended = self._ended
        if not context.add_callback(lambda: self._forget(send)):
            self._forget(send)
        if ended:
            self._finish(send, request.service)

    # It returns at once, and `send` goes on: a watching call keeps no thread.
    Watch.experimental_non_blocking = True

    def end(self) -> None:
        """Tells all who ask or watch that nothing is served any more, and ends the watching.

        A server waits for the calls that are open, and a watching call has no end of its own.
        """
        with self._lock:
            self._ended = True
            watched = list(self._watched.items())

        def finish():
            for send, name in watched:
                self._finish(send, name)

        # In a thread of its own: a watcher that does not read must not keep the server from ending.
        threading.Thread(target=finish, daemon=True).start()

    def _state(self, name: str) -> health_pb2.HealthCheckResponse:
        state = "NOT_SERVING" if self._ended else "SERVING"
        return health_pb2.HealthCheckResponse(
            status=state if name in self._NAMES else "SERVICE_UNKNOWN"
        )

    def _finish(self, send: Callable, name: str) -> None:
        send(self._state(name))
        send(None)

    def _forget(self, send: Callable) -> None:
        with self._lock:
            self._watched.pop(send, None)


@dataclasses.dataclass(frozen=True)
class _Method:
    """One gRPC method: its name, what it takes, and who answers."""

    name: str
    request: type[Message]
    answer: Callable[[Message, Call], Message]


def _handler(method: _Method):
    """A gRPC behaviour: the request's bytes to the response, Status to the call's status."""

    def handle(data: bytes, context: grpc.ServicerContext):
        call = Call()
        try:
            # gRPC tells when the call is over: its deadline has come, it was cancelled, or its
            # connection is gone (or it was answered, which ends nothing any more).
            if not context.add_callback(lambda: call.end(_gone())):
                raise _gone()
            # Parsed here rather than by gRPC, which would call it a fault of the server.
            return method.answer(method.request.FromString(data), call)
        except DecodeError:
            status = invalid_argument(f"the request's bytes are not a {method.name} request")
        except Status as raised:
            status = raised
        except Exception as error:
            _log.exception(
                "%s failed", method.name, extra={"event": "fault", "method": method.name}
            )
            status = internal(error)
        context.abort(status.code, status.message)

    return handle


def _gone() -> Status:
    return cancelled("its caller does not wait for the answer any more")
