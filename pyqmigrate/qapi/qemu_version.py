"""The differences between versions of QEMU that a file migration can show.

Code that imitates QEMU takes them from here: the names that a version lacks, the form of its texts,
and its checks. Behaviour common to all versions is in the code.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QEMU_10_0", "QEMU_11_1", "QemuVersion"]


@dataclass(frozen=True, slots=True)
class QemuVersion:
    """One version of QEMU.

    Names:
        numbers: major, minor and micro version, as in the greeting.
        lacks: the capabilities, parameters, words of parameters, statuses, and members of
            addresses that another version has and this one does not.
        returns_str_or_null: in the schema, the type of the texts that query-migrate-parameters
            returns; otherwise they are strings.

    Texts:
        out_of_range: for a parameter out of range; ``{name}`` is its name as shown, ``{range}`` is
            what it expects.
        underscores: parameters are shown with underscores for dashes, except ``shown_otherwise``,
            for which the opposite holds.
        json_positions: errors of JSON begin with line and column, and name what was expected.
        sectioned_info: HMP ``info migrate`` has sections, and the globals with ``-a`` only.
        hmp_takes_rest_of_line: HMP ``migrate_set_parameter`` takes all of the line as the value.
        total_remaining: query-migrate has the remaining bytes of everything, not of RAM only.
        load_reasons: the error of a failed load ends with the reason.

    Behaviour:
        colo_needs_return_path, postcopy_with_multifd: rules for combinations.
        detach: ``migrate`` takes the argument ``detach``, which has no effect.
        files_by_fd: ``fd:`` accepts the descriptor of a file.
        first_pass_event: MIGRATION_PASS is sent for the first pass too, and for the last after the
            status ``device``; otherwise before it.
        interrupted_switchover: the error of a migration that was cancelled in ``pre-switchover``.
        external_blocks: a mapped-ram file can list RAM that x-ignore-shared leaves out.
    """

    numbers: tuple[int, int, int]
    lacks: frozenset[str]
    returns_str_or_null: bool
    out_of_range: str
    underscores: bool
    shown_otherwise: str
    json_positions: bool
    sectioned_info: bool
    hmp_takes_rest_of_line: bool
    total_remaining: bool
    load_reasons: bool
    colo_needs_return_path: bool
    postcopy_with_multifd: bool
    detach: bool
    files_by_fd: bool
    first_pass_event: bool
    interrupted_switchover: str
    external_blocks: bool

    def has(self, name: str) -> bool:
        """Return whether this version has the capability, parameter, word or status."""
        return name not in self.lacks

    def shown(self, parameter: str) -> str:
        """Return a parameter's name as texts show it."""
        underscores = self.underscores != (parameter == self.shown_otherwise)
        return parameter.replace("-", "_") if underscores else parameter


QEMU_10_0 = QemuVersion(
    numbers=(10, 0, 2),
    lacks=frozenset(
        {
            "cpr-exec",
            "cpr-exec-command",
            "x-rdma-chunk-size",
            "failing",
            "postcopy-device",
            "keep-alive-count",
            "keep-alive-idle",
            "keep-alive-interval",
        }
    ),
    returns_str_or_null=False,
    out_of_range="Parameter '{name}' expects {range}",
    underscores=True,
    shown_otherwise="x-vcpu-dirty-limit-period",
    json_positions=False,
    sectioned_info=False,
    hmp_takes_rest_of_line=False,
    total_remaining=False,
    load_reasons=False,
    colo_needs_return_path=False,
    postcopy_with_multifd=False,
    detach=True,
    files_by_fd=True,
    first_pass_event=True,
    interrupted_switchover="Channel error: Input/output error",
    external_blocks=False,
)

QEMU_11_1 = QemuVersion(
    numbers=(11, 1, 3),
    lacks=frozenset({"zero-blocks"}),
    returns_str_or_null=True,
    out_of_range="Option {name} expects {range}",
    underscores=False,
    shown_otherwise="x-rdma-chunk-size",
    json_positions=True,
    sectioned_info=True,
    hmp_takes_rest_of_line=True,
    total_remaining=True,
    load_reasons=True,
    colo_needs_return_path=True,
    postcopy_with_multifd=True,
    detach=False,
    files_by_fd=False,
    first_pass_event=False,
    interrupted_switchover="Switchover is interrupted",
    external_blocks=True,
)
