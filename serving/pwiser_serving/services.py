"""The methods of TF Serving's gRPC API that are spoken here, by name and message types."""

import dataclasses

from google.protobuf.message import Message

from pwiser_serving.protos import service_pb2


@dataclasses.dataclass(frozen=True)
class Method:
    """One gRPC method: /service/name, from a request to a response."""

    service: str
    name: str
    request: type[Message]
    response: type[Message]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


PREDICT = Method(
    "tensorflow.serving.PredictionService",
    "Predict",
    service_pb2.PredictRequest,
    service_pb2.PredictResponse,
)
GET_MODEL_METADATA = Method(
    "tensorflow.serving.PredictionService",
    "GetModelMetadata",
    service_pb2.GetModelMetadataRequest,
    service_pb2.GetModelMetadataResponse,
)
GET_MODEL_STATUS = Method(
    "tensorflow.serving.ModelService",
    "GetModelStatus",
    service_pb2.GetModelStatusRequest,
    service_pb2.GetModelStatusResponse,
)

# The one metadata field there is.
SIGNATURE_FIELD = "signature_def"
DEFAULT_SIGNATURE = "serving_default"
