"""Loader: the error of TensorFlow's C++ loader, which TF Serving uses, for a SavedModel.

Python's loader has other messages, and for some faults other codes.
"""

import ctypes
import functools
import pathlib
from collections.abc import Sequence

import tensorflow as tf

from pwiser_serving.server.status import Status

_POINTER = ctypes.c_void_p


def load_error(folder: pathlib.Path, tags: Sequence[str]) -> Status | None:
    """The status with which the C++ loader refuses that folder; None if it loads."""
    library = _library()
    status, graph = library.TF_NewStatus(), library.TF_NewGraph()
    options = library.TF_NewSessionOptions()
    array = (ctypes.c_char_p * len(tags))(*(tag.encode() for tag in tags))
    path = bytes(folder)
    session = library.TF_LoadSessionFromSavedModel(
        options, None, path, array, len(tags), graph, None, status
    )
    try:
        code, message = library.TF_GetCode(status), library.TF_Message(status)
        if session:
            library.TF_DeleteSession(session, status)
    finally:
        library.TF_DeleteSessionOptions(options)
        library.TF_DeleteGraph(graph)
        library.TF_DeleteStatus(status)
    return Status(code, message.decode("utf-8", "replace")) if code else None


@functools.cache
def _library() -> ctypes.CDLL:
    """TensorFlow's C API, in the library that the process has loaded already."""
    library = ctypes.CDLL(str(pathlib.Path(tf.__file__).with_name("libtensorflow_cc.so.2")))
    for name in ("TF_NewStatus", "TF_NewGraph", "TF_NewSessionOptions"):
        getattr(library, name).restype = _POINTER
    for name in ("TF_DeleteStatus", "TF_DeleteGraph", "TF_DeleteSessionOptions", "TF_GetCode"):
        getattr(library, name).argtypes = [_POINTER]
    library.TF_Message.argtypes, library.TF_Message.restype = [_POINTER], ctypes.c_char_p
    library.TF_DeleteSession.argtypes = [_POINTER, _POINTER]
    library.TF_LoadSessionFromSavedModel.restype = _POINTER
    library.TF_LoadSessionFromSavedModel.argtypes = [
        *(_POINTER, _POINTER, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)),
        *(ctypes.c_int, _POINTER, _POINTER, _POINTER),
    ]
    return library
