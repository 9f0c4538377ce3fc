"""TorchServe's classes are changed only where they are those that we know."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest

from etenet.errors import UsageError
from etenet.serving.torchserve_classes import CHANGES, Change, write_classes


@pytest.fixture
def classes() -> dict[str, bytes]:
    """Those of the TorchServe that is installed, by their files."""
    spec = importlib.util.find_spec("ts")
    assert spec
    assert spec.origin
    with zipfile.ZipFile(Path(spec.origin).parent / "frontend" / "model-server.jar") as jar:
        return {change.file: jar.read(change.file) for change in CHANGES}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.without)
def test_a_torchserve_in_which_a_change_finds_nothing_is_refused(
    change: Change, classes: dict[str, bytes], tmp_path: Path
) -> None:
    changed, times = change.made(classes[change.file])
    assert times == change.times
    with zipfile.ZipFile(tmp_path / "other.jar", "w") as jar:
        for file, code in {**classes, change.file: changed}.items():
            jar.writestr(file, code)
    told = rf"another TorchServe, in which {re.escape(change.without)};.*pip install torchserve==0"
    with pytest.raises(UsageError, match=told):
        write_classes(tmp_path / "other.jar", tmp_path / "classes")
    assert not (tmp_path / "classes").exists()


def test_a_jar_without_the_classes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.jar", "w") as jar:
        jar.writestr("org/pytorch/serve/Other.class", bytes(range(256)))
    with pytest.raises(UsageError, match="another TorchServe, in which gRPC listens"):
        write_classes(tmp_path / "other.jar", tmp_path / "classes")
