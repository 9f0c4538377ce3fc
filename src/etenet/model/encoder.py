"""phi: frames -> one vector each, by a convolutional network out of `pretrainedmodels`.

The only file that imports pretrainedmodels, and only when a network is built: the import takes seconds, and a worker
with a compiled encoder does not need it. Knows nothing of clips, captions or files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import model_zoo

from etenet.errors import UsageError
from etenet.model.config import Preprocessing

# The paper resizes to 314 and crops to Inception-ResNet-v2's 299; other input sizes keep that ratio.
RESIZE_OVER_CROP = 314 / 299

GIVEN_FEATURES = "given features"  # the encoder's name in a checkpoint that was trained on features alone

_UNFIT = ("alexnet", "vgg", "resnext101_")  # these have no feature map at the end, or need their weights to be built


def encoder_names() -> list[str]:
    """The networks of `pretrainedmodels` that can be an encoder: ImageNet weights, and a feature map at the end."""
    return sorted(
        name
        for name in _networks().model_names
        if "imagenet" in _networks().pretrained_settings.get(name, ()) and not name.startswith(_UNFIT)
    )


def default_preprocessing(name: str, *, crop_px: int | None = None) -> Preprocessing:
    """The preprocessing of a network's ImageNet weights by `pretrainedmodels`, at `crop_px` if given."""
    settings = _settings(name)
    crop_px = crop_px or settings["input_size"][1]
    return Preprocessing(
        resize_px=round(crop_px * RESIZE_OVER_CROP),
        crop_px=crop_px,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        input_max=float(settings["input_range"][1]),
        channels=settings["input_space"],
    )


def published_url(name: str) -> str:
    """Where the ImageNet weights of a network are published."""
    return str(_settings(name)["url"])


class Encoder(nn.Module):
    """A network up to its last feature map, averaged over the map.

    Source: eq. (1) of arXiv 1904.02628; for Inception-ResNet-v2 that map is the output of `conv2d_7b`, D = 1536.
    BatchNorm is frozen: statistics and affine parameters keep their values in every mode.
    """

    def __init__(self, name: str, *, imagenet: Mapping[str, Tensor] | None = None) -> None:
        """With random weights, or with `imagenet`, the contents of the file at `published_url`.

        `RuntimeError` if the weights belong to another network.
        """
        super().__init__()
        _settings(name)
        self.name = name
        with warnings.catch_warnings(), _weights_from(imagenet):
            # pretrainedmodels calls torchvision by argument names that torchvision now warns about.
            warnings.filterwarnings("ignore", module="torchvision")
            self.network: Any = getattr(_networks(), name)(
                num_classes=1000, pretrained=None if imagenet is None else "imagenet"
            )
        for classifier in ("last_linear", "last_conv"):
            if hasattr(self.network, classifier):
                setattr(self.network, classifier, nn.Identity())
        self.requires_grad_().train()

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
        feature_map: Tensor = self.network.features(frames)
        return feature_map.mean(dim=(-2, -1), dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class AbsentEncoder:
    """The name of an encoder without its weights: such a network can decode features, but not encode frames."""

    name: str = GIVEN_FEATURES


def feature_size(name: str) -> int:
    """D of an encoder, found by running it on meta tensors."""
    with torch.device("meta"):
        pixels = torch.empty(1, *_settings(name)["input_size"])
        return int(Encoder(name)(pixels).shape[-1])


@cache
def _networks() -> Any:
    import pretrainedmodels

    return pretrainedmodels


def _settings(name: str) -> dict[str, Any]:
    if name not in encoder_names():
        raise UsageError(f"unknown encoder {name!r}; choose one of {', '.join(encoder_names())}")
    settings: dict[str, Any] = _networks().pretrained_settings[name]["imagenet"]
    return settings


@contextmanager
def _weights_from(imagenet: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within the block pretrainedmodels loads these weights instead of fetching its own unchecked.

    Its factories know how each published file differs from the network (Inception-ResNet-v2's has one class more,
    DenseNet's has other names), but they take weights only from `model_zoo.load_url`.
    """
    zoo: Any = model_zoo
    fetch = zoo.load_url
    zoo.load_url = lambda *_, **__: dict(imagenet or {})
    try:
        yield
    finally:
        zoo.load_url = fetch
