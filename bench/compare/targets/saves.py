"""Targets of saves, and of what is part of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.compare.buffers import BUFFERS
from bench.compare.processor import PYTHON_WORK
from bench.compare.sparse import SPARSE_ALONE, SPARSE_WIDE, TEBIBYTE_WORK
from bench.compare.targets.ratios import ratio
from bench.compare.vm import VM_DIRECT, VM_QEMU
from bench.results import FIO, LIBVIRT, MIB, OURS, QEMU, Results, Verdict
from tests.harness.contents import Contents

__all__ = ["page_cache", "processor", "python", "saves", "scan", "sparse", "tebibyte"]

# Content -> the time of a save at most, as a share of QEMU's defaults and of QEMU's best.
_AGAINST_QEMU = {
    Contents.DENSE: (None, 0.95),
    Contents.RUNS: (0.15, 0.8),
    Contents.SPECKLED: (0.15, 0.8),
}
# Of memory that need not be copied: as a share of fio, and of QEMU's best for speckled memory.
_BUFFER_FIO, _BUFFER_SPECKLED = 0.75, 0.7


def saves(results: Results) -> Iterator[Verdict]:
    for contents, (of_defaults, of_best) in _AGAINST_QEMU.items():
        work = f"save {contents}"
        for memory in results.names(work, OURS):
            ours = results.median(work, OURS, memory)
            label = f"{work} ({memory})"
            if memory in (VM_DIRECT, VM_QEMU):
                yield from _vm_saves(results, contents, memory, ours)
                continue
            is_buffer = memory in BUFFERS
            if fio := results.best(work, FIO):
                limit = _BUFFER_FIO if is_buffer else 1.05
                yield ratio(f"{label} / fio", ours, results.median(work, FIO, fio), limit, fio)
            if of_defaults and "defaults" in results.names(work, QEMU):
                theirs = results.median(work, QEMU, "defaults")
                yield ratio(f"{label} / QEMU's defaults", ours, theirs, of_defaults)
            if best := results.best(work, QEMU):
                theirs = results.median(work, QEMU, best)
                limit = _BUFFER_SPECKLED if is_buffer and contents is Contents.SPECKLED else of_best
                yield ratio(f"{label} / QEMU's best", ours, theirs, limit, best)


def _vm_saves(results: Results, contents: Contents, name: str, ours: float) -> Iterator[Verdict]:
    """Against the same runs of QEMU's as the package's other saves."""
    work = f"save {contents}"
    label = f"{work} ({name})"
    of_defaults = {VM_DIRECT: 0.15, VM_QEMU: 0.2}[name]
    if contents is not Contents.DENSE and "defaults" in results.names(work, QEMU):
        theirs = results.median(work, QEMU, "defaults")
        yield ratio(f"{label} / QEMU's defaults", ours, theirs, of_defaults)
    best = results.best(work, QEMU)
    if name == VM_DIRECT and best and contents is not Contents.DENSE:
        limit = 0.8 if contents is Contents.RUNS else 0.9
        yield ratio(f"{label} / QEMU's best", ours, results.median(work, QEMU, best), limit, best)
    best = results.best(work, LIBVIRT)
    if name == VM_DIRECT and best and contents is Contents.RUNS:
        theirs = results.median(work, LIBVIRT, best)
        yield ratio(f"{label} / libvirt", ours, theirs, 0.15, best)


def processor(results: Results) -> Iterator[Verdict]:
    """Against the processor time of QEMU's fastest setting; what its thriftiest one used is said
    too."""
    for contents in Contents:
        work = f"save {contents}"
        times = {n: results.cpu(work, QEMU, n) or 0.0 for n in results.names(work, QEMU)}
        best = results.best(work, QEMU)
        for memory in results.names(work, OURS):
            ours = results.cpu(work, OURS, memory)
            if ours is None or best is None:
                continue
            least = min(times, key=lambda name: times[name])
            yield Verdict(
                f"processor time, {work} ({memory}) / QEMU's best",
                ours / times[best],
                1.0,
                detail=f"{ours:.2f} s against {times[best]:.2f} s ({best}); "
                f"QEMU's least {times[least]:.2f} s ({least})",
            )


def sparse(results: Results) -> Iterator[Verdict]:
    work = "save sparse"
    for name in results.names(work, OURS):
        if not name.startswith(SPARSE_WIDE):
            continue
        alone = name.replace(SPARSE_WIDE, SPARSE_ALONE)
        ours, theirs = (results.median(work, OURS, who) for who in (name, alone))
        yield ratio(f"{work}: {name} / {SPARSE_ALONE}", ours, theirs, 1.3)
        grown = max(
            sample.facts["resident_after"] - sample.facts["resident_before"]
            for sample in results.of(work, OURS, name)
        )
        yield Verdict(f"{work}: {name}, the memfd grows by", grown / MIB, 0.0, "MiB")


def tebibyte(results: Results) -> Iterator[Verdict]:
    for step in results.names(TEBIBYTE_WORK, OURS):
        samples = results.of(TEBIBYTE_WORK, OURS, step)
        extra = max(sample.facts["extra_bytes"] for sample in samples)
        guest = max(sample.facts["guest_bytes"] for sample in samples)
        yield Verdict(
            f"{TEBIBYTE_WORK}, {step}: extra memory",
            extra / MIB,
            96,
            "MiB",
            detail=f"{samples[0].seconds:.2f} s; guest pages it has mapped "
            f"({guest / MIB:.0f} MiB) not counted",
        )


def python(results: Results) -> Iterator[Verdict]:
    for name in results.names(PYTHON_WORK, OURS):
        samples = results.of(PYTHON_WORK, OURS, name)
        share = statistics.median(s.facts["python_seconds"] / s.seconds for s in samples)
        spent = statistics.median(s.facts["python_seconds"] for s in samples)
        yield Verdict(
            f"{PYTHON_WORK} of a save ({name})",
            share * 100,
            1.0,
            "%",
            detail=f"{spent * 1000:.1f} ms",
        )
        fixed = statistics.median(s.facts["fixed_seconds"] for s in samples)
        yield Verdict(
            f"{PYTHON_WORK} of a save ({name}), not counting the channels",
            fixed * 1000,
            6.0,
            "ms",
            detail="does not grow with the memory",
        )


def page_cache(results: Results) -> Iterator[Verdict]:
    for contents in Contents:
        work = f"save {contents}"
        samples = [s for name in results.names(work, OURS) for s in results.of(work, OURS, name)]
        samples = [s for s in samples if "cached_bytes" in s.facts]
        shares = [s.facts["cached_bytes"] / (s.facts["data_pages"] * 4096) for s in samples]
        if shares:
            direct = "direct" if all(s.facts["direct_io"] for s in samples) else "NOT direct"
            yield Verdict(
                f"{work}: left in the page cache",
                max(shares) * 100,
                1.0,
                "%",
                detail=f"{direct}; the most of {len(shares)} saves",
            )


def scan(results: Results) -> Iterator[Verdict]:
    if results.names("scan", OURS):
        scan = results.median("scan", OURS, "scan")
        reader = min(("sum", "vectors"), key=lambda name: results.median("scan", OURS, name))
        plain = results.median("scan", OURS, reader)
        size = results.of("scan", OURS, "scan")[0].facts["bytes"]
        yield Verdict(
            "zero scan / read bandwidth",
            plain / scan,
            0.95,
            at_least=True,
            detail=f"{size / scan / 1e9:.1f} GB/s, {reader} {size / plain / 1e9:.1f} GB/s",
        )
