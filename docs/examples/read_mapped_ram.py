"""Print the blocks of a mapped-ram file, and write one of them, from the bytes alone."""

import struct
import sys
from pathlib import Path


def read_mapped_ram(file, start=0):
    """The machine type, and for each block its length, page size, bitmap and pages offset."""

    def take(form):
        return struct.unpack(">" + form, file.read(struct.calcsize(">" + form)))

    def name(form="B"):
        return file.read(take(form)[0]).decode()

    file.seek(start)
    assert take("4sIB") == (b"QEVM", 3, 7)
    machine, capabilities = name("I"), []
    while (kind := take("B")[0]) == 5:
        subsection, _version = name(), take("I")
        if subsection == "configuration/target-page-bits":
            take("I")
        elif subsection == "configuration/capabilities":
            capabilities = [name() for _ in range(take("I")[0])]
        elif subsection == "configuration/uuid":
            take("16s")
    assert "mapped-ram" in capabilities and kind == 1, "not this kind of file"
    assert (take("I"), name(), take("II"))[1:] == ("ram", (0, 4))
    (total,) = take("Q")
    assert total & 0xFFF == 4
    total, blocks = total - 4, {}
    while total:
        block, (length,) = name(), take("Q")
        if "x-ignore-shared" in capabilities:
            take("Q")  # the block's address in the guest
        version, page_size, bitmap_offset, pages_offset = take("IQQQ")
        assert version == 1
        blocks[block] = (length, page_size, bitmap_offset, pages_offset)
        if pages_offset:  # else the block's content is in another file
            file.seek(pages_offset + length)
        total -= length
    assert take("QBI") == (0x10, 0x7E, 1)
    return machine, blocks


def read_block(file, length, page_size, bitmap_offset, pages_offset):
    """The block's memory: a page whose bit is clear is zero, whatever the file has there."""
    file.seek(bitmap_offset)
    bitmap = file.read(length // page_size // 8 + 8)
    for page in range(length // page_size):
        file.seek(pages_offset + page * page_size)
        present = bitmap[page // 8] >> page % 8 & 1
        yield file.read(page_size) if present else bytes(page_size)


if __name__ == "__main__":
    with Path(sys.argv[1]).open("rb") as snapshot:
        machine, blocks = read_mapped_ram(snapshot)
        print(machine, *(f"{name} {numbers}" for name, numbers in blocks.items()), sep="\n")
        with Path(sys.argv[3]).open("wb") as out:
            out.writelines(read_block(snapshot, *blocks[sys.argv[2]]))
