"""The chat page in a browser: a dropped picture, a streamed answer, errors, the keyboard, and how it looks."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import browser
import pytest
from chat_service import Scripted, serving
from tiny import png

from megatron_anymal.serving.limits import ServingLimits

# Where screenshots are kept, to be looked at.
SHOTS = os.environ.get("SCREENSHOTS")
HOSTILE = "<img src=x onerror=\"document.title='x'\"> "
READY = "document.getElementById('name').textContent === 'tiny'"
ANSWER = "[...document.querySelectorAll('.turn.assistant span')].at(-1).textContent"


def drop(tab: browser.Tab, name: str, kind: str, data: bytes) -> None:
    """Drop a file onto the page."""
    tab.value(f"""(() => {{
      const bytes = Uint8Array.from(atob({base64.b64encode(data).decode()!r}), c => c.charCodeAt(0))
      const transfer = new DataTransfer()
      transfer.items.add(new File([bytes], {name!r}, {{type: {kind!r}}}))
      document.dispatchEvent(new DragEvent("drop", {{dataTransfer: transfer, cancelable: true, bubbles: true}}))
    }})()""")
    tab.wait("document.querySelectorAll('.file').length || !document.getElementById('problem').hidden")


def write(tab: browser.Tab, text: str) -> None:
    tab.wait("document.activeElement.id === 'text'")
    for key in text:
        tab.press(key)
    tab.press("Enter")


def test_a_conversation_about_a_picture_by_keyboard(tmp_path: Path) -> None:
    script = Scripted(words=["A ", "grey ", "cat. ", HOSTILE])
    with serving(script) as served, browser.tab(tmp_path) as tab:
        tab.open(f"{served.url}/")
        tab.wait(READY)
        drop(tab, "cat.png", "image/png", png(1, (60, 40)))
        script.gate.clear()
        write(tab, "hi")
        tab.wait("document.getElementById('send').textContent === 'Stop'")
        script.gate.set()
        tab.wait(f"{ANSWER}.startsWith('A grey cat.') && document.getElementById('send').textContent === 'Send'")
        assert tab.value(ANSWER) == f"A grey cat. {HOSTILE.strip()}" and tab.value("document.title") == "tiny"
        assert tab.value("document.querySelector('.turn.user img').naturalWidth") == 60
        # The second turn holds the first.
        write(tab, "so")
        tab.wait("document.querySelectorAll('.turn').length === 4 && !state.stop")
        assert tab.value("state.messages.map(m => m.role).join()") == "user,assistant,user,assistant"
        assert tab.value("state.messages[0].content[0].input_image.format") == "png"
        assert not tab.errors, tab.errors
        assert all(url.startswith((served.url, "data:", "blob:")) for url in tab.requests)


def test_errors_are_shown_and_the_question_is_kept(tmp_path: Path) -> None:
    with serving(Scripted(), ServingLimits(max_body_bytes=1000)) as served, browser.tab(tmp_path) as tab:
        tab.open(f"{served.url}/")
        tab.wait(READY)
        drop(tab, "a.exe", "application/x-exe", b"a")
        assert "a.exe: the model accepts image, imu" in tab.value("document.getElementById('problem').textContent")
        drop(tab, "a.png", "image/png", os.urandom(3000))
        write(tab, "hi")
        tab.wait("document.getElementById('problem').textContent.includes('--max-body-mb')")
        assert tab.value("document.getElementById('text').value") == "hi"
        assert tab.value("document.querySelectorAll('.turn').length") == 0
        assert tab.value("document.querySelectorAll('.file').length") == 1


def test_escape_stops_an_answer_and_frees_its_place(tmp_path: Path) -> None:
    limits = ServingLimits(max_batch=1, max_new_tokens=10**6, max_cache_tokens=10**7)
    with serving(Scripted(times=10**6, pause=0.01), limits) as served, browser.tab(tmp_path) as tab:
        tab.open(f"{served.url}/")
        tab.wait(READY)
        write(tab, "hi")
        tab.wait(f"{ANSWER}.length > 20")
        tab.press("Escape")
        tab.wait("!state.stop && state.messages.length === 2")
        served.wait(lambda service: service.in_flight == 0 and service.engine.running == 0)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_chat_fits_the_screen(tmp_path: Path, width: int, dark: bool) -> None:
    script = Scripted(words=["The mountains in front of a clear sky suggest an early morning in summer. "], times=6)
    with serving(script) as served, browser.tab(tmp_path) as tab:
        tab.open(f"{served.url}/", width, 800, dark=dark)
        tab.wait(READY)
        drop(tab, "mountains.png", "image/png", png(2, (300, 160)))
        write(tab, "what is this")
        tab.wait("document.querySelectorAll('.turn').length === 2 && !state.stop")
        drop(tab, "walk.npy", "", b"1")
        wide = tab.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] == wide[1] <= width
        assert tab.value("document.getElementById('form').getBoundingClientRect().bottom") <= 800
        assert not tab.value("document.getElementById('rate-label').hidden") and not tab.errors, tab.errors
        if SHOTS:
            tab.screenshot(Path(SHOTS) / f"chat-{width}-{'dark' if dark else 'light'}.png")
