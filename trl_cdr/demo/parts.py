"""Long measurements part by part: a folder of results, from which a run that was stopped goes on. Knows no model."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..annotation.score_folder import write_json, writing
from ..errors import ConfigError

SETTINGS = "settings.json"


class Parts:
    """
    Results by part, one JSON file each, in a folder. What is there is taken as it is.

    Args:
        folder (`Path`): Made if missing.
        settings (`dict`): What the results depend on; kept in `settings.json`.

    Raises:
        ConfigError: the folder holds results of other settings, or can't be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.keep(SETTINGS, settings)

    def keep(self, name: str, content: dict[str, Any]) -> None:
        """
        Keep something that the results depend on.

        Args:
            name (`str`): Of its file.
            content (`dict`): What JSON can hold.

        Raises:
            ConfigError: another content is kept under this name, or the file can't be written.
        """
        path = self.folder / name
        if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8"))) != content:
            changed = [key for key in {*content, *found} if content.get(key) != found.get(key)]
            raise ConfigError(
                f"output_dir is {str(self.folder)!r}, whose results are of another {', '.join(sorted(changed))} "
                f"({name}). Pass another folder."
            )
        with writing(self.folder):
            write_json(path, content)

    def run(self, name: str, measure: Callable[[], Any]) -> Any:
        """
        The part's result: what `measure` returns, with its `seconds`.

        Raises:
            ConfigError: it can't be written.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            started = time.perf_counter()
            result = measure()
            with writing(self.folder):
                write_json(path, result | {"seconds": round(time.perf_counter() - started, 1)})
        return json.loads(path.read_text(encoding="utf-8"))
