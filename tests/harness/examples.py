"""How long property tests may run: by examples, never by the clock of a shared machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

__all__ = ["few", "some"]

some = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
few = settings(some, max_examples=15)
