"""The pages tell the truth: their commands run, their answers are the real ones, their lists are those of the code."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from etenet.captioning.feature_cache import DEFAULT_BYTES
from etenet.captioning.options import OPTIONS
from etenet.errors import CaptionError
from etenet.video.ffmpeg import CONTAINERS, DECODERS
from etenet.video.limits import DecodeLimits
from tests.conftest import DEMO, REAL, REPOSITORY, Server, running_server

PAGES = {
    name: (REPOSITORY / name).read_text()
    for name in (
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
        *(
            "docs/capacity.md",
            "docs/comparison.md",
            "docs/http.md",
            "docs/scores.md",
            "model_store/README.md",
            "model_store/MODEL_CARD.md",
        ),
    )
}
README, HTTP, COMPARISON = PAGES["README.md"], PAGES["docs/http.md"], PAGES["docs/comparison.md"]
ALL_PAGES = "\n".join(PAGES.values())
BIN = f"{Path(sys.executable).parent}/"


def blocks(kind: str, text: str = ALL_PAGES) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(kind: str) -> list[str]:
    return [line for block in blocks(kind) for line in block.splitlines()]


REQUESTS_AND_ANSWERS = [
    (page, *found)
    for page, text in PAGES.items()
    for found in re.findall(r"^```sh\n(curl [^\n]*)\n```\n\n```(?:json|text)\n(.*?)^```", text, re.M | re.S)
]


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """A folder that looks like the repository and may be written to."""
    (tmp_path / "model_store").mkdir()
    for checkpoint in (REAL, DEMO):
        (tmp_path / "model_store" / checkpoint.name).symlink_to(checkpoint)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    return tmp_path


@pytest.fixture(scope="module")
def server_of() -> Iterator[Callable[[str], Server]]:
    """Of a page: README shows the answers of the model that `make serve` serves, the other pages those of the demo."""
    with running_server("--checkpoint", str(REAL)) as real, running_server("--checkpoint", str(DEMO)) as demo:
        yield lambda page: real if page == "README.md" else demo


def test_the_first_screen_has_both_commands_a_request_and_its_answer() -> None:
    first = "\n".join(README.splitlines()[:25])
    for expected in ("](docs/page.png)", "make serve", "make test", "curl -T examples/", '"caption":', '"timing_ms":'):
        assert expected in first


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 170


def test_every_request_is_shown_with_its_answer() -> None:
    assert [request for _, request, _ in REQUESTS_AND_ANSWERS] == [c for c in commands("sh") if c.startswith("curl")]
    assert len(REQUESTS_AND_ANSWERS) == len(blocks("json")) + len(blocks("text"))


@pytest.mark.parametrize(("page", "request_line", "shown"), REQUESTS_AND_ANSWERS)
def test_a_request_gets_the_answer_below_it(
    server_of: Callable[[str], Server], newcomer: Path, page: str, request_line: str, shown: str
) -> None:
    server = server_of(page)
    here = request_line.replace("localhost:8080", server.inference).replace("localhost:8083", server.exporter)
    command = [*shlex.split(here), "--silent"]
    answer = subprocess.run(command, cwd=newcomer, capture_output=True, text=True, check=True).stdout
    if shown.startswith("{"):
        assert comparable(json.loads(answer)) == comparable(json.loads(shown))
    else:
        assert answer == shown


def comparable(answer: dict[str, Any]) -> Mapping[str, Any]:
    """An answer in which numbers may differ a little, and times as they like."""
    for sentence in answer.get("captions", ()):
        sentence["log_prob"] = pytest.approx(sentence["log_prob"], abs=5e-3)
        sentence["words"] = [(word["word"], pytest.approx(word["prob"], abs=5e-3)) for word in sentence["words"]]
    return answer | {"timing_ms": sorted(answer.get("timing_ms", ()))}


@pytest.mark.parametrize("command", [command for command in commands("sh") if not command.startswith("curl")])
def test_its_commands_run(server_of: Callable[[str], Server], newcomer: Path, command: str) -> None:
    server = server_of("README.md")
    words = shlex.split(command.replace(".venv/bin/", BIN).replace("http://localhost:8080", server.inference))
    assert subprocess.run(words, cwd=newcomer, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", commands("sh long"))
def test_its_long_commands_know_the_options_they_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    at = next(number for number, word in enumerate(words) if word.startswith("training."))
    subcommand = [word for word in words[at + 1 : at + 2] if not word.startswith("--")]
    with pytest.raises(SystemExit) as ended:
        import_module(words[at]).main([*subcommand, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert not [word for word in words if word.startswith("--") and word not in shown]


@pytest.mark.parametrize(
    "word",
    sorted(set(re.findall(r"make (serve|test-\w+|test|check|bench-gpu|bench|\w+-model|clean)\b", ALL_PAGES))),
)
def test_its_make_targets_exist(word: str) -> None:
    assert subprocess.run(["make", "-n", word], cwd=REPOSITORY, capture_output=True, check=False).returncode == 0


def test_its_python_runs(newcomer: Path) -> None:
    (code,) = blocks("python", README)
    assert subprocess.run([sys.executable, "-c", code], cwd=newcomer, capture_output=True, check=True).stdout.strip()


def test_its_tree_names_every_package_and_every_folder() -> None:
    tree = README[README.index("## How it is built") :].split("\n## ")[0]
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    of_core = {line.split("/")[2] for line in listed.splitlines() if line.startswith("src/etenet/")}
    at_the_top = {line.split("/")[0] for line in listed.splitlines() if "/" in line}
    for name in of_core | at_the_top:
        if not name.startswith(("__", ".")):
            assert re.search(rf"\s{re.escape(name)}(/|\s)", tree), name


def headings(page: Path) -> set[str]:
    """As links name them on GitHub."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [path for folder in (".", "docs", "model_store") for path in sorted(REPOSITORY.glob(f"{folder}/*.md"))]
)
def test_the_links_of_a_page_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]*)\)", page.read_text()):
        name, _, heading = link.partition("#")
        if not name.startswith("https:"):
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`((?:src|handler|tests|docs|training|benchmarks|deploy)/[\w./-]+)`", PAGES[page])
    named += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", PAGES[page])]
    assert not [name for name in named if not (REPOSITORY / name).exists()]


def test_the_comparison_has_a_word_in_every_cell() -> None:
    tables = re.findall(r"^\|.*?(?=\n\n)", COMPARISON, re.MULTILINE | re.DOTALL)
    assert tables
    for table in tables:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        assert all(len(row) == 6 and all(row) for row in rows), rows[0]


def test_its_figures_are_those_of_the_results() -> None:
    table = README[README.index("| measured |") :].split("\n\n")[0]
    results = {
        path.stem: json.loads(path.read_text()) for path in (REPOSITORY / "benchmarks" / "results").glob("*.json")
    }
    decode, encoder, server = (results[name] for name in ("decode", "encoder", "server"))
    of_arms = results["two_stages_demo"]["scores_by_seed"].values()
    torchcodec = min(ms for name, ms in decode["median_ms"].items() if name.startswith("torchcodec"))
    peers = ("plain LitServe", "plain TorchServe")
    for row in (
        [f"CIDEr {mean_cider(of_arms, 'stage 2'):.1f}", f"{mean_cider(of_arms, 'encoder frozen'):.1f}"],
        [f"{decode['median_ms']['ours']:.0f} ms", f"{torchcodec:.0f} ms"],
        [f"{encoder['median_ms'][name] / 1000:.2f} s" for name in ("ours", "eager torch")],
        [f"{server['p50_ms'][name] / 1000:.2f} s" for name in ("ours", *peers)],
        [f"{server['throughput_per_s'][name]:.3f}" for name in ("ours", *peers)],
    ):
        assert any(all(figure in line for figure in row) for line in table.splitlines()), row
    for name in ("ours", *peers):
        assert f"{server['throughput_per_s'][name]:.3f}, measured" in COMPARISON


def test_the_page_on_capacity_has_the_figures_of_its_result() -> None:
    page = (REPOSITORY / "docs" / "capacity.md").read_text()
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "capacity.json").read_text())
    for name, network in record["networks"].items():
        rows = [line for line in page.splitlines() if line.startswith(f"| {name.replace('full', 'the paper')}")]
        parts, money = ([cell.strip() for cell in row.strip("|").split("|")[1:]] for row in rows)
        assert parts == [f"{ms:,.1f}" for ms in network["cpu_ms"].values()]
        hours, dollars = network["core_hours_per_million"], network["dollars_per_million"]
        assert money == [f"{hours[form]:,.1f} h, ${dollars[form]:,.2f}" for form in ("float32", "int8")]


def mean_cider(of_arms: Any, arm: str) -> float:
    figures = [of_arm[arm]["CIDEr"] for of_arm in of_arms]
    return float(sum(figures) / len(figures))


def test_the_page_on_scores_says_what_each_arm_gains() -> None:
    demo, real = (
        json.loads((REPOSITORY / "benchmarks" / "results" / f"two_stages_{recipe}.json").read_text())
        for recipe in ("demo", "real")
    )
    on_test = [{arm: of["CIDEr"] for arm, of in arms.items()} for arms in demo["scores_by_seed"].values()]
    on_validation = [
        {arm: of_epochs[-1] for arm, of_epochs in arms.items()} | {"stage 1": arms["stage 2"][0]}
        for arms in real["validation_cider_by_seed"].values()
    ]
    for of_seeds, gains in (
        (on_test, demo["cider_over_the_control"]),
        (on_validation, real["last_validation_cider_over_the_control"]),
    ):
        for arm in of_seeds[0]:
            figures = [f"{of_seed[arm]:.1f}" for of_seed in of_seeds]
            if arm in ("encoder at 1e-9", "stage 2"):
                figures.append(f"{gains[arm]['mean']:+.1f} (spread {gains[arm]['spread']:.1f})")
            assert f" | {' | '.join(figures)} |" in PAGES["docs/scores.md"]


def test_its_lists_are_those_of_the_code() -> None:
    assert f"| containers | {', '.join(CONTAINERS)} |".replace("mpeg,", "mpeg (program stream),") in HTTP
    assert f"| codecs | {', '.join(DECODERS)} |" in HTTP


def test_its_options_are_those_of_the_code() -> None:
    rows = HTTP[HTTP.index("| header (form field) |") :].split("\n\n")[0].splitlines()[2:]
    for row, option in zip(rows, OPTIONS, strict=True):
        name, _, values, default = row.strip("| ").split(" | ")
        assert name == f"`{option.header}` (`{option.name}`)"
        assert values.strip("`").startswith(option.range)
        assert default.startswith(option.otherwise if option.default is None else f"{option.default:g}")


def test_its_errors_are_those_of_the_code() -> None:
    table = HTTP[HTTP.index("| status | code |") :].split("\n\n")[0]
    shown = {code: int(status) for status, code in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE)}
    assert shown == {kind.code: kind.status for kind in CaptionError.__subclasses__()}


def test_its_errors_of_nginx_are_those_of_its_configuration() -> None:
    table = HTTP[HTTP.index("| status | nginx's code |") :].split("\n\n")[0]
    configured = set(re.findall(r'"code": "(\w+)"', (REPOSITORY / "deploy" / "nginx" / "nginx.conf").read_text()))
    assert set(re.findall(r"^\| \d+ \| `(\w+)` \|", table, re.MULTILINE)) == configured - {
        kind.code for kind in CaptionError.__subclasses__()
    }


SHOWN_LIMITS = {
    "max_body_bytes": f"{DecodeLimits().max_body_bytes // 2**20} MiB",
    "max_pixels": f"{DecodeLimits().max_pixels:,}",
    "max_packets": f"{DecodeLimits().max_packets:,}",
    "max_segments": f"{DecodeLimits().max_segments}",
    "max_memory_bytes": f"{DecodeLimits().max_memory_bytes // 2**30} GiB",
    "decode_cpu_s": f"{DecodeLimits().decode_cpu_s:g} s",
    "decode_deadline_s": f"{DecodeLimits().decode_deadline_s:g} s",
}


def test_its_limits_are_those_in_force() -> None:
    rows = HTTP[HTTP.index("| limit | default |") :].split("\n\n")[0].splitlines()
    for name, value in SHOWN_LIMITS.items():
        assert [row for row in rows if f"`{name}`" in row and value in row], name


def test_the_security_page_names_the_lists_and_limits_in_force() -> None:
    page = PAGES["SECURITY.md"]
    assert f"| containers | {', '.join(CONTAINERS)} |" in page
    assert f"| decoders | {', '.join(DECODERS)} |" in page
    assert SHOWN_LIMITS.keys() == {field.name for field in fields(DecodeLimits)}
    for name, value in SHOWN_LIMITS.items():
        assert f"| {value} | `{name}` |" in page
    settings = yaml.safe_load((REPOSITORY / "handler" / "model-config.yaml").read_text())["etenet"]
    assert settings.pop("feature_cache_bytes") == DEFAULT_BYTES
    assert DecodeLimits(**settings) == DecodeLimits()
