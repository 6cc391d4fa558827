"""Functions of other classes are replaced and put back: the same objects, whatever the order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from oner_fast.integrations import fallback
from oner_fast.integrations.fallback import tell
from oner_fast.integrations.swaps import Swap, Swaps, stands_for


class Owner:
    def first(self, x: int) -> int:
        """Add one."""
        return x + 1

    def second(self, x: int, y: int = 0) -> int:
        return x + y


ORIGINALS = {name: Owner.__dict__[name] for name in ("first", "second")}


def negated(original: Callable[..., int]) -> Callable[..., int]:
    if original.__name__ == "first":

        def replacement(self: Any, x: int) -> int:
            return -original(self, x)
    else:

        def replacement(self: Any, x: int, y: int = 0) -> int:  # type: ignore[misc]
            return -original(self, x, y)

    return stands_for(replacement, original)


FIRST, SECOND = (Swap(Owner, name, negated, f"Owner.{name}") for name in ("first", "second"))


@pytest.fixture
def swaps() -> Iterator[Swaps]:
    made = Swaps("toy")
    yield made
    for name, original in ORIGINALS.items():
        setattr(Owner, name, original)


def untouched() -> bool:
    return all(Owner.__dict__[name] is original for name, original in ORIGINALS.items())


def test_replacing_twice_is_replacing_once(swaps: Swaps) -> None:
    swaps.replace([FIRST, SECOND])
    now = Owner.__dict__["first"]
    swaps.replace([FIRST])
    assert Owner.__dict__["first"] is now and Owner().first(1) == -2 and Owner().second(1, 2) == -3
    swaps.put_back()
    assert untouched() and Owner().first(1) == 2
    swaps.put_back()
    assert untouched()


def test_blocks_nest_and_each_puts_back_its_own(swaps: Swaps) -> None:
    with swaps.replace([FIRST]):
        with swaps.replace([FIRST, SECOND]):
            assert Owner().first(1) == -2 and Owner().second(1) == -1
        assert Owner().first(1) == -2 and Owner().second(1) == 1
    assert untouched()


def test_an_error_in_the_block_puts_back_too(swaps: Swaps) -> None:
    with pytest.raises(KeyError), swaps.replace([FIRST]):
        raise KeyError
    assert untouched()


def test_a_block_may_find_everything_put_back_already(swaps: Swaps) -> None:
    with swaps.replace([FIRST, SECOND]):
        swaps.put_back()
        assert untouched()
    assert untouched()


def test_a_function_that_was_replaced_again_is_not_lost(swaps: Swaps) -> None:
    swaps.replace([FIRST, SECOND])
    ours, other = Owner.__dict__["second"], lambda self, x, y=0: 7
    Owner.second = other  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="Owner.second was replaced again after patch"):
        swaps.put_back()
    assert Owner().first(1) == -2 and Owner().second(1) == 7
    Owner.second = ours  # type: ignore[method-assign]
    swaps.put_back()
    assert untouched()


def test_other_arguments_are_refused_before_anything_is_replaced(swaps: Swaps) -> None:
    wrong = Swap(Owner, "second", lambda original: lambda self, x: x, "Owner.second")
    with pytest.raises(RuntimeError, match=r"Owner.second of the installed toy takes \(self, x, y\).*for \(self, x\)"):
        swaps.replace([FIRST, wrong])
    assert untouched()


def test_a_function_that_is_missing_is_named(swaps: Swaps) -> None:
    with pytest.raises(RuntimeError, match=r"the installed toy has no Owner.third"):
        swaps.replace([FIRST, Swap(Owner, "third", negated, "Owner.third")])
    assert untouched()


def test_a_function_that_someone_wrapped_before_is_wrapped_once_more(swaps: Swaps) -> None:
    original = ORIGINALS["first"]

    @functools.wraps(original)
    def doubled(*arguments: Any) -> int:
        return 2 * original(*arguments)

    Owner.first = doubled  # type: ignore[method-assign, assignment]
    with swaps.replace([FIRST]):
        assert Owner().first(1) == -4
    assert Owner.__dict__["first"] is doubled


def test_a_replacement_has_the_originals_name_documentation_and_source(swaps: Swaps) -> None:
    with swaps.replace([FIRST]):
        assert Owner.first.__doc__ == "Add one." and Owner.first.__qualname__ == "Owner.first"
        assert inspect.getsource(Owner.first) == inspect.getsource(ORIGINALS["first"])


def test_a_reason_is_told_once_and_again_after_everything_is_put_back(
    swaps: Swaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "_told", set())
    with swaps.replace([FIRST]):
        with pytest.warns(fallback.Fallback, match="leaves Owner.first to its own code: too short") as told:
            for _ in range(3):
                tell("Owner.first", "its own code", "too short")
        assert len(told) == 1
        with pytest.warns(fallback.Fallback, match="too long"):
            tell("Owner.first", "its own code", "too long")
    with pytest.warns(fallback.Fallback, match="too short"):
        tell("Owner.first", "its own code", "too short")


def test_what_was_loaded_again_counts_as_put_back() -> None:
    swaps = Swaps("project")
    swaps.replace([Swap(Owner, name, negated, f"Owner.{name}") for name in ORIGINALS])
    Owner.first = ORIGINALS["first"]  # type: ignore[method-assign]  # as importlib.reload does
    swaps.put_back()
    assert {name: vars(Owner)[name] for name in ORIGINALS} == ORIGINALS
