"""One file with weights, sizes, vocabulary, encoder name and preprocessing: everything that captioning needs.

It is read with `weights_only`, so a checkpoint cannot run code. It is sealed, and every field has bounds, so a damaged
one does not load. It is replaced atomically, so a crash leaves the old file.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etenet.errors import CheckpointError, UsageError
from etenet.files import replacing
from etenet.model.confidence import Calibration
from etenet.model.config import MAX_WORDS, DecoderConfig, Preprocessing, check_whole
from etenet.model.decoder import Decoder
from etenet.model.encoder import GIVEN_FEATURES, AbsentEncoder, Encoder, default_preprocessing, feature_size
from etenet.model.etenet import EtENet
from etenet.model.minimum_risk import MinimumRisk
from etenet.model.seal import seal, sha256_of_whole
from etenet.model.vocabulary import Vocabulary

FORMAT = "etenet-checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network with everything that belongs to it. `max_words` is the longest sentence in its training.

    `provenance` says what made the weights: recipe, stage, seed, data, epoch, scores, version; {} if unknown. `terms`
    are those under which the weights may be used.
    """

    model: EtENet
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    max_words: int = 20
    id: str = ""  # sha256:..., of the file
    provenance: dict[str, Any] = field(default_factory=dict)
    confidence: Calibration | None = None  # without it, captions have no confidence
    minimum_risk: MinimumRisk | None = None  # without it, the most probable sentence is given
    name: str = ""
    terms: str = ""

    def __post_init__(self) -> None:
        check_whole("max_words", self.max_words, 1, MAX_WORDS)

    @property
    def encoder(self) -> Encoder:
        """The encoder. `CheckpointError` if the checkpoint has none."""
        if isinstance(self.model.encoder, AbsentEncoder):
            raise CheckpointError(f"the checkpoint was loaded without its encoder ({self.model.encoder.name})")
        return self.model.encoder


def initialise(
    encoder: Encoder | str,
    vocabulary: Vocabulary,
    *,
    crop_px: int | None = None,
    max_words: int = 20,
    dropout: float = 0.0,
) -> Checkpoint:
    """A new network: a random decoder on the given encoder, or on a random encoder of that name."""
    encoder = Encoder(encoder) if isinstance(encoder, str) else encoder
    decoder = DecoderConfig(feature_size=feature_size(encoder.name), vocabulary_size=len(vocabulary), dropout=dropout)
    preprocessing = default_preprocessing(encoder.name, crop_px=crop_px)
    return Checkpoint(EtENet(encoder, Decoder(decoder)), vocabulary, preprocessing, max_words)


def save(checkpoint: Checkpoint, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write atomically. Floating-point weights are stored as `dtype` (torch.float16 halves the file)."""
    weights = {
        name: (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous()
        for name, value in checkpoint.model.state_dict().items()
    }
    contents = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "encoder": checkpoint.model.encoder.name,
        "decoder": asdict(checkpoint.model.decoder.config),
        "preprocessing": asdict(checkpoint.preprocessing),
        "vocabulary": list(checkpoint.vocabulary.known_words),
        "max_words": checkpoint.max_words,
        "provenance": checkpoint.provenance,
        "confidence": checkpoint.confidence and asdict(checkpoint.confidence),
        "minimum_risk": checkpoint.minimum_risk and asdict(checkpoint.minimum_risk),
        "name": checkpoint.name,
        "terms": checkpoint.terms,
        "weights": weights,
    }
    _write(contents, path)


def calibrate(
    path: Path, out: Path, calibration: Calibration, minimum_risk: MinimumRisk | None, measured: Mapping[str, Any]
) -> None:
    """Write the checkpoint of `path` to `out` with these; `measured` becomes part of its provenance.

    Everything else stays as it is in the file, the precision of the weights included. Raises `CheckpointError`.
    """
    contents, _ = _read(path, mmap=False)
    provenance = {**(contents.get("provenance") or {}), "confidence": dict(measured)}
    fitted = {"confidence": asdict(calibration), "minimum_risk": minimum_risk and asdict(minimum_risk)}
    _write({**contents, **fitted, "provenance": provenance}, out)


def _write(contents: dict[str, Any], path: Path) -> None:
    body = io.BytesIO()
    torch.save(contents, body)
    seal(body)
    with replacing(path) as file:
        file.write(body.getbuffer())


def load(path: Path, *, device: torch.device | str = "cpu", with_encoder: bool = True) -> Checkpoint:
    """Read a checkpoint for inference: float32, eval mode, no gradients. `CheckpointError` if that is not possible.

    `with_encoder=False` gives an `AbsentEncoder` and reads only the rest of the file. A decoder that was trained on
    features alone can only be loaded this way.
    """
    contents, digest = _read(path, mmap=not with_encoder)
    if with_encoder:
        _require_encoder(path, contents.get("encoder"))
    try:
        vocabulary = Vocabulary(contents["vocabulary"])
        decoder = DecoderConfig(**contents["decoder"])
        preprocessing = Preprocessing(**contents["preprocessing"])
        if decoder.vocabulary_size != len(vocabulary):
            raise ValueError(f"{len(vocabulary)} words for a decoder of {decoder.vocabulary_size}")
        encoder = Encoder.unloaded(contents["encoder"]) if with_encoder else AbsentEncoder(contents["encoder"])
        with torch.device("meta"):
            model = EtENet(encoder, Decoder(decoder))
        model.load_state_dict(_weights(contents["weights"], model, with_encoder=with_encoder), assign=True)
        confidence = Calibration(**contents["confidence"]) if contents.get("confidence") else None
        minimum_risk = MinimumRisk(**contents["minimum_risk"]) if contents.get("minimum_risk") else None
        if minimum_risk and minimum_risk.typical.shape != (decoder.feature_size,):
            raise ValueError(f"typical features {tuple(minimum_risk.typical.shape)} for {decoder.feature_size}")
        checkpoint = Checkpoint(
            model,
            vocabulary,
            preprocessing,
            contents["max_words"],
            id=f"sha256:{digest}",
            provenance=dict(contents.get("provenance") or {}),
            confidence=confidence,
            minimum_risk=minimum_risk,
            name=str(contents.get("name") or ""),
            terms=str(contents.get("terms") or ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UsageError) as error:
        raise CheckpointError(
            f"{path} is damaged or not from this version ({_first_line(error)}); make it again with training.train"
        ) from error
    model.to(device).eval().requires_grad_(False)
    return checkpoint


def inspect(path: Path) -> Checkpoint:
    """A checkpoint without its encoder. `CheckpointError` if it cannot caption video."""
    checkpoint = load(path, with_encoder=False)
    _require_encoder(path, checkpoint.model.encoder.name)
    return checkpoint


def _weights(weights: Mapping[str, Tensor], model: EtENet, *, with_encoder: bool) -> dict[str, Tensor]:
    """The weights that the model has, in its own precision. `ValueError` if one does not fit or is not finite."""
    own, kept = model.state_dict(), {}
    for name, value in weights.items():
        if not with_encoder and name.startswith("encoder."):
            continue
        if value.shape != own[name].shape or value.is_floating_point() != own[name].is_floating_point():
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, and not {tuple(own[name].shape)}")
        if value.layout != torch.strided or not value.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
        kept[name] = value.to(own[name].dtype, copy=not with_encoder)
    return kept


def _require_encoder(path: Path, encoder: object) -> None:
    if encoder == GIVEN_FEATURES:
        raise CheckpointError(
            f"{path} has no encoder: it was trained on features, so it cannot caption video; train on clips"
        )


def _read(path: Path, *, mmap: bool) -> tuple[dict[str, Any], str]:
    """What is in the file, and its SHA-256."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a .pt file made by training.train")
    try:
        digest = sha256_of_whole(path)
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({_first_line(error)}); give a .pt file made by training.train, or "
            "copy it again if it was whole elsewhere"
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an EtENet checkpoint; give a .pt file made by training.train")
    if contents.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {contents.get('version')}, this etenet reads version {FORMAT_VERSION}; "
            "use the etenet that wrote it, or train again"
        )
    return contents, digest


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = str(error).strip().splitlines() or [type(error).__name__]
    return next(iter(lines))[:160]
