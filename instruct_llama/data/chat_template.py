"""Chat formats: the text and special tokens around the turns of a dialog, which mark the roles and the end.

Each model family was trained with its own format. These are the published ones: a test compares each with the chat
template in the publisher's `tokenizer_config.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")  # of our own format
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatFormat:
    """The text around a turn's content. `{role}` becomes the role's name; special tokens are written as text."""

    name: str
    begin: str  # before the first turn
    before: str  # before a turn's content
    after: str  # after the content of a system or user turn
    end: str  # the end-of-turn token of the assistant, which the model learns to generate
    template: str  # the same in Jinja, for `transformers`, vLLM and llama.cpp; {system} is the default system message
    after_end: str = ""  # between the assistant's end token and the next turn
    other_ends: tuple[str, ...] = ()  # further tokens that end a response, if the vocabulary has them
    begin_each: bool = False  # `begin` precedes every user turn, not only the first turn
    system_in_user: tuple[str, str] | None = None  # the texts around the system message, inside the first user turn
    silent: tuple[str, ...] = ()  # roles with nothing before their content
    trail: str = ""  # text between an assistant turn's content and its end token

    def closed(self, text: str) -> str:
        """The content of an assistant turn with `trail` at its end exactly once, as it precedes the end token."""
        return text.rstrip() + self.trail if self.trail else text


OURS = ChatFormat(
    name="instruct_llama", begin="<s>", before="<|{role}|>", after="", end="</s>",
    template="{{ '<s>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
)  # fmt: skip
CHATML = ChatFormat(  # SmolLM2, Qwen and others: the model card of HuggingFaceTB/SmolLM2-135M-Instruct
    name="chatml", begin="", before="<|im_start|>{role}\n", after="<|im_end|>\n", end="<|im_end|>", after_end="\n",
    other_ends=("<|endoftext|>",),
    template="{% for message in messages %}{% if loop.first and '{system}' and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n{system}<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)  # fmt: skip
LLAMA3 = ChatFormat(  # LLaMA 3 (arXiv:2407.21783, section 4.1.1), as in Meta's model card
    name="llama3", begin="<|begin_of_text|>", before="<|start_header_id|>{role}<|end_header_id|>\n\n",
    after="<|eot_id|>", end="<|eot_id|>", other_ends=("<|end_of_text|>", "<|eom_id|>"),
    template="{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
)  # fmt: skip
LLAMA2 = ChatFormat(  # LLaMA 2 chat (arXiv:2307.09288, appendix A.3.3): no role tokens in its vocabulary, so plain text
    name="llama2", begin="<s>", before="[INST]", after="[/INST]", end="</s>", begin_each=True,
    system_in_user=("<<SYS>>\n", "\n<</SYS>>\n\n"), silent=("assistant",), trail=" ",
    template="{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].rstrip() + ' </s>' }}{% endif %}{% endfor %}",
)  # fmt: skip
FORMATS = {chat.name: chat for chat in (OURS, CHATML, LLAMA3, LLAMA2)}


def format_for(known: Sequence[str]) -> ChatFormat:
    """The format whose special tokens are in the vocabulary; LLaMA 2's needs only `<s>` and `</s>`."""
    marks = {"instruct_llama": MARKERS[1], "chatml": "<|im_start|>", "llama3": "<|start_header_id|>"}
    return FORMATS[next((name for name, mark in marks.items() if mark in known), "llama2")]


def dialog_problem(messages: Sequence[Message]) -> str | None:
    """The first problem of a dialog's turns, its details in brackets, or None.

    A dialog is an optional system message, then alternating user and assistant turns, the user first.
    """
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f'a turn is not {{"role": …, "content": …}} (turn {number})'
        if message["role"] not in ROLES:
            return f"a role is not system, user or assistant (turn {number}: {message['role']!r})"
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) == first:
        return "there is no user turn"
    for index in range(first, len(messages)):
        role, due = messages[index]["role"], ("user", "assistant")[(index - first) % 2]
        if role != due:
            return f"the turns do not alternate (turn {index + 1} is {role}, where {due} is expected)"
    return None


def framed(chat: ChatFormat, messages: Sequence[Message], system: str = "") -> list[tuple[str, str, str, bool]]:
    """Each turn as (text before, content, text after, whether it is an assistant turn).

    `system` is the default system message, used if the dialog has none.
    """
    turns = list(messages)
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    if chat.system_in_user and turns[0]["role"] == "system":
        opening, closing = chat.system_in_user
        turns[:2] = [{"role": "user", "content": f"{opening}{turns[0]['content']}{closing}{turns[1]['content']}"}]
    parts = []
    for number, turn in enumerate(turns):
        answer = turn["role"] == "assistant"
        begin = chat.begin if number == 0 or (chat.begin_each and not answer) else ""
        before = "" if turn["role"] in chat.silent else chat.before.format(role=turn["role"])
        text, after = turn["content"], chat.after
        if answer:
            text, after = chat.closed(text), chat.end + chat.after_end
        parts.append((begin + before, text, after, answer))
    return parts
