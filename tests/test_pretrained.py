"""Published weights are loaded whole into their own network, or an error says why not. No test uses the internet."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pretrainedmodels
import pytest
import torch
from torch import Tensor
from torch.utils import model_zoo

from etenet.errors import UsageError
from etenet.model import libraries
from etenet.model.encoder import Encoder, encoder_names
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


@pytest.mark.parametrize("name", encoder_names())
def test_every_encoder_has_a_hash_and_takes_the_weights_that_it_is_given(name: str) -> None:
    library, network = libraries.library_of(name)
    for address in library.addresses(network):
        assert len(address.sha256) >= 8
        assert set(address.sha256) <= set("0123456789abcdef")
    fetch = model_zoo.load_url
    with torch.device("meta"), pytest.raises(RuntimeError, match="of_no_network"):
        Encoder(name, imagenet={"of_no_network": torch.zeros(1)})
    assert model_zoo.load_url is fetch
