"""Keeps the output of C++ libraries off stderr, so that the server's own lines are found."""

import contextlib
import os
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Sends file descriptor 2 to /dev/null within the `with`.

    TensorFlow's import prints CPU features and missing GPUs, whatever TF_CPP_MIN_LOG_LEVEL says,
    and gRPC prints an error for a port in use.
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
