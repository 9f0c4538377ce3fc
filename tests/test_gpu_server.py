"""How `etenet serve`, archives, workers and jobs adapt to GPUs, which are simulated here."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import etenet
from etenet import doctor
from etenet.captioning import captioner
from etenet.cli import main
from etenet.errors import UsageError
from etenet.jobs.engines import local
from etenet.runtime import CPU_BATCH_CLIPS, GPU_BATCH_CLIPS, cuda
from etenet.serving import archive
from etenet.serving.torchserve import gpus_of
from handler.etenet_handler import EtenetHandler
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, ask, running_server

CONFIG = yaml.safe_load((REPOSITORY / "handler" / "model-config.yaml").read_text())
NVIDIA_SMI = """#!/bin/sh
case "$*" in *noheader*) ;; *) echo index ;; esac
seq 0 {last}
"""


def path_with_gpus(folder: Path, count: int) -> str:
    """A PATH with an nvidia-smi that lists this many GPUs."""
    program = folder / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(last=count - 1))
    program.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0,3", 2), ("GPU-8a2b, GPU-1f00", 2)]
)
def test_gpus_are_counted_as_cuda_shows_them(visible: str | None, count: int, tmp_path: Path) -> None:
    environment = {"PATH": path_with_gpus(tmp_path, 4)}
    assert gpus_of(environment | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})) == count


@pytest.mark.parametrize("script", [None, "exit 9"])
def test_without_a_working_nvidia_smi_there_is_no_gpu(script: str | None, tmp_path: Path) -> None:
    path = path_with_gpus(tmp_path, 1)
    if script is None:
        (tmp_path / "nvidia-smi").unlink()
    else:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    assert gpus_of({"PATH": path}) == 0


@pytest.mark.long
def test_with_gpus_torchserve_gets_the_settings_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch does not find the GPU that TorchServe gives a worker, the worker captions on the CPU."""
    monkeypatch.setenv("PATH", path_with_gpus(tmp_path, 1))
    with running_server("--checkpoint", str(DEMO)) as server:
        (model,) = ask(f"{server.management}/models/etenet").json()
        assert len(model["workers"]) == model["minWorkers"] == CONFIG["gpu"]["workers"] == 1
        assert model["batchSize"] == CONFIG["gpu"]["batchSize"] > CONFIG["batchSize"]
        assert {worker["gpu"] for worker in model["workers"]} == {True}
        for name, caption in EXAMPLES.items():
            assert server.caption((REPOSITORY / "examples" / name).read_bytes()).json()["caption"] == caption
        log = server.log.read_text()
        assert "1 GPU: 1 worker with 16 clips at a time" in log
        assert (
            torch.cuda.is_available() or "\nwarning: captions are computed on the CPU, which is slower: cuda:0" in log
        )


@pytest.mark.parametrize(
    ("torch_finds_it", "compiler", "finding"),
    [
        (False, True, "FAIL  nvidia-smi lists 1 GPU, torch finds none"),
        (True, False, "FAIL  no C++ compiler, so torch cannot compile for the GPU"),
        (True, True, "ok    1 GPU"),
    ],
)
def test_doctor_says_what_a_gpu_lacks(
    torch_finds_it: bool, compiler: bool, finding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", path_with_gpus(tmp_path, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_finds_it)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if compiler else None)
    assert finding in str(doctor._gpus())


@pytest.fixture
def unpacked(small_checkpoint: Path, tmp_path: Path) -> Path:
    archive.unpack(archive.package(small_checkpoint, tmp_path / "etenet.mar"), tmp_path / "unpacked")
    return tmp_path / "unpacked"


def test_a_configured_archive_passes_verification(unpacked: Path) -> None:
    archive.configure(unpacked, {"batchSize": 3})
    archive.verify(unpacked)
    assert archive.configuration(unpacked) == CONFIG | {"batchSize": 3}


def test_configuring_does_not_hide_damage(unpacked: Path) -> None:
    config = unpacked / archive.CONFIG_FILE
    config.write_text(config.read_text() + "batchSize: 9\n")
    archive.configure(unpacked, {"batchSize": 3})
    with pytest.raises(UsageError, match=r"model-config\.yaml of the archive is damaged"):
        archive.verify(unpacked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_compiled_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "etenet.mar"
    assert main(["package", str(DEMO), "--gpu", "--out", str(out)]) == 2
    assert "this machine has no GPU to compile for; package on a machine with a GPU" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report a GPU that computes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("etenet.runtime.network.gpu_fault", lambda _: None)
    monkeypatch.setattr(local, "_SIGNS_OF_GPU", (os.devnull,))


@pytest.mark.usefixtures("gpu")
def test_compiled_kernels_are_part_of_the_archive(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def compiled(*_: object, device: torch.device, **__: object) -> bytes:
        devices.append(device.type)
        return b"kernels"

    monkeypatch.setattr(cuda, "compiled_kernels", compiled)
    archive.unpack(archive.package(small_checkpoint, tmp_path / "etenet.mar", gpu=True), tmp_path / "unpacked")
    archive.verify(tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / archive.GPU_KERNELS_FILE).read_bytes() == b"kernels"
    assert devices == ["cuda"]


@pytest.mark.usefixtures("gpu")
def test_an_encoder_that_does_not_compile_is_not_packaged(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cuda, "compiled_kernels", broken)
    with pytest.raises(UsageError, match="cannot be compiled for this GPU: no compiler"):
        archive.package(small_checkpoint, tmp_path / "etenet.mar", gpu=True)


@pytest.mark.usefixtures("gpu")
def test_a_worker_with_a_gpu_captions_on_it(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with settings of older releases: `decode_from_pixels` no longer exists."""
    settings: dict[str, Any] = {}
    ready = SimpleNamespace(
        caption=lambda _, **__: None,
        checkpoint=SimpleNamespace(max_words=20),
        checkpoint_id="sha256:0",
        encoder="squeezenet1_1",
        network=SimpleNamespace(precision="float32"),
    )
    monkeypatch.setattr(etenet, "load", lambda _, **given: settings.update(given) or ready)
    context = SimpleNamespace(
        system_properties={"model_dir": str(unpacked), "gpu_id": 3},
        model_yaml_config=archive.configuration(unpacked) | {"gpu": {"decode_from_pixels": 2_000_000}},
        manifest={"model": {"serializedFile": archive.CHECKPOINT_FILE, "modelVersion": "1.0"}},
        model_name="etenet",
    )
    EtenetHandler().initialize(context)
    assert (settings["device"], settings["record_gpu"]) == ("cuda:3", True)
    assert settings["gpu_kernels"] is None


@pytest.mark.parametrize(("clips", "captures"), [(15, False), (16, True)])
@pytest.mark.usefixtures("gpu")
def test_a_job_captures_cuda_graphs_if_that_saves_time(
    clips: int, captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {}
    monkeypatch.setattr(captioner, "load", lambda _, **given: settings.update(given))
    local.load(DEMO, limits=local.JOB_LIMITS, clips=clips)
    assert (settings["device"], settings["record_gpu"]) == ("cuda", captures)


def test_a_server_takes_batches_of_the_size_that_the_network_computes_at_once() -> None:
    assert (CONFIG["batchSize"], CONFIG["gpu"]["batchSize"]) == (CPU_BATCH_CLIPS, GPU_BATCH_CLIPS)


def test_there_is_one_worker_per_gpu_until_more_are_measured() -> None:
    assert CONFIG["gpu"] == {"workers": 1, "batchSize": GPU_BATCH_CLIPS}
