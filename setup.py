"""The compiled core and a plugin for volatility3; everything else about the package is in pyproject.toml."""

import shlex
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, ExecError, LinkError


class BuildCore(build_ext):
    """Compile the core; if that fails, say what is missing and how to install it."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (CompileError, ExecError, LinkError) as error:
            raise CompileError(f"{error}\n\n{self._advice()}") from None

    def _advice(self) -> str:
        compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
        command = getattr(self.compiler, "compiler", None) or compiler
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        missing = []
        if shutil.which(command[0]) is None:
            missing.append(f"the C compiler ({command[0]})")
        if not header.exists():
            missing.append(f"Python's headers ({header})")
        found = f"Missing: {' and '.join(missing)}. " if missing else ""
        return (
            f"The core of pyqmigrate could not be compiled. {found}"
            "It needs a C compiler and the headers of Python, of the C library and of Linux:\n"
            "    apt install gcc libc6-dev linux-libc-dev python3-dev       (Debian, Ubuntu)\n"
            "    dnf install gcc glibc-devel kernel-headers python3-devel   (Fedora, RHEL)"
        )


class BuildModules(build_py):
    """The package, and a module among volatility's plugins, where volatility3 looks for its extensions.

    In an editable install volatility3 needs its option -p for that.
    """

    _PLUGIN = Path("pyqmigrate/integrations/volatility3_plugins/pyqmigrate_snapshots.py")

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.mkpath(str(self._plugin.parent))
            self.copy_file(str(self._PLUGIN), str(self._plugin))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(self._plugin)]

    @property
    def _plugin(self) -> Path:
        return Path(self.build_lib) / "volatility3" / "plugins" / self._PLUGIN.name


# There is no stable ABI without the GIL; csrc/build.py leaves it out there too.
abi3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp311"}

# Manual pages, where `make wheel` has put them; a build from a checkout has none.
pages = sorted(map(str, Path("man").glob("*.1")))

setup(
    cffi_modules=["csrc/build.py:ffibuilder"],
    cmdclass={"build_ext": BuildCore, "build_py": BuildModules},
    data_files=[("share/man/man1", pages)] if pages else [],
    options={"bdist_wheel": abi3},
)
