"""The report and the figure show their values; the report keeps hostile captions harmless and is self-contained."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from training.evaluation import figure, report
from training.evaluation.examples import Attention, ReportedClip, chosen, shown_once
from training.evaluation.table import Row

HOSTILE = "</p><script>alert('x')</script><img src=http://evil.example/a.png onerror=\"x\"> & \ud800"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, and whether every tag is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[Image.Image]:
        pictures = []
        for tag, attributes in self.tags:
            if tag == "img":
                kind, _, data = (attributes["src"] or "").partition(",")
                assert kind == "data:image/jpeg;base64"
                pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        return pictures


def example(
    video: str = "dog.mp4",
    shape: tuple[int, int, int] = (16, 120, 90),
    **scores: float,
) -> ReportedClip:
    """Frames that get brighter, of which later words see more of later ones."""
    frames = np.broadcast_to(np.linspace(0, 255, shape[0], dtype=np.uint8)[:, None, None, None], (*shape, 3))
    weights = 1.0 + np.outer(np.arange(3), np.arange(shape[0]))
    attention = Attention(words=["a", "dog", "runs"], weights=weights / weights.sum(axis=1, keepdims=True))
    captions = {"step 1": "a cat sits", "step 2": "a dog runs"}
    return ReportedClip(
        video=video,
        frames=frames,
        captions=captions,
        references=["a dog", "it runs"],
        scores=scores,
        attention=attention,
    )


def row(name: str, *captions: str, **scores: float) -> Row:
    return Row(name=name, captions=dict(enumerate(captions)), scores=scores)  # type: ignore[arg-type]


def test_every_tag_is_closed_and_everything_given_is_shown() -> None:
    rows = [row("a baseline", "a dog", "a dog", CIDEr=0.1), row("step 1", "a dog", "a cat", CIDEr=0.23456, METEOR=0.2)]
    clips = {"Best by CIDEr": [example(CIDEr=0.5, METEOR=0.25)]}
    page = Page(report.html("MSVD, test", {"CIDEr": 0.87654, "clips": 670}, clips, rows))
    assert page.open == []
    for shown in ("MSVD, test", "0.877", "670", "dog.mp4", "a dog runs", "a cat sits", "it runs", "METEOR", "0.250"):
        assert shown in page.text
    for shown in ("a baseline", "23.5", "100.0 %", "50.0 %"):
        assert shown in page.text


@pytest.mark.parametrize(
    "where",
    ["title", "metric", "video", "name", "caption", "beside", "reference", "score", "heading", "row", "word"],
)
def test_hostile_text_is_shown_as_text(where: str) -> None:
    def at(place: str) -> str:
        return HOSTILE if place == where else "harmless"

    frames = np.zeros((1, 8, 8, 3), np.uint8)
    hostile = ReportedClip(
        video=at("video"),
        frames=frames,
        captions={at("name"): at("beside"), "step 2": at("caption")},
        references=[at("reference")],
        scores={"CIDEr": 1.0, at("score"): 1.0},
        attention=Attention(words=[at("word")], weights=np.ones((1, 1))),
    )
    rows = [row(at("row"), "a dog"), row("step 2", "a dog")]
    source = report.html(at("title"), {at("metric"): 1.0}, {at("heading"): [hostile]}, rows)
    page = Page(source)
    assert page.open == []
    assert HOSTILE.replace("\ud800", "?") in page.text
    assert "script" not in dict(page.tags)
    assert len(page.pictures()) == 1
    source.encode()


@pytest.mark.parametrize(
    ("shape", "size_px"), [((16, 120, 90), (90, 120)), ((3, 100, 200), (160, 80)), ((1, 8, 8), (8, 8))]
)
def test_every_different_frame_is_shown_in_order_with_its_share_of_the_attention(
    shape: tuple[int, int, int], size_px: tuple[int, int]
) -> None:
    clip = example(shape=shape)
    page = Page(report.html("t", {}, {"h": [clip]}))
    assert [picture.size for picture in page.pictures()] == [size_px] * shape[0]
    brightness = [np.asarray(picture).mean() for picture in page.pictures()]
    assert brightness == pytest.approx(np.linspace(0, 255, shape[0]), abs=2)
    assert clip.attention is not None
    bars = [float((a["style"] or "").removeprefix("width:").rstrip("%")) for tag, a in page.tags if tag == "i"]
    assert bars == pytest.approx(100 * clip.attention.mean, abs=0.06)
    assert sum(bars) == pytest.approx(100, abs=1)
    cells = [a for tag, a in page.tags if tag == "td"]
    assert len(cells) == 3 * shape[0]


def test_a_frame_that_repeats_is_shown_once_with_the_sum_of_its_weights() -> None:
    pictures = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 4, 4, 3), np.uint8)
    repeated, weights = pictures[[0, 0, 1, 1, 1, 2]], np.array([[0.1, 0.2, 0.3, 0.1, 0.1, 0.2], [1, 0, 0, 0, 0, 0]])
    frames, summed = shown_once(repeated, weights)
    np.testing.assert_array_equal(frames, pictures)
    np.testing.assert_allclose(summed, [[0.3, 0.5, 0.2], [1, 0, 0]])
    frames, summed = shown_once(pictures[[0, 1, 0]], weights[:, :3])  # it comes back later: another moment
    assert (len(frames), summed.shape) == (3, (2, 3))


def videos(count: int, *, seed: int = 0, clips: int = 6, measure: str = "CIDEr") -> list[list[str]]:
    order = np.random.default_rng(1).permutation(clips)
    return list(chosen({str(i): {measure: float(i)} for i in order}, count, seed=seed).values())


def test_the_best_come_first_then_the_worst_then_others_at_random_and_none_twice() -> None:
    best, worst, random = videos(1)
    assert (best, worst) == (["5"], ["0"])
    assert len(random) == 1
    best, worst, random = videos(2)
    assert (best, worst, sorted(random)) == (["5", "4"], ["0", "1"], ["2", "3"])
    assert videos(9) == [["5", "4", "3", "2", "1", "0"]]
    assert videos(4, seed=3, clips=99) == videos(4, seed=3, clips=99) != videos(4, seed=4, clips=99)


def test_without_cider_clips_stay_in_the_order_given() -> None:
    scores = {str(i): {"BLEU-4": float(i)} for i in (3, 0, 4, 1, 2)}
    assert chosen(scores, 2, seed=0) == {"Examples": ["3", "0", "4", "1"]}


def test_the_figure_has_a_row_for_each_clip_whatever_its_text_and_number_of_frames() -> None:
    odd = replace(example(shape=(1, 20, 30)), captions={"step 1": "$x_{broken", "step 2": "a_b \u4e2d <&>"})
    one, two = (
        np.asarray(Image.open(io.BytesIO(figure.png(sections))).convert("L"), int)
        for sections in ({"Best": [example()]}, {"Best": [example()], "Worst": [odd]})
    )
    assert two.shape == (2 * one.shape[0], one.shape[1])
    assert np.abs(two[: len(one)] - one).mean() < 4
    assert two[len(one) :].std() > 10


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = Page(report.html("t", {"CIDEr": 1.0}, {"Best": [example(CIDEr=1.0)]}))
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a"} == set()
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert (policy or "").startswith("default-src 'none'")
    assert "url(" not in page.text
    assert "@import" not in page.text
