"""The gateway's page in a real browser: what it sends, what it shows, and what it never does."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_server import Answer, PageServer, page_server

from support.gateway import gateway

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, ViewportSize

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WAIT_MS = 20_000
NARROW: ViewportSize = {"width": 360, "height": 740}
WIDE: ViewportSize = {"width": 1400, "height": 900}
CHAT, WATCH = "/v1/chat/completions", "/operator/watch"
ROW: dict[str, Any] = {
    "subject": "key:7f3a2b",
    "owner": "acme",
    "requests": 4120,
    "tokens": 2912345,
    "score": 0.81,
    "signals": ["volume", "template"],
    "position": 0.65,
    "evaluation": False,
    "parties": 0,
}
TELL_OF_VIOLATIONS = """addEventListener("securitypolicyviolation", event =>
    console.error(`Content Security Policy: ${event.effectiveDirective} ${event.blockedURI}`))"""
#: What is wider than its place, unseen labels aside.
CUT_OFF = """[...document.querySelectorAll("*")].filter(each =>
    each.scrollWidth > each.clientWidth && each.clientWidth > 1 && getComputedStyle(each).overflowX !== "visible"
).map(each => each.id || each.className)"""
#: Each would show itself, were it taken for markup.
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "<iframe srcdoc='<script>parent.document.title=1</script>'></iframe>",
    "</div></article><b id=owned>&lt;bold&amp;</b>",
    "<style>body{display:none}</style>",
)

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}: apt-get install chromium"),
]
Visit = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    with page_server() as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: PageServer) -> Iterator[Visit]:
    """Opens the page. At the end, whatever a test did: no request went elsewhere, no rule broke, no script failed."""
    contexts = []
    requested: list[str] = []
    wrong: list[str] = []

    def visit(viewport: ViewportSize = WIDE, scheme: Any = "light") -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        context.on("request", lambda request: requested.append(request.url))
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if _is_wrong(message.text) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.add_init_script(TELL_OF_VIOLATIONS)  # the console is not told of all
        page.goto(server.address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong
    assert [url for url in requested if not url.startswith((f"{server.address}/", "data:"))] == []


def _is_wrong(message: str) -> bool:
    """All but the browser's own words for a status that says no."""
    return not message.startswith("Failed to load resource: the server responded with a status of")


def ask(page: Page, question: str) -> None:
    page.get_by_label("Your message").fill(question)
    page.get_by_role("button", name="Send").click()


def answers(page: Page) -> Locator:
    return page.get_by_role("article", name="Answer")


def see(place: Locator, text: str | re.Pattern[str]) -> None:
    """Waits for the whole text of a place."""
    from playwright.sync_api import expect

    expect(place).to_have_text(text, timeout=WAIT_MS)


def shown(place: Locator, visible: bool = True) -> None:
    """Waits until it is on the page, or is not."""
    from playwright.sync_api import expect

    expect(place).to_be_visible(visible=visible, timeout=WAIT_MS)


def steered(kl: float, dose: float, rows: int = 1) -> dict[str, float]:
    return {"rows": rows, "choices": int(kl > 0), "kl": kl, "dose": dose}


# ---- Chat


def test_an_answer_appears_bit_by_bit(visit: Visit, server: PageServer) -> None:
    """Each piece is on the page before the next one is sent, wherever the bytes are cut."""
    page = visit()
    see(page.locator("#model"), "teacher-8b")
    answer = server.answer()
    ask(page, "What is 6 × 7?")
    text = answers(page).locator("> .text")
    for said, so_far in (("It ", "It "), ("is ", "It is "), ("42.", "It is 42.")):
        answer.say(said)
        see(text, so_far)
    sent = 'data: {"choices":[{"index":0,"delta":{"content":" Ünd\\n"},"finish_reason":null}]}\r\n\r\n'.encode()
    cut = sent.index("Ü".encode()) + 1  # within a character
    answer.raw(b": ping\n\n" + sent[:cut])
    see(text, "It is 42.")
    answer.raw(sent[cut:])
    see(text, "It is 42. Ünd\n")
    assert answers(page).get_attribute("aria-busy") == "true"
    answer.finish(6)
    see(page.get_by_role("status"), "Done.")
    see(answers(page).locator(".ended"), "6 tokens.")
    assert answers(page).get_attribute("aria-busy") == "false"


def test_turns_and_settings_are_sent(visit: Visit, server: PageServer) -> None:
    page = visit()
    see(page.locator("#model"), "teacher-8b")
    for question, said in (("one?", "1"), ("two?", "2")):
        answer = server.answer()
        answer.say(said, reasoning="hm")
        answer.finish(1)
        ask(page, question)
        see(page.get_by_role("status"), "Done.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Token limit").fill("20")
    answer = server.answer()
    answer.say("3")
    answer.finish(1, "length")
    page.get_by_label("Your message").fill("three?")
    page.get_by_label("Your message").press("Enter")
    see(answers(page).last.locator(".ended"), "Cut off at the limit of tokens. 1 token.")
    first, _, third = (seen.body for seen in server.asked())
    always = {"model": "teacher-8b", "stream": True, "stream_options": {"include_usage": True}}
    assert first == {**always, "messages": [{"role": "user", "content": "one?"}]}
    turns = [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2"), ("user", "three?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert third == {**always, "messages": messages, "temperature": 0.5, "max_tokens": 20}
    page.get_by_role("button", name="Clear").click()
    assert answers(page).count() == 0
    answer = server.answer()
    answer.finish(0)
    ask(page, "anew?")
    see(page.get_by_role("status"), "Done.")
    assert server.asked()[-1].body["messages"] == [{"role": "user", "content": "anew?"}]


def test_settings_that_cannot_be_are_not_sent(visit: Visit, server: PageServer) -> None:
    page = visit()
    page.get_by_label("Temperature").fill("7")
    ask(page, "hot?")
    assert page.locator("#temperature:invalid").count() == 1
    assert page.get_by_label("Your message").input_value() == "hot?"
    assert not server.asked()


def test_reasoning_is_folded_and_its_summary_is_a_line(visit: Visit, server: PageServer) -> None:
    page = visit()
    answer = server.answer()
    answer.say(reasoning="First ")
    answer.say(reasoning="this.")
    answer.say("So.", summary="Reasoned for 214 tokens in 3.1 seconds.")
    answer.finish(4)
    ask(page, "Why?")
    see(answers(page).locator("> .text"), "So.")
    see(answers(page).locator(".summary"), "Reasoned for 214 tokens in 3.1 seconds.")
    reasoning = answers(page).locator("details .text")
    shown(reasoning, False)
    answers(page).get_by_text("Reasoning", exact=True).click()
    shown(reasoning)
    see(reasoning, "First this.")


@pytest.mark.parametrize("said", ["Some", ""])
def test_stop_aborts_the_request(visit: Visit, server: PageServer, said: str) -> None:
    """Of an answer what there is stays. Where there is nothing, the message comes back."""
    page = visit()
    answer = server.answer()
    ask(page, "Long?")
    if said:
        answer.say(said)
        see(answers(page).locator("> .text"), said)
    page.get_by_role("button", name="Stop").click()
    assert answer.hung_up.wait(20)
    see(page.get_by_role("status"), "Stopped.")
    if said:
        see(answers(page).locator("> .text"), said)
    else:
        assert answers(page).count() == 0
    assert page.get_by_label("Your message").input_value() == ("" if said else "Long?")
    assert page.evaluate("document.activeElement.id") == "question"


def test_clear_aborts_the_request(visit: Visit, server: PageServer) -> None:
    page = visit()
    answer = server.answer()
    ask(page, "Long?")
    answer.say("Some")
    see(answers(page).locator("> .text"), "Some")
    page.get_by_role("button", name="Clear").click()
    assert answer.hung_up.wait(20)
    shown(page.get_by_text("Ask the model something."))
    assert page.get_by_role("article").count() == 0
    assert page.get_by_label("Your message").input_value() == ""


# ---- Errors


def test_a_refusal_is_told_and_the_message_kept(visit: Visit, server: PageServer) -> None:
    page = visit()
    server.refuse(429, "this key may ask 20 times a minute", {"retry-after": "12"})
    ask(page, "May I?")
    notice = page.locator("#notice[role=alert]")
    told = "There are too many requests just now: this key may ask 20 times a minute. Try again in 12 seconds."
    see(notice, told)
    assert page.get_by_label("Your message").input_value() == "May I?"
    assert page.get_by_role("article").count() == 0
    answer = server.answer()
    answer.say("Yes.")
    answer.finish(1)
    page.get_by_role("button", name="Send").click()
    see(answers(page).locator("> .text"), "Yes.")
    see(notice, "")


def _engine_dies(answer: Answer) -> None:
    answer.event({"error": {"message": "the engine stopped.", "type": "server_error"}})
    answer.hang_up()


@pytest.mark.parametrize(
    ("end", "why"), [(_engine_dies, "the engine stopped."), (Answer.hang_up, "the connection ended early.")]
)
def test_an_answer_that_breaks_off(visit: Visit, server: PageServer, end: Callable[[Answer], None], why: str) -> None:
    """Its beginning stays, and it can be asked for again. A stream that just ends is not taken for a whole answer."""
    page = visit()
    answer = server.answer()
    answer.say("It is")
    end(answer)
    ask(page, "What?")
    see(answers(page).get_by_role("alert").locator("span"), f"The answer broke off: {why}")
    see(answers(page).locator("> .text"), "It is")
    again = server.answer()
    again.say("It is 42.")
    again.finish(3)
    page.get_by_role("button", name="Ask again").click()
    see(answers(page).locator("> .text"), "It is 42.")
    assert server.asked()[0].body["messages"] == server.asked()[1].body["messages"]


def test_an_answer_that_breaks_off_at_once(visit: Visit, server: PageServer) -> None:
    page = visit()
    _engine_dies(server.answer())
    ask(page, "What?")
    see(page.locator("#notice"), "There is no answer: the engine stopped.")
    assert page.get_by_label("Your message").input_value() == "What?"


# ---- Keys


def test_a_key_is_asked_for_and_sent(visit: Visit, server: PageServer) -> None:
    server.key = "adl-secret"
    page = visit()
    see(page.locator("#notice"), "This server asks for a key. Enter yours above.")
    assert page.evaluate("document.activeElement.id") == "key"
    assert all("authorization" not in seen.headers for seen in server.seen)
    page.get_by_label("Key").fill("adl-secret")
    page.get_by_label("Key").press("Enter")
    see(page.locator("#model"), "teacher-8b")
    see(page.locator("#notice"), "")
    answer = server.answer()
    answer.say("Yes.")
    answer.finish(1)
    ask(page, "May I?")
    see(answers(page).locator("> .text"), "Yes.")
    assert server.asked()[0].headers["authorization"] == "Bearer adl-secret"
    kept = page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert kept == [["adl-secret"], 0, ""]
    page.reload()
    see(page.locator("#model"), "teacher-8b")
    assert page.get_by_label("Key").input_value() == "adl-secret"


def test_a_wrong_key(visit: Visit, server: PageServer) -> None:
    server.key = "adl-secret"
    page = visit()
    see(page.locator("#notice"), re.compile("asks for a key"))
    for key, told in (("adl-wrong", "missing or not known: this key is not known"), ("schlüssel→", "no key has")):
        page.get_by_label("Key").fill(key)
        page.get_by_role("button", name="Use key").click()
        see(page.locator("#notice"), re.compile(told))
    assert all(seen.headers.get("authorization") in (None, "Bearer adl-wrong") for seen in server.seen)


# ---- The operator's view


def test_without_the_operators_key_there_is_no_such_view(visit: Visit, server: PageServer) -> None:
    page = visit()
    see(page.locator("#model"), "teacher-8b")
    answer = server.answer()
    answer.say("Yes.", steered=steered(0.5, 1.0))
    answer.finish(1)
    ask(page, "May I?")
    see(page.get_by_role("status"), "Done.")
    assert "x-adlocal-steering" not in server.asked()[0].headers
    for hidden in ("#watch", "#legend", "#meaning", ".chunk"):
        shown(page.locator(hidden), False)


def test_text_is_shaded_and_totals_run(visit: Visit, server: PageServer) -> None:
    """By KL a row. A dose comes a chunk late and belongs to the piece before; the last one comes without text."""
    server.watch = []
    page = visit()
    shown(page.locator("#legend"))
    shown(page.get_by_text("The shade of a piece of text tells"))
    answer = server.answer()
    ask(page, "Shade?")
    figures = answers(page).locator(".figures")
    see(figures, "Tokens 0With a choice 0KL/token 0.000Dose +0.00")
    answer.say("No ", steered=steered(0.0, 0.0))
    answer.say("a ", steered=steered(0.01, 0.0))
    see(figures, "Tokens 2With a choice 1KL/token 0.005Dose +0.00")
    answer.say("b ", steered=steered(0.3, -0.25))
    answer.say("c ", steered=steered(4.0, 1.75, rows=5))
    answer.say("d", steered=steered(2.0, 0.5))
    see(figures, "Tokens 9With a choice 4KL/token 0.701Dose +2.00")
    answer.say(reason="stop", steered={"rows": 0, "choices": 0, "kl": 0.0, "dose": -3.0})
    answer.finish(9)
    see(figures, "Tokens 9With a choice 4KL/token 0.701Dose −1.00")
    assert server.asked()[0].headers["x-adlocal-steering"] == "1"
    pieces = answers(page).locator(".chunk")
    assert pieces.all_text_contents() == ["No ", "a ", "b ", "c ", "d"]
    classes = pieces.evaluate_all("all => all.map(each => each.className)")
    assert classes == ["chunk", "chunk k1", "chunk k3", "chunk k4", "chunk k5"]
    tip = page.locator("#tip")
    pieces.nth(1).hover()
    see(tip, "1 row · with a choice · KL 0.010 · dose −0.25")
    pieces.nth(3).hover()
    see(tip, "5 rows · 1 with a choice · KL 4.000 · dose +0.50")
    page.get_by_label("Your message").hover()
    shown(tip, False)


def test_pieces_are_reached_by_keys(visit: Visit, server: PageServer) -> None:
    """The tab key stops at a text once; arrows go from piece to piece, and Escape hides the figures."""
    server.watch = []
    page = visit()
    answer = server.answer()
    for word, kl in (("one ", 0.1), ("two ", 0.2), ("three", 0.0)):
        answer.say(word, steered=steered(kl, 0.0))
    answer.finish(3)
    shown(page.locator("#legend"))
    ask(page, "Count")
    see(page.get_by_role("status"), "Done.")
    page.get_by_role("log").focus()
    tip = page.locator("#tip")
    page.keyboard.press("Tab")
    see(tip, "1 row · with a choice · KL 0.100 · dose +0.00")
    page.keyboard.press("ArrowRight")
    see(tip, "1 row · with a choice · KL 0.200 · dose +0.00")
    page.keyboard.press("End")
    see(tip, "1 row · without a choice · KL 0.000 · dose not known yet")
    page.keyboard.press("Escape")
    shown(tip, False)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "question"


def test_the_watch_is_shown_and_refreshed(visit: Visit, server: PageServer) -> None:
    shared = {"subject": "template:9be0", "owner": "", "tokens": 0, "signals": [], "position": 0, "parties": 52}
    server.watch = [ROW, {**ROW, **shared}]
    page = visit()
    rows = page.locator("#rows tr")
    see(rows.nth(0), "key:7f3a2bacme4,1202,912,3450.81volume, template65\u00a0%")
    see(rows.nth(1), "template:9be0shared by 52 parties–4,120–0.81noneno")
    server.watch = [{**ROW, "requests": 5000, "evaluation": True}]
    see(rows.nth(0), re.compile("key:7f3a2bdeclared as an evaluationacme5,000"))
    server.watch = None  # the key has been revoked
    shown(page.locator("#watch"), False)
    assert 3 <= len(server.asked(WATCH)) <= 4


# ---- What it never does


def test_hostile_text_stays_text(visit: Visit, server: PageServer) -> None:
    """Of the model, shaded or not, of an error, of a name, and of the watch's table."""
    everything = "".join(HOSTILE)
    server.watch = [{**ROW, "subject": everything, "owner": everything, "signals": [everything]}]
    page = visit()
    shown(page.locator("#watch"))
    answer = server.answer()
    for each in HOSTILE:
        answer.say(each, reasoning=each)
        answer.say(each, reasoning=each, summary=each, steered=steered(0.2, 0.1))
    answer.event({"error": {"message": everything}})
    answer.hang_up()
    ask(page, everything)
    see(answers(page).get_by_role("alert").locator("span"), f"The answer broke off: {everything}")
    see(answers(page).locator("> .text"), "".join(each * 2 for each in HOSTILE))
    server.refuse(400, everything)
    ask(page, "again")
    see(page.locator("#notice"), f"The server did not accept this: {everything}.")
    assert page.title() == "adlocal"
    assert page.locator("#owned, img, iframe, #turns style, #turns script, #rows style, #rows script").count() == 0


def test_the_policy_of_the_page_is_in_force(browser: Browser, server: PageServer) -> None:
    """A page that tried could load nothing, and what it tried would be seen by these tests."""
    context = browser.new_context()
    page = context.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text) if _is_wrong(message.text) else None)
    page.goto(server.address)
    broken = page.evaluate(
        """() => new Promise(resolve => {
            const told = [];
            document.addEventListener("securitypolicyviolation", event => {
                told.push(event.effectiveDirective);
                if (told.length === 2) resolve(told.sort());
            });
            const image = document.createElement("img");
            image.src = "/image.png";
            document.body.append(image);
            fetch("http://localhost:1/").catch(() => {});
        })"""
    )
    context.close()
    assert broken == ["connect-src", "img-src"]
    assert len([text for text in told if "Content Security Policy" in text]) >= 2
    assert all(seen.path != "/image.png" for seen in server.seen)


# ---- Looks


@pytest.mark.parametrize("is_operator", [True, False])
def test_a_telephones_width_is_enough(visit: Visit, server: PageServer, is_operator: bool) -> None:
    """Nothing is scrolled sideways, long words and names included, and no control is cut off."""
    from playwright.sync_api import expect

    server.watch = [{**ROW, "subject": "user:" + "x" * 200, "owner": "y" * 90}] if is_operator else None
    page = visit(NARROW)
    see(page.locator("#model"), "teacher-8b")
    answer = server.answer()
    for _ in range(40):
        answer.say("incomprehensibilities" * 4, reasoning="z" * 80, steered=steered(0.2, 0.1))
    answer.event({"error": {"message": "w" * 300}})
    answer.hang_up()
    ask(page, "v" * 300)
    expect(answers(page).get_by_role("alert")).to_be_in_viewport(timeout=WAIT_MS)
    answers(page).get_by_text("Reasoning", exact=True).click()
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
    for control in page.locator("button, input, textarea").all():
        box = control.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= NARROW["width"]


def test_what_comes_does_not_move_what_is_there(visit: Visit, server: PageServer) -> None:
    """The composer stays in its place while an answer comes, longer than the window, and its end stays in sight."""
    page = visit()
    see(page.locator("#model"), "teacher-8b")
    place = "JSON.stringify(document.getElementById('question').getBoundingClientRect())"
    before = page.evaluate(place)
    answer = server.answer()
    ask(page, "Long?")
    for n in range(100):
        answer.say(f"Line {n}\n")
    see(answers(page).locator("> .text"), re.compile("Line 99"))
    log = page.get_by_role("log")
    assert log.evaluate("log => log.scrollHeight - log.scrollTop - log.clientHeight") < 2
    log.evaluate("log => log.scrollTo(0, 0)")  # who reads further up is left there
    answer.say("Line 100\n")
    see(answers(page).locator("> .text"), re.compile("Line 100"))
    assert log.evaluate("log => log.scrollTop") == 0
    answer.finish(400)
    see(page.get_by_role("status"), "Done.")
    assert page.evaluate(place) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shades_can_be_read_and_told_apart(visit: Visit, server: PageServer, scheme: str) -> None:
    """Text on each is of contrast 4.5 or more, and each is further from the panel than the one before by lightness
    alone, which every eye sees."""
    server.watch = []
    page = visit(scheme=scheme)
    shown(page.locator("#legend"))
    styles = page.locator("#legend li").evaluate_all(
        "all => all.map(each => [getComputedStyle(each).color, getComputedStyle(each).backgroundColor])"
    )
    grounds = [_luminance(page.locator(".sheet").evaluate("each => getComputedStyle(each).backgroundColor"))]
    for color, ground in styles[1:]:
        grounds.append(_luminance(ground))
        assert _contrast(_luminance(color), grounds[-1]) >= 4.5
    assert len(grounds) == 6
    assert grounds == sorted(grounds, reverse=scheme == "light")
    assert all(_contrast(one, other) >= 1.07 for one, other in pairwise(grounds))


def _luminance(color: str) -> float:
    """Relative luminance of rgb(r, g, b), as WCAG has it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


# ---- A real gateway


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")
def test_a_real_gateway_is_asked_and_shades(
    browser: Browser, long_llama: Path, long_bundle: Path, tmp_path: Path
) -> None:
    """The operator's view: the answer's tokens, with what the plugin counted of them."""
    from playwright.sync_api import expect

    with gateway(long_llama, long_bundle, tmp_path, "-np", 1, "-c", 1024) as served:
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(served.url)
        page.get_by_label("Token limit").fill("12")
        ask(page, "Hi")
        expect(page.locator("body")).to_contain_text(re.compile(r"With a choice\s*\d"), timeout=WAIT_MS)
        (record,) = served.wait_for_record(1)
        rows, choices = record["answers"][0]["rows"], record["answers"][0]["choices"]
        expect(page.locator("body")).to_contain_text(re.compile(rf"Tokens\s*{rows}(?!\d)"), timeout=WAIT_MS)
        expect(page.locator("body")).to_contain_text(re.compile(rf"With a choice\s*{choices}(?!\d)"), timeout=WAIT_MS)
        expect(page.locator("body")).to_contain_text("all", timeout=WAIT_MS)  # the watch's table
        page.close()
