"""Types whose weights llama.cpp multiplies with several tokens at once on a CPU.

Tokens that wait for the pair are decoded in one batch. A batched kernel unpacks a block of weights once for several
tokens. Without one llama.cpp unpacks it again for each token, and a batch saves less.

Read from the llama.cpp that llama-cpp-python 0.3.36 carries, in ggml/src/ggml-cpu: `llamafile_sgemm`
(llamafile/sgemm.cpp), `ggml_repack_get_optimal_repack_type` (repack.cpp), `qtype_has_amx_kernels` (amx/common.h), and
`nrows` of `type_traits_cpu` (ggml-cpu.c), which is 2 where a kernel takes two rows and two tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .ggml_types import GGML_TYPES
from .gguf import TensorInfo

#: (what the CPU and the build must have, types that then have a batched kernel), by `llama_print_system_info`'s names.
_KERNELS = (
    ({"LLAMAFILE", "AVX"}, {"F32", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL"}),
    ({"LLAMAFILE", "AVX", "F16C"}, {"F16"}),
    ({"LLAMAFILE", "AVX2"}, {"BF16"}),
    ({"REPACK", "AVX2"}, {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}),
    ({"REPACK", "AVX512"}, {"Q2_K"}),
    ({"AMX_INT8", "AVX512_VNNI"}, {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}),
    ({"LLAMAFILE", "NEON"}, {"F32", "F16"}),
    ({"LLAMAFILE", "NEON", "DOTPROD"}, {"Q4_0", "Q8_0"}),
    ({"REPACK", "NEON", "DOTPROD"}, {"Q1_0", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"}),
    ({"NEON", "MATMUL_INT8"}, {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"}),
)
_READ = ({"AVX"}, {"NEON"})  # a CPU of another kind has kernels that were not read
#: Types to change to, and their bits a weight, from the smallest.
_REMEDIES = {"Q4_0": 4.5, "Q5_0": 5.5, "Q8_0": 8.5, "F16": 16.0}


@dataclass(frozen=True)
class Batching:
    """How a model's weights batch on this CPU.

    Attributes:
        type: that most weights have which a token is multiplied with, by ggml's name in capitals.
        batched: whether it has a batched CPU kernel; None on a CPU of which nothing is known.
        remedy: where it has none, the type of the nearest size that has one.
    """

    type: str
    batched: bool | None
    remedy: str | None

    @classmethod
    def of(cls, tensors: Sequence[TensorInfo], features: frozenset[str] | None = None) -> Batching:
        """Of the tensors of a model's file; `features` are those of this CPU by default."""
        features = cpu_features() if features is None else features
        main = GGML_TYPES[_main_type(tensors)]
        batched = has_batched_kernel(main.name, features)
        return cls(main.name, batched, _remedy(main.bits, features) if batched is False else None)

    @property
    def note(self) -> str | None:
        """What to tell whoever chose the type; None where there is nothing to say."""
        if self.batched is not False:
            return None
        lacks = f"most weights are {self.type}, for which llama.cpp has no batched CPU kernel here"
        saves = "tokens that wait for the proxies gain less from being decoded together"
        return f"{lacks}: {saves}" + (f"; --quant {self.remedy} has one" if self.remedy else "")


def cpu_features() -> frozenset[str]:
    """What llama.cpp says of this CPU and of its own build; nothing where llama-cpp-python is not installed."""
    try:
        import llama_cpp
    except ModuleNotFoundError:
        return frozenset()
    return frozenset(re.findall(r"(\w+) = 1\b", llama_cpp.llama_print_system_info().decode()))


def has_batched_kernel(type_name: str, features: frozenset[str]) -> bool | None:
    """Whether llama.cpp's CPU backend has a kernel for several tokens; None on a CPU of which nothing is known."""
    if not any(known <= features for known in _READ):
        return None
    return any(needed <= features and type_name in types for needed, types in _KERNELS)


def _main_type(tensors: Sequence[TensorInfo]) -> int:
    """A table that is only looked up does not count."""
    is_tied = all(t.name != "output.weight" for t in tensors)
    n_weights: Counter[int] = Counter()
    for t in tensors:
        if is_tied or t.name != "token_embd.weight":
            n_weights[t.ggml_type] += round(8 * t.n_bytes / GGML_TYPES[t.ggml_type].bits)
    return n_weights.most_common(1)[0][0]


def _remedy(bits: float, features: frozenset[str]) -> str | None:
    able = [name for name in _REMEDIES if has_batched_kernel(name, features)]
    return min(able, key=lambda name: abs(_REMEDIES[name] - bits), default=None)
