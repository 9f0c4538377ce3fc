"""phi: frames -> one vector each, by a convolutional network out of one of three libraries (`libraries.py`).

Knows nothing of clips, captions or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etenet.errors import UsageError
from etenet.model.config import GIVEN_FEATURES, Preprocessing
from etenet.model.libraries import CLASSIFIERS, Library, library_of


def default_preprocessing(name: str, *, crop_px: int | None = None) -> Preprocessing:
    """The preprocessing of a network's ImageNet weights by its library, at `crop_px` if given.

    `UsageError` for an unknown network, or one that does not take frames of that size.
    """
    library, network = library_of(name)
    try:
        return library.preprocessing(network, crop_px)
    except ValueError as error:
        raise UsageError(f"{name} cannot take such frames: {error}") from error


class Encoder(nn.Module):
    """A network up to its last feature map, averaged over the map.

    Source: eq. (1) of arXiv 1904.02628; for Inception-ResNet-v2 that map is the output of `conv2d_7b`, D = 1536.
    BatchNorm is frozen: statistics and affine parameters keep their values in every mode.
    """

    def __init__(self, name: str, *, imagenet: Mapping[str, Tensor] | None = None) -> None:
        """With random weights, or with `imagenet`: the contents of a published file, or a state dict of the network.

        The state dict may have its classifier, which is left out. `RuntimeError` if the weights are another network's.
        """
        super().__init__()
        self.name = name
        self._library, network = library_of(name)
        self.network = (
            self._library.build(network) if imagenet is None else _with_weights(self._library, network, imagenet)
        )
        self.requires_grad_().train()

    @classmethod
    def unloaded(cls, name: str) -> Encoder:
        """For weights that will be assigned: on the meta device, if its state dict holds all that it computes with.

        Some networks of timm also have buffers that no state dict holds, such as indices of positions.
        """
        with torch.device("meta"):
            encoder = cls(name)
        is_whole = dict(encoder.named_buffers()).keys() <= encoder.state_dict().keys()
        return encoder if is_whole else cls(name)

    def _batch_norms(self) -> Iterable[nn.Module]:
        return (module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        for norm in self._batch_norms():
            norm.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Encoder:
        super().requires_grad_(requires_grad)
        for norm in self._batch_norms():
            for parameter in norm.parameters():
                parameter.requires_grad_(False)
        return self

    def forward(self, frames: Tensor) -> Tensor:
        """frames (N, 3, crop_px, crop_px) -> features (N, D)."""
        return self._library.features(self.network, frames)


@dataclass(frozen=True, slots=True)
class AbsentEncoder:
    """The name of an encoder without its weights: such a network can decode features, but not encode frames."""

    name: str = GIVEN_FEATURES


def feature_size(name: str) -> int:
    """D of an encoder, found by running it on meta tensors."""
    crop_px = default_preprocessing(name).crop_px
    with torch.device("meta"):
        return int(Encoder(name).eval()(torch.empty(1, 3, crop_px, crop_px)).shape[-1])


def _with_weights(library: Library, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
    network = library.build(name)
    own = network.state_dict()
    absent = (key for key, value in own.items() if key not in weights or weights[key].shape != value.shape)
    if all(key.endswith("num_batches_tracked") for key in absent) and all(  # which old files lack, and nobody reads
        key in own or key.startswith(CLASSIFIERS) for key in weights
    ):
        network.load_state_dict({key: value for key, value in weights.items() if key in own})
        return network
    return library.restore(name, weights)
