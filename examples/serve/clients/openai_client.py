"""OpenAI's Python client (pip install openai) on adlocal serve: an answer that streams.

ADLOCAL_URL=http://127.0.0.1:8080 ADLOCAL_KEY=... python openai_client.py "Why is the sky blue?"
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main() -> None:
    """Prints the answer as it comes."""
    url, key = os.environ.get("ADLOCAL_URL", "http://127.0.0.1:8080"), os.environ.get("ADLOCAL_KEY", "none")
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        model = client.models.list().data[0].id
        chunks = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], max_tokens=200, stream=True
        )
        for chunk in chunks:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
