"""Converting on the command line, and what the verbs say of a sequential stream."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pyqmigrate import RamBlock, SnapshotError, open_snapshot
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.snapshot.save.sequential import start_sequential_save
from tests.harness.command import COMMAND, PAGE, Command, make_snapshot, pages
from tests.harness.physical import Physical


def save_sequential(target: Path | str, memory: bytes, machine: str = "pc-q35-9.2") -> None:
    start_sequential_save(target, [RamBlock("pc.ram", memory)], machine=machine).wait()


@pytest.fixture
def sequential(tmp_path: Path) -> Path:
    save_sequential(tmp_path / "sequential", pages(9, 1))
    return tmp_path / "sequential"


@pytest.mark.parametrize("form", ["mapped-ram", "stream"])
def test_target_has_the_memory_in_the_form_asked_for(
    sequential: Path, tmp_path: Path, command: Command, form: str
) -> None:
    ran = command("convert", sequential, tmp_path / "to", "--to", form, "--json")
    assert ran.code == 0
    assert (ran.json["to"], ran.json["data_pages"], ran.json["zero_pages"]) == (form, 6, 3)
    with open_snapshot(tmp_path / "to") as snapshot:
        assert str(snapshot.format) == form
        assert snapshot.blocks["pc.ram"].read(0, 9 * PAGE) == pages(9, 1)


def test_raw_files_are_those_of_unpack(sequential: Path, tmp_path: Path, command: Command) -> None:
    assert command("convert", sequential, tmp_path / "raw", "--to", "raw").code == 0
    assert command("unpack", sequential, tmp_path / "out").code == 0
    for directory in ("raw", "out"):
        assert (tmp_path / directory / "pc.ram.raw").read_bytes() == pages(9, 1)


def test_a_description_for_raw_files_is_refused_before_a_qemu_starts(
    tmp_path: Path, command: Command
) -> None:
    """Before anything else, too: neither the snapshot nor the program exists."""
    missing = tmp_path / "missing"
    ran = command("convert", missing, tmp_path / "raw", "--to", "raw", "--describe", "--", missing)
    assert ran.code == 2
    assert "raw files hold RAM only" in ran.err
    assert not (tmp_path / "raw").exists()


def test_form_has_to_be_said(sequential: Path, tmp_path: Path, command: Command) -> None:
    assert command("convert", sequential, tmp_path / "to").code == 2
    assert command("convert", sequential, tmp_path / "to", "--to", "qcow2").code == 2


def test_damaged_source_is_bad_and_makes_no_target(
    sequential: Path, tmp_path: Path, command: Command
) -> None:
    os.truncate(sequential, sequential.stat().st_size - 1)
    assert command("convert", sequential, tmp_path / "to", "--to", "mapped-ram").code == 1
    assert not (tmp_path / "to").exists()


def test_info_reports_a_sequential_stream(sequential: Path, command: Command) -> None:
    info = command("info", sequential, "--json").json
    assert info["kind"] == "stream"
    assert info["written_by"]["qemu"] == "9.2"
    assert info["loadable"] is True
    assert info["blocks"] == [
        {
            "name": "pc.ram",
            "length": 9 * PAGE,
            "page_size": PAGE,
            "pages": 9,
            "data_pages": 6,
            "zero_pages": 3,
            "bitmap_offset": None,
            "pages_offset": None,
            "external": False,
        }
    ]
    assert "would load it" in command("info", sequential).out


def test_verify_counts_the_pages_of_a_sequential_stream(sequential: Path, command: Command) -> None:
    ran = command("verify", sequential, "--json")
    assert (ran.code, ran.json["data_pages"], ran.json["zero_pages"]) == (0, 6, 3)


def test_kept_index_is_written_where_it_is_asked_for(
    sequential: Path, tmp_path: Path, command: Command
) -> None:
    for _ in range(2):
        assert command("verify", sequential, "--index", tmp_path / "index").code == 0
    assert (tmp_path / "index").exists()


def test_xml_of_libvirt_is_printed(tmp_path: Path, command: Command) -> None:
    xml = "<domain>\n  <name>\x1b[2J</name>\n</domain>"
    front = encode_header(
        LibvirtHeader(True, 2, ImageFormat.RAW, False, xml, "<cookie/>", 4096, "little")
    )
    (tmp_path / "save").write_bytes(front)
    save_sequential(f"file:{tmp_path}/save,offset=4096", pages(3))
    assert command("info", tmp_path / "save", "--xml").out == (
        "<domain>\n  <name>\\x1b[2J</name>\n</domain>\n"
    )
    libvirt = command("info", tmp_path / "save", "--json").json["libvirt"]
    assert libvirt == {
        "version": 2,
        "format": "raw",
        "was_running": False,
        "xml": xml,
        "cookie": "<cookie/>",
    }
    assert "libvirt" in command("info", tmp_path / "save").out


@pytest.mark.parametrize("form", [ImageFormat.LZOP, ImageFormat.RAW])
def test_xml_is_printed_where_the_stream_cannot_be_read(
    tmp_path: Path, command: Command, form: ImageFormat
) -> None:
    complete = form is not ImageFormat.RAW
    image = encode_header(LibvirtHeader(complete, 2, form, True, "<domain/>", "", 200, "big"))
    (tmp_path / "save").write_bytes(image + b"noise")
    assert command("info", tmp_path / "save", "--xml").out == "<domain/>\n"
    assert command("info", tmp_path / "save").code == (5 if complete else 1)
    assert command("info", tmp_path / "save", "--xml", "--offset", "200").code == 2


def test_header_of_an_image_that_cannot_be_read_is_shown(tmp_path: Path, command: Command) -> None:
    front = LibvirtHeader(True, 2, ImageFormat.LZOP, True, "<domain/>", "<c/>", 200, "little")
    (tmp_path / "save").write_bytes(encode_header(front) + b"noise")
    ran = command("info", tmp_path / "save", "--json")
    assert ran.code == 5
    assert ran.json["offset"] == 200
    assert "lzop -dc" in ran.json["unreadable"]
    assert ran.json["libvirt"] == {
        "version": 2,
        "format": "lzop",
        "was_running": True,
        "xml": "<domain/>",
        "cookie": "<c/>",
    }
    text = command("info", tmp_path / "save").out
    assert "the guest was running" in text
    assert "tail -c +201" in text


def test_compressed_image_is_shown_verified_and_converted(tmp_path: Path, command: Command) -> None:
    save_sequential(tmp_path / "sequential", pages(9, 1))
    front = LibvirtHeader(True, 2, ImageFormat.GZIP, False, "<domain/>", "", 200, "little")
    packed = gzip.compress((tmp_path / "sequential").read_bytes())
    (tmp_path / "save").write_bytes(encode_header(front) + packed)
    info = command("info", tmp_path / "save", "--json").json
    assert (info["libvirt"]["format"], info["machine"], info["file_size"]) == (
        "gzip",
        "pc-q35-9.2",
        200 + len(packed),
    )
    assert "gzip image" in command("info", tmp_path / "save").out
    assert command("verify", tmp_path / "save", "--json").json["data_pages"] == 6
    assert command("convert", tmp_path / "save", tmp_path / "to", "--to", "mapped-ram").code == 0
    assert command("convert", tmp_path / "save", tmp_path / "elf", "--to", "elf").code == 5
    with open_snapshot(tmp_path / "to") as snapshot:
        assert snapshot.blocks["pc.ram"].read(0, 9 * PAGE) == pages(9, 1)


def test_xml_of_no_libvirt_image_is_wrong_usage(sequential: Path, command: Command) -> None:
    assert command("info", sequential, "--xml").code == 2


def kill_conversions(
    disk: Path, environment: dict[str, str], form: str, delays: tuple[float, ...]
) -> list[bytes]:
    """Converts over an old target, killed after each of the delays; what the target was then."""
    source = (disk / "from").read_bytes()
    found = []
    for delay in delays:
        (disk / "to").write_bytes(b"old")
        process = subprocess.Popen(
            [*COMMAND, "convert", str(disk / "from"), str(disk / "to"), "--to", form],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append((disk / "to").read_bytes())
        for entry in disk.iterdir():
            if entry.name not in ("from", "to"):
                # A finished file that was killed between getting this name and its own.
                assert entry.name.endswith(".partial")
                found.append(entry.read_bytes())
                entry.unlink()
    assert (disk / "from").read_bytes() == source
    whole = [data for data in found if data != b"old"]
    assert whole, "no conversion ended: the test proves nothing"
    return whole


def test_killed_conversion_leaves_the_source_and_no_half_of_a_target(
    disk: Path, child_environment: dict[str, str]
) -> None:
    memory = pages(8192, 5)
    save_sequential(disk / "from", memory)
    delays = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 2.0)
    for data in kill_conversions(disk, child_environment, "mapped-ram", delays):
        (disk / "to").write_bytes(data)
        with open_snapshot(disk / "to") as snapshot:
            snapshot.verify()
            assert snapshot.blocks["pc.ram"].read(0, len(memory)) == memory


@pytest.mark.long  # the library's own are in tests/unit/export/test_convert_killed.py
@pytest.mark.parametrize("form", ["elf", "lime"])
def test_killed_export_leaves_no_half_of_a_file(
    disk: Path, child_environment: dict[str, str], form: str
) -> None:
    memory = pages(8192, 5)
    save_sequential(disk / "from", memory)
    for data in kill_conversions(disk, child_environment, form, (0.2, 0.3, 0.35, 0.45, 3.0)):
        (disk / "to").write_bytes(data)
        read = Physical.of_elf if form == "elf" else Physical.of_lime
        assert read(disk / "to").all() == {0: memory}


@pytest.mark.parametrize("form", ["elf", "lime"])
def test_export_shows_where_memory_is(tmp_path: Path, command: Command, form: str) -> None:
    blocks = {"pc.ram": pages(9, 1), "odd\x1b[2J": pages(6, 2)}
    make_snapshot(tmp_path / "s", blocks, machine="pc-q35-10.0")
    arguments = ["convert", tmp_path / "s", tmp_path / "to", "--to", form]
    ran = command(*arguments, "--map", "pc.ram@0x1000+4096,8192", "--json")
    assert ran.code == 0
    assert ran.json["ranges"] == [
        {"block": "pc.ram", "address": 4096, "offset": 4096, "length": 8192}
    ]
    assert (ran.json["unplaced"], ran.json["cpus"]) == (["odd\x1b[2J"], 0)
    assert ran.json["file_size"] == (tmp_path / "to").stat().st_size
    text = command(*arguments).out
    assert "0x9000" in text
    assert "odd\\x1b[2J" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    "words",
    [
        ("--map", "pc.ram"),
        ("--map", "pc.ram@0x10000000000000000"),
        ("--map", "nobody@0"),
        ("--map", "pc.ram@0", "--map", "pc.ram@0"),
        ("--memory", "pc.ram=/dev/null"),
    ],
)
def test_wrong_words_about_an_export_are_wrong_usage(
    sequential: Path, tmp_path: Path, command: Command, words: tuple[str, ...]
) -> None:
    assert command("convert", sequential, tmp_path / "to", "--to", "elf", *words).code == 2
    assert not (tmp_path / "to").exists()


def test_machine_of_which_nothing_is_known_is_not_supported(
    tmp_path: Path, command: Command
) -> None:
    make_snapshot(tmp_path / "s", {"ram": pages(9)}, machine="toaster")
    ran = command("convert", tmp_path / "s", tmp_path / "to", "--to", "lime")
    assert ran.code == 5
    assert "--map" in ran.err


def test_interrupted_pass_says_so(
    sequential: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyqmigrate.snapshot.sequential.SequentialSnapshot.read_through", interrupt)
    assert command("verify", sequential).code == 130


def test_what_is_not_a_snapshot_is_bad(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"ELF")
    with pytest.raises(SnapshotError):
        open_snapshot(tmp_path / "s")
