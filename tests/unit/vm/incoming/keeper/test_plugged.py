"""Blocks that were plugged in are found in a table of QEMU's."""

from __future__ import annotations

from pyqmigrate.vm.incoming.keeper.plugged import plugged_in

TABLE = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000001800000 0x0000000001800000 0x00007f0000000000  rw
  0000:00:03.0/nic   rom    4 KiB  0x0000000001860000 0x0000000000001000 0x0000000000001000 0x00007f0002000000  ro
                            4 KiB  0x0000000002000000 0x0000000000001000 0x0000000000001000 0x00007f0003000000  rw
                    more    2 MiB  0x0000000003000000 0x0000000000001000 0x0000000000001000 0x00007f0004000000  rw
"""


def test_names_that_are_new_are_returned() -> None:
    assert plugged_in(TABLE, ["pc.ram"]) == ["0000:00:03.0/nic   rom", "more"]


def test_blocks_without_a_name_are_not_migrated() -> None:
    assert plugged_in(TABLE, ["pc.ram", "0000:00:03.0/nic   rom", "more"]) == []
