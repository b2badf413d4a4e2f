"""A Linux that works on files while increments are taken; the files of each restored one are whole."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyqmigrate.format.stream.mapped_ram import PAGES_ALIGNMENT
from pyqmigrate.vm import sync
from tests.harness.linux_guest import Console, LinuxGuest
from tests.harness.verbs import restored, save

pytestmark = pytest.mark.qemu

MIB = 1 << 20
MEGABYTES = 128

# Files of 256 KiB, each written under another name, listed with its digest, and renamed: at any
# instant each file but one that is being renamed or removed is as listed. Every third round removes a file.
WORK = """\
mkdir work; cd work; : > sums
round=0
while :; do
  round=$((round + 1))
  name=file-$((round % 8))
  dd if=/dev/urandom of=new bs=64k count=4 2>/dev/null
  sum=$(md5sum < new)
  grep -v "^$name " sums > sums.new
  if [ $((round % 3)) = 0 ]; then
    rm -f $name; rm new
  else
    echo "$name $sum" >> sums.new
  fi
  echo $round > sums.round
  mv sums.new sums
  [ -e new ] && mv new $name
  mv sums.round round
done
"""
# Prints how many files are listed, how many differ, and the round.
VERIFY = """\
wrong=0; checked=0
while read name sum; do
  checked=$((checked + 1))
  [ "$(cat work/$name 2>/dev/null | md5sum)" = "$sum" ] || wrong=$((wrong + 1))
done < work/sums
echo "$checked $wrong $(cat work/round)"
"""
STOP = "kill -STOP $worker"


@dataclass(frozen=True)
class Taken:
    """An increment, and what was known shortly before and after it: the rounds of the work."""

    path: Path
    before: int
    after: int
    allocated: int


@dataclass(frozen=True)
class Series:
    """Increments of one base, taken one after another from a guest that worked all the time."""

    guest: LinuxGuest
    base: Path
    taken: list[Taken]
    kept: str


def rounds(console: Console) -> int:
    return int(console.run("cat work/round"))


def take_series(directory: Path, count: int) -> Series:
    guest = LinuxGuest(directory, megabytes=MEGABYTES)
    base = directory / "base.mapped"
    with guest.boot() as console:
        console.run("dd if=/dev/urandom of=kept bs=64k count=64 2>/dev/null")
        kept = console.run("md5sum < kept")
        console.run(f"cat > work.sh <<'END'\n{WORK}END")
        console.run("sh work.sh & worker=$!")
        console.run("until [ -s work/round ]; do sleep 0.1; done")
        save(guest.qmp, base)
    monitor = directory / "monitor"
    console_path = directory / "restored"
    command = [*guest.command(console_path), "-qmp", f"unix:{monitor},server=on,wait=off"]
    vm = sync.restore(base, command, mode="instant", paused=False, stdin=subprocess.DEVNULL)
    taken = []
    try:
        with Console(console_path) as console:
            for number in range(count):
                before = rounds(console)
                console.run(f"until [ $(cat work/round) -gt {before + 2} ]; do sleep 0.05; done")
                before = rounds(console)
                path = directory / f"{number}.increment"
                report = save(monitor, path, "--base", "auto")
                assert (report["method"], report["run_state_after"]) == ("changed", "running")
                taken.append(Taken(path, before, rounds(console), path.stat().st_blocks * 512))
    finally:
        vm.process.kill()
        vm.process.wait()
    return Series(guest, base, taken, kept)


@pytest.fixture(
    scope="module", params=[2, pytest.param(10, marks=pytest.mark.long)], ids=["two", "ten"]
)
def series(request: pytest.FixtureRequest, module_disk: Path) -> Iterator[Series]:
    directory = module_disk / f"series-{request.param}"
    directory.mkdir()
    yield take_series(directory, request.param)


@pytest.mark.parametrize("mode", ["instant", "load"])
def test_files_of_each_restored_increment_are_whole(
    series: Series, mode: str, tmp_path: Path
) -> None:
    for number, taken in enumerate(series.taken):
        path = tmp_path / f"console-{number}"
        with (
            restored(taken.path, series.guest.command(path), "--mode", mode) as report,
            Console(path) as console,
        ):
            assert (report["mode"], report["run_state"]) == (mode, "running")
            console.run(STOP)
            checked, wrong, last = (int(word) for word in console.run(VERIFY).split())
            assert checked > 0
            assert wrong <= 1, f"{wrong} of {checked} files of increment {number} are wrong"
            assert taken.before <= last
            assert console.run("md5sum < kept") == series.kept
            console.run("kill -CONT $worker")
            console.run(f"until [ $(cat work/round) -gt {last} ]; do sleep 0.05; done")
            log = console.run("dmesg")
            assert not re.search(r"BUG|Oops|corrupt|soft lockup|stall|Call Trace", log)


def test_each_increment_is_of_its_own_instant(series: Series) -> None:
    for earlier, later in zip(series.taken, series.taken[1:], strict=False):
        assert earlier.before < later.before


def test_an_increment_has_only_what_the_guest_changed(series: Series) -> None:
    base = series.base.stat().st_blocks * 512
    assert all(taken.allocated < base / 2 + PAGES_ALIGNMENT for taken in series.taken)
