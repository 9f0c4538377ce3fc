"""What training minimises: equations (18) to (20) of arXiv 1904.02628, per example, under teacher forcing.

Uses the two halves of the decoder's `step`. Knows nothing of encoders, optimizers or batching.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from etenet.model.decoder import Decoder
from training.data.datasets import EncodedCaptions

ATTENTION_PENALTY = 0.70602


def sentence_losses(
    decoder: Decoder,
    features: Tensor,
    sentences: EncodedCaptions,
    *,
    attention_penalty: float = ATTENTION_PENALTY,
    label_smoothing: float = 0.0,
) -> Tensor:
    """features (B, L, D), K sentences per clip -> the loss of each sentence (B, K).

    NLL = -sum_t log p(y_t); DSA = 1/L sum_k (1 - sum_t alpha_k^t)^2; both over the words of the mask only. L is the
    number of frames. The caller averages over the sentences of the effective batch. With label smoothing, which is not
    in the paper, a share of each word's probability is spread over all words (Szegedy et al., arXiv 1512.00567).
    """
    memory = decoder.prepare(features)
    state = decoder.first_state(memory, sentences.previous.shape[1])
    attended = features.new_zeros(*sentences.previous.shape[:2], features.shape[1])  # (B, K, L), sum_t alpha^t
    outputs = []
    for word in range(sentences.previous.shape[-1]):
        output, state, attention = decoder.advance(sentences.previous[..., word], state, memory)
        outputs.append(output)
        attended = attended + attention * sentences.mask[..., word, None]
    is_word = sentences.mask.bool()
    word_losses = functional.cross_entropy(
        decoder.logits(torch.stack(outputs, dim=2)[is_word]),  # no logits where a shorter sentence has ended
        sentences.target[is_word],
        reduction="none",
        label_smoothing=label_smoothing,
    )
    negative_log_likelihood = (
        word_losses.new_zeros(is_word.shape).masked_scatter(is_word, word_losses).sum(dim=-1)
    )  # (18)
    attention_loss = (1 - attended).square().mean(dim=-1)  # (19)
    return negative_log_likelihood + attention_penalty * attention_loss  # (20)
