"""The distribution: light, apart from pwiser_tf, at peace with TensorFlow; and deploy/."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest
from pwiser_serving import Scorer

SERVING = pathlib.Path(__file__).resolve().parents[1]


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_client_does_not_import_tensorflow():
    code = "import sys, pwiser_serving.client; print(*sys.modules)"
    modules = {name.split(".")[0] for name in _python(code).split()}
    assert modules.isdisjoint({"tensorflow", "tensorflow_serving", "keras", "pandas", "absl"})
    assert {"grpc", "numpy"} <= modules


def test_tensorflow_can_be_imported_afterwards():
    pytest.importorskip("tensorflow_serving")
    code = """
import warnings
warnings.simplefilter("error", UserWarning)
import pwiser_serving.scorer
from pwiser_serving.protos import service_pb2, tensor_pb2
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2
request = predict_pb2.PredictRequest()
request.model_spec.name = "m"
request.inputs["x"].CopyFrom(tf.make_tensor_proto([1, 2]))
request.inputs["x"].variant_val.add(type_name="unread")
ours = service_pb2.PredictRequest.FromString(request.SerializeToString())
assert ours.inputs["x"].dtype == tensor_pb2.DT_INT32
assert ours.model_spec.name == "m"
# What our messages do not name is carried along.
assert predict_pb2.PredictRequest.FromString(ours.SerializeToString()) == request
print("fine")
"""
    assert _python(code) == "fine\n"


def _numbers(ours, theirs, pairs):
    """Compares fields by name: number, type and label; follows messages; each pair once."""
    if (ours.full_name, theirs.full_name) in pairs:
        return
    pairs.add((ours.full_name, theirs.full_name))
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert field.number == other.number, field.full_name
        assert field.is_repeated == other.is_repeated, field.full_name
        # An enum is an integer on the wire.
        kinds = {field.type, other.type}
        assert len(kinds) == 1 or kinds == {field.TYPE_INT32, field.TYPE_ENUM}, field.full_name
        if field.message_type and field.message_type.file.package == "pwiser.serving":
            _numbers(field.message_type, other.message_type, pairs)


def test_fields_are_those_of_tf_serving():
    pytest.importorskip("tensorflow_serving")
    from pwiser_serving.protos import service_pb2
    from tensorflow_serving.apis import (
        get_model_metadata_pb2,
        get_model_status_pb2,
        predict_pb2,
        prediction_log_pb2,
    )

    pairs = set()
    for ours, theirs in (
        (service_pb2.PredictRequest, predict_pb2.PredictRequest),
        (service_pb2.PredictResponse, predict_pb2.PredictResponse),
        (
            service_pb2.GetModelMetadataRequest,
            get_model_metadata_pb2.GetModelMetadataRequest,
        ),
        (
            service_pb2.GetModelMetadataResponse,
            get_model_metadata_pb2.GetModelMetadataResponse,
        ),
        (service_pb2.SignatureMap, get_model_metadata_pb2.SignatureDefMap),
        (service_pb2.GetModelStatusRequest, get_model_status_pb2.GetModelStatusRequest),
        (service_pb2.GetModelStatusResponse, get_model_status_pb2.GetModelStatusResponse),
        (service_pb2.PredictionLog, prediction_log_pb2.PredictionLog),
    ):
        _numbers(ours.DESCRIPTOR, theirs.DESCRIPTOR, pairs)
    assert len(pairs) > 15


def _imports(folder: pathlib.Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found


def test_neither_distribution_imports_the_other():
    ours = _imports(SERVING)
    assert "grpc" in ours
    assert ours.isdisjoint({"pwiser_tf", "tools"})
    library = SERVING.parent / "pwiser_tf"
    if library.is_dir():
        assert "pwiser_serving" not in _imports(library) | _imports(SERVING.parent / "tools")


def _server_config(name):
    pytest.importorskip("tensorflow_serving")
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    text = (SERVING / "deploy" / name).read_text()
    return text_format.Parse(text, model_server_config_pb2.ModelServerConfig())


def test_models_config():
    models = _server_config("models.config").model_config_list.config
    assert [model.model_platform for model in models] == ["tensorflow"] * len(models)
    for model in models:
        assert model.base_path == f"/models/{model.name}"


def _session_config_messages():
    """The two messages that tensorflow-serving-api leaves out, from deploy's description."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="deploy_test.proto",
        package="deploy_test",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )

    def message(name, **fields):
        added = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            entry = added.field.add(name=field, number=number, label=kinds.LABEL_OPTIONAL)
            if isinstance(kind, str):
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, kind
            else:
                entry.type = kind
            if field == "allowed_batch_sizes":
                entry.label = kinds.LABEL_REPEATED

    integer = ".google.protobuf.Int64Value"
    message(
        "Batching",
        max_batch_size=integer,
        batch_timeout_micros=integer,
        max_enqueued_batches=integer,
        num_batch_threads=integer,
        allowed_batch_sizes=kinds.TYPE_INT64,
        pad_variable_length_inputs=kinds.TYPE_BOOL,
    )
    message("Prometheus", enable=kinds.TYPE_BOOL, path=kinds.TYPE_STRING)
    message("Monitoring", prometheus_config=".deploy_test.Prometheus")
    text, flag = kinds.TYPE_STRING, kinds.TYPE_BOOL
    message("Ssl", server_key=text, server_cert=text, custom_ca=text, client_verify=flag)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"deploy_test.{name}"))
        for name in ("Batching", "Monitoring", "Ssl")
    }


def _parsed(name, kind):
    from google.protobuf import text_format

    text = (SERVING / "deploy" / name).read_text()
    return text_format.Parse(text, _session_config_messages()[kind]())


def test_batching_config():
    config = _parsed("batching.config", "Batching")
    sizes = list(config.allowed_batch_sizes)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == config.max_batch_size.value
    assert config.num_batch_threads.value >= 1
    # What the client sends in one request must be allowed in one batch.
    default = inspect.signature(Scorer).parameters["rows_per_request"].default
    assert default <= config.max_batch_size.value


def test_monitoring_and_ssl_config():
    monitoring = _parsed("monitoring.config", "Monitoring").prometheus_config
    assert monitoring.enable
    assert monitoring.path == "/monitoring/prometheus/metrics"
    ssl = _parsed("ssl.config", "Ssl")
    assert "PRIVATE KEY" in ssl.server_key
    assert "CERTIFICATE" in ssl.server_cert
    assert not ssl.client_verify


def test_compose_and_kubernetes_name_files_that_are_there():
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((SERVING / "deploy/docker-compose.yaml").read_text())
    service = compose["services"]["serving"]
    # [flag=value] of the server's command line
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in service["command"])
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}
    for flag, value in flags.items():
        if flag.endswith("_file"):
            assert mounts["/config"] == "."
            assert (SERVING / "deploy" / pathlib.Path(value).relative_to("/config")).is_file()
    documents = list(yaml.safe_load_all((SERVING / "deploy/kubernetes.yaml").read_text()))
    kinds = {document["kind"]: document for document in documents}
    assert {"ConfigMap", "Deployment", "Service"} <= set(kinds)
    container = kinds["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == service["image"]
    # The cluster's copies of the files are these files.
    for name, text in kinds["ConfigMap"]["data"].items():
        assert text == (SERVING / "deploy" / name).read_text()
    named = {argument.split("=", 1)[0] for argument in container["args"]}
    assert named == {f"--{flag}" for flag in flags}
    ports = {port["containerPort"] for port in container["ports"]}
    assert ports == {int(flags["port"]), int(flags["rest_api_port"])}
