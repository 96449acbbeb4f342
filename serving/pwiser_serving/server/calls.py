"""Calls: a request ends when nobody waits for it, and each model's requests wait only for turns of
that model."""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator

from pwiser_serving.server.status import Status, resource_exhausted

# Requests that the server holds at a time, running or waiting; each has a thread. Half of them may
# be for one model.
MAX_HELD = 256
_MAX_HELD_OF_ONE = MAX_HELD // 2


class Call:
    """A request that somebody waits for until `end` is called. Thread-safe."""

    __slots__ = ("_lock", "_status", "_stop")

    def __init__(self):
        self._lock = threading.Lock()
        self._status: Status | None = None
        self._stop: Callable[[], object] | None = None

    def end(self, status: Status) -> None:
        """Stops what runs for the request, which fails with that status."""
        with self._lock:
            if self._status is None:
                self._status = status
                # Within the lock: `stop` must not be called after `finish`.
                if self._stop is not None:
                    self._stop()

    def check(self) -> None:
        """Raises the status of `end`, if that was called."""
        if self._status is not None:
            raise self._status

    def begin(self, stop: Callable[[], object]) -> None:
        """Until `finish`, `end` calls `stop`. Raises as `check` does."""
        with self._lock:
            self.check()
            self._stop = stop

    def finish(self) -> None:
        """What `begin` announced has ended. Raises as `check` does."""
        with self._lock:
            self._stop = None
        self.check()


class _Model:
    """The requests of one model: how many run, and the events of those that wait."""

    def __init__(self):
        self.running = 0
        self.waiting: collections.deque[threading.Event] = collections.deque()


class Turns:
    """Lets at most `running` requests of each model run at a time; its others wait, in order."""

    def __init__(self, running: int):
        self._running = running
        self._lock = threading.Lock()
        # Only of models that have requests: callers may invent names.
        self._models: dict[str, _Model] = {}

    @contextlib.contextmanager
    def turn(self, name: str, call: Call) -> Iterator[None]:
        """Waits for a turn of that model, and holds it within the `with`.

        Raises:
          Status: RESOURCE_EXHAUSTED if too many of the model's requests wait already, or the
            call's status when it is ended.
        """
        self._take(name, call)
        try:
            yield
        finally:
            self._give(name)

    def _take(self, name: str, call: Call) -> None:
        call.check()
        with self._lock:
            model = self._models.setdefault(name, _Model())
            if model.running < self._running:
                model.running += 1
                return
            held = model.running + len(model.waiting)
            if held >= _MAX_HELD_OF_ONE:
                raise resource_exhausted(
                    f"{held} requests of model {name} are running or waiting already"
                )
            turn = threading.Event()
            model.waiting.append(turn)
        try:
            call.begin(turn.set)
            turn.wait()
            call.finish()
        except Status:
            with self._lock:
                waits = turn in model.waiting
                if waits:
                    model.waiting.remove(turn)
            # It may have got its turn in this moment.
            if not waits:
                self._give(name)
            raise

    def _give(self, name: str) -> None:
        """Ends a turn: the next one begins."""
        with self._lock:
            model = self._models[name]
            if model.waiting:
                model.waiting.popleft().set()
                return
            model.running -= 1
            if not model.running:
                del self._models[name]
