"""What is asked of a QEMU: by a session of an event loop, or by one that blocks."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, Protocol, TypeVar

__all__ = ["Commands", "run_blocking"]

T = TypeVar("T")


class Commands(Protocol):
    """A negotiated session with a QEMU of ``version``, as (major, minor, micro)."""

    @property
    def version(self) -> tuple[int, int, int]: ...

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float | None = ...,
    ) -> Any:
        """Run a command and return its result, which takes ``timeout`` seconds at most, or any time (None).

        Raises QemuRefused, QemuGone, and QemuError when there is no answer in time.
        """
        ...

    async def pause(self, seconds: float) -> None:
        """Wait."""
        ...

    async def hmp(self, line: str) -> str:
        """Run ``line`` in the human monitor and return its output."""
        ...


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that awaits nothing but a session that blocks."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise RuntimeError("a coroutine that needs an event loop was run without one")
