"""A stage starts from what the one before it left, is never worse than that, and says in one line what is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from etenet.errors import EtenetError, JavaError, UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.confidence import FEATURES, Calibration
from etenet.model.minimum_risk import MinimumRisk
from etenet.model.vocabulary import EOS_ID, SOS_ID, Vocabulary
from tests.conftest import REPOSITORY
from tests.test_step import PREPROCESSING, trainee
from training import command, recipes, train
from training.data.datasets import Dataset, DatasetClip
from training.loop import processes as process
from training.loop import snapshots
from training.loop.features import cached_features
from training.loop.loading import Loader
from training.loop.memory import out_of_memory_named
from training.loop.order import TrainingExample
from training.loop.processes import Processes, init_processes
from training.loop.start import continued, log_frequencies, next_checkpoint, stage_before, with_settings
from training.loop.views import numbered_view, seen

QUICK = ("batch_clips=4", "epochs=1", "hidden_size=8", "embedding_size=6", "attention_size=5", "projection=4")


def arguments(data: Path, out: Path, stage: int, *settings: str, options: tuple[str, ...] = ()) -> list[str]:
    sets = [argument for setting in settings for argument in ("--set", setting)]
    return ["real", "--stage", str(stage), "--data", str(data), "--out", str(out), *options, *sets]


def run(data: Path, out: Path, stage: int, *settings: str, options: tuple[str, ...] = ()) -> int:
    return train.main(arguments(data, out, stage, *settings, options=options))


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because libraries that other tests load have signal handling of their own."""
    command_line = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command_line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def first(features_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after stage 1."""
    out = tmp_path_factory.mktemp("first")
    run(features_dataset, out, 1, *QUICK)
    return out


def epochs(folder: Path) -> list[dict[str, object]]:
    every = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == "epoch"]


def test_a_stage_that_learns_nothing_keeps_its_start(first: Path, features_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "run")
    run(features_dataset, tmp_path / "run", 3, "epochs=1", "batch_clips=4", "decoder_learning_rate=0.0")
    assert [(line["epoch"], line["best"]) for line in epochs(tmp_path / "run" / "stage3")] == [(0, True), (1, False)]
    start, kept = (checkpoints.load(tmp_path / "run" / s / "best.pt", with_encoder=False) for s in ("stage1", "stage3"))
    for name, value in start.model.decoder.state_dict().items():
        assert torch.equal(value, kept.model.decoder.state_dict()[name])
    assert (kept.provenance["stage"], kept.provenance["epoch"]) == (3, 0)


def test_a_calibrated_start_is_validated_as_what_the_stage_saves(
    first: Path, features_dataset: Path, tmp_path: Path
) -> None:
    start, calibrated = first / "stage1" / "best.pt", tmp_path / "calibrated.pt"
    calibration = Calibration(weights=dict.fromkeys(FEATURES, 0.0), bias=0.0, beam_size=5)
    unlikely = MinimumRisk(typical=np.zeros(8, np.float32), prior_weight=100.0)
    checkpoints.calibrate(start, calibrated, calibration, unlikely, {})
    for out, file in (("plain", start), ("other", calibrated)):
        settings = ("epochs=1", "batch_clips=16", "decoder_learning_rate=0.0")
        run(features_dataset, tmp_path / out, 3, *settings, options=("--from", str(file)))
    assert epochs(tmp_path / "other" / "stage3") == epochs(tmp_path / "plain" / "stage3")
    kept = checkpoints.load(tmp_path / "other" / "stage3" / "best.pt", with_encoder=False)
    assert (kept.confidence, kept.minimum_risk) == (None, None)


def test_the_reward_trains_and_the_stage_says_what_it_was_made_with(
    first: Path, features_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = str(first / "stage1" / "best.pt")
    settings = ("epochs=2", "batch_clips=4", "decoder_learning_rate=0.01", "dropout=0.1", "weight_average=0.5")
    assert run(features_dataset, tmp_path, 3, *settings, options=("--from", start)) == 0
    log = [json.loads(line) for line in (tmp_path / "stage3" / "log.jsonl").read_text().splitlines()]
    assert all(-10 <= line["loss"] <= 0 for line in log if line["kind"] == "step")  # minus CIDEr-D
    described = json.loads((tmp_path / "stage3" / "recipe.json").read_text())
    assert (described["recipe"], described["stage"]) == ("real", 3)
    assert (described["settings"]["dropout"], described["settings"]["projection"]) == (0.1, 4)
    assert described["stage_settings"]["samples_per_clip"] == recipes.real().stages[3].samples_per_clip
    error = capsys.readouterr().err
    assert "stage 3 of real on cpu" in error
    assert "given features, float32: 13 clips, 3 to validate, at most 2 epochs of 4 steps" in error
    assert "stage 3, its start: validation loss" in error
    assert "stage 3, epoch 2 of 2: loss" in error


INTERRUPTED_IN_STEP_2 = """
import signal, sys
from training import train
from training.loop import stage

accumulate, calls = stage.accumulate, []

def interrupted(*given, **named):
    calls.append(given)
    if len(calls) == 2:
        signal.raise_signal(signal.SIGINT)
    return accumulate(*given, **named)

stage.accumulate = interrupted
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_ctrl_c_saves_and_another_split_and_more_epochs_continue(features_dataset: Path, tmp_path: Path) -> None:
    command_line = arguments(features_dataset, tmp_path, 1, *QUICK)
    ended = run_python(INTERRUPTED_IN_STEP_2, *command_line)
    assert ended.returncode == 130
    assert ended.stderr.endswith("training: stopped after step 2; continue with --resume\n")
    other = (*QUICK[2:], "epochs=2", "batch_clips=2", "accumulation_steps=2")
    assert run(features_dataset, tmp_path, 1, *other, options=("--resume",)) == 0
    assert [line["epoch"] for line in epochs(tmp_path / "stage1")] == [1, 2]
    with pytest.raises(UsageError, match="trained with a different batch_clips x accumulation_steps; choose another"):
        run(features_dataset, tmp_path, 1, *other, "accumulation_steps=4", options=("--resume",))


def test_a_stop_in_validation_saves_the_weights_and_not_their_average(
    features_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        handler = signal.getsignal(signal.SIGINT)
        assert callable(handler)
        handler(signal.SIGINT, None)
        raise JavaError("METEOR ended by itself")

    settings = (*QUICK, "weight_average=0.9")
    assert run(features_dataset, tmp_path / "whole", 1, *settings) == 0
    with monkeypatch.context() as patched:
        patched.setattr("training.loop.stage.validate", stopped)
        assert run(features_dataset, tmp_path / "stopped", 1, *settings) == 130
    assert run(features_dataset, tmp_path / "stopped", 1, *settings, options=("--resume",)) == 0
    whole, resumed = (snapshots.load_newest(tmp_path / name / "stage1" / "snapshots") for name in ("whole", "stopped"))
    assert whole is not None
    assert resumed is not None
    for name, value in whole["learned"].items():
        assert torch.equal(resumed["learned"][name], value)


def test_on_features_a_start_must_take_their_size_and_leaves_its_encoder(
    first: Path, features_dataset: Path, tmp_path: Path
) -> None:
    data, start = tmp_path / "data", tmp_path / "start.pt"
    shutil.copytree(features_dataset, data)
    np.save(data / "features.npy", np.random.default_rng(0).normal(size=(16, 4, 512)).astype(np.float32))
    with pytest.raises(UsageError, match=r"best.pt takes features of size 8, those of .*data have 512$"):
        run(data, tmp_path / "run", 3, options=("--from", str(first / "stage1" / "best.pt")))
    checkpoints.save(checkpoints.initialise("squeezenet1_1", Dataset.load(data).vocabulary(), crop_px=112), start)
    run(data, tmp_path / "run", 3, "epochs=1", options=("--from", str(start)))
    with pytest.raises(EtenetError, match="has no encoder: it was trained on features, so it cannot caption video"):
        checkpoints.load(tmp_path / "run" / "stage3" / "best.pt")


def test_a_network_that_left_the_finite_numbers_is_one_line(features_dataset: Path, tmp_path: Path) -> None:
    settings = (*QUICK, "batch_clips=16", "warmup_steps=0", "decoder_learning_rate=1e30", "weight_average=0.0")
    with pytest.raises(UsageError, match=r"no finite probabilities for clip13 any more; train into another --out at a"):
        run(features_dataset, tmp_path, 1, *settings)


def test_without_a_word_there_is_one_line(features_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(features_dataset, tmp_path / "data")
    (tmp_path / "data" / "vocabulary.json").write_text(json.dumps({"words": []}))
    with pytest.raises(UsageError, match=r"data has no word; prepare it again with a smaller --minimum-count$"):
        run(tmp_path / "data", tmp_path, 1, *QUICK)


def test_without_a_validation_split_there_is_one_line(features_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(features_dataset, tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if '"train"' in line))
    with pytest.raises(UsageError, match=r"data has no validation split, only train; prepare it again"):
        run(tmp_path / "data", tmp_path / "out", 1, *QUICK)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("projection=5", "starts from a network with projection=4; train stage 1 with that setting"),
        ("encoder=resnet18", "starts from a network with encoder=given features"),
        ("crop_px=96", "starts from a network with crop_px="),
        ("output_bias=zero", "output_bias is for a new decoder"),
    ],
)
def test_what_a_later_stage_cannot_change_is_refused(
    first: Path, features_dataset: Path, setting: str, message: str
) -> None:
    start = next_checkpoint(first / "stage1" / "best.pt", Dataset.load(features_dataset))
    recipe = recipes.overridden(recipes.real(), 3, [setting])
    with pytest.raises(UsageError, match=message):
        continued(recipe, start, [setting])


def test_dropout_and_the_longest_sentence_are_the_starts_unless_set(first: Path, features_dataset: Path) -> None:
    start = next_checkpoint(first / "stage1" / "best.pt", Dataset.load(features_dataset))
    settings = ["dropout=0.9", "max_words=3"]
    recipe = recipes.overridden(replace(recipes.real(), dropout=0.7, max_words=9), 3, settings)
    changed = with_settings(start, continued(recipe, start, settings))
    assert (changed.max_words, changed.model.decoder.dropout.p) == (3, 0.9)
    assert changed.model.decoder.config.dropout == 0.9
    start = next_checkpoint(first / "stage1" / "best.pt", Dataset.load(features_dataset))
    trained = recipes.real()  # with which stage 1 was trained
    unchanged = continued(replace(recipes.real(), dropout=0.7, max_words=9), start, [])
    assert (unchanged.dropout, unchanged.max_words, unchanged.projection) == (trained.dropout, trained.max_words, 4)


def test_stage_3_starts_from_stage_2_or_else_from_stage_1(tmp_path: Path) -> None:
    assert stage_before(tmp_path, 3) == tmp_path / "stage2" / "best.pt"
    for stage in (1, 2):
        (tmp_path / f"stage{stage}").mkdir()
        (tmp_path / f"stage{stage}" / "best.pt").touch()
        assert stage_before(tmp_path, 3) == tmp_path / f"stage{stage}" / "best.pt"


def test_the_bias_of_the_words_is_their_log_frequency(tmp_path: Path) -> None:
    clips = [
        DatasetClip(row=0, video="a", captions=("a dog", "a cat")),
        DatasetClip(row=1, video="b", captions=("a cat",), weight=2.0),
    ]
    vocabulary = Vocabulary(["a", "cat", "dog", "fish"])
    bias = log_frequencies(Dataset(tmp_path, {"train": clips}, None), vocabulary)
    counts = {EOS_ID: 4, 3: 4, 4: 3, 5: 1}  # of 12
    for word, count in counts.items():
        assert bias[word].item() == pytest.approx(np.log(count / 12), rel=1e-5)
    assert bias[SOS_ID] == bias[6] < bias[5]


def raised(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("stage", "batch_clips", "fill", "settings"),
    [
        (
            2,
            8,
            lambda: raised(torch.OutOfMemoryError("CUDA out of memory")),
            "--set batch_clips=4 --set accumulation_steps=128",
        ),
        (2, 9, lambda: raised(MemoryError()), "--set batch_clips=3 --set accumulation_steps=192"),
        (2, 1, lambda: raised(MemoryError()), "--set activation_checkpointing=True --set frames_per_clip=4"),
        (1, 512, lambda: torch.empty(1 << 50), "--set batch_clips=256 --set accumulation_steps=2"),
    ],
)
def test_out_of_memory_is_one_line_with_two_settings_to_try(
    stage: int, batch_clips: int, fill: Callable[[], object], settings: str
) -> None:
    of = replace(recipes.msvd().stages[stage], batch_clips=batch_clips)
    with pytest.raises(UsageError, match=f"^out of memory; try {settings}$"), out_of_memory_named(of):
        fill()


def test_another_error_is_not_taken_for_a_full_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named(recipes.msvd().stages[1]):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("ending", "status", "line"),
    [
        (None, 0, ""),
        (UsageError("wrong; do this"), 2, "training: wrong; do this\n"),
        (EtenetError("failed"), 1, "training: failed\n"),
        (KeyboardInterrupt(), 130, "training: stopped by Ctrl-C\n"),
    ],
)
def test_commands_end_with_a_line_and_a_status(
    ending: BaseException | None, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        if ending:
            raise ending
        return 0

    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert (ended.value.code, capsys.readouterr().err) == (status, line)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("banana", "--device banana is no device; choose cpu, cuda or cuda:1"),
        ("meta", "training runs on cpu and cuda, not on --device meta"),
        ("cuda:1", "--device cuda:1: this machine has 1 such GPUs; try --device cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=message), init_processes(name):
        pass


TWO_CTRL_C = """
import signal
from training.loop.processes import init_processes

with init_processes("cpu") as processes:
    signal.raise_signal(signal.SIGINT)
    assert processes.should_stop() and processes.ctrl_c.is_set()
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("ended")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def test_the_second_ctrl_c_ends_at_once_and_the_first_one_does_not() -> None:
    ended = run_python(TWO_CTRL_C)
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr


def stills(folder: Path) -> Dataset:
    """Three clips of one, two and five frames, each stored once."""
    side = PREPROCESSING.resize_px
    pixels = np.random.default_rng(0).integers(256, size=(8, side, side, 3), dtype=np.uint8)
    clips = [
        DatasetClip(row=row, video=str(row), captions=("a",), distinct=count) for row, count in ((0, 1), (1, 2), (3, 5))
    ]
    (folder / "vocabulary.json").write_text('{"words": ["a"]}')
    return Dataset(folder, {"train": clips[:2], "validation": clips[2:]}, pixels)


def test_every_different_frame_is_encoded_once_and_clips_of_any_number_have_16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, dataset, encoded = trainee().float(), stills(tmp_path), []
    encode = network.model.encode
    monkeypatch.setattr(
        network.model, "encode", lambda frames: encoded.append(len(frames.flatten(0, 1))) or encode(frames)
    )
    features = cached_features(network, dataset, tmp_path / "features.npy", batch_clips=2, processes=Processes())
    assert features is not None
    assert (features.shape[0], sum(encoded)) == (8, 8)
    clips = [clip for split in dataset.clips.values() for clip in split]
    loader = Loader(dataset, Vocabulary(["a"]), 5, torch.device("cpu"), features)
    with torch.no_grad():
        expected = network.features(dataset.frames_of(clips))
    assert sum(encoded) == 8 + 8  # a frame that repeats the one before it is not computed again
    torch.testing.assert_close(loader.inputs(clips), expected, rtol=1e-4, atol=1e-5)
    again = cached_features(
        network,
        dataset,
        tmp_path / "elsewhere.npy",
        batch_clips=1,
        processes=Processes(),
        others=[tmp_path / "features.npy"],
    )
    assert again is not None
    assert sum(encoded) == 8 + 8  # the stage before has them
    np.testing.assert_array_equal(again, features)


def test_a_frozen_encoder_has_seen_every_view_of_the_clips_to_train_on(tmp_path: Path) -> None:
    network, dataset = trainee().float(), stills(tmp_path)
    network.stage = replace(network.stage, encoder_learning_rate=0.0, views=3, smallest_crop=0.5)
    features = cached_features(network, dataset, tmp_path / "features.npy", batch_clips=2, processes=Processes())
    loader = Loader(dataset, Vocabulary(["a"]), 5, torch.device("cpu"), features)
    for clip in dataset.clips["train"]:
        for number in range(3):
            example = TrainingExample(clip, ("a",), view_number=number)
            with loader.ahead([[example]]) as load:
                loaded, _ = load([example])
            frames = seen(dataset.frames_of([clip])[0], numbered_view(clip, number, smallest_crop=0.5))
            with torch.no_grad():
                torch.testing.assert_close(loaded, network.features(frames[None]), rtol=1e-4, atol=1e-5)


def test_many_frames_are_encoded_as_in_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, dataset, processes = trainee().float(), stills(tmp_path), Processes()
    of_torch = cached_features(network, dataset, tmp_path / "torch.npy", batch_clips=2, processes=processes)
    monkeypatch.setattr("training.loop.features.COMPILED_FROM_FRAMES", 8)
    monkeypatch.setattr(network, "features", None)
    compiled = cached_features(network, dataset, tmp_path / "compiled.npy", batch_clips=2, processes=processes)
    assert of_torch is not None
    np.testing.assert_allclose(compiled, of_torch, rtol=0, atol=1e-4 * np.abs(of_torch).max())


def test_sampled_frames_are_loaded_by_their_moments(tmp_path: Path) -> None:
    dataset = stills(tmp_path)
    clips = dataset.clips["validation"] + dataset.clips["train"][1:]
    examples = [
        TrainingExample(clip, ("a",), moments=moments) for clip, moments in zip(clips, [(0, 4), (1, 1)], strict=True)
    ]
    features = np.arange(8, dtype=np.float32)[:, None]
    for given, expected in ((None, dataset.frames[[[3, 7], [2, 2]]]), (features, [[[3], [7]], [[2], [2]]])):
        loader = Loader(dataset, Vocabulary(["a"]), 5, torch.device("cpu"), given)
        with loader.ahead([examples]) as load:
            np.testing.assert_array_equal(load(examples)[0].numpy(), expected)
