"""The report shows its values, keeps hostile captions harmless, and is self-contained."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from training import report
from training.report import ReportedClip

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
    caption: str = "a dog runs",
    shape: tuple[int, int, int] = (16, 120, 90),
    **scores: float,
) -> ReportedClip:
    frames = np.broadcast_to(np.linspace(0, 255, shape[0], dtype=np.uint8)[:, None, None, None], (*shape, 3))
    return ReportedClip(video=video, frames=frames, caption=caption, references=["a dog", "it runs"], scores=scores)


def test_every_tag_is_closed_and_everything_given_is_shown() -> None:
    page = Page(report.html("MSVD, test", {"CIDEr": 0.87654, "clips": 670}, [example(CIDEr=0.5, METEOR=0.25)]))
    assert page.open == []
    for shown in ("MSVD, test", "0.877", "670", "dog.mp4", "a dog runs", "it runs", "METEOR", "0.250"):
        assert shown in page.text


@pytest.mark.parametrize("where", ["title", "metric", "video", "caption", "reference", "score"])
def test_hostile_text_is_shown_as_text(where: str) -> None:
    def at(place: str) -> str:
        return HOSTILE if place == where else "harmless"

    frames = np.zeros((1, 8, 8, 3), np.uint8)
    hostile = ReportedClip(
        video=at("video"),
        frames=frames,
        caption=at("caption"),
        references=[at("reference")],
        scores={"CIDEr": 1.0, at("score"): 1.0},
    )
    source = report.html(at("title"), {at("metric"): 1.0}, [hostile])
    page = Page(source)
    assert page.open == []
    assert HOSTILE.replace("\ud800", "?") in page.text
    assert "script" not in dict(page.tags)
    assert len(page.pictures()) == 1
    source.encode()


@pytest.mark.parametrize(
    ("shape", "pictures", "size_px"),
    [
        ((16, 120, 90), 4, (90, 120)),
        ((16, 314, 314), 4, (160, 160)),
        ((3, 100, 200), 3, (160, 80)),
        ((1, 8, 8), 1, (8, 8)),
    ],
)
def test_pictures_are_a_few_frames_from_first_to_last(
    shape: tuple[int, int, int], pictures: int, size_px: tuple[int, int]
) -> None:
    shown = Page(report.html("t", {}, [example(shape=shape)])).pictures()
    assert [picture.size for picture in shown] == [size_px] * pictures
    brightness = [np.asarray(picture).mean() for picture in shown]
    wanted = np.linspace(0, 255, shape[0])[[0, -1]]
    assert brightness == sorted(brightness)
    assert [brightness[0], brightness[-1]] == pytest.approx(wanted if pictures > 1 else [0, 0], abs=2)


def videos(examples: list[ReportedClip], count: int) -> list[str]:
    page = Page(report.html("t", {}, examples, count=count))
    return [line for line in page.text.split() if line.endswith(".mp4")]


def test_the_best_come_first_then_the_worst_from_the_bottom_and_none_twice() -> None:
    examples = [example(f"{i}.mp4", CIDEr=float(i)) for i in (3, 0, 4, 1, 2)]
    assert videos(examples, 1) == ["4.mp4", "0.mp4"]
    assert videos(examples, 2) == ["4.mp4", "3.mp4", "0.mp4", "1.mp4"]
    assert videos(examples, 9) == ["4.mp4", "3.mp4", "2.mp4", "1.mp4", "0.mp4"]


def test_without_cider_clips_stay_in_the_order_given() -> None:
    assert videos([example(f"{i}.mp4") for i in (3, 0, 4, 1, 2)], 2) == ["3.mp4", "0.mp4", "4.mp4", "1.mp4"]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = Page(report.html("t", {"CIDEr": 1.0}, [example(CIDEr=1.0)]))
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a"} == set()
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert (policy or "").startswith("default-src 'none'")
    assert "url(" not in page.text
    assert "@import" not in page.text
