"""psi: the soft-attention LSTM that says one word at a time, equations (3) to (17) of arXiv 1904.02628.

`Decoder.step` is the only place where a word is predicted: teacher forcing, greedy and beam search all call it.
Knows nothing of frames, of text, or of how words are chosen.

The context vector phi_t of equation (6) is only ever multiplied by matrices, those of the LSTM's gates and W_u. A
weighted sum may be taken after a multiplication as well as before, so the frames are multiplied once per clip, not
the context once per word and sentence: phi_t itself is never formed.

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
    """What the decoder looks at: made once per clip, shared by its K sentences."""

    features: Tensor  # (B, L, D)
    keys: Tensor  # (B, L, A), W_ev v_i + b_e
    seen: Tensor  # (B, L, 4 H + E), v_i as the LSTM's gates (7 to 12) and W_u (14) see it
    gates_of_words: Tensor  # (4 H, E), of the decoder: the gates' matrix for the last word, in one piece of memory


@dataclass(frozen=True, slots=True)
class State:
    """h and c of the LSTM, (B, K, H) each."""

    hidden: Tensor
    cell: Tensor

    def pick(self, sentences: Tensor) -> State:
        """For each clip, go on with the sentences of these numbers (B, K'), repeats allowed."""
        index = sentences[..., None].expand(-1, -1, self.hidden.shape[-1])
        return State(self.hidden.gather(1, index), self.cell.gather(1, index))


@dataclass(frozen=True, slots=True)
class Step:
    """One word further."""

    log_probs: Tensor  # (B, K, V)
    state: State
    attention: Tensor  # (B, K, L), sums to 1 over L


class Decoder(nn.Module):
    """Equations (3) to (17)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        features, hidden = config.feature_size, config.hidden_size
        vectors = torch.empty(config.vocabulary_size, config.embedding_size)
        if not vectors.is_meta:  # there, `normal_` would take two seconds to import torch's compiler
            vectors.normal_()
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

    def remember(self, features: Tensor) -> Memory:
        """features (B, L, D) -> Memory."""
        size = self.config.feature_size
        seen_by = torch.cat([self.lstm.weight_ih[:, :size], self.to_embedding.weight[:, :size]])
        gates_of_words = self.lstm.weight_ih[:, size:].contiguous()
        return Memory(features, self.attend_feature(features), functional.linear(features, seen_by), gates_of_words)

    def first_state(self, memory: Memory, sentences: int = 1) -> State:
        """Equations (16) and (17), the same for each of the K sentences of a clip."""
        mean = memory.features.mean(dim=1)
        hidden, cell = torch.tanh(self.first_hidden(mean)), torch.tanh(self.first_cell(mean))
        return State(hidden[:, None].repeat(1, sentences, 1), cell[:, None].repeat(1, sentences, 1))

    def attend(self, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Equations (3) to (6): hidden (B, K, H) -> the context as `Memory.seen` (B, K, 4 H + E), weights (B, K, L)."""
        keys = memory.keys[:, None] + self.attend_hidden(hidden)[:, :, None]  # (B, K, L, A)
        weights = self.attend_score(torch.tanh(keys)).squeeze(-1).softmax(dim=-1)
        return torch.sigmoid(self.gate(hidden)) * (weights @ memory.seen), weights

    def step(self, previous_words: Tensor, state: State, memory: Memory) -> Step:
        """Equations (3) to (15): previous_words (B, K) ids -> the next word's log probabilities."""
        size, hidden_size = self.config.feature_size, self.config.hidden_size
        embedded = self.embedding(previous_words)
        seen, weights = self.attend(state.hidden, memory)
        seen_by_gates, seen_by_words = seen[..., : 4 * hidden_size], seen[..., 4 * hidden_size :]
        heard_by_gates = _product(memory.gates_of_words, embedded, self.lstm.bias_ih)
        gates = seen_by_gates + heard_by_gates + _product(self.lstm.weight_hh, state.hidden, self.lstm.bias_hh)
        admit, keep, new, show = gates.chunk(4, dim=-1)
        cell = torch.sigmoid(keep) * state.cell + torch.sigmoid(admit) * torch.tanh(new)
        hidden = torch.sigmoid(show) * torch.tanh(cell)
        heard = functional.linear(self.dropout(hidden), self.to_embedding.weight[:, size:], self.to_embedding.bias)
        said = torch.tanh(seen_by_words + heard + embedded)
        log_probs = _product(self.to_words.weight, self.dropout(said), self.to_words.bias).log_softmax(dim=-1)
        return Step(log_probs, State(hidden, cell), weights)


def _product(matrix: Tensor, vectors: Tensor, bias: Tensor) -> Tensor:
    """functional.linear of vectors (B, K, X), with a large matrix (Y, X): left of them it takes a CPU half the time."""
    products = torch.addmm(bias[:, None], matrix, vectors.flatten(0, 1).t())
    return products.t().reshape(*vectors.shape[:2], -1)
