"""What a Ray cluster is given to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LISTS_WHAT_IS_DONE = """
import json, logging, sys
import ray
from etenet.job_ray import _without_copies
from etenet.segments import WHOLE, Cut

ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
cuts = [WHOLE, Cut(start_s=1.0)]
sources = {(path, cut): [f"{path} {number}"] for path in sys.argv[1:] for number, cut in enumerate(cuts)}
print(json.dumps(sorted(_without_copies(sources).values())))
"""


def test_files_with_the_same_bytes_are_captioned_once(tmp_path: Path) -> None:
    files = {"a": b"one", "b": b"one", "c": b"two", "d": b"three", "empty": b"", "also empty": b""}
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    done = subprocess.run(
        [sys.executable, "-c", LISTS_WHAT_IS_DONE, *files, "not there"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    expected = [["a", "b"], ["c"], ["d"], ["empty"], ["also empty"], ["not there"]]
    assert json.loads(done.stdout) == sorted(
        [f"{name} {number}" for name in names] for names in expected for number in (0, 1)
    )
