"""The gradient and the directional derivative, against a llama written out here in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from adlocal.errors import ConversionError
from adlocal.traces import EncodedTrace
from adlocal_convert.direction import gradient as gradient_module
from adlocal_convert.direction.gradient import Gradient, Settings, compute_gradient
from adlocal_convert.direction.tensor_file import TensorFile
from adlocal_convert.model import weights as weights_module
from adlocal_convert.model.loss import directional_derivative, trace_losses
from adlocal_convert.model.proxy import Proxy
from support import tiny

N_LAYERS, N_HEAD, N_HEAD_KV = 2, 4, 2
EPS, BASE = 1e-6, 10000.0  # what transformers gives a llama by default
MATRIX, TABLE, HEAD, NORM = "blk.0.attn_q.weight", "token_embd.weight", "output.weight", "output_norm.weight"
Weights = Mapping[str, torch.Tensor]
Values = dict[str, torch.Tensor]

# Both sides round to float32 (2⁻²⁴ = 6e-8) thousands of times: 4.3e-7 was measured, and a wrong weighting of one trace
# in six, or a target too many, costs over 1e-2.
CLOSE = 1e-6


def trace(seed: int, n_given: int, n_targets: int) -> EncodedTrace:
    """Random tokens."""
    tokens = np.random.default_rng(seed).integers(0, tiny.N_VOCAB, n_given + n_targets).tolist()
    return EncodedTrace(f"trace {seed}", tokens, [False] * n_given + [True] * n_targets)


TRACES = [trace(0, 5, 1), trace(1, 3, 20), trace(2, 8, 4), trace(3, 1, 9), trace(4, 12, 2), trace(5, 2, 30)]
GROUPED = pytest.mark.parametrize("bytes_per_weight", [4.0, 1.4], ids=["at once", "in groups"])
LONGEST_FIRST = [TRACES[i] for i in (5, 1, 4, 2, 3, 0)]


def open_proxy(directory: Path, architecture: str = "llama", **overrides: Any) -> Proxy:
    torch.set_num_threads(1)  # for models this small, more threads only wait for each other
    return Proxy(tiny.write_gguf(tiny.tiny_model(architecture, **overrides), directory / f"{architecture}.gguf"))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Proxy:
    return open_proxy(tmp_path_factory.mktemp("gradient"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Proxy:
    return open_proxy(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def names_of(proxy: Proxy) -> list[str]:
    return [t.name for t in proxy.tensors]


def as_double(proxy: Proxy) -> Values:
    """The file's weights, read by gguf-py, in the file's order."""
    stored = gguf.GGUFReader(proxy.path).tensors
    return {t.name: torch.from_numpy(np.array(t.data)).double().requires_grad_() for t in stored}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions, (n_head, n_tokens, size), as llama.cpp has them: component 2j turns with component 2j + 1."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double()[:, None] * BASE ** (-torch.arange(half).double() / half)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten(-2)


def attention(w: Weights, layer: str, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (x @ w[f"{layer}.attn_{part}.weight"].T for part in "qkv")
    q, k, v = (t.view(len(x), n, -1).transpose(0, 1) for t, n in ((q, N_HEAD), (k, N_HEAD_KV), (v, N_HEAD_KV)))
    q, k = rotated(q), rotated(k)
    k, v = (t.repeat_interleave(N_HEAD // N_HEAD_KV, 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
    out: torch.Tensor = mixed @ w[f"{layer}.attn_output.weight"].T
    return out


def logits(w: Weights, tokens: Sequence[int]) -> torch.Tensor:
    """A llama in float64, (n_tokens, n_vocab); a tied one has no head of its own."""
    x = w[TABLE][torch.tensor(tokens)]
    for i in range(N_LAYERS):
        layer = f"blk.{i}"
        x = x + attention(w, layer, norm(x, w[f"{layer}.attn_norm.weight"]))
        y = norm(x, w[f"{layer}.ffn_norm.weight"])
        gate, up = (y @ w[f"{layer}.ffn_{part}.weight"].T for part in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{layer}.ffn_down.weight"].T
    rows: torch.Tensor = norm(x, w[NORM]) @ w.get(HEAD, w[TABLE]).T
    return rows


def own_loss(w: Weights, trace: EncodedTrace) -> torch.Tensor:
    rows = logits(w, trace.tokens)
    terms = [
        rows[i - 1].exp().sum().log() - rows[i - 1, trace.tokens[i]] for i, counts in enumerate(trace.targets) if counts
    ]
    return torch.stack(terms).mean()


def own_gradient(proxy: Proxy, traces: Sequence[EncodedTrace]) -> tuple[float, Values]:
    w = as_double(proxy)
    loss = torch.stack([own_loss(w, t) for t in traces]).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in w.items() if p.grad is not None}


def flat(values: Weights) -> torch.Tensor:
    return torch.cat([values[name].double().flatten() for name in sorted(values)])


def apart(a: Weights, b: Weights) -> float:
    """‖a − b‖ / ‖b‖"""
    assert a.keys() == b.keys()
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def values_of(gradient: Gradient) -> Values:
    return {name: gradient.file.get(name) for name in gradient.file}


Compute = Callable[..., Gradient]


@pytest.fixture
def compute(proxy: Proxy, tmp_path: Path) -> Compute:
    """Computes into a file of its own, over all tensors of the plain proxy unless told otherwise."""

    def compute(
        traces: Sequence[EncodedTrace] = TRACES,
        names: Sequence[str] | None = None,
        settings: Settings = Settings(),  # noqa: B008  # frozen
        *,
        of: Proxy = proxy,
        file: str = "g.safetensors",
        progress: Callable[[float, float], None] = lambda n, loss: None,
    ) -> Gradient:
        return compute_gradient(of, traces, names or names_of(of), tmp_path / file, settings, progress)

    return compute


@pytest.fixture(scope="module")
def expected(proxy: Proxy) -> tuple[float, Values]:
    return own_gradient(proxy, TRACES)


@GROUPED
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "whole"])
@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_gradient_is_that_of_the_mean_over_traces_of_each_traces_mean(
    compute: Compute, expected: tuple[float, Values], batch_size: int, checkpointing: bool, bytes_per_weight: float
) -> None:
    found = compute(settings=Settings(batch_size, checkpointing, bytes_per_weight))
    loss, values = expected
    assert found.loss == pytest.approx(loss, rel=CLOSE)
    assert apart(values_of(found), values) < CLOSE
    for name, value in values.items():  # also where a tensor's share of the whole is small
        assert apart({name: found.file.get(name)}, {name: value}) < 10 * CLOSE, name
    assert (found.n_traces, found.n_tokens) == (6, 66)


@pytest.mark.parametrize(
    ("settings", "most"), [(Settings.low_memory(), 1.4), (Settings(6, bytes_per_weight=2.5), 2.5)], ids=str
)
def test_the_sum_in_memory_takes_no_more_than_it_may(
    proxy: Proxy,
    compute: Compute,
    expected: tuple[float, Values],
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    most: float,
) -> None:
    """In bytes a weight of the whole gradient; the groups together hold each tensor once, in the file's order."""
    held: list[list[str]] = []
    create = TensorFile.create

    def spy(path: Path, shapes: Mapping[str, tuple[int, ...]], *, in_memory: bool = False) -> TensorFile:
        if in_memory:
            held.append([*shapes])
        return create(path, shapes, in_memory=in_memory)

    monkeypatch.setattr(TensorFile, "create", spy)
    found = compute(settings=settings)
    n_weights = {t.name: t.n_weights for t in proxy.tensors}
    sizes = [4 * sum(n_weights[name] for name in group) / sum(n_weights.values()) for group in held]
    assert max(sizes) <= most
    assert sum(sizes) == pytest.approx(4)
    assert [name for group in held for name in group] == [*found.file] == names_of(proxy)
    assert apart(values_of(found), expected[1]) < CLOSE


def test_every_tensor_may_be_a_group_of_its_own(compute: Compute, expected: tuple[float, Values]) -> None:
    found = compute(settings=Settings(6, bytes_per_weight=0.0))
    assert apart(values_of(found), expected[1]) < CLOSE


def test_low_memory_is_one_trace_checkpointed_in_groups_and_pieces() -> None:
    low, plain = Settings.low_memory(), Settings()
    assert (low.batch_size, low.checkpointing) == (1, True)
    assert low.bytes_per_weight < plain.bytes_per_weight == 4
    assert low.largest_logits < plain.largest_logits


@pytest.mark.parametrize("n_rows", [1, 30, 1000])
def test_matrices_may_be_read_in_bands(
    proxy: Proxy, compute: Compute, monkeypatch: pytest.MonkeyPatch, n_rows: int
) -> None:
    """30 rows divide neither 64 nor 96; 1 row also where rows are longer than the largest band."""
    monkeypatch.setattr(weights_module, "_LARGEST_BAND", 64 * n_rows)
    assert len([*proxy.weights.bands(HEAD)]) == -(-tiny.N_VOCAB // n_rows)
    found = compute(TRACES[:3])
    assert apart(values_of(found), own_gradient(proxy, TRACES[:3])[1]) < CLOSE
    check_derivative(proxy, None)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "whole"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("n_logits", [1, 5 * tiny.N_VOCAB + 1])
def test_the_head_may_be_computed_in_pieces(
    compute: Compute,
    expected: tuple[float, Values],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    checkpointing: bool,
    n_logits: int,
) -> None:
    sizes: list[int] = []
    head = Proxy.logits

    def spy(self: Proxy, states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return head(self, states)

    monkeypatch.setattr(Proxy, "logits", spy)
    found = compute(settings=Settings(batch_size, checkpointing, largest_logits=n_logits))
    assert max(sizes) == max(1, n_logits // tiny.N_VOCAB)
    assert found.loss == pytest.approx(expected[0], rel=CLOSE)
    assert apart(values_of(found), expected[1]) < CLOSE


@pytest.mark.parametrize("settings", [Settings(), Settings.low_memory()], ids=["plain", "low memory"])
def test_a_tied_tables_gradient_is_that_of_both_its_uses(tied: Proxy, compute: Compute, settings: Settings) -> None:
    found = compute(settings=settings, of=tied)
    loss, values = own_gradient(tied, TRACES)
    assert HEAD not in found.file
    assert found.loss == pytest.approx(loss, rel=CLOSE)
    assert apart(values_of(found), values) < CLOSE
    assert apart({TABLE: found.file.get(TABLE)}, {TABLE: values[TABLE]}) < CLOSE


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gradient_equals_transformers_own(compute: Compute, tmp_path: Path, architecture: str, tie: bool) -> None:
    """Biases, too. Both are float32 here, so their errors add."""
    model = tiny.tiny_model(architecture, tie_word_embeddings=tie)
    found = compute(TRACES[1:4], of=open_proxy(tmp_path, architecture, tie_word_embeddings=tie))
    losses = []
    for t in TRACES[1:4]:
        rows = model(input_ids=torch.tensor([t.tokens])).logits[0, :-1]
        labels = torch.tensor([i if counts else -100 for i, counts in zip(t.tokens, t.targets, strict=True)])[1:]
        losses.append(torch.nn.functional.cross_entropy(rows, labels))
    torch.stack(losses).mean().backward()
    table = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), N_LAYERS)
    expected = {}
    for parameter, p in model.named_parameters():
        name = str(table.get_name(parameter, try_suffixes=(".weight", ".bias")))
        n_head = {"attn_q": N_HEAD, "attn_k": N_HEAD_KV}.get(name.split(".")[-2], 0) if architecture == "llama" else 0
        expected[name] = torch.from_numpy(tiny.interleaved(p.grad.numpy(), n_head)) if n_head else p.grad
    assert ("blk.1.attn_k.bias" in expected) == (architecture == "qwen2")
    assert apart(values_of(found), expected) < 2 * CLOSE
    for name, value in expected.items():
        # The bias of K shifts all scores of a row alike at rotation 0 and little elsewhere: its gradient is rounding.
        tolerance = 1e-3 if name.endswith("attn_k.bias") else 20 * CLOSE
        assert apart({name: found.file.get(name)}, {name: value}) < tolerance, name


@pytest.mark.parametrize(
    "names",
    [[MATRIX], [NORM], [TABLE], [HEAD], [TABLE, "blk.1.ffn_norm.weight", "blk.1.ffn_down.weight"]],
    ids=", ".join,
)
def test_only_the_named_tensors_are_computed(
    proxy: Proxy,
    compute: Compute,
    expected: tuple[float, Values],
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
) -> None:
    added: list[str] = []
    sink = gradient_module._Accumulator
    for method in ("add_product", "add_rows"):
        monkeypatch.setattr(sink, method, noting(added, getattr(sink, method), at=1))
    found = compute(names=names)
    assert set(added) == {name for name in names if "norm" not in name}
    assert [*found.file] == [name for name in names_of(proxy) if name in names]
    assert apart(values_of(found), {name: expected[1][name] for name in names}) < 10 * CLOSE


def test_values_are_float32_of_every_tensor_and_the_model_is_left_clean(proxy: Proxy, compute: Compute) -> None:
    before = {name: p.detach().clone() for name, p in proxy.model.named_parameters()}
    forwards = [layer.forward for layer in proxy.model.model.layers]
    found = compute(TRACES[:2], settings=Settings.low_memory())
    for t in proxy.tensors:
        assert found.file.get(t.name).shape == t.shape
        assert found.file.get(t.name).dtype == torch.float32
    for name, parameter in proxy.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert [layer.forward for layer in proxy.model.model.layers] == forwards
    assert proxy.stream.sink is None


def test_gradients_left_by_others_do_not_enter(proxy: Proxy, compute: Compute) -> None:
    clean = compute(TRACES[:1], file="clean")
    for parameter in proxy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        assert apart(values_of(compute(TRACES[:1])), values_of(clean)) == 0
    finally:
        proxy.model.zero_grad()


def test_the_order_of_traces_does_not_matter(compute: Compute) -> None:
    """Up to the rounding of a sum of six: traces of one length keep their order."""
    assert apart(values_of(compute(TRACES[::-1], file="reversed")), values_of(compute())) < CLOSE


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradient_of_a_union_is_the_weighted_mean_of_its_parts(compute: Compute, n: int) -> None:
    first, second, union = compute(TRACES[:n], file="a"), compute(TRACES[n:], file="b"), compute(file="c")
    share, other = n / len(TRACES), values_of(second)
    mean = {name: share * value + (1 - share) * other[name] for name, value in values_of(first).items()}
    assert apart(values_of(union), mean) < CLOSE
    assert union.loss == pytest.approx(share * first.loss + (1 - share) * second.loss, rel=CLOSE)


def test_a_trace_weighs_the_same_whatever_its_length(proxy: Proxy, compute: Compute) -> None:
    """1 and 30 targets: their mean is far from the mean over all 31 tokens."""
    short, long = TRACES[0], TRACES[5]
    losses = [own_loss(as_double(proxy), t).item() for t in (short, long)]
    found = compute([short, long])
    assert found.loss == pytest.approx(sum(losses) / 2, rel=CLOSE)
    assert abs(found.loss - (losses[0] + 30 * losses[1]) / 31) > 1e-2


def test_losses_of_a_batch_are_those_of_its_traces(proxy: Proxy) -> None:
    """Padding and neighbours have no effect, and the order is the batch's."""
    w = as_double(proxy)
    losses = trace_losses(proxy, TRACES).tolist()
    assert losses == pytest.approx([own_loss(w, t).item() for t in TRACES], rel=CLOSE)
    assert losses == pytest.approx([trace_losses(proxy, [t]).item() for t in TRACES], rel=CLOSE)


def test_only_targets_count(proxy: Proxy) -> None:
    """What comes after the last target has no effect at all, and one target alone is its own −log p."""
    base = trace(7, 6, 3)
    longer = EncodedTrace("longer", [*base.tokens, 9, 8, 7], [*base.targets, False, False, False])
    assert trace_losses(proxy, [longer]).item() == pytest.approx(trace_losses(proxy, [base]).item(), rel=CLOSE)
    rows = logits(as_double(proxy), base.tokens).log_softmax(-1)
    for i in range(1, len(base.tokens)):
        alone = EncodedTrace("alone", base.tokens, [j == i for j in range(len(base.tokens))])
        assert trace_losses(proxy, [alone]).item() == pytest.approx(-rows[i - 1, base.tokens[i]].item(), rel=CLOSE)


def test_targets_may_be_interrupted(proxy: Proxy) -> None:
    """As in a conversation with several assistant turns."""
    tokens = trace(8, 4, 8).tokens
    gapped = EncodedTrace("gapped", tokens, [i in (3, 4, 9) for i in range(len(tokens))])
    found = trace_losses(proxy, [gapped, TRACES[0]])[0].item()
    assert found == pytest.approx(own_loss(as_double(proxy), gapped).item(), rel=CLOSE)


@pytest.mark.parametrize(("wanted", "n_reads"), [(True, 3), (False, 2), (None, 2)])
def test_checkpointed_layers_are_computed_anew(
    proxy: Proxy, compute: Compute, monkeypatch: pytest.MonkeyPatch, wanted: bool | None, n_reads: int
) -> None:
    """A matrix is read in the forward pass, in the backward pass, and where it is computed anew."""
    assert reads_of(MATRIX, proxy, monkeypatch, lambda: compute(settings=Settings(6, wanted))) == n_reads


@pytest.mark.parametrize(("longest", "n_reads"), [(31, 3), (32, 2)])
def test_long_traces_are_checkpointed_unless_told_otherwise(
    proxy: Proxy, compute: Compute, monkeypatch: pytest.MonkeyPatch, longest: int, n_reads: int
) -> None:
    monkeypatch.setattr(gradient_module, "LONG_TRACE", longest)
    assert reads_of(MATRIX, proxy, monkeypatch, lambda: compute(settings=Settings(6))) == n_reads


def reads_of(name: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> int:
    read: list[str] = []
    monkeypatch.setattr(proxy.weights, "bands", noting(read, proxy.weights.bands))
    act()
    return read.count(name)


def noting(seen: list[str], function: Callable[..., Any], at: int = 0) -> Callable[..., Any]:
    """The function, which notes its argument `at`."""

    def noted(*args: Any) -> Any:
        seen.append(args[at])
        return function(*args)

    return noted


@pytest.mark.parametrize("batch_size", [1, 4])
def test_progress_is_the_number_just_done_and_the_running_loss(proxy: Proxy, compute: Compute, batch_size: int) -> None:
    """Longest first, whatever the batch size."""
    told: list[tuple[float, float]] = []
    found = compute(settings=Settings(batch_size), progress=lambda *figures: told.append(figures))
    losses = [own_loss(as_double(proxy), t).item() for t in LONGEST_FIRST]
    ends = [*range(batch_size, 6, batch_size), 6]
    assert [n for n, _ in told] == [0, *(b - a for a, b in zip([0, *ends], ends, strict=False))]
    assert [loss for _, loss in told] == pytest.approx([0.0, *(sum(losses[:n]) / n for n in ends)], rel=CLOSE)
    assert told[-1][1] == pytest.approx(found.loss)


@GROUPED
def test_progress_adds_up_to_the_traces(
    compute: Compute, interruptions: Interruptions, bytes_per_weight: float
) -> None:
    """Each group of tensors is its share of the whole, and what was done before an interruption counts."""
    told: list[float] = []
    settings = Settings(2, bytes_per_weight=bytes_per_weight)
    compute(settings=settings, file="other", progress=lambda n, loss: told.append(n))
    assert sum(told) == pytest.approx(6)
    n_batches = len(interruptions.done) // 2
    with pytest.raises(KeyboardInterrupt):
        compute(settings=settings, progress=interruptions.after(2 * (n_batches - 1)))
    told.clear()
    compute(settings=settings, progress=lambda n, loss: told.append(n))
    assert sum(told) == pytest.approx(6)


@GROUPED
def test_the_file_is_whole_private_and_alone_when_done(
    compute: Compute, tmp_path: Path, bytes_per_weight: float
) -> None:
    path = tmp_path / "g.safetensors"
    seen: list[bool] = []
    found = compute(
        settings=Settings(bytes_per_weight=bytes_per_weight), progress=lambda n, loss: seen.append(path.exists())
    )
    assert not any(seen)
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o600
    opened = Gradient.open(path)
    assert opened is not None
    assert (opened.loss, opened.n_traces, opened.n_tokens) == (found.loss, found.n_traces, found.n_tokens)
    assert apart(values_of(opened), values_of(found)) == 0


def test_what_is_no_gradient_is_not_opened(tmp_path: Path) -> None:
    assert Gradient.open(tmp_path / "absent") is None
    for content in SPOILT.values():
        (tmp_path / "spoilt").write_bytes(content)
        assert Gradient.open(tmp_path / "spoilt") is None


SPOILT = {
    "empty": b"",
    "three bytes": b"abc",
    "noise": np.random.default_rng(0).bytes(4096),
    "no JSON": b"\x08" + bytes(7) + b"not json" + bytes(99),
}


class Interruptions:
    """Saves after every batch, and counts which traces the losses are computed of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(gradient_module, "SAVE_SECONDS", 0)
        # Saving takes 0 s on this clock, so that the next batch is saved, too.
        monkeypatch.setattr(gradient_module, "time", SimpleNamespace(monotonic=lambda: 0.0))
        monkeypatch.setattr(gradient_module, "trace_losses", self._losses)

    def _losses(self, proxy: Proxy, traces: Sequence[EncodedTrace], *args: Any) -> torch.Tensor:
        self.done += [t.where for t in traces]
        return trace_losses(proxy, traces, *args)

    def after(self, n_traces: int) -> Callable[[float, float], None]:
        """A progress that interrupts when that many more traces are done; their last batch is not saved then."""
        limit = len(self.done) + n_traces

        def progress(n: float, loss: float) -> None:
            if len(self.done) >= limit:
                raise KeyboardInterrupt

        return progress


@pytest.fixture
def interruptions(monkeypatch: pytest.MonkeyPatch) -> Interruptions:
    return Interruptions(monkeypatch)


WHERE = [t.where for t in LONGEST_FIRST]


def n_groups(proxy: Proxy, bytes_per_weight: float) -> int:
    return len(gradient_module._groups(proxy, names_of(proxy), bytes_per_weight))


@pytest.mark.parametrize(
    ("size", "following", "n_saved"), [(1, 4, 3), (2, 1, 2), (2, 3, 2), (1, 1, 9), (2, 4, 6), (3, 2, 12)]
)
def test_an_interrupted_computation_is_gone_on_with(
    proxy: Proxy,
    compute: Compute,
    expected: tuple[float, Values],
    interruptions: Interruptions,
    tmp_path: Path,
    size: int,
    following: int,
    n_saved: int,
) -> None:
    """With another batch size, too. What was saved is not done again; the batch that progress stopped was not saved.

    More than 6 traces are those of the following groups of tensors.
    """
    bytes_per_weight = 4.0 if n_saved < 6 else 1.4
    with pytest.raises(KeyboardInterrupt):
        compute(settings=Settings(size, None, bytes_per_weight), progress=interruptions.after(n_saved + size))
    assert Gradient.open(tmp_path / "g.safetensors") is None
    interruptions.done.clear()
    found = compute(settings=Settings(following, None, bytes_per_weight))
    assert interruptions.done == (WHERE * n_groups(proxy, bytes_per_weight))[n_saved:]
    assert (found.n_traces, found.n_tokens) == (6, 66)
    assert found.loss == pytest.approx(expected[0], rel=CLOSE)
    assert apart(values_of(found), expected[1]) < CLOSE
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


def test_a_computation_may_be_interrupted_after_every_batch(
    compute: Compute, expected: tuple[float, Values], interruptions: Interruptions
) -> None:
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            compute(settings=Settings(1), progress=interruptions.after(2))
    found = compute(settings=Settings(1))
    assert interruptions.done == [WHERE[0], *(where for where in WHERE[1:] for _ in range(2))]
    assert found.loss == pytest.approx(expected[0], rel=CLOSE)
    assert apart(values_of(found), expected[1]) < CLOSE


@pytest.mark.parametrize(
    ("bytes_per_weight", "n_saves"), [*((4.0, n) for n in range(4)), (1.4, 3), (1.4, 6), (1.4, None)]
)
def test_saving_may_be_interrupted(
    proxy: Proxy,
    compute: Compute,
    expected: tuple[float, Values],
    interruptions: Interruptions,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bytes_per_weight: float,
    n_saves: int | None,
) -> None:
    """Each group is saved after each of three batches and when it is done; None: interrupted as all are joined."""
    settings, groups = Settings(2, None, bytes_per_weight), n_groups(proxy, bytes_per_weight)
    n_saves = 4 * groups if n_saves is None else n_saves
    saves = iter(range(99))
    true = TensorFile.save_as

    def save_as(self: TensorFile, path: Path) -> None:
        if next(saves) == n_saves:
            raise KeyboardInterrupt
        true(self, path)

    with monkeypatch.context() as broken:
        broken.setattr(TensorFile, "save_as", save_as)
        with pytest.raises(KeyboardInterrupt):
            compute(settings=settings)
    interruptions.done.clear()
    found = compute(settings=settings)
    assert interruptions.done == (WHERE * groups)[6 * (n_saves // 4) + 2 * (n_saves % 4) :]
    assert (found.n_traces, found.n_tokens) == (6, 66)
    assert apart(values_of(found), expected[1]) < CLOSE
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


def test_without_a_save_it_begins_anew(
    compute: Compute, expected: tuple[float, Values], interruptions: Interruptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_module, "SAVE_SECONDS", 30)
    with pytest.raises(KeyboardInterrupt):
        compute(settings=Settings(2), progress=interruptions.after(4))
    interruptions.done.clear()
    found = compute(settings=Settings(2))
    assert interruptions.done == WHERE
    assert apart(values_of(found), expected[1]) < CLOSE


def interrupted_losses(proxy: Proxy, traces: Sequence[EncodedTrace], largest_logits: int) -> torch.Tensor:
    raise KeyboardInterrupt


def interrupted_add(self: Any, name: str, *args: Any) -> None:
    if name == MATRIX:  # the gradients of everything behind it are in the file by now
        raise KeyboardInterrupt
    true_add(self, name, *args)


true_add = gradient_module._Accumulator.add_product


@pytest.mark.parametrize("moment", ["losses", "backward"])
def test_nothing_of_a_batch_that_was_interrupted_within_is_in_the_sum(
    compute: Compute,
    expected: tuple[float, Values],
    interruptions: Interruptions,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    def progress(n: float, loss: float) -> None:
        if n and moment == "losses":
            broken.setattr(gradient_module, "trace_losses", interrupted_losses)
        elif n:
            broken.setattr(gradient_module._Accumulator, "add_product", interrupted_add)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        compute(settings=Settings(2), progress=progress)
    interruptions.done.clear()
    found = compute(settings=Settings(2))
    assert interruptions.done == WHERE[2:]
    assert found.loss == pytest.approx(expected[0], rel=CLOSE)
    assert apart(values_of(found), expected[1]) < CLOSE


@pytest.mark.parametrize("content", SPOILT.values(), ids=SPOILT.keys())
@pytest.mark.parametrize("suffix", [".new", ".partial"])
def test_stray_files_are_ignored(
    compute: Compute, expected: tuple[float, Values], tmp_path: Path, suffix: str, content: bytes
) -> None:
    (tmp_path / f"g.safetensors{suffix}").write_bytes(content)
    assert apart(values_of(compute()), expected[1]) < CLOSE
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9999])
def test_a_truncated_partial_is_ignored(
    compute: Compute, expected: tuple[float, Values], interruptions: Interruptions, tmp_path: Path, share: float
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compute(progress=interruptions.after(6))
    partial = tmp_path / "g.safetensors.partial"
    whole = partial.read_bytes()
    partial.write_bytes(whole[: int(len(whole) * share)])
    interruptions.done.clear()
    assert apart(values_of(compute()), expected[1]) < CLOSE
    assert interruptions.done == WHERE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused_with_its_trace(
    compute: Compute, interruptions: Interruptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float
) -> None:
    def losses(proxy: Proxy, traces: Sequence[EncodedTrace], largest_logits: int) -> torch.Tensor:
        bad = torch.tensor([value if t.where == "trace 2" else 0.0 for t in traces])
        return trace_losses(proxy, traces, largest_logits) + bad

    monkeypatch.setattr(gradient_module, "trace_losses", losses)
    with pytest.raises(ConversionError, match=rf"^trace 2: the proxy's loss is {value}; check the model and this"):
        compute(settings=Settings(3))
    assert not (tmp_path / "g.safetensors").exists()


def test_a_model_that_overflows_is_refused(tmp_path: Path, compute: Compute) -> None:
    """Finite weights can have logits that are not."""
    proxy = open_proxy(tmp_path)
    with torch.no_grad():
        proxy.small[NORM].mul_(1e38)
    with pytest.raises(ConversionError, match="trace 5: the proxy's loss is nan"):
        compute(of=proxy)


class Moving:
    """A direction that is nothing but the protocol."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def get(self, name: str) -> torch.Tensor:
        return self._values[name]

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return self._values[name][ids]


def unit(proxy: Proxy, seed: int, names: Iterable[str] | None = None) -> Values:
    """A random unit direction over some tensors, all by default."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        t.name: torch.randn(t.shape, generator=generator) for t in proxy.tensors if names is None or t.name in names
    }
    length = flat(chosen).norm().float()
    return {name: value / length for name, value in chosen.items()}


TANGENTS: list[list[str] | None] = [None, [NORM], ["blk.0.ffn_norm.weight"], [MATRIX], ["blk.1.attn_k.weight"], [TABLE]]


@pytest.mark.parametrize("names", [*TANGENTS, [HEAD]], ids=lambda names: str(names and names[0]))
def test_directional_derivative_equals_central_differences(proxy: Proxy, names: list[str] | None) -> None:
    check_derivative(proxy, names)


@pytest.mark.parametrize("names", [None, [TABLE]], ids=lambda names: str(names and names[0]))
def test_a_tied_table_moves_in_both_its_uses(tied: Proxy, names: list[str] | None) -> None:
    check_derivative(tied, names)


def check_derivative(proxy: Proxy, names: list[str] | None) -> None:
    """Oracle in float64: h = 1e-3 leaves an error of order h² (3e-4 at h = 0.1), so float32 sets the tolerance."""
    held_out, direction, h = TRACES[1], unit(proxy, 1, names), 1e-3
    w = {name: p.detach() for name, p in as_double(proxy).items()}
    at = [i - 1 for i, counts in enumerate(held_out.targets) if counts]
    plus, minus = (
        logits(
            {name: p + step * direction.get(name, torch.zeros(())).double() for name, p in w.items()}, held_out.tokens
        )
        for step in (h, -h)
    )
    expected = (plus - minus)[at] / (2 * h)
    values, derivative = directional_derivative(proxy, Moving(direction), held_out)
    assert derivative.shape == values.shape == (held_out.n_targets, tiny.N_VOCAB)
    assert derivative.dtype == values.dtype == torch.float32
    assert float((derivative - expected).norm() / expected.norm()) < 1e-5
    plain = logits(w, held_out.tokens)[at]
    assert float((values - plain).norm() / plain.norm()) < 5 * CLOSE


class Product:
    """A sink of inner products with a direction."""

    def __init__(self, direction: Values) -> None:
        self.total, self._direction = 0.0, direction

    def wants(self, name: str) -> bool:
        return name in self._direction

    def add_product(self, name: str, first_row: int, dy: torch.Tensor, x: torch.Tensor) -> None:
        moved = self._direction[name][first_row : first_row + dy.shape[1]]
        self.total += float((dy.T @ x * moved).double().sum())

    def add_rows(self, name: str, ids: torch.Tensor, gradients: torch.Tensor) -> None:
        self.total += float((gradients * self._direction[name][ids]).double().sum())


@pytest.mark.parametrize("which", ["proxy", "tied"])
def test_directional_derivative_is_the_gradient_of_each_logit_times_the_direction(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Forward mode against reverse mode."""
    proxy: Proxy = request.getfixturevalue(which)
    held_out, direction = TRACES[2], unit(proxy, 2)
    _, derivative = directional_derivative(proxy, Moving(direction), held_out)
    position = held_out.targets.index(True) - 1
    for token in (0, 17, 263):
        sink = Product(direction)
        with proxy.stream.collecting(sink):
            proxy.logits(proxy.hidden(torch.tensor([held_out.tokens])))[0, position, token].backward()
        small = sum(
            float((p.grad * direction[name]).double().sum()) for name, p in proxy.small.items() if p.grad is not None
        )
        proxy.model.zero_grad()
        bound = 1e-5 * float(derivative[0].abs().max())
        assert derivative[0, token].item() == pytest.approx(sink.total + small, abs=bound)


def test_a_gradient_on_disk_is_a_direction(proxy: Proxy, compute: Compute) -> None:
    """Moving along −g changes the loss by −‖g‖² to first order."""
    held_out = TRACES[1]
    found = compute([held_out])
    values, derivative = directional_derivative(proxy, found.file, held_out)
    ids = torch.tensor([i for i, counts in zip(held_out.tokens, held_out.targets, strict=True) if counts])
    slope = (values.softmax(-1) * derivative).sum(-1) - derivative.gather(1, ids[:, None])[:, 0]
    assert slope.mean().item() == pytest.approx(float(flat(values_of(found)).square().sum()), rel=1e-5)


def test_a_direction_without_tensors_has_no_derivative(proxy: Proxy) -> None:
    _, derivative = directional_derivative(proxy, Moving({}), TRACES[2])
    assert derivative.shape == (4, tiny.N_VOCAB)
    assert not derivative.any()


def test_observer_sees_what_goes_into_each_matrix(proxy: Proxy) -> None:
    """Oracle: values and tangents that go into the head give the logits and their derivative back."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    direction = unit(proxy, 4)

    def observe(name: str, x: torch.Tensor, tangent: torch.Tensor) -> None:
        assert name not in seen
        seen[name] = x, tangent

    values, derivative = directional_derivative(proxy, Moving(direction), TRACES[2], observe)
    assert seen.keys() == {t.name for t in proxy.tensors if t.is_linear and t.name != TABLE}
    for x, tangent in seen.values():
        assert x.shape == tangent.shape
    (x, tangent), head = seen[HEAD], torch.from_numpy(proxy.weights.get(HEAD))
    torch.testing.assert_close((x @ head.T)[0], values)
    torch.testing.assert_close((tangent @ head.T + x @ direction[HEAD].T)[0], derivative)


def failing(name: str, x: torch.Tensor, tangent: torch.Tensor) -> None:
    raise ValueError(name)


@pytest.mark.parametrize("observer", [None, failing], ids=["done", "failed"])
def test_directional_derivative_leaves_the_model_as_it_was(proxy: Proxy, observer: Any) -> None:
    proxy.model.set_attn_implementation("sdpa")  # its own, whatever other tests left
    before = {name: p.detach().clone() for name, p in proxy.model.named_parameters()}
    losses = trace_losses(proxy, TRACES)
    try:
        _, derivative = directional_derivative(proxy, Moving(unit(proxy, 3)), TRACES[0], observer)
        assert not derivative.requires_grad
    except ValueError:
        assert observer is failing
    assert proxy.model.config._attn_implementation == "sdpa"
    assert (proxy.stream.direction, proxy.stream.observer, proxy.stream.sink) == (None, None, None)
    for name, parameter in proxy.model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert torch.equal(trace_losses(proxy, TRACES), losses)
