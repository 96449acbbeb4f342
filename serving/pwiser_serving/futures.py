"""Work that waits for futures, without a thread of its own."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import grpc

Result = TypeVar("Result")


def run(steps: Generator[Any, Any, Result]) -> "concurrent.futures.Future[Result]":
    """Runs a generator that yields a future wherever it waits, and is sent the future's result.

    It goes on in whichever thread completes the future. A cancelled run cancels the future that
    it waits for, which raises where the generator stands.

    Args:
      steps: yields futures of gRPC or of concurrent.futures; an exception of theirs is raised at
        the `yield`.
    """
    outer = concurrent.futures.Future()
    current = None

    def advance(inner):
        nonlocal current
        try:
            while True:
                if inner is None:
                    inner = next(steps)
                else:
                    try:
                        result = inner.result()
                    except BaseException as error:
                        inner = steps.throw(error)
                    else:
                        inner = steps.send(result)
                current = inner
                if outer.cancelled():
                    inner.cancel()
                if not inner.done():
                    break
        except StopIteration as end:
            # It may be cancelled in this very moment.
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                outer.set_result(end.value)
        except BaseException as error:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                outer.set_exception(error)
        else:
            inner.add_done_callback(advance)

    def pass_on(_):
        if outer.cancelled() and current is not None:
            current.cancel()

    advance(None)
    outer.add_done_callback(pass_on)
    return outer


class Race(concurrent.futures.Future):
    """The first good answer of several copies of one call; it cancels the others.

    Where all of them fail, the first one's failure is its own.
    """

    def __init__(self, start: Callable[[], grpc.Future]):
        super().__init__()
        self._start = start
        self._calls: list[grpc.Future] = []
        self._failed: list[grpc.Future] = []
        self._order = threading.Lock()

    def add(self) -> None:
        """Sends one more copy, unless the race is over."""
        with self._order:
            if self.done():
                return
            call = self._start()
            self._calls.append(call)
        call.add_done_callback(self._ended)

    def cancel(self) -> bool:
        cancelled = super().cancel()
        self._stop()
        return cancelled

    def _ended(self, call: grpc.Future) -> None:
        good = call.code() is grpc.StatusCode.OK
        with self._order:
            self._failed += [] if good else [call]
            lost = len(self._failed) == len(self._calls)
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if good:
                self.set_result(call.result())
            elif lost and not self.done():
                # A gRPC call that failed is its own exception.
                self.set_exception(self._failed[0].exception())
        if good:
            self._stop()

    def _stop(self) -> None:
        with self._order:
            calls = list(self._calls)
        for call in calls:
            call.cancel()
