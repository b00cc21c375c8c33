"""Where the repository lies."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train_1000.jsonl"
