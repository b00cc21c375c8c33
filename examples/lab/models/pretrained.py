"""Tiny llama models: trained from nothing, written as a Hugging Face directory and as a GGUF."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from adlocal.engine.parallel import ParallelLlama
from adlocal.engine.sequences import Request, Sampling
from adlocal_convert.source.export import export_directory

from ..stages import Stage
from ..task import word_problems
from ..task.vocabulary import BOS, EOS, N_VOCAB, encode, write_vocabulary
from .training import Batch, Example, train

N_CTX = 128
N_PREDICT = 64  # the longest solution has 51 tokens
BATCH_SIZE = 16
_HEAD = 32  # llama.cpp's attention is much slower for widths that are no multiple of it
_LR = 3e-3
_MORE = 3  # times that a teacher may go on
_N_GRADED = 500
_BUCKET = 16  # batches of examples that are sorted by length together


@dataclass(frozen=True)
class Size:
    """Width and depth."""

    width: int
    depth: int


TEACHER, STUDENT, PROXY, SMALLER, LARGER = Size(128, 4), Size(96, 3), Size(96, 4), Size(64, 3), Size(128, 3)
LARGE_STUDENT = Size(160, 4)


@dataclass(frozen=True)
class Pretrained(Stage):
    """A model trained on fresh problems.

    Attributes:
        size: of the model.
        seed: of weights and data.
        easy: share of problems with + and − alone; 0 for a teacher.
        n_steps: of AdamW.
        least: greedy accuracy on training problems; half as many steps are added until it is reached, three times at
            most.
    """

    size: Size
    seed: str
    easy: float
    n_steps: int
    least: float = 0.0

    @property
    def seconds(self) -> float:
        return self.n_steps * self.size.width * self.size.depth * 2e-4

    @property
    def freely(self) -> bool:
        """Whether the solutions are worded freely."""
        return False

    def run(self, root: Path, out: Path) -> None:
        model, batches = new_model(self.size, self.seed), self._batches()
        losses: list[float] = []
        for n_steps in (self.n_steps, *[self.n_steps // 2] * _MORE):
            train(model, batches, n_steps, _LR, lambda step, loss: losses.append(loss))
            save(model, out)
            if not self.least or grade(out / "model.gguf", _N_GRADED, "train")["accuracy"] >= self.least:
                break
        (out / "losses.json").write_text(json.dumps(losses))
        (out / "accuracy.json").write_text(json.dumps(grade(out / "model.gguf", _N_GRADED)))

    def _batches(self) -> Iterator[Batch]:
        rng = random.Random(f"{self.seed} order")
        examples = self._examples()
        while True:
            some = sorted(itertools.islice(examples, BATCH_SIZE * _BUCKET), key=lambda e: len(e.ids))
            chunks = [some[i : i + BATCH_SIZE] for i in range(0, len(some), BATCH_SIZE)]
            rng.shuffle(chunks)
            yield from map(Batch.of, chunks)

    def _examples(self) -> Iterator[Example]:
        rng = random.Random(f"{self.seed} solutions")
        every, easy = (
            word_problems.problems(f"{self.seed} {name}", "train", kinds)
            for name, kinds in (("all", word_problems.KINDS), ("easy", ("+", "-")))
        )
        while True:
            problem = next(easy if rng.random() < self.easy else every)
            yield Example.of(problem.prompt, problem.solution(rng, freely=self.freely))


@dataclass(frozen=True)
class FreelyWorded(Pretrained):
    """A model trained on solutions in twice as many phrasings."""

    @property
    def freely(self) -> bool:
        return True


def new_model(size: Size, seed: str) -> Any:
    """A random transformers model in float32."""
    torch.manual_seed(random.Random(f"{seed} weights").getrandbits(32))
    config = transformers.LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=size.width,
        intermediate_size=-(-size.width * 8 // 3 // 32) * 32,
        num_hidden_layers=size.depth,
        num_attention_heads=size.width // _HEAD,
        num_key_value_heads=size.width // _HEAD,
        max_position_embeddings=N_CTX,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return transformers.LlamaForCausalLM(config)


def load(directory: Path) -> Any:
    """The model of a stage, in float32."""
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def save(model: Any, out: Path) -> None:
    """Writes config.json and model.safetensors, and model.gguf through the product's own exporter."""
    model.save_pretrained(out)
    vocabulary = out / "vocabulary.gguf"
    write_vocabulary(vocabulary)
    export_directory(out, vocabulary, out / "model.gguf")
    vocabulary.unlink()


def grade(gguf: Path, n_problems: int, split: word_problems.Split = "test") -> dict[str, Any]:
    """Accuracy of greedy decoding under llama.cpp on problems that are the same for all models."""
    asked = word_problems.distinct(split, split, n_problems)
    requests = [Request(i, [BOS, *encode(p.prompt)], n_predict=N_PREDICT) for i, p in enumerate(asked)]
    right = [False] * len(asked)
    with closing(ParallelLlama(gguf, n_ctx=N_CTX, n_parallel=64, n_threads=1)) as llm:
        for done in llm.generate(requests, Sampling(temp=0)):
            right[done.index] = word_problems.is_right(asked[done.index], llm.text(done.tokens))
    return {"accuracy": sum(right) / len(right), "n": len(right), "right": right}
