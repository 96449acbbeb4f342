"""What serving costs on top of the model: ours beside naive servers, over gRPC and REST.

    python -m benchmarks.serving [--size=mmoe | --model=exported/demo/1] [--rounds=5]

Without --model an untrained one of 16 categorical and 63 numerical features is exported by
pwiser_tf: --size=sample of the size of configs/sample.flags, --size=mmoe of MTReclib's MMoE at
embedding 16. Each of these is a process of its own, and they take
turns within each round, so that a noisy machine disturbs all of them alike:

- model: the Session callable alone, in process, NumPy arrays in and out. No server.
- empty: a gRPC method of the same Python server stack, sent the same bytes, that returns at once.
- ours: `python -m pwiser_serving.server`; "content" answers as tensor_content, else as float_val.
- naive: what one would write first: tf.saved_model.load, the signature called eagerly,
  tf.make_ndarray and tf.make_tensor_proto, the same number of threads.
- FastAPI: what one would write first for REST: FastAPI and uvicorn, a pydantic model with
  `instances: list[dict]`, a constant per column, the signature called eagerly, and .tolist().

The caller sends bytes prepared before and reads the answer as bytes, so a call's time is the
server's work and gRPC or HTTP itself, both ends, in Python. Microseconds of a call: p50 is the
median of the rounds' medians; p99 and p99.9 are over all rounds. A ratio is the median of the
rounds' ratios. Requests a second are counted with --callers processes that each wait for their
answer.
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
from absl import app, flags

FLAGS = flags.FLAGS
PREDICT = "/tensorflow.serving.PredictionService/Predict"
EMPTY, MODEL = "/benchmark/Empty", "/benchmark/Model"
REST = "/v1/models/m:predict"
# Requests that a server answers at the same time.
THREADS = 4 * (os.cpu_count() or 1)
# Calls of one case in one round.
CALLS = {1: 400, 50: 200, 500: 100}
WARM_UP_CALLS = 50
# Architecture, and what of its configuration is not the default.
SIZES = {
    "sample": ("shared_bottom", {"bottom_units": (128, 64), "tower_units": (32,)}),
    "mmoe": ("mmoe", {}),
}


def define_flags():
    flags.DEFINE_string(
        "model", None, "A version's folder of an export with pwiser_tf's signatures."
    )
    flags.DEFINE_enum("size", "sample", list(SIZES), "Of the model that is exported.")
    flags.DEFINE_integer("rounds", 5, "Rounds in which the cases take turns.", lower_bound=1)
    flags.DEFINE_integer("callers", 4, "Callers at once, for requests a second.", lower_bound=1)
    flags.DEFINE_float("seconds", 2, "Of load for requests a second, a server and round.")
    flags.DEFINE_string("worker", None, "Used by the benchmark itself: what this process does.")
    flags.DEFINE_string("url", None, "Used by the benchmark itself: what a caller calls.")


# The processes that are measured.


def export(folder: pathlib.Path) -> None:
    """Writes an untrained model of --size into the folder."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tensorflow as tf

    from pwiser_tf.export import ServedModel, _restore_names
    from pwiser_tf.models import MODELS, ModelConfig
    from pwiser_tf.schema import Categorical, Numerical, Schema, Split

    schema = Schema(
        dataset="generated",
        categorical=tuple(
            Categorical(f"feature_{k}", "int64", range(50 * (k + 1))) for k in range(16)
        ),
        numerical=tuple(
            Numerical(f"feature_{k}", "identity", 0.5, 0.3, 0.5) for k in range(16, 79)
        ),
        click="click",
        conversion="conversion",
        group=None,
        splits={"train": Split(1000, 50, 5, 0, ())},
    )
    architecture, sizes = SIZES[FLAGS.size]
    model = MODELS[architecture](schema, ModelConfig(name=architecture, embedding_dim=16, **sizes))
    model(
        {"categorical": np.zeros((1, 16), np.int64), "numerical": np.zeros((1, 63), np.float32)},
        training=False,
    )
    served = ServedModel(model, schema)
    tf.saved_model.save(served, str(folder), signatures=served.functions)
    _restore_names(folder, served)


def _serve(methods: dict) -> None:
    """Serves path-to-function methods, bytes to bytes, until stdin closes; prints the port."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            method = methods.get(details.method)
            return method and grpc.unary_unary_rpc_method_handler(method)

    server = grpc.server(futures.ThreadPoolExecutor(THREADS), handlers=[Handler()])
    print(server.add_insecure_port("localhost:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None).wait()


def serve_reference(folder: str) -> None:
    """The empty call, and the model alone: a request is timed `calls` times in this process."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tensorflow as tf
    from tensorflow.core.protobuf import config_pb2
    from tensorflow_serving.apis import predict_pb2

    session = tf.compat.v1.Session(graph=tf.Graph())
    with session.graph.as_default():
        loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], folder)
    callables = {}
    for name, signature in loaded.signature_def.items():
        options = config_pb2.CallableOptions(
            feed=[info.name for _, info in sorted(signature.inputs.items())],
            fetch=[info.name for _, info in sorted(signature.outputs.items())],
        )
        # What initialises a loaded model is listed among the signatures, and fetches nothing.
        if signature.inputs:
            callables[name] = session._make_callable_from_options(options)

    def time_model(data: bytes, context) -> bytes:
        request = predict_pb2.PredictRequest.FromString(data)
        arrays = [tf.make_ndarray(tensor) for _, tensor in sorted(request.inputs.items())]
        run = callables[request.model_spec.signature_name]
        calls = CALLS[arrays[0].shape[0]]
        return np.array(_timed(lambda: run(*arrays), calls)).tobytes()

    _serve({EMPTY: lambda data, context: b"", MODEL: time_model})


def serve_naive(folder: str) -> None:
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    loaded = tf.saved_model.load(folder)

    def predict(data: bytes, context) -> bytes:
        request = predict_pb2.PredictRequest.FromString(data)
        inputs = {
            name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in request.inputs.items()
        }
        response = predict_pb2.PredictResponse()
        for name, values in loaded.signatures[request.model_spec.signature_name](**inputs).items():
            response.outputs[name].CopyFrom(tf.make_tensor_proto(values.numpy()))
        return response.SerializeToString()

    _serve({PREDICT: predict})


def serve_fastapi(folder: str) -> None:
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import anyio.to_thread
    import fastapi
    import pydantic
    import tensorflow as tf
    import uvicorn

    loaded = tf.saved_model.load(folder)

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

    # Only where a socket names TCP does asyncio send at once (TCP_NODELAY): 40 ms a call otherwise.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        print(listener.getsockname()[1], flush=True)
        # A connection waits while the others have their turns.
        config = uvicorn.Config(api, log_level="warning", timeout_keep_alive=600)
        uvicorn.Server(config).run([listener])


def count_calls(url: str) -> None:
    """A caller: reads a request in hexadecimal and seconds, prints how many calls it made."""
    with connect(url) as call:
        for line in sys.stdin:
            seconds, data = json.loads(line)
            data = bytes.fromhex(data)
            calls, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                call(data)
                calls += 1
            print(calls, flush=True)


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
    """A process, the address at which it serves, and its log, which is told if it does not."""

    def __init__(self, command: list[str]):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def wait_for_port(self) -> None:
        line = self.process.stdout.readline()
        # Our server says more than its port, and the port last.
        port = line.rsplit(":", 1)[-1].strip()
        if not port.isdecimal():
            self._log.seek(0)
            raise RuntimeError(f"{self.process.args} did not start: {self._log.read()}")
        self.address = f"localhost:{port}"

    def stop(self) -> None:
        # A signal for our server, the end of stdin for the others.
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()
        self._log.close()


def _timed(call, calls: int) -> list[float]:
    """Microseconds of each call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


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

    columns = {name: values.tolist() for name, values in raw.items()}
    serialized = []
    for row in range(len(next(iter(columns.values())))):
        example = example_pb2.Example()
        for name, values in columns.items():
            feature = example.features.feature[name]
            kind = feature.int64_list if isinstance(values[row], int) else feature.float_list
            kind.value.append(values[row])
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


def _percentiles(rounds: list[list[float]]) -> tuple[float, float, float]:
    everything = np.concatenate(rounds)
    return (
        statistics.median(statistics.median(times) for times in rounds),
        float(np.percentile(everything, 99)),
        float(np.percentile(everything, 99.9)),
    )


def _ratio(above: list[list[float]], below: list[list[float]]) -> float:
    return statistics.median(
        statistics.median(a) / statistics.median(b) for a, b in zip(above, below, strict=True)
    )


def _table(title: str, rows: dict[str, list[list[float]]]) -> None:
    print(f"\n{title}\n\n| | p50 us | p99 us | p99.9 us |\n|---|---|---|---|")
    for name, rounds in rows.items():
        print(f"| {name} | " + " | ".join(f"{p:.0f}" for p in _percentiles(rounds)) + " |")


def _take_turns(cases: dict[str, tuple]) -> dict[str, list[list[float]]]:
    """Case: (call, calls) to case: the times of each round."""
    results = {name: [] for name in cases}
    for call, _ in cases.values():
        _timed(call, WARM_UP_CALLS)
    for _ in range(FLAGS.rounds):
        for name, (call, calls) in cases.items():
            results[name].append(_timed(call, calls))
    return results


def measure(folder: pathlib.Path) -> None:
    """Runs all comparisons and prints their tables."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    signatures = saved.meta_graphs[0].signature_def
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(tempfile.TemporaryDirectory())
        os.symlink(folder.resolve(), os.path.join(base, "1"))
        ours = ["pwiser_serving.server", "--port=0", "--model_name=m", "--model_base_path", base]
        with socket.create_server(("localhost", 0)) as listener:
            rest_port = listener.getsockname()[1]
        rest = [f"--rest_api_port={rest_port}", f"--rest_api_num_threads={THREADS}"]
        commands = {
            "reference": ["benchmarks.serving", "--worker=reference", f"--model={folder}"],
            "naive": ["benchmarks.serving", "--worker=naive", f"--model={folder}"],
            "FastAPI": ["benchmarks.serving", "--worker=fastapi", f"--model={folder}"],
            "ours": [*ours, *rest],
            "ours, content": [*ours, "--enable_serialization_as_tensor_content"],
        }
        workers = {name: Worker(command) for name, command in commands.items()}
        for worker in workers.values():
            stack.callback(worker.stop)
        for worker in workers.values():
            worker.wait_for_port()

        def url(server: str, path: str = PREDICT) -> str:
            return f"grpc://{workers[server].address}{path}"

        def sends(server: str, data: bytes, path: str = PREDICT):
            call = stack.enter_context(connect(url(server, path)))
            return lambda: call(data)

        ids, raw = (
            {batch: _arrays(signatures[name], batch) for batch in CALLS}
            for name in ("predict", "predict_raw")
        )
        requests = {batch: _request("predict", arrays) for batch, arrays in ids.items()}
        _compare_calls(requests, sends)
        _compare_wires(signatures, sends)
        servers = ("ours", "naive")
        targets = {name: (workers[name], url(name), requests[1]) for name in servers}
        _compare_throughput("Batch 1", targets)
        _compare_rest(
            raw,
            {
                "ours, REST": (workers["ours"], f"http://localhost:{rest_port}{REST}"),
                "FastAPI, REST": (
                    workers["FastAPI"],
                    f"http://{workers['FastAPI'].address}{REST}",
                ),
                "ours, gRPC": (workers["ours"], url("ours")),
            },
        )


def _compare_calls(requests: dict[int, bytes], sends) -> None:
    cases = {}
    for batch, data in requests.items():
        cases["empty", batch] = sends("reference", data, EMPTY), CALLS[batch]
        for server in ("ours", "ours, content", "naive"):
            cases[server, batch] = sends(server, data), CALLS[batch]
    model = {batch: sends("reference", data, MODEL) for batch, data in requests.items()}
    # One message times many calls in its own process.
    for batch in requests:
        model[batch]()
    results = {key: [] for key in [*cases, *(("model", batch) for batch in model)]}
    for call, _ in cases.values():
        _timed(call, WARM_UP_CALLS)
    for _ in range(FLAGS.rounds):
        for batch, call in model.items():
            results["model", batch].append(np.frombuffer(call()).tolist())
        for key, (call, calls) in cases.items():
            results[key].append(_timed(call, calls))
    for batch in requests:
        kinds = ("empty", "model", "ours", "ours, content", "naive")
        rows = {kind: results[kind, batch] for kind in kinds}
        _table(f"Batch {batch}, signature predict", rows)
        for server in ("ours", "ours, content", "naive"):
            times = results[server, batch]
            ratios = {kind: _ratio(times, results[kind, batch]) for kind in ("model", "empty")}
            told = "; ".join(f"/ {kind}: {ratio:.2f}" for kind, ratio in ratios.items())
            print(f"\n{server} {told}", end="")
        print()


def _compare_wires(signatures, sends) -> None:
    batch = 500
    ids, raw = (_arrays(signatures[name], batch) for name in ("predict", "predict_raw"))
    encoders = {
        "ids, tensor_content": lambda: _request("predict", ids),
        "ids, repeated values": lambda: _request("predict", ids, as_content=False),
        "raw, tensor_content": lambda: _request("predict_raw", raw),
        "raw, repeated values": lambda: _request("predict_raw", raw, as_content=False),
        "raw, Examples": lambda: _request("serving_default", _examples(raw)),
    }
    cases = {}
    for name, encode in encoders.items():
        cases[f"{name}: encode"] = encode, 5
        cases[f"{name}: call"] = sends("ours", encode()), 50
    _table(f"Wire formats, batch {batch}: encoding in the client, and the call", _take_turns(cases))


def _compare_rest(
    raw: dict[int, dict[str, np.ndarray]], servers: dict[str, tuple[Worker, str]]
) -> None:
    """Raw features by batch size to servers with their URLs, the first against the others."""
    for batch, arrays in raw.items():
        title = f"Batch {batch}, signature predict_raw"
        grpc_request, rest_request = (
            encode("predict_raw", arrays) for encode in (_request, _rest_request)
        )
        targets = {
            name: (worker, url, rest_request if url.startswith("http:") else grpc_request)
            for name, (worker, url) in servers.items()
        }
        with contextlib.ExitStack() as stack:
            cases = {}
            for name, (_, url, data) in targets.items():
                call = stack.enter_context(connect(url))
                cases[name] = functools.partial(call, data), CALLS[batch]
            results = _take_turns(cases)
        _table(title, results)
        first, *others = results
        for other in others:
            print(f"\n{other} / {first}: {_ratio(results[other], results[first]):.2f}", end="")
        print()
        _compare_throughput(title, targets)


def _compare_throughput(title: str, targets: dict[str, tuple[Worker, str, bytes]]) -> None:
    """Requests a second of servers with URL and request, the first against the others."""
    with contextlib.ExitStack() as stack:
        callers = {name: [] for name in targets}
        for name, (_, url, _) in targets.items():
            for _ in range(FLAGS.callers):
                caller = Worker(["benchmarks.serving", "--worker=caller", f"--url={url}"])
                stack.callback(caller.stop)
                callers[name].append(caller.process)
        rates, burdens = {name: [] for name in targets}, {name: [] for name in targets}
        # The first round finds the callers still starting, and is not counted.
        for round_ in range(FLAGS.rounds + 1):
            for name, (worker, _, data) in targets.items():
                seconds = FLAGS.seconds if round_ else 0.2
                for process in callers[name]:
                    print(json.dumps([seconds, data.hex()]), file=process.stdin, flush=True)
                before = _processor_seconds(worker.process.pid)
                calls = sum(int(process.stdout.readline()) for process in callers[name])
                burden = _processor_seconds(worker.process.pid) - before
                if round_:
                    rates[name].append(calls / FLAGS.seconds)
                    burdens[name].append(burden / calls * 1e6)
    print(f"\n{title}, {FLAGS.callers} callers: requests a second; the server's CPU time of one\n")
    for name in targets:
        rate, burden = statistics.median(rates[name]), statistics.median(burdens[name])
        print(f"{name}: {rate:.0f}; {burden:.0f} us")
    first, *others = targets
    for other in others:
        more, less = (
            statistics.median(a / b for a, b in zip(values[first], values[other], strict=True))
            for values in (rates, burdens)
        )
        print(f"{first} / {other}: {more:.2f}; {less:.2f}")


def _processor_seconds(pid: int) -> float:
    """CPU time that a process has used, from Linux's /proc."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_import() -> None:
    """Prints what the client's import costs, in fresh processes."""
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
    print(f"import pwiser_serving: {seconds:.2f} s, {megabytes:.0f} MB at its highest")


def main(_):
    if not FLAGS.worker:
        measure_import()
    if FLAGS.worker == "reference":
        serve_reference(FLAGS.model)
    elif FLAGS.worker == "naive":
        serve_naive(FLAGS.model)
    elif FLAGS.worker == "fastapi":
        serve_fastapi(FLAGS.model)
    elif FLAGS.worker == "caller":
        count_calls(FLAGS.url)
    elif FLAGS.worker == "export":
        export(pathlib.Path(FLAGS.model))
    elif FLAGS.model:
        measure(pathlib.Path(FLAGS.model))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "1")
            command = ["-m", "benchmarks.serving", "--worker=export", f"--size={FLAGS.size}"]
            subprocess.run([sys.executable, *command, f"--model={path}"], check=True)
            measure(path)


if __name__ == "__main__":
    define_flags()
    app.run(main)
