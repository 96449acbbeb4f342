"""server: one process through its life: versions, faults, floods, certificates, its end."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading

import grpc
import pytest
import serving_model
from calls import (
    NOT_FOUND,
    PRECONDITION,
    ROWS,
    SECONDS,
    Caller,
    free_port,
    id_request,
    named,
    raw_request,
    refused,
    scores,
    status_request,
)
from fake_server import INTERRUPTIBLE

pytest.importorskip("tensorflow_serving.apis.prediction_service_pb2_grpc")

import tensorflow as tf
import trustme
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pwiser_serving.server import __main__ as command
from pwiser_serving.server import config_pb2, service
from pwiser_serving.server.calls import Turns
from pwiser_serving.server.models import Models
from pwiser_serving.server.monitoring import Monitoring
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2
from waiting import wait_for

pytestmark = pytest.mark.slow


def _warm_up(folder: pathlib.Path, *requests) -> None:
    (folder / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(folder / "assets.extra/tf_serving_warmup_requests")) as writer:
        for request in requests:
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.CopyFrom(request)
            writer.write(log.SerializeToString())


def test_versions_come_go_and_break_while_serving(models, start_server, tmp_path):
    """One server through its life: no version yet, first, newer, broken, mended, rolled back."""
    base_path = tmp_path / "base"
    base_path.mkdir()
    wanted = {b: serving_model.expected(*ROWS[0], bias=b)["ctr"] for b in (0.0, 1.0)}
    with start_server(base_path, "--enable_serialization_as_tensor_content", wait=False) as server:
        server.wait_for_log("holds no version that loads yet; waiting")
        shutil.copytree(models[0.0], tmp_path / "aside")
        _warm_up(tmp_path / "aside", raw_request(), id_request())
        (tmp_path / "aside").rename(base_path / "1")
        server.wait_until_ready()
        assert server.version == 1
        caller = Caller(server.address)

        def answer():
            response = caller.predict(raw_request())
            assert response.outputs["ctr"].tensor_content
            return response.model_spec.version.value, scores(response)["ctr"][0]

        assert answer() == (1, pytest.approx(wanted[0.0], rel=1e-6))

        # Requests run all the while; none may fail, and versions only ever go up.
        seen, stop = [], threading.Event()

        def ask():
            while not stop.is_set():
                seen.append(answer())

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        os.symlink(models[1.0], base_path / "00002")
        server.wait_for_log("m version 1 is closed")
        wait_for(lambda: seen[-1][0] == 2)
        stop.set()
        for thread in threads:
            thread.join()
        assert answer() == (2, pytest.approx(wanted[1.0], rel=1e-6))
        assert {version for version, _ in seen} == {1, 2}
        for version, ctr in seen:
            assert ctr == pytest.approx(wanted[version - 1.0], rel=1e-6)

        # Broken in three ways: no model, a model cut short, warm-up requests that fail.
        (base_path / "3").mkdir()
        server.wait_for_log("m version 3 does not load")
        (tmp_path / "cut").mkdir()
        data = (models[0.0] / "saved_model.pb").read_bytes()
        (tmp_path / "cut/saved_model.pb").write_bytes(data[: len(data) // 2])
        (tmp_path / "cut").rename(base_path / "4")
        server.wait_for_log("m version 4 does not load")
        shutil.copytree(models[0.0], tmp_path / "cold")
        _warm_up(tmp_path / "cold", raw_request(price=None))
        (tmp_path / "cold").rename(base_path / "5")
        server.wait_for_log("m version 5 does not load: input size does not match signature")
        assert answer()[0] == 2
        State = get_model_status_pb2.ModelVersionStatus
        states = caller.status(status_request()).model_version_status
        assert [(entry.version, entry.state) for entry in states] == [
            (5, State.END),
            (4, State.END),
            (3, State.END),
            (2, State.AVAILABLE),
            (1, State.END),
        ]
        assert [entry.status.error_code != 0 for entry in states] == [True] * 3 + [False] * 2

        # Mended in place: its files have changed, so it is tried again.
        shutil.rmtree(base_path / "5" / "assets.extra")
        server.wait_for_log("m version 5 is served now")
        assert answer() == (5, pytest.approx(wanted[0.0], rel=1e-6))
        # Rolled back by removing it.
        (base_path / "5").rename(tmp_path / "removed")
        server.wait_for_log("m version 5 is closed")
        assert answer()[0] == 2
        # A folder that disappears leaves what is in memory.
        base_path.rename(tmp_path / "gone")
        server.wait_for_log("No such file or directory")
        assert answer()[0] == 2
        caller.channel.close()
        assert server.stop() == 0
        assert "Traceback" not in server.log


def _run(*flags, seconds=60):
    return subprocess.run(
        [sys.executable, "-m", "pwiser_serving.server", *flags],
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def test_a_wrong_flag_is_one_line(tmp_path):
    for flags, told in (
        ([], "expected --model_base_path or --model_config_file"),
        (["--model_base_path", str(tmp_path / "none")], "is not a folder"),
        (["--model_base_path", str(tmp_path), "--port=70000"], "found 70000, expected 0 to 65535"),
        (["--model_base_path", str(tmp_path), "--port=x"], "invalid int value: 'x'"),
        (["--model_base_path", str(tmp_path), "--prot=1"], "--prot=1"),
        (["--model_base_path", "\udcff"], "--model_base_path: found '\\udcff', which is not UTF-8"),
        (
            ["--model_base_path", str(tmp_path), "--file_system_poll_wait_seconds=inf"],
            "found inf, expected at most 1000000000",
        ),
    ):
        done = _run(*flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_socket_beside_the_port_or_instead_of_it(models, start_server, tmp_path):
    (tmp_path / "base").mkdir()
    os.symlink(models[0.0], tmp_path / "base" / "7")
    path = tmp_path / "socket"
    flags = [
        f"--port={free_port()}",
        f"--grpc_socket_path={path}",
        "--grpc_channel_arguments=grpc.max_receive_message_length=500",
    ]
    with start_server(tmp_path / "base", *flags, wait=False) as server:
        line = server.process.stdout.readline()
        assert line.endswith(f"on 0.0.0.0:{flags[0][7:]} and unix:{path}\n"), server.log
        for address in (f"localhost:{flags[0][7:]}", f"unix:{path}"):
            caller = Caller(address)
            assert caller.predict(named()).model_spec.version.value == 7
            # gRPC's own argument goes before ours.
            large = raw_request(rows=[("a" * 500, 3, 0.5)])
            assert refused(caller.predict, large)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            caller.channel.close()
    with start_server(tmp_path / "base", f"--grpc_socket_path={path}", wait=False) as server:
        assert server.process.stdout.readline().endswith(f"version 7 on unix:{path}\n")
    done = _run("--model_base_path", str(tmp_path), f"--grpc_socket_path={tmp_path}/none/socket")
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"--grpc_socket_path: {tmp_path}/none/socket is in use, or may not be used\n"
    )


def test_it_may_serve_what_loads(models, start_server, tmp_path):
    for name in ("good", "broken", "absent"):
        if name != "absent":
            (tmp_path / name / "1").mkdir(parents=True)
    shutil.rmtree(tmp_path / "good" / "1")
    os.symlink(models[0.0], tmp_path / "good" / "1")
    (tmp_path / "config").write_text(
        "model_config_list {"
        + "".join(
            f"config {{ name: '{name}' base_path: '{tmp_path}/{name}' "
            "model_platform: 'tensorflow' }"
            for name in ("absent", "broken", "good")
        )
        + "}"
    )
    flags = [f"--model_config_file={tmp_path}/config", "--serve_what_loads"]
    with start_server(None, *flags) as server:
        assert server.line.startswith("pwiser_serving: serving good version 1 on ")
        caller = Caller(server.address)
        assert caller.predict(named("good")).model_spec.version.value == 1
        (status,) = caller.status(status_request("broken")).model_version_status
        assert status.status.error_message.startswith("Could not find SavedModel .pb or .pbtxt")
        server.wait_for_log(f"{tmp_path}/broken holds no version that loads")
        server.wait_for_log(f"{tmp_path}/absent: No such file or directory")
        # They follow, and a new version of the good one does not wait for them.
        os.symlink(models[1.0], tmp_path / "good" / "2")
        wait_for(lambda: caller.predict(named("good")).model_spec.version.value == 2)
        (tmp_path / "absent").mkdir()
        os.symlink(models[0.0], tmp_path / "absent" / "4")
        server.wait_for_log("absent version 4 is served now")
        assert caller.predict(named("absent")).model_spec.version.value == 4
        assert refused(caller.predict, named("broken"))[0] is NOT_FOUND
        caller.channel.close()


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _run("--model_base_path", str(tmp_path), f"--port={port}")
    assert done.returncode == 2
    assert done.stderr == f"error: --port: {port} is in use, or may not be used\n"


SLOW_SERVER = """
import sys, time, types
import numpy as np
from pwiser_serving.server import __main__ as server

class Slow:
    signatures = {}
    def __init__(self, folder, monitoring, options): pass
    def close(self): print("closed", flush=True)
    def predict(self, name, inputs, output_filter, call):
        if name == "fault":
            raise KeyError("a fault\\nin two lines")
        print("running", flush=True)
        time.sleep({"short": 0.5, "long": 600}[name])
        print("answered", flush=True)
        return {"ctr": np.zeros(1, np.float32)}

sys.modules["pwiser_serving.server.saved_model"] = types.SimpleNamespace(
    SavedModel=Slow, LoadOptions=dict, DEFAULT_SIGNATURE="serving_default")
from pwiser_serving.server import quiet
with quiet.libraries():
    from pwiser_serving.server import service
service._MAX_REQUESTS = 2
server.main(sys.argv[1:])
"""


def test_a_request_whose_bytes_do_not_come_keeps_nobody_waiting():
    stop, looked = threading.Event(), threading.Event()

    class Waiting(Models):
        def reload(self, config):
            looked.set()
            assert stop.wait(SECONDS)

    answering = service.Service(Waiting(load=None), Monitoring(), Turns(1))
    server = service.grpc_server(answering, max_message_bytes=2**20)
    port = server.add_insecure_port("localhost:0")
    server.start()

    def nothing():
        assert stop.wait(SECONDS)
        yield from ()

    caller = Caller(f"localhost:{port}")
    method = caller.channel.stream_unary("/tensorflow.serving.PredictionService/Predict")
    calls = [method.future(nothing(), timeout=SECONDS) for _ in range(9)]
    # Nor does a reload, which may last as long as a load.
    reload = threading.Thread(
        target=caller.reload, args=[model_management_pb2.ReloadConfigRequest()]
    )
    reload.start()
    assert looked.wait(SECONDS)
    assert refused(caller.predict, named())[0] is NOT_FOUND
    stop.set()
    assert {call.code() for call in calls} == {grpc.StatusCode.UNIMPLEMENTED}
    reload.join()
    caller.channel.close()
    server.stop(None).wait()


@contextlib.contextmanager
def _slow_server(base_path, *flags):
    """A server of a model that takes its time, and a function that asks it."""
    (base_path / "1").mkdir()
    flags = ["--port=0", "--model_name=m", "--model_base_path", str(base_path), *flags]
    with subprocess.Popen(
        [*INTERRUPTIBLE, sys.executable, "-c", SLOW_SERVER, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            port = process.stdout.readline().rsplit(":", 1)[1].strip()
            with grpc.insecure_channel(f"localhost:{port}") as channel:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
                yield (
                    process,
                    lambda name: stub.Predict.future(named(signature=name), timeout=SECONDS),
                )
        finally:
            process.kill()


def test_faults_floods_and_the_end(tmp_path):
    with _slow_server(tmp_path, "--grpc_max_threads=1") as (process, ask):
        fault = ask("fault").exception()
        assert fault.code() is grpc.StatusCode.INTERNAL
        assert fault.details() == "KeyError: 'a fault\\nin two lines'"
        # One runs, one waits for its thread, one is too many.
        first = ask("short")
        assert process.stdout.readline() == "running\n"
        second, third = ask("short"), ask("short")
        answers = sorted(str(call.code()) for call in (second, third))
        assert answers == ["StatusCode.OK", "StatusCode.RESOURCE_EXHAUSTED"]
        assert first.code() is grpc.StatusCode.OK
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines == ["answered\n", "running\n", "answered\n"]
        # Whose caller has gone before its turn is not run. It has come when one is too many.
        first = ask("short")
        assert process.stdout.readline() == "running\n"
        waiting = {ask("short"), ask("short")}
        too_many = wait_for(lambda: {call for call in waiting if call.done()})
        (gone,) = waiting - too_many
        gone.cancel()
        assert first.code() is grpc.StatusCode.OK
        assert process.stdout.readline() == "answered\n"
        # What runs when it is told to end is answered.
        last = ask("short")
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        assert list(last.result().outputs) == ["ctr"]
        out, log = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "answered\nclosed\n")
    records = [json.loads(line) for line in log.splitlines()]
    assert [record["event"] for record in records] == ["served", "fault", "stopping", "closed"]
    assert [record["level"] for record in records] == ["INFO", "ERROR", "INFO", "INFO"]
    assert (records[0]["model"], records[0]["version"]) == ("m", 1)
    assert records[1]["method"] == "Predict"
    assert records[1]["traceback"].startswith("Traceback")
    assert "KeyError" in records[1]["traceback"]


def test_a_second_signal_ends_it_at_once(tmp_path):
    with _slow_server(tmp_path) as (process, ask):
        call = ask("long")
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        assert '"event": "served"' in process.stderr.readline()
        assert '"event": "stopping"' in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_nobody_needs_to_read_what_it_says(tmp_path):
    (tmp_path / "1").mkdir()
    with socket.socket() as free:
        free.bind(("0.0.0.0", 0))
        port = free.getsockname()[1]
    unread, stderr = os.pipe()
    os.set_blocking(stderr, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(stderr, b"x" * 4096)
    os.set_blocking(stderr, True)
    flags = [f"--port={port}", "--model_name=m", f"--model_base_path={tmp_path}"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER, *flags], stderr=stderr, preexec_fn=lambda: os.close(1)
    ) as process:
        try:
            channel = grpc.insecure_channel(f"localhost:{port}")
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            for _ in range(3):
                call = stub.Predict.future(
                    named(signature="fault"), timeout=SECONDS, wait_for_ready=True
                )
                assert call.code() is grpc.StatusCode.INTERNAL
            channel.close()
            process.terminate()
            assert process.wait(timeout=SECONDS) == 0
        finally:
            process.kill()
            os.close(unread)
            os.close(stderr)


def test_closed_standard_files_go_nowhere_and_many_files_may_be_open():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; os.close(0); os.close(2)\n"
            "from pwiser_serving.server import __main__ as server\n"
            "try: server.main(['--port=x'])\n"
            "finally: print(*(os.readlink(f'/proc/self/fd/{n}') for n in (0, 2)),"
            " server.resource.getrlimit(server.resource.RLIMIT_NOFILE), flush=True)",
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128)),
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout) == (2, "/dev/null /dev/null (128, 128)\n")


@pytest.mark.usefixtures("signals")
def test_a_signal_does_not_wait_for_the_thread_that_it_interrupts():
    stop = command._stop_event()
    # As in the middle of stop.wait().
    with stop._cond:
        signal.raise_signal(signal.SIGTERM)
    assert stop.wait(SECONDS)


def _model_config(**base_paths: str) -> model_server_config_pb2.ModelServerConfig:
    """Models by their names, all of whose versions are served."""
    config = model_server_config_pb2.ModelServerConfig()
    config.model_config_list.SetInParent()
    for name, base_path in base_paths.items():
        entry = config.model_config_list.config.add(
            name=name, base_path=str(base_path), model_platform="tensorflow"
        )
        entry.model_version_policy.all.SetInParent()
    return config


def test_models_labels_reloads_and_health(models, start_server, tmp_path):
    """One server of a configuration file, to the end."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    os.symlink(models[0.0], tmp_path / "a/1")
    os.symlink(models[1.0], tmp_path / "a/2")
    os.symlink(models[1.0], tmp_path / "b/1")
    config = _model_config(a=tmp_path / "a", b=tmp_path / "b")
    config.model_config_list.config[0].version_labels["stable"] = 1
    file = tmp_path / "models.config"
    file.write_text(text_format.MessageToString(config))
    flags = [f"--model_config_file={file}", "--model_config_file_poll_wait_seconds=0.1"]
    done = _run(*flags, "--port=0")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --model_config_file: Request to assign label to version 1 of model a, which is "
        "not currently available for inference\n",
    )
    flags += ["--allow_version_labels_for_unavailable_models", "--enable_grpc_healthcheck_service"]
    with start_server(None, *flags) as server:
        assert server.line.startswith("pwiser_serving: serving a version 2, b version 1 on ")
        caller = Caller(server.address)
        wanted = {b: serving_model.expected(*ROWS[0], bias=b)["ctr"] for b in (0.0, 1.0)}

        def answer(name, version=None, label=None):
            response = caller.predict(named(name, version, label))
            return response.model_spec.version.value, scores(response)["ctr"][0]

        assert answer("a") == (2, pytest.approx(wanted[1.0], rel=1e-6))
        assert answer("a", label="stable") == (1, pytest.approx(wanted[0.0], rel=1e-6))
        assert answer("a", version=1)[0] == 1
        assert answer("b") == (1, pytest.approx(wanted[1.0], rel=1e-6))
        both = caller.status(status_request("a")).model_version_status
        assert [status.version for status in both] == [2, 1]

        # The label moves by request; the file has not changed, so that it comes back by itself.
        manage = model_service_pb2_grpc.ModelServiceStub(caller.channel)
        request = model_management_pb2.ReloadConfigRequest(config=config)
        request.config.model_config_list.config[0].version_labels["stable"] = 2
        response = manage.HandleReloadConfigRequest(request, timeout=SECONDS)
        assert (response.HasField("status"), response.status.error_code) == (True, 0)
        wait_for(lambda: answer("a", label="stable")[0] == 1)
        request.config.model_config_list.config[0].version_labels["stable"] = 3
        assert refused(manage.HandleReloadConfigRequest, request) == (
            PRECONDITION,
            "Request to assign label to version 3 of model a, which is not currently available "
            "for inference",
        )
        # A file that is wrong changes nothing, and is told once, however often it is read.
        file.write_text("model_config_list { config { nome: 'a' } }")
        server.wait_for_log("has no field named")
        assert answer("b")[0] == 1

        # Health, by every name that TF Serving gives it, and watched until the end.
        health = health_pb2_grpc.HealthStub(caller.channel)
        SERVING = health_pb2.HealthCheckResponse.SERVING
        for name in ("", "ModelService", "PredictionService"):
            asked = health_pb2.HealthCheckRequest(service=name)
            assert health.Check(asked, timeout=SECONDS).status == SERVING
        asked = health_pb2.HealthCheckRequest(service="x")
        assert refused(health.Check, asked)[0] is NOT_FOUND
        # Watchers come and go, of whom some ask for what is not there.
        for number in range(1000):
            asked = health_pb2.HealthCheckRequest(service="x" * (number % 2))
            watch = health.Watch(asked, timeout=SECONDS)
            assert next(watch).status in (SERVING, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            watch.cancel()
        # The file was read meanwhile. One that is right is followed.
        assert server.log.count("has no field named") == 1
        file.write_text(text_format.MessageToString(_model_config(b=tmp_path / "b")))
        server.wait_for_log("a version 2 is closed")
        assert refused(caller.predict, named("a"))[0] is NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(watch).status == SERVING
        server.process.send_signal(signal.SIGTERM)
        # A watcher is told, and does not keep the server from ending.
        assert [update.status for update in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        assert server.process.wait(SECONDS) == 0
        caller.channel.close()
        # TensorFlow 2.18 adds two lines of its own.
        records = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        assert [record["level"] for record in records].count("ERROR") == 2


def _pem(*blobs) -> bytes:
    return b"".join(blob.bytes() for blob in blobs)


def test_only_a_client_with_the_right_certificate_gets_anything(models, start_server, tmp_path):
    ours, theirs = trustme.CA(), trustme.CA()
    issued = ours.issue_cert("localhost")
    config = config_pb2.SSLConfig(
        server_key=_pem(issued.private_key_pem),
        server_cert=_pem(*issued.cert_chain_pems),
        custom_ca=_pem(ours.cert_pem),
        client_verify=True,
    )
    file = tmp_path / "ssl.config"
    file.write_text(text_format.MessageToString(config))
    base_path = tmp_path / "base"
    base_path.mkdir()
    os.symlink(models[0.0], base_path / "1")

    def answer(credentials=None):
        """The code of one call, with the client's key and certificate where it has one."""
        channel = (
            grpc.secure_channel(server.address, credentials)
            if credentials
            else grpc.insecure_channel(server.address)
        )
        with channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            return stub.Predict.future(raw_request(), timeout=SECONDS).code()

    def client(authority, certificate=None):
        pair = (None, None)
        if certificate:
            pair = _pem(certificate.private_key_pem), _pem(*certificate.cert_chain_pems)
        return grpc.ssl_channel_credentials(_pem(authority.cert_pem), *pair)

    good = client(ours, ours.issue_cert("client"))
    OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
    with start_server(base_path, f"--ssl_config_file={file}") as server:
        assert answer(good) is OK
        # None, another authority's, a server that is not trusted, and no TLS at all.
        assert answer(client(ours)) is UNAVAILABLE
        assert answer(client(ours, theirs.issue_cert("client"))) is UNAVAILABLE
        assert answer(client(theirs, ours.issue_cert("client"))) is UNAVAILABLE
        assert answer() is UNAVAILABLE
        assert answer(good) is OK
        assert server.stop() == 0
    # Without client_verify anybody is answered, over TLS. (And by a version whose warm-up fails.)
    config.client_verify = False
    file.write_text(text_format.MessageToString(config))
    (base_path / "1").unlink()
    shutil.copytree(models[0.0], base_path / "1")
    _warm_up(base_path / "1", raw_request(price=None))
    flags = [f"--ssl_config_file={file}", "--enable_model_warmup=false"]
    with start_server(base_path, *flags) as server:
        assert answer(client(ours)) is OK
        assert answer() is UNAVAILABLE


@pytest.fixture
def signals():
    """main takes the signals; here they are given back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_wrong_configuration_is_one_line(tmp_path, capsys):
    (tmp_path / "text").write_text("model_config_list { config { name: 'm' base_path: '/m' } }")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").touch()
    (tmp_path / "ssl").write_text("server_key: 'key' server_cert: 'certificate'")
    (tmp_path / "client").write_text("server_key: 'k' server_cert: 'c' client_verify: true")
    (tmp_path / "relative").write_text(
        "model_config_list { config { name: 'm' base_path: 'm' model_platform: 'tensorflow' } }"
    )
    (tmp_path / "away").write_text(
        "model_config_list { config { name: 'm' base_path: '/none' model_platform: 'tensorflow' } }"
    )
    models, ssl = "--model_config_file={}", "--ssl_config_file={}"
    for flag, name, told in (
        (models, "none", "No such file or directory"),
        (models, "bytes", "codec can't decode"),
        (models, "empty", "ServerModelConfig type not supported"),
        (models, "text", "Illegal setting neither"),
        (models, "ssl", "Error parsing text-format tensorflow.serving.ModelServerConfig: 1:"),
        (models, "relative", "to have an absolute path"),
        (models, "away", "model m: /none is not a folder"),
        (ssl, "none", "No such file or directory"),
        (ssl, "text", "has no field named"),
        (ssl, "client", "custom_ca is missing"),
        (ssl, "ssl", "not PEM texts that fit"),
    ):
        flags = [flag.format(tmp_path / name), "--port=0"]
        flags += [] if flag is models else ["--model_base_path", str(tmp_path)]
        with pytest.raises(SystemExit) as caught:
            command.main(flags)
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, ""), name
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, name
        assert told in lines[0]
        assert "Traceback" not in err
