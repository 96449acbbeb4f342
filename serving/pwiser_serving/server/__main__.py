"""The server's command.

    python -m pwiser_serving.server --port 8500 --model_name demo --model_base_path exported/demo

Flags have TF Serving's names and, if they are equal, its defaults.
"""

import _thread
import contextlib
import importlib.metadata
import logging
import os
import pathlib
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent import futures

import grpc
from google.protobuf import text_format
from google.protobuf.message import Message

from pwiser_serving import command_line
from pwiser_serving.server import config_pb2, logs, quiet
from pwiser_serving.server import flags as server_flags

_log = logging.getLogger("pwiser_serving")

# Longer than any request should run; then the server ends without its answer.
_GRACE_SECONDS = 30


def main(arguments: list[str] | None = None) -> None:
    """The command. Returns after SIGTERM or SIGINT has stopped the server.

    A second signal ends the process at once.
    """
    _hold_standard_files()
    _allow_many_files()
    flags = server_flags.parse(arguments)
    if flags.version:
        for name, package in (("ModelServer", "pwiser-serving"), ("Library", "tensorflow")):
            print(f"TensorFlow {name}: {importlib.metadata.version(package)}")
        return
    logs.set_up()
    for name, reason in flags.ignored.items():
        _log.info("--%s: no effect here: %s", name, reason, extra={"event": "flag"})
    try:
        _serve(flags, _stop_event())
    except _UserError as error:
        command_line.fail(error)


def _serve(flags, stop: threading.Event) -> None:
    """Serves until the event is set."""
    # Errors in flags are reported before TensorFlow's import, which takes four seconds.
    credentials = flags.ssl_config_file and _credentials(flags.ssl_config_file)
    monitoring_path = flags.monitoring_config_file and _metrics_path(flags.monitoring_config_file)
    if not flags.model_config_file and not pathlib.Path(flags.model_base_path).is_dir():
        raise _UserError(f"--model_base_path: {flags.model_base_path} is not a folder")
    try:
        with quiet.libraries():
            import tensorflow  # noqa: F401
    except ModuleNotFoundError as error:
        raise _UserError(f"{error}: pip install 'pwiser-serving[server]'") from None
    from tensorflow_serving.config import model_server_config_pb2

    from pwiser_serving.server import memory, rest
    from pwiser_serving.server.calls import Turns
    from pwiser_serving.server.models import Models, single_model
    from pwiser_serving.server.monitoring import Monitoring
    from pwiser_serving.server.saved_model import SavedModel
    from pwiser_serving.server.service import Health, Service, grpc_server
    from pwiser_serving.server.status import Status
    from pwiser_serving.server.versions import Retries

    memory.settle()
    monitoring, load_options = Monitoring(), _load_options(flags)
    models = Models(
        lambda folder: SavedModel(folder, monitoring, load_options),
        allow_labels_for_unavailable=flags.allow_version_labels_for_unavailable_models,
        retries=Retries(flags.max_num_load_retries, flags.load_retry_interval_micros / 1e6),
    )

    def configure() -> bool:
        """Whether the models' configuration has changed, which is in force then."""
        if flags.model_config_file:
            config = model_server_config_pb2.ModelServerConfig()
            _read("--model_config_file", flags.model_config_file, config)
        else:
            config = single_model(flags.model_name, pathlib.Path(flags.model_base_path))
        changed = config != models.config
        if changed:
            try:
                models.configure(config)
            except Status as status:
                raise _UserError(f"--model_config_file: {status}") from None
        return changed

    configure()
    for model in models.all():
        if not (model.base_path.is_dir() or flags.serve_what_loads):
            raise _UserError(f"model {model.name}: {model.base_path} is not a folder")
    service = Service(
        models,
        monitoring,
        Turns(flags.grpc_max_threads),
        as_content=flags.enable_serialization_as_tensor_content,
    )
    max_bytes = flags.max_message_bytes
    server = grpc_server(
        service, max_message_bytes=max_bytes, arguments=flags.grpc_channel_arguments
    )
    health = flags.enable_grpc_healthcheck_service and Health(server)
    addresses = _bind(server, flags, credentials)
    http = None
    if flags.rest_api_port:
        calls = rest.Calls(flags.rest_api_timeout_in_ms / 1000 or None)
        application = rest.Application(
            models,
            service,
            monitoring,
            Turns(flags.rest_api_num_threads),
            calls,
            max_bytes=max_bytes,
            monitoring_path=monitoring_path,
            cors=flags.rest_api_enable_cors_support,
        )
        try:
            http = rest.Server(application, calls, flags.rest_api_port, max_bytes=max_bytes)
        except OSError as error:
            problem = f"--rest_api_port: {flags.rest_api_port}: {error.strerror}"
            raise _UserError(problem) from None

    seconds = flags.file_system_poll_wait_seconds
    if _wait_until_available(models, seconds, stop, all_of_them=not flags.serve_what_loads):
        server.start()
        if http:
            http.start()
        # Nobody may read stdout, or it may be closed.
        with contextlib.suppress(OSError):
            print(f"pwiser_serving: serving {_served(models)} on {addresses}", flush=True)
            if http:
                print(f"pwiser_serving: REST API on 0.0.0.0:{http.port}", flush=True)
        if flags.model_config_file and (wait := flags.model_config_file_poll_wait_seconds):
            follow = (models, configure, wait, stop)
            threading.Thread(target=_follow_file, args=follow, daemon=True).start()
        while not stop.wait(seconds or None):
            models.poll()
        _log.info("stopping on a signal", extra={"event": "stopping"})
        if health:
            health.end()
        # Both refuse new requests from here on, and answer the open ones.
        stopped = server.stop(_GRACE_SECONDS)
        if http:
            http.stop(_GRACE_SECONDS)
        stopped.wait()
    models.close()


def _hold_standard_files() -> None:
    """Opens those of stdin, stdout and stderr that are closed, as /dev/null.

    Otherwise a socket gets the number, and what a library prints goes to a client.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _allow_many_files() -> None:
    """Raises the limit of open files, often 1024, to its maximum: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _stop_event() -> threading.Event:
    """An event that the first SIGTERM or SIGINT sets; the second ends the process at once."""
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def handle(*_):
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        # In another thread: this one may hold the event's lock at this moment.
        _thread.start_new_thread(stop.set, ())

    for number in numbers:
        signal.signal(number, handle)
    return stop


class _UserError(Exception):
    """A mistake in a flag or in a file that it names, in one line."""


def _read(flag: str, path: str, message: Message) -> Message:
    """Fills a message from its text form in a file."""
    try:
        return text_format.Parse(pathlib.Path(path).read_text("utf-8"), message)
    except OSError as error:
        raise _UserError(f"{flag}: {path}: {error.strerror}") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        # TF Serving's words.
        kind = message.DESCRIPTOR.full_name
        raise _UserError(f"{flag}: {path}: Error parsing text-format {kind}: {error}") from None


def _load_options(flags):
    """How models are loaded: the threads and the tags that the flags name."""
    from tensorflow.core.protobuf import config_pb2 as tensorflow_config_pb2

    from pwiser_serving.server.saved_model import LoadOptions

    session = tensorflow_config_pb2.ConfigProto()
    if path := flags.tensorflow_session_config_file:
        _read("--tensorflow_session_config_file", path, session)
    threads = flags.tensorflow_intra_op_parallelism or flags.tensorflow_session_parallelism
    if threads:
        session.intra_op_parallelism_threads = threads
    if flags.per_process_gpu_memory_fraction:
        fraction = flags.per_process_gpu_memory_fraction
        session.gpu_options.per_process_gpu_memory_fraction = fraction
    iterations = max(1, flags.num_request_iterations_for_warmup)
    return LoadOptions(
        tags=flags.saved_model_tags.split(","),
        warm_up_iterations=iterations if flags.enable_model_warmup else 0,
        session=session,
    )


def _credentials(path: str) -> grpc.ServerCredentials:
    """What gRPC needs for TLS, from an SSLConfig file."""
    config = _read("--ssl_config_file", path, config_pb2.SSLConfig())
    for name in ("server_key", "server_cert") + ("custom_ca",) * config.client_verify:
        if not getattr(config, name):
            raise _UserError(f"--ssl_config_file: {path}: {name} is missing")
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        root_certificates=config.custom_ca.encode() or None,
        require_client_auth=config.client_verify,
    )


def _metrics_path(path: str) -> str | None:
    """Where a MonitoringConfig file wants the metrics; None if it does not enable them."""
    from pwiser_serving.server import monitoring

    flag = "--monitoring_config_file"
    config = _read(flag, path, config_pb2.MonitoringConfig()).prometheus_config
    where = config.path or monitoring.DEFAULT_PATH
    if not where.startswith("/"):
        raise _UserError(f"{flag}: {path}: found path {where!r}, expected /...")
    return where if config.enable else None


def _bind(server: grpc.Server, flags, credentials: grpc.ServerCredentials | None) -> str:
    """Binds the port (a free one for 0) and the socket; returns where gRPC listens."""
    found, places = [], []
    if flags.port or not flags.grpc_socket_path:
        places.append(("--port", "0.0.0.0:", flags.port))
    if flags.grpc_socket_path:
        places.append(("--grpc_socket_path", "unix:", flags.grpc_socket_path))
    for flag, scheme, place in places:
        address = f"{scheme}{place}"
        try:
            with quiet.libraries():
                if credentials:
                    port = server.add_secure_port(address, credentials)
                else:
                    port = server.add_insecure_port(address)
        except RuntimeError:
            reasons = f"{flag}: {place} is in use, or may not be used"
            if credentials:
                # gRPC does not say which of the two it is.
                reasons = f"{flag} or --ssl_config_file: {place} is in use, or may not be used, or "
                reasons += "the key and the certificates are not PEM texts that fit"
            raise _UserError(reasons) from None
        found.append(f"{scheme}{port}" if flag == "--port" else address)
    return " and ".join(found)


def _wait_until_available(
    models, seconds: float, stop: threading.Event, *, all_of_them: bool
) -> bool:
    """Waits until all models, or one, have a version in service; False if stopped before."""

    def ready() -> bool:
        missing = models.missing()
        return not missing or (not all_of_them and len(missing) < len(models.all()))

    warned = set()
    while True:
        looks = models.poll()
        next_look = time.monotonic() + seconds
        # A load may take minutes, in which signals and the other models go on.
        while futures.wait(looks, timeout=0.1).not_done:
            if stop.is_set():
                return False
            if ready() or (seconds and time.monotonic() > next_look):
                break
        for model in models.missing():
            if model in warned or model.loading:
                continue
            _log.warning(
                "%s holds no version that loads yet; waiting",
                model.base_path,
                extra={"event": "waiting", "model": model.name},
            )
            warned.add(model)
        if ready():
            return True
        if not seconds:
            raise _UserError(f"{models.missing()[0].base_path} holds no version that loads")
        if stop.wait(max(0, next_look - time.monotonic())):
            return False


def _follow_file(
    models, configure: Callable[[], bool], seconds: float, stop: threading.Event
) -> None:
    """Reads the models' configuration again and again, and uses it when it has changed."""
    reported = None
    while not stop.wait(seconds):
        try:
            if configure():
                # Without waiting for the loads: the file may change again before they are done.
                models.look_again()
                _log.info("a new configuration is in force", extra={"event": "reload"})
            reported = None
        except _UserError as problem:
            # Tried again, as a label may wait for its version, but reported once.
            if str(problem) != reported:
                _log.error("%s", problem, extra={"event": "reload"})
            reported = str(problem)
        except Exception:
            if stop.is_set():
                # The models are closed.
                return
            _log.exception("reading --model_config_file", extra={"event": "fault"})


def _served(models) -> str:
    """What is in service: "a version 3, b version 1"."""
    newest = {model.name: model.available[0] for model in models.all() if model.available}
    return ", ".join(f"{name} version {version}" for name, version in newest.items()) or "nothing"


if __name__ == "__main__":
    main()
    logging.shutdown()
    # Not sys.exit, which would wait for the threads of a running load or request.
    os._exit(0)
