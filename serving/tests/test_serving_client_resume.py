"""client: what a command that did not come to its end leaves, and how the next one goes on."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import fake_server
import grpc
import numpy as np
import pytest
from fake_server import INTERRUPTIBLE, FakeModel, Refused, serve
from pwiser_serving import client, tensors
from waiting import wait_for

pytestmark = pytest.mark.slow

ROWS = 500
FORMATS = ["csv", "jsonl", "parquet", "csv.gz", "jsonl.gz"]


@pytest.fixture
def candidates(tmp_path):
    """A CSV whose ids count from 0; a row's scores are its price, id / 1000."""
    path = tmp_path / "c.csv"
    rows = [f"{number},acme,1,{number / 1000}\n" for number in range(ROWS)]
    path.write_text("id,brand,item,price\n" + "".join(rows))
    return path


@pytest.fixture
def model():
    return FakeModel(**fake_server.FEATURES)


def _arguments(address, path, output, *flags):
    good = ["score", f"--server={address}", "--model=m", f"--input={path}", f"--output={output}"]
    return [*good, "--keep=id", "--batch_size=1", "--timeout=5", *flags]


@pytest.fixture
def run(capsys):
    """A function that runs the command here: exit code, stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def score(*arguments):
        code = 0
        try:
            client.main(_arguments(*arguments))
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    yield score
    for number, handler in before.items():
        signal.signal(number, handler)


def _rows(output):
    if output.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(output).to_pylist()
    opened = gzip.open if output.suffix == ".gz" else open
    with opened(output, "rt", newline="") as file:
        if ".csv" in output.suffixes:
            return list(csv.DictReader(file))
        return [json.loads(line) for line in file]


def _check(output):
    """Every row once, in order, with its own score."""
    rows = _rows(output)
    assert [int(row["id"]) for row in rows] == list(range(ROWS))
    wanted = np.arange(ROWS, dtype=np.float64) / 1000
    np.testing.assert_array_equal(
        np.array([row["ctcvr"] for row in rows], np.float32), wanted.astype(np.float32)
    )


def _fails_after(model, requests, code=grpc.StatusCode.INTERNAL):
    left = iter(range(requests))

    def before():
        if next(left, None) is None:
            raise Refused(code, "no more")

    model.before = before


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_command_goes_on_where_the_server_failed(model, candidates, tmp_path, run, suffix):
    output = tmp_path / f"s.{suffix}"
    partial = tmp_path / f"s.{suffix}.partial"
    with serve(model) as port:
        address = f"localhost:{port}"
        done = 0
        for _ in range(3):
            _fails_after(model, 100)
            code, err = run(address, candidates, output)
            assert code == 1
            assert err.count("\n") == 1 + bool(done)
            assert f"resuming after {done} rows scored by m, version 1" in err or not done
            kept = int(err.split(f"{partial} keeps ")[1].split()[0])
            # In the order of the answers: up to 3 of the requests that were answered came later.
            assert done + 97 <= kept <= done + 100
            assert err.endswith(" rows: the same command continues after them\n")
            assert not output.exists()
            done = kept
        calls, model.before = model.calls, lambda: None
        code, err = run(address, candidates, output)
        assert (code, err) == (
            0,
            f"{output}: resuming after {done} rows scored by m, version 1\n"
            f"{output}: {ROWS} rows scored by m, version 1\n",
        )
        assert model.calls - calls == ROWS - done
    _check(output)
    assert not partial.exists()


def _process(arguments, **options):
    return subprocess.Popen(
        [*INTERRUPTIBLE, sys.executable, "-m", "pwiser_serving.client", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def _wait_for_a_part(process, partial, number=1):
    def written():
        assert process.poll() is None, process.stderr.read()
        return len(list(partial.glob("rows-*"))) >= number

    wait_for(written)


@pytest.mark.parametrize(
    ("number", "suffix"),
    [
        (signal.SIGKILL, "csv"),
        (signal.SIGKILL, "jsonl"),
        (signal.SIGKILL, "parquet"),
        (signal.SIGKILL, "csv.gz"),
        (signal.SIGKILL, "jsonl.gz"),
        (signal.SIGTERM, "csv"),
        (signal.SIGINT, "csv"),
    ],
)
def test_a_killed_command_is_resumed(model, candidates, tmp_path, run, number, suffix):
    output, partial = tmp_path / f"s.{suffix}", tmp_path / f"s.{suffix}.partial"
    model.before = lambda: time.sleep(0.005)
    with serve(model) as port:
        arguments = (f"localhost:{port}", candidates, output)
        for _ in range(2):
            parts = len(list(partial.glob("rows-*")))
            with _process(_arguments(*arguments)) as process:
                _wait_for_a_part(process, partial, parts + 2)
                process.send_signal(number)
                err = process.communicate(timeout=30)[1]
            assert process.returncode == -number
            assert not output.exists()
            if number != signal.SIGKILL:
                assert err.endswith(" rows: the same command continues after them\n")
        model.before = lambda: None
        code, err = run(*arguments)
        assert code == 0
        assert "resuming after " in err
        _check(output)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", output.name]
        # The very bytes of a command that was not interrupted.
        resumed = output.read_bytes()
        assert run(*arguments)[0] == 0
    assert output.read_bytes() == resumed


def test_a_killed_server_loses_no_row(candidates, tmp_path, run):
    output, partial = tmp_path / "s.csv", tmp_path / "s.csv.partial"
    with fake_server.process() as (server, port):
        arguments = (f"localhost:{port}", candidates, output)
        with _process(_arguments(*arguments)) as process:
            _wait_for_a_part(process, partial)
            server.kill()
            err = process.communicate(timeout=30)[1]
        assert process.returncode == 1
        assert "UNAVAILABLE: no server answers" in err
        assert err.endswith("the same command continues after them\n")
        # Still away: nothing is lost by asking.
        assert run(*arguments)[0] == 1
    with fake_server.process(port):
        assert run(*arguments)[0] == 0
    _check(output)
    assert not partial.exists()


def test_rows_of_two_versions_never_mix(model, candidates, tmp_path, run):
    output, partial = tmp_path / "s.csv", tmp_path / "s.csv.partial"
    with serve(model) as port:
        arguments = (f"localhost:{port}", candidates, output)
        _fails_after(model, 100)
        assert run(*arguments)[0] == 1
        model.before = lambda: None
        # The version is gone: refused, and kept.
        model.set_version(2)
        code, err = run(*arguments)
        assert code == 2
        assert "version 1: NOT_FOUND" in err
        assert f"{partial} holds " in err
        assert "rows of this version: remove it to begin again" in err
        assert not output.exists()
        # It is back beside the new one: the rest is scored by it too.
        model.set_version(1)
        model.set_version(2, keep=True)
        code, err = run(*arguments)
        assert code == 0
        assert err.endswith(f"{ROWS} rows scored by m, version 1\n")
    _check(output)


def test_one_run_stays_with_its_version(model, candidates, tmp_path, run):
    """A new version during the run does not change who scores it."""
    left = iter(range(20))

    def before():
        if next(left, None) is None:
            model.set_version(2, keep=True)

    model.before = before
    with serve(model) as port:
        code, err = run(f"localhost:{port}", candidates, tmp_path / "s.csv")
    assert (code, err) == (0, f"{tmp_path}/s.csv: {ROWS} rows scored by m, version 1\n")


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ("input", []),
        ("--keep", ["--keep=id,item"]),
        ("--model", ["--model=other"]),
        ("--version", ["--version=1"]),
        ("--delimiter", ["--delimiter=;"]),
    ],
)
def test_another_command_does_not_go_on(model, candidates, tmp_path, run, change, flags):
    output, partial = tmp_path / "s.csv", tmp_path / "s.csv.partial"
    with serve(model) as port:
        arguments = (f"localhost:{port}", candidates, output)
        _fails_after(model, 100)
        assert run(*arguments)[0] == 1
        model.before = lambda: None
        before = sorted(path.read_bytes() for path in partial.iterdir())
        time_before = candidates.stat()
        if change == "input":
            os.utime(candidates, ns=(time_before.st_atime_ns, time_before.st_mtime_ns + 1))
        code, err = run(*arguments, *flags)
        assert (code, err) == (
            2,
            f"error: {partial}: cannot be resumed, it was begun with another {change}; remove "
            "this folder to begin again\n",
        )
        # Nothing of it was touched, and what may differ does not matter.
        assert sorted(path.read_bytes() for path in partial.iterdir()) == before
        os.utime(candidates, ns=(time_before.st_atime_ns, time_before.st_mtime_ns))
        assert run(*arguments, "--batch_size=7", "--timeout=6")[0] == 0
    _check(output)


def test_two_commands_do_not_write_one_output(model, candidates, tmp_path, run):
    output, partial = tmp_path / "s.csv", tmp_path / "s.csv.partial"
    model.before = lambda: time.sleep(0.01)
    with serve(model) as port:
        arguments = (f"localhost:{port}", candidates, output)
        with _process(_arguments(*arguments)) as process:
            _wait_for_a_part(process, partial)
            code, err = run(*arguments)
            assert (code, err) == (2, f"error: {partial}: another command is writing it\n")
            model.before = lambda: None
            process.communicate(timeout=30)
        assert process.returncode == 0
    _check(output)


def test_a_damaged_partial_is_refused(model, candidates, tmp_path, run):
    output, partial = tmp_path / "s.csv", tmp_path / "s.csv.partial"
    with serve(model) as port:
        arguments = (f"localhost:{port}", candidates, output)
        _fails_after(model, 100)
        run(*arguments)
        model.before = lambda: None
        # What a killed command had not finished is nothing.
        (partial / "unfinished").write_text("half a ro")
        first, second, *_ = sorted(partial.glob("rows-*"))
        second.rename(tmp_path / "aside")
        code, err = run(*arguments)
        assert (code, "rows 16 to 31 are missing from it; remove" in err) == (2, True)
        (tmp_path / "aside").rename(second)
        (partial / "command.json").write_text("{")
        code, err = run(*arguments)
        assert (code, "its command.json cannot be read; remove" in err) == (2, True)
        # Without a description it is no partial.
        (partial / "command.json").unlink()
        assert run(*arguments)[0] == 0
    assert first.name.startswith("rows-000000000000-")
    _check(output)


def test_all_rows_done_but_not_joined(model, candidates, tmp_path, run, monkeypatch):
    """Killed in the last moment: after the last part, before the output is in place."""
    output = tmp_path / "s.csv"
    real = client.outputs.Partial.finish

    def killed(self, no_rows):
        raise OSError(5, "gone", str(output))

    with serve(model) as port:
        arguments = (f"localhost:{port}", candidates, output)
        monkeypatch.setattr(client.outputs.Partial, "finish", killed)
        code, err = run(*arguments)
        assert (code, f"keeps {ROWS} rows" in err) == (2, True)
        monkeypatch.setattr(client.outputs.Partial, "finish", real)
        calls = model.calls
        assert run(*arguments)[0] == 0
        assert model.calls == calls
    _check(output)


def test_a_pipe_is_always_read_from_its_beginning(model, candidates, tmp_path):
    output, partial = tmp_path / "s.csv", tmp_path / "s.csv.partial"
    text = candidates.read_text()
    model.before = lambda: time.sleep(0.005)
    with serve(model) as port:
        arguments = _arguments(f"localhost:{port}", "/dev/stdin", output)
        with _process(arguments, stdin=subprocess.PIPE) as process:
            process.stdin.write(text[:2000])
            process.stdin.flush()
            _wait_for_a_part(process, partial)
            process.kill()
            process.wait()
        model.before = lambda: None
        with _process(arguments, stdin=subprocess.PIPE) as process:
            err = process.communicate(text, timeout=30)[1]
    assert err == f"{output}: {ROWS} rows scored by m, version 1\n"
    _check(output)


def test_an_input_that_changes_meanwhile_leaves_nothing(model, candidates, tmp_path, run):
    """Its rows may be those of two files."""
    left = iter(range(20))

    def before():
        if next(left, None) is None:
            os.utime(candidates)

    model.before = before
    with serve(model) as port:
        code, err = run(f"localhost:{port}", candidates, tmp_path / "s.csv")
    assert (code, err) == (2, f"error: {candidates}: changed while it was read\n")
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_resumed_parquet_asks_and_writes_the_same(model, tmp_path, run, suffix):
    """Requests of the same rows, wherever the row groups end: a model's last digit may hang on
    the rows beside a row. And the very same file."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path, output = tmp_path / "c.parquet", tmp_path / f"s.{suffix}"
    rows = np.arange(1000)
    columns = {"id": rows, "brand": pa.array(["a"] * 1000), "item": rows, "price": rows / 1000}
    pq.write_table(pa.table(columns), path, row_group_size=37)
    firsts = []
    predict = model.predict

    def noted(request, context):
        firsts.append(round(float(tensors.decode(request.inputs["price"])[0]) * 1000))
        return predict(request, context)

    model.predict = noted
    with serve(model) as port:
        arguments = (f"localhost:{port}", path, output, "--batch_size=10")
        assert run(*arguments)[0] == 0
        whole = output.read_bytes()
        assert sorted(firsts) == list(range(0, 1000, 10))
        output.unlink()
        _fails_after(model, 50)
        assert run(*arguments)[0] == 1
        model.before = lambda: None
        assert run(*arguments)[0] == 0
    assert set(firsts) == set(range(0, 1000, 10))
    assert output.read_bytes() == whole


def test_a_wrong_row_leaves_nothing_of_what_was_done(model, candidates, tmp_path, run):
    with candidates.open("a") as file:
        file.write("x,acme,1,dear\n")
    with serve(model) as port:
        code, err = run(f"localhost:{port}", candidates, tmp_path / "s.csv")
    assert code == 2
    assert f"row {ROWS + 2}, column price: found 'dear'" in err
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


SIGNALLED_WHILE_OPENING = """
import os, pathlib, signal, sys
import numpy as np
from pwiser_serving import client, outputs

class Slow(outputs.Partial):
    def _read(self):
        os.kill(os.getpid(), signal.SIGTERM)
        super()._read()

output, rows = pathlib.Path(sys.argv[1]), int(sys.argv[2])
if rows:
    with outputs.Partial(output, {}, resumable=True) as partial:
        partial.begin(1)
        partial.save([{"ctr": np.zeros(rows)}], rows)
        partial.keeps = lambda error: True
with client._opened(Slow(output, {}, resumable=True)):
    print("not reached", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("rows", [0, 3])
def test_a_signal_while_the_partial_is_opened(tmp_path, rows):
    """It ends the command, which keeps rows that an earlier one has left, and else nothing."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED_WHILE_OPENING, str(tmp_path / "s.csv"), str(rows)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
    kept = [path.name for path in tmp_path.rglob("rows-*")]
    assert kept == (["rows-000000000000-000000000003"] if rows else [])
    assert ("keeps 3 rows" in done.stderr) == bool(rows)
    assert rows or list(tmp_path.iterdir()) == []
