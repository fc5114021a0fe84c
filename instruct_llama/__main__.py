"""The command line: `python -m instruct_llama COMMAND [--preset NAME] [--out DIR] [--seed N] …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from . import checkpoint, presets
from .config import Settings, UserError, check, project_folder
from .data.tokenizer import Tokenizer
from .model.llama import Llama

USAGE = """python -m instruct_llama COMMAND [--preset NAME] [--out DIR] [--seed N] [--any.setting VALUE]

  tour                       all notebooks in order, from nothing; then the report card
  doctor                     what this machine has, and what to do about what is missing
  data NAME-or-FILE          records for the stages: tinychat, a public set (data/README.md), or a file recognised by
                             its content; of a public set --limit N records, or from --files fetched by hand
  pretrain sft reward ppo    one stage; --resume goes on, --init starts from a checkpoint, --data from a file
  merge CHECKPOINT [TARGET]  adapters into their base, to a plain checkpoint
  chat [CHECKPOINT]          talk to a checkpoint
  evaluate                   the report card of every stage under --out

Settings of every stage: python -m instruct_llama COMMAND --help"""


@dataclass(frozen=True)
class DataSettings(Settings):
    """Settings of the command `data`."""

    files: tuple[str, ...] = ()  # read a public set from these files, fetched by hand, instead of from the hub
    limit: int = 0  # records of a public set to build; 0 means all


def parse(args: list[str], kind: type[Settings] = Settings) -> Settings:
    """Settings from the command line, on top of a preset's; tyro makes an option of every field of `kind`."""
    name = None
    for i, arg in enumerate(args):
        if arg.startswith("--preset="):
            name = arg.partition("=")[2]
        elif arg == "--preset":
            check(i + 1 < len(args), "--preset needs a name: tiny or laptop.")
            name = args[i + 1]
    options = (tyro.conf.FlagCreatePairsOff,)
    default = kind(**vars(presets.get(name)))
    return tyro.cli(kind, args=args, default=default, prog="instruct_llama", config=options)


def stage(name: str) -> Callable[[Settings, list[str]], int]:
    """The command that runs one stage and prints what it reached."""

    def command(settings: Settings, _: list[str]) -> int:
        result = importlib.import_module(f"instruct_llama.stages.{name}").run(settings)
        figures = ", ".join(f"{key} {value:.4g}" for key, value in result.best.items())
        print(f"{name} finished in {result.seconds:.0f} s: {figures}. Saved in {result.folder}")
        return 0

    return command


def data(settings: DataSettings, words: list[str]) -> int:
    """Build records into data/, or --out."""
    from .data import public, sources, tinychat

    check(len(words) == 1, "data needs one name or file: `data tinychat`, `data dolly`, or `data my.jsonl.gz`.")
    name = words[0]
    folder = Path(settings.out) if settings.out else project_folder() / "data"
    if name in public.SETS:
        built = public.build(name, folder, limit=settings.limit, files=settings.files, seed=settings.seed)
        print(built.describe())
        return 0
    check(
        not settings.files and not settings.limit,
        f"--files and --limit are for a public set, and {name} is none: choose from {', '.join(public.SETS)}.",
    )
    known = name == "tinychat" or Path(name).exists()
    check(known, f"There is no file {name}, and no set of that name: choose from tinychat, {', '.join(public.SETS)}.")
    if name == "tinychat":
        world, seed = settings.world, settings.seed
        made = {
            "corpus": [{"text": text} for text in tinychat.corpus(seed, world.corpus_chars)],
            "demonstrations": tinychat.demonstrations(seed, world.demonstrations),
            "comparisons": tinychat.comparisons(seed, world.comparisons, world.temperature),
            "prompts": [{"prompt": prompt} for prompt in tinychat.prompts(seed, world.prompts)],
        }
    else:
        records = sources.read(name)
        print(records.describe())
        made = {f"{Path(name).name.split('.')[0]}-{records.kind}": records.records}
    for stem, items in made.items():
        sources.write_jsonl(folder / f"{stem}.jsonl", items)
        print(f"{len(items):,} records in {folder / stem}.jsonl")
    return 0


def merge(settings: Settings, words: list[str]) -> int:
    """Merge a LoRA run into a plain checkpoint, and print how far each way of merging is from what was trained."""
    check(1 <= len(words) <= 2, "merge needs the run folder of a LoRA stage, and optionally a target folder.")
    source = Path(words[0])
    target = Path(words[1]) if len(words) == 2 else settings.out_dir / f"{source.name}-merged"
    for line in checkpoint.merge_run(source, target):
        print(line)
    return 0


def chat(settings: Settings, words: list[str]) -> int:
    """Talk in the terminal; an empty line or Ctrl-D ends."""
    from .model.generate import stream
    from .stages.trainer import pick_device

    check(len(words) <= 1, "chat takes one checkpoint folder.")
    folder = Path(words[0]) if words else checkpoint.require("ppo", settings)
    model, tokenizer = checkpoint.load(folder, pick_device(settings.device))
    check(checkpoint.read_info(folder)["kind"] == "lm", f"{folder} is a reward model and cannot talk: give another.")
    messages: list[dict[str, str]] = []
    generator = torch.Generator(next(model.parameters()).device).manual_seed(settings.seed)
    room = settings.evaluate.max_new_tokens
    print(f"Talking to {folder}. An empty line ends.")
    while line := _ask():
        messages.append({"role": "user", "content": line})
        text, ids = "", []
        for token in stream(
            model, _within_context(model, tokenizer, messages, room), max_new_tokens=room,
            eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, temperature=settings.evaluate.temperature,
            generator=generator, banned=tokenizer.banned_ids,
        ):  # fmt: skip
            if token != tokenizer.eos_id:
                ids.append(token)
            now = tokenizer.decode(ids)
            print(now[len(text) :], end="", flush=True)
            text = now
        print()
        messages.append({"role": "assistant", "content": text or "…"})
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _within_context(model: Llama, tokenizer: Tokenizer, messages: list[dict[str, str]], room: int) -> list[int]:
    from .data.batches import fit_prompt

    ids = fit_prompt(tokenizer, messages, model.config.max_seq_len - room)
    check(ids is not None, f"That is longer than the model's context of {model.config.max_seq_len} tokens: say less.")
    return ids


def evaluate(settings: Settings, _: list[str]) -> int:
    """Print the report card and write report.json."""
    from . import evaluate as card

    print(card.describe(card.report_card(settings)))
    return 0


def tour(settings: Settings, _: list[str]) -> int:
    """Execute every notebook."""
    from . import tour as notebooks

    return notebooks.run(settings)


def doctor(settings: Settings, _: list[str]) -> int:
    """Check the machine."""
    from . import doctor as checks

    return checks.run(settings)


COMMANDS: dict[str, Callable[[Settings, list[str]], int]] = {
    **{name: stage(name) for name in ("pretrain", "sft", "reward", "ppo")},
    "data": data, "merge": merge, "chat": chat, "evaluate": evaluate, "tour": tour, "doctor": doctor,
}  # fmt: skip

KINDS: dict[str, type[Settings]] = {"data": DataSettings}  # commands with options of their own


def main(argv: list[str]) -> int:
    """Run a command; returns the exit status: 0, 1 when it failed, 2 when it was asked wrongly, 130 on Ctrl-C."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    words = []
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    try:
        check(name in COMMANDS, f"There is no command {name!r}: choose from {', '.join(COMMANDS)}.")
        check(not words or name in ("data", "merge", "chat"), f"{name} takes no {words[:1]}: options begin with --.")
        return COMMANDS[name](parse(rest, KINDS.get(name, Settings)), words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error}: make room or give another --out, then go on with --resume.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
