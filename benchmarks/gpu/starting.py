"""How soon a new worker captions on a GPU: if it must compile, has compiled before, or gets compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.rig.record import REPOSITORY

DEADLINE_S = 300.0
_LOAD = """
import sys, time
from pathlib import Path
started = time.perf_counter()
import etenet
from etenet.assets import CANARY_CLIP
checkpoint, device, kernels = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else None
captioner = etenet.load(checkpoint, device=device, record_gpu=True, gpu_kernels=kernels)
captioner.caption(CANARY_CLIP.read_bytes())
print(time.perf_counter() - started)
"""
_COMPILE = """
import sys, torch
from pathlib import Path
from etenet.model import checkpoint as checkpoints
from etenet.runtime.cuda import compiled_kernels
from etenet.video.clip import FRAMES_PER_CLIP
checkpoint = checkpoints.load(Path(sys.argv[1]))
kernels = compiled_kernels(
    checkpoint.encoder, checkpoint.preprocessing, frames_per_clip=FRAMES_PER_CLIP, device=torch.device(sys.argv[2])
)
Path(sys.argv[3]).write_bytes(kernels)
"""


def starting(checkpoint: Path, folder: Path, device: torch.device) -> dict[str, float | str]:
    """Seconds from the import of etenet to a first caption. The parts that run later use what this one compiled."""
    cache, kernels = folder / "compiled", folder / "kernels"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    given = [str(checkpoint), str(device)]
    seconds: dict[str, float | str] = {"compiling_s": _seconds(_LOAD, given)}
    if device.type == "cuda":
        seconds["compiled_before_s"] = _seconds(_LOAD, given)
        _run(_COMPILE, [*given, str(kernels)])
        empty = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "empty")}
        seconds["carried_in_the_archive_s"] = _seconds(_LOAD, [*given, str(kernels)], empty)
        seconds["kernels_mib"] = kernels.stat().st_size / 2**20
    return seconds


def _seconds(code: str, arguments: list[str], environment: dict[str, str] | None = None) -> float:
    return float(_run(code, arguments, environment).splitlines()[-1])


def _run(code: str, arguments: list[str], environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=DEADLINE_S
    )
    return ran.stdout
