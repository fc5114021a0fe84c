"""Public data sets: small files of each real shape, the hub's rows and its failures, cards, and text in a stream."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instruct_llama import presets
from instruct_llama.__main__ import main, parse
from instruct_llama.config import UserError
from instruct_llama.data import converters, files, public_sets, sources
from instruct_llama.data.public_sets import SETS, build
from instruct_llama.stages import pretrain, records
from instruct_llama.tools import doctor

ROOT = Path(__file__).resolve().parents[1]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, text: str) -> str:
    """A text file, gzipped if its name says so; returns its path for `--files`."""
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def jsonl(path: Path, *rows: Any) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def made(built: public_sets.Built) -> list[dict[str, Any]]:
    """The records of a build, read as a stage reads them."""
    found = sources.read(built.path)
    assert found.kind == built.card["kind"] and not found.dropped
    return found.records


# ---------------------------------------------------------------- rows as their publishers write them

DOLLY = [
    {"instruction": "When did Virgin Australia start?", "context": "It commenced services on 31 August 2000.",
     "response": "On 31 August 2000.", "category": "closed_qa"},
    {"instruction": "Name a fish.", "context": "", "response": "Tope", "category": "classification"},
    {"instruction": "Say nothing.", "context": "", "response": "", "category": "open_qa"},
    {"instruction": "Half a row.", "context": ""},
]  # fmt: skip
DOLLY_DIALOGS = [
    [user("When did Virgin Australia start?\n\nIt commenced services on 31 August 2000."),
     assistant("On 31 August 2000.")],
    [user("Name a fish."), assistant("Tope")],
]  # fmt: skip
ALPACA = [
    {"instruction": "Add them.", "input": "2, 3", "output": "5"},
    {"instruction": "Say hi.", "input": "", "output": "Hi"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
]
QUEEN = "Beyoncé was born in Houston."
KING = "Elvis was born in Tupelo."
SQUAD_OFFICIAL = {
    "version": "v2.0",
    "data": [
        {"title": "Beyoncé", "paragraphs": [{"context": QUEEN, "qas": [
            {"question": "Where was she born?", "id": "1", "is_impossible": False,
             "answers": [{"text": "Houston", "answer_start": 20}, {"text": "in Houston", "answer_start": 17}]},
            {"question": "When was she born?", "id": "2", "answers": [], "is_impossible": True,
             "plausible_answers": [{"text": "Houston", "answer_start": 20}]},
        ]}]},
        {"title": "Elvis", "paragraphs": [{"context": KING, "qas": [
            {"question": "Where was he born?", "id": "3", "is_impossible": False,
             "answers": [{"text": "Tupelo", "answer_start": 18}]},
        ]}]},
    ],
}  # fmt: skip
SQUAD_FLAT = [
    {"id": "1", "title": "Beyoncé", "context": QUEEN, "question": "Where was she born?",
     "answers": {"text": ["Houston", "in Houston"], "answer_start": [20, 17]}},
    {"id": "2", "title": "Beyoncé", "context": QUEEN, "question": "When was she born?",
     "answers": {"text": [], "answer_start": []}},
    {"id": "3", "title": "Elvis", "context": KING, "question": "Where was he born?",
     "answers": {"text": ["Tupelo"], "answer_start": [18]}},
]  # fmt: skip
SQUAD_DIALOGS = [
    [{"role": "system", "content": QUEEN}, user("Where was she born?"), assistant("Houston"),
     user("When was she born?"), assistant("The passage does not say.")],
    [{"role": "system", "content": KING}, user("Where was he born?"), assistant("Tupelo")],
]  # fmt: skip
SITUATIONS = {
    "1": {"context": "Lee lost his keys.", "speaker": "Lee", "turns": ["I lost my keys.", "Oh no!", "Yes.", "Look."]},
    "2": {"context": "Lee won.", "speaker": "Lee", "turns": ["I won!", "Great!", "I\u2019m glad."]},
    "3": {"context": "Lee fell.", "speaker": "Lee", "turns": ["I fell.", "Ouch.", ""]},
    "4": {"context": "Lee sat.", "speaker": "Lee", "turns": ["I sat."]},
}
SITUATION_DIALOGS = [
    [{"role": "system", "content": "You are talking with Lee, a friend. Lee lost his keys."},
     user("I lost my keys."), assistant("Oh no!"), user("Yes."), assistant("Look.")],
    [{"role": "system", "content": "You are talking with Lee, a friend. Lee won."},
     user("I won!"), assistant("Great!")],
]  # fmt: skip


def answer(score: int, text: str) -> dict[str, Any]:
    return {"answer_id": 1, "author": "x", "author_id": 2, "author_profile": "https://…", "pm_score": score,
            "selected": False, "text": text}  # fmt: skip


VOTES = [
    {"qid": 7, "question": "<p>How do I  use\n<code>a &lt; b</code>?</p>\n", "date": "2020/01/01", "metadata": ["h"],
     "answers": [answer(1, "<p>Like so:</p>\n\n<pre><code>if a &lt; b:\n    go()\n</code></pre>"),
                 answer(-1, "<p>You&#39;d <b>not</b>.</p>"), answer(4, "<ul>\n<li>Read.</li>\n<li>Think.</li>\n</ul>"),
                 answer(1, "<p>The same score, later.</p>")]},
    {"qid": 8, "question": "<p>A tie?</p>", "answers": [answer(2, "<p>one</p>"), answer(2, "<p>two</p>")]},
    {"qid": 9, "question": "<p>A picture?</p>", "answers": [answer(2, "<p>one</p>"), answer(1, "<img src='x'>")]},
]  # fmt: skip
RANKED = {
    "prompt": [user("How do I use a < b?")],
    "completions": ["- Read.\n- Think.", "Like so:\n\nif a < b:\n    go()", "You'd not."],
}
FINEWEB = [
    {"text": " A page.\n\nMore of it. ", "id": "<urn:uuid:1>", "dump": "CC-MAIN-2013-20", "url": "http://a",
     "file_path": "s3://x", "language": "en", "language_score": 0.95, "token_count": 6, "score": 3.1, "int_score": 3},
    {"text": "Another.", "id": "<urn:uuid:2>", "dump": "CC-MAIN-2013-20", "url": "http://b", "file_path": "s3://x",
     "language": "en", "language_score": 0.9, "token_count": 2, "score": 3.0, "int_score": 3},
]  # fmt: skip
STORIES = "Once upon a time.\n\nThe end.\n<|endoftext|>\n\n\nTom ran.\n<|endoftext|>\n"
PAIRS = [
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Well?\n\nAssistant: Yes.",
     "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Well?\n\nAssistant: No."},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nAssistant: b", "rejected": "\n\nHuman: Hi\n\nAssistant: c"},
]  # fmt: skip


# ---------------------------------------------------------------- every set from its own files


@pytest.mark.parametrize("name", ["dolly.jsonl", "dolly.jsonl.gz"])
def test_dolly(tmp_path: Path, name: str) -> None:
    built = build("dolly", tmp_path, files=[jsonl(tmp_path / f"in-{name}", *DOLLY)])
    assert [record["messages"] for record in made(built)] == DOLLY_DIALOGS
    assert built.card["dropped"] == {"a response is empty": 1, "it lacks response": 1}


def test_alpaca_as_one_json_list(tmp_path: Path) -> None:
    built = build("alpaca-cleaned", tmp_path, files=[write(tmp_path / "a.json", json.dumps(ALPACA, indent=4))])
    assert [record["messages"] for record in made(built)] == [
        [user("Add them.\n\n2, 3"), assistant("5")], [user("Say hi."), assistant("Hi")],
    ]  # fmt: skip
    assert built.card["dropped"] == {"a response is empty": 1}


def squad_files(folder: Path) -> dict[str, str]:
    return {
        "official": write(folder / "train-v2.0.json", json.dumps(SQUAD_OFFICIAL)),
        "indented": write(folder / "indented.json.gz", json.dumps(SQUAD_OFFICIAL, indent=1)),
        "lines": jsonl(folder / "flat.jsonl", *SQUAD_FLAT),
        "parquet": parquet(folder / "flat.parquet", SQUAD_FLAT),
    }


@pytest.mark.parametrize("shape", ["official", "indented", "lines", "parquet"])
def test_squad_is_one_dialog_a_passage(tmp_path: Path, shape: str) -> None:
    built = build("squad", tmp_path, files=[squad_files(tmp_path)[shape]])
    assert [record["messages"] for record in made(built)] == SQUAD_DIALOGS
    assert built.card["dropped"] == {}


def test_p03_a_bad_question_drops_its_whole_passage(tmp_path: Path) -> None:
    bad = [{**SQUAD_FLAT[1], "question": " "}, {**SQUAD_FLAT[1], "answers": {"text": [""], "answer_start": [0]}},
           {**SQUAD_FLAT[1], "answers": None}]  # fmt: skip
    reasons = ["question is empty", "a response is empty", "answers is not a list of texts"]
    for row, reason in zip(bad, reasons, strict=True):
        flat = [SQUAD_FLAT[0], row, SQUAD_FLAT[2]]
        built = build("squad", tmp_path, files=[jsonl(tmp_path / "flat.jsonl", *flat)])
        assert [record["messages"] for record in made(built)] == SQUAD_DIALOGS[1:]
        assert built.card["dropped"] == {reason: 1}


def test_p06_a_passage_stands_on_one_side(tmp_path: Path) -> None:
    flat = [{**SQUAD_FLAT[0], "context": f"Passage {i // 4}.", "question": f"Question {i}?"} for i in range(400)]
    built = build("squad", tmp_path, files=[jsonl(tmp_path / "flat.jsonl", *flat)])
    sides = sources.split(made(built), 0.3)
    first, second = ({record["messages"][0]["content"].split("\n")[0] for record in side} for side in sides)
    assert len(first) + len(second) == 100 and not first & second and second


def test_p06_a_situation_stands_on_one_side(tmp_path: Path) -> None:
    """Several people talked about each situation, which is the system message: it must not be seen in training."""
    row = SITUATIONS["1"]
    rows = {str(i): {**row, "context": f"Case {i // 5}.", "turns": [f"Well {i}.", "Oh."]} for i in range(500)}
    built = build("commonsense-dialogues", tmp_path, files=[write(tmp_path / "train.json", json.dumps(rows))])
    for kind in (sources.as_dialogs, sources.as_prompts):
        sides = sources.split(kind(sources.read(built.path)), 0.3)
        first, second = ({record["group"] for record in side} for side in sides)
        assert len(first) + len(second) == 100 and not first & second and second


@pytest.mark.parametrize("indent", [None, 4])
def test_commonsense_dialogues(tmp_path: Path, indent: int | None) -> None:
    text = json.dumps(SITUATIONS, indent=indent)
    built = build("commonsense-dialogues", tmp_path, files=[write(tmp_path / "train.json", text)])
    assert [record["messages"] for record in made(built)] == SITUATION_DIALOGS
    assert built.card["dropped"] == {"turn is empty": 1, "there is no user turn": 1}


def test_stack_exchange_ranks_two_to_eight_answers(tmp_path: Path) -> None:
    built = build("stackexchange", tmp_path, files=[parquet(tmp_path / "site.parquet", VOTES[1:2] + VOTES)])
    assert made(built) == [RANKED]
    assert built.card["dropped"] == {"fewer than two answers differ in score": 2, "a response is empty": 1}
    many = {**VOTES[1], "answers": [answer(i % 10, f"<p>{i}</p>") for i in range(30)]}
    (record,) = converters.from_votes(many)
    assert record["completions"] == ["9", "8", "7", "6", "5", "4", "3", "2"]


def test_html_becomes_text() -> None:
    assert converters.plain("plain") == "plain"
    assert converters.plain("<p>a<br>b</p>\n<p>c <em>d</em> e&amp;f</p>") == "a\nb\n\nc d e&f"
    code = converters.plain("<p>see</p><pre><code>  x = 1\n\n  y = 2  \n</code></pre>now")
    assert code == "see\n\n  x = 1\n\n  y = 2\n\nnow"
    assert converters.plain("<blockquote>\n<p>said</p>\n</blockquote>\n<ol><li>one</li></ol>") == "said\n\n- one"
    assert converters.plain("a < b").startswith("a < b")


def test_tinystories_text(tmp_path: Path) -> None:
    expected = [{"text": "Once upon a time.\n\nThe end."}, {"text": "Tom ran."}]
    for name, text in (("a.txt", STORIES), ("a.txt.gz", STORIES), ("b.txt", STORIES.replace("\n<|", "<|"))):
        built = build("tinystories", tmp_path, files=[write(tmp_path / name, text)])
        assert made(built) == expected and built.card["dropped"] == {}
    both = [write(tmp_path / "a.txt", STORIES), jsonl(tmp_path / "b.jsonl", {"text": "Third."}, {"text": " "})]
    built = build("tinystories", tmp_path, files=both)
    assert made(built) == [*expected, {"text": "Third."}] and built.card["dropped"] == {"text is empty": 1}


def test_p03_a_story_that_the_file_cuts_off_is_dropped(tmp_path: Path) -> None:
    built = build("tinystories", tmp_path, files=[write(tmp_path / "a.txt", STORIES + "Half a st")])
    assert [record["text"] for record in made(built)][1:] == ["Tom ran."]
    assert built.card["dropped"] == {"the text is cut off at the end of the file": 1}


@pytest.mark.parametrize("shape", ["lines", "parquet"])
def test_fineweb_edu_keeps_the_text_alone(tmp_path: Path, shape: str) -> None:
    file = jsonl(tmp_path / "a.jsonl", *FINEWEB) if shape == "lines" else parquet(tmp_path / "a.parquet", FINEWEB)
    built = build("fineweb-edu", tmp_path, files=[file])
    assert made(built) == [{"text": "A page.\n\nMore of it."}, {"text": "Another."}]


@pytest.mark.parametrize("name", ["hh-rlhf", "hh-rlhf-harmless", "hh-rlhf-online", "hh-rlhf-rejection-sampled"])
def test_p03_hh_pairs_serve_reward_models_sft_and_ppo(tmp_path: Path, name: str) -> None:
    built = build(name, tmp_path, files=[jsonl(tmp_path / "train.jsonl.gz", *PAIRS)])
    prompt, found = [user("Hi"), assistant("Hello!"), user("Well?")], sources.read(built.path)
    assert sources.as_comparisons(found) == [{"prompt": prompt, "completions": ["Yes.", "No."]}]
    assert sources.as_dialogs(found) == [{"messages": [*prompt, assistant("Yes.")]}]
    assert sources.as_prompts(found) == [{"prompt": prompt}]
    assert built.card["dropped"] == {"the turns do not alternate": 1}


def test_prompts_of_dialogs_keep_the_passage_and_the_situation(tmp_path: Path) -> None:
    file = write(tmp_path / "train.json", json.dumps(SITUATIONS))
    (first, _) = sources.as_prompts(sources.read(build("commonsense-dialogues", tmp_path, files=[file]).path))
    assert [turn["role"] for turn in first["prompt"]] == ["system", "user", "assistant", "user"]


# ---------------------------------------------------------------- sums


def test_sums_are_right_and_asked_once(tmp_path: Path) -> None:
    dialogs = [record["messages"] for record in made(build("arithmetic", tmp_path))]
    numbers = {converters.in_words(n): n for n in range(200)}
    assert len(numbers) == 200
    seen = set()
    for question, reply in dialogs:
        asked = re.fullmatch(r"What is (\S+) (\+|-|×|plus|minus|times) (\S+)\?", question["content"])
        a, sign, b = asked.groups()
        words = a in numbers
        x, y = (numbers[a], numbers[b]) if words else (int(a), int(b))
        sign = {"plus": "+", "minus": "-", "times": "×"}.get(sign, sign)
        result = {"+": x + y, "-": x - y, "×": x * y}[sign]
        text = reply["content"]
        assert (numbers[text.split(" is ")[1].rstrip(".")] if words else int(text.split(" = ")[1])) == result
        seen.add((sign, max(x, y), min(x, y)))
    assert len(seen) == len(dialogs) == 10_191
    assert 0.4 < sum("=" in reply["content"] for _, reply in dialogs) / len(dialogs) < 0.6
    assert converters.in_words(0) == "zero" and converters.in_words(21) == "twenty-one"
    assert converters.in_words(90) == "ninety"
    assert converters.in_words(100) == "one hundred" and converters.in_words(112) == "one hundred and twelve"


def test_p06_no_sum_stands_on_both_sides_in_another_form(tmp_path: Path) -> None:
    sides = sources.split([record["messages"] for record in made(build("arithmetic", tmp_path, limit=4000))], 0.2)
    units = [{tuple(sorted(pair.items())) for pair in _units(side)} for side in sides]
    assert not units[0] & units[1] and len(units[0]) + len(units[1]) == 4000


def _units(side: list[Any]) -> Iterator[dict[str, Any]]:
    numbers = {converters.in_words(n): n for n in range(200)} | {str(n): n for n in range(200)}
    for question, _ in side:
        a, sign, b = question["content"].removeprefix("What is ").rstrip("?").split(" ")
        sign = {"plus": "+", "minus": "-", "times": "×"}.get(sign, sign)
        yield {"sign": sign, "high": max(numbers[a], numbers[b]), "low": min(numbers[a], numbers[b])}


def test_the_seed_decides_the_sums_and_nothing_else(tmp_path: Path) -> None:
    one, two, other = (build("arithmetic", tmp_path / x, limit=50, seed=s) for x, s in (("a", 1), ("b", 1), ("c", 2)))
    for kind in (".jsonl", ".card.json", ".card.md"):
        same, again, new = (built.path.with_suffix("").with_suffix(kind).read_bytes() for built in (one, two, other))
        assert same == again != new
    with pytest.raises(UserError, match="arithmetic is generated from --seed: remove --files"):
        build("arithmetic", tmp_path, files=["a.jsonl"])


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`datasets.load_dataset` answers with the rows put into this list, or raises the exception among them."""
    import datasets

    rows: list[Any] = []

    def load(path: str, *, split: str, streaming: bool, **options: str) -> Iterator[Any]:
        assert streaming and split == "train"
        rows.insert(0, (path, options))
        return stream()

    def stream() -> Iterator[Any]:
        for row in rows[1:]:
            if isinstance(row, Exception):
                raise row
            yield row

    monkeypatch.setattr(datasets, "load_dataset", load)
    return rows


HUB_ROWS = {
    "tinystories": ([{"text": "Once."}], {}), "fineweb-edu": (FINEWEB, {"name": "sample-10BT"}), "dolly": (DOLLY, {}),
    "alpaca-cleaned": (ALPACA, {}), "squad": (SQUAD_FLAT, {}), "hh-rlhf": (PAIRS, {"data_dir": "helpful-base"}),
    "hh-rlhf-harmless": (PAIRS, {"data_dir": "harmless-base"}),
    "hh-rlhf-online": (PAIRS, {"data_dir": "helpful-online"}),
    "hh-rlhf-rejection-sampled": (PAIRS, {"data_dir": "helpful-rejection-sampled"}), "stackexchange": (VOTES, {}),
}  # fmt: skip
KEPT = {"fineweb-edu": 2, "dolly": 2, "alpaca-cleaned": 2, "squad": 2}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_the_hubs_rows_are_streamed(tmp_path: Path, hub: list[Any], name: str) -> None:
    rows, options = HUB_ROWS[name]
    hub += rows
    built = build(name, tmp_path)
    assert hub[0] == (SETS[name].hub, options)
    assert len(made(built)) == built.card["kept"] == KEPT.get(name, 1)
    assert built.card["source"] == f"https://huggingface.co/datasets/{SETS[name].hub}"


def test_commonsense_dialogues_come_from_their_own_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(write(tmp_path / "train.json", json.dumps(SITUATIONS)))
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url) or file.open("rb"))
    assert [record["messages"] for record in made(build("commonsense-dialogues", tmp_path))] == SITUATION_DIALOGS
    assert asked == ["https://raw.githubusercontent.com/alexa/Commonsense-Dialogues/HEAD/data/train.json"]


def test_every_set_of_the_table_is_tested_here() -> None:
    assert set(SETS) == {*HUB_ROWS, "commonsense-dialogues", "arithmetic"}


def hub_errors() -> list[tuple[Exception, str]]:
    """What the libraries raise, and what of it must be said; the last two want a login."""
    import datasets.exceptions as ours
    import huggingface_hub.errors as hubs

    reply = SimpleNamespace(headers={}, request=None)
    gated = "accept its terms at https://.*log in"
    return [
        (ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"), "Couldn't reach"),
        (hubs.OfflineModeIsEnabled("Offline mode is enabled."), "Offline mode is enabled"),
        (hubs.LocalEntryNotFoundError("No file in the cache."), "No file in the cache"),
        (ours.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub or cannot be accessed."), "doesn't exist"),
        (hubs.RepositoryNotFoundError("404 Not Found", response=reply), "404"),
        (hubs.HfHubHTTPError("500 Server Error", response=reply), "500"),
        (ours.DatasetGenerationError("An error occurred"), "An error occurred"),
        (ours.DataFilesNotFoundError("No data files found"), "No data files"),
        (ValueError("BuilderConfig 'x' not found."), "BuilderConfig"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts"),
        (TimeoutError(), "TimeoutError"),
        (ours.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), gated),
        (hubs.GatedRepoError("403 Client Error", response=reply), gated),
    ]


def test_a_failure_of_the_hub_names_the_local_route(tmp_path: Path, hub: list[Any]) -> None:
    route = r"databricks-dolly-15k\.jsonl.*`python -m instruct_llama data dolly --files PATH`"
    wants_login = []
    for error, said in hub_errors():
        for before in ([], DOLLY[:1]):  # at once, and in the middle of the stream
            hub[:] = [*before, error]
            with pytest.raises(UserError, match=rf"dolly cannot be read from https://.*{said}.*{route}") as raised:
                build("dolly", tmp_path)
            assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []
        wants_login.append("accept its terms" in str(raised.value))
    assert wants_login == [False] * (len(wants_login) - 2) + [True] * 2


def test_without_a_network_every_set_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, offline."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name, source in SETS.items():
        if source.hub:
            with pytest.raises(UserError, match=f"data {name} --files PATH") as raised:
                build(name, tmp_path)
            assert source.fetch in str(raised.value) and source.fetch
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- files that cannot be used


def test_p05_files_that_are_cut_off_are_named(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in DOLLY * 50).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    table = Path(parquet(tmp_path / "cut.parquet", DOLLY[:2]))
    table.write_bytes(table.read_bytes()[:-20])
    cases = {
        str(tmp_path / "cut.jsonl.gz"): r"cut\.jsonl\.gz is a truncated or damaged gzip file: download",
        str(table): r"cut\.parquet is a truncated or damaged parquet file: download it again",
        write(
            tmp_path / "cut.jsonl", json.dumps(DOLLY[0]) + '\n{"in'
        ): r"cut\.jsonl line 2 is not valid JSON .*download",
        write(
            tmp_path / "list.json", json.dumps(DOLLY, indent=1)[:80]
        ): r"list\.json line 4 is not valid JSON .*truncated",
        write(tmp_path / "squad.json", '{"version": "v2.0", "data": [{"ti'): r"squad\.json line 1 is not valid JSON",
        write(tmp_path / "open.json", '{\n"1": {'): r"open\.json line 2 is not valid JSON .*truncated",
        write(tmp_path / "empty.jsonl", "\n\n"): r"empty\.jsonl is empty: download it again",
        str(tmp_path / "none.jsonl"): r"There is no file .*none\.jsonl",
        str(tmp_path): "is a folder",
    }
    for file, message in cases.items():
        with pytest.raises(UserError, match=message):
            build("dolly", tmp_path / "out", files=[file])
    assert not list((tmp_path / "out").iterdir())


def test_a_file_of_another_set_is_refused_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"dolly has no usable record .*2 because it lacks context and response.*databricks"
    ):
        build("dolly", tmp_path, files=[jsonl(tmp_path / "a.jsonl", *ALPACA[:2])])
    for foreign, reason in ((ALPACA[0], "it lacks context and qas"), ({"data": [{"a": 1}]}, "it lacks context and qas"),
                            ({"data": ["x"]}, "it is not a JSON object")):  # fmt: skip
        with pytest.raises(UserError, match=rf"squad has no usable record .*1 because {reason}"):
            build("squad", tmp_path, files=[jsonl(tmp_path / "a.jsonl", foreign)])
    with pytest.raises(UserError, match=r"1 because it is not a JSON object"):
        build("dolly", tmp_path, files=[write(tmp_path / "a.json", "[3]")])
    assert not (tmp_path / "dolly.jsonl").exists()


def test_text_without_separators_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LONGEST", 50)
    with pytest.raises(UserError, match=r"a\.txt line 51: no <\|endoftext\|> in 50 lines"):
        build("tinystories", tmp_path, files=[write(tmp_path / "a.txt", "words\n" * 1000)])


def test_bad_names_and_limits() -> None:
    with pytest.raises(UserError, match="no public data set 'doly': choose from tinystories, .*stackexchange"):
        build("doly", "x")
    with pytest.raises(UserError, match="--limit is -1"):
        build("dolly", "x", limit=-1)


# ---------------------------------------------------------------- cards and limits


def test_the_card_says_what_was_built(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "databricks-dolly-15k.jsonl", *DOLLY)
    built = build("dolly", tmp_path / "out", files=[file])
    card = json.loads((tmp_path / "out" / "dolly.card.json").read_text("utf-8"))
    assert card == built.card
    assert card["sha256"] == hashlib.sha256(built.path.read_bytes()).hexdigest()
    assert (card["kept"], card["dropped"]) == (2, {"a response is empty": 1, "it lacks response": 1})
    assert (card["licence"], card["kind"], card["limit"]) == ("CC BY-SA 3.0", "dialogs", 0)
    assert card["source"] == "databricks-dolly-15k.jsonl"
    assert card["published_at"] == "https://huggingface.co/datasets/databricks/databricks-dolly-15k"
    page = (tmp_path / "out" / "dolly.card.md").read_text("utf-8")
    for said in ("# dolly", "| licence | CC BY-SA 3.0 |", "| records | 2 dialogs |", card["sha256"],
                 "1 because a response is empty, 1 because it lacks response", card["published_at"]):  # fmt: skip
        assert said in page
    assert str(tmp_path) not in page + json.dumps(card)
    assert built.describe().endswith("1 because it lacks response. Licence: CC BY-SA 3.0.")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, hub: list[Any]) -> None:
    hub += SQUAD_FLAT
    for out in ("a", "b"):
        build("squad", tmp_path / out)
        del hub[0]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["squad.card.json", "squad.card.md", "squad.jsonl"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_limit_stops_reading(tmp_path: Path, hub: list[Any]) -> None:
    hub += [*PAIRS[::-1], *PAIRS, RuntimeError("read too far")]
    built = build("hh-rlhf", tmp_path, limit=2)
    assert len(made(built)) == built.card["kept"] == built.card["limit"] == 2
    assert built.card["dropped"] == {"the turns do not alternate": 1}
    assert "the first 2 records" in built.path.with_suffix(".card.md").read_text("utf-8")


def test_building_holds_a_row_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked, written = [], []

    def stream(*_: Any, **__: Any) -> Iterator[Any]:
        for i in range(4):
            asked.append(i)
            yield {"text": str(i)}

    def write_jsonl(path: Path, items: Iterator[Any]) -> int:
        written.extend(len(asked) for _ in items)
        path.write_text("x")
        return len(written)

    monkeypatch.setattr(datasets, "load_dataset", stream)
    monkeypatch.setattr(public_sets, "write_jsonl", write_jsonl)
    build("tinystories", tmp_path)
    assert written == [1, 2, 3, 4]  # when the n-th record is written, n rows have been read


def test_licences_are_stated_in_the_readme_too() -> None:
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for name, source in SETS.items():
        (row,) = [line for line in page.splitlines() if re.match(rf"\| `data {name}[ `]", line)]
        assert source.licence.split(";")[0].split(" by ")[0] in row
        assert source.size.split(" ")[0] in row
    for words in re.findall(r"`(data [\w-]+(?: --\S+ \S+)*)`", page):
        assert parse(words.split()).limit in (0, 50_000, 100_000)


# ---------------------------------------------------------------- the command and the stages


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the checkout, and is the current one."""
    for name in ("notebooks", "checkpoints", "data"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INSTRUCT_LLAMA_OUT", raising=False)
    return tmp_path


def test_the_command_builds_from_files(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = jsonl(project / "a.jsonl", DOLLY[0]), jsonl(project / "b.jsonl", *DOLLY[1:])
    assert main(["data", "dolly", "--files", a, b]) == 0
    assert "2 dialogs, dropped 1 because a response is empty" in capsys.readouterr().out
    assert len(sources.read(project / "data" / "dolly.jsonl")) == 2
    assert main(["data", "dolly", "--files", a, b, "--limit", "1", "--out", "there"]) == 0
    assert len(sources.read(project / "there" / "dolly.jsonl")) == 1


def test_the_command_says_what_to_do(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "dolly"]) == 2  # tests are offline
    assert "data dolly --files PATH" in capsys.readouterr().err
    assert main(["data", "doly"]) == 2
    assert "no set of that name: choose from tinychat, tinystories" in capsys.readouterr().err
    assert main(["data", "tinychat", "--limit", "3"]) == 2
    assert "--files and --limit are for a public set" in capsys.readouterr().err


def test_a_stage_takes_a_set_by_name_and_builds_it_once(
    project: Path, hub: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    hub += [{"chosen": f"\n\nHuman: Q{i}\n\nAssistant: a", "rejected": f"\n\nHuman: Q{i}\n\nAssistant: b"}
            for i in range(99)]  # fmt: skip
    settings = presets.get("tiny").replace(data="hh-rlhf")
    train, valid = records.comparisons(settings)
    assert len(train) + len(valid) == 99 and valid
    assert "hh-rlhf is not in data: it is built first" in capsys.readouterr().out
    assert doctor.data_file("hh-rlhf") == "hh-rlhf is in data/."
    assert "will be built" in doctor.data_file("dolly")
    hub.clear()
    assert {p[0]["content"] for side in records.prompts(settings) for p in side} == {f"Q{i}" for i in range(99)}
    assert {d[-1]["content"] for side in records.demonstrations(settings) for d in side} == {"a"}
    assert not hub and capsys.readouterr().out == ""


def test_a_stage_builds_a_part_of_a_huge_set(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(public_sets, "build", lambda *args, **options: asked.append((args, options)) or built)
    built = public_sets.Built(Path("x"), {"kept": 1, "kind": "text", "dropped": {}, "licence": "y"})
    settings = presets.get("tiny").replace(data="fineweb-edu", seed=3)
    assert records.data_path(settings) == project / "data" / "fineweb-edu.jsonl"
    assert asked == [(("fineweb-edu", project / "data"), {"limit": 100_000, "seed": 3})]
    assert "its first 100,000 records are built first" in capsys.readouterr().out
    assert records.data_path(presets.get("tiny")) is None
    assert records.data_path(presets.get("tiny").replace(data="my.jsonl")) == Path("my.jsonl")


# ---------------------------------------------------------------- text in a stream


def test_a_stream_of_texts_equals_the_file_read_whole(tmp_path: Path) -> None:
    cases = [
        jsonl(tmp_path / "a.jsonl", {"text": "one\n\ntwo"}, {"text": "three", "id": 4}),
        jsonl(tmp_path / "b.jsonl.gz", {"text": "one"}, {"text": "two"}),
        write(tmp_path / "c.txt", "one\n\ntwo\n"),
        jsonl(tmp_path / "d.jsonl", {"messages": [user("a"), assistant("b")]}),
        jsonl(tmp_path / "e.jsonl", {"text": "x", "prompt": "a", "response": "b"}),
        write(tmp_path / "f.json", json.dumps([{"text": "one"}, {"text": "two"}])),
    ]
    for file in cases:
        assert list(sources.stream_texts(file)) == sources.as_texts(sources.read(file)) != []
    for bad in ('{"text": "a"}\n{"text": ""}\n', '{"text": "a"}\n{"tex'):
        with pytest.raises(UserError) as whole:
            sources.read(write(tmp_path / "bad.jsonl", bad))
        with pytest.raises(UserError, match=re.escape(str(whole.value))):
            list(sources.stream_texts(tmp_path / "bad.jsonl"))


def test_a_stream_of_texts_reads_no_further_than_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nnot json\n')
    stream = sources.stream_texts(file)
    assert [next(stream), next(stream)] == ["one", "two"]
    with pytest.raises(UserError, match="line 3 is not valid JSON"):
        next(stream)


def test_p06_a_file_of_text_is_split_by_content_in_a_stream(tmp_path: Path) -> None:
    texts = [f"Text number {i}." for i in range(500)]
    settings = presets.get("tiny").replace(data=jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts)))
    train, valid = records.texts(settings)
    assert (list(train), list(valid)) == sources.split(texts, records.HELDOUT_TEXTS)
    assert list(train) == list(train) and 0 < len(list(valid)) < 30  # gone through again: the same


def test_a_text_file_is_tokenised_without_being_held(
    micro: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instruct_llama.worlds import tinychat

    texts = [f"{text} ({i})" for i, text in enumerate(tinychat.corpus(2, 30_000))]
    file = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))

    def refuse(*_: Any) -> Any:
        raise AssertionError("the file was read whole")

    monkeypatch.setattr(sources, "read", refuse)
    tokenizer, train, valid = pretrain.build_tokens(micro(tmp_path, data=file), tmp_path / "tokens")
    expected = sources.split(texts, records.HELDOUT_TEXTS)
    for ids, side in zip((train, valid), expected, strict=True):
        assert ids.tolist() == [i for text in side for i in (*tokenizer.encode(text), tokenizer.eos_id)]
    joined = "\0".join((*expected[0], "", *expected[1]))
    stamp = (tmp_path / "tokens" / "made_from.txt").read_text()
    assert stamp.split()[0] == hashlib.sha256(joined.encode()).hexdigest()


def test_a_text_of_one_piece_holds_out_its_end(tmp_path: Path) -> None:
    piece = "".join(f"{i} " for i in range(100))
    settings = presets.get("tiny").replace(data=jsonl(tmp_path / "a.jsonl", {"text": piece}))
    train, valid = records.texts(settings)
    assert "".join((*train, *valid)) == piece and len(valid[0]) == len(piece) // 20
