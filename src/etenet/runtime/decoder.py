"""The decoder of `model/decoder.py` on NumPy arrays: equations (3) to (17) for searching on a CPU, without torch.

`import torch` costs a process 265 MiB, and a search on torch is a hundred small calls. Here a word reads each weight
once and copies none:

- What multiplies h_{t-1} is one matrix: W_eh, w_beta and the gates'. So is what multiplies the features.
- A word's own share of the gates and of the output is computed once, when it is first said, and kept.
- sigmoid(x) = (1 + tanh(x / 2)) / 2: with halved weights, which is exact, one tanh serves all four gates.
- The products with large matrices are compiled (`openvino.py`). NumPy's would take twice the time of a search, because
  they copy a matrix each time, to lay it out as they need it.
- The others have one thread. They are small, and those of NumPy's OpenBLAS that helped would spin for 25 ms after each
  of them: on two cores, that took half of the processor time of a caption, and cores from the encoder.

Shapes as in `model/decoder.py`: B clips, L frames per clip, D feature size, K sentences per clip, H hidden,
E embedding, A attention, V words. N is B K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from etenet import metrics
from etenet.model.config import DecoderConfig
from etenet.model.hypothesis import WORDS, Hypothesis
from etenet.runtime.search import Numbers, beam_search

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Memory:
    """What the decoder attends to."""

    keys: Floats  # (B, 1, L, A), W_ev v_i + b_e of (3)
    values: Floats  # (B, L, 4 H + E), v_i times the gates' matrices (8-11) and W_u (14)


@dataclass(frozen=True, slots=True)
class _State:
    """h and c of the LSTM, (B, K, H) each."""

    hidden: Floats
    cell: Floats

    def select(self, beams: Numbers) -> _State:
        clip = np.arange(len(beams))[:, None]
        return _State(self.hidden[clip, beams], self.cell[clip, beams])


@dataclass(frozen=True, slots=True, eq=False)
class Matrices:
    """The large matrices by which every word is multiplied."""

    of_hidden: Floats  # (4 H + A + 1, H): of the gates (8-11), W_eh (3) and w_beta (5)
    output_of_hidden: Floats  # (E, H), W_u (14)
    to_words: Floats  # (V, E), W_p (15)
    words_bias: Floats  # (V,), b_p


class Products(Protocol):
    """What is computed with `Matrices`. A result is valid until the next call, and may be overwritten."""

    def of_hidden(self, hidden: Floats) -> Floats:
        """h_{t-1} (N, H) -> (N, 4 H + A + 1)."""

    def log_probs(self, hidden: Floats, outputs: Floats) -> Floats:
        """h_t (N, H) and the rest of u_t (N, E) -> the log probabilities of y_t (N, V), by (14) and (15)."""


class ArrayDecoder:
    """One instance serves one thread at a time."""

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, Floats], compiled: Callable[[Matrices], Products]
    ) -> None:
        """`weights` are those of a `Decoder` by their names in its state dict."""
        size, hidden = config.attended_size, config.hidden_size
        self._config = config
        self._project = (weights["project.weight"], weights["project.bias"]) if config.projection_size else None
        half = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], np.float32), hidden)  # input, forget, candidate, output
        of_input = weights["lstm.weight_ih"] * half[:, None]
        self._of_features = np.concatenate(
            [weights["attend_feature.weight"], of_input[:, :size], weights["to_embedding.weight"][:, :size]]
        )
        self._key_bias = weights["attend_feature.bias"]
        self._first = np.concatenate([weights["first_hidden.weight"], weights["first_cell.weight"]])
        self._first_bias = np.concatenate([weights["first_hidden.bias"], weights["first_cell.bias"]])
        self._gate_bias = weights["gate.bias"] * np.float32(0.5)
        self._score = weights["attend_score.weight"][0]  # without b_a, which raises all scores alike
        self._embedding = weights["embedding.weight"]
        self._of_embedding = np.ascontiguousarray(of_input[:, size:])
        self._gates_bias = (weights["lstm.bias_ih"] + weights["lstm.bias_hh"]) * half
        self._output_bias = weights["to_embedding.bias"]
        self._products = compiled(
            Matrices(
                np.concatenate(
                    [
                        weights["lstm.weight_hh"] * half[:, None],
                        weights["attend_hidden.weight"],
                        weights["gate.weight"] / 2,
                    ]
                ),
                np.ascontiguousarray(weights["to_embedding.weight"][:, size:]),
                weights["to_words.weight"],
                weights["to_words.bias"],
            )
        )
        self._one_thread = partial(ThreadpoolController().limit, limits=1, user_api="blas")
        # Memory that is not written to costs nothing, so this takes as much as words are said.
        self._of_words = np.empty((config.vocabulary_size, 4 * hidden + config.embedding_size), np.float32)
        self._is_known = np.zeros(config.vocabulary_size, np.bool_)

    def sentences(self, features: Floats, *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
        """features (B, L, D) -> the sentences of each clip, best first; none if its probabilities are not finite."""
        with np.errstate(all="ignore"), self._one_thread():
            memory, first = self._prepare(features, beam_size)

            def step(previous_words: Numbers, state: _State) -> tuple[Floats, _State, Floats]:
                metrics.STEPS.inc()
                outputs, state, attention = self._advance(previous_words, state, memory)
                return self._log_probs(outputs, state), state, attention

            return beam_search(step, first, clips=len(features), beam_size=beam_size, max_words=max_words, words=WORDS)

    def log_probs(self, feature: Floats, sentences: Sequence[Sequence[int]]) -> list[float]:
        """Of each sentence, its end included, for a clip whose frames all have this feature (D,)."""
        with self._one_thread():
            return self._log_probs_of(sentences, *self._prepare(feature[None, None], len(sentences)))

    def _log_probs_of(self, sentences: Sequence[Sequence[int]], memory: _Memory, state: _State) -> list[float]:
        ended = [[*sentence, WORDS.eos] for sentence in sentences]
        totals, previous = np.zeros(len(sentences)), np.full((1, len(sentences)), WORDS.sos, np.intp)
        for position in range(max(map(len, ended))):
            outputs, state, _ = self._advance(previous, state, memory)
            going_on = [number for number, words in enumerate(ended) if position < len(words)]
            words = [ended[number][position] for number in going_on]
            totals[going_on] += self._log_probs(outputs, state)[0, going_on, words]
            previous[0, going_on] = words
        return [float(total) for total in totals]

    def _prepare(self, features: Floats, sentences: int) -> tuple[_Memory, _State]:
        """features (B, L, D) -> what is attended to; h_0 and c_0, the same for each of the K sentences of a clip."""
        if self._project:
            features = _linear(features, self._project[0]) + self._project[1]
        attention_size, hidden_size = self._config.attention_size, self._config.hidden_size
        products = _linear(features, self._of_features)
        keys = products[..., :attention_size] + self._key_bias
        first = np.tanh(_linear(features.mean(axis=1), self._first) + self._first_bias)  # (16, 17)
        repeated = np.repeat(first[:, None], sentences, axis=1)
        memory = _Memory(keys[:, None], np.ascontiguousarray(products[..., attention_size:]))
        return memory, _State(repeated[..., :hidden_size], repeated[..., hidden_size:])

    def _advance(self, previous_words: Numbers, state: _State, memory: _Memory) -> tuple[Floats, _State, Floats]:
        """y_{t-1} (B, K), h_{t-1} and c_{t-1} -> u_t without h_t (B, K, E), h_t and c_t, attention (B, K, L)."""
        hidden_size, attention_size = self._config.hidden_size, self._config.attention_size
        products = self._products.of_hidden(_flat(state.hidden)).reshape(*previous_words.shape, -1)
        query = products[..., 4 * hidden_size : 4 * hidden_size + attention_size]
        scores = np.tanh(memory.keys + query[:, :, None]) @ self._score  # (3)
        attention = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attention /= attention.sum(axis=-1, keepdims=True)  # (4)
        beta = _sigmoid_of_double(products[..., -1:] + self._gate_bias)  # (5)
        sums = (beta * attention) @ memory.values  # (6)
        sums += self._rows_of(previous_words)
        gates, outputs = sums[..., : 4 * hidden_size], sums[..., 4 * hidden_size :]
        gates += products[..., : 4 * hidden_size]  # (7-11)
        np.tanh(gates, out=gates)
        input_gate, forget_gate, candidate, output_gate = np.split(gates, 4, axis=-1)
        cell = ((forget_gate + 1) * state.cell + (input_gate + 1) * candidate) * np.float32(0.5)  # (12)
        hidden = (output_gate + 1) * np.tanh(cell) * np.float32(0.5)  # (13)
        return outputs, _State(hidden, cell), attention

    def _rows_of(self, words: Numbers) -> Floats:
        """words (B, K) -> W_x E[y] + b of the gates, and E[y] + b_u: (B, K, 4 H + E)."""
        for word in set(words[~self._is_known[words]].tolist()):
            vector = self._embedding[word]  # one at a time: the result must not depend on other words
            self._of_words[word] = np.concatenate(
                [self._of_embedding @ vector + self._gates_bias, vector + self._output_bias]
            )
            self._is_known[word] = True
        return self._of_words[words]

    def _log_probs(self, outputs: Floats, state: _State) -> Floats:
        """u_t without h_t (B, K, E), and h_t -> the log probabilities of y_t (B, K, V)."""
        of_words = self._products.log_probs(_flat(state.hidden), _flat(outputs))
        return of_words.reshape(*outputs.shape[:-1], -1)


def _linear(vectors: Floats, matrix: Floats) -> Floats:
    """vectors (..., X), matrix (Y, X) -> (..., Y), in one multiplication."""
    products: Floats = _flat(vectors) @ matrix.T
    return products.reshape(*vectors.shape[:-1], -1)


def _sigmoid_of_double(x: Floats) -> Floats:
    return (np.tanh(x) + 1) * np.float32(0.5)


def _flat(vectors: Floats) -> Floats:
    """(..., X) -> (N, X), in one piece of memory."""
    return np.ascontiguousarray(vectors.reshape(-1, vectors.shape[-1]))
