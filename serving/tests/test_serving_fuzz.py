"""fuzzing: the server outlives requests of any kind, and its memory stays what it was.

The long form, with 100,000 of them, is `python serving/tests/fuzzing.py`.
"""

import os

import fuzzing


def test_mutated_requests_do_no_harm(models, start_server, tmp_path):
    os.symlink(models[0.0], tmp_path / "7")
    with start_server(tmp_path) as server:
        before = fuzzing.memory(server.process.pid)["VmRSS"]
        attacked = fuzzing.attack(server.address, tmp_path, requests=3000, seed=1)
        after = fuzzing.memory(server.process.pid)
        assert attacked.wrong == []
        assert server.process.poll() is None
        methods = {method for method, _ in attacked.codes}
        assert len(methods) == 7
        codes = {code for _, code in attacked.codes}
        # Neither a fault of the server's own, nor a call that never ends.
        assert codes <= {
            "OK",
            "INVALID_ARGUMENT",
            "NOT_FOUND",
            "FAILED_PRECONDITION",
            "UNIMPLEMENTED",
        }
        assert attacked.codes["Predict", "OK"] > 50
        assert attacked.codes["Predict", "INVALID_ARGUMENT"] > 500
        assert after["VmHWM"] < before + 300
        assert "Traceback" not in server.log
