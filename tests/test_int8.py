"""int8 is packaged only where its captions are still those of float32, and everything says that it is int8."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray

import etenet
from etenet import metrics
from etenet.assets import CANARY_CLIP
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import Video
from etenet.cli import main
from etenet.cli.int8 import Quantiser
from etenet.errors import UsageError
from etenet.jobs.inputs import JobClip
from etenet.model import checkpoint as checkpoints
from etenet.runtime import BF16, int8, interface
from etenet.runtime.openvino import CompiledEncoder, compile_encoder, core
from etenet.scoring import agreement
from etenet.scoring.agreement import Agreement, compare
from etenet.serving import archive
from handler.etenet_handler import EtenetHandler
from tests import clips
from tests.conftest import DEMO, EXAMPLES, REPOSITORY
from tests.test_handler import Context

Capture = pytest.CaptureFixture[str]
FIRST, SECOND = (0.0, 0.8), (0.8, 1.6)  # seconds of each example
BODIES = [(REPOSITORY / "examples" / name).read_bytes() for name in EXAMPLES]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of twelve clips of the demo world: two parts of each example."""
    folder = tmp_path_factory.mktemp("parts")
    lines = [
        {"path": str(REPOSITORY / "examples" / name), "start_s": start_s, "end_s": end_s}
        for start_s, end_s in (FIRST, SECOND)
        for name in EXAMPLES
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "clips.jsonl"


@pytest.fixture(scope="module")
def mar(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "etenet.mar"
    assert main(["package", str(DEMO), "--int8", "--calibrate", str(parts), "--out", str(out)]) == 0
    return out


def test_an_int8_archive_says_so_and_captions_as_float32_does(mar: Path, tmp_path: Path) -> None:
    archive.unpack(mar, unpacked := tmp_path / "unpacked")
    assert "squeezenet1_1 in int8" in str(archive.about(unpacked))
    float32 = archive.package(DEMO, tmp_path / "float32.mar")
    assert mar.stat().st_size < float32.stat().st_size - 1_000_000  # weights of one byte, not of four
    handler, context = EtenetHandler(), Context(unpacked)
    handler.initialize(context)
    context.headers = [{}] * len(BODIES)
    answers = [json.loads(body) for body in handler.handle([{"body": body} for body in BODIES], context)]
    assert [answer["caption"] for answer in answers] == list(EXAMPLES.values())
    assert {answer["model"]["precision"] for answer in answers} == {"int8"}
    (info,) = metrics.MODEL_INFO.collect()
    assert [sample.value for sample in info.samples if sample.labels["precision"] == "int8"] == [1.0]


@pytest.mark.long
def test_int8_that_changes_captions_is_refused_with_the_figures_and_leaves_no_archive(
    parts: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Ranges of black frames fit nothing else."""
    black = tmp_path / "black.mp4"
    black.write_bytes(clips.video(pictures=[np.zeros((64, 96, 3), np.uint8)] * 20))
    lines = parts.read_text().splitlines()
    for place in (0, 4, 8):
        lines[place] = json.dumps({"video": f"black {place}", "path": str(black)})
    (tmp_path / "clips.jsonl").write_text("\n".join(lines))
    out = tmp_path / "etenet.mar"
    assert main(["package", str(DEMO), "--int8", "--calibrate", str(tmp_path / "clips.jsonl"), "--out", str(out)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("etenet package: ")]
    first, last = (line for line in lines if "of 9 held-out clips (" in line)
    assert first.endswith("trying again with more care, which takes longer")
    assert "98 % are needed; package without --int8, or ask for less with --agreement" in last
    assert not out.exists()


def test_references_allow_other_captions_that_score_as_well() -> None:
    references = {"a": ["a dog runs", "a dog is running"], "b": ["a cat sleeps"], "c": ["a man sings", "a man talks"]}
    exact = {"a": "a dog runs", "b": "a cat sleeps", "c": "a man sings"}
    as_good, worse = {**exact, "c": "a man talks"}, {**exact, "c": "a cat sleeps"}
    assert compare(exact, exact, references).cider_points == compare(exact, as_good, references).cider_points
    good = compare(exact, as_good, references)
    assert (good.same, good.as_good, good.share) == (2, 1, 1.0)
    assert good.reaches(None)
    assert good.reaches(1.0)
    bad = compare(exact, worse, references)
    assert (bad.same, bad.as_good) == (2, 0)
    assert not bad.reaches(None)
    assert not compare(exact, as_good).reaches(None)
    assert compare(exact, as_good).reaches(2 / 3)


@pytest.mark.parametrize(
    ("lost", "share", "least", "reached"),
    [(0.5, 0.5, None, True), (0.51, 0.5, None, False), (0.0, 0.5, 0.6, False), (-9.0, 0.6, 0.6, True)],
)
def test_with_references_cider_decides_and_agreement_only_if_it_is_asked_for(
    lost: float, share: float, least: float | None, reached: bool
) -> None:
    compared = Agreement(clips=100, same=round(100 * share), cider_points=(40.0, 40.0 - lost))
    assert compared.reaches(least) is reached
    assert f"CIDEr {40 - lost:.1f} instead of 40.0" in str(compared)


def test_without_references_98_percent_of_the_captions_must_be_the_same() -> None:
    assert agreement.LEAST_AGREEMENT == 0.98
    assert Agreement(clips=100, same=98).reaches(None)
    assert not Agreement(clips=100, same=97).reaches(None)
    assert "97 of 100 held-out clips (97.0 %) keep their caption" in str(Agreement(clips=100, same=97))


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--int8"], "give them with --calibrate"),
        (["--calibrate", "examples"], "need --int8"),
        (["--agreement", "0.5"], "need --int8"),
        (["--int8", "--calibrate", "nowhere.mp4"], "no file at nowhere.mp4"),
        (["--int8", "--calibrate", *(f"examples/{name}" for name in EXAMPLES)], "6 clips to calibrate with"),
        (["--int8", "--calibrate", "examples", "--references", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_use_is_one_line(flags: list[str], wrong: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["package", str(DEMO), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wrong in line


def test_references_that_lack_a_clip_are_named_before_any_work(parts: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "references.json").write_text(json.dumps({"another": ["a dog"]}))
    given = ["--references", str(tmp_path / "references.json")]
    assert main(["package", str(DEMO), "--int8", "--calibrate", str(parts), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no reference for" in line


def test_references_are_found_by_names_that_look_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etenet.cli.int8.Scorer", Mock())
    names = [normalize("NFD", f"clips/{number} ä.mp4") for number in range(10)]
    held_out = [name for name in names if name not in names[::4]]
    for given in ("clips/{} ä.mp4", "{} ä"):
        references = {given.format(number): ["a dog"] for number in range(10)}
        found = Quantiser.of([JobClip(name, name) for name in names], references, None).references
        assert found == {name: ["a dog"] for name in held_out}


def test_without_nncf_one_line_names_the_extra(parts: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert main(["package", str(DEMO), "--int8", "--calibrate", str(parts)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'etenet[int8]'" in line


def can_bf16() -> bool:
    """As the processor itself says. Its flags are Linux's."""
    return "bf16" in Path("/proc/cpuinfo").read_text()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "encoder.xml"
    compile_encoder(checkpoints.load(DEMO), path)
    return path


def test_bf16_captions_as_float32_does_or_says_that_the_processor_cannot(graph: Path) -> None:
    if not can_bf16():
        with pytest.raises(UsageError, match="no instructions for bfloat16; set precision to packaged"):
            etenet.load(DEMO, compiled_encoder=graph, precision=BF16, sandboxed=False)
        return
    captioner = etenet.load(DEMO, compiled_encoder=graph, precision=BF16, sandboxed=False)
    assert captioner.network.precision == "bf16"
    assert [captioner.caption(body).text for body in BODIES] == list(EXAMPLES.values())


def test_bf16_is_refused_where_the_features_of_the_test_clip_differ(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = etenet.load(DEMO, compiled_encoder=graph, sandboxed=False)
    (clip,) = plain.decode(Video(0, CANARY_CLIP.read_bytes(), CaptionOptions())).result()
    interface.require_similar_features(plain.network, plain.network, clip.frames)
    monkeypatch.setattr(interface, "LEAST_SIMILARITY", 1.1)
    with pytest.raises(UsageError, match=r"^in float32 .* cosine of 1\.0000 .* set precision to packaged$"):
        interface.require_similar_features(plain.network, plain.network, clip.frames)


@pytest.mark.parametrize(
    ("precision", "compiled", "wrong"),
    [("int4", True, "precision must be packaged or bf16, got 'int4'"), (BF16, False, "bf16 needs OpenVINO")],
)
def test_a_precision_that_cannot_be_had_is_refused(graph: Path, precision: str, compiled: bool, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        etenet.load(DEMO, compiled_encoder=graph if compiled else False, precision=precision, sandboxed=False)


def test_an_int8_archive_is_not_computed_in_bf16(mar: Path, tmp_path: Path) -> None:
    archive.unpack(mar, tmp_path / "unpacked")
    with pytest.raises(UsageError, match="packaged in int8"):
        CompiledEncoder(tmp_path / "unpacked" / archive.ENCODER_FILE, threads=1, bf16=True)


def weights_converted_by_openvino(encoder: Path) -> list[str]:
    """When it compiles. It does so in several threads where it computes several frames at a time: a race."""
    compiled = core().compile_model(encoder, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers = compiled.get_runtime_model().get_ops()
    return [layer.get_friendly_name() for layer in layers if layer.get_rt_info()["layerType"].astype(str) == "Convert"]


def test_no_weights_are_left_to_openvino_to_convert(mar: Path, tmp_path: Path) -> None:
    archive.unpack(mar, unpacked := tmp_path / "unpacked")
    assert weights_converted_by_openvino(unpacked / archive.ENCODER_FILE) == []


def test_weights_of_layers_that_stay_in_float32_are_converted_before(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's convolutions after pools that give indices are such layers."""
    monkeypatch.setattr(int8, "_plain_pools", lambda _: None)
    frames, encoders = np.concatenate([frames_of(body) for body in BODIES]), {}
    for name, fold in (("left", lambda _: None), ("folded", int8.fold_leftovers)):
        monkeypatch.setattr(int8, "fold_leftovers", fold)
        int8.quantise(graph, tmp_path / f"{name}.xml", frames[::6], careful=False)
        encoders[name] = CompiledEncoder(tmp_path / f"{name}.xml", threads=1)(frames)
    assert len(weights_converted_by_openvino(tmp_path / "left.xml")) == 3
    assert weights_converted_by_openvino(tmp_path / "folded.xml") == []
    np.testing.assert_allclose(encoders["folded"], encoders["left"], rtol=1e-4, atol=1e-3)


def frames_of(body: bytes) -> NDArray[np.uint8]:
    (clip,) = (
        etenet.load(DEMO, compiled_encoder=False, sandboxed=False).decode(Video(0, body, CaptionOptions())).result()
    )
    return clip.frames


@pytest.mark.long
def test_the_features_of_int8_need_no_vnni(mar: Path, tmp_path: Path) -> None:
    """8-bit weights would overflow there."""
    archive.unpack(mar, unpacked := tmp_path / "unpacked")
    code = """
import sys
import numpy as np
from pathlib import Path
from etenet.runtime.openvino import CompiledEncoder
frames = np.load(sys.argv[2])
np.save(sys.argv[3], CompiledEncoder(Path(sys.argv[1]), threads=1)(frames))
"""
    np.save(tmp_path / "frames.npy", np.concatenate([frames_of(body) for body in BODIES]))
    features = {}
    for isa in ("AVX2", "DEFAULT"):
        arguments = [unpacked / archive.ENCODER_FILE, tmp_path / "frames.npy", tmp_path / f"{isa}.npy"]
        environment = {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": str(REPOSITORY / "src")}
        subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, check=True)
        features[isa] = np.load(tmp_path / f"{isa}.npy")
    a, b = features.values()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.999
