"""How much is refused before the start."""

from enum import Enum

__all__ = ["Policy"]


class Policy(Enum):
    """STRICT refuses at once what QEMU accepts and later fails or dies on, and says what to pass
    instead. COMPAT checks what QEMU 10.0.2 checks, in its order and with its texts."""

    STRICT = "strict"
    COMPAT = "compat"
