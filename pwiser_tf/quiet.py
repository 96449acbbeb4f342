"""Imports TensorFlow without its greeting on stderr; the command lines import this before it.

Its C++ side writes lines about CPU features and absent GPUs straight to file descriptor 2, whatever
TF_CPP_MIN_LOG_LEVEL says, and a command whose only line should be an error would not have one.
An import that fails still raises, and prints its traceback.
"""

import os

# What goes wrong on the C++ side reaches Python as an exception; the rest is chatter.
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
