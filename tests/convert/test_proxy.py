"""The proxy in PyTorch: its weights are the file's, number by number, and it computes what transformers' model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from adlocal.errors import ModelError
from adlocal_convert.model import weights as weights_module
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.model.streamed import deinterleave
from adlocal_convert.source.quantize import quantize
from support import tiny

WIDTH, N_HEAD, N_HEAD_KV = 64, 4, 2
# llama.cpp's file type -> the tensor type that most of its matrices get
FILE_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K_M": "Q4_K"}
# name -> (architecture, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
}


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


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Proxy]:
    """A transformers model, and the proxy of its F32 file."""
    torch.set_num_threads(1)
    architecture, settings = MODELS[request.param]
    model = tiny.tiny_model(architecture, **settings)
    return model, Proxy(tiny.write_gguf(model, tmp_path_factory.mktemp("proxy") / f"{request.param}.gguf"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """File type -> a model of it, 256 wide, which the blocks of K-quants need."""
    directory = tmp_path_factory.mktemp("wide")
    base = tiny.write_gguf(tiny.tiny_model(hidden_size=256, intermediate_size=256), directory / "F32.gguf")
    paths = {name: directory / f"{name}.gguf" for name in FILE_TYPES}
    for name, path in paths.items():
        if path != base:
            quantize(base, path, name, 1)
    return paths


def test_tensors_are_those_of_the_file(made: tuple[Any, Proxy]) -> None:
    """Names, order, shapes, types and sizes, as gguf-py reads them."""
    model, proxy = made
    stored = gguf.GGUFReader(proxy.path).tensors
    assert [t.name for t in proxy.tensors] == [t.name for t in stored]
    for tensor, other in zip(proxy.tensors, stored, strict=True):
        assert tensor.shape == other.data.shape
        assert (tensor.ggml_type, tensor.n_bytes) == (other.tensor_type, other.n_bytes)
        assert (tensor.n_weights, tensor.is_linear) == (other.data.size, other.data.ndim == 2)
    assert {parameter_name(t.name) for t in proxy.tensors} == dict(model.named_parameters()).keys()
    assert proxy.n_vocab == tiny.N_VOCAB
    assert proxy.is_tied == model.config.tie_word_embeddings == ("output.weight" not in {t.name for t in proxy.tensors})


def test_norms_and_biases_are_the_models_only_parameters(made: tuple[Any, Proxy]) -> None:
    """Equal to those that were written; matrices stay in the file, and nothing is left without values."""
    model, proxy = made
    written, loaded = dict(model.named_parameters()), dict(proxy.model.named_parameters())
    assert proxy.small.keys() == {t.name for t in proxy.tensors if not t.is_linear}
    assert proxy.parameters == {name: parameter_name(name) for name in proxy.small}
    assert loaded.keys() == set(proxy.parameters.values())
    for name, parameter in proxy.small.items():
        assert loaded[parameter_name(name)] is parameter
        assert torch.equal(parameter, written[parameter_name(name)]), name
    assert not any(t.is_meta for t in (*loaded.values(), *proxy.model.buffers()))


@torch.no_grad()
def test_logits_equal_transformers_own(made: tuple[Any, Proxy]) -> None:
    """Through the pieces and through the whole model; sums of float32 in another order, 4e-7 was measured."""
    model, proxy = made
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, tiny.N_VOCAB, (3, 40)))
    expected = model(input_ids=ids).logits
    for found in (proxy.logits(proxy.hidden(ids)), proxy.model(input_ids=ids).logits):
        assert found.shape == (3, 40, tiny.N_VOCAB)
        assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_padding_on_the_right_changes_nothing_before_it(made: tuple[Any, Proxy]) -> None:
    _, proxy = made
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(proxy.hidden(padded)[:, :8], proxy.hidden(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_weights_are_those_that_the_file_dequantizes_to(
    wide: dict[str, Path], monkeypatch: pytest.MonkeyPatch, file_type: str, n_threads: int
) -> None:
    """Oracle: gguf-py's own dequantization, and equality, because both routes are the same arithmetic."""
    monkeypatch.setattr(weights_module, "_BYTES_AT_A_TIME", 5000)  # a few rows a call, and not a divisor of any tensor
    proxy = Proxy(wide[file_type], n_threads=n_threads)
    stored = {t.name: t for t in gguf.GGUFReader(wide[file_type]).tensors}
    assert FILE_TYPES[file_type] in {t.tensor_type.name for t in stored.values()}
    for tensor in proxy.tensors:
        other = stored[tensor.name]
        expected = gguf.dequantize(other.data, other.tensor_type)
        found = proxy.weights.get(tensor.name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected, err_msg=tensor.name)
        assert proxy.weights.shape(tensor.name) == tensor.shape == expected.shape
    proxy.close()


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_rows_are_those_of_the_whole(wide: dict[str, Path], file_type: str) -> None:
    """In the order asked for, repeated where asked for twice."""
    weights = Proxy(wide[file_type]).weights
    for name in ("token_embd.weight", "blk.1.ffn_down.weight"):
        np.testing.assert_array_equal(weights.rows(name, [255, 0, 17, 0]), weights.get(name)[[255, 0, 17, 0]])
    assert "token_embd.weight" in weights
    assert "token_embd" not in weights


@pytest.mark.parametrize("n_rows", [1, 100, 264, 999])
def test_bands_are_the_whole(wide: dict[str, Path], monkeypatch: pytest.MonkeyPatch, n_rows: int) -> None:
    """264 rows in bands of at most `n_rows`; a vector is one."""
    monkeypatch.setattr(weights_module, "_LARGEST_BAND", 256 * n_rows)
    weights = Proxy(wide["Q4_K_M"]).weights
    bands = list(weights.bands("token_embd.weight"))
    whole = weights.get("token_embd.weight")
    assert [rows.start for rows, _ in bands] == [*range(0, 264, n_rows)]
    for rows, band in bands:
        np.testing.assert_array_equal(band, whole[rows])
    np.testing.assert_array_equal(np.concatenate([band for _, band in bands]), whole)
    ((_, vector),) = weights.bands("output_norm.weight")
    np.testing.assert_array_equal(vector.ravel(), weights.get("output_norm.weight"))


@torch.no_grad()
def test_a_quantized_proxy_computes_with_its_dequantized_weights(wide: dict[str, Path]) -> None:
    """Oracle: transformers' model with the weights that gguf-py reads, rows of Q and K put back into halves."""
    model = tiny.tiny_model(hidden_size=256, intermediate_size=256)
    for tensor in gguf.GGUFReader(wide["Q4_K_M"]).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        n_head = {"attn_q": N_HEAD, "attn_k": N_HEAD_KV}.get(str(tensor.name).split(".")[-2], 0)
        if n_head:
            size = len(values) // n_head
            halves = [
                i // size * size + i % size % (size // 2) * 2 + i % size // (size // 2) for i in range(len(values))
            ]
            values = values[halves]
        model.get_parameter(parameter_name(str(tensor.name))).copy_(torch.tensor(values))
    ids = torch.arange(30)[None]
    proxy = Proxy(wide["Q4_K_M"])
    found, expected = proxy.logits(proxy.hidden(ids)), model(input_ids=ids).logits
    assert float((found - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("n_head", [1, 4])
def test_deinterleaving_is_the_way_back(n_head: int) -> None:
    rows = torch.arange(WIDTH)
    stored = torch.from_numpy(tiny.interleaved(rows.numpy(), n_head))
    assert torch.equal(deinterleave(stored[None], n_head), rows[None])


def test_progress_is_called_for_each_parameter(tiny_llama: Path) -> None:
    calls: list[None] = []
    Proxy(tiny_llama, progress=lambda: calls.append(None))
    assert len(calls) == len(dict(tiny.tiny_model().named_parameters()))


class Changed:
    """Writes the tiny llama with some of its tensors changed."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._monkeypatch = directory / "changed.gguf", monkeypatch

    def __call__(self, changes: dict[str, Any], extra: dict[str, Any] | None = None, **overrides: Any) -> Path:
        """`changes` gives other values to tensors by name, or None to leave one out."""
        add = gguf.GGUFWriter.add_tensor

        def changed(writer: gguf.GGUFWriter, name: str, values: Any) -> None:
            values = changes.get(name, values)
            if values is not None:
                add(writer, name, values)
            if name == "output_norm.weight":
                for other, more in (extra or {}).items():
                    add(writer, other, more)

        with self._monkeypatch.context() as patched:
            patched.setattr(gguf.GGUFWriter, "add_tensor", changed)
            return tiny.write_gguf(tiny.tiny_model(**overrides), self._path)


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Changed:
    return Changed(tmp_path, monkeypatch)


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight", "token_embd.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, name: str, changed: Changed) -> None:
    shape = {"blk.1.ffn_up.weight": (96, 64), "output_norm.weight": (64,), "token_embd.weight": (264, 64)}[name]
    values = zeros(*shape)
    values.flat[-1] = value
    with pytest.raises(ModelError, match=rf"changed\.gguf: tensor {name} holds NaN or infinite weights; convert or"):
        Proxy(changed({name: values}))


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        (
            {"blk.0.attn_q.weight": None},
            {},
            r"it holds no tensor for transformers' model\.layers\.0\.self_attn\.q_proj",
        ),
        (
            {"output_norm.weight": None},
            {},
            r"it holds no tensor for transformers' model\.norm\.weight; convert it again",
        ),
        ({"token_embd.weight": None}, {}, r"changed\.gguf: .*token_embd\.weight"),
        ({}, {"blk.0.attn_q_norm.weight": zeros(16)}, r"tensor blk\.0\.attn_q_norm\.weight has no counterpart in"),
        ({}, {"blk.2.ffn_up.weight": zeros(96, 64)}, r"tensor blk\.2\.ffn_up\.weight has no counterpart in"),
        (
            {"blk.0.ffn_up.weight": zeros(95, 64)},
            {},
            r"tensor blk\.0\.ffn_up\.weight is \(95, 64\), .*up_proj.* \(96, 64\)",
        ),
        ({"output_norm.weight": zeros(63)}, {}, r"tensor output_norm\.weight is \(63,\), transformers' .* \(64,\)"),
        (
            {"output_norm.weight": zeros(64).astype(np.int32)},
            {},
            "weights of type I32 cannot be dequantized; convert the proxy to another type",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused_by_name(
    changes: dict[str, Any], extra: dict[str, Any], message: str, changed: Changed
) -> None:
    with pytest.raises(ModelError, match=message):
        Proxy(changed(changes, extra))


def test_a_file_without_a_head_is_tied(changed: Changed) -> None:
    """As llama.cpp takes it."""
    proxy = Proxy(changed({"output.weight": None}))
    model = tiny.tiny_model(tie_word_embeddings=True)
    source = dict(tiny.tiny_model().named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source[name])
    ids = torch.arange(20)[None]
    assert proxy.is_tied
    torch.testing.assert_close(proxy.logits(proxy.hidden(ids)), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_tables_that_no_training_changes_are_not_among_the_tensors(changed: Changed) -> None:
    """Rotary factors of a Llama 3: here one that turns only the first pair, and it has its effect."""
    factors = np.array([1.0, *[1e9] * 7], np.float32)
    proxy = Proxy(changed({}, {"rope_freqs.weight": factors}))
    assert "rope_freqs.weight" not in {t.name for t in proxy.tensors}
    plain, ids = tiny.tiny_model(), torch.arange(20)[None]
    frequencies = plain.model.rotary_emb.inv_freq
    assert not torch.allclose(proxy.model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3)
    frequencies /= torch.from_numpy(factors)
    torch.testing.assert_close(proxy.model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "mamba"])
def test_another_architecture_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", zeros(8, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelError, match=rf"^{path}: architecture {architecture} is not supported; give one of llama, "
    ):
        Proxy(path)


@pytest.mark.parametrize("kept", [0, 3, 40, 20_000, -1], ids=lambda n: f"{n} bytes")
def test_a_truncated_file_is_refused(kept: int, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_llama.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cut\.gguf: (not a readable GGUF file|truncated at [\d,]+ bytes of)"):
        Proxy(path)


def test_garbage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + np.random.default_rng(0).bytes(4096))
    with pytest.raises(ModelError, match=r"noise\.gguf: not a readable GGUF"):
        Proxy(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf: no such file"):
        Proxy(tmp_path / "absent.gguf")
