"""Marks the functions that prove a lab's exercises; tests/test_exercises.py runs them through the checks."""

from __future__ import annotations

from collections.abc import Callable


def right(exercise: str) -> Callable:
    """Another correct solution: the check and the hidden tests pass."""
    return _mark("right", exercise, "")


def wrong(exercise: str, says: str) -> Callable:
    """A misconception: it runs, has the right shape, and the check fails with the sentence that contains `says`."""
    return _mark("wrong", exercise, says)


def sly(exercise: str, says: str) -> Callable:
    """A mistake that the check does not see and the hidden tests do."""
    return _mark("sly", exercise, says)


def _mark(kind: str, exercise: str, says: str) -> Callable:
    def mark(function: Callable) -> Callable:
        function.proof = (kind, exercise, says)
        return function

    return mark
