"""The machine that a benchmark runs on, and processes that print nothing but their result."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import tempfile


def header() -> str:
    """What stands above a table: "Intel Xeon ..., 2 cores, Python 3.11.7, TensorFlow 2.21.0"."""
    processor = platform.processor() or platform.machine()
    facts = pathlib.Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else ():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    cores, tensorflow = os.cpu_count(), importlib.metadata.version("tensorflow")
    return (
        f"{processor}, {cores} cores, Python {platform.python_version()}, TensorFlow {tensorflow}"
    )


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
