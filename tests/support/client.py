"""What tests ask of llama-server's HTTP API, whoever serves it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ASK_SECONDS = 100


class Refused(Exception):
    """The server answered with an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status


class Client:
    """Asks a server.

    Attributes:
        address: as http://host:port.
    """

    address: str

    def ask(self, path: str, body: Any = None, key: str | None = None) -> Any:
        """The answer to a GET, or with a body to a POST: JSON, else text.

        Raises:
            Refused: it is an error.
        """
        text = self._open(path, body, key)
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def status(self, path: str, body: Any = None, key: str | None = None) -> int:
        """Of the answer."""
        try:
            self._open(path, body, key)
        except Refused as error:
            return error.status
        return 200

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """Posts and gives the parts of the answer, as they come."""
        for line in self._open(path, {**body, "stream": True}).splitlines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))

    def answer(self, prompt: Sequence[int], n: int, **parameters: Any) -> Any:
        """The whole answer to a prompt, greedily unless the parameters say otherwise."""
        body = {"prompt": list(prompt), "n_predict": n, "temperature": 0, "return_tokens": True, **parameters}
        return self.ask("/completion", body)

    def complete(self, prompt: Sequence[int], n: int, **parameters: Any) -> list[int]:
        """The tokens that follow a prompt."""
        tokens: list[int] = self.answer(prompt, n, **parameters)["tokens"]
        return tokens

    def complete_at_once(self, prompts: Sequence[Sequence[int]], n: int, **parameters: Any) -> list[list[int]]:
        """The tokens that follow each prompt, asked for in threads of their own."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, n, **parameters), prompts))

    def _open(self, path: str, body: Any = None, key: str | None = None) -> str:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=ASK_SECONDS) as response:
                content: bytes = response.read()
                return content.decode()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from error
