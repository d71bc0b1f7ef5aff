"""The page in a browser: twenty judgements by keyboard, a server that ends meanwhile, and how it looks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import browser
import pytest
from judgements import make_items, served
from PIL import Image, ImageDraw
from server_thread import in_thread

from megatron_anymal.data.journal import Journal, read_journal
from megatron_anymal.judgement.comparison import Comparison
from megatron_anymal.judgement.items import JudgedItem
from megatron_anymal.judgement.server import JudgementServer

HOSTILE = "</p><script>document.title='x'</script><img src=x onerror=\"document.title='x'\">"
FOCUS = "document.querySelector('fieldset.current legend').textContent"
# Where screenshots are kept, to be looked at.
SHOTS = os.environ.get("SCREENSHOTS")


@contextmanager
def serving(items: list[JudgedItem], folder: Path) -> Iterator[JudgementServer]:
    """A server in this process; its journal is folder/judgements.jsonl."""
    journal = Journal(folder / "judgements.jsonl")
    try:
        with in_thread(JudgementServer(Comparison(items, journal, 0))) as server:
            yield server
    finally:
        journal.close()


def answers_of(item: JudgedItem) -> dict[str, str]:
    return {item.a: "a", item.b: "b"}


def test_twenty_judgements_by_keyboard(tmp_path: Path) -> None:
    """A judges two thirds better; every key press is a real one."""
    items = make_items(tmp_path / "source", 20)
    expected, seen = {}, []
    with serving(items, tmp_path) as server, browser.tab(tmp_path) as tab:
        tab.open(server.url)
        tab.wait("!document.getElementById('login').hidden")
        for key in "ann":
            tab.press(key)
        tab.press("Enter")
        for number, item in enumerate(items):
            tab.wait(f"document.getElementById('count').textContent === '{number} of 20 judged'")
            texts = [tab.value(f"document.querySelectorAll('.answer p')[{side}].textContent") for side in (0, 1)]
            order = [answers_of(item)[text] for text in texts]
            better = ("a", "a", "b", "tie")[number % 4]
            scores = {"a": (2, 2, 2), "b": (number % 3, 0, 2)}
            tab.press("0" if better == "tie" else str(1 + order.index(better)))
            for model in order:
                for score in scores[model]:
                    tab.press(str(score))
            if number == 7:
                # The accuracy of the second answer is wrong at first, and corrected before it is saved.
                right = str(scores[order[1]][1])
                for key in ("Backspace", {"0": "2", "2": "0"}[right], "Backspace", right, "2"):
                    tab.press(key)
                    if key != "Backspace":
                        chosen = tab.value("document.querySelector('[name=\"1-accuracy\"]:checked').value")
                        seen.append(chosen == right)
            tab.press("Enter")
            expected[item.question.key] = (better, order[0], scores)
        tab.wait("!document.getElementById('done').hidden")
        assert not tab.errors, tab.errors
        assert {url.split("?")[0].startswith(server.url) or url.startswith("data:") for url in tab.requests} == {True}
    rows = read_journal(tmp_path / "judgements.jsonl")
    judgements = {r["item"]: (r["choice"], r["first"], {m: tuple(r["scores"][m].values()) for m in "ab"}) for r in rows}
    assert (
        seen == [False, True, True]
        and len(rows) == 20
        and judgements == expected
        and {row["annotator"] for row in rows} == {"ann"}
    )


def test_the_page_outlives_its_server(tmp_path: Path) -> None:
    """What is entered stays on the page if it cannot be saved, and a later judgement replaces an earlier one."""
    make_items(tmp_path / "source", 3)
    process, url = served(tmp_path)
    with browser.tab(tmp_path) as tab:
        tab.open(f"{url}?annotator=bob")
        tab.wait("!document.getElementById('judge').hidden")
        # Enter first goes to the question that is open.
        tab.press("1")
        tab.press("Enter")
        assert tab.value(FOCUS) == "Recognition accuracy"
        for key in "222222":
            tab.press(key)
        tab.press("Enter")
        tab.wait("document.getElementById('count').textContent === '1 of 3 judged'")
        tab.press("p")
        tab.wait("document.querySelectorAll(':checked').length === 7")
        tab.press("0")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(240)
        tab.press("Enter")
        tab.wait("document.getElementById('problem').textContent.includes('is not responding')")
        assert tab.value("document.querySelector('[name=choice][value=tie]').checked")
        process, url = served(tmp_path)
        tab.open(f"{url}?annotator=bob")
        tab.wait("document.getElementById('who').textContent === 'item 2, bob'")
        tab.press("p")
        tab.wait("document.querySelectorAll(':checked').length === 7")
        tab.press("0")
        tab.press("Enter")
        tab.wait("document.getElementById('who').textContent === 'item 2, bob'")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(240) == 0
    rows = read_journal(tmp_path / "out" / "judgements.jsonl")
    assert [(row["item"], row["choice"] == "tie") for row in rows] == [("q0", False), ("q0", True)]


def test_hostile_answers_are_text(tmp_path: Path) -> None:
    items = [JudgedItem(item.question, HOSTILE, f"{HOSTILE} 2") for item in make_items(tmp_path / "source", 1)]
    with serving(items, tmp_path) as server, browser.tab(tmp_path) as tab:
        tab.open(f"{server.url}?annotator=ann")
        tab.wait("!document.getElementById('judge').hidden")
        assert HOSTILE in tab.value("document.querySelector('.answer p').textContent")
        assert tab.value("document.title") == "Compare answers" and not tab.errors


def picture(path: Path) -> None:
    """A picture of a landscape's size, so that the layout is a real one."""
    image = Image.new("RGB", (1200, 800), "#9cc3de")
    draw = ImageDraw.Draw(image)
    draw.polygon([(0, 800), (400, 300), (700, 600), (900, 350), (1200, 800)], "#46624f")
    draw.ellipse((900, 80, 1040, 220), "#f4d35e")
    image.save(path)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_the_screen(tmp_path: Path, width: int, dark: bool) -> None:
    items = make_items(tmp_path / "source", 3)
    picture(tmp_path / "source" / "0.png")
    long = "The mountains in front of a clear sky suggest an early morning in summer. " * 6
    items[0] = JudgedItem(items[0].question, long, "A" * 300)
    with serving(items, tmp_path) as server, browser.tab(tmp_path) as tab:
        tab.open(f"{server.url}?annotator=ann", width, 900, dark=dark)
        for number, shown in enumerate(("img", "audio", "svg")):
            tab.wait(f"document.querySelector('#question {shown}')")
            if shown == "img":
                tab.wait("document.images[0].complete && document.images[0].naturalWidth === 1200")
            wide = tab.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert wide[0] == wide[1] <= width, (shown, wide)
            elements = "[...document.querySelectorAll('header,main *,footer *')].filter(e => e.checkVisibility())"
            outside = f"{elements}.filter(e => e.getBoundingClientRect().right > {width + 1}).map(e => e.outerHTML)"
            assert tab.value(outside) == []
            if SHOTS:
                tab.screenshot(Path(SHOTS) / f"{shown}-{width}-{'dark' if dark else 'light'}.png")
            if number < 2:
                tab.press("n")
        assert not tab.errors, tab.errors
