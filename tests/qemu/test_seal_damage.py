"""What becomes of a sealed file that a real QEMU saved is found, whatever it is."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyqmigrate import seal, verify_seal
from tests.harness.contents import Contents, fill
from tests.harness.machine import GuestRam, Mode, Qemu
from tests.harness.sealed import damage, replaced
from tests.harness.sequential_saves import SequentialQemu

pytestmark = pytest.mark.qemu

RAM = 8 << 20


def mapped(path: Path) -> None:
    with GuestRam(RAM) as ram, Qemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.SPECKLED)
        vm.save(path, Mode(channels=2, multifd=True))


def sequential(path: Path) -> None:
    with GuestRam(RAM) as ram, SequentialQemu(ram) as vm:
        fill(memoryview(ram.memory), Contents.RUNS)
        vm.save(path)


@pytest.fixture(scope="module", params=[mapped, sequential], ids=lambda f: f.__name__)
def saved(request: pytest.FixtureRequest, module_disk: Path) -> Iterator[Path]:
    make: Callable[[Path], None] = request.param
    path = module_disk / make.__name__
    make(path)
    seal(path)
    yield path
    shutil.rmtree(module_disk / "damaged", ignore_errors=True)


def mutate(saved: Path, count: int, seed: int) -> None:
    """Damages a copy ``count`` times, each on its own; every one has to be found, and told."""
    whole, info = saved.read_bytes(), saved.stat()
    path = saved.parent / "damaged" / saved.name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(f"{saved}.seal", f"{path}.seal")
    rng = random.Random(seed)
    for n in range(count):
        data = bytearray(whole)
        how = [damage(data, rng) for _ in range(rng.choice((1, 1, 2)))]
        replaced(path, data, (info.st_atime_ns, info.st_mtime_ns))
        check = verify_seal(path, channels=1 + n % 3)
        assert check is not None
        assert check.intact == (data == whole), (seed, n, how)
        for found in check.damages:
            assert found.parts or "added" in found.why, (seed, n, how, str(found))


def test_every_mutation_of_a_file_of_qemu_is_found(saved: Path) -> None:
    mutate(saved, 25, 1)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(5))
def test_every_one_of_thousands_of_mutations_of_a_file_of_qemu_is_found(
    saved: Path, seed: int
) -> None:
    mutate(saved, 500, seed)
