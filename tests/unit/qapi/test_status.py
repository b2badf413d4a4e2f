import dataclasses

import pytest

from pyqmigrate.qapi.status import MigrationInfo, RamStatistics, RunState, Status

RAM = RamStatistics(total=1 << 30, normal=5, mbps=1.5)
AT_REST = {Status.NONE, Status.COMPLETED, Status.FAILED, Status.CANCELLED}
WITH_NUMBERS = {
    Status.ACTIVE,
    Status.PRE_SWITCHOVER,
    Status.DEVICE,
    Status.CANCELLING,
    Status.COMPLETED,
}


def test_before_the_first_migration_there_is_nothing_to_tell():
    assert MigrationInfo().to_json() == {}


@pytest.mark.parametrize("status", Status)
def test_a_migration_runs_unless_it_is_at_rest(status):
    assert status.running == (status not in AT_REST)


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.NONE])
def test_numbers_are_told_while_they_change_and_in_the_end(status):
    told = MigrationInfo(status, ram=RAM).to_json()
    assert told["status"] == status
    assert ("ram" in told) == (status in WITH_NUMBERS)
    assert ("downtime" in told) == (status is Status.COMPLETED)
    assert ("expected-downtime" in told) == (status in WITH_NUMBERS - {Status.COMPLETED})


def test_a_load_tells_its_status_only():
    assert MigrationInfo(Status.COMPLETED).to_json() == {"status": "completed"}


def test_an_error_is_reported_with_the_status():
    assert MigrationInfo(Status.FAILED, "no room", RAM).to_json() == {
        "status": "failed",
        "error-desc": "no room",
    }


def test_ram_has_the_members_of_qemu():
    assert RAM.to_json() == {
        "total": 1 << 30,
        "postcopy-requests": 0,
        "dirty-sync-count": 0,
        "multifd-bytes": 0,
        "pages-per-second": 0,
        "downtime-bytes": 0,
        "page-size": 4096,
        "remaining": 0,
        "postcopy-bytes": 0,
        "mbps": 1.5,
        "transferred": 0,
        "dirty-sync-missed-zero-copy": 0,
        "precopy-bytes": 0,
        "duplicate": 0,
        "dirty-pages-rate": 0,
        "normal-bytes": 0,
        "normal": 5,
    }


def test_each_number_has_a_place_of_its_own():
    for number, field in enumerate(dataclasses.fields(RamStatistics), 1000):
        assert list(RamStatistics(**{field.name: number}).to_json().values()).count(number) == 1


def test_words_are_plain_text_in_json():
    assert f"{Status.PRE_SWITCHOVER} {RunState.FINISH_MIGRATE}" == "pre-switchover finish-migrate"
