"""`make cold-and-cached`: the same prompt in a fresh context and in one that holds it or another, on SmolLM2.

Prints for every strength how many texts of each kind are those of the fresh context, token by token, at temperature 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import closing

from adlocal import AntidistillationLlama
from adlocal_convert.demo.smollm2 import demo_model
from bench.ends_table import add_bundle, bundle
from support.problems import cold_and_cached, encoded_problems


def main() -> int:
    """Prints a row a strength. The exit status is 1 where any text differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bundle(parser)
    parser.add_argument("--prompts", type=int, default=50, metavar="N")
    parser.add_argument("-n", "--n-predict", type=int, default=48, metavar="N")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 2.0, 6.0], metavar="NATS")
    parser.add_argument("--guard", type=float, default=0.05, metavar="P")
    parser.add_argument("-t", "--threads", type=int, default=None, metavar="N")
    args = parser.parse_args()
    differ = 0
    with bundle(args.bundle) as directory:
        threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
        options = {"n_ctx": 1024, "verbose": False, **threads}
        with closing(AntidistillationLlama(str(demo_model()), bundle=directory, guard=args.guard, **options)) as llm:
            prompts = encoded_problems(llm, args.prompts)
            lengths = sorted(map(len, prompts))
            print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {args.n_predict} tokens each")
            print("strength  texts  second  third  after another  seconds", flush=True)
            for strength in args.strengths:
                started, same = time.perf_counter(), Counter[str]()
                for i, prompt in enumerate(prompts):
                    (_, first), *others = cold_and_cached(llm, prompt, prompts[i - 1], args.n_predict, strength)
                    same.update(when for when, ids in others if ids == first)
                    differ += sum(ids != first for _, ids in others)
                second, third, after = (same[when] for when in ("second", "third", "after another"))
                seconds = time.perf_counter() - started
                print(f"{strength:8g}  {len(prompts):5}  {second:6}  {third:5}  {after:13}  {seconds:7.0f}", flush=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
