"""Online SimPO with labels from a strong/weak pair: of eight completions, the best is chosen and the worst rejected.

python examples/06_online_simpo.py           # 7B pair, 0.5B policy: a GPU with 48 GB, and the Hub
python examples/06_online_simpo.py --tiny    # tiny models: any machine, no network
python examples/06_online_simpo.py --tiny --preference_loss dpo
"""

import argparse

from datasets import Dataset, load_dataset

from trl_cdr import CDRReward, OnlinePreferenceConfig, OnlinePreferenceTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--policy", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--strong", default="NousResearch/Nous-Hermes-2-Mistral-7B-DPO")
parser.add_argument("--weak", default="teknium/OpenHermes-2.5-Mistral-7B")
parser.add_argument("--dataset", default="trl-lib/ultrafeedback-prompt", help="with a column `prompt`")
parser.add_argument("--preference_loss", default="simpo", choices=["simpo", "dpo", "ipo"])
parser.add_argument("--max_steps", type=int, default=240)
parser.add_argument("--output_dir", default="./trl-cdr-online-simpo")
parser.add_argument("--tiny", action="store_true", help="run on tiny models, built from scratch in a minute")
args = parser.parse_args()

# A step: 16 prompts with 8 completions each, in 16 micro-batches of one pair.
settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 16, "max_completion_length": 256}
settings |= {"learning_rate": 1e-6, "lr_scheduler_type": "cosine"}
if args.tiny:
    from trl_cdr.demo import world
    from trl_cdr.demo.models import MAX_NEW_TOKENS, build_plain

    plain = build_plain()
    args.policy, args.strong, args.weak = (str(plain / name) for name in ("policy", "strong", "weak"))
    dataset = Dataset.from_list([{"prompt": world.conversation(task)} for task in world.TRAIN])
    settings = {"per_device_train_batch_size": 128, "learning_rate": 5e-4, "max_completion_length": MAX_NEW_TOKENS}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
else:
    dataset = load_dataset(args.dataset, split="train")

trainer = OnlinePreferenceTrainer(
    model=args.policy,
    reward_funcs=CDRReward(args.strong, args.weak, dtype="auto" if args.tiny else "bfloat16"),
    args=OnlinePreferenceConfig(
        args.output_dir,
        preference_loss=args.preference_loss,
        num_generations=8,
        max_steps=args.max_steps,
        logging_steps=10,
        report_to="none",
        save_strategy="no",
        **settings,
    ),
    train_dataset=dataset,
)
trainer.train()
trainer.save_model()

logs = [entry for entry in trainer.state.log_history if "pairs/margin" in entry]
first, last = logs[0], logs[-1]
print(f"mean reward of the first log {first['reward']:+.2f}, of the last {last['reward']:+.2f}; in {args.output_dir}")
print(f"policy prefers the chosen: {first['rewards/accuracies']:.0%}, {last['rewards/accuracies']:.0%} of pairs")
print(f"log-probability of the chosen: {first['logps/chosen']:.2f}, {last['logps/chosen']:.2f} nats")
