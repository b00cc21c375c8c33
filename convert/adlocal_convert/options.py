"""What `adlocal convert` takes, and what of it cannot be meant."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from adlocal.bundle import ADAPTER, HALVES, NAMES
from adlocal.bundle.choices import ALL, BALANCED, LINEAR
from adlocal.errors import InputError


@dataclass(frozen=True)
class Options:
    """What `adlocal convert` takes.

    Attributes:
        proxy: GGUF file, Hugging Face directory, or hub id.
        traces: capability -> JSON lines; the last few of each are held out to measure fidelity.
        out: directory of the bundle.
        teacher: its GGUF, whose tokenizer a Hugging Face proxy gets.
        mix: weights of the capabilities, as in "math=0.7,code=0.3".
        loss_on: regular expression; only tokens whose text it is found in count in the loss. None: all do.
        quant: llama.cpp type to requantize the proxy to first, or None.
        format: "halves" or "adapter".
        quality: see `presets`.
        carriers: share of the linear weights that carry the perturbation, in place of `quality`'s choice.
        rank: of an adapter's every tensor, or None to choose.
        params: which weights the gradient is over; None: all, or linear for an adapter.
        eps: step along ĝ, or None to sweep.
        raw: concatenate string pairs instead of using the chat template.
        low_memory: one trace at a time, recomputed activations, a third of the gradient at a time.
        batch_size: traces of one pass.
        device: where PyTorch computes: auto, cpu, cuda or mps.
        n_ctx: longest trace in tokens; longer ones are cut.
        n_threads: for PyTorch and llama.cpp.
        n_gpu_layers: for llama.cpp, while it measures fidelity.
        force: write a bundle whose fidelity is too low.
        overwrite: replace a bundle that lies in `out`.
    """

    proxy: str
    traces: dict[str, Path]
    out: Path
    teacher: Path | None = None
    mix: str | None = None
    loss_on: str | None = None
    quant: str | None = None
    format: str = HALVES
    quality: str = BALANCED
    carriers: float | None = None
    rank: int | None = None
    params: str | None = None
    eps: float | None = None
    raw: bool = False
    low_memory: bool = False
    batch_size: int = 2
    device: str = "auto"
    n_ctx: int = 2048
    n_threads: int = os.cpu_count() or 1
    n_gpu_layers: int = 0
    force: bool = False
    overwrite: bool = False


def checked(options: Options) -> Options:
    """The options with their defaults filled in, or InputError."""
    if options.carriers is not None and not 0 <= options.carriers <= 1:
        raise InputError(f"--carriers {options.carriers}: give a share of the linear weights, 0 to 1, for example 0.05")
    if options.eps is not None and not (math.isfinite(options.eps) and options.eps > 0):
        raise InputError(f"--eps {options.eps}: give a positive step, or auto")
    if options.loss_on is not None:
        _check_expression(options.loss_on)
    if options.n_ctx < 2:
        raise InputError(f"--ctx-size {options.n_ctx}: give at least 2 tokens")
    if options.format == ADAPTER and options.params not in (None, LINEAR):
        raise InputError(
            f"--params {options.params}: an adapter carries matrices alone; say --params linear, or --format halves"
        )
    if options.format == ADAPTER and options.carriers is not None:
        raise InputError("--carriers is for --format halves; an adapter's size is set by --rank")
    if options.format == HALVES and options.rank is not None:
        raise InputError("--rank is for --format adapter; the size of halves is set by --quality or --carriers")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"{options.out} is a file; give a directory for --out")
    if any((options.out / name).exists() for names in NAMES.values() for name in names) and not options.overwrite:
        raise InputError(f"{options.out} holds a bundle already; give another --out, or say --overwrite")
    return dataclasses.replace(options, params=options.params or (LINEAR if options.format == ADAPTER else ALL))


def _check_expression(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise InputError(f"--loss-on {text}: no regular expression ({error}); give one such as '[0-9]'") from None
