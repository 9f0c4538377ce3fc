"""A run that is killed, stopped or damaged ends like an undisturbed one, and several processes end like one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import wait_until
from training import train

REPOSITORY = Path(__file__).parent.parent
SETTINGS = [
    argument
    for setting in ("epoch_of=captions", "batch_clips=1", "captions_per_clip=1", "meteor=False")
    for argument in ("--set", setting)
]


class Training:
    """`python -m training.train`, stage 1, on a data set of features, in a process of its own."""

    def __init__(self, data: Path, out: Path, epochs: int = 2) -> None:
        self.stage, settings = out / "stage1", [*SETTINGS, "--set", f"epochs={epochs}"]
        self.arguments = ["demo", "--stage", "1", "--data", str(data), "--out", str(out), *settings]

    def start(self, *arguments: str, launcher: tuple[str, ...] = ("-m",)) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *launcher, "training.train", *self.arguments, *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def finish(self, *arguments: str, launcher: tuple[str, ...] = ("-m",)) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, launcher=launcher)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def outcome(self) -> tuple[bytes, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The log, the final weights, and the best ones."""
        newest = max((self.stage / "snapshots").glob("step-*.pt"))
        final = torch.load(newest, weights_only=True)["learned"]
        best = torch.load(self.stage / "best.pt", weights_only=True)["weights"]
        return (self.stage / "log.jsonl").read_bytes(), final, best

    def steps(self) -> int:
        log = self.stage / "log.jsonl"
        return log.read_text().count('"kind": "step"') if log.is_file() else 0


def assert_same(one: Training, other: Training) -> None:
    (log, *weights), (other_log, *other_weights) = one.outcome(), other.outcome()
    assert log == other_log
    for named, other_named in zip(weights, other_weights, strict=True):
        assert named.keys() == other_named.keys()
        assert all(torch.equal(named[name], other_named[name]) for name in named)


@pytest.fixture(scope="module")
def whole(features_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """An undisturbed run."""
    training = Training(features_dataset, tmp_path_factory.mktemp("whole"))
    finished = training.finish()
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == str(training.stage / "best.pt")
    return training


@pytest.mark.long
def test_kills_at_random_moments_change_no_bit(features_dataset: Path, tmp_path: Path) -> None:
    kills, epochs = 50, 40
    training, undisturbed = (Training(features_dataset, tmp_path / name, epochs) for name in ("killed", "undisturbed"))
    assert undisturbed.finish().returncode == 0
    chance, every_step = random.Random(5), ["--resume", "--save-every-s", "0"]
    for _ in range(kills):
        process, before = training.start(*every_step), training.steps()
        wait_until(lambda p=process, b=before: p.poll() is not None or training.steps() != b, 60)
        try:
            process.communicate(timeout=chance.uniform(0, 0.8))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before all kills: make it longer"
    finished = training.finish(*every_step)
    assert finished.returncode == 0, finished.stderr
    assert "resuming after step" in finished.stderr
    assert_same(training, undisturbed)
    print(f"{kills} kills in {training.steps()} steps")


@pytest.mark.long
def test_sigterm_saves_and_ends_well(whole: Training, features_dataset: Path, tmp_path: Path) -> None:
    training = Training(features_dataset, tmp_path)
    process = training.start()
    wait_until(lambda: training.steps() > 2 or process.poll() is not None, 60)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "continue with --resume" in err
    again = training.finish()
    assert again.returncode == 2
    assert "holds a run; continue with --resume" in again.stderr
    assert training.finish("--resume").returncode == 0
    assert_same(training, whole)


@pytest.mark.long
def test_damage_costs_one_snapshot_and_another_recipe_is_refused(
    whole: Training, features_dataset: Path, tmp_path: Path
) -> None:
    training = Training(features_dataset, tmp_path)
    process = training.start("--save-every-s", "0")
    wait_until(lambda: training.steps() > 3 or process.poll() is not None, 60)
    process.kill()
    process.communicate()
    newest = max((training.stage / "snapshots").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    changed = training.finish("--resume", "--set", "dropout=0.25")
    assert changed.returncode == 2
    assert "trained with a different dropout" in changed.stderr
    finished = training.finish("--resume")
    assert finished.returncode == 0, finished.stderr
    assert f"{newest} is damaged" in finished.stderr
    assert_same(training, whole)


def test_a_finished_run_stays_as_it_is(features_dataset: Path, tmp_path: Path) -> None:
    training = Training(features_dataset, tmp_path, epochs=1)
    arguments = [*training.arguments, "--set", "batch_clips=8"]
    assert train.main(arguments) == 0
    before = training.outcome()[0]
    assert train.main([*arguments, "--resume"]) == 0
    assert training.outcome()[0] == before


@pytest.mark.long
def test_two_processes_end_with_the_weights_of_one(features_dataset: Path, tmp_path: Path) -> None:
    settings = ["--set", "dropout=0.0", "--set", "accumulation_steps=4"]
    alone, together = (Training(features_dataset, tmp_path / name) for name in ("alone", "together"))
    assert alone.finish(*settings).returncode == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    finished = together.finish(*settings, launcher=torchrun)
    assert finished.returncode == 0, finished.stderr
    (log, *weights), (other_log, *other_weights) = alone.outcome(), together.outcome()
    for line, other in zip(log.splitlines(), other_log.splitlines(), strict=True):
        loss, other_loss = (json.loads(text).get("loss", 0.0) for text in (line, other))
        assert other_loss == pytest.approx(loss, rel=1e-4)
    for named, other_named in zip(weights, other_weights, strict=True):
        for name, value in named.items():
            torch.testing.assert_close(other_named[name], value, rtol=1e-3, atol=1e-5, msg=name)
