"""The files of a store of snapshots: bytes to values and back (docs/internals/store-format.md)."""
