"""The native core through its binding: handshake, the equation against adjust.py, bundles, lifetime and memory."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp._internals import LlamaModel
from llama_cpp.llama_cpp import _lib as libllama

import adlocal
from adlocal import Bundle, BundleError, InputError, ModelError, NativeError, ProxyError
from adlocal.adjust import NO_ENDS, Ids, adjust, delta, expectation
from adlocal.bundle import FORMAT_VERSION, MINUS_NAME, PLUS_NAME
from adlocal.llamacpp import native
from adlocal.llamacpp.record import stored_fields
from adlocal.pair import context_params
from support import tiny
from support.cli import Cli
from support.reference import log_softmax
from support.spoiled import HALVES, Copy, drop, read_natively, rewrite, stored

Row = npt.NDArray[np.float32]

REMEDY = "install adlocal again (`pip install .` compiles it; `make setup` in a checkout)"


# Handshake


def handshake() -> Any:
    """Loads the library as if for the first time."""
    return native.library.__wrapped__()


def refused() -> str:
    with pytest.raises(NativeError) as error:
        handshake()
    message = str(error.value)
    assert "\n" not in message
    assert REMEDY in message
    return message


FUNCTIONS = native._names(native.library().adl_llama_function_name)
STRUCTS = native._names(native.library().adl_llama_struct_name)


@pytest.fixture
def installed_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library is looked for instead."""
    monkeypatch.setattr(adlocal, "__path__", [str(tmp_path)])
    return tmp_path / native.FILE_NAME


def test_a_library_that_was_not_built(installed_as: Path) -> None:
    assert f"the native library {installed_as.name} is not there" in refused()


def test_a_file_that_is_no_library(installed_as: Path) -> None:
    installed_as.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert f"{installed_as.name} cannot be used (" in refused()


def test_a_library_that_is_not_adlocals(installed_as: Path) -> None:
    installed_as.write_bytes(Path(np.random.bit_generator.__file__).read_bytes())
    assert re.search(f"{installed_as.name} cannot be used .*adl_last_error", refused())


def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = adlocal.__version__
    monkeypatch.setattr(adlocal, "__version__", "9.9.9")
    assert f"{native.FILE_NAME} is of adlocal {ours}, this is adlocal 9.9.9" in refused()


def test_llama_cpp_has_every_function_of_the_table() -> None:
    assert len(FUNCTIONS) > 40
    assert [name for name in FUNCTIONS if native.address_of(name) is None] == []
    assert [name for name in STRUCTS if native.size_of(name) == 0] == []


def test_a_function_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    address_of = native.address_of
    for missing in FUNCTIONS:
        monkeypatch.setattr(native, "address_of", lambda name, no=missing: None if name == no else address_of(name))
        assert f"the host's llama.cpp lacks the function {missing};" in refused()


def test_a_structure_of_another_size_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    size_of = native.size_of
    for other in STRUCTS:
        monkeypatch.setattr(native, "size_of", lambda name, o=other: size_of(name) + 8 * (name == o))
        ours = size_of(other)
        assert f"struct {other} has {ours + 8} bytes in the host's llama.cpp and {ours} in the one" in refused()
        monkeypatch.setattr(native, "size_of", lambda name, o=other: size_of(name) * (name != o))
        assert handshake(), "a size that the host cannot tell passes"


def test_another_llama_cpp_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = ctypes.create_string_buffer(b"0.0.1")
    version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
    address_of = native.address_of
    ours = {"llama_version": ctypes.cast(version, ctypes.c_void_p).value}
    monkeypatch.setattr(native, "address_of", lambda name: ours.get(name) or address_of(name))
    function = libllama.llama_version
    function.restype = ctypes.c_char_p
    compiled_for = function().decode()
    assert f"the host's llama.cpp is 0.0.1, and adlocal was compiled for {compiled_for};" in refused()


def test_the_command_tells_it_in_one_line(
    tiny_llama: Path, tiny_bundle: Path, installed_as: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    done = cli("generate", "-m", tiny_llama, "--bundle", tiny_bundle, "-p", "1", "-c", 256, "-t", 1)
    assert done == (1, "", f"adlocal generate: the native library {installed_as.name} is not there; {REMEDY}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["libllama", "libggml-base"])
def test_there_is_one_llama_cpp_in_the_process(name: str) -> None:
    handshake()
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if f"/{name}." in line}
    assert len(paths) == 1


# The equation, against adjust.py

SIZES = [1, 7, 264, 1000, 4099, 49152, 152064]
GUARDS = [0.0, 1e-6, 0.05, 0.5, 1.0]
LAMBDAS = [0.0, 0.3, 2.0, -1.5, 30.0]
EPSILON = 0.01
KINDS = ["random", "-inf", "one plausible", "ties", "equal"]
# (ids that only the teacher has, only the proxies have, both have and do not share)
PADDINGS = [(0, 0, 0), (5, 0, 0), (0, 5, 0), (0, 0, 3)]


def rows(kind: str, n: int, n_proxy: int) -> tuple[Row, Row, Row]:
    """Logits of teacher and proxies, of the sizes that real ones have."""
    rng = np.random.default_rng(zlib.crc32(f"{kind} {n} {n_proxy}".encode()))
    z = rng.normal(0, 3, n).astype(np.float32)
    plus = rng.normal(0, 3, n_proxy).astype(np.float32)
    minus = plus + rng.normal(0, 0.02, n_proxy).astype(np.float32)
    if kind == "-inf":
        z[1:][rng.random(n - 1) < 0.3] = -np.inf
    elif kind == "one plausible":
        z[n // 2] = 60
    elif kind == "ties":
        z = np.round(z)
    elif kind == "equal":
        z[:] = 1.25
    return z, plus, minus


def core(
    z: Row,
    plus: Row,
    minus: Row,
    lam: float,
    guard: float,
    n_shared: int | None = None,
    epsilon: float = EPSILON,
    ends: Ids = NO_ENDS,
) -> tuple[Row, native.RowStruct]:
    """adl_adjust; raises what it refuses, after a look at the row."""
    z, before, out = z.copy(), z, native.RowStruct(mean=7, kl=7, n_candidates=7)
    n_shared = min(len(z), len(plus)) if n_shared is None else n_shared
    pointers = [row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for row in (z, plus, minus)]
    ids = (ctypes.c_int32 * len(ends))(*ends)
    row = pointers[0], len(z), *pointers[1:], len(plus), n_shared
    status = native.library().adl_adjust(*row, ids, len(ends), epsilon, lam, guard, ctypes.byref(out))
    if status != 0:
        assert z.tobytes() == before.tobytes()
        assert (out.mean, out.kl, out.n_candidates) == (7, 7, 7)
    native.check(status)
    return z, out


@pytest.mark.parametrize("n", SIZES)
def test_rows_are_the_oracles(n: int) -> None:
    """KL to 1e-5 of itself and 1e-5, E[Δ] to 1e-5 of Δ's spread: the core sums exponentials in float32, a block at a
    time.
    """
    for kind in KINDS:
        for more, fewer, unshared in PADDINGS if n < 40_000 else PADDINGS[: 2 if kind == "random" else 1]:
            n_proxy = max(1, n - more + fewer)
            z, plus, minus = rows(kind, n, n_proxy)
            n_shared = max(1, min(n, n_proxy) - unshared)
            d = delta(plus, minus, EPSILON)
            mean = pytest.approx(expectation(plus, minus, d), abs=1e-5 * float(np.std(d)) or 1e-6)
            ends = np.unique(np.array([n - 1, np.argsort(z)[-2:][0], n // 3, n // 2 + 1]) % n)[: n - 1]
            for guard, lam, some in itertools.product(GUARDS, LAMBDAS, [NO_ENDS, ends]):
                got, out = core(z, plus, minus, lam, guard, n_shared, ends=some)
                expected = adjust(z, d[:n_shared], lam=lam, guard=guard, ends=some)
                assert_same_row(got, expected.logits, z)
                assert got[some].tobytes() == z[some].tobytes()
                assert out.n_candidates == expected.n_candidates
                assert out.kl == pytest.approx(expected.kl, rel=1e-5, abs=1e-5)
                assert out.mean == mean


def assert_same_row(got: Row, expected: Row, z: Row) -> None:
    """To a unit in the last place of the logit or of its shift, whichever is larger, and 1e-6: the constant that keeps
    the mass comes from the core's float32 sums. What did not move is the same to the bit.
    """
    assert np.array_equal(np.isfinite(got), np.isfinite(expected))
    some = np.isfinite(z)
    ulp = np.spacing(np.maximum(np.abs(expected[some]), np.abs(expected[some] - z[some])))
    assert np.all(np.abs(got[some] - expected[some]) <= ulp + 1e-6)


def evened_out(lam: float) -> tuple[Row, Row, Row]:
    """600 tokens, of which λ evens out the plausible ones, 5 and 520 to 530; 7 is nearly the top, and ends."""
    z, plus, minus = rows("random", 600, 600)
    z[:] = np.minimum(z, 5)
    z[5], z[7], z[520:531] = 11, 10.75, 9.5
    minus[:] = plus
    minus[520:531] -= np.float32(2 * EPSILON * 1.5 / lam)
    minus[525] -= np.float32(1e-3 / lam)
    return z, plus, minus


@pytest.mark.parametrize("lam", [0.5, 1.0, 50.0])
@pytest.mark.parametrize("guard", [0.0, 0.05])
def test_greedy_decoding_ends_only_where_the_teacher_would(guard: float, lam: float) -> None:
    """One candidate is the next float above the end, as the oracle has it; and the end keeps its probability."""
    z, plus, minus = evened_out(lam)
    d, end = delta(plus, minus, EPSILON), np.array([7])
    got, out = core(z, plus, minus, lam, guard, ends=end)
    expected = adjust(z, d, lam=lam, guard=guard, ends=end)
    assert got.argmax() == expected.logits.argmax() != 7
    assert got.max() == np.nextafter(z[7], np.float32(np.inf))
    assert_same_row(got, expected.logits, z)
    assert out.kl == pytest.approx(expected.kl, rel=1e-5)
    assert np.exp(log_softmax(got)[7]) == pytest.approx(np.exp(log_softmax(z)[7]), rel=1e-5)
    higher = np.append(z, np.float32(10.9))  # the teacher's own, beyond the proxies' vocabulary
    got, _ = core(higher, plus, minus, lam, guard, ends=end)
    assert_same_row(got, adjust(higher, d, lam=lam, guard=guard, ends=end).logits, higher)
    assert got[:-1].max() == z[7]


@pytest.mark.parametrize("guard", [0.0, 0.05])
def test_an_end_that_is_the_teachers_top_is_not_overtaken_by_force(guard: float) -> None:
    z, plus, minus = evened_out(1.0)
    d, ends = delta(plus, minus, EPSILON), np.array([5, 7, 5])  # one named twice
    got, out = core(z, plus, minus, 1.0, guard, ends=ends)
    expected = adjust(z, d, lam=1.0, guard=guard, ends=ends)
    assert_same_row(got, expected.logits, z)
    assert got[[5, 7]].tolist() == [11, 10.75]
    assert got.argmax() == 5
    assert out.n_candidates == expected.n_candidates


@pytest.mark.parametrize("guard", GUARDS)
def test_lambda_0_leaves_the_row_to_the_bit(guard: float) -> None:
    for kind in KINDS:
        z, plus, minus = rows(kind, 1000, 1000)
        got, out = core(z, plus, minus, 0.0, guard)
        assert got.tobytes() == z.tobytes()
        assert out.kl == 0.0
        assert core(z, plus, minus, 0.0, guard, ends=np.array([3, 999]))[0].tobytes() == z.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_end_that_is_no_number_is_refused_and_stays(bad: float) -> None:
    z, plus, minus = rows("random", 1000, 1000)
    z[3] = bad
    with pytest.raises(ProxyError, match="teacher"):
        core(z, plus, minus, 1.0, 0.05, ends=np.array([3]))


def test_the_delta_of_an_end_is_not_asked_for() -> None:
    z, plus, minus = rows("random", 1000, 1000)
    z[3], minus[3] = z.max(), -np.inf
    got, _ = core(z, plus, minus, 1.0, 0.05, ends=np.array([3]))
    expected = adjust(z, delta(plus, minus, EPSILON), lam=1.0, guard=0.05, ends=np.array([3]))
    assert_same_row(got, expected.logits, z)
    z[4] = -np.inf  # nor does a row lose one that is ruled out
    assert core(z, plus, minus, 1.0, 0.05, ends=np.array([3, 4]))[0][4] == -np.inf


@pytest.mark.parametrize("ends", [[-1], [3, 264], [2**31 - 1]])
def test_ends_that_are_no_tokens_are_named(ends: list[int]) -> None:
    with pytest.raises(InputError, match=rf"ends: {ends[-1]} is none of the teacher's 264 tokens"):
        core(*rows("random", 264, 264), 1.0, 0.05, ends=np.array(ends))


@pytest.mark.parametrize("place", [3, 5, 998], ids=["plausible", "implausible", "unshared"])
@pytest.mark.parametrize("where", ["teacher", "plus", "minus", "both", "opposite"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_as_the_oracle_refuses(bad: float, where: str, place: int) -> None:
    """NaN and +inf anywhere, −inf in a half where the teacher finds the token plausible: and the row stays."""
    z, plus, minus = rows("random", 1000, 1000)
    z[3], z[5] = z.max(), -40
    for row, value in {
        "teacher": [(z, bad)],
        "plus": [(plus, bad)],
        "minus": [(minus, bad)],
        "both": [(plus, bad), (minus, bad)],
        "opposite": [(plus, bad), (minus, -bad)],
    }[where]:
        row[place] = value
    with np.errstate(invalid="ignore"):
        d = delta(plus, minus, EPSILON)
    harmless = bad == -np.inf and (where == "teacher" or (place != 3 and where != "opposite"))
    if harmless:
        got, out = core(z, plus, minus, 1.0, 0.05, 990)
        assert_same_row(got, adjust(z, d[:990], lam=1.0, guard=0.05).logits, z)
        assert out.mean == pytest.approx(expectation(plus, minus, d), abs=1e-5)
        return
    with pytest.raises(ProxyError):
        core(z, plus, minus, 1.0, 0.05, 990)
    with pytest.raises(ProxyError):
        protected_by_the_oracle(z, plus, minus, d)


def protected_by_the_oracle(z: Row, plus: Row, minus: Row, d: Row) -> None:
    with np.errstate(invalid="ignore"):
        if not math.isfinite(expectation(plus, minus, d)):
            raise ProxyError("no expectation")
    adjust(z, d[:990], lam=1.0, guard=0.05)


@pytest.mark.parametrize("lam", [1e39, 1e308, -1e39])
def test_a_lambda_that_overflows_is_refused(lam: float) -> None:
    z, plus, minus = rows("equal", 264, 264)
    for refuse in (
        lambda: core(z, plus, minus, lam, 0.05),
        lambda: adjust(z, delta(plus, minus, EPSILON), lam=lam, guard=0.05),
    ):
        with pytest.raises(ProxyError, match="shifts a logit beyond float32; nothing emitted"):
            refuse()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("guard", guard) for guard in (-0.1, 1.1, np.nan)),
        *(("lam", lam) for lam in (np.nan, np.inf)),
        *(("epsilon", epsilon) for epsilon in (0.0, -1.0, np.nan, np.inf)),
        *(("n_shared", n_shared) for n_shared in (0, -1, 265)),
    ],
)
def test_arguments_out_of_range_are_named(argument: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{argument}={value:g}"):
        core(*rows("random", 264, 264), **{"lam": 1.0, "guard": 0.05, argument: value})  # type: ignore[arg-type]


# Bundles: one set of vectors for Bundle.open and adl_bundle_read

KEYS = [key for _, key, _ in stored_fields(Bundle)]
TYPES = {"UINT32": 4, "INT32": 5, "BOOL": 7, "UINT64": 10, "INT64": 11, "FLOAT64": 12}  # of GGUF
OTHER_TYPE = {"UINT32": "INT32", "INT32": "UINT32", "UINT64": "FLOAT64", "FLOAT64": "INT64"}  # of the same length


def assert_refused(directory: Path) -> None:
    """By both, as a BundleError in one line that names the directory or the file."""
    for opened in (Bundle.open, read_natively):
        with pytest.raises(BundleError) as error:
            opened(directory)
        assert "\n" not in str(error.value)
        assert str(directory) in str(error.value)


def spoil(change: Callable[..., object], *arguments: Any, halves: list[str] = HALVES) -> Callable[[Path], None]:
    """Changes the halves of a bundle, both of them by default."""

    def spoiled(directory: Path) -> None:
        for name in halves:
            change(directory / name, *arguments)

    return spoiled


def alter(half: Path, key: str) -> None:
    """Changes the least bit of a key's value, of a string's or an array's first element."""
    field = gguf.GGUFReader(half, "r+").get_field(key)
    assert field is not None
    field.parts[field.data[0]].view(np.uint8)[0] ^= 1


def replace(half: Path, old: bytes, new: bytes) -> None:
    """Puts other bytes where `old` comes last: the tensor table lies behind the metadata that name tensors."""
    content = half.read_bytes()
    at = content.rindex(old)
    half.write_bytes(content[:at] + new + content[at + len(old) :])


def retype(half: Path, key: str, old: str) -> None:
    """Says that a key's value, or an array's elements, are of another type of the same length."""
    content = bytearray(half.read_bytes())
    at = content.index(stored(key)) + len(stored(key))
    array = (9).to_bytes(4, "little")
    at += 4 * content[at:].startswith(array)
    assert content[at] == TYPES[old]
    content[at] = TYPES[OTHER_TYPE[old]]
    half.write_bytes(content)


def exchange(half: Path, key: str, other: str) -> None:
    """Two keys of one length exchange their names: a number where a string should be, and the other way round."""
    content = half.read_bytes()
    for old, new in ((key, "?" * len(key)), (other, key), ("?" * len(key), other)):
        assert content.count(stored(old)) == 1
        content = content.replace(stored(old), stored(new))
    half.write_bytes(content)


def in_place_of(half: Path, make: Callable[[Path], object]) -> None:
    half.unlink()
    make(half)


def cut(half: Path, n_bytes: int) -> None:
    half.write_bytes(half.read_bytes()[:n_bytes])


def drop_all(half: Path) -> None:
    for key in [*KEYS, "adlocal.sign"]:
        drop(half, key)


def swap(directory: Path) -> None:
    contents = [(directory / name).read_bytes() for name in HALVES]
    for name, content in zip(HALVES, reversed(contents), strict=True):
        (directory / name).write_bytes(content)


def copy_over(directory: Path) -> None:
    (directory / MINUS_NAME).write_bytes((directory / PLUS_NAME).read_bytes())


NAME = b"blk.1.ffn_norm.weight"
VECTORS: dict[str, Callable[[Path], object]] = {
    "swapped": swap,
    "one half twice": copy_over,
    **{f"no {name}": spoil(Path.unlink, halves=[name]) for name in HALVES},
    "a directory as half": spoil(in_place_of, Path.mkdir, halves=[PLUS_NAME]),
    "empty": spoil(Path.write_bytes, b"", halves=[MINUS_NAME]),
    "no GGUF": spoil(Path.write_bytes, b"version https://git-lfs.github.com/spec/v1\n", halves=[MINUS_NAME]),
    "half a header": spoil(cut, 2000),
    "a plain model": spoil(drop_all),
    "newer": spoil(rewrite, "adlocal.format_version", FORMAT_VERSION + 1),
    "older": spoil(rewrite, "adlocal.format_version", FORMAT_VERSION - 1),
    "newer in one": spoil(rewrite, "adlocal.format_version", FORMAT_VERSION + 1, halves=[MINUS_NAME]),
    "a sign of 0": spoil(rewrite, "adlocal.sign", 0, halves=[MINUS_NAME]),
    "other tensors": spoil(replace, NAME, b"blk.1.ffn_morn.weight", halves=[MINUS_NAME]),
    "a tensor's name that is no UTF-8": spoil(replace, NAME, b"blk.1.ffn_n\xffrm.weight", halves=[MINUS_NAME]),
    "a key that is no UTF-8": spoil(replace, b"adlocal.params", b"adlocal.param\xff"),
    **{
        f"{key} {value}": spoil(rewrite, f"adlocal.{key}", value)
        for key in ("epsilon", "delta_scale", "gradient.norm")
        for value in (0.0, -1.0, math.nan, math.inf)
    },
    **{f"guard {value}": spoil(rewrite, "adlocal.guard", value) for value in (-0.1, 1.1, math.nan)},
    "a string as delta_scale": spoil(exchange, "adlocal.delta_scale", "adlocal.base.sha256"),
    "a number as quality": spoil(exchange, "adlocal.quality", "adlocal.epsilon"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_what_one_refuses_the_other_refuses(name: str, copy_bundle: Copy) -> None:
    VECTORS[name](directory := copy_bundle("bundle"))
    assert_refused(directory)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("key", [*KEYS, "adlocal.sign"])
def test_a_key_that_is_missing(key: str, half: str, copy_bundle: Copy) -> None:
    drop((directory := copy_bundle("bundle")) / half, key)
    assert_refused(directory)


@pytest.mark.parametrize("key", [*(key for key in KEYS if key != "adlocal.params.excluded"), "adlocal.sign"])
def test_a_key_that_differs_between_the_halves(key: str, copy_bundle: Copy) -> None:
    """By its least bit. (Nothing is excluded here, so that array has none.)"""
    alter((directory := copy_bundle("bundle")) / MINUS_NAME, key)
    assert_refused(directory)


STORED_AS = {**{key: gguf_type for _, key, gguf_type in stored_fields(Bundle)}, "adlocal.sign": "INT32"}


@pytest.mark.parametrize("key", [key for key, stored_as in STORED_AS.items() if stored_as in OTHER_TYPE])
def test_a_key_of_another_type(key: str, copy_bundle: Copy) -> None:
    spoil(retype, key, STORED_AS[key])(directory := copy_bundle("bundle"))
    assert_refused(directory)


def test_both_open_a_bundle_that_fits(teacher: LlamaModel, tiny_bundle: Path) -> None:
    lib, pair = native.library(), open_natively(tiny_bundle, teacher)
    assert lib.adl_pair_n_vocab(pair) == tiny.N_VOCAB
    lib.adl_pair_free(pair)
    with pytest.raises(InputError, match="the teacher is NULL"):
        open_natively(tiny_bundle, None)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_half_that_ends_early(share: float, half: str, teacher: LlamaModel, copy_bundle: Copy) -> None:
    """The core reads the header only; it is loading that finds the missing weights then."""
    path = (directory := copy_bundle("bundle")) / half
    cut(path, int(share * path.stat().st_size))
    with pytest.raises(BundleError, match=half):
        Bundle.open(directory)
    with pytest.raises((BundleError, ModelError), match=half):
        open_natively(directory, teacher)


@pytest.fixture(scope="module")
def teacher(tiny_llama: Path) -> Iterator[LlamaModel]:
    params = llama_cpp.llama_model_default_params()
    with closing(LlamaModel(path_model=str(tiny_llama), params=params, verbose=False)) as model:
        yield model


def open_natively(directory: Path, teacher: LlamaModel | None) -> int:
    """adl_pair_init; to be freed."""
    lib = native.library()
    contexts = context_params(n_ctx=128, n_threads=1)
    params = native.sized(native.PairParams, llama_cpp.llama_model_default_params(), contexts)
    table, model = native.llama_table(lib), teacher and ctypes.cast(teacher.model, ctypes.c_void_p)
    pair: int | None = lib.adl_pair_init(ctypes.byref(table), os.fsencode(directory), model, params)
    if pair is None:
        raise native.error()
    return pair


def test_both_read_the_same(copy_bundle: Copy) -> None:
    """Numbers to the bit, also those that no short decimal gives back."""
    directory = copy_bundle("bundle")
    for value in (None, 0.1 + 0.2, 5e-324, 1.7976931348623157e308):
        if value:
            for key in ("epsilon", "delta_scale", "gradient.norm", "guard"):
                spoil(rewrite, f"adlocal.{key}", value if key != "guard" else min(value, 1.0))(directory)
        bundle, core = Bundle.open(directory), read_natively(directory)
        assert (core.format_version, core.id.decode()) == (bundle.format_version, bundle.id)
        for name in ("epsilon", "delta_scale", "gradient_norm", "guard"):
            assert getattr(core, name).hex() == getattr(bundle, name).hex()


def test_a_path_in_other_letters(copy_bundle: Copy) -> None:
    directory = copy_bundle("bündel und 束")
    assert read_natively(directory).epsilon == Bundle.open(directory).epsilon


# Lifetime and memory

RESIDENT = """
import ctypes, gc, itertools, sys
from contextlib import closing
import llama_cpp
from adlocal import AntidistillationLlama
from adlocal.llamacpp import native

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
"""

CYCLES = """
class Mallinfo(ctypes.Structure):
    _fields_ = [(f"f{i}", ctypes.c_size_t) for i in range(10)]

def allocated():
    try:  # KiB that are not freed; 0 where the C library cannot tell (glibc can)
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo.restype = Mallinfo
    gc.collect()
    found = mallinfo()
    return (found.f4 + found.f7) // 1024

sampler_p = ctypes.POINTER(llama_cpp.llama_sampler)
lib, kwargs = native.library(), dict(n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
for cycle in range(1, 201):
    with closing(AntidistillationLlama(sys.argv[1], bundle=sys.argv[2], **kwargs)) as llm:
        list(itertools.islice(llm.generate(llm.tokenize(b"3 + 4 ="), temp=0.0), 4))
        samplers = [ctypes.cast(lib.adl_sampler_init(llm.pair.handle, 1.0, 0.05), sampler_p)]
        samplers.append(llama_cpp.llama_sampler_clone(samplers[0]))
        for sampler in samplers:
            llama_cpp.llama_sampler_free(sampler)
    if cycle in (50, 200):
        print(resident(), allocated())
"""

EVALUATION = """
from llama_cpp._internals import LlamaBatch, LlamaContext, LlamaModel
from adlocal.pair import context_params

model, bundle, which = sys.argv[1:]
kwargs, tokens = dict(n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False), [*range(1, 65)]
if which == "protected":
    llm = AntidistillationLlama(model, bundle=bundle, **kwargs)
else:
    llm, bare = llama_cpp.Llama(model, **kwargs), []
    for name in ("proxy-plus.gguf", "proxy-minus.gguf"):
        defaults = llama_cpp.llama_model_default_params()
        half = LlamaModel(path_model=f"{bundle}/{name}", params=defaults, verbose=False)
        bare.append(LlamaContext(model=half, params=context_params(512, 512, 1, 2), verbose=False))
        batch = LlamaBatch(n_tokens=64, embd=0, n_seq_max=1, verbose=False)
        batch.set_batch(tokens, 0, False)
        bare[-1].decode(batch)
llm.eval(tokens)
print(resident())
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def measured(script: str, *argv: object) -> list[int]:
    """KiB that a script in a process of its own prints; memory that it frees is given back at once."""
    command = [sys.executable, "-c", RESIDENT + script, *map(str, argv)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@linux
def test_200_lives_take_no_more_memory_than_50(tiny_llama: Path, tiny_bundle: Path) -> None:
    """Resident to 1 MiB (0.1 MiB measured, and 0.3 MiB for plain llama_cpp.Llama); allocated to 64 KiB, 0.4 KiB a life:
    less than two samplers (11 KiB measured).
    """
    resident_50, allocated_50, resident_200, allocated_200 = measured(CYCLES, tiny_llama, tiny_bundle)
    assert resident_200 - resident_50 <= 1024
    assert allocated_200 - allocated_50 <= 64


@linux
@pytest.mark.real
def test_memory_is_that_of_three_bare_contexts(smollm2: Path, smollm2_bundle: Path) -> None:
    """Resident after 64 tokens, to 5%. Measured: 425 MiB both, 0.1% apart; most of it is the weights, mapped."""
    (bare,), (protected,) = (measured(EVALUATION, smollm2, smollm2_bundle, which) for which in ("bare", "protected"))
    assert protected == pytest.approx(bare, rel=0.05)
