"""`etenet caption --report`: one page that shows a job, in a real browser, with a thousand clips."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from etenet.captioning.captions import jpeg_url
from etenet.cli import main
from etenet.jobs import report
from etenet.jobs.journal import Record
from etenet.video.sampling import sample_frames
from etenet.video.thumbnails import thumbnails
from tests import clips
from tests.browser import Browser, Tab, browser
from tests.conftest import CAPTION, EXAMPLES, REPOSITORY

CLIPS = [REPOSITORY / "examples" / name for name in EXAMPLES]
CLIP_COUNT, FAILED, WITHHELD = 1000, 7, 13


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
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
def tab(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_bytes(b"".join(report.html(records())))
    with chromium.tab(file.as_uri()) as tab:
        yield tab
        assert not tab.complaints()


SHOWN = "[...document.querySelectorAll('#clips > li')].filter(li => !li.hidden)"


def set_to(tab: Tab, **values: str) -> None:
    for name in ("words", "kind", "order", "most"):
        value = json.dumps(values.get(name, "100" if name == "most" else ""))
        tab.run(
            f"(e => {{ e.value = {value}; e.dispatchEvent(new Event('input', {{bubbles: true}}));"
            f" e.dispatchEvent(new Event('change', {{bubbles: true}})) }})(document.getElementById({name!r}))"
        )


def test_a_thousand_clips_are_on_one_page(tab: Tab) -> None:
    set_to(tab)
    assert tab.text("#count") == f"1,000 of 1,000 clips; {FAILED} failed"
    assert tab.run(f"{SHOWN}.length") == CLIP_COUNT
    first = tab.run("document.querySelector('#clips > li').textContent")
    assert "it is <i>damaged</i>" in first
    assert "clips/<b>0000</b>.mp4" in first
    last = tab.run("document.querySelector('#clips > li:last-child').textContent")
    assert "a dog & cat number 999" in last
    assert "100 % confident" in last
    tab.run("document.querySelector('#clips > li:last-child').scrollIntoView()")
    tab.wait(
        "[...document.querySelectorAll('#clips > li:last-child img')].every(i => i.complete && i.naturalWidth === 112)"
    )


def test_it_is_filtered_by_words_by_outcome_and_by_confidence(tab: Tab) -> None:
    for values, expected in (
        ({"words": "NUMBER 77"}, [n for n in range(FAILED + WITHHELD, CLIP_COUNT) if "77" in f"{n:04}"]),
        ({"kind": "failed"}, range(FAILED)),
        ({"kind": "withheld"}, range(FAILED, FAILED + WITHHELD)),
        ({"kind": "captioned", "most": "10"}, range(FAILED + WITHHELD, CLIP_COUNT // 10 + 1)),
        ({"words": "nothing like it"}, []),
    ):
        set_to(tab, **values)
        names = tab.run(f"{SHOWN}.map(li => li.querySelector('.name').textContent)")
        found = {int(name.removeprefix("clips/<b>").partition("<")[0]) for name in names}
        assert found == set(expected)
        assert tab.text("#count").startswith(f"{len(found)} of 1,000 clips")


def test_it_is_sorted_by_confidence(tab: Tab) -> None:
    for order, expected in (("1", FAILED), ("-1", CLIP_COUNT - 1), ("", 0)):
        set_to(tab, order=order)
        assert f"<b>{expected:04}</b>" in tab.run("document.querySelector('#clips > li .name').textContent")


def test_it_fits_a_telephone(tab: Tab) -> None:
    set_to(tab)
    tab.resize(320)
    assert tab.run("document.documentElement.scrollWidth") <= 320


def test_a_job_writes_a_report_beside_its_output(chromium: Browser, tmp_path: Path) -> None:
    broken, out, page = tmp_path / "broken.mp4", tmp_path / "captions.jsonl", tmp_path / "report.html"
    broken.write_bytes(CLIPS[0].read_bytes()[:3000])
    paths = [str(CLIPS[0]), str(broken)]
    assert main([*CAPTION, *paths, "--out", str(out), "--report", str(page)]) == 1
    first, second = map(json.loads, out.read_text().splitlines())
    captioned, failed = (first, second) if "caption" in first else (second, first)
    assert captioned["caption"] == EXAMPLES[CLIPS[0].name]
    with chromium.tab(page.as_uri()) as tab:
        assert tab.text("#count") == "2 of 2 clips; 1 failed"
        assert tab.text(".caption") == captioned["caption"]
        assert failed["error"]["message"] in tab.text(".error")
        tab.wait("[...document.images].length === 4 && [...document.images].every(i => i.naturalWidth === 112)")
        assert not tab.complaints()
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
