"""How long torch's threads spin while they wait, unless the user has chosen that."""

from __future__ import annotations

import subprocess
import sys

import pytest

from etenet.linux import SPIN_COUNT, thread_settings
from tests.conftest import REPOSITORY, Server


@pytest.mark.parametrize("variable", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_the_setting_of_the_user_wins(variable: str) -> None:
    assert thread_settings({"PATH": "/bin"}) == {"GOMP_SPINCOUNT": SPIN_COUNT}
    assert thread_settings({variable: "ACTIVE"}) == {}


def test_a_worker_of_the_server_has_the_setting(server: Server) -> None:
    worker = server.worker()
    assert worker is not None
    assert worker.environ()["GOMP_SPINCOUNT"] == SPIN_COUNT


def test_the_command_sets_it_before_it_imports_torch() -> None:
    code = """
import os, sys
from etenet.cli import main
main(["score", "--predictions", "missing", "--references", "missing"])
print("torch" in sys.modules, os.environ["GOMP_SPINCOUNT"])
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", SPIN_COUNT]
