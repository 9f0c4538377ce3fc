"""What computes: resized frames -> features -> sentences. One interface, three forms.

`network.py` has the form that defines the results, on torch. `openvino.py` has the form for CPUs, whose encoder is
compiled and whose search needs no torch; `cuda/` has the form for GPUs, in half precision and captured as CUDA graphs.
`load.py` chooses. Knows no video and no caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from etenet import metrics
from etenet.errors import UsageError
from etenet.model.hypothesis import Hypothesis
from etenet.runtime import PACKAGED

# Frames encoded in one call. On a GPU more need more memory and are no faster.
MAX_FRAMES = 256
# The cosine of the features of a frame to those of float32. bfloat16 has .9997 where it works.
LEAST_SIMILARITY = 0.999

Features: TypeAlias = Any
"""float32 features in the array of a network's own kind and on its own device: of NumPy or of torch."""
FeaturesOfClips: TypeAlias = Any
"""Those of B clips: a sequence of B arrays (L, D), or one array (B, L, D). Each network takes arrays of either kind."""
FeaturesT = TypeVar("FeaturesT", bound=Any)


class Network(Protocol):
    """Encoder and decoder of one checkpoint, ready to run. One instance serves one thread at a time."""

    batch_clips: int  # how many clips to bring at once where there are many
    few_clips: int  # how many, where the first caption should be there soon
    precision: str  # what the encoder computes in: float32, float16, bf16 or int8

    @property
    def exact(self) -> Network:
        """The form that clips go to whose numbers leave this form's range; itself if it has float32's range."""

    def features(self, frames: NDArray[np.uint8]) -> Features:
        """frames (B, L, resize_px, resize_px, 3) uint8 RGB -> features (B, L, D) float32."""

    def finite(self, features: Features) -> list[bool]:
        """features (B, L, D) -> of each clip whether all its features are finite."""

    def mean_features(self, features: FeaturesOfClips) -> NDArray[np.float32]:
        """The mean over the frames of each clip, (B, D)."""

    def sentences(self, features: FeaturesOfClips, *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
        """The sentences of each clip, best first; none if its probabilities are not finite."""

    def log_probs(self, feature: NDArray[np.float32], sentences: Sequence[Sequence[int]]) -> list[float]:
        """Of each sentence, its end included, for a clip whose frames all have this feature (D,)."""

    def recover(self) -> None:
        """After an error: free the device's memory. Raises `DeviceFailed` if the device no longer computes."""


def require_similar_features(network: Network, exact: Network, frames: NDArray[np.uint8]) -> None:
    """Both networks, on a CPU, must agree on frames (L, resize_px, resize_px, 3). Raises `UsageError`."""
    features, expected = (np.asarray(each.features(frames[None])) for each in (network, exact))
    norms = np.linalg.norm(features, axis=-1) * np.linalg.norm(expected, axis=-1)
    similarity = float(((features * expected).sum(axis=-1) / np.maximum(norms, np.finfo(norms.dtype).tiny)).min())
    if not similarity >= LEAST_SIMILARITY:
        raise UsageError(
            f"in {network.precision} the features of the test clip have a cosine of {similarity:.4f} to those in "
            f"{exact.precision}, and {LEAST_SIMILARITY} is needed; set precision to {PACKAGED}"
        )


def encode_clips(
    frames: NDArray[np.uint8],
    encode: Callable[[NDArray[np.uint8]], FeaturesT],
    concatenate: Callable[[list[FeaturesT]], FeaturesT],
    *,
    max_frames: int = MAX_FRAMES,
) -> FeaturesT:
    """frames (B, L, resize_px, resize_px, 3) -> features (B, L, D). Of equal consecutive frames one is encoded.

    `encode`: frames (N, resize_px, resize_px, 3) -> features (N, D), and `concatenate` joins these.
    """
    clips, length = frames.shape[:2]
    flat = frames.reshape(-1, *frames.shape[2:])
    is_new = [True, *(not _equal(before, frame) for before, frame in pairwise(flat))]
    distinct = flat if all(is_new) else flat[is_new]
    parts = []
    for at in range(0, len(distinct), max_frames):
        parts.append(encode(distinct[at : at + max_frames]))
        metrics.STEPS.inc()
    features = concatenate(parts)
    if not all(is_new):
        features = features[np.cumsum(is_new) - 1]
    of_clips: FeaturesT = features.reshape(clips, length, -1)
    return of_clips


def _equal(frame: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Of two frames that differ, the middle rows nearly always differ, so these are compared first."""
    middle = len(frame) // 2
    return np.array_equal(frame[middle], other[middle]) and np.array_equal(frame, other)
