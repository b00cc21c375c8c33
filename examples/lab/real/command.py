"""`python -m examples.lab.real`: the laboratory's question asked of real models, on a machine with a GPU.

A teacher answers prompts without and with protection; a student is fine-tuned on either with LoRA; the students and
their base are graded by final answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adlocal import plotting
from adlocal.bundle import Bundle, teacher_identity
from adlocal.commands.arguments import add_protection, count, seed, temperature
from adlocal.errors import AdlocalError, InputError
from adlocal.settings import Settings, resolve

if TYPE_CHECKING:
    from .lora import Student
    from .stages import Plan, Problem

_EPILOG = """example:
  python -m examples.lab.real -m teacher.gguf --bundle bundle/ --prompts gsm8k_train.jsonl --test gsm8k_test.jsonl \\
      --student Qwen/Qwen2.5-0.5B-Instruct --strength 4 --out real/

Every stage is kept in --out under a hash of its settings: the same command goes on where it stopped, one with other
settings takes over what they have in common."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not there yet, writes the report and returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except AdlocalError as error:
        print(f"real: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"real: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nreal: stopped; the same command goes on with what is left", file=sys.stderr)
        return 130
    except SystemExit as ended:  # a command of adlocal failed, and told why
        return int(ended.code or 0)
    return 0


def _run(args: argparse.Namespace) -> None:
    plotting.require("the report")
    _require_peft()
    import torch

    from . import lora
    from . import report as real_report
    from .stages import read_problems

    # Whatever is wrong with what was given is to show before hours of work.
    settings = resolve(Bundle.open(args.bundle), args.model, args.strength, args.guard)
    problems = read_problems("--prompts", args.prompts, args.n_traces)
    test = read_problems("--test", args.test, args.n_test)
    _check_disjoint(args, problems, test)
    lora.quiet()
    torch.set_num_threads(args.threads)
    student = lora.Student(args.student, args.device)
    plan = _plan(args, student, problems, test, settings)
    root = args.out / "stages"
    try:
        plan.execute(root)
    except torch.OutOfMemoryError as error:
        raise AdlocalError(
            f"the device's memory does not do ({lora.one_line(error)}); give a smaller --batch-size or --student"
        ) from None
    taught = plan.taught(root)
    made_with = {**_made_with(args, settings), **student.description, **_versions()}
    made_with["generated_by"] = taught[-1].rows[0]["generated_by"]
    found = real_report.results(taught, plan.graded(root), made_with)
    text = real_report.write(found, taught, args.out)
    print(json.dumps(found) if args.json else text)
    print(f"wrote {args.out / 'report.md'}, its pictures and results.jsonl", file=sys.stderr)


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise AdlocalError(
            f"fine-tuning needs {error.name}, which is not installed; run: pip install 'adlocal[lab]'"
        ) from None


def _check_disjoint(args: argparse.Namespace, problems: Sequence[Problem], test: Sequence[Problem]) -> None:
    asked = {json.dumps(problem.prompt) for problem in problems}
    if n := sum(json.dumps(problem.prompt) in asked for problem in test):
        raise InputError(f"--test {args.test}: {n} of its problems are among --prompts {args.prompts}; give others")


def _plan(
    args: argparse.Namespace,
    student: Student,
    problems: tuple[Problem, ...],
    test: tuple[Problem, ...],
    settings: Settings,
) -> Plan:
    from .lora import Tuning
    from .stages import Dose, Grade, Plan, Runtime, Teaching, Tuned

    bundle = Bundle.open(args.bundle).id
    runtime = Runtime(args.model, args.bundle, args.parallel, args.threads, args.gpu_layers)
    clean = Teaching(
        teacher_identity(args.model),
        _hash(problems),
        temp=args.temp,
        n_predict=args.n_predict,
        n_ctx=args.ctx_size,
        seed=args.seed,
        rows=problems,
        runtime=runtime,
    )
    protected = dataclasses.replace(clean, bundle=bundle, **dataclasses.asdict(settings))
    teachings = {"clean": clean, "protected": protected}
    tuning = Tuning(args.epochs, args.batch_size, args.lr, args.lora_rank, args.ctx_size, args.seed)
    tuned = {
        name: Tuned(student.identity, teaching, tuning, args.only_right, student)
        for name, teaching in teachings.items()
    }
    base = Grade(student.identity, _hash(test), args.n_predict, test, student)
    return Plan(
        teachings,
        {name: Dose(teaching, bundle, runtime) for name, teaching in teachings.items()},
        {"base": base, **{name: dataclasses.replace(base, tuned=stage) for name, stage in tuned.items()}},
    )


def _hash(problems: Sequence[Problem]) -> str:
    return hashlib.sha256("\n".join(problem.row for problem in problems).encode()).hexdigest()[:16]


def _made_with(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "json"
    }
    identities = {"teacher_id": teacher_identity(args.model)[:16], "bundle_id": Bundle.open(args.bundle).id}
    return {**given, **dataclasses.asdict(settings), **identities}


def _versions() -> dict[str, str]:
    packages = ("adlocal", "llama-cpp-python", "torch", "transformers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.lab.real",
        description="Fine-tune a real student on a teacher's clean and protected traces, and grade it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", "--model", required=True, metavar="TEACHER.gguf")
    parser.add_argument("--prompts", required=True, metavar="FILE.jsonl", help='"question" and "answer", as in GSM8K')
    parser.add_argument("--test", required=True, metavar="FILE.jsonl", help="other problems, to grade students on")
    parser.add_argument(
        "--student", required=True, metavar="STUDENT", help="Hugging Face id, directory, or GGUF, which is slow to open"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="stages, report.md, results.jsonl")
    add_protection(parser, required=True)
    _add_sizes(parser)
    _add_training(parser)
    _add_machine(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the report")
    return parser


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n-traces", type=count, metavar="N", help="take the first N prompts")
    parser.add_argument("--n-test", type=count, metavar="N", help="take the first N test problems")
    parser.add_argument("-n", "--n-predict", type=count, default=512, metavar="N", help="most tokens an answer (512)")
    parser.add_argument("-c", "--ctx-size", type=count, default=2048, metavar="N", help="tokens a trace (2048)")
    parser.add_argument("--temp", type=temperature, default=0.6, metavar="T", help="of the teacher (0.6)")
    parser.add_argument("-s", "--seed", type=seed, default=0, metavar="N", help="of traces and fine-tuning (0)")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=count, default=3, metavar="N", help="over the traces (3)")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="traces a step (8)")
    parser.add_argument("--lr", type=_positive, default=2e-4, metavar="RATE", help="AdamW's, the largest (2e-4)")
    parser.add_argument("--lora-rank", type=count, default=16, metavar="N", help="on all linear layers (16)")
    parser.add_argument("--only-right", action="store_true", help="train on traces with right answers alone")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", metavar="NAME", help="of the student: auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "-ngl", "--gpu-layers", "--n-gpu-layers", type=int, default=-1, metavar="N", help="of the teacher; -1 is all"
    )
    parser.add_argument("-np", "--parallel", type=count, default=8, metavar="N", help="traces written together (8)")
    parser.add_argument("-t", "--threads", type=count, default=os.cpu_count() or 1, metavar="N")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number over 0 and under 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
