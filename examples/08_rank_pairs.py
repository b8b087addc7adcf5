"""Which pair to take: every model is run once over preference pairs, and every ordered pair of models is ranked.

python examples/08_rank_pairs.py           # five models of 0.5B to 3B on RewardBench: a GPU with 16 GB, and the Hub
python examples/08_rank_pairs.py --tiny    # 13 tiny models on pairs that a tiny policy wrote: any machine, no network
"""

import argparse
import json
from pathlib import Path

from trl_cdr.annotation.rank_pairs import RankArguments, RankOptions, rank_files

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--models", nargs="+", default=[f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B")])
parser.add_argument("--bases", nargs="+", default=[f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B")])
parser.add_argument("--data", nargs="+", default=["allenai/reward-bench"])
parser.add_argument("--output_dir", default="./trl-cdr-rank-pairs")
parser.add_argument("--tiny", action="store_true", help="run on tiny models, built from scratch in a minute")
args = parser.parse_args()

models, data, performance = args.models + args.bases, args.data, None
if args.tiny:
    from trl_cdr.demo import ladder
    from trl_cdr.demo.models import build_checkpoints, build_ladder, one_thread, quiet

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(), one_thread():
        checkpoints = build_checkpoints()
        models = [str(path) for path in build_ladder(checkpoints).values()]
        data, performance = [str(folder / "pairs.jsonl")], str(folder / "performance.json")
        ladder.write_pairs(checkpoints.policy, folder / "pairs.jsonl")
        gold = {name: ladder.measure_gold(Path(name)) for name in models}
    Path(performance).write_text(json.dumps(gold, indent=2))

found = rank_files(
    RankArguments(data=data, models=models, performance=performance, output_dir=args.output_dir),
    RankOptions(cdr_gate="none", cdr_dtype="auto" if args.tiny else "bfloat16"),
)
best = found["ranking"][0]
print(f"best pair: {Path(best['strong']).name} over {Path(best['weak']).name}, {best['accuracy'][0]:.3f}")
