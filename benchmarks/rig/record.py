"""How every benchmark ends: one JSON line on stdout that names machine, versions and commit, kept in `results/`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parent.parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = (
    *("torch", "torchvision", "torchserve", "av", "numpy", "nltk", "pycocoevalcap"),
    *("openvino", "onnxruntime", "torchcodec", "litserve"),
)


def conclude(name: str, figures: Mapping[str, Any], *, folder: Path = RESULTS) -> Path:
    """Print the last line and keep it as `folder/NAME.json`."""
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        **figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record), flush=True)
    return path


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"cpus": os.cpu_count(), "architecture": platform.machine(), "cpu": _cpu()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """With "-dirty" where anything but older results differs from it."""

    def git(*arguments: str) -> str:
        asked = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return asked.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")
