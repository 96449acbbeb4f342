"""Jobs in worker processes; tests/test_paper_table.py and test_tune.py interrupt and kill them."""

import os
import signal
import threading

import pytest

from pwiser_tf.errors import DataError
from pwiser_tf.study import workers
from pwiser_tf.study.workers import Job, Pool

pytestmark = pytest.mark.slow


def _process(text):
    print(text)
    return os.getpid()


def _sum_of_answers(*questions):
    return sum(workers.ask(question) for question in questions)


def _fail(kind):
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()
    raise {"data": DataError("wrong", file="x.csv"), "fault": ZeroDivisionError("by zero")}.get(
        kind, FileNotFoundError(2, "No such file", "y.csv")
    )


@pytest.fixture
def pool():
    with Pool(1) as pool:
        yield pool


def test_a_process_is_replaced_after_some_jobs(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_JOBS_PER_PROCESS", 2)
    jobs = [Job(name, tmp_path / "logs" / "log.txt", _process, (name,)) for name in "abc"]
    results = list(pool.run(jobs))
    assert [job.name for job, _ in results] == ["a", "b", "c"]
    first, second, third = (process for _, process in results)
    assert first == second != third
    assert os.getpid() not in (first, third)
    assert (tmp_path / "logs" / "log.txt").read_text() == "a\nb\nc\n"
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_job_asks_its_parent(pool, tmp_path):
    job = Job("sum", tmp_path / "log.txt", _sum_of_answers, (1, 2, 3))
    assert list(pool.run([job], answer=lambda question: question**2)) == [(job, 14)]


def test_errors_of_a_job_have_its_name(pool, tmp_path):
    for kind, error, message in (
        ("data", DataError, r"^job 7: x\.csv: wrong$"),
        ("file", DataError, r"^job 7: y\.csv: No such file$"),
        ("fault", RuntimeError, r"(?s)^job 7\nTraceback.*ZeroDivisionError: by zero"),
        ("signal", DataError, r"^job 7: its process ended with exit code -9"),
    ):
        with pytest.raises(error, match=message):
            list(pool.run([Job("job 7", tmp_path / "log.txt", _fail, (kind,))]))


def test_processes_end_with_the_pool(tmp_path):
    with Pool(2) as pool:
        jobs = [Job(name, tmp_path / "log.txt", _process, (name,)) for name in "ab"]
        processes = {process for _, process in pool.run(jobs)}
    assert len(processes) == 2
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
