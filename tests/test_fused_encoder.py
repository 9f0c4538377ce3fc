"""The network as a GPU computes it gives the features of the network as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from etenet.model.encoder import Encoder, default_preprocessing
from etenet.model.preprocess import preprocess
from etenet.runtime.fusion import FusedEncoder

# A padded first convolution, BGR and 0..255, residuals with scales, siblings of size 1, BatchNorm before convolution,
# a convolution that is called twice
NETWORKS = {
    "inceptionresnetv2": 107,
    "squeezenet1_1": 64,
    "resnet18": 64,
    "bninception": 96,
    "densenet121": 64,
    "xception": 96,
}


def randomised(name: str) -> Encoder:
    """No BatchNorm and no bias that leaves things as they are."""
    torch.manual_seed(0)
    encoder = Encoder(name).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return encoder


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_network_does(name: str) -> None:
    encoder, how = randomised(name), default_preprocessing(name, crop_px=NETWORKS[name])
    frames = torch.randint(0, 256, (2, how.resize_px, how.resize_px, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = encoder.double()(preprocess(frames, how).double())
        found = FusedEncoder(encoder, how).double()(frames)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_inception_resnet_loses_its_batch_norms_its_scales_and_a_fifth_of_its_convolutions() -> None:
    encoder = randomised("inceptionresnetv2")
    fused = FusedEncoder(encoder, default_preprocessing("inceptionresnetv2", crop_px=107))
    kinds = [type(module) for module in fused.modules()]
    assert nn.BatchNorm2d not in kinds
    assert isinstance(fused.normalise, nn.Identity)
    before = sum(isinstance(module, nn.Conv2d) for module in encoder.modules())
    assert kinds.count(nn.Conv2d) < 0.8 * before
    assert not [node for node in fused.network.graph.nodes if node.target is torch.mul]


def test_the_network_that_it_is_made_of_stays_as_it_is() -> None:
    encoder = randomised("squeezenet1_1")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    FusedEncoder(encoder, default_preprocessing("squeezenet1_1", crop_px=64))
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)
