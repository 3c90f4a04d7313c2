"""The precision of a program, as its id and its manifest entry name it.

    float      everything in float32
    int8       the frozen weights are int8, what trains is float32
    ptq<b>     trains in float32; serves and is scored quantized to b bits, as it will be deployed
    qat<b>     the same, and the forward pass of a step is quantized too

`ptq` and `qat` quantize weights to b bits (2 to 8), symmetric per output channel, and what enters them to unsigned 8 bits;
frozen weights to b bits as well (methods/precision.md, section 4). Of one width both serve the same function, and they
share the tensors of the float program.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from export.errors import SpecError

_NAME: Final = re.compile(r"(float)|(int)(8)|(ptq|qat)([2-8])")


@dataclass(frozen=True)
class Precision:
    """`bits` of weights, None where they are float32; `serves` and `trains`: whether fake quantizers are in those graphs."""

    name: str
    bits: int | None
    serves: bool
    trains: bool

    @classmethod
    def named(cls, name: str) -> Precision:
        """The precision of that name. Raises `SpecError` saying which there are."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise SpecError(f"precision {name!r} is unknown; there are float, int8, ptq2 to ptq8 and qat2 to qat8")
        width = found[3] or found[5]
        return cls(name, int(width) if width else None, found[4] is not None, found[4] == "qat")


FLOAT: Final = Precision("float", None, serves=False, trains=False)
