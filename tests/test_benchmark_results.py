"""A benchmark's result in the repository belongs to a commit: a changed tree is refused before the benchmark runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import (
    capacity,
    decode,
    encoder,
    jobs,
    neighbours,
    saturation,
    scale,
    search,
    server,
    training,
    two_stages,
)
from benchmarks.gpu import __main__ as gpu
from benchmarks.rig import command
from benchmarks.rig.record import RESULTS, Results
from etenet.errors import UsageError


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "code.py").write_text("1\n")
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "Begin"]):
        subprocess.run(["git", "-C", folder, *arguments], check=True)
    return folder


def modify(repository: Path) -> None:
    (repository / "code.py").write_text("2\n")


def add(repository: Path) -> None:
    (repository / "new.py").write_text("3\n")


def results(repository: Path) -> Path:
    return repository / "benchmarks" / "results"


def test_a_clean_tree_keeps_one_result_after_the_other(repository: Path) -> None:
    for name in ("one", "two"):
        path = Results.start(results(repository), repository).conclude(name, {"seconds": 1.0})
        record = json.loads(path.read_text())
        assert path == results(repository) / f"{name}.json"
        assert record["changed"] is False
        assert record["seconds"] == 1.0


@pytest.mark.parametrize(("change", "file"), [(modify, "code.py"), (add, "new.py")])
def test_a_changed_tree_is_refused_in_one_line_that_names_the_file(
    repository: Path, change: Callable[[Path], None], file: str
) -> None:
    change(repository)
    with pytest.raises(UsageError, match=rf"^the tree differs from its commit \w+ in '{file}'; commit first, .*--out$"):
        Results.start(results(repository), repository)


@pytest.mark.parametrize(
    ("benchmark", "arguments"),
    [
        (decode, ["--clips", "nowhere"]),
        (encoder, []),
        (gpu, ["--dry-run"]),
        (jobs, []),
        (neighbours, []),
        (capacity, ["--clips", "examples"]),
        (saturation, []),
        (scale, []),
        (search, []),
        (server, []),
        (training, ["--dry-run"]),
        (two_stages, ["demo", "--data", "nowhere", "--runs", "nowhere"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_every_benchmark_refuses_a_changed_tree_before_it_runs(
    benchmark: ModuleType, arguments: list[str], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modify(repository)
    monkeypatch.setattr(command, "REPOSITORY", repository)
    with pytest.raises(UsageError, match="the tree differs"):
        benchmark.main([*arguments, "--out", str(results(repository))])


def test_outside_the_repository_a_changed_tree_is_named_as_such(repository: Path, tmp_path: Path) -> None:
    modify(repository)
    record = json.loads(Results.start(tmp_path / "out", repository).conclude("one", {}).read_text())
    assert record["changed"] is True
    assert "dirty" not in record["commit"]


@pytest.mark.parametrize("change", [modify, add])
def test_a_tree_that_changes_during_the_run_gets_a_line_and_no_file(
    repository: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    started = Results.start(results(repository), repository)
    change(repository)
    with pytest.raises(UsageError, match="the tree changed while the benchmark ran"):
        started.conclude("one", {"seconds": 1.0})
    record = json.loads(capsys.readouterr().out)
    assert (record["changed"], record["seconds"]) == (True, 1.0)
    assert not results(repository).exists()


def test_without_a_commit_results_go_only_elsewhere(tmp_path: Path) -> None:
    tree = tmp_path / "unpacked"
    tree.mkdir()
    with pytest.raises(UsageError, match="commit of this tree is unknown"):
        Results.start(results(tree), tree)
    record = json.loads(Results.start(tmp_path / "out", tree).conclude("one", {}).read_text())
    assert (record["commit"], record["changed"]) == ("unknown", None)


def test_a_refusal_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise UsageError("the tree differs")

    with pytest.raises(SystemExit) as ended:
        command.run("search", refuse)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "search: the tree differs\n"


def test_no_result_is_of_a_changed_tree() -> None:
    records = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert not {name for name, record in records.items() if "dirty" in record["commit"] or record.get("changed")}
