"""Answers that are kept for a while, since finding them takes long."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """The answers to the last questions that were asked, 64 of them."""

    def __init__(self, most: int = 64):
        self.most = most
        self.answers: OrderedDict[Hashable, T] = OrderedDict()

    def of(self, question: Hashable, find: Callable[[], T]) -> T:
        """The answer, found now if it is not there."""
        if question not in self.answers:
            self.answers[question] = find()
            if len(self.answers) > self.most:
                self.answers.popitem(last=False)
        self.answers.move_to_end(question)
        return self.answers[question]
