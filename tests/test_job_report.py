"""`etenet caption --report`: one page that shows a job, in a real browser, with a thousand clips."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page

from etenet.captioning.captions import jpeg_url
from etenet.cli import main
from etenet.jobs import report
from etenet.jobs.journal import Record
from etenet.video.sampling import sample_frames
from etenet.video.thumbnails import thumbnails
from tests import clips
from tests.browser import browser, complaints, open_tab, text_of
from tests.conftest import CAPTION, EXAMPLES, REPOSITORY

CLIPS = [REPOSITORY / "examples" / name for name in EXAMPLES]
CLIP_COUNT, FAILED, WITHHELD = 1000, 7, 13


@pytest.fixture(scope="module")
def chromium() -> Iterator[BrowserContext]:
    with browser() as driven:
        yield driven


def records() -> Iterator[Record]:
    """Failed and withheld clips come first; every other one has a number in its caption and its own confidence."""
    clip = sample_frames(clips.video(16), resize_px=160)
    frames = {
        "times_s": list(clip.info.times_s[2::4]),
        "thumbnails": [jpeg_url(jpeg) for jpeg in thumbnails(clip, longer_px=report.THUMBNAIL_PX)[2::4]],
    }
    for number in range(CLIP_COUNT):
        video = f"clips/<b>{number:04}</b>.mp4"
        if number < FAILED:
            yield {"video": video, "error": {"code": "undecodable_video", "message": "it is <i>damaged</i>"}}
        else:
            caption = None if number < FAILED + WITHHELD else f"a dog & cat number {number}"
            yield {"video": video, "caption": caption, "confidence": number / CLIP_COUNT, "frames": frames}


@pytest.fixture(scope="module")
def tab(chromium: BrowserContext, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_bytes(b"".join(report.html(records())))
    with open_tab(chromium, file.as_uri()) as tab:
        yield tab
        assert not complaints(tab)


SHOWN = "#clips > li:not([hidden])"


def set_to(tab: Page, *, words: str = "", kind: str = "", order: str = "", most: str = "100") -> None:
    tab.locator("#words").fill(words)
    tab.locator("#kind").select_option(kind)
    tab.locator("#order").select_option(order)
    tab.locator("#most").fill(most)


def test_a_thousand_clips_are_on_one_page(tab: Page) -> None:
    set_to(tab)
    assert text_of(tab, "#count") == f"1,000 of 1,000 clips; {FAILED} failed"
    shown = tab.locator(SHOWN).all_text_contents()
    assert len(shown) == CLIP_COUNT
    assert "it is <i>damaged</i>" in shown[0]
    assert "clips/<b>0000</b>.mp4" in shown[0]
    assert "a dog & cat number 999" in shown[-1]
    assert "100 % confident" in shown[-1]
    tab.locator(SHOWN).last.scroll_into_view_if_needed()
    tab.wait_for_function(
        "() => [...document.querySelectorAll('#clips > li:last-child img')]"
        ".every(i => i.complete && i.naturalWidth === 112)"
    )


def test_it_is_filtered_by_words_by_outcome_and_by_confidence(tab: Page) -> None:
    for values, expected in (
        ({"words": "NUMBER 77"}, [n for n in range(FAILED + WITHHELD, CLIP_COUNT) if "77" in f"{n:04}"]),
        ({"kind": "failed"}, range(FAILED)),
        ({"kind": "withheld"}, range(FAILED, FAILED + WITHHELD)),
        ({"kind": "captioned", "most": "10"}, range(FAILED + WITHHELD, CLIP_COUNT // 10 + 1)),
        ({"words": "nothing like it"}, []),
    ):
        set_to(tab, **values)
        names = tab.locator(f"{SHOWN} .name").all_text_contents()
        found = {int(name.removeprefix("clips/<b>").partition("<")[0]) for name in names}
        assert found == set(expected)
        assert text_of(tab, "#count").startswith(f"{len(found)} of 1,000 clips")


def test_it_is_sorted_by_confidence(tab: Page) -> None:
    for order, expected in (("1", FAILED), ("-1", CLIP_COUNT - 1), ("", 0)):
        set_to(tab, order=order)
        assert f"<b>{expected:04}</b>" in (tab.locator("#clips > li .name").first.text_content() or "")


def test_it_fits_a_telephone(tab: Page) -> None:
    set_to(tab)
    tab.set_viewport_size({"width": 320, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_job_writes_a_report_beside_its_output(chromium: BrowserContext, tmp_path: Path) -> None:
    broken, out, page = tmp_path / "broken.mp4", tmp_path / "captions.jsonl", tmp_path / "report.html"
    broken.write_bytes(CLIPS[0].read_bytes()[:3000])
    paths = [str(CLIPS[0]), str(broken)]
    assert main([*CAPTION, *paths, "--out", str(out), "--report", str(page)]) == 1
    first, second = map(json.loads, out.read_text().splitlines())
    captioned, failed = (first, second) if "caption" in first else (second, first)
    assert captioned["caption"] == EXAMPLES[CLIPS[0].name]
    with open_tab(chromium, page.as_uri()) as tab:
        assert text_of(tab, "#count") == "2 of 2 clips; 1 failed"
        assert text_of(tab, ".caption") == captioned["caption"]
        assert failed["error"]["message"] in text_of(tab, ".error")
        assert tab.locator("img").count() == 4
        tab.wait_for_function("() => [...document.images].every(i => i.naturalWidth === 112)")
        assert not complaints(tab)
    before = page.read_bytes()
    page.unlink()
    assert main([*CAPTION, *paths, "--out", str(out), "--report", str(page)]) == 1
    assert page.read_bytes() == before


def test_a_report_can_be_the_only_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    clip = REPOSITORY / "examples" / "umbrella-crossing-sky.mp4"
    assert main([*CAPTION, str(clip), "--segment-s", "1", "--report", str(page)]) == 0
    assert not capfd.readouterr().out
    text = page.read_text()
    assert text.count("<time>") == len(json.loads((tmp_path / "report.html.jsonl").read_text())["segments"])
    assert "<time>0.0 to 1.0 s</time>" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--report", "none/report.html", "--out", "captions.jsonl"], "no folder for none/report.html"),
        (["--report", "report.html", "--format", "csv"], "name that too"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_at_once(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CAPTION, str(CLIPS[0]), *arguments]) == 2
    assert said in capsys.readouterr().err
