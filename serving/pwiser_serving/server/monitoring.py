"""Monitoring: counts and latencies in Prometheus' text format, under TensorFlow Serving's names.

Names, labels, bucket bounds and what is counted when are those of tensorflow/serving
(servables/tensorflow/util.cc, saved_model_warmup_util.cc) and of TensorFlow
(cc/saved_model/loader.cc); `/` becomes `:` as in its util/prometheus_exporter.cc. Its dashboards
and alerts work here. Its counters do not end in `_total`, which prometheus_client insists on.
"""

import bisect
import itertools
import threading
import time

from pwiser_serving.server.status import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DEFAULT_PATH = "/monitoring/prometheus/metrics"

# Microseconds: 10 * 1.8^i, up to 25 minutes; what is longer falls into the last bucket.
_BOUNDS = list(itertools.accumulate([1.8] * 32, lambda bound, growth: bound * growth, initial=10.0))
# Anybody can name models that do not exist. Failures of more names than that, or of longer ones,
# are counted under the empty name.
_MAX_FAILED_SERIES = 1000
_MAX_NAME_LENGTH = 256


class _Counter:
    """A number for each tuple of label values."""

    def __init__(self, name: str, *labels: str):
        self.name, self.labels, self.type = name, labels, "counter"
        self.cells: dict[tuple[str, ...], int] = {}

    def add(self, values: tuple[str, ...], number: int = 1) -> None:
        self.cells[values] = self.cells.get(values, 0) + number

    def copy(self) -> dict[tuple[str, ...], int]:
        return dict(self.cells)

    def lines(self, cells: dict[tuple[str, ...], int]):
        for values, number in sorted(cells.items()):
            yield f"{self.name}{{{_pairs(self.labels, values)}}} {number}"


class _Histogram:
    """A distribution of microseconds for each tuple of label values."""

    def __init__(self, name: str, *labels: str):
        self.name, self.labels, self.type = name, labels, "histogram"
        # The counts by bucket and, last, the sum.
        self.cells: dict[tuple[str, ...], list] = {}

    def add(self, values: tuple[str, ...], microseconds: float) -> None:
        cell = self.cells.get(values)
        if cell is None:
            cell = self.cells[values] = [0] * (len(_BOUNDS) + 1) + [0.0]
        # A value on a bound goes to the next bucket: TensorFlow's rule.
        cell[bisect.bisect_right(_BOUNDS, microseconds)] += 1
        cell[-1] += microseconds

    def copy(self) -> dict[tuple[str, ...], list]:
        return {values: list(cell) for values, cell in self.cells.items()}

    def lines(self, cells: dict[tuple[str, ...], list]):
        bounds = [f"{bound:g}" for bound in _BOUNDS] + ["+Inf"]
        for values, (*counts, total) in sorted(cells.items()):
            pairs = _pairs(self.labels, values)
            for bound, count in zip(bounds, itertools.accumulate(counts), strict=True):
                yield f'{self.name}_bucket{{{pairs},le="{bound}"}} {count}'
            # In full: TF Serving rounds it to six digits, and then its rate cannot be told.
            yield f"{self.name}_sum{{{pairs}}} {total!r}"
            yield f"{self.name}_count{{{pairs}}} {sum(counts)}"


class Monitoring:
    """What one server counts. Methods may be called from several threads at once."""

    def __init__(self):
        # One lock is enough: what it guards takes less than a microsecond.
        self._lock = threading.Lock()
        self._load_attempts = _Counter(
            ":tensorflow:cc:saved_model:load_attempt_count", "model_path", "status"
        )
        self._load_latency = _Counter(":tensorflow:cc:saved_model:load_latency", "model_path")
        self._warm_up_latency = _Histogram(
            ":tensorflow:serving:model_warmup_latency", "model_path", "status"
        )
        self._warm_up_records = _Counter(
            ":tensorflow:serving:model_warmup_records_read", "model_path", "status"
        )
        self._requests = _Counter(":tensorflow:serving:request_count", "model_name", "status")
        self._request_latency = _Histogram(
            ":tensorflow:serving:request_latency", "model_name", "API", "entrypoint"
        )
        self._runtime_latency = _Histogram(
            ":tensorflow:serving:runtime_latency", "model_name", "API", "runtime"
        )

    def request(self, model_name: str, api: str, entrypoint: str) -> "_Request":
        """A context in which one request is answered: it is counted, and timed where it succeeds.

        A Status raised inside is counted by its code's name, another exception as INTERNAL.

        Args:
          model_name: as the request gives it; api: "Predict", "Classify" or "Regress", over REST
          the path's word ("predict", or "" for a GET); entrypoint: "GRPC" or "REST".
        """
        return _Request(self, model_name, api, entrypoint)

    def runtime(self, model_name: str, api: str, seconds: float) -> None:
        """Counts one successful call of the model itself; `api` is "Predict", ... ."""
        with self._lock:
            self._runtime_latency.add((model_name, api, "TF1"), seconds * 1e6)

    def loaded(self, path: str, seconds: float, *, success: bool) -> None:
        """Counts one attempt to load the version in that folder, and how long it took."""
        with self._lock:
            self._load_attempts.add((path, "success" if success else "fail"))
            if success:
                self._load_latency.add((path,), round(seconds * 1e6))

    def warmed_up(self, path: str, seconds: float, records: int) -> None:
        """Counts the warm-up of the version in that folder with so many requests."""
        # A warm-up request that fails ends the load before TF Serving counts: always this status.
        with self._lock:
            self._warm_up_latency.add((path, "OK"), seconds * 1e6)
            self._warm_up_records.add((path, "OK"), records)

    def text(self) -> str:
        """Everything counted so far, in Prometheus' text format."""
        metrics = (
            self._load_attempts,
            self._load_latency,
            self._warm_up_latency,
            self._warm_up_records,
            self._requests,
            self._request_latency,
            self._runtime_latency,
        )
        # Copied at once and written afterwards: no request waits for the writing.
        with self._lock:
            copies = [metric.copy() for metric in metrics]
        lines = []
        for metric, cells in zip(metrics, copies, strict=True):
            lines += [f"# TYPE {metric.name} {metric.type}", *metric.lines(cells)]
        return "\n".join(lines) + "\n"

    def _count_request(self, name: str, api: str, entrypoint: str, status: str, seconds: float):
        with self._lock:
            if status == "OK":
                self._request_latency.add((name, api, entrypoint), seconds * 1e6)
            elif (name, status) not in self._requests.cells and (
                len(name) > _MAX_NAME_LENGTH or self._is_full_for(name)
            ):
                name = ""
            self._requests.add((name, status))

    def _is_full_for(self, name: str) -> bool:
        """Whether a failure of that name is one too many; never for a model that has answered."""
        cells = self._requests.cells
        return len(cells) >= _MAX_FAILED_SERIES and (name, "OK") not in cells


class _Request:
    """The context that Monitoring.request gives: a class, as a generator costs twice the time."""

    __slots__ = ("_api", "_entrypoint", "_monitoring", "_name", "_start")

    def __init__(self, monitoring: Monitoring, name: str, api: str, entrypoint: str):
        self._monitoring, self._name = monitoring, name
        self._api, self._entrypoint = api, entrypoint

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, kind, error, traceback) -> None:
        seconds = time.perf_counter() - self._start
        if error is None:
            status = "OK"
        else:
            status = error.code.name if isinstance(error, Status) else "INTERNAL"
        self._monitoring._count_request(self._name, self._api, self._entrypoint, status, seconds)


def _pairs(labels: tuple[str, ...], values: tuple[str, ...]) -> str:
    return ",".join(
        f'{label}="{_escape(value)}"' for label, value in zip(labels, values, strict=True)
    )


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
