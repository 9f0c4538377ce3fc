"""EtENet: encoder and decoder together. Knows nothing of training, searching or storing."""

from __future__ import annotations

from torch import Tensor, nn

from etenet.model.decoder import Decoder
from etenet.model.encoder import AbsentEncoder, Encoder


class EtENet(nn.Module):
    """The network of *End-to-End Video Captioning*, arXiv 1904.02628; without its encoder it starts from features."""

    def __init__(self, encoder: Encoder | AbsentEncoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, frames: Tensor) -> Tensor:
        """Preprocessed frames (B, L, 3, crop_px, crop_px) -> features (B, L, D)."""
        assert isinstance(self.encoder, Encoder), "features are given: there is nothing to encode"
        clips, length = frames.shape[:2]
        features: Tensor = self.encoder(frames.flatten(0, 1))
        return features.view(clips, length, -1)
