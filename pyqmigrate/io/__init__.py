"""Memories, targets and the channels between them. Knows no QMP."""
