"""psi: the soft-attention LSTM that predicts one word at a time, equations (3) to (17) of arXiv 1904.02628.

`Decoder.step` is the only place where torch predicts a word; greedy and beam search and sampling call it. (For a CPU,
`runtime/decoder.py` has the same equations on NumPy.) Where all words are known beforehand, as in teacher forcing, the
two halves of `step` are called apart: `advance` for each word, `logits` once for all.
Knows nothing of frames, of text, or of how words are chosen.

The context vector phi_t of equation (6) is only ever multiplied by matrices: those of the LSTM's gates and W_u. A
weighted sum may be taken before or after a multiplication, so the features are multiplied once per clip instead of the
context once per word and sentence, and phi_t itself is never formed. Comments give the paper's form.

A projection of the features, which is not in the paper, is the decoder's first layer where the config asks for one.
Where a shape says D after that, it is the size of the projected features.

Shapes: B clips, L frames per clip, D feature size, K sentences per clip (references in training, beams in search),
H hidden, E embedding, A attention, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from etenet.model.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class Memory:
    """What the decoder attends to: computed once per clip, shared by its K sentences."""

    features: Tensor  # (B, L, D), v_i, projected
    keys: Tensor  # (B, L, A), W_ev v_i + b_e of (3)
    values: Tensor  # (B, L, 4 H + E), v_i times the gates' matrices (8-11) and W_u (14)
    embedding_gates: Tensor  # (4 H, E), of the decoder: the gates' matrices for E[y_{t-1}], contiguous


@dataclass(frozen=True, slots=True)
class State:
    """h and c of the LSTM, (B, K, H) each."""

    hidden: Tensor
    cell: Tensor

    def select(self, sentences: Tensor) -> State:
        """The states of the sentences with these numbers (B, K') of each clip, repeats allowed."""
        index = sentences[..., None].expand(-1, -1, self.hidden.shape[-1])
        return State(self.hidden.gather(1, index), self.cell.gather(1, index))


@dataclass(frozen=True, slots=True)
class Step:
    """The prediction of the next word."""

    log_probs: Tensor  # (B, K, V)
    state: State
    attention: Tensor  # (B, K, L), sums to 1 over L


class Decoder(nn.Module):
    """Equations (3) to (17)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        features, hidden = config.attended_size, config.hidden_size
        vectors = torch.empty(config.vocabulary_size, config.embedding_size)
        if not vectors.is_meta:  # on meta tensors `normal_` would import torch's compiler, which takes two seconds
            vectors.normal_()
        self.project = nn.Linear(config.feature_size, features) if config.projection_size else nn.Identity()
        self.embedding = nn.Embedding.from_pretrained(vectors, freeze=False)  # type: ignore[no-untyped-call]  # E
        self.attend_hidden = nn.Linear(hidden, config.attention_size, bias=False)  # W_eh
        self.attend_feature = nn.Linear(features, config.attention_size)  # W_ev, b_e
        self.attend_score = nn.Linear(config.attention_size, 1)  # w_a, b_a
        self.gate = nn.Linear(hidden, 1)  # w_beta, b_beta
        self.lstm = nn.LSTMCell(features + config.embedding_size, hidden)
        self.to_embedding = nn.Linear(features + hidden, config.embedding_size)  # W_u, b_u
        self.to_words = nn.Linear(config.embedding_size, config.vocabulary_size)  # W_p, b_p
        self.first_hidden = nn.Linear(features, hidden)  # W_h, b_h
        self.first_cell = nn.Linear(features, hidden)  # W_c, b_c
        self.dropout = nn.Dropout(config.dropout)

    def prepare(self, features: Tensor) -> Memory:
        """features (B, L, D) -> Memory."""
        size = self.config.attended_size
        features = self.project(features)
        feature_matrices = torch.cat([self.lstm.weight_ih[:, :size], self.to_embedding.weight[:, :size]])
        return Memory(
            features,
            keys=self.attend_feature(features),
            values=functional.linear(features, feature_matrices),
            embedding_gates=self.lstm.weight_ih[:, size:].contiguous(),
        )

    def first_state(self, memory: Memory, sentences: int = 1) -> State:
        """h_0 and c_0, the same for each of the K sentences of a clip."""
        mean = memory.features.mean(dim=1)
        hidden = torch.tanh(self.first_hidden(mean))  # (16) h_0 = tanh(W_h mean(V) + b_h)
        cell = torch.tanh(self.first_cell(mean))  # (17) c_0 = tanh(W_c mean(V) + b_c)
        return State(hidden[:, None].repeat(1, sentences, 1), cell[:, None].repeat(1, sentences, 1))

    def attend(self, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """h_{t-1} (B, K, H) -> phi_t times the matrices of `Memory.values` (B, K, 4 H + E), weights (B, K, L)."""
        keys = memory.keys[:, None] + self.attend_hidden(hidden)[:, :, None]  # (B, K, L, A)
        scores = self.attend_score(torch.tanh(keys)).squeeze(-1)  # (3) e_i = w_a tanh(W_eh h + W_ev v_i + b_e) + b_a
        weights = scores.softmax(dim=-1)  # (4) alpha = softmax(e)
        beta = torch.sigmoid(self.gate(hidden))  # (5) beta = sigmoid(w_beta h + b_beta)
        return beta * (weights @ memory.values), weights  # (6) phi = beta sum_i alpha_i v_i

    def step(self, previous_words: Tensor, state: State, memory: Memory) -> Step:
        """y_{t-1} (B, K) ids, h_{t-1} and c_{t-1} -> the log probabilities of y_t."""
        output, state, attention = self.advance(previous_words, state, memory)
        return Step(self.logits(output).log_softmax(dim=-1), state, attention)  # (15) p = softmax(W_p tanh(u) + b_p)

    def advance(self, previous_words: Tensor, state: State, memory: Memory) -> tuple[Tensor, State, Tensor]:
        """y_{t-1} (B, K) ids, h_{t-1} and c_{t-1} -> u_t (B, K, E), h_t and c_t, attention (B, K, L)."""
        size, hidden_size = self.config.attended_size, self.config.hidden_size
        embedding = self.embedding(previous_words)  # E[y]
        context, attention = self.attend(state.hidden, memory)  # (3-6)
        context_gates, context_output = context[..., : 4 * hidden_size], context[..., 4 * hidden_size :]
        gates = (
            context_gates
            + _linear(embedding, memory.embedding_gates, self.lstm.bias_ih)
            + _linear(state.hidden, self.lstm.weight_hh, self.lstm.bias_hh)
        )  # (7-11) W_x [phi, E[y]] + W_h h + b, for all four gates
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)
        cell = torch.sigmoid(forget_gate) * state.cell + torch.sigmoid(input_gate) * torch.tanh(candidate)  # (12)
        hidden = torch.sigmoid(output_gate) * torch.tanh(cell)  # (13)
        hidden_output = functional.linear(
            self.dropout(hidden), self.to_embedding.weight[:, size:], self.to_embedding.bias
        )
        output = context_output + hidden_output + embedding  # (14) u = W_u [phi, h] + E[y] + b_u
        return output, State(hidden, cell), attention

    def logits(self, outputs: Tensor) -> Tensor:
        """u (..., E) -> W_p tanh(u) + b_p of (15), (..., V)."""
        return _linear(self.dropout(torch.tanh(outputs)), self.to_words.weight, self.to_words.bias)


def _linear(vectors: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """functional.linear of vectors (..., X) with a large matrix (Y, X). Matrix first takes a CPU half the time."""
    products = torch.addmm(bias[:, None], matrix, vectors.flatten(0, -2).t())
    return products.t().reshape(*vectors.shape[:-1], -1)
