"""Keeps what C++ libraries say off stderr, where the server's own lines would drown."""

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Sends file descriptor 2 to nowhere within the `with`. An exception comes through.

    An import of TensorFlow greets with CPU features and absent GPUs, whatever TF_CPP_MIN_LOG_LEVEL
    says, and gRPC tells of a port that is in use in its own words.
    """
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
