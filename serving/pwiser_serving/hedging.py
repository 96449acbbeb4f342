"""Hedging: a second copy of a slow request."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable

import grpc

from pwiser_serving.futures import Race

# Few: an overloaded fleet must not get a burst of hedges that were saved in quiet hours.
_MOST_TOKENS = 10.0


@dataclasses.dataclass(frozen=True)
class Hedge:
    """Sends a second copy of a request that has no answer yet; the first answer counts.

    It shortens the slowest answers of a fleet whose servers are sometimes slow: the copies go to
    different servers of the address (`dns:///name:8500` of a headless Kubernetes service,
    `ipv4:10.0.0.1:8500,10.0.0.2:8500`). With one server it only adds load.

    Attributes:
      after_seconds: how long to wait for the first; take the 95th percentile of the latency.
      budget: the share of requests that may be sent twice, so that a fleet that is slow as a whole
        does not get twice the load.
    """

    after_seconds: float
    budget: float = 0.05

    def __post_init__(self):
        if not (self.after_seconds > 0 and 0 < self.budget <= 1):
            raise ValueError(
                "after_seconds must be above 0 and budget above 0 and at most 1, found "
                f"{self.after_seconds}, {self.budget}"
            )


class Hedger:
    """Sends calls, and second copies when their time has come. Thread-safe.

    One thread and one queue serve all calls, because each waits equally long.
    """

    def __init__(self, hedge: Hedge):
        self._hedge = hedge
        self._tokens = 0.0
        self._sent: collections.deque[tuple[float, Race]] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, start: Callable[[], grpc.Future]) -> Race:
        """The call that `start` sends, perhaps twice."""
        race = Race(start)
        race.add()
        with self._changed:
            self._tokens = min(self._tokens + self._hedge.budget, _MOST_TOKENS)
            self._sent.append((time.monotonic() + self._hedge.after_seconds, race))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hedging", daemon=True)
                self._thread.start()
            if len(self._sent) == 1:
                self._changed.notify()
        return race

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._sent and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                due, race = self._sent[0]
                left = due - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._sent.popleft()
                if race.done() or self._tokens < 1:
                    continue
                self._tokens -= 1
            try:
                race.add()
            except ValueError:
                # The channel was closed, which ends the first copy too.
                return
