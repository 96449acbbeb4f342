"""Mutated requests for a server, to all of its methods, with good requests in between.

    python serving/tests/fuzzing.py [--requests=100000] [--seed=0]

starts a server, sends it so many and prints its answers by code, the first few that say INTERNAL
or UNKNOWN (a server's own faults), and its memory before, after and at its highest. Ends with exit
code 1 where a good request was answered wrongly, or not at all.

Messages are mutated as messages (sizes that are huge, negative or none, other types, contents,
names, versions) and as bytes (flipped, cut, repeated, spliced from another message, numbers that
claim too much, unknown and deep fields), or as both.
"""

import argparse
import collections
import concurrent.futures
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time

import calls
import grpc
import numpy as np
import serving_model
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    inference_pb2,
    model_management_pb2,
    regression_pb2,
)

SECONDS = 30
# Mutants between two good requests.
_STRIDE = 100
_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_RELOAD = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"


def _seeds(base_path: pathlib.Path) -> list[tuple[str, object]]:
    """(method, message) pairs; good ones, but for the reload, which would change the server."""
    metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    metadata.model_spec.name = "m"
    classify = classification_pb2.ClassificationRequest()
    regress = regression_pb2.RegressionRequest()
    for request in (classify, regress):
        request.model_spec.name = "m"
        request.input.example_list.examples.add()
    several = inference_pb2.MultiInferenceRequest()
    for method in ("classify", "regress"):
        task = several.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = "m", "predict_raw"
    several.input.example_list.examples.add()
    reload = model_management_pb2.ReloadConfigRequest()
    for path in (str(base_path), "elsewhere"):
        reload.config.model_config_list.config.add(
            name="m", base_path=path, model_platform="tensorflow"
        ).version_labels["stable"] = 7
    raw = calls.raw_request()
    as_bytes = calls.raw_request()
    for tensor, dtype in ((as_bytes.inputs["item"], "<i8"), (as_bytes.inputs["price"], "<f4")):
        values = tensor.int64_val if dtype == "<i8" else tensor.float_val
        content = np.array(values, dtype).tobytes()
        tensor.ClearField("int64_val")
        tensor.ClearField("float_val")
        tensor.tensor_content = content
    return [
        *((_PREDICT, message) for message in (raw, as_bytes, calls.id_request())),
        (_PREDICT, calls.example_request()),
        ("/tensorflow.serving.PredictionService/GetModelMetadata", metadata),
        ("/tensorflow.serving.PredictionService/Classify", classify),
        ("/tensorflow.serving.PredictionService/Regress", regress),
        ("/tensorflow.serving.PredictionService/MultiInference", several),
        ("/tensorflow.serving.ModelService/GetModelStatus", calls.status_request()),
        (_RELOAD, reload),
    ]


class Mutator:
    """An endless source of requests that are wrong in some way, the same ones for a seed."""

    def __init__(self, seed: int, base_path: pathlib.Path):
        self._random = random.Random(seed)
        self._seeds = _seeds(base_path)

    def next(self) -> tuple[str, bytes]:
        """A method, and the bytes to send it."""
        # Most of them to Predict, which reads the most.
        path, seed = self._random.choice(
            self._seeds[:4] if self._random.random() < 0.7 else self._seeds
        )
        message = type(seed)()
        message.CopyFrom(seed)
        kind = self._random.random()
        if kind < 0.7 and path == _PREDICT:
            for _ in range(self._random.choice([1, 1, 2, 4])):
                self._change_message(message)
        data = message.SerializeToString()
        if kind > 0.4 or path != _PREDICT:
            for _ in range(self._random.choice([1, 1, 2, 5])):
                data = self._change_bytes(data)
        return path, data

    def _change_message(self, request) -> None:
        choice = self._random.choice
        name = choice(sorted(request.inputs)) if request.inputs else "more"
        tensor = request.inputs[name]
        sizes = [0, 1, 2, 3, 5, 100, 2**16, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**63)]
        change = self._random.randrange(12)
        if change < 3:
            if tensor.tensor_shape.dim:
                choice(tensor.tensor_shape.dim).size = choice(sizes)
        elif change == 3:
            count = choice([0, 1, 2, 5, 255, 300])
            del tensor.tensor_shape.dim[:]
            for _ in range(count):
                tensor.tensor_shape.dim.add(size=choice([1, 1, 1, 2, *sizes]))
        elif change == 4:
            tensor.dtype = choice([*range(32), 99, 101, 2**31 - 1, -1])
        elif change == 5:
            tensor.tensor_content = self._random.randbytes(choice([0, 1, 4, 7, 8, 32, 1000]))
        elif change == 6:
            for field in ("float_val", "int64_val", "string_val", "double_val", "tensor_content"):
                tensor.ClearField(field)
        elif change == 7:
            tensor.int64_val.extend(choice(sizes) for _ in range(choice([1, 3, 500])))
        elif change == 8:
            tensor.string_val.extend(
                self._random.randbytes(choice([0, 1, 30])) for _ in range(choice([1, 4, 50]))
            )
        elif change == 9:
            request.output_filter.append(choice(["ctr", "cvr", "x", "", "x" * 5000]))
        elif change == 10:
            request.model_spec.signature_name = choice(
                ["predict", "serving_default", "predict_raw", "__saved_model_init_op", "", "x"]
            )
        else:
            request.model_spec.version.value = choice([7, *sizes])

    def _change_bytes(self, data: bytes) -> bytes:
        source = self._random
        start = source.randrange(len(data) + 1)
        end = min(len(data), start + source.choice([1, 2, 8, 50]))
        change = source.randrange(9)
        if change < 2:
            changed = bytearray(data)
            for _ in range(source.choice([1, 1, 2, 8])):
                if changed:
                    changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
            return bytes(changed)
        if change == 2:
            return data[:start]
        if change == 3:
            return data[:start] + source.randbytes(source.choice([1, 4, 40])) + data[start:]
        if change == 4:
            return data[:start] + data[end:]
        if change == 5:
            return data[:end] + data[start:end] * source.choice([1, 3, 100]) + data[end:]
        if change == 6:
            _, other = source.choice(self._seeds)
            other = other.SerializeToString()
            return data[:start] + other[source.randrange(len(other)) :]
        if change == 7:
            # A number or a length that claims all there is.
            return data[:start] + b"\xff" * source.choice([4, 9, 12]) + b"\x01" + data[end:]
        return data + self._deep_field()

    def _deep_field(self) -> bytes:
        """A field that no message has, or any has, with fields in fields, or groups."""
        tag = self._random.choice([b"\x0a", b"\x12", b"\xfa\x01", b"\xfa\x7f"])
        depth = self._random.choice([1, 50, 99, 101, 400])
        if self._random.random() < 0.3:
            return b"\x0b" * depth + b"\x0c" * self._random.choice([0, depth])
        data = b""
        for _ in range(depth):
            length = len(data)
            varint = bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14])
            data = tag + varint + data
        return data


class Attack:
    """Mutants against one server, and what came of them.

    Attributes:
      codes: the answers by method and code; faults: (method, request, message) of answers that
      blame the server; wrong: what is wrong with the answers to good requests.
    """

    def __init__(self, address: str, base_path: pathlib.Path):
        self._address, self._base_path = address, base_path
        self._lock = threading.Lock()
        self.codes: collections.Counter = collections.Counter()
        self.faults: list[tuple[str, bytes, str]] = []
        self.wrong: list[str] = []

    def run(self, seed: int, requests: int) -> None:
        """Sends so many, good ones among them, one after the other."""
        mutator = Mutator(seed, self._base_path)
        with grpc.insecure_channel(self._address) as channel:
            for number in range(1, requests + 1):
                path, data = mutator.next()
                try:
                    channel.unary_unary(path)(data, timeout=SECONDS)
                    code = grpc.StatusCode.OK
                except grpc.RpcError as error:
                    code = error.code()
                    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                        self.faults.append((path, data, error.details()))
                with self._lock:
                    self.codes[path.rpartition("/")[2], code.name] += 1
                if path == _RELOAD and code is grpc.StatusCode.OK:
                    self._reload(channel)
                if number % _STRIDE == 0 or number == requests:
                    self._ask(channel, seed * 1_000_000 + number)

    def _reload(self, channel: grpc.Channel) -> None:
        """Gives the server its model back, which a mutant had taken."""
        request = model_management_pb2.ReloadConfigRequest()
        request.config.model_config_list.config.add(
            name="m", base_path=str(self._base_path), model_platform="tensorflow"
        )
        channel.unary_unary(_RELOAD)(request.SerializeToString(), timeout=SECONDS)

    def _ask(self, channel: grpc.Channel, number: int) -> None:
        """A good request of its own rows, whose answer must be theirs."""
        prices = np.random.default_rng(number).normal(size=3).tolist()
        rows = [("acme", 3, price) for price in prices]
        request = calls.raw_request(rows).SerializeToString()
        end = time.monotonic() + SECONDS
        while True:
            try:
                data = channel.unary_unary(_PREDICT)(request, timeout=SECONDS)
                break
            except grpc.RpcError as error:
                # A mutant of another thread may just have taken the model away.
                if error.code() is not grpc.StatusCode.NOT_FOUND or time.monotonic() > end:
                    self.wrong.append(f"{error.code()}: {error.details()}")
                    return
                time.sleep(0.05)
        found = calls.scores(calls.predict_pb2.PredictResponse.FromString(data))["ctr"]
        wanted = [serving_model.expected(*row, bias=0.0)["ctr"] for row in rows]
        if not (len(found) == 3 and np.allclose(found, wanted, rtol=1e-5)):
            self.wrong.append(f"found {found}, wanted {wanted}")


def memory(pid: int) -> dict[str, int]:
    """A process's memory in MB: VmRSS now, VmHWM at its highest."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM")}


def attack(address: str, base_path: pathlib.Path, requests: int, seed: int, threads=4) -> Attack:
    """Sends mutants from several threads at once."""
    attacked = Attack(address, base_path)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        share = -(-requests // threads)
        seeds = range(seed * threads, seed * threads + threads)
        for done in [pool.submit(attacked.run, one, share) for one in seeds]:
            done.result()
    return attacked


def main() -> None:
    parser = argparse.ArgumentParser(description="Sends mutated requests to a server of its own.")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        serving_model.save(pathlib.Path(folder, "7"), 0.0)
        command = [sys.executable, "-m", "pwiser_serving.server", "--port=0", "--model_name=m"]
        with subprocess.Popen(
            [*command, "--model_base_path", folder], stdout=subprocess.PIPE, text=True
        ) as server:
            port = server.stdout.readline().rsplit(":", 1)[1].strip()
            address = f"localhost:{port}"
            attack(address, pathlib.Path(folder), 1000, seed=flags.seed + 1)
            before = memory(server.pid)
            attacked = attack(address, pathlib.Path(folder), flags.requests, flags.seed)
            after = memory(server.pid)
            server.terminate()
    for (method, code), count in sorted(attacked.codes.items()):
        print(f"{method:28}{code:24}{count:8}")
    for path, data, message in attacked.faults[:5]:
        print(f"{path}: {message}\n  {data[:500].hex()}")
    print(
        f"memory, MB: {before['VmRSS']} after a first 1000, {after['VmRSS']} at the end, ", end=""
    )
    print(f"{after['VmHWM']} at its highest; the server's exit code: {server.returncode}")
    for text in attacked.wrong[:5]:
        print("a good request:", text)
    sys.exit(1 if attacked.wrong else 0)


if __name__ == "__main__":
    main()
