"""A desktop chat under protection: the strength is a slider, and each answer's dose is drawn while it is written.

    python examples/desktop_chat.py -m teacher.gguf --bundle bundle/

One thread owns the model. It takes messages from one queue, and puts what the window has to do into another.
"""

from __future__ import annotations

import argparse
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from adlocal import AdlocalError, AntidistillationLlama, Dose, InputError

try:
    import tkinter as tk
    from tkinter import font, ttk
except ImportError as error:
    sys.exit(f"desktop_chat: this Python has no tkinter ({error}); on Debian: apt install python3-tk")

MAX_STRENGTH = 8.0
POLL_MS = 30
PAPER, PANEL, INK, MUTED, GRID = "#ffffff", "#f3f5f6", "#1f2933", "#6b7680", "#e3e7ea"
ACCENT, PRESSED, TINT, FAINT, ALARM = "#0b7285", "#095c6b", "#e6f4f6", "#bcc5cd", "#c92a2a"


class Stopped(Exception):
    """Ends an answer; the message says why."""


class WatchedLlama(AntidistillationLlama):
    """Calls `watch` after every sampled token. Streamed chunks are text, which can take several tokens to complete."""

    watch: Callable[[], None]

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As without watching."""
        token = super().sample(*args, **kwargs)
        self.watch()
        return token


class Generation:
    """The thread that loads the model, answers, and remembers the conversation. Nothing else touches llama.cpp.

    Attributes:
        calls: what the window's thread has to call, in order.
        stop: set it to end the answer at its next token.
    """

    def __init__(self, load: Callable[[], WatchedLlama], window: ChatWindow) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.stop = threading.Event()
        self._load, self._window = load, window
        self._requests: queue.SimpleQueue[tuple[str, float] | None] = queue.SimpleQueue()
        self._history: list[dict[str, str]] = []
        self.thread = threading.Thread(target=self._run, name="generation")
        self.thread.start()

    def send(self, message: str, strength: float) -> None:
        """Asks for an answer. `on_idle` tells that it has ended; until then ask for no other."""
        self.stop.clear()
        self._requests.put((message, strength))

    def forget(self) -> None:
        """Begins a new conversation. Not while an answer is written."""
        self._history.clear()

    def end(self) -> None:
        """Stops, and has the thread free the model and end."""
        self.stop.set()
        self._requests.put(None)

    def _tell(self, call: Callable[..., None], *args: object) -> None:
        self.calls.put(partial(call, *args))

    def _write(self, text: str, tag: str = "") -> None:
        self._tell(self._window.transcript.write, text, tag)

    def _run(self) -> None:
        try:
            llm = self._load()
        except Exception as error:  # whatever it is, the reader has to learn of it
            self._write(_words(error), "error")
            self._tell(self._window.status.set, "no model: see above")
            return
        with closing(llm):
            self._tell(self._window.on_idle, "ready")
            while (request := self._requests.get()) is not None:
                self._answer(llm, *request)

    def _answer(self, llm: WatchedLlama, message: str, strength: float) -> None:
        before = list(self._history)
        self._history.append({"role": "user", "content": message})
        llm.watch = partial(self._watch, llm, time.perf_counter())
        pieces: list[str] = []
        try:
            for piece in self._stream(llm, strength):
                pieces.append(piece)
                self._write(piece)
        except Stopped as reason:
            self._write(str(reason), "note")
        except Exception as error:  # as above
            self._history = before
            self._write(_words(error), "error")
            self._tell(self._window.on_idle, "no answer: see above", message)
            return
        self._history.append({"role": "assistant", "content": "".join(pieces)})
        self._tell(self._window.on_idle)

    def _stream(self, llm: WatchedLlama, strength: float) -> Iterator[str]:
        """The answer's text as it comes. While the conversation is too long, its older half is forgotten."""
        note = ""
        while True:
            try:
                for chunk in llm.create_chat_completion(self._history, stream=True, max_tokens=None, strength=strength):
                    if note:
                        self._write(note, "note")
                        note = ""
                    yield chunk["choices"][0]["delta"].get("content", "")
                return
            except ValueError as error:
                if "exceed context window" not in str(error):
                    raise
                exchanges = len(self._history) // 2
                if exchanges == 0:
                    raise InputError(
                        f"the message alone does not fit into the context of {len(llm.input_ids)} tokens; shorten it, "
                        "or give a larger --ctx-size"
                    ) from None
                del self._history[: 2 * math.ceil(exchanges / 2)]
                note = "the context is full: the model no longer sees the oldest messages"

    def _watch(self, llm: WatchedLlama, started: float) -> None:
        dose = replace(llm.last_dose)
        self._tell(self._window.on_token, dose, dose.n_tokens / (time.perf_counter() - started))
        if self.stop.is_set():
            raise Stopped("stopped")
        if llm.n_tokens + 1 >= len(llm.input_ids):  # n_ctx as asked for; llama.cpp rounds its own up
            raise Stopped("the context is full: the answer ends here")


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, AdlocalError) else f"{type(error).__name__}: {error}"


class DosePlot(tk.Canvas):
    """Dose over tokens, marked with the strength: the present answer in colour, earlier ones in grey.

    Attributes:
        curves: of each answer its strength, and the dose after each token.
    """

    LEFT, RIGHT, TOP, BOTTOM = 48, 32, 36, 48

    def __init__(self, parent: tk.Misc) -> None:
        super().__init__(parent, width=360, height=260, background=PAPER, highlightthickness=0)
        self.curves: list[tuple[float, list[float]]] = []
        self.bind("<Configure>", lambda _: self.draw())

    def draw(self) -> None:
        """Draws everything anew."""
        self.delete("all")
        n_max = max([20, *(len(doses) for _, doses in self.curves)])
        values = [0.0, *(dose for _, doses in self.curves for dose in doses)]
        rows = ticks(min(values), max(*values, min(values) + 4))
        width, height = self.winfo_width() - self.LEFT - self.RIGHT, self.winfo_height() - self.TOP - self.BOTTOM

        def x(n: float) -> float:
            return self.LEFT + width * n / n_max

        def y(dose: float) -> float:
            return self.TOP + height * (rows[-1] - dose) / (rows[-1] - rows[0])

        for dose in rows:
            self.create_line(x(0), y(dose), x(n_max), y(dose), fill=GRID if dose else MUTED)
            self._label(x(0) - 6, y(dose), "e", f"{dose:+g}" if dose else "0")
        for n in ticks(0, n_max):
            if n <= n_max:
                self._label(x(n), y(rows[0]) + 8, "n", f"{n:g}")
        self._label(x(n_max / 2), y(rows[0]) + 25, "n", "tokens")
        self._label(x(0), 8, "nw", "dose so far")
        for older, (strength, doses) in enumerate(self.curves, 1 - len(self.curves)):
            if doses:
                points = [(x(n), y(dose)) for n, dose in enumerate([0.0, *doses])]
                self.create_line(points, fill=FAINT if older else ACCENT, width=2)
                self._label(points[-1][0] + 5, points[-1][1], "w", f"{strength:g}", MUTED if older else ACCENT)

    def _label(self, x: float, y: float, anchor: Any, text: str, color: str = MUTED) -> None:
        self.create_text(x, y, anchor=anchor, text=text, fill=color, font="TkSmallCaptionFont")


def ticks(low: float, high: float) -> list[float]:
    """Round values, about five, from `low` to `high`; a tenth of a step may lie outside."""
    least = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(least))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= least)
    return [step * i for i in range(math.floor(low / step + 0.1), math.ceil(high / step - 0.1) + 1)]


class Transcript(tk.Text):
    """The conversation, to which text is only added."""

    def __init__(self, parent: tk.Misc) -> None:
        super().__init__(parent, width=64, height=26, wrap="word", padx=18, pady=6, borderwidth=0, state="disabled")
        self.configure(background=PAPER, foreground=INK, spacing2=4, spacing3=4, highlightthickness=0)
        self.tag_configure("name", font="TkCaptionFont", foreground=MUTED, spacing1=14)
        self.tag_configure("user", background=TINT, lmargin1=10, lmargin2=10, rmargin=10, spacing1=5)
        self.tag_configure("note", font="TkSmallCaptionFont", foreground=MUTED)
        self.tag_configure("error", foreground=ALARM)

    def write(self, text: str, tag: str = "") -> None:
        """Adds to the answer or, with a tag, lines of their own. Scrolls along unless the reader has scrolled back."""
        at_end = self.yview()[1] == 1.0
        if tag:
            text = f"{text}\n" if self.index("end-1c").endswith(".0") else f"\n{text}\n"
        self.configure(state="normal")
        self.insert("end", text, tag)
        self.configure(state="disabled")
        if at_end:
            self.see("end")

    def clear(self) -> None:
        """Empties it."""
        self.configure(state="normal")
        self.delete("1.0", "end")
        self.configure(state="disabled")


class ChatWindow:
    """Transcript and entry on the left; strength, dose and its plot on the right; a status line below.

    Attributes:
        state: loading (for good when that fails), ready, answering or closing.
    """

    def __init__(self, root: tk.Tk, load: Callable[[], WatchedLlama], strength: float = 1.0) -> None:
        self.root = root
        self.status, self._slider_words = tk.StringVar(root), tk.StringVar(root)
        self.readings = {name: tk.StringVar(root) for name in ("dose", "mean Δ", "mean KL, nats")}
        self.slider = tk.DoubleVar(root)
        self.slider.trace_add("write", lambda *_: self._slider_words.set(_nats(self.strength)))
        self.slider.set(strength)
        self._buttons: dict[ttk.Button, str] = {}
        self._build()
        self._read(None)
        self._become("loading", "loading the model …")
        self.generation = Generation(load, self)
        self._poll()

    @property
    def strength(self) -> float:
        """Where the slider stands, in tenths of a nat."""
        return round(self.slider.get(), 1)

    def send(self, _event: object = None) -> str:
        """Sends what was typed, at the slider's strength. Unless the model is ready it stays typed."""
        message = self.entry.get("1.0", "end").strip()
        if message and self.state == "ready":
            self.entry.delete("1.0", "end")
            for text, tag in (("You", "name"), (message, "user"), (f"Model ({_nats(self.strength)})", "name")):
                self.transcript.write(text, tag)
            self.transcript.see("end")
            self.plot.curves.append((self.strength, []))
            self._read(None)
            self._become("answering", "reading the prompt …")
            self.generation.send(message, self.strength)
        return "break"  # from Enter's own effect

    def stop(self) -> None:
        """Ends the answer that is being written."""
        self.generation.stop.set()

    def clear(self) -> None:
        """Begins a new conversation."""
        if self.state == "ready":
            self.generation.forget()
            self.transcript.clear()
            self.plot.curves.clear()
            self.plot.draw()
            self._read(None)
            self.status.set("ready")

    def close(self) -> None:
        """Ends the model's thread first, then the window."""
        self._become("closing", "closing …")
        self.generation.end()

    def on_token(self, dose: Dose, speed: float) -> None:
        """A token was sampled; `dose` is that of the answer so far."""
        if dose.strength > 0:  # at 0 the proxies do not run
            self.plot.curves[-1][1].append(dose.total or 0.0)
        self._read(dose)
        if self.state == "answering":
            self.status.set(f"{dose.n_tokens} tokens, {speed:.1f} a second")

    def on_idle(self, status: str = "", unanswered: str = "") -> None:
        """The model waits for a message; one that it could not answer goes back to where it was typed."""
        if not self.entry.get("1.0", "end").strip():
            self.entry.insert("1.0", unanswered)
        if self.state != "closing":
            self._become("ready", status or self.status.get())

    def _poll(self) -> None:
        ended = not self.generation.thread.is_alive()  # asked first: then no call can come after those below
        n_calls = self.generation.calls.qsize()
        for _ in range(n_calls):
            self.generation.calls.get()()
        if n_calls:
            self.plot.draw()
        if ended and self.state == "closing":
            self.root.destroy()
        else:
            self.root.after(POLL_MS, self._poll)

    def _become(self, state: str, status: str) -> None:
        self.state = state
        self.status.set(status)
        for button, when in self._buttons.items():
            button.state(["!disabled" if state == when else "disabled"])

    def _read(self, dose: Dose | None) -> None:
        readings = ["–"] * 3
        if dose is not None and dose.total is not None:
            readings = [f"{dose.total:+.1f}", f"{dose.per_token:+.2f}", f"{dose.mean_kl:.3f}"]
        for variable, reading in zip(self.readings.values(), readings, strict=True):
            variable.set(reading)

    def _build(self) -> None:
        dress(self.root)
        self.root.title("Chat under protection")
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        status = ttk.Label(self.root, textvariable=self.status, style="Muted.TLabel", padding=(18, 8))
        status.pack(side="bottom", fill="x")
        side, chat = ttk.Frame(self.root, padding=(8, 16, 16, 0)), ttk.Frame(self.root, padding=(16, 16, 8, 0))
        side.pack(side="right", fill="both")
        chat.pack(side="left", fill="both", expand=True)
        self._build_side(side)
        self._build_chat(chat)

    def _build_chat(self, parent: ttk.Frame) -> None:
        buttons, pages = ttk.Frame(parent), ttk.Frame(parent)
        for name, when in (("Send", "ready"), ("Stop", "answering"), ("Clear", "ready")):
            button = ttk.Button(buttons, text=name, command=getattr(self, name.lower()), style=f"{name}.TButton")
            button.pack(side="right", padx=(8, 0))
            self._buttons[button] = when
        self.entry = tk.Text(parent, width=1, height=3, wrap="word", padx=12, pady=8, borderwidth=0, foreground=INK)
        self.entry.configure(background=PAPER, highlightthickness=1, highlightbackground=GRID, highlightcolor=ACCENT)
        self.entry.bind("<Return>", self.send)
        self.entry.bind("<Shift-Return>", lambda _: None)  # a new line, as Enter is elsewhere
        self.entry.focus()
        self.transcript = Transcript(pages)
        bar = ttk.Scrollbar(pages, command=self.transcript.yview)
        self.transcript.configure(yscrollcommand=bar.set)
        buttons.pack(side="bottom", fill="x")
        self.entry.pack(side="bottom", fill="x", pady=10)
        pages.pack(fill="both", expand=True)
        bar.pack(side="right", fill="y")
        self.transcript.pack(fill="both", expand=True)

    def _build_side(self, parent: ttk.Frame) -> None:
        ttk.Label(parent, text="strength of the next answer", style="Muted.TLabel").pack(fill="x")
        ttk.Label(parent, textvariable=self._slider_words, style="Big.TLabel").pack(fill="x")
        ttk.Scale(parent, to=MAX_STRENGTH, variable=self.slider).pack(fill="x", pady=(4, 16))
        readings = ttk.Frame(parent)
        readings.pack(side="bottom", fill="x")
        for column, (name, value) in enumerate(self.readings.items()):
            readings.columnconfigure(column, weight=1, uniform="readings")
            ttk.Label(readings, text=name, style="Muted.TLabel").grid(row=0, column=column, sticky="w")
            ttk.Label(readings, textvariable=value, style="Big.TLabel").grid(row=1, column=column, sticky="w")
        self.plot = DosePlot(parent)
        self.plot.pack(fill="both", expand=True, pady=(0, 12))


def _nats(strength: float) -> str:
    return f"{strength:.1f} nats" if strength else "off: plain teacher"


def dress(root: tk.Tk) -> None:
    """Sets fonts and colours."""
    for name, size in {"TkDefaultFont": 10, "TkTextFont": 11, "TkCaptionFont": 9, "TkSmallCaptionFont": 9}.items():
        font.nametofont(name, root).configure(size=size)
    font.nametofont("TkHeadingFont", root).configure(size=15, weight="bold")
    root.option_add("*Text.font", "TkTextFont")
    root.configure(background=PANEL)
    theme = ttk.Style(root)
    theme.theme_use("clam")
    theme.configure(".", background=PANEL, foreground=INK, troughcolor=GRID, gripcount=0)
    theme.configure(".", bordercolor=PANEL, lightcolor=PANEL, darkcolor=PANEL)
    theme.configure(
        "TScrollbar", background=FAINT, troughcolor=PAPER, bordercolor=PAPER, arrowcolor=PAPER, arrowsize=10
    )
    theme.map("TScrollbar", background=[("disabled", PAPER)])
    theme.configure("TScale", background=ACCENT, sliderlength=18)
    theme.map("TScale", background=[("active", PRESSED)])
    theme.configure("Muted.TLabel", foreground=MUTED)
    theme.configure("Big.TLabel", font="TkHeadingFont")
    theme.configure("TButton", background=PAPER, padding=(16, 6), relief="flat")
    theme.map("TButton", background=[("disabled", PANEL), ("active", TINT)], foreground=[("disabled", FAINT)])
    theme.configure("Send.TButton", background=ACCENT, foreground=PAPER)
    theme.map("Send.TButton", background=[("disabled", FAINT), ("active", PRESSED)], foreground=[("disabled", PAPER)])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A desktop chat under protection.")
    parser.add_argument("-m", "--model", required=True, metavar="TEACHER.gguf")
    parser.add_argument("--bundle", required=True, metavar="DIR", help="from adlocal convert")
    parser.add_argument("-c", "--ctx-size", type=int, default=2048, metavar="N", help="tokens of context")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--strength", type=float, default=1.0, help="where the slider stands at first, in nats")
    parser.add_argument("-ngl", "--gpu-layers", type=int, default=0, metavar="N", help="layers to offload, -1 for all")
    args = parser.parse_args(argv)
    if not 0 <= args.strength <= MAX_STRENGTH:
        parser.error(f"--strength {args.strength}: give 0 to {MAX_STRENGTH:g} nats")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Shows the window until it is closed; returns the exit status."""
    args = _parse(argv)
    options = {"n_ctx": args.ctx_size, "n_threads": args.threads, "n_threads_batch": args.threads}
    load = partial(WatchedLlama, args.model, bundle=args.bundle, n_gpu_layers=args.gpu_layers, verbose=False, **options)
    try:
        root = tk.Tk(className="adlocal")
    except tk.TclError as error:
        print(f"desktop_chat: no window can be opened ({error}); run it on a desktop", file=sys.stderr)
        return 1
    window = ChatWindow(root, load, args.strength)
    signal.signal(signal.SIGINT, lambda *_: window.close())
    try:
        root.mainloop()
    finally:
        window.generation.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
