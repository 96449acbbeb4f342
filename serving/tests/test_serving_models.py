"""models: configurations, policies, labels and reloads, with servables that only take notes."""

import threading
from concurrent import futures

import grpc
import pytest
from google.protobuf import text_format
from notes import Note
from pwiser_serving.server import versions as versions_module
from pwiser_serving.server.models import Models, single_model
from pwiser_serving.server.status import Status
from pwiser_serving.server.versions import Retries
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus as State
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig
from waiting import wait_for

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION, UNKNOWN = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNKNOWN


@pytest.fixture
def models():
    models = Models(Note)
    yield models
    models.close()


def _add(base_path, *names, broken=False):
    for name in names:
        (base_path / name).mkdir(parents=True)
        if broken:
            (base_path / name / "broken").touch()


def _config(*entries: str) -> ModelServerConfig:
    """From the text of each model; the platform goes without saying."""
    text = "".join(f"config {{ {entry} model_platform: 'tensorflow' }}" for entry in entries)
    return text_format.Parse(f"model_config_list {{ {text} }}", ModelServerConfig())


def _served(models, name, version=None, label=None):
    """The version that a request gets."""
    with models.use(name, version, label) as (number, servable):
        assert not servable.closed
        return number


def _refused(call, *arguments):
    with pytest.raises(Status) as caught:
        call(*arguments)
    return caught.value.code, caught.value.message


def test_several_models_each_with_its_policy(models, tmp_path):
    _add(tmp_path / "a", "1", "2", "3")
    _add(tmp_path / "b", "1", "2", "3")
    _add(tmp_path / "c", "1", "2", "3")
    _add(tmp_path / "d", "7", "8")
    models.reload(
        _config(
            f"name: 'newest' base_path: '{tmp_path}/a'",
            f"name: 'two' base_path: '{tmp_path}/b' "
            "model_version_policy { latest { num_versions: 2 } }",
            f"name: 'some' base_path: '{tmp_path}/c' "
            "model_version_policy { specific { versions: 1 versions: 3 versions: 9 } }",
            f"name: 'all' base_path: '{tmp_path}/d' model_version_policy {{ all {{}} }}",
        )
    )
    available = {model.name: model.available for model in models.all()}
    assert available == {"newest": [3], "two": [3, 2], "some": [3, 1], "all": [8, 7]}
    assert _served(models, "two") == 3
    assert _served(models, "two", 2) == 2
    assert _refused(_served, models, "two", 1) == (
        NOT_FOUND,
        "Servable not found for request: Specific(two, 1)",
    )
    assert _refused(_served, models, "none") == (
        NOT_FOUND,
        "Servable not found for request: Latest(none)",
    )
    assert _refused(_served, models, "") == (INVALID, "ModelSpec has no name specified.")


def test_a_broken_version_counts_for_nothing_with_any_policy(models, tmp_path):
    _add(tmp_path, "1", "2")
    _add(tmp_path, "3", broken=True)
    config = f"name: 'm' base_path: '{tmp_path}' "
    models.reload(_config(config + "model_version_policy { latest { num_versions: 2 } }"))
    assert models.all()[0].available == [2, 1]
    # Only the broken one is wanted: what is in service stays.
    models.reload(_config(config + "model_version_policy { specific { versions: 3 } }"))
    assert models.all()[0].available == [2, 1]
    models.reload(_config(config + "model_version_policy { specific { versions: 1 } }"))
    assert models.all()[0].available == [1]
    states = {status.version: status.state for status in models.statuses("m")}
    assert states == {1: State.AVAILABLE, 2: State.END, 3: State.END}
    assert models.statuses("m", 3)[0].status.error_message == "3 is broken"


def test_labels(models, tmp_path):
    _add(tmp_path, "1", "2", "3")
    config = (
        f"name: 'm' base_path: '{tmp_path}' "
        "model_version_policy { specific { versions: 1 versions: 2 } } "
    )
    stable = "version_labels { key: 'stable' value: 1 }"
    canary = "version_labels { key: 'canary' value: 2 }"
    not_available = (
        PRECONDITION,
        "Request to assign label to version 1 of model m, which is not currently available for "
        "inference",
    )
    # Nothing is loaded yet, and nothing comes of it.
    assert _refused(models.reload, _config(config + stable)) == not_available
    assert models.all() == []
    models.reload(_config(config))
    assert _refused(_served, models, "m", None, "stable") == (
        INVALID,
        "Unrecognized servable version label: stable",
    )
    models.reload(_config(config + stable + canary))
    assert _served(models, "m", label="stable") == 1
    assert _served(models, "m", label="canary") == 2
    assert _served(models, "m") == 2
    # A label of another model is none of this one's, and an unknown model's is no label.
    assert _refused(_served, models, "n", None, "stable")[0] is INVALID
    # Version 3 is there but not loaded: the labels stay as they were.
    moved = stable.replace("1", "3")
    code, message = _refused(models.reload, _config(config + moved + canary))
    assert (code, "version 3 of model m" in message) == (PRECONDITION, True)
    assert _served(models, "m", label="stable") == 1
    # Promoted, as the README says: both labels on the new version, then the old one goes.
    models.reload(_config(config + stable.replace("1", "2") + canary))
    assert _served(models, "m", label="stable") == 2
    models.reload(_config(config))
    assert _refused(_served, models, "m", None, "stable")[0] is INVALID


def test_a_new_label_may_wait_for_its_version_where_that_is_allowed(tmp_path):
    models = Models(Note, allow_labels_for_unavailable=True)
    _add(tmp_path, "1")
    config = f"name: 'm' base_path: '{tmp_path}' model_version_policy {{ all {{}} }} "
    models.reload(_config(config + "version_labels { key: 'canary' value: 2 }"))
    assert _refused(_served, models, "m", None, "canary") == (
        NOT_FOUND,
        "Servable not found for request: Specific(m, 2)",
    )
    _add(tmp_path, "2")
    [look] = models.poll()
    look.result()
    assert _served(models, "m", label="canary") == 2
    # A label that is in use does not move to a version that is not there.
    moved = _config(config + "version_labels { key: 'canary' value: 3 }")
    assert _refused(models.reload, moved)[0] is PRECONDITION
    assert _served(models, "m", label="canary") == 2
    models.close()


def test_configurations_that_are_refused_change_nothing(models, tmp_path):
    _add(tmp_path / "m", "1")
    good = f"name: 'm' base_path: '{tmp_path}/m'"
    models.reload(_config(good))
    custom = ModelServerConfig()
    custom.custom_model_config.SetInParent()
    kind = (
        INVALID,
        "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList "
        "is currently supported",
    )
    assert _refused(models.reload, ModelServerConfig()) == kind
    assert _refused(models.reload, custom) == kind
    new = f"name: 'n' base_path: '{tmp_path}/m'"
    relative = "name: 'r' base_path: 'models/r'"
    assert _refused(models.reload, _config(new, relative)) == (
        INVALID,
        "Expected model r to have an absolute path or URI; got base_path()=models/r",
    )
    # Duplicates are told before relative paths, and both before labels.
    label = "version_labels { key: 'x' value: 9 }"
    assert _refused(models.reload, _config(good + label, relative, good)) == (
        INVALID,
        "Illegal to list model m multiple times in config list",
    )
    none = _config(new)
    none.model_config_list.config[0].model_platform = ""
    assert _refused(models.reload, none) == (
        INVALID,
        "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
        "ModelServerConfig::model_platform, model name is n",
    )
    for entry, told in (
        (new, "Model n requests unsupported platform torch"),
        (
            good,
            "Illegal to change a model's platform. For model m platform was tensorflow and new "
            "platform requested is torch",
        ),
    ):
        other = _config(entry)
        other.model_config_list.config[0].model_platform = "torch"
        assert _refused(models.reload, other) == (INVALID, told)
    # A new model's platform is looked at last.
    other = _config(good + label, new)
    other.model_config_list.config[1].model_platform = "torch"
    assert _refused(models.reload, other)[0] is PRECONDITION
    old = _config(new)
    old.model_config_list.config[0].model_platform = ""
    old.model_config_list.config[0].model_type = 2
    assert _refused(models.reload, old) == (
        INVALID,
        "ModelServerConfig::model_type choice 2 not supported.",
    )
    for text, told in (
        ("base_path: 'gs://bucket/n'", "reads only folders of its machine"),
        ("base_path: '/n' logging_config { }", "does not log requests"),
    ):
        code, message = _refused(models.reload, _config(good, f"name: 'n' {text}"))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert message.startswith("Model n has ")
        assert message.endswith(told)
    assert [model.name for model in models.all()] == ["m"]
    assert _served(models, "m") == 1
    old.model_config_list.config[0].model_type = 1
    models.reload(old)
    assert _served(models, "n") == 1


def test_a_model_that_is_no_longer_listed_goes_after_its_last_request(models, tmp_path):
    _add(tmp_path / "a", "1")
    _add(tmp_path / "b", "1")
    a, b = (f"name: '{name}' base_path: '{tmp_path}/{name}'" for name in "ab")
    models.reload(_config(a, b))
    with models.use("a") as (_, servable):
        models.reload(_config(b))
        assert _refused(_served, models, "a") == (
            NOT_FOUND,
            "Servable not found for request: Latest(a)",
        )
        assert _served(models, "b") == 1
        assert not servable.closed
        assert [status.state for status in models.statuses("a")] == [State.UNLOADING]
    wait_for(lambda: servable.closed)
    # What became of it is still told, until it comes back.
    wait_for(lambda: [status.state for status in models.statuses("a")] == [State.END])
    models.reload(_config(a))
    assert _served(models, "a") == 1
    assert [status.state for status in models.statuses("a")] == [State.AVAILABLE]
    # No model at all is a configuration too.
    models.reload(_config())
    assert models.all() == []


def test_a_changed_base_path_is_looked_at(models, tmp_path):
    _add(tmp_path / "old", "1")
    _add(tmp_path / "new", "1", "2")
    models.reload(_config(f"name: 'm' base_path: '{tmp_path}/old'"))
    models.reload(_config(f"name: 'm' base_path: '{tmp_path}/new'"))
    with models.use("m") as (number, servable):
        assert (number, servable.folder) == (2, tmp_path / "new" / "2")


def test_a_new_model_without_a_version_is_told_and_waited_for(models, tmp_path):
    _add(tmp_path / "a", "1")
    _add(tmp_path / "b", "1", broken=True)
    (tmp_path / "c").mkdir()
    entries = [f"name: '{name}' base_path: '{tmp_path}/{name}'" for name in "abc"]
    code, message = _refused(models.reload, _config(*entries))
    assert (code, message) == (
        UNKNOWN,
        "2 model(s) did not become available: {{{name: b version: 1} due to error: 1 is broken}, "
        f"{{{{name: c}} due to error: no version in {tmp_path}/c}}, }}",
    )
    assert _served(models, "a") == 1
    _add(tmp_path / "c", "5")
    for look in models.poll():
        look.result()
    assert _served(models, "c") == 5


def test_a_slow_load_delays_neither_requests_nor_other_models(tmp_path):
    released = threading.Event()

    def load(folder):
        if folder.parent.name == "slow" and folder.name == "2":
            assert released.wait(20)
        return Note(folder)

    models = Models(load)
    _add(tmp_path / "slow", "1")
    _add(tmp_path / "quick", "1")
    models.reload(
        _config(*(f"name: '{name}' base_path: '{tmp_path}/{name}'" for name in ("slow", "quick")))
    )
    _add(tmp_path / "slow", "2")
    _add(tmp_path / "quick", "2")
    slow, quick = models.poll()
    quick.result()
    assert (_served(models, "slow"), _served(models, "quick")) == (1, 2)
    wait_for(
        lambda: (
            [status.state for status in models.statuses("slow")] == [State.LOADING, State.AVAILABLE]
        )
    )
    # Looked at again and again, it is not loaded a second time meanwhile.
    _add(tmp_path / "quick", "3")
    again, other = models.poll()
    assert again is slow
    other.result()
    assert _served(models, "quick") == 3
    # Reloads wait for it, and keep no other model from loading. What they change is seen.
    _add(tmp_path / "else", "5")
    moved = _config(
        f"name: 'slow' base_path: '{tmp_path}/else'", f"name: 'quick' base_path: '{tmp_path}/quick'"
    )
    with futures.ThreadPoolExecutor(40) as pool:
        reloads = [pool.submit(models.reload, moved) for _ in range(40)]
        wait_for(lambda: all(reload.running() for reload in reloads))
        _add(tmp_path / "quick", "4")
        wait_for(lambda: models.poll() and _served(models, "quick") == 4)
        assert not any(reload.done() for reload in reloads)
        released.set()
        for reload in reloads:
            reload.result()
    assert _served(models, "slow") == 5
    models.close()


def test_a_model_that_is_removed_while_it_loads_is_not_served(tmp_path):
    released, loaded = threading.Event(), []

    def load(folder):
        assert released.wait(20)
        loaded.append(Note(folder))
        return loaded[-1]

    models = Models(load)
    _add(tmp_path, "1")
    models.configure(_config(f"name: 'm' base_path: '{tmp_path}'"))
    [look] = models.poll()
    wait_for(lambda: models.all()[0].statuses())
    models.reload(_config())
    released.set()
    look.result()
    assert [note.closed for note in loaded] == [True]
    assert _refused(_served, models, "m")[0] is NOT_FOUND
    models.close()


def test_a_version_that_failed_is_tried_again_a_few_times(tmp_path):
    tries = []

    def load(folder):
        tries.append(folder.name)
        if len(tries) < 3:
            raise Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "no memory now")
        return Note(folder)

    _add(tmp_path, "1")
    for count, seconds, wanted in ((2, 0, 3), (1, 0, 2), (2, 60, 1)):
        tries.clear()
        models = Models(load, retries=Retries(count, seconds))
        models.configure(single_model("m", tmp_path))
        for _ in range(5):
            models.poll()[0].result()
        assert len(tries) == wanted
        assert bool(models.missing()) == (wanted < 3)
        models.close()


def test_a_fault_while_loading_is_the_versions_own(tmp_path):
    def load(folder):
        if folder.name == "2":
            raise KeyError("a fault\nin two lines")
        return Note(folder)

    _add(tmp_path, "1", "2")
    models = Models(load)
    models.reload(single_model("m", tmp_path))
    assert _served(models, "m") == 1
    status = models.statuses("m", 2)[0].status
    assert (status.error_code, "\n" in status.error_message) == (13, False)
    models.close()


def test_ended_versions_are_forgotten_in_the_end(models, tmp_path, monkeypatch):
    monkeypatch.setattr(versions_module, "_MAX_ENDED", 3)
    models.configure(single_model("m", tmp_path))
    for version in range(1, 9):
        _add(tmp_path, str(version))
        models.poll()[0].result()
    assert [status.version for status in models.statuses("m")] == [8, 7, 6, 5]
    assert _refused(models.statuses, "m", 4) == (NOT_FOUND, "Could not find version 4 of model m")
    assert _refused(models.statuses, "x") == (NOT_FOUND, "Could not find any versions of model x")
