"""Features are those of the library's own network, pooled as it pools them, and BatchNorm never changes."""

from __future__ import annotations

import pretrainedmodels
import pytest
import timm
import torch
import torchvision
from torch import nn

from etenet.errors import UsageError
from etenet.model.encoder import Encoder, default_preprocessing, feature_size
from etenet.model.libraries import PRETRAINEDMODELS


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


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "test_vit"])
def test_features_of_timm_are_what_timm_gives_without_a_classifier(name: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(f"timm:{name}").eval()
    network = timm.create_model(name, num_classes=1000).eval()
    network.load_state_dict(encoder.network.state_dict(), strict=False)
    network.reset_classifier(0)
    frames = torch.randn(2, 3, *(160, 160) if name == "test_vit" else (65, 65))
    with torch.no_grad():
        features = encoder(frames)
        assert torch.equal(features, network(frames))
    assert feature_size(f"timm:{name}") == features.shape[1] == network.num_features


def test_features_of_googlenet_are_what_torchvision_gives_to_its_classifier() -> None:
    torch.manual_seed(0)
    encoder, given = Encoder("torchvision:googlenet").eval(), []
    network = torchvision.models.GoogLeNet(transform_input=True, init_weights=False).eval()
    network.load_state_dict(encoder.network.state_dict(), strict=False)
    network.fc.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pixels = torch.rand(2, 3, 64, 64)  # of 0 to 1
    documented = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()
    normalised = torchvision.transforms.functional.normalize(pixels, documented.mean, documented.std)
    preprocessing = default_preprocessing("torchvision:googlenet")
    assert (list(preprocessing.mean), list(preprocessing.std)) == (documented.mean, documented.std)
    with torch.no_grad():
        network(normalised)
        assert torch.equal(encoder.train()(normalised), given[0])  # also without its classifier's dropout
    assert feature_size("torchvision:googlenet") == 1024


# Between them: BatchNorm alone, BatchNorm with an activation, normalisation inside the network, networks side by side
@pytest.mark.parametrize(
    "name", ["resnet18", "timm:test_efficientnet", "torchvision:googlenet", "resnet18+timm:test_efficientnet"]
)
def test_batch_norm_is_frozen_in_every_mode(name: str) -> None:
    encoder = Encoder(name).requires_grad_(False).requires_grad_(True).train()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in encoder.parameters() if p.requires_grad), lr=0.1)
    encoder(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    for norm in norms:
        assert not norm.training
    names = {name for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, value in encoder.state_dict().items():
        is_of_batch_norm = name.rpartition(".")[0] in names
        assert torch.equal(value, before[name]) == is_of_batch_norm, name


@pytest.mark.parametrize("name", PRETRAINEDMODELS.names())
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


@pytest.mark.parametrize("name", ["resnet10t", "inception_resnet_v2", "test_vit", "resnet18.a1_in1k"])
def test_preprocessing_of_timm_is_its_own(name: str) -> None:
    settings = timm.get_pretrained_cfg(name)
    preprocessing = default_preprocessing(f"timm:{name}")
    assert (preprocessing.mean, preprocessing.std) == (settings.mean, settings.std)
    assert (3, preprocessing.crop_px, preprocessing.crop_px) == settings.input_size
    assert preprocessing.resize_px == round(preprocessing.crop_px * 314 / 299)


@pytest.mark.parametrize(
    ("name", "crop_px", "message"),
    [
        ("timm:tf_efficientnet_lite9", None, "did you mean timm:tf_efficientnet_lite"),
        ("timm:hf-hub:timm/resnet18", None, "libraries are timm, torchvision"),
        ("timm:resnet18.of_nobody", None, "no such network"),
        ("torchvision:resnet18", None, "torchvision:googlenet"),
        ("keras:resnet18", None, "libraries are timm, torchvision"),
        ("timm:test_vit", 128, "set crop_px to 160"),
        ("resnet18+timm:test_vit", None, "set crop_px to 160"),
        ("resnet18+resnet17", None, "unknown encoder 'resnet17'"),
        ("resnet18+", None, "unknown encoder ''"),
        ("resnet18+timm:tf_efficientnet_lite0", None, "lite0 takes frames that are normalised in another way"),
    ],
)
def test_the_error_for_what_no_library_has_is_one_line_with_the_fix(
    name: str, crop_px: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        default_preprocessing(name, crop_px=crop_px)
    assert "\n" not in str(caught.value)


def test_an_encoder_whose_weights_are_assigned_has_all_that_its_state_dict_lacks() -> None:
    """Indices of positions, which timm keeps in buffers that are not saved."""
    torch.manual_seed(0)
    encoder, unloaded = Encoder("timm:test_vit_relpos").eval(), Encoder.unloaded("timm:test_vit_relpos").eval()
    unloaded.load_state_dict(encoder.state_dict(), assign=True)
    frames = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(unloaded(frames), encoder(frames))
    assert next(Encoder.unloaded("timm:test_efficientnet").parameters()).is_meta


def test_the_error_for_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="inceptionresnetv2"):
        Encoder("resnet17")
    assert {"inceptionresnetv2", "squeezenet1_1"} <= set(PRETRAINEDMODELS.names())
