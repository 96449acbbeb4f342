"""The parts of benchmarks/batching.py that do not depend on a clock."""

import itertools
import re
import types

import numpy as np
import pytest

from benchmarks import batching, generated
from pwiser_tf.errors import DataError


def test_the_grid_reaches_from_one_row_to_the_largest():
    assert batching.grid(1) == [1]
    assert batching.grid(2) == [1, 2]
    sizes = batching.grid(4096)
    assert sizes[0] == 1
    assert sizes[-1] == 4096
    assert sizes == sorted(set(sizes))
    # Eight to a doubling, 1.09 times each, and small ones to the next whole number.
    assert all(b - a <= 1 + 0.1 * a for a, b in itertools.pairwise(sizes))


def test_times_between_sizes_by_arithmetic():
    # 3 then 2 cannot be: both count as 2.5. Halfway between sizes is halfway between times.
    seconds = batching.every_size([1, 2, 4, 6], [1, 3, 2, 4.5])
    assert seconds.tolist() == [1, 2.5, 2.5, 2.5, 3.5, 4.5]


def test_ladder_by_arithmetic():
    # Time is rows. 8 may serve 4 to 8 at a price of 100 percent, 3 may serve 2 and 3, and 1 is
    # left; 3 cannot reach down to 1.
    assert batching.ladder(np.arange(1.0, 9), 1.0) == [1, 3, 8]
    # A call that costs the same at every size needs one size.
    assert batching.ladder(np.ones(100), 0.25) == [100]


def _serves(sizes, seconds, padding):
    return all(
        seconds[batching.padded(n, sizes) - 1] <= (1 + padding) * seconds[n - 1]
        for n in range(1, len(seconds) + 1)
    )


@pytest.mark.parametrize("padding", [0.1, 0.25, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_shorter_ladder_keeps_the_promise(seed, padding):
    seconds = np.cumsum(np.random.default_rng(seed).exponential(1.0, 9)) + 2
    found = batching.ladder(seconds, padding)
    assert found[-1] == 9
    assert _serves(found, seconds, padding)
    for count in range(len(found) - 1):
        for below in itertools.combinations(range(1, 9), count):
            assert not _serves([*below, 9], seconds, padding)


def test_largest_within_a_budget():
    seconds = np.array([1.0, 2.0, 2.0, 3.0])
    assert [batching.largest_within(seconds, budget) for budget in (0.5, 1, 2, 2.5, 9)] == [
        *(1, 1, 3, 3, 4)
    ]


class Steady:
    """A model with its own clock: a call takes 1 ms, plus 10 us per row."""

    def call(self, rows):
        return 1e-3 + 1e-5 * rows


def _flags(**changed):
    usual = {"rows": 50, "callers": 8, "largest_request": 1024, "latency_ms": 6.0}
    return types.SimpleNamespace(**{**usual, "padding": 0.25, "turns": 1, **changed})


@pytest.fixture
def steady(monkeypatch):
    def derive(speeds=(100.0, 150.0), **changed):
        # Each caller for itself first, then the batch threads.
        turns = itertools.cycle(speeds)
        monkeypatch.setattr(batching, "_rows_per_second", lambda *_: next(turns))
        return batching.derive(Steady(), 2, _flags(**changed))

    return derive


def _values(text):
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    sizes = [int(line.split()[1]) for line in lines if line.startswith("allowed_batch_sizes")]
    return dict(line.split(" { value: ") for line in lines if "{" in line), sizes


def test_the_file_follows_from_the_times(steady):
    values, sizes = _values(steady())
    assert values["max_batch_size"] == "1024 }"
    # 1 ms and 500 rows make 6 ms.
    assert values["max_execution_batch_size"] == "500 }"
    # 50 rows: 1.5 ms alone; with 7 more such requests 400 rows, padded to 500, 6 / 8 ms each.
    assert values["batch_timeout_micros"] == "750 }"
    assert values["num_batch_threads"] == "2 }"
    # The largest request is three batches of 500 rows, and in 6 ms two threads work off two.
    assert values["max_enqueued_batches"] == "5 }"
    # 500 rows serve down to 4.8 ms, which is 380 rows: the next size is 379.
    assert sizes[-3:] == [379, 500, 1024]


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 20},
        {"callers": 2},
        {"padding": 0.5},
        {"latency_ms": 4.0},
        {"largest_request": 600},
    ],
    ids=str,
)
def test_each_flag_changes_the_file(steady, changed):
    assert _values(steady(**changed)) != _values(steady())


def test_it_says_whether_batching_pays(steady):
    assert ": it pays." in steady()
    assert "it does not pay: leave it off" in steady(speeds=(100.0, 105.0))


def test_padding_counts_as_work_without_an_answer(steady):
    # 200 of the 8 * 50 rows for each of two threads, padded to the next allowed size.
    text = steady(speeds=(100.0, 115.0))
    _, sizes = _values(text)
    size = batching.padded(200, sizes)
    assert size > 200
    assert f"{115 * 200 / size:,.0f} batched, {1.15 * 200 / size:.2f} times" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    generated.export(folder)
    return folder


def test_of_a_real_model(folder, monkeypatch):
    monkeypatch.setattr(batching, "_TURN_SECONDS", 0.01)
    model = batching.Model(folder, "predict", 16)
    assert model.call(16) > 0
    values, sizes = _values(batching.derive(model, 1, _flags(largest_request=16, latency_ms=1e3)))
    assert values["max_execution_batch_size"] == "16 }"
    assert sizes[-1] == 16


def test_a_model_that_cannot_be_measured_is_reported(folder, tmp_path):
    with pytest.raises(DataError, match=r"no signature 'x', but .*predict"):
        batching.Model(folder, "x", 4)
    with pytest.raises(DataError, match="serving_default takes string"):
        batching.Model(folder, "serving_default", 4)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        batching.Model(tmp_path, "predict", 4)
