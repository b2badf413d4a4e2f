"""Build ``pyqmigrate._core`` from the C files in this directory."""

import re
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = [
    "job.c",
    "channel.c",
    "transfer.c",
    "queue.c",
    "bits.c",
    "scan.c",
    "chunk.c",
    "source.c",
    "layered.c",
    "process.c",
    "direct.c",
    "write.c",
    "read.c",
    "store.c",
    "stale.c",
    "encode.c",
    "decode.c",
    "xbzrle.c",
    "index.c",
    "staging.c",
    "search.c",
    "find.c",
    "xxh3.c",
    "page_digests.c",
    "compare.c",
    "contiguous.c",
    "page_states.c",
    "filled.c",
    "entropy.c",
    "classify.c",
    "page_map.c",
    "stash.c",
    "blake3.c",
    "dedup.c",
    "postcopy.c",
]
HEADERS = [
    "qmigrate.h",
    "core_internal.h",
    "bits.h",
    "channel.h",
    "chunk.h",
    "records.h",
    "xxh3.h",
    "pagemap.h",
    "page_class.h",
    "blake3.h",
]
# A qm_write_hook, implemented in pyqmigrate/core.py.
CALLBACKS = """
extern "Python" int qm_call_write_hook(void *arg, int64_t at, const void *bytes, size_t len);
"""


def declarations(header: str) -> str:
    """Return the declarations of ``qmigrate.h`` for cffi: without comments and directives, and with
    the values of macros left to the compiler."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r"^#define (\w+)[ \t]+\S.*$", r"#define \1 ...", text, flags=re.MULTILINE)
    text = re.sub(r"^#(?!define \w+ \.\.\.).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\boff_t\b", "int64_t", text)


ffibuilder = FFI()
ffibuilder.cdef(declarations((HERE / "qmigrate.h").read_text()) + CALLBACKS)
ffibuilder.set_source(
    "pyqmigrate._core",
    '#include "qmigrate.h"',
    # Relative to setup.py, as sdists and editable installs require.
    sources=[f"csrc/{name}" for name in SOURCES],
    depends=[f"csrc/{name}" for name in HEADERS],
    include_dirs=["csrc"],
    extra_compile_args=["-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror=implicit"],
    libraries=["pthread"],
    # One binary for every later Python, but not without the GIL: there is no such ABI there.
    py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
)
