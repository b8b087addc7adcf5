"""Two objectives from one pair: each reward shows the models its own criteria, and GRPO weighs the two.

python examples/03_criteria.py           # 7B pair, 0.5B policy: a GPU with 48 GB, and the Hub
python examples/03_criteria.py --tiny    # the demo's models: any machine, no network
"""

import argparse

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_cdr import CDRReward, Criteria, DomainCriteria

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--policy", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--strong", default="NousResearch/Nous-Hermes-2-Mistral-7B-DPO")
parser.add_argument("--weak", default="teknium/OpenHermes-2.5-Mistral-7B")
parser.add_argument("--dataset", default="trl-lib/ultrafeedback-prompt", help="with a column `prompt`")
parser.add_argument("--max_steps", type=int, default=200)
parser.add_argument("--output_dir", default="./trl-cdr-criteria")
parser.add_argument("--tiny", action="store_true", help="run on the demo's models, built from scratch in a minute")
args = parser.parse_args()

CRITERIA = """
[chemistry]
instruction = "A good completion names the reaction, balances it, and says how to stay safe. A bad one guesses."

[[chemistry.exemplars]]
prompt = "What happens when iron rusts?"
chosen = "Iron reacts with oxygen and water: 4 Fe + 3 O2 + 6 H2O -> 4 Fe(OH)3, which dries to rust."
rejected = "The iron gets old and turns brown because of the weather."
explanation = "The first gives the balanced reaction; the second describes what anyone sees."

[default]  # serves every other prompt: the plain ratio
"""


def find_domain(prompt):
    return "chemistry" if "reaction" in str(prompt) else "default"


settings = {"per_device_train_batch_size": 8, "num_generations": 8, "learning_rate": 1e-6, "bf16": True}
criteria, router, brevity = Criteria.from_toml(CRITERIA), find_domain, "A good completion is as short as it can be."
options = {"dtype": "bfloat16"}
if args.tiny:
    from trl_cdr.demo import steering, world
    from trl_cdr.demo.models import MAX_NEW_TOKENS, build_checkpoints, build_steerable

    checkpoints = build_checkpoints()
    pair = build_steerable(checkpoints)
    args.policy, args.strong, args.weak = str(checkpoints.policy), str(pair.strong), str(pair.weak)
    rows = [{"prompt": world.conversation(task), "domain": task.domain} for task in world.TRAIN]
    dataset, criteria, router = Dataset.from_list(rows), steering.make_criteria(), "column:domain"
    settings |= {"max_completion_length": MAX_NEW_TOKENS, "learning_rate": 1e-3, "bf16": False, "use_cpu": True}
    options, brevity = {}, "be brief ."
else:
    dataset = load_dataset(args.dataset, split="train")

right = CDRReward(args.strong, args.weak, name="right", criteria=criteria, router=router, **options)
# The same two models, behind other criteria: nothing is loaded twice.
short = CDRReward(share=right, name="short", criteria=Criteria({"brief": DomainCriteria(brevity)}))
trainer = GRPOTrainer(
    model=args.policy,
    reward_funcs=[right, short],
    args=GRPOConfig(
        args.output_dir,
        max_steps=args.max_steps,
        reward_weights=[1.0, 0.5],
        report_to="none",
        logging_steps=5,
        **settings,
    ),
    processing_class=AutoTokenizer.from_pretrained(args.policy),
    train_dataset=dataset,
)
trainer.train()
for name in ("right", "short"):
    means = [log[f"rewards/{name}_reward/mean"] for log in trainer.state.log_history if "reward" in log]
    print(f"{name}: mean reward of the first log {means[0]:+.2f}, of the last {means[-1]:+.2f}")
