"""Reader of the pack's JSONL files, called by lm-eval through ``custom_dataset: !function dataset.load``."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(file: str, **_: Any) -> Any:
    """Read a JSONL file that lies beside this module, whatever the working folder.

    Parameters
    ----------
    file
        File name, from ``dataset_kwargs`` in the task's YAML. lm-eval passes the task's metadata too; it is not needed.

    Returns
    -------
    datasets.DatasetDict
        One split, ``test``.
    """
    # ``datasets`` takes seconds to import; task listings read this folder without needing it.
    import json

    from datasets import Dataset, DatasetDict

    with (Path(__file__).parent / file).open(encoding="utf-8") as lines:
        return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in lines])})
