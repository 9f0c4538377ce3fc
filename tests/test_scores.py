"""Scores equal published ones to the published digit, whatever the captions contain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from etenet import java
from etenet.cli import main
from etenet.errors import JavaError, UsageError
from etenet.scoring import scores
from etenet.scoring.scores import Scorer, Scores, score, tokenize

Captions = dict[str, list[str]]
MEASURES = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
REFERENCES: Captions = {
    "dog": ["a dog runs", "the dog is running"],
    "cat": ["a cat sleeps", "the cat is sleeping on a bed"],
    "bird": ["a bird sings"],
}
PREDICTIONS: Captions = {"dog": ["a dog is running"], "cat": ["a cat is sleeping"], "bird": ["a fish swims"]}


@pytest.fixture(scope="module")
def published(reference_data: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((reference_data / "scores" / "expected_scores.json").read_text())
    return figures


@pytest.fixture(scope="module")
def raw_captions(reference_data: Path) -> Mapping[str, list[str]]:
    """vidN -> its captions as people typed them."""
    by_clip = json.loads((reference_data / "msvd" / "captions_by_clip.json").read_text(encoding="utf-8"))
    mapping = (reference_data / "msvd" / "youtube_mapping.txt").read_text().split()
    return {vid: by_clip[clip] for clip, vid in zip(mapping[::2], mapping[1::2], strict=True)}


@pytest.fixture(scope="module")
def scn_predictions(reference_data: Path) -> Captions:
    return numbered(reference_data / "scores" / "msvd_scn_test_predictions.txt", first=1301)


@pytest.fixture(scope="module")
def scn_scores(reference_data: Path, scn_predictions: Captions) -> Scores:
    references: Captions = {}
    listed = (reference_data / "msvd" / "msvd_sents_test_lc_nopunc.txt").read_text(encoding="utf-8")
    for line in listed.strip().split("\n"):
        vid, _, sentence = line.partition("\t")
        references.setdefault(vid, []).append(sentence)
    return score(scn_predictions, references, tokenizer="none")


def numbered(path: Path, first: int) -> Captions:
    """A caption in each line, for clips numbered from `first`."""
    lines = path.read_text(encoding="utf-8").strip().split("\n")
    return {f"vid{number}": [line] for number, line in enumerate(lines, start=first)}


def with_our_names(figures: Mapping[str, float]) -> dict[str, float]:
    ours = {f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {"ROUGE_L": "ROUGE-L"}
    return {ours.get(name, name): value for name, value in figures.items() if isinstance(value, float)}


def to_the_digit(figures: Mapping[str, float], digits: int) -> dict[str, Any]:
    return {name: pytest.approx(value, abs=0.5 * 10**-digits) for name, value in with_our_names(figures).items()}


def test_scn_on_msvd_gets_the_published_scores(scn_scores: Scores, published: dict[str, Any]) -> None:
    assert list(scn_scores.overall) == MEASURES
    assert scn_scores.overall == to_the_digit(published["msvd_scn_test"]["published"], 3)
    assert scn_scores.overall == to_the_digit(published["msvd_scn_test"]["local"], 6)


def test_each_clip_has_its_own_scores(scn_scores: Scores, scn_predictions: Captions) -> None:
    assert scn_scores.per_clip.keys() == scn_predictions.keys()
    assert all(list(figures) == MEASURES for figures in scn_scores.per_clip.values())
    for measure in ("ROUGE-L", "CIDEr"):
        mean = sum(figures[measure] for figures in scn_scores.per_clip.values()) / len(scn_scores.per_clip)
        assert mean == pytest.approx(scn_scores.overall[measure])


def test_line_breaks_in_raw_references_shift_nothing(
    raw_captions: Mapping[str, list[str]], scn_predictions: Captions, published: dict[str, Any]
) -> None:
    """CIDEr .773; pycocoevalcap's own tokenizer makes it .533."""
    references = {vid: raw_captions[vid] for vid in scn_predictions}
    assert any("\r\n" in sentence for sentences in references.values() for sentence in sentences)
    result = Scorer(references, meteor=False).score(scn_predictions).overall
    assert result == to_the_digit(published["msvd_scn_test"]["local_ptb_raw_whitespace_normalised"], 6)


def test_arctic_on_msvd_gets_the_published_scores(
    reference_data: Path, raw_captions: Mapping[str, list[str]], published: dict[str, Any]
) -> None:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    expected = published["msvd_arctic_valid"]
    predictions = numbered(reference_data / "scores" / "msvd_arctic_valid_samples.txt", first=1201)
    scorer = Scorer({vid: raw_captions[vid] for vid in predictions}, meteor=False)
    result = scorer.score(predictions).overall
    assert result.items() >= to_the_digit(expected["published"], 3).items()
    assert result == to_the_digit(expected["local"], 6)

    counted = BleuScorer(n=4)
    for vid, (sentence,) in tokenize(predictions, "ptb").items():
        counted += (sentence, scorer.references[vid])
    of_clips = {name: zip(*(clip[name] for clip in counted.ctest), strict=True) for name in ("guess", "correct")}
    counts = {name: [sum(column) for column in columns] for name, columns in of_clips.items()}
    counted.compute_score(option="closest")
    lengths = {"reflen": counted._reflen, "testlen": counted._testlen}
    assert counts | lengths == {name: expected["published"][name] for name in ("guess", "correct", "reflen", "testlen")}


def test_two_sentences_get_the_scores_that_nlg_eval_published(reference_data: Path, published: dict[str, Any]) -> None:
    folder, expected = reference_data / "scores", published["nlgeval_two_sentences"]
    first, second = (numbered(folder / name, first=1) for name in expected["refs"])
    references = {clip: first[clip] + second[clip] for clip in first}
    result = score(numbered(folder / expected["hyp"], first=1), references, tokenizer="none")
    assert result.overall == to_the_digit(expected["published"], 5)


def test_single_sentences_get_the_scores_that_nlg_eval_published(published: dict[str, Any]) -> None:
    """nlg-eval scored each alone, so CIDEr, whose weights come from the set, was 0."""
    cases = {name: published[name] for name in ("nlgeval_single", "nlgeval_french")}
    predictions = {name: [case["hyp"]] for name, case in cases.items()}
    result = score(predictions, {name: case["refs"] for name, case in cases.items()}, tokenizer="none").per_clip
    for name, case in cases.items():
        assert result[name] | {"CIDEr": 0.0} == to_the_digit(case["published"], 5)


def test_odd_captions_are_scored_correctly(monkeypatch: pytest.MonkeyPatch) -> None:
    """`|||` separates captions in METEOR's protocol, and a German locale has a decimal comma."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    odd = {"empty": [""], "bars": ["a dog ||| a cat"], "more bars": ["a dog a cat"], "accents": ["日本 café \ud800"]}
    meant = odd | {"empty": ["a dog"], "bars": ["a dog a cat"], "more bars": ["a dog ||| a cat"]}
    result = score(PREDICTIONS | odd, REFERENCES | meant, tokenizer="none").per_clip
    assert set(result["empty"].values()) == {0.0}
    for clip in ("bars", "more bars", "accents"):
        assert result[clip]["METEOR"] > 0.95, clip
    assert result["accents"]["BLEU-2"] == pytest.approx(1.0)
    assert result["dog"]["METEOR"] > 0.4


def test_captions_of_no_words_at_all_score_zero() -> None:
    nothing = {clip: [" "] for clip in REFERENCES}
    assert set(Scorer(REFERENCES, tokenizer="none", meteor=False).score(nothing).overall.values()) == {0.0}


@pytest.mark.parametrize("tokenizer", scores.TOKENIZERS)
def test_no_white_space_moves_a_sentence_to_another_clip(tokenizer: scores.Tokenizer) -> None:
    spaces = ["\r\n", "\n\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\t", "\u00a0"]
    captions = {"a": [f"one{space}two" for space in spaces], "b": [""], "c": ["\n", "three\n"], "d": ["  four  "]}
    expected = {"a": ["one two"] * len(spaces), "b": [""], "c": ["", "three"], "d": ["four"]}
    assert tokenize(captions, tokenizer) == expected


def test_ptb_drops_case_and_punctuation_and_none_drops_nothing() -> None:
    captions = {"a": ["A man's dog, isn't it?"], "b": ["\ufeffUn café -- très bon!"]}
    assert tokenize(captions, "ptb") == {"a": ["a man 's dog is n't it"], "b": ["un café très bon"]}
    assert tokenize(captions, "none") == captions


def test_a_tokenizer_that_loses_a_sentence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "output", lambda *_, **__: "a\nb\n")
    with pytest.raises(JavaError, match="2 sentences for 3"):
        tokenize({"clip": ["a", "b", "c"]}, "ptb")


def test_references_are_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    output = java.output

    def recorded(name: str, arguments: Sequence[str], text: str, *, deadline_s: float) -> str:
        texts.append(text)
        return output(name, arguments, text, deadline_s=deadline_s)

    monkeypatch.setattr(java, "output", recorded)
    scorer = Scorer(REFERENCES, meteor=False)
    assert scorer.score(PREDICTIONS) == scorer.score(PREDICTIONS)
    assert [text.count("sleeping on a bed") for text in texts] == [1, 0, 0]


def test_the_order_of_clips_changes_nothing() -> None:
    scorer = Scorer(REFERENCES, tokenizer="none", meteor=False)
    turned = dict(reversed(PREDICTIONS.items()))
    assert scorer.score(turned).per_clip == scorer.score(PREDICTIONS).per_clip


def test_references_without_a_word_do_not_count() -> None:
    def of_dog(references: list[str], caption: str = "a dog is running") -> dict[str, float]:
        scorer = Scorer({**REFERENCES, "dog": references}, meteor=False)
        return scorer.score({**PREDICTIONS, "dog": [caption]}).per_clip["dog"]

    assert of_dog(["a dog runs", "", "..."]) == of_dog(["a dog runs"])
    assert of_dog(["a dog runs", ""], caption="")["ROUGE-L"] == 0.0


@pytest.mark.parametrize(
    ("predictions", "references", "complaint"),
    [
        ({}, REFERENCES, "no prediction to score; give"),
        (PREDICTIONS, REFERENCES | {"fox": ["a fox"], "cow": ["a cow"]}, "no prediction for 'fox', 'cow'; caption"),
        (PREDICTIONS | {"fox": ["a fox"]}, REFERENCES, "no reference for 'fox'; add"),
        (PREDICTIONS | {"cat": ["a cat", "cats"]}, REFERENCES, "not exactly one prediction for 'cat'"),
        (PREDICTIONS | {"cat": []}, REFERENCES, "not exactly one prediction for 'cat'"),
        (PREDICTIONS, REFERENCES | {"cat": [" "]}, "no reference of 'cat' has a word; remove"),
        (PREDICTIONS, REFERENCES | {"cat": []}, "no reference of 'cat' has a word; remove"),
        ({"clips/dog.mp4": ["a dog"]}, {"dog": ["a dog"]}, "no clip in common: 'clips/dog.mp4' against 'dog'; use"),
    ],
)
def test_sets_that_do_not_match_are_named_with_the_fix(
    predictions: Captions, references: Captions, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        score(predictions, references, tokenizer="none")


@pytest.mark.parametrize("tokenizer", scores.TOKENIZERS)
def test_without_pycocoevalcap_the_fix_is_named(tokenizer: scores.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UsageError, match=r"pip install 'etenet\[train\]'"):
        score(PREDICTIONS, REFERENCES, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("exit 1", "METEOR ended by itself with status 1: it printed no error"),
        ("read line; echo 1.0 2.0; echo 'no heap' >&2; exit 3", "METEOR ended by itself with status 3: no heap"),
        ("while read line; do echo 'Error: a'; echo 'Error: b'; done", "METEOR returned no number .* 'Error: "),
        ("exec tail -f /dev/null", r"METEOR was not done after 0\.4 s"),
    ],
)
def test_a_meteor_that_fails_is_reported_and_does_not_hang(
    java_as: Callable[[str], None], script: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    java_as(script)
    monkeypatch.setattr(scores, "_deadline_s", lambda _: 0.4 if script.startswith("exec") else 60.0)
    with pytest.raises(JavaError, match=complaint):
        score(PREDICTIONS, REFERENCES, tokenizer="none")


def written(path: Path, captions: Captions) -> str:
    path.write_text(json.dumps(captions))
    return str(path)


def test_the_command_scores_one_clip_if_no_file_can_be_written(tmp_path: Path) -> None:
    """No file may grow, neither in the package's folder nor here nor in the temporary folder."""
    files = ["--predictions", written(tmp_path / "predictions.json", {"clip": ["A dog is running."]})]
    files += ["--references", written(tmp_path / "references.json", {"clip": ["A dog runs.", "A dog is running!"]})]
    ran = subprocess.run(
        ["sh", "-c", 'ulimit -f 0 && exec "$@"', "sh", sys.executable, "-m", "etenet", "score", *files],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "CIDEr is meaningless for one clip" in ran.stderr
    figures = json.loads(ran.stdout)
    assert (figures.pop("clips"), figures.pop("tokenizer"), figures.pop("CIDEr")) == (1, "ptb", 0.0)
    assert figures == dict.fromkeys(MEASURES[:-1], pytest.approx(1.0, abs=1e-6))


def test_the_command_takes_our_own_output_and_coco_and_writes_scores_per_clip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, references, out = tmp_path / "captions.jsonl", tmp_path / "coco.json", tmp_path / "clips.jsonl"
    lines = (json.dumps({"video": clip, "caption": captions[0]}) + "\n" for clip, captions in PREDICTIONS.items())
    predictions.write_text("".join(lines))
    annotations = [{"image_id": clip, "caption": sentence} for clip, of in REFERENCES.items() for sentence in of]
    references.write_text(json.dumps({"annotations": annotations}))
    files = ["--predictions", str(predictions), "--references", str(references), "--per-clip", str(out)]
    assert main(["score", *files, "--tokenizer", "none"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    figures = json.loads(printed.out)
    assert list(figures) == [*MEASURES, "clips", "tokenizer"]
    assert (figures["clips"], figures["tokenizer"]) == (3, "none")
    clips = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {clip["video"]: [clip["caption"]] for clip in clips} == PREDICTIONS
    assert sum(clip["CIDEr"] for clip in clips) / 3 == pytest.approx(figures["CIDEr"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--predictions", "gone.json", "--references", "references.json"],
        ["--predictions", "failed.jsonl", "--references", "references.json"],
        ["--predictions", "fewer.json", "--references", "references.json"],
        ["--predictions", "predictions.json", "--references", "references.json", "--per-clip", "gone/clips.jsonl"],
    ],
)
def test_wrong_use_of_the_command_is_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("predictions.json"), PREDICTIONS)
    written(Path("references.json"), REFERENCES)
    written(Path("fewer.json"), {"dog": ["a dog"]})
    Path("failed.jsonl").write_text('{"video": "dog", "error": {"code": "not_a_video", "message": "..."}}\n')
    assert main(["score", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


def test_a_failing_java_is_one_line_and_status_1(
    java_as: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    java_as("exit 1")
    files = ["--predictions", written(tmp_path / "predictions.json", PREDICTIONS)]
    files += ["--references", written(tmp_path / "references.json", REFERENCES)]
    assert main(["score", *files]) == 1
    assert (
        capsys.readouterr().err == "etenet score: the PTB tokenizer ended by itself with status 1: "
        "it printed no error; check Java with: etenet doctor\n"
    )
