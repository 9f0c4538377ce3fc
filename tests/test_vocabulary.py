"""Captions are split into words by Treebank's rules and joined again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.tokenize.treebank import TreebankWordDetokenizer

from etenet.model.vocabulary import EOS_ID, UNKNOWN_ID, Vocabulary, sentence, words


def test_captions_are_lower_case_treebank_words_without_punctuation() -> None:
    assert words("A man, (quickly) plays the guitar... and isn't BAD!") == [
        *("a", "man", "quickly", "plays", "the", "guitar", "and", "is", "n't", "bad"),
    ]
    assert words("  \r\n ") == []


@given(st.lists(st.sampled_from(["a", "dog", "does", "n't", "run", "the", "man", "'s", "can", "not", "5"]), min_size=1))
def test_a_sentence_splits_into_the_words_it_was_joined_from(parts: list[str]) -> None:
    assert "".join(words(sentence(parts))) == "".join(parts)


TYPED = ["a", "dog", "don't", "can't", "cannot", "gonna", "wanna", "gotta", "gimme", "lemme", "man's", "I'm", "she'd"]
TYPED += ["they'll", "we're", "I've", "dogs'", "u.s.", "5:30", "not", "can", "me", "and/or", "t-shirt", "rock'n'roll"]


@given(st.lists(st.sampled_from(TYPED), min_size=1))
def test_words_are_joined_as_nltk_joins_them(typed: list[str]) -> None:
    tokens = words(" ".join(typed))
    assert sentence(tokens) == TreebankWordDetokenizer().detokenize(tokens)


def test_words_of_real_captions_are_joined_as_nltk_joins_them(reference_data: Path) -> None:
    by_clip = json.loads((reference_data / "msvd" / "captions_by_clip.json").read_text())
    for tokens in map(words, {caption for captions in list(by_clip.values())[::20] for caption in captions}):
        assert sentence(tokens) == TreebankWordDetokenizer().detokenize(tokens)


def test_nltk_is_imported_when_text_is_split_and_not_before() -> None:
    code = """
import sys, etenet
from etenet.captioning import captioner
from etenet.model.vocabulary import Vocabulary, words
assert Vocabulary(["dog"]).decode([3]) == "dog"
assert "nltk" not in sys.modules
assert words("a dog")
assert "nltk" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_contractions_are_written_together() -> None:
    assert sentence(["a", "dog", "does", "n't", "eat", "the", "man", "'s", "hat"]) == "a dog doesn't eat the man's hat"


def test_words_become_ids_and_ids_become_words() -> None:
    vocabulary = Vocabulary.from_captions(["a dog runs", "a dog sleeps", "a cat"])
    assert vocabulary.known_words == ("a", "dog", "cat", "runs", "sleeps")
    ids = vocabulary.encode("A dog flies")
    assert ids == [3, 4, UNKNOWN_ID]
    assert vocabulary.decode([3, 4, 6, EOS_ID, 3]) == "a dog runs"
    assert len(vocabulary) == 8


def test_rare_words_can_be_left_out() -> None:
    assert Vocabulary.from_captions(["a dog", "a cat"], minimum_count=2).known_words == ("a",)


@pytest.mark.parametrize("wrong", [["a", "a"], ["<EOS>"]])
def test_an_invalid_vocabulary_is_refused(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match=r"a|EOS"):
        Vocabulary(wrong)
