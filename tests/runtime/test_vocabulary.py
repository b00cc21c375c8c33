"""Which vocabularies are shared, and that a teacher with another one is refused before it says a word."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp._internals import LlamaModel

from adlocal import AntidistillationLlama, ProxyError, ProxyPair, VocabularyError
from adlocal.adjust import adjust
from adlocal.llamacpp import native
from adlocal.llamacpp.model import open_vocabulary
from support import tiny
from support.reference import eval_prompt

PADDED = 272
TEXT = [tiny.BOS, *b"two and two"]
OPTIONS: dict[str, Any] = {"n_ctx": 64, "logits_all": True, "n_threads": 1, "verbose": False}


@pytest.fixture(scope="module")
def proxy(tiny_bundle: Path) -> Iterator[LlamaModel]:
    """The vocabulary of the bundle's proxy, 264 tokens."""
    with closing(open_vocabulary(tiny_bundle / "proxy-plus.gguf")) as model:
        yield model


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with 8 more tokens than the proxy, all of them as plausible as any."""
    path = tmp_path_factory.mktemp("padded") / "teacher.gguf"
    return tiny.write_gguf(tiny.tiny_model(seed=1, vocab_size=PADDED), path, tiny.CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that numbers A and B the other way round."""
    pieces = list(tiny.BYTES)
    pieces[65], pieces[66] = pieces[66], pieces[65]
    return tiny.write_gguf(tiny.tiny_model(), tmp_path_factory.mktemp("shuffled") / "teacher.gguf", pieces=pieces)


def shared_vocabulary(teacher: LlamaModel, proxy: LlamaModel) -> int:
    lib = native.library()
    models = (ctypes.cast(model.model, ctypes.c_void_p) for model in (teacher, proxy))
    return native.check(lib.adl_vocab_shared(ctypes.byref(native.llama_table(lib)), *models))


def shared(teacher: Path, proxy: LlamaModel) -> int:
    with closing(open_vocabulary(teacher)) as model:
        return shared_vocabulary(model, proxy)


def rewrite(path: Path, key: str, value: int, index: int = 0) -> Path:
    """Changes a number, or one of an array, in a GGUF's metadata in place."""
    field = gguf.GGUFReader(path, "r+").get_field(key)
    assert field is not None
    field.parts[field.data[index]][0] = value
    return path


def copy_of(teacher: Path, folder: Path) -> Path:
    target = folder / "copy.gguf"
    target.write_bytes(teacher.read_bytes())
    return target


# The rule


def test_the_same_vocabulary_is_shared_whole(tiny_llama: Path, proxy: LlamaModel) -> None:
    assert shared(tiny_llama, proxy) == tiny.N_VOCAB


def test_padding_on_either_side_is_not_shared(padded: Path, proxy: LlamaModel) -> None:
    assert shared(padded, proxy) == tiny.N_VOCAB
    with closing(open_vocabulary(padded)) as longer:
        assert shared_vocabulary(proxy, longer) == tiny.N_VOCAB


def test_the_first_differing_token_is_named_with_both_texts(shuffled: Path, proxy: LlamaModel) -> None:
    with pytest.raises(VocabularyError, match=r"^token 65 is 'B' .*to the teacher and 'A' .*to the proxy; convert a"):
        shared(shuffled, proxy)


def test_a_token_of_another_type_is_named(tiny_llama: Path, proxy: LlamaModel, tmp_path: Path) -> None:
    """The same text as a control token is not the same token: one is printed, the other is not."""
    teacher = copy_of(tiny_llama, tmp_path)
    rewrite(teacher, "tokenizer.ggml.token_type", gguf.TokenType.CONTROL, index=97)
    with pytest.raises(VocabularyError, match=r"^token 97 is 'a' \(type \d+\) to the teacher and 'a' \(type \d+\)"):
        shared(teacher, proxy)


def test_a_special_token_in_the_padding_is_named(padded: Path, proxy: LlamaModel, tmp_path: Path) -> None:
    teacher = rewrite(copy_of(padded, tmp_path), "tokenizer.ggml.eos_token_id", 268)
    with pytest.raises(VocabularyError, match=r"special token 268 lies beyond the proxy's 264 tokens; convert a"):
        shared(teacher, proxy)


# End to end


def test_a_teacher_with_another_vocabulary_is_refused(shuffled: Path, tiny_bundle: Path) -> None:
    with pytest.raises(VocabularyError, match=r"^token 65 is 'B'"):
        AntidistillationLlama(str(shuffled), bundle=tiny_bundle, **OPTIONS)


def plain_rows(teacher: Path) -> npt.NDArray[np.float32]:
    with closing(llama_cpp.Llama(str(teacher), **OPTIONS)) as llm:
        eval_prompt(llm, TEXT)
        return np.array(llm.scores[: len(TEXT)])


@pytest.mark.parametrize("guard", [0.0, 0.05])
def test_tokens_beyond_the_proxy_keep_the_teachers_logits(guard: float, padded: Path, tiny_bundle: Path) -> None:
    """Bit for bit; the others are the oracle's, adjusted by a pair of its own, to 1e-3: the shift of a typical token is
    1 nat, and Δ through another batch size rounds otherwise."""
    with ExitStack() as stack:
        llm = stack.enter_context(
            closing(AntidistillationLlama(str(padded), bundle=tiny_bundle, strength=1.0, guard=guard, **OPTIONS))
        )
        pair = stack.enter_context(ProxyPair.open(tiny_bundle, n_threads=1))
        llm.eval(TEXT)
        rows, deltas = llm.scores[: len(TEXT)], pair.delta(TEXT)
        lam, ends = pair.bundle.lam(1.0), np.array([tiny.EOS])
        for z, row, delta in zip(plain_rows(padded), rows, deltas, strict=True):
            assert row[tiny.N_VOCAB :].tobytes() == z[tiny.N_VOCAB :].tobytes()
            np.testing.assert_allclose(row, adjust(z, delta, lam=lam, guard=guard, ends=ends).logits, atol=1e-3)
            assert np.abs(row - z)[: tiny.N_VOCAB].max() > 0.5


def test_a_padded_teacher_writes_under_protection(padded: Path, tiny_bundle: Path) -> None:
    with closing(AntidistillationLlama(str(padded), bundle=tiny_bundle, strength=4.0, **OPTIONS)) as llm:
        llm.create_completion(TEXT, max_tokens=4, temperature=0.0)
        assert llm.last_dose.n_tokens > 0
        assert llm.last_dose.total


def test_writing_on_after_a_token_that_the_proxy_lacks_is_refused(padded: Path, tiny_bundle: Path) -> None:
    """The pair cannot follow, so there would be no protection. The plain teacher, strength 0, may go on."""
    forced: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "logit_bias": {PADDED - 1: 100.0}}
    with closing(AntidistillationLlama(str(padded), bundle=tiny_bundle, strength=4.0, **OPTIONS)) as llm:
        with pytest.raises(ProxyError, match="no token was emitted"):
            llm.create_completion(TEXT, **forced)
        llm.reset()
        llm.create_completion(TEXT, max_tokens=4, temperature=0.0)
        assert llm.last_dose.total
        assert llm.create_completion(TEXT, strength=0.0, **forced)["usage"]["completion_tokens"] == 4
