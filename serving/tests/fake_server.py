"""A server of TF Serving's gRPC methods in a few lines: no TensorFlow, and faults on demand.

As a program it serves `FakeModel(brand=string, item=int64, price=float)`, whose scores are the
price, and prints its port: `python fake_server.py PORT VERSION SECONDS_A_REQUEST`.
"""

import contextlib
import pathlib
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import numpy as np
from pwiser_serving import services, tensors
from pwiser_serving.protos import service_pb2, tensor_pb2

# In front of a command: a job in the background inherits that SIGINT is ignored. Not preexec_fn,
# which forks: with gRPC in this process, that may end the child before its command begins.
INTERRUPTIBLE = ("env", "--default-signal=INT")

FEATURES = {"brand": tensor_pb2.DT_STRING, "item": tensor_pb2.DT_INT64, "price": 1}


class Refused(Exception):
    """The code and the message of a call's end."""


class FakeModel:
    """A model whose three scores are its last input's values, whatever `before` does first.

    Attributes:
      calls: the predictions asked for; version: the newest, which answers where none is asked
      for; held: the versions there are; labels: versions by label; answer: an array as a tensor.
    """

    def __init__(self, **data_types):
        self.signatures = {"predict_raw": tensor_pb2.Signature()}
        self.calls = self.metadata_calls = 0
        self.version, self.held, self.labels = 1, {1}, {}
        self.before = lambda: None
        self.answer = tensors.encode
        self.set_inputs(**(data_types or {"x": tensor_pb2.DT_FLOAT}))

    def set_inputs(self, **data_types):
        signature = self.signatures["predict_raw"]
        signature.inputs.clear()
        for name, data_type in data_types.items():
            signature.inputs[name].dtype = data_type
            signature.inputs[name].tensor_shape.dim.add(size=-1)
        for name in ("ctr", "cvr", "ctcvr"):
            signature.outputs[name].dtype = tensor_pb2.DT_FLOAT

    def set_version(self, version: int, *, keep: bool = False):
        self.held = {version} | (self.held if keep else set())
        self.version = version

    def predict(self, request, context):
        self.calls += 1
        spec = self._found(request.model_spec)
        self.before()
        if request.inputs.keys() != self.signatures[spec.signature_name].inputs.keys():
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "input size does not match signature")
        last = max(request.inputs)
        values = tensors.decode(request.inputs[last])
        if values.dtype == object:
            values = np.array([len(value) for value in values])
        values = values.astype(np.float32)
        outputs = {name: self.answer(values) for name in request.output_filter}
        return service_pb2.PredictResponse(outputs=outputs, model_spec=spec)

    def get_model_metadata(self, request, context):
        self.metadata_calls += 1
        spec = self._found(request.model_spec)
        signatures = service_pb2.SignatureMap(signature_def=self.signatures)
        response = service_pb2.GetModelMetadataResponse(model_spec=spec)
        response.metadata[services.SIGNATURE_FIELD].value = signatures.SerializeToString()
        return response

    def get_model_status(self, request, context):
        spec = request.model_spec
        asked = {spec.version.value} if spec.HasField("version") else self.held
        response = service_pb2.GetModelStatusResponse()
        for version in sorted(asked & self.held):
            response.model_version_status.add(version=version, state=30)
        response.model_version_status.add(version=99, state=50).status.error_code = 5
        response.model_version_status[-1].status.error_message = "no\nsuch file"
        return response

    def _found(self, asked):
        """The spec of the answer: the version that gives it."""
        version = self.version
        if asked.HasField("version"):
            version = asked.version.value
        elif asked.version_label:
            if asked.version_label not in self.labels:
                message = f"Unrecognized servable version label: {asked.version_label}"
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, message)
            version = self.labels[asked.version_label]
        if version not in self.held:
            message = f"Servable not found for request: Specific({asked.name}, {version})"
            raise Refused(grpc.StatusCode.NOT_FOUND, message)
        spec = service_pb2.ModelSpec(name=asked.name, signature_name=asked.signature_name)
        spec.version.value = version
        return spec


def _handler(answer, method: services.Method):
    def respond(request, context):
        try:
            return answer(request, context)
        except Refused as refused:
            return context.abort(*refused.args)

    return grpc.unary_unary_rpc_method_handler(
        respond,
        request_deserializer=method.request.FromString,
        response_serializer=method.response.SerializeToString,
    )


@contextlib.contextmanager
def serve(model: FakeModel, *, credentials=None, port: int = 0, options=()):
    """Runs the model's server within a `with`, and gives its port."""
    server = grpc.server(futures.ThreadPoolExecutor(8), options=list(options))
    for method, answer in (
        (services.PREDICT, model.predict),
        (services.GET_MODEL_METADATA, model.get_model_metadata),
        (services.GET_MODEL_STATUS, model.get_model_status),
    ):
        handlers = {method.name: _handler(answer, method)}
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(method.service, handlers)]
        )
    address = f"localhost:{port}"
    if credentials is None:
        found = server.add_insecure_port(address)
    else:
        found = server.add_secure_port(address, credentials)
    server.start()
    try:
        yield found
    finally:
        server.stop(None).wait()


def server_credentials(folder: pathlib.Path, role: str = "server", *, mutual: bool):
    """Credentials out of the files of the fixture `certificates`."""
    key, chain = (folder / f"ours-{role}{end}.pem" for end in ("-key", ""))
    return grpc.ssl_server_credentials(
        [(key.read_bytes(), chain.read_bytes())],
        root_certificates=(folder / "ours.pem").read_bytes() if mutual else None,
        require_client_auth=mutual,
    )


@contextlib.contextmanager
def process(port: int = 0, version: int = 1, seconds: float = 0.005):
    """Runs this file as a program within a `with`: the process, to be killed, and its port."""
    command = [sys.executable, __file__, str(port), str(version), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running, int(running.stdout.readline())
        finally:
            running.kill()


def main():
    port, version, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    model = FakeModel(**FEATURES)
    model.set_version(version)
    model.before = lambda: time.sleep(seconds)
    with serve(model, port=port, options=[("grpc.so_reuseport", 0)]) as found:
        print(found, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
