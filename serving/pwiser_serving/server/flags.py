"""Flags: those of TF Serving (main.cc), by their names and, where they are the same, its defaults.

Each is done, or does nothing here (which the log says), or is refused with the reason.
"""

import argparse
import os

from pwiser_serving import command_line

# Python waits for a little longer, and not for what is much longer.
_MAX_SECONDS = 10**9
_THREADS = 4 * (os.cpu_count() or 1)

# TF Serving's flags that do nothing here, and why.
_ALONE = "each request runs by itself"
_BY_MODEL = "models load side by side, the versions of one model one after the other"
_IGNORED = {
    "enable_batching": _ALONE,
    "batching_parameters_file": _ALONE,
    "enable_per_model_batching_parameters": _ALONE,
    "num_load_threads": _BY_MODEL,
    "num_unload_threads": "a version is closed by the thread that used it last",
    "flush_filesystem_caches": "the system's file cache is left alone",
    "tensorflow_inter_op_parallelism": "the operations of a request run one after the other",
    "remove_unused_fields_from_bundle_metagraph": "no such message is kept",
    "num_tflite_pools": "there are no TF Lite models",
    "num_tflite_interpreters_per_pool": "there are no TF Lite models",
    "xla_cpu_compilation_enabled": "TensorFlow's own XLA is always there",
    "xla_gpu_compilation_enabled": "TensorFlow's own XLA is always there",
    "skip_initialize_tpu": "there is no TPU",
}
# And those that cannot be had, which `false` or an empty text switches off.
_REFUSED = {
    "use_alts_credentials": "ALTS is not there; TLS is, by --ssl_config_file",
    "platform_config_file": "the one platform is TensorFlow's",
    "prefer_tflite_model": "TF Lite models are not served",
    "enable_profiler": "there is no profiler service",
    "thread_pool_factory_config_file": "there is one kind of thread pool",
    "mixed_precision": "a model runs in the precision that it was exported in",
    "enable_signature_method_name_check": "the method names of signatures are not checked",
}
_OFF = ("", "0", "false")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected true or false")
    return text.lower() in ("true", "1")


# A flag that is on as --name, --name=true or --name=1.
_SWITCH = {"type": _boolean, "nargs": "?", "const": True, "default": False}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags; `ignored` are those given that do nothing, each with the reason.

    A wrong one ends the process.
    """
    parser = command_line.Parser(
        prog="python -m pwiser_serving.server",
        description="Serves SavedModels over TF Serving's gRPC and REST APIs.",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8500,
        help="gRPC port; 0 chooses a free one, or with --grpc_socket_path none",
    )
    parser.add_argument("--grpc_socket_path", help="a Unix socket for gRPC too")
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
        "--num_request_iterations_for_warmup",
        type=int,
        default=0,
        help="how often each of these is answered; once, if it is not above 0",
    )
    parser.add_argument(
        "--serve_what_loads",
        **_SWITCH,
        help="start as soon as one model is in service; the others follow as they load. Otherwise "
        "the ports open when all models are in service",
    )
    parser.add_argument("--saved_model_tags", default="serve", help="of the graph to load, tag,tag")
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
        "--grpc_max_threads",
        type=int,
        default=_THREADS,
        help="gRPC requests of one model that run at a time; its others wait",
    )
    parser.add_argument(
        "--grpc_channel_arguments",
        type=_channel_arguments,
        default={},
        help="gRPC's own arguments, name=value,name=value",
    )
    parser.add_argument(
        "--rest_api_port", type=int, default=0, help="port of the REST API; 0 for none"
    )
    parser.add_argument(
        "--rest_api_num_threads",
        type=int,
        default=_THREADS,
        help="REST requests of one model that run at a time; its others wait",
    )
    parser.add_argument(
        "--rest_api_timeout_in_ms",
        type=int,
        default=30_000,
        help="milliseconds in which a REST request must be answered; 0 for as long as it takes",
    )
    parser.add_argument(
        "--rest_api_enable_cors_support",
        **_SWITCH,
        help="allow web pages of any origin to use the REST API",
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
    for name, meaning in (
        ("intra_op", "threads that one operation may use; 0 for one a core"),
        ("session", "the same"),
    ):
        parser.add_argument(f"--tensorflow_{name}_parallelism", type=int, default=0, help=meaning)
    parser.add_argument(
        "--tensorflow_session_config_file", help="a ConfigProto as text, for every session"
    )
    parser.add_argument(
        "--per_process_gpu_memory_fraction", type=float, default=0, help="of the memory of a GPU"
    )
    parser.add_argument("--version", action="store_true", help="print the versions and end")
    for name in (*_IGNORED, *_REFUSED):
        # Any text, as no more is done with it.
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    for name, reason in _REFUSED.items():
        if (getattr(flags, name) or "").lower() not in _OFF:
            parser.error(f"--{name} is a flag of TF Serving that this server refuses: {reason}")
    flags.ignored = {
        name: reason for name, reason in _IGNORED.items() if getattr(flags, name) is not None
    }
    if flags.version:
        return flags
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
        "tensorflow_intra_op_parallelism",
        "tensorflow_session_parallelism",
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


def _channel_arguments(text: str) -> dict[str, int | str]:
    """gRPC's arguments by name; what is a number of 32 bits is meant as one, as with TF Serving."""
    arguments: dict[str, int | str] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise argparse.ArgumentTypeError(f"found {pair!r}, expected name=value")
        whole = value.lstrip("-").isdecimal() and -(2**31) <= int(value) < 2**31
        arguments[name] = int(value) if whole else value
    return arguments
