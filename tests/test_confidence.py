"""A confidence: computed as written, fitted to what is known, measured by an oracle, and obeyed by all who answer."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import etenet
from etenet import errors
from etenet.captioning.stream import Video
from etenet.cli import main
from etenet.model import checkpoint as checkpoints
from etenet.model.confidence import FEATURES, Calibration, features_of
from etenet.model.config import GIVEN_FEATURES, DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.encoder import AbsentEncoder
from etenet.model.etenet import EtENet
from etenet.model.hypothesis import Hypothesis, WordShare
from etenet.model.minimum_risk import RARE
from etenet.model.vocabulary import Vocabulary
from etenet.scoring.scores import Captions, Scorer, Scores
from tests import clips
from tests.conftest import DEMO, EXAMPLES, REPOSITORY
from training import calibrate
from training.evaluation import reliability

BODIES = [(REPOSITORY / "examples" / name).read_bytes() for name in EXAMPLES]
BY_BEAM = Calibration(weights=dict.fromkeys(FEATURES, 0.0) | {"beam_log_prob": 1.0}, bias=1.0, beam_size=5)
ALWAYS_LOW = Calibration(weights=dict.fromkeys(FEATURES, 0.0), bias=-1.0, beam_size=5)  # sigmoid(-1) = .2689


def hypothesis(words: str, *probs: float) -> Hypothesis:
    """Words are letters; the last probability is that of the end."""
    log_probs = tuple(map(math.log, probs))
    return Hypothesis(tuple(map(ord, words)), log_probs, sum(log_probs), ())


BEAM = [hypothesis("abca", 0.5, 0.5, 1, 1, 1), hypothesis("ab", 0.25, 0.5, 1), hypothesis("xy", 0.25, 0.25, 0.5)]


def test_features_are_those_that_a_hand_computes() -> None:
    features = features_of(BEAM[0], BEAM[1:])
    assert features == pytest.approx(
        {
            "mean_log_prob": math.log(1 / 4) / 5,
            "opening_log_prob": math.log(1 / 4),
            "beam_log_prob": math.log(1 / 4 + 1 / 8 + 1 / 32),
            "gain": 0,
            "informed_share": 0,
        }
    )
    assert tuple(features) == FEATURES
    unlikely = hypothesis("a", 1e-300, 1e-300)
    assert features_of(unlikely, [])["beam_log_prob"] == pytest.approx(unlikely.log_prob)
    typical = replace(BEAM[0], typical_log_prob=math.log(1 / 16))
    assert features_of(typical, BEAM[1:])["gain"] == pytest.approx(math.log(4))
    seen = replace(BEAM[0], shares=(WordShare(here=0.4, usual=0.1),))
    assert features_of(seen, BEAM[1:])["informed_share"] == pytest.approx(0.4)


def test_of_a_wider_beam_only_the_most_probable_others_count() -> None:
    narrow = replace(BY_BEAM, beam_size=2)
    assert narrow.confidence(BEAM[0], BEAM) == narrow.confidence(BEAM[0], BEAM[:2])
    assert narrow.confidence(BEAM[2], BEAM) == narrow.confidence(BEAM[2], [BEAM[0], BEAM[2]])
    assert BY_BEAM.confidence(BEAM[0], BEAM) != narrow.confidence(BEAM[0], BEAM)


@pytest.mark.parametrize("bias", [-1e4, 0.0, 1e4])
def test_a_confidence_is_between_0_and_1_whatever_the_numbers(bias: float) -> None:
    assert replace(BY_BEAM, bias=bias).confidence(BEAM[0], BEAM) in (0, pytest.approx(0.2889), 1)


def test_the_regression_finds_the_weights_that_made_its_data() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal([3, -20, 0], [0.5, 10, 1], (40_000, 3))
    weights, bias = np.array([1.5, 0.1, 0.0]), -3.0
    probs = 1 / (1 + np.exp(-(features @ weights + bias)))
    found, found_bias = calibrate.fit(features, rng.random(len(probs)) < probs, l2=0.01)
    np.testing.assert_allclose(found * features.std(axis=0), weights * features.std(axis=0), atol=0.04)
    fitted = 1 / (1 + np.exp(-(features @ found + found_bias)))
    assert np.abs(fitted - probs).max() < 0.02


def test_a_feature_that_never_changes_has_no_weight() -> None:
    features = np.column_stack([np.full(100, 7.0), np.arange(100.0)])
    weights, _ = calibrate.fit(features, np.arange(100) % 3 == 0)
    assert weights[0] == 0


def test_cross_validation_of_noise_finds_nothing_and_of_a_rule_finds_it() -> None:
    rng = np.random.default_rng(1)
    features, good = rng.normal(size=(400, 6)), rng.random(400) < 0.5
    assert reliability.auc(calibrate.cross_validated(features, good), good) < 0.55
    rule = features[:, 0] > 0
    assert reliability.auc(calibrate.cross_validated(features, rule), rule) > 0.98


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(2)
    scores, good = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[good] for b in scores[~good]]
    assert reliability.auc(scores, good) == pytest.approx(np.mean(pairs))
    with pytest.raises(errors.UsageError, match="0 of 60 captions are good"):
        reliability.auc(scores, np.zeros(60, bool))


def test_the_calibration_error_is_the_error_that_was_made() -> None:
    """Of 100 captions in the middle of each of ten bins, as many are good as the confidence says, less an error."""
    confidences = np.repeat(np.arange(0.05, 1, 0.1), 100)
    for error in (0.0, 0.03, -0.05):
        good = np.concatenate([np.arange(100) < round(100 * (c + error)) for c in confidences[::100]])
        assert reliability.calibration_error(confidences, good) == pytest.approx(abs(error))
    assert reliability.calibration_error(np.array([1.0, 0.0]), np.array([False, True])) == 1


def test_the_least_error_is_what_chance_leaves_of_a_perfect_calibration() -> None:
    rng = np.random.default_rng(3)
    confidences = rng.random(500)
    drawn = np.mean([reliability.calibration_error(confidences, rng.random(500) < confidences) for _ in range(50)])
    assert reliability.least_error(confidences) == pytest.approx(drawn, abs=0.004)
    assert reliability.least_error(np.ones(50)) == 0


def captioner_with(calibration: Calibration | None) -> etenet.Captioner:
    captioner = etenet.load(DEMO, sandboxed=False)
    captioner.checkpoint = replace(captioner.checkpoint, confidence=calibration)
    return captioner


@pytest.fixture(scope="module")
def calibrated() -> etenet.Captioner:
    return captioner_with(BY_BEAM)


def test_a_clip_gets_the_same_confidence_alone_and_in_a_batch_and_with_a_wider_beam(
    calibrated: etenet.Captioner,
) -> None:
    wider = etenet.CaptionOptions(captions=5)
    together = calibrated.caption_batch(BODIES[:3], [etenet.CaptionOptions(), wider, etenet.CaptionOptions()])
    for body, outcome in zip(BODIES, together, strict=False):
        assert isinstance(outcome, etenet.Caption)
        (alone,) = calibrated.caption(body).sentences
        assert alone.confidence == outcome.sentences[0].confidence
        assert alone.confidence is not None
        assert 0 <= alone.confidence <= 1
        assert outcome.as_dict()["captions"][0]["confidence"] == alone.confidence


def test_without_a_calibration_and_with_a_narrower_beam_there_is_no_confidence(
    captioner: etenet.Captioner, calibrated: etenet.Captioner
) -> None:
    for one, beam_size in ((captioner, 5), (calibrated, 4)):
        caption = one.caption(BODIES[0], etenet.CaptionOptions(beam_size=beam_size))
        assert caption.sentences[0].confidence is None
        assert "confidence" not in caption.as_dict()["captions"][0]
        assert caption.text


def test_a_caption_is_withheld_below_the_minimum_and_given_from_it_on(calibrated: etenet.Captioner) -> None:
    (sentence,) = calibrated.caption(BODIES[0]).sentences
    assert sentence.confidence is not None
    given = calibrated.caption(BODIES[0], etenet.CaptionOptions(min_confidence=sentence.confidence))
    withheld = calibrated.caption(BODIES[0], etenet.CaptionOptions(min_confidence=sentence.confidence + 1e-4))
    assert given.text == sentence.text
    assert withheld.text is None
    fields = withheld.as_dict()
    assert fields["caption"] is None
    assert fields["captions"][0]["caption"] == sentence.text


@pytest.mark.parametrize(
    ("calibration", "beam_size", "message"),
    [(None, 5, "needs a checkpoint with a calibration"), (BY_BEAM, 4, "beam_size of at least 5, got 4; raise")],
)
def test_a_minimum_that_no_confidence_can_meet_is_refused_for_its_clip_alone(
    calibration: Calibration | None, beam_size: int, message: str
) -> None:
    captioner = captioner_with(calibration)
    wanting = etenet.CaptionOptions(beam_size=beam_size, min_confidence=0.5)
    refused, given = captioner.caption_batch(BODIES[:2], [wanting, etenet.CaptionOptions()])
    assert isinstance(refused, errors.BadOption)
    assert message in str(refused)
    assert isinstance(given, etenet.Caption)
    clip = captioner.decode(Video(0, BODIES[0], wanting)).result()[0]
    (of_decoded,) = captioner.caption_decoded([clip], wanting)
    assert isinstance(of_decoded, errors.BadOption)


def test_segments_below_the_minimum_are_null(calibrated: etenet.Captioner) -> None:
    options = etenet.CaptionOptions.parse({"segment_s": "1", "min_confidence": "1"})
    (outcome,) = calibrated.caption_batch([BODIES[0]], [options])
    assert isinstance(outcome, etenet.SegmentCaptions)
    assert {segment["caption"] for segment in outcome.as_dict()["segments"]} == {None}


@pytest.fixture(scope="module")
def low_checkpoint(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("low") / "low.pt"
    checkpoints.calibrate(small_checkpoint, path, ALWAYS_LOW, None, {"validation": {"auc": 0.5}})
    return path


def test_a_job_writes_null_and_the_confidence(low_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(clips.video(3))
    for minimum, withheld in (("0.26", False), ("0.27", True)):
        out = tmp_path / f"{minimum}.jsonl"
        command = ["caption", str(tmp_path / "clip.mp4"), "--checkpoint", str(low_checkpoint), "--out", str(out)]
        assert main([*command, "--min-confidence", minimum]) == 0
        record = json.loads(out.read_text())
        assert (record["caption"] is None, record["confidence"]) == (withheld, 0.2689)


def test_a_job_with_a_minimum_and_no_calibration_is_wrong_use(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clip.mp4").write_bytes(clips.video(3))
    command = ["caption", str(tmp_path / "clip.mp4"), "--checkpoint", str(small_checkpoint), "--min-confidence", "0.5"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "make a calibration with training.calibrate" in error
    assert error.count("\n") == 1


def test_a_calibration_is_kept_by_its_checkpoint_and_changes_nothing_else(
    tmp_path: Path, small_checkpoint: Path
) -> None:
    half, out, again = (tmp_path / name for name in ("half.pt", "out.pt", "again.pt"))
    checkpoints.save(checkpoints.load(small_checkpoint), half, dtype=torch.float16)
    checkpoints.calibrate(half, out, BY_BEAM, None, {"validation": {"auc": 0.7}})
    before, after = (torch.load(path, weights_only=True) for path in (half, out))
    for name, value in before["weights"].items():
        assert after["weights"][name].dtype == value.dtype
        assert torch.equal(after["weights"][name], value)
    read = checkpoints.load(out)
    assert (read.confidence, read.provenance["confidence"]) == (BY_BEAM, {"validation": {"auc": 0.7}})
    checkpoints.save(read, again)
    assert checkpoints.load(again).confidence == BY_BEAM
    assert checkpoints.load(half).confidence is None


def test_a_calibration_of_the_version_before_is_read(low_checkpoint: Path, tmp_path: Path) -> None:
    contents = torch.load(low_checkpoint, weights_only=True)
    before = {name: 1.0 for name in FEATURES if name != "informed_share"}
    torch.save({**contents, "confidence": asdict(ALWAYS_LOW) | {"version": 2, "weights": before}}, tmp_path / "v2.pt")
    read = checkpoints.load(tmp_path / "v2.pt").confidence
    assert read is not None
    as_now = replace(ALWAYS_LOW, weights={**before, "informed_share": 0.0})
    assert read.confidence(BEAM[0], BEAM) == as_now.confidence(BEAM[0], BEAM)


@pytest.mark.parametrize(
    "change", [{"version": 1}, {"version": 2}, {"weights": {"gain": 1.0}}, {"bias": math.nan}, {"new": 1}]
)
def test_a_calibration_of_another_version_is_refused_in_one_line(
    change: dict[str, object], low_checkpoint: Path, tmp_path: Path
) -> None:
    contents = torch.load(low_checkpoint, weights_only=True)
    torch.save({**contents, "confidence": asdict(ALWAYS_LOW) | change}, tmp_path / "other.pt")
    with pytest.raises(errors.CheckpointError, match="not from this version"):
        checkpoints.load(tmp_path / "other.pt")


@pytest.fixture(scope="module")
def features_and_decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set of 3 x 60 clips of given features with references at random, and a decoder for them."""
    folder, rng = tmp_path_factory.mktemp("calibration"), np.random.default_rng(0)
    words = ["a", "man", "dog", "runs", "sings", "on", "the", "street"]
    np.save(folder / "features.npy", rng.normal(size=(180, 4, 8)).astype(np.float32))
    lines = [
        {
            "video": f"clip{row}",
            "row": row,
            "split": ("validation", "test", "train")[row // 60],
            "file": None,
            "captions": [" ".join(rng.choice(words, 5)) for _ in range(3)],
        }
        for row in range(180)
    ]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "vocabulary.json").write_text(json.dumps({"words": words}))
    torch.manual_seed(0)
    vocabulary = Vocabulary(words)
    decoder = Decoder(DecoderConfig(feature_size=8, vocabulary_size=len(vocabulary), hidden_size=16, embedding_size=8))
    preprocessing = checkpoints.load(DEMO).preprocessing
    model = EtENet(AbsentEncoder(GIVEN_FEATURES), decoder)
    checkpoints.save(checkpoints.Checkpoint(model, vocabulary, preprocessing, max_words=6), folder / "decoder.pt")
    return folder, folder / "decoder.pt"


class ByNearness(Scorer):
    """METEOR takes Java seconds to start; this is the share of the references' words that a caption has."""

    def score(self, predictions: Captions) -> Scores:
        wanted = {clip: set(" ".join(sentences).split()) for clip, sentences in self.references.items()}
        shares = {clip: len(wanted[clip] & set(predictions[clip][0].split())) / len(wanted[clip]) for clip in wanted}
        return Scores({}, {clip: {"METEOR": share} for clip, share in shares.items()}, self.tokenizer)


@pytest.mark.parametrize("minimum_risk", [False, True])
def test_the_command_measures_draws_and_writes_what_the_captioner_then_says(
    minimum_risk: bool,
    features_and_decoder: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate, "Scorer", ByNearness)
    data, decoder = features_and_decoder
    arguments = ["--checkpoint", str(decoder), "--data", str(data), "--tokenizer", "none", "--test-split", "test"]
    out, figure = tmp_path / "out.pt", tmp_path / "reliability.png"
    calibrate.main([*arguments, "--out", str(out), "--figure", str(figure), *["--minimum-risk"] * minimum_risk])
    measured = json.loads(capsys.readouterr().out)
    assert list(measured) == ["validation", "test"]
    for figures in measured.values():
        assert figures["clips"] == 60
        assert 0 <= figures["calibration_error"] <= 1
        assert 0 <= figures["auc"] <= 1
    assert figure.read_bytes().startswith(b"\x89PNG")
    written = checkpoints.load(out, with_encoder=False)
    assert written.provenance["confidence"] == measured
    dataset = calibrate.Dataset.load(data)
    captioner = calibrate.load_captioner(out, dataset)
    features = torch.from_numpy(np.array(dataset.features[:1]))
    ((best,),) = captioner.caption_features(features, etenet.CaptionOptions())
    (beam,) = captioner.network.sentences(features, beam_size=5, max_words=6)
    chosen = 0
    if minimum_risk:
        assert written.minimum_risk is not None
        of_validation = np.array(dataset.features[:60]).mean((0, 1))
        np.testing.assert_allclose(written.minimum_risk.typical, of_validation, rtol=1e-5, atol=1e-5)
        of_clip = captioner.network.mean_features(features)
        (beam,) = written.minimum_risk.compared(captioner.network.log_probs, of_clip, [beam])
        assert any(share.here != share.usual for share in beam[0].shares)
        chosen = written.minimum_risk.order(beam)[0]
    assert written.confidence is not None
    assert best.confidence == written.confidence.confidence(beam[chosen], beam)


def test_the_sentences_that_it_says_of_many_training_clips_are_its_habits(
    features_and_decoder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "Scorer", ByNearness)
    data, decoder = features_and_decoder
    out = tmp_path / "out.pt"
    calibrate.main(["--checkpoint", str(decoder), "--data", str(data), "--out", str(out), "--minimum-risk"])
    written = checkpoints.load(out, with_encoder=False)
    assert written.minimum_risk is not None
    without = tmp_path / "without.pt"
    checkpoints.save(replace(written, minimum_risk=replace(written.minimum_risk, habits={})), without)
    dataset = calibrate.Dataset.load(data)
    learned = torch.from_numpy(np.array(dataset.features[120:]))
    captions = calibrate.load_captioner(without, dataset).caption_features(learned, etenet.CaptionOptions())
    said = Counter(sentence.text for (sentence,) in captions)
    habits = {written.vocabulary.decode(words): share for words, share in written.minimum_risk.habits.items()}
    assert habits == {text: count / 60 for text, count in said.items() if count / 60 > RARE}
    assert max(habits.values()) > 1 / 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "held-out"], "has no held-out split"),
        (["--figure", "diagram.jpg"], "--figure must end in .png"),
        (["--beam-size", "0"], "beam_size must be from 1 to 10"),
    ],
)
def test_wrong_use_of_the_command_is_one_line(
    features_and_decoder: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    data, decoder = features_and_decoder
    given = ["--checkpoint", str(decoder), "--data", str(data), "--out", str(tmp_path / "out.pt"), *arguments]
    with pytest.raises(errors.UsageError, match=message) as raised:
        calibrate.main(given)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.pt").exists()


def test_minimum_risk_needs_clips_to_learn_words_from(features_and_decoder: tuple[Path, Path], tmp_path: Path) -> None:
    data, decoder = features_and_decoder
    for name in ("features.npy", "vocabulary.json"):
        (tmp_path / name).symlink_to(data / name)
    held_out = [line for line in (data / "manifest.jsonl").read_text().splitlines() if '"train"' not in line]
    (tmp_path / "manifest.jsonl").write_text("\n".join(held_out))
    given = ["--checkpoint", str(decoder), "--data", str(tmp_path), "--out", str(tmp_path / "out.pt")]
    with pytest.raises(errors.UsageError, match="has no train split, from which --minimum-risk learns"):
        calibrate.main([*given, "--minimum-risk"])


@pytest.mark.parametrize("option", ["--out", "--figure"])
def test_where_nothing_can_be_written_nothing_is_calibrated(
    features_and_decoder: tuple[Path, Path], tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, decoder = features_and_decoder
    monkeypatch.delattr(calibrate, "load_captioner")
    given = {"--checkpoint": decoder, "--data": data, "--out": tmp_path / "out.pt", "--figure": tmp_path / "out.png"}
    given[option].mkdir()
    with pytest.raises(errors.CannotWrite, match=rf"^cannot write {given[option]}: it is no regular file; "):
        calibrate.main([str(word) for pair in given.items() for word in pair])
    assert list(tmp_path.iterdir()) == [given[option]]
