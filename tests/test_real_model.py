"""The machinery on a real model, SmolLM2-135M-Instruct: its template and tokens, parity, samples, an online step."""

import math
from datetime import date

import pytest
import torch
from datasets import Dataset
from oracle import completion_logps, split_text
from peft import LoraConfig
from tiny import TRAINING, chat, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cdr import CDRReward, Criteria, DensityRatioScorer, DomainCriteria

pytestmark = pytest.mark.real

TOPICS = ["volcanoes", "bread", "the Moon", "chess", "honey bees"]
PROMPTS = [chat(f"Tell me something about {topic}. Answer in exactly one sentence.") for topic in TOPICS]
COMPLETIONS = [
    "I can't say much about it, but it is older than most people think.",
    'It\'s "simple":\n\n1. Look.\n2. Ask why — and ask again 🙂\n',
    "  It is it is it is it is it is",
]
CRITERION = (
    "A good completion is one sentence long, names its topic, says something that can be checked, and ends there. A "
    "bad one repeats itself, changes the subject, or goes on after it has said what it had to say."
)
ROWS = [(prompt, text) for prompt in PROMPTS for text in COMPLETIONS]


@pytest.fixture(scope="module")
def tokenizer(smollm_folder):
    return AutoTokenizer.from_pretrained(smollm_folder)


@pytest.fixture(scope="module")
def model(smollm_folder):
    return AutoModelForCausalLM.from_pretrained(smollm_folder).eval()


@pytest.fixture(scope="module")
def exact(smollm_folder):
    return AutoModelForCausalLM.from_pretrained(smollm_folder, dtype=torch.float64).eval()


@pytest.fixture
def pair(smollm_folder, tokenizer):
    """The model over a small random one, which reads the same tokens and costs nothing."""
    weak = llama(len(tokenizer), seed=1, positions=8192)
    return {"strong": str(smollm_folder), "weak": weak, "weak_tokenizer": tokenizer}


@pytest.mark.parametrize("criterion", [None, CRITERION], ids=["plain", "conditioned"])
def test_scores_equal_the_naive_reference(pair, tokenizer, exact, criterion):
    conditions = (
        {} if criterion is None else {"criteria": Criteria({"any": DomainCriteria(criterion)}), "domain": "any"}
    )
    scorer = DensityRatioScorer(**pair, **conditions)
    prompts, texts = zip(*ROWS, strict=True)
    cold = scorer.score(prompts, texts)
    warm = scorer.score(prompts, texts)
    assert [score.value for score in warm] == [score.value for score in cold]
    assert scorer.describe()["strong"]["way"] == "packed"
    scorer.unload()
    for (prompt, text), score in list(zip(ROWS, cold, strict=True))[::2]:
        system = [] if criterion is None else [{"role": "system", "content": criterion}]
        rendered = tokenizer.apply_chat_template([*system, *prompt], tokenize=False, add_generation_prompt=True)
        assert rendered.count("<|im_start|>") == 3  # the template's own system turn stands where there is no other
        # The end of a turn is also the pad token, and the start of one is also BOS: each counts where it is written.
        ids = split_text(tokenizer, rendered, text, tokenizer.eos_token)
        assert score.n_tokens == len(ids[1])
        expected = float(completion_logps(exact, *ids).sum())
        assert score.strong_logps == pytest.approx(expected, abs=1e-4 * len(ids[1]))


def test_packed_and_padded_agree(model, tokenizer):
    held = {"strong": model, "strong_tokenizer": tokenizer, "weak_tokenizer": tokenizer}
    scorer = DensityRatioScorer(weak=llama(len(tokenizer), positions=8192), **held)
    prompts, texts = zip(*ROWS, strict=True)
    packed = scorer.score(prompts, texts)
    for (prompt, text), score in list(zip(ROWS, packed, strict=True))[:3]:
        [alone] = scorer.score([prompt], [text])  # one row is padded
        assert score.strong_logps == pytest.approx(alone.strong_logps, abs=1e-4 * score.n_tokens)


def test_own_samples_are_typical(pair, model, tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = []
        for prompt in PROMPTS:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=32,
                num_return_sequences=4,
            )[:, inputs["input_ids"].shape[1] :]
            rows += [(prompt, row) for row in ids.tolist()]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in rows]
    reward = CDRReward(**pair, policy_tokenizer=str(pair["strong"]), gate="typicality")
    scores = reward.scorer.score([prompt for prompt, _ in rows], texts, completion_ids=[ids for _, ids in rows])
    tokens = sum(score.n_tokens for score in scores)
    assert abs(sum(score.typicality * score.n_tokens for score in scores) / tokens) < 0.15
    assert {score.finished for score in scores} == {True, False}


# peft 0.21 and TRL 1.16 read what transformers 5 deprecates
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_an_online_step(pair, smollm_folder, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        **TRAINING,
    )
    trainer = GRPOTrainer(
        model=str(smollm_folder),
        reward_funcs=CDRReward(**pair),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert math.isfinite(log["loss"])
    assert math.isfinite(log["reward"])
    assert log["cdr/unscorable"] == 0


SCRIPTS = {
    "cjk": "火山は地球の内部から",
    "cyrillic": "Вулканы горячие",
    "devanagari": "ज्वालामुखी गर्म",
    "emoji": "It is hot 🌋🔥",
}


def test_completions_cut_inside_a_character(pair, tokenizer, exact):
    """In four scripts: the rest of the last character is not scored, nor the token that it would be."""
    scorer = DensityRatioScorer(**pair, gate="none")
    rendered = tokenizer.apply_chat_template(PROMPTS[0], tokenize=False, add_generation_prompt=True)
    for whole in SCRIPTS.values():
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        length = next(n for n in range(len(ids) - 1, 0, -1) if tokenizer.decode(ids[:n]).endswith("\ufffd"))
        text = tokenizer.decode(ids[:length])
        cut, written = scorer.score(PROMPTS[:1] * 2, [text] * 2, finished=[False, True])
        prompt_ids, kept_ids = split_text(tokenizer, rendered, text.rstrip("\ufffd"), "")
        expected = completion_logps(exact, prompt_ids, kept_ids).sum()
        assert cut.strong_logps == pytest.approx(float(expected), abs=2e-3)
        assert written.n_tokens > cut.n_tokens + 1  # the character U+FFFD, and the end of the turn


def test_roles_are_read_or_refused(pair):
    """Two conversations that differ in one turn have different scores, or that turn is named."""
    scorer = DensityRatioScorer(**pair, gate="none")
    for role in ("system", "developer", "user", "assistant", "tool", "critic"):
        prompts = [[*PROMPTS[0], {"role": role, "content": content}, *PROMPTS[1]] for content in ("Rome.", "Paris.")]
        first, second = scorer.score(prompts, [COMPLETIONS[0]] * 2)
        if first.error is None:
            assert abs(first.strong_logps - second.strong_logps) > 1e-3
        else:
            assert f"message 1 of the prompt, which has the role {role!r}" in first.error


@pytest.mark.slow
def test_date_in_the_template_changes_scores(pair, smollm_folder, tmp_path):
    own = AutoTokenizer.from_pretrained(smollm_folder).chat_template
    template = tmp_path / "dated.jinja"
    template.write_text("<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}<|im_end|>\n" + own)
    scorer = DensityRatioScorer(**pair, gate="none", chat_template=str(template), date="2026-11-29")
    first, second = (scorer.score(PROMPTS[:2], COMPLETIONS[:2]) for _ in range(2))
    assert first == second
    scorer.use_date(date(2026, 11, 30))
    other = scorer.score(PROMPTS[:2], COMPLETIONS[:2])
    assert max(abs(one.strong_logps - two.strong_logps) for one, two in zip(first, other, strict=True)) > 1e-2
