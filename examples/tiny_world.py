"""Write what tiny.yaml and rounds.yaml read: the demo's pair and policy, built from scratch in a minute, and prompts.

python examples/tiny_world.py    # into ./trl-cdr-tiny, offline
"""

import json
import shutil
from pathlib import Path

from trl_cdr.demo import world
from trl_cdr.demo.models import build_checkpoints

folder = Path("trl-cdr-tiny")
checkpoints = build_checkpoints()
for name, source in (("strong", checkpoints.mild), ("weak", checkpoints.base), ("policy", checkpoints.policy)):
    shutil.copytree(source, folder / name, dirs_exist_ok=True)
for split, tasks in (("train", world.TRAIN), ("test", world.HELD_OUT)):
    rows = [json.dumps({"prompt": world.conversation(task), "domain": task.domain}) for task in tasks]
    (folder / "prompts").mkdir(exist_ok=True)
    (folder / "prompts" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
print(f"{folder}: strong, weak, policy and prompts")
