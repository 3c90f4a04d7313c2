"""Looks into an ONNX file before the runtime does: how large the graph is, and which files it would have read.

Old versions of onnxruntime read any file of the machine as a weight, if a graph says so, and all of them take a special
name for an address in memory; a graph can also be made to exhaust whoever parses it. Rules, by which a graph of a bundle
is refused (invariant I13 of step-graphs.md, and section 2.5):

1. At most 16 MiB, 20,000 nodes, 4,096 inputs.
2. External data lies in the bundle's weight file and nowhere else, within its size, under exactly its bare name.
3. No subgraphs, functions, training information or sparse tensors, and no operators of foreign domains: our graphs have
   none, and each is a place where something could hide.

The format is protocol buffers (encoding page of the project) with the field numbers of `onnx.proto`. Only what the rules
need is looked at. Every length is checked before it is used, each message is entered at a fixed depth, and what no writer
writes (groups, numbers in more bytes than they need) is refused, so that no two parsers can read one file differently.
This module trusts nothing, runs nothing and raises `BundleError` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_sdk.errors import BundleError

FILE_LIMIT: Final = 16 << 20
NODES_LIMIT: Final = 20_000
INPUTS_LIMIT: Final = 4_096

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _MODEL_REFUSED = 7, {20: "training information", 25: "a function"}
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_REFUSED = 1, 5, 11, {15: "a sparse tensor"}
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_ATTRIBUTE_TENSORS = (5, 10)
_ATTRIBUTE_REFUSED = {6: "a subgraph", 11: "a subgraph", 22: "a sparse tensor", 23: "a sparse tensor"}
_TENSOR_EXTERNAL = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_DOMAINS = (b"", b"ai.onnx")


class _Refused(BundleError):
    """Says what was found; `check_graph` adds the file's name."""


@dataclass(frozen=True)
class ExternalData:
    """Where a tensor says its bytes lie; absent numbers are None."""

    location: bytes
    offset: int | None
    length: int | None


@dataclass(frozen=True)
class GraphFacts:
    """What a graph file is made of."""

    nodes: int
    inputs: int
    external: tuple[ExternalData, ...]


def check_graph(path: Path, weights: str) -> GraphFacts:
    """Raise `BundleError` unless the graph file keeps the rules; `weights` is the name of the weight file beside it."""
    try:
        size = path.stat().st_size
        if size > FILE_LIMIT:
            raise BundleError(f"{path.name}: I13: has {size} bytes, a graph has at most {FILE_LIMIT}")
        data = path.read_bytes()
        beside = path.with_name(weights)
        held = beside.stat().st_size if beside.is_file() else 0
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        facts = graph_facts(data)
        for entry in facts.external:
            _check_external(entry, weights, held)
    except _Refused as refused:
        raise BundleError(
            f"{path.name}: is refused before it is loaded: {refused}: do not use this bundle unless you know who made it"
        ) from refused
    return facts


def graph_facts(data: bytes) -> GraphFacts:
    """Count nodes and inputs of a serialized `ModelProto`, collect its external data. Raises `BundleError`."""
    return _model(memoryview(data))


def _check_external(entry: ExternalData, weights: str, size: int) -> None:
    if entry.location != weights.encode():
        raise _Refused(f"it would read {_shown(entry.location)} as a weight, expected {weights}")
    begin, length = entry.offset or 0, entry.length
    end = size if length is None else begin + length
    if begin > size or end > size:
        raise _Refused(f"it would read bytes {begin} to {end} of {weights}, which has {size}")


def _shown(text: bytes) -> str:
    return repr(text[:80].decode("utf-8", "replace"))


# The messages, from the outside in. No message is entered from itself: the depth is that of the functions.


def _model(data: memoryview) -> GraphFacts:
    nodes = inputs = graphs = 0
    external: list[ExternalData] = []
    for number, value in _fields(data, "the model"):
        if number in _MODEL_REFUSED:
            raise _Refused(f"it holds {_MODEL_REFUSED[number]}")
        if number != _MODEL_GRAPH:
            continue
        graphs += 1
        for inner, part in _fields(_message(value, "the graph"), "the graph"):
            if inner in _GRAPH_REFUSED:
                raise _Refused(f"it holds {_GRAPH_REFUSED[inner]}")
            if inner == _GRAPH_NODE:
                nodes += 1
                if nodes > NODES_LIMIT:
                    raise _Refused(f"I13: it has more than {NODES_LIMIT} nodes")
                external += _node(_message(part, "a node"))
            elif inner == _GRAPH_INPUT:
                inputs += 1
                if inputs > INPUTS_LIMIT:
                    raise _Refused(f"I13: it has more than {INPUTS_LIMIT} inputs")
            elif inner == _GRAPH_INITIALIZER:
                external += _tensor(_message(part, "a tensor"))
    if graphs != 1:
        raise _Refused(f"it holds {graphs} graphs, expected one: not a whole ONNX file")
    return GraphFacts(nodes, inputs, tuple(external))


def _node(data: memoryview) -> Iterator[ExternalData]:
    for number, value in _fields(data, "a node"):
        if number == _NODE_DOMAIN:
            domain = bytes(_message(value, "a domain"))
            if domain not in _DOMAINS:
                raise _Refused(f"it uses an operator of the domain {_shown(domain)}")
        elif number == _NODE_ATTRIBUTE:
            for inner, part in _fields(_message(value, "an attribute"), "an attribute"):
                if inner in _ATTRIBUTE_REFUSED:
                    raise _Refused(f"it holds {_ATTRIBUTE_REFUSED[inner]}")
                if inner in _ATTRIBUTE_TENSORS:
                    yield from _tensor(_message(part, "a tensor"))


def _tensor(data: memoryview) -> Iterator[ExternalData]:
    """At most one: where the tensor's bytes lie, if it says so, whether or not it also says that they lie outside."""
    entries: dict[bytes, bytes] = {}
    for number, value in _fields(data, "a tensor"):
        if number == _TENSOR_EXTERNAL:
            key, content = _entry(_message(value, "external data"))
            if key in entries or key not in (b"location", b"offset", b"length"):
                raise _Refused(f"its external data has the entry {_shown(key)}{' twice' if key in entries else ''}")
            entries[key] = content
    if entries:
        yield ExternalData(
            entries.get(b"location", b""), _number(entries.get(b"offset")), _number(entries.get(b"length"))
        )


def _entry(data: memoryview) -> tuple[bytes, bytes]:
    found: dict[int, bytes] = {}
    for number, value in _fields(data, "external data"):
        if number not in (_ENTRY_KEY, _ENTRY_VALUE) or number in found:
            raise _Refused("an entry of its external data is not one key and one value")
        found[number] = bytes(_message(value, "external data"))
    return found.get(_ENTRY_KEY, b""), found.get(_ENTRY_VALUE, b"")


def _number(text: bytes | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        raise _Refused(f"its external data has the number {_shown(text)}")
    return int(text)


def _message(value: memoryview | None, what: str) -> memoryview:
    if value is None:
        raise _Refused(f"{what} is written as a number")
    return value


def _fields(data: memoryview, what: str) -> Iterator[tuple[int, memoryview | None]]:
    """Number and content of every field; None for numbers, whose values nobody here needs."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position, 5, what)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise _Refused(f"{what} has a field of the number {number}")
        content = None
        if wire == _VARINT:
            _, position = _varint(data, position, 10, what)
        elif wire == _LENGTH:
            length, position = _varint(data, position, 5, what)
            if length > end - position:
                raise _Refused(f"{what} is cut short")
            content = data[position : position + length]
            position += length
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
            if position > end:
                raise _Refused(f"{what} is cut short")
        else:
            raise _Refused(f"{what} has a field of the wire type {wire}")
        yield number, content


def _varint(data: memoryview, position: int, most: int, what: str) -> tuple[int, int]:
    """A number in at most `most` bytes, and the position behind it."""
    result = 0
    for index in range(most):
        if position >= len(data):
            raise _Refused(f"{what} is cut short")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if byte == 0 and index:
                raise _Refused(f"{what} has a number in more bytes than it needs")
            return result, position
    raise _Refused(f"{what} has a number of more than {most} bytes")
