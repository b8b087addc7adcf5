"""Online DPO with labels from a strong/weak pair: the policy writes two completions, the pair says which is better.

python examples/02_online_dpo.py           # 7B pair, 0.5B policy: a GPU with 48 GB, and the Hub
python examples/02_online_dpo.py --tiny    # the demo's models: any machine, no network
"""

import argparse

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_cdr import CDRReward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--policy", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--strong", default="NousResearch/Nous-Hermes-2-Mistral-7B-DPO")
parser.add_argument("--weak", default="teknium/OpenHermes-2.5-Mistral-7B")
parser.add_argument("--dataset", default="trl-lib/ultrafeedback-prompt", help="with a column `prompt`")
parser.add_argument("--max_steps", type=int, default=200)
parser.add_argument("--output_dir", default="./trl-cdr-online-dpo")
parser.add_argument("--tiny", action="store_true", help="run on the demo's models, built from scratch in a minute")
args = parser.parse_args()

settings = {"per_device_train_batch_size": 8, "learning_rate": 5e-7, "max_new_tokens": 256}
options = {"dtype": "bfloat16", "policy_tokenizer": args.policy}
if args.tiny:
    from trl_cdr.demo import world
    from trl_cdr.demo.models import MAX_NEW_TOKENS, build_checkpoints

    checkpoints = build_checkpoints()
    args.policy, args.strong, args.weak = (
        str(path) for path in (checkpoints.policy, checkpoints.mild, checkpoints.base)
    )
    dataset = Dataset.from_list([{"prompt": world.conversation(task)} for task in world.TRAIN])
    settings = {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "max_new_tokens": MAX_NEW_TOKENS}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "beta": 0.5}
    options = {}
else:
    dataset = load_dataset(args.dataset, split="train")

reward = CDRReward(args.strong, args.weak, **options)
trainer = OnlineDPOTrainer(
    model=args.policy,
    reward_funcs=reward,
    args=OnlineDPOConfig(args.output_dir, max_steps=args.max_steps, logging_steps=10, report_to="none", **settings),
    processing_class=AutoTokenizer.from_pretrained(args.policy),
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()

rewards = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
print(f"mean reward of the first log {rewards[0]:+.2f}, of the last {rewards[-1]:+.2f}; saved to {args.output_dir}")
