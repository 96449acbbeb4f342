"""What the tests ask of a server: tensorflow-serving-api's own stubs, and requests for them.

The model is that of serving_model.save(folder, 0.0).
"""

import socket

import grpc
import numpy as np
import pytest
import serving_model

pytest.importorskip("tensorflow_serving.apis.prediction_service_pb2_grpc")

import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
ROWS = [("acme", 3, 0.5), ("zorg", 99, -2.0), ("", -(2**63), float("nan")), ("new", 0, 1e30)]
WANTED = {
    name: [serving_model.expected(*row, bias=0.0)[name] for row in ROWS]
    for name in ("ctr", "cvr", "ctcvr")
}
# Far more than any answer needs, on a busy machine too.
SECONDS = 60


class Caller:
    """Both services, over one channel."""

    def __init__(self, address: str):
        self.channel = grpc.insecure_channel(address)
        self._prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self._model = model_service_pb2_grpc.ModelServiceStub(self.channel)

    def predict(self, request):
        return self._prediction.Predict(request, timeout=SECONDS)

    def metadata(self, request):
        return self._prediction.GetModelMetadata(request, timeout=SECONDS)

    def status(self, request):
        return self._model.GetModelStatus(request, timeout=SECONDS)

    def classify(self, request):
        return self._prediction.Classify(request, timeout=SECONDS)

    def regress(self, request):
        return self._prediction.Regress(request, timeout=SECONDS)

    def multi_inference(self, request):
        return self._prediction.MultiInference(request, timeout=SECONDS)

    def reload(self, request):
        return self._model.HandleReloadConfigRequest(request, timeout=SECONDS)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def raw_request(rows=ROWS, **tensors):
    """A Predict request for predict_raw; keywords replace or, with None, remove an input."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    request.model_spec.signature_name = "predict_raw"
    brands, items, prices = zip(*rows, strict=True) if rows else ((), (), ())
    inputs = {
        "brand": tf.make_tensor_proto(list(brands), tf.string, [len(rows)]),
        "item": tf.make_tensor_proto(list(items), tf.int64, [len(rows)]),
        "price": tf.make_tensor_proto(list(prices), tf.float32, [len(rows)]),
    }
    for name, tensor in (inputs | tensors).items():
        if tensor is not None:
            request.inputs[name].CopyFrom(tensor)
    return request


def id_request():
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    request.model_spec.signature_name = "predict"
    brands = [serving_model.BRANDS.get(brand, 0) for brand, _, _ in ROWS]
    categorical = np.array([brands, [item for _, item, _ in ROWS]], np.int64).T
    numerical = np.array([[price] for _, _, price in ROWS], np.float32)
    request.inputs["categorical"].CopyFrom(tf.make_tensor_proto(categorical))
    request.inputs["numerical"].CopyFrom(tf.make_tensor_proto(numerical))
    return request


def example_request(examples=None):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    if examples is None:
        examples = [example(*row) for row in ROWS]
    request.inputs["examples"].CopyFrom(tf.make_tensor_proto(examples, tf.string))
    return request


def example(brand, item, price):
    values = {
        "brand": tf.train.Feature(bytes_list=tf.train.BytesList(value=[brand.encode()])),
        "item": tf.train.Feature(int64_list=tf.train.Int64List(value=[item])),
        "price": tf.train.Feature(float_list=tf.train.FloatList(value=[price])),
    }
    return tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString()


def refused(call, request):
    """The code and message of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return caught.value.code(), caught.value.details()


def scores(response):
    return {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}


def named(name="m", version=None, label=None, signature="predict_raw"):
    request = raw_request()
    request.model_spec.Clear()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    if version is not None:
        request.model_spec.version.value = version
    if label is not None:
        request.model_spec.version_label = label
    return request


def status_request(name="m", version=None):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    return request
