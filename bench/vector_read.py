"""A read loop with the widest vectors of this machine, which the zero scan is compared with."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

__all__ = ["vector_read"]

_SOURCE = Path(__file__).with_name("vector_read.c")


@cache
def vector_read() -> Callable[[int, int], int]:
    """Compile the loop; return a function of an address and a length that gives the OR of all words.

    The address is a multiple of 64, the length of 512. Raises CalledProcessError if it does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="vector-read-") as name:
        library = Path(name) / "vector_read.so"
        options = ["-O3", "-march=native", "-mprefer-vector-width=512"]
        flags = options if os.uname().machine == "x86_64" else options[:2]
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *flags, "-shared", "-fPIC", _SOURCE, "-o", library], check=True)
        function = ctypes.CDLL(str(library)).vector_read
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_uint64
    return function
