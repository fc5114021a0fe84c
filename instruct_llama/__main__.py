"""The command line: `python -m instruct_llama COMMAND [--preset NAME] [--out DIR] [--seed N] …`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union

import tyro
from tyro.conf import Positional

from . import pipeline, presets
from .config import SamplingConfig, Settings, UserError, check, project_folder, shown
from .tools import versions
from .training import checkpoint, distributed

PROGRAM = "python -m instruct_llama"
ABOUT = """COMMAND [--preset NAME] [--out DIR] [--seed N] [--any.setting VALUE]. `COMMAND --help` lists the options of a
command. `instruct-llama COMMAND` is the same as `python -m instruct_llama COMMAND`."""
STAGES = {
    "pretrain": "Train a tokenizer, then a language model on running text, from random weights.",
    "sft": "Fine-tune on demonstrations: all weights, LoRA (--sft.lora.rank) or QLoRA (--sft.quant.kind nf4).",
    "reward": "Train a reward model on ranked responses.",
    "ppo": "Train the SFT model by PPO against the reward model.",
}
NO_PAIRS = (tyro.conf.FlagCreatePairsOff,)  # --resume, without a --no-resume


# positional arguments, by the names that the help gives them
Name = Positional[Annotated[str, tyro.conf.arg(metavar="NAME-or-FILE")]]
Source = Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
Checkpoint = Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
OptionalCheckpoint = Positional[Annotated[Path | None, tyro.conf.arg(metavar="[CHECKPOINT]")]]
Target = Positional[Annotated[Path, tyro.conf.arg(metavar="TARGET")]]
OptionalTarget = Positional[Annotated[Path | None, tyro.conf.arg(metavar="[TARGET]")]]


@dataclass(frozen=True)
class Import(Settings):
    """Where weights are imported from."""

    source: Source = tyro.MISSING  # a Hugging Face folder or hub name, Meta's folder, a .gguf file, or smollm2


@dataclass(frozen=True)
class Merge(Settings):
    """How an adapter is merged."""

    checkpoint: Checkpoint = tyro.MISSING  # the run folder of a LoRA stage
    target: OptionalTarget = None  # the full checkpoint; default: CHECKPOINT-merged under --out
    into: Literal["dequantised", "original"] = "dequantised"  # which base: the one trained over, or before its 4 bits


@dataclass(frozen=True)
class Export(Settings):
    """The format of an export."""

    checkpoint: Checkpoint = tyro.MISSING  # a run folder
    target: Target = tyro.MISSING  # the folder or the .gguf file that is written
    into: Literal["dequantised", "original"] = "dequantised"  # the base that an adapter is merged into, as in `merge`
    to: Literal["hf", "peft", "gguf"] = "hf"  # a Hugging Face folder, a PEFT adapter with its base, or a GGUF file
    # how a GGUF file keeps the weights; auto: in 16 bits, bf16 as they are and fp32 rounded to f16
    quant: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"


@dataclass(frozen=True)
class Chat(Settings):
    """How responses are sampled in a chat."""

    checkpoint: OptionalCheckpoint = None  # a run folder; default: ppo under --out, trained if missing
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
class Data(Settings):
    """Which records are built."""

    name: Name = tyro.MISSING  # tinychat, a public set (data/README.md), or a file
    files: tuple[str, ...] = ()  # read a public set from these files, fetched by hand, instead of from the hub
    limit: int = 0  # records of a public set to build; 0 means all


def parse(args: list[str], kind: type[Settings] = Settings, command: str = "COMMAND") -> Settings:
    """Settings from the command line, on top of a preset's; tyro makes an option of every field of `kind`."""
    finder = argparse.ArgumentParser(f"{PROGRAM} {command}", add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    default = kind(**vars(presets.get(finder.parse_known_args(args)[0].preset)))
    about = COMMANDS[command][0].__doc__ if command in COMMANDS else None
    return tyro.cli(kind, args=args, default=default, prog=f"{PROGRAM} {command}", description=about, config=NO_PAIRS)


def print_overview() -> None:
    """Print the help text that lists the commands."""
    usual = vars(presets.get())
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, default=kind(**usual), description=command.__doc__)]
        for name, (command, kind) in COMMANDS.items()
    ]
    with contextlib.suppress(SystemExit):  # tyro leaves after its help
        tyro.cli(Union[tuple(kinds)], args=["--help"], prog=PROGRAM, description=ABOUT, config=NO_PAIRS)  # noqa: UP007


def stage(name: str, about: str) -> Callable[[Any], int]:
    """The command that runs one stage and prints its best metrics; `about` is its help text."""

    def command(settings: Settings) -> int:
        result = pipeline.run(name, settings)
        figures = ", ".join(f"{key} {value:.4g}" for key, value in result.best.items())
        when = f"finished in {result.seconds:.0f} s" if result.trained else "was finished before"
        print(f"{name} {when}: {figures}. Saved in {result.folder}")
        return 0

    command.__doc__ = f"{about} --resume continues an interrupted run, --overwrite trains a finished one anew."
    return command


def data(settings: Data) -> int:
    """Build records into data/ (or --out): tinychat, a public set, or a file."""
    from .data import public_sets, sources
    from .worlds import tinychat

    name = settings.name
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
    """Merge adapters into their base, and print how exact the merge is."""
    from . import convert

    target = settings.target or settings.out_dir / f"{settings.checkpoint.name}-merged"
    print(*convert.merge_run(settings.checkpoint, target, settings.into, settings.overwrite), sep="\n")
    return 0


def import_(settings: Import) -> int:
    """Import weights (Hugging Face, Meta, GGUF, SmolLM2) into --out, or a folder named after the source."""
    from . import convert

    source = settings.source
    given = settings.out != presets.get(settings.preset).out
    target = settings.out_dir if given else settings.out_dir / Path(os.path.abspath(source)).name.removesuffix(".gguf")
    print(*convert.import_checkpoint(source, target, settings.overwrite), sep="\n")
    return 0


def export(settings: Export) -> int:
    """Export a checkpoint to Hugging Face, PEFT or GGUF format."""
    from . import convert

    options = (settings.into, settings.overwrite, settings.quant)
    print(*convert.export(settings.to, settings.checkpoint, settings.target, *options), sep="\n")
    return 0


def chat(settings: Chat) -> int:
    """Chat with a checkpoint in the terminal, or respond to a file of prompts."""
    from .tools import chat as conversation
    from .training.device import pick_device

    folder = settings.checkpoint or pipeline.require("ppo", settings)
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
    """Evaluate the stages under --out, print and write the report card; or run a study over seeds."""
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
    """Execute all notebooks in order, then print the report card. Finished stages are used again."""
    from .notebook import tour as notebooks
    from .stages.start import flatten

    usual, asked = flatten(asdict(presets.get(settings.preset))), flatten(asdict(settings))
    other = [f"--{key.replace('_', '-')}" for key in usual if key not in ("out", "seed") and asked[key] != usual[key]]
    check(not other, f"The notebooks have their preset's settings, and know nothing of {', '.join(other)}: leave that "
          "out. Finished stages are used again: to train them anew, give another --out, or remove them from "
          f"{shown(settings.out_dir)}.")  # fmt: skip
    return notebooks.run(settings)


def doctor(settings: Doctor) -> int:
    """Check the installation and this machine, and say what to do about each problem."""
    from .tools import doctor as checks

    return versions.write_constraints() if settings.write_constraints else checks.run(settings)


COMMANDS: dict[str, tuple[Callable[[Any], int], type[Settings]]] = {
    **{name: (stage(name, about), Settings) for name, about in STAGES.items()},
    "data": (data, Data), "merge": (merge, Merge), "import": (import_, Import), "export": (export, Export),
    "chat": (chat, Chat), "evaluate": (evaluate, Evaluate), "tour": (tour, Tour), "doctor": (doctor, Doctor),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command, of `argv` or else of the process's own arguments.

    Returns the exit status: 0, 1 when it failed, 2 when it was asked wrongly, 130 on Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print_overview()
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    try:
        check(name in COMMANDS, f"There is no command {name!r}: choose from {', '.join(COMMANDS)}.")
        command, kind = COMMANDS[name]
        settings = parse(rest, kind, name)
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
