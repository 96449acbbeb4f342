"""The distribution: light, apart from pwiser_tf, at peace with TensorFlow."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_client_does_not_import_tensorflow():
    code = "import sys, pwiser_serving.client; print(*sys.modules)"
    modules = {name.split(".")[0] for name in _python(code).split()}
    heavy = {"tensorflow", "tensorflow_serving", "keras", "absl", "pandas", "pyarrow", "tqdm"}
    assert modules.isdisjoint(heavy)
    assert {"grpc", "numpy"} <= modules


def test_a_server_without_its_extra_says_so(tmp_path):
    code = f"""
import sys
sys.modules["tensorflow"] = None
from pwiser_serving.server.__main__ import main
main(["--model_name=m", "--model_base_path={tmp_path}"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(": pip install 'pwiser-serving[server]'\n")


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


def test_nothing_of_it_imports_pwiser_tf():
    _python("""
import importlib, pkgutil, sys
sys.modules["pwiser_tf"] = sys.modules["tools"] = None
import pwiser_serving
for module in pkgutil.walk_packages(pwiser_serving.__path__, "pwiser_serving."):
    importlib.import_module(module.name)
""")
