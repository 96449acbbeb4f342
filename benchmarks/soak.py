"""Versions come, break and go while callers ask: does a request fail, does memory grow?

    python -m benchmarks.soak [--seconds=60 --callers=8]

Starts our server on a model of which version after version appears in the base path: every
seventh is broken (its graph is cut short), every fifth is removed again while it is in service.
Callers ask for the newest version all the while and check each answer: version v answers x with
x + v, and each caller asks with numbers of its own, so that an answer to another caller's question
would be seen. A row is printed for each version: what was done, how long until the server showed
it, requests and failures so far, and the server's resident memory.

Exit code 1: a request failed or was answered wrong, a version was never answered, or memory after
the last version is more than --slack_megabytes above that after half of them.
"""

import collections
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import grpc
from absl import flags

from benchmarks import machine
from pwiser_tf import command_line

FLAGS = flags.FLAGS
BROKEN_EVERY, REMOVED_EVERY = 7, 5
# Far longer than anything takes here.
PATIENCE_SECONDS = 60


def define_flags():
    flags.DEFINE_float("seconds", 60, "In all, shared out among the versions.", lower_bound=0)
    flags.DEFINE_integer("callers", 8, "Callers at once.", lower_bound=1)
    flags.DEFINE_integer("versions", 20, "Versions that appear.", lower_bound=4)
    flags.DEFINE_float("megabytes", 8, "Weights of a version.", lower_bound=0)
    flags.DEFINE_float("slack_megabytes", 10, "Growth of memory that is no growth.")


def export(folder: pathlib.Path, version: int, megabytes: float) -> None:
    """Writes a model that answers `x` with `y` = x + version."""
    import tensorflow as tf

    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.weights = tf.Variable(tf.fill([int(megabytes * 2**18) + 1], float(version)))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
        def add(self, x):
            return {"y": x + self.weights[0]}

    model = Model()
    tf.saved_model.save(model, str(folder), signatures={"serving_default": model.add})


class Callers:
    """Threads that ask for the newest version until they are stopped.

    Attributes:
      answers: how often each version answered; failures: what went wrong, in words.
    """

    def __init__(self, address: str, count: int):
        self.answers: collections.Counter[int] = collections.Counter()
        self.failures: list[str] = []
        self._address = address
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, caller: int) -> None:
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

        request = predict_pb2.PredictRequest()
        request.model_spec.name = "soak"
        with grpc.insecure_channel(self._address) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            number = 0
            while not self._stop.is_set():
                # Small integers of one caller alone, exact in float32.
                number = (number + 1) % 1000
                asked = float(caller * 1000 + number)
                tensor = request.inputs["x"]
                tensor.Clear()
                tensor.dtype = 1
                tensor.tensor_shape.dim.add(size=1)
                tensor.float_val.append(asked)
                try:
                    response = stub.Predict(request, timeout=PATIENCE_SECONDS)
                except grpc.RpcError as error:
                    with self._lock:
                        self.failures.append(f"{error.code().name}: {error.details()}")
                    continue
                version = response.model_spec.version.value
                answer = list(response.outputs["y"].float_val)
                with self._lock:
                    self.answers[version] += 1
                    if answer != [asked + version]:
                        self.failures.append(f"version {version} answered {asked} with {answer}")


def state(address: str, version: int) -> str:
    """The state of a version as GetModelStatus tells it; "" where it is not known."""
    from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "soak"
    request.model_spec.version.value = version
    with grpc.insecure_channel(address) as channel:
        try:
            response = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(
                request, timeout=PATIENCE_SECONDS
            )
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return ""
    names = get_model_status_pb2.ModelVersionStatus.State.Name
    return names(response.model_version_status[0].state)


def wait_for(address: str, version: int, wanted: str) -> float:
    """Waits until a version is in that state, and returns for how many seconds."""
    start = time.monotonic()
    while state(address, version) != wanted:
        if time.monotonic() > start + PATIENCE_SECONDS:
            sys.exit(f"error: version {version} is not {wanted} after {PATIENCE_SECONDS} s")
        time.sleep(0.02)
    return time.monotonic() - start


def resident_megabytes(process: int) -> float:
    """The resident memory of a process."""
    pages = int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def server(base_path: pathlib.Path):
    """Our server on the model, as (process, address)."""
    command = [sys.executable, "-m", "pwiser_serving.server", "--port=0", "--model_name=soak"]
    command += [f"--model_base_path={base_path}", "--file_system_poll_wait_seconds=0.2"]
    with open(base_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        if not line:
            sys.exit("error: the server does not start: " + (base_path / "log").read_text())
        yield process, f"localhost:{line.rsplit(':', 1)[1].strip()}"
        process.terminate()
        if process.wait(PATIENCE_SECONDS):
            sys.exit(f"error: the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def run(folder: pathlib.Path) -> list[str]:
    """The whole of it in an empty folder; returns what is wrong."""
    base_path, aside = folder / "base", folder / "aside"
    base_path.mkdir()
    for version in range(1, FLAGS.versions + 1):
        export(aside / str(version), version, FLAGS.megabytes)
        if version % BROKEN_EVERY == 0:
            graph = aside / str(version) / "saved_model.pb"
            graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    (aside / "1").rename(base_path / "1")
    memory, good = [], {1}
    print(f"{machine.header()}\n")
    print("version  what       shown after s    requests  failures  memory MB")
    with server(base_path) as (process, address), Callers(address, FLAGS.callers) as callers:
        start = time.monotonic()
        for version in range(2, FLAGS.versions + 1):
            (aside / str(version)).rename(base_path / str(version))
            what, wanted = "new", "AVAILABLE"
            if version % BROKEN_EVERY == 0:
                what, wanted = "broken", "END"
            waited = wait_for(address, version, wanted)
            if what == "new":
                good.add(version)
                served = version
            if version % REMOVED_EVERY == 0 and what == "new":
                what = "removed"
                time.sleep(0.3)
                shutil.move(base_path / str(version), folder / "removed")
                shutil.rmtree(folder / "removed")
                served = max(good - {version})
                wait_for(address, served, "AVAILABLE")
            # What was replaced is gone, so that memory is that of one version.
            for old in good - {served}:
                wait_for(address, old, "END")
            good = {served}
            time.sleep(max(0, start + FLAGS.seconds * version / FLAGS.versions - time.monotonic()))
            memory.append(resident_megabytes(process.pid))
            print(
                f"{version:7d}  {what:9s}  {waited:13.2f}  {sum(callers.answers.values()):10d}"
                f"  {len(callers.failures):8d}  {memory[-1]:9.1f}",
                flush=True,
            )
    problems = callers.failures[:10]
    half = memory[len(memory) // 2]
    if memory[-1] > half + FLAGS.slack_megabytes:
        problems.append(f"memory grew from {half:.1f} to {memory[-1]:.1f} MB")
    unanswered = [
        version
        for version in range(1, FLAGS.versions + 1)
        if (version % BROKEN_EVERY != 0) != (callers.answers[version] > 0)
    ]
    if unanswered:
        problems.append(f"not answered, or broken and answered: {unanswered}")
    print(f"{sum(callers.answers.values())} requests, {len(callers.failures)} failed")
    print("answers by version:", dict(sorted(callers.answers.items())))
    return problems


def main() -> None:
    """Prints a table, and what is wrong."""
    import pwiser_tf.quiet  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        problems = run(pathlib.Path(folder))
    for problem in problems:
        print("error:", problem, file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
