"""calls: requests that end when nobody waits for them, and the turns of a model's requests."""

import threading

import grpc
import pytest
from pwiser_serving.server import calls
from pwiser_serving.server.calls import Call, Turns
from pwiser_serving.server.status import Status, cancelled, deadline_exceeded

SECONDS = 20


def _code(action, *arguments):
    with pytest.raises(Status) as caught:
        action(*arguments)
    return caught.value.code


def test_an_end_stops_what_runs_and_only_that():
    stopped = []
    call = Call()
    call.check()
    call.begin(lambda: stopped.append("first"))
    call.finish()
    call.begin(lambda: stopped.append("second"))
    call.end(deadline_exceeded())
    # The first end is the one.
    call.end(cancelled("later"))
    assert stopped == ["second"]
    assert _code(call.finish) is grpc.StatusCode.DEADLINE_EXCEEDED
    # Nothing more begins for it.
    assert _code(call.begin, stopped.append) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert _code(call.check) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert stopped == ["second"]


def _held(turns, model, call=None):
    """A request of the model that has its turn until the event is set; the event, its thread."""
    has_turn, go = threading.Event(), threading.Event()

    def run():
        with turns.turn(model, call or Call()):
            has_turn.set()
            assert go.wait(SECONDS)

    thread = threading.Thread(target=run)
    thread.start()
    return has_turn, go, thread


def test_each_model_has_its_own_turns():
    turns = Turns(2)
    running = [_held(turns, "slow") for _ in range(2)]
    for has_turn, _, _ in running:
        assert has_turn.wait(SECONDS)
    waiting = _held(turns, "slow")
    # Another model's does not wait for them.
    with turns.turn("other", Call()):
        assert not waiting[0].is_set()
    # The third runs when one of the two is done.
    running[0][1].set()
    assert waiting[0].wait(SECONDS)
    for _, go, thread in (*running, waiting):
        go.set()
        thread.join(SECONDS)
    # What is done is forgotten.
    assert not turns._models


def test_who_waits_for_a_turn_leaves_when_the_call_ends():
    turns = Turns(1)
    has_turn, go, thread = _held(turns, "m")
    assert has_turn.wait(SECONDS)
    call = Call()
    threading.Timer(0.1, call.end, [cancelled("gone")]).start()

    def take():
        with turns.turn("m", call):
            pytest.fail("it has a turn")

    assert _code(take) is grpc.StatusCode.CANCELLED
    # So it does when the call has ended before.
    go.set()
    thread.join(SECONDS)
    assert _code(take) is grpc.StatusCode.CANCELLED
    with turns.turn("m", Call()):
        pass


def test_a_model_that_is_asked_too_much_is_not_asked_more(monkeypatch):
    monkeypatch.setattr(calls, "_MAX_HELD_OF_ONE", 2)
    turns = Turns(1)
    first, second = _held(turns, "m"), None
    assert first[0].wait(SECONDS)
    second = _held(turns, "m")
    while not turns._models["m"].waiting:
        pass

    def take():
        with turns.turn("m", Call()):
            pytest.fail("it has a turn")

    with pytest.raises(Status, match="2 requests of model m are running or waiting") as caught:
        take()
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with turns.turn("other", Call()):
        pass
    for _, go, thread in (first, second):
        go.set()
        thread.join(SECONDS)
