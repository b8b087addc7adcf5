"""GRPO with labels from a strong/weak pair: the policy writes a group of completions, each is rewarded in nats.

python examples/05_grpo.py           # 7B pair, 0.5B policy: a GPU with 48 GB, and the Hub
python examples/05_grpo.py --tiny    # the demo's models: any machine, no network
"""

import argparse

from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer

from trl_cdr import CDRReward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--policy", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--strong", default="NousResearch/Nous-Hermes-2-Mistral-7B-DPO")
parser.add_argument("--weak", default="teknium/OpenHermes-2.5-Mistral-7B")
parser.add_argument("--dataset", default="trl-lib/ultrafeedback-prompt", help="with a column `prompt`")
parser.add_argument("--max_steps", type=int, default=200)
parser.add_argument("--output_dir", default="./trl-cdr-grpo")
parser.add_argument("--tiny", action="store_true", help="run on the demo's models, built from scratch in a minute")
args = parser.parse_args()

settings = {"per_device_train_batch_size": 8, "num_generations": 8, "max_completion_length": 256, "beta": 0.04}
if args.tiny:
    from trl_cdr.demo import world
    from trl_cdr.demo.models import MAX_NEW_TOKENS, build_checkpoints

    checkpoints = build_checkpoints()
    args.policy, args.strong, args.weak = (
        str(path) for path in (checkpoints.policy, checkpoints.mild, checkpoints.base)
    )
    dataset = Dataset.from_list([{"prompt": world.conversation(task)} for task in world.TRAIN])
    settings |= {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "max_completion_length": MAX_NEW_TOKENS}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
else:
    dataset = load_dataset(args.dataset, split="train")

training_args = GRPOConfig(
    args.output_dir, max_steps=args.max_steps, logging_steps=10, report_to="none", save_strategy="no", **settings
)
trainer = GRPOTrainer(
    model=args.policy,
    reward_funcs=CDRReward(args.strong, args.weak, dtype="auto" if args.tiny else "bfloat16"),
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()

logs = [entry for entry in trainer.state.log_history if "rewards/cdr_reward/mean" in entry]
rewards = [entry["rewards/cdr_reward/mean"] for entry in logs]
print(f"mean reward of the first log {rewards[0]:+.2f}, of the last {rewards[-1]:+.2f}; saved to {args.output_dir}")
print(f"gated, of the last log: {logs[-1]['cdr/gated']:.1%}")
