"""Imports TensorFlow without its log lines on stderr. Commands import this module first.

TensorFlow's C++ code writes lines about CPU features and missing GPUs to file descriptor 2, also
when TF_CPP_MIN_LOG_LEVEL is set. A command that fails should print only its error line. An import
that fails still raises and prints its traceback.
"""

import os

# C++ errors reach Python as exceptions, so the C++ log lines are not needed.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_stderr = os.dup(2)
_devnull = os.open(os.devnull, os.O_WRONLY)
os.dup2(_devnull, 2)
try:
    import tensorflow  # noqa: F401
finally:
    os.dup2(_stderr, 2)
    os.close(_stderr)
    os.close(_devnull)
