"""Many snapshots: deduplicated, compressed, in a directory or an object store."""
