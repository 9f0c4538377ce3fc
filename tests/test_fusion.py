"""The fused encoder gives the features of the encoder from which it is made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from etenet.model.encoder import Encoder, default_preprocessing
from etenet.model.preprocess import preprocess
from etenet.runtime.cuda.fusion import FusedEncoder

# Between them: a padded first convolution, BGR up to 255, residuals with scales, sibling convolutions of size 1,
# BatchNorm before a convolution, a convolution that is called twice, BatchNorm with an activation, a first convolution
# that pads by the size of its input, normalisation inside the network, networks side by side
NETWORKS = {
    "inceptionresnetv2": 107,
    "squeezenet1_1": 64,
    "resnet18": 64,
    "bninception": 96,
    "densenet121": 64,
    "xception": 96,
    "timm:resnet10t": 64,
    "timm:tf_efficientnet_lite0": 65,
    "torchvision:googlenet": 64,
    "squeezenet1_1+resnet18": 64,
}


def randomised(name: str) -> Encoder:
    """An encoder with random values in every BatchNorm, so that one that is left out changes the features."""
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
def test_the_fused_encoder_gives_the_same_features(name: str) -> None:
    encoder, preprocessing = randomised(name), default_preprocessing(name, crop_px=NETWORKS[name])
    frames = torch.randint(0, 256, (2, preprocessing.resize_px, preprocessing.resize_px, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = encoder.double()(preprocess(frames, preprocessing).double())
        features = FusedEncoder(encoder, preprocessing).double()(frames)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_inception_resnet_loses_its_batch_norms_its_scales_and_a_fifth_of_its_convolutions() -> None:
    encoder = randomised("inceptionresnetv2")
    fused = FusedEncoder(encoder, default_preprocessing("inceptionresnetv2", crop_px=107))
    kinds = [type(module) for module in fused.modules()]
    assert nn.BatchNorm2d not in kinds
    assert isinstance(fused.normalise, nn.Identity)
    before = sum(isinstance(module, nn.Conv2d) for module in encoder.modules())
    assert kinds.count(nn.Conv2d) < 0.8 * before
    assert not [node for node in fused.network.graph.nodes if node.target is torch.mul]


def test_batch_norms_of_timm_that_hold_an_activation_are_folded_too() -> None:
    fused = FusedEncoder(randomised("timm:tf_efficientnet_lite0"), default_preprocessing("timm:tf_efficientnet_lite0"))
    called = [node.target for node in fused.network.graph.nodes]
    assert nn.functional.batch_norm not in called
    assert not [module for module in fused.network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [module for module in fused.network.modules() if isinstance(module, nn.ReLU6)]


def test_fusing_does_not_change_the_original() -> None:
    encoder = randomised("squeezenet1_1")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    FusedEncoder(encoder, default_preprocessing("squeezenet1_1", crop_px=64))
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)
