"""A file is opened once: where its stream starts, libvirt's header, the configuration."""

import contextlib
import gzip
import os
from pathlib import Path

import pytest

from pyqmigrate import (
    Descriptors,
    NotSupported,
    RamBlock,
    Snapshot,
    SnapshotError,
    UsageError,
    save,
)
from pyqmigrate.format.libvirt import ImageFormat, LibvirtHeader, encode_header
from pyqmigrate.format.stream import start as start_module
from pyqmigrate.io.stream_file import StreamFile
from pyqmigrate.snapshot.detect import snapshot_of
from pyqmigrate.snapshot.mapped_ram import MappedRamSnapshot
from pyqmigrate.snapshot.sequential import SequentialSnapshot
from tests.harness.stream_builders import page_records, sequential_stream

HEADER = LibvirtHeader(True, 2, ImageFormat.RAW, True, "<domain/>", "", 4096, "little")


@pytest.fixture
def stream() -> bytes:
    return sequential_stream(page_records())


def test_the_stream_behind_a_header_of_libvirt_is_found(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "image").write_bytes(encode_header(HEADER) + stream)
    with contextlib.closing(StreamFile.open(tmp_path / "image")) as file:
        assert (file.offset, file.libvirt) == (4096, HEADER)
        assert file.configuration.capabilities == ()


def test_a_compressed_image_is_a_forward_only_source(tmp_path: Path, stream: bytes) -> None:
    header = HEADER._replace(format=ImageFormat.GZIP)
    (tmp_path / "image").write_bytes(encode_header(header) + gzip.compress(stream))
    with contextlib.closing(StreamFile.open(tmp_path / "image")) as file:
        assert (file.source.forward, file.offset, file.libvirt) == (True, 0, header)


def test_an_unfinished_image_is_refused(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "image").write_bytes(encode_header(HEADER._replace(complete=False)) + stream)
    with pytest.raises(SnapshotError, match="did not finish"):
        StreamFile.open(tmp_path / "image")


def test_an_offset_is_given_once(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "s").write_bytes(stream)
    with pytest.raises(UsageError, match="twice"):
        StreamFile.open(f"file:{tmp_path / 's'},offset=8", offset=8)
    with (tmp_path / "s").open("rb") as file, pytest.raises(UsageError, match="twice"):
        StreamFile.open(Descriptors(file.fileno()), offset=8)


@pytest.mark.parametrize("kind", ["mapped-ram", "sequential"])
def test_the_configuration_is_parsed_once_for_each_opening(
    tmp_path: Path, stream: bytes, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    if kind == "sequential":
        path.write_bytes(stream)
    else:
        save(path, [RamBlock("pc.ram", bytearray(8192))])
    parsed = []
    read = start_module.configuration.read

    def noted(cursor: object) -> object:
        parsed.append(cursor)
        return read(cursor)  # type: ignore[arg-type]

    monkeypatch.setattr(start_module.configuration, "read", noted)
    with Snapshot(path) as snapshot:
        snapshot.verify()
        snapshot.load({"pc.ram": bytearray(snapshot.blocks["pc.ram"].length)})
    assert len(parsed) == 1


def test_a_shared_file_stays_open(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "s").write_bytes(stream)
    with contextlib.closing(StreamFile.open(tmp_path / "s")) as file:
        with snapshot_of(file.share()) as snapshot:
            snapshot.verify()
        assert os.fstat(file.source.fd).st_size == len(stream)


def test_a_file_that_cannot_be_a_snapshot_is_closed(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"\x11\x22\x33\x44" + bytes(100))
    file = StreamFile.open(tmp_path / "s")
    with pytest.raises(NotSupported, match="multifd"):
        snapshot_of(file)
    assert file.source.fd == -1


def test_calling_snapshot_opens_any_kind(tmp_path: Path, stream: bytes) -> None:
    (tmp_path / "sequential").write_bytes(stream)
    save(tmp_path / "mapped", [RamBlock("pc.ram", bytearray(8192))])
    with Snapshot(tmp_path / "sequential") as one, Snapshot(tmp_path / "mapped") as other:
        assert isinstance(one, SequentialSnapshot)
        assert isinstance(other, MappedRamSnapshot)


@pytest.mark.parametrize("kind", [MappedRamSnapshot, SequentialSnapshot])
def test_a_kind_of_snapshot_does_not_open_a_path(kind: type, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="open_snapshot"):
        kind(tmp_path / "s")
