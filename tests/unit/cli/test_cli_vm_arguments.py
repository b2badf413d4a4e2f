"""The command line of a VM among the arguments of ``vm restore`` and ``vm clone``."""

from __future__ import annotations

import pytest

from pyqmigrate.cli.outcome import shown_error
from pyqmigrate.errors import QemuError, UsageError
from tests.harness.command import Command


@pytest.mark.parametrize(
    "verb", [["restore"], ["clone", "--count", "2"], ["pool", "--socket", "s"]]
)
@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["qemu-system-x86_64", "-m", "64"], "qemu-system-x86_64"),
        (["qemu-kvm"], "qemu-kvm"),
        (["./start", "-m", "64"], "./start"),
        (["a", "--", "qemu-kvm"], "a"),
    ],
)
def test_forgotten_dashes_before_the_command_line_are_named(
    command: Command, verb: list[str], words: list[str], first: str
) -> None:
    ran = command("vm", *verb, "/none", *words)
    assert ran.code == 2
    assert f"-- must come before {first}: SNAPSHOT -- {first} ..." in ran.err


@pytest.mark.parametrize(
    "verb", [["restore"], ["clone", "--count", "2"], ["pool", "--socket", "s"]]
)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-vnc", ":1"], "-vnc looks like an option of QEMU"),
        (["-vga", "std"], "-vga looks like an option of QEMU"),
        (["-qmp", "stdio"], "-qmp looks like an option of QEMU"),
        (["-m", "64"], "-m looks like an option of QEMU"),
        (["-S"], "-S looks like an option of QEMU"),
        (["qemu-kvm", "-vnc", ":1"], "-- must come before qemu-kvm"),
        (["--", "qemu-kvm", "-vnc", ":1"], "no file '/none'"),
        (["-vq"], "no file '/none'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_options_of_qemu_that_begin_as_ours_do_not_hide_the_forgotten_dashes(
    command: Command, verb: list[str], words: list[str], said: str
) -> None:
    ran = command("vm", *verb, "/none", *words)
    assert ran.code == (3 if said == "no file '/none'" else 2)
    assert said in ran.err


@pytest.mark.parametrize("verb", ["restore", "clone"])
def test_usage_has_the_command_line_once(command: Command, verb: str) -> None:
    usage = command("vm", verb, "--help").out.split("\n\n")[0]
    assert usage.count("ARGS") == 1


def test_options_may_be_after_the_snapshot_and_dashes_in_the_command_line(command: Command) -> None:
    """Options of QEMU's are not ours, whatever they are called."""
    ran = command("vm", "restore", "/none", "--paused", "--json", "--", "qemu-kvm", "--", "--qmp")
    assert ran.code == 3
    assert "no file '/none'" in ran.err


def test_what_qemu_wrote_is_printed_in_its_lines_and_nothing_else_is() -> None:
    wrote = QemuError("QEMU does not start; QEMU wrote:\nqemu: a\x1b[2J\nqemu: b\r")
    assert shown_error(wrote) == ("QEMU does not start; QEMU wrote:\nqemu: a\\x1b[2J\nqemu: b\\r")
    assert shown_error(UsageError("no file 'a\nb'")) == "no file 'a\\nb'"
