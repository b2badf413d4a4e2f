"""Identity that guests of one snapshot share."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

from pyqmigrate.vm.incoming.identity import runs_already, shared_identity, with_new_generation
from pyqmigrate.vm.qemu.command_line import CommandLine
from tests.harness.locks import HOLD

GUID = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"


def command(*words: str) -> CommandLine:
    return CommandLine.parse(["qemu-kvm", *words])


def test_fixed_number_is_made_anew() -> None:
    changed, notes = with_new_generation(command("-device", f"vmgenid,guid={GUID},id=v"))
    (option,) = changed.options
    assert option.properties("driver") == {"driver": "vmgenid", "guid": "auto", "id": "v"}
    assert len(notes) == 1


def test_fixed_number_in_json_is_made_anew() -> None:
    words = json.dumps({"driver": "vmgenid", "guid": GUID, "id": "v"})
    (option,) = with_new_generation(command("-device", words))[0].options
    assert json.loads(option.value or "") == {"driver": "vmgenid", "guid": "auto", "id": "v"}


def test_number_that_is_new_anyway_or_the_callers_stays() -> None:
    for words in ("vmgenid", "vmgenid,guid=auto", "vmgenid,guid=00000000-{n}", "e1000,mac=1"):
        unchanged = command("-device", words)
        assert with_new_generation(unchanged) == (unchanged, [])


def test_guests_are_recognized_by_vmgenid_where_there_is_one() -> None:
    assert "vmgenid has them reseed" in shared_identity(command("-device", "vmgenid"))
    assert "a device vmgenid would" in shared_identity(command("-m", "64"))


def test_snapshot_that_another_process_holds_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    path.touch()
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not runs_already(file.fileno())
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert runs_already(file.fileno())
            process.communicate()
