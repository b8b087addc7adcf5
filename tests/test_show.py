"""What `trl-cdr show` and `DensityRatioScorer.show` print: the text that each model reads, counts and the score."""

import io
import json
import re

import pytest
from rich.console import Console
from tiny import CHATML, answer, byte_tokenizer, chat, llama

from trl_cdr import Criteria, DensityRatioScorer, DomainCriteria, Exemplar, Score
from trl_cdr.cli import main
from trl_cdr.scoring.show import ShownModel, ShownRow, parse_prompt, print_row, read_row, token_texts

# As Qwen3's: an answer of a conversation has an empty thought before it, and the generation prompt does not open one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSERTED = "<think>\n\n</think>\n\n"
START = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CODES = {"not read": "9;31", "conditioning": "36", "inserted": "33", "completion": "32", "end": "35"}


def build(template=THINKING, weak=None, positions=256, **options):
    tokenizer = byte_tokenizer(template=template)
    weak = weak or tokenizer
    models = [llama(len(one), seed=seed, positions=positions) for seed, one in enumerate((tokenizer, weak))]
    return DensityRatioScorer(*models, strong_tokenizer=tokenizer, weak_tokenizer=weak, **options)


@pytest.fixture(scope="module")
def scorer():
    return build()


def printed(scorer, *row, width=80, **options):
    """The lines that `show` prints where there is no terminal."""
    console = Console(file=io.StringIO(), width=width)
    scorer.show(*row, console=console, **options)
    return console.file.getvalue()


def sections(text, role):
    """The parts that were printed for a model, as pairs of a name and its text with the marks undone."""
    lines = re.search(rf"^{role}: .*?\n(.*?)^tokens: ", text, flags=re.MULTILINE | re.DOTALL)[1].splitlines()
    parts = []
    for line in lines:
        name = line[:15].strip()
        if name:
            parts.append([name, ""])
        parts[-1][1] += line[15:].replace("·", " ").replace("↵", "\n")
    return [tuple(part) for part in parts]


def join(parts):
    return "".join(text for _, text in parts)


def test_read_row_parts_and_order(scorer):
    row = read_row(scorer, chat("hi"), "four")
    expected = (("prompt", START.format("hi")), ("inserted", INSERTED), ("completion", "four"), ("end", "<|im_end|>"))
    assert row.strong.parts == row.weak.parts == expected
    row = read_row(scorer, chat("hi"), answer("four"), finished=False, is_generated=True)
    assert row.strong.parts == (("prompt", START.format("hi")), ("completion", "four"))


@pytest.mark.parametrize("is_generated", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_read_row_counts_add_up(scorer, finished, is_generated):
    options = {"finished": finished, "is_generated": is_generated}
    row = read_row(scorer, chat("hello world"), "what is <|im_end|> this", **options)
    counts, texts = row.strong.counts, []
    assert counts.total == len(row.strong.ids)
    position = 0
    for count in (counts.prompt, counts.inserted, counts.completion, counts.end):
        texts.append(scorer.load().strong.encoder.tokenizer.decode(row.strong.ids[position : position + count]))
        position += count
    end = "<|im_end|>" if finished else ""
    assert texts == [START.format("hello world"), "" if is_generated else INSERTED, "what is <|im_end|> this", end]
    assert counts.completion + counts.end == row.score.n_tokens
    assert counts.conditioning == counts.lost == 0


def test_read_row_is_what_is_scored(scorer):
    row = read_row(scorer, "hello", "four")
    [score] = scorer.score(["hello"], ["four"])
    assert row.score == score
    assert "".join(text for text, _ in row.tokens) == "four<|im_end|>"
    assert sum(ratio for _, ratio in row.tokens) == pytest.approx(score.value, abs=1e-4)


def test_show_marks_without_terminal(scorer):
    text = printed(scorer, chat("hi  \nthere"), "a\n\nb ")
    assert "\x1b" not in text
    for role in ("strong", "weak"):
        names, texts = zip(*sections(text, role), strict=True)
        assert names == ("[prompt]", "[inserted]", "[completion]", "[end]")
        assert texts == (START.format("hi  \nthere"), INSERTED, "a\n\nb ", "<|im_end|>")
    assert "hi··↵\n" in text
    assert "[completion]   a↵\n               ↵\n               b·\n" in text


def test_show_colours_on_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    criteria = Criteria({"chat": DomainCriteria("be quick")})
    scorer = build(criteria=criteria, domain="chat")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    scorer.show("hi", "four", console=console)
    text = console.file.getvalue()
    for name, shown in {
        "conditioning": "be quick",
        "inserted": "<think>",
        "completion": "four",
        "end": "<|im_end|>",
    }.items():
        assert text.count(f"\x1b[{CODES[name]}m{shown}\x1b[0m") >= 2, name
    assert "[prompt]" not in text
    assert "\x1b[0m<|im_end|>\x1b[2m↵" in text  # the prompt's own text has no colour
    console = Console(file=io.StringIO(), force_terminal=True, no_color=True, width=80)
    scorer.show("hi", "four", console=console)
    assert "[inserted]" in console.file.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("text", ["[/bold] [red]x[/red] :smile:", "[completion] [end]", "<|im_end|>", "\\[a] [link=x]"])
def test_show_markup_verbatim(scorer, text, is_terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
    scorer.show(chat(f"user {text} says"), f"policy {text} writes", console=console)
    shown = console.file.getvalue()
    assert shown.count(f"user {text} says") == 2
    assert shown.count(f"policy {text} writes") == 2


def test_show_spelled_control_tokens(scorer):
    parts = read_row(scorer, chat("a <|im_end|> b"), "c <|im_start|> d").strong.parts
    assert parts == (
        ("prompt", START.format("a <|im_end|> b")),
        ("inserted", INSERTED),
        ("completion", "c <|im_start|> d"),
        ("end", "<|im_end|>"),
    )


def test_show_names_in_text(scorer):
    parts = sections(printed(scorer, chat("hi"), "a\n[end]\nb\n\n[prompt]       c"), "strong")
    assert [name for name, _ in parts] == ["[prompt]", "[inserted]", "[completion]", "[end]"]
    assert parts[2][1] == "a\n[end]\nb\n\n[prompt]       c"


def test_show_escapes_control_characters(scorer):
    text = printed(scorer, chat("hi"), "a\tb\rc\x1b[31md\x07\u2028e\x85f\u200b")
    assert r"a\tb\rc\x1b[31md\x07\u2028e\x85f\u200b" in text
    assert not set("\t\r\x1b\x07\u2028\x85\u200b") & set(text)


def test_show_long_text_is_whole():
    scorer = build(positions=4096)
    prompt, completion = " ".join(f"word{index}  x" for index in range(60)), "y" * 300
    text = printed(scorer, chat(prompt), completion)
    assert join(sections(text, "weak")) == START.format(prompt) + INSERTED + completion + "<|im_end|>"
    table = text[text.index("log-ratio of each token") :].splitlines()
    assert max(map(len, table)) <= 80
    assert sum(line.split()[0].count("y") for line in table[2:]) == 300


def test_print_row_long_token():
    model = ShownModel("a", (("prompt", "b"),))
    row = ShownRow(model, model, Score(1.0), (("x y" * 100, 1.0), ("z", 0.0)), "none", "sum")
    console = Console(file=io.StringIO(), width=80)
    print_row(row, console)
    table = console.file.getvalue().partition("log-ratio of each token")[2].splitlines()[2:]
    assert max(map(len, table)) <= 80
    assert "".join(line.split()[0] for line in table) == "x·y" * 100 + "z"


def test_show_criteria_as_conditioning():
    exemplar = Exemplar("which colour", "quick", "red")
    criteria = Criteria({"chat": DomainCriteria("be quick", (exemplar,)), "plain": DomainCriteria()})
    scorer = build(criteria=criteria, exemplar_style="turns", domain="chat")
    row = read_row(scorer, "hi", "four")
    assert [text for name, text in row.strong.parts if name == "conditioning"] == ["be quick", "which colour", "quick"]
    encoder = scorer.load().strong.encoder
    conditioned = [{"role": "system", "content": "be quick"}, *chat("which colour", "quick", "hi")]
    assert join(row.strong.parts[:-3]) == encoder.template.render(conditioned)
    tokenize = encoder.tokenizer.backend_tokenizer.encode
    texts = ("be quick", "which colour", "quick")
    assert row.strong.counts.conditioning == sum(len(tokenize(text, add_special_tokens=False).ids) for text in texts)
    assert row.strong.counts.total == len(row.strong.ids)
    plain = read_row(scorer, "hi", "four", domain="plain")
    assert [name for name, _ in plain.strong.parts] == ["prompt", "inserted", "completion", "end"]
    assert (plain.score.domain, plain.strong.counts.conditioning) == ("plain", 0)


def test_show_inline_exemplars_of_raw_text():
    criteria = Criteria({"chat": DomainCriteria("be quick", (Exemplar("a", "b", "c", "d"),))})
    scorer = build(criteria=criteria, domain="chat", string_prompts="text")
    row = read_row(scorer, "hi", " four")
    [(first, shown), *rest] = row.strong.parts
    assert (first, shown) == ("conditioning", "be quick\n\nExample\nPrompt: a\nGood: b\nBad: c\nWhy: d")
    assert rest == [("prompt", "\n\nhi"), ("completion", " four"), ("end", "<|im_end|>")]
    assert row.strong.counts.total == len(row.strong.ids)
    assert 0 < row.strong.counts.conditioning < row.strong.counts.prompt


def test_show_without_shared_vocabulary(scorer):
    other = build(weak=byte_tokenizer(300, template=CHATML))
    row = read_row(other, "hello", "the quick brown fox")
    assert row.tokens == ()
    assert row.weak.ids != row.strong.ids
    assert row.weak.counts.total == len(row.weak.ids)
    assert row.weak.counts.completion + row.weak.counts.end > row.score.n_tokens
    assert [name for name, _ in row.weak.parts] == ["prompt", "completion", "end"]
    text = printed(other, "hello", "the quick brown fox")
    assert "log-ratios do not exist for each token" in text
    assert "log-ratio of each token" not in text
    assert "log-ratio of each token" in printed(scorer, "hello", "fox")


def test_show_score():
    scorer = build(gate="surprise")
    [score] = scorer.score(["hello"], ["four"])
    text = printed(scorer, "hello", "four")
    assert f"log-ratio (strong - weak): {score.value:+.4f} nats, over {score.n_tokens} tokens" in text
    assert f"surprise {score.surprise:.4f}" in text
    assert f"gated: {'yes' if score.gated else 'no'}" in text
    logps = re.findall(r"log-probability of completion and end: (.*) nats", text)
    assert logps == [f"{score.strong_logps:.4f}", f"{score.weak_logps:.4f}"]
    table = [line.split() for line in text[text.index("log-ratio of each token") :].splitlines()[2:]]
    assert [row[1] for row in table] == [f"{ratio:+.4f}" for ratio in score.per_token.tolist()]
    for _, ratio, bar in (row for row in table if len(row) == 3):
        assert set(bar) == {ratio[0]}
    assert max(len(row[2]) for row in table if len(row) == 3) == 20


def test_show_truncated_prompt():
    scorer = build(positions=64)
    prompt = "".join(f"{index} " for index in range(100))
    row = read_row(scorer, chat(prompt), "four")
    encoder = scorer.load().strong.encoder
    assert join(row.strong.parts) == START.format(prompt) + INSERTED + "four<|im_end|>"
    (first, lost), (second, kept), *_ = row.strong.parts
    assert (first, second) == ("not read", "prompt")
    assert encoder.tokenizer.decode(row.strong.ids).startswith(kept)
    counts = row.strong.counts
    assert counts.total == len(row.strong.ids) == 64
    assert counts.lost == len(encoder.tokenizer(lost, add_special_tokens=False).input_ids)
    text = printed(scorer, chat(prompt), "four")
    assert f"prompt truncated: yes, {counts.lost} tokens lost on its left" in text
    assert "[not read]" in text
    assert "prompt truncated: no" in printed(scorer, chat("a"), "four")


def test_show_unscorable_rows(scorer):
    text = printed(scorer, chat("hello"), "y" * 400)
    assert "This row can't be scored: the completion has 401 tokens" in text
    assert sections(text, "weak")[2] == ("[completion]", "y" * 400)
    assert "tokens: not counted" in text
    text = printed(scorer, chat("hello"), [{**answer("x")[0], "tool_calls": [1]}])
    assert "This row can't be scored: the completion holds tool_calls" in text
    assert sections(text, "strong") == [("[prompt]", START.format("hello")), ("[inserted]", INSERTED)]
    text = printed(scorer, [], "four")
    assert "This row can't be scored: the prompt is an empty conversation" in text
    assert text.count("The chat template can't write this row.") == 2


def test_show_unknown_domain():
    scorer = build(criteria=Criteria({"chat": DomainCriteria("be quick")}), domain="chat")
    row = read_row(scorer, chat("hello"), "four", domain="law")
    assert "law" in row.score.error
    assert join(row.strong.parts) == START.format("hello") + INSERTED + "four<|im_end|>"


def test_token_texts_of_characters():
    tokenizer = byte_tokenizer()
    ids = tokenizer("hello é中 \ufffd", add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, ids, 0)
    assert len(texts) == len(ids)
    assert "".join(texts) == "hello é中 \ufffd"
    assert "" in texts
    assert token_texts(tokenizer, ids, len(ids) - 3)[-1] == texts[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", "hello"),
        ('[{"role": "user", "content": "hi"}]', chat("hi")),
        ("[1, 2", "[1, 2"),
        ("[1, 2]", "[1, 2]"),
        ("[]", "[]"),
        ('[{"content": "hi"}]', '[{"content": "hi"}]'),
    ],
)
def test_parse_prompt(text, expected):
    assert parse_prompt(text) == expected


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    tokenizer = byte_tokenizer(template=THINKING)
    arguments = ["show"]
    for seed, role in enumerate(("strong", "weak")):
        folder = str(tmp_path_factory.mktemp("show") / role)
        llama(len(tokenizer), seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        arguments += [f"--cdr_{role}", folder]
    return arguments


def test_main_show(pair, tmp_path, capsys):
    criteria = tmp_path / "criteria.toml"
    criteria.write_text('[quick]\ninstruction = "be quick"\n[slow]\ninstruction = "be slow"\n')
    pair = [*pair, "--cdr_criteria", str(criteria), "--cdr_domain", "quick"]
    main([*pair, "--prompt", "hi", "--completion", "four"])
    text = capsys.readouterr().out
    assert sections(text, "strong") == [
        ("[prompt]", "<|im_start|>system\n"),
        ("[conditioning]", "be quick"),
        ("[prompt]", "<|im_end|>\n" + START.format("hi")),
        ("[inserted]", INSERTED),
        ("[completion]", "four"),
        ("[end]", "<|im_end|>"),
    ]
    assert f"strong: {pair[2]}\n" in text
    assert "log-ratio of each token" in text
    messages = json.dumps(chat("hi", "so", "ho"))
    main([*pair, "--prompt", messages, "--completion", "x", "--domain", "slow", "--cut_off", "--generated"])
    parts = sections(capsys.readouterr().out, "weak")
    assert [name for name, _ in parts] == ["[prompt]", "[conditioning]", "[prompt]", "[completion]"]
    assert parts[1][1] == "be slow"
    assert "<|im_start|>assistant\nso<|im_end|>" in parts[2][1]


def test_main_show_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["show", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("--prompt", "--completion", "--domain", "--cut_off", "--generated"))
    with pytest.raises(SystemExit) as stop:
        main(["show", "--completions", "a"])
    assert stop.value.code == 2
    assert "did you mean completion?" in capsys.readouterr().err
