"""Counts what a reader of PPO has to follow: `python tests/count_calls.py`.

It trains the stages at preset tiny in a temporary folder, then runs the command `ppo` for one iteration of one
micro-batch, and prints which files of the package were entered from the command line to the saved weights, and how
often a function called one in another file during the iteration.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import instruct_llama as il
from instruct_llama.__main__ import main
from instruct_llama.rlhf import ppo

PACKAGE = str(Path(il.__file__).parent)


def file_of(frame: FrameType | None) -> str | None:
    """The file of a frame inside the package, else None."""
    name = frame.f_code.co_filename if frame else ""
    return name.removeprefix(PACKAGE + "/") if name.startswith(PACKAGE) else None


def count(folder: str) -> None:
    """Train what PPO needs, then count while `ppo` runs."""
    common = ["--preset", "tiny", "--device", "cpu", "--out", folder]
    for stage in ("sft", "reward"):
        il.require(stage, il.presets.get("tiny").replace(out=folder, device="cpu"))
    entered: set[str] = set()
    crossings: Counter[tuple[str, str]] = Counter()
    inside = False

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal inside
        if event == "return" and frame.f_code is ppo.run_iteration.__code__:
            inside = False
        here = file_of(frame) if event == "call" else None
        if here is None:
            return
        if frame.f_code is ppo.run_iteration.__code__:
            inside = True
        entered.add(here)
        caller = frame.f_back
        while caller is not None and file_of(caller) is None:  # through torch, contextlib and others
            caller = caller.f_back
        there = file_of(caller)
        if inside and there is not None and there != here:
            crossings[there, here] += 1

    torch.set_num_threads(1)
    sys.setprofile(profile)
    try:
        main(["ppo", *common, "--ppo.iterations", "1", "--ppo.rollouts-per-iteration", "2",
              "--ppo.generation-batch-size", "2", "--ppo.mini-batch-size", "2", "--ppo.micro-batch-size", "2",
              "--ppo.num-ppo-epochs", "1", "--ppo.max-new-tokens", "4", "--ppo.eval-prompts", "2"])  # fmt: skip
    finally:
        sys.setprofile(None)
    print(f"files entered from the command line to saved weights: {len(entered)}")
    print("  " + " ".join(sorted(entered)))
    print(f"calls from file to file in one iteration of one micro-batch: {sum(crossings.values())}")
    for (there, here), number in crossings.most_common():
        print(f"  {number:4} {there} -> {here}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        count(scratch)
