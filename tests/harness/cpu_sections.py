"""Device sections of processors, as QEMU writes them."""

from __future__ import annotations

from pyqmigrate.format.device.values import Device, Field, State, Value

__all__ = ["ARM", "X86", "device", "fields", "segment", "state"]


def state(**values: Value) -> State:
    """A state whose fields have these names, with ``__`` for a dot."""
    named = [(name.replace("__", "."), value) for name, value in values.items()]
    return State("cpu", 1, 0, 0, tuple(Field(n, "", 0, 0, v) for n, v in named))


def fields(values: dict[str, Value]) -> State:
    return State("cpu", 1, 0, 0, tuple(Field(n, "", 0, 0, v) for n, v in values.items()))


def device(tree: State, *, name: str = "cpu", instance: int = 0) -> Device:
    return Device(name, instance, 1, 4, 0, 0, 0, 0, tree, True, True)


def segment(base: int) -> State:
    return state(selector=8, base=base, limit=0xFFFF, flags=0x9300)


X86: dict[str, Value] = {
    "env.regs": tuple(range(100, 116)),
    "env.eip": 0xFFF0,
    "env.eflags": 2,
    "env.segs": tuple(segment(base) for base in range(6)),
    "env.gdt": segment(0x777),
    "env.cr[3]": 0x1000,
    "env.dr": tuple(range(8)),
    "env.xmm_regs[0]": (fields({"_q_ZMMReg[0]": 1, "_q_ZMMReg[1]": 2}),),
}


ARM: dict[str, Value] = {
    "env.regs": tuple(range(16)),
    "env.xregs": tuple(range(200, 232)),
    "env.pc": 0x40000000,
    "cpsr": 0x3C5,
    "env.elr_el": (0, 11, 12, 13),
    "cpreg_vmstate_indexes": (0x603000000013C100, 0x603000000013C101),
    "cpreg_vmstate_values": (0xAAA, 0xBBB),
}
