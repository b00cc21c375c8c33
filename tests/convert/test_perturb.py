"""Carriers and the files of both halves, read back with gguf-py."""

from __future__ import annotations

import dataclasses
import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from adlocal.bundle import MINUS_NAME, PLUS_NAME, Bundle
from adlocal.errors import ConversionError
from adlocal.llamacpp.gguf import GGUFHeader
from adlocal_convert.bundle.gain import Gain
from adlocal_convert.bundle.perturb import Carrier, bundle_id, carriers_sha256, load_carriers, move_carriers, write_half
from adlocal_convert.bundle.presets import QUALITIES, carrier_types
from adlocal_convert.convert import convert
from adlocal_convert.direction.mixture import Mixture
from adlocal_convert.model.proxy import Proxy
from adlocal_convert.options import Options
from adlocal_convert.source.quantize import quantize
from support import tiny
from support.directions import Given, mixture_of, random_values

F16, F32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
EPSILON = 0.37


@pytest.fixture(scope="module", params=["F32", "Q8_0", "Q4_0", "F16", "BF16"])
def proxy(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Proxy:
    if request.param == "F32":
        return Proxy(tiny_llama)
    path = tmp_path_factory.mktemp("perturb") / f"{request.param}.gguf"
    quantize(tiny_llama, path, request.param, 1)
    return Proxy(path)


@pytest.fixture(scope="module")
def direction(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """ĝ of a random gradient."""
    return mixture_of(random_values(proxy.tensors), tmp_path_factory.mktemp("gradient") / "g.safetensors")


def chosen(proxy: Proxy, fraction: float) -> dict[str, gguf.GGMLQuantizationType]:
    """Carriers that the share allows, where nothing speaks for one tensor over another but its size."""
    gain = Gain(slope={t.name: 1 / len(proxy.tensors) for t in proxy.tensors})
    return carrier_types(proxy.tensors, gain, QUALITIES["small"], fraction, proxy.path.stat().st_size)


def loaded(proxy: Proxy, direction: Mixture, fraction: float) -> list[Carrier]:
    return load_carriers(proxy, direction, chosen(proxy, fraction))


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_carriers_are_those_named_in_file_order(proxy: Proxy, direction: Mixture, fraction: float) -> None:
    types, carriers = chosen(proxy, fraction), loaded(proxy, direction, fraction)
    names = [c.name for c in carriers]
    assert set(names) == set(types)
    assert names == [t.name for t in gguf.GGUFReader(proxy.path).tensors if t.name in names]
    assert [c.ggml_type for c in carriers] == [types[name] for name in names]
    assert set(names) >= {t.name for t in proxy.tensors if not t.is_linear}
    for carrier in carriers:
        np.testing.assert_array_equal(carrier.direction, direction.get(carrier.name))


def test_the_energy_of_a_tensor_is_its_share_of_the_gradient(proxy: Proxy, direction: Mixture) -> None:
    values = random_values(proxy.tensors)
    total = sum(float((v.double() ** 2).sum()) for v in values.values())
    assert direction.norm == pytest.approx(total**0.5, rel=1e-9)
    for name, value in values.items():
        assert direction.energy(name) == pytest.approx(float((value.double() ** 2).sum()) / total, rel=1e-9)


def metadata(values: dict[str, tuple[Any, str]]) -> Iterable[tuple[str, Any, str]]:
    return ((key, value, kind) for key, (value, kind) in values.items())


EXTRA = {"adlocal.number": (0.1, "FLOAT64"), "adlocal.names": (["a", "ü"], "STRING"), "adlocal.sign": (-1, "INT32")}


def raw_keys(path: Path) -> dict[str, tuple[Any, bytes]]:
    """Every metadata key: types, and bytes as the file holds them."""
    fields = gguf.GGUFReader(path).fields.values()
    return {f.name: (f.types, b"".join(p.tobytes() for p in f.parts)) for f in fields if not f.name.startswith("GGUF.")}


def test_keys_of_the_base_are_kept_with_type_and_value(proxy: Proxy, direction: Mixture, tmp_path: Path) -> None:
    """Byte for byte, the tokenizer's arrays included; only the bundle's own keys are new."""
    half = tmp_path / "half.gguf"
    write_half(half, gguf.GGUFReader(proxy.path), loaded(proxy, direction, 0.3), EPSILON, metadata(EXTRA))
    base, found = raw_keys(proxy.path), raw_keys(half)
    assert "tokenizer.ggml.tokens" in base
    assert {key: found[key] for key in base} == base
    assert found.keys() - base.keys() == EXTRA.keys()
    header = GGUFHeader(half)
    assert {key: header.get(key) for key in EXTRA} == {key: value for key, (value, _) in EXTRA.items()}


def awkward_base(path: Path) -> Path:
    """Keys of every type, an alignment of its own, an empty array, a token that is no UTF-8."""
    tiny.write_gguf(tiny.tiny_model(), path)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    writer.add_custom_alignment(256)
    kinds = {k.name.lower(): k for k in gguf.GGUFValueType}
    for name, value in {"uint8": 200, "int8": -3, "uint16": 60_000, "int16": -9, "int32": -70_000}.items():
        writer.add_key_value(f"test.{name}", value, kinds[name])
    for name, number in {"uint64": 2**63 + 1, "int64": -(2**60), "float32": 0.1, "float64": 0.1}.items():
        writer.add_key_value(f"test.{name}", number, kinds[name])
    writer.add_key_value("test.bool", True, kinds["bool"])
    writer.add_key_value("test.text", "Größe\0 \u2028", kinds["string"])
    writer.add_key_value("test.bytes", b"\xff\xfe", kinds["string"])
    for sub_type, values in {"float32": [0.1, -1e-9], "bool": [True, False], "int64": [-1, 2**40]}.items():
        writer.add_key_value(f"test.array.{sub_type}", values, kinds["array"], kinds[sub_type])
    writer.add_key_value("test.array.bytes", [b"\xf0\x9f", b"", b"x"], kinds["array"], kinds["string"])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".new").rename(path)


def test_an_awkward_base_is_kept_too(tmp_path: Path) -> None:
    base = awkward_base(tmp_path / "base.gguf")
    half = tmp_path / "half.gguf"
    write_half(half, gguf.GGUFReader(base), [], 0.0, [])
    assert raw_keys(half) == raw_keys(base)
    assert all(t.offset % 256 == 0 for t in GGUFHeader(half).tensors)
    assert {n: t.data.tobytes() for n, t in tensors(half).items()} == {
        n: t.data.tobytes() for n, t in tensors(base).items()
    }


def with_empty_array(base: Path, path: Path, key: str = "test.array.empty") -> Path:
    """Appends a key with an empty array of strings to the header; gguf-py itself refuses to write one."""
    name = key.encode()
    added = len(name).to_bytes(8, "little") + name + (9).to_bytes(4, "little")
    added += (8).to_bytes(4, "little") + (0).to_bytes(8, "little")
    data, reader = base.read_bytes(), gguf.GGUFReader(base)
    fields = [f for f in reader.fields.values() if not f.name.startswith("GGUF.")]
    end = max(f.offset + sum(p.nbytes for p in f.parts) for f in fields)
    n_tensors, n_keys = (int.from_bytes(data[i : i + 8], "little") for i in (8, 16))
    infos_end = max(t.field.offset + sum(p.nbytes for p in t.field.parts) for t in reader.tensors)
    counts = n_tensors.to_bytes(8, "little") + (n_keys + 1).to_bytes(8, "little")
    head = data[:8] + counts + data[24:end] + added + data[end:infos_end]
    path.write_bytes(head + bytes(-len(head) % reader.alignment) + data[reader.data_offset :])
    return path


def test_an_empty_array_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    base = with_empty_array(tiny_llama, tmp_path / "base.gguf")
    assert GGUFHeader(base).get("test.array.empty") == []
    write_half(tmp_path / "half.gguf", gguf.GGUFReader(base), [], 0.0, [])
    assert raw_keys(tmp_path / "half.gguf") == raw_keys(base)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_bulk_is_the_bases_and_carriers_are_moved_both_ways(
    proxy: Proxy, direction: Mixture, fraction: float, tmp_path: Path
) -> None:
    """Oracle: θ ± εĝ in float64, from the file's own weights. The bound is that of four roundings to float32 (of ĝ, ε,
    the product and the sum) and, for F16, of one more to 11 bits or, under its least normal number, to 2⁻²⁴."""
    values, base = random_values(proxy.tensors), tensors(proxy.path)
    norm = sum(float((v.double() ** 2).sum()) for v in values.values()) ** 0.5
    carriers = loaded(proxy, direction, fraction)
    moved = {c.name for c in carriers}
    for sign in (1, -1):
        half = tmp_path / f"{sign}.gguf"
        write_half(half, gguf.GGUFReader(proxy.path), carriers, sign * EPSILON, [])
        found = tensors(half)
        assert list(found) == list(base)
        for name, stored in found.items():
            np.testing.assert_array_equal(stored.shape, base[name].shape)
            if name not in moved:
                assert stored.tensor_type == base[name].tensor_type
                assert stored.data.tobytes() == base[name].data.tobytes()
                continue
            narrow = stored.data.ndim > 1 and base[name].tensor_type.name not in ("F32", "BF16")
            assert stored.tensor_type == (F16 if narrow else F32)
            weights = gguf.dequantize(base[name].data, base[name].tensor_type).astype(np.float64)
            step = EPSILON * values[name].double().numpy() / norm
            expected, room = weights + sign * step, np.abs(weights) + np.abs(step)
            bound = 4 * 2.0**-24 * room + (2.0**-11 * np.abs(expected) + 2.0**-25 if narrow else 0)
            assert np.all(np.abs(stored.data - expected) <= bound)
            assert not np.array_equal(stored.data, weights)


def test_a_half_is_for_its_owner_alone(proxy: Proxy, tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    write_half(half, gguf.GGUFReader(proxy.path), [], 0.0, [])
    assert stat.S_IMODE(half.stat().st_mode) == 0o600


def test_moving_carriers_equals_writing_afresh(proxy: Proxy, direction: Mixture, tmp_path: Path) -> None:
    carriers = loaded(proxy, direction, 0.3)
    moved, fresh = tmp_path / "moved.gguf", tmp_path / "fresh.gguf"
    write_half(moved, gguf.GGUFReader(proxy.path), carriers, 0.0, [])
    for step in (5.0, -EPSILON):
        move_carriers(moved, carriers, step)
    write_half(fresh, gguf.GGUFReader(proxy.path), carriers, -EPSILON, [])
    assert moved.read_bytes() == fresh.read_bytes()


def test_the_hash_is_of_the_carriers_bytes_in_the_file(proxy: Proxy, direction: Mixture, tmp_path: Path) -> None:
    carriers = loaded(proxy, direction, 0.3)
    half = tmp_path / "half.gguf"
    write_half(half, gguf.GGUFReader(proxy.path), carriers, EPSILON, [])
    names = {c.name for c in carriers}
    data = b"".join(t.data.tobytes() for t in gguf.GGUFReader(half).tensors if t.name in names)
    assert carriers_sha256(carriers, EPSILON) == hashlib.sha256(data).hexdigest()


def test_weights_beyond_f16_are_refused_as_carriers(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 40_000
    quantize(tiny.write_gguf(model, tmp_path / "f32.gguf"), tmp_path / "f16.gguf", "F16", 1)
    proxy = Proxy(tmp_path / "f16.gguf")
    direction = Given(random_values(proxy.tensors))
    with pytest.raises(ConversionError, match=r"output\.weight has weights too large for F16 carriers"):
        load_carriers(proxy, direction, chosen(proxy, 1.0))
    proxy = Proxy(tmp_path / "f32.gguf")
    assert len(load_carriers(proxy, direction, chosen(proxy, 1.0))) == len(proxy.tensors)


def test_the_same_conversion_twice_gives_the_same_bundle(
    tiny_llama: Path, tiny_traces: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient computed anew, too."""
    monkeypatch.setenv("ADLOCAL_CACHE", str(tmp_path / "cache"))
    options = Options(str(tiny_llama), {"traces": tiny_traces}, tmp_path / "b", carriers=1.0, n_threads=1)
    again = convert(options, lambda line: None)
    assert again == Bundle.open(tiny_bundle)
    assert again.id == bundle_id(again)
    for name in (PLUS_NAME, MINUS_NAME):
        assert (tmp_path / "b" / name).read_bytes() == (tiny_bundle / name).read_bytes()


@pytest.mark.parametrize(
    "field", ["base_sha256", "capability_sha256", "capability_weights", "epsilon", "carriers_sha256"]
)
def test_the_id_follows_from_what_the_bundle_is_made_of(field: str, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    other: Any = {"epsilon": 0.123, "base_sha256": "0" * 64, "capability_weights": [0.5]}.get(field, ["0" * 64])
    assert bundle_id(dataclasses.replace(bundle, **{field: other})) != bundle.id
    assert bundle_id(dataclasses.replace(bundle, forced=True)) == bundle.id
