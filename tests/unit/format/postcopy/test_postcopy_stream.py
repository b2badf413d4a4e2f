"""The bytes of the source's side, against the table of docs/internals/format.md."""

from __future__ import annotations

import pytest

from pyqmigrate.errors import UsageError
from pyqmigrate.format.postcopy import stream
from pyqmigrate.format.postcopy.stream import PostcopyBlock, encode_head, encode_package
from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.configuration import Configuration

PAGE = 4096
ID = "00 52 41 4d "  # "RAM"


def block(name: str, length: int, host_page_size: int = PAGE) -> PostcopyBlock:
    return PostcopyBlock(BlockSpec(name, length), host_page_size)


def test_head() -> None:
    blocks = [block("a", 2 << 20, 2 << 20), block("b", PAGE)]
    assert encode_head(Configuration("pc"), blocks, b"EARLY") == bytes.fromhex(
        "51 45 56 4d 00000003 07 00000002 7063"
        "08 0001 0000"
        "08 0002 0004 00000001"
        "08 0003 0010 0000000000201000 0000000000001000"
        "01" + ID + "03 72616d 00000000 00000004"
        "0000000000201004"
        "01 61 0000000000200000 0000000000200000"
        "01 62 0000000000001000"
        "0000000000000010 7e" + ID
    ) + b"EARLY" + bytes.fromhex("08 0006 0014 00 01 61 00 0000000000000000 0000000000200000")


def test_package() -> None:
    assert encode_package(b"DEVICES") == bytes.fromhex(
        "08 0007 0004 0000001a 08 0004 0000"
    ) + b"DEVICES" + bytes.fromhex("08 0002 0004 00000003 08 0005 0000")


def test_package_that_qemu_refuses_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PACKAGE_MAX", 100)
    with pytest.raises(UsageError, match="90 bytes of device state are too long"):
        encode_package(bytes(90))


def test_end_and_recovery() -> None:
    assert bytes.fromhex("03" + ID + "0000000000000010 7e" + ID + "00") == stream.END
    assert bytes.fromhex("08 0009 0000") == stream.RESUME
    assert stream.ask_received("ab") == bytes.fromhex("08 000a 0003 02 6162")


def test_stream_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="no RAM block"):
        encode_head(Configuration("pc"), [])
