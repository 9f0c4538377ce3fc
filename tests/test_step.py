"""One optimizer step: the gradients do not depend on the micro-batches or on recomputed activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from etenet.errors import UsageError
from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.encoder import Encoder, default_preprocessing, feature_size
from etenet.model.etenet import EtENet
from etenet.model.vocabulary import Vocabulary
from training.data.datasets import DatasetClip, EncodedCaptions
from training.loop.averaging import WeightAverage
from training.loop.memory import checkpoint_activations
from training.loop.optimizer import clip_gradients
from training.loop.order import TrainingExample
from training.loop.processes import Processes
from training.loop.step import Trainee, accumulate
from training.run_settings import Stage

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


@pytest.mark.parametrize(("count", "cuts"), [pytest.param(512, (512, 64, 8), marks=pytest.mark.long), (37, (37, 8, 5))])
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


def test_smoothed_labels_are_those_of_cross_entropy_in_training_and_whole_in_validation() -> None:
    network = trainee()
    network.stage = replace(STAGE, label_smoothing=0.2, attention_penalty=0.0)
    frames, sentences = load(examples(3))
    smoothed = network(frames, sentences)
    decoder, features = network.model.decoder, network.features(frames)
    memory = decoder.prepare(features)
    for smoothing, losses in ((0.2, smoothed), (0.0, network.eval().losses(features, sentences))):
        state, expected = decoder.first_state(memory), torch.zeros(3, 1, dtype=torch.float64)
        for word in range(sentences.previous.shape[-1]):
            step = decoder.step(sentences.previous[..., word], state, memory)
            state, target = step.state, sentences.target[:, 0, word]
            of_word = nn.functional.cross_entropy(
                step.log_probs[:, 0], target, label_smoothing=smoothing, reduction="none"
            )
            expected[:, 0] += of_word * sentences.mask[:, 0, word]
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)


def test_gradients_are_clipped_by_norm_and_by_value_and_the_norm_before_is_known() -> None:
    for settings, expected in (
        ({"gradient_clip_value": 0.0}, [3.0, -4.0]),
        ({"gradient_clip_value": 2.0}, [2.0, -2.0]),
        ({"gradient_clip_value": 0.0, "gradient_clip_norm": 1.0}, [0.6, -0.8]),
        ({"gradient_clip_value": 0.7, "gradient_clip_norm": 1.0}, [0.6, -0.7]),
        ({"gradient_clip_value": 0.0, "gradient_clip_norm": 9.0}, [3.0, -4.0]),
    ):
        weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        for weight, gradient in zip(weights, (3.0, -4.0), strict=True):
            weight.grad = torch.tensor([gradient])
        assert clip_gradients(weights, replace(STAGE, **settings)) == 5
        assert [weight.grad.item() for weight in weights] == pytest.approx(expected, abs=1e-5)  # type: ignore[union-attr]


def test_the_average_of_the_weights_stands_in_for_them_and_follows_them() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    average, expected = WeightAverage({"w": weight}, 0.9), weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            weight += torch.tensor([1.0, -1.0])
        average.update(step)
        decay = min(0.9, step / (step + 9))
        expected = decay * expected + (1 - decay) * weight.detach()
    own = weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), own)
    again = WeightAverage({"w": weight}, 0.9)
    again.restore({name: value.clone() for name, value in average.average.items()})
    with again.applied():
        torch.testing.assert_close(weight.detach(), expected)
    off = WeightAverage({"w": weight}, 0.0)
    off.update(1)
    with off.applied():
        assert torch.equal(weight.detach(), own)


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
