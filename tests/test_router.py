"""Which domain a prompt belongs to, by every rule, and what each rule refuses."""

import pickle

import pytest
from tiny import chat

from trl_cdr import ConfigError, Criteria, DomainCriteria, InputError
from trl_cdr.conditioning.router import NoDomain, Router, ask, confusion, read_request

CRITERIA = Criteria({"math": DomainCriteria(), "poems": DomainCriteria(), "other": DomainCriteria()})
PROMPTS = [chat("1 + 1"), "a poem", chat("a poem", "ok", "2 + 2")]


def by_digit(prompt):
    return "math" if any(character.isdigit() for character in str(prompt)) else "poems"


def never(texts, labels):
    raise AssertionError("no model is needed")


def test_constant():
    assert Router(CRITERIA, domain="poems").route(PROMPTS, None, never) == ["poems"] * 3
    assert Router(Criteria({"only": DomainCriteria()})).route(PROMPTS, None, never) == ["only"] * 3
    with pytest.raises(
        ConfigError, match="cdr_domain: the domain 'law' is not among the criteria's: math, poems, other"
    ):
        Router(CRITERIA, domain="law")
    with pytest.raises(ConfigError, match="domain is 'math' and router is 'likelihood': one of them decides"):
        Router(CRITERIA, domain="math", router="likelihood")


def test_what_the_caller_knows_wins():
    router = Router(CRITERIA, domain="poems")
    assert router.route(PROMPTS, ["math", None, "other"], never) == ["math", "poems", "other"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("law", "the domain 'law' is not among the criteria's: math, poems, other. Name one of these, or define"),
        (["math"], "its domain is ['math'] (list), and a domain is a name"),
        (3, "its domain is 3 (int), and a domain is a name"),
        (float("nan"), "its domain is nan (float), and a domain is a name"),
    ],
)
def test_a_bad_domain_is_its_rows_reason(value, reason):
    for router in (Router(CRITERIA, domain="poems"), Router(CRITERIA), Router(CRITERIA, router="column:kind")):
        right, wrong, _ = router.route(PROMPTS, ["math", value, "other"], never)
        assert right == "math"
        assert wrong.reason.startswith(reason)
    with_default = Router(Criteria({"math": DomainCriteria(), "default": DomainCriteria()}), router="column:kind")
    assert with_default.route(["a", "b"], ["law", "math"], never) == ["default", "math"]


def test_a_row_without_a_domain():
    assert Router(CRITERIA).route(PROMPTS, ["math", None, "other"], never) == [
        "math",
        NoDomain("the call names no domain for it"),
        "other",
    ]
    [found] = Router(CRITERIA, router="column:kind").route(["a"], [None], never)
    assert found == NoDomain("the column 'kind' names no domain for it")


def test_several_domains_and_no_rule():
    router = Router(CRITERIA)
    assert router.is_undecided
    assert router.route(PROMPTS, ["math"] * 3, never) == ["math"] * 3
    with pytest.raises(InputError, match="several domains .math, poems, other., and neither the call nor a router"):
        router.route(PROMPTS, None, never)


def test_column():
    router = Router(CRITERIA, router="column:kind")
    assert not router.is_undecided
    assert router.read_column({"kind": ["math"], "other": [1]}) == ["math"]
    with pytest.raises(InputError, match="router is 'column:kind', and the call has only: a, b. Add the column"):
        router.read_column({"a": [1], "b": [2]})
    with pytest.raises(InputError, match="router is 'column:kind', and the call names no domains"):
        router.route(PROMPTS, None, never)
    router.check_column(["kind"], ["math", None, "other"], where="train_dataset")
    with pytest.raises(InputError, match="router is 'column:kind', and train_dataset has only: a. Add the column"):
        router.check_column(["a"], where="train_dataset")
    with pytest.raises(InputError, match="router is 'column:kind', and in train_dataset the domain 'law' is not among"):
        router.check_column(["kind"], ["math", "law"], where="train_dataset")
    Router(CRITERIA, domain="math").check_column([], where="train_dataset")
    with pytest.raises(ConfigError, match="names no column"):
        Router(CRITERIA, router="column: ")


def test_callable():
    expected = ["math", "poems", "math"]
    assert Router(CRITERIA, router=by_digit).route(PROMPTS, None, never) == expected
    assert Router(CRITERIA, router="test_router.by_digit").route(PROMPTS, None, never) == expected
    for path in ("no.such.module", "test_router.nowhere", "word", ".relative.path"):
        with pytest.raises(ConfigError, match=f"router is '{path}', which can't be imported"):
            Router(CRITERIA, router=path)
    with pytest.raises(ConfigError, match="router is 3. Pass 'column:NAME'"):
        Router(CRITERIA, router=3)

    def broken(prompt):
        raise KeyError("oh")

    def lost(prompt):
        return "law"

    def nothing(prompt):
        return None

    with pytest.raises(InputError, match="the router broken raised KeyError: 'oh'"):
        Router(CRITERIA, router=broken).route(PROMPTS, None, never)
    [found] = Router(CRITERIA, router=lost).route(["a"], None, never)
    assert found.reason.startswith("of the router lost, the domain 'law' is not among")
    [found] = Router(CRITERIA, router=nothing).route(["a"], None, never)
    assert found == NoDomain("of the router nothing, its domain is None (NoneType), and a domain is a name")


def test_likelihood_takes_the_most_likely_label_and_remembers():
    asked = []

    def score(texts, labels):
        asked.extend(texts)
        return [[-1.0 if (label == "math") == ("+" in text) else -2.0 for label in labels] for text in texts]

    router, model = Router(CRITERIA, router="likelihood"), Model()
    assert router.route(PROMPTS, None, score, lambda: model) == ["math", "poems", "math"]
    assert asked == [ask(text, ["math", "poems", "other"]) for text in ("1 + 1", "a poem", "2 + 2")]
    assert router.route([chat("2 + 2"), chat("3 + 3")], None, score, lambda: model) == ["math", "math"]
    assert len(asked) == 4  # the first was known
    first, second, third = router.route([None, [], chat("2 + 2")], None, never, lambda: model)
    assert first == second == NoDomain("its domain can't be told: no user's turn of the prompt can be read")
    assert third == "math"


class Model:
    """Stands for the object that scores labels."""


def always(label):
    """A function that scores one label highest, whatever is asked."""
    return lambda texts, labels: [[-1.0 if name == label else -2.0 for name in labels] for _ in texts]


def test_route_forgets_answers_of_another_model():
    router, first, second = Router(CRITERIA, router="likelihood"), Model(), Model()
    assert router.route(["a"], None, always("math"), lambda: first) == ["math"]
    assert router.route(["a"], None, never, lambda: first) == ["math"]
    assert router.route(["a"], None, always("poems"), lambda: second) == ["poems"]
    assert router.route(["a"], None, always("other"), lambda: first) == ["other"]


def test_route_forgets_answers_of_changing_weights():
    router = Router(CRITERIA, router="likelihood")
    for label in ("math", "poems"):
        assert router.route(["a", "a"], None, always(label), lambda: None) == [label] * 2
        assert router.route(["a"], None, always(label)) == [label]


def test_route_forgets_answers_when_told():
    router, model = Router(CRITERIA, router="likelihood"), Model()
    assert router.route(["a"], None, always("math"), lambda: model) == ["math"]
    copy = pickle.loads(pickle.dumps(router))  # without the answers
    router.forget()
    for each in (router, copy):
        assert each.route(["a"], None, always("poems"), lambda: model) == ["poems"]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "domain"),
    [
        ([NAN, NAN, NAN], "'math' is nan"),
        ([-1.0, NAN, -2.0], "'poems' is nan"),
        ([NAN, -1.0, -2.0], "'math' is nan"),
        ([-INF, -INF, -INF], "'math' is -inf"),
        ([-1.0, INF, -2.0], "'poems' is inf"),
        ([-INF, -2.0, -INF], "poems"),
    ],
)
def test_route_labels_without_a_likelihood(values, domain):
    router, model = Router(CRITERIA, router="likelihood"), Model()
    [found] = router.route(["a"], None, lambda texts, labels: [values], lambda: model)
    if isinstance(found, NoDomain):
        assert f"mean log-probability of the label {domain}, and must be finite" in found.reason
        assert router.route(["a"], None, always("math"), lambda: model) == ["math"]  # the reason is not remembered
    else:
        assert found == domain


def test_route_passes_reasons_on():
    reason = NoDomain("too long")
    router = Router(CRITERIA, router="likelihood")
    assert router.route(["a"], None, lambda texts, labels: [reason], Model) == [reason]


def test_the_request():
    assert read_request("x" * 5000) == "x" * 2000
    assert (
        read_request([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
        == "ab"
    )
    assert read_request([{"role": "system", "content": "a"}]) is None
    assert read_request(chat("  ")) is None


def test_confusion():
    assert confusion(["a", "a", "b"], ["a", "b", None]) == {
        "a": {"a": 1, "b": 1, "none": 0},
        "b": {"a": 0, "b": 0, "none": 1},
    }
    with pytest.raises(InputError, match="domains.0. is .'a'. .list.. Pass a domain's name"):
        confusion([["a"]], ["a"])
