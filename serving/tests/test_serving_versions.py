"""versions: what is loaded, kept, replaced and closed, with servables that only take notes."""

import grpc
import pytest
from notes import Note
from pwiser_serving.server.status import Status
from pwiser_serving.server.versions import Versions
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus as State
from waiting import wait_for


@pytest.fixture
def loads():
    """The names of the folders in the order in which loading them was tried."""
    return []


@pytest.fixture
def versions(tmp_path, loads):
    def load(folder):
        loads.append(folder.name)
        return Note(folder)

    return Versions("m", tmp_path, load)


def _add(base_path, name, broken=False):
    (base_path / name).mkdir()
    if broken:
        (base_path / name / "broken").touch()


def _states(versions):
    return [(status.version, status.state) for status in versions.statuses()]


def test_an_empty_folder_has_no_version(versions):
    assert not versions.poll()
    assert (versions.available, versions.statuses()) == ([], [])
    with (
        pytest.raises(Status, match=r"Servable not found for request: Latest\(m\)"),
        versions.use(),
    ):
        pass


def test_only_folders_with_numbers_are_versions(versions, tmp_path, loads):
    for name in ("1.tmp", "v2", "-3", "4 ", "\u0665", str(2**63), "9" * 30):
        _add(tmp_path, name)
    (tmp_path / "6").touch()
    assert not versions.poll()
    _add(tmp_path, "0007")
    assert versions.poll()
    assert (versions.available, loads) == ([7], ["0007"])
    _add(tmp_path, str(2**63 - 1))
    assert versions.poll()
    assert versions.available == [2**63 - 1]


def test_two_folders_of_one_version_are_warned_of_once(versions, tmp_path, loads, caplog):
    _add(tmp_path, "007")
    assert versions.poll()
    assert not caplog.records
    # It is served already; and loaded anew, the last by name is taken.
    _add(tmp_path, "7")
    assert not versions.poll()
    assert not versions.poll()
    told = ["m: the folders 007, 7 are all version 7: 7 is taken"]
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == told
    assert loads == ["007"]


def test_the_newest_is_served_and_loaded_once(versions, tmp_path, loads):
    for name in ("2", "10", "9"):
        _add(tmp_path, name)
    assert [versions.poll(), versions.poll()] == [True, False]
    assert (versions.available, loads) == ([10], ["10"])
    with pytest.raises(Status) as caught, versions.use(9):
        pass
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert caught.value.message == "Servable not found for request: Specific(m, 9)"


def test_a_replaced_version_is_closed_after_its_last_request(versions, tmp_path):
    _add(tmp_path, "1")
    versions.poll()
    with versions.use() as (number, first):
        with versions.use(1):
            _add(tmp_path, "2")
            assert versions.poll()
            # Two requests still use version 1; new ones get version 2.
            assert _states(versions) == [(2, State.AVAILABLE), (1, State.UNLOADING)]
            with versions.use() as (newer, second):
                assert (number, newer) == (1, 2)
        assert not first.closed
    wait_for(lambda: first.closed)
    wait_for(lambda: _states(versions) == [(2, State.AVAILABLE), (1, State.END)])
    assert not second.closed
    versions.close()
    assert second.closed
    assert versions.available == []


def test_a_request_that_fails_lets_go(versions, tmp_path):
    _add(tmp_path, "1")
    versions.poll()
    with pytest.raises(RuntimeError, match="failed"), versions.use() as (_, servable):
        raise RuntimeError("failed")
    _add(tmp_path, "2")
    versions.poll()
    wait_for(lambda: servable.closed)


def test_a_broken_version_is_tried_again_when_its_files_change(versions, tmp_path, loads):
    _add(tmp_path, "1")
    versions.poll()
    _add(tmp_path, "2", broken=True)
    assert [versions.poll() for _ in range(3)] == [False] * 3
    assert (versions.available, loads) == ([1], ["1", "2"])
    assert _states(versions) == [(2, State.END), (1, State.AVAILABLE)]
    status = versions.statuses()[0].status
    assert (status.error_code, status.error_message) == (15, "2 is broken")
    (tmp_path / "2" / "more").touch()
    assert not versions.poll()
    assert loads == ["1", "2", "2"]
    (tmp_path / "2" / "broken").unlink()
    assert versions.poll()
    assert versions.available == [2]
    assert versions.statuses()[0].status.error_code == 0


def test_the_next_older_one_stands_in_at_the_start(versions, tmp_path, loads):
    _add(tmp_path, "1")
    _add(tmp_path, "2")
    _add(tmp_path, "3", broken=True)
    assert versions.poll()
    assert (versions.available, loads) == ([2], ["3", "2"])


def test_a_removed_version_is_rolled_back_but_the_last_one_stays(versions, tmp_path, caplog):
    _add(tmp_path, "1")
    _add(tmp_path, "2")
    versions.poll()
    (tmp_path / "2").rmdir()
    assert versions.poll()
    assert versions.available == [1]
    (tmp_path / "1").rmdir()
    assert not versions.poll()
    assert versions.available == [1]
    tmp_path.rmdir()
    caplog.clear()
    assert [versions.poll(), versions.poll()] == [False, False]
    assert versions.available == [1]
    # Told once.
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: No such file or directory"
    ]
