"""A shutdown in which newcomers are refused at once, while what was accepted before is captioned.

TorchServe keeps a queue and workers for each version of a model. A second version refuses every request; it becomes the
default version when the shutdown begins. So the version that captions gets no further requests, and its queue empties.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from etenet.assets import bundled
from etenet.serving import archive
from etenet.serving.torchserve import delay_torch

VERSION = "draining"
HANDLER_FILE = "draining_handler.py"

_SETTINGS = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 1, "responseTimeout": 120}


def write_model(folder: Path) -> Path:
    """Write the version that refuses, as TorchServe reads an unpacked archive; returns the folder."""
    folder.mkdir()
    shutil.copy(bundled("handler") / HANDLER_FILE, folder)
    delay_torch(folder)
    (folder / archive.CONFIG_FILE).write_text(yaml.safe_dump(_SETTINGS))
    manifest = folder / archive.MANIFEST_FILE
    manifest.parent.mkdir()
    manifest.write_text(json.dumps(archive.manifest(version=VERSION, handler=HANDLER_FILE)))
    return folder
