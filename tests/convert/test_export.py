"""Hugging Face directories written as GGUFs: llama.cpp computes what transformers computes."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adlocal.errors import ConversionError, ModelError, VocabularyError
from adlocal_convert.model.architectures import ARCHITECTURES
from adlocal_convert.source.export import export_directory
from support import families, tiny

N_TOKENS = 40
# Largest difference of a logit, in standard deviations of the logits. Measured 4e-6 at most, and 2.4e-3 where the
# activation is GELU, which ggml's CPU code reads from a table of half floats. A key left out differs by 0.5 and more.
CLOSE, CLOSE_WITH_GELU = 1e-4, 1e-2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama directory that no test changes."""
    return families.save(families.family_model("llama"), tmp_path_factory.mktemp("saved") / "llama")


def tokens(n_vocab: int = tiny.N_VOCAB) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(0, n_vocab, N_TOKENS)]


def llama_logits(path: Path, n_ctx: int = 256) -> Any:
    """Logits of every position, (n, n_vocab), with a float32 cache."""
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(path), n_ctx=n_ctx, n_threads=1, n_threads_batch=1, type_k=f32, type_v=f32, logits_all=True, verbose=False
    )
    try:
        model.eval(tokens())
        return np.array(model.scores[:N_TOKENS])
    finally:
        model.close()


def torch_logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([tokens()])).logits[0].float().numpy()


def error(found: Any, expected: Any) -> float:
    """Largest difference, in standard deviations of the logits."""
    return float(np.max(np.abs(found - expected)) / np.std(expected))


def stored(path: Path) -> dict[str, Any]:
    """Tensors of a GGUF by name, copied."""
    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(path).tensors}


def keys(path: Path, start: str) -> dict[str, bytes]:
    """Type and value of keys as their bytes lie in the file, by gguf-py's view of it."""
    fields = gguf.GGUFReader(path).fields.values()
    return {f.name: b"".join(p.tobytes() for p in f.parts[2:]) for f in fields if f.name.startswith(start)}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_those_of_transformers(name: str, teacher: Path, tmp_path: Path) -> None:
    model = families.family_model(name)
    directory = families.save(model, tmp_path / name)

    export_directory(directory, teacher, tmp_path / "proxy.gguf")

    difference = error(llama_logits(tmp_path / "proxy.gguf"), torch_logits(model))
    assert difference < (CLOSE_WITH_GELU if "gemma" in name else CLOSE)


def test_long_factors_hold_in_a_context_longer_than_the_original(teacher: Path, tmp_path: Path) -> None:
    model = families.family_model("phi3-longrope")
    rope = {**model.config.rope_parameters, "short_factor": families.LONG}
    long = families.family_model("phi3-longrope", rope_parameters=rope)

    export_directory(families.save(model, tmp_path / "phi3"), teacher, tmp_path / "proxy.gguf")

    assert error(llama_logits(tmp_path / "proxy.gguf", n_ctx=512), torch_logits(long)) < CLOSE


@pytest.mark.parametrize(
    ("part", "name"), [("interleaved", "llama"), ("norm_offset", "gemma2"), ("norm_offset", "gemma3")]
)
def test_without_a_difference_of_the_formats_the_logits_are_far_off(
    part: str, name: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the tolerances above can tell."""
    model = families.family_model(name)
    without: dict[str, Any] = {part: 0}
    monkeypatch.setitem(ARCHITECTURES, name, dataclasses.replace(ARCHITECTURES[name], **without))

    export_directory(families.save(model, tmp_path / name), teacher, tmp_path / "proxy.gguf")

    assert error(llama_logits(tmp_path / "proxy.gguf"), torch_logits(model)) > 10 * CLOSE_WITH_GELU


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_stay_and_norms_become_float32(dtype: str, teacher: Path, tmp_path: Path) -> None:
    model = families.family_model("llama").to(getattr(torch, dtype))

    export_directory(families.save(model, tmp_path / "llama"), teacher, tmp_path / "proxy.gguf")

    matrices = {kind for kind, data in stored(tmp_path / "proxy.gguf").values() if data.ndim > 1}
    vectors = {kind for kind, data in stored(tmp_path / "proxy.gguf").values() if data.ndim == 1}
    assert matrices == {"F16" if dtype == "float16" else "BF16"}
    assert vectors == {"F32"}
    # llama.cpp rounds activations to the type of the weights: 2^-11 and 2^-8 of each, over a few layers
    expected = torch_logits(model.float())
    assert error(llama_logits(tmp_path / "proxy.gguf"), expected) < (0.02 if dtype == "float16" else 0.2)


def test_shards_give_the_same_file_as_one(saved: Path, teacher: Path, tmp_path: Path) -> None:
    sharded = families.save(families.family_model("llama"), tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2

    for directory, name in ((saved, "one.gguf"), (sharded, "shards.gguf")):
        export_directory(directory, teacher, tmp_path / name)

    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "shards.gguf").read_bytes()


def test_the_language_model_of_a_multimodal_checkpoint(teacher: Path, tmp_path: Path) -> None:
    model = families.family_model("gemma3")
    directory = families.save(model, tmp_path / "gemma3")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    tensors = {f"language_model.{name}": t for name, t in load_file(directory / "model.safetensors").items()}
    save_file({**tensors, "vision_tower.patch.weight": torch.zeros(2, 2)}, directory / "model.safetensors")

    export_directory(directory, teacher, tmp_path / "proxy.gguf")

    assert error(llama_logits(tmp_path / "proxy.gguf"), torch_logits(model)) < CLOSE_WITH_GELU


def test_tokenizer_is_the_teachers_byte_for_byte(saved: Path, teacher: Path, tmp_path: Path) -> None:
    export_directory(saved, teacher, tmp_path / "proxy.gguf")

    found = keys(tmp_path / "proxy.gguf", "tokenizer.")
    assert found == keys(teacher, "tokenizer.")
    assert "tokenizer.chat_template" in found


@pytest.mark.parametrize("n_rows", [260, 300])
def test_tokens_are_cut_or_padded_to_the_embedding_table(n_rows: int, teacher: Path, tmp_path: Path) -> None:
    model = families.family_model("llama", vocab_size=n_rows)

    export_directory(families.save(model, tmp_path / "llama"), teacher, tmp_path / "proxy.gguf")

    fields = gguf.GGUFReader(tmp_path / "proxy.gguf").fields
    texts, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    theirs = gguf.GGUFReader(teacher).fields["tokenizer.ggml.tokens"].contents()
    assert texts == (theirs + [f"[PAD{i}]" for i in range(264, n_rows)])[:n_rows]
    assert kinds[258:] == [gguf.TokenType.UNUSED] * (n_rows - 258)
    vocabulary_size = llama_logits(tmp_path / "proxy.gguf").shape[1]  # llama.cpp opens it and counts the same
    assert vocabulary_size == n_rows


def byte_tokenizer(**changes: int) -> dict[str, Any]:
    """A tokenizer.json with the tiny vocabulary, some texts moved to other ids."""
    pieces = {text: i for i, text in enumerate(tiny.BYTES)}
    added = [{"id": tiny.BOS, "content": "<s>"}, {"id": tiny.EOS, "content": "</s>"}]
    return {"model": {"type": "BPE", "vocab": {**pieces, **changes}, "merges": []}, "added_tokens": added}


def tokens_of(path: Path) -> list[str]:
    return list(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents())


def test_a_tokenizer_json_that_fits_is_accepted(saved: Path, teacher: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved, tmp_path / "llama")
    (directory / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))

    export_directory(directory, teacher, tmp_path / "proxy.gguf")

    assert tokens_of(tmp_path / "proxy.gguf") == tokens_of(teacher)


@pytest.mark.parametrize("unigram", [False, True])
def test_the_first_differing_token_is_named(unigram: bool, saved: Path, teacher: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(saved, tmp_path / "llama")
    content = byte_tokenizer(A=tiny.BYTES.index("B"), B=tiny.BYTES.index("A"))
    if unigram:
        pieces = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
        content["model"]["vocab"] = [[piece, 0.0] for piece in pieces]
    (directory / "tokenizer.json").write_text(json.dumps(content))

    with pytest.raises(VocabularyError, match=r"token 65 is 'A' in .*llama\.gguf and 'B' in .*llama; give a proxy"):
        export_directory(directory, teacher, tmp_path / "proxy.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize(
    ("n_rows", "message"),
    [
        (200, "token 200 is .* embeds only 200 tokens"),
        (2000, "embeds 2,000 tokens and .* has 264: too many more for padding"),
    ],
)
def test_another_vocabulary_is_refused(n_rows: int, message: str, teacher: Path, tmp_path: Path) -> None:
    directory = families.save(families.family_model("llama", vocab_size=n_rows), tmp_path / "llama")

    with pytest.raises(VocabularyError, match=message):
        export_directory(directory, teacher, tmp_path / "proxy.gguf")


def _set(**values: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **values}))

    return spoil


def _tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return spoil


_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
_UNTRUNCATED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
_NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("llama", _set(model_type="mamba"), "model_type mamba is none of llama, mistral, .*convert_hf_to_gguf.py"),
        ("llama", _set(hidden_act="gelu"), "hidden_act is gelu, and llama.cpp's llama has silu"),
        ("llama", _set(rope_parameters=_DYNAMIC), "rope_type dynamic of llama is not mapped"),
        ("qwen2", _set(rope_parameters={**_UNTRUNCATED, "truncate": False}), "truncate of yarn is False"),
        ("qwen2", _set(rope_parameters={**_UNTRUNCATED, "beta_fast": 16.0}), "beta_fast of yarn is 16.0"),
        ("llama", _set(quantization_config={"quant_method": "gptq"}), r"its weights are quantized \(gptq\)"),
        ("llama", _set(hidden_size=128), r"embed_tokens.weight is \(264, 64\), and config.json makes it \(264, 128\)"),
        ("llama", _set(num_hidden_layers="two"), "transformers refuses it"),
        ("gemma2", _set(query_pre_attn_scalar=99), "query_pre_attn_scalar is 99, and llama.cpp has 24"),
        ("gemma2", _set(final_logit_softcapping=None), "gemma2 has attn_logit_softcapping and final_logit_soft"),
        ("gemma2", _set(layer_types=["full_attention"] * 2), "no layer has a sliding window"),
        ("llama", lambda d: (d / "config.json").unlink(), r"config.json: no such file; give a directory with"),
        ("llama", lambda d: (d / "config.json").write_text("{"), "config.json: not readable as JSON"),
        ("llama", lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        ("llama", lambda d: (d / "model.safetensors").write_text("{"), "not a readable safetensors file"),
        ("llama", lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: no readable tokenizer"),
        ("llama", _tensors(lambda t: t.pop(_NORM)), "no file holds model.norm.weight"),
        (
            "llama",
            _tensors(lambda t: t.update({"new.weight": t[_NORM].clone()})),
            "tensor new.weight has no place in llama",
        ),
        ("llama", _tensors(lambda t: t.update({_NORM: t[_NORM].double()})), "stored as F64, expected F32, F16, BF16"),
    ],
)
def test_what_cannot_be_mapped_is_refused_in_words(
    name: str, spoil: Callable[[Path], object], message: str, teacher: Path, tmp_path: Path
) -> None:
    directory = families.save(families.family_model(name), tmp_path / "model")
    spoil(directory)

    with pytest.raises(ModelError, match=message) as caught:
        export_directory(directory, teacher, tmp_path / "proxy.gguf")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("content", [b"", b"GGUF"])
def test_a_teacher_that_cannot_be_read_is_refused(content: bytes, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "teacher.gguf").write_bytes(content)

    with pytest.raises(ModelError, match=r"teacher.gguf: not a readable GGUF file"):
        export_directory(saved, tmp_path / "teacher.gguf", tmp_path / "proxy.gguf")


def test_a_full_disk_leaves_nothing(saved: Path, teacher: Path, tmp_path: Path) -> None:
    """numpy's short write, after some tensors: a limit on the size of files stands for the disk's."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1][1]))
    try:
        with pytest.raises(ConversionError, match=r"cannot write .*proxy.gguf: .* written; is the disk full\?"):
            export_directory(saved, teacher, tmp_path / "proxy.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_its_total(saved: Path, teacher: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    export_directory(saved, teacher, tmp_path / "proxy.gguf", lambda done, total: told.append((done, total)))

    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "proxy.gguf").tensors)


def test_spaces_of_sentencepiece_count_as_spaces(saved: Path, tmp_path: Path) -> None:
    """llama.cpp's converter writes Gemma's runs of them as spaces."""
    spaced = tiny.write_gguf(tiny.tiny_model("llama"), tmp_path / "teacher.gguf", pieces=["  ", *tiny.BYTES[1:]])
    content = byte_tokenizer(**{"\u2581\u2581": 0})
    del content["model"]["vocab"][tiny.BYTES[0]]
    directory = shutil.copytree(saved, tmp_path / "llama")
    (directory / "tokenizer.json").write_text(json.dumps(content))

    export_directory(directory, spaced, tmp_path / "proxy.gguf")

    assert tokens_of(tmp_path / "proxy.gguf")[:2] == ["  ", tiny.BYTES[1]]
