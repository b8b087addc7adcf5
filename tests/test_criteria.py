"""Criteria: what files may say, what is drawn, and where it goes in a prompt."""

import pickle
import subprocess
import sys

import pytest

from trl_cdr import ConfigError, Criteria, DomainCriteria, Exemplar, InputError
from trl_cdr.conditioning.criteria import Conditioning

SUM = Exemplar("1 + 1?", "2", "3", "It is 2.")
POEM = Exemplar("A poem.", "Roses", "no")
TEXT = """
# law
[law]
instruction = \"\"\"
Cite the paragraph.
Be brief.\"\"\"

[[law.exemplars]]
prompt = "May I?"
chosen = "Yes, by § 1."
rejected = "Sure."
explanation = "A source."

[[law.exemplars]]
prompt = "And she?"
chosen = '''
No,
by § 2.'''
rejected = "No."

[plain]
"""


def test_a_file_says_what_it_says(tmp_path):
    path = tmp_path / "law.toml"
    path.write_text(TEXT, encoding="utf-8")
    criteria = Criteria.load(str(path))
    assert dict(criteria.domains) == {
        "law": DomainCriteria(
            "Cite the paragraph.\nBe brief.",
            (
                Exemplar("May I?", "Yes, by § 1.", "Sure.", "A source."),
                Exemplar("And she?", "No,\nby § 2.", "No."),
            ),
        ),
        "plain": DomainCriteria(),
    }
    assert pickle.loads(pickle.dumps(criteria)) == criteria


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("instruction =", "instructions =", "f.toml, line 4: unknown key 'instructions'. Known keys: exemplars, instr"),
        ('explanation = "A source."', "why = 1", "f.toml, line 12: unknown key 'why'. Known keys: chosen, explanation"),
        ('rejected = "Sure."\n', "", "f.toml, line 8: the exemplar has no 'rejected'"),
        ("chosen = '''\nNo,\nby § 2.'''\n", "", "f.toml, line 14: the exemplar has no 'chosen'"),
        ('rejected = "No."', "rejected = 2", "f.toml, line 19: rejected is 2. It takes a string"),
        ('chosen = "Yes, by § 1."', 'chosen = " "', "f.toml, line 10: chosen is ' '. It takes a string with some text"),
        (
            "[plain]",
            "[plain]\nexemplars = 'two'",
            "f.toml, line 22: exemplars is 'two'. Write each one below a [[plain",
        ),
        ("[plain]", "[plain]\ninstruction = [\n1,\n]", "f.toml, line 22: instruction is [1]. It takes a string"),
        ("# law", "plan = 3", "f.toml, line 2: plan is 3. Only domains stand at the top level"),
        ("[plain]", "[law]", "f.toml is no valid TOML: Cannot declare ('law',) twice (at line 21"),
        ("[plain]", "[plain", "at line 21"),
    ],
)
def test_what_a_file_may_not_say(old, new, message):
    assert old in TEXT
    with pytest.raises(ConfigError) as error:
        Criteria.from_toml(TEXT.replace(old, new), name="f.toml")
    assert message in str(error.value)


def test_sources(tmp_path):
    assert list(Criteria.load("safety+reasoning+chat").domains) == ["safety", "reasoning", "chat"]
    for name in ("safety", "reasoning", "chat"):
        [domain] = Criteria.load(name).domains.values()
        assert 2 <= len(domain.exemplars) <= 4
        assert all(exemplar.explanation for exemplar in domain.exemplars)
        assert len(Criteria.load(name).conditioning(name, num_exemplars=2, style="inline", seed=0).text) < 2000
    with pytest.raises(ConfigError, match="the domain 'safety' is defined twice, by safety and by safety. Rename one"):
        Criteria.load("safety+safety")
    with pytest.raises(ConfigError, match="'kindness', which is no preset .* presets: chat, reasoning, safety"):
        Criteria.load("kindness")
    with pytest.raises(ConfigError, match="is no preset and can't be read"):
        Criteria.load(str(tmp_path))
    (tmp_path / "empty.toml").write_text("# nothing")
    with pytest.raises(ConfigError, match="empty.toml has no domain"):
        Criteria.load(str(tmp_path / "empty.toml"))
    with pytest.raises(ConfigError, match=r"criteria\['a'\] is 'be good': map"):
        Criteria({"a": "be good"})


def inline(*exemplars, instruction=""):
    return Conditioning(instruction, exemplars, "inline")


def test_where_the_text_goes():
    conditioning = inline(SUM, POEM, instruction="Be right.")
    text = (
        "Be right.\n\nExample\nPrompt: 1 + 1?\nGood: 2\nBad: 3\nWhy: It is 2.\n\n"
        "Example\nPrompt: A poem.\nGood: Roses\nBad: no"
    )
    user = {"role": "user", "content": "hi"}
    turns = [user, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "hum"}]
    own = {"role": "system", "content": "You are Bo."}
    parts = {"role": "system", "content": [{"type": "text", "text": "You are Bo."}]}
    assert conditioning.apply([user]) == [{"role": "system", "content": text}, user]
    assert conditioning.apply(turns) == [{"role": "system", "content": text}, *turns]
    assert conditioning.apply([own, *turns]) == [{"role": "system", "content": f"You are Bo.\n\n{text}"}, *turns]
    assert conditioning.apply([parts, user])[0]["content"] == [
        {"type": "text", "text": "You are Bo."},
        {"type": "text", "text": f"\n\n{text}"},
    ]
    assert conditioning.apply("hi") == f"{text}\n\nhi"
    assert own == {"role": "system", "content": "You are Bo."}  # what was handed over stays as it was


def test_exemplars_as_turns():
    conditioning = Conditioning("Be right.", (SUM, POEM), "turns")
    user = {"role": "user", "content": "hi"}
    shown = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "A poem."},
        {"role": "assistant", "content": "Roses"},
    ]
    assert conditioning.apply([user]) == [{"role": "system", "content": "Be right."}, *shown, user]
    assert Conditioning("", (SUM,), "turns").apply([user]) == [*shown[:2], user]
    with pytest.raises(InputError, match="a prompt is a string, and cdr_exemplar_style='turns'"):
        conditioning.apply("hi")
    assert Conditioning("Be right.", (), "turns").apply("hi") == "Be right.\n\nhi"


@pytest.mark.parametrize("style", ["inline", "turns"])
def test_empty_conditioning_is_none(style):
    empty = Criteria({"a": DomainCriteria()}).conditioning("a", num_exemplars=2, style=style, seed=0)
    for prompt in ("hi", [{"role": "user", "content": "hi"}], [], [None], [{"role": "system", "content": None}]):
        assert empty.apply(prompt) is prompt


def test_unknown_domains():
    criteria = Criteria({"a": DomainCriteria(), "b": DomainCriteria()})
    assert criteria.resolve("b") == "b"
    with pytest.raises(InputError, match="the domain 'c' is not among the criteria's: a, b. Name one of these, or def"):
        criteria.resolve("c")
    assert (criteria | Criteria({"default": DomainCriteria()})).resolve("c") == "default"


def test_drawing_follows_from_domain_and_seed():
    exemplars = tuple(Exemplar(str(number), "yes", "no") for number in range(20))
    criteria = Criteria({"a": DomainCriteria(exemplars=exemplars), "b": DomainCriteria(exemplars=exemplars)})

    def draw(domain, seed, count=3):
        drawn = criteria.conditioning(domain, num_exemplars=count, style="inline", seed=seed).exemplars
        return [int(exemplar.prompt) for exemplar in drawn]

    assert draw("a", 0) == draw("a", 0) == sorted(draw("a", 0))
    assert len({tuple(draw("a", seed)) for seed in range(5)}) > 1
    assert draw("a", 0) != draw("b", 0)
    assert draw("a", 0, 0) == []
    assert draw("a", 0, 50) == list(range(20))


ROWS = [
    {"prompt": "q0", "chosen": "good0", "rejected": "bad0"},
    {
        "prompt": [{"role": "user", "content": "q1"}],
        "chosen": [{"role": "assistant", "content": "good1"}],
        "rejected": [{"role": "assistant", "content": "bad1"}],
    },
    {  # the prompt is what both start with
        "chosen": [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "good2"}],
        "rejected": [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "bad2"}],
    },
    {"prompt": "q3", "chosen": "same", "rejected": "same"},
    {"prompt": "q4", "chosen": "long" * 500, "rejected": "bad4"},
    {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "chosen": [{"role": "assistant", "content": "good5"}],
        "rejected": [{"role": "assistant", "content": "bad5"}],
    },
]


def test_exemplars_from_a_preference_data_set():
    criteria = Criteria.from_dataset(ROWS, num_exemplars=3)
    [domain] = criteria.domains.values()
    assert sorted(domain.exemplars, key=lambda exemplar: exemplar.prompt) == [
        Exemplar(f"q{index}", f"good{index}", f"bad{index}") for index in range(3)
    ]
    with pytest.raises(ConfigError, match="num_exemplars is 4, and 3 of the 6 rows of the domain 'default' can serve"):
        Criteria.from_dataset(ROWS, num_exemplars=4)
    many = [
        {"prompt": f"q{n}", "chosen": "g", "rejected": "b", "kind": "even" if n % 2 == 0 else "odd"} for n in range(40)
    ]
    drawn = Criteria.from_dataset(many, domain_column="kind", seed=3)
    assert set(drawn.domains) == {"even", "odd"}
    assert all(int(exemplar.prompt[1:]) % 2 == 1 for exemplar in drawn.domains["odd"].exemplars)
    assert drawn != Criteria.from_dataset(many, domain_column="kind", seed=4)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"domain_column": "kind"}, "the data set has no column 'kind', only: prompt, chosen, rejected. Add it"),
        ({"kind": ["math"]}, {"domain_column": "kind"}, "row 0 has kind=.'math'. .list., and a domain is a name"),
        ({"kind": None}, {"domain_column": "kind"}, "row 0 has kind=None"),
        ({"chosen": ...}, {}, "the data set has no column 'chosen', only: prompt, rejected"),
    ],
)
def test_a_data_set_that_can_not_serve_is_said_so(change, options, message):
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"} | change
    with pytest.raises(InputError, match=message):
        Criteria.from_dataset([{key: value for key, value in row.items() if value is not ...}], **options)


def test_a_seed_draws_alike_in_every_process():
    code = (
        "from trl_cdr import Criteria\n"
        "rows = [{'prompt': str(n), 'chosen': 'a', 'rejected': 'b'} for n in range(99)]\n"
        "print([e.prompt for e in Criteria.from_dataset(rows, seed=7).domains['default'].exemplars])\n"
        "print([e.prompt for e in Criteria.load('safety').conditioning('safety', num_exemplars=2, style='inline', "
        "seed=1).exemplars])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
