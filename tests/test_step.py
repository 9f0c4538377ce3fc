"""One optimizer step: the gradients do not depend on the micro-batches or on recomputed activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from etenet.errors import UsageError
from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.encoder import Encoder, default_preprocessing, feature_size
from etenet.model.etenet import EtENet
from etenet.model.vocabulary import Vocabulary
from training.data.datasets import DatasetClip, EncodedCaptions
from training.loop.memory import checkpoint_activations
from training.loop.order import TrainingExample
from training.loop.processes import Processes
from training.loop.step import Trainee, accumulate
from training.recipes import Stage

VOCABULARY = Vocabulary(list("abcdefgh"))
STAGE = Stage(
    epochs=1,
    patience_epochs=1,
    batch_clips=1,
    accumulation_steps=1,
    encoder_learning_rate=1e-3,
    decoder_learning_rate=1e-3,
    mixed_precision=False,
)
PREPROCESSING = default_preprocessing("squeezenet1_1", crop_px=32)


def trainee(encoder: str = "squeezenet1_1") -> Trainee:
    torch.manual_seed(0)
    sizes = DecoderConfig(
        feature_size=feature_size(encoder),
        vocabulary_size=len(VOCABULARY),
        hidden_size=6,
        embedding_size=5,
        attention_size=4,
    )
    return Trainee(EtENet(Encoder(encoder), Decoder(sizes)), PREPROCESSING, STAGE).double()


def examples(count: int) -> list[TrainingExample]:
    """Sentences of one to seven words."""
    return [
        TrainingExample(DatasetClip(row=n, video=str(n), captions=()), (" ".join("abcdefgh"[: 1 + n % 7]),))
        for n in range(count)
    ]


def load(batch: Sequence[TrainingExample]) -> tuple[Tensor, EncodedCaptions]:
    """Two frames per clip, a function of the clip's row."""
    side = PREPROCESSING.resize_px
    frames = [
        torch.randint(256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(e.clip.row))
        for e in batch
    ]
    return torch.stack(frames), EncodedCaptions.encode([e.captions for e in batch], VOCABULARY, 20)


def gradients_and_weights(count: int, micro_batch: int) -> dict[str, Tensor]:
    network = trainee()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    accumulate(network, examples(count), load, micro_batch=micro_batch, processes=Processes())
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    optimizer.step()
    return gradients | {name: p.detach().clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize(("count", "cuts"), [(512, (512, 64, 8)), (37, (37, 8, 5))])
def test_a_window_gives_the_same_gradients_and_weights_in_any_number_of_micro_batches(
    count: int, cuts: tuple[int, ...]
) -> None:
    whole, *others = (gradients_and_weights(count, micro_batch) for micro_batch in cuts)
    assert any("encoder" in name for name in whole)
    for other in others:
        assert other.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_accumulated_loss_is_the_sum_over_the_window() -> None:
    network, window = trainee(), examples(7)
    total = accumulate(network, window, load, micro_batch=3, processes=Processes())
    assert total == pytest.approx(network(*load(window)).sum().item(), rel=1e-9)


def test_the_host_waits_once_per_window_for_any_number_of_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these methods brings a number from a GPU to Python, and so waits for all work on the GPU."""
    waits: list[str] = []
    network = trainee()
    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def waiting(self: Tensor, *given: object, name: str = name, original: object = original) -> object:
            waits.append(name)
            return original(self, *given)  # type: ignore[operator]

        monkeypatch.setattr(Tensor, name, waiting)
    batches = {1: load(examples(4)[:1]), 4: load(examples(4))}  # in training, a thread has read them
    waits.clear()
    accumulate(network, examples(4), lambda some: batches[len(some)], micro_batch=1, processes=Processes())
    assert waits == ["item"]


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    network = trainee()
    with torch.no_grad():
        network.model.decoder.to_words.bias[0] = float("nan")
    with pytest.raises(UsageError, match=r"no longer finite; .* at a lower learning rate"):
        accumulate(network, examples(4), load, micro_batch=2, processes=Processes())


def test_the_attention_penalty_is_in_the_gradient() -> None:
    with_penalty = gradients_and_weights(4, 4)["gradient of model.decoder.attend_score.weight"]
    network = trainee()
    network.stage = replace(STAGE, attention_penalty=0.0)
    accumulate(network, examples(4), load, micro_batch=4, processes=Processes())
    assert not torch.allclose(network.model.decoder.attend_score.weight.grad, with_penalty)


@pytest.mark.parametrize("encoder", ["squeezenet1_1", "resnet18"])
def test_checkpointed_activations_give_the_same_gradients(encoder: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        network = trainee(encoder)
        if checkpointed:
            checkpoint_activations(network.model.encoder.network)
        accumulate(network, examples(3), load, micro_batch=3, processes=Processes())
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)
