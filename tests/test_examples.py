"""The examples: a program made protected, and the desktop chat under a virtual screen, on a tiny model."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adlocal import ProxyError
from support.paths import ROOT

EXAMPLES = ROOT / "examples"
N_CTX = 128


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, without a display."""
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


# drop_in.py


def test_drop_in_streams_an_answer_and_tells_its_dose(tiny_llama: Path, tiny_bundle: Path) -> None:
    done = run(EXAMPLES / "drop_in.py", "-m", tiny_llama, "--bundle", tiny_bundle, "-c", N_CTX, "-p", "3 + 4 =")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Dose(strength=1.0" in done.stderr
    assert "total=None" not in done.stderr


def test_drop_in_refuses_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    done = run(EXAMPLES / "drop_in.py", "-m", tiny_llama, "--bundle", tmp_path / "none")
    refused(done, 2, "drop_in: ", "no such bundle")


# desktop_chat.py


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    """A virtual screen."""
    pytest.importorskip("tkinter")
    if shutil.which("Xvfb") is None:
        pytest.skip("needs Xvfb, for a virtual screen")
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1180x800x24", "-nolisten", "tcp"]
    with subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL) as server:
        os.close(writing)
        try:
            with open(reading) as number:
                yield f":{number.readline().strip()}"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def example(display: str) -> ModuleType:
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("desktop_chat", EXAMPLES / "desktop_chat.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Chat:
    """A chat window, driven as its reader would."""

    def __init__(self, example: ModuleType, display: str, load: Callable[[], Any]) -> None:
        self.models: list[Any] = []
        self.closed = False
        self._gone = example.tk.TclError
        self.root = example.tk.Tk(screenName=display)
        self.window = example.ChatWindow(self.root, lambda: self._keep(load()), strength=3.0)

    def _keep(self, llm: Any) -> Any:
        self.models.append(llm)
        return llm

    def until(self, condition: Callable[[], object]) -> None:
        """Serves the window until something holds."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"{self.window.state}: {self.window.status.get()}\n{self.text()}"
            self.root.update()
            time.sleep(0.002)

    def until_ready(self) -> None:
        self.until(lambda: self.window.state == "ready")

    def send(self, message: str) -> None:
        """Types a message and presses Enter."""
        self.window.entry.insert("end", message)
        self.window.entry.focus_force()
        self.root.update()
        self.window.entry.event_generate("<Return>")

    def ask(self, message: str, strength: float = 3.0) -> None:
        """Sends a message and waits for the end of the answer."""
        self.window.slider.set(strength)
        self.send(message)
        assert self.window.state == "answering"
        self.until_ready()

    def begin(self, message: str) -> None:
        """Sends a message and waits for a few tokens of the answer."""
        self.send(message)
        self.until(lambda: len(self.doses()) > 2)
        assert self.window.state == "answering"

    def text(self, tag: str | None = None) -> str:
        """The transcript's lines; of a tag only those, and of the tag "" what has none: the answers."""
        transcript = self.window.transcript
        return "".join(
            text
            for _, text, index in transcript.dump("1.0", "end-1c", text=True)
            if tag is None or tag in (transcript.tag_names(index) or ("",))
        )

    def typed(self) -> str:
        return str(self.window.entry.get("1.0", "end-1c"))

    def doses(self) -> list[float]:
        """The curve of the present answer."""
        return list(self.window.plot.curves[-1][1])

    def close(self) -> None:
        """Closes the window, and serves it until it is gone."""
        if not self.closed:
            self.closed = True
            self.window.close()
            with pytest.raises(self._gone, match="has been destroyed"):
                self.until(lambda: not self.root.winfo_exists())


@pytest.fixture
def open_chat(example: ModuleType, display: str) -> Iterator[Callable[[Path, Path], Chat]]:
    """Opens chats with a teacher and a bundle, which are then loading."""
    chats: list[Chat] = []

    def open_one(teacher: Path, bundle: Path) -> Chat:
        options = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
        chats.append(Chat(example, display, partial(example.WatchedLlama, str(teacher), bundle=bundle, **options)))
        return chats[-1]

    yield open_one
    while chats:
        chats.pop().close()
    gc.collect()  # here, because Tk's objects must not be freed in the thread of the next window


@pytest.fixture
def chat(open_chat: Callable[[Path, Path], Chat], readable_llama: Path, readable_bundle: Path) -> Chat:
    """A chat that is ready."""
    chat = open_chat(readable_llama, readable_bundle)
    assert chat.window.state == "loading"
    assert "loading" in chat.window.status.get()
    chat.until_ready()
    return chat


@pytest.fixture
def slowly(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a token take 20 ms."""
    sample = example.WatchedLlama.sample

    def slow(*args: Any, **kwargs: Any) -> int:
        time.sleep(0.02)
        return int(sample(*args, **kwargs))

    monkeypatch.setattr(example.WatchedLlama, "sample", slow)


def test_an_answer_and_its_dose(chat: Chat, display: str) -> None:
    chat.ask("3 + 4 =")
    dose = chat.models[0].last_dose
    assert chat.text("user") == "3 + 4 =\n"
    assert chat.text("name") == "You\nModel (3.0 nats)\n"
    assert chat.text("").strip()
    assert chat.text("error") == chat.typed() == ""
    assert len(chat.doses()) == dose.n_tokens > 10
    assert chat.doses()[-1] == dose.total
    assert [variable.get() for variable in chat.window.readings.values()] == [
        f"{dose.total:+.1f}",
        f"{dose.per_token:+.2f}",
        f"{dose.mean_kl:.3f}",
    ]
    assert re.fullmatch(rf"{dose.n_tokens} tokens, [\d.]+ a second", chat.window.status.get())
    chat.root.update()
    if path := os.environ.get("ADLOCAL_SCREENSHOT"):
        subprocess.run(["import", "-display", display, "-window", "root", path], check=True)


def test_the_plot_has_a_point_for_each_token(chat: Chat) -> None:
    """And one for no token; a line for every answer, the present one last and in colour."""
    for strength in (1.0, 5.0):
        chat.ask("3 + 4 =", strength)
    plot = chat.window.plot
    plot.draw()
    curves = [item for item in plot.find_all() if plot.type(item) == "line" and plot.itemcget(item, "width") == "2.0"]
    assert [len(plot.coords(item)) // 2 - 1 for item in curves] == [len(doses) for _, doses in plot.curves]
    assert [plot.itemcget(item, "fill") for item in curves].count(plot.itemcget(curves[-1], "fill")) == 1
    assert {"1", "5", "0", "tokens"} <= {
        plot.itemcget(item, "text") for item in plot.find_all() if plot.type(item) == "text"
    }


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4, [0, 1, 2, 3, 4]), (-1.2, 158, [0, 50, 100, 150, 200]), (-30, 12, [-30, -20, -10, 0, 10, 20])],
)
def test_axes_have_round_values(low: float, high: float, expected: list[float], example: ModuleType) -> None:
    assert example.ticks(low, high) == expected


@pytest.mark.usefixtures("slowly")
def test_stop_ends_an_answer(chat: Chat) -> None:
    chat.begin("3 + 4 =")
    chat.window.stop()
    chat.until_ready()
    assert chat.text("note").strip() == "stopped"
    assert len(chat.doses()) == chat.models[0].last_dose.n_tokens < 30
    chat.begin("and another answer")


@pytest.mark.usefixtures("slowly")
def test_the_strength_is_the_sliders_when_a_message_is_sent(chat: Chat) -> None:
    chat.window.slider.set(2.04)
    chat.begin("3 + 4 =")
    chat.window.slider.set(7.0)
    chat.window.stop()
    chat.until_ready()
    assert chat.models[0].last_dose.strength == chat.window.plot.curves[-1][0] == 2.0
    assert "Model (2.0 nats)" in chat.text("name")


def test_strength_0_has_no_dose(chat: Chat) -> None:
    chat.ask("3 + 4 =", strength=0.0)
    assert "Model (off: plain teacher)" in chat.text("name")
    assert chat.text("").strip()
    assert chat.doses() == []
    assert chat.window.readings["dose"].get() == "–"
    assert re.fullmatch(r"[1-9]\d* tokens, [\d.]+ a second", chat.window.status.get())


@pytest.mark.usefixtures("slowly")
def test_what_is_typed_during_an_answer_stays_typed(chat: Chat) -> None:
    chat.begin("3 + 4 =")
    chat.send("and then?")
    chat.window.clear()
    assert chat.typed() == "and then?"
    assert chat.text("user") == "3 + 4 =\n"
    chat.window.stop()
    chat.until_ready()
    assert chat.typed() == "and then?"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ProxyError("a proxy went away; no token was emitted"), "a proxy went away; no token was emitted"),
        (RuntimeError("llama_decode returned -3"), "RuntimeError: llama_decode returned -3"),
    ],
)
def test_an_error_is_told_in_words(
    error: Exception, words: str, chat: Chat, example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is given back, and can be sent again."""

    def half_an_answer(*_args: object, **_kwargs: object) -> Iterator[Any]:
        yield {"choices": [{"delta": {"content": "Half of"}}]}
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(example.WatchedLlama, "create_chat_completion", half_an_answer)
        chat.ask("3 + 4 =")
    assert chat.text("error").strip() == words
    assert chat.text("") == "Half of"
    assert chat.typed() == "3 + 4 ="
    assert chat.window.status.get() == "no answer: see above"
    chat.ask("")
    assert chat.typed() == ""
    assert len(chat.doses()) > 10


@pytest.fixture
def sent(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each call of the model sent to it."""
    calls: list[list[str]] = []
    complete = example.WatchedLlama.create_chat_completion

    def record(llm: Any, messages: list[dict[str, str]], **kwargs: Any) -> Any:
        calls.append([message["content"] for message in messages])
        return complete(llm, messages, **kwargs)

    monkeypatch.setattr(example.WatchedLlama, "create_chat_completion", record)
    return calls


@pytest.mark.usefixtures("slowly")
def test_the_conversation_is_kept(chat: Chat, sent: list[list[str]]) -> None:
    """A stopped answer too, as far as it came."""
    chat.begin("first")
    chat.window.stop()
    chat.until_ready()
    chat.begin("second")
    answer = chat.text("")[: len(sent[1][1])]
    assert answer
    assert sent == [["first"], ["first", answer, "second"]]


def test_a_full_context_forgets_the_oldest_messages(chat: Chat, sent: list[list[str]]) -> None:
    """In the model, not on the screen."""
    for message in ("first", "second", "third"):
        chat.ask(message)
    assert [messages[-1] for messages in sent] == ["first", "second", "second", "third", "third"]
    assert sent[2] == ["second"]
    assert sent[4] == ["third"]
    assert chat.text("error") == ""
    assert "the context is full: the answer ends here\n" in chat.text("note")
    assert "the context is full: the model no longer sees the oldest messages\n" in chat.text("note")
    assert chat.text("user") == "first\nsecond\nthird\n"


@pytest.mark.usefixtures("slowly")
def test_a_message_that_never_fits_is_given_back(chat: Chat, sent: list[list[str]]) -> None:
    """And costs nothing of the conversation."""
    chat.begin("first")
    chat.window.stop()
    chat.until_ready()
    chat.ask(too_long := "much too long " * 20)
    assert f"does not fit into the context of {N_CTX} tokens" in chat.text("error")
    assert chat.text("note").strip() == "stopped"
    assert chat.typed() == too_long.strip()
    chat.window.entry.delete("1.0", "end")
    chat.begin("short")
    assert [sent[-1][0], *sent[-1][2:]] == ["first", "short"]


def test_characters_that_are_never_complete_end_with_the_context(
    open_chat: Callable[[Path, Path], Chat], tiny_llama: Path, tiny_bundle: Path
) -> None:
    """llama-cpp-python would sample on beyond it: it counts tokens only after whole characters."""
    chat = open_chat(tiny_llama, tiny_bundle)
    chat.until_ready()
    chat.ask("3 + 4 =")
    assert chat.text("error") == ""
    assert 10 < len(chat.doses()) <= N_CTX


def test_clear_begins_anew(chat: Chat, sent: list[list[str]]) -> None:
    chat.ask("first")
    chat.window.clear()
    assert chat.text() == ""
    assert chat.window.plot.curves == []
    assert chat.window.readings["dose"].get() == "–"
    chat.ask("second")
    assert sent == [["first"], ["second"]]


@pytest.mark.usefixtures("slowly")
def test_closing_during_an_answer_ends_the_thread_first(
    chat: Chat, example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, released = threading.Event(), threading.Event()
    sample = example.WatchedLlama.sample

    def held(*args: Any, **kwargs: Any) -> int:
        reached.set()
        released.wait(30)
        return int(sample(*args, **kwargs))

    chat.begin("3 + 4 =")
    monkeypatch.setattr(example.WatchedLlama, "sample", held)
    chat.until(reached.is_set)
    chat.window.close()
    closed = time.monotonic()
    chat.until(lambda: time.monotonic() > closed + 0.2)
    assert chat.root.winfo_exists()
    assert chat.window.status.get() == "closing …"
    released.set()
    chat.close()
    assert not chat.window.generation.thread.is_alive()
    assert chat.models[0].last_dose.n_tokens < 30  # stopped, not written to its end
    assert chat.models[0].model is None


def test_a_model_that_cannot_be_loaded(
    open_chat: Callable[[Path, Path], Chat], readable_llama: Path, tmp_path: Path
) -> None:
    chat = open_chat(readable_llama, tmp_path / "none")
    chat.until(lambda: chat.text("error"))
    assert "no such bundle" in chat.text("error")
    chat.send("3 + 4 =")
    assert chat.window.status.get() == "no model: see above"
    assert chat.typed() == "3 + 4 ="


def test_the_program_ends_with_ctrl_c(
    example: ModuleType,
    display: str,
    readable_llama: Path,
    readable_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windows = []

    class Interrupted(example.ChatWindow):  # type: ignore[misc, name-defined]
        def __init__(self, root: Any, *args: Any) -> None:
            windows.append(self)
            super().__init__(root, *args)
            root.after(60_000, root.destroy)

        def on_idle(self, *args: str) -> None:
            super().on_idle(*args)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(example, "ChatWindow", Interrupted)
    monkeypatch.setenv("DISPLAY", display)
    before = signal.getsignal(signal.SIGINT)
    try:
        argv = ["-m", readable_llama, "--bundle", readable_bundle, "-c", N_CTX, "-t", 1, "--strength", 2.5]
        assert example.main([str(word) for word in argv]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    (window,) = windows
    assert window.state == "closing"
    assert not window.generation.thread.is_alive()
    windows.clear()
    del window
    gc.collect()


@pytest.mark.usefixtures("display")
def test_without_a_display() -> None:
    done = run(EXAMPLES / "desktop_chat.py", "-m", "teacher.gguf", "--bundle", "bundle")
    refused(done, 1, "desktop_chat: no window can be opened")


def test_without_tkinter() -> None:
    program = f"import runpy, sys; sys.modules['tkinter'] = None; runpy.run_path({str(EXAMPLES / 'desktop_chat.py')!r})"
    refused(run("-c", program), 1, "desktop_chat: this Python has no tkinter")


def test_a_strength_off_the_slider_is_refused() -> None:
    pytest.importorskip("tkinter")
    done = run(EXAMPLES / "desktop_chat.py", "-m", "teacher.gguf", "--bundle", "bundle", "--strength", "nan")
    assert done.returncode == 2
    assert "--strength nan: give 0 to 8 nats" in done.stderr
