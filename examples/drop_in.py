"""A program on llama-cpp-python that streams an answer, and the five lines that put the answer under protection.

    python examples/drop_in.py -m teacher.gguf --bundle bundle/ -p "Why is the sky blue?"

A line marked - is what the program had, a line marked + is what it has now; every other line stayed as it was.
"""

from __future__ import annotations

import argparse
import sys

# - from llama_cpp import Llama
from adlocal import AdlocalError, AntidistillationLlama  # +


def main() -> int:
    """Answers one prompt; returns the exit status."""
    parser = argparse.ArgumentParser(description="Stream an answer under protection.")
    parser.add_argument("-m", "--model", required=True, metavar="TEACHER.gguf")
    parser.add_argument("--bundle", required=True, metavar="DIR", help="from adlocal convert")
    parser.add_argument("-p", "--prompt", default="Why is the sky blue?", metavar="TEXT")
    parser.add_argument("-c", "--ctx-size", type=int, default=2048, metavar="N", help="tokens of context")
    args = parser.parse_args()
    try:
        # - llm = Llama(
        llm = AntidistillationLlama(  # +
            model_path=args.model,
            bundle=args.bundle,  # +
            strength=1.0,  # + in nats; may be left out, and given to any call instead
            n_ctx=args.ctx_size,
            verbose=False,
        )
        messages = [{"role": "user", "content": args.prompt}]
        for chunk in llm.create_chat_completion(messages, max_tokens=200, stream=True):
            print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
        print()
        print(llm.last_dose, file=sys.stderr)  # + what protection did
    except AdlocalError as error:  # no text leaves unprotected: what cannot be protected is an error
        print(f"drop_in: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
