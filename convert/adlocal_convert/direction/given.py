"""A direction that a caller hands in, in the place of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from adlocal.errors import InputError

from ..model.proxy import Proxy
from .capabilities import Capability
from .gradient import Gradient
from .tensor_file import TensorFile

Tensors = Mapping[str, torch.Tensor]


def given_gradient(
    tensors: Tensors, proxy: Proxy, names: Sequence[str], capabilities: Sequence[Capability]
) -> Gradient:
    """The direction in memory, as if it were the gradient of the only capability; its loss, which it has none of, is 0.

    Args:
        tensors: GGUF tensor name -> direction in the file's order and shape, of any length.
        proxy: the base.
        names: the tensors that a gradient would be over; others are ignored.
        capabilities: what fidelity is measured on.

    Raises:
        InputError: a tensor is missing or has another shape, or there are several capabilities.
    """
    if len(capabilities) > 1:
        raise InputError(
            f"a direction stands for one capability's gradient, and there are {len(capabilities)}; give one"
        )
    shapes = {name: proxy.weights.shape(name) for name in names}
    for name, shape in shapes.items():
        if name not in tensors:
            raise InputError(f"the direction holds no tensor {name}; give one for each of the {len(names)} selected")
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"the direction's {name} is {tuple(tensors[name].shape)}; give it the base's shape, {shape}"
            )
    file = TensorFile.create(Path("direction"), shapes, in_memory=True)  # a name that no file gets
    for name in names:
        file.add(name, tensors[name])
    learned = capabilities[0].learned
    return Gradient(file, 0.0, len(learned), sum(trace.n_targets for trace in learned))
