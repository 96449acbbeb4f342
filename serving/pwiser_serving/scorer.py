"""Scorer: a model behind a server, called with features and answering with scores."""

import collections
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import grpc
import numpy as np

from pwiser_serving import features as feature_columns
from pwiser_serving import services, tensors
from pwiser_serving.errors import FeatureError, ScoringError, ServerUnavailable
from pwiser_serving.protos import service_pb2, tensor_pb2

OUTPUTS = ("ctr", "cvr", "ctcvr")
RAW_SIGNATURE = "predict_raw"
ID_SIGNATURE = "predict"

# Only a call that reached no server is tried again: to score twice is harmless, but a server that
# fails for another reason needs less work, not more.
_RETRY = {
    "methodConfig": [
        {
            "name": [{"service": services.PREDICT.service}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

Scores = dict[str, np.ndarray]


class Scorer:
    """Scores candidates with a model that a server of TF Serving's gRPC API holds.

    One channel is opened and kept; a Scorer may be used by several threads at once. What the
    model takes is asked from the server, at the first call.

    Args:
      address: host:port of the server.
      model: the model's name there.
      version: the version to use; None for the newest.
      timeout: seconds that one request may take, retries included.
      signature: the signature to call. None chooses by the features' names: `predict` for
        `categorical` and `numerical`, unless raw features are called so, else `predict_raw`.
      rows_per_request: larger calls are split into requests of so many rows.
      requests_in_flight: how many of them are on their way at once.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        version: int | None = None,
        timeout: float = 5.0,
        signature: str | None = None,
        rows_per_request: int = 4096,
        requests_in_flight: int = 4,
    ):
        if timeout <= 0 or rows_per_request < 1 or requests_in_flight < 1:
            raise ValueError(
                "timeout, rows_per_request and requests_in_flight must be above 0, found "
                f"{timeout}, {rows_per_request}, {requests_in_flight}"
            )
        self.address, self.model, self.version = address, model, version
        self.timeout, self.signature = timeout, signature
        self.rows_per_request, self.requests_in_flight = rows_per_request, requests_in_flight
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.service_config", json.dumps(_RETRY)),
                # A server that comes back is found within the tries, not after gRPC's seconds.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )
        self._predict = self._method(services.PREDICT)
        self._get_metadata = self._method(services.GET_MODEL_METADATA)
        self._signatures: Mapping[str, tensor_pb2.Signature] | None = None

    def score(self, features: Mapping[str, Sequence]) -> Scores:
        """Scores the candidates, in their order.

        Args:
          features: columns of raw features by name (lists, NumPy arrays, a pandas frame), each
            [n]; None, NaN and "" are missing values. Or ids: `categorical` [n, C], `numerical`
            [n, N].

        Returns:
          "ctr", "cvr", "ctcvr": float32 [n], probabilities.

        Raises:
          FeatureError: the model does not take these features; nothing was sent.
          ServerUnavailable: no server answers.
          ScoringError: the server refused, failed, or did not answer in time.
        """
        parts = list(self.score_batches([features]))
        if not parts:
            return {name: np.zeros(0, np.float32) for name in OUTPUTS}
        return {name: np.concatenate([part[name] for part in parts]) for name in OUTPUTS}

    def score_batches(self, batches: Iterable[Mapping[str, Sequence]]) -> Iterator[Scores]:
        """Scores a stream of features in bounded memory, as `score` does each of them.

        A batch of at most rows_per_request rows gives one result; a larger one gives several.
        Results come in order, while later requests are on their way.
        """
        requests = itertools.chain.from_iterable(map(self._requests, batches))
        waiting = collections.deque()
        try:
            for request, rows in requests:
                waiting.append((self._predict.future(request, timeout=self.timeout), rows))
                if len(waiting) >= self.requests_in_flight:
                    yield self._scores(*waiting.popleft())
            while waiting:
                yield self._scores(*waiting.popleft())
        finally:
            for call, _ in waiting:
                call.cancel()

    def inputs(self, signature: str) -> dict[str, tensor_pb2.TensorInfo]:
        """What a signature of the model takes, by name; empty where there is no such signature."""
        if self._signatures is None:
            self._signatures = self._ask_signatures()
        found = self._signatures.get(signature)
        return dict(found.inputs) if found else {}

    def close(self) -> None:
        """Closes the channel; calls that are running end with an error."""
        self._channel.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _requests(self, features) -> Iterator[tuple[service_pb2.PredictRequest, int]]:
        """The requests that the features make, each with its number of rows."""
        known_before = self._signatures is not None
        try:
            signature, arrays, rows = self._columns(features)
        except FeatureError:
            if not known_before:
                raise
            # The server may hold a newer version by now, which takes other features.
            self._signatures = None
            signature, arrays, rows = self._columns(features)
        for start in range(0, rows, self.rows_per_request):
            part = slice(start, start + self.rows_per_request)
            request = service_pb2.PredictRequest(
                model_spec=self._model_spec(),
                inputs={name: tensors.encode(array[part]) for name, array in arrays.items()},
                output_filter=OUTPUTS,
            )
            request.model_spec.signature_name = signature
            yield request, min(self.rows_per_request, rows - start)

    def _columns(self, features) -> tuple[str, dict[str, np.ndarray], int]:
        """The signature to call, its arrays, and their number of rows."""
        signature = self.signature
        if signature is None:
            ids = self.inputs(ID_SIGNATURE)
            names = set(features.keys())
            by_ids = bool(ids) and names == set(ids) != set(self.inputs(RAW_SIGNATURE))
            signature = ID_SIGNATURE if by_ids else RAW_SIGNATURE
        inputs = self.inputs(signature)
        if not inputs:
            have = ", ".join(sorted(self._signatures))
            details = f"the model has no signature {signature}, only {have}"
            raise self._fault(grpc.StatusCode.FAILED_PRECONDITION, details)
        arrays, rows = feature_columns.to_arrays(features, inputs)
        return signature, arrays, rows

    def _scores(self, call: grpc.Future, rows: int) -> Scores:
        try:
            response = call.result()
        except grpc.RpcError as error:
            # Perhaps the model was replaced by one that takes other features: ask again.
            self._signatures = None
            raise self._error(error) from None
        scores = {}
        for name in OUTPUTS:
            try:
                scores[name] = tensors.decode(response.outputs[name]).astype(np.float32)
            except ValueError as error:
                details = f"the answer's {name} cannot be read: {error}"
                raise self._fault(grpc.StatusCode.INTERNAL, details) from None
            if scores[name].shape != (rows,):
                shape = list(scores[name].shape)
                details = f"the answer's {name} has the shape {shape}, expected [{rows}]"
                raise self._fault(grpc.StatusCode.INTERNAL, details)
        return scores

    def _ask_signatures(self) -> Mapping[str, tensor_pb2.Signature]:
        request = service_pb2.GetModelMetadataRequest(
            model_spec=self._model_spec(), metadata_field=[services.SIGNATURE_FIELD]
        )
        try:
            response = self._get_metadata(request, timeout=self.timeout)
        except grpc.RpcError as error:
            raise self._error(error) from None
        value = response.metadata[services.SIGNATURE_FIELD].value
        return service_pb2.SignatureMap.FromString(value).signature_def

    def _model_spec(self) -> service_pb2.ModelSpec:
        spec = service_pb2.ModelSpec(name=self.model)
        if self.version is not None:
            spec.version.value = self.version
        return spec

    def _method(self, method: services.Method):
        return self._channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )

    def _error(self, error: grpc.RpcError) -> ScoringError:
        code, details = error.code(), error.details() or ""
        kind = ScoringError
        if code is grpc.StatusCode.UNAVAILABLE:
            kind, details = ServerUnavailable, f"no server answers ({details})"
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            details = f"no answer within {self.timeout:g} seconds"
        return kind(self.address, self.model, self.version, code, details)

    def _fault(self, code: grpc.StatusCode, details: str) -> ScoringError:
        return ScoringError(self.address, self.model, self.version, code, details)
