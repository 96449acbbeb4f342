"""The methods of TF Serving's gRPC API that the client calls, by name and message types."""

from typing import NamedTuple

from google.protobuf.message import Message

from pwiser_serving.protos import service_pb2


class Method(NamedTuple):
    """One gRPC method: /service/name, from a request to a response."""

    service: str
    name: str
    request: type[Message]
    response: type[Message]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


def _method(service: str, name: str) -> Method:
    """A method whose messages are named after it."""
    messages = (getattr(service_pb2, f"{name}{kind}") for kind in ("Request", "Response"))
    return Method(f"tensorflow.serving.{service}", name, *messages)


PREDICT = _method("PredictionService", "Predict")
GET_MODEL_METADATA = _method("PredictionService", "GetModelMetadata")
GET_MODEL_STATUS = _method("ModelService", "GetModelStatus")

# The one metadata field there is.
SIGNATURE_FIELD = "signature_def"
DEFAULT_SIGNATURE = "serving_default"
