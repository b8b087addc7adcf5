"""What is saved by waiting for several things at once: `python tests/waiting.py`, for `examples/RESULTS.md`.

Steps of GRPO on a tiny policy, whose rewards wait: `CDRReward` on two stand-ins for vLLM that are slow to answer, and
another one that waits as long.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from contextlib import contextmanager

os.environ |= {"HF_HUB_OFFLINE": "1", "CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

from datasets import Dataset
from tiny import TRAINING, byte_tokenizer, llama
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from vllm_stand_in import StandIn

from trl_cdr import CDRReward


@contextmanager
def pair_on_servers(folder, delays):
    """A tiny pair's addresses; each of its servers takes so many seconds for an answer with log-probabilities."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    servers = {}
    try:
        for seed, (role, delay) in enumerate(delays.items()):
            servers[role] = StandIn(llama(len(tokenizer), seed=seed), tokenizer, role, root=folder, tells=False)
            servers[role].before = lambda path, _, delay=delay: time.sleep(delay * (path == "/v1/completions"))
        yield {role: server.address for role, server in servers.items()}
    finally:
        for server in servers.values():
            server.kill()


def time_call(delays):
    """Seconds of one call of the reward for eight rows."""
    with tempfile.TemporaryDirectory() as folder, pair_on_servers(folder, delays) as addresses:
        reward = CDRReward(**addresses, gate="none")
        reward.scorer.load()
        started = time.perf_counter()
        reward(prompts=["hello"] * 8, completions=[f"number {number}" for number in range(8)])
        return time.perf_counter() - started


def time_step(delay, *, steps, is_awaited, others=1):
    """Seconds of a step, their median."""

    async def other(completions, **_):
        await asyncio.sleep(delay)
        return [0.0] * len(completions)

    tokenizer = byte_tokenizer()
    with (
        tempfile.TemporaryDirectory() as folder,
        pair_on_servers(folder, {"strong": delay, "weak": delay}) as addresses,
    ):
        reward = CDRReward(**addresses, gate="none")
        reward.scorer.load()
        options = {"max_completion_length": 4, "num_generations": 4, "per_device_train_batch_size": 8}
        trainer = GRPOTrainer(
            model=llama(len(tokenizer), seed=2, eos_token_id=tokenizer.eos_token_id),
            processing_class=tokenizer,
            reward_funcs=[reward.awaitable if is_awaited else reward] + [other] * others,
            args=GRPOConfig(folder, max_steps=steps, logging_steps=1, save_strategy="no", **options, **TRAINING),
            train_dataset=Dataset.from_dict({"prompt": ["hello"] * 8 * steps}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return statistics.median(log["step_time"] for log in trainer.state.log_history if "step_time" in log)


def main(delay, steps):
    for role, wait in (("strong", {"strong": delay, "weak": 0}), ("weak", {"strong": 0, "weak": delay})):
        print(f"a call where {role} takes {delay} s a request: {time_call(wait):.2f} s")
    print(f"a call where both do: {time_call({'strong': delay, 'weak': delay}):.2f} s")
    print(f"a step where nothing waits: {time_step(0.0, steps=steps, is_awaited=False):.2f} s")
    print(f"a step with CDRReward alone: {time_step(delay, steps=steps, is_awaited=False, others=0):.2f} s")
    print(f"and another that waits {delay} s: {time_step(delay, steps=steps, is_awaited=False):.2f} s")
    print(f"the same, both awaited: {time_step(delay, steps=steps, is_awaited=True):.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay", type=float, default=0.5, help="seconds")
    parser.add_argument("--steps", type=int, default=5)
    main(**vars(parser.parse_args()))
