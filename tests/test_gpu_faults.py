"""A GPU that fails on demand: captions go on or the worker is replaced, and the log says which."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ALL_COMPLETED
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.cli import main
from etenet.errors import DeviceFailed, InternalError, UsageError
from etenet.jobs.engines import local
from etenet.model import checkpoint as checkpoints
from etenet.model.hypothesis import Hypothesis
from etenet.runtime import load
from etenet.runtime.network import TorchNetwork
from etenet.serving.config import REQUEST_LOG_VARIABLE
from etenet.serving.request import Request
from etenet.serving.warnings_log import show_warnings
from handler.etenet_handler import EtenetHandler
from tests.conftest import CAPTION, DEMO, EXAMPLES, REPOSITORY

BODIES = [(REPOSITORY / "examples" / name).read_bytes() for name in list(EXAMPLES)[:2]]
CAPTIONS = list(EXAMPLES.values())[:2]
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
LOST = RuntimeError(
    "CUDA error: GPU is lost\nCUDA kernel errors might be asynchronously reported at some other API call"
)
OLD = RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver")


class StandIn(TorchNetwork):
    """A network on a GPU that computes as long as `most` clips come and `fault` is None. It runs on the CPU."""

    def __init__(self, checkpoint: checkpoints.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(checkpoint)
        self.fault: Exception | None = None  # of whatever runs on the GPU
        self.most = {"features": 99, "sentences": 99}
        self._ones = torch.ones
        monkeypatch.setattr(torch, "ones", self.ones)

    def ones(self, *size: int, device: torch.device | None = None, **keywords: Any) -> Tensor:
        """Replaces `torch.ones`, by which a GPU is tried."""
        if device is None or device.type != "cuda":
            return self._ones(*size, device=device, **keywords)
        self._use()
        return self._ones(*size, **keywords)

    def features(self, frames: NDArray[np.uint8]) -> Tensor:
        self._use("features", len(frames))
        return super().features(frames)

    def sentences(self, features: Sequence[Any], *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
        self._use("sentences", len(features))
        return super().sentences(features, beam_size=beam_size, max_words=max_words)

    def recover(self) -> None:
        self.device = torch.device("cuda", 0)
        try:
            super().recover()
        finally:
            self.device = torch.device("cpu")

    def _use(self, step: str = "features", clips: int = 0) -> None:
        if self.fault:
            raise self.fault
        if clips > self.most[step]:
            raise FULL


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr("etenet.captioning.stream.FIRST_COMPLETED", ALL_COMPLETED)  # all clips make one batch
    return StandIn(checkpoints.load(DEMO), monkeypatch)


@pytest.fixture
def captioner(network: StandIn) -> Captioner:
    checkpoint = network._checkpoint
    return Captioner(checkpoint, network, decoders_for(checkpoint, sandboxed=False))


def texts(captioner: Captioner) -> list[str | None]:
    outcomes = captioner.caption_batch(BODIES, [CaptionOptions()] * len(BODIES))
    return [getattr(outcome, "text", None) for outcome in outcomes]


@pytest.mark.parametrize("step", ["features", "sentences"])
def test_clips_that_do_not_fit_into_memory_together_are_captioned_one_by_one(
    step: str, network: StandIn, captioner: Captioner, caplog: pytest.LogCaptureFixture
) -> None:
    network.most[step] = 1
    assert texts(captioner) == CAPTIONS
    assert "the network failed on 2 clips; each is tried again, alone" in caplog.text
    assert str(FULL) in caplog.text


@pytest.mark.parametrize("step", ["features", "sentences"])
def test_a_clip_that_does_not_fit_into_memory_alone_gets_no_caption_and_harms_no_later_one(
    step: str, network: StandIn, captioner: Captioner, caplog: pytest.LogCaptureFixture
) -> None:
    network.most[step] = 0
    outcomes = captioner.caption_batch(BODIES, [CaptionOptions()] * 2)
    assert [type(outcome) for outcome in outcomes] == [InternalError] * 2
    assert caplog.text.count("the network failed on 1 clip; it gets no caption") == 2
    network.most[step] = 1
    assert texts(captioner) == CAPTIONS


def test_a_gpu_whose_memory_is_full_is_not_a_lost_one(network: StandIn, captioner: Captioner) -> None:
    network.fault = FULL
    assert texts(captioner) == [None, None]
    network.fault = None
    assert texts(captioner) == CAPTIONS


def test_a_network_that_does_not_fit_into_memory_is_refused_with_the_fix(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr("etenet.runtime.network.TorchNetwork", full)
    with pytest.raises(DeviceFailed, match=r"cuda:1 has too little free memory.*CUDA_VISIBLE_DEVICES="):
        load.load_network(small_checkpoint, device="cuda:1", frames_per_clip=16)


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_a_device_that_is_not_there_is_named(
    device: str, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_cuda() -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda._lazy_init", without_cuda)
    with pytest.raises(UsageError, match=f"this machine has no device {device}; give cpu"):
        load.load_network(small_checkpoint, device=device, frames_per_clip=16)


@pytest.mark.parametrize("fault", [LOST, OLD])
def test_a_worker_whose_gpu_is_lost_ends_so_that_torchserve_starts_another(
    fault: Exception,
    network: StandIn,
    captioner: Captioner,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(REQUEST_LOG_VARIABLE, "off")
    show_warnings()
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    handler, network.fault = EtenetHandler(), fault
    handler.captioner = captioner
    handler._outcomes([Request.read("1", {"body": bytearray(BODIES[0])}, {}, max_body_bytes=2**20)], [], None)
    assert ended == [1]
    assert "this worker cannot go on; TorchServe starts another" in caplog.text
    lost = f"cuda:0 no longer computes: {str(fault).splitlines()[0]}"
    assert f"{lost}\n" in caplog.text
    assert (
        f"\nwarning: this worker cannot go on; TorchServe starts another (DeviceFailed: {lost})\n"
        in capsys.readouterr().out
    )


def test_a_job_whose_gpu_is_lost_stops_and_goes_on_when_it_is_started_again(
    network: StandIn,
    captioner: Captioner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentences = network.sentences

    def lost_after_the_first(features: Sequence[Any], **how: int) -> list[list[Hypothesis]]:
        found = sentences(features, **how)
        network.fault = LOST
        return found

    monkeypatch.setattr(network, "sentences", lost_after_the_first)
    monkeypatch.setattr(network, "batch_clips", 1)
    monkeypatch.setattr(local, "load", lambda *_, **__: captioner)
    monkeypatch.chdir(REPOSITORY)
    job = [*CAPTION, *(f"examples/{name}" for name in EXAMPLES), "--out", str(tmp_path / "captions.jsonl")]
    assert main(job) == 1
    lost = "cuda:0 no longer computes: CUDA error: GPU is lost; start this job again, and it goes on from there"
    assert f"etenet caption: {lost}\n" in capsys.readouterr().err
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 1
    network.fault = None
    monkeypatch.setattr(network, "sentences", sentences)
    assert main(job) == 0
    records = map(json.loads, (tmp_path / "captions.jsonl").read_text().splitlines())
    assert {Path(record["video"]).name: record["caption"] for record in records} == EXAMPLES


@pytest.mark.parametrize("fault", [None, FULL])
def test_a_gpu_that_computes_is_used(fault: Exception | None, network: StandIn) -> None:
    network.fault = fault
    assert load.working_device("cuda:3") == "cuda:3"


@pytest.mark.parametrize("fault", [LOST, OLD])
def test_captions_are_computed_on_the_cpu_where_a_gpu_does_not_compute(
    fault: Exception, network: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network.fault = fault
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(local, "_SIGNS_OF_GPU", (os.devnull,))
    assert load.working_device("cuda:3") == "cpu"
    assert local.load(DEMO, limits=local.JOB_LIMITS, clips=1, sandboxed=False).caption(BODIES[0]).text == CAPTIONS[0]
    for gpu in ("cuda:3", "cuda"):
        message = f"captions are computed on the CPU, which is slower: {gpu} does not compute"
        assert f"{message} ({str(fault).splitlines()[0]})" in caplog.text


def test_a_warning_is_one_line_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_warnings()
    log = logging.getLogger("etenet.handler")
    log.warning("nobody reads this")
    monkeypatch.setenv(REQUEST_LOG_VARIABLE, "off")
    for _ in range(2):
        show_warnings()
    log.warning("one\nrequest two \x1b[2J%s", "x" * 5000)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: one request two \\x1b[2Jxxx")
    assert len(line) < 1100
