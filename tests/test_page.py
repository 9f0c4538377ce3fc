"""The page in a real browser, as `make serve` serves it and through nginx."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etenet.serving.page import HEADERS, page
from tests import clips
from tests.browser import Browser, Tab, browser
from tests.conftest import EXAMPLES, REAL, REPOSITORY, Server, ask, running_server
from tests.front import edit, nginx, with_keys

CLIPS = {REPOSITORY / "examples" / name: caption for name, caption in EXAMPLES.items()}
CLIP = REPOSITORY / "examples" / "umbrella-crossing-sky.mp4"
CAPTION = CLIPS[CLIP]
SEEN = {"X-Etenet-Captions": "5"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as driven:
        yield driven


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[str]:
    """The address of nginx, which also has the example clips below /clips/."""

    def with_clips(folder: Path) -> None:
        clips = f"location /clips/ {{ alias {CLIP.parent}/; }}\n\n        location / {{"
        edit(folder / "nginx.conf", "location / {", clips)

    with nginx(int(server.inference.rpartition(":")[2]), with_clips) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def tab(chromium: Browser, front: str) -> Iterator[Tab]:
    with chromium.tab(front) as tab:
        yield tab
        assert not tab.complaints()


def wait_for_caption(tab: Tab) -> None:
    tab.wait(
        "/^Captioned/.test(document.getElementById('status').textContent) || !document.getElementById('error').hidden"
    )
    assert not tab.text("#error")


def explained(server: Server, path: Path, **headers: str) -> Any:
    return ask(f"{server.inference}/explanations/etenet", path.read_bytes(), SEEN | headers).json()


def test_nginx_and_the_server_send_the_same_files_with_the_same_headers(server: Server, front: str) -> None:
    for path, file in page().items():
        for address in (front, server.exporter):
            with urllib.request.urlopen(address + path, timeout=10) as response:
                assert response.read() == file.content
                sent = HEADERS | {"Content-Type": file.content_type}
                assert {name: response.headers[name] for name in sent} == sent
    assert ask(f"{front}/page").status == ask(f"{server.exporter}/page").status == 404


def test_every_example_gets_its_caption_with_its_frames_and_their_times(chromium: Browser, server: Server) -> None:
    with chromium.tab(server.exporter) as tab:
        for path, caption in CLIPS.items():
            tab.choose_file("#file", path)
            tab.wait(f"document.getElementById('curl').textContent.includes({path.name!r})")
            wait_for_caption(tab)
            assert tab.text("#sentence").split() == caption.split()
            tab.wait("[...document.querySelectorAll('#frames img')].every(i => i.complete && i.naturalWidth === 128)")
            times = explained(server, path)["frames"]["times_s"]
            assert [float(text.split()[0]) for text in tab.texts("#frames figcaption")] == pytest.approx(
                times, abs=0.006
            )
            tab.wait("document.getElementById('video').videoWidth > 0")
        assert not tab.complaints()


@pytest.mark.long
def test_a_model_with_a_calibration_says_how_sure_it_is(chromium: Browser) -> None:
    with running_server("--checkpoint", str(REAL)) as real, chromium.tab(real.exporter) as tab:
        tab.choose_file("#file", CLIP)
        wait_for_caption(tab)
        sure = [f"{100 * each['confidence']:.0f} %" for each in explained(real, CLIP)["captions"]]
        assert tab.text("#confidence").startswith(f"{sure[0]} confident: of such captions, about ")
        assert tab.texts("#sentences small") == sure
        assert not tab.complaints()


def test_a_word_lights_up_the_frames_that_it_came_from(tab: Tab, server: Server) -> None:
    tab.drop(files=[CLIP])
    wait_for_caption(tab)
    expected = explained(server, CLIP)["captions"][0]
    weights = "[...document.querySelectorAll('#frames li')].map(li => Number(li.style.getPropertyValue('--weight')))"
    for number, (word, of_word) in enumerate(zip(expected["words"], expected["attention"], strict=True)):
        tab.point_at(".word", number)
        assert tab.text(".word.lit") == word["word"]
        assert tab.run(weights) == pytest.approx([weight / max(of_word) for weight in of_word], abs=1e-3)
        described = tab.run(f"document.querySelectorAll('.word')[{number}].getAttribute('aria-description')")
        assert f"{round(100 * word['prob'])} %" in described
        lights = tab.run(weights.replace("--weight", "--light"))
        assert [lights.index(0), lights.index(1)] == [of_word.index(of(of_word)) for of in (min, max)]
    tab.point_at("h1")
    assert not tab.text(".word.lit")
    assert tab.run(weights) == [0] * 16


def test_the_keyboard_is_enough(tab: Tab, server: Server) -> None:
    reached = []
    while tab.run("document.activeElement.id") != "link":
        tab.press("Tab", 9)
        reached.append(tab.run("document.activeElement.id"))
        assert len(reached) < 10
    assert reached == ["file", "link"]
    tab.type(f"/clips/{CLIP.name}")
    tab.press("Enter", 13)
    wait_for_caption(tab)
    assert tab.text("#sentence").split() == CAPTION.split()
    while not tab.run("document.activeElement.classList.contains('word')"):
        tab.press("Tab", 9)
    for word in CAPTION.split():
        assert tab.text(".word.lit") == word
        tab.press("Tab", 9)
    assert not tab.text(".word.lit")
    second = explained(server, CLIP)["captions"][1]["caption"]
    while not tab.run(f"document.activeElement.innerText.startsWith({second!r})"):
        tab.press("Tab", 9)
    tab.press("Enter", 13)
    assert tab.text("#sentence").split() == second.split()


def test_a_link_of_this_server_is_followed_and_no_other(tab: Tab, front: str) -> None:
    tab.drop(link="https://example.org/dog.mp4")
    tab.wait("!document.getElementById('error').hidden")
    assert tab.text("#error") == (
        f"Only links on this server ({front}) can be followed; download the video, and drop the file."
    )
    tab.drop(link=f"{front}/clips/{CLIP.name}")
    wait_for_caption(tab)
    assert tab.text("#sentence").split() == CAPTION.split()


def test_a_link_to_nothing_and_no_link_are_called_that(chromium: Browser, front: str) -> None:
    with chromium.tab(front) as tab:
        for link, said in (
            ("/clips/none.mp4", "There is nothing at /clips/none.mp4 (status 404)."),
            ("https://[", "This is not a link: https://[."),
        ):
            tab.run(f"document.getElementById('link').value = {link!r}")
            tab.run("document.getElementById('ask').requestSubmit()")
            tab.wait(f"document.getElementById('error').textContent === {said!r}")


@pytest.mark.parametrize("where", ["front", "server"])
def test_an_error_is_shown_as_the_servers_own_sentence(
    chromium: Browser, front: str, server: Server, where: str, tmp_path: Path
) -> None:
    broken = tmp_path / "<img src=x onerror=hacked=1>.mp4"
    broken.write_bytes(CLIP.read_bytes()[:3000])
    message = ask(server.predictions, broken.read_bytes()).json()["error"]["message"]
    with chromium.tab(front if where == "front" else server.exporter) as tab:
        tab.drop(files=[broken])
        tab.wait("!document.getElementById('error').hidden")
        assert tab.text("#error") == f"{message[0].upper()}{message[1:]}."
        assert not tab.text("#again")
        tab.drop(files=[CLIP])
        wait_for_caption(tab)
        assert tab.run("typeof hacked") == "undefined"


@pytest.mark.parametrize("where", ["front", "server"])
def test_a_video_beyond_the_limit_is_called_too_large(
    chromium: Browser, front: str, server: Server, where: str, tmp_path: Path
) -> None:
    huge = tmp_path / "huge.mp4"
    with huge.open("wb") as file:
        file.truncate(70 * 2**20)
    with chromium.tab(front if where == "front" else server.exporter) as tab:
        tab.drop(files=[huge])
        tab.wait("!document.getElementById('error').hidden")
        assert re.search("too large|larger than 6[45] MiB", tab.text("#error"))


def test_without_a_captioner_it_says_so_and_tries_again_when_asked(chromium: Browser) -> None:
    with nginx(1) as port, chromium.tab(f"http://127.0.0.1:{port}") as tab:
        tab.drop(files=[CLIP])
        tab.wait("!document.getElementById('error').hidden")
        assert tab.text("#error") == "The captioner cannot be reached; try again in a moment."
        tab.run("document.getElementById('error').textContent = ''")
        tab.run("document.getElementById('again').click()")
        tab.wait("document.getElementById('error').textContent.startsWith('The captioner')")


def test_segments_are_a_timeline_and_subtitles_of_the_video(tab: Tab, server: Server) -> None:
    tab.run("document.getElementById('cut').value = '1'")
    tab.drop(files=[CLIP])
    wait_for_caption(tab)
    segments = explained(server, CLIP, **{"X-Etenet-Segment-S": "1"})["segments"]
    assert len(segments) > 1
    assert [text.splitlines()[-1] for text in tab.texts("#transcript li")] == [each["caption"] for each in segments]
    tab.wait("document.querySelector('track').track.cues?.length > 0")
    cues = tab.run("[...document.querySelector('track').track.cues].map(c => [c.startTime, c.endTime, c.text])")
    assert cues == [[each["start_s"], each["end_s"], each["caption"]] for each in segments]
    tab.run("document.querySelectorAll('#transcript button')[1].click()")
    assert tab.text("#sentence").split() == segments[1]["caption"].split()
    assert tab.run("document.getElementById('video').currentTime") == segments[1]["start_s"]
    first_s = float(tab.texts("#frames figcaption")[0].split()[0])
    assert first_s == pytest.approx(segments[1]["frames"]["times_s"][0], abs=0.006)


@pytest.mark.long
def test_a_long_video_goes_on_where_it_stopped(tab: Tab, tmp_path: Path) -> None:
    long = tmp_path / "long.mp4"
    long.write_bytes(clips.video(18 * 25, size=(64, 48), preset="ultrafast"))
    tab.run("document.getElementById('cut').value = '1'")
    tab.drop(files=[long])
    wait_for_caption(tab)
    assert len(tab.texts("#transcript li")) == 16
    assert tab.text("#more") == "Caption the rest, from 0:16.0"
    tab.run("document.getElementById('more').click()")
    tab.wait("document.querySelectorAll('#transcript li').length === 18")
    assert not tab.text("#more")


def test_the_command_does_the_same(tab: Tab, server: Server, tmp_path: Path) -> None:
    awkward = tmp_path / "the dog's $(touch hacked).mp4"
    awkward.write_bytes(CLIP.read_bytes())
    tab.drop(files=[awkward])
    wait_for_caption(tab)
    answer = subprocess.run(
        ["sh", "-c", f"{tab.text('#curl')} --silent"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert json.loads(answer)["captions"] == explained(server, CLIP)["captions"]
    assert [path.name for path in tmp_path.iterdir()] == [awkward.name]


def test_a_4k_clip_and_one_that_browsers_do_not_play(tab: Tab, tmp_path: Path) -> None:
    large, old = tmp_path / "large.mp4", tmp_path / "old.avi"
    grey = [np.full((2160, 3840, 3), 50 * number, np.uint8) for number in range(1, 5)]
    large.write_bytes(clips.video(pictures=grey, size=(3840, 2160), preset="ultrafast"))
    old.write_bytes(clips.video(20, codec="mpeg4", container="avi"))
    tab.drop(files=[large])
    wait_for_caption(tab)
    assert "3840" in tab.text("#facts")
    assert tab.run("document.querySelector('#frames img').naturalHeight") == 72
    tab.drop(files=[old])
    tab.wait("document.getElementById('curl').textContent.includes('old.avi')")
    tab.wait("document.getElementById('player').hidden")
    assert "does not play" in tab.text("#unplayable")
    tab.wait("document.querySelector('#frames img').naturalHeight > 0")


def test_where_the_server_has_keys_the_page_asks_for_one(chromium: Browser, server: Server) -> None:
    with (
        nginx(int(server.inference.rpartition(":")[2]), with_keys("mine")) as port,
        chromium.tab(f"http://127.0.0.1:{port}") as tab,
    ):
        tab.drop(files=[CLIP])
        tab.wait("!document.getElementById('unlock').hidden")
        assert tab.text("#error") == "This server needs a key."
        assert tab.run("document.activeElement.id") == "key"
        tab.type("mine")
        tab.press("Enter", 13)
        tab.wait("document.getElementById('unlock').hidden && !document.getElementById('result').hidden")
        assert tab.text("#sentence").split() == CAPTION.split()
        assert '-H "Authorization: Bearer $KEY"' in tab.text("#curl")
        assert "mine" not in tab.text("#curl")


def test_two_tabs_do_not_disturb_each_other(chromium: Browser, front: str) -> None:
    (one, first), (two, second) = list(CLIPS.items())[:2]
    with chromium.tab(front) as left, chromium.tab(front) as right:
        left.drop(files=[one])
        right.drop(files=[two])
        for tab, caption in ((left, first), (right, second)):
            wait_for_caption(tab)
            assert tab.text("#sentence").split() == caption.split()
            assert not tab.complaints()


def test_a_new_video_takes_the_place_of_the_one_before(tab: Tab) -> None:
    (one, _), (two, second) = list(CLIPS.items())[:2]
    tab.drop(files=[one])
    tab.drop(files=[two])
    wait_for_caption(tab)
    assert tab.text("#sentence").split() == second.split()


def test_a_file_takes_the_place_of_a_link_that_is_still_fetched(tab: Tab, front: str) -> None:
    (one, _), (two, second) = list(CLIPS.items())[:2]
    tab.drop(link=f"{front}/clips/{one.name}")
    tab.drop(files=[two])
    wait_for_caption(tab)
    assert tab.text("#sentence").split() == second.split()
    assert two.name in tab.text("#curl")


def test_no_script_runs_but_that_of_the_page(chromium: Browser, front: str) -> None:
    with chromium.tab(front) as tab:
        for attempt in (
            "document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 1'}))",
            "document.body.innerHTML = '<img src=x onerror=\"hacked = 1\">'",
            "document.body.setAttribute('onclick', 'hacked = 1'); document.body.click()",
            "setTimeout('hacked = 1')",
        ):
            tab.run(f"(() => {{ try {{ {attempt} }} catch {{}} }})()")
        assert tab.run("typeof hacked") == "undefined"
        assert tab.complaints()


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_every_width_and_is_readable_in_the_light_and_in_the_dark(
    chromium: Browser, front: str, dark: bool
) -> None:
    with chromium.tab(front, dark=dark) as tab:
        tab.run("document.getElementById('cut').value = '1'")
        tab.drop(files=[CLIP])
        wait_for_caption(tab)
        for width in (320, 1600):
            tab.resize(width)
            assert tab.run("document.documentElement.scrollWidth") <= width
        colours = tab.run(
            "Object.fromEntries(['paper', 'field', 'ink', 'quiet', 'wrong', 'accent', 'accent-ink']"
            ".map(n => [n, getComputedStyle(document.documentElement).getPropertyValue('--' + n)]))"
        )
        pairs = [(ink, paper) for ink in ("ink", "quiet", "wrong", "accent") for paper in ("paper", "field")]
        for ink, paper in [*pairs, ("accent-ink", "accent")]:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        assert (luminance(colours["paper"]) < 0.1) is dark


def test_everything_has_a_name_for_a_screen_reader(tab: Tab) -> None:
    tab.run("document.getElementById('cut').value = '1'")
    tab.drop(files=[CLIP])
    wait_for_caption(tab)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    things = [node for node in nodes if not node["ignored"]]
    named = {"button", "textbox", "combobox", "image", "heading", "region", "form", "Video"}
    unnamed = [n for n in things if n["role"]["value"] in named and not n.get("name", {}).get("value")]
    assert not [node for node in unnamed if node["role"]["value"] != "Video"]
    roles = [node["role"]["value"] for node in things]
    assert roles.count("image") == 16
    assert {"status", "main", "heading", "button", "textbox", "combobox"} <= set(roles)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb. Source: WCAG 2.2."""
    digits = colour.strip().removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    shares = [int(part, 16) / 255 for part in re.findall("..", digits)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Source: WCAG 2.2."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
