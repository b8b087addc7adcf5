"""Judge pairs of completions: which is better, and how surely?

python examples/04_judge.py           # the paper's pair of 7B models: a GPU with 32 GB, and the Hub
python examples/04_judge.py --tiny    # the demo's pair: any machine, no network

TRL 1.0, the last version with judges, takes the same object in its trainers. The move to later versions is one line:

    OnlineDPOTrainer(model, judge=CDRJudge(strong=strong, weak=weak), ...)          # TRL 1.0
    OnlineDPOTrainer(model, reward_funcs=CDRReward(strong=strong, weak=weak), ...)  # TRL 1.0 and later
"""

import argparse

from trl_cdr import CDRJudge, CDRReward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--strong", default="NousResearch/Nous-Hermes-2-Mistral-7B-DPO")
parser.add_argument("--weak", default="teknium/OpenHermes-2.5-Mistral-7B")
parser.add_argument("--temperature", type=float, default=1.0, help="nats of margin for each unit of log-odds")
parser.add_argument("--tiny", action="store_true", help="run on the demo's pair, built from scratch in a minute")
args = parser.parse_args()

options = {"dtype": "bfloat16"}
if args.tiny:
    from trl_cdr.demo.models import build_checkpoints

    checkpoints = build_checkpoints()
    args.strong, args.weak, options = str(checkpoints.mild), str(checkpoints.base), {}

questions = ["what is 3 + 5 ?", "what is 2 + 4 ?"]
pairs = [
    ["the answer is 8 .", "the answer is 9 ."],
    ["go away , i do not care .", "the answer is 6 ."],
]
prompts = [[{"role": "user", "content": question}] for question in questions]

reward = CDRReward(args.strong, args.weak, **options)
judge = CDRJudge(reward, temperature=args.temperature)  # or CDRJudge(strong=..., weak=...), without a reward
verdicts = judge.judge(prompts, pairs)
probabilities = judge.judge(prompts, pairs, return_scores=True)
for question, pair, verdict, probability in zip(questions, pairs, verdicts, probabilities, strict=True):
    print(f"{question}\n  0: {pair[0]}\n  1: {pair[1]}\n  better: {verdict}; 0 is better with {probability:.2f}")

group = [pairs[0][1], pairs[1][0], pairs[0][0]]
[order] = judge.rank(prompts[:1], [group])
print(f"{questions[0]}\n  best first: " + " | ".join(group[index] for index in order))

# What a judge compares are rewards: reward_funcs=reward prefers the same completions. It is also told their token ids,
# and so which of them are finished and which were cut off.
rewards = reward([prompts[0]] * 2, pairs[0])
print(f"rewards of the first pair: {rewards[0]:+.2f} and {rewards[1]:+.2f} nats")
