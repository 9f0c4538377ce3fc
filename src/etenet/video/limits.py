"""What decoding one upload may cost."""

from __future__ import annotations

from dataclasses import dataclass, fields

MOST_SEGMENTS = 100  # of one request, whatever its limits


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """What one upload may cost. Header claims are never trusted against these."""

    max_body_bytes: int = 64 * 2**20
    max_pixels: int = 4096 * 2304
    max_memory_bytes: int = 2**30  # of a decoder process, beyond what it uses at its start
    max_packets: int = 200_000
    max_segments: int = 16  # of one video, in one answer
    decode_deadline_s: float = 5.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) <= 0:
                raise ValueError(f"{limit.name} must be positive, got {getattr(self, limit.name)}")
        if self.max_segments > MOST_SEGMENTS:
            raise ValueError(f"max_segments is at most {MOST_SEGMENTS}, got {self.max_segments}")
