"""One file with weights, sizes, vocabulary, encoder name and preprocessing: everything that captioning needs.

It is written by torch and read without it (`torch_file.py`), so a checkpoint cannot run code. It is sealed, and every
field has bounds, so a damaged one does not load. It is replaced atomically, so a crash leaves the old file. Only what
makes a network on torch imports torch, which takes seconds.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from etenet.errors import CheckpointError, UsageError
from etenet.files import replacing
from etenet.model import torch_file
from etenet.model.confidence import Calibration
from etenet.model.config import GIVEN_FEATURES, MAX_WORDS, DecoderConfig, Preprocessing, check_whole
from etenet.model.minimum_risk import MinimumRisk
from etenet.model.seal import seal, sha256_of_whole
from etenet.model.torch_file import StoredTensor
from etenet.model.vocabulary import Vocabulary
from etenet.model.word_evidence import WordEvidence

if TYPE_CHECKING:
    import torch

    from etenet.model.encoder import Encoder
    from etenet.model.etenet import EtENet

FORMAT = "etenet-checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class DecoderArrays:
    """A network without its encoder and without torch: the weights of its decoder, by their names in its state dict."""

    encoder_name: str
    config: DecoderConfig
    weights: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A network with everything that belongs to it. `max_words` is the longest sentence in its training.

    `provenance` says what made the weights: recipe, stage, seed, data, epoch, scores, version; {} if unknown. `terms`
    are those under which the weights may be used.
    """

    _model: EtENet | DecoderArrays
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
    def model(self) -> EtENet:
        """The network on torch. `CheckpointError` if the checkpoint was loaded without."""
        if isinstance(self._model, DecoderArrays):
            raise CheckpointError("the checkpoint was loaded without its network on torch")
        return self._model

    @property
    def encoder(self) -> Encoder:
        """The encoder. `CheckpointError` if the checkpoint has none."""
        from etenet.model.encoder import AbsentEncoder

        if isinstance(self.model.encoder, AbsentEncoder):
            raise CheckpointError(f"the checkpoint was loaded without its encoder ({self.encoder_name})")
        return self.model.encoder

    @property
    def encoder_name(self) -> str:
        return self._model.encoder_name if isinstance(self._model, DecoderArrays) else self._model.encoder.name

    @property
    def decoder_arrays(self) -> DecoderArrays:
        if isinstance(self._model, DecoderArrays):
            return self._model
        decoder = self._model.decoder
        weights = {name: value.detach().cpu().float().numpy() for name, value in decoder.state_dict().items()}
        return DecoderArrays(self.encoder_name, decoder.config, weights)

    def without_weights(self) -> Checkpoint:
        """The same without its network, for whoever has that in another form."""
        return replace(self, _model=replace(self.decoder_arrays, weights={}))


def initialise(
    encoder: Encoder | str,
    vocabulary: Vocabulary,
    *,
    crop_px: int | None = None,
    max_words: int = 20,
    dropout: float = 0.0,
) -> Checkpoint:
    """A new network: a random decoder on the given encoder, or on a random encoder of that name."""
    from etenet.model.decoder import Decoder
    from etenet.model.encoder import Encoder, default_preprocessing, feature_size
    from etenet.model.etenet import EtENet

    encoder = Encoder(encoder) if isinstance(encoder, str) else encoder
    decoder = DecoderConfig(feature_size=feature_size(encoder.name), vocabulary_size=len(vocabulary), dropout=dropout)
    preprocessing = default_preprocessing(encoder.name, crop_px=crop_px)
    return Checkpoint(EtENet(encoder, Decoder(decoder)), vocabulary, preprocessing, max_words)


def save(checkpoint: Checkpoint, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write atomically. Floating-point weights are stored as `dtype`, by default float32; float16 halves the file."""
    import torch

    weights = {
        name: (value.to(dtype or torch.float32) if value.is_floating_point() else value).cpu().contiguous()
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
        "minimum_risk": _as_stored(checkpoint.minimum_risk),
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
    import torch

    with _read(path):
        contents = torch.load(path, map_location="cpu", weights_only=True)
    provenance = {**(contents.get("provenance") or {}), "confidence": dict(measured)}
    fitted = {"confidence": asdict(calibration), "minimum_risk": _as_stored(minimum_risk)}
    _write({**contents, **fitted, "provenance": provenance}, out)


def _as_stored(minimum_risk: MinimumRisk | None) -> dict[str, Any] | None:
    import torch

    if minimum_risk is None:
        return None
    evidence = minimum_risk.evidence
    halves = {name: torch.from_numpy(value) for name, value in asdict(evidence).items()} if evidence else {}
    for name, value in halves.items():
        if value.is_floating_point() and name != "center":
            halves[name] = value.half()
    typical = torch.from_numpy(minimum_risk.typical)
    return {**asdict(minimum_risk), "typical": typical, "evidence": halves or None}


def _write(contents: dict[str, Any], path: Path) -> None:
    import torch

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
    import torch

    from etenet.model.decoder import Decoder
    from etenet.model.encoder import AbsentEncoder, Encoder
    from etenet.model.etenet import EtENet

    with _read(path) as (contents, digest):
        if with_encoder:
            _require_encoder(path, contents.get("encoder"))
        with _damage_named(path):
            checkpoint = _without_weights(contents, digest)
            name, config = checkpoint.encoder_name, checkpoint.decoder_arrays.config
            encoder = Encoder.unloaded(name) if with_encoder else AbsentEncoder(name)
            with torch.device("meta"):
                model = EtENet(encoder, Decoder(config)).float()  # whatever the default of the process
            own = model.state_dict()
            kinds = {name: (tuple(value.shape), value.is_floating_point()) for name, value in own.items()}
            weights = _weights(contents["weights"], kinds, prefix="" if with_encoder else "decoder.")
            tensors = {name: torch.from_numpy(value).to(own[name].dtype) for name, value in weights.items()}
            model.load_state_dict(tensors, assign=True)
    model.to(device).eval().requires_grad_(False)
    return replace(checkpoint, _model=model)


def load_arrays(path: Path) -> Checkpoint:
    """The same without torch, and so without its encoder and its `model`: for a form that has another encoder."""
    with _read(path) as (contents, digest):
        _require_encoder(path, contents.get("encoder"))
        with _damage_named(path):
            checkpoint = _without_weights(contents, digest)
            arrays = checkpoint.decoder_arrays
            kinds = {f"decoder.{name}": (shape, True) for name, shape in arrays.config.weight_shapes.items()}
            weights = _weights(contents["weights"], kinds, prefix="decoder.")
            if absent := kinds.keys() - weights.keys():
                raise ValueError(f"it has no {min(absent)}")
            of_decoder = {name.removeprefix("decoder."): value for name, value in weights.items()}
    return replace(checkpoint, _model=replace(arrays, weights=of_decoder))


def inspect(path: Path) -> Checkpoint:
    """A checkpoint without its weights, read without torch. `CheckpointError` if it cannot caption video."""
    with _read(path) as (contents, digest):
        _require_encoder(path, contents.get("encoder"))
        with _damage_named(path):
            return _without_weights(contents, digest)


def _without_weights(contents: Mapping[str, Any], digest: str) -> Checkpoint:
    """Raises `ValueError`, or another error, for what is damaged."""
    vocabulary = Vocabulary(contents["vocabulary"])
    config = DecoderConfig(**contents["decoder"])
    preprocessing = Preprocessing(**contents["preprocessing"])
    if config.vocabulary_size != len(vocabulary):
        raise ValueError(f"{len(vocabulary)} words for a decoder of {config.vocabulary_size}")
    if not isinstance(contents["encoder"], str):
        raise ValueError(f"the name of its encoder is {contents['encoder']!r}")
    minimum_risk = None
    if stored := contents.get("minimum_risk"):
        minimum_risk = MinimumRisk(**{**stored, "typical": _array(stored["typical"]), "evidence": _evidence(stored)})
        if minimum_risk.typical.shape != (config.feature_size,):
            raise ValueError(f"typical features {minimum_risk.typical.shape} for {config.feature_size}")
    return Checkpoint(
        DecoderArrays(contents["encoder"], config, {}),
        vocabulary,
        preprocessing,
        contents["max_words"],
        id=f"sha256:{digest}",
        provenance=dict(contents.get("provenance") or {}),
        confidence=Calibration(**contents["confidence"]) if contents.get("confidence") else None,
        minimum_risk=minimum_risk,
        name=str(contents.get("name") or ""),
        terms=str(contents.get("terms") or ""),
    )


def _evidence(minimum_risk: Mapping[str, Any]) -> WordEvidence | None:
    stored = minimum_risk.get("evidence")
    return WordEvidence(**{name: _array(value) for name, value in stored.items()}) if stored else None


def _weights(
    weights: Mapping[str, StoredTensor], kinds: Mapping[str, tuple[tuple[int, ...], bool]], *, prefix: str
) -> dict[str, NDArray[Any]]:
    """Those whose names begin so. `kinds` has the shape of each and whether it holds floating-point numbers.

    These become float32. `ValueError` if one does not fit or is not finite.
    """
    kept = {}
    for name, value in weights.items():
        if name.startswith(prefix):
            if (value.shape, value.is_floating_point) != kinds[name]:
                raise ValueError(f"{name} is no tensor of {kinds[name][0]} such numbers, but of {value.shape}")
            kept[name] = _array(value)
            if not np.isfinite(kept[name]).all():
                raise ValueError(f"{name} has numbers that are not finite")
    return kept


def _array(value: StoredTensor) -> NDArray[Any]:
    return value.array().astype(np.float32, copy=False) if value.is_floating_point else value.array()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UsageError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged or not from this version ({_first_line(error)}); make it again with training.train"
        ) from error


def _require_encoder(path: Path, encoder: object) -> None:
    if encoder == GIVEN_FEATURES:
        raise CheckpointError(
            f"{path} has no encoder: it was trained on features, so it cannot caption video; train on clips"
        )


@contextmanager
def _read(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """What is in the file, with a `StoredTensor` for each tensor, and its SHA-256."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a .pt file made by training.train")
    with ExitStack() as stack:
        try:
            digest = sha256_of_whole(path)
            contents = stack.enter_context(torch_file.opened(path))
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint ({_first_line(error)}); give a .pt file made by "
                "training.train, or copy it again if it was whole elsewhere"
            ) from error
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not an EtENet checkpoint; give a .pt file made by training.train")
        if contents.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has checkpoint version {contents.get('version')}, this etenet reads version {FORMAT_VERSION}; "
                "use the etenet that wrote it, or train again"
            )
        yield contents, digest


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
