"""Loss and scores on the validation split, between epochs. Each clip is encoded once for both.

Knows nothing of optimizers or files. The final scores, from video files, are those of `training.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.errors import UsageError
from etenet.model.checkpoint import Checkpoint
from etenet.runtime.network import TorchNetwork
from etenet.scoring.scores import Scorer
from training.data.datasets import DatasetClip, EncodedCaptions
from training.loop.step import Trainee

LOGGED = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L")


@dataclass(frozen=True, slots=True)
class Validation:
    """`loss` is the mean over all sentences."""

    loss: float
    scores: dict[str, float]

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: CIDEr, and of equal CIDEr the loss."""
        return self.scores["CIDEr"], -self.loss


@torch.inference_mode()
def validate(
    trainee: Trainee,
    checkpoint: Checkpoint,
    clips: Sequence[DatasetClip],
    inputs: Callable[[Sequence[DatasetClip]], Tensor],
    scorer: Scorer,
    *,
    batch_clips: int,
) -> Validation:
    """`checkpoint` holds the trainee's network, `scorer` the references; `inputs` loads frames or features of clips.

    Raises `UsageError` if the network's numbers are no longer finite.
    """
    trainee.eval()
    network = TorchNetwork(checkpoint, device=trainee.model.decoder.embedding.weight.device)
    captioner = Captioner(checkpoint, network, decoders_for(checkpoint, sandboxed=False))
    loss, count, captions = 0.0, 0, {}
    for start in range(0, len(clips), batch_clips):
        batch = clips[start : start + batch_clips]
        features = trainee.features(inputs(batch))
        for clip, sentences in zip(batch, captioner.caption_features(features, CaptionOptions()), strict=True):
            if not sentences:
                raise UsageError(
                    f"the network has no finite probabilities for {clip.video} any more; train into another --out at a "
                    "lower learning rate (--set)"
                )
            captions[clip.video] = [sentences[0].text]
        most = max(len(clip.captions) for clip in batch)
        repeated = [[clip.captions[i % len(clip.captions)] for i in range(most)] for clip in batch]
        references = EncodedCaptions.encode(repeated, checkpoint.vocabulary, checkpoint.max_words).to(features.device)
        losses = trainee.losses(features, references).double()
        for clip, of_clip in zip(batch, losses, strict=True):
            loss, count = loss + of_clip[: len(clip.captions)].sum().item(), count + len(clip.captions)
    scores = scorer.score(captions).overall
    return Validation(loss / count, {name: scores[name] for name in LOGGED if name in scores})
