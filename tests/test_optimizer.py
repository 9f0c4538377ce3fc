"""The learning rate of each part of the network."""

from __future__ import annotations

from dataclasses import replace

import pytest

from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.encoder import Encoder
from etenet.model.etenet import EtENet
from training import recipes
from training.loop.optimizer import adam, set_learning_rates
from training.run_settings import Stage


def network(projection_size: int) -> EtENet:
    config = DecoderConfig(feature_size=512, vocabulary_size=9, projection_size=projection_size)
    return EtENet(Encoder("squeezenet1_1"), Decoder(config))


def rates_of(network: EtENet, stage: Stage, *, step: int) -> dict[str, float]:
    """By the name of the weights, of 100 steps."""
    optimizer = adam(network, stage)
    logged = set_learning_rates(optimizer, stage, step=step, steps=100)
    of_weights = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    rates = {
        name: of_weights.pop(id(weight)) for name, weight in network.named_parameters() if id(weight) in of_weights
    }
    assert not of_weights
    assert logged["learning_rate"] == rates["decoder.to_words.weight"]
    assert logged.get("encoder_learning_rate") == next(iter(rate for n, rate in rates.items() if "encoder" in n), None)
    return rates


@pytest.mark.parametrize("step", [0, 50])
def test_encoder_decoder_and_projection_have_rates_of_their_own(step: int) -> None:
    stage = replace(
        recipes.demo().stages[2],
        warmup_steps=0,
        encoder_learning_rate=1e-4,
        decoder_learning_rate=1e-3,
        projection_rate_share=0.1,
    )
    rates = rates_of(network(8), stage, step=step)
    assert {name.split(".")[0] for name in rates} == {"encoder", "decoder"}
    full = rates["decoder.to_words.weight"]
    assert (full == 1e-3) == (step == 0)
    for name, rate in rates.items():
        share = 0.1 if "decoder.project." in name or "encoder." in name else 1.0
        assert rate == pytest.approx(share * full), name


def test_a_frozen_encoder_has_no_rate_and_no_projection_needs_none() -> None:
    model, stage = network(0), recipes.demo().stages[1]
    assert rates_of(model, stage, step=0).keys() == {
        f"decoder.{name}" for name, _ in model.get_submodule("decoder").named_parameters()
    }
