"""Captioning as plain code: decode every frame, resize with Pillow, run the network in eager torch, loop over beams.

The peer of several benchmarks. It runs the checkpoint's own network, so its captions differ from ours only where Pillow
resizes differently.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from etenet.model import checkpoint as checkpoints
from etenet.model.decoder import Decoder, Memory, State
from etenet.model.vocabulary import EOS_ID, SOS_ID, UNKNOWN_ID, sentence
from etenet.video.ffmpeg import LENIENT_METADATA

BEAM_SIZE = 5
FRAMES = 16


@dataclass(frozen=True, slots=True)
class Beam:
    words: tuple[int, ...]
    log_prob: float
    state: State

    @property
    def ended(self) -> bool:
        return self.words[-1:] == (EOS_ID,)


def search_by_loop(decoder: Decoder, features: Tensor, *, beam_size: int, max_words: int) -> list[Beam]:
    """Beam search, one beam and one word at a time. features (L, D) -> ended beams, best first."""
    memory = decoder.prepare(features[None])
    beams = [Beam((), 0.0, decoder.first_state(memory))]
    for position in range(max_words + 1):
        candidates = [beam for beam in beams if beam.ended]
        places = beam_size - len(candidates)
        for beam in beams:
            if not beam.ended:
                candidates += _extended(decoder, memory, beam, places, last=position == max_words)
        candidates.sort(key=lambda beam: (beam.ended and beam in beams, beam.log_prob), reverse=True)
        beams = candidates[:beam_size]
        if all(beam.ended for beam in beams):
            break
    return sorted(beams, key=lambda beam: beam.log_prob, reverse=True)


def _extended(decoder: Decoder, memory: Memory, beam: Beam, places: int, *, last: bool) -> list[Beam]:
    previous = torch.tensor([[beam.words[-1] if beam.words else SOS_ID]], device=memory.features.device)
    step = decoder.step(previous, beam.state, memory)
    log_probs = step.log_probs[0, 0].clone()
    log_probs[[SOS_ID, UNKNOWN_ID]] = -math.inf
    if not beam.words:
        log_probs[EOS_ID] = -math.inf
    if last:
        log_probs[torch.arange(len(log_probs)) != EOS_ID] = -math.inf
    return [
        Beam((*beam.words, word), beam.log_prob + log_prob, step.state)
        for log_prob, word in zip(*(values.tolist() for values in log_probs.topk(places)), strict=True)
        if log_prob > -math.inf
    ]


class PlainCaptioner:
    """One clip at a time, from bytes to a sentence."""

    def __init__(self, checkpoint: Path, *, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.checkpoint = checkpoints.load(checkpoint, device=device)
        self.model = self.checkpoint.model.eval()
        self.preprocessing = self.checkpoint.preprocessing

    def frames(self, body: bytes) -> Tensor:
        """All frames decoded, 16 of them resized, cropped and normalised: (16, 3, S, S)."""
        with av.open(io.BytesIO(body), **LENIENT_METADATA) as container:
            pictures = [frame.to_image() for frame in container.decode(video=0)]
        chosen = [pictures[(2 * number + 1) * len(pictures) // (2 * FRAMES)] for number in range(FRAMES)]
        size, crop = self.preprocessing.resize_px, self.preprocessing.crop_px
        edge = (size - crop) // 2
        small = [picture.resize((size, size), Image.Resampling.BILINEAR) for picture in chosen]
        pixels = np.stack([np.asarray(picture) for picture in small])[:, edge : edge + crop, edge : edge + crop]
        if self.preprocessing.channels == "BGR":
            pixels = pixels[..., ::-1]
        values = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255 * self.preprocessing.input_max
        normal = (values - torch.tensor(self.preprocessing.mean)) / torch.tensor(self.preprocessing.std)
        return normal.permute(0, 3, 1, 2).contiguous()

    @torch.inference_mode()
    def caption(self, body: bytes) -> str:
        features = self.checkpoint.encoder(self.frames(body).to(self.device))
        best, *_ = search_by_loop(
            self.model.decoder, features, beam_size=BEAM_SIZE, max_words=self.checkpoint.max_words
        )
        return sentence(self.checkpoint.vocabulary.tokens(best.words[:-1]))
