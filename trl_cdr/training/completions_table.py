"""The completions of online DPO, as GRPO and RLOO show theirs: some on the terminal, all of them in Parquet files."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from .metrics import Call

_SHOWN = 4
_LONGEST = 400


def table_rows(call: Call) -> list[dict[str, Any]]:
    """A row for each completion of a reward call."""
    return [
        {
            "prompt": as_text(prompt),
            "completion": as_text(completion),
            "reward": reward,
            "log_ratio": score.value,
            "strong_logps": score.strong_logps,
            "weak_logps": score.weak_logps,
            "tokens": score.n_tokens,
            "surprise": score.surprise,
            "survival": score.survival,
            "typicality": score.typicality,
            "gated": score.gated,
            "domain": score.domain,
            "error": score.error,
        }
        for prompt, completion, score, reward in zip(
            call.prompts, call.completions, call.scores, call.rewards, strict=True
        )
    ]


def write_table(rows: list[dict[str, Any]], folder: Path, *, step: int) -> None:
    """Write `completions_<step>.parquet` into the folder, and print the last rows; nothing without rows."""
    if not rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(folder / f"completions_{step:05d}.parquet")
    table = Table("prompt", "completion", "reward", "tokens", title=f"Step {step}", show_lines=True)
    for row in rows[-_SHOWN:]:
        reward = "-" if row["reward"] is None else f"{row['reward']:+.2f}"
        note = " (gated)" if row["gated"] else ""
        texts = (row[name][-_LONGEST:] for name in ("prompt", "completion"))
        table.add_row(*texts, f"{reward}{note}", str(row["tokens"]))
    Console().print(table, markup=False)


def as_text(conversation: Any) -> str:
    """A string as it is, messages one below the other."""
    if isinstance(conversation, str):
        return conversation
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in conversation)
