"""The paper's own client (PyPI: reward_hub) over two vLLM servers, in a process of its own: it forks, and says a lot.

`test_real_vllm` runs it. Conversations come as JSON on standard input. The last line of standard output has the seconds
that each call took, and its rows' log-probabilities, one a token.
"""

import json
import sys
import time

from reward_hub.drsow import DrSowConfig
from reward_hub.openai.reward import OpenAIOutcomeRewardModel

asked = json.load(sys.stdin)
client = OpenAIOutcomeRewardModel("drsow", drsow_config=DrSowConfig(**asked["servers"]))
answers = []
for conversations in asked["calls"]:
    started = time.perf_counter()
    found = client.score(conversations, return_raw_scores=True)
    seconds = time.perf_counter() - started
    rows = [{role: row[f"{role}_logprobs"].tolist() for role in ("strong", "weak")} for row in found]
    answers.append({"seconds": seconds, "rows": rows})
print(json.dumps(answers))
