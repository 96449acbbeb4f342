"""Scorer: a model behind a server, called with features and answering with scores."""

import asyncio
import collections
import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from pwiser_serving import features as feature_columns
from pwiser_serving import futures, services, tensors
from pwiser_serving.connection import TLS, open_channel
from pwiser_serving.errors import FeatureError, ModelNotFound, ScoringError, scoring_error
from pwiser_serving.hedging import Hedge, Hedger
from pwiser_serving.protos import service_pb2, tensor_pb2

OUTPUTS = ("ctr", "cvr", "ctcvr")
RAW_SIGNATURE = "predict_raw"
ID_SIGNATURE = "predict"

# Which of them a call takes is told by its features' names: raw ones, ids, serialized Examples.
_SIGNATURES = (RAW_SIGNATURE, ID_SIGNATURE, services.DEFAULT_SIGNATURE)

# Seconds. gRPC counts nanoseconds in 64 bits, and takes a deadline beyond them for one in the past.
_LONGEST_TIMEOUT = 1e9

# What a server may say to features that the model took yesterday.
_CHANGED_MODEL = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


class Scores(dict[str, np.ndarray]):
    """The scores of one call: "ctr", "cvr" and "ctcvr", float32 [n].

    Attributes:
      versions: the versions of the model that answered, in order; several only where the server
        changed over during the call. Empty where there were no rows, or the server does not say.
    """

    def __init__(self, values: Mapping[str, np.ndarray], versions: Iterable[int] = ()):
        super().__init__(values)
        self.versions = tuple(sorted(set(versions)))

    @property
    def version(self) -> int | None:
        """The version that answered; None where it was not exactly one."""
        return self.versions[0] if len(self.versions) == 1 else None


class VersionStatus(NamedTuple):
    """How one version of a model is: its state (START, LOADING, AVAILABLE, UNLOADING or END), and
    the code and message of its error, OK and empty where it has none."""

    version: int
    state: str
    code: grpc.StatusCode
    message: str


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a version of a model takes and gives.

    Attributes:
      version: which one; None where the server does not say.
      signatures: [signature]["inputs" or "outputs"][name] is {"type": "int64", "shape": [None]},
        with None for a size that is free; [signature]["method"] is the method's name.
    """

    version: int | None
    signatures: dict[str, dict]


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a server said about a model."""

    version: int | None
    signatures: Mapping[str, tensor_pb2.Signature]

    def inputs(self, signature: str) -> Mapping[str, tensor_pb2.TensorInfo]:
        found = self.signatures.get(signature)
        return found.inputs if found else {}


class Scorer:
    """Scores candidates with a model that a server of TF Serving's gRPC API holds.

    Keep it: one channel is opened at the first call and used for all that follow, and what the
    model takes is asked from the server then, and again when a new version answers. Several
    threads may use one Scorer at once. A process that forks opens its Scorers after the fork:
    gRPC's connections do not survive one.

    Args:
      address: host:port of the server, or any name that gRPC takes.
      model: the model's name there.
      version: the version to use, or the label of one ("stable"); None for the newest.
      timeout: seconds that one request may take, tries and hedges included. A call that is split,
        or must ask first what the model takes, is several requests, each with this time: one that
        makes progress goes on, one that hangs ends.
      tls: speak TLS, so; None for a plain connection.
      signature: the signature to call. None chooses by the features' names: `predict_raw` for raw
        features, `predict` for `categorical` and `numerical`, `serving_default` for serialized
        tf.train.Examples.
      rows_per_request: larger calls are split into requests of so many rows.
      requests_in_flight: how many of one call's requests are on their way at once.
      hedge: send a second copy of a slow request; None for never. Calls are then spread over all
        servers that the address stands for.

    Raises:
      ValueError: an argument out of range, a TLS file that is not there or no PEM.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        version: int | str | None = None,
        timeout: float = 5.0,
        tls: TLS | None = None,
        signature: str | None = None,
        rows_per_request: int = 4096,
        requests_in_flight: int = 4,
        hedge: Hedge | None = None,
    ):
        if not (timeout > 0 and rows_per_request > 0 and requests_in_flight > 0):
            raise ValueError(
                "timeout, rows_per_request and requests_in_flight must be above 0, found "
                f"{timeout}, {rows_per_request}, {requests_in_flight}"
            )
        if timeout > _LONGEST_TIMEOUT:
            raise ValueError(f"timeout must be at most {_LONGEST_TIMEOUT:g}, found {timeout:g}")
        if isinstance(version, int) and not 0 <= version < 2**63:
            raise ValueError(f"version must be from 0 to 2**63 - 1, found {version}")
        if not address or not model:
            raise ValueError(f"address and model are needed, found {address!r} and {model!r}")
        self.address, self.model, self.version = address, model, version
        self.timeout, self.signature = timeout, signature
        self.rows_per_request, self.requests_in_flight = rows_per_request, requests_in_flight
        self._channel = open_channel(address, tls, several_servers=hedge is not None)
        self._hedger = Hedger(hedge) if hedge else None
        self._predict = self._method(services.PREDICT)
        self._get_metadata = self._method(services.GET_MODEL_METADATA)
        self._get_status = self._method(services.GET_MODEL_STATUS)
        # Replaced as a whole, never changed: threads share it without a lock.
        self._model: _Model | None = None

    def score(self, features: Mapping[str, Sequence]) -> Scores:
        """Scores the candidates, in their order.

        A call that is split while the server changes to another version is scored again, all by
        the newer one, where the server still holds it.

        Args:
          features: columns of raw features by name (lists, NumPy arrays, a pandas frame), each
            [n]; None, NaN, "" and what is masked are missing values. Or ids: `categorical` [n, C],
            `numerical` [n, N]. Or the one input of `serving_default`: serialized Examples of raw
            features.

        Returns:
          "ctr", "cvr", "ctcvr": float32 [n], probabilities; and the `version` that answered.

        Raises:
          FeatureError: the model does not take these features; nothing was sent.
          ServerUnavailable, DeadlineExceeded, ModelNotFound: as they say.
          ScoringError: the server refused or failed otherwise; the kind of all three.
        """
        future = self.score_future(features)
        try:
            return future.result()
        finally:
            # Without effect on one that is done: for a caller that is interrupted.
            future.cancel()

    def score_future(self, features: Mapping[str, Sequence]) -> "concurrent.futures.Future[Scores]":
        """As `score`, without waiting: a future with the scores or the exception.

        `features` must not change until it is done. No thread waits for it: its callbacks run on
        gRPC's own and should be short, and must not wait for other scores there.
        """
        return futures.run(self._steps(features))

    async def score_async(self, features: Mapping[str, Sequence]) -> Scores:
        """As `score`, for asyncio; cancelling it cancels the requests."""
        return await asyncio.wrap_future(self.score_future(features))

    def score_batches(self, batches: Iterable[Mapping[str, Sequence]]) -> Iterator[Scores]:
        """Scores a stream of features in bounded memory, as `score` does each of them.

        A batch of at most rows_per_request rows gives one result, also one without rows; a larger
        one gives several. Results come in order, while later requests are on their way.
        """
        requests = itertools.chain.from_iterable(map(self._stream, batches))
        waiting = collections.deque()
        try:
            for request, rows in requests:
                waiting.append((self._send(self._predict, request) if rows else None, rows))
                if len(waiting) >= self.requests_in_flight:
                    yield self._wait(*waiting.popleft())
            while waiting:
                yield self._wait(*waiting.popleft())
        finally:
            for call, _ in waiting:
                if call:
                    call.cancel()

    def inputs(self, signature: str) -> dict[str, tensor_pb2.TensorInfo]:
        """What a signature of the model takes, by name; empty where there is no such signature."""
        return dict(self._known_model().inputs(signature))

    def metadata(self) -> Metadata:
        """Asks the server what the model takes and gives. Raises ScoringError."""
        model = futures.run(self._ask()).result()
        signatures = {
            name: {
                "inputs": _plain(signature.inputs),
                "outputs": _plain(signature.outputs),
                "method": signature.method_name,
            }
            for name, signature in sorted(model.signatures.items())
        }
        return Metadata(model.version, signatures)

    def status(self) -> list[VersionStatus]:
        """Asks the server how the model's versions are, or the one asked for, newest first.

        Raises:
          ModelNotFound: the server knows no such model, version or label.
          ScoringError: another failure.
        """
        spec = self._spec()
        if isinstance(self.version, str):
            # The server's status knows no labels, and would list all versions.
            spec.version.value = self.metadata().version or 0
        request = service_pb2.GetModelStatusRequest(model_spec=spec)
        try:
            response = self._get_status(request, timeout=self.timeout)
        except grpc.RpcError as error:
            raise self._error(error) from None
        states = service_pb2.ModelVersionStatus.State
        found = [
            VersionStatus(
                version.version,
                states.Name(version.state) if version.state in states.values() else "UNKNOWN",
                _CODES.get(version.status.error_code, grpc.StatusCode.UNKNOWN),
                version.status.error_message,
            )
            for version in response.model_version_status
        ]
        return sorted(found, reverse=True, key=lambda status: status.version)

    def close(self) -> None:
        """Closes the channel; calls that are running end with an error. Once more does nothing."""
        if self._hedger:
            self._hedger.close()
        self._channel.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _steps(self, features) -> Generator[object, object, Scores]:
        """The steps of one call; yields each future that it waits for."""
        model, asked_now = self._model, False
        while True:
            if model is None:
                model, asked_now = (yield from self._ask()), True
            try:
                scores = yield from self._call(model, features, None)
                break
            except (FeatureError, ScoringError) as error:
                refused = isinstance(error, FeatureError) or error.code in _CHANGED_MODEL
                if asked_now or not refused:
                    raise
                # Perhaps the model was replaced by one that takes other features.
                before, model, asked_now = model, (yield from self._ask()), True
                if model == before:
                    raise
        if len(scores.versions) > 1:
            try:
                model = yield from self._ask()
                scores = yield from self._call(model, features, scores.versions[-1])
            except ModelNotFound:
                # Removed already, as happens when a server goes back to an older version.
                pass
        return scores

    def _call(self, model: _Model, features, version: int | None):
        """The requests of one call, some of them at once; a generator of the scores."""
        parts, waiting = [], collections.deque()
        signature, arrays, count = self._columns(model, features)
        try:
            for request, rows in self._requests(signature, arrays, count, version):
                waiting.append((self._send(self._predict, request), rows))
                if len(waiting) >= self.requests_in_flight:
                    parts.append((yield from self._answer(*waiting.popleft())))
            while waiting:
                parts.append((yield from self._answer(*waiting.popleft())))
        finally:
            for call, _ in waiting:
                call.cancel()
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return _no_scores()
        return Scores(
            {name: np.concatenate([part[name] for part in parts]) for name in OUTPUTS},
            itertools.chain.from_iterable(part.versions for part in parts),
        )

    def _answer(self, call, rows: int):
        """A generator: waits for one request's answer."""
        try:
            response = yield call
        except grpc.RpcError as error:
            raise self._error(error) from None
        return self._scores(response, rows)

    def _wait(self, call, rows: int) -> Scores:
        if call is None:
            return _no_scores()
        try:
            return self._scores(call.result(), rows)
        except grpc.RpcError as error:
            # Perhaps the model was replaced by one that takes other features: ask again.
            self._model = None
            raise self._error(error) from None

    def _send(self, method, request):
        """Sends a request: a future of gRPC's kind."""
        if self._hedger is None:
            return method.future(request, timeout=self.timeout)
        end = time.monotonic() + self.timeout
        return self._hedger.send(
            lambda: method.future(request, timeout=max(0, end - time.monotonic()))
        )

    def _stream(self, features) -> Iterator[tuple[service_pb2.PredictRequest | None, int]]:
        """The requests that one batch of a stream makes, each with its number of rows; None in
        place of one without rows, which is not sent."""
        known = self._model
        try:
            columns = self._columns(known or self._known_model(), features)
        except FeatureError:
            if known is None:
                raise
            # The server may hold a newer version by now, which takes other features.
            self._model = None
            columns = self._columns(self._known_model(), features)
        return self._requests(*columns, None) if columns[-1] else iter([(None, 0)])

    def _requests(self, signature: str, arrays, count: int, version: int | None):
        for start in range(0, count, self.rows_per_request):
            part = slice(start, start + self.rows_per_request)
            request = service_pb2.PredictRequest(
                model_spec=self._spec(version),
                inputs={name: tensors.encode(array[part]) for name, array in arrays.items()},
                output_filter=OUTPUTS,
            )
            request.model_spec.signature_name = signature
            yield request, min(self.rows_per_request, count - start)

    def _columns(self, model: _Model, features) -> tuple[str, dict[str, np.ndarray], int]:
        """The signature to call, its arrays, and their number of rows."""
        signature = self.signature
        if signature is None:
            names = set(features.keys())
            there = [name for name in _SIGNATURES if model.inputs(name)] or [RAW_SIGNATURE]
            fitting = [name for name in there if model.inputs(name).keys() == names]
            signature = (fitting or there)[0]
        inputs = model.inputs(signature)
        if not inputs:
            have = ", ".join(sorted(model.signatures))
            details = f"the model has no signature {signature}, only {have}"
            raise self._fault(grpc.StatusCode.FAILED_PRECONDITION, details)
        arrays, rows = feature_columns.to_arrays(features, inputs)
        return signature, arrays, rows

    def _scores(self, response: service_pb2.PredictResponse, rows: int) -> Scores:
        spec, known = response.model_spec, self._model
        versions = [spec.version.value] if spec.HasField("version") else []
        if known and versions and versions != [known.version]:
            # Another version, perhaps with other features: to be asked before the next call.
            self._model = None
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
        return Scores(scores, versions)

    def _known_model(self) -> _Model:
        return self._model or futures.run(self._ask()).result()

    def _ask(self) -> Generator[object, object, _Model]:
        """A generator: asks for the metadata and remembers it."""
        request = service_pb2.GetModelMetadataRequest(
            model_spec=self._spec(), metadata_field=[services.SIGNATURE_FIELD]
        )
        try:
            response = yield self._send(self._get_metadata, request)
            value = response.metadata[services.SIGNATURE_FIELD].value
            signatures = service_pb2.SignatureMap.FromString(value).signature_def
        except grpc.RpcError as error:
            raise self._error(error) from None
        except DecodeError:
            details = "the model's signatures cannot be read"
            raise self._fault(grpc.StatusCode.INTERNAL, details) from None
        spec = response.model_spec
        version = spec.version.value if spec.HasField("version") else None
        self._model = model = _Model(version, signatures)
        return model

    def _spec(self, version: int | None = None) -> service_pb2.ModelSpec:
        wanted = self.version if version is None else version
        spec = service_pb2.ModelSpec(name=self.model)
        if isinstance(wanted, str):
            spec.version_label = wanted
        elif wanted is not None:
            spec.version.value = wanted
        return spec

    def _method(self, method: services.Method):
        return self._channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )

    def _error(self, error: grpc.RpcError) -> ScoringError:
        return scoring_error(self.address, self.model, self.version, self.timeout, error)

    def _fault(self, code: grpc.StatusCode, details: str) -> ScoringError:
        return ScoringError(self.address, self.model, self.version, code, details)


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _no_scores() -> Scores:
    return Scores({name: np.zeros(0, np.float32) for name in OUTPUTS})


def _plain(infos: Mapping[str, tensor_pb2.TensorInfo]) -> dict[str, dict]:
    """A signature's tensors in plain Python, by name."""
    return {
        name: {
            "type": tensors.data_type_name(info.dtype),
            "shape": None
            if info.tensor_shape.unknown_rank
            else [None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim],
        }
        for name, info in sorted(infos.items())
    }
