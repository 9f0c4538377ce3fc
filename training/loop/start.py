"""Where a stage starts: a new decoder on a pretrained encoder, or the best checkpoint of the stage before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from etenet.errors import UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.encoder import AbsentEncoder, Encoder, feature_size
from etenet.model.etenet import EtENet
from etenet.model.pretrained import load_encoder
from etenet.model.vocabulary import EOS_ID, Vocabulary
from training.data.datasets import Dataset
from training.run_settings import Recipe

RARE = 0.5  # the count of a word that no training caption has


def first_checkpoint(recipe: Recipe, dataset: Dataset, encoder_weights: Path | None) -> Checkpoint:
    """A new decoder on an encoder with the given weights, or ImageNet's, or on given features.

    Raises `UsageError` if the data set has no words.
    """
    torch.manual_seed(recipe.seed)
    vocabulary = dataset.vocabulary()
    if not vocabulary.known_words:
        raise UsageError(
            f"the vocabulary of {dataset.folder} has no word; prepare it again with a smaller --minimum-count"
        )
    encoder: Encoder | AbsentEncoder
    if dataset.features is not None:
        encoder, size = AbsentEncoder(), int(dataset.features.shape[-1])
    else:
        encoder, size = load_encoder(recipe.encoder, encoder_weights), feature_size(recipe.encoder)
    sizes = DecoderConfig(
        feature_size=size,
        vocabulary_size=len(vocabulary),
        hidden_size=recipe.hidden_size,
        embedding_size=recipe.embedding_size,
        attention_size=recipe.attention_size,
        projection_size=recipe.projection,
        dropout=recipe.dropout,
    )
    decoder = Decoder(sizes)
    if recipe.output_bias == "word frequency":
        decoder.to_words.bias.data.copy_(log_frequencies(dataset, vocabulary))
    return Checkpoint(EtENet(encoder, decoder), vocabulary, recipe.preprocessing(), recipe.max_words)


def log_frequencies(dataset: Dataset, vocabulary: Vocabulary) -> torch.Tensor:
    """(V,) of every word and of <EOS> in the training captions, each folder's by its weight."""
    counts = torch.zeros(len(vocabulary), dtype=torch.float64)
    for clip in dataset.need("train"):
        ids = [word for caption in clip.captions for word in [*vocabulary.encode(caption), EOS_ID]]
        counts += clip.weight * torch.bincount(torch.tensor(ids), minlength=len(vocabulary))
    return (counts.clamp(min=RARE) / counts.sum()).log().float()


def stage_before(run: Path, stage_number: int) -> Path:
    """The best checkpoint of the last stage before this one. Stage 2 may be left out before stage 3."""
    candidates = [run / f"stage{number}" / "best.pt" for number in range(stage_number - 1, 0, -1)]
    return next((path for path in candidates if path.is_file()), candidates[0])


def next_checkpoint(file: Path, dataset: Dataset) -> Checkpoint:
    """The checkpoint that a later stage starts from; without an encoder if the data set has given features."""
    start = checkpoints.load(file, with_encoder=dataset.has_frames)
    if start.vocabulary != dataset.vocabulary():
        raise UsageError(f"{file} was not trained with the vocabulary of {dataset.folder}; train stage 1 again")
    if dataset.features is not None:
        expected, size = start.model.decoder.config.feature_size, dataset.features.shape[-1]
        if expected != size:
            raise UsageError(f"{file} takes features of size {expected}, those of {dataset.folder} have {size}")
        start.model.encoder = AbsentEncoder()  # its own, if it had one, is not in the file that this stage writes
    return start


def continued(recipe: Recipe, start: Checkpoint, settings: Sequence[str]) -> Recipe:
    """The recipe of a stage that starts from a checkpoint: its network stays as it is.

    Dropout and the longest sentence are the checkpoint's too, unless `settings` (`field=value`, already in the recipe)
    name them; then they are applied. Raises `UsageError` for a setting that would change the network.
    """
    asked = {setting.partition("=")[0] for setting in settings}
    sizes = start.model.decoder.config
    fixed: dict[str, Any] = {
        "encoder": start.model.encoder.name,
        "crop_px": start.preprocessing.crop_px,
        "projection": sizes.projection_size,
        "hidden_size": sizes.hidden_size,
        "embedding_size": sizes.embedding_size,
        "attention_size": sizes.attention_size,
    }
    for name, value in fixed.items():
        if name in asked and getattr(recipe, name) != value:
            raise UsageError(
                f"--set {name}={getattr(recipe, name)}: this stage starts from a network with {name}={value}; "
                "train stage 1 with that setting, into another --out"
            )
    if "output_bias" in asked:
        raise UsageError("--set output_bias is for a new decoder; train stage 1 with it, into another --out")
    changing: dict[str, Any] = {"dropout": sizes.dropout, "max_words": start.max_words}
    return replace(recipe, **fixed, **{name: value for name, value in changing.items() if name not in asked})


def with_settings(start: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with the recipe's dropout and longest sentence."""
    decoder = start.model.decoder
    decoder.config = replace(decoder.config, dropout=recipe.dropout)
    decoder.dropout.p = recipe.dropout
    return replace(start, max_words=recipe.max_words)
