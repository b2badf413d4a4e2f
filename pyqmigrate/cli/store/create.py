"""Make a new store: a directory, which is created, or the objects below a URL.

It must be empty. A store has a random key of its own, which all digests depend on. Who can read the store
can read all of its snapshots; who can add to it can find out which pages it has: use one store for guests
that trust each other, not one for all.

The URLs s3://BUCKET/PREFIX, gs:// and az:// need the library obstore (pip install obstore). Credentials and
the endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL;
GOOGLE_SERVICE_ACCOUNT; AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY).

JSON: ``store``, as it was named; ``version``, of the format.
"""

from __future__ import annotations

import argparse

from pyqmigrate.cli.arguments import Verbs, add_verb
from pyqmigrate.cli.outcome import Outcome, printable
from pyqmigrate.cli.store.opening import add_store

__all__ = ["add_parser"]


def add_parser(verbs: Verbs) -> None:
    parser = add_verb(verbs, "create", _run, __doc__)
    add_store(parser)


def _run(args: argparse.Namespace) -> Outcome:
    from pyqmigrate.store.store import Store

    with Store.create(args.store) as store:
        name = store.name
    return Outcome({"store": args.store, "version": 1}, [f"{printable(name)}: a new store"])
