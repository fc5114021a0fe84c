"""The command line: `python -m instruct_llama COMMAND [--preset NAME] [--out DIR] [--seed N] …`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import tyro

from . import pipeline, presets
from .config import SamplingConfig, Settings, UserError, check, project_folder, shown
from .tools import versions
from .training import checkpoint, distributed

USAGE = """python -m instruct_llama COMMAND [--preset NAME] [--out DIR] [--seed N] [--any.setting VALUE]

  tour                       all notebooks in order, at a preset's settings; then the report card. Finished stages
                             under --out are used again. --record writes the outputs of a run from nothing back into
                             notebooks/, --real trains the real model in notebook 11
  doctor                     what this machine has, and what to do about what is missing
  data NAME-or-FILE          records for the stages: tinychat, a public set (data/README.md), or a file recognised by
                             its content; of a public set --limit N records, or from --files fetched by hand
  pretrain sft reward ppo    one stage; --resume goes on, --init starts from a checkpoint, --data from a file,
                             --overwrite trains anew what is finished
  merge CHECKPOINT [TARGET]  adapters into their base, to a plain checkpoint
  import SOURCE              other people's weights: a Hugging Face folder or name, Meta's folder, a .gguf, or smollm2
  export --to hf|peft|gguf CHECKPOINT TARGET
                             a checkpoint in other people's formats; a GGUF file in 16 bits, or --quant q8_0 or f32
  chat [CHECKPOINT]          talk to a checkpoint; --prompts FILE answers a file
  evaluate                   the report card of every stage under --out; with --study seeds, the whole pipeline for
                             each of --seeds, a line of figures for each in notebooks/results/

Settings of every stage: python -m instruct_llama COMMAND --help. `instruct-llama COMMAND` does the same."""

Words = tyro.conf.Positional[tuple[str, ...]]


@dataclass(frozen=True)
class Worded(Settings):
    """Settings of a command that also takes words: names, files, folders."""

    words: Words = ()  # what the command is about


@dataclass(frozen=True)
class Merge(Worded):
    """How an adapter is merged."""

    into: Literal["dequantised", "original"] = "dequantised"  # which base: the one trained over, or before its 4 bits


@dataclass(frozen=True)
class Export(Merge):
    """What a checkpoint becomes."""

    to: Literal["hf", "peft", "gguf"] = "hf"  # a Hugging Face folder, a PEFT adapter with its base, or a GGUF file
    # how a GGUF file keeps the weights; auto: in 16 bits, bf16 as they are and fp32 rounded to f16
    quant: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"


@dataclass(frozen=True)
class Chat(Worded):
    """How a checkpoint answers."""

    system: str = ""  # the system message; empty: the model's own, where it has one
    prompts: str = ""  # a file of prompts, a line each or JSON records: answered as JSON lines on the standard output
    temperature: float = 0.7  # 0 takes the likeliest token each time
    top_k: int = 0  # sample among the k likeliest tokens; 0 means all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this mass; 1 means all
    max_new_tokens: int = 512  # longest answer, in tokens; the context may allow less
    batch_size: int = 32  # prompts of a file that are answered at once


@dataclass(frozen=True)
class Evaluate(Settings):
    """What is judged: the stages under --out, or a study that trains its own."""

    study: Literal["", "seeds"] = ""  # seeds: every stage and its report card for each seed, under --out/seeds
    seeds: tuple[int, ...] = tuple(range(1, 11))  # of the study; what the results hold already is skipped
    kl0: bool = False  # PPO without its KL penalty for every seed of the study, not for 1 to 3 alone
    results: str = ""  # where the study appends a line a seed; empty: notebooks/results/seeds.jsonl


@dataclass(frozen=True)
class Tour(Settings):
    """What a tour does beside executing the notebooks."""

    record: bool = False  # write the outputs back into the notebooks of the project
    real: bool = False  # train the real model in notebook 11, which else takes a stand-in


@dataclass(frozen=True)
class Doctor(Settings):
    """What the doctor does instead of its checks."""

    write_constraints: bool = False  # write the installed versions into constraints.txt, after the tests passed


@dataclass(frozen=True)
class Data(Worded):
    """What is built."""

    files: tuple[str, ...] = ()  # read a public set from these files, fetched by hand, instead of from the hub
    limit: int = 0  # records of a public set to build; 0 means all


def parse(args: list[str], kind: type[Settings] = Settings) -> Settings:
    """Settings from the command line, on top of a preset's; tyro makes an option of every field of `kind`."""
    name = None
    for i, arg in enumerate(args):
        if arg.startswith("--preset="):
            name = arg.partition("=")[2]
        elif arg == "--preset":
            check(i + 1 < len(args), f"--preset needs a name: {', '.join(presets.PRESETS)}.")
            name = args[i + 1]
    default = kind(**vars(presets.get(name)))
    return tyro.cli(kind, args=args, default=default, prog="instruct_llama", config=(tyro.conf.FlagCreatePairsOff,))


def stage(name: str) -> Callable[[Any], int]:
    """The command that runs one stage and prints what it reached."""

    def command(settings: Settings) -> int:
        result = pipeline.run(name, settings)
        figures = ", ".join(f"{key} {value:.4g}" for key, value in result.best.items())
        when = f"finished in {result.seconds:.0f} s" if result.trained else "was finished before"
        print(f"{name} {when}: {figures}. Saved in {result.folder}")
        return 0

    return command


def data(settings: Data) -> int:
    """Build records into data/, or --out."""
    from .data import public_sets, sources
    from .worlds import tinychat

    check(len(settings.words) == 1, "data needs one name or file: `data tinychat`, `data dolly` or `data my.jsonl.gz`.")
    name = settings.words[0]
    folder = Path(settings.out) if settings.out else project_folder() / "data"
    if name in public_sets.SETS:
        built = public_sets.build(name, folder, limit=settings.limit, files=settings.files, seed=settings.seed)
        print(built.describe())
        return 0
    check(
        not settings.files and not settings.limit,
        f"--files and --limit are for a public set, and {name} is none: choose from {', '.join(public_sets.SETS)}.",
    )
    known = name == "tinychat" or Path(name).exists()
    sets = ", ".join(["tinychat", *public_sets.SETS])
    check(known, f"There is no file {name}, and no set of that name: choose from {sets}.")
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


def merge(settings: Merge) -> int:
    """Merge a LoRA run into a plain checkpoint, and print how far each way of merging is from what was trained."""
    from . import convert

    words = settings.words
    check(1 <= len(words) <= 2, "merge needs the run folder of a LoRA stage, and optionally a target folder.")
    source = Path(words[0])
    target = Path(words[1]) if len(words) == 2 else settings.out_dir / f"{source.name}-merged"
    print(*convert.merge_run(source, target, settings.into, settings.overwrite), sep="\n")
    return 0


def import_(settings: Worded) -> int:
    """Other people's weights into a run folder: --out, or one named after the source."""
    from . import convert

    check(len(settings.words) == 1, "import needs one source: a folder, a hub name, a .gguf file, or smollm2.")
    source = settings.words[0]
    given = settings.out != presets.get(settings.preset).out
    target = settings.out_dir if given else settings.out_dir / Path(os.path.abspath(source)).name.removesuffix(".gguf")
    print(*convert.import_checkpoint(source, target, settings.overwrite), sep="\n")
    return 0


def export(settings: Export) -> int:
    """A checkpoint into other people's formats."""
    from . import convert

    check(len(settings.words) == 2, "export needs a checkpoint and a target: `export --to hf FOLDER ppo-hf`.")
    how = (settings.into, settings.overwrite, settings.quant)
    print(*convert.export(settings.to, *map(Path, settings.words), *how), sep="\n")
    return 0


def chat(settings: Chat) -> int:
    """Talk in the terminal, or answer a file of prompts."""
    from .tools import chat as conversation
    from .training.device import pick_device

    check(len(settings.words) <= 1, "chat takes one checkpoint folder.")
    folder = Path(settings.words[0]) if settings.words else pipeline.require("ppo", settings)
    check(checkpoint.read_info(folder)["kind"] == "lm", f"{folder} is a reward model and cannot talk: give another.")
    model, tokenizer = checkpoint.load_for_inference(folder, pick_device(settings.device))
    sampling = SamplingConfig(settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
    session = conversation.ChatSession(model, tokenizer, settings.system, sampling, settings.seed)
    if settings.prompts:
        conversation.answer_file(session, Path(settings.prompts), settings.batch_size)
    else:
        print(f"Talking to {folder}. An empty line ends.")
        conversation.converse(session)
    return 0


def evaluate(settings: Evaluate) -> int:
    """Print the report card and write report.json; or run a study and print how often each target was met."""
    from .evaluation import report as card
    from .stages import records
    from .tools import study
    from .training.device import pick_device

    if settings.study:
        plain = Settings(**{field.name: getattr(settings, field.name) for field in fields(Settings)})
        results = Path(settings.results) if settings.results else None
        written = study.run(plain, settings.seeds, results, settings.kl0)
        print(study.describe(study.summary(written, made_by=study.made_by(plain))))
        return 0
    device = pick_device(settings.device)
    if settings.data or settings.sft.data:
        print(card.describe(card.data_card(settings, records.heldout(settings), device)))
    else:
        print(card.describe(card.report_card(settings, device)))
    return 0


def tour(settings: Tour) -> int:
    """Execute every notebook, where they know of everything that is asked for."""
    from .notebook import tour as notebooks
    from .stages.start import flatten

    usual, asked = flatten(asdict(presets.get(settings.preset))), flatten(asdict(settings))
    other = [f"--{key.replace('_', '-')}" for key in usual if key not in ("out", "seed") and asked[key] != usual[key]]
    check(not other, f"The notebooks have their preset's settings, and know nothing of {', '.join(other)}: leave that "
          "out. Finished stages are used again: to train them anew, give another --out, or remove them from "
          f"{shown(settings.out_dir)}.")  # fmt: skip
    return notebooks.run(settings)


def doctor(settings: Doctor) -> int:
    """Check the machine, or write down what is installed on it."""
    from .tools import doctor as checks

    return versions.write_constraints() if settings.write_constraints else checks.run(settings)


COMMANDS: dict[str, tuple[Callable[[Any], int], type[Settings]]] = {
    **{name: (stage(name), Settings) for name in ("pretrain", "sft", "reward", "ppo")},
    "data": (data, Data), "merge": (merge, Merge), "import": (import_, Worded), "export": (export, Export),
    "chat": (chat, Chat), "evaluate": (evaluate, Evaluate), "tour": (tour, Tour), "doctor": (doctor, Doctor),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command, of `argv` or else of the process's own arguments.

    Returns the exit status: 0, 1 when it failed, 2 when it was asked wrongly, 130 on Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    try:
        check(name in COMMANDS, f"There is no command {name!r}: choose from {', '.join(COMMANDS)}.")
        command, kind = COMMANDS[name]
        worded = issubclass(kind, Worded) or not rest or rest[0].startswith("-")
        check(worded, f"{name} takes no {rest[:1]}: options begin with --.")
        settings = parse(rest, kind)
        with distributed.session(settings):
            return command(settings)
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


def leave(status: int) -> NoReturn:
    """End the process."""
    if status == 0 and distributed.under_torchrun():
        # PyTorch's caches of divided tensors keep gloo's threads alive, which may abort while Python shuts down
        # (pytorch/pytorch#179291): torchrun would report a failure after everything was saved.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
