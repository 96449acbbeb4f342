"""client: a CSV through a running server, and every way in which it can be wrong."""

import csv
import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
import serving_model
from fake_server import INTERRUPTIBLE, FakeModel, serve, server_credentials
from pwiser_serving import Scorer, client, outputs, tensors
from pwiser_serving.protos import tensor_pb2
from waiting import wait_for

CANDIDATES = (
    "price,note,item,brand,id\n"
    "0.5,n,3,acme,a\n"
    ',"two\nlines",,,b\n'
    '1e-3,,99,"zorg","c,3"\n'
    "nan,,4.0,new,\n"
)
ROWS = [
    ("a", "acme", 3, 0.5),
    ("b", "", -1, float("nan")),
    ("c,3", "zorg", 99, 1e-3),
    ("", "new", 4, float("nan")),
]


def _wanted():
    return [(row[0], serving_model.expected(*row[1:], bias=0.0)) for row in ROWS]


def run(capsys, *flags):
    """Calls the command here: exit code, stdout, stderr."""
    code = 0
    try:
        client.main([str(flag) for flag in flags])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def command(server, tmp_path, capsys):
    """A function that writes a CSV, scores it, and gives exit code, stdout, stderr."""

    def score(text, *flags):
        path = tmp_path / "candidates.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        good = ["--server", server.address, "--model", "m", "--input", path]
        return run(capsys, "score", *good, *flags)

    return score


@pytest.fixture(autouse=True)
def _signals():
    """The command takes these signals over; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_scores_are_written_row_by_row(command, tmp_path):
    output = tmp_path / "scores.csv"
    for batch_size in (1, 2, 4096):
        code, out, err = command(
            CANDIDATES, "--output", output, "--keep=id", f"--batch_size={batch_size}"
        )
        assert (code, out) == (0, "")
        assert err == f"{output}: 4 rows scored by m, version 7\n"
        with open(output, newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["id", "ctr", "cvr", "ctcvr"]
        for row, (kept, scores) in zip(rows[1:], _wanted(), strict=True):
            assert row[0] == kept
            assert [float(text) for text in row[1:]] == pytest.approx(
                [scores["ctr"], scores["cvr"], scores["ctcvr"]], rel=1e-6
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates.csv", "scores.csv"]


def test_written_scores_are_exactly_those_of_the_scorer(command, server, tmp_path):
    random = np.random.default_rng(0)
    prices = random.normal(size=50)
    text = "brand,item,price\n" + "".join(f"acme,1,{price}\n" for price in prices)
    assert command(text, "--output", tmp_path / "o.csv")[0] == 0
    with open(tmp_path / "o.csv", newline="") as file:
        found = [np.float32(row["ctr"]) for row in csv.DictReader(file)]
    with Scorer(server.address, "m", timeout=20) as scorer:
        wanted = scorer.score({"brand": ["acme"] * 50, "item": [1] * 50, "price": prices})
    np.testing.assert_array_equal(found, wanted["ctr"])


def test_without_output_a_table_is_printed(command):
    code, out, _ = command(CANDIDATES, "--keep=id,brand", "--version=7")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["id", "brand", "ctr", "cvr", "ctcvr"]
    wanted = _wanted()[0][1]
    assert lines[1] == ["a", "acme"] + [f"{wanted[n]:.6f}" for n in ("ctr", "cvr", "ctcvr")]
    assert len(lines) == 5
    assert len({len(line) for line in out.splitlines()}) == 1


def test_a_header_alone_gives_a_header_alone(command, tmp_path):
    output = tmp_path / "o.csv"
    assert command("price,item,brand\n", "--output", output)[0] == 0
    assert output.read_text() == "ctr,cvr,ctcvr\n"
    assert command("price,item,brand\n")[1] == "ctr  cvr  ctcvr\n"


def test_spreadsheet_text_is_read(command):
    """A byte order mark, CRLF line ends, blank lines, no line end at the end."""
    text = b"\xef\xbb\xbfprice,item,brand\r\n0.5,3,acme\r\n\r\n0.5,3,acme"
    code, out, _ = command(text)
    assert code == 0
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(("flag", "delimiter"), [(r"--delimiter=\t", "\t"), ("--delimiter=;", ";")])
def test_another_delimiter_is_named(command, flag, delimiter):
    text = f'id,price,item,brand\na,0.5,3,acme\n"b{delimiter}",1,2,zorg\n'
    plain = command(text, "--keep=price")
    assert plain[0] == 0
    assert command(text.replace(",", delimiter), "--keep=price", flag) == plain


def test_a_wrong_delimiter(command):
    code, out, err = command(CANDIDATES, "--delimiter=;;")
    assert (code, out) == (2, "")
    assert err.startswith("error: --delimiter: found ';;', expected one character")


def test_long_text_and_columns_twice_that_nobody_reads(command):
    code, out, err = command(f",price,item,brand,,\n0,0.5,3,acme,{'x' * 200_000},\n")
    assert (code, err) == (0, "")
    wanted = serving_model.expected("acme", 3, 0.5, bias=0.0)
    assert out.split()[3:] == [f"{wanted[name]:.6f}" for name in ("ctr", "cvr", "ctcvr")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "candidates.csv: the file is empty, expected a header"),
        ("\n\n", "candidates.csv: the file is empty, expected a header"),
        (
            "price,brand\n1,a\n",
            "row 1, column item: the file has no such column, which model m needs; "
            "it has: price, brand",
        ),
        ("price,item,brand,price\n", "row 1: found 'price', expected each column once"),
        ("price,item,brand\n1,2,a\nx,2,a\n", "row 3, column price: found 'x', expected a finite"),
        ("price,item,brand\ninf,2,a\n", "row 2, column price: found 'inf', expected a finite"),
        ("price,item,brand\n1e39,2,a\n", "row 2, column price: found '1e39', expected a finite"),
        ('price,item,brand\n1,2,"a\nb"\nx,2,a\n', "row 4, column price: found 'x'"),
        ("price,item,brand\n1,2\n", "row 2: found 2 columns, expected 3 as in the header"),
        ("price,item,brand\n1,2,a,b\n", "row 2: found 4 columns, expected 3 as in the header"),
        ('price,item,brand\n1,2,"a\n', "row 2: not well-formed CSV (unexpected end of data)"),
        (b"price,item,brand\n1,2,a\n1,2,\xe9\n", "row 3: found byte 0xe9, expected text in UTF-8"),
        ("price,item,brand\n1,2,a\n".encode("utf-16"), "row 1: found byte 0xff, expected text in"),
        (
            "price,item,brand\n1,2,a\n".encode("utf-16-le"),
            "row 1: found a zero byte, expected text in UTF-8",
        ),
        (b"\x00" * 100, "row 1: found a zero byte, expected text in UTF-8"),
    ],
)
def test_a_wrong_file_is_one_line_and_leaves_nothing(command, tmp_path, text, told):
    output = tmp_path / "scores.csv"
    # Rows of their own requests: the first ones are scored when the fault is found.
    code, out, err = command(text, "--output", output, "--batch_size=1")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path}/candidates.csv")
    assert told in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["candidates.csv"]


def test_an_earlier_output_survives_a_failure(command, tmp_path):
    output = tmp_path / "scores.csv"
    output.write_text("earlier")
    assert command("price,item,brand\nx,1,a\n", "--output", output)[0] == 2
    assert output.read_text() == "earlier"
    assert command("price,item,brand\n1,1,a\n", "--output", output)[0] == 0
    assert output.read_text().startswith("ctr,cvr,ctcvr\n")


def test_an_output_that_is_a_link_replaces_what_it_points_to(command, tmp_path):
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("earlier")
    link.symlink_to(target)
    assert command("price,item,brand\n1,1,a\n", "--output", link)[0] == 0
    assert link.is_symlink()
    assert target.read_text().startswith("ctr,cvr,ctcvr\n")


def test_large_ids_are_read_exactly(tmp_path):
    """Also with the .0 that a column with gaps is often written with."""
    model, seen = FakeModel(item=tensor_pb2.DT_INT64), []
    predict = model.predict

    def noted(request, context):
        seen.extend(tensors.decode(request.inputs["item"]).tolist())
        return predict(request, context)

    model.predict = noted
    path = tmp_path / "c.csv"
    path.write_text("item\n9007199254740993\n9007199254740993.0\n-9007199254740993.\n-0.0\n")
    with serve(model) as port:
        client.main(["score", f"--server=localhost:{port}", "--model=m", f"--input={path}"])
    assert seen == [2**53 + 1, 2**53 + 1, -(2**53) - 1, 0]


def test_wrong_flags_are_one_line(server, tmp_path, capsys):
    path = tmp_path / "c.csv"
    path.write_text("price,item,brand,ctr\n1,2,a,0\n")
    pem = tmp_path / "none.pem"
    good = ["score", "--server", server.address, "--model", "m", "--input", path]
    for flags, told in (
        ([*good, "--model=other"], "model other: NOT_FOUND: Servable not found for request"),
        ([*good, "--version=3"], "model m, version 3: NOT_FOUND: Servable not found"),
        ([*good, "--keep=id"], "column id: the file has no such column, which --keep names"),
        ([*good, "--keep=ctr"], "--keep: ctr is a score's name, and the output has each column"),
        ([*good, "--keep=item,item"], "--keep: item is named twice, and the output"),
        ([*good, "--input", tmp_path / "none"], "none: No such file or directory"),
        ([*good, "--input", tmp_path / "none.parquet"], "none.parquet: No such file or directory"),
        (
            [*good, "--input", tmp_path / "none.tfrecord"],
            "none.tfrecord: No such file or directory",
        ),
        ([*good, "--input", tmp_path], "Is a directory"),
        ([*good, "--output", tmp_path], "is a folder or device, expected a file's name"),
        ([*good, "--output", os.devnull], "/dev/null is a folder or device, expected a file's"),
        ([*good, "--output", path], "c.csv is the input"),
        ([*good, "--output", tmp_path / "x" / "y.csv"], "is not a folder"),
        ([*good, "--timeout=0"], "--timeout: found 0, expected more than 0 seconds"),
        ([*good, "--timeout=nan"], "--timeout: found nan"),
        ([*good, "--timeout=inf"], "timeout must be at most 1e+09, found inf"),
        ([*good, f"--version={2**63}"], "version must be from 0 to 2**63 - 1, found"),
        ([*good, "--version="], "version: found '', expected the number of a version as an int"),
        ([*good, "--batch_size=0"], "--batch_size: found 0, expected 1 or more"),
        ([*good, "--root_certificates", pem], "TLS: root_certificates"),
        ([*good, "--private_key", path], "private_key and certificate_chain go together"),
        ([*good, "--fast"], "unrecognized arguments: --fast"),
        (["score"], "the following arguments are required: --model, --input"),
        ([], "the following arguments are required: COMMAND"),
        (["serve"], "invalid choice: 'serve'"),
        (["status", "--server", server.address, "--model=other"], "Could not find any versions of"),
        (["metadata", "--server", server.address, "--model=m", "--version=3"], "Specific(m, 3)"),
    ):
        code, out, err = run(capsys, *flags)
        assert (code, out) == (2, ""), flags
        assert err.startswith("error: ")
        assert told in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["score", "status", "metadata"])
def test_a_server_that_is_away_is_another_exit_code(command, tmp_path, capsys):
    path = tmp_path / "c.csv"
    path.write_text("price,item,brand\n1,2,a\n")
    flags = [f"--input={path}", f"--output={tmp_path}/o.csv"] if command == "score" else []
    code, out, err = run(capsys, command, "--server=localhost:1", "--model=m", *flags)
    assert (code, out) == (1, "")
    assert "localhost:1, model m: UNAVAILABLE: no server answers" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


def test_status(server, capsys):
    code, out, err = run(capsys, "status", "--server", server.address, "--model=m")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["version", "state", "error"],
        ["7", "AVAILABLE"],
    ]


def test_status_without_an_available_version(capsys):
    model = FakeModel()
    model.held = set()
    with serve(model) as port:
        code, out, _ = run(capsys, "status", f"--server=localhost:{port}", "--model=m")
    assert code == 1
    assert out.splitlines()[1:] == ["99       END    NOT_FOUND: no such file"]


def test_a_model_with_a_score(tmp_path, capsys):
    model = FakeModel()
    for name in ("score", "other"):
        model.signatures["predict_raw"].outputs[name].dtype = tensor_pb2.DT_FLOAT
    path = tmp_path / "c.csv"
    path.write_text("x,score,interest\n0.5,3,4\n")
    with serve(model) as port:
        good = ["score", f"--server=localhost:{port}", "--model=m", "--input", path, "--output=-"]
        code, out, _ = run(capsys, *good, "--keep=interest")
        assert (code, out) == (0, "interest,ctr,cvr,ctcvr,score\n4,0.5,0.5,0.5,0.5\n")
        code, out, err = run(capsys, *good, "--keep=score")
    assert (code, out) == (2, "")
    assert "--keep=score: model m has a score of this name" in err


def test_tls_by_flags(certificates):
    ours = certificates / "ours-client"
    client_flags = [f"--private_key={ours}-key.pem", f"--certificate_chain={ours}.pem"]
    roots = [f"--root_certificates={certificates / 'ours.pem'}"]
    with serve(FakeModel(), credentials=server_credentials(certificates, mutual=True)) as port:

        def status(*flags):
            command = [sys.executable, "-m", "pwiser_serving.client", "status", "--model=m"]
            command += [f"--server=localhost:{port}", *flags]
            # A process of its own: it shows what gRPC itself prints.
            return subprocess.run(command, capture_output=True, text=True, timeout=60)

        assert status(*roots, *client_flags).returncode == 0
        for flags in (
            [],
            ["--tls", *client_flags],
            roots,
            [*roots, *client_flags, "--server_name=other.example"],
        ):
            done = status(*flags)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert "UNAVAILABLE: no server answers" in done.stderr


def test_a_terminal_gets_a_progress_bar(tmp_path):
    pytest.importorskip("tqdm")
    path = tmp_path / "c.csv"
    path.write_text("x\n" + "1\n" * 300)
    terminal, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with serve(FakeModel()) as port:
        command = [sys.executable, "-m", "pwiser_serving.client", "score", "--model=m"]
        command += [f"--server=localhost:{port}", f"--input={path}", f"--output={path}.csv"]
        assert subprocess.run(command, stderr=its, timeout=60).returncode == 0
    os.close(its)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert "300 rows [" in shown
    assert shown.endswith("300 rows scored by m, version 1\r\n")


def test_metadata(server, capsys):
    code, out, _ = run(capsys, "metadata", "--server", server.address, "--model=m")
    assert code == 0
    assert out.startswith("model m, version 7\n")
    assert (
        "predict (tensorflow/serving/predict)\n"
        "  inputs\n"
        "    categorical  int64 [rows, 2]\n"
        "    numerical    float [rows, 1]\n"
    ) in out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_one_line(command, tmp_path, monkeypatch):
    real_open = open

    def full(path, mode, **options):
        return real_open("/dev/full" if mode == "w" else path, mode, **options)

    monkeypatch.setattr(outputs, "open", full, raising=False)
    code, _, err = command("price,item,brand\n1,2,a\n", "--output", tmp_path / "o.csv")
    assert (code, err) == (2, f"error: {tmp_path}/o.csv: No space left on device\n")


def _process(address, path, *flags, **options):
    command = [*INTERRUPTIBLE, sys.executable, "-m", "pwiser_serving.client", "score"]
    command += ["--server", address, "--model=m", f"--input={path}", *flags]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_command_leaves_nothing(server, tmp_path, number):
    # A pipe as input: the command cannot finish before it is told to end.
    read, write = os.pipe()
    process = _process(
        server.address, "/dev/stdin", f"--output={tmp_path}/o.csv", "--batch_size=1", stdin=read
    )
    try:
        os.write(write, b"price,item,brand\n" + b"1,2,a\n" * 200)
        wait_for(lambda: list(tmp_path.iterdir()))
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(read)
        os.close(write)
    assert process.returncode == -number
    assert err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error(server, tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("price,item,brand\n" + "1,2,a\n" * 20_000)
    with _process(server.address, path, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
