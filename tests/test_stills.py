"""Stills train BatchNorm and its statistics, and both stay as they are when frozen."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from etenet.errors import CannotWrite, UsageError
from etenet.model.encoder import Encoder
from etenet.model.preprocess import preprocess
from etenet.model.pretrained import load_encoder
from tests.test_snapshots import files_no_larger_than
from training import recipes, stills
from training.data.datasets import Dataset, DatasetClip
from training.demo import world
from training.recipes import overridden
from training.run_settings import Stills

THINGS, SCENES = ("balloon", "bus", "octopus"), ("beach", "meadow")
RECIPE = replace(
    recipes.demo(),
    encoder="resnet18",
    crop_px=48,
    stills=Stills(steps=60, batch=24, learning_rate=2e-3, weight_decay=1e-4),
)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """A part of the demo world with little motion, without files."""
    side, clips, frames = RECIPE.preprocessing().resize_px, {"train": [], "validation": []}, []
    for clip in world.clips(train_per_combination=12, held_out_per_combination=6):
        what = clip.combination
        if what.thing in THINGS and what.scene in SCENES and what.motion in ("standing", "bouncing"):
            split = "validation" if clip.seed % 6 == 0 else "train"
            labels = {"thing": what.thing, "scene": what.scene}
            clips[split].append(DatasetClip(row=len(frames), video=clip.name, captions=("a",), labels=labels))
            frames.append(np.stack(list(world.frames(clip, count=16, size_px=(side, side)))))
    return Dataset(Path(), clips, np.stack(frames))


def norms(encoder: Encoder) -> list[nn.BatchNorm2d]:
    return [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def features_of(encoder: Encoder, dataset: Dataset, clips: list[DatasetClip]) -> torch.Tensor:
    """Features (B, L, D)."""
    return encoder(preprocess(dataset.frames_of(clips), RECIPE.preprocessing()).flatten(0, 1)).view(len(clips), 16, -1)


@pytest.mark.long
def test_batch_norm_learns_and_its_statistics_serve_when_frozen(
    dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    taught = stills.teach(dataset, RECIPE, torch.device("cpu"))
    assert all(norm.running_mean.abs().max() > 0.01 for norm in norms(taught))
    assert all((norm.weight != 1).any() and (norm.bias != 0).any() for norm in norms(taught))
    (shares,) = re.findall(r"step 60: .*thing ([\d.]+)%, scene ([\d.]+)%", capfd.readouterr().err)
    assert min(map(float, shares)) > 70  # by chance, 33 % of things

    torch.save(taught.state_dict(), tmp_path / "encoder.pt")
    frozen = load_encoder("resnet18", tmp_path / "encoder.pt").train()
    train, unseen = dataset.clips["train"], dataset.clips["validation"]
    centres = torch.stack(
        [features_of(frozen, dataset, [c for c in train if c.labels["thing"] == t]).mean((0, 1)) for t in THINGS]
    )
    named = torch.cdist(features_of(frozen, dataset, unseen), centres).argmin(-1)
    right = torch.tensor([THINGS.index(clip.labels["thing"]) for clip in unseen])
    assert (named == right[:, None]).float().mean() > 0.6
    for before, after in zip(norms(taught), norms(frozen), strict=True):
        assert torch.equal(before.running_var, after.running_var)


def test_a_recipe_that_starts_from_imagenet_has_no_stills(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="starts from ImageNet; choose one that has stills"):
        stills.teach(dataset, recipes.msvd(), torch.device("cpu"))


def test_data_without_labels_or_of_another_size_is_named(dataset: Dataset) -> None:
    own = {split: [replace(clip, labels={}) for clip in clips] for split, clips in dataset.clips.items()}
    with pytest.raises(UsageError, match="is not of the demo world, whose clips say what is in them; make one with"):
        stills.teach(replace(dataset, clips=own), RECIPE, torch.device("cpu"))
    with pytest.raises(UsageError, match=r"has frames of 50 pixels, the encoder takes 101; prepare it again"):
        stills.teach(dataset, replace(RECIPE, crop_px=96), torch.device("cpu"))


def test_stills_have_settings_too() -> None:
    changed = overridden(recipes.demo(), "stills", ["steps=7", "encoder=resnet18"])
    assert (changed.stills.steps, changed.encoder) == (7, "resnet18")
    assert changed.stages == recipes.demo().stages
    with pytest.raises(UsageError, match="no field 'epochs'; choose one of steps, "):
        overridden(recipes.demo(), "stills", ["epochs=7"])


def test_the_encoder_is_written_as_a_whole_or_not_at_all(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, out = Encoder("squeezenet1_1"), tmp_path / "deep" / "encoder.pt"
    monkeypatch.setattr(Dataset, "load", lambda _: dataset)
    monkeypatch.setattr(stills, "teach", lambda *_: encoder)
    command = ["demo", "--data", str(tmp_path), "--out"]
    stills.main([*command, str(out)])
    for name, value in load_encoder("squeezenet1_1", out).state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name])
    before = out.read_bytes()
    with files_no_larger_than(1000), pytest.raises(CannotWrite, match=rf"^cannot write {out}: File too large; "):
        stills.main([*command, str(out)])
    assert out.read_bytes() == before
    monkeypatch.delattr(stills, "teach")
    with pytest.raises(CannotWrite, match=rf"^cannot write {tmp_path}: it is no regular file; "):
        stills.main([*command, str(tmp_path)])
