"""Keys: who gets in, what is kept of a key, and `adlocal keys`."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import string
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adlocal.commands.keys import expiry
from adlocal.commands.serve_verbs import add_keys
from adlocal.commands.verb import Parser
from adlocal.errors import AdlocalError, InputError
from adlocal.serve.events import Failed
from adlocal.serve.keys import FRESH, KeyRecord, Keys, open_keys, read_pepper
from adlocal.serve.limits import Limiter, Limits, Subject
from adlocal.serve.state import Store
from support.stores import KINDS, Place, place

UNKNOWN = "this key is not known; send a key as Authorization: Bearer KEY or as X-Api-Key: KEY"
NOW = 1_800_000_000


@pytest.fixture(params=KINDS)
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with place(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def here(tmp_path: Path) -> Place:
    """A directory: what a test shows does not depend on the store."""
    return Place(str(tmp_path / "state"))


def with_keys(
    there: Place, pepper: Path, use: Callable[[Keys], Coroutine[Any, Any, None]], clock: Callable[[], float] = time.time
) -> None:
    async def given(store: Store) -> None:
        await use(await open_keys(store, pepper, clock))

    there.run(given)


async def denied(keys: Keys, authorization: str | None, x_api_key: str | None) -> str:
    with pytest.raises(Failed) as told:
        await keys.authenticate(authorization, x_api_key)
    assert (told.value.status, told.value.type) == (401, "authentication_error")
    return told.value.message


# Who gets in.


def test_a_key_opens_by_either_header(there: Place, tmp_path: Path) -> None:
    async def use(keys: Keys) -> None:
        key, record = await keys.add(
            "alice", tier="gold", trusted=True, budget_tokens=9, declared="evaluation", note="n"
        )
        assert re.fullmatch(r"adl_[a-z0-9]{8}_[A-Za-z0-9_-]{43}", key)
        assert key[4:12] == record.id
        assert record == KeyRecord(
            record.id, "alice", "gold", NOW, trusted=True, budget_tokens=9, declared="evaluation", note="n"
        )
        for headers in ((f"Bearer {key}", None), (f"bearer  {key} ", None), (None, key), (f"Bearer {key}", key)):
            assert await keys.authenticate(*headers) == record

    with_keys(there, tmp_path / "pepper", use, lambda: NOW + 0.7)


def test_two_keys_at_once_are_refused(here: Place, tmp_path: Path) -> None:
    async def use(keys: Keys) -> None:
        (one, _), (two, _) = await keys.add("alice"), await keys.add("alice")
        for headers in ((f"Bearer {one}", two), (f"Bearer {one}", "x"), ("Basic abc", one), ("", one)):
            assert "are different keys; send one of them" in await denied(keys, *headers)

    with_keys(here, tmp_path / "pepper", use)


def test_what_is_no_key_is_refused_in_the_same_words(here: Place, tmp_path: Path) -> None:
    async def use(keys: Keys) -> None:
        key, _ = await keys.add("alice")
        other = "adl_" + ("a" if key[4] != "a" else "b") + key[5:]
        wrong = key[:-2] + ("A" if key[-2] != "A" else "B") + key[-1]
        for text in ("", "x", key + "\n\n", key[:-1], key + "x", other, wrong, key.upper(), "adl_" + "é" * 8, "\udcff"):
            if text.strip() != key:
                assert await denied(keys, f"Bearer {text}", None) == UNKNOWN
                assert await denied(keys, None, text) == UNKNOWN
        assert await denied(keys, key, None) == UNKNOWN
        assert await denied(keys, f"Basic {key}", None) == UNKNOWN
        assert (await denied(keys, None, None)).startswith("no key was sent; send one as Authorization: Bearer KEY")

    with_keys(here, tmp_path / "pepper", use)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=60) | st.from_regex(r"adl_[a-z0-9]{8}_[A-Za-z0-9_-]{43}", fullmatch=True))
def test_no_text_but_a_key_gets_in(here: Place, tmp_path: Path, text: str) -> None:
    async def use(keys: Keys) -> None:
        assert await denied(keys, f"Bearer {text}", None) == UNKNOWN
        assert await denied(keys, None, text) == UNKNOWN

    with_keys(here, tmp_path / "pepper", use)


def test_only_who_has_the_key_is_told_that_it_ended(here: Place, tmp_path: Path) -> None:
    now = [float(NOW)]

    async def use(keys: Keys) -> None:
        revoked, record = await keys.add("alice")
        expires, _ = await keys.add("alice", expires=NOW + 10)
        await keys.revoke(record.id)
        now[0] = NOW + 9.9
        await keys.authenticate(None, expires)
        now[0] = NOW + 10.0
        assert await denied(keys, None, expires) == "this key has expired; ask the operator for another"
        assert await denied(keys, None, revoked) == "this key was revoked; ask the operator for another"
        for key in (expires, revoked):
            assert await denied(keys, None, key[:13] + "A" * 43) == UNKNOWN

    with_keys(here, tmp_path / "pepper", use, lambda: now[0])


def test_a_revocation_elsewhere_is_in_force_within_two_seconds(there: Place, tmp_path: Path) -> None:
    assert FRESH < 2

    async def use(keys: Keys) -> None:
        key, record = await keys.add("alice")
        await keys.authenticate(None, key)
        other = await there.open()
        await (await open_keys(other, tmp_path / "pepper")).revoke(record.id)
        await other.close()
        await asyncio.sleep(FRESH + 0.05)
        assert "revoked" in await denied(keys, None, key)

    with_keys(there, tmp_path / "pepper", use)


def test_a_key_that_is_known_is_not_read_each_time(
    here: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(store: Store) -> None:
        keys = await open_keys(store, tmp_path / "pepper")
        key, _ = await keys.add("alice")
        read, look_up = [], store.key

        async def counted(id: str) -> tuple[KeyRecord, str] | None:
            read.append(id)
            return await look_up(id)

        monkeypatch.setattr(store, "key", counted)
        for _ in range(5):
            await keys.authenticate(None, key)
        assert len(read) == 1
        await denied(keys, None, key[:13] + "A" * 43)  # known by its id, and its secret is compared all the same

    here.run(use)


def test_without_a_store_nobody_gets_in(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def key(self, id: str) -> None:
            raise AdlocalError("state lies on the moon")

    async def use() -> None:
        store: Any = Broken()
        with pytest.raises(Failed) as told:
            await Keys(store, b"p" * 32).authenticate(None, f"adl_{'a' * 8}_{'b' * 43}")
        assert (told.value.status, told.value.type) == (503, "unavailable_error")
        assert "moon" not in told.value.message

    asyncio.run(use())
    assert "state lies on the moon" in caplog.text


def test_keys_are_random(here: Place, tmp_path: Path) -> None:
    async def use(keys: Keys) -> None:
        made = [await keys.add("alice") for _ in range(200)]
        secrets = [key[13:] for key, _ in made]
        assert len(set(secrets)) == len({record.id for _, record in made}) == 200
        assert {letter for secret in secrets for letter in secret} == {*string.ascii_letters, *string.digits, "-", "_"}

    with_keys(here, tmp_path / "pepper", use)


def test_an_id_that_is_taken_is_not_given_again(here: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = iter("a" * 8 + "a" * 8 + "b" * 8)
    monkeypatch.setattr("adlocal.serve.keys.secrets.choice", lambda _: next(letters))

    async def use(keys: Keys) -> None:
        assert [(await keys.add("alice"))[1].id for _ in range(2)] == ["a" * 8, "b" * 8]

    with_keys(here, tmp_path / "pepper", use)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"owner": ""}, "owner '': give up to 64 letters"),
        ({"owner": "a b"}, "owner 'a b'"),
        ({"owner": "a:b"}, "owner 'a:b'"),
        ({"owner": "a" * 65}, "owner"),
        ({"owner": "a", "tier": "x\ny"}, r"tier 'x\\ny'"),
        ({"owner": "a", "note": "x\ny"}, "note of 3 characters: give one line"),
        ({"owner": "a", "budget_tokens": 0}, "budget 0: give from 1"),
        ({"owner": "a", "expires": NOW}, "this time has passed"),
    ],
)
def test_values_that_make_no_sense_are_refused(here: Place, tmp_path: Path, how: dict[str, Any], words: str) -> None:
    async def use(keys: Keys) -> None:
        with pytest.raises(InputError, match=words):
            await keys.add(**how)
        assert await keys.records() == []

    with_keys(here, tmp_path / "pepper", use, lambda: NOW)


# What is kept.


def test_a_key_is_kept_as_its_hmac_alone(here: Place, tmp_path: Path) -> None:
    async def use(store: Store) -> None:
        key, record = await (await open_keys(store, tmp_path / "pepper")).add("alice")
        kept = await store.key(record.id)
        assert kept == (record, hmac.new((tmp_path / "pepper").read_bytes(), key.encode(), "sha256").hexdigest())
        files = b"".join(path.read_bytes() for path in Path(here.state).iterdir())
        assert record.id.encode() in files
        assert key[13:].encode() not in files

    here.run(use)


def test_a_pepper_is_made_once_and_its_owners_alone(tmp_path: Path) -> None:
    code = "import sys, pathlib; from adlocal.serve.keys import read_pepper\n"
    code += "print(read_pepper(pathlib.Path(sys.argv[1]), may_make=True).hex())"
    path = tmp_path / "own" / "pepper"
    how = [sys.executable, "-c", code, str(path)]
    made = [subprocess.Popen(how, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = {each.communicate(timeout=60)[0] for each in made}
    assert found == {path.read_bytes().hex() + "\n"}
    assert len(path.read_bytes()) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["pepper"]


def test_a_pepper_that_appears_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pepper").write_bytes(b"p" * 40)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert read_pepper(tmp_path / "pepper", may_make=True) == b"p" * 40


def test_a_pepper_that_is_lost_or_another_is_refused(there: Place, tmp_path: Path) -> None:
    async def use(keys: Keys) -> None:
        await keys.add("alice")

    with_keys(there, tmp_path / "pepper", use)
    (tmp_path / "other").write_bytes(b"o" * 32)
    (tmp_path / "short").write_bytes(b"o" * 31)
    for name, words in (
        ("lost", "lost: No such file or directory; give the file that the keys were made with"),
        ("other", "other is not the one that the keys were made with"),
        ("short", "short has 31 bytes of at least 32"),
    ):
        with pytest.raises(InputError, match=words):
            with_keys(there, tmp_path / name, use)
    assert not (tmp_path / "lost").exists()
    with_keys(there, tmp_path / "pepper", use)


# The command.


class Command:
    """`adlocal keys` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], state: str) -> None:
        self._capsys = capsys
        self._state = state

    def __call__(self, *words: str, state: str | None = None) -> str:
        parser = Parser(prog="adlocal")
        add_keys(parser.add_subparsers(dest="verb"))
        args = parser.parse_args(["keys", *words, "--state", state or self._state])
        args.handler(args)
        return self._capsys.readouterr().out


@pytest.fixture
def keys_command(capsys: pytest.CaptureFixture[str], here: Place) -> Command:
    return Command(capsys, here.state)


def test_a_key_is_added_listed_and_revoked_while_a_gateway_runs(keys_command: Command, here: Place) -> None:
    async def gateway(keys: Keys) -> None:
        async def command(*words: str) -> str:
            return await asyncio.to_thread(keys_command, *words)

        key = (await command("add", "--owner", "alice")).strip()
        record = await keys.authenticate(f"Bearer {key}", None)
        assert (record.owner, record.tier, record.expires) == ("alice", "default", None)
        assert record.id in await command("list")
        assert key not in await command("list", "--json")
        await command("revoke", record.id)
        await asyncio.sleep(FRESH + 0.05)
        assert "revoked" in await denied(keys, None, key)
        assert "revoked" in await command("list")

    with_keys(here, Path(here.state) / "pepper", gateway)


def test_a_key_is_as_it_was_asked_for(keys_command: Command) -> None:
    words = ["--tier", "gold", "--expires", "30d", "--budget", "5000", "--operator", "--trusted", "--evaluation"]
    made = json.loads(keys_command("add", "--owner", "bob", *words, "--note", "a note", "--json"))
    assert made.pop("key").startswith(f"adl_{made['id']}_")
    assert abs(made["created"] - time.time()) < 30
    assert made["expires"] - made["created"] == pytest.approx(30 * 86400, abs=30)
    assert {name: made[name] for name in sorted({*made} - {"id", "created", "expires"})} == {
        "budget_tokens": 5000,
        "declared": "evaluation",
        "note": "a note",
        "operator": True,
        "owner": "bob",
        "revoked": None,
        "tier": "gold",
        "trusted": True,
    }
    assert json.loads(keys_command("list", "--json")) == [made | {"used_tokens": 0}]


def test_the_list_tells_what_was_used(keys_command: Command, here: Place) -> None:
    assert keys_command("list") == "there are no keys; make one with adlocal keys add --owner NAME\n"
    made = json.loads(keys_command("add", "--owner", "bob", "--budget", "5000", "--expires", "2100-01-02", "--json"))

    async def spend(store: Store) -> None:
        async with Limiter(store) as limits:
            await limits.settle(await limits.reserve([Subject(f"key:{made['id']}", Limits())], 2000), 1234)

    here.run(spend)
    titles, line = keys_command("list").splitlines()
    assert titles.split("  ")[0] == "id"
    assert line.split() == [
        made["id"],
        "bob",
        "default",
        *line.split()[3:5],
        "2100-01-02",
        "00:00",
        "-",
        "1,234",
        "5,000",
    ]


def test_an_unknown_id_revokes_none(keys_command: Command) -> None:
    made = json.loads(keys_command("add", "--owner", "bob", "--json"))
    with pytest.raises(InputError, match="key nothing0: there is none of this id, and none was revoked"):
        keys_command("revoke", made["id"], "nothing0")
    assert json.loads(keys_command("list", "--json"))[0]["revoked"] is None


def test_redis_needs_a_pepper_of_the_operators(keys_command: Command, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--state in Redis: give --pepper FILE, the same file on every node"):
        keys_command("list", state="redis://127.0.0.1:9/0")
    with place("redis", tmp_path) as there:
        pepper = ("--pepper", str(tmp_path / "pepper"))
        key = keys_command("add", "--owner", "alice", *pepper, state=there.state).strip()
        assert key[4:12] in keys_command("list", *pepper, state=there.state)
        with pytest.raises(InputError, match=r"pepper .*another: No such file"):
            keys_command("list", "--pepper", str(tmp_path / "another"), state=there.state)


def test_the_key_alone_is_on_stdout(here: Place, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; sys.modules['llama_cpp'] = None; from adlocal.commands import keys, serve_verbs, verb\n"
    code += "parser = verb.Parser(); serve_verbs.add_keys(parser.add_subparsers()); keys.run(parser.parse_args())"
    words = ["keys", "add", "--owner", "alice", "--state", here.state]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"adl_[a-z0-9]{8}_[A-Za-z0-9_-]{43}\n", done.stdout)
    assert done.stderr == f"key {done.stdout[4:12]} of alice; its text is shown this once\n"


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("30d", NOW + 30 * 86400),
        ("12h", NOW + 12 * 3600),
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC).timestamp()),
        ("2027-01-31T12:00:00+02:00", datetime(2027, 1, 31, 10, tzinfo=UTC).timestamp()),
    ],
)
def test_a_time_is_read(text: str, when: float) -> None:
    assert expiry(text, NOW + 0.5) == when


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "1w", "tomorrow", "2027-02-30", "9" * 30 + "d", "99999999d"])
def test_a_time_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--expires {text}: give 30d, 12h, or a date"):
        expiry(text, NOW)
