"""The server's command.

    python -m pwiser_serving.server --port 8500 --model_name demo --model_base_path exported/demo

Flags have TF Serving's names and, where they are the same, its defaults.
"""

import _thread
import argparse
import contextlib
import logging
import os
import pathlib
import resource
import signal
import threading
from collections.abc import Callable
from concurrent import futures

import grpc
from google.protobuf import text_format
from google.protobuf.message import Message

from pwiser_serving import command_line
from pwiser_serving.server import config_pb2, logs, quiet

_log = logging.getLogger("pwiser_serving")

# Longer than any request should run: then the server ends without its answer.
_GRACE_SECONDS = 30
# Python waits for a little longer, and not for what is much longer.
_MAX_SECONDS = 10**9
_THREADS = 4 * (os.cpu_count() or 1)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected true or false")
    return text.lower() in ("true", "1")


# A flag that is on as --name, --name=true or --name=1.
_SWITCH = {"type": _boolean, "nargs": "?", "const": True, "default": False}


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="python -m pwiser_serving.server",
        description="Serves SavedModels over TF Serving's gRPC and REST APIs.",
    )
    parser.add_argument("--port", type=int, default=8500, help="gRPC port; 0 chooses a free one")
    parser.add_argument("--model_name", default="default", help="the model's name in requests")
    parser.add_argument("--model_base_path", help="the folder of version folders")
    parser.add_argument(
        "--model_config_file",
        help="a ModelServerConfig as text: several models, version policies, labels; the two "
        "flags above are ignored then",
    )
    parser.add_argument(
        "--model_config_file_poll_wait_seconds",
        type=float,
        default=0,
        help="seconds between looks for changes of that file; 0 looks once",
    )
    parser.add_argument(
        "--file_system_poll_wait_seconds",
        type=float,
        default=1,
        help="seconds between looks for a new version; 0 looks once",
    )
    parser.add_argument(
        "--max_num_load_retries",
        type=int,
        default=5,
        help="how often a version that failed is tried again though its files are as they were",
    )
    parser.add_argument(
        "--load_retry_interval_micros",
        type=int,
        default=60_000_000,
        help="microseconds between these tries",
    )
    parser.add_argument(
        "--enable_model_warmup",
        **_SWITCH | {"default": True},
        help="answer a version's warm-up requests before it takes others",
    )
    parser.add_argument(
        "--allow_version_labels_for_unavailable_models",
        **_SWITCH,
        help="a new label may name a version that is not in service yet: for labels in the "
        "first --model_config_file",
    )
    parser.add_argument(
        "--enable_serialization_as_tensor_content",
        **_SWITCH,
        help="numbers in answers as raw bytes: faster for clients that read them",
    )
    parser.add_argument(
        "--enable_grpc_healthcheck_service", **_SWITCH, help="serve grpc.health.v1.Health too"
    )
    parser.add_argument(
        "--ssl_config_file",
        help="an SSLConfig as text, with the PEM texts of key and certificates: gRPC over TLS only",
    )
    parser.add_argument(
        "--grpc_max_threads", type=int, default=_THREADS, help="gRPC requests that run at a time"
    )
    parser.add_argument(
        "--rest_api_port", type=int, default=0, help="port of the REST API; 0 for none"
    )
    parser.add_argument(
        "--rest_api_num_threads",
        type=int,
        default=_THREADS,
        help="REST requests that run at a time",
    )
    parser.add_argument(
        "--monitoring_config_file",
        help="a MonitoringConfig as text: Prometheus metrics on the REST port",
    )
    parser.add_argument(
        "--max_message_bytes",
        type=int,
        # TF Serving takes 2 GiB, and a request's memory is several times its size.
        default=64 << 20,
        help="the largest request accepted",
    )
    flags = parser.parse_args(arguments)
    if not flags.model_base_path and not flags.model_config_file:
        parser.error("expected --model_base_path or --model_config_file")
    for name in ("port", "rest_api_port"):
        if not 0 <= getattr(flags, name) < 2**16:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected 0 to 65535")
    if flags.monitoring_config_file and not flags.rest_api_port:
        parser.error("--monitoring_config_file: the metrics are on the REST port: --rest_api_port")
    for name in (
        "file_system_poll_wait_seconds",
        "model_config_file_poll_wait_seconds",
        "max_num_load_retries",
        "load_retry_interval_micros",
    ):
        if not getattr(flags, name) >= 0:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected 0 or more")
    for name in ("grpc_max_threads", "rest_api_num_threads"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected 1 or more")
    for name in ("file_system_poll_wait_seconds", "model_config_file_poll_wait_seconds"):
        if getattr(flags, name) > _MAX_SECONDS:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected at most {_MAX_SECONDS}")
    for name in ("model_name", "model_base_path"):
        try:
            (getattr(flags, name) or "").encode()
        except UnicodeEncodeError:
            parser.error(f"--{name}: found {getattr(flags, name)!r}, which is not UTF-8")
    if not 0 < flags.max_message_bytes < 2**31:
        parser.error("--max_message_bytes: expected 1 to 2147483647")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """The command. Returns when SIGTERM or SIGINT has stopped the server.

    A second signal ends the process at once.
    """
    _hold_standard_files()
    _allow_many_files()
    flags = _flags(arguments)
    logs.set_up()
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
    from pwiser_serving.server.models import Models, single_model
    from pwiser_serving.server.monitoring import Monitoring
    from pwiser_serving.server.saved_model import SavedModel
    from pwiser_serving.server.service import Health, Service, grpc_server
    from pwiser_serving.server.status import Status
    from pwiser_serving.server.versions import Retries

    memory.settle()
    monitoring = Monitoring()
    models = Models(
        lambda folder: SavedModel(folder, monitoring, warm_up=flags.enable_model_warmup),
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
        if not model.base_path.is_dir():
            command_line.fail(f"model {model.name}: {model.base_path} is not a folder")

    service = Service(models, monitoring, as_content=flags.enable_serialization_as_tensor_content)
    server = grpc_server(
        service, max_message_bytes=flags.max_message_bytes, threads=flags.grpc_max_threads
    )
    health = flags.enable_grpc_healthcheck_service and Health(server)
    port = _bind(server, flags.port, credentials)
    http = None
    if flags.rest_api_port:
        application = rest.application(
            models,
            service,
            monitoring,
            max_bytes=flags.max_message_bytes,
            monitoring_path=monitoring_path,
        )
        try:
            http = rest.Server(
                application,
                flags.rest_api_port,
                max_bytes=flags.max_message_bytes,
                threads=flags.rest_api_num_threads,
            )
        except OSError as error:
            command_line.fail(f"--rest_api_port: {flags.rest_api_port}: {error.strerror}")

    seconds = flags.file_system_poll_wait_seconds
    if _wait_until_available(models, seconds, stop):
        server.start()
        if http:
            http.start()
        # Whoever started it may have closed stdout or stopped reading it.
        with contextlib.suppress(OSError):
            print(f"pwiser_serving: serving {_served(models)} on 0.0.0.0:{port}", flush=True)
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
        raise _BadFile(f"{path}: {error}") from None


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


def _bind(server: grpc.Server, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Takes the port, or a free one for 0, and returns it."""
    address = f"0.0.0.0:{port}"
    try:
        with quiet.libraries():
            if not credentials:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
    except RuntimeError:
        # It says no more than that it failed: with a key and a certificate there are two reasons.
        which = "--port or --ssl_config_file" if credentials else "--port"
        reasons = f"{port} is in use, or may not be used"
        if credentials:
            reasons += ", or the key and the certificates are not PEM texts that fit"
        command_line.fail(f"{which}: {reasons}")


def _wait_until_available(models, seconds: float, stop: threading.Event) -> bool:
    """Waits until each model has a version in service; False where told to stop before."""
    warned = set()
    while True:
        looks = models.poll()
        # A load may take minutes, and a signal should not wait for it.
        while futures.wait(looks, timeout=0.1).not_done:
            if stop.is_set():
                return False
        missing = models.missing()
        if not missing:
            return True
        for model in missing:
            problem = f"{model.base_path} holds no version that loads"
            if not seconds:
                command_line.fail(problem)
            if model not in warned:
                _log.warning(
                    "%s yet; waiting", problem, extra={"event": "waiting", "model": model.name}
                )
            warned.add(model)
        if stop.wait(seconds):
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
                models.reload(config)
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
