"""A hostile file and its expected outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Expected = Literal["accept", "reject", "either"]


@dataclass(frozen=True, slots=True)
class HostileFile:
    """`accept`: it must get a caption. `reject`: a 4xx with a reason. `either`: one of the two."""

    name: str
    expected: Expected
    body: bytes
