"""From prompts to a preference data set that TRL trains on: eight completions each, of which the pair takes two.

python examples/07_annotate.py           # the paper's pair, 8B policy: a GPU with 80 GB, and the Hub
python examples/07_annotate.py --tiny    # tiny models: any machine, no network

Kill it, start it again, and it goes on. The same as a command: trl-cdr annotate --help.
"""

import argparse

from datasets import Dataset, load_dataset

from trl_cdr import CDRConfig
from trl_cdr.annotation.annotate import AnnotateArguments, annotate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--input", default="trl-lib/ultrafeedback-prompt", help="with a column `prompt`")
parser.add_argument("--policy", default="meta-llama/Meta-Llama-3-8B-Instruct")
parser.add_argument("--strong", default="NousResearch/Nous-Hermes-2-Mistral-7B-DPO")
parser.add_argument("--weak", default="teknium/OpenHermes-2.5-Mistral-7B")
parser.add_argument("--output_dir", default="./trl-cdr-annotate")
parser.add_argument("--tiny", action="store_true", help="run on tiny models, built from scratch in a minute")
args = parser.parse_args()

data, settings = None, {"max_completion_length": 1024, "temperature": 0.8}
if args.tiny:
    from trl_cdr.demo import world
    from trl_cdr.demo.models import MAX_NEW_TOKENS, build_plain

    plain = build_plain()
    args.policy, args.strong, args.weak = (str(plain / name) for name in ("policy", "strong", "weak"))
    rows = [{"prompt": world.conversation(task), "domain": task.domain} for task in world.HELD_OUT]
    data = Dataset.from_list(rows)
    args.input, settings = "tiny-world", {"max_completion_length": MAX_NEW_TOKENS}

annotate(
    AnnotateArguments(
        input=args.input,
        output_dir=args.output_dir,
        policy=args.policy,
        num_generations=8,
        pair_strategy="best_worst",
        **settings,
    ),
    CDRConfig(cdr_strong=args.strong, cdr_weak=args.weak),
    data=data,
)

# What DPOTrainer and CPOTrainer take as it is.
pairs = load_dataset(args.output_dir, split="train")
print(f"{len(pairs)} pairs, columns: {', '.join(pairs.column_names)}")
print(f"chosen:   {pairs[0]['chosen'][0]['content']}\nrejected: {pairs[0]['rejected'][0]['content']}")
if args.tiny:  # where a rule judges every completion
    for side in ("chosen", "rejected"):
        right = [world.gold(row["prompt"], row[side][0]["content"], finished=True) for row in pairs]
        print(f"share of {side} that are right: {sum(right) / len(right):.2f}")
