"""How long torch's threads spin while they wait, unless the user has chosen that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from etenet.linux import CORES_VARIABLE, SPIN_COUNT, cores, thread_settings
from tests.conftest import REPOSITORY, Server


@pytest.mark.parametrize("variable", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_the_setting_of_the_user_wins(variable: str) -> None:
    default = {"GOMP_SPINCOUNT": SPIN_COUNT, "OMP_NUM_THREADS": str(cores(environment={}))}
    assert thread_settings({"PATH": "/bin"}) == default
    chosen = {variable: "ACTIVE", "OMP_NUM_THREADS": "7"}
    assert thread_settings(chosen) == chosen
    assert thread_settings({CORES_VARIABLE: "5"})["OMP_NUM_THREADS"] == "5"


def test_a_worker_of_the_server_has_the_setting(server: Server) -> None:
    worker = server.worker()
    assert worker is not None
    environment = worker.environ()
    assert {name: environment[name] for name in thread_settings(os.environ)} == thread_settings(os.environ)


CHOICES = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


def run(code: str, **variables: str) -> list[str]:
    """The words that a Python prints in which nobody has chosen how many threads there are, and how they wait."""
    unset = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=unset | variables, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()


def test_the_command_sets_it_before_it_imports_torch() -> None:
    code = """
import os, sys
from etenet.cli import main
main(["score", "--predictions", "missing", "--references", "missing"])
print("torch" in sys.modules, os.environ["GOMP_SPINCOUNT"])
"""
    assert run(code) == ["False", SPIN_COUNT]


def test_commands_of_training_set_it_before_they_import_torch() -> None:
    code = "import os, sys, training; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    assert run(code) == ["False", SPIN_COUNT]


def test_training_uses_as_many_cores_as_it_may() -> None:
    code = """
import torch
from training.loop.processes import init_processes
with init_processes("cpu"):
    print(torch.get_num_threads())
"""
    assert run(code, **{CORES_VARIABLE: "1"}) == ["1"]
