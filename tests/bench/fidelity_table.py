"""`make fidelity`: Δ through llama.cpp against the exact derivative, for every family, type and format, in one table.

Models are random and small (256 wide, 2 layers), bases come from llama.cpp's own quantizer, and each bundle from
`adlocal convert`. Random weights and short random traces are a harder case than trained ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from adlocal.bundle import Bundle
from adlocal_convert.convert import convert
from adlocal_convert.options import Options
from adlocal_convert.source.export import export_directory
from support import families, tiny
from support.json_lines import write_lines

FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
TYPES = ("F16", "Q8_0", "Q4_K_M")
FORMATS = ("halves", "adapter")
_WIDE = {"hidden_size": 256, "intermediate_size": 512}  # K-quants come in blocks of 256


def main() -> int:
    """Prints the table: median cosine, and slope."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ["ADLOCAL_CACHE"] = str(directory / "cache")
        teacher = tiny.write_gguf(tiny.tiny_model(), directory / "teacher.gguf", tiny.CHAT_TEMPLATE)
        traces = write_traces(directory / "traces.jsonl")
        columns = [(kind, quant) for kind in FORMATS for quant in TYPES]
        print(f"{'median cosine (slope)':22}" + "".join(f"{f'{kind} {quant}':>17}" for kind, quant in columns))
        for family in FAMILIES:
            model = families.save(families.family_model(family, **_WIDE), directory / family)
            proxy = directory / f"{family}.gguf"
            export_directory(model, teacher, proxy)
            bar = tqdm(columns, desc=family, leave=False, file=sys.stderr)
            found = [bundle_of(proxy, traces, directory / "bundle", kind, quant) for kind, quant in bar]
            cells = "".join(f"{f'{b.fidelity_median:.4f} ({b.fidelity_slope:.2f})':>17}" for b in found)
            print(f"{family:22}{cells}", flush=True)
    return 0


def bundle_of(proxy: Path, traces: Path, out: Path, kind: str, quant: str) -> Bundle:
    """The bundle of a proxy after quantization, whatever its fidelity."""
    options = Options(
        str(proxy), {"traces": traces}, out, quant=quant, format=kind, n_threads=1, force=True, overwrite=True
    )
    return convert(options, lambda line: None)


def write_traces(path: Path, n: int = 12) -> Path:
    """Random letters."""
    rng = np.random.default_rng(0)
    text = ["".join(map(chr, rng.integers(97, 123, 30))) for _ in range(n)]
    return write_lines(path, *({"prompt": t[:10], "completion": t[10:]} for t in text))


if __name__ == "__main__":
    sys.exit(main())
