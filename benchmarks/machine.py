"""The machine that a benchmark runs on, and processes that print nothing but their result."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile

from pwiser_tf.machine import processor


def header() -> str:
    """What stands above a table: "Intel Xeon ..., 2 cores, Python 3.11.7, TensorFlow 2.21.0"."""
    cores, tensorflow = os.cpu_count(), importlib.metadata.version("tensorflow")
    python = platform.python_version()
    return f"{processor()}, {cores} cores, Python {python}, TensorFlow {tensorflow}"


def run(module: str, *arguments: str) -> str:
    """What `python -m module` prints on stdout.

    Raises:
      RuntimeError: it failed; the message is what it printed on stderr.
    """
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        if done.returncode:
            errors.seek(0)
            raise RuntimeError(f"{module} {' '.join(arguments)}: {errors.read()}")
    return done.stdout
