"""The command line: `python -m instruct_llama COMMAND [--preset NAME] [--out DIR] [--seed N] [--SETTING VALUE]`.

`instruct-llama COMMAND` does the same. `COMMAND --help` lists its options; every setting is one (`--ppo.kl-coef 0.1`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import tyro
from tyro.conf import Positional

from . import pipeline, presets
from .config import SamplingConfig, Settings, UserError, check, project_folder, shown
from .tools import versions
from .training import checkpoint, distributed

PROG = "python -m instruct_llama"

# The comments after the fields are the help of the options. tyro.MISSING marks a required argument.


@dataclass(frozen=True)
class Data(Settings):
    """Settings and options of `data`."""

    name: Positional[str] = tyro.MISSING  # tinychat, a public set (data/README.md), or a file of records or text
    files: tuple[str, ...] = ()  # read a public set from these files, fetched by hand, instead of from the hub
    limit: int = 0  # records of a public set to build; 0 means all


@dataclass(frozen=True)
class Merge(Settings):
    """Settings and options of `merge`."""

    checkpoint: Positional[Path] = tyro.MISSING  # the run folder of a LoRA stage
    target: Positional[Path | None] = None  # the folder to write; without it, <checkpoint>-merged under --out
    into: Literal["dequantised", "original"] = "dequantised"  # which base: the one trained over, or before its 4 bits


@dataclass(frozen=True)
class Import(Settings):
    """Settings and options of `import`."""

    source: Positional[str] = tyro.MISSING  # a Hugging Face folder or hub name, Meta's folder, a .gguf file, or smollm2


@dataclass(frozen=True)
class Export(Merge):
    """Settings and options of `export`."""

    checkpoint: Positional[Path] = tyro.MISSING  # the run folder to export
    target: Positional[Path] = tyro.MISSING  # the folder or GGUF file to write
    to: Literal["hf", "peft", "gguf"] = "hf"  # a Hugging Face folder, a PEFT adapter with its base, or a GGUF file
    # how a GGUF file keeps the weights; auto: in 16 bits, bf16 as they are and fp32 rounded to f16
    quant: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"


@dataclass(frozen=True)
class Chat(Settings):
    """Settings and options of `chat`."""

    checkpoint: Positional[Path | None] = None  # the run folder of a language model; without it, that of PPO
    system: str = ""  # the system message; empty: the model's own, where it has one
    prompts: str = ""  # a file of prompts, a line each or JSON records: answered as JSON lines on the standard output
    temperature: float = 0.7  # 0 takes the likeliest token each time
    top_k: int = 0  # sample among the k likeliest tokens; 0 means all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this mass; 1 means all
    max_new_tokens: int = 512  # longest answer, in tokens; the context may allow less
    batch_size: int = 32  # prompts of a file that are answered at once


@dataclass(frozen=True)
class Evaluate(Settings):
    """Settings and options of `evaluate`."""

    study: Literal["", "seeds"] = ""  # seeds: every stage and its report card for each seed, under --out/seeds
    seeds: tuple[int, ...] = tuple(range(1, 11))  # of the study; what the results hold already is skipped
    kl0: bool = False  # PPO without its KL penalty for every seed of the study, not for 1 to 3 alone
    results: str = ""  # where the study appends a line a seed; empty: notebooks/results/seeds.jsonl


@dataclass(frozen=True)
class Tour(Settings):
    """Settings and options of `tour`."""

    record: bool = False  # write the outputs back into notebooks/; only where --out holds no finished stages to reuse
    real: bool = False  # train the real model in notebook 11, which else takes a stand-in


@dataclass(frozen=True)
class Doctor(Settings):
    """Settings and options of `doctor`."""

    write_constraints: bool = False  # write the installed versions into constraints.txt, after the tests passed


@dataclass(frozen=True)
class Conformance(Settings):
    """Settings and options of `conformance`."""

    adapter: Positional[Path | None] = None  # a Python file with loss(rollouts); without it, the published variants


def stage(name: str, description: str) -> Callable[[Any], int]:
    """The command that runs one stage and prints what it reached."""

    def command(settings: Settings) -> int:
        result = pipeline.run(name, settings)
        figures = ", ".join(f"{key} {value:.4g}" for key, value in result.best.items())
        when = f"finished in {result.seconds:.0f} s" if result.trained else "was finished before"
        print(f"{name} {when}: {figures}. Saved in {result.folder}")
        return 0

    command.__doc__ = description
    return command


def data(settings: Data) -> int:
    """Build records that stages train on, into data/ or --out."""
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
    """Merge adapters into their base, to a plain checkpoint."""
    from . import convert

    target = settings.target or settings.out_dir / f"{settings.checkpoint.name}-merged"
    print(*convert.merge_run(settings.checkpoint, target, settings.into, settings.overwrite), sep="\n")
    return 0


def import_(settings: Import) -> int:
    """Import a Hugging Face, Meta or GGUF model."""
    from . import convert

    source = settings.source
    given = settings.out != presets.get(settings.preset).out
    target = settings.out_dir if given else settings.out_dir / Path(os.path.abspath(source)).name.removesuffix(".gguf")
    print(*convert.import_checkpoint(source, target, settings.overwrite), sep="\n")
    return 0


def export(settings: Export) -> int:
    """Export a checkpoint to Hugging Face, PEFT or GGUF files."""
    from . import convert

    how = (settings.into, settings.overwrite, settings.quant)
    print(*convert.export(settings.to, settings.checkpoint, settings.target, *how), sep="\n")
    return 0


def chat(settings: Chat) -> int:
    """Chat with a checkpoint, or answer a file of prompts."""
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
    """Print every stage's report card, or run a study."""
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
    """Run all notebooks in order, then print the report card."""
    from .notebook import tour as notebooks
    from .stages.start import flatten

    usual, asked = flatten(asdict(presets.get(settings.preset))), flatten(asdict(settings))
    other = [f"--{key.replace('_', '-')}" for key in usual if key not in ("out", "seed") and asked[key] != usual[key]]
    check(not other, f"The notebooks have their preset's settings, and know nothing of {', '.join(other)}: leave that "
          "out. Finished stages are used again: to train them anew, give another --out, or remove them from "
          f"{shown(settings.out_dir)}.")  # fmt: skip
    return notebooks.run(settings)


def doctor(settings: Doctor) -> int:
    """Check what this machine has, and say how to get the rest."""
    from .tools import doctor as checks

    return versions.write_constraints() if settings.write_constraints else checks.run(settings)


def conformance_(settings: Conformance) -> int:
    """Test an RLHF loss against the exact gradient."""
    from . import conformance
    from .notebook.frontier import conformance_picture

    folder = settings.out_dir / "conformance"
    try:
        variants = [conformance.load(str(settings.adapter))] if settings.adapter else conformance.VARIANTS
        reports = [conformance.measure(variant) for variant in variants]
        print(conformance.describe(reports[0]) if settings.adapter else conformance.table(reports))
    except ValueError as error:
        raise UserError(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(conformance.as_json(reports), encoding="utf-8")
    (folder / "picture.png").write_bytes(conformance_picture(reports)._repr_png_())
    print(f"The measures are in {shown(folder / 'report.json')}, as a picture in {shown(folder / 'picture.png')}.")
    return 0


COMMANDS: dict[str, tuple[Callable[[Any], int], type[Settings]]] = {
    "pretrain": (stage("pretrain", "Train a language model from random weights on plain text."), Settings),
    "sft": (stage("sft", "Fine-tune on dialogs: all weights, LoRA or QLoRA."), Settings),
    "reward": (stage("reward", "Train a reward model on comparisons of responses."), Settings),
    "dpo": (stage("dpo", "Train the SFT model on comparisons: DPO, IPO or KTO."), Settings),
    "ppo": (stage("ppo", "Train the SFT model by PPO against the reward model."), Settings),
    "data": (data, Data), "merge": (merge, Merge), "import": (import_, Import), "export": (export, Export),
    "chat": (chat, Chat), "evaluate": (evaluate, Evaluate), "tour": (tour, Tour), "doctor": (doctor, Doctor),
    "conformance": (conformance_, Conformance),
}  # fmt: skip


def parse(argv: list[str]) -> Settings:
    """The settings of the command `argv[0]`: those of the preset, changed by the other options."""
    name, *args = argv
    command, kind = COMMANDS[name]
    prog = f"{PROG} {name}"
    # --preset is parsed first, by itself: the defaults of all other options depend on it
    chosen, _ = tyro.cli(dict, default={"preset": ""}, args=args, prog=prog, add_help=False, return_unknown_args=True)
    return tyro.cli(
        kind, args=args, default=kind(**vars(presets.get(chosen["preset"]))), prog=prog, description=command.__doc__,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command, of `argv` or else of the process's own arguments.

    Returns the exit status: 0, 1 when it failed, 2 when it was asked wrongly, 130 on Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            sys.stdout.reconfigure(errors="replace")  # tyro's bullets are not in every system's character set
            described = {name: command for name, (command, _) in COMMANDS.items()}
            about = f"{__doc__}\nPresets: {', '.join(presets.PRESETS)}."
            tyro.extras.subcommand_cli_from_dict(described, args=["--help"], prog=PROG, description=about)
        check(argv[0] in COMMANDS, f"There is no command {argv[0]!r}: choose from {', '.join(COMMANDS)}.")
        command, _ = COMMANDS[argv[0]]
        settings = parse(argv)
        with distributed.session(settings):
            return command(settings)
    except SystemExit as stop:  # raised by tyro after it printed help or an error
        return stop.code if argv else 2
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
