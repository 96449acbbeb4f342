"""A local server that answers as TensorFlow Serving does, for tests and development.

    python -m pwiser_serving.server --port 8500 --model_name demo --model_base_path exported/demo

gRPC methods: PredictionService/Predict, PredictionService/GetModelMetadata and
ModelService/GetModelStatus. Flags have TF Serving's names and defaults.
"""

import argparse
import logging
import os
import pathlib
import signal
import threading
from concurrent import futures

import grpc
from google.protobuf.message import DecodeError

from pwiser_serving import command_line, services
from pwiser_serving.protos import service_pb2
from pwiser_serving.status import Status, invalid_argument, not_found
from pwiser_serving.versions import Versions, no_servable

_log = logging.getLogger("pwiser_serving")

# Longer than any request should run: then the server ends without its answer.
_GRACE_SECONDS = 30


class Service:
    """Answers requests, messages in and out; mistakes are raised as Status.

    Args:
      models: Versions by model name. Their servables have `signatures` and `predict`, as
        saved_model.SavedModel.
      as_content: numbers in answers as raw bytes instead of one by one.
    """

    def __init__(self, models: dict[str, Versions], *, as_content: bool = False):
        self._models = models
        self._as_content = as_content

    def predict(self, request: service_pb2.PredictRequest) -> service_pb2.PredictResponse:
        spec = _model_spec(request)
        with self._use(spec) as (version, model):
            outputs = model.predict(request, as_content=self._as_content)
        response = service_pb2.PredictResponse(outputs=outputs)
        response.model_spec.name = spec.name
        response.model_spec.version.value = version
        response.model_spec.signature_name = spec.signature_name or services.DEFAULT_SIGNATURE
        return response

    def get_model_metadata(
        self, request: service_pb2.GetModelMetadataRequest
    ) -> service_pb2.GetModelMetadataResponse:
        spec = _model_spec(request)
        if not request.metadata_field:
            raise invalid_argument(
                "GetModelMetadataRequest must specify at least one metadata_field"
            )
        for field in request.metadata_field:
            if field != services.SIGNATURE_FIELD:
                raise invalid_argument(f"Metadata field {field} is not supported")
        with self._use(spec) as (version, model):
            signatures = service_pb2.SignatureMap(signature_def=model.signatures)
        response = service_pb2.GetModelMetadataResponse()
        response.model_spec.name = spec.name
        response.model_spec.version.value = version
        response.metadata[services.SIGNATURE_FIELD].type_url = services.SIGNATURE_TYPE
        response.metadata[services.SIGNATURE_FIELD].value = signatures.SerializeToString()
        return response

    def get_model_status(
        self, request: service_pb2.GetModelStatusRequest
    ) -> service_pb2.GetModelStatusResponse:
        spec = _model_spec(request)
        model = self._models.get(spec.name)
        statuses = model.statuses() if model else []
        if spec.HasField("version"):
            version = spec.version.value
            statuses = [status for status in statuses if status.version == version]
            if not statuses:
                raise not_found(f"Could not find version {version} of model {spec.name}")
        elif not statuses:
            raise not_found(f"Could not find any versions of model {spec.name}")
        return service_pb2.GetModelStatusResponse(model_version_status=statuses)

    def _use(self, spec: service_pb2.ModelSpec):
        """The version that a request asks for, as Versions.use gives it."""
        if not spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        if spec.HasField("version_label"):
            raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
        version = spec.version.value if spec.HasField("version") else None
        if spec.name not in self._models:
            raise no_servable(spec.name, version)
        return self._models[spec.name].use(version)


def _model_spec(request) -> service_pb2.ModelSpec:
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
    for method, answer in (
        (services.PREDICT, service.predict),
        (services.GET_MODEL_METADATA, service.get_model_metadata),
        (services.GET_MODEL_STATUS, service.get_model_status),
    ):
        handler = grpc.unary_unary_rpc_method_handler(
            _handler(method, answer), response_serializer=method.response.SerializeToString
        )
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(method.service, {method.name: handler})]
        )
    return server


def _handler(method: services.Method, answer):
    """A gRPC behaviour: the request's bytes to the response, Status to the call's status."""

    def handle(data: bytes, context: grpc.ServicerContext):
        try:
            # Parsed here rather than by gRPC, which would call it a fault of the server.
            return answer(method.request.FromString(data))
        except DecodeError:
            status = invalid_argument(f"the request's bytes are not a {method.name} request")
        except Status as raised:
            status = raised
        except Exception as error:
            _log.exception("%s failed", method.name)
            status = Status(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        context.abort(status.code, status.message)

    return handle


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="python -m pwiser_serving.server",
        description="Serves the newest version of a SavedModel over TF Serving's gRPC API.",
    )
    parser.add_argument("--port", type=int, default=8500, help="gRPC port; 0 chooses a free one")
    parser.add_argument("--model_name", default="default", help="the model's name in requests")
    parser.add_argument("--model_base_path", required=True, help="the folder of version folders")
    parser.add_argument(
        "--file_system_poll_wait_seconds",
        type=float,
        default=1,
        help="seconds between looks for a new version; 0 looks once",
    )
    parser.add_argument(
        "--enable_serialization_as_tensor_content",
        type=_boolean,
        nargs="?",
        const=True,
        default=False,
        help="numbers in answers as raw bytes: faster for clients that read them",
    )
    parser.add_argument(
        "--max_message_bytes", type=int, default=2**31 - 1, help="the largest request accepted"
    )
    flags = parser.parse_args(arguments)
    if not 0 <= flags.port < 2**16:
        parser.error(f"--port: found {flags.port}, expected 0 to 65535")
    if flags.file_system_poll_wait_seconds < 0:
        parser.error("--file_system_poll_wait_seconds: expected 0 or more seconds")
    if not 0 < flags.max_message_bytes < 2**31:
        parser.error("--max_message_bytes: expected 1 to 2147483647")
    return flags


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected true or false")
    return text.lower() in ("true", "1")


def main(arguments: list[str] | None = None) -> None:
    """The command. Returns when SIGTERM or SIGINT has stopped the server."""
    flags = _flags(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    base_path = pathlib.Path(flags.model_base_path)
    if not base_path.is_dir():
        command_line.fail(f"--model_base_path: {base_path} is not a folder")

    # Imported late: a wrong flag is told at once, not after TensorFlow's four seconds.
    from pwiser_serving.saved_model import SavedModel

    versions = Versions(flags.model_name, base_path, SavedModel)
    service = Service(
        {flags.model_name: versions}, as_content=flags.enable_serialization_as_tensor_content
    )
    server = grpc_server(service, max_message_bytes=flags.max_message_bytes)
    try:
        port = server.add_insecure_port(f"0.0.0.0:{flags.port}")
    except RuntimeError:
        command_line.fail(f"--port: {flags.port} is in use, or may not be used")

    _watch(versions, server, port, flags.file_system_poll_wait_seconds, stop)
    server.stop(_GRACE_SECONDS).wait()
    versions.close()


def _watch(
    versions: Versions, server: grpc.Server, port: int, seconds: float, stop: threading.Event
) -> None:
    """Starts the server with the first version, replaces it by newer ones, until told to stop."""
    waiting = started = False
    while not stop.is_set():
        changed = versions.poll()
        if changed and not started:
            server.start()
            started = True
            print(
                f"pwiser_serving: serving {versions.name} version {versions.current} "
                f"on 0.0.0.0:{port}",
                flush=True,
            )
        elif changed:
            _log.info("%s version %d is served now", versions.name, versions.current)
        elif not started:
            problem = f"{versions.base_path} holds no version that loads"
            if not seconds:
                command_line.fail(problem)
            if not waiting:
                _log.warning("%s yet; waiting", problem)
            waiting = True
        stop.wait(seconds or None)


if __name__ == "__main__":
    main()
