"""The targets, and the results compared with them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.compare.lazy import (
    AFTER_EXEC_WORK,
    BYTE_WORK,
    FIRST_RUN,
    LATENCY_WORK,
    PUSH_WORK,
    REMOTE,
    SECOND_RUN,
    WORKLOAD_WORK,
)
from bench.compare.live import (
    AGAIN,
    BACKGROUND_WORK,
    CLONES_WORK,
    CONVERGE_WORK,
    COST_WORK,
    INCREMENT_WORK,
    INSTANT,
    LINUX_WORK,
    PRECOPY_WORK,
    PRIVATE,
    RECORDED,
    STOPPED,
    UNRECORDED,
    WORKING_SET_WORK,
)
from bench.compare.pool import RESET_WORK, TAKE_WORK
from bench.compare.seal import CACHED, COLD, PLAIN, SEALED, seal_work
from bench.compare.store import (
    ADD_WORK,
    COPY,
    COPY_WORK,
    DIFF_WORK,
    FAULT_WORK,
    FIRST,
    FLEET_WORK,
    LATER,
    MOUNTED,
    WALK_WORK,
)
from bench.compare.store import PLAIN as PLAIN_FILE
from bench.compare.vm import (
    INSTANT_WORK,
    MEMFD_FULL,
    MEMFD_WIDE,
    MEMFD_WORK,
    RESTORE_WORK,
    SERIAL_WORK,
    VM_DIRECT,
    VM_QEMU,
)
from bench.results import FIO, LIBVIRT, OURS, QEMU, Results, Verdict
from tests.harness.contents import Contents

__all__ = ["GIB", "MIB", "PYTHON_WORK", "SPARSE_ALONE", "SPARSE_WIDE", "TEBIBYTE_WORK", "verdicts"]

MIB, GIB = 1 << 20, 1 << 30
SPARSE_ALONE, SPARSE_WIDE = "1 GiB alone", "64 GiB"
TEBIBYTE_WORK = "1 TiB sparse"
PYTHON_WORK = "python's share"

# Content -> the time of a save at most, as a share of QEMU's defaults and of QEMU's best.
_AGAINST_QEMU = {
    Contents.DENSE: (None, 0.95),
    Contents.RUNS: (0.15, 0.8),
    Contents.SPECKLED: (0.15, 0.8),
}


def verdicts(results: Results) -> list[Verdict]:
    """One for every target whose work was measured, with the peers that were there."""
    return [
        *_scan(results),
        *_saves(results),
        *_processor(results),
        *_loads(results),
        *_sparse(results),
        *_tebibyte(results),
        *_python(results),
        *_page_cache(results),
        *_seals(results),
        *_restores(results),
        *_live(results),
        *_increments(results),
        *_pool(results),
        *_lazy(results),
        *_store(results),
    ]


def _scan(results: Results) -> Iterator[Verdict]:
    if results.names("scan", OURS):
        scan, plain = (results.median("scan", OURS, name) for name in ("scan", "sum"))
        size = results.of("scan", OURS, "scan")[0].facts["bytes"]
        yield Verdict(
            "zero scan / read bandwidth",
            plain / scan,
            0.9,
            at_least=True,
            detail=f"{size / scan / 1e9:.1f} GB/s, sum loop {size / plain / 1e9:.1f} GB/s",
        )


def _saves(results: Results) -> Iterator[Verdict]:
    for contents, (of_defaults, of_best) in _AGAINST_QEMU.items():
        work = f"save {contents}"
        for memory in results.names(work, OURS):
            ours = results.median(work, OURS, memory)
            label = f"{work} ({memory})"
            if memory in (VM_DIRECT, VM_QEMU):
                yield from _vm_saves(results, contents, memory, ours)
                continue
            if fio := results.best(work, FIO):
                yield _ratio(f"{label} / fio", ours, results.median(work, FIO, fio), 1.05, fio)
            if of_defaults and "defaults" in results.names(work, QEMU):
                theirs = results.median(work, QEMU, "defaults")
                yield _ratio(f"{label} / QEMU's defaults", ours, theirs, of_defaults)
            if best := results.best(work, QEMU):
                theirs = results.median(work, QEMU, best)
                yield _ratio(f"{label} / QEMU's best", ours, theirs, of_best, best)


def _vm_saves(results: Results, contents: Contents, name: str, ours: float) -> Iterator[Verdict]:
    """Against the same runs of QEMU's as the package's other saves."""
    work = f"save {contents}"
    label = f"{work} ({name})"
    of_defaults = {VM_DIRECT: 0.15, VM_QEMU: 0.2}[name]
    if contents is not Contents.DENSE and "defaults" in results.names(work, QEMU):
        theirs = results.median(work, QEMU, "defaults")
        yield _ratio(f"{label} / QEMU's defaults", ours, theirs, of_defaults)
    best = results.best(work, QEMU)
    if name == VM_DIRECT and best and contents is not Contents.DENSE:
        limit = 0.8 if contents is Contents.RUNS else 0.9
        yield _ratio(f"{label} / QEMU's best", ours, results.median(work, QEMU, best), limit, best)
    best = results.best(work, LIBVIRT)
    if name == VM_DIRECT and best and contents is Contents.RUNS:
        theirs = results.median(work, LIBVIRT, best)
        yield _ratio(f"{label} / libvirt", ours, theirs, 0.15, best)


def _seals(results: Results) -> Iterator[Verdict]:
    for contents in Contents:
        work = seal_work(contents)
        if results.names(work, OURS):
            plain, sealed = (results.median(work, OURS, name) for name in (PLAIN, SEALED))
            yield _ratio(f"save {contents} with a seal / without", sealed, plain, 1.05)
    for name in results.names(COLD, OURS):
        if fio := results.best(COLD, FIO):
            ours, theirs = _rate(results, COLD, OURS, name), _rate(results, COLD, FIO, fio)
            yield Verdict(
                f"{COLD} ({name}), rate / fio's",
                ours / theirs,
                0.9,
                at_least=True,
                detail=f"{ours / MIB:.0f} MiB/s against {theirs / MIB:.0f} MiB/s ({fio})",
            )
    for name in results.names(CACHED, OURS):
        wall = _rate(results, CACHED, OURS, name) / 1e9
        spent = statistics.median(
            s.facts["data_bytes"] / s.cpu / 1e9 for s in results.of(CACHED, OURS, name) if s.cpu
        )
        yield Verdict(
            f"{CACHED}, a core", spent, 4.0, "GB/s", at_least=True, detail=f"{wall:.1f} by the wall"
        )


def _rate(results: Results, work: str, side: str, name: str) -> float:
    """Bytes of data a second, by the median time."""
    data: float = results.of(work, side, name)[0].facts["data_bytes"]
    return data / results.median(work, side, name)


def _restores(results: Results) -> Iterator[Verdict]:
    for name in results.names(INSTANT_WORK, OURS):
        median = results.median(INSTANT_WORK, OURS, name)
        yield Verdict(f"{INSTANT_WORK}, {name}", median * 1000, 30, "ms")
    for name in results.names(SERIAL_WORK, OURS):
        if fresh := results.best(SERIAL_WORK, QEMU):
            ours = results.median(SERIAL_WORK, OURS, name)
            theirs = results.median(SERIAL_WORK, QEMU, fresh)
            yield Verdict(
                f"{SERIAL_WORK} ({name}), more than fresh",
                (ours - theirs) * 1000,
                150,
                "ms",
                detail=f"{ours * 1000:.0f} ms against {theirs * 1000:.0f} ms",
            )
    if results.names(MEMFD_WORK, OURS):
        wide, full = (results.median(MEMFD_WORK, OURS, n) for n in (MEMFD_WIDE, MEMFD_FULL))
        yield _ratio(f"{MEMFD_WORK}: {MEMFD_WIDE} / {MEMFD_FULL}", wide, full, 1.3)
    for name in results.names(RESTORE_WORK, OURS):
        if best := results.best(RESTORE_WORK, QEMU):
            ours = results.median(RESTORE_WORK, OURS, name)
            theirs = results.median(RESTORE_WORK, QEMU, best)
            yield _ratio(f"{RESTORE_WORK} ({name}) / QEMU's best", ours, theirs, 1.0, best)


def _ratio(work: str, ours: float, theirs: float, limit: float, who: str = "") -> Verdict:
    detail = f"{ours:.3f} s against {theirs:.3f} s" + (f" ({who})" if who else "")
    return Verdict(work, ours / theirs, limit, detail=detail)


def _processor(results: Results) -> Iterator[Verdict]:
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


def _loads(results: Results) -> Iterator[Verdict]:
    """Into a file of shared memory, and into anonymous memory: each against QEMU doing the same,
    with the default of two channels and with the best count."""
    for contents in (Contents.DENSE, Contents.RUNS):
        work = f"load {contents}"
        for kind in ("shared file", "anonymous"):
            names = [name for name in results.names(work, OURS) if name.startswith(kind)]
            names = [name for name in names if "clear" not in name]  # QEMU has no such choice
            theirs = results.best(work, QEMU, kind)
            if not names:
                continue
            best = min(names, key=lambda name: results.median(work, OURS, name))
            for name in dict.fromkeys((names[0], best)):
                ours = results.median(work, OURS, name)
                if theirs:
                    time = results.median(work, QEMU, theirs)
                    yield _ratio(f"{work} ({name}) / QEMU's best", ours, time, 0.95, theirs)
                if fio := results.best(work, FIO):
                    rate = results.of(work, OURS, name)[0].facts["data_bytes"] / ours
                    peer = results.of(work, FIO, fio)[0].facts["data_bytes"]
                    peer /= results.median(work, FIO, fio)
                    yield Verdict(
                        f"{work} ({name}), rate / fio's",
                        rate / peer,
                        0.9,
                        at_least=True,
                        detail=f"{rate / MIB:.0f} MiB/s against {peer / MIB:.0f} MiB/s ({fio})",
                    )


def _sparse(results: Results) -> Iterator[Verdict]:
    work = "save sparse"
    for name in results.names(work, OURS):
        if not name.startswith(SPARSE_WIDE):
            continue
        alone = name.replace(SPARSE_WIDE, SPARSE_ALONE)
        ours, theirs = (results.median(work, OURS, who) for who in (name, alone))
        yield _ratio(f"{work}: {name} / {SPARSE_ALONE}", ours, theirs, 1.3)
        grown = max(
            sample.facts["resident_after"] - sample.facts["resident_before"]
            for sample in results.of(work, OURS, name)
        )
        yield Verdict(f"{work}: {name}, the memfd grows by", grown / MIB, 0.0, "MiB")


def _tebibyte(results: Results) -> Iterator[Verdict]:
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


def _python(results: Results) -> Iterator[Verdict]:
    for name in results.names(PYTHON_WORK, OURS):
        samples = results.of(PYTHON_WORK, OURS, name)
        share = statistics.median(s.facts["python_seconds"] / s.seconds for s in samples)
        spent = statistics.median(s.facts["python_seconds"] for s in samples)
        yield Verdict(
            f"{PYTHON_WORK} of a save ({name})",
            share * 100,
            1.0,
            "%",
            detail=f"{spent * 1000:.1f} ms, system calls outside the core included",
        )


def _page_cache(results: Results) -> Iterator[Verdict]:
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


def _live(results: Results) -> Iterator[Verdict]:
    """The pause as the guest sees it; in the detail, what the report says of it."""
    if results.names(CONVERGE_WORK, OURS):
        yield _pause(results, CONVERGE_WORK, "converge", 20)
        if results.of(CONVERGE_WORK, OURS, STOPPED):
            ours, theirs = (results.median(CONVERGE_WORK, OURS, n) for n in ("converge", STOPPED))
            yield _ratio(f"{CONVERGE_WORK} / engine qemu, {STOPPED}", ours, theirs, 1.2)
    for name in results.names(BACKGROUND_WORK, OURS):
        private = name == PRIVATE
        yield _pause(results, BACKGROUND_WORK, name, 100 if private else 150)
        if private:
            yield _pause(results, BACKGROUND_WORK, name, 15, "pause_early")
        speed = _fact(results, BACKGROUND_WORK, name, "speed")
        work = f"{BACKGROUND_WORK} ({name}), the guest's speed / before"
        yield Verdict(work, speed, 0.5, at_least=True)
    for name in results.names(PRECOPY_WORK, OURS):
        if STOPPED in name:
            continue
        gib = float(name.split()[0])
        yield _pause(results, PRECOPY_WORK, name, 350 * gib / 4)
        plain = f"{name}, {STOPPED}"
        if results.names(PRECOPY_WORK, OURS).count(plain):
            ours, theirs = (results.median(PRECOPY_WORK, OURS, n) for n in (name, plain))
            yield _ratio(f"{PRECOPY_WORK} ({name}) / {STOPPED}", ours, theirs, 1.25)
    for name in results.names(COST_WORK, OURS):
        speed = _fact(results, COST_WORK, name, "speed")
        yield Verdict(f"{COST_WORK} ({name})", speed, 0.97, at_least=True)


def _increments(results: Results) -> Iterator[Verdict]:
    for name in results.names(INCREMENT_WORK, OURS):
        pause, total = (20, 0.25) if name.startswith("40 ") else (150, 1.0)
        yield _pause(results, INCREMENT_WORK, name, pause)
        seconds = results.median(INCREMENT_WORK, OURS, name)
        yield Verdict(f"{INCREMENT_WORK} ({name}), with fsync", seconds, total, "s")
        changed = _fact(results, INCREMENT_WORK, name, "working_set")
        size = _fact(results, INCREMENT_WORK, name, "allocated_bytes")
        yield Verdict(
            f"{INCREMENT_WORK} ({name}), the file", size / MIB, changed / MIB * 1.05 + 2, "MiB"
        )
    for name in results.names(LINUX_WORK, OURS):
        yield _pause(results, LINUX_WORK, name, 10)
        size = _fact(results, LINUX_WORK, name, "allocated_bytes")
        yield Verdict(f"{LINUX_WORK} ({name}), the file", size / MIB, 4, "MiB")
    for name in results.names(AGAIN, OURS):
        if name.startswith(INSTANT):
            continue
        plain = f"{INSTANT}, {name.partition(', ')[2]}"
        ours, theirs = (results.median(AGAIN, OURS, n) * 1000 for n in (name, plain))
        yield Verdict(
            f"{AGAIN} ({name}), beyond {INSTANT}",
            ours - theirs,
            60 if "of 40 MiB" in name else 400,
            "ms",
            detail=f"{ours:.0f} ms against {theirs:.0f} ms",
        )
    for name in results.names(CLONES_WORK, OURS):
        memory, whole, base, changed = (
            _fact(results, CLONES_WORK, name, fact) / MIB
            for fact in ("memory_pss", "process_pss", "base_bytes", "changed_bytes")
        )
        yield Verdict(
            f"{CLONES_WORK} ({name}), PSS of their memory",
            memory,
            base + 1.2 * changed,
            "MiB",
            detail=f"base {base:.0f}, changed {changed:.0f}; of the whole processes {whole:.0f}",
        )
    if results.names(WORKING_SET_WORK, OURS):
        ours, theirs = (
            results.median(WORKING_SET_WORK, OURS, name) for name in (RECORDED, UNRECORDED)
        )
        yield _ratio(f"{WORKING_SET_WORK}: {RECORDED} / {UNRECORDED}", ours, theirs, 0.4)


def _lazy(results: Results) -> Iterator[Verdict]:
    for name in results.names(BYTE_WORK, OURS):
        if name.startswith("lazy") and name != REMOTE:
            seconds = results.median(BYTE_WORK, OURS, name)
            others = ", ".join(
                f"{mode} {results.median(BYTE_WORK, OURS, other) * 1e3:.0f} ms"
                for mode in ("instant", "load")
                if (other := name.replace("lazy", mode)) in results.names(BYTE_WORK, OURS)
            )
            yield Verdict(f"{BYTE_WORK} ({name})", seconds * 1e3, 10, "ms", detail=others)
    if REMOTE in results.names(AFTER_EXEC_WORK, OURS):
        seconds = results.median(AFTER_EXEC_WORK, OURS, REMOTE)
        yield Verdict(f"{AFTER_EXEC_WORK} ({REMOTE})", seconds * 1e3, 150, "ms")
    if SECOND_RUN in results.names(WORKLOAD_WORK, OURS):
        first, second = (
            results.median(WORKLOAD_WORK, OURS, run) for run in (FIRST_RUN, SECOND_RUN)
        )
        detail = f"{first:.2f} s, then {second:.2f} s"
        yield Verdict(WORKLOAD_WORK, first / second, 4, at_least=True, detail=detail)
    for name in results.names(PUSH_WORK, OURS):
        samples = results.of(PUSH_WORK, OURS, name)
        for fact, limit, unit in (("gib_a_second", 0.9, "GiB/s"), ("cpu_a_gib", 0.5, "s/GiB")):
            measured = statistics.median(sample.facts[fact] for sample in samples)
            faster = fact == "gib_a_second"
            yield Verdict(f"{PUSH_WORK}, {fact}", measured, limit, unit, at_least=faster)
    for name in results.names(LATENCY_WORK, OURS):
        yield Verdict(LATENCY_WORK, results.median(LATENCY_WORK, OURS, name) * 1e6, 30, "us")


def _pool(results: Results) -> Iterator[Verdict]:
    for name in results.names(TAKE_WORK, OURS):
        samples = [sample.seconds * 1000 for sample in results.of(TAKE_WORK, OURS, name)]
        detail = f"{min(samples):.1f} to {max(samples):.1f}"
        yield Verdict(f"{TAKE_WORK}, {name}", statistics.median(samples), 10, "ms", detail=detail)
    for name in results.names(RESET_WORK, OURS):
        speed = 1 / results.median(RESET_WORK, OURS, name)
        yield Verdict(f"{RESET_WORK}, {name}", speed, 20, "a second", at_least=True)
        cpu = results.cpu(RESET_WORK, OURS, name)
        if cpu:
            yield Verdict(
                f"{RESET_WORK}, {name}, by processor time of two cores",
                2 / cpu,
                20,
                "a second",
                at_least=True,
            )


def _store(results: Results) -> Iterator[Verdict]:
    for name in results.names(ADD_WORK, OURS):
        limit = {FIRST: 1.5, LATER: 0.3}.get(name.partition(",")[0])
        if limit is not None:
            yield Verdict(f"{ADD_WORK}, {name}", results.median(ADD_WORK, OURS, name), limit, "s")
    if results.names(COPY_WORK, COPY):
        ours, theirs = (results.median(COPY_WORK, who, "1 file") for who in (OURS, COPY))
        yield _ratio(f"{COPY_WORK} / cp of the plain file", ours, theirs, 2.0)
    if results.names(WALK_WORK, OURS):
        ours, theirs = (
            results.of(WALK_WORK, OURS, name)[0].facts["bytes"]
            / results.median(WALK_WORK, OURS, name)
            / MIB
            for name in (MOUNTED, PLAIN_FILE)
        )
        yield Verdict(f"{WALK_WORK} ({MOUNTED})", ours, 500, "MiB/s", at_least=True)
        yield Verdict(
            f"{WALK_WORK} ({MOUNTED}), rate / {PLAIN_FILE}'s", ours / theirs, 0.8, at_least=True
        )
        ours, theirs = (
            results.of(FAULT_WORK, OURS, name)[0].facts["bytes"]
            / 4096
            / results.median(FAULT_WORK, OURS, name)
            for name in (MOUNTED, PLAIN_FILE)
        )
        yield Verdict(
            f"{FAULT_WORK} ({MOUNTED})",
            ours,
            10_000,
            "a second",
            at_least=True,
            detail=f"plain file {theirs:.0f}",
        )
    for name in results.names(DIFF_WORK, OURS):
        size = results.of(DIFF_WORK, OURS, name)[0].facts["bytes"]
        seconds = results.median(DIFF_WORK, OURS, name) * GIB / size
        yield Verdict(f"{DIFF_WORK}, {name}", seconds, 0.4, "s a GiB")
    for name in results.names(FLEET_WORK, OURS):
        seconds = results.median(FLEET_WORK, OURS, name)
        if name == FIRST:
            yield Verdict(f"{FLEET_WORK}, each", seconds / 200 * 1000, 40, "ms")
        else:
            yield Verdict(f"{FLEET_WORK}, second run in all", seconds, 0.2, "s")


def _pause(results: Results, work: str, name: str, limit: float, fact: str = "pause") -> Verdict:
    """In ms; ``fact`` says which of its pauses."""
    samples = [s.facts for s in results.of(work, OURS, name)]
    pauses = [facts[fact] * 1000 for facts in samples]
    reported = [f["downtime_reported"] * 1000 for f in samples if f["downtime_reported"]]
    detail = f"{min(pauses):.1f} to {max(pauses):.1f}"
    if reported:
        detail += f"; reported {statistics.median(reported):.1f}"
    where = "at the start" if fact == "pause_early" else "pause"
    return Verdict(
        f"{work} ({name}), {where}", statistics.median(pauses), limit, "ms", detail=detail
    )


def _fact(results: Results, work: str, name: str, fact: str) -> float:
    """The median of a fact."""
    return statistics.median(sample.facts[fact] for sample in results.of(work, OURS, name))
