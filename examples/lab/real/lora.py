"""A real student: a causal language model of transformers, fine-tuned on traces with LoRA and asked for answers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm

from adlocal.errors import AdlocalError, InputError

from ..models.training import Batch, Example, epochs

_IGNORED = -100  # in targets
_ALPHA = 2  # LoRA's scale, alpha / r
_WARMUP = 0.03  # share of the steps
_N_TOGETHER = 32  # prompts that are answered in one batch
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")


@dataclass(frozen=True)
class Tuning:
    """How a student is fine-tuned.

    Attributes:
        epochs: over all traces.
        batch_size: traces a step.
        lr: AdamW's largest learning rate.
        rank: of LoRA, on all linear layers.
        n_ctx: tokens that a trace is cut at.
        seed: of LoRA's first weights and of the order.
    """

    epochs: int
    batch_size: int
    lr: float
    rank: int
    n_ctx: int
    seed: int


@dataclass(frozen=True)
class Lesson:
    """A prompt, a string or messages, and the completion that is learned; one that was cut short teaches no end."""

    prompt: Any
    completion: str
    ended: bool = True


class Student:
    """A model with its tokenizer. The weights are read when they are first needed, and stay.

    Args:
        source: Hugging Face id, directory, or GGUF (which transformers dequantizes, slowly).
        device: as PyTorch names it, or "auto".

    Attributes:
        identity: a text that changes with the weights.

    Raises:
        InputError: the device is not there, or transformers can't open the model's configuration or tokenizer.
    """

    def __init__(self, source: str, device: str = "auto") -> None:
        self._device = _device(device)
        self._source = source
        path = Path(source)
        is_gguf = source.lower().endswith(".gguf")
        self._where: dict[str, Any] = {"pretrained_model_name_or_path": source}
        if is_gguf:
            self._where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self._tokenizer = self._open(transformers.AutoTokenizer, padding_side="left")
        if self._tokenizer.eos_token_id is None:
            raise InputError(f"--student {source}: its tokenizer has no end-of-sequence token; give another student")
        self._tokenizer.pad_token_id = self._tokenizer.eos_token_id  # what is padded is masked
        files = [path] if is_gguf else sorted(path.glob("*")) if path.is_dir() else []
        self.identity = _fingerprint(files) if files else self._hub_identity()

    @property
    def description(self) -> dict[str, Any]:
        """Settings for the report."""
        return {"student": self._source, "student_id": self.identity, "device": str(self._device)}

    def tune(self, traces: Iterable[Lesson], tuning: Tuning, out: Path) -> list[float]:
        """Fine-tunes the base on completions and writes the adapter into `out`; the base is left as it was.

        Returns:
            The loss of each step, nats a token.

        Raises:
            AdlocalError: no trace leaves room for a token, or the loss is no number.
        """
        examples = [e for trace in traces if (e := self._example(trace, tuning.n_ctx)) is not None]
        if not examples:
            raise InputError(f"all prompts fill {tuning.n_ctx} tokens of the student; give a larger --ctx-size")
        torch.manual_seed(tuning.seed)
        config = peft.LoraConfig(
            r=tuning.rank, lora_alpha=_ALPHA * tuning.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model: Any = peft.get_peft_model(self._base, config)
        try:
            losses = _train(model, examples, tuning, self._device)
            model.save_pretrained(out, save_embedding_layers=False)
        finally:
            model.unload()
        return losses

    def answer(self, prompts: Sequence[Any], adapter: Path | None, n_predict: int) -> list[str]:
        """Greedy completions of prompts (strings or messages), by the base or with an adapter."""
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # long ones first: memory that lacks shows at once
        texts = [""] * len(ids)
        with self._adapted(adapter) as model, tqdm(total=len(ids), desc="answers", unit="answer") as bar:
            for start in range(0, len(ids), _N_TOGETHER):
                chosen = order[start : start + _N_TOGETHER]
                for i, text in zip(chosen, self._generate(model, [ids[i] for i in chosen], n_predict), strict=True):
                    texts[i] = text
                bar.update(len(chosen))
        return texts

    @cached_property
    def _base(self) -> Any:
        is_wide = self._device.type == "cuda" and torch.cuda.is_bf16_supported()
        model = self._open(transformers.AutoModelForCausalLM, dtype=torch.bfloat16 if is_wide else torch.float32)
        eos = model.generation_config.eos_token_id
        ends = {self._tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos] if eos is not None else [])}
        # Greedy and nothing else: some models come with a temperature or a penalty of their own.
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=sorted(ends), pad_token_id=self._tokenizer.pad_token_id
        )
        return model.to(self._device).eval()

    @contextmanager
    def _adapted(self, adapter: Path | None) -> Iterator[Any]:
        if adapter is None:
            yield self._base
            return
        model = peft.PeftModel.from_pretrained(self._base, str(adapter)).eval()
        try:
            yield model
        finally:
            model.unload()

    def _generate(self, model: Any, prompts: Sequence[list[int]], n_predict: int) -> list[str]:
        padded = self._tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            ids = model.generate(**padded, max_new_tokens=n_predict)
        completions: list[str] = self._tokenizer.batch_decode(
            ids[:, padded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return completions

    def _example(self, trace: Lesson, n_ctx: int) -> Example | None:
        start = self._prompt_ids(trace.prompt)
        completion = self._tokenizer(trace.completion, add_special_tokens=False)["input_ids"]
        ids = [*start, *completion, *([self._tokenizer.eos_token_id] if trace.ended else [])][:n_ctx]
        return Example(ids, len(start)) if len(start) < len(ids) else None

    def _prompt_ids(self, prompt: Any) -> list[int]:
        """Ids up to where the student begins to write: by its chat template, else the text and a line break."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not self._tokenizer.chat_template:
            text = "".join(f"{message['content']}\n" for message in messages)
            return list(self._tokenizer(text)["input_ids"])
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template raises
            raise InputError(
                f"--student {self._source}: its chat template refuses a prompt ({one_line(error)})"
            ) from None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _hub_identity(self) -> str:
        config = self._open(transformers.AutoConfig)
        return f"{self._source}@{getattr(config, '_commit_hash', None)}"

    def _open(self, opener: Any, **settings: Any) -> Any:
        try:
            return opener.from_pretrained(**self._where, **settings)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # transformers raises errors of several libraries
            raise InputError(
                f"--student {self._source}: transformers cannot open it ({one_line(error)}); "
                "give a Hugging Face id, a directory with a model and its tokenizer, or a GGUF"
            ) from None


def _train(model: Any, examples: Sequence[Example], tuning: Tuning, device: torch.device) -> list[float]:
    """AdamW over the parameters that ask for gradients, with a cosine to zero; the loss of each step, nats a token."""
    n_steps = tuning.epochs * math.ceil(len(examples) / tuning.batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=tuning.lr, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(_WARMUP * n_steps), n_steps)
    losses: list[float] = []
    model.train()
    with tqdm(total=n_steps, desc="fine-tuning", unit="step") as bar:
        for batch in _first(n_steps, epochs(examples, tuning.batch_size, tuning.seed)):
            loss = _loss(model, batch, device)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise AdlocalError(f"the loss of step {len(losses)} is {losses[-1]}; give a smaller --lr")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval()
    return losses


def _first(n: int, batches: Iterable[Batch]) -> Iterator[Batch]:
    return (batch for _, batch in zip(range(n), batches, strict=False))


def _loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Mean negative log-likelihood of the completions' tokens, in float32."""
    targets = batch.targets.to(device)
    counted = targets != _IGNORED
    # Padding is on the right, where causal attention keeps it from what counts: no mask is needed.
    logits = model(input_ids=batch.ids.to(device), use_cache=False).logits[counted].float()
    return torch.nn.functional.cross_entropy(logits, targets[counted])


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        if not _DEVICE.fullmatch(text):
            raise RuntimeError("no device of PyTorch's")
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {text}: {one_line(error)}; give auto, cpu, cuda, cuda:1 or mps") from None
    return torch.device(text)


def _fingerprint(files: Iterable[Path]) -> str:
    """Changes with a file's name, size or time: reading gigabytes would take longer than some runs."""
    stats = [(file.name, (stat := os.stat(file)).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def one_line(error: Exception) -> str:
    """An error of another library, at most 200 characters of it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def quiet() -> None:
    """Leaves stderr to what this program reports."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module="peft|transformers")
