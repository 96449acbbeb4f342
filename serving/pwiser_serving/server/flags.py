"""Flags: those of TF Serving (main.cc), by their names and, if they are equal, its defaults.

Each has its effect, or none (then the log says so), or is refused with the reason.
"""

import argparse
import math
import os

from pwiser_serving import command_line

_THREADS = 4 * (os.cpu_count() or 1)

# TF Serving's flags that have no effect here, and why.
_ALONE = "each request runs alone"
_BY_MODEL = "models load in parallel, the versions of one model in sequence"
_IGNORED = {
    "enable_batching": _ALONE,
    "batching_parameters_file": _ALONE,
    "enable_per_model_batching_parameters": _ALONE,
    "num_load_threads": _BY_MODEL,
    "num_unload_threads": "a version is closed by the thread that used it last",
    "flush_filesystem_caches": "the system's file cache is not touched",
    "tensorflow_inter_op_parallelism": "the operations of a request run one after the other",
    "remove_unused_fields_from_bundle_metagraph": "no such message is kept",
    "num_tflite_pools": "there are no TF Lite models",
    "num_tflite_interpreters_per_pool": "there are no TF Lite models",
    "xla_cpu_compilation_enabled": "TensorFlow's own XLA is always there",
    "xla_gpu_compilation_enabled": "TensorFlow's own XLA is always there",
    "skip_initialize_tpu": "there is no TPU",
}
# Those that this server cannot do. `false` or an empty text is accepted.
_REFUSED = {
    "use_alts_credentials": "there is no ALTS; for TLS use --ssl_config_file",
    "platform_config_file": "the only platform is TensorFlow",
    "prefer_tflite_model": "TF Lite models are not served",
    "enable_profiler": "there is no profiler service",
    "thread_pool_factory_config_file": "there is one kind of thread pool",
    "mixed_precision": "a model runs in the precision that it was exported in",
    "enable_signature_method_name_check": "the method names of signatures are not checked",
}
_PORTS = ("port", "rest_api_port")
# Python cannot wait much longer than that.
_WAITS = ("file_system_poll_wait_seconds", "model_config_file_poll_wait_seconds")
_COUNTS = (
    "max_num_load_retries",
    "tensorflow_intra_op_parallelism",
    "tensorflow_session_parallelism",
)
_RANGES = (
    (_PORTS, 0, 2**16 - 1, "0 to 65535"),
    (_WAITS, 0, math.inf, "0 or more"),
    (_WAITS, 0, 10**9, "at most 1000000000"),
    (_COUNTS, 0, math.inf, "0 or more"),
    (("grpc_max_threads", "rest_api_num_threads"), 1, math.inf, "1 or more"),
    (("max_message_bytes",), 1, 2**31 - 1, "1 to 2147483647"),
)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected true or false")
    return text.lower() in ("true", "1")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags; `ignored` are those given that have no effect, each with the reason.

    A wrong one ends the process.
    """
    parser = command_line.Parser(
        prog="python -m pwiser_serving.server",
        description="Serves SavedModels over TF Serving's gRPC and REST APIs.",
    )

    def add(name: str, default=None, help: str = "", **options) -> None:
        """A flag with the type of its default: text for None, --name or --name=true for bool."""
        if isinstance(default, bool):
            options = {"type": _boolean, "nargs": "?", "const": True}
        elif default is not None and "type" not in options:
            options["type"] = type(default)
        parser.add_argument(f"--{name}", default=default, help=help, **options)

    add("port", 8500, "gRPC port; 0 chooses a free one, or with --grpc_socket_path none")
    add("grpc_socket_path", help="also serve gRPC on this Unix socket")
    add("model_name", "default", "the model's name in requests")
    add("model_base_path", help="the folder of version folders")
    add(
        "model_config_file",
        help="a ModelServerConfig as text: several models, version policies, labels; replaces the "
        "two flags above",
    )
    add(
        "model_config_file_poll_wait_seconds",
        0.0,
        "seconds between looks for changes of that file; 0 looks once",
    )
    add(
        "file_system_poll_wait_seconds",
        1.0,
        "seconds between looks for a new version; 0 looks once",
    )
    add("max_num_load_retries", 5, "tries of a version that failed, while its files do not change")
    add("load_retry_interval_micros", 60_000_000, "microseconds between these tries")
    add("enable_model_warmup", True, "answer a version's warm-up requests before it takes others")
    add("num_request_iterations_for_warmup", 0, "how often each of them is answered; at least once")
    add(
        "serve_what_loads",
        False,
        "open the ports as soon as one model is in service, not when all are",
    )
    add("saved_model_tags", "serve", "of the graph to load, tag,tag")
    add(
        "allow_version_labels_for_unavailable_models",
        False,
        "a new label may name a version that is not in service yet: for labels in the first "
        "--model_config_file",
    )
    add(
        "enable_serialization_as_tensor_content",
        False,
        "numbers in answers as raw bytes: faster for clients that read them",
    )
    add("enable_grpc_healthcheck_service", False, "also serve grpc.health.v1.Health")
    add(
        "ssl_config_file",
        help="an SSLConfig as text, with the PEM texts of key and certificates: gRPC over TLS only",
    )
    waits = "requests of one model that run at a time; its others wait"
    add("grpc_max_threads", _THREADS, f"gRPC {waits}")
    add(
        "grpc_channel_arguments",
        {},
        "gRPC's own arguments, name=value,name=value",
        type=_channel_arguments,
    )
    add("rest_api_port", 0, "port of the REST API; 0 for none")
    add("rest_api_num_threads", _THREADS, f"REST {waits}")
    add("rest_api_timeout_in_ms", 30_000, "deadline of a REST request in milliseconds; 0 for none")
    add("rest_api_enable_cors_support", False, "allow web pages of any origin to use the REST API")
    add(
        "monitoring_config_file",
        help="a MonitoringConfig as text: Prometheus metrics on the REST port",
    )
    # TF Serving accepts 2 GiB, and a request's memory is several times its size.
    add("max_message_bytes", 64 << 20, "the largest request accepted")
    add("tensorflow_intra_op_parallelism", 0, "threads that one operation may use; 0: one a core")
    add("tensorflow_session_parallelism", 0, "the same")
    add("tensorflow_session_config_file", help="a ConfigProto as text, for every session")
    add("per_process_gpu_memory_fraction", 0.0, "of the memory of a GPU")
    parser.add_argument("--version", action="store_true", help="print the versions and end")
    for name in (*_IGNORED, *_REFUSED):
        add(name, help=argparse.SUPPRESS, nargs="?", const="true")
    flags = parser.parse_args(arguments)
    for name, reason in _REFUSED.items():
        if (getattr(flags, name) or "").lower() not in ("", "0", "false"):
            parser.error(f"--{name} is a flag of TF Serving that this server refuses: {reason}")
    flags.ignored = {
        name: reason for name, reason in _IGNORED.items() if getattr(flags, name) is not None
    }
    if flags.version:
        return flags
    if not flags.model_base_path and not flags.model_config_file:
        parser.error("expected --model_base_path or --model_config_file")
    if flags.monitoring_config_file and not flags.rest_api_port:
        parser.error("--monitoring_config_file: the metrics are on the REST port: --rest_api_port")
    for names, low, high, expected in _RANGES:
        for name in names:
            if not low <= getattr(flags, name) <= high:
                parser.error(f"--{name}: found {getattr(flags, name)}, expected {expected}")
    for name in ("model_name", "model_base_path"):
        try:
            (getattr(flags, name) or "").encode()
        except UnicodeEncodeError:
            parser.error(f"--{name}: found {getattr(flags, name)!r}, which is not UTF-8")
    return flags


def _channel_arguments(text: str) -> dict[str, int | str]:
    """gRPC's arguments by name; values that are numbers of 32 bits are int, as in TF Serving."""
    arguments: dict[str, int | str] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise argparse.ArgumentTypeError(f"found {pair!r}, expected name=value")
        whole = value.lstrip("-").isdecimal() and -(2**31) <= int(value) < 2**31
        arguments[name] = int(value) if whole else value
    return arguments
