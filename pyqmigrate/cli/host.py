"""The part of ``info`` about this host: whether the guest can go on here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyqmigrate.cli.arguments import Parser
from pyqmigrate.cli.outcome import counted, printable
from pyqmigrate.errors import UsageError
from pyqmigrate.snapshot.base import Snapshot

if TYPE_CHECKING:
    from pyqmigrate.vm.incoming.portability import HostReport

__all__ = ["add_host", "check_host_options", "host_data", "host_lines", "host_report"]


def add_host(parser: Parser) -> None:
    """Add ``--host``, ``--qemu``, ``--accel`` and ``--cpu``."""
    parser.add_argument(
        "--host",
        action="store_true",
        help="compare the CPU features that the guest uses with this host and its QEMU",
    )
    parser.add_argument(
        "--qemu", metavar="PATH", help="with --host: the QEMU to ask (default: qemu-system-x86_64)"
    )
    parser.add_argument(
        "--accel",
        choices=["kvm", "tcg"],
        help="with --host: the accelerator of the restore (default: kvm if it is available)",
    )
    parser.add_argument(
        "--cpu",
        metavar="MODEL",
        help="with --host: the CPU model of the restore, as QEMU's -cpu (default: the one that vm save "
        "recorded; without a record only what is possible at all is compared)",
    )


def check_host_options(args: argparse.Namespace) -> None:
    """Raise UsageError for options that need ``--host``."""
    for name in ("qemu", "accel", "cpu"):
        if getattr(args, name) is not None and not args.host:
            raise UsageError(f"--{name} is for --host")


def host_report(args: argparse.Namespace, snapshot: Snapshot) -> HostReport:
    """Compare, as the options say."""
    # Few need these.
    from pyqmigrate.vm.incoming.portability import check_host
    from pyqmigrate.vm.incoming.restore_cpu import recorded_model

    model = args.cpu or recorded_model(snapshot)
    if model is not None and model.partition(",")[0] == "host" and args.accel != "kvm":
        model = args.cpu  # QEMU has it with KVM only, which this host may not have
    return check_host(snapshot, qemu=args.qemu, accelerator=args.accel, model=model)


def host_data(report: HostReport) -> dict[str, Any]:
    """Return the value of the key ``host``."""
    return {
        "possible": report.possible,
        "cpus": report.use.cpus,
        "xcr0": report.use.xcr0,
        "xsave_size": report.use.xsave_size,
        "features": [asdict(feature) for feature in report.use.features],
        "msrs": list(report.use.msrs),
        "accelerator": report.accelerator,
        "qemu": report.qemu,
        "model": report.model,
        "missing": list(report.missing),
        "obstacles": list(report.obstacles),
        "notes": list(report.notes),
    }


def host_lines(report: HostReport) -> Iterator[str]:
    """Yield the report for people."""
    use = report.use
    names = ", ".join(feature.name for feature in use.features) or "nothing beyond the base"
    yield f"CPU use   {counted(use.cpus, 'CPU')}: {names}"
    yield f"          XCR0 {use.xcr0:#x}, an XSAVE area of {use.xsave_size} bytes"
    if use.msrs:
        yield f"          state {', '.join(printable(name) for name in use.msrs)}"
    asked = "no QEMU" if report.qemu is None else f"{printable(report.qemu)}, -cpu {report.model}"
    yield f"host      compared for {report.accelerator} with {asked}"
    yield from (f"note      {printable(text)}" for text in report.notes)
    yield from (f"obstacle  {printable(text)}" for text in report.obstacles)
    yield f"restore   {'nothing stands against it' if report.possible else 'not possible here'}"
