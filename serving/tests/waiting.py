"""Waiting for what another thread or process does."""

import time


def wait_for(condition, seconds: float = 60):
    """Polls until the condition is true, and returns its value; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return found
