"""What a notebook shows of captions."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import etenet
from etenet.captioning.captions import jpeg_url
from tests.conftest import REPOSITORY

CLIP = (REPOSITORY / "examples" / "umbrella-crossing-sky.mp4").read_bytes()


class Cells(HTMLParser):
    """The texts of each row of a table, and the sources of pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "img":
            self.pictures.append(dict(attributes)["src"] or "")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_a_caption_shows_its_sentences_and_where_each_word_came_from(captioner: etenet.Captioner) -> None:
    caption = captioner.caption(CLIP, etenet.CaptionOptions(captions=3, thumbnails=48))
    html = caption._repr_html_()
    for sentence in caption.sentences:
        assert sentence.text in html
    shown = Cells(html)
    assert shown.pictures == [jpeg_url(jpeg) for jpeg in caption.thumbnails]
    assert [row[0] for row in shown.rows[2:]] == list(caption.sentences[0].words)
    assert [len(row) for row in shown.rows[2:]] == [2 + 16] * len(caption.sentences[0].words)
    assert not Cells(captioner.caption(CLIP)._repr_html_()).pictures


def test_segments_show_a_row_each(captioner: etenet.Captioner) -> None:
    (outcome,) = captioner.caption_batch([CLIP], [etenet.CaptionOptions(cut=etenet.Cut(segment_s=1))])
    assert isinstance(outcome, etenet.SegmentCaptions)
    rows = Cells(outcome._repr_html_()).rows
    assert [row[1] for row in rows] == [segment.text for segment in outcome.segments]
    assert rows[0][0] == "0.00 to 1.00 s"


def test_words_of_a_vocabulary_do_not_become_html_and_doubtful_captions_are_withheld(
    captioner: etenet.Captioner,
) -> None:
    caption = captioner.caption(CLIP)
    hostile = replace(caption.sentences[0], text="<script>", words=("<script>", *caption.sentences[0].words[1:]))
    assert "<script>" not in replace(caption, sentences=(hostile,))._repr_html_()
    doubtful = replace(caption.sentences[0], confidence=0.2)
    html = replace(caption, sentences=(doubtful,), min_confidence=0.5)._repr_html_()
    assert "withheld" in html
    assert "20 % confident" in html
