"""Real pixels and real sentences through both stages at full size: Inception-ResNet-v2 at 299 x 299.

An overfit test: a network that cannot learn a few clips by heart has a bug.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from etenet.model.encoder import Encoder
from training import evaluate, prepare, train

FEW = ["--set", "epoch_of=clips", "--set", "batch_clips=1", "--set", "captions_per_clip=4", "--set", "meteor=False"]
STAGES = {
    1: ["--set", "epochs=15", "--set", "decoder_learning_rate=2e-3"],
    2: ["--set", "epochs=1", "--set", "accumulation_steps=1", "--set", "activation_checkpointing=True"],
}


@pytest.fixture(scope="module")
def few_clips(reference_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips to train on. One of them is also the validation split, because the aim is to overfit."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "clips").mkdir()
    listed = json.loads((reference_data / "clips_captions.json").read_text())
    first, second = [path for path in listed if path.startswith("msvd/")][:2]
    lines = []
    for name, path, split in (("one", first, "train"), ("two", second, "train"), ("again", first, "validation")):
        shutil.copyfile(reference_data / path, folder / "clips" / f"{name}{Path(path).suffix}")
        lines.append({"video": name, "captions": listed[path]["captions"][:4], "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--captions", str(folder / "captions.jsonl"), "--clips", str(folder / "clips")]
    prepare.main(["folder", *given, "--out", str(folder / "data")])
    return folder


def losses(run: Path, stage: int) -> list[float]:
    lines = [json.loads(line) for line in (run / f"stage{stage}" / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.long
def test_two_stages_at_full_size_learn_a_few_clips_by_heart(few_clips: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(Encoder("inceptionresnetv2").state_dict(), tmp_path / "encoder.pt")
    data = ["--data", str(few_clips / "data"), "--out", str(tmp_path)]
    weights = ["--encoder-weights", str(tmp_path / "encoder.pt")]
    train.main(["msvd", "--stage", "1", *data, *weights, *FEW, *STAGES[1]])
    train.main(["msvd", "--stage", "2", *data, *FEW, *STAGES[2]])
    assert losses(tmp_path, 2)[-1] < losses(tmp_path, 1)[0] / 3
    best = tmp_path / "stage2" / "best.pt"
    folders = ["--data", str(few_clips / "data"), "--out", str(tmp_path / "evaluation")]
    evaluate.main(["--checkpoint", str(best), "--split", "train", *folders])
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["clips"] == 2
    assert "<img" in (tmp_path / "evaluation" / "report.html").read_text()
