"""Gives memory back to the operating system once a model is gone."""

import ctypes
import gc

try:
    _trim = ctypes.CDLL(None).malloc_trim
except (OSError, AttributeError):
    # Only glibc keeps what was freed, and only it has this.
    _trim = None


def settle() -> None:
    """Takes all that is there now out of the collector's sight, to be called when all is imported.

    TensorFlow's modules are 400,000 objects. A collection that walks through them takes 150 ms, in
    which no request is answered; without them it takes 2.
    """
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Frees what only a collection finds, and returns the allocator's free pages.

    A TensorFlow graph's Python objects refer to one another in circles, so that a model that is no
    longer used keeps its memory until the collector comes by.
    """
    gc.collect()
    if _trim is not None:
        _trim(0)
