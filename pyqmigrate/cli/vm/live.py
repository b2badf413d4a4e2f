"""The options of live saves, for ``vm save`` and ``vm check``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqmigrate.vm.outgoing.options import VmLiveOptions

__all__ = ["add_live", "live_options"]


def add_live(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--live",
        action="store_true",
        help="let the guest run during the save, by the method with the shortest expected pause",
    )
    parser.add_argument(
        "--method",
        choices=["converge", "background", "precopy", "changed"],
        default=None,
        help="save live by this method only; implies --live",
    )
    parser.add_argument(
        "--max-pause",
        metavar="MS",
        type=_milliseconds,
        default=None,
        help="of a live save: fail rather than pause the guest for more milliseconds than this",
    )
    parser.add_argument(
        "--base",
        metavar="auto|PATH|none",
        default="none",
        help="write an increment: only what changed since this snapshot, from which the guest was "
        "restored (auto: find it; default: none); implies --live, by method changed",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="with --base: write a whole snapshot that shares unchanged pages with the base on disk "
        "(XFS, btrfs)",
    )
    parser.add_argument(
        "--keep-digests",
        action="store_true",
        help="write digests of the pages into SNAPSHOT.pages, for later increments; implies --live, "
        "by method precopy",
    )


def live_options(args: argparse.Namespace) -> VmLiveOptions:
    return {
        "live": args.live if args.method is None else args.method,
        "max_pause": args.max_pause,
        "base": None if args.base == "none" else args.base,
        "full": args.full,
        "keep_digests": args.keep_digests,
    }


def _milliseconds(text: str) -> float:
    """Return them in seconds."""
    try:
        return float(text) / 1000
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number of milliseconds: {text!r}") from None
