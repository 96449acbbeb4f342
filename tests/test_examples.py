"""Each program of examples/ runs on little data and gives plausible results."""

import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def _run(name, *arguments, folder=None) -> str:
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which own_csv.py has run: own/data, own/run and own/models."""
    folder = tmp_path_factory.mktemp("examples")
    _run("make_log.py", "log.csv", 4000, folder=folder)
    (folder / "own_csv.txt").write_text(_run("own_csv.py", "log.csv", "own", folder=folder))
    return folder


def test_own_csv_scores_three_candidates(folder):
    lines = (folder / "own_csv.txt").read_text().splitlines()[-3:]
    for line in lines:
        ctr, cvr, ctcvr = map(float, re.findall(r"0\.\d{4}", line))
        assert 0 < ctcvr < ctr
        assert ctcvr == pytest.approx(ctr * cvr, abs=2e-4)


def test_score_from_python_ranks_by_ctcvr(folder):
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "pwiser_serving.server", "--port=0", "--model_name=log"),
            f"--model_base_path={folder / 'own' / 'models' / 'log'}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = re.search(r"on 0\.0\.0\.0:(\d+)", server.stdout.readline())[1]
        lines = _run("score_from_python.py", f"localhost:{port}", "log").splitlines()
    finally:
        server.terminate()
        server.wait(30)
    assert lines[0] == "model log, version 1"
    scores = [float(line.rpartition(" ")[2]) for line in lines[1:]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_own_architecture_is_exported(folder):
    _run("your_own_architecture.py", "own/data", "cross", folder=folder)
    assert (folder / "cross" / "models" / "cross" / "1" / "saved_model.pb").exists()


def test_pwiser_in_a_keras_model_learns():
    found = dict(re.findall(r"(ctr|ctcvr) test AUC (\S+)", _run("pwiser_in_your_keras_model.py")))
    assert float(found["ctr"]) > 0.7
    assert float(found["ctcvr"]) > 0.7


def test_lists_are_converted(tmp_path):
    assert "2 lists: tags" in _run("list_features.py", "lists", folder=tmp_path)
    assert (tmp_path / "lists" / "data" / "schema.json").exists()
