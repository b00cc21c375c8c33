"""What the control file says of requests under way, when one begins, and the ban of reasoning tokens.

A driver makes the calls of llama.h that servers make, so that each row can be looked at.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from adlocal import InputError, Settings
from adlocal.plugin import Control, Decodes, Think, control_directory
from support import tiny
from support.driver import Driver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libraries are preloaded on Linux alone")

GUARD = 0.05
OPEN, CLOSE, OTHER = ord("<"), ord(">"), ord("x")
ONCE, NEVER = Think(OPEN, CLOSE), Think(OPEN, CLOSE, from_start=True)
#: It has both tokens in it.
PROMPT = [tiny.BOS, *b"a <thought> and"]
END = len(PROMPT)
ASKED = Settings(3.0, GUARD)


def controlled(driver: Driver, directory: Path) -> Control:
    return Control.open(directory / f"{driver.process.pid}.control")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return control_directory(tmp_path / "control")


@pytest.fixture
def driver(tiny_llama: Path, tiny_bundle: Path, directory: Path) -> Iterator[Driver]:
    """At a floor of 0, so that a request gets what it asks for."""
    with Driver(tiny_llama, tiny_bundle, directory, "--strength", 0, "--guard", GUARD) as running:
        yield running


@pytest.fixture
def control(driver: Driver, directory: Path) -> Control:
    return controlled(driver, directory)


def banned(row: list[float]) -> bool:
    """Both tokens or neither, and nothing else."""
    never = {token for token, logit in enumerate(row) if logit == -math.inf}
    assert never in (set(), {OPEN, CLOSE})
    return bool(never)


def all_banned(rows: list[list[float]]) -> list[bool]:
    return [banned(row) for row in rows]


# Progress


def test_calls_are_counted_when_they_begin_and_when_they_end(driver: Driver, control: Control) -> None:
    """Those that fail or are refused, too; and one that is under way shows."""
    assert control.decodes() == Decodes(0, 0)
    driver.do("watch")
    driver.prompt(PROMPT)
    assert {tuple(each) for each in driver.do("seen")} == {(1, 0)}
    assert control.decodes() == Decodes(1, 1)
    assert driver.do("decode", [(OTHER, END, [9], True)])[0] < 0
    assert driver.do("encode", [(OTHER, END, [0], True)]) == -3
    assert control.decodes() == Decodes(3, 3)


def test_tokens_are_counted_by_the_batch(driver: Driver, control: Control) -> None:
    """A prompt in two batches, a draft that is rolled back, one token of two sequences, and a batch that fails."""
    driver.decode(*((token, i, [0], False) for i, token in enumerate(PROMPT)))
    assert control.counters(0).n_decoded == len(PROMPT)
    driver.prompt(PROMPT, END)
    driver.sampled([OTHER, OTHER], 2 * END)
    driver.do("rm", 0, 2 * END + 1, -1)
    assert control.counters(0).n_decoded == 2 * END + 2
    driver.decode((OTHER, 0, [1, 2], True))
    assert driver.do("decode", [(OTHER, END, [9], True)])[0] < 0
    assert [control.counters(seq_id).n_decoded for seq_id in range(4)] == [2 * END + 2, 1, 1, 0]


# The ban


@pytest.mark.parametrize("strength", [0.0, 3.0])
@pytest.mark.parametrize("mode", ["off", "observe", "protect"])
def test_both_tokens_are_banned_from_the_start_and_no_other(
    mode: str, strength: float, driver: Driver, control: Control
) -> None:
    settings = Settings(strength, GUARD)
    control.ask(0, settings, mode)
    control.ask(1, settings, mode, NEVER)
    free = [driver.prompt(PROMPT, seq_id=0), *driver.sampled([OTHER, CLOSE], END, seq_id=0)]
    never = [driver.prompt(PROMPT, seq_id=1), *driver.sampled([OTHER, CLOSE], END, seq_id=1)]
    assert all_banned(free) == [False] * 3
    assert all_banned(never) == [True] * 3
    assert (control.in_force(0).think, control.in_force(1).think) == (None, NEVER)
    for theirs, ours in zip(free, never, strict=True):
        ours[OPEN], ours[CLOSE] = theirs[OPEN], theirs[CLOSE]
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("options", [("--strength", 3), ("--strength", 3, "--observe")], ids=["protect", "observe"])
def test_a_ban_is_in_force_at_any_floor(
    options: tuple[object, ...], tiny_llama: Path, tiny_bundle: Path, directory: Path
) -> None:
    with Driver(tiny_llama, tiny_bundle, directory, *options, "--guard", GUARD) as driver:
        control = controlled(driver, directory)
        epoch = control.ask(0, Settings(1.0, 1.0), "off", NEVER)
        assert banned(driver.prompt(PROMPT))
        found = control.in_force(0)
        assert (found.strength, found.guard, found.epoch, found.think) == (3.0, GUARD, epoch, NEVER)
        assert found.mode == control.floor.mode


def test_reasoning_is_banned_once_it_was_closed(driver: Driver, control: Control) -> None:
    """Not by the prompt, nor by its last token; by the first close that was sampled, and until the request ends."""
    control.ask(0, ASKED, think=ONCE)
    assert not banned(driver.prompt([*PROMPT, OPEN, CLOSE]))
    pos = END + 2
    assert all_banned(driver.sampled([OPEN], pos)) == [False]
    assert all_banned(driver.sampled([CLOSE], pos + 1)) == [True]
    assert all_banned(driver.sampled([OTHER], pos + 2)) == [True]
    assert not banned(driver.prompt([OTHER, OTHER], pos + 3))  # the next request asks the same
    assert all_banned(driver.sampled([OTHER], pos + 5)) == [False]
    assert all_banned(driver.sampled([CLOSE], pos + 6)) == [True]
    control.ask(0, ASKED)
    assert all_banned(driver.sampled([OTHER], pos + 7)) == [True]
    assert not banned(driver.prompt([OTHER, OTHER], pos + 8))
    assert all_banned(driver.sampled([CLOSE], pos + 10)) == [False]


def test_rows_of_drafts_after_a_close_are_banned_and_a_rollback_lifts_it(driver: Driver, control: Control) -> None:
    control.ask(0, ASKED, think=ONCE)
    driver.prompt(PROMPT)
    assert all_banned(driver.sampled([OTHER, OTHER, CLOSE, OTHER], END)) == [False, False, True, True]
    driver.do("rm", 0, END + 2, -1)
    assert all_banned(driver.sampled([OTHER, CLOSE], END + 2)) == [False, True]
    driver.do("rm", 0, END + 4, -1)  # all of the draft was right
    assert all_banned(driver.sampled([OTHER, OTHER], END + 4)) == [True, True]
    driver.do("rm", 0, END + 5, -1)
    assert all_banned(driver.sampled([OTHER], END + 5)) == [True]
    assert control.counters(0).n_begun == 1


def test_a_batch_that_fails_bans_nothing(driver: Driver, control: Control) -> None:
    control.ask(0, ASKED, think=ONCE)
    driver.prompt(PROMPT)
    assert driver.do("decode", [(CLOSE, END, [0], True), (OTHER, 0, [9], True)])[0] < 0
    assert all_banned(driver.sampled([OTHER], END)) == [False]


def test_a_copy_takes_the_ban_along(driver: Driver, control: Control) -> None:
    control.ask(0, ASKED, think=ONCE)
    control.ask(1, ASKED)
    driver.prompt(PROMPT)
    driver.sampled([CLOSE], END)
    driver.do("rm", 1, -1, -1)
    driver.do("cp", 0, 1)
    assert all_banned(driver.sampled([OTHER], END + 1, seq_id=1)) == [True]
    assert control.in_force(1).think == ONCE
    driver.do("cp", 0, 2)
    assert not banned(driver.prompt([OTHER, OTHER], END + 1, seq_id=2))  # nothing was asked for it


def test_a_row_of_two_sequences_is_banned_what_one_of_them_is(driver: Driver, control: Control) -> None:
    control.ask(1, ASKED, think=NEVER)
    (shared,) = driver.decode((OTHER, 0, [0, 1], True))
    assert banned(shared)
    own, others = driver.decode((OTHER, 1, [0], True), (OTHER, 1, [1], True))
    assert [banned(own), banned(others)] == [False, True]


def test_a_row_with_nothing_left_is_closed(
    tiny_llama: Path, tiny_bundle: Path, tmp_path: Path, directory: Path
) -> None:
    """A teacher that has only the two tokens to say."""
    teacher = shutil.copy(tiny_llama, tmp_path / "teacher.gguf")
    with Driver(write_narrow(Path(teacher), 1.0), tiny_bundle, directory, "--strength", 0) as driver:
        sign = 1.0 if -math.inf in driver.prompt(PROMPT) else -1.0
    with Driver(write_narrow(Path(teacher), sign), tiny_bundle, directory, "--strength", 0) as driver:
        control = controlled(driver, directory)
        row = driver.prompt(PROMPT)
        assert {token for token, logit in enumerate(row) if logit != -math.inf} == {OPEN, CLOSE}
        control.ask(0, Settings(0.0, GUARD), think=NEVER)
        driver.do("rm", 0, -1, -1)
        before = control.counters(0)
        row = driver.prompt(PROMPT)
        assert max(row) == row[tiny.EOS] == 0.0
        assert sorted(set(row))[0] == -1e9
        assert (control.counters(0) - before).n_closed == 1


def write_narrow(path: Path, sign: float) -> Path:
    """All logits but the two are one huge number, of the sign that is asked for or the other."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors}
    tensors["output_norm.weight"][:] = 0.0
    tensors["output_norm.weight"][0] = 1e30
    tensors["output.weight"][:] = 0.0
    tensors["output.weight"][:, 0] = -sign * 1e30
    tensors["output.weight"][[OPEN, CLOSE]] = np.zeros(tensors["output.weight"].shape[1], np.float32)
    return path


@pytest.mark.parametrize(
    ("open_token", "close_token", "state"),
    [(OPEN, -1, 1), (-2, CLOSE, 1), (OPEN, tiny.N_VOCAB, 2), (OPEN, CLOSE, 3), (OPEN, CLOSE, -1)],
)
def test_a_ban_that_makes_no_sense_closes_the_rows(
    open_token: int, close_token: int, state: int, driver: Driver, control: Control
) -> None:
    control.ask(0, ASKED, think=ONCE)
    asked = control._file.sequences[0].asked
    asked.think_open, asked.think_close, asked.think_state = open_token, close_token, state
    row = driver.prompt(PROMPT)
    assert max(row) == row[tiny.EOS] == 0.0
    assert control.counters(0).n_closed == 1


def test_tokens_that_may_be_missing(driver: Driver, control: Control) -> None:
    control.ask(0, ASKED, think=Think(None, CLOSE, from_start=True))
    row = driver.prompt(PROMPT)
    assert [token for token, logit in enumerate(row) if logit == -math.inf] == [CLOSE]
    assert control.in_force(0).think == Think(None, CLOSE, from_start=True)
    with pytest.raises(InputError, match="close=None: give the token that ends reasoning, or from_start=True"):
        control.ask(0, ASKED, think=Think(OPEN, None))
    with pytest.raises(InputError, match="-2: give a token's id, or None for none"):
        control.ask(0, ASKED, think=Think(-2, CLOSE))


# When a request begins


def test_a_request_of_one_token_begins_where_a_sampler_is_set(driver: Driver, control: Control) -> None:
    """As llama-server does between requests: nothing is cut, or the last token alone."""
    driver.prompt(PROMPT)
    driver.sampled([OTHER], END)
    epoch = control.ask(0, ASKED)
    driver.sampled([OTHER], END + 1)
    assert control.in_force(0).epoch == 0
    assert driver.do("sampler", 0) is False
    driver.do("rm", 0, END + 2, -1)
    driver.sampled([OTHER], END + 2)
    assert control.in_force(0).epoch == epoch
    assert (control.counters(0).n_begun, control.counters(1).n_begun) == (2, 0)
    driver.do("sampler", 1)  # another's
    driver.sampled([OTHER], END + 3)
    assert control.counters(0).n_begun == 2


def test_what_is_cut_off_drafts_begins_no_request(driver: Driver, control: Control) -> None:
    """All were right, some were, none was; and cuts that cut nothing, as llama-cpp-python's before each token."""
    driver.prompt(PROMPT)
    control.ask(0, ASKED)
    pos = END
    for n_right in (3, 1, 0, 3):
        driver.sampled([OTHER] * 4, pos)
        pos += 1 + n_right
        driver.do("rm", 0, pos, -1)
    for _ in range(2):
        driver.do("rm", -1, pos, -1)
        driver.sampled([OTHER], pos)
        pos += 1
    assert control.counters(0).n_begun == 1
    assert control.in_force(0).epoch == 0


def test_a_state_that_takes_back_a_draft_begins_no_request(driver: Driver, control: Control) -> None:
    """As llama-server goes back in memory that cannot forget a part; what it decodes again may be the close."""
    control.ask(0, ASKED, think=ONCE)
    driver.prompt(PROMPT)
    driver.sampled([CLOSE], END)
    control.ask(0, ASKED)
    driver.do("save", "before", 0)
    driver.sampled([OTHER, OTHER, OTHER], END + 1)
    assert driver.do("load", "before", 0) > 0
    driver.do("rm", 0, END + 1, -1)
    assert all_banned(driver.sampled([OTHER, OTHER], END + 1)) == [True, True]
    assert control.counters(0).n_begun == 1


def test_a_close_in_a_draft_that_a_state_takes_back_bans_nothing(driver: Driver, control: Control) -> None:
    control.ask(0, ASKED, think=ONCE)
    driver.prompt(PROMPT)
    driver.do("save", "before", 0)
    assert all_banned(driver.sampled([OTHER, CLOSE], END)) == [False, True]
    driver.do("load", "before", 0)
    assert all_banned(driver.sampled([OTHER, OTHER], END)) == [False, False]
    assert control.counters(0).n_begun == 1


def test_any_other_state_begins_a_request(driver: Driver, control: Control) -> None:
    """Of before an earlier batch, of other tokens, in another sequence, and where no draft was."""
    driver.prompt(PROMPT)
    driver.do("save", "prompt", 0)
    driver.sampled([OTHER], END)
    driver.do("load", "prompt", 0)  # the last token alone
    driver.sampled([OTHER], END)
    assert control.counters(0).n_begun == 2
    driver.sampled([OTHER, OTHER], END + 1)
    driver.do("load", "prompt", 0)
    driver.sampled([OTHER, OTHER], END)
    assert control.counters(0).n_begun == 3
    driver.prompt([OTHER] * END, seq_id=1)
    driver.sampled([OTHER, OTHER], END, seq_id=1)
    driver.do("load", "prompt", 1)
    driver.sampled([OTHER], END, seq_id=1)
    assert control.counters(1).n_begun == 2
