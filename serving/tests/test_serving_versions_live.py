"""Versions come, break and go while callers ask: benchmarks/soak.py, for a few seconds."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def test_twenty_versions_under_load():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--seconds=8", "--callers=4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[3:22]]
    assert [int(row[0]) for row in rows] == list(range(2, 21))
    assert [row[1] for row in rows].count("broken") == 2
    assert [row[1] for row in rows].count("removed") == 4
