"""Files as QEMU writes them with ``background-snapshot`` and ``mapped-ram``."""

from __future__ import annotations

from pathlib import Path

from pyqmigrate.format.stream.block_spec import BlockSpec
from pyqmigrate.format.stream.writer import (
    RAM_EOS,
    encode_head,
    encode_part_header,
    encode_ram_end,
    encode_tail,
)
from tests.harness.kernel import Bits, Bytes
from tests.harness.stream_builders import described, device, full

__all__ = ["DEVICES", "write_background_snapshot"]

DEVICES = full(7, "timer", b"\7" * 24) + full(8, "globalstate", b"\0" * 105)
_DESCRIPTION = described(device("timer", 24), device("globalstate", 105))


def write_background_snapshot(
    path: Path,
    blocks: dict[str, tuple[Bytes, Bits]],
    page_size: int = 4096,
    *,
    devices: bytes = DEVICES,
    description: bytes | None = _DESCRIPTION,
) -> None:
    """Write the pages whose bits are set, but no bitmaps, and a PART in place of RAM's END."""
    specs = [BlockSpec(name, len(memory), page_size) for name, (memory, _) in blocks.items()]
    head = encode_head("pc-q35-10.0", specs)
    tail = encode_tail(settings=head.configuration, sections=devices, description=description)
    end, last_part = encode_ram_end(), encode_part_header() + RAM_EOS
    assert tail.count(end) == 1
    with path.open("wb") as file:
        for piece in head.pieces:
            file.seek(piece.offset)
            file.write(piece.data)
        for layout, (memory, bits) in zip(head.blocks, blocks.values(), strict=True):
            for page in bits.nonzero()[0]:
                file.seek(layout.pages_offset + int(page) * page_size)
                file.write(memory[int(page) * page_size :][:page_size].tobytes())
        file.seek(head.tail_offset)
        file.write(tail.replace(end, last_part))
