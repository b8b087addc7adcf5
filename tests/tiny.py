"""Tiny tokenizers and random models, built in a moment without a network. Used by the tests only."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# A last answer gets thoughts, empty ones if it has none; tools are written before the conversation.
THINKING = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The generation prompt opens a thought.
OPEN = THINKING[: THINKING.index("{% if enable_thinking")] + "<think>\n{% endif %}"
# Today's date before the conversation, as templates of Llama 3 and SmolLM3 have it.
DATED = "{% if strftime_now is defined %}Today is {{ strftime_now('%d %B %Y') }}.\n{% endif %}" + CHATML
# No system role, turns in brackets of plain text, a space before the completion, </s> as the end of a turn.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# Of any trainer's arguments: what a tiny run on a CPU needs.
TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}
_TEXT = (
    "hello world what is this and that\n\n user assistant\n\n system the  quick brown fox jumps over a lazy dog " * 20
)


def byte_tokenizer(size: int = 320, *, template: str | None = CHATML, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text round-trips, and merges cross the seam between prompt and completion."""
    special = ["<|pad|>", "<|im_end|>", "<|im_start|>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [_TEXT],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens(["<think>", "</think>"])
    byte_level = processors.ByteLevel(trim_offsets=True)
    if bos:
        start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special.index("<s>"))])
        backend.post_processor = processors.Sequence([byte_level, start])
    else:
        backend.post_processor = byte_level
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>" if template == BRACKETS else "<|im_end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = template
    return tokenizer


def llama(vocab_size: int, *, seed: int = 0, positions: int = 256, **config: object) -> LlamaForCausalLM:
    """A random two-layer Llama whose predictions are sharp enough that a wrong boundary shows in the score."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        defaults = {
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": positions,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        model = LlamaForCausalLM(LlamaConfig(**(defaults | config)))
    return model.eval()


def chat(*turns: str) -> list[dict[str, str]]:
    """User and assistant turns in alternation; a first turn that starts with "system:" is the system's."""
    messages = []
    if turns[0].startswith("system:"):
        messages.append({"role": "system", "content": turns[0].removeprefix("system:")})
        turns = turns[1:]
    roles = ("user", "assistant")
    return messages + [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def scarce(monkeypatch, way, *, most, error=None):
    """Let a way of running rows fail with more than `most` of them, as a GPU does; returns the sizes tried."""
    sizes, run = [], way.run

    def limited(self, layout, job, *reduce):
        sizes.append(len(job.rows))
        if len(job.rows) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return run(self, layout, job, *reduce)

    monkeypatch.setattr(way, "run", limited)
    return sizes
