"""flags: what of TF Serving's own is done, does nothing, or is refused."""

import re

import pytest
from pwiser_serving.server import __main__ as server
from pwiser_serving.server import flags

# Those of tensorflow_model_server (main.cc at 9d981c5).
TF_SERVINGS = """
port grpc_socket_path rest_api_port rest_api_num_threads rest_api_timeout_in_ms
rest_api_enable_cors_support enable_batching allow_version_labels_for_unavailable_models
batching_parameters_file enable_per_model_batching_parameters model_config_file
model_config_file_poll_wait_seconds model_name model_base_path num_load_threads
num_unload_threads max_num_load_retries load_retry_interval_micros file_system_poll_wait_seconds
flush_filesystem_caches tensorflow_session_parallelism tensorflow_session_config_file
tensorflow_intra_op_parallelism tensorflow_inter_op_parallelism use_alts_credentials
ssl_config_file platform_config_file per_process_gpu_memory_fraction saved_model_tags
grpc_channel_arguments grpc_max_threads enable_model_warmup num_request_iterations_for_warmup
version monitoring_config_file remove_unused_fields_from_bundle_metagraph prefer_tflite_model
num_tflite_pools num_tflite_interpreters_per_pool enable_signature_method_name_check
xla_cpu_compilation_enabled xla_gpu_compilation_enabled enable_profiler
thread_pool_factory_config_file mixed_precision skip_initialize_tpu
enable_grpc_healthcheck_service enable_serialization_as_tensor_content
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", TF_SERVINGS)
def test_each_of_tf_servings_flags_is_known(name):
    assert hasattr(flags.parse(["--model_base_path=/m"]), name)


def test_flags_without_effect_are_told_and_those_that_cannot_be_had_refused(capsys):
    found = flags.parse(
        ["--model_base_path=/m", "--enable_batching", "--num_load_threads=2", "--mixed_precision="]
    )
    assert list(found.ignored) == ["enable_batching", "num_load_threads"]
    assert not flags.parse(["--model_base_path=/m", "--enable_profiler=false"]).ignored
    for flag in ("--enable_profiler", "--prefer_tflite_model=true", "--platform_config_file=p"):
        with pytest.raises(SystemExit) as caught:
            flags.parse(["--model_base_path=/m", flag])
        assert caught.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {flag.split('=')[0]} is a flag of TF Serving that this")
        assert told.count("\n") == 1


def test_grpcs_own_arguments_are_numbers_where_they_can_be(capsys):
    text = "grpc.max_connection_age_ms=2000,grpc.lb_policy_name=grpclb,grpc.x=99999999999,"
    found = flags.parse(["--model_base_path=/m", f"--grpc_channel_arguments={text}"])
    assert found.grpc_channel_arguments == {
        "grpc.max_connection_age_ms": 2000,
        "grpc.lb_policy_name": "grpclb",
        "grpc.x": "99999999999",
    }
    with pytest.raises(SystemExit):
        flags.parse(["--model_base_path=/m", "--grpc_channel_arguments=grpc.x"])
    assert "found 'grpc.x', expected name=value" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    server.main(["--version"])
    out = capsys.readouterr().out
    assert re.fullmatch(r"TensorFlow ModelServer: \S+\nTensorFlow Library: 2\.\d+\.\S+\n", out)
