"""Interactive viewers that also work without a live notebook front end.

Each displays one picture or table for its default settings, as PNG or HTML. In a live front end it adds controls that
redraw the picture in place. Saved notebooks and HTML pages therefore contain plain pictures, and no ipywidgets are
created in nbconvert, nbmake or the tour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import torch
from IPython.display import display
from torch import Tensor

from ..config import LoRAConfig, ModelConfig, QuantConfig, UserError, check
from ..model.llama import attention_weights
from ..model.sampling import eval_mode, filter_logits, generate
from ..training import memory
from ..worlds import tinychat
from .plots import HATCHES, attention_grid, bars, codebook, is_live, rope_picture
from .style import COLOURS, Picture, panels, shade, style, visible

BOX = "color:#111;background:#fff;border:1px solid #999;padding:4px 8px;text-align:left;white-space:pre-wrap;"
BOX += "overflow-wrap:anywhere"  # an untrained model generates very long words


class Page:
    """HTML with a plain-text version for front ends without HTML. Build it from escaped text only."""

    def __init__(self, html: str, text: str) -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def _slider(value: float, low: float, high: float, step: float = 1) -> partial:
    kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
    return partial(kind, value=value, min=low, max=high, step=step, continuous_update=False)


def _choice(value: Any, options: Sequence[Any]) -> partial:
    return partial(ipywidgets.Dropdown, value=value, options=options)


def _show(draw: Callable[..., Any], **controls: partial) -> None:
    """Display `draw` with the defaults of the controls; in a live front end also the controls, which redraw it."""
    if not is_live():
        display(draw(**{name: control.keywords["value"] for name, control in controls.items()}))
        return
    made = {name: control(description=name.replace("_", " ")) for name, control in controls.items()}

    display(ipywidgets.VBox(list(made.values())))
    handle = display(_drawn(draw, made), display_id=True)
    for widget in made.values():
        widget.observe(lambda _: handle.update(_drawn(draw, made)), names="value")


def _drawn(draw: Callable[..., Any], made: Mapping[str, Any]) -> Any:
    try:
        return draw(**{name: widget.value for name, widget in made.items()})
    except UserError as error:  # a callback would hide it in a log
        return Page(f"<p>{escape(str(error))}</p>", str(error))


def _encode(model: Any, tokenizer: Any, prompt: Any, chat: bool) -> Tensor:
    ids = tokenizer.encode_prompt(prompt) if chat else tokenizer.encode(prompt)  # pretraining text has no chat tokens
    return torch.tensor([ids], device=next(model.parameters()).device)  # (1, T)


# ---------------------------------------------------------------- the model


def sampling_picture(logits: Tensor, tokenizer: Any, temperature: float, top_k: int, top_p: float) -> Picture:
    """Probabilities of the most likely next tokens, before and after filtering. `logits` is (V,)."""
    kept = filter_logits(logits, temperature, top_k, top_p).exp()  # (V,)
    model_says = logits.float().softmax(-1)
    ids = model_says.topk(min(8, len(logits))).indices.tolist()
    pairs = zip(ids, tokenizer.pieces(ids), strict=True)
    values = {f"{visible(piece)[:10]}\n{i}": (float(model_says[i]), float(kept[i])) for i, piece in pairs}
    entropy = float(torch.special.entr(kept).sum()) + 0.0  # turns -0.0 into 0.0
    title = (f"temperature {temperature:g}, top-k {top_k or 'all'}, top-p {top_p:g}:\n"
             f"{int((kept > 0).sum())} of {len(logits)} tokens can be sampled, entropy {entropy:.2f} nats")  # fmt: skip
    return bars(values, ylabel="probability (share)", xlabel="next token and its id", title=title, number="{:.2f}",
                series=("model", "after filtering"))  # fmt: skip


def sampling_playground(model: Any, tokenizer: Any, prompt: Any, *, temperature: float = 0.7, top_k: int = 0,
                        top_p: float = 0.9, chat: bool = True) -> None:  # fmt: skip
    """The effect of temperature, top-k and top-p on the next token after `prompt` (`chat=False`: plain text)."""
    tokens = _encode(model, tokenizer, prompt, chat)
    with eval_mode(model), torch.no_grad():
        logits = model(tokens)[0, -1].float().cpu()  # (V,)
    _show(
        lambda **settings: sampling_picture(logits, tokenizer, **settings),
        temperature=_slider(temperature, 0.0, 2.0, 0.05),
        top_k=_slider(top_k, 0, min(50, len(logits))),
        top_p=_slider(top_p, 0.05, 1.0, 0.05),
    )


def attention_viewer(model: Any, tokenizer: Any, text: Any, *, layer: int = 0, head: int | str = "all",
                     chat: bool = True) -> None:  # fmt: skip
    """Attention weights between the tokens of `text`, by layer and head."""
    tokens = _encode(model, tokenizer, text, chat)
    with eval_mode(model):
        weights = [layer[0].float().cpu() for layer in attention_weights(model, tokens)]  # each (H, T, T)
    pieces, heads = tokenizer.pieces(tokens[0].tolist()), list(range(len(weights[0])))

    def draw(layer: int, head: int | str) -> Picture:
        chosen = heads if head == "all" else [head]
        names = [f"head {index}" for index in chosen]
        return attention_grid(weights[layer][chosen], pieces, title=f"layer {layer}", names=names)

    _show(draw, layer=_slider(layer, 0, len(weights) - 1), head=_choice(head, ["all", *heads]))


def rope_viewer(head_dim: int = 32, theta: float = 10_000.0, *, length: int = 128) -> None:
    """The rotation angles of RoPE, and q . k of two equal vectors over their distance."""
    _show(
        rope_picture,
        head_dim=_choice(head_dim, sorted({8, 16, 32, 64, 128, head_dim})),
        theta=_choice(theta, sorted({100.0, 1_000.0, 10_000.0, 100_000.0, 500_000.0, theta})),
        length=_slider(length, 16, 2048, 16),
    )


# ---------------------------------------------------------------- LoRA and 4-bit


def scale_blocks(weights: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Weights in blocks, each divided by its largest magnitude: (blocks, block_size) in [-1, 1], scales (blocks, 1).

    An incomplete last block is omitted, unless it is the only one.
    """
    flat = weights.detach().float().cpu().flatten()
    block_size = min(block_size, len(flat))
    blocks = flat[: len(flat) // block_size * block_size].view(-1, block_size)
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    return blocks / scales, scales


def rounding_error(scaled: Tensor, scales: Tensor, codes: Tensor) -> float:
    """Relative error of rounding every weight to the nearest code: ||error|| / ||weights||, Euclidean norms."""
    codes = codes.sort().values
    nearest = codes[torch.bucketize(scaled, (codes[1:] + codes[:-1]) / 2)]
    return float(((nearest - scaled) * scales).norm() / (scaled * scales).norm())


def nf4_explorer(weights: Tensor, *, block_size: int = 64) -> None:
    """The 16 values of NF4 and FP4 below a histogram of weights, with memory and error by block size."""
    from bitsandbytes.functional import get_4bit_type  # slow to import, used only here

    nf4, fp4 = (get_4bit_type(kind, device="cpu") for kind in ("nf4", "fp4"))
    weights = weights.detach().flatten()[: 1 << 20]  # a million suffice for a histogram

    def draw(block_size: int) -> Picture:
        scaled, scales = scale_blocks(weights, block_size)
        errors = [rounding_error(scaled, scales, codes) for codes in (nf4, fp4)]
        title = f"blocks of {block_size}: {4 + 32 / block_size:.2f} bits per weight; rounding error "
        return codebook(nf4, fp4, weights=scaled, title=title + "NF4 {:.1%}, FP4 {:.1%}".format(*errors))

    _show(draw, block_size=_choice(block_size, sorted({16, 32, 64, 128, 256, 512, 1024, 4096, block_size})))


def training_memory(config: ModelConfig, rank: int, block_size: int = 64) -> dict[str, dict[str, float]]:
    """Training memory without activations: {method: {part: bytes}} for full, LoRA and QLoRA training.

    Trained weights are fp32 with a gradient and AdamW's two moments, 16 bytes each. A frozen base takes 2 bytes a
    weight, or under QLoRA (arXiv:2305.14314) 4 bits and a doubly quantised scale per block; embeddings and norms stay
    16-bit. The formulas are those of `training.memory`.
    """
    lora, everything = LoRAConfig(rank=rank), memory.parameter_count(config)
    adapters = memory.adapter_count(config, lora)
    kinds = QuantConfig(), QuantConfig("nf4", block_size)
    dense, nf4 = (memory.base_bytes(config, lora, quant, "bf16") for quant in kinds)
    trained = {"trained weights": 4.0, "gradients": 4.0, "AdamW": 8.0}
    return {
        "full": {"frozen base": 0.0} | {part: n * everything for part, n in trained.items()},
        "LoRA": {"frozen base": dense} | {part: n * adapters for part, n in trained.items()},
        "QLoRA": {"frozen base": nf4} | {part: n * adapters for part, n in trained.items()},
    }


@style()
def memory_picture(config: ModelConfig, rank: int) -> Picture:
    """Memory of the three methods at `rank`, and that of the adapters by rank."""
    methods = training_memory(config, rank)
    scale, unit = (2**30, "GiB") if sum(methods["full"].values()) > 2**30 else (2**20, "MiB")
    figure, (left, right) = panels(1, 2, width_ratios=(3, 2))
    for y, parts in enumerate(methods.values()):
        at = 0.0
        for i, (part, size) in enumerate(parts.items()):
            left.barh(y, size / scale, left=at, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", alpha=0.8,
                      label="" if y else part)  # fmt: skip
            at += size / scale
        left.text(at, y, f" {at:.3g} {unit}", va="center", fontsize=8)
    left.set_yticks(range(3), list(methods))
    left.set(xlabel=f"memory ({unit}, without activations)", title=f"rank {rank}")
    left.margins(x=0.25)
    left.invert_yaxis()
    left.legend(fontsize=7, loc="lower right")
    ranks = 2 ** np.arange(0, 9)
    adapter = [sum(list(training_memory(config, int(r))["QLoRA"].values())[1:]) / scale for r in ranks]
    right.plot(ranks, adapter, "-o", color=COLOURS[1], label="adapters, trained")
    right.axhline(methods["QLoRA"]["frozen base"] / scale, color="0.3", linestyle=":", label="4-bit base")
    right.axvline(rank, color="0.3", linewidth=0.8)
    right.set_xscale("log", base=2)
    right.set(xlabel="rank", ylabel=f"memory ({unit})", ylim=(0, None), title="QLoRA")
    right.legend(fontsize=7)
    return figure


def rank_memory(config: ModelConfig, *, rank: int = 8) -> None:
    """Memory of full, LoRA and QLoRA training for a model of this shape, by adapter rank."""
    _show(lambda rank: memory_picture(config, rank), rank=_slider(rank, 1, 256))


# ---------------------------------------------------------------- responses


def _words(prompt: Any) -> str:
    if isinstance(prompt, str) or len(prompt) == 1:
        return prompt if isinstance(prompt, str) else prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _strip(title: str, pieces: Sequence[str], values: Sequence[float]) -> str:
    scale = max((abs(value) for value in values), default=0.0) or 1.0
    style = "display:inline-block;margin:1px;padding:0 3px;border:1px solid #999;text-align:center;color:#111"
    cells = "".join(
        f'<span style="{style};font-family:monospace;background:{shade(value / scale)}">{escape(visible(piece))}'
        f"<br><small>{round(value, 2) + 0.0:+.2f}</small></span>"
        for piece, value in zip(pieces, values, strict=True)
    )
    return f'<div style="margin:4px 0"><small>{escape(title)}</small><br>{cells}</div>'


STRIPS = {"kl": "KL to the reference (nats per token)", "rewards": "reward (score units per token)",
          "values": "value (score units)", "advantages": "advantage (deviations)"}  # fmt: skip


def rollout_page(record: Mapping[str, Any], strips: Sequence[str] = ("kl", "rewards"), tokenizer: Any = None) -> Page:
    """One rollout of `samples.jsonl`: prompt, response, scores, and tokens coloured by each of `strips`."""
    pieces = record.get("pieces") or tokenizer.pieces(tokenizer.encode(record["response"]))
    strips = [name for name in strips if record.get(name)]
    facts = [f"iteration {record['step']}"] if "step" in record else []
    scores = {name.replace("_", " "): record.get(name) for name in ("score", "true_reward")}
    facts += [f"{name} {value:.2f}" for name, value in scores.items() if value is not None]
    facts += [f"KL {sum(record['kl']):.2f} nats", f"{len(record['kl'])} tokens"] if record.get("kl") else []
    head, prompt = ", ".join(facts), _words(record["prompt"])
    html = f"<p><b>{escape(head)}</b></p>"
    texts = (f"prompt: {prompt}", f"response: {record['response']}")
    html += "".join(f'<div style="{BOX}">{escape(text)}</div>' for text in texts)
    html += "".join(_strip(STRIPS[name], pieces, record[name]) for name in strips)
    rows = [" " * 16 + "".join(f"{name:>12}" for name in strips)] + [
        f"{visible(piece):16}" + "".join(f"{round(value, 2) + 0.0:+12.2f}" for value in values)
        for piece, *values in zip(pieces, *(record[name] for name in strips), strict=True)
    ]
    return Page(html, "\n".join([head, *texts, *rows]))


def rollout_browser(rollouts: Sequence[Mapping[str, Any]], tokenizer: Any = None, *, count: int = 3) -> None:
    """PPO's logged rollouts with coloured tokens: `count` of them over all iterations, or of one iteration.

    A rollout is a record of `samples.jsonl`; `tokenizer` is needed only for records without "pieces".
    """
    check(len(rollouts) > 0, "rollout_browser was given no rollouts: read them from the run's samples.jsonl.")
    spread = sorted({round(i) for i in np.linspace(0, len(rollouts) - 1, count)})

    def draw(iteration: int | None, colour: tuple[str, ...]) -> Page:
        at = spread if iteration is None else [i for i, e in enumerate(rollouts) if e["step"] == iteration][:count]
        pages = [rollout_page(rollouts[i], colour, tokenizer) for i in at]
        return Page("<hr>".join(page.html for page in pages), "\n\n".join(page.text for page in pages))

    colours = [("KL and reward", ("kl", "rewards")), *((STRIPS[name], (name,)) for name in STRIPS)]
    iterations = [("first to last", None), *((str(step), step) for step in sorted({e["step"] for e in rollouts}))]
    _show(draw, iteration=_choice(None, iterations), colour=_choice(("kl", "rewards"), colours))


def responses_page(answers: Mapping[str, Sequence[str]], prompts: Sequence[Any]) -> Page:
    """A table with a row per prompt and a column per model; `answers` is {model: responses, one per prompt}."""
    rows = [[_words(prompt), *row] for prompt, *row in zip(prompts, *answers.values(), strict=True)]
    rows.insert(0, ["prompt", *answers])
    cells = [[f'<td style="{BOX};vertical-align:top">{escape(text)}</td>' for text in row] for row in rows]
    html = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    texts = ["\n".join(map(": ".join, zip(rows[0], row, strict=True))) for row in rows[1:]]
    return Page(f"<table>{html}</table>", "\n\n".join(texts))


def side_by_side(models: Mapping[str, tuple[Any, Any]], prompts: Sequence[Any] = tinychat.FIXED_PROMPTS, *,
                 max_new_tokens: int = 48, temperature: float = 1.0, seed: int = 0) -> Page:  # fmt: skip
    """Every model's responses to the same prompts, with the true reward in brackets for tinychat prompts."""
    answers = {}
    for name, (model, tokenizer) in models.items():
        texts = generate(
            model, tokenizer, list(prompts), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        answers[name] = [f"{text}{_worth(prompt, text)}" for prompt, text in zip(prompts, texts, strict=True)]
    return responses_page(answers, prompts)


def _worth(prompt: Any, text: str) -> str:
    """The true reward in brackets; empty for a prompt from outside tinychat, which has none."""
    try:
        return f"  [{tinychat.true_reward(prompt, text).total:.2f}]"
    except ValueError:
        return ""


def compare_chat(models: Mapping[str, tuple[Any, Any]], prompt: Any, *, max_new_tokens: int = 64,
                 temperature: float = 0.0, seed: int = 0) -> None:  # fmt: skip
    """Compare models: `models` is {name: (model, tokenizer)}; all respond to `prompt`, or to a list of prompts.

    In a live front end, two menus choose the models that respond to a typed prompt. A prompt is a str or messages.
    """
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], Mapping) else list(prompt)

    def ask(names: Sequence[str], prompts: Sequence[Any]) -> Page:
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        return responses_page({name: generate(*models[name], prompts, **options) for name in names}, prompts)

    handle = display(ask(list(models), prompts), display_id=True)
    if is_live():
        _chat_controls(
            lambda left, right, text: ask(list(dict.fromkeys((left, right))), [text]),  # one column for one model
            handle, list(models), _words(prompts[-1]),
        )  # fmt: skip


def _chat_controls(answer: Callable[..., Page], handle: Any, names: list[str], text: str) -> None:
    made = {
        "left": ipywidgets.Dropdown(options=names, value=names[0], description="left"),
        "right": ipywidgets.Dropdown(options=names, value=names[-1], description="right"),
        "text": ipywidgets.Textarea(value=text, layout=ipywidgets.Layout(width="90%")),
    }
    button = ipywidgets.Button(description="generate")

    def clicked(_: Any) -> None:
        button.disabled = True
        try:
            handle.update(_drawn(answer, made))
        finally:
            button.disabled = False

    button.on_click(clicked)
    display(ipywidgets.VBox([*made.values(), button]))
