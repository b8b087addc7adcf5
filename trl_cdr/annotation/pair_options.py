"""What a run over rows has to know of the pair: what its scores depend on, and where rows say their domain.

`score_file` and `annotate` share it. Scores nothing.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import shareable_options
from ..scoring.scorer import DensityRatioScorer
from ..scoring.sources import find_sources, read_served
from .reader import Row, Source


def known_options(scorer: DensityRatioScorer) -> dict[str, Any]:
    """What scores will depend on, as far as it is known without the models."""
    config = scorer.config
    init_kwargs: Any = config.cdr_model_init_kwargs
    template = config.cdr_chat_template
    return {
        **shareable_options(config),
        **{
            f"{role}_weights": source.identify(role, init_kwargs=init_kwargs)
            for role, source in find_sources(config).items()
        },
        **{
            f"{role}_weights": f"{read_served(getattr(config, f'cdr_{role}'), role).model} of a server"
            for role in config.served
        },
        "criteria_sha256": None if scorer.criteria is None else scorer.criteria.digest,
        "chat_template_sha256": None if template is None else hashlib.sha256(Path(template).read_bytes()).hexdigest(),
    }


def loaded_options(scorer: DensityRatioScorer) -> dict[str, Any]:
    """What else they depend on; loads the pair."""
    described = scorer.describe()
    return {
        **{f"{role}_dtype": described[role]["dtype"] for role in ("strong", "weak")},
        "date": described["date"],
        "string_prompts": described["string_prompts"],
    }


def check_router(scorer: DensityRatioScorer, source: Source) -> None:
    """
    Whether the column that the router reads is in any row. All are looked at: a row without it has its reason.

    Raises:
        InputError: it is in none.
    """
    if scorer.router is None or scorer.router.column is None:
        return
    names: dict[str, None] = {}
    for row in source.read():
        if isinstance(row, Row):
            names |= dict.fromkeys(row.fields)
    scorer.router.check_column(names, where=f"input {source.name!r}")


def row_domains(scorer: DensityRatioScorer, rows: Sequence[Row]) -> list[str | None]:
    """What the rows say of their domains: in the column that the router reads, else in `domain`."""
    column = None if scorer.router is None else scorer.router.column
    return [row.fields.get(column or "domain") for row in rows]
