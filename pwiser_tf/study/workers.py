"""Jobs in worker processes, which are replaced before the memory of TensorFlow adds up.

A job is a function and its arguments, all of them picklable. It may `ask` the process that started
it, and its return value goes back there. Workers end with their parent, however that ends, and a
job that was running has to be given again: the jobs of this package then resume.
"""

import contextlib
import dataclasses
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator

import tf_keras as keras
from tqdm import tqdm

from pwiser_tf import runs
from pwiser_tf.errors import DataError, one_line
from pwiser_tf.training import share_cores

# TensorFlow keeps about 30 MB of every model that it has trained, whatever is cleared.
_JOBS_PER_PROCESS = 10

# In a worker: the connection to its parent.
_parent = None


@dataclasses.dataclass(frozen=True)
class Job:
    """`function(*arguments)`, called in a worker process.

    Attributes:
      name: for error messages. log: the file to which its output is appended.
    """

    name: str
    log: pathlib.Path
    function: Callable
    arguments: tuple


def ask(question) -> object:
    """In a job: sends the question to the parent process and returns its answer."""
    _parent.send(("question", question))
    return _parent.recv()


class Pool:
    """Worker processes, each with its share of the cores; a context that ends them.

    A worker runs several jobs one after another, because starting TensorFlow takes longer than a
    small job.

    Args:
      size: the number of workers.
    """

    def __init__(self, size: int):
        cores = sorted(os.sched_getaffinity(0))
        self._workers = [
            _Worker(cores[number::size] or [cores[number % len(cores)]]) for number in range(size)
        ]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.end()

    def run(self, jobs: Iterable[Job], answer: Callable | None = None) -> Iterator[tuple]:
        """Starts the jobs in their order; yields (job, result) as they finish.

        Args:
          answer: called in this process with what a job asks; the job gets what it returns.

        Raises:
          DataError: of a job, with the job's name; or the worker was killed. RuntimeError: another
          exception of a job, with its traceback.
        """
        waiting, idle, busy = list(jobs), list(self._workers), {}
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop(0)
                worker.start(waiting.pop(0))
                busy[worker.connection] = worker
            for connection in multiprocessing.connection.wait(list(busy)):
                worker = busy[connection]
                kind, content = worker.receive()
                if kind == "question":
                    connection.send(answer(content))
                    continue
                idle.append(busy.pop(connection))
                yield worker.job, content


class _Worker:
    """One worker process, which is replaced after some jobs."""

    def __init__(self, cores: list[int]):
        self._cores = cores
        self._process = self.connection = self.job = None

    def start(self, job: Job) -> None:
        if self._process is None or self._jobs == _JOBS_PER_PROCESS:
            self.end()
            self._start_process()
        self.job = job
        self._jobs += 1
        self.connection.send(job)

    def _start_process(self) -> None:
        # Not forked: TensorFlow's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._cores), daemon=True)
        with _signals_held():
            process.start()
            self._process = process
        # If their end stayed open here too, the end of the process would not be noticed.
        theirs.close()
        self._jobs = 0

    def receive(self) -> tuple[str, object]:
        """("question" or "result", content); DataError or RuntimeError where the job failed."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise DataError(
                f"{self.job.name}: its process ended with exit code {self._process.exitcode} "
                "(-9: killed, most often for lack of memory; fewer processes at a time or smaller "
                "batches need less)"
            ) from None
        if kind == "error":
            raise DataError(f"{self.job.name}: {content}")
        if kind == "exception":
            raise RuntimeError(f"{self.job.name}\n{content}")
        return kind, content

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _signals_held():
    """Delays Ctrl-C and SIGTERM, so that a process is started completely or not at all.

    The process inherits the blocked signals and never sees the Ctrl-C that a terminal sends to all:
    the parent alone reacts to it, and kills its workers. In the parent blocking is not enough: a
    signal that is blocked in one thread goes to another thread of TensorFlow.
    """
    numbers, arrived = (signal.SIGINT, signal.SIGTERM), []
    handlers = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in numbers
    }
    # Python's helper process, started with the first worker, would unblock the signals.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        raise KeyboardInterrupt


def _work(connection, cores: list[int]) -> None:
    """The main function of a worker: runs the jobs that it receives and sends their results."""
    global _parent
    _parent = connection
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.sched_setaffinity(0, cores)
    share_cores()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # tqdm's own lock is one between processes, which Python reports as leaked when this one ends.
    tqdm.set_lock(threading.RLock())
    while True:
        job = connection.recv()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a", encoding="utf-8") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        try:
            with runs.file_errors():
                answer = "result", job.function(*job.arguments)
        except (DataError, OSError) as error:
            answer = "error", one_line(error)
        except Exception:
            answer = "exception", traceback.format_exc()
        sys.stdout.flush()
        connection.send(answer)
        # Otherwise Keras would keep a part of each model until the process ends.
        keras.backend.clear_session()
        gc.collect()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, however that ended."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
