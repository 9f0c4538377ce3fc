"""An archive has the same bytes every time, and captions without the repository."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.rig.servers import config_on_free_ports
from etenet.errors import CheckpointError, UsageError
from etenet.serving import archive
from tests import clips
from tests.conftest import DEMO, EXAMPLES, REPOSITORY
from tests.hostile.damage import with_one_bit_flipped

RUN = """
import json, sys
sys.path[:0] = [sys.argv[1]]
sys.path.append(sys.argv[2])
import etenet, etenet_handler

class Context:
    model_name, manifest, model_yaml_config = "etenet", json.load(open(sys.argv[1] + "/MAR-INF/MANIFEST.json")), None
    system_properties = {"model_dir": sys.argv[1], "gpu_id": None}
    statuses = {}
    def get_all_request_header(self, number):
        return {}
    def get_request_id(self, number):
        return str(number)
    def set_response_status(self, code, phrase, number):
        self.statuses[number] = code
    def set_response_header(self, number, name, value):
        assert name.lower() in ("x-etenet-error", "x-request-id")
    def set_response_content_type(self, number, value):
        pass

handler, context = etenet_handler.EtenetHandler(), Context()
handler.initialize(context)
bodies = [open(path, "rb").read() for path in sys.argv[3:]]
responses = [json.loads(body) for body in handler.handle([{"body": bytearray(body)} for body in bodies], context)]
captions = [response.get("caption") or response["error"]["code"] for response in responses]
slow = ("torch", "torchvision", "timm", "pretrainedmodels", "nltk", "torch._dynamo")
slow = [name for name in slow if name in sys.modules]
print(json.dumps({"from": etenet.__file__, "captions": captions, "statuses": context.statuses, "slow": slow}))
"""

BREAK = """
from etenet.errors import DeviceFailed

def broken(frames):
    raise RuntimeError("a kernel failed")

def fails():
    raise DeviceFailed("cuda:63 no longer computes")

handler.captioner.network.recover = fails
handler.captioner.network.features = broken
handler.handle([{"body": bytearray(open(sys.argv[3], "rb").read())}], context)
print("continued")
"""


@pytest.fixture(scope="module")
def demo_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive.package(DEMO, tmp_path_factory.mktemp("archive") / "etenet.mar")


def test_an_archive_has_the_same_bytes_every_time(
    demo_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where nothing is kept, so it compiles
    again = archive.package(DEMO, tmp_path / "sub" / "other.mar")
    assert again.read_bytes() == demo_archive.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == ["other.mar"]


@pytest.fixture
def unpacked(demo_archive: Path, tmp_path: Path) -> Path:
    archive.unpack(demo_archive, tmp_path / "unpacked")
    return tmp_path / "unpacked"


def in_a_fresh_interpreter(code: str, unpacked: Path, *clips: Path) -> subprocess.CompletedProcess[str]:
    """-I and -S exclude the working directory, the environment and the editable installation of the repository."""
    command = [sys.executable, "-I", "-S", "-c", code, str(unpacked), sysconfig.get_path("purelib"), *map(str, clips)]
    return subprocess.run(command, cwd=unpacked.parent, capture_output=True, text=True, check=False)


def test_an_archive_captions_without_the_repository(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"not a video")
    (tmp_path / "cut").write_bytes(clips.video(40)[:1500])
    first, *others = (REPOSITORY / "examples" / name for name in EXAMPLES)
    finished = in_a_fresh_interpreter(RUN, unpacked, first, tmp_path / "text", *others, tmp_path / "cut")
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["from"] == str(unpacked / "etenet" / "__init__.py")
    first_caption, *other_captions = EXAMPLES.values()
    assert result["captions"] == [first_caption, "not_a_video", *other_captions, "undecodable_video"]
    assert result["statuses"] == {"1": 415, "7": 422}
    assert result["slow"] == []  # with a compiled encoder a worker does not import what takes seconds


@pytest.mark.parametrize(
    ("contents", "wrong"), [(None, "no archive at"), (b"PK but not a zip", "damaged or not an archive")]
)
def test_a_file_that_is_not_an_archive_is_not_unpacked(contents: bytes | None, wrong: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "etenet.mar").write_bytes(contents)
    with pytest.raises(UsageError, match=wrong):
        archive.unpack(tmp_path / "etenet.mar", tmp_path / "unpacked")


def test_an_archive_of_another_program_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(foreign := tmp_path / "other.mar", "w") as contents:
        contents.writestr(archive.MANIFEST_FILE, "{}")
    with pytest.raises(UsageError, match=r"other\.mar was not made by etenet package"):
        archive.unpack(foreign, tmp_path / "unpacked")


@pytest.mark.parametrize("name", [archive.MANIFEST_FILE, archive.CHECKPOINT_FILE, "etenet/model/config.py"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_archive_does_not_pass_verification(unpacked: Path, name: str, damage: str) -> None:
    file = unpacked / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(UsageError, match=f"{name} of the archive is damaged"):
        archive.verify(unpacked)


def test_an_archive_says_what_its_checkpoint_says(unpacked: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    assert str(archive.about(unpacked)) == "demo (squeezenet1_1); terms: Apache-2.0, made from rendered clips"
    nameless = archive.package(small_checkpoint, tmp_path / "nameless.mar")
    archive.unpack(nameless, tmp_path / "nameless")
    assert str(archive.about(tmp_path / "nameless")) == "a model without a name (squeezenet1_1); terms: not stated"
    (tmp_path / "nameless" / archive.ABOUT_FILE).unlink()
    unknown = "a model without a name (an unknown encoder); terms: not stated"
    assert str(archive.about(tmp_path / "nameless")) == unknown


def test_no_flipped_bit_of_an_archive_is_accepted(demo_archive: Path, tmp_path: Path, thorough: bool) -> None:
    whole, rng, mar = demo_archive.read_bytes(), np.random.default_rng(0), tmp_path / "etenet.mar"
    directory = len(whole) - 2000, None
    for start, end in [(0, None), directory] * (100 if thorough else 10):
        mar.write_bytes(with_one_bit_flipped(whole, rng, start, end))
        with pytest.raises(UsageError, match=r"^.*etenet\.mar is damaged or not an archive .*$"):
            archive.unpack(mar, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def repacked(unpacked: Path, mar: Path, changes: dict[str, bytes]) -> Path:
    """A .mar without a seal, as older versions and other programs write them."""
    with zipfile.ZipFile(mar, "w") as written:
        for name, content in (contents_of(unpacked) | changes).items():
            written.writestr(name, content)
    return mar


def test_a_flipped_bit_in_the_directory_of_an_older_archive_is_one_line_or_changes_nothing(
    unpacked: Path, tmp_path: Path, thorough: bool
) -> None:
    small = {archive.CHECKPOINT_FILE: b"small", archive.ENCODER_FILE: b"", "encoder.bin": b""}
    sums = (unpacked / archive.SUMS_FILE).read_text()
    for name, content in small.items():
        sums = sums.replace(
            hashlib.sha256((unpacked / name).read_bytes()).hexdigest(), hashlib.sha256(content).hexdigest()
        )
    whole = repacked(unpacked, tmp_path / "etenet.mar", small | {archive.SUMS_FILE: sums.encode()})
    archive.unpack(whole, tmp_path / "expected")
    body, rng, mar = whole.read_bytes(), np.random.default_rng(0), tmp_path / "flipped.mar"
    directory, refusals = body.index(b"PK\1\2"), list[str]()
    for number in range(1000 if thorough else 50):
        mar.write_bytes(with_one_bit_flipped(body, rng, directory))
        folder = tmp_path / str(number)
        try:
            archive.unpack(mar, folder)
        except UsageError as error:
            refusals.append(str(error))
        else:
            assert contents_of(folder) == contents_of(tmp_path / "expected")
    assert refusals
    assert not [refusal for refusal in refusals if "\n" in refusal]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (archive.HANDLER_FILE, "etenet_handler.py of the archive is damaged"),
        ("etenet/__init__.py", "etenet/__init__.py of the archive is damaged"),
        ("torch.py", "'torch.py' came later"),
        ("__pycache__/etenet_handler.cpython-311.pyc", "__pycache__/etenet_handler"),
        ("x/../etenet_handler.py", "'x/../etenet_handler.py' came later"),
        ("MAR-INF/MANIFEST.json", "MAR-INF/MANIFEST.json of the archive is damaged"),
    ],
)
def test_a_changed_archive_is_not_unpacked(unpacked: Path, tmp_path: Path, name: str, named: str) -> None:
    before = (unpacked / name).read_bytes() if (unpacked / name).is_file() else b""
    changed = repacked(unpacked, tmp_path / "changed.mar", {name: before + b" "})
    with pytest.raises(UsageError, match=named):
        archive.unpack(changed, tmp_path / "changed")


def test_code_of_a_changed_archive_never_runs(unpacked: Path, tmp_path: Path) -> None:
    handler = (unpacked / archive.HANDLER_FILE).read_text()
    changed = f"{handler}\nopen({str(tmp_path / 'executed')!r}, 'w')\n"
    (tmp_path / "model_store").mkdir()
    repacked(unpacked, tmp_path / "model_store" / "etenet.mar", {archive.HANDLER_FILE: changed.encode()})
    command = [sys.executable, "-m", "etenet", "serve", "--config", str(config_on_free_ports(tmp_path))]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert not (tmp_path / "executed").exists()
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("etenet serve: etenet_handler.py of the archive is damaged")
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("lines", [0, 1])
def test_missing_sums_are_damage(unpacked: Path, lines: int) -> None:
    sums = unpacked / archive.SUMS_FILE
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(UsageError, match="of the archive is damaged or missing"):
        archive.verify(unpacked)


def test_the_handler_verifies_its_archive_before_it_loads_it(unpacked: Path) -> None:
    checkpoint = unpacked / archive.CHECKPOINT_FILE
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"?")
    finished = in_a_fresh_interpreter(RUN, unpacked)
    assert finished.returncode == 1
    assert f"{archive.CHECKPOINT_FILE} of the archive is damaged" in finished.stderr


def test_a_worker_ends_when_its_device_fails(unpacked: Path) -> None:
    code = RUN.partition("bodies =")[0] + BREAK
    finished = in_a_fresh_interpreter(code, unpacked, REPOSITORY / "examples" / next(iter(EXAMPLES)))
    assert finished.returncode == 1
    assert "DeviceFailed" in finished.stderr
    assert "continued" not in finished.stdout


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  workers: 1", "\tworkers: 1", "is not YAML: while scanning .*found character '.t'.*line 16"),
        ("batchSize: 8", "batchsize: 8", ": no setting is called batchsize; write batchSize, or leave it out"),
        ("  batchSize: 16", "  batch_size: 16", ": no setting is called batch_size; write batchSize, or leave it out"),
        ("max_pixels:", "max_pixel:", ": no setting is called max_pixel; write max_pixels, or leave it out"),
        ("batchSize: 8", "batchSize: eight", ": batchSize must be a value like 8, got 'eight'"),
        ("batchSize: 8", "batchSize: 0", ": batchSize must be at least 1, got 0"),
        ("  workers: 1", "  workers: 0", ": workers must be at least 1, got 0"),
        ("minWorkers: 1", "minWorkers: 2", ": minWorkers must be at most maxWorkers, which is 1, got 2"),
        ("startupTimeout: 600", "startupTimeout:", ": startupTimeout must be a value like 600, got None"),
        ("decode_cpu_s: 5.0", "decode_cpu_s: yes", ": decode_cpu_s must be a value like 5.0, got True"),
        ("gpu:\n  workers: 1 # per GPU\n  batchSize: 16", "gpu: 2", ": gpu must have lines like batchSize: 8, got 2"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_packaged(
    old: str, new: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "handler" / archive.CONFIG_FILE).read_text()
    (config := tmp_path / archive.CONFIG_FILE).write_text(text.replace(old, new, 1))
    assert config.read_text() != text
    monkeypatch.setattr(archive, "bundled", lambda _: tmp_path)
    with pytest.raises(UsageError, match=f"^{config} ?{said}"):
        archive.package(DEMO, tmp_path / "new.mar")


def test_settings_may_be_left_out_and_be_those_of_torchserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = tmp_path / "handler"
    shutil.copytree(REPOSITORY / "handler", handler)
    (handler / archive.CONFIG_FILE).write_text("maxBatchDelay: 2\ndeviceType: cpu\netenet:\n  decode_cpu_s: 2\n")
    monkeypatch.setattr(archive, "bundled", lambda _: handler)
    assert archive.package(DEMO, tmp_path / "new.mar").is_file()


def test_a_bad_checkpoint_is_not_packaged(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        archive.package(bad, tmp_path / "etenet.mar")
    assert not (tmp_path / "etenet.mar").exists()
