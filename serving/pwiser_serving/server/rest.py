"""REST: TensorFlow Serving's HTTP API, as a WSGI application and the server that runs it.

Paths, methods, codes and messages are those of tensorflow/serving (http_rest_api_handler.cc,
http_rest_api_util.cc, http_server.cc). Where it closes a connection without an answer, this one
says in JSON what is wrong.
"""

import contextlib
import json
import logging
import math
import re
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator

import google.protobuf
import grpc
import waitress
from google.protobuf import json_format
from google.protobuf.message import Message
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, model_pb2
from waitress import wasyncore
from waitress.channel import HTTPChannel

from pwiser_serving.server import json_tensors
from pwiser_serving.server import monitoring as metrics
from pwiser_serving.server.calls import MAX_HELD, Call, Turns
from pwiser_serving.server.models import Models
from pwiser_serving.server.saved_model import DEFAULT_SIGNATURE
from pwiser_serving.server.service import SIGNATURE_FIELD, Service
from pwiser_serving.server.status import (
    Status,
    cancelled,
    deadline_exceeded,
    failed_precondition,
    internal,
    invalid_argument,
)

_log = logging.getLogger("pwiser_serving")

_NAME = r"/v1/models/(?P<name>[^/:]+)"
_VERSION = r"(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
_POST = re.compile(_NAME + _VERSION + r":(?P<verb>classify|regress|predict)", re.IGNORECASE)
_GET = re.compile(
    rf"/v1/models(?:/(?P<name>[^/:]+))?{_VERSION}(?:/(?P<verb>metadata))?", re.IGNORECASE
)

_HTTP = {
    grpc.StatusCode.CANCELLED: "499 Client Closed Request",
    grpc.StatusCode.INVALID_ARGUMENT: "400 Bad Request",
    grpc.StatusCode.DEADLINE_EXCEEDED: "504 Gateway Timeout",
    grpc.StatusCode.NOT_FOUND: "404 Not Found",
    grpc.StatusCode.ALREADY_EXISTS: "409 Conflict",
    grpc.StatusCode.PERMISSION_DENIED: "403 Forbidden",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "429 Too Many Requests",
    grpc.StatusCode.FAILED_PRECONDITION: "400 Bad Request",
    grpc.StatusCode.ABORTED: "409 Conflict",
    grpc.StatusCode.OUT_OF_RANGE: "400 Bad Request",
    grpc.StatusCode.UNIMPLEMENTED: "501 Not Implemented",
    grpc.StatusCode.UNAVAILABLE: "503 Service Unavailable",
    grpc.StatusCode.UNAUTHENTICATED: "401 Unauthorized",
}
_SERVER_ERROR = "500 Internal Server Error"
# The largest body after it is uncompressed: TF Serving's bound.
_MAX_UNCOMPRESSED = 100 * 2**20
# The largest version number.
_MAX_VERSION = 2**63 - 1

# Connections that are open at the same time; further ones wait.
_MAX_CONNECTIONS = 1000
# How soon the server's thread notices that it, or a request, should end.
_TICK_SECONDS = 0.05
# What TF Serving sends with --rest_api_enable_cors_support.
_CORS_HEADERS = [
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "POST, GET"),
    ("Access-Control-Allow-Headers", "Content-Type"),
]

# For json_format: fields that have their default are written too.
_JSON_OPTIONS = {
    "preserving_proto_field_name": True,
    "always_print_fields_with_no_presence"
    if int(google.protobuf.__version__.split(".")[0]) >= 5
    else "including_default_value_fields": True,
}


class Calls:
    """The requests that are being answered. `look` ends those that nobody waits for any more.

    Args:
      seconds: how long a request may take; None for no limit.
    """

    def __init__(self, seconds: float | None):
        self._seconds = math.inf if seconds is None else seconds
        self._lock = threading.Lock()
        # When each must be answered, and whether its client has gone.
        self._calls: dict[Call, tuple[float, Callable[[], bool]]] = {}
        self._next_look = 0.0

    @contextlib.contextmanager
    def call(self, environ: dict) -> Iterator[Call]:
        """A WSGI request's call, within the `with`."""
        call, end = Call(), time.monotonic() + self._seconds
        with self._lock:
            self._calls[call] = end, environ["waitress.client_disconnected"]
        try:
            yield call
        finally:
            with self._lock:
                del self._calls[call]

    def look(self) -> None:
        """Ends the calls whose time is up or whose client has gone. Call it repeatedly."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _TICK_SECONDS
        with self._lock:
            calls = list(self._calls.items())
        for call, (end, client_has_gone) in calls:
            if now > end:
                call.end(deadline_exceeded())
            elif client_has_gone():
                call.end(cancelled("the client has closed its connection"))


class Application:
    """The WSGI application.

    Args:
      models: what is in service; service: answers what needs no JSON tensors; monitoring: counts
      the requests; turns: how many requests of a model run at a time; calls: ends requests;
      max_bytes: the largest body, also after it is uncompressed; monitoring_path: where the metrics
      are, or None; cors: allow pages of any origin to use the API.
    """

    def __init__(
        self,
        models: Models,
        service: Service,
        monitoring: metrics.Monitoring,
        turns: Turns,
        calls: Calls,
        *,
        max_bytes: int,
        monitoring_path: str | None = None,
        cors: bool = False,
    ):
        self._models, self._service, self._monitoring = models, service, monitoring
        self._turns, self._calls = turns, calls
        self._max_uncompressed = min(max_bytes, _MAX_UNCOMPRESSED)
        self._monitoring_path, self._cors_headers = monitoring_path, _CORS_HEADERS if cors else []

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        # As it was sent: a name may hold %2F, and for TF Serving the query is a part of it.
        path = re.sub("^https?://[^/]*", "", environ["REQUEST_URI"], flags=re.IGNORECASE)
        content_type, headers = "application/json", []
        if self._monitoring_path is not None and path == self._monitoring_path:
            status, content_type = "200 OK", metrics.CONTENT_TYPE
            body = self._monitoring.text().encode("utf-8", "replace")
        elif path.lower().startswith("/v1/"):
            status, body = self._answer(environ["REQUEST_METHOD"], path, environ)
            headers = self._cors_headers
        else:
            status, body = "404 Not Found", json_tensors.error("Not Found")
        if environ["REQUEST_METHOD"] == "HEAD":
            body = b""
        headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), *headers]
        start_response(status, headers)
        return [body]

    def _answer(self, method: str, path: str, environ: dict) -> tuple[str, bytes]:
        """The HTTP status line and the body."""
        pattern = {"POST": _POST, "GET": _GET}.get(method)
        match = pattern and pattern.fullmatch(path)
        name = _decode(match["name"]) if match else ""
        verb = match["verb"] or "" if match else ""
        try:
            # TF Serving's labels: a GET has no API.
            with self._monitoring.request(name, verb if method == "POST" else "", "REST"):
                if method == "OPTIONS":
                    # A browser asks this before it allows a page of another origin to use the API.
                    if not re.search("https?://", environ.get("HTTP_ORIGIN", "")):
                        raise failed_precondition("Origin header is missing in CORS preflight")
                    return "200 OK", b""
                # Upper and lower case are equal in the path, but not in the verb.
                if not match or (method == "POST" and not verb.islower()):
                    raise invalid_argument(f"Malformed request: {method} {path}")
                version = match["version"] and int(match["version"])
                if version is not None and version > _MAX_VERSION:
                    raise invalid_argument(
                        f"Failed to convert version: {match['version']} to numeric."
                    )
                asked = name, version, match["label"] and _decode(match["label"])
                if method == "GET":
                    return "200 OK", self._get(*asked, metadata=bool(verb))
                with self._calls.call(environ) as call, self._turns.turn(name, call):
                    return "200 OK", self._run(verb, self._body(environ), asked, call)
        except Status as raised:
            status = raised
        except Exception as error:
            _log.exception("%s %s failed", method, path, extra={"event": "fault", "method": method})
            status = internal(error)
        return _HTTP.get(status.code, _SERVER_ERROR), json_tensors.error(status.message)

    def _body(self, environ: dict) -> bytes:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if "gzip" not in environ.get("HTTP_CONTENT_ENCODING", "").lower():
            return body
        unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            body = unpacker.decompress(body, self._max_uncompressed)
        except zlib.error:
            raise invalid_argument("Failed to uncompress the gzipped body") from None
        if not unpacker.eof:
            raise invalid_argument(
                "Failed to uncompress the gzipped body: it is cut short, or larger than "
                f"{self._max_uncompressed} bytes"
            )
        return body

    def _get(self, name: str, version: int | None, label: str | None, *, metadata: bool) -> bytes:
        """The model's metadata, or the status of its versions."""
        if not name:
            raise invalid_argument("Missing model name in request.")
        spec = model_pb2.ModelSpec(name=name, version_label=label)
        if version is not None:
            spec.version.value = version
        if not metadata:
            request = get_model_status_pb2.GetModelStatusRequest(model_spec=spec)
            return _dump(_as_dict(self._service.GetModelStatus(request)))
        response = self._service.GetModelMetadata(
            get_model_metadata_pb2.GetModelMetadataRequest(
                model_spec=spec, metadata_field=[SIGNATURE_FIELD]
            )
        )
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[SIGNATURE_FIELD].Unpack(signatures)
        answer = {"model_spec": _as_dict(response.model_spec)}
        return _dump(answer | {"metadata": {SIGNATURE_FIELD: _as_dict(signatures)}})

    def _run(self, verb: str, body: bytes, asked: tuple, call: Call) -> bytes:
        """The answer of the model's method `verb`."""
        document = json_tensors.parse(body)
        key = json_tensors.signature_name(document) or DEFAULT_SIGNATURE
        given = None if verb == "predict" else json_tensors.examples(document)
        with self._models.use(*asked) as (_, model):
            if verb == "predict":
                if key not in model.signatures:
                    raise invalid_argument(
                        f'Serving signature name: "{key}" not found in signature def'
                    )
                signature = model.signatures[key]
                data_types = {alias: info.dtype for alias, info in signature.inputs.items()}
                given, row = json_tensors.inputs(document, data_types)
            method = getattr(model, verb)
            result = self._service.run(verb.capitalize(), asked[0], method, key, given, call=call)
        if verb == "predict":
            return json_tensors.predictions(result, row=row)
        if verb == "classify":
            return json_tensors.classifications(result)
        return json_tensors.regressions(result)


def _decode(text: str | None) -> str:
    """A part of a path, its %XX decoded."""
    return urllib.parse.unquote(text or "", "utf-8", "replace")


def _as_dict(message: Message) -> dict:
    return json_format.MessageToDict(message, **_JSON_OPTIONS)


def _dump(answer: dict) -> bytes:
    return json.dumps(answer, indent=1, ensure_ascii=False).encode("utf-8", "replace")


class _Connection(HTTPChannel):
    """A connection that is not read again after its client closed it: poll() reports it always."""

    def readable(self) -> bool:
        return self.connected and super().readable()


class Server:
    """The HTTP server.

    Args:
      application: an Application; calls: those of the application, looked at here; port: to
      listen on, 0 for a free one; max_bytes: the largest body; a larger one is answered with 413.

    Attributes:
      port: the one that it listens on.

    Raises:
      OSError: the port is in use, or may not be used.
    """

    def __init__(self, application: Callable, calls: Calls, port: int, *, max_bytes: int):
        for name in ("waitress", "waitress.queue"):
            # They log each client that goes away, and each request that waits.
            logging.getLogger(name).setLevel(logging.ERROR)
        self._calls = calls
        self._sockets: dict = {}
        self._server = waitress.create_server(
            application,
            map=self._sockets,
            host="0.0.0.0",
            port=port,
            threads=MAX_HELD,
            # Only reading while a request is answered shows that its client has gone.
            channel_request_lookahead=1,
            # No Server header.
            ident=None,
            max_request_body_size=max_bytes,
            # A large body in a few reads, and in memory; by default 8 KB each, and in a file.
            recv_bytes=2**18,
            inbuf_overflow=2**22,
            connection_limit=_MAX_CONNECTIONS,
            # select() knows no file descriptor above 1023.
            asyncore_use_poll=True,
        )
        self._server.channel_class = _Connection
        self.port = int(self._server.effective_port)
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="rest", daemon=True)

    def start(self) -> None:
        """Starts to answer."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Takes no more connections, answers the open requests for so long, and ends."""
        self._deadline = time.monotonic() + seconds
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join()

    def _run(self) -> None:
        while self._deadline is None:
            self._turn()
        # Closes only the listening socket; its map still holds the connections.
        wasyncore.dispatcher.close(self._server)
        while time.monotonic() < self._deadline and self._close_idle():
            self._turn()
        self._server.task_dispatcher.shutdown(timeout=0)
        wasyncore.close_all(self._sockets, ignore_all=True)

    def _turn(self) -> None:
        try:
            wasyncore.loop(timeout=_TICK_SECONDS, use_poll=True, map=self._sockets, count=1)
            self._calls.look()
        except Exception:
            # A connection that fails must not end the others.
            _log.exception("a fault of the REST server", extra={"event": "fault"})

    def _close_idle(self) -> bool:
        """Closes connections without an open request. True if others are left."""
        for channel in list(self._server.active_channels.values()):
            if not (channel.requests or channel.request or channel.total_outbufs_len):
                channel.handle_close()
        return bool(self._server.active_channels)
