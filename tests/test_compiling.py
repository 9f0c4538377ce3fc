"""A compiled network has the same gradients, and where torch's compiler fails, the network trains uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_step import STAGE, examples, load, trainee
from training.loop.compiling import CompiledForward
from training.loop.memory import checkpoint_activations
from training.loop.processes import Processes
from training.loop.step import Trainee, accumulate

# All of torch.compile but the writing of machine code, which takes minutes.
TRACED = partial(torch.compile, backend="aot_eager")


def gradients(network: Trainee) -> dict[str, Tensor]:
    accumulate(network, examples(7), load, micro_batch=3, processes=Processes())
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_or_not_the_gradients_are_the_same(checkpointing: bool) -> None:
    plain = trainee()
    expected, network = gradients(plain), trainee()
    if checkpointing:
        checkpoint_activations(network.model.encoder.network)
    compiled = Trainee(network.model, network.preprocessing, replace(STAGE, compiled=True), TRACED)
    computed = gradients(compiled)
    assert compiled.compiled is not None
    assert compiled.compiled.works
    assert compiled.compiled.compile_s > 0
    assert computed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(computed[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def counting(calls: list[tuple[int, ...]]) -> Callable[..., Any]:
    """A compiler that notes the shapes of the inputs."""

    def compiler(forward: Callable[[Tensor], Tensor], **_: object) -> Callable[[Tensor], Tensor]:
        def compiled(value: Tensor) -> Tensor:
            calls.append(tuple(value.shape))
            return forward(value)

        return compiled

    return compiler


def test_only_the_shape_that_comes_first_is_compiled() -> None:
    calls: list[tuple[int, ...]] = []
    network = nn.Linear(3, 2)
    forward = CompiledForward(network, network, counting(calls))
    for batch in (4, 4, 1, 4):
        value = torch.randn(batch, 3)
        assert torch.equal(forward(value), network(value))
    assert calls == [(4, 3)] * 4  # one more than were asked for: the trial run


def test_inference_is_not_compiled() -> None:
    calls: list[tuple[int, ...]] = []
    plain = trainee()
    network = Trainee(plain.model, plain.preprocessing, replace(STAGE, compiled=True), counting(calls))
    frames, _ = load(examples(2))
    with torch.no_grad():
        network.features(frames)
    network.eval()
    network.features(frames)
    assert not calls
    network.train()
    network.features(frames)
    assert calls


def failing(_forward: object, **_: object) -> Callable[[Tensor], Tensor]:
    def compiled(_value: Tensor) -> Tensor:
        raise RuntimeError("no compiler here\nand much more")

    return compiled


def unwilling(_forward: object, **_: object) -> Callable[[Tensor], Tensor]:
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize("compiler", [failing, unwilling])
def test_a_failing_compiler_is_reported_once_and_training_continues(
    compiler: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    expected, plain = gradients(trainee()), trainee()
    network = Trainee(plain.model, plain.preprocessing, replace(STAGE, compiled=True), compiler)
    computed = gradients(network)
    assert all(torch.equal(computed[name], gradient) for name, gradient in expected.items())
    error = capsys.readouterr().err
    assert error == "training: the encoder runs uncompiled: torch.compile fails here (no compiler here)\n"
    assert network.compiled is not None
    assert not network.compiled.works


def test_a_full_memory_is_not_taken_for_a_failing_compiler() -> None:
    def full(_forward: object, **_: object) -> Callable[[Tensor], Tensor]:
        raise torch.OutOfMemoryError("full")

    network = nn.Linear(3, 2)
    with pytest.raises(torch.OutOfMemoryError):
        CompiledForward(network, network, full)(torch.randn(4, 3))
