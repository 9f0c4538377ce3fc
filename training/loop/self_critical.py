"""Self-critical sequence training (Rennie et al., arXiv 1612.00563): the reward of sampled sentences is CIDEr-D.

What is sampled is exactly the decoder's distribution over the words that a sentence may have: no <SOS>, no <UNK>, and
no <EOS> before the first word. A sentence that has not ended after `max_words` words is cut, and so has no <EOS> in its
reward. Uses the decoder's `step`. Knows nothing of encoders, optimizers or files.

Rewards alone teach a network to end sentences in words that are seldom wrong, as "about a news". With the loss of
teacher forcing beside them, it also keeps to what people say (O_Mixed of Wu et al., arXiv 1609.08144).

Shapes: B clips, L frames per clip, D feature size, K sampled sentences per clip, T words of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etenet.model.decoder import Decoder
from etenet.model.generate import generate
from etenet.model.vocabulary import EOS_ID, SOS_ID, UNKNOWN_ID
from training.data.datasets import EncodedCaptions
from training.loop.loss import sentence_losses
from training.loop.reward import CiderD, ClipT, ended
from training.run_settings import Baseline


@dataclass(frozen=True, slots=True)
class Samples:
    """Sampled sentences. `mask` is 1 on their words and their <EOS>; `log_probs` have gradients."""

    words: Tensor  # (B, K, T) int64
    mask: Tensor  # (B, K, T) bool
    log_probs: Tensor  # (B, K, T)

    def log_prob(self) -> Tensor:
        """Of each sentence, (B, K)."""
        return (self.log_probs * self.mask).sum(-1)


def sample(decoder: Decoder, features: Tensor, *, sentences: int, max_words: int) -> Samples:
    """features (B, L, D) -> K sentences per clip, drawn with torch's random numbers."""
    memory = decoder.prepare(features)
    state = decoder.first_state(memory, sentences)
    previous = torch.full((len(features), sentences), SOS_ID, device=features.device)
    grows = torch.ones_like(previous, dtype=torch.bool)
    words, masks, log_probs = [], [], []
    for position in range(max_words + 1):
        step = decoder.step(previous, state, memory)
        state = step.state
        allowed = _allowed(step.log_probs, first=position == 0)
        drawn = torch.multinomial(allowed.detach().exp().flatten(0, 1), 1).view_as(previous)
        words.append(drawn)
        masks.append(grows)
        log_probs.append(allowed.gather(-1, drawn[..., None]).squeeze(-1))
        previous, grows = drawn, grows & (drawn != EOS_ID)
        if not bool(grows.any()):
            break
    return Samples(torch.stack(words, -1), torch.stack(masks, -1), torch.stack(log_probs, -1))


def self_critical_losses(
    decoder: Decoder,
    features: Tensor,
    clips: Sequence[ClipT],
    reward: CiderD[ClipT],
    *,
    sentences: int,
    baseline: Baseline,
    max_words: int,
) -> Tensor:
    """features (B, L, D) of the named clips -> the mean loss of K sampled sentences of each (B, 1).

    Its gradient is that of REINFORCE, -(reward - baseline) grad log p(sentence); its value is minus the reward. The
    caller averages over the clips of the effective batch.
    """
    samples = sample(decoder, features, sentences=sentences, max_words=max_words)
    rewards = rewards_of(samples, clips, reward)
    if baseline == "greedy":
        against = greedy_rewards(decoder, features, clips, reward, max_words=max_words)[:, None]
    else:  # Luo, arXiv 2003.09971
        against = (rewards.sum(1, keepdim=True) - rewards) / (sentences - 1)
    reinforce = -(rewards - against) * samples.log_prob()
    return (reinforce - reinforce.detach() - rewards).mean(1, keepdim=True)


def mixed_losses(
    decoder: Decoder,
    features: Tensor,
    targets: tuple[Sequence[ClipT], EncodedCaptions],
    reward: CiderD[ClipT],
    *,
    teacher_forcing: float,
    attention_penalty: float,
    sentences: int,
    baseline: Baseline,
    max_words: int,
) -> Tensor:
    """The same (B, 1), and a share of the gradient of teacher forcing with a caption of each clip. Values stay."""
    clips, captions = targets
    losses = self_critical_losses(
        decoder, features, clips, reward, sentences=sentences, baseline=baseline, max_words=max_words
    )
    if not teacher_forcing:
        return losses
    forced = teacher_forcing * sentence_losses(decoder, features, captions, attention_penalty=attention_penalty)
    return losses + forced - forced.detach()


def rewards_of(samples: Samples, clips: Sequence[ClipT], reward: CiderD[ClipT]) -> Tensor:
    """The reward of each sampled sentence, (B, K)."""
    count = samples.words.shape[1]
    named = [clip for clip in clips for _ in range(count)]
    lengths = samples.mask.sum(-1).flatten().cpu().numpy()
    scores = reward.score(named, samples.words.flatten(0, 1).cpu().numpy(), lengths)
    return torch.from_numpy(scores).to(samples.log_probs).view(len(clips), count)


def greedy_rewards(
    decoder: Decoder, features: Tensor, clips: Sequence[ClipT], reward: CiderD[ClipT], *, max_words: int
) -> Tensor:
    """The reward of the sentence that a greedy search without dropout finds for each clip, (B,)."""
    training = decoder.training
    decoder.eval()
    found = [of_clip[0].words for of_clip in generate(decoder, features, beam_size=1, max_words=max_words)]
    decoder.train(training)
    return torch.from_numpy(reward.score(clips, *ended(found))).to(features)


def _allowed(log_probs: Tensor, *, first: bool) -> Tensor:
    """The distribution over the words that may come next, (B, K, V)."""
    never = torch.zeros(log_probs.shape[-1], dtype=torch.bool, device=log_probs.device)
    never[[SOS_ID, UNKNOWN_ID, *([EOS_ID] if first else [])]] = True
    return log_probs.masked_fill(never, -math.inf).log_softmax(-1)
