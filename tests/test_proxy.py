"""The proxy in PyTorch: its weights are the file's, number by number, and gradients find their way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers
from adlocal_convert import proxy as proxy_module
from adlocal_convert.proxy import Proxy
from adlocal_convert.quantize import quantize

from adlocal.errors import ModelError

ARCHITECTURES = ("llama", "qwen2")
N_LAYERS, WIDTH, N_HEAD, N_HEAD_KV = 2, 64, 4, 2


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A transformers model and its F32 file."""
    model = tiny.tiny_model(request.param)
    return model, tiny.write_gguf(model, tmp_path_factory.mktemp("proxy") / f"{request.param}.gguf")


def parameter_name(tensor_name: str) -> str:
    """The correspondence between both formats, written out by hand."""
    fixed = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if tensor_name in fixed:
        return fixed[tensor_name]
    _, layer, part, kind = tensor_name.split(".")
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    return f"model.layers.{layer}.{parts[part]}.{kind}"


def test_every_tensor_of_the_file_is_matched_to_its_parameter(made: tuple[Any, Path]) -> None:
    model, path = made
    proxy = Proxy(path)
    assert [t.name for t in proxy.tensors] == [t.name for t in gguf.GGUFReader(path).tensors]
    assert {t.name: t.parameter for t in proxy.tensors} == {t.name: parameter_name(t.name) for t in proxy.tensors}
    assert {t.parameter for t in proxy.tensors} == dict(model.named_parameters()).keys()


def test_the_model_is_the_one_that_was_written(made: tuple[Any, Path]) -> None:
    """F32 files lose nothing: equality."""
    model, path = made
    loaded = dict(Proxy(path).model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter), name


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_0", "F16"])
def test_weights_are_those_that_the_file_dequantizes_to(made: tuple[Any, Path], type_name: str, tmp_path: Path) -> None:
    """Oracle: gguf-py's own dequantization, and equality, because both routes are the same arithmetic."""
    path = made[1]
    if type_name != "F32":
        path = tmp_path / f"{type_name}.gguf"
        quantize(made[1], path, type_name, 1)
    proxy = Proxy(path)
    parameters = dict(proxy.model.named_parameters())
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert type_name in {t.tensor_type.name for t in reader.values()}
    for tensor in proxy.tensors:
        stored = reader[tensor.name]
        weights = gguf.dequantize(stored.data, stored.tensor_type)
        np.testing.assert_array_equal(tensor.weights(), weights)
        np.testing.assert_array_equal(tensor.to_gguf(parameters[tensor.parameter]), weights)
        assert tensor.n_weights == weights.size
        assert tensor.is_linear == (weights.ndim == 2)


def test_rows_of_q_and_k_are_interleaved_for_llama_alone(made: tuple[Any, Path]) -> None:
    """Oracle: row 2j + s of a head in the file is row j of half s in transformers (llama.cpp's converter)."""
    model, path = made
    heads = {t.name: t.n_head for t in Proxy(path).tensors if t.n_head}
    if model.config.model_type == "qwen2":
        assert heads == {}
        return
    expected = {"attn_q": N_HEAD, "attn_k": N_HEAD_KV}
    assert heads == {f"blk.{i}.{part}.weight": n for i in range(N_LAYERS) for part, n in expected.items()}
    parameters = dict(model.named_parameters())
    size = WIDTH // N_HEAD
    for tensor in Proxy(path).tensors:
        values = parameters[tensor.parameter].detach()
        rows = range(values.shape[0])
        moved = [i // size * size + i % 2 * (size // 2) + i % size // 2 for i in rows] if tensor.n_head else [*rows]
        np.testing.assert_array_equal(tensor.to_gguf(values), values[moved].numpy())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tied_embedding_is_one_tensor_with_one_parameter(architecture: str, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.tiny_model(architecture, tie_word_embeddings=True), tmp_path / "tied.gguf")
    proxy = Proxy(path)
    assert proxy.model.lm_head.weight is proxy.model.model.embed_tokens.weight
    names = [t.name for t in proxy.tensors]
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    assert len({t.parameter for t in proxy.tensors}) == len(names)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parameter", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, parameter: str, tmp_path: Path) -> None:
    model = tiny.tiny_model()
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[5] = value
    path = tiny.write_gguf(model, tmp_path / "nan.gguf")
    name = next(t.name for t in gguf.GGUFReader(path).tensors if parameter_name(t.name) == parameter)
    with pytest.raises(ModelError, match=rf"nan\.gguf: tensor {name} holds NaN or infinite weights"):
        Proxy(path)


@pytest.mark.parametrize("architecture", ["gpt2", "mamba"])
def test_another_architecture_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=f"architecture {architecture} is not supported; give one of llama, qwen2"):
        Proxy(path)


@pytest.mark.parametrize("kept", [0, 3, 40, 20_000, -1], ids=lambda n: f"{n} bytes")
def test_a_truncated_file_is_refused(kept: int, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_llama.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cut\.gguf: not a readable GGUF"):
        Proxy(path)


def test_garbage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + np.random.default_rng(0).bytes(4096))
    with pytest.raises(ModelError, match=r"noise\.gguf: not a readable GGUF"):
        Proxy(path)


def test_what_transformers_cannot_open_is_refused_with_its_reason(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no such thing\nand much more")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"llama\.gguf: transformers cannot open it \(no such thing\)$"):
        Proxy(tiny_llama)


def test_a_tensor_that_transformers_reordered_otherwise_is_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of numbers is what finds it: a gradient must not be written to the wrong rows."""
    monkeypatch.setattr(proxy_module, "_interleave", lambda values, n_head: values[::-1])
    with pytest.raises(ModelError, match=r"blk\.0\.attn_[qk]\.weight differs from transformers'"):
        Proxy(tiny_llama)


def test_a_tensor_without_a_counterpart_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = proxy_module._gguf_names

    def without_norm(*args: Any) -> dict[str, str]:
        return {name: parameter for name, parameter in known(*args).items() if name != "output_norm.weight"}

    monkeypatch.setattr(proxy_module, "_gguf_names", without_norm)
    with pytest.raises(ModelError, match=r"tensor output_norm\.weight has no counterpart"):
        Proxy(tiny_llama)
