"""Anthropic's Python client (pip install anthropic) on adlocal serve: an answer that streams.

ADLOCAL_URL=http://127.0.0.1:8080 ADLOCAL_KEY=... python anthropic_client.py "Why is the sky blue?"
"""

from __future__ import annotations

import os
import sys

from anthropic import Anthropic


def main() -> None:
    """Prints the answer as it comes."""
    url, key = os.environ.get("ADLOCAL_URL", "http://127.0.0.1:8080"), os.environ.get("ADLOCAL_KEY", "none")
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
    with (
        Anthropic(base_url=url, api_key=key) as client,
        client.messages.stream(
            model="default", messages=[{"role": "user", "content": prompt}], max_tokens=200
        ) as stream,
    ):
        for text in stream.text_stream:
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
