"""The gRPC services: a request's checks and its answer, in TensorFlow Serving's own messages.

PredictionService/Predict, PredictionService/GetModelMetadata and ModelService/GetModelStatus.
Codes, messages and the order of checks are those of tensorflow/serving.
"""

import dataclasses
import logging
import os
from collections.abc import Callable
from concurrent import futures

import grpc
from google.protobuf.message import DecodeError, Message
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    predict_pb2,
)

from pwiser_serving import tensors
from pwiser_serving.server.models import Models
from pwiser_serving.server.saved_model import DEFAULT_SIGNATURE
from pwiser_serving.server.status import Status, internal, invalid_argument

_log = logging.getLogger("pwiser_serving")

# The one metadata field there is.
SIGNATURE_FIELD = "signature_def"


class Service:
    """Answers requests, messages in and out; mistakes are raised as Status.

    Args:
      models: what is in service. Their servables have `signatures` and `predict`, as
        saved_model.SavedModel.
      as_content: numbers in answers as raw bytes instead of one by one.
    """

    def __init__(self, models: Models, *, as_content: bool = False):
        self._models = models
        self._as_content = as_content

    def predict(self, request: predict_pb2.PredictRequest) -> predict_pb2.PredictResponse:
        spec = _model_spec(request)
        signature = spec.signature_name or DEFAULT_SIGNATURE
        with self._use(spec) as (version, model):
            outputs = model.predict(signature, request.inputs, request.output_filter)
        response = predict_pb2.PredictResponse()
        for name, array in outputs.items():
            tensors.fill(response.outputs[name], array, as_content=self._as_content)
        response.model_spec.name = spec.name
        response.model_spec.version.value = version
        response.model_spec.signature_name = signature
        return response

    def get_model_metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
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
        self, request: get_model_status_pb2.GetModelStatusRequest
    ) -> get_model_status_pb2.GetModelStatusResponse:
        spec = _model_spec(request)
        version = spec.version.value if spec.HasField("version") else None
        return get_model_status_pb2.GetModelStatusResponse(
            model_version_status=self._models.statuses(spec.name, version)
        )

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


def grpc_server(service: Service, *, max_message_bytes: int) -> grpc.Server:
    """A server with the service's methods, not yet bound to a port nor started."""
    server = grpc.server(
        # The work is done by TensorFlow's own threads, outside Python's lock.
        futures.ThreadPoolExecutor(4 * (os.cpu_count() or 1)),
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # Without this a second server on the same port is accepted in silence.
            ("grpc.so_reuseport", 0),
        ],
    )
    prediction, model = "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"
    for service_name, method in (
        (prediction, _Method("Predict", predict_pb2.PredictRequest, service.predict)),
        (
            prediction,
            _Method(
                "GetModelMetadata",
                get_model_metadata_pb2.GetModelMetadataRequest,
                service.get_model_metadata,
            ),
        ),
        (
            model,
            _Method(
                "GetModelStatus",
                get_model_status_pb2.GetModelStatusRequest,
                service.get_model_status,
            ),
        ),
    ):
        handler = grpc.unary_unary_rpc_method_handler(
            _handler(method), response_serializer=lambda response: response.SerializeToString()
        )
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(service_name, {method.name: handler})]
        )
    return server


@dataclasses.dataclass(frozen=True)
class _Method:
    """One gRPC method: its name, what it takes, and who answers."""

    name: str
    request: type[Message]
    answer: Callable[[Message], Message]


def _handler(method: _Method):
    """A gRPC behaviour: the request's bytes to the response, Status to the call's status."""

    def handle(data: bytes, context: grpc.ServicerContext):
        try:
            # Parsed here rather than by gRPC, which would call it a fault of the server.
            return method.answer(method.request.FromString(data))
        except DecodeError:
            status = invalid_argument(f"the request's bytes are not a {method.name} request")
        except Status as raised:
            status = raised
        except Exception as error:
            _log.exception("%s failed", method.name)
            status = internal(error)
        context.abort(status.code, status.message)

    return handle
