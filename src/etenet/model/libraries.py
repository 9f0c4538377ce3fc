"""The networks of `pretrainedmodels`, `timm` and torchvision: built without their classifiers, with the preprocessing
of their ImageNet weights, and the addresses of these.

The only file that imports these libraries, and only when a network is asked for: the import takes seconds, and a worker
with a compiled encoder does not need it. Knows nothing of files, downloads or captions.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Protocol

from torch import Tensor, cat, float32, nn
from torch.utils import model_zoo

from etenet.errors import UsageError
from etenet.model.config import Preprocessing

# The paper resizes to 314 and crops to Inception-ResNet-v2's 299; other input sizes keep that ratio.
RESIZE_OVER_CROP = 314 / 299

# The names of what stands after the pooled features, in any of the libraries.
CLASSIFIERS = ("last_linear.", "last_conv.", "classif.", "classifier.", "fc.", "head.", "head_dist.", "aux1.", "aux2.")

_HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # torch hub's name-xxxxxxxx.pth


@dataclass(frozen=True, slots=True)
class Address:
    """Where weights are published: a URL with the first digits of the file's SHA-256, or a file of a hub repository."""

    url: str = ""
    sha256: str = ""
    hub_repository: str = ""
    hub_file: str = ""

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.hub_file or self.url.rpartition("/")[-1]

    def __str__(self) -> str:
        return self.url or f"huggingface.co/{self.hub_repository} ({self.hub_file})"


def hash_in(file_name: str) -> str:
    """The first digits of the SHA-256 in a file's name, as torch hub writes it; empty if there are none."""
    found = _HASHED_NAME.search(file_name)
    return found[1] if found else ""


# The paper's network. Its hash stands here so that no release of pretrainedmodels can change it, and its one address
# fails for many people, so timm's file of the same network is the second.
PAPERS_SHA256 = "520b38e4"
PAPERS_SECOND = Address(
    "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/inception_resnet_v2-940b1cd6.pth",
    "940b1cd6",
)


class Library(Protocol):
    """Networks by name. `UsageError` for a name that it does not know."""

    def build(self, name: str) -> nn.Module:
        """With random weights and without its classifier."""
        ...

    def restore(self, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
        """The same from the contents of a published file. `RuntimeError` if they are another network's."""
        ...

    def features(self, network: Any, frames: Tensor) -> Tensor:
        """frames (N, 3, crop_px, crop_px) -> the last feature map, pooled as the library does: (N, D) float32."""
        ...

    def preprocessing(self, name: str, crop_px: int | None) -> Preprocessing:
        """That of the ImageNet weights, at `crop_px` if given."""
        ...

    def addresses(self, name: str) -> tuple[Address, ...]:
        """Where the ImageNet weights are published, first choice first."""
        ...


def library_of(encoder: str) -> tuple[Library, str]:
    """The library of an encoder, and the network's name in it: `timm:NAME`, `torchvision:NAME`, or a plain NAME.

    `timm:A+timm:B` are networks side by side.
    """
    if "+" in encoder:
        return _SideBySide(), encoder
    prefix, colon, name = encoder.rpartition(":")
    if not colon:
        return PRETRAINEDMODELS, encoder
    if prefix not in _LIBRARIES:
        raise UsageError(f"unknown encoder {encoder!r}: the libraries are {', '.join(_LIBRARIES)}, or no prefix")
    return _LIBRARIES[prefix], name


def _squashed(crop_px: int, mean: Any, std: Any, **other: Any) -> Preprocessing:
    resize_px = round(crop_px * RESIZE_OVER_CROP)
    return Preprocessing(resize_px=resize_px, crop_px=crop_px, mean=tuple(mean), std=tuple(std), **other)


class _Pretrainedmodels:
    """Cadene's library. Its networks have a `features` method, and their features are averaged over the map."""

    _UNFIT = ("alexnet", "vgg", "resnext101_")  # no feature map at the end, or not to be built without their weights

    def names(self) -> list[str]:
        return sorted(
            name
            for name in _pretrainedmodels().model_names
            if "imagenet" in _pretrainedmodels().pretrained_settings.get(name, ()) and not name.startswith(self._UNFIT)
        )

    def build(self, name: str) -> nn.Module:
        return self._built(name, None)

    def restore(self, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
        with _loaded_instead(weights):
            return self._built(name, "imagenet")

    def _built(self, name: str, pretrained: str | None) -> nn.Module:
        self._settings(name)
        with warnings.catch_warnings():
            # pretrainedmodels calls torchvision by argument names that torchvision now warns about.
            warnings.filterwarnings("ignore", module="torchvision")
            network: nn.Module = getattr(_pretrainedmodels(), name)(num_classes=1000, pretrained=pretrained)
        for classifier in ("last_linear", "last_conv"):
            if hasattr(network, classifier):
                setattr(network, classifier, nn.Identity())
        return network

    def features(self, network: Any, frames: Tensor) -> Tensor:
        feature_map: Tensor = network.features(frames)
        return feature_map.mean(dim=(-2, -1), dtype=float32)

    def preprocessing(self, name: str, crop_px: int | None) -> Preprocessing:
        settings = self._settings(name)
        return _squashed(
            crop_px or settings["input_size"][1],
            settings["mean"],
            settings["std"],
            input_max=float(settings["input_range"][1]),
            channels=settings["input_space"],
        )

    def addresses(self, name: str) -> tuple[Address, ...]:
        url = str(self._settings(name)["url"])
        if name == "inceptionresnetv2":
            return Address(url, PAPERS_SHA256), PAPERS_SECOND
        return (Address(url, hash_in(url)),)

    def _settings(self, name: str) -> dict[str, Any]:
        if name not in self.names():
            known = ", ".join(self.names())
            raise UsageError(f"unknown encoder {name!r}; choose timm:NAME, torchvision:googlenet, or one of {known}")
        settings: dict[str, Any] = _pretrainedmodels().pretrained_settings[name]["imagenet"]
        return settings


class _Timm:
    """Wightman's library: any network that takes square frames and gives one vector for each."""

    # Google trained these on (x - 127) / 128, which timm's 0.5 and 0.5 are close to. The weights that come by pip
    # (pretrained.py) need it to the letter.
    _GOOGLES = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")

    def build(self, name: str) -> nn.Module:
        self._settings(name)
        network: nn.Module = _timm().create_model(name, pretrained=False, num_classes=0)
        return network

    def restore(self, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
        """timm's own functions translate files that others published. A plain `build` never needs them."""
        self._settings(name)
        try:
            overlay = {"state_dict": dict(weights)}
            network: Any = _timm().create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # each network's translation fails in its own way
            raise RuntimeError(f"timm cannot load them: {error!r}") from error
        network.reset_classifier(0)
        return network  # type: ignore[no-any-return]

    def features(self, network: Any, frames: Tensor) -> Tensor:
        features: Tensor = network(frames)
        return features.float()

    def preprocessing(self, name: str, crop_px: int | None) -> Preprocessing:
        settings = self._settings(name)
        _, height, width = settings.input_size
        if height != width:
            raise UsageError(f"timm:{name} takes frames of {width} x {height} pixels; an encoder needs square ones")
        if crop_px not in (None, width) and settings.fixed_input_size:
            raise UsageError(f"timm:{name} takes frames of {width} x {width} pixels only; set crop_px to {width}")
        if name.partition(".")[0] in self._GOOGLES:
            return _squashed(crop_px or width, [127.0] * 3, [128.0] * 3, input_max=255.0)
        return _squashed(crop_px or width, settings.mean, settings.std)

    def addresses(self, name: str) -> tuple[Address, ...]:
        settings = self._settings(name)
        addresses = []
        if isinstance(settings.url, str) and hash_in(settings.url) and not settings.custom_load:
            addresses.append(Address(settings.url, hash_in(settings.url)))
        if settings.hf_hub_id:
            file = settings.hf_hub_filename or "model.safetensors"
            addresses.append(Address(hub_repository=settings.hf_hub_id, hub_file=file))
        return tuple(addresses)

    def _settings(self, name: str) -> Any:
        if name not in _timm_names():
            close = get_close_matches(name, _timm().list_models(), n=4, cutoff=0.5)
            hint = f"; did you mean {', '.join(f'timm:{match}' for match in close)}?" if close else ""
            raise UsageError(f"unknown encoder 'timm:{name}': timm {_timm().__version__} has no such network{hint}")
        return _timm().get_pretrained_cfg(name)


class _Torchvision:
    """GoogLeNet, the encoder of the paper's later version. Its input is normalised twice: with ImageNet's mean and
    standard deviation, as documented, and then inside the network to those of its weights."""

    def build(self, name: str) -> nn.Module:
        self._weights(name)
        network: nn.Module = _torchvision().GoogLeNet(aux_logits=False, transform_input=True, init_weights=False)
        network.fc = network.dropout = nn.Identity()
        return network

    def restore(self, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
        network = self.build(name)
        network.load_state_dict(weights)  # the published file has the plain names, so this says what is wrong
        return network

    def features(self, network: Any, frames: Tensor) -> Tensor:
        features: Tensor = network(frames)
        return features.float()

    def preprocessing(self, name: str, crop_px: int | None) -> Preprocessing:
        documented = self._weights(name).transforms()
        return _squashed(crop_px or documented.crop_size[0], documented.mean, documented.std)

    def addresses(self, name: str) -> tuple[Address, ...]:
        url = str(self._weights(name).url)
        return (Address(url, hash_in(url)),)

    def _weights(self, name: str) -> Any:
        if name != "googlenet":
            raise UsageError(f"unknown encoder 'torchvision:{name}': of torchvision only torchvision:googlenet")
        return _torchvision().GoogLeNet_Weights.IMAGENET1K_V1


class _SideBySide:
    """Networks that look at the same frames. Their features are put after one another."""

    def build(self, name: str) -> nn.Module:
        return _Row(_members(name))

    def restore(self, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
        network = self.build(name)
        network.load_state_dict(weights)  # nobody publishes such files: an error that says so
        return network

    def features(self, network: Any, frames: Tensor) -> Tensor:
        return cat([library.features(one, frames) for library, one in zip(network.libraries, network, strict=True)], -1)

    def preprocessing(self, name: str, crop_px: int | None) -> Preprocessing:
        """That of the first. `UsageError` if another takes frames that are normalised in another way."""
        (first, of_first), *others = _members(name)
        preprocessing = first.preprocessing(of_first, crop_px)
        for library, of_other in others:
            if library.preprocessing(of_other, preprocessing.crop_px) != preprocessing:
                raise UsageError(f"{name}: {of_other} takes frames that are normalised in another way than the first's")
        return preprocessing

    def addresses(self, name: str) -> tuple[Address, ...]:  # noqa: ARG002, the protocol's
        return ()  # each of them has its own


class _Row(nn.ModuleList):
    def __init__(self, members: list[tuple[Library, str]]) -> None:
        super().__init__(library.build(name) for library, name in members)
        self.libraries = [library for library, _ in members]


def _members(name: str) -> list[tuple[Library, str]]:
    return [library_of(of_one) for of_one in name.split("+")]


PRETRAINEDMODELS = _Pretrainedmodels()
_LIBRARIES: dict[str, Library] = {"timm": _Timm(), "torchvision": _Torchvision()}


@cache
def _pretrainedmodels() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of its code, by Python 3.12 and later, on the first start
        import pretrainedmodels

    return pretrainedmodels


@cache
def _timm() -> Any:
    import timm

    return timm


@cache
def _timm_names() -> frozenset[str]:
    """Networks, and networks with the tag of one set of weights (`resnet18.a1_in1k`)."""
    return frozenset([*_timm().list_models(), *_timm().list_pretrained()])


@cache
def _torchvision() -> Any:
    import torchvision

    return torchvision.models


@contextmanager
def _loaded_instead(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block pretrainedmodels loads these weights instead of fetching its own unchecked.

    Its factories know how each published file differs from the network (Inception-ResNet-v2's has one class more,
    DenseNet's has other names), but they take weights only from `model_zoo.load_url`.
    """
    zoo: Any = model_zoo
    fetch = zoo.load_url
    zoo.load_url = lambda *_, **__: dict(weights)
    try:
        yield
    finally:
        zoo.load_url = fetch
