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
from playwright.sync_api import BrowserContext, Page, expect

from etenet.serving.page import HEADERS, page
from tests import clips
from tests.browser import browser, complaints, contrast, drop, luminance, open_tab, percent, press_tab_until, text_of
from tests.conftest import EXAMPLES, REAL, REPOSITORY, Server, ask, running_server
from tests.front import edit, nginx, with_keys

CLIPS = {REPOSITORY / "examples" / name: caption for name, caption in EXAMPLES.items()}
CLIP = REPOSITORY / "examples" / "umbrella-crossing-sky.mp4"
CAPTION = CLIPS[CLIP]
SEEN = {"X-Etenet-Captions": "5"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[BrowserContext]:
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
def tab(chromium: BrowserContext, front: str) -> Iterator[Page]:
    with open_tab(chromium, front) as tab:
        yield tab
        assert not complaints(tab)


def wait_for_caption(tab: Page) -> None:
    tab.wait_for_function(
        "() => /^Captioned/.test(document.getElementById('status').textContent)"
        " || !document.getElementById('error').hidden"
    )
    assert tab.locator("#error").filter(visible=True).all_inner_texts() == []


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


def test_every_example_gets_its_caption_with_its_frames_and_their_times(
    chromium: BrowserContext, server: Server
) -> None:
    with open_tab(chromium, server.exporter) as tab:
        for path, caption in CLIPS.items():
            tab.set_input_files("#file", path)
            expect(tab.locator("#curl")).to_contain_text(path.name)
            wait_for_caption(tab)
            assert text_of(tab, "#sentence").split() == caption.split()
            tab.wait_for_function(
                "() => [...document.querySelectorAll('#frames img')].every(i => i.complete && i.naturalWidth === 128)"
            )
            times = explained(server, path)["frames"]["times_s"]
            shown = [float(text.split()[0]) for text in tab.locator("#frames figcaption").all_inner_texts()]
            assert shown == pytest.approx(times, abs=0.006)
            tab.wait_for_function("() => document.getElementById('video').videoWidth > 0")
        assert not complaints(tab)


def test_a_model_with_a_calibration_says_how_sure_it_is(chromium: BrowserContext) -> None:
    with running_server("--checkpoint", str(REAL)) as real, open_tab(chromium, real.exporter) as tab:
        tab.set_input_files("#file", CLIP)
        wait_for_caption(tab)
        sure = [percent(each["confidence"]) for each in explained(real, CLIP)["captions"]]
        assert text_of(tab, "#confidence").startswith(f"{sure[0]} confident: of such captions, about ")
        assert tab.locator("#sentences small").all_inner_texts() == sure
        assert not complaints(tab)


def test_a_word_lights_up_the_frames_that_it_came_from(tab: Page, server: Server) -> None:
    drop(tab, files=[CLIP])
    wait_for_caption(tab)
    expected = explained(server, CLIP)["captions"][0]
    weights = "[...document.querySelectorAll('#frames li')].map(li => Number(li.style.getPropertyValue('--weight')))"
    for number, (word, of_word) in enumerate(zip(expected["words"], expected["attention"], strict=True)):
        button = tab.locator(".word").nth(number)
        button.hover()
        assert text_of(tab, ".word.lit") == word["word"]
        assert tab.evaluate(weights) == pytest.approx([weight / max(of_word) for weight in of_word], abs=1e-3)
        described = button.get_attribute("aria-description") or ""
        assert percent(word["prob"]) in described
        lights = tab.evaluate(weights.replace("--weight", "--light"))
        assert [lights.index(0), lights.index(1)] == [of_word.index(of(of_word)) for of in (min, max)]
    tab.locator("h1").hover()
    assert tab.locator(".word.lit").count() == 0
    assert tab.evaluate(weights) == [0] * 16


def test_the_keyboard_is_enough(tab: Page, server: Server) -> None:
    reached = []
    while tab.evaluate("document.activeElement.id") != "link":
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id"))
        assert len(reached) < 10
    assert reached == ["file", "link"]
    tab.keyboard.type(f"/clips/{CLIP.name}")
    tab.keyboard.press("Enter")
    wait_for_caption(tab)
    assert text_of(tab, "#sentence").split() == CAPTION.split()
    press_tab_until(tab, "document.activeElement.classList.contains('word')")
    for word in CAPTION.split():
        assert text_of(tab, ".word.lit") == word
        tab.keyboard.press("Tab")
    assert tab.locator(".word.lit").count() == 0
    second = explained(server, CLIP)["captions"][1]["caption"]
    press_tab_until(tab, "start => document.activeElement.innerText.startsWith(start)", second)
    tab.keyboard.press("Enter")
    assert text_of(tab, "#sentence").split() == second.split()


def test_a_link_of_this_server_is_followed_and_no_other(tab: Page, front: str) -> None:
    drop(tab, link="https://example.org/dog.mp4")
    assert text_of(tab, "#error") == (
        f"Only links on this server ({front}) can be followed; download the video, and drop the file."
    )
    drop(tab, link=f"{front}/clips/{CLIP.name}")
    wait_for_caption(tab)
    assert text_of(tab, "#sentence").split() == CAPTION.split()


def test_a_link_to_nothing_and_no_link_are_called_that(chromium: BrowserContext, front: str) -> None:
    with open_tab(chromium, front) as tab:
        for link, said in (
            ("/clips/none.mp4", "There is nothing at /clips/none.mp4 (status 404)."),
            ("https://[", "This is not a link: https://[."),
        ):
            tab.locator("#link").fill(link)
            tab.locator("#link").press("Enter")
            expect(tab.locator("#error")).to_have_text(said)


def test_a_link_whose_name_is_not_utf_8_is_followed(tab: Page) -> None:
    tab.route(re.compile("%E9"), lambda route: route.fulfill(body=CLIP.read_bytes()))
    tab.locator("#link").fill("/clips/caf%E9.mp4")
    tab.locator("#link").press("Enter")
    wait_for_caption(tab)
    assert "caf%E9.mp4" in text_of(tab, "#facts")


@pytest.mark.parametrize("where", ["front", "server"])
def test_an_error_is_shown_as_the_servers_own_sentence(
    chromium: BrowserContext, front: str, server: Server, where: str, tmp_path: Path
) -> None:
    broken = tmp_path / "<img src=x onerror=hacked=1>.mp4"
    broken.write_bytes(CLIP.read_bytes()[:3000])
    message = ask(server.predictions, broken.read_bytes()).json()["error"]["message"]
    with open_tab(chromium, front if where == "front" else server.exporter) as tab:
        drop(tab, files=[broken])
        assert text_of(tab, "#error") == f"{message[0].upper()}{message[1:]}."
        assert tab.locator("#again").is_hidden()
        drop(tab, files=[CLIP])
        wait_for_caption(tab)
        assert tab.evaluate("typeof hacked") == "undefined"


@pytest.mark.parametrize("where", ["front", "server"])
def test_a_video_beyond_the_limit_is_called_too_large(
    chromium: BrowserContext, front: str, server: Server, where: str, tmp_path: Path
) -> None:
    huge = tmp_path / "huge.mp4"
    with huge.open("wb") as file:
        file.truncate(70 * 2**20)
    with open_tab(chromium, front if where == "front" else server.exporter) as tab:
        drop(tab, files=[huge])
        assert re.search("too large|larger than 6[45] MiB", text_of(tab, "#error"))


def test_without_a_captioner_it_says_so_and_tries_again_when_asked(chromium: BrowserContext) -> None:
    said = "The captioner cannot be reached; try again in a moment."
    with nginx(1) as port, open_tab(chromium, f"http://127.0.0.1:{port}") as tab:
        drop(tab, files=[CLIP])
        assert text_of(tab, "#error") == said
        tab.evaluate("document.getElementById('error').textContent = ''")
        tab.locator("#again").click()
        expect(tab.locator("#error")).to_have_text(said)


def test_a_folder_and_several_files_are_called_that(chromium: BrowserContext, front: str, tmp_path: Path) -> None:
    with open_tab(chromium, front) as tab:
        drop(tab, files=[tmp_path])
        assert "it is a folder" in text_of(tab, "#error")
        drop(tab, files=list(CLIPS)[:2])
        expect(tab.locator("#error")).to_have_text("These are 2 files; give one video at a time.")


def test_the_page_of_a_login_is_not_taken_for_a_caption(tab: Page) -> None:
    tab.route("**/explanations/etenet", lambda route: route.fulfill(body="<html>Log in"))
    drop(tab, files=[CLIP])
    assert text_of(tab, "#error") == "This is not the answer of a captioner (status 200)."


def test_segments_are_a_timeline_and_subtitles_of_the_video(tab: Page, server: Server) -> None:
    tab.locator("#cut").select_option("1")
    drop(tab, files=[CLIP])
    wait_for_caption(tab)
    segments = explained(server, CLIP, **{"X-Etenet-Segment-S": "1"})["segments"]
    assert len(segments) > 1
    listed = [text.splitlines()[-1] for text in tab.locator("#transcript li").all_inner_texts()]
    assert listed == [each["caption"] for each in segments]
    tab.wait_for_function("() => document.querySelector('track').track.cues?.length > 0")
    cues = tab.evaluate("[...document.querySelector('track').track.cues].map(c => [c.startTime, c.endTime, c.text])")
    assert cues == [[each["start_s"], each["end_s"], each["caption"]] for each in segments]
    tab.locator("#transcript button").nth(1).click()
    assert text_of(tab, "#sentence").split() == segments[1]["caption"].split()
    assert tab.evaluate("document.getElementById('video').currentTime") == segments[1]["start_s"]
    first_s = float(tab.locator("#frames figcaption").first.inner_text().split()[0])
    assert first_s == pytest.approx(segments[1]["frames"]["times_s"][0], abs=0.006)


def drop_18_seconds_in_segments_of_one(tab: Page, folder: Path) -> None:
    (long := folder / "long.mp4").write_bytes(clips.video(18 * 25, size=(64, 48), preset="ultrafast"))
    tab.locator("#cut").select_option("1")
    drop(tab, files=[long])
    wait_for_caption(tab)


def test_a_long_video_goes_on_where_it_stopped(tab: Page, tmp_path: Path) -> None:
    drop_18_seconds_in_segments_of_one(tab, tmp_path)
    assert tab.locator("#transcript li").count() == 16
    assert text_of(tab, "#more") == "Caption the rest, from 0:16.0"
    tab.locator("#more").click()
    expect(tab.locator("#transcript li")).to_have_count(18)
    assert tab.locator("#more").is_hidden()


def test_two_clicks_for_the_rest_of_a_video_bring_it_once(tab: Page, tmp_path: Path) -> None:
    drop_18_seconds_in_segments_of_one(tab, tmp_path)
    with tab.expect_event("requestfailed", timeout=10_000):  # the first click's, which the page aborts
        tab.locator("#more").dblclick()
    expect(tab.locator("#transcript li")).to_have_count(18)


def test_times_are_rounded_before_they_are_cut_into_minutes(tab: Page) -> None:
    times = {0: "0:00.0", 59.94: "0:59.9", 59.96: "1:00.0", 60.02: "1:00.0", 3599.99: "60:00.0"}
    assert tab.evaluate("times => times.map(clock)", list(times)) == list(times.values())


def test_the_command_does_the_same(tab: Page, server: Server, tmp_path: Path) -> None:
    awkward = tmp_path / "the dog's $(touch hacked) {1,2} [dQw4w9WgXcQ].mp4"
    awkward.write_bytes(CLIP.read_bytes())
    drop(tab, files=[awkward])
    wait_for_caption(tab)
    answer = subprocess.run(
        ["sh", "-c", f"{text_of(tab, '#curl')} --silent"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert json.loads(answer)["captions"] == explained(server, CLIP)["captions"]
    assert [path.name for path in tmp_path.iterdir()] == [awkward.name]


def test_a_4k_clip_and_one_that_browsers_do_not_play(tab: Page, tmp_path: Path) -> None:
    large, old = tmp_path / "large.mp4", tmp_path / "old.avi"
    grey = [np.full((2160, 3840, 3), 50 * number, np.uint8) for number in range(1, 5)]
    large.write_bytes(clips.video(pictures=grey, size=(3840, 2160), preset="ultrafast"))
    old.write_bytes(clips.video(20, codec="mpeg4", container="avi"))
    drop(tab, files=[large])
    wait_for_caption(tab)
    assert "3840" in text_of(tab, "#facts")
    assert tab.evaluate("document.querySelector('#frames img').naturalHeight") == 72
    drop(tab, files=[old])
    expect(tab.locator("#curl")).to_contain_text(old.name)
    tab.locator("#player").wait_for(state="hidden")
    assert "does not play" in text_of(tab, "#unplayable")
    tab.wait_for_function("() => document.querySelector('#frames img').naturalHeight > 0")


def test_where_the_server_has_keys_the_page_asks_for_one(chromium: BrowserContext, server: Server) -> None:
    with (
        nginx(int(server.inference.rpartition(":")[2]), with_keys("mine")) as port,
        open_tab(chromium, f"http://127.0.0.1:{port}") as tab,
    ):
        drop(tab, files=[CLIP])
        tab.locator("#unlock").wait_for()
        assert text_of(tab, "#error") == "This server needs a key."
        assert tab.evaluate("document.activeElement.id") == "key"
        tab.keyboard.type("\N{CYRILLIC SMALL LETTER EM}ine")
        tab.keyboard.press("Enter")
        expect(tab.locator("#error")).to_have_text("This is not a key of this server.")
        tab.locator("#link").fill("mine\N{ZERO WIDTH SPACE}")
        for keys in ("Control+A", "Control+X"):
            tab.locator("#link").press(keys)
        for keys in ("Control+A", "Control+V"):
            tab.locator("#key").press(keys)
        tab.keyboard.press("Enter")
        tab.locator("#unlock").wait_for(state="hidden")
        tab.locator("#result").wait_for()
        assert text_of(tab, "#sentence").split() == CAPTION.split()
        assert '-H "Authorization: Bearer $KEY"' in text_of(tab, "#curl")
        assert "mine" not in text_of(tab, "#curl")


def test_it_works_below_a_path_of_another_server(chromium: BrowserContext, front: str) -> None:
    inside = f"location /inside/ {{ proxy_pass {front}/; }}\n\n        location / {{"
    with nginx(1, lambda folder: edit(folder / "nginx.conf", "location / {", inside)) as port:
        outer = f"http://127.0.0.1:{port}/inside/"
        with open_tab(chromium, outer) as tab:
            drop(tab, files=[CLIP])
            wait_for_caption(tab)
            assert f"'{outer}explanations/etenet'" in text_of(tab, "#curl")


def test_two_tabs_do_not_disturb_each_other(chromium: BrowserContext, front: str) -> None:
    (one, first), (two, second) = list(CLIPS.items())[:2]
    with open_tab(chromium, front) as left, open_tab(chromium, front) as right:
        drop(left, files=[one])
        drop(right, files=[two])
        for tab, caption in ((left, first), (right, second)):
            wait_for_caption(tab)
            assert text_of(tab, "#sentence").split() == caption.split()
            assert not complaints(tab)


@pytest.mark.parametrize("before", ["a file", "a link"])
def test_a_new_video_takes_the_place_of_the_one_before(tab: Page, front: str, before: str) -> None:
    (one, _), (two, second) = list(CLIPS.items())[:2]
    drop(tab, **({"files": [one]} if before == "a file" else {"link": f"{front}/clips/{one.name}"}))
    drop(tab, files=[two])
    wait_for_caption(tab)
    assert text_of(tab, "#sentence").split() == second.split()
    assert two.name in text_of(tab, "#curl")


def test_what_is_under_way_can_be_cancelled(tab: Page) -> None:
    tab.route("**/explanations/etenet", lambda _: None)
    for cancel in (tab.locator("#cancel").click, lambda: tab.keyboard.press("Escape")):
        drop(tab, files=[CLIP])
        with tab.expect_event("requestfailed"):
            cancel()
        expect(tab.locator("#status")).to_have_text("Cancelled.")
    tab.unroute_all()
    drop(tab, files=[CLIP])
    wait_for_caption(tab)
    expect(tab.locator("#cancel")).to_be_hidden()


def test_no_script_runs_but_that_of_the_page(chromium: BrowserContext, front: str) -> None:
    with open_tab(chromium, front) as tab:
        for attempt in (
            "document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 1'}))",
            "document.body.innerHTML = '<img src=x onerror=\"hacked = 1\">'",
            "document.body.setAttribute('onclick', 'hacked = 1'); document.body.click()",
            "setTimeout('hacked = 1')",
        ):
            tab.evaluate(f"() => {{ try {{ {attempt} }} catch {{}} }}")
        assert tab.evaluate("typeof hacked") == "undefined"
        assert complaints(tab)


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_every_width_and_is_readable_in_the_light_and_in_the_dark(
    chromium: BrowserContext, front: str, dark: bool
) -> None:
    with open_tab(chromium, front, dark=dark) as tab:
        tab.locator("#cut").select_option("1")
        drop(tab, files=[CLIP])
        wait_for_caption(tab)
        for width in (320, 1600):
            tab.set_viewport_size({"width": width, "height": 800})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        colours = tab.evaluate(
            "Object.fromEntries(['paper', 'field', 'ink', 'quiet', 'wrong', 'accent', 'accent-ink']"
            ".map(n => [n, getComputedStyle(document.documentElement).getPropertyValue('--' + n)]))"
        )
        pairs = [(ink, paper) for ink in ("ink", "quiet", "wrong", "accent") for paper in ("paper", "field")]
        for ink, paper in [*pairs, ("accent-ink", "accent")]:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        assert (luminance(colours["paper"]) < 0.1) is dark


def test_everything_has_a_name_for_a_screen_reader(tab: Page) -> None:
    tab.locator("#cut").select_option("1")
    drop(tab, files=[CLIP])
    wait_for_caption(tab)
    nodes = tab.context.new_cdp_session(tab).send("Accessibility.getFullAXTree")["nodes"]
    things = [node for node in nodes if not node["ignored"]]
    named = {"button", "textbox", "combobox", "image", "heading", "region", "form", "Video"}
    unnamed = [n for n in things if n["role"]["value"] in named and not n.get("name", {}).get("value")]
    assert not [node for node in unnamed if node["role"]["value"] != "Video"]
    roles = [node["role"]["value"] for node in things]
    assert roles.count("image") == 16
    assert {"status", "main", "heading", "button", "textbox", "combobox"} <= set(roles)
