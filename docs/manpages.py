"""Write the manual pages of the command, from its parser.

    python docs/manpages.py DIRECTORY

There is one page for the command (``pyqmigrate.1``) and one for each verb
(``pyqmigrate-vm-save.1``). ``make man`` writes them to build/man.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from argparse_manpage.manpage import Manpage

from pyqmigrate import __version__
from pyqmigrate.cli import build_parser
from pyqmigrate.cli.arguments import Parser
from pyqmigrate.cli.exit_codes import ExitCode

SUMMARY = "save, restore and look into the memory of QEMU virtual machines"
MEANINGS = {
    ExitCode.DONE: "The work is done.",
    ExitCode.BAD: "The snapshot is bad, or something differs.",
    ExitCode.USAGE: "The command line is wrong.",
    ExitCode.REFUSED: "The system refused: space, permission, I/O.",
    ExitCode.GUEST: "The guest or QEMU failed.",
    ExitCode.NOT_SUPPORTED: "This is not supported here.",
    ExitCode.INTERRUPTED: "The command was interrupted.",
}
SIZES = r"""
.SH SIZES
A size is written as 4096, 0x1000, 512M or 1GiB."""


def verbs(parser: Parser) -> Iterator[tuple[str, Parser, str]]:
    """Yield the name, the parser and the summary of each verb, and of the verbs below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                name, verb = choice.dest, action.choices[choice.dest]
                yield name, verb, choice.help or ""
                for below, *rest in verbs(verb):
                    yield f"{name} {below}", *rest


def page(parser: Parser, name: str, summary: str) -> Manpage:
    page = Manpage(
        parser,
        _data={"project_name": "pyqmigrate", "version": __version__, "manual_title": "pyqmigrate"},
    )
    page.prog, page.description = name, summary
    return page


def overview(parser: Parser, title: str, summary: str) -> Manpage:
    """Return a page that lists verbs, each of which has its own page."""
    listed = list(verbs(parser))
    plain = argparse.ArgumentParser(parser.prog, description=parser.description, add_help=False)
    group = plain.add_argument_group("verbs")
    for name, _, help_text in listed:
        group.add_argument(name, metavar=name, help=help_text)
    for shown in parser._action_groups:
        if shown.title in ("options", "general options"):
            plain._action_groups.append(shown)
    result = page(plain, title, summary)
    result.synopsis = [parser.prog, "[OPTIONS]", "VERB", "..."]
    return result


def exit_status() -> str:
    lines = [f".TP\n.B {int(code)}\n{MEANINGS[code]}" for code in ExitCode]
    return "\n.SH EXIT STATUS\n" + "\n".join(lines)


def see_also(names: list[str]) -> str:
    references = [r"\fB{}\fR(1)".format(name.replace("-", r"\-")) for name in names]
    return "\n.SH SEE ALSO\n" + ",\n".join(references) + "\n"


def pages() -> dict[str, str]:
    """Return the text of every page by its file's name."""
    parser = build_parser()
    parser.load_verbs([], nested=True)
    listed = [("", parser, SUMMARY), *verbs(parser)]
    titles = [f"pyqmigrate {name}".strip().replace(" ", "-") for name, _, _ in listed]
    made = {}
    for title, (_, verb, summary) in zip(titles, listed, strict=True):
        make = overview if any(verbs(verb)) else page
        others = [other for other in titles if other != title]
        related = others if title == "pyqmigrate" else ["pyqmigrate"]
        head, _, body = str(make(verb, title, summary)).rstrip().partition("\n")
        text = head.replace(r"\-", "-") + "\n" + body + SIZES + exit_status()
        made[f"{title}.1"] = text + see_also(related)
    return made


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.1"):
        old.unlink()
    for file_name, text in pages().items():
        (directory / file_name).write_text(text)
