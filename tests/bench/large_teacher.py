"""`make large-teacher`: what protection costs where each proxy costs an eighth of the teacher.

No such pair of models is at hand that shares a vocabulary, so the teacher is SmolLM2-135M-Instruct made deeper: layers
are added that take as long as its own and add nothing, because the matrices that write to the residual stream are zero.
What it says is what SmolLM2 says; what it costs is what a model of eight times the size costs. Proxies and bundle are
the demo's.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from adlocal.cli import main as adlocal
from adlocal_convert.demo.smollm2 import demo_model
from adlocal_convert.gguf_copy import AsStored, Writer, open_reader
from bench.proxy_types import AS_IT_IS, bundle_of

_WRITE = ("attn_output.weight", "ffn_down.weight")  # what a layer adds to the residual stream comes through these


def main() -> int:
    """Prints `adlocal bench` of one sequence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=8.0, metavar="N", help="what the teacher costs, in proxies")
    parser.add_argument("--type", default=AS_IT_IS, metavar="TYPE", help="of the proxy, as --quant")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="keeps the bundle, and takes the one that lies there")
    parser.add_argument("--guard", type=float, default=0.05, metavar="SHARE")
    parser.add_argument("-n", "--n-predict", type=int, default=48, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    args = parser.parse_args()
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = bundle_of(args.type, args.dir or temporary, args.threads)
        teacher = deepened(demo_model(), temporary / "teacher.gguf", args.times)
        own = ["bench", "-m", teacher, "--bundle", bundle.directory, "--guard", args.guard, "-n", args.n_predict]
        return adlocal([*map(str, [*own, "--rounds", args.rounds, "-t", args.threads]), "--parallel"])


def deepened(source: Path, target: Path, times: float) -> Path:
    """A model that says what `source` says, and has `times` as many weights for each token."""
    reader = open_reader(source)
    n_layers = int(reader.fields["llama.block_count"].contents())
    n_bytes = sum(t.n_bytes for t in reader.tensors)
    of_layers = sum(t.n_bytes for t in reader.tensors if t.name.startswith("blk."))
    n_added = round((times - 1) * n_bytes / (of_layers / n_layers))
    writer = Writer(target, arch="llama", use_temp_file=True)
    for name, field in reader.fields.items():
        if name == "llama.block_count":
            writer.add_uint32(name, n_layers + n_added)
        elif not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_stored(name, AsStored(field))
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    for layer in range(n_layers, n_layers + n_added):
        for t in (t for t in reader.tensors if t.name.startswith(f"blk.{layer % n_layers}.")):
            data = np.zeros_like(t.data) if t.name.endswith(_WRITE) else t.data
            writer.add_tensor(re.sub(r"^blk\.\d+", f"blk.{layer}", t.name), data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


if __name__ == "__main__":
    sys.exit(main())
