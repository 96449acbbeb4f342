"""The server's command.

    python -m pwiser_serving.server --port 8500 --model_name demo --model_base_path exported/demo

Flags have TF Serving's names and, where they are the same, its defaults.
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

# Longer than any request should run: then the server ends without its answer.
_GRACE_SECONDS = 30


def main(arguments: list[str] | None = None) -> None:
    """The command. Returns when SIGTERM or SIGINT has stopped the server.

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
    stop = _stop_event()
    credentials = flags.ssl_config_file and _credentials(flags.ssl_config_file)
    monitoring_path = flags.monitoring_config_file and _metrics_path(flags.monitoring_config_file)
    if not flags.model_config_file and not pathlib.Path(flags.model_base_path).is_dir():
        command_line.fail(f"--model_base_path: {flags.model_base_path} is not a folder")

    # Imported late: a wrong flag is told at once, not after TensorFlow's four seconds.
    try:
        with quiet.libraries():
            import tensorflow  # noqa: F401
    except ModuleNotFoundError as error:
        command_line.fail(f"{error}: pip install 'pwiser-serving[server]'")
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
    monitoring = Monitoring()
    try:
        load_options = _load_options(flags)
    except _BadFile as problem:
        command_line.fail(f"--tensorflow_session_config_file: {problem}")
    models = Models(
        lambda folder: SavedModel(folder, monitoring, load_options),
        allow_labels_for_unavailable=flags.allow_version_labels_for_unavailable_models,
        retries=Retries(flags.max_num_load_retries, flags.load_retry_interval_micros / 1e6),
    )

    def configuration() -> model_server_config_pb2.ModelServerConfig:
        if not flags.model_config_file:
            return single_model(flags.model_name, pathlib.Path(flags.model_base_path))
        return _read(flags.model_config_file, model_server_config_pb2.ModelServerConfig())

    try:
        models.configure(configuration())
    except (_BadFile, Status) as problem:
        command_line.fail(f"--model_config_file: {problem}")
    for model in models.all():
        if not (model.base_path.is_dir() or flags.serve_what_loads):
            command_line.fail(f"model {model.name}: {model.base_path} is not a folder")

    service = Service(
        models,
        monitoring,
        Turns(flags.grpc_max_threads),
        as_content=flags.enable_serialization_as_tensor_content,
    )
    server = grpc_server(
        service,
        max_message_bytes=flags.max_message_bytes,
        arguments=flags.grpc_channel_arguments,
    )
    health = flags.enable_grpc_healthcheck_service and Health(server)
    addresses = _bind(server, flags, credentials)
    http = None
    if flags.rest_api_port:
        calls = rest.Calls(flags.rest_api_timeout_in_ms / 1000 or None)
        application = rest.application(
            models,
            service,
            monitoring,
            Turns(flags.rest_api_num_threads),
            calls,
            max_bytes=flags.max_message_bytes,
            monitoring_path=monitoring_path,
            cors=flags.rest_api_enable_cors_support,
        )
        try:
            http = rest.Server(
                application, calls, flags.rest_api_port, max_bytes=flags.max_message_bytes
            )
        except OSError as error:
            command_line.fail(f"--rest_api_port: {flags.rest_api_port}: {error.strerror}")

    seconds = flags.file_system_poll_wait_seconds
    if _wait_until_available(models, seconds, stop, all_of_them=not flags.serve_what_loads):
        server.start()
        if http:
            http.start()
        # Whoever started it may have closed stdout or stopped reading it.
        with contextlib.suppress(OSError):
            print(f"pwiser_serving: serving {_served(models)} on {addresses}", flush=True)
            if http:
                print(f"pwiser_serving: REST API on 0.0.0.0:{http.port}", flush=True)
        if flags.model_config_file and flags.model_config_file_poll_wait_seconds:
            threading.Thread(
                target=_follow_file,
                args=(models, configuration, flags.model_config_file_poll_wait_seconds, stop),
                daemon=True,
            ).start()
        while not stop.wait(seconds or None):
            models.poll()
        _log.info("told to stop", extra={"event": "stopping"})
        if health:
            health.end()
        # Both refuse what is new from here on, and answer what has come.
        stopped = server.stop(_GRACE_SECONDS)
        if http:
            http.stop(_GRACE_SECONDS)
        stopped.wait()
    models.close()


def _hold_standard_files() -> None:
    """Opens those of stdin, stdout and stderr that are closed, to nowhere.

    Otherwise a socket gets such a number, and what a library prints goes to a client.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _allow_many_files() -> None:
    """Lifts the bound on open files, often 1024, as far as it may: a connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _stop_event() -> threading.Event:
    """An event that the first SIGTERM or SIGINT sets; the second ends the process at once."""
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def handle(*_):
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        # This runs in the main thread, which may hold the event's lock at this very moment.
        _thread.start_new_thread(stop.set, ())

    for number in numbers:
        signal.signal(number, handle)
    return stop


class _BadFile(Exception):
    """A file of the user's that cannot be read, told in one line."""


def _read(path: str, message: Message) -> Message:
    """A message from its text form in a file."""
    try:
        return text_format.Parse(pathlib.Path(path).read_text("utf-8"), message)
    except OSError as error:
        raise _BadFile(f"{path}: {error.strerror}") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        # TF Serving's words, which its tests look for.
        kind = message.DESCRIPTOR.full_name
        raise _BadFile(f"{path}: Error parsing text-format {kind}: {error}") from None


def _load_options(flags):
    """How models are loaded: the threads and the tags that the flags name."""
    from tensorflow.core.protobuf import config_pb2 as tensorflow_config_pb2

    from pwiser_serving.server.saved_model import LoadOptions

    session = tensorflow_config_pb2.ConfigProto()
    if flags.tensorflow_session_config_file:
        _read(flags.tensorflow_session_config_file, session)
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
    try:
        config = _read(path, config_pb2.SSLConfig())
    except _BadFile as problem:
        command_line.fail(f"--ssl_config_file: {problem}")
    for name in ("server_key", "server_cert") + ("custom_ca",) * config.client_verify:
        if not getattr(config, name):
            command_line.fail(f"--ssl_config_file: {path}: {name} is missing")
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        root_certificates=config.custom_ca.encode() or None,
        require_client_auth=config.client_verify,
    )


def _metrics_path(path: str) -> str | None:
    """Where a MonitoringConfig file wants the metrics, or None where it does not enable them."""
    from pwiser_serving.server import monitoring

    try:
        config = _read(path, config_pb2.MonitoringConfig()).prometheus_config
    except _BadFile as problem:
        command_line.fail(f"--monitoring_config_file: {problem}")
    where = config.path or monitoring.DEFAULT_PATH
    if not where.startswith("/"):
        command_line.fail(f"--monitoring_config_file: {path}: found path {where!r}, expected /...")
    return where if config.enable else None


def _bind(server: grpc.Server, flags, credentials: grpc.ServerCredentials | None) -> str:
    """Takes the port, or a free one for 0, and the socket; returns where gRPC listens."""
    found = []
    for flag, address in (
        ("--port", f"0.0.0.0:{flags.port}" if flags.port or not flags.grpc_socket_path else ""),
        ("--grpc_socket_path", flags.grpc_socket_path and f"unix:{flags.grpc_socket_path}"),
    ):
        if not address:
            continue
        try:
            with quiet.libraries():
                if credentials:
                    port = server.add_secure_port(address, credentials)
                else:
                    port = server.add_insecure_port(address)
        except RuntimeError:
            # It says no more than that it failed: with TLS there are two reasons.
            which = f"{flag} or --ssl_config_file" if credentials else flag
            place = address.removeprefix("0.0.0.0:").removeprefix("unix:")
            reasons = f"{place} is in use, or may not be used"
            if credentials:
                reasons += ", or the key and the certificates are not PEM texts that fit"
            command_line.fail(f"{which}: {reasons}")
        found.append(f"0.0.0.0:{port}" if flag == "--port" else address)
    return " and ".join(found)


def _wait_until_available(
    models, seconds: float, stop: threading.Event, *, all_of_them: bool
) -> bool:
    """Waits until each model has a version in service, or one model has; False where told to stop
    before."""

    def ready() -> bool:
        missing = models.missing()
        return not missing or (not all_of_them and len(missing) < len(models.all()))

    warned = set()
    while True:
        looks = models.poll()
        next_look = time.monotonic() + seconds
        # A load may take minutes: neither a signal nor the other models should wait for it.
        while futures.wait(looks, timeout=0.1).not_done:
            if stop.is_set():
                return False
            if ready() or (seconds and time.monotonic() > next_look):
                break
        for model in models.missing():
            if model in warned or model.loading:
                continue
            problem = f"{model.base_path} holds no version that loads"
            _log.warning(
                "%s yet; waiting", problem, extra={"event": "waiting", "model": model.name}
            )
            warned.add(model)
        if ready():
            return True
        if not seconds:
            missing = models.missing()[0]
            command_line.fail(f"{missing.base_path} holds no version that loads")
        if stop.wait(max(0, next_look - time.monotonic())):
            return False


def _follow_file(
    models, configuration: Callable[[], Message], seconds: float, stop: threading.Event
) -> None:
    """Reads the models' configuration again and again, and goes by it where it has changed."""
    from pwiser_serving.server.status import Status

    told = None
    while not stop.wait(seconds):
        try:
            config = configuration()
            if config != models.config:
                models.configure(config)
                # Nobody waits for the loads: the file may change again before they are done.
                models.look_again()
                _log.info("a new configuration is in force", extra={"event": "reload"})
            told = None
        except (_BadFile, Status) as problem:
            # Tried again, as a label may wait for its version, but told once.
            if str(problem) != told:
                _log.error("--model_config_file: %s", problem, extra={"event": "reload"})
            told = str(problem)
        except Exception:
            if stop.is_set():
                # The models were closed meanwhile.
                return
            _log.exception("reading --model_config_file", extra={"event": "fault"})


def _served(models) -> str:
    """What is in service: "a version 3, b version 1"."""
    newest = {model.name: model.available[0] for model in models.all() if model.available}
    return ", ".join(f"{name} version {version}" for name, version in newest.items()) or "nothing"


if __name__ == "__main__":
    main()
    logging.shutdown()
    # What still runs (a load, a request beyond the grace) has threads that Python would wait for.
    os._exit(0)
