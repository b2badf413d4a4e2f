"""Device state as values: the results of :mod:`~pyqmigrate.format.device.decode`.

A :class:`Device` is one section of the stream; its ``state`` is a tree of :class:`State` and
:class:`Field` with the names and types of the stream's own description::

    device.name, device.instance_id             ("cpu", 0)
    device.state["env.eip"]                     0xfff0
    device.state["env.segs"][1]["base"]         0xffff0000
    device.state.subsection("cpu/vfp")          a State, or None
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, Union

__all__ = ["Device", "Field", "Scalar", "State", "Value"]

Scalar: TypeAlias = int | bool | bytes | None
Value: TypeAlias = Union[Scalar, "State", tuple[Scalar, ...], tuple["State", ...]]


@dataclass(frozen=True, slots=True)
class Field:
    """One field, as the description lists it. ``offset`` and ``length`` are bytes in the body.

    ``type`` is QEMU's word for it, empty for bytes that the description does not explain (which have no
    name either). ``index`` is the index in an array whose elements are listed one by one.

    ``value`` by type: numbers and timers are int, ``bool`` is bool (an int where the byte is
    neither 0 nor 1), a null pointer is None, a struct is a State; buffers, arrays of ``uint8`` and
    all that is ``opaque`` are bytes; a bitmap is bytes, its bit k being ``value[k // 8] >> k % 8``;
    other arrays and lists are tuples. ``opaque`` means that the type is not known here.
    """

    name: str
    type: str
    offset: int
    length: int
    value: Value
    index: int | None = None
    opaque: bool = False

    @property
    def label(self) -> str:
        """The name, with the index if it has one."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"


@dataclass(frozen=True, slots=True)
class State:
    """The fields of a device, of a struct, or of a subsection, in the order of the stream.

    ``name`` is that of the description's vmstate and may be empty; ``version`` is None if the
    description has none. ``offset`` and ``length`` are bytes in the body; those of a subsection include
    its frame.
    """

    name: str
    version: int | None
    offset: int
    length: int
    fields: tuple[Field, ...]
    subsections: tuple[State, ...] = ()

    def __getitem__(self, name: str) -> Value:
        """Return the value of the first field of this name; KeyError if none has it."""
        for field in self.fields:
            if field.name == name:
                return field.value
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(field.name == name for field in self.fields)

    def get(self, name: str) -> Value:
        """Return ``self[name]``, or None if no field has this name."""
        return next((field.value for field in self.fields if field.name == name), None)

    def subsection(self, name: str) -> State | None:
        """Return the subsection of this name, or None."""
        return next((state for state in self.subsections if state.name == name), None)


@dataclass(frozen=True, slots=True)
class Device:
    """One device section. ``offset`` and ``body_offset`` are absolute in the file, bytes.

    ``described`` is False if the stream does not describe the section; its ``state`` is then one opaque
    field. ``explained`` is False if the description does not account for all bytes, here or in a
    struct: they are in the tree as fields without a name.
    """

    name: str
    instance_id: int
    version_id: int
    section_id: int
    offset: int
    length: int
    body_offset: int
    body_length: int
    state: State
    described: bool
    explained: bool

    def __getitem__(self, name: str) -> Value:
        """Return ``state[name]``."""
        return self.state[name]

    def states(self) -> Iterator[State]:
        """Yield every State of the tree, beginning with the device's own."""
        pending = [self.state]
        while pending:
            state = pending.pop()
            yield state
            pending += reversed(state.subsections)
            for field in reversed(state.fields):
                values = field.value if isinstance(field.value, tuple) else (field.value,)
                pending += [value for value in reversed(values) if isinstance(value, State)]
