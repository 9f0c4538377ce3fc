"""`python -m benchmarks.wheels FOLDER`: fetch the wheels that GPU benchmarks need on a machine without a package index.

About 40 MB for Linux on x86-64 and the given Python version; torch must be installed there. On that machine, in the
repository:

    python3 -m pip install --no-index --no-deps --target site FOLDER/*.whl
    PYTHONPATH=site:src python3 -m benchmarks.gpu --out ../results
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rig.record import REPOSITORY

BINARY = ("av", "joblib", "munch", "nltk", "pycocoevalcap", "regex")
BUILT_HERE = ("pretrainedmodels",)  # published as source
PLATFORMS = [f"manylinux_{glibc}_x86_64" for glibc in ("2_28", "2_17", "2_5")] + ["manylinux2014_x86_64"]
JAVA = (".jar", ".gz")  # METEOR and the PTB tokenizer, about 100 MB, which these benchmarks do not use


def fetch(folder: Path, python: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    pinned = ["--no-deps", "--constraint", str(REPOSITORY / "constraints.txt")]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*pip, "download", *pinned, *target, "--dest", str(folder), *BINARY], check=True)
    subprocess.run([*pip, "wheel", *pinned, "--wheel-dir", str(folder), *BUILT_HERE], check=True)
    (scores,) = folder.glob("pycocoevalcap-*.whl")
    _drop(scores, JAVA)


def _drop(wheel: Path, endings: tuple[str, ...]) -> None:
    """Remove the files with these endings."""
    lighter = wheel.with_suffix(".lighter")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(lighter, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if not entry.filename.endswith(endings):
                new.writestr(entry, old.read(entry))
    lighter.replace(wheel)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the other machine; default: 3.12")
    options = parser.parse_args(arguments)
    fetch(options.folder, options.python)
    for wheel in sorted(options.folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")


if __name__ == "__main__":
    main()
