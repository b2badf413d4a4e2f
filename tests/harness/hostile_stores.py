"""Damage for stores: random, and by a writer that knows the key and signs what it made up."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

from pyqmigrate.format.digest import DIGEST_SIZE
from pyqmigrate.format.store.config import StoreConfig
from pyqmigrate.format.store.keyed import keyed_digest
from pyqmigrate.format.store.keys import pack_key
from pyqmigrate.format.store.pack import MAGIC, TRAILER_SIZE
from pyqmigrate.format.store.zstd import compress, decompress

__all__ = ["damage_store"]

_NUMBERS = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def damage_store(store: Path, rng: random.Random) -> str:
    """Change one file of a store; return what was done."""
    config = StoreConfig.decode((store / "store.json").read_bytes())
    kinds = [_flip_file, _flip_file, _sign_footer, _sign_body, _sign_body, _sign_head, _edit_config]
    kind = rng.choice([*kinds, _swap_files, _make_link])
    return f"{kind.__name__} {kind(store, config, rng)}"


def _files(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def _mutate(data: bytes, rng: random.Random) -> bytes:
    """Return some bytes with a few changes: bits, numbers, cuts, insertions."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        what = rng.randrange(6)
        if what == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(_NUMBERS) & ((1 << 8 * width) - 1)
            at -= at % width
            changed[at : at + width] = number.to_bytes(width, "little")
        elif what == 2:
            del changed[at:]
        elif what == 3:
            del changed[at : at + rng.randrange(1, 20)]
        elif what == 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 20))
        else:
            end = at + rng.randrange(1, 20)
            changed[at:end] = bytes(len(changed[at:end]))
    return bytes(changed)


def _flip_file(store: Path, config: StoreConfig, rng: random.Random) -> str:
    path = rng.choice(_files(store))
    path.write_bytes(_mutate(path.read_bytes(), rng))
    return path.name


def _sign_footer(store: Path, config: StoreConfig, rng: random.Random) -> str:
    """Change the table of a pack, or its frames, and sign it again."""
    path = rng.choice(sorted((store / "packs").iterdir()))
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, len(data) - TRAILER_SIZE)
    end = len(data) - TRAILER_SIZE
    frames, footer = data[: end - length], data[end - length : end]
    if rng.random() < 0.3:
        frames = _mutate(frames, rng)
    else:
        footer = _mutate(footer, rng)
    trailer = struct.pack("<II", len(footer), 0) + keyed_digest(config.key, [footer]) + MAGIC
    whole = frames + footer + trailer
    path.write_bytes(whole)
    if rng.random() < 0.3:  # under the name that it should have, too
        (store / pack_key(keyed_digest(config.key, [whole]))).write_bytes(whole)
    return path.name


def _snapshot(store: Path, rng: random.Random) -> tuple[Path, dict[str, object], bytes]:
    path = rng.choice(sorted((store / "snapshots").iterdir()))
    line, _, rest = path.read_bytes().partition(b"\n")
    head = json.loads(line)
    return path, head, decompress(rest[:-DIGEST_SIZE], head["body_size"])


def _write(path: Path, key: bytes, head: dict[str, object], body: bytes, compressed: bytes) -> None:
    head |= {"body": len(compressed), "body_size": len(body)}
    head.pop("digest", None)
    front = json.dumps(head).encode()[:-1]
    line = front + b', "digest": "' + keyed_digest(key, [front]).hex().encode() + b'"}\n'
    path.write_bytes(line + compressed + keyed_digest(key, [line, compressed]))


def _sign_body(store: Path, config: StoreConfig, rng: random.Random) -> str:
    """Change the index of a snapshot, and sign it again."""
    path, head, body = _snapshot(store, rng)
    body = _mutate(body, rng)
    _write(path, config.key, head, body, compress(body, 1))
    return path.name


def _sign_head(store: Path, config: StoreConfig, rng: random.Random) -> str:
    """Change a value of a snapshot's head, and sign it again."""
    path, head, body = _snapshot(store, rng)
    name = rng.choice(sorted(head))
    head[name] = rng.choice(
        [None, True, -1, 0, 1 << 46, 1 << 62, 1 << 70, 1.5, "", "x" * 300, "../../a", [], {}, [[]],
         [{}], {"a": 1}, [{"name": "a", "length": 1 << 62, "page_size": 4096}], "Infinity", "\0"]
    )  # fmt: skip
    _write(path, config.key, head, body, compress(body, 1))
    return f"{path.name} {name}"


def _edit_config(store: Path, config: StoreConfig, rng: random.Random) -> str:
    value = json.loads((store / "store.json").read_bytes())
    name = rng.choice(sorted(value))
    value[name] = rng.choice([None, True, -1, 0, 1, 65, 1 << 70, 1.5, "", "zz" * 32, "00" * 31, []])
    (store / "store.json").write_text(json.dumps(value))
    return name


def _swap_files(store: Path, config: StoreConfig, rng: random.Random) -> str:
    """Give a file the content of another."""
    left, right = rng.choice(_files(store)), rng.choice(_files(store))
    left.write_bytes(right.read_bytes())
    return f"{left.name} {right.name}"


def _make_link(store: Path, config: StoreConfig, rng: random.Random) -> str:
    """Replace a file by a link, or by something that cannot be read to its end."""
    path = rng.choice(_files(store))
    path.unlink()
    path.symlink_to(
        rng.choice(["/dev/zero", "/etc/passwd", "../store.json", path.name, "/dev/null"])
    )
    return path.name
