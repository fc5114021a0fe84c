"""A run folder while it is being written: the logs, the state to resume from, and Ctrl-C without losing work."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from ..config import Settings, check, shown
from . import checkpoint, distributed, folders

Watch = Callable[[dict[str, float]], None]
NOTE = "state.json"  # in a folder of sharded tensors: the rest of the state; written last


class Interrupted(KeyboardInterrupt):
    """Raised on Ctrl-C or the notebook's stop button, after the state was saved."""


@dataclass(frozen=True)
class StageResult:
    """The result of a stage."""

    folder: Path  # the run folder
    best: dict[str, float]  # the validation metrics of the weights that were kept
    steps: int  # optimizer steps (PPO: iterations) in total
    seconds: float  # wall-clock time of this call
    trained: bool = True  # False: a finished run of the same settings existed, and nothing was done

    @property
    def history(self) -> list[dict[str, float]]:
        """metrics.jsonl as a list of records."""
        return read_jsonl(self.folder / "metrics.jsonl")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """samples.jsonl as a list of records."""
        return read_jsonl(self.folder / "samples.jsonl")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a log, without a last line that a kill cut off."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


# The reward stage samples responses as PPO does: the prompts that fit, their batches, the sampling.
SAMPLED_BY = ("temperature", "top_k", "top_p", "max_new_tokens", "seq_len", "generation_batch_size")


def identity(settings: Settings, stage: str) -> dict[str, Any]:
    """The settings that a stage's run depends on, as JSON.

    Device, number of processes and run name are not among them, so that a run can be moved and resumed elsewhere.
    """
    fields = asdict(settings)
    usual = fields[stage].pop("data")
    fields["data"] = settings.data or usual or None
    for where in ("name", "devices", "offload_inactive"):  # the last two: of PPO's networks
        fields[stage].pop(where, None)
    names = ("seed", "init", "data", "weights", "model", "tokenizer", "world", stage)
    found = {key: fields[key] for key in names}
    if stage == "dpo" and not found["data"]:  # the reward model's comparisons
        found["reward"] = {key: fields["reward"][key] for key in ("sample_share", "responses_per_prompt")}
    if stage in ("reward", "dpo"):
        found["ppo"] = {key: fields["ppo"][key] for key in SAMPLED_BY}
    if stage == "ppo" and settings.ppo.ptx_coef > 0:
        found["sft"] = {key: fields["sft"][key] for key in ("data", "seq_len")}  # PPO's demonstrations
    return json.loads(json.dumps(found))


def saved_states(folder: Path) -> list[Path]:
    """The saved states: a file from one process, a folder from several; more than one only after a kill."""
    return [note.parent for note in folder.glob(f"state/step-*/{NOTE}")] + [*folder.glob("state/resume.safetensors")]


class RunLog:
    """The logs and the resumable state of one run folder.

    `stage` determines the settings that identify the run; `inputs` are the run folders that it reads.
    """

    def __init__(
        self, folder: Path, settings: Settings, stage: str, inputs: Sequence[Path] = (), watch: Watch | None = None
    ):
        self.folder, self.watch, self.started = folder, watch, time.perf_counter()
        self.state_path = folder / "state" / "resume.safetensors"
        self.identity = json.dumps(identity(settings, stage), sort_keys=True)
        self.inputs = checkpoint.fingerprints(inputs)
        self.saved = self._newest_state() if settings.resume else None  # its path, and the part that is not tensors
        self.start = self.saved[1]["step"] if self.saved else 0
        self.stops = 0  # how often Ctrl-C was pressed

    def _begin(self) -> None:
        """Open the logs, only when training starts, so that bad input leaves an earlier run in the folder intact."""
        if not distributed.is_main():
            return
        start = self.start
        for name in ("metrics.jsonl", "samples.jsonl"):  # drop what a killed run logged after its last save
            kept = [r for r in read_jsonl(self.folder / name) if r["step"] <= start] if start else []
            checkpoint.write_text(self.folder / name, "".join(json.dumps(r) + "\n" for r in kept))
        if not start:
            weights = self.folder.glob("*.safetensors")  # of an earlier run with adapters, for example
            for stale in (self.folder / "config.json", *self.folder.glob("events.out.*"), *weights):
                stale.unlink(missing_ok=True)
            self._forget_states()
        self.board = SummaryWriter(str(self.folder), purge_step=start + 1 if start else None)

    def _newest_state(self) -> tuple[Path, dict[str, Any]] | None:
        found = []
        for path in saved_states(self.folder):
            if path.is_dir():
                note = json.loads((path / NOTE).read_text(encoding="utf-8"))
            else:
                with checkpoint.open_tensors(path) as file:
                    note = file.metadata()
            found.append((path, note["identity"], json.loads(note["state"])))
        if not found:
            return None
        path, identity, state = max(found, key=lambda item: item[2]["step"])
        other = checkpoint.changed_inputs(state, self.inputs) if identity == self.identity else "settings"
        folder = shown(folders.final_path(self.folder))
        check(not other, f"--resume: {folder} was started with other {other}; use the same "
              "ones, or start again without --resume.")  # fmt: skip
        return path, state

    def _forget_states(self, but: Path | None = None) -> None:
        for stale in {*saved_states(self.folder), *self.state_path.parent.glob(".step-*")} - {but}:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """End a step: write its metrics to metrics.jsonl and TensorBoard, call `watch`, and stop here after Ctrl-C."""
        if distributed.is_main():
            record = {"step": step, **metrics}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            for key, value in metrics.items():
                self.board.add_scalar(key, value, step)
            if self.watch:
                self.watch(record)
        if distributed.all_reduce_sum({"stops": self.stops})["stops"]:  # Ctrl-C may reach processes in different steps
            raise KeyboardInterrupt

    def sample(self, step: int, records: list[dict[str, Any]]) -> None:
        """Write text samples with their scores to samples.jsonl and TensorBoard."""
        if not distributed.is_main():
            return
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)
        text = "\n\n".join(f"**{r.get('prompt', '')}**\n\n{r.get('response', r.get('text', ''))}" for r in records[:4])
        self.board.add_text("samples", text, step)

    def save_state(self, step: int, tensors: checkpoint.State, state: dict[str, Any]) -> None:
        """Save everything that resume needs as one file or folder, put in place by one rename (P32, P33)."""
        state = {"step": step, "inputs": self.inputs, **state}
        note = {"identity": self.identity, "state": json.dumps(state)}
        path = self.state_path
        if distributed.world_size() == 1:
            checkpoint.write_tensors(path, tensors, note)
        else:
            path = path.with_name(f"step-{step}")
            write_sharded(path, tensors, note)
        if distributed.is_main():
            self._forget_states(but=path)

    def restore(self, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Copy the saved tensors into the weights and the optimizer; returns the rest of the state."""
        assert self.saved is not None, "restore is called only where `saved` holds a state"
        path, state = self.saved
        if distributed.world_size() == 1 and path.is_file():
            tensors, _ = checkpoint.read_tensors(path)
        else:
            tensors = read_sharded(path if path.is_dir() else path.parent, weights, optimizer)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[f"model/{name}"])
        restore_optimizer(optimizer, tensors, state["optimizer"])
        return state

    def finish(self, best: dict[str, float], steps: int) -> StageResult:
        """Mark the run folder complete, and replace the folder that it overwrites."""
        place = folders.final_path(self.folder)
        if distributed.is_main():
            self.board.close()
            done = {"complete": True, "best": best, "steps": steps, "settings": json.loads(self.identity)}
            checkpoint.write_info(self.folder, {**checkpoint.read_info(self.folder), **done, "inputs": self.inputs})
            if place != self.folder:
                folders.replace_folder(place)
        distributed.barrier()  # afterwards, every process finds the folder complete
        return StageResult(place, best, steps, time.perf_counter() - self.started)

    @contextlib.contextmanager
    def interruptible(self, save: Callable[[], None], command: str) -> Iterator[None]:
        """On Ctrl-C or the stop button: finish the step, save, tell how to resume, and leave the kernel usable.

        A run can resume only from a state between two steps (P32). A second Ctrl-C stops at once, without saving.
        """
        self._begin()
        here = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, self._stop) if here else None
        try:
            yield
        except KeyboardInterrupt:
            if self.stops < 2:
                save()
            if distributed.is_main():
                self.board.close()
            state = self.state_path if distributed.world_size() == 1 else self.state_path.parent
            raise Interrupted(
                f"Stopped; the state is in {shown(state)}. Resume with: python -m instruct_llama {command} "
                "--resume (same options), or settings.replace(resume=True) in a notebook."
            ) from None
        finally:
            if here:
                signal.signal(signal.SIGINT, before)

    def _stop(self, *_: object) -> None:
        self.stops += 1
        if self.stops > 1:
            raise KeyboardInterrupt
        if distributed.is_main():
            print(
                "\nStopping after this step. A second Ctrl-C stops at once and loses all steps since the last save.",
                file=sys.stderr,
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[checkpoint.State, dict[str, Any]]:
    """An optimizer's state as flat tensors, and the rest as JSON values."""
    tensors, rest = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        wrapped = [value for value in state.values() if isinstance(value, dict)]  # bitsandbytes' maps and scales
        shared = {key: value.clone() for group in wrapped for key, value in group.items()}  # one map for all weights
        for key, value in ({k: v for k, v in state.items() if not isinstance(v, dict)} | shared).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                rest[f"{index}/{key}"] = value
    return tensors, rest


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: checkpoint.State, rest: dict[str, Any]) -> None:
    """Inverse of `optimizer_tensors`, into an optimizer over the same parameters."""
    state: dict[int, dict[str, object]] = {}
    for name, value in (*tensors.items(), *((f"optimizer/{key}", value) for key, value in rest.items())):
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_sharded(folder: Path, tensors: checkpoint.State, note: dict[str, str]) -> None:
    """Write a folder with one safetensors file for each process, which holds its shards of the tensors.

    torch.distributed.checkpoint's own format contains a pickle; its safetensors writer needs none (P05).
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    if distributed.broadcast_from_main(folder.exists()):  # already saved
        return
    new = folder.with_name(f".{folder.name}")
    if distributed.is_main():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    distributed.barrier()
    writer = HuggingFaceStorageWriter(str(new), save_distributed=True)
    save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
    checkpoint.write_text(new / NOTE, json.dumps(note))
    if distributed.is_main():
        new.rename(folder)
    distributed.barrier()


def read_sharded(
    folder: Path, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> checkpoint.State:  # fmt: skip
    """The tensors of a state, sharded as the weights are now, whatever number of processes wrote them."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    owners = {f"model/{name}": weight for name, weight in weights.items()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {}
    for name, saved in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        owner = owners[name] if name in owners else trained[int(name.split("/")[1])]
        if owner.shape == saved.size:
            tensors[name] = torch.empty_like(owner, requires_grad=False)
        else:  # the optimizer's step count
            tensors[name] = torch.empty(saved.size, dtype=saved.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended when one process resumes
        load(tensors, storage_reader=reader, no_dist=distributed.world_size() == 1)
    return tensors
