"""The viewers: an ordinary picture or table without a front end, the same picture redrawn in place before one."""

from __future__ import annotations

import html.parser
from pathlib import Path

import ipywidgets
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from instruct_llama.config import ModelConfig, UserError
from instruct_llama.model.llama import Llama
from instruct_llama.model.sampling import filter_logits
from instruct_llama.notebook import plots, widgets

ROOT = Path(__file__).parent.parent
NASTY = '<script>alert("x")</script> & <b>'


class Words:
    """A tokenizer of 40 words."""

    bos_id, eos_id, pad_id, special_ids, suppress_tokens = 1, 2, 0, (0, 1, 2, 3), (0, 1, 3)

    def encode(self, text):
        return [4 + sum(map(ord, word)) % 36 for word in text.split()]

    def encode_prompt(self, prompt):
        return [1, *self.encode(prompt if isinstance(prompt, str) else prompt[-1]["content"]), 3]

    def pieces(self, ids):
        return [f"▁{i}" for i in ids]

    def decode(self, ids):
        return " ".join(self.pieces(ids))


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocab_size=40, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=32, max_seq_len=64)
    return Llama(config, generator=torch.Generator().manual_seed(0)).train()


class Display:
    """What IPython's display does: a list of what was shown; a handle with `update` where one is asked for."""

    def __init__(self):
        self.shown, self.updates = [], []

    def __call__(self, thing, display_id=False):
        self.shown.append(thing)
        return self if display_id else None

    def update(self, thing):
        self.updates.append(thing)

    @property
    def controls(self):
        (box,) = (thing for thing in self.shown if isinstance(thing, ipywidgets.VBox))
        return {child.description: child for child in box.children if hasattr(child, "description")}


@pytest.fixture
def static(monkeypatch):
    monkeypatch.setenv("INSTRUCT_LLAMA_STATIC", "1")
    for kind in (ipywidgets.VBox, ipywidgets.IntSlider, ipywidgets.FloatSlider, ipywidgets.Dropdown, ipywidgets.Button):
        monkeypatch.setattr(kind, "__init__", lambda *_, **__: pytest.fail("a widget was made with no front end"))
    display = Display()
    monkeypatch.setattr(widgets, "display", display)
    return display


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("INSTRUCT_LLAMA_STATIC", "0")
    display = Display()
    monkeypatch.setattr(widgets, "display", display)
    return display


def episode(step, **changes):
    pieces = ["▁Cold", "<b>", "</s>"]
    values = {"kl": [0.5, -0.25, 0.001], "rewards": [-0.1, 0.0, 1.5], "values": [1.0, 1.0, 1.0]}
    return {"step": step, "prompt": f"What? {NASTY}", "response": f"Cold {NASTY}", "pieces": pieces, "score": 1.25,
            "true_reward": 0.75, **values, **changes}  # fmt: skip


SHOWN = {
    "sampling_playground": lambda m: widgets.sampling_playground(m, Words(), "What is two plus three"),
    "attention_viewer": lambda m: widgets.attention_viewer(m, Words(), "What is two plus three"),
    "rope_viewer": lambda m: widgets.rope_viewer(16),
    "nf4_explorer": lambda m: widgets.nf4_explorer(m.layers[0].attention.wq.weight, block_size=32),
    "rank_memory": lambda m: widgets.rank_memory(m.config),
    "rollout_browser": lambda m: widgets.rollout_browser([episode(i) for i in range(1, 8)]),
    "compare_chat": lambda m: widgets.compare_chat({"a": (m, Words()), "b": (m, Words())}, NASTY, max_new_tokens=4),
}


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert all(name == "style" for name, _ in attributes)
        if tag not in ("br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", SHOWN)
def test_without_a_front_end_one_picture_and_no_widget(name, static, model):
    SHOWN[name](model)
    (shown,) = static.shown
    if isinstance(shown, widgets.Page):
        page = Tags(shown._repr_html_())
        assert not page.open and set(page.tags) <= {"p", "b", "div", "small", "br", "span", "hr", "table", "tr", "td"}
        assert NASTY in page.text and NASTY in repr(shown)  # as text, in both forms
    else:
        assert isinstance(shown, plots.Picture) and shown._repr_png_().startswith(b"\x89PNG")
        with plots.style():
            width = shown.get_tightbbox().x1
        assert width <= shown.get_size_inches()[0] + 0.03
        assert any(ax.get_xlabel() for ax in shown.axes) and any(ax.get_ylabel() for ax in shown.axes)
    assert model.training  # the viewers leave the model's mode as it was


@pytest.mark.parametrize("name", sorted(set(SHOWN) - {"compare_chat"}))
def test_before_a_front_end_controls_redraw_the_same_picture(name, live, model):
    SHOWN[name](model)
    (picture,) = (thing for thing in live.shown if isinstance(thing, (plots.Picture, widgets.Page)))
    assert not live.updates
    control = next(iter(live.controls.values()))
    if isinstance(control, ipywidgets.Dropdown):
        control.index = 0 if control.index else 1
    else:
        control.value = control.max
    assert len(live.updates) == 1 and type(live.updates[0]) is type(picture)


def test_sampling_picture_shows_the_model_beside_what_is_sampled_from():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    ax = widgets.sampling_picture(logits, Words(), temperature=0.5, top_k=2, top_p=1.0).axes[0]
    says, sampled = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert says == pytest.approx(logits.softmax(-1).tolist())
    assert sampled == pytest.approx(filter_logits(logits, 0.5, 2, 1.0).exp().tolist())
    entropy = -sum(p * torch.tensor(p).log().item() for p in sampled if p)
    assert f"2 of 5 tokens can be sampled, entropy {entropy:.2f} nats" in ax.get_title(loc="left")


def test_raw_text_prompt_has_no_chat_markers(model):
    tokens = widgets._encode(model, Words(), "two words", chat=False)
    assert tokens.tolist() == [Words().encode("two words")]  # pretraining saw no start token


def test_blocks_and_rounding_by_hand():
    scaled, scales = widgets.scale_blocks(torch.tensor([[1.0, -2.0], [0.0, 0.3], [9.0, 9.0]])[:, :], 4)
    assert scales.tolist() == [[2.0]] and scaled[0].tolist() == pytest.approx([0.5, -1.0, 0.0, 0.15])
    codes = torch.tensor([1.0, -1.0, 0.0])  # 0.5 and 0.15 round to 0 or 1: an error of 0.5 and 0.15, times 2
    weights_norm, error = (1 + 4 + 0.09) ** 0.5, (1 + 0.09) ** 0.5
    assert widgets.rounding_error(scaled, scales, codes) == pytest.approx(error / weights_norm)
    assert widgets.scale_blocks(torch.ones(3), 64)[0].shape == (1, 3)


def test_rounding_is_what_bitsandbytes_does():
    from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weights, blocksize=64, quant_type="nf4")
    expected = float((dequantize_4bit(packed, state) - weights).norm() / weights.norm())
    scaled, scales = widgets.scale_blocks(weights, 64)
    assert widgets.rounding_error(scaled, scales, get_4bit_type("nf4", device="cpu")) == pytest.approx(
        expected, rel=1e-3
    )


def test_training_memory_by_hand(model):
    config = ModelConfig(vocab_size=10, dim=4, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=6, tie_embeddings=True)
    memory = widgets.training_memory(config, rank=3, block_size=64)
    blocks = 2 * (16 + 8 + 8 + 16 + 24 + 24 + 24)
    adapters = 2 * 3 * (8 + 6 + 6 + 8 + 10 + 10 + 10)
    assert sum(memory["full"].values()) == 16 * (blocks + 40 + 20)  # the last: norms
    assert sum(memory["LoRA"].values()) == 2 * (blocks + 40 + 20) + 16 * adapters
    assert memory["QLoRA"]["frozen base"] == pytest.approx(blocks * (4 + 0.125 + 32 / 16384) / 8 + 80 + 40)
    counted = sum(p.numel() for p in model.parameters())
    assert widgets.training_memory(model.config, 1)["full"]["gradients"] == 4 * counted


def test_episode_page_tells_scores_and_tokens():
    page = widgets.rollout_page(episode(3))
    assert repr(page).splitlines()[0] == "iteration 3, score 1.25, true reward 0.75, KL 0.25 nats, 3 tokens"
    assert "▁Cold                  +0.50       -0.10" in repr(page)
    assert repr(page).splitlines()[-1].split() == ["</s>", "+0.00", "+1.50"]
    text = Tags(page._repr_html_()).text
    assert "KL to the reference (nats per token)" in text and "<b>-0.25" in text and "value" not in text


def test_episode_page_of_a_sparse_record():
    page = widgets.rollout_page({"prompt": [{"role": "user", "content": "Hi"}], "response": "Hello you",
                                 "true_reward": None}, tokenizer=Words())  # fmt: skip
    assert "prompt: Hi\nresponse: Hello you" in repr(page)


def test_rollout_browser_goes_from_first_to_last_and_to_one_iteration(static, live, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("INSTRUCT_LLAMA_STATIC", "0")
    display = Display()
    monkeypatch.setattr(widgets, "display", display)
    widgets.rollout_browser([episode(step) for step in (1, 2, 2, 3, 4, 5)])
    steps = [line.split(",")[0] for line in repr(display.shown[-1]).splitlines() if line.startswith("iteration")]
    assert steps[0] == "iteration 1" and steps[-1] == "iteration 5" and len(steps) == 3
    display.controls["iteration"].value = 2
    assert repr(display.updates[-1]).count("iteration 2") == 2
    display.controls["colour"].value = ("values",)
    assert "value (score units)" in display.updates[-1].html and "KL to" not in display.updates[-1].html


def test_rollout_browser_without_episodes_says_where_they_are():
    with pytest.raises(UserError, match="samples.jsonl"):
        widgets.rollout_browser([])


def test_compare_chat_tabulates_and_answers_live(live, model):
    pair = {"sft": (model, Words()), "ppo": (model, Words())}
    widgets.compare_chat(pair, ["two words", [{"role": "user", "content": "three"}]], max_new_tokens=3)
    table, box = live.shown
    assert repr(table).startswith("prompt: two words\nsft: ") and repr(table).count("ppo: ") == 2
    left, right, text, button = box.children
    right.value, text.value = "sft", NASTY
    button.click()
    assert repr(live.updates[0]).splitlines()[0] == f"prompt: {NASTY}"
    assert repr(live.updates[0]).count("sft: ") == 1 and not button.disabled
    text.value = "word " * 100  # longer than the context
    button.click()
    assert "64" in repr(live.updates[1]) and not button.disabled


@pytest.mark.parametrize(("asked", "answer"), [({}, False), ({"cellId": "5f2a"}, True)])
def test_live_is_what_the_request_says(asked, answer, monkeypatch):
    class Shell:
        class kernel:
            get_parent = staticmethod(lambda channel: {"metadata": asked})

    monkeypatch.delenv("INSTRUCT_LLAMA_STATIC", raising=False)
    assert not widgets.is_live()  # no kernel at all
    monkeypatch.setattr(plots, "get_ipython", Shell)
    assert widgets.is_live() is answer
    monkeypatch.setenv("INSTRUCT_LLAMA_STATIC", "1")
    assert not widgets.is_live()


@pytest.mark.slow
def test_executed_notebook_holds_one_picture_each_and_no_widget_state(monkeypatch):
    monkeypatch.delenv("INSTRUCT_LLAMA_STATIC", raising=False)
    cells = [
        "from instruct_llama.notebook import plots, widgets",
        "import time\nwith plots.LivePlot('train/loss', every=0.01) as watch:\n"
        "    for step in range(4):\n        watch({'step': step, 'train/loss': 1.0})\n        time.sleep(0.3)",
        "plots.losses(watch.history)",
        "widgets.rope_viewer(8)",
        f"widgets.rollout_browser([{episode(1)!r}])",
        "print(get_ipython().kernel.get_parent('shell')['metadata'])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    assert "widgets" not in notebook.metadata
    live, losses, rope, rollouts, asked = (cell.outputs for cell in notebook.cells[1:])
    assert asked[0].text.strip() == "{}"  # what `is_live` relies on: nbclient names no cell
    for outputs in (live, losses, rope):
        (output,) = outputs
        assert "image/png" in output.data
    (output,) = rollouts
    assert "text/html" in output.data and output.data["text/plain"].startswith("iteration 1")
    assert not any("widget" in kind for cell in notebook.cells for o in cell.outputs for kind in o.get("data", {}))
