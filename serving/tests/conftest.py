"""Fixtures: a running server and a caller made of tensorflow-serving-api's own stubs."""

import contextlib
import gc
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from waiting import wait_for


def pytest_collection_modifyitems(items):
    """Marks as slow what starts a server."""
    for item in items:
        if "start_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Makes garbage collection, which follows a closed version, pass over all that is imported."""
    gc.freeze()


def pytest_sessionfinish():
    """Lets the end of the process see all garbage, without which TensorFlow warns of leaks."""
    gc.unfreeze()


READY = re.compile(r"pwiser_serving: serving \S+ version (\d+)(?:, .*)? on 0\.0\.0\.0:(\d+)\n")


class RunningServer:
    """The server's process, its port, and what it has logged so far.

    Without a base path the flags say what is served.
    """

    def __init__(self, base_path: pathlib.Path | None, log: pathlib.Path, *flags: str):
        self._log = log
        self.base_path = base_path
        with open(log, "w") as errors:
            command = [sys.executable, "-m", "pwiser_serving.server", "--port=0"]
            if base_path is not None:
                command += ["--model_name", "m", "--model_base_path", str(base_path)]
            command += ["--file_system_poll_wait_seconds=0.1", *flags]
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def wait_until_ready(self) -> None:
        self.line = self.process.stdout.readline()
        ready = READY.fullmatch(self.line)
        assert ready, f"{self.line!r}, {self.log}"
        self.version, self.port = int(ready[1]), int(ready[2])
        self.address = f"localhost:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for_log(self, text: str) -> None:
        wait_for(lambda: text in self.log or self.process.poll() is not None)
        assert text in self.log, self.log

    def stop(self) -> int:
        """Ends the server as Kubernetes would, and returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[float, pathlib.Path]:
    """Saved models by their bias, to be copied into a base path as versions."""
    from serving_model import save

    folders = {}
    for bias in (0.0, 1.0):
        folders[bias] = tmp_path_factory.mktemp("saved") / f"bias{bias}"
        save(folders[bias], bias)
    return folders


@pytest.fixture(scope="session")
def start_server(tmp_path_factory):
    """A function that runs a server within a `with`, ready, and stops it at the end."""

    @contextlib.contextmanager
    def start(base_path, *flags, wait=True):
        log = tmp_path_factory.mktemp("server") / "log"
        server = RunningServer(base_path, log, *flags)
        try:
            if wait:
                server.wait_until_ready()
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()

    return start


@pytest.fixture(scope="session")
def server(models, start_server, tmp_path_factory):
    """A server of model m, version 7, that stays as it is."""
    base_path = tmp_path_factory.mktemp("base")
    os.symlink(models[0.0], base_path / "7")
    # Neither of these is a version.
    (base_path / "8.tmp").mkdir()
    (base_path / "notes").write_text("9")
    with start_server(base_path) as running:
        yield running


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Files of two authorities: ours, which signed the server and a client, and a stranger."""
    trustme = pytest.importorskip("trustme")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ours", "stranger"):
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / f"{name}.pem")
        for role, host in (("server", "localhost"), ("named", "model.example"), ("client", "c")):
            issued = authority.issue_cert(host)
            issued.private_key_pem.write_to_path(folder / f"{name}-{role}-key.pem")
            with open(folder / f"{name}-{role}.pem", "wb") as chain:
                chain.writelines(part.bytes() for part in issued.cert_chain_pems)
    (folder / "empty.pem").write_text("no PEM")
    return folder
