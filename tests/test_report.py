"""The report as a parsed page: complete, self-contained, and safe whatever a client says."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcil.errors import InputError
from fedcil.partition import TaskPartition, save_partition
from fedcil.record.report import duration, render_report, size, write_report
from fedcil.record.run import Run, open_run

CELLS = {"td", "th", "dt", "dd", "p"}
VOID = {"meta", "img", "br", "link", "input"}
COST = {"seconds": 2.0, "cpu_seconds": 2.0}
HOSTILE = "<script>alert('x')</script> & \"quoted\""
SECTIONS = ["headline", "figures", "matrix", "tasks", "coverage", "rounds", "scenario", "environment"]


class Page(HTMLParser):
    """Tags, attributes and text of a page; an end tag without its start is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " " if tag in CELLS else ""

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""

    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def round_line(task: int, number: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "round", "task": task, "phase": 0, "phase_name": "train", "round": number, "status": "ok",
        "cohort": [0, 1], "answered": [0, 1], "failures": [], "samples": 20, "loss": 0.25,
        "bytes": {"down": {"model": 2000, "teacher": 500}, "up": {"model": 2000}}, "cost": COST, **more,
    }  # fmt: skip


def task_line(task: int, accuracy: list[float]) -> dict[str, Any]:
    return {
        "kind": "task", "task": task, "classes": [2 * task, 2 * task + 1], "accuracy": accuracy,
        "task_aware": accuracy, "test_images": [10, 30][: task + 1], "cost": COST,
    }  # fmt: skip


BOUNDARY = {
    "kind": "boundary",
    "task": 0,
    "classes": [0, 1],
    "warnings": [f"vanished {HOSTILE}"],
    "histogram": [3, 1],
    "cost": COST,
}
FAILURE = {"client": 1, "stage": "train", "reason": HOSTILE}
LINES = [
    round_line(0, 0, accuracy=[0.5]),
    round_line(0, 1, answered=[0], failures=[FAILURE], status="no_quorum", loss=None),
    task_line(0, [0.75]),
    BOUNDARY,
    round_line(1, 0),
    task_line(1, [0.25, 0.5]),
]


def make_run(folder: Path, lines: list[dict[str, Any]], *, finished: bool = True) -> Run:
    folder.mkdir()
    (folder / "scenario.toml").write_text('name = "trial"\n[stream]\ntasks = 2\n[method]\nname = "fedavg"\n')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"backward_transfer": -0.5, "min_accuracy": None}))
    return Run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("runs") / "run", LINES)
    part = TaskPartition(np.arange(4, dtype=np.int32), np.array([0, 1, 4]))
    save_partition(run.path / "partition.npz", [part, part])
    environment = {"python": "3.11", "class_order": [HOSTILE, "two", "three", "four"], "data": {"name": "toy"}}
    (run.path / "environment.json").write_text(json.dumps(environment))
    return run


@pytest.fixture(scope="module")
def html(run: Run) -> str:
    return render_report(run)


@pytest.fixture
def page(html: str) -> Page:
    return Page(html)


def test_every_section_is_there_and_linked(page: Page) -> None:
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in SECTIONS]
    assert [name for name, _ in page.tags if name in ("script", "link", "iframe")] == []


def test_nothing_is_fetched(html: str, page: Page) -> None:
    links = [value for _, tag in page.tags for key, value in tag.items() if key in ("src", "href", "srcset")]
    assert links
    assert all(link and link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html


def test_figures_are_inside_with_a_description(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 3  # no label counts are stored in this folder
    assert all(image["alt"] and len(image["src"] or "") > 1000 for image in images)


def test_headline_numbers_by_hand(page: Page) -> None:
    """A_1 = 0.75, A_2 = (10 x 0.25 + 30 x 0.5) / 40 = 0.4375; mean 0.59375; forgetting 0.75 - 0.25.

    Three rounds of 2000 bytes up and 2500 down; six lines of 2 s.
    """
    for expected in (
        "average incremental accuracy 59.4 %", "final accuracy 43.8 %", "forgetting 50.0 %", "time 12.0 s",
        "sent by clients 6.0 kB", "sent to clients 7.5 kB", "failed answers 1", "backward transfer -50.0",
    ):  # fmt: skip
        assert expected in page.words()


def test_hostile_text_stays_text(html: str, page: Page) -> None:
    """In a failure's reason, a warning and a class name."""
    assert "<script" not in html
    assert f"client 1, train: {HOSTILE}" in page.text
    assert f"vanished {HOSTILE}" in page.text
    assert HOSTILE in page.text.split("class_order")[1]


def test_rounds_say_who_was_asked_and_who_failed(page: Page) -> None:
    assert "Task 1: 2 rounds, 1 failed answer, 4.0 s" in page.text
    assert "no_quorum" in page.text
    _metrics, *rounds = page.all("details")
    assert ["open" in details for details in rounds] == [True, False]  # trouble is shown without a click


def test_class_coverage_has_a_bar_per_class(page: Page) -> None:
    """3 of 4 images and 1 of 4."""
    assert len(page.all("svg")) == 1
    assert len(page.all("rect")) == 2
    assert "3 images, 75.0 %" in page.text
    assert "two: 1 images, 25.0 %" in page.text


def test_a_method_without_a_generator_has_no_section_of_its_classes(tmp_path: Path) -> None:
    boundary = {"kind": "boundary", "task": 0, "warnings": [], "cost": COST}
    text = render_report(make_run(tmp_path / "run", [*LINES[:3], boundary], finished=False))
    assert "Class coverage" not in text
    assert "#coverage" not in text


def test_scenario_and_environment(run: Run, page: Page) -> None:
    text = page.words()
    assert 'name = "trial" [stream] tasks = 2' in text
    assert "data.name toy" in text
    assert str(run.path) in text


def test_an_unfinished_run_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    """One task of two has ended; half a line at the end is what a kill leaves."""
    run = make_run(tmp_path / "run", LINES[:5], finished=False)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "rou')
    text = Page(render_report(run)).words()
    assert "This run is not finished: 1 of 2 tasks have ended, 3 rounds are recorded." in text
    assert f"fedcil resume {run.path}" in text
    assert "accuracy after task 1 75.0 %" in text
    assert "2 not ended 1 2.0 kB" in text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], finished=False)
    page = Page(render_report(run))
    assert [section["id"] for section in page.all("section")] == [name for name in SECTIONS if name != "coverage"]
    assert not page.all("img")
    assert "No task has ended yet" in page.text


def test_a_finished_run_is_not_told_to_go_on(page: Page) -> None:
    assert "not finished" not in page.text


def test_it_is_written_into_the_run_folder_or_elsewhere(run: Run, tmp_path: Path) -> None:
    assert write_report(run) == run.path / "report.html"
    assert write_report(run, tmp_path / "mine.html").read_text() == (run.path / "report.html").read_text()
    with pytest.raises(InputError, match="cannot write the report"):
        write_report(run, tmp_path / "nowhere" / "a.html")


@pytest.mark.parametrize("folder", [".", "", ".."])
def test_a_folder_to_write_to_gets_a_page_in_it(
    run: Run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert write_report(run, Path(folder)) == Path(folder) / "report.html"
    assert Path(folder, "report.html").is_file()


@pytest.mark.parametrize("content", [b"", b"x", b"\x93NUMPY\x01\x00"])
def test_damaged_counts_are_an_error_for_people(content: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LINES)
    (run.path / "label_counts.npy").write_bytes(content)
    with pytest.raises(InputError, match="not an array of counts") as error:
        assert run.label_counts is None
    assert error.value.where.endswith("label_counts.npy")


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    run = make_run(tmp_path / "run", LINES)
    monkeypatch.setattr(Path, "read_bytes", locked)
    for name, read in (("summary.json", lambda: run.summary), ("metrics.jsonl", lambda: run.lines)):
        with pytest.raises(InputError, match="cannot be read: Permission denied") as error:
            read()
        assert error.value.where == str(run.path / name)
    monkeypatch.setattr(Path, "is_file", locked)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        open_run(run.path)


def test_half_a_character_does_not_cost_the_page(run: Run, tmp_path: Path) -> None:
    """In the name of a file that is not UTF-8, say."""
    lines = [round_line(0, 0, failures=[FAILURE | {"reason": "no image gr\udcfc.png"}])]
    page = write_report(make_run(tmp_path / "run", lines, finished=False))
    assert "gr\\udcfc.png" in page.read_text()


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_500_000, 3e12)] == ["0 B", "999 B", "1.0 kB", "2.5 MB", "3.0 TB"]
    assert [duration(s) for s in (0.04, 99.9, 600, 9000)] == ["0.0 s", "99.9 s", "10 min", "2.5 h"]


@pytest.mark.slow
def test_a_browser_shows_it(run: Run) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed (on Debian: apt-get install chromium)")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command = [browser, *options, write_report(run).resolve().as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<h2>Accuracy matrix</h2>" in shown
    assert "<script" not in shown
