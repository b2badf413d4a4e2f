"""How the core is built: ``pyqmigrate._core`` from the C files beside this one."""

import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = [
    "job.c", "queue.c", "scan.c", "chunk.c", "write.c", "store.c", "read.c", "stale.c", "encode.c",
    "decode.c", "staging.c", "index.c", "search.c", "direct.c", "process.c",
]

ffibuilder = FFI()
ffibuilder.cdef((HERE / "cdef.h").read_text())
ffibuilder.set_source(
    "pyqmigrate._core",
    '#include "qmigrate.h"',
    # Relative to setup.py, as sdists and editable installs need it.
    sources=[f"csrc/{name}" for name in SOURCES],
    depends=[
        f"csrc/{name}.h" for name in ("qmigrate", "bits", "channel", "chunk", "records")
    ],
    include_dirs=["csrc"],
    extra_compile_args=["-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror=implicit"],
    libraries=["pthread"],
    # One binary for every later Python, but not without the GIL: there is no such ABI there.
    py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
)
