"""Preference rows in words that the tiny tokenizer has merges for. Used by the tests only."""

from tiny import answer, chat

from trl_cdr.annotation.preferences import Preference

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "that", "is", "this", "hello"]


def say(place, count):
    return " ".join(WORDS[(place * 5 + step * 3) % len(WORDS)] for step in range(count))


def rows(count=12, **changes):
    """Two domains, three subsets, two prompts each."""
    subsets = (("chat", "small"), ("chat", "large"), ("safety", "only"))
    found = []
    for place in range(count):
        domain, subset = subsets[place % 3]
        prompt = chat(f"what is {WORDS[place % 6]}")
        found.append(
            {
                "id": f"r{place}",
                "prompt": prompt,
                "chosen": answer(say(place, 3 + place % 3)),
                "rejected": answer(say(place + 1, 4)),
                "subset": subset,
                "domain": domain,
                **changes,
            }
        )
    return found


def preferences(count=12):
    return [
        Preference(
            row["id"],
            row["prompt"],
            (row["chosen"][0]["content"],),
            (row["rejected"][0]["content"],),
            row["subset"],
            row["domain"],
            criteria_domain=row["domain"],
        )
        for row in rows(count)
    ]
