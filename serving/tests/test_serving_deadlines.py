"""Deadlines, through the whole server: what nobody waits for ends, and leaves others their turn."""

import contextlib
import http.client
import json
import os

import grpc
import pytest
import tensorflow as tf
from calls import SECONDS, Caller, free_port, named, scores
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from waiting import wait_for


def _save_counting(folder):
    """A model that counts to x before it answers: with 2**30, for hours."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def count(x):
        turns = tf.cast(tf.reduce_max(x), tf.int32)
        _, y = tf.while_loop(lambda i, _: i < turns, lambda i, y: (i + 1, y + 1), [0, x])
        return {"y": y}

    tf.saved_model.save(tf.Module(), str(folder), signatures={"serving_default": count})


ENDLESS = 2.0**30
EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED


def test_calls_that_nobody_waits_for_end_and_leave_others_their_turn(
    models, start_server, tmp_path
):
    _save_counting(tmp_path / "slow" / "1")
    (tmp_path / "m").mkdir()
    os.symlink(models[0.0], tmp_path / "m" / "1")
    (tmp_path / "config").write_text(
        "model_config_list {"
        + "".join(
            f"config {{ name: '{name}' base_path: '{tmp_path}/{name}' "
            "model_platform: 'tensorflow' }"
            for name in ("slow", "m")
        )
        + "}"
    )
    flags = [
        f"--model_config_file={tmp_path}/config",
        "--grpc_max_threads=2",
        "--rest_api_num_threads=2",
        f"--rest_api_port={free_port()}",
        "--rest_api_timeout_in_ms=500",
    ]

    def slow(x=ENDLESS):
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "slow"
        request.inputs["x"].CopyFrom(tf.make_tensor_proto([x]))
        return request

    with start_server(None, *flags) as server:
        rest = server.process.stdout.readline().rsplit(":", 1)[1].strip()

        def post(name, body, seconds=SECONDS):
            connection = http.client.HTTPConnection("localhost", int(rest), timeout=seconds)
            with contextlib.closing(connection):
                connection.request("POST", f"/v1/models/{name}:predict", body)
                response = connection.getresponse()
                return response.status, json.loads(response.read())

        caller = Caller(server.address)
        stub = prediction_service_pb2_grpc.PredictionServiceStub(caller.channel)
        # All of one model's turns are taken, and more of its requests wait: none of the other's.
        waiting = [stub.Predict.future(slow(), timeout=SECONDS) for _ in range(8)]
        assert scores(caller.predict(named("m")))["ctr"].shape == (4,)
        body = '{"inputs": {"brand": ["acme"], "item": [3], "price": [0.5]}, "signature_name": '
        body += '"predict_raw"}'
        assert post("m", body)[0] == 200
        for call in waiting:
            call.cancel()
        # When their callers have gone, its turns are free.
        assert stub.Predict(slow(2.0), timeout=SECONDS).outputs["y"].float_val[:] == [4.0]
        for _ in range(8):
            assert stub.Predict.future(slow(), timeout=0.2).code() is EXCEEDED
        assert stub.Predict(slow(3.0), timeout=SECONDS).outputs["y"].float_val[:] == [6.0]
        # A connection that is closed is a caller that has gone.
        other = grpc.insecure_channel(server.address)
        predict = prediction_service_pb2_grpc.PredictionServiceStub(other).Predict
        # Held, as grpc cancels a call whose future nobody holds.
        waiting = [predict.future(slow()) for _ in range(2)]
        wait_for(lambda: stub.Predict.future(slow(3.0), timeout=0.2).code() is EXCEEDED)
        other.close()
        assert {call.code() for call in waiting} == {grpc.StatusCode.CANCELLED}
        assert stub.Predict(slow(3.0), timeout=SECONDS).outputs["y"].float_val[:] == [6.0]
        # Over REST there is a time for all, and clients that go.
        endless = json.dumps({"instances": [ENDLESS]})
        assert post("slow", endless) == (504, {"error": "Timed out waiting for notification"})
        for _ in range(3):
            with pytest.raises(TimeoutError):
                post("slow", endless, seconds=0.1)
        assert post("slow", '{"instances": [2.0]}') == (200, {"predictions": [4.0]})
        caller.channel.close()
