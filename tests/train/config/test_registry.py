"""The recipes of all systems together: each belongs to one command, which an error names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from oner_fast.train.config.registry import command_of, import_all_recipes, recipes
from oner_fast.train.oner.settings import OneRConfiguration

PROGRAM = """
import sys
from oner_fast.train.{system}.__main__ import main
main(["--recipe", "{recipe}"])
"""


def test_every_recipe_carries_its_name_and_belongs_to_a_command() -> None:
    import_all_recipes()
    found = {name: make() for name, make in recipes().items() if make.__module__.startswith("oner_fast.train.")}
    assert all(config.run.recipe == name for name, config in found.items())
    commands = {command_of(config) for config in found.values()}
    assert commands == {f"oner-fast train {system}" for system in ("oner", "uta", "clip", "lit")}
    assert not [name for name, config in found.items() if "clip" in name and isinstance(config, OneRConfiguration)]


@pytest.mark.parametrize(
    ("system", "recipe", "owner"), [("oner", "clip_tiny_icons_cpu", "clip"), ("lit", "uta_b14_in21k_a100x8", "uta")]
)
def test_an_error_names_the_command_that_knows_a_recipe(system: str, recipe: str, owner: str) -> None:
    """In a process of its own, which has not imported the other system's recipes."""
    program = PROGRAM.format(system=system, recipe=recipe)
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stderr == (
        f"oner-fast train {system}: error: recipe '{recipe}' belongs to 'oner-fast train {owner}'\n"
    )
