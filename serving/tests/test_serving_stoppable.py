"""stoppable: a run ends soon after it is stopped, however the model's loop was made, and a run that
is not stopped gives what the graph gives."""

import random
import threading
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from pwiser_serving.server import saved_model
from pwiser_serving.server.calls import Call
from pwiser_serving.server.saved_model import SavedModel
from pwiser_serving.server.status import Status, cancelled
from tensorflow.core.protobuf import config_pb2

# Turns of a loop: hours, if it is not stopped.
ENDLESS = 2**30
SECONDS = 60


def _save(folder, function):
    """Saves a function of x, float [n], as TensorFlow 2 does."""
    spec = tf.TensorSpec([None], tf.float32, "x")
    tf.saved_model.save(
        tf.Module(),
        str(folder),
        signatures=tf.function(function, input_signature=[spec]),
    )


def _count(x):
    """Adds 1 as often as x says, at most."""
    turns = tf.cast(tf.reduce_max(x), tf.int32)
    _, total = tf.while_loop(lambda i, _: i < turns, lambda i, y: (i + 1, y + 1), [0, x])
    return {"y": total, "twice": 2 * total}


@tf.function(autograph=False, experimental_attributes={"_noinline": True})
def _not_expanded(x):
    return _count(x)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with a loop, by how it was made."""
    folders = {name: tmp_path_factory.mktemp(name) / "1" for name in ("v2", "call", "v1")}
    _save(folders["v2"], _count)
    _save(folders["call"], lambda x: _not_expanded(x))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [None])
        tf.compat.v1.disable_control_flow_v2()
        outputs = _count(x)
        tf.compat.v1.enable_control_flow_v2()
        tf.compat.v1.saved_model.simple_save(session, str(folders["v1"]), {"x": x}, outputs)
    return folders


@pytest.mark.parametrize("kind", ["v2", "call", "v1"])
def test_a_loop_ends_when_it_is_stopped(folders, kind):
    model = SavedModel(folders[kind])
    for _ in range(3):
        call = Call()
        threading.Timer(0.2, call.end, [cancelled("gone")]).start()
        start = time.monotonic()
        with pytest.raises(Status, match="gone") as caught:
            model.predict("serving_default", {"x": np.array([ENDLESS], np.float32)}, (), call)
        assert caught.value.code is grpc.StatusCode.CANCELLED
        # Not by itself.
        assert time.monotonic() - start < SECONDS
        # The same model, and what is left of the run in the session, serve the next one.
        found = model.predict("serving_default", {"x": np.array([3.0, 1.0], np.float32)})
        assert found["y"].tolist() == [6.0, 4.0]
    model.close()


def test_runs_that_are_stopped_at_any_moment_disturb_no_others(folders):
    model = SavedModel(folders["v2"])
    answered, stopped, wrong = [], [], []

    def ask(seed):
        draw = random.Random(seed)
        for turn in range(300):
            call, value = Call(), float(turn % 7)
            ending = None
            if draw.random() < 0.5:
                ending = threading.Timer(draw.random() * 2e-3, call.end, [cancelled("gone")])
                ending.start()
            try:
                found = model.predict("serving_default", {"x": np.array([value], "f4")}, (), call)
                answered.append(value)
                if found["y"].tolist() != [2 * value]:
                    wrong.append(found)
            except Status as status:
                stopped.append(turn)
                if status.message != "gone":
                    wrong.append(status)
            if ending:
                ending.join()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(answered) + len(stopped) == 4 * 300
    assert answered
    assert stopped
    model.close()


def test_an_op_that_fails_within_a_call_gives_its_own_reason(tmp_path):
    @tf.function(experimental_attributes={"_noinline": True})
    def positive(x):
        with tf.control_dependencies([tf.debugging.assert_positive(x, "too small")]):
            return tf.identity(x)

    for name, function in (("call", positive), ("plain", positive.python_function)):
        _save(tmp_path / name, lambda x, function=function: {"y": function(x)})
        model = SavedModel(tmp_path / name)
        for _ in range(2):
            with pytest.raises(Status, match="too small") as caught:
                model.predict("serving_default", {"x": np.array([-1.0], np.float32)})
            assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        found = model.predict("serving_default", {"x": np.array([2.0], np.float32)})
        assert found["y"].tolist() == [2.0]
        model.close()


def test_a_model_without_inputs_and_one_that_gives_its_input_back(tmp_path):
    same = tf.function(lambda x: {"x": x}, input_signature=[tf.TensorSpec([None], tf.int64, "x")])
    nothing = tf.function(lambda: {"y": tf.constant([1.5])}, input_signature=[])
    tf.saved_model.save(
        tf.Module(), str(tmp_path / "1"), signatures={"same": same, "nothing": nothing}
    )
    model = SavedModel(tmp_path / "1")
    assert model.predict("nothing", {})["y"].tolist() == [1.5]
    assert model.predict("same", {"x": np.array([4, 5])})["x"].tolist() == [4, 5]
    model.close()


def test_a_variable_of_tensorflow_1_is_an_output(tmp_path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [])
        variable = tf.compat.v1.Variable(1.0, use_resource=False)
        outputs = {"sum": tf.compat.v1.assign_add(variable, x)}
        session.run(variable.initializer)
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "1"), {"x": x}, outputs)
    model = SavedModel(tmp_path / "1")
    sums = [
        model.predict("serving_default", {"x": np.array(2.0, np.float32)})["sum"] for _ in range(2)
    ]
    assert [float(value) for value in sums] == [3.0, 5.0]
    model.close()


def test_requests_may_name_any_outputs_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "_PARTS", 3)
    _save(tmp_path / "1", lambda x: {f"y{n}": x + n for n in range(4)})
    model = SavedModel(tmp_path / "1")
    x = {"x": np.array([1.0], np.float32)}
    for wanted in ((), ("y0",), ("y1",), ("y2",), ("y3", "y1"), ("y0", "y2", "y3")):
        found = model.predict("serving_default", x, wanted)
        names = wanted or ("y0", "y1", "y2", "y3")
        assert {name: value.tolist() for name, value in found.items()} == {
            name: [1.0 + int(name[1])] for name in names
        }
    # The three that came first, of which one has all outputs.
    assert len(model._parts) == 3
    model.close()


def test_the_session_is_as_the_options_say(tmp_path):
    _save(tmp_path / "1", lambda x: {"y": x})
    session = config_pb2.ConfigProto(intra_op_parallelism_threads=1)
    model = SavedModel(tmp_path / "1", options=saved_model.LoadOptions(session=session))
    assert model._session._session._config.intra_op_parallelism_threads == 1
    model.close()
    with pytest.raises(Status, match=r"matching supplied tags: \{ gpu serve \}") as caught:
        SavedModel(tmp_path / "1", options=saved_model.LoadOptions(tags=("serve", "gpu")))
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
