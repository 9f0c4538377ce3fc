"""How every benchmark ends: one JSON line on stdout that names machine, versions and commit, in a file of `results/`.

A result belongs to a commit, so none is written into the repository while the tree differs from its commit. Other files
in `results/` do not count as differences. Outside the repository, the field `changed` says whether the tree differed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from etenet.errors import UsageError, named

REPOSITORY = Path(__file__).parent.parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = (
    *("torch", "torchvision", "torchserve", "av", "numpy", "nltk", "pycocoevalcap"),
    *("openvino", "onnxruntime", "torchcodec", "litserve"),
)


@dataclass(frozen=True, slots=True)
class Tree:
    """The state of a repository: its commit, and the files that differ from it or that it does not have."""

    commit: str
    changes: tuple[str, ...]

    @classmethod
    def read(cls, repository: Path) -> Tree | None:
        """None without git, or if the folder is in no repository."""

        def git(*arguments: str) -> str:
            command = ["git", "-C", str(repository), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        try:
            commit = git("rev-parse", "--short", "HEAD").strip()
            listing = ("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
            status = git(*listing, "--", ".", ":!benchmarks/results")
        except (OSError, subprocess.CalledProcessError):
            return None
        return cls(commit, tuple(line[3:] for line in status.split("\0") if line))


@dataclass(frozen=True, slots=True)
class Results:
    """Where the result of a benchmark goes, and the state of the repository when the benchmark started."""

    folder: Path
    repository: Path
    tree: Tree | None
    load_before: float

    @classmethod
    def start(cls, folder: Path, repository: Path) -> Results:
        """Raises `UsageError` if the folder is in the repository and the tree is not its commit."""
        results = cls(folder.resolve(), repository.resolve(), Tree.read(repository), os.getloadavg()[0])
        if results._inside and not results.tree:
            raise UsageError("the commit of this tree is unknown; name a folder outside the repository with --out")
        if results._inside and results.tree and (changes := results.tree.changes):
            raise UsageError(
                f"the tree differs from its commit {results.tree.commit} in {named(changes)}; "
                "commit first, or name a folder outside the repository with --out"
            )
        return results

    def conclude(self, name: str, figures: Mapping[str, Any]) -> Path:
        """Print the last line and write it to `folder/NAME.json`.

        If the tree changed while the benchmark ran, nothing is written into the repository: `UsageError`.
        """
        unchanged = Tree.read(self.repository) == self.tree
        record = {
            "benchmark": name,
            "date": datetime.now(UTC).date().isoformat(),
            "commit": self.tree.commit if self.tree else "unknown",
            "changed": bool(self.tree.changes) or not unchanged if self.tree else None,
            "machine": _machine(),
            "load_average": {"before": round(self.load_before, 2), "after": round(os.getloadavg()[0], 2)},
            "versions": {"python": platform.python_version(), **_versions()},
            **figures,
        }
        print(json.dumps(record), flush=True)
        if self._inside and not unchanged:
            raise UsageError(
                f"the tree changed while the benchmark ran; its result is not in {self.folder}/{name}.json"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
        return path

    @property
    def _inside(self) -> bool:
        return self.folder.is_relative_to(self.repository)


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
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
