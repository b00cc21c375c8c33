"""Models in the place of those that llama.cpp's tests of its server download.

One small random llama with Llama 2's vocabulary, which llama.cpp's source carries, lies in a folder like a hub's cache,
under every name that the tests know.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from adlocal.bundle import ADAPTER
from adlocal_convert.convert import convert
from adlocal_convert.options import Options
from adlocal_convert.source.export import export_directory
from support import families, tiny

_COMMIT = "0" * 40
#: Repository -> its file.
NAMES = {
    "ggml-org/test-model-stories260K": "stories260K-F32.gguf",
    "ggml-org/test-model-stories260K-infill": "stories260K-infill-F32.gguf",
    "ggml-org/stories15M_MOE": "stories15M_MOE-F16.gguf",
    "ggml-org/tinygemma3-GGUF": "tinygemma3-Q8_0.gguf",
    "ggml-org/models": "bert-bge-small/ggml-model-f16.gguf",
}
N_CTX = 8192
#: Control tokens and single bytes: no text ends by chance, and all of it is UTF-8.
_NEVER = 259


def write(folder: Path, vocabulary: Path) -> None:
    """Writes the cache `hub`, the bundle `bundle` and one with an adapter, `adapter`, in a folder.

    Args:
        folder: made by this.
        vocabulary: llama.cpp's ggml-vocab-llama-spm.gguf.
    """
    folder.mkdir(parents=True)
    model = tiny.tiny_model(vocab_size=32000, max_position_embeddings=N_CTX)
    with torch.no_grad():
        model.lm_head.weight[:_NEVER] = 0
        model.lm_head.weight *= 8  # a random model is sure of nothing, and a token in 32,000 no text
    path = folder / "stand-in.gguf"
    with tempfile.TemporaryDirectory() as directory:
        export_directory(families.save(model, Path(directory) / "model"), vocabulary, path)
    for repository, name in NAMES.items():
        _link(folder / "hub", repository, name, path)
    traces = folder / "traces.jsonl"
    rows = ({"prompt": f"{i} + {i + 3} =", "completion": f" {2 * i + 3}"} for i in range(10))
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    convert(Options(str(path), {"traces": traces}, folder / "bundle", carriers=1.0), lambda line: None)
    convert(Options(str(path), {"traces": traces}, folder / "adapter", format=ADAPTER), lambda line: None)


def _link(hub: Path, repository: str, name: str, target: Path) -> None:
    """As huggingface_hub lays a cache out, and llama.cpp reads it."""
    top = hub / f"models--{repository.replace('/', '--')}"
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(_COMMIT)
    link = top / "snapshots" / _COMMIT / name
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
