"""Features are those of pretrainedmodels' own network, averaged, and BatchNorm never changes."""

from __future__ import annotations

import pretrainedmodels
import pytest
import torch
from torch import nn

from etenet.errors import UsageError
from etenet.model.encoder import Encoder, default_preprocessing, encoder_names, feature_size


@pytest.mark.filterwarnings("ignore:.*pretrained.*:UserWarning", "ignore:.*weight enum.*:UserWarning")
@pytest.mark.parametrize(
    ("name", "size"), [("inceptionresnetv2", 1536), ("squeezenet1_1", 512), ("resnet18", 512), ("bninception", 1024)]
)
def test_features_are_the_networks_own_averaged_over_the_picture(name: str, size: int) -> None:
    torch.manual_seed(0)
    encoder = Encoder(name).eval()
    network = getattr(pretrainedmodels, name)(num_classes=1000, pretrained=None).eval()
    network.load_state_dict(encoder.network.state_dict(), strict=False)
    frames = torch.randn(2, *pretrainedmodels.pretrained_settings[name]["imagenet"]["input_size"])
    with torch.no_grad():
        features = encoder(frames)
        expected = network.features(frames).mean(dim=(2, 3))
        if name == "inceptionresnetv2":
            torch.testing.assert_close(expected, network.avgpool_1a(network.features(frames)).flatten(1))
    assert features.shape == (2, size)
    assert feature_size(name) == size
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_batch_norm_is_frozen_in_every_mode() -> None:
    encoder = Encoder("resnet18").requires_grad_(False).requires_grad_(True).train()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in encoder.parameters() if p.requires_grad), lr=0.1)
    encoder(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    for norm in norms:
        assert not norm.training
    names = {name for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, value in encoder.state_dict().items():
        is_of_batch_norm = name.rpartition(".")[0] in names
        assert torch.equal(value, before[name]) == is_of_batch_norm, name


@pytest.mark.parametrize("name", encoder_names())
def test_every_listed_encoder_can_be_built(name: str) -> None:
    assert feature_size(name) in (512, 832, 1024, 1056, 1536, 1664, 1920, 2048, 2208, 2688, 4032, 4320)
    assert default_preprocessing(name).crop_px >= 224


def test_inception_preprocessing_is_the_papers() -> None:
    preprocessing = default_preprocessing("inceptionresnetv2")
    assert (preprocessing.resize_px, preprocessing.crop_px) == (314, 299)
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert (preprocessing.input_max, preprocessing.channels) == (1.0, "RGB")


def test_other_input_sizes_keep_the_ratio_of_resizing_to_cropping() -> None:
    assert default_preprocessing("squeezenet1_1").resize_px == round(224 * 314 / 299)


def test_the_error_for_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="inceptionresnetv2"):
        Encoder("resnet17")
    assert {"inceptionresnetv2", "squeezenet1_1"} <= set(encoder_names())
