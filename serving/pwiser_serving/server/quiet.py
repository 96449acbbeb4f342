"""Imports TensorFlow without its greeting on stderr, where the server's own log would drown.

Its C++ side writes lines about CPU features and absent GPUs straight to file descriptor 2, whatever
TF_CPP_MIN_LOG_LEVEL says. An import that fails still raises.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_stderr = os.dup(2)
_nowhere = os.open(os.devnull, os.O_WRONLY)
os.dup2(_nowhere, 2)
try:
    import tensorflow  # noqa: F401
finally:
    os.dup2(_stderr, 2)
    os.close(_stderr)
    os.close(_nowhere)
