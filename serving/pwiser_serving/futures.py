"""Work that waits for futures without a separate thread."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import grpc

from pwiser_serving.errors import UsageError

Result = TypeVar("Result")

# Whether this thread, which may be gRPC's own, is completing a future and runs its callbacks.
_this_thread = threading.local()


def refuse_in_callback() -> None:
    """UsageError inside a callback, which must not wait for an answer."""
    if getattr(_this_thread, "completes", False):
        raise UsageError(
            "cannot wait for an answer inside a callback of a future, which would block the "
            "thread that receives the answers: use score_future, or call it in another thread"
        )


class Run(concurrent.futures.Future):
    """The future of a run. Its `result` and `exception` raise UsageError if they would wait inside
    a callback."""

    def result(self, timeout=None):
        self._check()
        return super().result(timeout)

    def exception(self, timeout=None):
        self._check()
        return super().exception(timeout)

    def _check(self) -> None:
        if not self.done():
            refuse_in_callback()


def run(steps: Generator[Any, Any, Result]) -> "concurrent.futures.Future[Result]":
    """Runs a generator that yields each future it waits for, and is sent the future's result.

    It continues in the thread that completes the future. Cancelling the run cancels the future that
    it waits for, which raises at the `yield`.

    Args:
      steps: yields futures of gRPC or of concurrent.futures; an exception of theirs is raised at
        the `yield`.
    """
    outer = Run()
    current = None

    def completed(inner):
        before = getattr(_this_thread, "completes", False)
        _this_thread.completes = True
        try:
            advance(inner)
        finally:
            _this_thread.completes = before

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
            # It may be cancelled at this moment.
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                outer.set_result(end.value)
        except BaseException as error:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                outer.set_exception(error)
        else:
            inner.add_done_callback(completed)

    def pass_on(_):
        if outer.cancelled() and current is not None:
            current.cancel()

    advance(None)
    outer.add_done_callback(pass_on)
    return outer


class Race(concurrent.futures.Future):
    """The first good answer of several copies of one call; the other copies are cancelled.

    If all fail, it fails with the first one's error.
    """

    def __init__(self, start: Callable[[], grpc.Future]):
        super().__init__()
        self._start = start
        self._calls: list[grpc.Future] = []
        self._failed: list[grpc.Future] = []
        self._order = threading.Lock()

    def add(self) -> None:
        """Sends one more copy, unless there is a result."""
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
