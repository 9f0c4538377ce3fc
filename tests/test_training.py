"""References of the demo world name what a clip shows, the loss is the paper's, and training runs end to end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import etenet
from benchmarks import two_stages
from etenet.errors import EtenetError, UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.vocabulary import EOS_ID, SOS_ID, Vocabulary
from etenet.video.sampling import sample_frames
from training import evaluate, prepare, recipes, ship, stills, train
from training.data.datasets import Dataset, DatasetClip, EncodedCaptions
from training.demo import world
from training.loop.loss import ATTENTION_PENALTY, sentence_losses
from training.loop.processes import Processes
from training.loop.stage import Run, train_stage

CLIPS = list(world.clips())


def test_the_world_is_as_large_as_promised() -> None:
    assert len(world.THINGS) >= 24
    assert len(world.MOTIONS) == len(world.SCENES) == 6


def test_whole_combinations_are_held_out_and_all_names_are_taught() -> None:
    splits = world.combinations_by_split()
    everything = [combination for split in splits.values() for combination in split]
    assert len(set(everything)) == len(everything) == 24 * 6 * 6
    for attribute in ("thing", "motion", "scene"):
        taught = {getattr(combination, attribute) for combination in splits["train"]}
        assert taught == {getattr(combination, attribute) for combination in everything}


@pytest.mark.long
def test_every_reference_names_its_own_combination_and_no_other() -> None:
    for clip in CLIPS:
        sentences = world.references(clip)
        assert len(set(sentences)) >= 5
        for sentence in sentences:
            assert world.named(sentence) == clip.combination, sentence


@pytest.mark.parametrize("caption", ["", "a dog and a cat are rising in the sky", "a man is playing a guitar"])
def test_what_a_caption_does_not_say_is_not_counted(caption: str) -> None:
    assert "" in dataclasses.astuple(world.named(caption))


def test_a_clip_is_a_function_of_its_seed() -> None:
    first, again, other = (
        np.stack(list(world.frames(clip, count=5, size_px=(64, 48)))) for clip in (CLIPS[0], CLIPS[0], CLIPS[1])
    )
    assert (first == again).all()
    assert (first != other).any()


def test_the_loss_is_equations_18_to_20_of_each_sentence_alone() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(feature_size=6, vocabulary_size=9, hidden_size=5, embedding_size=4, attention_size=3)
    decoder, vocabulary = Decoder(config).double(), Vocabulary(list("abcdef"))
    features = torch.randn(2, 16, 6, dtype=torch.float64)
    captions = [["a b c d", "f"], ["e e", "a b c d e f"]]
    losses = sentence_losses(decoder, features, EncodedCaptions.encode(captions, vocabulary, 20))
    for clip, of_clip in enumerate(captions):
        for number, caption in enumerate(of_clip):
            memory = decoder.prepare(features[clip : clip + 1])
            state, nll, attended = decoder.first_state(memory), 0.0, torch.zeros(16, dtype=torch.float64)
            ids = vocabulary.encode(caption)
            for previous, target in zip([SOS_ID, *ids], [*ids, EOS_ID], strict=True):
                step = decoder.step(torch.tensor([[previous]]), state, memory)
                state, attended = step.state, attended + step.attention[0, 0]
                nll -= step.log_probs[0, 0, target].item()
            penalty = ((1 - attended) ** 2).sum().item() / 16
            assert losses[clip, number].item() == pytest.approx(nll + ATTENTION_PENALTY * penalty, abs=1e-9)


def test_sentences_longer_than_the_limit_are_cut_and_still_end() -> None:
    sentences = EncodedCaptions.encode([["a b c d e"]], Vocabulary(list("abcde")), 3)
    assert sentences.target.tolist() == [[[3, 4, 5, EOS_ID]]]
    assert sentences.previous.tolist() == [[[SOS_ID, 3, 4, 5]]]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo dataset of few clips, prepared by the real code."""
    folder = tmp_path_factory.mktemp("demo")
    first = CLIPS[0].combination
    few = [
        dataclasses.replace(CLIPS[n], combination=first, split=s)
        for n, s in enumerate(3 * ["train"] * 2 + ["validation", "test"] * 3)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "clips", lambda **_: iter(few))
        assert prepare.main(["demo", "--out", str(folder)]) == 0
    return folder


def test_the_whole_trainer_runs_and_learns(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipes.demo()
    short = dataclasses.replace(
        recipe,
        dropout=0.0,
        stills=dataclasses.replace(recipe.stills, steps=3, batch=8),
        stages={
            number: dataclasses.replace(
                stage, epochs=3, batch_clips=1, accumulation_steps=2, warmup_steps=0, meteor=number == 2
            )
            for number, stage in recipe.stages.items()
        },
    )
    monkeypatch.setitem(recipes.RECIPES, "demo", lambda: short)
    run, data = tmp_path / "run", ["--data", str(miniature)]
    stills.main(["demo", *data, "--out", str(run / "encoder.pt")])
    train.main(["demo", "--stage", "1", *data, "--out", str(run), "--encoder-weights", str(run / "encoder.pt")])
    train.main(["demo", "--stage", "2", *data, "--out", str(run)])
    for stage in (1, 2):
        folder = run / f"stage{stage}"
        epochs = [line for line in lines(folder / "log.jsonl") if line["kind"] == "epoch"]
        assert [line["epoch"] for line in epochs] == ([1, 2, 3] if stage == 1 else [0, 1, 2, 3])
        assert epochs[-1]["train_loss"] < 0.95 * epochs[-3]["train_loss"]
        assert set(epochs[0]["scores"]) == {"CIDEr", "BLEU-4", "ROUGE-L"} | ({"METEOR"} if stage == 2 else set())
        best = max(epochs, key=lambda line: (line["scores"]["CIDEr"], -line["validation_loss"]))
        made = checkpoints.load(folder / "best.pt").provenance
        assert (made["recipe"], made["stage"], made["epoch"]) == ("demo", stage, best["epoch"])
        assert (made["scores"], made["data"]) == (best["scores"], Dataset.load(miniature).digest())
        steps = [line for line in lines(folder / "log.jsonl") if line["kind"] == "step"]
        assert all(line["gradient_norm"] > 0 for line in steps)
        assert all(("encoder_learning_rate" in line) == (stage == 2) for line in steps)
        assert json.loads((folder / "recipe.json").read_text())["settings"]["dropout"] == 0
        assert all(line["peak_memory_bytes"] > 0 and line["clips_per_s"] > 0 for line in lines(folder / "speed.jsonl"))
        assert (folder / "curves.png").is_file()
    frozen, learned = (checkpoints.load(run / f"stage{n}" / "best.pt").model.encoder.state_dict() for n in (1, 2))
    given = torch.load(run / "encoder.pt", weights_only=True)
    assert all(torch.equal(frozen[name], given[name]) for name in given)
    assert any(not torch.equal(learned[name], given[name]) for name in given)

    capsys.readouterr()
    evaluate.main(
        ["--checkpoint", str(run / "stage2" / "best.pt"), *data, "--device", "cpu", "--out", str(run / "test")]
    )
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["clips"] == 3
    assert set(metrics["right"]) == {"thing", "motion", "scene", "all"}
    assert set(metrics["scores"]) >= {"BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    assert (run / "test" / "report.html").read_text().count("<article>") == 3
    captioner = etenet.load(run / "stage2" / "best.pt")
    for line in lines(run / "test" / "captions.jsonl"):
        body = (miniature / "clips" / f"{line['video']}.mp4").read_bytes()
        assert captioner.caption(body).text == line["caption"]
    (run / "examples" / "real").mkdir(parents=True)
    kept, old = run / "examples" / "real" / "dog.mp4", run / "examples" / "old.mp4"
    for path in (kept, old):
        path.write_bytes(b"")
    ship.main(["--run", str(run), *data, "--checkpoint", str(run / "demo.pt"), "--examples", str(run / "examples")])
    assert etenet.load(run / "demo.pt").encoder == "squeezenet1_1"
    assert (kept.exists(), old.exists()) == (True, False)


@pytest.mark.long
def test_stage_2_is_measured_beside_its_controls_with_every_seed(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.demo()
    stages = {n: dataclasses.replace(stage, epochs=1, meteor=False) for n, stage in recipe.stages.items()}
    monkeypatch.setitem(recipes.RECIPES, "demo", lambda: dataclasses.replace(recipe, stages=stages))
    weights = tmp_path / "encoder.pt"
    stills.main(["demo", "--data", str(miniature), "--out", str(weights), "--set", "steps=1", "--set", "batch=4"])
    runs = tmp_path / "runs"
    given = ["--data", str(miniature), "--encoder-weights", str(weights), "--runs", str(runs)]
    two_stages.main(["demo", *given, "--seeds", "3", "4", "--out", str(tmp_path / "results")])
    record = json.loads((tmp_path / "results" / "two_stages_demo.json").read_text())
    assert record["epochs"] == {"1": 1, "2": 1}
    assert list(record["scores_by_seed"]) == ["3", "4"]
    for of_seed in record["scores_by_seed"].values():
        assert list(of_seed) == ["stage 1", "encoder frozen", "encoder at 1e-9", "stage 2"]
        assert all({"CIDEr", "METEOR", "thing right %"} <= scores.keys() for scores in of_seed.values())
    over = [of["stage 2"]["CIDEr"] - of["encoder frozen"]["CIDEr"] for of in record["scores_by_seed"].values()]
    gain = record["cider_over_the_control"]["stage 2"]
    assert gain == {"mean": pytest.approx(sum(over) / 2), "spread": pytest.approx(abs(over[0] - over[1]))}
    for arms in record["validation_cider_by_seed"].values():
        assert {arm: len(epochs) for arm, epochs in arms.items()} == {
            "stage 1": 1,
            "encoder frozen": 2,
            "encoder at 1e-9": 2,
            "stage 2": 2,
        }
        assert all(epochs[0] == arms["stage 1"][0] for arm, epochs in arms.items() if arm != "stage 1")
    assert set(record["last_validation_cider_over_the_control"]) == {"stage 1", "encoder at 1e-9", "stage 2"}
    rates = [
        [
            line.get("encoder_learning_rate")
            for line in lines(runs / "seed3" / arm / "log.jsonl")
            if line["kind"] == "step"
        ]
        for arm in ("encoderfrozen", "encoderat1e-9", "stage2")
    ]
    assert [len(of_arm) for of_arm in rates] == [len(rates[0])] * 3
    assert [of_arm[-1] and of_arm[-1] > 1e-8 for of_arm in rates] == [None, False, True]


def test_a_shipped_checkpoint_can_keep_a_share_of_the_start_of_the_last_stage(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    start = checkpoints.load(small_checkpoint)
    for stage, factor in ((1, 1.0), (3, 3.0)):
        weights = {
            name: value * factor if value.is_floating_point() else value
            for name, value in start.model.state_dict().items()
        }
        start.model.load_state_dict(weights)
        (tmp_path / f"stage{stage}").mkdir()
        checkpoints.save(start, tmp_path / f"stage{stage}" / "best.pt")
    shipped = tmp_path / "mixed.pt"
    ship.main(["--run", str(tmp_path), "--checkpoint", str(shipped), "--start-share", "0.25", "--terms", "for a test"])
    mixed = checkpoints.load(shipped)
    assert (mixed.name, mixed.terms, mixed.provenance) == ("mixed", "for a test", {"start_share": 0.25})
    for name, value in checkpoints.load(small_checkpoint).model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(mixed.model.state_dict()[name], value * 2.5, rtol=2e-3, atol=1e-4)
    with pytest.raises(UsageError, match="start-share must be from 0 to 1"):
        ship.main(["--run", str(tmp_path), "--checkpoint", str(shipped), "--start-share", "1"])
    shutil.rmtree(tmp_path / "stage3")
    with pytest.raises(UsageError, match=r"has no stage3/best\.pt to mix its start into; train stage 3, or leave out"):
        ship.main(["--run", str(tmp_path), "--checkpoint", str(shipped), "--start-share", "0.25"])


def test_what_cannot_be_shipped_leaves_the_shipped_one_as_it_was(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stage1").mkdir()
    shutil.copyfile(small_checkpoint, tmp_path / "stage1" / "best.pt")
    shipped = tmp_path / "store" / "demo.pt"
    command = ["--run", str(tmp_path), "--checkpoint", str(shipped)]
    ship.main(command)
    before = shipped.read_bytes()
    refused = rf"^{shipped} would have \d+ bytes, more than 1000; raise --max-bytes, or train a smaller encoder$"
    with pytest.raises(EtenetError, match=refused):
        ship.main([*command, "--max-bytes", "1000", "--terms", "others than before"])
    assert shipped.read_bytes() == before
    own = Dataset(tmp_path / "own", {"test": [DatasetClip(0, "dog.mp4", ("a dog",))]}, None)
    monkeypatch.setattr(Dataset, "load", lambda _: own)
    with pytest.raises(UsageError, match=rf"^{tmp_path}/own is not of the demo world, whose clips say what is in them"):
        ship.main([*command, "--data", str(own.folder), "--terms", "others than before"])
    assert shipped.read_bytes() == before
    assert list(shipped.parent.iterdir()) == [shipped]


def test_a_mirrored_example_trains_like_its_mirror_image_and_nothing_needs_java(
    miniature: Path, tmp_path: Path, java_as: Callable[[str], None]
) -> None:
    java_as("exit 1")
    recipe, dataset = recipes.demo(), Dataset.load(miniature)
    pictures = np.array(dataset.frames)
    pictures[[clip.row for clip in dataset.clips["train"]]] = pictures[
        [c.row for c in dataset.clips["train"]], ..., ::-1, :
    ]
    looked_at = {
        "straight": (dataset, 0.0),
        "mirrored": (dataset, 1.0),
        "mirror images": (dataclasses.replace(dataset, frames=pictures), 0.0),
    }
    learned = {}
    for name, (clips, share) in looked_at.items():
        stage = dataclasses.replace(
            recipe.stages[2], epochs=1, batch_clips=3, mirrored_share=share, tokenizer="none", meteor=False
        )
        run = Run(
            recipe=dataclasses.replace(recipe, stages={2: stage}),
            stage_number=2,
            dataset=clips,
            folder=tmp_path / name,
            processes=Processes(),
        )
        torch.manual_seed(0)
        start = checkpoints.initialise(recipe.encoder, dataset.vocabulary(), crop_px=recipe.crop_px)
        best = train_stage(run, start)
        learned[name] = torch.load(best, weights_only=True)["weights"]["encoder.network.features.0.weight"]
    torch.testing.assert_close(learned["mirrored"], learned["mirror images"], rtol=0, atol=0)
    assert not torch.equal(learned["mirrored"], learned["straight"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_frame_cache_holds_what_serving_sees(miniature: Path) -> None:
    dataset = Dataset.load(miniature)
    for clip in dataset.clips["test"]:
        sampled = sample_frames(dataset.clip_file(clip).read_bytes(), resize_px=118).frames
        np.testing.assert_array_equal(dataset.frames[clip.row], sampled)
