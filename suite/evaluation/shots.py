"""Few-shot examples of a task: which split they come from, and never the document that is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from suite.errors import InputError

SCORED = " (scored)"  # after the name of the split whose other documents are asked
OWN_EXAMPLES = "own examples"  # written in the task's YAML


def split_of(task: Any) -> str:
    """Split that lm-eval draws the examples of ``task`` from, ``<split> (scored)`` where it is the scored one."""
    config = task.config
    shots = getattr(task, "fewshot_cfg", None)
    split = getattr(shots, "split", None)
    if split is None and getattr(shots, "samples", None) is not None:
        return OWN_EXAMPLES
    split = split or config.training_split or config.validation_split or config.test_split
    return f"{split}{SCORED}" if split == (config.test_split or config.validation_split) else str(split)


class Shots:
    """Stands in for the sampler of a task: draws as it does, but never the document whose prompt is being built.

    Parameters
    ----------
    task : lm-eval's task with its sampler and seed; its ``fewshot_context`` is wrapped to say which document is asked

    Raises
    ------
    InputError
        Examples of the scored split have a ``process_docs`` of their own, so that a document cannot be told among them;
        fewer documents than examples (at a draw).
    """

    def __init__(self, task: Any) -> None:
        self._sampler, self._name, self._split = task.sampler, task.config.task, split_of(task)
        self._document: Any = None
        self._said = lambda doc: (repr(task.doc_to_text(doc)), repr(task.doc_to_target(doc)))
        shots = task.fewshot_cfg
        if self._split.endswith(SCORED) and shots.process_docs not in (None, task.config.process_docs):
            raise InputError(
                f"task {self._name}: its few-shot examples come from the scored split with a process_docs of their own, "
                "so that the document itself cannot be left out; give num_fewshot 0 or a fewshot_split"
            )
        build = task.fewshot_context

        def fewshot_context(doc: Any, *args: Any, **kwargs: Any) -> Any:
            self._document = doc
            return build(doc, *args, **kwargs)

        task.fewshot_context = fewshot_context
        task.sampler = self

    def sample(self, n: int, *args: Any, **kwargs: Any) -> Sequence[Any]:
        """``n`` examples, as the task's own sampler draws them where it leaves the document out."""
        document = self._document
        scored = self._split.endswith(SCORED)
        asked = self._said(document)
        try:
            drawn = self._sampler.sample(n, eval_doc=document if scored else None)
            if any(self._said(d) == asked for d in drawn):  # a split that holds it again, perhaps under another id
                drawn = self._sampler.rnd.sample([d for d in self._sampler.df if self._said(d) != asked], n)
        except (ValueError, AssertionError) as error:
            others = sum(self._said(d) != asked for d in self._sampler.df)
            raise InputError(
                f"task {self._name}: num_fewshot {n} is more than the {others} examples of split {self._split} "
                f"beside the document; give at most {others}"
            ) from error
        return drawn
