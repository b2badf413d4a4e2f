"""The checks before the start of a migration, and the QEMU that is imitated."""

from __future__ import annotations

from enum import Enum

from pyqmigrate.qapi.qemu_version import QEMU_10_0, QEMU_11_1, QemuVersion

__all__ = ["Policy"]


class Policy(Enum):
    """STRICT refuses at once what QEMU accepts and later fails or dies on; its errors say what to
    pass instead. COMPAT_10_0 and COMPAT_11_1 make the checks of QEMU 10.0.2 and 11.1.3, in their order
    and with their texts. COMPAT is COMPAT_10_0."""

    STRICT = "strict"
    COMPAT_10_0 = "compat-10.0"
    COMPAT_11_1 = "compat-11.1"
    COMPAT = COMPAT_10_0

    @property
    def compat(self) -> bool:
        """Whether a QEMU is imitated."""
        return self is not Policy.STRICT

    @property
    def qemu(self) -> QemuVersion:
        """The QEMU whose names and texts are used; STRICT uses those of 10.0."""
        return QEMU_11_1 if self is Policy.COMPAT_11_1 else QEMU_10_0
