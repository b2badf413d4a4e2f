"""Compare snapshots."""
