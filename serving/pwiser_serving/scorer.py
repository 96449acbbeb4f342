"""Scorer: a model behind a server, called with features and answering with scores."""

import asyncio
import collections
import concurrent.futures
import dataclasses
import itertools
import numbers
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import grpc
from google.protobuf.message import DecodeError

from pwiser_serving import futures, services, tensors
from pwiser_serving.base_scorer import (
    BaseScorer,
    Call,
    Model,
    Scores,
    by_name,
    joined,
    names_of_lists,
    require_types,
    type_name,
)
from pwiser_serving.connection import TLS, open_channel, proxy
from pwiser_serving.errors import (
    FeatureError,
    ModelNotFound,
    RequestTooLarge,
    ScoringError,
    scoring_error,
)
from pwiser_serving.hedging import Hedge, Hedger
from pwiser_serving.protos import service_pb2, tensor_pb2

# Seconds. gRPC counts nanoseconds in 64 bits, and a deadline beyond them is in the past.
_LONGEST_TIMEOUT = 1e9

# What a server answers to features that only an older version takes.
_CHANGED_MODEL = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


class VersionStatus(NamedTuple):
    """One version of a model: its state (START, LOADING, AVAILABLE, UNLOADING or END), and the code
    and message of its error, OK and empty if there is none."""

    version: int
    state: str
    code: grpc.StatusCode
    message: str


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a version of a model takes and gives.

    Attributes:
      version: which one; None if the server does not say.
      signatures: [signature]["inputs" or "outputs"][name] is {"type": "int64", "shape": [None]},
        with None for a size that is free; [signature]["method"] is the method's name.
    """

    version: int | None
    signatures: dict[str, dict]


class Scorer(BaseScorer):
    """Scores candidates with a model that a server of TF Serving's gRPC API holds.

    Keep it: the first call opens the channel that all later calls use, and asks the server what the
    model takes, as does a call after which a new version answered. Thread-safe. A process that
    forks must open its Scorers after the fork: gRPC's connections do not survive one.

    Args:
      address: host:port of the server, or any name that gRPC takes.
      model: the model's name there.
      version: the version to use, or the label of one ("stable"); None for the newest.
      timeout: seconds for one request, retries and hedges included. A call that is split, or must
        first ask what the model takes, is several requests, each with this time.
      tls: settings of TLS; None for a plain connection.
      signature: the signature to call. None chooses by the features' names: `predict_raw` for raw
        features, `predict` for `categorical` and `numerical`, `serving_default` for serialized
        tf.train.Examples.
      rows_per_request: larger calls are split into requests of so many rows. A request above the
        server's message limit is split further.
      requests_in_flight: how many requests of one call are sent at once.
      hedge: send a second copy of a slow request; None for never. With it, calls are spread over
        all servers of the address.
      newest_last: the list features whose newest value is the last one: of a list with more values
        than the model takes, the last ones are kept. Of other lists the first ones are.

    Every method raises UsageError after close(). Those that wait for an answer (all but
    score_future and score_async) also raise it inside a callback of a future, where they would wait
    forever.

    Raises:
      TypeError: an argument of another type.
      ValueError: an argument out of range, a TLS file that is missing or not PEM.
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
        newest_last: Collection[str] = (),
    ):
        require_types(
            ("address", address, str, 'a str, "host:port"'),
            ("model", model, str, "a str"),
            ("version", version, numbers.Integral | str | None, "an int, a label (str) or None"),
            ("timeout", timeout, numbers.Real, "a number of seconds"),
            ("tls", tls, TLS | None, "a pwiser_serving.TLS or None"),
            ("signature", signature, str | None, "a str or None"),
            ("rows_per_request", rows_per_request, numbers.Integral, "an int"),
            ("requests_in_flight", requests_in_flight, numbers.Integral, "an int"),
            ("hedge", hedge, Hedge | None, "a pwiser_serving.Hedge or None"),
        )
        if not (timeout > 0 and rows_per_request > 0 and requests_in_flight > 0):
            raise ValueError(
                "timeout, rows_per_request and requests_in_flight must be above 0, found "
                f"{timeout}, {rows_per_request}, {requests_in_flight}"
            )
        if timeout > _LONGEST_TIMEOUT:
            raise ValueError(f"timeout must be at most {_LONGEST_TIMEOUT:g}, found {timeout:g}")
        if isinstance(version, str) and (not version or version.isdecimal()):
            raise ValueError(
                f"version: found {version!r}, expected the number of a version as an int, or a "
                "label, which is not a number"
            )
        if isinstance(version, numbers.Integral) and not 0 <= version < 2**63:
            raise ValueError(f"version must be from 0 to 2**63 - 1, found {version}")
        if not address or not model:
            raise ValueError(f"address and model are needed, found {address!r} and {model!r}")
        # Plain numbers: gRPC adds the timeout to the time of day, which does not fit a float32.
        self.address, self.model, self.signature = address, model, signature
        self.version = int(version) if isinstance(version, numbers.Integral) else version
        self.timeout, self.rows_per_request = float(timeout), int(rows_per_request)
        self.requests_in_flight = int(requests_in_flight)
        self.newest_last = names_of_lists(newest_last)
        self._channel = open_channel(address, tls, several_servers=hedge is not None)
        self._proxy = proxy(address)
        self._hedger = Hedger(hedge) if hedge else None
        self._closed = False
        self._predict = self._method(services.PREDICT)
        self._get_metadata = self._method(services.GET_MODEL_METADATA)
        self._get_status = self._method(services.GET_MODEL_STATUS)
        # Replaced as a whole, never changed: threads share it without a lock.
        self._model: Model | None = None

    def score(self, features: Mapping[str, Sequence]) -> Scores:
        """Scores the candidates, in their order.

        If the server changes to another version during a call that is split, all of it is scored
        again by the newer one, if the server still has it.

        Args:
          features: columns of raw features by name (lists, NumPy arrays, a pandas frame), each
            [n]; None, NaN, "" and what is masked are missing values. A list or a vector has a
            sequence in each row; "NAME.weights" may give a weight for each value of list NAME. Or
            ids: `categorical` [n, C], `numerical` [n, N]. Or the one input of `serving_default`:
            serialized Examples of raw features.

        Returns:
          "ctr", "cvr", "ctcvr", or only "ctr", as the model has them: float32 [n], probabilities;
          and the `version` that answered.

        Raises:
          TypeError: `features` has no columns by name, as a list of rows; nothing was sent.
          FeatureError: the model does not take these features; nothing was sent.
          ScoringError: the server refused or failed. Its subclasses are ServerUnavailable,
            DeadlineExceeded, ModelNotFound, and RequestTooLarge: one row alone is above the
            server's message limit.
        """
        return self._wait(self._steps(features))

    def score_future(self, features: Mapping[str, Sequence]) -> "concurrent.futures.Future[Scores]":
        """As `score`, without waiting: a future with the scores or the exception.

        `features` must not change until it is done. Its callbacks run on gRPC's thread, which
        receives all answers. They should be short, and cannot wait for an answer: score() and the
        other methods that wait, and the result of a future that is not done, raise UsageError
        there. Use score_future, or another thread.
        """
        return futures.run(self._steps(features))

    async def score_async(self, features: Mapping[str, Sequence]) -> Scores:
        """As `score`, for asyncio; cancelling it cancels the requests."""
        return await asyncio.wrap_future(self.score_future(features))

    def score_batches(self, batches: Iterable[Mapping[str, Sequence]]) -> Iterator[Scores]:
        """Scores a stream of features in bounded memory, each as `score` does.

        A batch of at most rows_per_request rows, also one without rows, gives one result; a larger
        one gives several. Results come in order, while later requests are running.

        Raises: as `score`; TypeError also for the features of one batch in place of a stream.
        """
        if callable(getattr(batches, "keys", None)) or not isinstance(batches, Iterable):
            raise TypeError(
                "batches: expected a stream of features, as a list or generator of dicts, found "
                f"{type_name(batches)}; for one batch call score(features)"
            )
        self._require_open()
        futures.refuse_in_callback()
        return self._results(batches)

    def inputs(self, signature: str) -> dict[str, tensor_pb2.TensorInfo]:
        """What a signature of the model takes, by name; empty if there is no such signature."""
        self._require_open()
        return dict(self._known_model().inputs(signature))

    def outputs(self, signature: str) -> tuple[str, ...]:
        """The scores that a signature of the model gives; empty if there is no such signature."""
        self._require_open()
        return self._known_model().outputs(signature)

    def metadata(self) -> Metadata:
        """Asks the server what the model takes and gives. Raises ScoringError."""
        model = self._wait(self._ask())
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
        """Asks the server for the state of each of the model's versions, or of the Scorer's
        version, newest first.

        Raises:
          ModelNotFound: the server knows no such model, version or label.
          ScoringError: another failure.
        """
        response = self._wait(self._ask_status())
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
        """Closes the channel; running calls end with UsageError. May be called again."""
        self._closed = True
        if self._hedger:
            self._hedger.close()
        self._channel.close()

    def _steps(self, features) -> Generator[object, object, Scores]:
        """The steps of one call; yields each future that it waits for."""
        self._require_open()
        features = by_name(features)
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
                # The model may have been replaced by one that takes other features.
                before, model, asked_now = model, (yield from self._ask()), True
                if model == before:
                    raise
        if len(scores.versions) > 1:
            try:
                model = yield from self._ask()
                scores = yield from self._call(model, features, scores.versions[-1])
            except ModelNotFound:
                # The server has gone back to an older version.
                pass
        return scores

    def _call(self, model: Model, features, version: int | None):
        """The requests of one call, some of them at once; a generator of the scores."""
        parts, waiting = [], collections.deque()
        try:
            for future in self._requests(self._prepared(model, features), version):
                waiting.append(future)
                if len(waiting) >= self.requests_in_flight:
                    parts.append((yield waiting.popleft()))
            while waiting:
                parts.append((yield waiting.popleft()))
        finally:
            for future in waiting:
                future.cancel()
        return joined(parts)

    def _results(self, batches) -> Iterator[Scores]:
        """The results of a stream of batches."""
        waiting = collections.deque()
        try:
            for future in itertools.chain.from_iterable(map(self._stream, batches)):
                waiting.append(future)
                if len(waiting) >= self.requests_in_flight:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def _result(self, future: "concurrent.futures.Future[Scores]") -> Scores:
        try:
            return future.result()
        except ScoringError:
            # The model may have been replaced by one that takes other features: ask again.
            self._model = None
            raise
        finally:
            # For a caller that is interrupted: no effect on one that is done.
            future.cancel()

    def _wait(self, steps: Generator):
        """The result of the steps."""
        futures.refuse_in_callback()
        future = futures.run(steps)
        try:
            return future.result()
        finally:
            # As above.
            future.cancel()

    def _exchange(self, method, request):
        """A generator: sends a request, waits, and gives the response."""
        self._require_open()
        try:
            return (yield self._send(method, request))
        except grpc.RpcError as error:
            # The Scorer may have been closed meanwhile.
            self._require_open()
            raise self._error(error) from None
        except ValueError:
            # The channel was closed at this moment.
            self._require_open()
            raise

    def _send(self, method, request):
        """Sends a request: a future of gRPC's kind."""
        if self._hedger is None:
            return method.future(request, timeout=self.timeout)
        end = time.monotonic() + self.timeout
        return self._hedger.send(
            lambda: method.future(request, timeout=max(0, end - time.monotonic()))
        )

    def _stream(self, features) -> Iterator["concurrent.futures.Future[Scores]"]:
        """The requests that one batch of a stream makes."""
        features, known = by_name(features), self._model
        try:
            call = self._prepared(known or self._known_model(), features)
        except FeatureError:
            if known is None:
                raise
            # The server may have a newer version by now, which takes other features.
            self._model = None
            call = self._prepared(self._known_model(), features)
        return self._requests(call, None)

    def _requests(
        self, call: Call, version: int | None
    ) -> Iterator["concurrent.futures.Future[Scores]"]:
        """Sends the next request for each `next`; gives the futures of scores, at least one."""
        for start in range(0, max(1, call.rows), self.rows_per_request):
            end = min(start + self.rows_per_request, call.rows)
            yield futures.run(self._request(call, start, end, version))

    def _request(
        self, call: Call, start: int, end: int, version: int | None
    ) -> Generator[object, object, Scores]:
        """A generator: scores the rows from start to end in one request, or if that is above the
        server's message limit, one half after the other."""
        if start == end:
            return call.no_scores()
        try:
            response = yield from self._exchange(
                self._predict, self._message(call, start, end, version)
            )
            return self._scores(response, call.outputs, end - start)
        except RequestTooLarge as error:
            if end - start == 1:
                error.row = start
                raise
        middle = (start + end) // 2
        first = yield from self._request(call, start, middle, version)
        second = yield from self._request(call, middle, end, version)
        return joined([first, second])

    def _message(
        self, call: Call, start: int, end: int, version: int | None
    ) -> service_pb2.PredictRequest:
        request = service_pb2.PredictRequest(
            model_spec=self._spec(version),
            inputs={name: tensors.encode(array) for name, array in call.part(start, end).items()},
            output_filter=call.outputs,
        )
        request.model_spec.signature_name = call.signature
        return request

    def _scores(
        self, response: service_pb2.PredictResponse, names: Sequence[str], rows: int
    ) -> Scores:
        spec, known = response.model_spec, self._model
        versions = [spec.version.value] if spec.HasField("version") else []
        if known and versions and versions != [known.version]:
            # Another version, perhaps with other features: ask before the next call.
            self._model = None
        outputs = response.outputs
        return self._checked(lambda name: tensors.decode(outputs[name]), names, rows, versions)

    def _known_model(self) -> Model:
        return self._model or self._wait(self._ask())

    def _ask(self) -> Generator[object, object, Model]:
        """A generator: asks for the metadata and remembers it."""
        request = service_pb2.GetModelMetadataRequest(
            model_spec=self._spec(), metadata_field=[services.SIGNATURE_FIELD]
        )
        response = yield from self._exchange(self._get_metadata, request)
        try:
            value = response.metadata[services.SIGNATURE_FIELD].value
            signatures = service_pb2.SignatureMap.FromString(value).signature_def
        except DecodeError:
            details = "the model's signatures cannot be read"
            raise self._fault(grpc.StatusCode.INTERNAL, details) from None
        spec = response.model_spec
        version = spec.version.value if spec.HasField("version") else None
        self._model = model = Model(version, signatures)
        return model

    def _ask_status(self):
        """A generator of the model's status."""
        spec = self._spec()
        if isinstance(self.version, str):
            # The server ignores labels here, and would list all versions.
            spec.version.value = (yield from self._ask()).version or 0
        request = service_pb2.GetModelStatusRequest(model_spec=spec)
        return (yield from self._exchange(self._get_status, request))

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
        return scoring_error(
            self.address, self.model, self.version, self.timeout, self._proxy, error
        )


_CODES = {code.value[0]: code for code in grpc.StatusCode}


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
