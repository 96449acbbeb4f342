import json
import shutil

import numpy as np
import tensorflow as tf

from pwiser_tf import data, metrics, runs
from pwiser_tf.evaluation import predict
from pwiser_tf.schema import Schema


def test_predictions_are_the_models_own_in_the_files_order(trained, dataset):
    model, _, _ = runs.load_run(trained)
    found, grade, group = predict(model, dataset, Schema.load(dataset), "test")
    batches = list(data.batches(dataset, Schema.load(dataset), "test", 300))
    ((features, expected_grade),) = batches
    np.testing.assert_array_equal(grade, expected_grade)
    np.testing.assert_array_equal(group, features["group"])
    for name, values in model(features).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_the_command_gives_the_runs_own_test_metrics(command, trained, tmp_path):
    result = command("evaluate", f"--workdir={trained}", f"--output_dir={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["test"] == json.loads((trained / "metrics.json").read_text())["test"]
    assert (tmp_path / "out" / "report-test.png").stat().st_size > 10_000
    assert f"{found['test']['ctr']['auc']:.4f}" in result.stdout


def test_split_and_metrics_file_are_extended_not_replaced(command, trained, tmp_path):
    (tmp_path / "metrics.json").write_text('{"test": 1}')
    result = command(
        "evaluate", f"--workdir={trained}", f"--output_dir={tmp_path}", "--split=validation"
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["test"] == 1
    assert found["validation"] == json.loads((trained / "metrics.json").read_text())["validation"]


def test_metrics_are_those_of_the_metrics_module(trained, dataset):
    model, _, _ = runs.load_run(trained)
    predictions, grade, _ = predict(model, dataset, Schema.load(dataset), "test")
    test = json.loads((trained / "metrics.json").read_text())["test"]
    assert test["ctr"]["auc"] == metrics.auc(grade >= 1, predictions["ctr"])
    clicked = grade >= 1
    assert test["cvr"]["auc"] == metrics.auc(grade[clicked] == 2, predictions["cvr"][clicked])


def test_a_folder_without_a_run_is_refused(command, tmp_path):
    result = command("evaluate", f"--workdir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {tmp_path}/flags.json: no such file; --workdir must be a run of pwiser_tf.train\n"
    )


def test_data_of_another_schema_is_refused(command, trained, dataset, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    content = json.loads((copy / "schema.json").read_text())
    content["numerical"][0]["mean"] += 1
    schema_text = json.dumps(content)
    (copy / "schema.json").write_text(schema_text)
    result = command("evaluate", f"--workdir={trained}", f"--data_dir={copy}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "schema.json" in result.stderr


def test_a_truncated_record_file_is_named(command, trained, dataset, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    shard = copy / "test-00002-of-00003.tfrecord"
    shard.write_bytes(shard.read_bytes()[:-100])
    result = command(
        "evaluate", f"--workdir={trained}", f"--data_dir={copy}", f"--output_dir={tmp_path / 'out'}"
    )
    assert result.returncode == 2
    assert "test-00002-of-00003.tfrecord: found" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tensorflow_is_keras_2_here():
    assert tf.keras.Model.__module__.startswith("tf_keras")


def test_several_runs_are_compared_with_the_first(command, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "again")
    result = command(
        "evaluate", f"--workdir={trained},{tmp_path / 'again'}", f"--output_dir={tmp_path / 'out'}"
    )
    assert result.returncode == 0, result.stderr
    assert "CTR    again  +0.0000 [+0.0000, +0.0000]  p 1.000" in result.stdout
    made = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert made == {
        "comparison.png",
        "workdir/metrics.json",
        "workdir/report-test.png",
        "again/metrics.json",
        "again/report-test.png",
    }


def test_runs_with_different_rows_are_not_compared_and_nothing_is_written(
    command, trained, dataset, tmp_path
):
    other, data = tmp_path / "other", tmp_path / "data"
    shutil.copytree(trained, other)
    shutil.copytree(dataset, data)
    # The same schema, and the rows of validation as those of test.
    for shard in dataset.glob("validation-*"):
        shutil.copy(shard, data / shard.name.replace("validation", "test"))
    settings = json.loads((other / "flags.json").read_text())
    (other / "flags.json").write_text(json.dumps(settings | {"data_dir": str(data)}))
    result = command("evaluate", f"--workdir={trained},{other}", f"--output_dir={tmp_path / 'out'}")
    assert result.returncode == 2
    assert "the runs have different data and cannot be compared" in result.stderr
    assert not (tmp_path / "out").exists()


def test_several_runs_need_different_names_and_an_output_dir(command, trained, tmp_path):
    for arguments, message in (
        ([f"--workdir={trained},{trained}"], "several runs need an --output_dir"),
        ([f"--workdir={trained},{trained}", f"--output_dir={tmp_path}"], "two runs are named"),
    ):
        result = command("evaluate", *arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
