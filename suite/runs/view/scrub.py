"""Texts without the paths of a machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from suite import settings


class Scrubber:
    """Replaces folders of this machine in texts: ``{data_dir}``, ``{results_dir}``, ``{cache_dir}``, ``{model_dir}`` ...

    Parameters
    ----------
    folders : pairs of a placeholder's name and a folder or None; the longest matching folder wins.
    """

    def __init__(self, folders: Iterable[tuple[str, str | Path | None]]) -> None:
        everywhere = [
            ("cache_dir", settings.cache_dir()),
            ("hub_cache_dir", settings.hub_cache_dir()),
            ("package_dir", settings.package_dir()),
            ("work_dir", Path.cwd()),
            ("home", Path.home()),
        ]
        names: dict[str, str] = {}
        for name, folder in [*everywhere, *folders]:
            if folder is not None:
                names[os.path.abspath(folder)] = name  # noqa: PTH100  Path.absolute() keeps ".."
                if "/" in str(folder):
                    names[str(folder)] = name  # as it was written; a bare word would also match prose
        names.pop("/", None)
        self._names = dict(sorted(names.items(), key=lambda item: -len(item[0])))
        self._pattern = re.compile("|".join(rf"(?<![\w.-]){re.escape(f)}(?![\w.-])" for f in self._names))

    def text(self, text: str) -> str:
        """``text`` with known folders as placeholders."""
        return self._pattern.sub(lambda match: "{" + self._names[match.group()] + "}", text)

    def value(self, value: Any) -> Any:
        """The same for every string inside a JSON value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, (list, tuple)) else value
