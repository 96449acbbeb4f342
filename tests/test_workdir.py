"""Any damage or edit of a run folder gives one DataError."""

import json
import shutil

import pytest
import tensorflow as tf

from pwiser_tf import runs
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import Evaluation
from pwiser_tf.schema import Schema


def _remove(pattern):
    def change(folder):
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _cut(pattern, size):
    def change(folder):
        for path in folder.glob(pattern):
            path.write_bytes(path.read_bytes()[:size])

    return change


def _edit(**values):
    def change(folder):
        path = folder / runs.FLAGS_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


DAMAGE = {
    "no best": (_remove("best"), "best: no model"),
    "no best files": (_remove("best/epoch*"), "corrupt checkpoint"),
    "cut weights": (_cut("best/*.data*", 100), "corrupt checkpoint"),
    "cut index": (_cut("best/*.index", 100), "corrupt checkpoint"),
    "empty list": (_cut("best/checkpoint", 0), "best: not written by"),
    "no flags": (_remove("flags.json"), "flags.json: no such file; --workdir must be a run"),
    "empty flags": (_cut("flags.json", 0), "flags.json: not JSON"),
    "other size": (_edit(embedding_dim=9), "best/epoch-[12]: .*of another model"),
    "one more layer": (_edit(bottom_units=[8, 8]), "best/epoch-[12]: .*of another model"),
    "wrong type": (_edit(embedding_dim="x"), "--embedding_dim=x: expected type int"),
    "number for a list": (_edit(tower_units=8), "--tower_units=8: expected type tuple"),
    "unknown model": (_edit(model="foo"), "--model=foo: expected one of"),
    "unknown head": (_edit(conversion_head="foo"), "--conversion_head=foo: expected one of"),
    "unknown flag": (_edit(foo=1), "unknown option foo"),
    "no schema": (_remove("schema.json"), "schema.json: no such file"),
    "no vocabulary": (_remove("vocabularies/*"), r"vocabularies/\d+.jsonl: no such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_reported(name, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    runs.load_run(folder)
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(DataError, match=message):
        runs.load_run(folder)


@pytest.mark.parametrize("content", ["", "[1]", "\udcff"])
def test_metrics_that_are_no_json_object_are_refused_before_anything_is_written(content, tmp_path):
    path = tmp_path / runs.METRICS_FILE
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"metrics\.json: not"):
        Evaluation("run", "test", None, None, {}).write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [runs.METRICS_FILE]


def test_checkpoints_without_their_flags_are_not_taken_for_another_run(trained, settings, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / runs.FLAGS_FILE).unlink()
    other = settings.replace(seed=5)
    with pytest.raises(DataError, match=r"flags\.json: no such file, but there are checkpoints"):
        runs.begin(tmp_path / "run", other, Schema.load(trained))


def test_a_lock_is_released(tmp_path):
    with runs.locked(tmp_path), pytest.raises(DataError), runs.locked(tmp_path):
        pass
    with runs.locked(tmp_path):
        pass


def test_the_best_weights_are_saved_without_the_running_means(trained):
    """So that a later version, which may keep other means, still loads them."""
    reader = tf.train.load_checkpoint(str(trained / "best"))
    names = reader.get_variable_to_shape_map()
    assert any("_heads" in name for name in names)
    assert not [name for name in names if "_means" in name or "_tasks" in name]
