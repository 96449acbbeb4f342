"""Gives memory back to the operating system once a model is gone."""

import ctypes
import gc

try:
    _trim = ctypes.CDLL(None).malloc_trim
except (OSError, AttributeError):
    # Only glibc has this, and needs it.
    _trim = None


def settle() -> None:
    """Excludes what exists now from garbage collections. To be called after all imports.

    TensorFlow's modules are 400,000 objects: a collection that visits them stops all requests for
    150 ms; without them it takes 2.
    """
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Collects garbage, and returns the allocator's free pages.

    A TensorFlow graph's Python objects refer to each other in cycles, so that an unused model keeps
    its memory until the next collection.
    """
    gc.collect()
    if _trim is not None:
        _trim(0)
