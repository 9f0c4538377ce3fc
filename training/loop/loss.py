"""What training minimises: equations (18) to (20) of arXiv 1904.02628, per example, under teacher forcing.

Uses the decoder's `step`. Knows nothing of encoders, optimizers or batching.
"""

from __future__ import annotations

from torch import Tensor

from etenet.model.decoder import Decoder
from training.data.datasets import EncodedCaptions

ATTENTION_PENALTY = 0.70602


def sentence_losses(
    decoder: Decoder, features: Tensor, sentences: EncodedCaptions, *, attention_penalty: float = ATTENTION_PENALTY
) -> Tensor:
    """features (B, L, D), K sentences per clip -> the loss of each sentence (B, K).

    NLL = -sum_t log p(y_t); DSA = 1/L sum_k (1 - sum_t alpha_k^t)^2; both over the words of the mask only. The
    caller averages over the sentences of the effective batch.
    """
    memory = decoder.prepare(features)
    state = decoder.first_state(memory, sentences.previous.shape[1])
    negative_log_likelihood = features.new_zeros(sentences.previous.shape[:2])
    attended = features.new_zeros(*sentences.previous.shape[:2], features.shape[1])  # (B, K, L), sum_t alpha^t
    for word in range(sentences.previous.shape[-1]):
        step = decoder.step(sentences.previous[..., word], state, memory)
        state, mask = step.state, sentences.mask[..., word]
        log_probs = step.log_probs.gather(-1, sentences.target[..., word, None]).squeeze(-1)
        negative_log_likelihood = negative_log_likelihood - log_probs * mask  # (18)
        attended = attended + step.attention * mask[..., None]
    attention_loss = (1 - attended).square().mean(dim=-1)  # (19)
    return negative_log_likelihood + attention_penalty * attention_loss  # (20)
