"""The server's command.

    python -m pwiser_serving.server --port 8500 --model_name demo --model_base_path exported/demo

Flags have TF Serving's names and, where they are the same, its defaults.
"""

import argparse
import logging
import pathlib
import signal
import threading
from concurrent import futures

from pwiser_serving import command_line

_log = logging.getLogger("pwiser_serving")

# Longer than any request should run: then the server ends without its answer.
_GRACE_SECONDS = 30


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
    import pwiser_serving.server.quiet  # noqa: F401

    # isort: split
    from pwiser_serving.server.models import Models, single_model
    from pwiser_serving.server.saved_model import SavedModel
    from pwiser_serving.server.service import Service, grpc_server

    models = Models(SavedModel)
    models.configure(single_model(flags.model_name, base_path))
    service = Service(models, as_content=flags.enable_serialization_as_tensor_content)
    server = grpc_server(service, max_message_bytes=flags.max_message_bytes)
    try:
        port = server.add_insecure_port(f"0.0.0.0:{flags.port}")
    except RuntimeError:
        command_line.fail(f"--port: {flags.port} is in use, or may not be used")

    seconds = flags.file_system_poll_wait_seconds
    if _wait_until_available(models, seconds, stop):
        server.start()
        print(f"pwiser_serving: serving {_served(models)} on 0.0.0.0:{port}", flush=True)
        while not stop.wait(seconds or None):
            models.poll()
    server.stop(_GRACE_SECONDS).wait()
    models.close()


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
                _log.warning("%s yet; waiting", problem, extra={"event": "waiting"})
            warned.add(model)
        if stop.wait(seconds):
            return False


def _served(models) -> str:
    """What is in service: "a version 3, b version 1"."""
    newest = {model.name: model.available[0] for model in models.all() if model.available}
    return ", ".join(f"{name} version {version}" for name, version in newest.items())


if __name__ == "__main__":
    main()
