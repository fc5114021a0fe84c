"""Every command of the README runs, its links lead somewhere, and no placeholder is left in it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_cli import options

from instruct_llama.__main__ import COMMANDS, main, parse
from instruct_llama.data import sources
from instruct_llama.worlds import tinychat

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="the README is not there yet")
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", TEXT, flags=re.M | re.S)
IN_BLOCKS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
MARKER = r"(python|torchrun --nproc-per-node \d+) -m instruct_llama "
IN_TEXT = [code for code in re.findall(r"`([^`\n]+)`", TEXT) if re.match(MARKER, code)]
UNFINISHED = bool(re.search(r"\{\{[^}]*\}\}", TEXT))  # the figures of the recorded run are not filled in yet


def commands(lines: list[str]) -> list[list[str]]:
    """The words after `python -m instruct_llama` of every command among the lines, `&&` taken apart."""
    parts = [part.strip().split("#")[0] for line in lines for part in line.split("&&")]
    return [shlex.split(re.sub(MARKER, "", part, count=1)) for part in parts if re.match(MARKER, part)]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)


def in_notebooks() -> list[str]:
    """The lines of the commands that the notebooks show."""
    notebooks = [json.loads(path.read_text()) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    cells = [cell for notebook in notebooks for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return [line for cell in cells for block in blocks("".join(cell["source"])) for line in block.splitlines()]


def test_the_two_lines_stand_there():
    assert len(commands(in_notebooks())) > 6 and [words[0] for words in commands(IN_TEXT)].count("sft") >= 2
    assert "python -m pip install -e . && python -m instruct_llama tour" in IN_BLOCKS
    assert 'python -m pip install -e ".[test]" && python -m pytest -n 2' in IN_BLOCKS


@pytest.mark.parametrize("words", commands(IN_BLOCKS + IN_TEXT + in_notebooks()), ids=" ".join)
def test_every_command_is_understood(words, capsys):
    words = ["sft" if word == "COMMAND" else word for word in words]
    assert words[0] in COMMANDS
    if "--help" not in words:
        parse(words)
    else:
        assert main(words) == 0 and "--preset" in capsys.readouterr().out


def test_every_option_named_in_the_text_exists():
    named = [code for code in re.findall(r"`(--[^`\n]+)`", TEXT) if "=" not in code]
    assert len(named) >= 3
    for code in named:
        words = shlex.split(code)
        parse(["sft", *words, "x"] if words in (["--init"], ["--data"]) else ["sft", *words])


def own_files(folder: Path) -> None:
    """The files that the README calls its reader's own."""
    answers = [f"It is number {i}." for i in range(60)]
    rows = [{"prompt": f"What is item {i}?", "completions": [a, "No."]} for i, a in enumerate(answers)]
    sources.write_jsonl(folder / "my_preferences.jsonl", rows)
    (folder / "my_text.txt").write_text("\n\n".join(tinychat.corpus(2, 30_000)), encoding="utf-8")


def test_the_commands_run_in_the_order_given(pipeline, tmp_path, monkeypatch, capsys):
    """At micro settings; those that train into the preset's folder go on from runs that are there, so each is short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda _: "")
    monkeypatch.delenv("INSTRUCT_LLAMA_OUT", raising=False)
    for folder in ("notebooks", "checkpoints"):  # this folder now stands for the checkout
        (tmp_path / folder).mkdir()
    shutil.copytree(pipeline.out, tmp_path / "checkpoints" / "tiny")
    own_files(tmp_path)
    micro = options(pipeline.replace(out=""))
    ran = []
    for words in commands(IN_BLOCKS):
        if words[0] in ("tour", "doctor") or any(word.isupper() for word in words) or "--help" in words:
            continue  # the tour is what nbmake runs; the doctor has tests of its own
        if {"smollm2", "checkpoints/smollm2", "gpu", "llama2_7b"} & set(words):
            continue  # what a hub or a registry gives: test_convert and test_memory
        if "--preset" in words:
            words = [word for i, word in enumerate(words) if "--preset" not in words[max(0, i - 1) : i + 1]]
        assert main([*words, "--preset", "tiny", *micro]) == 0, words
        ran.append(words[0])
    assert {"pretrain", "sft", "reward", "ppo", "evaluate", "chat"} <= set(ran)
    assert (tmp_path / "checkpoints" / "tiny" / "report.json").is_file()


def test_the_guide_for_contributors_explains_every_curve_of_ppo(pipeline):
    lines = (pipeline.out_dir / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {key for line in lines for key in json.loads(line)} - {"step"}
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    guide = guide.partition("## What the curves of PPO mean")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `((?:ppo|val)/\w+)` \|", guide, flags=re.M)
    assert sorted(explained) == sorted(logged | {"ppo/ptx_loss"})  # which is logged with ppo.ptx_coef only


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    missing = [t for t in targets if not t.startswith("http") and not (ROOT / t.split("#")[0]).exists()]
    assert [t for t in missing if not (UNFINISHED and t.endswith(".png"))] == []
    assert not re.search(r"!\[[^\]]*\]\((https?:)?//", TEXT), "pictures come from the project itself"


def test_the_map_names_every_notebook():
    assert [n for n in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")) if f"notebooks/{n.name}" not in TEXT] == []


@pytest.mark.skipif(UNFINISHED, reason="the figures of the recorded run are not filled in yet")
def test_the_report_card_holds_figures():
    rows = [line for line in TEXT.splitlines() if re.match(r"\| (pretrained|SFT|QLoRA SFT|PPO) \|", line)]
    assert len(rows) == 4 and all(re.search(r"\| \d\.\d+ .*\d\.\d+", row) for row in rows)


def test_it_fits_one_screen_or_two():
    assert len(TEXT.split()) < 1050 and max(len(line) for line in TEXT.splitlines() if not line.startswith("|")) <= 160
