"""On a CPU, an archive captions without torch: the same sentences, by the decoder on NumPy arrays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from etenet.captioning.captioner import Captioner
from etenet.captioning.captions import Caption
from etenet.captioning.options import CaptionOptions
from etenet.errors import UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.generate import generate, log_probs
from etenet.model.hypothesis import Hypothesis
from etenet.runtime import GRAPH
from etenet.runtime.decoder import ArrayDecoder
from etenet.runtime.kept import kept_encoder
from etenet.runtime.openvino import CompiledProducts
from etenet.serving import archive, torchserve
from etenet.serving.torchserve import delay_torch
from tests.conftest import CAPTION, DEMO, EXAMPLES, REAL, REPOSITORY, running_server

CLIPS = [REPOSITORY / "examples" / name for name in EXAMPLES]
CONFIG = DecoderConfig(
    feature_size=9, vocabulary_size=40, hidden_size=16, embedding_size=11, attention_size=7, projection_size=0
)
WORKER_MIB = 120


def decoder_of(config: DecoderConfig, *, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(config).eval().requires_grad_(False)
    decoder.to_words.weight.mul_(3)  # or nearly all words would be equally probable
    return decoder


def array_decoder(decoder: Decoder) -> ArrayDecoder:
    weights = {name: value.numpy() for name, value in decoder.state_dict().items()}
    return ArrayDecoder(decoder.config, weights, CompiledProducts)


def assert_same(beams: Sequence[Sequence[Hypothesis]], expected: Sequence[Sequence[Hypothesis]]) -> None:
    assert [[one.words for one in beam] for beam in beams] == [[one.words for one in beam] for beam in expected]
    for beam, of_torch in zip(beams, expected, strict=True):
        for one, other in zip(beam, of_torch, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
            assert one.word_log_probs == pytest.approx(other.word_log_probs, abs=1e-4)
            np.testing.assert_allclose(one.attention, other.attention, atol=1e-5)


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, projection_size=5), DecoderConfig(feature_size=64, vocabulary_size=900)]
)
@pytest.mark.parametrize("beam_size", [1, 2, 5, 10])
def test_all_beams_are_those_of_torch(config: DecoderConfig, beam_size: int) -> None:
    decoder = decoder_of(config)
    features = torch.randn(3, 16, config.feature_size, generator=torch.Generator().manual_seed(beam_size))
    expected = generate(decoder, features, beam_size=beam_size, max_words=7)
    assert_same(array_decoder(decoder).sentences(features.numpy(), beam_size=beam_size, max_words=7), expected)


@pytest.mark.parametrize("path", [DEMO, REAL])
def test_all_beams_of_the_shipped_checkpoints_are_those_of_torch(path: Path) -> None:
    decoder, arrays = checkpoints.load(path, with_encoder=False).model.decoder, checkpoints.load_arrays(path)
    size = decoder.config.feature_size
    features = torch.randn(8, 16, size, generator=torch.Generator().manual_seed(0)).abs()
    ours = ArrayDecoder(arrays.decoder_arrays.config, arrays.decoder_arrays.weights, CompiledProducts)
    for clip in features.split(1):
        expected = generate(decoder, clip, beam_size=5, max_words=20)
        assert_same(ours.sentences(clip.numpy(), beam_size=5, max_words=20), expected)


def test_log_probs_for_a_feature_are_those_of_torch() -> None:
    decoder, feature = decoder_of(CONFIG), torch.randn(9, generator=torch.Generator().manual_seed(0))
    sentences = [(5, 7), (3,), (8, 9, 10, 11), (7, 5)]
    expected = log_probs(decoder, feature, sentences)
    assert array_decoder(decoder).log_probs(feature.numpy(), sentences) == pytest.approx(expected, abs=1e-4)


def test_a_sentence_does_not_depend_on_what_was_said_before() -> None:
    decoder = decoder_of(CONFIG)
    first, second = np.random.default_rng(0).normal(size=(2, 1, 16, 9)).astype(np.float32)
    used = array_decoder(decoder)
    used.sentences(first, beam_size=5, max_words=7)
    again = used.sentences(second, beam_size=5, max_words=7)
    assert again == array_decoder(decoder).sentences(second, beam_size=5, max_words=7)


def test_features_that_are_not_finite_give_no_sentence_and_change_no_other_clip() -> None:
    ours, features = array_decoder(decoder_of(CONFIG)), np.ones((2, 16, 9), np.float32)
    features[0, 3] = np.nan
    without, good = ours.sentences(features, beam_size=5, max_words=7)
    assert without == []
    assert_same([good], ours.sentences(features[1:], beam_size=5, max_words=7))


@pytest.mark.parametrize("projection_size", [0, 5])
def test_the_config_knows_the_shapes_of_the_weights(projection_size: int) -> None:
    decoder = Decoder(replace(CONFIG, projection_size=projection_size))
    shapes = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    assert decoder.config.weight_shapes == shapes


COMMAND = """
import sys
from etenet.cli import main
status = main(sys.argv[1:])
print(status, sorted({"torch", "torchvision", "timm", "pretrainedmodels", "nltk"} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def demo_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive.package(DEMO, tmp_path_factory.mktemp("archive") / "demo.mar")


def test_what_one_command_has_compiled_and_measured_the_next_one_uses(
    demo_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with kept_encoder(DEMO):
        (kept,) = (tmp_path / "cache" / "etenet" / "encoders").iterdir()
    file = kept.stat().st_ino
    for name in ("first.mar", "second.mar"):
        command = [sys.executable, "-c", COMMAND, "package", str(DEMO), "--out", str(tmp_path / name)]
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert ended.stdout.splitlines() == [str(tmp_path / name), "0 []"], ended.stderr
        assert (tmp_path / name).read_bytes() == demo_archive.read_bytes()
    assert kept.stat().st_ino == file
    monkeypatch.setattr("etenet.runtime.layout._fastest", None)
    archive.package(DEMO, tmp_path / "third")


def test_an_encoder_that_was_compiled_in_another_way_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("etenet.runtime.kept.compiled_encoder", lambda *_: {"encoder.xml": b"graph"})
    for source in ("as before", "in another way"):
        monkeypatch.setattr("etenet.runtime.kept.sha256", lambda _, source=source: source)
        with kept_encoder(DEMO):
            pass
    assert len(list((tmp_path / "etenet" / "encoders").iterdir())) == 2


def captioned(checkpoint: Path, out: Path, cache: Path) -> str:
    """Caption the examples in a process of its own; returns its status, and what it imported."""
    options = ["--checkpoint", str(checkpoint), "--out", str(out), "--captions", "5"]
    command = [sys.executable, "-c", COMMAND, "caption", *map(str, CLIPS), *options]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), ended.stderr
    return ended.stdout.strip()


def beams(out: Path) -> dict[str, tuple[list[str], list[float]]]:
    """Of each clip: the sentences and their log probabilities."""
    records = [record for record in map(json.loads, out.read_text().splitlines()) if "captions" in record]
    return {
        Path(record["video"]).name: (
            [sentence["caption"] for sentence in record["captions"]],
            [sentence["log_prob"] for sentence in record["captions"]],
        )
        for record in records
    }


def test_the_command_captions_from_an_archive_without_torch(
    demo_archive: Path, captioner: Captioner, tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    assert captioned(demo_archive, out, tmp_path) == "0 []"
    given = beams(out)
    outcomes = captioner.caption_batch([clip.read_bytes() for clip in CLIPS], [CaptionOptions(captions=5)] * len(CLIPS))
    for clip, outcome in zip(CLIPS, outcomes, strict=True):
        assert isinstance(outcome, Caption)
        sentences, logarithms = given[clip.name]
        assert sentences == [each.text for each in outcome.sentences]
        assert logarithms == pytest.approx([each.log_prob for each in outcome.sentences], abs=2e-4)


def test_a_checkpoint_is_compiled_once_and_then_needs_no_torch(tmp_path: Path) -> None:
    first, second, without = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "without"))
    assert "torch" in captioned(DEMO, first, tmp_path)
    assert captioned(DEMO, second, tmp_path) == "0 []"
    assert "torch" in captioned(DEMO, without, Path(os.devnull))  # where nothing can be kept
    expected = beams(first)
    assert expected.keys() == {clip.name for clip in CLIPS}
    for again in map(beams, (second, without)):
        for name, (sentences, logarithms) in expected.items():
            assert again[name] == (sentences, pytest.approx(logarithms, abs=2e-4))  # which clips shared a batch differs


LIBRARY = """
import sys
from pathlib import Path
import etenet
captioner = etenet.load("model_store/demo.pt", **eval(sys.argv[2]))
print(captioner.caption(Path(sys.argv[1]).read_bytes()).text)
print("torch" in sys.modules)
"""


@pytest.mark.parametrize(("options", "on_torch"), [("{}", False), ("{'compiled_encoder': False}", True)])
def test_the_library_uses_what_was_compiled_unless_it_shall_not(options: str, on_torch: bool) -> None:
    with kept_encoder(DEMO):
        command = [sys.executable, "-c", LIBRARY, str(CLIPS[0]), options]
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines() == [EXAMPLES[CLIPS[0].name], str(on_torch)], ended.stderr


def test_no_thread_spins_after_the_products_of_a_search(captioner: Captioner) -> None:
    """Those of NumPy's OpenBLAS would, after all but the smallest products."""
    arrays = captioner.checkpoint.decoder_arrays
    decoder = ArrayDecoder(arrays.config, arrays.weights, CompiledProducts)
    features = np.random.default_rng(0).standard_normal((4, 16, arrays.config.feature_size), np.float32)
    of_all_s, of_this_thread_s = time.process_time(), time.thread_time()
    for _ in range(5):
        decoder.sentences(features, beam_size=5, max_words=20)
        decoder.log_probs(features[0, 0], [[4, 5]])
    of_this_thread_s = time.thread_time() - of_this_thread_s
    assert time.process_time() - of_all_s - of_this_thread_s < of_this_thread_s / 4


def test_only_the_newest_encoders_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("etenet.runtime.kept.compiled_encoder", lambda *_: {"encoder.xml": b"graph"})
    monkeypatch.setattr("etenet.runtime.kept.MOST_KEPT", 1)
    for checkpoint in (DEMO, REAL):
        with kept_encoder(checkpoint) as graph:
            assert graph is not None
            assert graph.read_bytes() == b"graph"
    (kept,) = (tmp_path / "etenet" / "encoders").iterdir()
    assert kept.name.startswith(checkpoints.inspect(REAL).id.removeprefix("sha256:"))


@pytest.mark.parametrize(
    "damage", [lambda kept: kept[:-1], lambda kept: kept.replace(b"graph", b"grapf"), lambda _: b""]
)
def test_a_damaged_encoder_is_compiled_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    monkeypatch.setattr("etenet.runtime.kept.compiled_encoder", lambda it: compiled.append(it) or {GRAPH: b"graph"})
    for times in (1, 2, 2):
        with kept_encoder(DEMO) as graph:
            assert graph is not None
            assert graph.read_bytes() == b"graph"
            assert [path.name for path in graph.parent.iterdir()] == [GRAPH]
        assert len(compiled) == times
        (kept,) = (tmp_path / "etenet" / "encoders").iterdir()
        if times == 1:
            kept.write_bytes(damage(kept.read_bytes()))


def test_an_encoder_is_kept_for_the_checkpoint_that_was_compiled(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("etenet.runtime.kept.compiled_encoder", lambda it: {GRAPH: it.id.encode()})
    best = tmp_path / "best.pt"

    def replaced_by_training() -> None:
        shutil.copy(DEMO, best)

    shutil.copy(small_checkpoint, best)
    with pytest.raises(UsageError, match="was replaced while it was packaged"):
        archive.package(best, tmp_path / "best.mar", before_compiling=replaced_by_training)
    for path in (best, small_checkpoint):
        with kept_encoder(path) as graph:
            assert graph is not None
            assert graph.read_text() == checkpoints.inspect(path).id


@pytest.mark.usefixtures("no_home")
def test_without_a_home_an_encoder_is_compiled_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etenet.runtime.kept.compiled_encoder", lambda *_: {"encoder.xml": b"graph"})
    with kept_encoder(DEMO) as graph:
        assert graph is not None
        assert graph.read_bytes() == b"graph"
    assert not graph.exists()


@pytest.mark.usefixtures("no_home")
def test_without_a_home_code_for_a_gpu_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch may have set it here
    assert torchserve._environment(tmp_path)["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")


SIGNALLED = """
import os, signal, sys
from pathlib import Path
import etenet
checkpoint, graph = map(Path, sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
captioner = etenet.load(checkpoint, compiled_encoder=graph, sandboxed=False)
del captioner
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_after_a_network_has_ended_is_handled(demo_archive: Path, tmp_path: Path) -> None:
    """On a processor with AMX, OpenVINO changes the stack on which a thread takes signals."""
    archive.unpack(demo_archive, unpacked := tmp_path / "unpacked")
    files = [str(unpacked / name) for name in (archive.CHECKPOINT_FILE, archive.ENCODER_FILE)]
    command = [sys.executable, "-c", SIGNALLED, *files]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


def test_a_server_on_a_cpu_is_small_and_has_no_torch() -> None:
    with running_server(*CAPTION[1:]) as server:
        assert server.caption(CLIPS[0].read_bytes()).status == 200
        worker = server.worker()
        assert worker is not None
        assert worker.memory_full_info().uss <= WORKER_MIB * 2**20
        java, launcher = worker.parents()[:2]
        workers = [each for each in java.children() if "model_service_worker" in " ".join(each.cmdline())]
        assert len(workers) == 2  # the other one refuses while the server shuts down
        own = [launcher, *workers]
        assert not [mapped for each in own for mapped in each.memory_maps() if "libtorch" in mapped.path]


FAKE_TORCH = """
print("loaded")
from torch import nn
class Tensor: pass
"""
USE = """
import sys
import torch
print("imported")
print(torch.Tensor.__name__, sys.modules["torch"] is torch, __import__("torch.nn").nn.Linear)
from torch import Tensor
"""


def test_torch_is_loaded_when_something_of_it_is_used(tmp_path: Path) -> None:
    installed, model = tmp_path / "installed", tmp_path / "model"
    (installed / "torch").mkdir(parents=True)
    (installed / "torch" / "__init__.py").write_text(FAKE_TORCH)
    (installed / "torch" / "nn.py").write_text("Linear = 'linear'")
    model.mkdir()
    delay_torch(model)
    paths = f"import sys; sys.path[:0] = [{str(model)!r}, {str(installed)!r}]"
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", paths + USE], cwd=model, capture_output=True, text=True, check=False
    )
    assert ended.stdout.splitlines() == ["imported", "loaded", "Tensor True linear"], ended.stderr
