"""The processor's registers as QEMU prints them."""

from __future__ import annotations

import re

__all__ = ["registers_said"]


def registers_said(text: str) -> dict[str, int]:
    """``info registers`` of x86, by the names of CpuRegisters; segments by their bases."""
    said = {
        name.lower(): int(value, 16)
        for name, value in re.findall(r"\b([A-Z]+\d*) ?=([0-9a-f]+)\b", text)
    }
    said |= {
        f"{name.lower()}.base": int(base, 16)
        for name, base in re.findall(r"^([CDEFGS]S|LDT|TR) *=[0-9a-f]{4} ([0-9a-f]+)", text, re.M)
    }
    said |= {
        f"{name.lower()}.base": int(base, 16)
        for name, base in re.findall(r"^([GI]DT)= +([0-9a-f]+) ", text, re.M)
    }
    said |= {
        f"xmm{number}": int(high + low, 16)
        for number, high, low in re.findall(r"XMM(\d\d)=([0-9a-f]{16}) ([0-9a-f]{16})", text)
    }
    return said
