"""The decoder against a plain NumPy transcription of equations (3) to (17), one clip and one sentence at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder, State

Array = NDArray[np.float64]
B, L, K = 3, 16, 4
CONFIG = DecoderConfig(feature_size=7, vocabulary_size=11, hidden_size=5, embedding_size=6, attention_size=4)


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).double().eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(B, L, CONFIG.feature_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


class Transcription:
    """The equations by their numbers in the paper. Weights are (out, in)."""

    def __init__(self, decoder: Decoder) -> None:
        self.p = {name: value.numpy() for name, value in decoder.state_dict().items()}

    def first(self, v: Array) -> tuple[Array, Array]:
        p, mean = self.p, v.mean(axis=0)
        h = np.tanh(p["first_hidden.weight"] @ mean + p["first_hidden.bias"])  # (16)
        c = np.tanh(p["first_cell.weight"] @ mean + p["first_cell.bias"])  # (17)
        return h, c

    def step(self, v: Array, word: int, h: Array, c: Array) -> tuple[Array, Array, Array, Array]:
        p = self.p
        e = np.array(
            [
                p["attend_score.weight"][0]
                @ np.tanh(p["attend_hidden.weight"] @ h + p["attend_feature.weight"] @ v_i + p["attend_feature.bias"])
                + p["attend_score.bias"][0]
                for v_i in v
            ]
        )  # (3)
        alpha = softmax(e)  # (4)
        beta = sigmoid(p["gate.weight"][0] @ h + p["gate.bias"][0])  # (5)
        phi = beta * sum(alpha_i * v_i for alpha_i, v_i in zip(alpha, v, strict=True))  # (6)
        y = p["embedding.weight"][word]
        z = np.concatenate([phi, y])  # (7)
        gates = p["lstm.weight_ih"] @ z + p["lstm.bias_ih"] + p["lstm.weight_hh"] @ h + p["lstm.bias_hh"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)  # (8-12)
        h = sigmoid(o) * np.tanh(c)  # (13)
        u = p["to_embedding.weight"] @ np.concatenate([phi, h]) + y + p["to_embedding.bias"]  # (14)
        return softmax(p["to_words.weight"] @ np.tanh(u) + p["to_words.bias"]), alpha, h, c  # (15)


def test_the_step_is_equations_3_to_15(decoder: Decoder, features: torch.Tensor) -> None:
    oracle, rng = Transcription(decoder), np.random.default_rng(2)
    memory = decoder.prepare(features)
    state = State(*(torch.from_numpy(rng.normal(size=(B, K, CONFIG.hidden_size))) for _ in range(2)))
    for _ in range(4):
        words = torch.from_numpy(rng.integers(CONFIG.vocabulary_size, size=(B, K)))
        step = decoder.step(words, state, memory)
        for clip in range(B):
            for sentence in range(K):
                probs, alpha, h, c = oracle.step(
                    features[clip].numpy(),
                    int(words[clip, sentence]),
                    state.hidden[clip, sentence].detach().numpy(),
                    state.cell[clip, sentence].detach().numpy(),
                )
                for ours, theirs in (
                    (step.log_probs.exp(), probs),
                    (step.attention, alpha),
                    (step.state.hidden, h),
                    (step.state.cell, c),
                ):
                    np.testing.assert_allclose(ours[clip, sentence].detach().numpy(), theirs, atol=1e-6)
        state = step.state


def test_the_first_state_is_equations_16_and_17(decoder: Decoder, features: torch.Tensor) -> None:
    oracle = Transcription(decoder)
    state = decoder.first_state(decoder.prepare(features), K)
    for clip in range(B):
        h, c = oracle.first(features[clip].numpy())
        for sentence in range(K):
            np.testing.assert_allclose(state.hidden[clip, sentence].detach().numpy(), h, atol=1e-12)
            np.testing.assert_allclose(state.cell[clip, sentence].detach().numpy(), c, atol=1e-12)


def test_attention_sums_to_one(decoder: Decoder, features: torch.Tensor) -> None:
    memory = decoder.prepare(features)
    step = decoder.step(torch.zeros(B, K, dtype=torch.long), decoder.first_state(memory, K), memory)
    torch.testing.assert_close(step.attention.sum(-1), torch.ones(B, K, dtype=torch.float64))


def test_permuting_frames_permutes_attention_and_changes_nothing_else(decoder: Decoder, features: torch.Tensor) -> None:
    order = torch.randperm(L, generator=torch.Generator().manual_seed(3))
    steps = []
    for permuted in (features, features[:, order]):
        memory = decoder.prepare(permuted)
        steps.append(decoder.step(torch.ones(B, K, dtype=torch.long), decoder.first_state(memory, K), memory))
    plain, permuted = steps
    torch.testing.assert_close(permuted.log_probs, plain.log_probs, atol=1e-12, rtol=0)
    torch.testing.assert_close(permuted.attention, plain.attention[..., order], atol=1e-12, rtol=0)


def test_sizes_default_to_the_papers() -> None:
    config = DecoderConfig(feature_size=1536, vocabulary_size=12000)
    assert (config.hidden_size, config.embedding_size) == (512, 486)


def test_a_projection_is_a_decoder_of_projected_features(features: torch.Tensor) -> None:
    torch.manual_seed(0)
    projecting = Decoder(replace(CONFIG, projection_size=3)).double().eval()
    plain = Decoder(replace(CONFIG, feature_size=3)).double().eval()
    plain.load_state_dict({k: v for k, v in projecting.state_dict().items() if not k.startswith("project.")})
    words, steps = torch.arange(B * K).view(B, K) % CONFIG.vocabulary_size, []
    for decoder, given in ((projecting, features), (plain, projecting.project(features))):
        memory = decoder.prepare(given)
        steps.append(decoder.step(words, decoder.first_state(memory, K), memory))
    torch.testing.assert_close(steps[0].log_probs, steps[1].log_probs, atol=0, rtol=0)
    assert projecting.project.weight.shape == (3, CONFIG.feature_size)
