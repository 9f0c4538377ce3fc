"""The `etenet` command: results on stdout, everything else on stderr, three exit statuses."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import av
import pytest

import etenet
from benchmarks.rig.servers import config_on_free_ports
from etenet import doctor
from etenet.cli import main
from etenet.serving import archive
from etenet.serving.config import ServerConfig, unusable
from etenet.serving.loopback import Address
from tests import clips
from tests.conftest import CAPTION, DEMO, EXAMPLES, HERE, REAL, REPOSITORY

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_caption_gives_the_captions_of_the_examples(capsys: Capture) -> None:
    assert main([*CAPTION, *(f"examples/{name}" for name in EXAMPLES)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {Path(line["video"]).name: line["caption"] for line in lines} == EXAMPLES


def test_caption_lists_the_clips_that_failed_and_does_the_rest(tmp_path: Path, capsys: Capture) -> None:
    """Eight in one batch, two of them bad."""
    out, bad = tmp_path / "out.jsonl", {"text.mp4": b"not a video", "cut.mp4": clips.video(40)[:1500]}
    for name, body in bad.items():
        (tmp_path / name).write_bytes(body)
    first, *others = (f"examples/{name}" for name in EXAMPLES)
    paths = [first, str(tmp_path / "text.mp4"), *others, str(tmp_path / "cut.mp4")]
    assert main([*CAPTION, *paths, "--out", str(out), "--captions", "2", "--in-order"]) == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["video"] for line in lines] == paths
    good = [line for line in lines if "error" not in line]
    assert [line["caption"] for line in good] == list(EXAMPLES.values())
    assert all(len(line["captions"]) == 2 for line in good)
    codes = [line["error"]["code"] for line in lines if "error" in line]
    assert codes == ["not_a_video", "undecodable_video"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(name in printed.err for name in bad)


def test_the_version_is_that_of_the_package(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"etenet {etenet.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", "missing.mp4"],
        ["caption", "README.md", "--checkpoint", "missing.pt"],
        ["caption", "README.md", "--checkpoint", "README.md"],
        ["caption", "README.md", "--beam-size", "99"],
        ["package", "missing.pt"],
        ["package", "README.md"],
        ["serve", "--checkpoint", "missing.pt"],
        ["serve", "--checkpoint", "README.md"],
        ["serve", "--checkpoint", "missing.mar"],
        ["serve", "--config", "missing.properties"],
        ["serve", "--host", "192.0.2.1"],
        ["serve", "--port", "65535"],
        ["init", "--encoder", "resnet17", "--words", "README.md"],
        ["init", "--encoder", "squeezenet1_1", "--words", "missing.txt"],
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments: list[str], capsys: Capture) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"etenet {arguments[0]}: ")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_an_archive_replaces_no_checkpoint(small_checkpoint: Path, capsys: Capture) -> None:
    before = small_checkpoint.read_bytes()
    assert main(["package", str(DEMO), "--out", str(small_checkpoint)]) == 2
    assert "the name of an archive ends in .mar" in capsys.readouterr().err
    assert small_checkpoint.read_bytes() == before


def test_scores_of_clips_do_not_replace_what_is_scored(tmp_path: Path, capsys: Capture) -> None:
    (captions := tmp_path / "captions.json").write_text(before := '{"a": ["a dog runs"]}')
    flags = [word for name in ("predictions", "references", "per-clip") for word in (f"--{name}", str(captions))]
    assert main(["score", *flags]) == 2
    assert f"--per-clip would replace {captions}" in capsys.readouterr().err
    assert captions.read_text() == before


def test_an_archive_is_not_packaged_again(tmp_path: Path, capsys: Capture) -> None:
    (archive := tmp_path / "own.mar").write_bytes(b"")
    assert main(["package", str(archive)]) == 2
    assert f"{archive} is an archive already; serve it: etenet serve --checkpoint {archive}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "variables", "message"),
    [
        ("", {"ETENET_REQUEST_LOG": "json"}, "192.0.2.1 is no IPv4 address of this machine"),
        ("request_log = json\njob_queue_size=many", {}, "job_queue_size must be a whole number"),
        ("request_log=json\nrequest_log=json", {}, "request_log is there twice"),
    ],
)
def test_where_the_log_is_json_an_error_is_too(
    settings: str, variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    (config := tmp_path / "config.properties").write_text(settings)
    command = [sys.executable, "-m", "etenet", "serve", "--config", str(config), "--host", "192.0.2.1"]
    ended = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = [json.loads(line) for line in ended.stderr.splitlines()]
    assert line["message"].startswith("etenet serve: ")
    assert message in line["message"]


@pytest.mark.parametrize(
    "arguments", [["--port", "many"], ["--prot", "9000"], ["--config"], ["--config", "own.properties", "--host"]]
)
def test_where_the_log_is_json_an_error_in_the_arguments_is_too(arguments: list[str], tmp_path: Path) -> None:
    for name in ("config.properties", "own.properties"):
        (tmp_path / name).write_text("request_log=json")
    command = [sys.executable, "-m", "etenet", "serve", *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    lines = [json.loads(line)["message"] for line in ended.stderr.splitlines()]
    assert ": error: " in lines[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--server", "http://localhost:1", "--engine", "ray"], "leave one of the two out"),
        (["--server", "http://localhost:1", *HERE], "leave out --checkpoint"),
        (["--ray-address", "ray://head:10001"], "--ray-address is for --engine ray; give that too"),
        (["--workers", "8"], "--workers is for --server and --engine ray; here, ETENET_CORES"),
        (["--seed", "1"], "--seed is for --sample; give that too"),
        (["--retry-failed"], "name it with --out"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(flags: list[str], message: str, capsys: Capture) -> None:
    assert main(["caption", "examples", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--out", ""], ["--report", ""], ["--server", ""], ["--checkpoint", ""], [""]])
def test_a_variable_that_is_not_set_is_no_folder_and_no_file(flags: list[str], capsys: Capture) -> None:
    """It had captioned all below the current folder, in this process, and to the terminal."""
    with pytest.raises(SystemExit, match="2"):
        main(["caption", "examples", *flags])
    assert f"argument {flags[0] or 'PATH'}: must not be empty; a variable" in capsys.readouterr().err


LOGGED = """
import fcntl, os, resource, struct, sys, termios
from etenet.serving.json_lines import write_json_lines
write_json_lines()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as on a full disk
print("lost", file=sys.stderr, flush=True)
while struct.unpack("i", fcntl.ioctl(2, termios.FIONREAD, b"1234"))[0]:
    pass
print("lost, too", file=sys.stderr, flush=True)
while struct.unpack("i", fcntl.ioctl(2, termios.FIONREAD, b"1234"))[0]:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print("kept", file=sys.stderr, flush=True)
"""


def test_a_log_of_json_goes_on_when_the_disk_has_room_again(tmp_path: Path) -> None:
    with (log := tmp_path / "log").open("wb") as stderr:
        subprocess.run([sys.executable, "-c", LOGGED], stderr=stderr, cwd=REPOSITORY, check=True)
    assert json.loads(log.read_text().splitlines()[-1])["message"] == "kept"


def test_init_makes_a_checkpoint_of_any_encoder_that_captions(tmp_path: Path, capsys: Capture) -> None:
    words, out, clip = tmp_path / "words.txt", tmp_path / "init.pt", tmp_path / "clip.mp4"
    words.write_text("a\nDog\nruns\na\n")
    clip.write_bytes(clips.video(20))
    assert main(["init", "--encoder", "resnet18", "--words", str(words), "--out", str(out)]) == 0
    assert main(["caption", str(clip), "--checkpoint", str(out)]) == 0
    captioner = etenet.load(out)
    assert captioner.encoder == "resnet18"
    assert captioner.checkpoint.vocabulary.known_words == ("a", "dog", "runs")
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["caption"].split()) <= {"a", "dog", "runs"}


def test_doctor_finds_nothing_wrong_here(tmp_path: Path, capsys: Capture) -> None:
    config = config_on_free_ports(tmp_path)
    assert main(["doctor", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "Python",
        "Java 17",
        "torch ",
        "no GPU",
        "TorchServe",
        f"PyAV {av.__version__} with FFmpeg {av.ffmpeg_version_info}; containers",
        "decoder processes",
        str(REAL.relative_to(REPOSITORY)),
        "ports",
    ):
        assert f"ok    {expected}" in printed


def test_doctor_names_what_is_wrong_and_how_to_fix_it(tmp_path: Path, capsys: Capture) -> None:
    config = config_on_free_ports(tmp_path)
    port = ServerConfig.read(config).inference.port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert main(["doctor", "--config", str(config), "--checkpoint", "missing.pt"]) == 1
    printed = capsys.readouterr().out
    assert f"FAIL  port {port} is taken" in printed
    assert "FAIL  no checkpoint at missing.pt" in printed
    assert printed.count("\n      fix: ") == 2


def test_doctor_examines_the_checkpoint_in_an_archive(small_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    mar, config = tmp_path / "small.mar", str(config_on_free_ports(tmp_path))
    archive.package(small_checkpoint, mar)
    assert main(["doctor", "--config", config, "--checkpoint", str(mar)]) == 0
    assert f"ok    {mar}: squeezenet1_1, 6 words" in capsys.readouterr().out
    mar.write_bytes(mar.read_bytes()[:-1])
    assert main(["doctor", "--config", config, "--checkpoint", str(mar)]) == 1
    assert f"FAIL  {mar} is damaged or not an archive" in capsys.readouterr().out


def test_doctor_goes_on_where_torch_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from etenet.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "doctor", "--config", str(config_on_free_ports(tmp_path))]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "fix: install a pair that fits: pip install 'torch<" in ended.stdout
    assert "FAIL  a package is missing or broken (import of torch halted" in ended.stdout
    assert "ok    TorchServe" in ended.stdout
    assert "ok    ports" in ended.stdout


@pytest.mark.parametrize("version", ["8.0_392", "17", "17.0.9", "26-ea", "27-internal"])
def test_doctor_reads_every_version_of_java(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2026-09-15' >&2\n")
    java.chmod(0o755)
    monkeypatch.setattr(doctor, "find_java", lambda: java)
    finding = doctor._java()
    assert finding.what == f"Java {version} at {java}"
    assert finding.good == (version != "8.0_392")


@pytest.mark.parametrize("command", ["doctor", "caption examples"])
@pytest.mark.parametrize("url", ["localhost:8080", "http://", "http://[::1:8080", "http://a:b", "http://a b:8080"])
def test_what_an_address_of_a_server_looks_like_is_said(command: str, url: str, capsys: Capture) -> None:
    assert main([*command.split(), "--server", url]) == 2
    assert f"--server must look like http://localhost:8080, got {url!r}\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["doctor", "caption examples"])
@pytest.mark.parametrize("key", ["\u201cmine\u201d", "mi\nne"])
def test_a_key_that_no_header_can_have_is_refused(
    key: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("ETENET_SERVER_KEY", key)
    assert main([*command.split(), "--server", "http://127.0.0.1:9"]) == 2
    assert "ETENET_SERVER_KEY has characters that no header can have" in capsys.readouterr().err


def test_a_port_that_only_root_may_use_is_not_called_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forbidding(socket.socket):
        def bind(self, address: tuple[str, int]) -> None:
            if address[1] == 80:
                raise PermissionError(errno.EACCES, "Permission denied")
            super().bind(address)

    monkeypatch.setattr("etenet.serving.config.socket.socket", Forbidding)
    fault = unusable([Address("127.0.0.1", 80)])
    assert fault is not None
    assert fault[0] == "only root may listen on port 80"
    assert unusable([Address("127.0.0.1", 0)]) is None


def test_all_taken_ports_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [taken.getsockname()[1] for taken in (one, two)]
        fault = unusable([Address("127.0.0.1", port) for port in ports])
    assert fault
    assert fault[0] == f"ports {ports[0]}, {ports[1]} are taken"


def test_a_setting_that_is_there_twice_is_named_with_its_line(tmp_path: Path, capsys: Capture) -> None:
    config = config_on_free_ports(tmp_path)
    lines = len(config.read_text().splitlines())
    with config.open("a") as file:
        file.write("# job_queue_size=1\n job_queue_size = 2\n")
    assert main(["serve", "--checkpoint", str(REAL), "--config", str(config)]) == 2
    assert f"config.properties, line {lines + 2}: job_queue_size is there twice; keep one" in capsys.readouterr().err


def test_doctor_reports_a_server_that_does_not_answer_without_importing_torch() -> None:
    code = "import sys; from etenet.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "doctor", "--server", "http://127.0.0.1:9"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "FAIL" in printed
    assert printed.endswith("fix: start it with: etenet serve\nFalse\n")


def test_train_without_its_extra_names_it() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from etenet.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "curves", "missing"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "pip install 'etenet[train]'" in finished.stderr
