"""Monitoring: counts and latencies in Prometheus' text format, under TensorFlow Serving's names.

Names, labels, bucket bounds and what is counted when are those of tensorflow/serving
(servables/tensorflow/util.cc, saved_model_warmup_util.cc) and of TensorFlow
(cc/saved_model/loader.cc); `/` becomes `:` as in its util/prometheus_exporter.cc. So its dashboards
and alerts work here. prometheus_client cannot write them: it ends each counter in `_total`.
"""

import bisect
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

from pwiser_serving.server.status import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DEFAULT_PATH = "/monitoring/prometheus/metrics"

# Microseconds: 10 * 1.8^i, up to 25 minutes; longer times are in the last bucket.
_BOUNDS = list(itertools.accumulate([1.8] * 32, lambda bound, growth: bound * growth, initial=10.0))
# A caller can invent model names. Failures of more names than this, or of longer names, are counted
# under the empty name.
_MAX_FAILED_SERIES = 1000
_MAX_NAME_LENGTH = 256


class _Counter:
    """A number for each tuple of label values."""

    type = "counter"

    def __init__(self, name: str, *labels: str):
        self.name, self.labels = name, labels
        self.cells: dict[tuple[str, ...], list] = {}

    def add(self, values: tuple[str, ...], number: int = 1) -> None:
        self.cells.setdefault(values, [0])[0] += number

    def lines(self, labels: str, cell: list) -> Iterator[str]:
        yield f"{self.name}{{{labels}}} {cell[0]}"


class _Histogram(_Counter):
    """A distribution of microseconds for each tuple of label values: counts by bucket, and sum."""

    type = "histogram"

    def add(self, values: tuple[str, ...], microseconds: float) -> None:
        cell = self.cells.setdefault(values, [0] * (len(_BOUNDS) + 1) + [0.0])
        # A value on a bound is in the next bucket: TensorFlow's rule.
        cell[bisect.bisect_right(_BOUNDS, microseconds)] += 1
        cell[-1] += microseconds

    def lines(self, labels: str, cell: list) -> Iterator[str]:
        *counts, total = cell
        bounds = [f"{bound:g}" for bound in _BOUNDS] + ["+Inf"]
        for bound, count in zip(bounds, itertools.accumulate(counts), strict=True):
            yield f'{self.name}_bucket{{{labels},le="{bound}"}} {count}'
        # All digits: rounded to six, as TF Serving does, it gives no rate.
        yield f"{self.name}_sum{{{labels}}} {total!r}"
        yield f"{self.name}_count{{{labels}}} {sum(counts)}"


class Monitoring:
    """What one server counts. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        load, serving = ":tensorflow:cc:saved_model:load_", ":tensorflow:serving:"
        path, request = ("model_path", "status"), ("model_name", "API")
        self._load_attempts = _Counter(f"{load}attempt_count", *path)
        self._load_latency = _Counter(f"{load}latency", "model_path")
        self._warm_up_latency = _Histogram(f"{serving}model_warmup_latency", *path)
        self._warm_up_records = _Counter(f"{serving}model_warmup_records_read", *path)
        self._requests = _Counter(f"{serving}request_count", "model_name", "status")
        self._request_latency = _Histogram(f"{serving}request_latency", *request, "entrypoint")
        self._runtime_latency = _Histogram(f"{serving}runtime_latency", *request, "runtime")

    @contextlib.contextmanager
    def request(self, model_name: str, api: str, entrypoint: str) -> Iterator[None]:
        """Counts the request that is answered within the `with`, and times it if it succeeds.

        A Status raised inside is counted by its code's name, another exception as INTERNAL.

        Args:
          model_name: as the request gives it; api: "Predict", "Classify" or "Regress", over REST
          the path's word ("predict", or "" for a GET); entrypoint: "GRPC" or "REST".
        """
        start, status = time.perf_counter(), "INTERNAL"
        try:
            yield
            status = "OK"
        except Status as error:
            status = error.code.name
            raise
        finally:
            self._count(model_name, api, entrypoint, status, time.perf_counter() - start)

    def runtime(self, model_name: str, api: str, seconds: float) -> None:
        """Counts one successful call of the model itself; `api` is "Predict", "Classify", ...."""
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
        # A warm-up request that fails ends the load before TF Serving counts: the status is OK.
        with self._lock:
            self._warm_up_latency.add((path, "OK"), seconds * 1e6)
            self._warm_up_records.add((path, "OK"), records)

    def text(self) -> str:
        """Everything counted so far, in Prometheus' text format."""
        metrics = [metric for metric in vars(self).values() if isinstance(metric, _Counter)]
        # Copied first: no request waits until the text is written.
        with self._lock:
            copies = [
                [(values, list(cell)) for values, cell in metric.cells.items()]
                for metric in metrics
            ]
        lines = []
        for metric, cells in zip(metrics, copies, strict=True):
            lines.append(f"# TYPE {metric.name} {metric.type}")
            for values, cell in sorted(cells):
                pairs = zip(metric.labels, map(_escape, values), strict=True)
                labels = ",".join(f'{label}="{value}"' for label, value in pairs)
                lines += metric.lines(labels, cell)
        return "\n".join(lines) + "\n"

    def _count(self, name: str, api: str, entrypoint: str, status: str, seconds: float) -> None:
        with self._lock:
            series = self._requests.cells
            if status == "OK":
                self._request_latency.add((name, api, entrypoint), seconds * 1e6)
            elif (name, status) not in series and (
                len(name) > _MAX_NAME_LENGTH
                # A model that has answered keeps its own series.
                or (len(series) >= _MAX_FAILED_SERIES and (name, "OK") not in series)
            ):
                name = ""
            self._requests.add((name, status))


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
