"""QEMU's command line: words to options and back, and the lists of properties in them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import UsageError
from pyqmigrate.vm.qemu.command_line import (
    CommandLine,
    Option,
    escape,
    is_on,
    join_properties,
    read_ram_size,
)

TEXT = st.text("abcxyz0189,=./ -", max_size=12)
KEY = st.text("abcdefg-", min_size=1, max_size=8).filter(lambda key: not key.startswith("no"))


def parse(text: str) -> CommandLine:
    return CommandLine.parse(["qemu-system-x86_64", *text.split()])


def test_one_dash_and_two_are_the_same() -> None:
    assert parse("-machine pc --m 64 --snapshot").options == (
        Option("machine", "pc"),
        Option("m", "64"),
        Option("snapshot"),
    )


def test_short_name_of_machine_is_the_long_one() -> None:
    assert parse("-M q35").last("machine") == Option("machine", "q35")


def test_word_that_is_not_an_option_is_a_disk_image() -> None:
    assert parse("-nographic disk.img -m 64").all("") == [Option("", "disk.img")]


def test_value_that_looks_like_an_option_stays_a_value() -> None:
    assert parse("-append -incoming -S").options == (Option("append", "-incoming"), Option("S"))


@given(st.lists(st.tuples(st.sampled_from(["m", "object", "drive", "S", ""]), TEXT)))
def test_words_go_through_unchanged(options: list[tuple[str, str]]) -> None:
    given = CommandLine(
        "qemu",
        tuple(
            Option(name) if name == "S" else Option(name, value)
            for name, value in options
            if name or not value.startswith("-")
        ),
    )
    assert CommandLine.parse(given.argv()) == given


@pytest.mark.parametrize(
    "before", [["numactl", "--membind=0"], ["env", "A=b"], ["nice", "-n", "5", "taskset", "1"]]
)
def test_program_that_starts_qemu_stays_before_it(before: list[str]) -> None:
    words = [*before, "/usr/bin/qemu-system-x86_64", "-m", "64", "d.img"]
    command = CommandLine.parse(words)
    assert command.program == "/usr/bin/qemu-system-x86_64"
    assert command.options == (Option("m", "64"), Option("", "d.img"))
    assert command.with_options(Option("S")).argv() == [*words, "-S"]


def test_words_that_are_not_changed_stay_as_they_are_written() -> None:
    words = ["qemu-kvm", "-M", "pc", "--m", "64", "--snapshot", "-nodefconfig"]
    assert CommandLine.parse(words).filled_in(1).without("x").argv() == words


def test_variables_in_front_are_for_env() -> None:
    """As libvirt's log shows a command line."""
    words = ["LC_ALL=C", "PATH=/bin", "/usr/bin/qemu-system-x86_64", "-m", "64"]
    command = CommandLine.parse(words)
    assert command.program == "/usr/bin/qemu-system-x86_64"
    assert command.argv() == ["env", *words]
    with_wrapper = CommandLine.parse(["A=b", "numactl", "--membind=0", "qemu-kvm", "-S"])
    assert with_wrapper.argv() == ["env", "A=b", "numactl", "--membind=0", "qemu-kvm", "-S"]
    assert with_wrapper.options == (Option("S"),)
    other = CommandLine.parse(["A=b", "./start-qemu", "-S"])
    assert (other.program, other.options) == ("./start-qemu", (Option("S"),))


@pytest.mark.parametrize("words", [[], ["-m", "64"], ["A=b"], ["A=b", "-m", "64"]])
def test_command_line_without_a_program_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="must start with the program"):
        CommandLine.parse(words)


def test_last_option_without_its_value_is_refused() -> None:
    with pytest.raises(UsageError, match="ends with -m"):
        parse("-S -m")


@given(st.dictionaries(KEY, TEXT.filter(bool), min_size=1))
def test_properties_come_back_whatever_commas_they_hold(properties: dict[str, str]) -> None:
    option = Option("object", join_properties("memory-backend-ram", properties))
    assert option.properties("qom-type") == {"qom-type": "memory-backend-ram", **properties}


def test_escaped_text_is_one_property() -> None:
    assert Option("drive", f"file={escape('/a,b,,c')},if=none").properties() == {
        "file": "/a,b,,c",
        "if": "none",
    }


def test_bare_keys_are_switches() -> None:
    found = Option("chardev", "socket,id=c,server,nowait,path=/s").properties("backend")
    assert found == {"backend": "socket", "id": "c", "server": "on", "wait": "off", "path": "/s"}


def test_json_is_read_like_a_list() -> None:
    option = Option("blockdev", '{"driver":"qcow2","read-only":true,"file":{"filename":"/d"}}')
    assert option.properties("driver") == {
        "driver": "qcow2",
        "read-only": "on",
        "file.filename": "/d",
    }


def test_bad_json_is_refused() -> None:
    with pytest.raises(UsageError, match="not JSON"):
        Option("object", '{"qom-type":').properties("qom-type")


@pytest.mark.parametrize("depth", [500, 2000, 100_000])
def test_json_that_is_nested_deeply_is_refused_or_read(depth: int) -> None:
    option = Option("object", '{"a":' * depth + "1" + "}" * depth)
    with contextlib.suppress(UsageError):
        assert len(option.properties("qom-type")) == 1
    if depth > 1000:
        with pytest.raises(UsageError, match="nested too deeply"):
            option.properties("qom-type")


def test_property_is_set_over_what_was_there() -> None:
    assert Option("d", "x,a=1").with_property("a", "2,3").properties("t") == {"t": "x", "a": "2,3"}
    assert Option("d", "x,a=on").with_property("a", False).value == "x,a=on,a=off"
    assert Option("d", '{"a":1}').with_property("a", "2").value == '{"a": "2"}'


def test_options_of_one_name_merge_and_the_last_wins() -> None:
    command = parse("-M pc,memory-backend=a -machine memory-backend=b,usb=off")
    assert command.merged("machine", "type") == {"type": "pc", "memory-backend": "b", "usb": "off"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64", 64 << 20),
        ("64M", 64 << 20),
        ("1.5G", 3 << 29),
        ("size=2g,slots=4,maxmem=8G", 2 << 30),
        ("4096k", 4 << 20),
    ],
)
def test_ram_size_is_in_mebibytes_unless_it_says_otherwise(text: str, size: int) -> None:
    assert read_ram_size(parse(f"-m {text}")) == size


def test_ram_size_is_unknown_without_the_option() -> None:
    assert read_ram_size(parse("-S")) is None


def test_ram_size_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="not a size"):
        read_ram_size(parse("-m lots"))


def test_number_is_filled_in_everywhere() -> None:
    command = parse("-drive file={n}.img -qmp unix:/run/{n}-{n}.qmp,server").filled_in(3)
    assert command.argv()[1:] == ["-drive", "file=3.img", "-qmp", "unix:/run/3-3.qmp,server"]


@pytest.mark.parametrize(
    ("value", "on"), [("on", True), ("Yes", True), ("off", False), (None, False), ("", False)]
)
def test_switch_is_on_in_every_spelling(value: str | None, on: bool) -> None:
    assert is_on(value) is on


@pytest.mark.parametrize("depth", [5000, 200_000])
def test_json_that_is_nested_too_deeply_is_wrong_usage(depth: int) -> None:
    option = Option("object", '{"a":' * depth + "1" + "}" * depth)
    for use in (option.properties, lambda: option.with_property("b", True)):
        with pytest.raises(UsageError, match="-object"):
            use()


def test_json_that_is_nested_deeply_is_read_or_wrong_usage() -> None:
    """Near the limit of one of the recursions in between."""
    for depth in range(50, 1200, 50):
        option = Option("object", '{"a":' * depth + "1" + "}" * depth)
        for use in (option.properties, lambda o=option: o.with_property("b", True)):
            with contextlib.suppress(UsageError):
                use()
