"""The direction that is protected: the gradients of one or several capabilities, mixed and normalised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from adlocal.errors import ConversionError, InputError

from .gradient import Gradient

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """g = Σ a_k g_k, the gradient of the protected loss ℓ = Σ a_k ℓ_k, with a_k ∝ w_k / ‖g_k‖ and Σ a_k = 1.

    So each capability's gradient enters with length w_k, whatever its own, and one capability alone is itself.

    Attributes:
        gradients: one a capability, over the same tensors.
        weights: w_k, which sum to 1.
        products: tensor name -> (k, k) inner products of the gradients' shares in that tensor.
    """

    gradients: Sequence[Gradient]
    weights: Sequence[float]
    products: dict[str, Matrix] = field(repr=False)

    @classmethod
    def of(
        cls,
        gradients: Sequence[Gradient],
        weights: Sequence[float],
        names: Sequence[str],
        progress: Callable[[], object] = lambda: None,
    ) -> Mixture:
        """Mixes gradients over the tensors `names`; `progress` is called after each of them.

        Raises:
            ConversionError: a gradient is not finite, or zero.
        """
        products = {}
        for name in names:
            flat = torch.stack([g.file.get(name).double().flatten() for g in gradients])
            products[name] = (flat @ flat.T).numpy()
            progress()
        mixture = cls(gradients, [w / sum(weights) for w in weights], products)
        for norm in mixture.norms:
            _check_norm(norm)
        _check_norm(mixture.norm)
        return mixture

    @cached_property
    def norms(self) -> list[float]:
        """‖g_k‖."""
        return [float(n) for n in np.sqrt(np.diag(sum(self.products.values())))]

    @cached_property
    def coefficients(self) -> Matrix:
        """a_k."""
        share = np.array(self.weights) / np.array(self.norms)
        return np.asarray(share / share.sum())

    @cached_property
    def norm(self) -> float:
        """‖g‖."""
        return float(np.sqrt(sum(self.coefficients @ p @ self.coefficients for p in self.products.values())))

    @property
    def cosines(self) -> Matrix:
        """(k, k) between the capabilities' gradients."""
        return np.asarray(sum(self.products.values()) / np.outer(self.norms, self.norms))

    @property
    def loss(self) -> float:
        """ℓ, nats a token."""
        return float(self.coefficients @ [g.loss for g in self.gradients])

    def energy(self, name: str) -> float:
        """A tensor's share of ‖g‖²."""
        return float(self.coefficients @ self.products[name] @ self.coefficients) / self.norm**2

    def __contains__(self, name: object) -> bool:
        return name in self.products

    def get(self, name: str) -> torch.Tensor:
        """ĝ of a tensor."""
        return self._mixed([g.file.get(name) for g in self.gradients])

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """ĝ of some rows of a matrix."""
        return self._mixed([g.file.rows(name, ids) for g in self.gradients])

    def _mixed(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([float(a) / self.norm * p for a, p in zip(self.coefficients, parts, strict=True)]).sum(0)


def _check_norm(norm: float) -> None:
    if not (np.isfinite(norm) and norm > 0):
        raise ConversionError(
            f"the gradient's norm is {norm:g}: nothing to steer by; check that the traces' completions count"
        )


def parse_mix(text: str | None, names: Sequence[str]) -> list[float]:
    """The weights of `--mix math=0.7,code=0.3` in the order of `names`; equal ones without it.

    Raises:
        InputError: an unknown or a missing capability, or a weight that is not positive.
    """
    if text is None:
        return [1.0 / len(names)] * len(names)
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    if unknown := [name for name in parts if name not in names]:
        raise InputError(f"--mix names {unknown[0]!r}, and --traces gives {', '.join(names)}; name one of those")
    if missing := [name for name in names if name not in parts]:
        raise InputError(f"--mix {text}: give a weight for {missing[0]}, too, or leave its --traces out")
    weights = [_weight(name, parts[name]) for name in names]
    return [weight / sum(weights) for weight in weights]


def _weight(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"--mix {name}={text}: give a positive number, as in --mix math=0.7,code=0.3")
    return value
