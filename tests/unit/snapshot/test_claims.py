"""Files that claim much and hold little: what they cost is what they hold."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyqmigrate import SnapshotError, verify_seal
from pyqmigrate.format.digest import Algorithm
from pyqmigrate.format.seal import PIECE, SealHead, SealLine
from pyqmigrate.format.stream.mapped_ram import BlockLayout
from pyqmigrate.io.bitmap import Bitmap
from tests.harness.stream_builders import EOF, RAM_EOS, Raw, end, part, start, str8, words

SECONDS = 2.0  # of the processor
MEMORY = 300 << 10  # KiB, the interpreter's own included
TABLES = 4 << 10  # KiB of page tables
# Runs one verb and tells what it took.
RUN = """
import json, os, re, resource, sys
from pathlib import Path
from pyqmigrate.cli import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
status = Path("/proc/self/status").read_text()
print(json.dumps({
    "code": code, "seconds": used.ru_utime + used.ru_stime,
    # Unlike ru_maxrss, without the program that this process was before exec().
    "memory": int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]),
    "tables": int(re.search(r"VmPTE:\\s+(\\d+)", status)[1]),
}), file=sys.stderr)
"""


def claiming(blocks: int, length: int, *, records: bool) -> bytes:
    """A sequential stream of so many long blocks; with two pages in each, or none."""
    names = [f"b{n}".encode() for n in range(blocks)]
    entries = b"".join(str8(name) + words(length) for name in names)
    pages = b"".join(
        words(length - 4096 | 8) + str8(name) + b"\1" * 4096 + words(0x28) + b"\2" * 4096
        for name in names
    )
    return (
        b"QEVM"
        + struct.pack(">IBI", 3, 7, 2)
        + b"pc"
        + start(1, "ram", 4, words(blocks * length | 4) + entries + RAM_EOS)
        + part(1, (pages if records else b"") + RAM_EOS)
        + end(1, RAM_EOS)
        + EOF
    )


def described_by(text: bytes) -> bytes:
    return claiming(1, 1 << 20, records=False) + struct.pack(">BI", 6, len(text)) + text


FILES: dict[str, Callable[[], bytes]] = {
    "one block": lambda: claiming(1, 1 << 49, records=False),
    "many blocks": lambda: claiming(200, 1 << 49, records=False),
    "more than fit in an address space": lambda: claiming(4000, 1 << 50, records=False),
    "pages at both ends": lambda: claiming(20, 1 << 49, records=True),
    "long text": lambda: described_by(
        b'{"page_size": 4096, "devices": [], "x": "' + b"a" * (63 << 20) + b'"}'
    ),
    "long text of wide characters": lambda: described_by(
        '{"page_size": 4096, "devices": [], "x": "\U0001f600'.encode() + b"a" * (63 << 20) + b'"}'
    ),
    "long text with an escape": lambda: described_by(
        rb'{"page_size": 4096, "devices": [], "x": "\ud83d\ude00' + b"a" * (63 << 20) + b'"}'
    ),
}
VERBS: dict[str, list[str]] = {
    "info": [],
    "verify": [],
    "devices": [],
    "seal": [],
    "unpack": ["raw"],
    "convert": ["new", "--to", "mapped-ram"],
}


@pytest.mark.parametrize(
    ("what", "verb"),
    [
        (what, verb)
        for what in FILES
        for verb in VERBS
        if "text" not in what or verb in ("info", "devices")  # the others read it just so
    ],
)
def test_what_a_file_claims_costs_nothing(
    what: str, verb: str, shm: Path, child_environment: dict[str, str]
) -> None:
    (shm / "file").write_bytes(FILES[what]())
    arguments = [str(shm / name) if name in ("raw", "new") else name for name in VERBS[verb]]
    ran = subprocess.run(
        [sys.executable, "-c", RUN, verb, str(shm / "file"), *arguments],
        env=child_environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=120,
        check=True,
    )
    took = json.loads(ran.stderr.splitlines()[-1])
    assert took["code"] in (0, 1, 3, 5)
    assert took["seconds"] < SECONDS
    assert took["memory"] < MEMORY
    assert took["tables"] < TABLES


def test_a_hole_of_a_snapshot_is_unpacked_at_once(
    shm: Path, child_environment: dict[str, str]
) -> None:
    """A block of 32 TiB, of which the last page is there; its bitmap is a hole but for a bit."""
    length, pages = 32 << 40, 2 << 30
    made = Raw(length=length, total=length, pages_offset=pages).file()
    bitmap = made.pieces[0][1]  # the bitmap follows the head
    with (shm / "file").open("wb") as file:
        file.truncate(made.size)
        for offset, data in made.pieces:
            file.seek(offset)
            file.write(data)
        file.seek(len(bitmap) + length // 4096 // 8 - 1)
        file.write(b"\x80")
        file.seek(pages + length - 4096)
        file.write(b"\7" * 4096)
    ran = subprocess.run(
        [sys.executable, "-c", RUN, "unpack", str(shm / "file"), str(shm / "raw")],
        env=child_environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=120,
        check=True,
    )
    took = json.loads(ran.stderr.splitlines()[-1])
    assert took["code"] == 0, ran.stderr
    assert took["seconds"] < SECONDS
    assert took["tables"] < TABLES
    [raw] = (shm / "raw").glob("*.raw")
    with raw.open("rb") as file:
        file.seek(length - 4096)
        assert file.read() == b"\7" * 4096


def test_a_long_bitmap_is_counted_where_it_was_touched() -> None:
    bitmap = Bitmap(1 << 37)
    assert (bitmap.count(), bitmap.last()) == (0, -1)
    pages = [0, 63, 8 << 20, (1 << 36) + 5, (1 << 37) - 1]
    for page in pages:
        bitmap.core[page // 64] |= 1 << page % 64
    assert (bitmap.count(), bitmap.last()) == (len(pages), pages[-1])
    assert bitmap.count((1 << 36) + 5) == 3
    assert bitmap.count((1 << 36) + 6) == 4
    written: dict[int, bytes] = {}

    class Target:
        def write_at(self, offset: int, data: bytes | memoryview) -> None:
            written[offset] = bytes(data)

    bitmap.write_to(Target(), 512, everything=False)
    found = sorted(
        (offset - 512 + at) * 8 + bit
        for offset, data in written.items()
        for at, byte in enumerate(data)
        for bit in range(8)
        if byte >> bit & 1
    )
    assert found == pages
    bitmap.close()


def sealed_blocks(blocks: list[BlockLayout], size: int) -> bytes:
    head = SealHead(Algorithm.XXH3_128, size, 1, True, 0, tuple(blocks))
    digests = b"\1" * (size // PIECE * 16)
    return head.encode(digests) + digests


def test_a_seal_with_blocks_that_overlap_is_refused(tmp_path: Path) -> None:
    """Thousands of them, each damaged at each place, once took minutes."""
    size = 400 * PIECE
    (tmp_path / "file").touch()
    (tmp_path / "file").open("r+b").truncate(size)
    over = [BlockLayout(f"b{n}", size, 4096, 100, 200, PIECE) for n in range(5000)]
    (tmp_path / "file.seal").write_bytes(sealed_blocks(over, size))
    with pytest.raises(SnapshotError) as caught:
        verify_seal(tmp_path / "file")
    assert caught.value.field == "seal"
    bitmaps = [
        BlockLayout(f"b{n}", PIECE, 4096, 100 + 2 * n * PIECE, 8000, (2 * n + 1) * PIECE)
        for n in range(3)
    ]
    line = sealed_blocks(bitmaps, size).partition(b"\n")[0] + b"\n"
    with pytest.raises(SnapshotError, match="overlap"):
        SealLine.decode(line)


def test_damage_among_thousands_of_blocks_is_named_once(tmp_path: Path) -> None:
    size, count = 6000 * PIECE, 2900
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    blocks = [
        BlockLayout(
            f"b{n}", PIECE, 4096, 2 * n * PIECE + 100, 2 * n * PIECE + 128, (2 * n + 1) * PIECE
        )
        for n in range(count)
    ]
    (tmp_path / "file.seal").write_bytes(sealed_blocks(blocks, size))
    check = verify_seal(tmp_path / "file")
    assert check is not None
    assert not check.intact
    parts = [part for damage in check.damages for part in damage.parts]
    assert [p.block for p in parts if p.what == "pages"] == [block.name for block in blocks]
    assert len([part for part in parts if part.what == "bitmap"]) == count


def test_a_bitmap_behind_its_pages_is_named_too(tmp_path: Path) -> None:
    """QEMU puts it before them, and nothing has to."""
    size = 20 * PIECE
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    block = BlockLayout("ram", PIECE, 4096, 100, 9 * PIECE, 2 * PIECE)
    line = sealed_blocks([block], size)
    digests = bytearray(line.partition(b"\n")[2])
    head = SealLine.decode(line.partition(b"\n")[0] + b"\n").head
    (tmp_path / "file.seal").write_bytes(head.encode(bytes(digests)) + digests)
    check = verify_seal(tmp_path / "file")
    assert check is not None
    named = {(part.what, part.block) for damage in check.damages for part in damage.parts}
    assert ("bitmap", "ram") in named
    assert ("pages", "ram") in named
