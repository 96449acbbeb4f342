"""Calls: a request while it is answered. When its caller is gone, or its time is up, it ends; and
no model's requests keep those of other models from their turn."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from pwiser_serving.server.status import Status, resource_exhausted

# Requests of one model that may be held at a time, running or waiting for their turn, of as many
# as MAX_HELD of all models. Each has a thread.
MAX_HELD = 256
_MAX_HELD_OF_ONE = MAX_HELD // 2
# How soon a request that waits for its turn notices that nobody waits for it.
_TICK_SECONDS = 0.05


class Call:
    """A request that somebody waits for, until `end` says that nobody does any more.

    Methods may be called from several threads at once.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._ended: Status | None = None
        self._stop: Callable[[], object] | None = None

    def end(self, status: Status) -> None:
        """Stops what is running for the request, which fails with that status."""
        with self._lock:
            if self._ended is not None:
                return
            self._ended = status
            # Within the lock: `stop` must not be called when what it stops has ended by itself.
            if self._stop is not None:
                self._stop()

    def check(self) -> None:
        """Raises the status that the call was ended with, if it was."""
        if self._ended is not None:
            raise self._ended

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
    """The requests of one model."""

    def __init__(self, running: int):
        self.turns = threading.Semaphore(running)
        self.held = 0


class Turns:
    """Lets at most so many requests of one model run at a time; its others wait.

    A model that is slow, or much asked for, has no turn of another model.

    Args:
      running: requests of one model that run at a time.
    """

    def __init__(self, running: int):
        self._running = running
        self._lock = threading.Lock()
        # Those with a request alone: callers may invent names.
        self._models: dict[str, _Model] = {}

    @contextlib.contextmanager
    def turn(self, name: str, call: Call) -> Iterator[None]:
        """Waits for the turn of a request of that model, which ends with the `with`.

        Raises:
          Status: RESOURCE_EXHAUSTED where too many of the model's requests wait already, or the
            call's own when it is ended.
        """
        with self._lock:
            model = self._models.get(name)
            if model is None:
                model = self._models[name] = _Model(self._running)
            if model.held >= _MAX_HELD_OF_ONE:
                raise resource_exhausted(
                    f"{model.held} requests of model {name} are running or waiting already"
                )
            model.held += 1
        try:
            while not model.turns.acquire(timeout=_TICK_SECONDS):
                call.check()
            try:
                call.check()
                yield
            finally:
                model.turns.release()
        finally:
            with self._lock:
                model.held -= 1
                if not model.held:
                    del self._models[name]
