"""A RAM block as a read-only, one-dimensional array of bytes for numpy, read when it is indexed.

    ram = snapshot.blocks["pc.ram"].as_array()
    ram[0x1000:0x2000].view("<u8")      # reads a page
    numpy.asarray(ram)                  # reads the whole block

The file is not mapped: one that becomes shorter would end the process (SIGBUS), pages of most kinds of
snapshots are not at their place in one file, and old bytes can be in the place of a page without data.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from pyqmigrate.errors import NotSupported

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pyqmigrate.snapshot.base import Block

__all__ = ["BlockArray"]


class BlockArray:
    """The bytes of a block, until its snapshot is closed.

    It has the ``shape``, ``size``, ``ndim`` and ``dtype`` (uint8) of an array. A number or a slice as
    the index reads that much, past pages without data, and returns a numpy scalar or a read-only
    array; numpy functions read all of it. Raises NotSupported if numpy is not installed, IndexError,
    and what ``Block.read`` raises.
    """

    ndim = 1

    def __init__(self, block: Block) -> None:
        try:
            import numpy
        except ImportError:
            raise NotSupported("as_array() needs numpy: pip install numpy") from None
        self._block = block
        self._numpy = numpy
        self.dtype = numpy.dtype("u1")
        self.size = block.length
        self.shape = (block.length,)

    def __repr__(self) -> str:
        return f"<BlockArray {self._block.name!r}, {self.size} bytes>"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._slice(index)
        try:
            number = operator.index(index)
        except TypeError:
            raise IndexError(
                f"a block is indexed by a number or a slice, not {index!r}; numpy.asarray() reads all"
            ) from None
        if not -self.size <= number < self.size:
            raise IndexError(f"byte {number} of {self.size}")
        return self._read(number % self.size, 1)[0]

    def _slice(self, index: slice) -> npt.NDArray[np.uint8]:
        numbers = range(self.size)[index]
        if not numbers:
            return self._read(0, 0)
        first, last = min(numbers[0], numbers[-1]), max(numbers[0], numbers[-1])
        return self._read(first, last - first + 1)[:: numbers.step]

    def _read(self, offset: int, length: int) -> npt.NDArray[np.uint8]:
        data: npt.NDArray[np.uint8] = self._numpy.frombuffer(
            self._block.read(offset, length), self.dtype
        )
        return data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a block is read into new memory: copy=False is not possible")
        data = self._read(0, self.size)
        return data if dtype is None else data.astype(dtype)
