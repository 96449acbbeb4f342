"""What serving costs on top of the model: the local server beside naive ones, over gRPC and REST.

    python -m benchmarks.serving [--size=mmoe | --model=exported/demo/1] [--rounds=5]

Without --model an untrained one of 16 categorical and 63 numerical features is exported (see
benchmarks/generated.py). These take turns within each round, each server in its own process, so
that noise of the machine hits all of them alike:

- model: the Session callable alone, in this process, NumPy arrays in and out. No server.
- empty: a gRPC method of the same Python stack that gets the same bytes and returns at once.
- ours: `python -m pwiser_serving.server`; "content" answers as tensor_content, otherwise float_val.
- naive: the simplest gRPC server: tf.saved_model.load, the signature called eagerly,
  tf.make_ndarray and tf.make_tensor_proto, the same number of threads.
- FastAPI: the simplest REST server: FastAPI and uvicorn, a pydantic model with
  `instances: list[dict]`, a constant for each column, the signature called eagerly, .tolist().

The caller sends bytes that were prepared before, and reads the answer as bytes: a call's time is
the server's work, and gRPC or HTTP in Python at both ends. p50 is the median of the rounds'
medians, p99 is over all rounds, a ratio is the median of the rounds' ratios. Requests per second
are counted with --callers processes that each wait for their answer; "CPU" is the server's time for
one of them.
"""

import contextlib
import functools
import http.client
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
from absl import flags

from benchmarks import machine
from pwiser_tf import command_line

FLAGS = flags.FLAGS
PREDICT, EMPTY = "/tensorflow.serving.PredictionService/Predict", "/benchmark/Empty"
REST = "/v1/models/m:predict"
# Requests that a server answers at the same time.
THREADS = 4 * (os.cpu_count() or 1)
# Calls of one case in one round, by batch size.
CALLS = {1: 300, 50: 150, 500: 75}
WARM_UP_CALLS = 30
# Case to the microseconds of its calls, a list for each round.
Times = dict[str, list[list[float]]]


def define_flags() -> None:
    """Defines the flags of this command line."""
    flags.DEFINE_string("model", None, "A version's folder of an export with pwiser_tf.")
    flags.DEFINE_enum("size", "sample", ["sample", "mmoe"], "Of the model that is exported.")
    flags.DEFINE_integer("rounds", 5, "Rounds in which the cases take turns.", lower_bound=1)
    flags.DEFINE_integer("callers", 4, "Callers for requests per second.", lower_bound=1)
    flags.DEFINE_float("seconds", 1, "Of load for requests per second, a server and round.")
    flags.DEFINE_enum("worker", None, list(WORKERS), "Used by the benchmark itself.")
    flags.DEFINE_string("url", None, "Used by the benchmark itself: what a caller calls.")


# The processes that are measured. Each prints its port and serves until stdin closes.


def _serve(method: str, answer: Callable) -> None:
    """Serves one gRPC method, bytes to bytes."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(answer) if details.method == method else None

    server = grpc.server(futures.ThreadPoolExecutor(THREADS), handlers=[Handler()])
    print(server.add_insecure_port("localhost:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None).wait()


def serve_empty() -> None:
    """Answers each request with nothing."""
    _serve(EMPTY, lambda data, context: b"")


def _load():
    """The model as tf.saved_model.load gives it."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tensorflow as tf

    return tf, tf.saved_model.load(FLAGS.model)


def serve_naive() -> None:
    """The simplest gRPC server."""
    tf, loaded = _load()
    from tensorflow_serving.apis import predict_pb2

    def predict(data: bytes, context) -> bytes:
        request = predict_pb2.PredictRequest.FromString(data)
        inputs = {
            name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in request.inputs.items()
        }
        response = predict_pb2.PredictResponse()
        for name, values in loaded.signatures[request.model_spec.signature_name](**inputs).items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(values.numpy()))
        return response.SerializeToString()

    _serve(PREDICT, predict)


def serve_fastapi() -> None:
    """The simplest REST server."""
    import anyio.to_thread
    import fastapi
    import pydantic
    import uvicorn

    tf, loaded = _load()

    @contextlib.asynccontextmanager
    async def limit_threads(api):
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    class Request(pydantic.BaseModel):
        signature_name: str = "serving_default"
        instances: list[dict]

    api = fastapi.FastAPI(lifespan=limit_threads)

    @api.post(REST)
    def predict(request: Request):
        signature = loaded.signatures[request.signature_name]
        inputs = {
            name: tf.constant([row[name] for row in request.instances], spec.dtype)
            for name, spec in signature.structured_input_signature[1].items()
        }
        outputs = {name: values.numpy().tolist() for name, values in signature(**inputs).items()}
        rows = zip(*outputs.values(), strict=True)
        return {"predictions": [dict(zip(outputs, row, strict=True)) for row in rows]}

    # asyncio sends at once (TCP_NODELAY) only if the socket names TCP: otherwise 40 ms a call.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        print(listener.getsockname()[1], flush=True)
        # A connection waits while the others have their turns.
        config = uvicorn.Config(api, log_level="warning", timeout_keep_alive=600)
        uvicorn.Server(config).run([listener])


def count_calls() -> None:
    """A caller: reads seconds and a request in hexadecimal, prints how many calls it made."""
    with connect(FLAGS.url) as call:
        for line in sys.stdin:
            seconds, data = json.loads(line)
            data = bytes.fromhex(data)
            calls, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                call(data)
                calls += 1
            print(calls, flush=True)


def export() -> None:
    """Writes the model to --model."""
    from benchmarks import generated

    generated.export(pathlib.Path(FLAGS.model), FLAGS.size)


WORKERS = {
    "empty": serve_empty,
    "naive": serve_naive,
    "fastapi": serve_fastapi,
    "caller": count_calls,
    "export": export,
}


@contextlib.contextmanager
def connect(url: str) -> Iterator[Callable[[bytes], bytes]]:
    """A function that sends a request to a URL, grpc:// or http://, and returns the answer."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "grpc":
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(parts.netloc, options) as channel:
            method = channel.unary_unary(parts.path)
            yield lambda data: method(data, timeout=60)
        return
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)

    def post(data: bytes) -> bytes:
        connection.request("POST", parts.path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{url}: {response.status} {answer[:200]}")
        return answer

    with contextlib.closing(connection):
        yield post


# The process that measures.


class Worker:
    """A process, and what it prints on stderr, which is shown if it does not start."""

    def __init__(self, module: str, *arguments: str):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def port(self) -> int:
        """The port that it prints last on its first line."""
        line = self.process.stdout.readline()
        port = line.rsplit(":", 1)[-1].strip()
        if not port.isdecimal():
            self._log.seek(0)
            raise RuntimeError(f"{self.process.args} did not start: {self._log.read()}")
        return int(port)

    def stop(self) -> None:
        # Our server ends on the signal, the others at the end of stdin.
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()
        self._log.close()

    def cpu_seconds(self) -> float:
        """CPU time that the process has used, from Linux's /proc."""
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = stat.rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _arrays(signature, batch: int) -> dict[str, np.ndarray]:
    """Random inputs of a signature of numbers."""
    random = np.random.default_rng(batch)
    arrays = {}
    for name, info in sorted(signature.inputs.items()):
        shape = (batch, *(dim.size for dim in info.tensor_shape.dim[1:]))
        integers = info.dtype == 9
        arrays[name] = (
            random.integers(0, 4, shape) if integers else random.random(shape, np.float32)
        )
    return arrays


def _examples(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Raw features as serialized Examples, as a caller of serving_default makes them."""
    from tensorflow.core.example import example_pb2

    serialized = []
    for row in zip(*(values.tolist() for values in raw.values()), strict=True):
        example = example_pb2.Example()
        for name, value in zip(raw, row, strict=True):
            feature = example.features.feature[name]
            kind = feature.int64_list if isinstance(value, int) else feature.float_list
            kind.value.append(value)
        serialized.append(example.SerializeToString())
    return {"examples": np.array(serialized, object)}


def _request(signature_name: str, arrays: dict[str, np.ndarray], *, as_content=True) -> bytes:
    from pwiser_serving import tensors
    from pwiser_serving.protos import service_pb2

    request = service_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "m", signature_name
    for name, array in arrays.items():
        tensors.fill(request.inputs[name], array, as_content=as_content)
    return request.SerializeToString()


def _rest_request(signature_name: str, arrays: dict[str, np.ndarray]) -> bytes:
    columns = [array.tolist() for array in arrays.values()]
    rows = [dict(zip(arrays, row, strict=True)) for row in zip(*columns, strict=True)]
    return json.dumps({"signature_name": signature_name, "instances": rows}).encode()


def _take_turns(cases: dict[str, Callable], calls: int) -> Times:
    """Calls each case so many times in each round."""
    results = {name: [] for name in cases}
    for round_ in range(FLAGS.rounds + 1):
        for name, call in cases.items():
            times = []
            for _ in range(calls if round_ else min(calls, WARM_UP_CALLS)):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e6)
            if round_:
                results[name].append(times)
    return results


def _table(title: str, results: Times, *baselines: str) -> None:
    """Prints percentiles, and the ratios of medians to those of the baselines."""
    medians = {name: list(map(statistics.median, rounds)) for name, rounds in results.items()}
    columns = ["p50 us", "p99 us", *(f"/ {name}" for name in baselines)]
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, rounds in results.items():
        p50, p99 = statistics.median(medians[name]), np.percentile(np.concatenate(rounds), 99)
        ratios = [
            statistics.median(np.divide(medians[name], medians[other])) for other in baselines
        ]
        cells = [f"{p50:.0f}", f"{p99:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _throughput(title: str, targets: dict[str, tuple[Worker, str, bytes]]) -> None:
    """Requests per second of servers with URL and request."""
    rates, loads = {name: [] for name in targets}, {name: [] for name in targets}
    with contextlib.ExitStack() as stack:
        callers = {name: [] for name in targets}
        for name, (_, url, _) in targets.items():
            for _ in range(FLAGS.callers):
                caller = Worker("benchmarks.serving", "--worker=caller", f"--url={url}")
                stack.callback(caller.stop)
                callers[name].append(caller.process)
        # The callers start in the first round, which is not counted.
        for round_ in range(FLAGS.rounds + 1):
            for name, (worker, _, data) in targets.items():
                before, seconds = worker.cpu_seconds(), FLAGS.seconds if round_ else 0.2
                for process in callers[name]:
                    print(json.dumps([seconds, data.hex()]), file=process.stdin, flush=True)
                calls = sum(int(process.stdout.readline()) for process in callers[name])
                if round_:
                    rates[name].append(calls / seconds)
                    loads[name].append((worker.cpu_seconds() - before) / calls * 1e6)
    first = next(iter(targets))
    print(f"\n{title}, {FLAGS.callers} callers\n")
    print(f"| | requests/s | CPU us | requests/s, {first} / this |\n|---|---|---|---|")
    for name in targets:
        ratio = statistics.median(np.divide(rates[first], rates[name]))
        rate, load = statistics.median(rates[name]), statistics.median(loads[name])
        print(f"| {name} | {rate:,.0f} | {load:,.0f} | {ratio:.2f} |", flush=True)


def _session_calls(folder: pathlib.Path):
    """The model's signatures, and a function from a signature's name to its Session callable."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tensorflow as tf
    from tensorflow.core.protobuf import config_pb2

    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(folder))

    def callable_of(name: str) -> Callable:
        signature = loaded.signature_def[name]
        options = config_pb2.CallableOptions(
            feed=[info.name for _, info in sorted(signature.inputs.items())],
            fetch=[info.name for _, info in sorted(signature.outputs.items())],
        )
        return session._make_callable_from_options(options)

    return loaded.signature_def, callable_of


def measure(folder: pathlib.Path) -> None:
    """Runs all comparisons and prints their tables."""
    signatures, callable_of = _session_calls(folder)
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(tempfile.TemporaryDirectory())
        os.symlink(folder.resolve(), os.path.join(base, "1"))
        ours = ["pwiser_serving.server", "--port=0", "--model_name=m", f"--model_base_path={base}"]
        with socket.create_server(("localhost", 0)) as listener:
            rest_port = listener.getsockname()[1]
        commands = {
            name: ["benchmarks.serving", f"--worker={name}", f"--model={folder}"]
            for name in ("empty", "naive", "fastapi")
        }
        rest = [f"--rest_api_port={rest_port}", f"--rest_api_num_threads={THREADS}"]
        commands["ours"] = [*ours, *rest]
        commands["ours, content"] = [*ours, "--enable_serialization_as_tensor_content"]
        workers = {name: Worker(*command) for name, command in commands.items()}
        for worker in workers.values():
            stack.callback(worker.stop)
        ports = {name: worker.port() for name, worker in workers.items()}
        urls = {name: f"grpc://localhost:{port}{PREDICT}" for name, port in ports.items()}
        urls["empty"] = f"grpc://localhost:{ports['empty']}{EMPTY}"
        urls["ours, REST"] = f"http://localhost:{rest_port}{REST}"
        urls["FastAPI, REST"] = f"http://localhost:{ports['fastapi']}{REST}"
        servers = workers | {"ours, REST": workers["ours"], "FastAPI, REST": workers["fastapi"]}
        calls = {name: stack.enter_context(connect(url)) for name, url in urls.items()}

        run = callable_of("predict")
        for batch, count in CALLS.items():
            arrays = _arrays(signatures["predict"], batch)
            cases = {"model": functools.partial(run, *arrays.values())}
            data = _request("predict", arrays)
            for name in ("empty", "ours", "ours, content", "naive"):
                cases[name] = functools.partial(calls[name], data)
            title = f"gRPC, batch {batch}, signature predict"
            _table(title, _take_turns(cases, count), "model", "empty")
            if batch == 1:
                targets = {name: (servers[name], urls[name], data) for name in ("ours", "naive")}
                _throughput(title, targets)
        for batch, count in CALLS.items():
            arrays = _arrays(signatures["predict_raw"], batch)
            data = _request("predict_raw", arrays), _rest_request("predict_raw", arrays)
            sent = dict(zip(("ours", "ours, REST"), data, strict=True)) | {"FastAPI, REST": data[1]}
            cases = {name: functools.partial(calls[name], sent[name]) for name in sent}
            title = f"REST, batch {batch}, signature predict_raw"
            _table(title, _take_turns(cases, count), "ours")
            names = ("ours, REST", "FastAPI, REST", "ours")
            targets = {name: (servers[name], urls[name], sent[name]) for name in names}
            _throughput(title, targets)

        batch = max(CALLS)
        ids, raw = (_arrays(signatures[name], batch) for name in ("predict", "predict_raw"))
        encoders = {
            "ids, tensor_content": lambda: _request("predict", ids),
            "ids, repeated values": lambda: _request("predict", ids, as_content=False),
            "raw, tensor_content": lambda: _request("predict_raw", raw),
            "raw, repeated values": lambda: _request("predict_raw", raw, as_content=False),
            "raw, Examples": lambda: _request("serving_default", _examples(raw)),
        }
        cases = {f"{name}: encode": encode for name, encode in encoders.items()}
        for name, encode in encoders.items():
            cases[f"{name}: call"] = functools.partial(calls["ours"], encode())
        _table(f"Wire formats, batch {batch}: client and call", _take_turns(cases, 20))


def measure_import() -> None:
    """Prints what the client's import costs, in new processes (while this one is still small: a
    process starts as a copy of this one)."""
    code = (
        "import resource, time; start = time.perf_counter(); import pwiser_serving; "
        "print(time.perf_counter() - start, "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(FLAGS.rounds)
    ]
    seconds, megabytes = np.median([list(map(float, run.stdout.split())) for run in runs], axis=0)
    print(f"\nimport pwiser_serving: {seconds:.2f} s, {megabytes:.0f} MB at its highest")


def main() -> None:
    """Prints Markdown tables."""
    if FLAGS.worker:
        WORKERS[FLAGS.worker]()
        return
    print(machine.header())
    measure_import()
    with tempfile.TemporaryDirectory() as folder:
        model = FLAGS.model
        if not model:
            model = f"{folder}/1"
            size = f"--size={FLAGS.size}"
            machine.run("benchmarks.serving", "--worker=export", size, f"--model={model}")
        measure(pathlib.Path(model))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
