"""Score completions: which of these does the pair prefer, and by how many nats?

python examples/01_score.py           # the paper's pair of 7B models: a GPU with 32 GB, and the Hub
python examples/01_score.py --tiny    # the demo's pair: any machine, no network
"""

import argparse

from trl_cdr import CDRReward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--strong", default="NousResearch/Nous-Hermes-2-Mistral-7B-DPO")
parser.add_argument("--weak", default="teknium/OpenHermes-2.5-Mistral-7B")
parser.add_argument("--tiny", action="store_true", help="run on the demo's pair, built from scratch in a minute")
args = parser.parse_args()

question = "what is 3 + 5 ?"
completions = ["the answer is 8 .", "the answer is 9 .", "go away , i do not care ."]
if args.tiny:
    from trl_cdr.demo.models import build_checkpoints

    checkpoints = build_checkpoints()
    args.strong, args.weak = str(checkpoints.mild), str(checkpoints.base)

reward = CDRReward(args.strong, args.weak)
prompts = [[{"role": "user", "content": question}]] * len(completions)
scores = reward.scorer.score(prompts, completions)
# What a trainer gets: the log-ratio, minus a penalty for text that the strong model could hardly have written.
rewards = reward(prompts, [[{"role": "assistant", "content": completion}] for completion in completions])

print(f"{question}\n{'log-ratio':>10}{'strong':>9}{'weak':>9}{'tokens':>8}{'reward':>9}")
for completion, score, value in zip(completions, scores, rewards, strict=True):
    numbers = f"{score.value:>+10.2f}{score.strong_logps:>9.2f}{score.weak_logps:>9.2f}{score.n_tokens:>8}"
    print(f"{numbers}{value:>+9.2f}  {completion}")
print(f"preferred: {completions[rewards.index(max(rewards))]}")
