"""A new encoder with weights from a file: published ImageNet weights, or weights that training.stills made.

A published file is checked against the first digits of its SHA-256, which are in its name (torch hub's
`name-xxxxxxxx.pth`). Eight digits reveal a damaged file, not a forged one. A forged file cannot run code, because all
files are read with `weights_only`.
"""

from __future__ import annotations

import sys
from http.client import HTTPException
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from etenet.errors import UsageError
from etenet.files import sha256
from etenet.model.encoder import Encoder, published_url

# The first digits. The paper's network is listed so that no release of pretrainedmodels can change it.
PUBLISHED_SHA256 = {"inceptionresnetv2": "520b38e4"}


def load_encoder(name: str, file: Path | None = None) -> Encoder:
    """The encoder `name` with ImageNet weights from `file`, or from torch hub's folder, downloaded if they are missing.

    `file` may also be one that training.stills made: the state dict of an `Encoder`, which has no published hash.
    `UsageError` if the weights are missing, damaged, or another network's.
    """
    file, expected = file or _fetched(name), _published_sha256(name)
    fix = f"put {published_url(name)} there, or give a file that training.stills made for {name}"
    if not file.is_file():
        raise UsageError(f"no encoder weights at {file}; {fix}")
    digest = sha256(file)
    is_published = digest.startswith(expected)
    what = f"{file} (SHA-256 {digest}; that of {name}'s ImageNet weights begins with {expected})"
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{what} is damaged or not a state dict; {fix}") from error
    if not _is_state_dict(weights):
        raise UsageError(f"{what} is not a state dict; {fix}")
    if not is_published and not all(key.startswith("network.") for key in weights):
        raise UsageError(f"{what} is damaged or another network's; {fix}")
    try:
        if is_published:
            return Encoder(name, imagenet=weights)
        encoder = Encoder(name)
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{what} holds the weights of another network; {fix}") from error
    return encoder


def _published_sha256(name: str) -> str:
    return PUBLISHED_SHA256.get(name) or published_url(name).rpartition("-")[-1].removesuffix(".pth")


def _fetched(name: str) -> Path:
    """The published file in torch hub's folder, downloaded if it is not there."""
    url = published_url(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[-1]
    fix = f"get it elsewhere and give it with --encoder-weights FILE, or put it at {path}"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), _published_sha256(name), progress=sys.stderr.isatty())
    except RuntimeError as error:  # torch hub's error for a wrong hash; it names both
        raise UsageError(f"the file from {url} is damaged: {error}; {fix}") from error
    except (OSError, HTTPException) as error:
        raise UsageError(f"cannot fetch the ImageNet weights of {name} from {url} ({error}); {fix}") from error
    return path


def _is_state_dict(contents: object) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(contents, dict)
        and bool(contents)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in contents.items())
    )
