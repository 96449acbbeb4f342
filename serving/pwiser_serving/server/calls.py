"""Calls: a request while it is answered. When its caller is gone, or its time is up, it ends; and
no model's requests keep those of other models from their turn."""

import collections
import threading
from collections.abc import Callable

from pwiser_serving.server.status import Status, resource_exhausted

# Requests that are held at a time, running or waiting for their turn; each has a thread. Of one
# model there are at most half as many.
MAX_HELD = 256
_MAX_HELD_OF_ONE = MAX_HELD // 2
# How soon a request that waits for its turn notices that nobody waits for it.
_TICK_SECONDS = 0.05


class Call:
    """A request that somebody waits for, until `end` says that nobody does any more.

    Methods may be called from several threads at once.
    """

    __slots__ = ("_lock", "_status", "_stop")

    def __init__(self):
        self._lock = threading.Lock()
        self._status: Status | None = None
        self._stop: Callable[[], object] | None = None

    def end(self, status: Status) -> None:
        """Stops what is running for the request, which fails with that status."""
        with self._lock:
            if self._status is not None:
                return
            self._status = status
            # Within the lock: `stop` must not be called when what it stops has ended by itself.
            if self._stop is not None:
                self._stop()

    def check(self) -> None:
        """Raises the status that the call was ended with, if it was."""
        if self._status is not None:
            raise self._status

    def begin(self, stop: Callable[[], object]) -> None:
        """From now to `finish`, `end` calls `stop`. Raises as `check` does."""
        with self._lock:
            self.check()
            self._stop = stop

    def finish(self) -> None:
        """What `begin` began has ended. Raises as `check` does."""
        with self._lock:
            self._stop = None
        self.check()


class _Model:
    """The requests of one model: how many run, and those that wait, which hold a locked lock."""

    __slots__ = ("running", "waiting")

    def __init__(self):
        self.running = 0
        self.waiting: collections.deque[threading.Lock] = collections.deque()


class Turns:
    """Lets at most so many requests of one model run at a time; its others wait, in order.

    A model that is slow, or much asked for, has no turn of another model.

    Args:
      running: requests of one model that run at a time.
    """

    def __init__(self, running: int):
        self._running = running
        self._lock = threading.Lock()
        # Those with a request alone: callers may invent names.
        self._models: dict[str, _Model] = {}

    def turn(self, name: str, call: Call) -> "_Turn":
        """A context in which a request of that model has its turn. To enter it waits for that.

        Raises:
          Status: RESOURCE_EXHAUSTED where too many of the model's requests wait already, or the
            call's own when it is ended.
        """
        return _Turn(self, name, call)

    def _take(self, name: str, call: Call) -> None:
        call.check()
        with self._lock:
            model = self._models.get(name)
            if model is None:
                model = self._models[name] = _Model()
            if model.running < self._running:
                model.running += 1
                return
            held = model.running + len(model.waiting)
            if held >= _MAX_HELD_OF_ONE:
                raise resource_exhausted(
                    f"{held} requests of model {name} are running or waiting already"
                )
            turn = threading.Lock()
            turn.acquire()
            model.waiting.append(turn)
        while not turn.acquire(timeout=_TICK_SECONDS):
            try:
                call.check()
            except Status:
                self._leave(name, model, turn)
                raise

    def _leave(self, name: str, model: _Model, turn: threading.Lock) -> None:
        """Takes a request out of those that wait; gives its turn back if it got one just now."""
        with self._lock:
            if turn in model.waiting:
                model.waiting.remove(turn)
                return
        self._give(name)

    def _give(self, name: str) -> None:
        """Ends a turn: the next one's begins."""
        with self._lock:
            model = self._models[name]
            if model.waiting:
                model.waiting.popleft().release()
                return
            model.running -= 1
            if not model.running:
                del self._models[name]


class _Turn:
    """The context that Turns.turn gives: a class, as a generator costs twice the time."""

    __slots__ = ("_call", "_name", "_turns")

    def __init__(self, turns: Turns, name: str, call: Call):
        self._turns, self._name, self._call = turns, name, call

    def __enter__(self) -> None:
        self._turns._take(self._name, self._call)

    def __exit__(self, *exception) -> None:
        self._turns._give(self._name)
