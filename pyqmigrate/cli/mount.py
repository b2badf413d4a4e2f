"""Show the snapshots of a store as plain files in a directory, read-only.

DIR must be an empty directory of this user. For each snapshot it has NAME, a plain mapped-ram file, and
NAME.seal; snapshots that are added or removed later appear and disappear. STORE can also be a single
file. All programs can read the files: gdb, cp, QEMU. The command returns when the mount serves; a
process in the background serves it until pyqmigrate umount DIR. Damaged data is an I/O error for its
reader, and a message.

With --status the only argument is DIR, or none for all mounts: who waits for which bytes, since when, and
the messages.

Mounting works as root, in a user namespace, and with the program fusermount3 (package fuse3).

JSON: ``store``, ``directory``, ``keeper`` (the process in the background) and ``seconds``. With --status:
``mounts``, a list of objects of ``directory``, ``place``, ``keeper`` (null if it does not answer) and, if
it does, ``worker``, ``seconds``, ``restarts``, ``mounted``, ``resend``, ``requests``, ``reads``,
``bytes_read``, ``failed``, ``pushed``, ``waiting`` and ``messages``; see docs/json.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.outcome import Outcome, announce, counted, printable
from pyqmigrate.cli.sizes import show_size
from pyqmigrate.errors import PyqmigrateError, UsageError
from pyqmigrate.mount.status import mount_status

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "mount", _run, __doc__)
    parser.add_argument("store", metavar="STORE", nargs="?", help="the store: a directory or a URL")
    parser.add_argument("directory", metavar="DIR", nargs="?", help="where to mount it")
    parser.add_argument("--status", action="store_true", help="show what mounts do")
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="stay, and print messages to standard error; Ctrl-C unmounts",
    )
    parser.add_argument(
        "--allow-other",
        action="store_true",
        help="let other users read the files, which are the memory of guests",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="directory for parts of a remote store (default: ~/.cache/pyqmigrate/packs)",
    )
    parser.add_argument("--log", metavar="FILE", help="append messages to this file")


def _run(args: argparse.Namespace) -> Outcome:
    if args.status:
        if (
            args.directory is not None
            or args.foreground
            or args.allow_other
            or args.log
            or args.cache
        ):
            raise UsageError("--status takes DIR and nothing else")
        mounts = mount_status(args.store)
        return Outcome({"mounts": mounts}, _status_lines(mounts))
    if args.store is None or args.directory is None:
        raise UsageError("STORE and DIR are required: pyqmigrate mount STORE DIR")
    return _mount(args)


def _mount(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.mount.mounting import check_mount_point, check_not_in_store
    from pyqmigrate.mount.starting import MountRequest, start_keeper
    from pyqmigrate.mount.unmounting import place_of
    from pyqmigrate.store.pack_cache import default_directory

    started = time.monotonic()
    directory = place_of(args.directory)
    check_mount_point(directory, [args.cache or default_directory(), *[args.log] * bool(args.log)])
    place = args.store if "://" in args.store else os.path.abspath(args.store)
    shown = _name_of(place)
    check_not_in_store(directory, shown)
    client = start_keeper(
        MountRequest(
            directory,
            place,
            shown,
            cache=os.path.abspath(args.cache) if args.cache else "",
            allow_other=args.allow_other,
            log=os.path.abspath(args.log) if args.log else "",
            follow=args.foreground,
        )
    )
    data = {
        "store": shown,
        "directory": directory,
        "keeper": client.keeper,
        "seconds": time.monotonic() - started,
    }
    lines = [f"{printable(directory)}: shows {printable(shown)}"]
    if args.foreground:
        announce(args, data, lines)
        _follow(client, quiet=args.quiet)
        return Outcome(None, [])
    client.ask("release")
    client.close()
    return Outcome(data, lines)


def _name_of(place: str) -> str:
    """Return the place as messages name it, without credentials; raise the error of one that cannot be
    opened."""
    if "://" not in place and not os.path.isdir(place):
        from pyqmigrate.mount.files import SingleFile

        SingleFile(place).open(os.path.basename(place)).close()
        return place
    from pyqmigrate.store.store import Store

    with Store.open(place) as store:
        return store.name


def _follow(client: Any, *, quiet: bool) -> None:
    """Print the messages of a keeper until it ends; Ctrl-C takes the mount's name away."""

    def show(text: str) -> None:
        if not quiet and sys.stderr is not None:
            print(f"pyqmigrate: {printable(text)}", file=sys.stderr, flush=True)

    client.on_message = show
    try:
        try:
            client.wait(None)
        except KeyboardInterrupt:
            client.ask("hide")
            show("unmounted; it ends with the last file that is open")
    except PyqmigrateError:
        return  # the keeper has ended
    finally:
        client.close()


def _status_lines(mounts: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for mount in mounts:
        place = f"{printable(mount['directory'])}: {printable(mount['place'])}"
        if mount["keeper"] is None:
            lines.append(f"{place}, its keeper does not answer")
            continue
        lines.append(
            f"{place}, keeper {mount['keeper']}, worker {mount['worker']}, "
            f"{counted(mount['restarts'], 'restart')}, {counted(mount['reads'], 'read')}, "
            f"{show_size(mount['bytes_read'])}"
        )
        for wait in mount["waiting"]:
            who = f"{wait['pid']} ({printable(wait['command'])})" if wait["pid"] else "the kernel"
            what = f"{wait['work']} of {printable(wait['file'] or 'the directory')}"
            if wait["work"] == "read":
                what += f" at file offset {wait['offset']:#x}"
            lines.append(f"  waits {wait['seconds']:.1f} s  {who}: {what}")
        for message in mount["messages"]:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(message["when"]))
            lines.append(f"  {when}  {printable(message['text'])}")
    return lines or ["nothing is mounted"]
