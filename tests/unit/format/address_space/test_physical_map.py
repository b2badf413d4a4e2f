"""Address spaces found from machine type, blocks and device state, or given by hand."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqmigrate.errors import NotSupported, UsageError
from pyqmigrate.format.address_space.physical_map import parse_placement, physical_map, processor_of
from pyqmigrate.format.address_space.placement import GivenPlacement, Placement
from pyqmigrate.format.address_space.srat import nodes_in_order
from pyqmigrate.format.device.values import Device, Field, State, Value
from tests.harness.cpu_sections import ARM, X86, device, fields
from tests.harness.examples import some

MIB, GIB = 1 << 20, 1 << 30


def clock(below: int, above: int) -> Device:
    """The clock of a PC whose firmware is told of so many bytes of RAM."""
    cmos = bytearray(128)
    cmos[0x30:0x32] = min((below - MIB) >> 10, 0xFFFF).to_bytes(2, "little")
    cmos[0x34:0x36] = ((below - 16 * MIB) >> 16).to_bytes(2, "little")
    cmos[0x5B:0x5E] = (above >> 16).to_bytes(3, "little")
    return device(fields({"cmos_data": bytes(cmos)}), name="mc146818rtc")


def bridge(name: str, at: int, registers: bytes) -> Device:
    config = bytearray(256)
    config[at : at + 7] = registers
    value: Value = bytes(config)
    state = State(name, 1, 0, 0, (Field("parent_obj", "pci config", 0, 0, value),))
    return device(state, name=f"0000:00:00.0/{name}")


def memory_entry(node: int, base: int, length: int, flags: int = 1) -> bytes:
    return struct.pack("<BBI2xQQ4xI8x", 1, 40, node, base, length, flags)


def srat(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return b"FACP" + bytes(60) + b"SRAT" + struct.pack("<I", 48 + len(body)) + bytes(40) + body


def test_ram_beyond_the_split_goes_on_at_4_gib() -> None:
    assert physical_map("pc-q35-9.2", {"pc.ram": 3 * GIB}) == (
        Placement("pc.ram", 0, 0, 2 * GIB),
        Placement("pc.ram", 4 * GIB, 2 * GIB, GIB),
    )


def test_split_is_the_one_that_firmware_got() -> None:
    found = physical_map("pc-i440fx-9.2", {"pc.ram": 3 * GIB}, [clock(GIB, 2 * GIB)])
    assert [one.address for one in found] == [0, 4 * GIB]
    assert found[0].length == GIB


def test_split_that_firmware_knows_only_roughly_is_not_guessed() -> None:
    length = 3 * GIB + 4096
    with pytest.raises(NotSupported, match="64 KiB"):
        physical_map("pc-i440fx-9.2", {"pc.ram": length}, [clock(GIB, 2 * GIB)])
    assert physical_map("pc", {"pc.ram": length}, [clock(length & -65536, 0)]) == (
        Placement("pc.ram", 0, 0, length),
    )


@pytest.mark.parametrize("devices", [[], [clock(GIB, GIB)]], ids=["no-clock", "another-size"])
@pytest.mark.parametrize("machine", ["pc", "q35", "isapc"])
def test_split_that_is_not_recorded_is_not_guessed(machine: str, devices: list[Device]) -> None:
    with pytest.raises(NotSupported, match="--max-ram-below-4g"):
        physical_map(machine, {"pc.ram": 4 * GIB}, devices)
    found = physical_map(machine, {"pc.ram": 4 * GIB}, devices, max_ram_below_4g=GIB)
    assert [(one.address, one.length) for one in found] == [(0, GIB), (4 * GIB, 3 * GIB)]


def test_split_of_a_microvm_cannot_be_moved() -> None:
    found = physical_map("microvm", {"microvm.ram": 4 * GIB}, [])
    assert [(one.address, one.length) for one in found] == [(0, 3 * GIB), (4 * GIB, GIB)]
    with pytest.raises(UsageError, match="no max-ram-below-4g"):
        physical_map("microvm", {"microvm.ram": 4 * GIB}, [], max_ram_below_4g=GIB)


def test_split_that_contradicts_the_clock_is_refused() -> None:
    with pytest.raises(UsageError, match="the device state records"):
        physical_map("pc", {"pc.ram": 4 * GIB}, [clock(GIB, 3 * GIB)], max_ram_below_4g=2 * GIB)
    found = physical_map("pc", {"pc.ram": 4 * GIB}, [clock(GIB, 3 * GIB)], max_ram_below_4g=GIB)
    assert found[0].length == GIB


# Length of RAM and max-ram-below-4g in MiB, and what QEMU 10.0 has below 4 GiB (info mtree).
SPLITS = {
    "pc": [
        (3583, 3584, 3583),
        (3584, 3584, 3072),
        (3400, 3328, 3072),
        (3200, 3328, 3200),
        (3800, 4096, 3800),
        (5120, 2048, 2048),
        (5120, 4096, 3072),
        (96, 64, 64),
    ],
    "q35": [
        (2815, 4096, 2815),
        (2816, 4096, 2048),
        (5120, 3072, 2048),
        (5120, 1024, 1024),
        (2700, 2688, 2688),
        (96, 64, 64),
    ],
}


@pytest.mark.parametrize(
    ("machine", "length", "most", "below"),
    [(machine, *row) for machine, rows in SPLITS.items() for row in rows],
)
def test_split_is_made_as_qemu_makes_it(machine: str, length: int, most: int, below: int) -> None:
    found = physical_map(machine, {"pc.ram": length * MIB}, [], max_ram_below_4g=most * MIB)
    low = sum(one.length for one in found if one.address < 4 * GIB)
    assert low == below * MIB


def test_clock_that_nothing_describes_is_read() -> None:
    described = clock(GIB, 2 * GIB)
    cmos = described.state["cmos_data"]
    assert isinstance(cmos, bytes)
    for name in ("", "data"):
        field = Field(name, "buffer", 0, 200, cmos + bytes(72), opaque=True)
        raw = device(State("", None, 0, 200, (field,)), name="mc146818rtc")
        found = physical_map("pc", {"pc.ram": 3 * GIB}, [raw])
        assert [one.length for one in found] == [GIB, 2 * GIB]


def test_so_much_ram_that_it_may_be_at_1_tib_is_not_guessed() -> None:
    with pytest.raises(NotSupported, match="--map"):
        physical_map("q35", {"pc.ram": 1 << 40})


def test_window_of_a_vga_card_hides_ram() -> None:
    found = physical_map("microvm", {"microvm.ram": 2 * MIB, "x/vga.vram": MIB})
    assert [(one.address, one.length) for one in found] == [(0, 0xA0000), (0xC0000, 0x140000)]


def test_registers_of_the_bridge_say_what_is_rom() -> None:
    """Reads of 0xe8000 to 0xebfff go to RAM, the rest of firmware is seen."""
    registers = bytes([0, 0, 0, 0, 0, 0, 1])
    blocks = {"pc.ram": 16 * MIB, "pc.bios": 0x20000, "pc.rom": 0x20000}
    found = physical_map("pc", blocks, [clock(16 * MIB, 0), bridge("I440FX", 0x59, registers)])
    assert found[:6] == (
        Placement("pc.ram", 0, 0, 0xC0000),
        Placement("pc.rom", 0xC0000, 0, 0x20000),
        Placement("pc.bios", 0xE0000, 0, 0x8000),
        Placement("pc.ram", 0xE8000, 0xE8000, 0x4000),
        Placement("pc.bios", 0xEC000, 0xC000, 0x14000),
        Placement("pc.ram", MIB, MIB, 15 * MIB),
    )
    assert found[6:] == (Placement("pc.bios", 4 * GIB - 0x20000, 0, 0x20000),)


def test_nodes_are_in_the_order_of_the_table() -> None:
    tables = srat(
        memory_entry(1, MIB, 63 * MIB),
        memory_entry(1, 0, 640 << 10),
        memory_entry(0, 64 * MIB, 32 * MIB),
        memory_entry(2, GIB, GIB, flags=3),
    )
    found = physical_map(
        "q35", {"a": 64 * MIB, "b": 32 * MIB, "pc.bios": 65536}, acpi_tables=tables
    )
    assert [(one.block, one.address) for one in found] == [
        ("a", 0),
        ("b", 64 * MIB),
        ("pc.bios", 4 * GIB - 65536),
    ]


def test_equal_nodes_are_taken_only_where_their_names_ascend() -> None:
    tables = srat(*(memory_entry(n, n * MIB, MIB) for n in range(3)))
    assert nodes_in_order(tables, {"ram-node2": MIB, "ram-node9": MIB, "ram-node10": MIB})
    assert nodes_in_order(tables, {"ram-node1": MIB, "ram-node0": MIB, "ram-node2": MIB}) is None


@some
@given(st.binary(max_size=200), st.dictionaries(st.text(max_size=3), st.integers(1, 99)))
def test_any_bytes_may_be_in_the_table(data: bytes, backends: dict[str, int]) -> None:
    found = nodes_in_order(b"SRAT" + data, backends)
    assert found is None or sorted(found) == sorted(backends)


def test_table_that_does_not_fit_the_blocks_is_not_believed() -> None:
    with pytest.raises(NotSupported, match="order"):
        physical_map("q35", {"a": 64 * MIB, "b": MIB}, acpi_tables=srat(memory_entry(0, 0, MIB)))


def test_module_beside_ram_of_a_known_size_is_left_out() -> None:
    found = physical_map("q35", {"module": GIB, "ram0": 64 * MIB}, [clock(64 * MIB, 0)])
    assert {one.block for one in found} == {"ram0"}


def test_machines_called_virt_are_distinguished_by_their_blocks() -> None:
    arm = device(fields(ARM))
    assert physical_map("virt-9.2", {"mach-virt.ram": GIB})[0].address == GIB
    assert physical_map("virt", {"riscv_virt_board.ram": GIB})[0].address == 2 * GIB
    assert physical_map("virt-9.2", {"mem": GIB}, [arm])[0].address == GIB
    with pytest.raises(NotSupported, match="--map"):
        physical_map("virt-9.2", {"mem": GIB})


def test_unknown_machine_has_what_is_given() -> None:
    blocks = {"ram": GIB, "other": GIB}
    with pytest.raises(NotSupported, match="--map"):
        physical_map("raspi3b", blocks)
    given = [parse_placement("ram@0x1000+4096,8192")]
    assert physical_map("raspi3b", blocks, given=given) == (Placement("ram", 0x1000, 4096, 8192),)


def test_given_placement_replaces_what_is_found_of_its_block_only() -> None:
    blocks = {"pc.ram": 16 * MIB, "pc.bios": 0x20000, "dimm": GIB}
    found = physical_map("q35", blocks, given=[GivenPlacement("dimm", 4 * GIB)])
    assert found[-1] == Placement("dimm", 4 * GIB, 0, GIB)
    assert found[:-1] == physical_map("q35", blocks)
    moved = physical_map("q35", blocks, given=[GivenPlacement("pc.ram", 8 * GIB)])
    assert [one for one in moved if one.block == "pc.ram"] == [
        Placement("pc.ram", 8 * GIB, 0, 16 * MIB)
    ]
    assert not any(one.block == "dimm" for one in moved)


@pytest.mark.parametrize(
    "text",
    [
        "ram@0+0,0x2000000",
        "ram@0+0x1000000",
        "ram@0+0x2000000,1",
        "ram@0+0,0",
        "ram@-1",
        "ram@0xfffffffffffff000",
        "ram@0x10000000000000000",
    ],
)
def test_part_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        physical_map("q35", {"ram": 16 * MIB}, given=[parse_placement(text)])


def test_parts_upon_one_another_are_refused() -> None:
    given = [GivenPlacement("ram", 0), GivenPlacement("rom", 0x1000), GivenPlacement("rom", 0x4000)]
    with pytest.raises(UsageError, match="both placed at 0x1000"):
        physical_map("q35", {"ram": 0x3000, "rom": 0x1000}, given=given)


def test_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown block 'nobody'"):
        physical_map("q35", {"ram": MIB}, given=[GivenPlacement("nobody", 0)])


def numbers() -> st.SearchStrategy[tuple[str, int]]:
    values = st.integers(0, (1 << 64) - 1)
    return values.map(lambda n: (str(n), n)) | values.map(lambda n: (hex(n), n))


@some
@given(
    st.text(min_size=1, max_size=30),
    numbers(),
    st.none() | st.tuples(numbers(), st.none() | numbers()),
)
def test_placement_is_parsed_whatever_the_block_is_called(
    name: str, address: tuple[str, int], part: tuple[tuple[str, int], tuple[str, int] | None] | None
) -> None:
    text, expected = f"{name}@{address[0]}", GivenPlacement(name, address[1])
    if part is not None:
        offset, length = part
        text += f"+{offset[0]}" + (f",{length[0]}" if length else "")
        expected = GivenPlacement(name, address[1], offset[1], length[1] if length else None)
    assert parse_placement(text) == expected


@some
@given(st.text(max_size=40))
def test_any_text_is_a_placement_or_wrong_usage(text: str) -> None:
    try:
        found = parse_placement(text)
    except UsageError:
        return
    assert found.block


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ram",
        "@0",
        "ram@",
        "ram@x",
        "ram@1+",
        "ram@1,2",
        "ram@1+2,",
        "ram@1 ",
        "ram@1_0",
        "ram@010",
        "ram@٣",
    ],
)
def test_text_that_is_not_a_placement_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME@ADDRESS"):
        parse_placement(text)


def test_processor_is_that_of_the_machine_or_of_its_cpus() -> None:
    assert processor_of("q35", []).elf == 62
    assert processor_of("virt-9.2", ["mach-virt.ram"]).elf == 183
    assert processor_of("pseries-9.2", ["ppc_spapr.ram"]).big_endian
    power = device(fields({"env.msr": 1, "env.spr": ()}))
    assert not processor_of("pseries-9.2", ["ppc_spapr.ram"], [power]).big_endian
    assert processor_of("raspi3b", ["ram"], [device(fields(ARM))]).elf == 183
    assert processor_of("xenfv", ["ram"], [device(fields(X86))]).elf == 62
    with pytest.raises(NotSupported, match="LiME"):
        processor_of("raspi3b", ["ram"])


@pytest.mark.parametrize(
    ("modes", "narrow"),
    [((0x13,), True), ((0x10,), False), ((0x10, 0x1F), True), ((0x13, 5), False)],
)
def test_arm_of_32_bits_is_recognized_by_its_modes(modes: tuple[int, ...], narrow: bool) -> None:
    """Programs of 32 bits may have a kernel of 64 below them."""
    cpus = [device(fields(ARM | {"cpsr": mode}), instance=n) for n, mode in enumerate(modes)]
    if narrow:
        with pytest.raises(NotSupported, match="32 bits"):
            processor_of("virt-9.2", ["mach-virt.ram"], cpus)
    else:
        assert processor_of("virt-9.2", ["mach-virt.ram"], cpus).elf == 183


def test_snapshot_without_memory_is_distinguished_from_an_unknown_machine() -> None:
    with pytest.raises(NotSupported, match="no RAM blocks"):
        physical_map("x-remote", {})
