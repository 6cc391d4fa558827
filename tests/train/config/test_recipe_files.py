"""Recipes in files of one's own: `--recipe FILE.py:NAME`, and what is said where that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oner_fast.train.clip import recipes as clip_recipes
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.config import registry
from oner_fast.train.config.command_line import parse
from oner_fast.train.config.registry import get_recipe, import_all_recipes
from oner_fast.train.lit.settings import LiTConfiguration
from oner_fast.train.oner import recipes as oner_recipes
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.uta.settings import UTAConfiguration

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "my_recipes.py"

FILE = """
from dataclasses import replace
from oner_fast.train.clip.recipes import clip_tiny_icons_cpu
from oner_fast.train.config.registry import recipe
from oner_fast.train.lit.recipes import lit_tiny_icons_cpu
from oner_fast.train.uta.recipes import uta_tiny_icons_cpu

@recipe
def mine_clip_cpu():
    '''A CLIP.'''
    base = clip_tiny_icons_cpu()
    return replace(base, optim=replace(base.optim, lr=5e-4))

@recipe
def mine_uta_cpu():
    '''A UTA.'''
    return uta_tiny_icons_cpu()

@recipe
def mine_lit_cpu():
    '''A LiT.'''
    return lit_tiny_icons_cpu()

@recipe
def mine_broken_cpu():
    '''Wrong.'''
    return replace(clip_tiny_icons_cpu(), colour=1)

@recipe
def mine_none_cpu():
    '''Nothing.'''
"""


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import_all_recipes()
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return "mine.py"


def test_the_example_is_a_recipe() -> None:
    reference = f"{EXAMPLE}:oner_mini_pairs_cpu"
    config = parse(["--recipe", reference, "--lr", "2e-3"], oner_recipes.DEFAULT, "prog", OneRConfiguration)
    assert (config.model.width, config.optim.steps, config.optim.lr) == (192, 300, 2e-3)
    assert config.run.recipe == reference
    assert get_recipe(reference, OneRConfiguration).optim.lr == 1e-3


def test_every_system_takes_a_recipe_of_a_file(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: dict[str, Any] = {"clip": CLIPConfiguration, "uta": UTAConfiguration, "lit": LiTConfiguration}
    for system, kind in kinds.items():
        config = parse([f"--recipe={file}:mine_{system}_cpu"], "unused_default_cpu", "prog", kind)
        assert isinstance(config, kind) and config.run.recipe == f"mine.py:mine_{system}_cpu"
    with pytest.raises(SystemExit):
        parse(["--recipe", f"{file}:mine_clip_cpu", "--help"], clip_recipes.DEFAULT, "prog", CLIPConfiguration)
    assert "A CLIP." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reference", "texts"),
    [
        ("absent.py:mine_clip_cpu", ["--recipe absent.py:mine_clip_cpu: there is no file", "absent.py"]),
        ("mine.py:mine_clop_cpu", ["mine.py has no recipe 'mine_clop_cpu'", "Did you mean 'mine_clip_cpu'"]),
        ("mine.py", ["mine.py has recipes: ", "mine_clip_cpu", "choose with --recipe mine.py:NAME"]),
        ("mine.py:mine_uta_cpu", ["recipe 'mine.py:mine_uta_cpu' belongs to 'oner-fast train uta'"]),
        ("mine.py:mine_broken_cpu", ["fails", "mine.py, line 27: TypeError", "'colour'"]),
        ("mine.py:mine_none_cpu", ["must return a CLIPConfiguration, got NoneType"]),
        ("raises.py:mine_clip_cpu", ["raises.py, line 2: ZeroDivisionError: division by zero"]),
        ("syntax.py:mine_clip_cpu", ["syntax.py, line 1: SyntaxError"]),
        ("empty.py:mine_clip_cpu", ["empty.py has no recipes: decorate functions with @recipe"]),
        ("taken.py:mine_clip_cpu", ["recipe 'clip_tiny_icons_cpu' is already defined in oner_fast.train.clip.recipes"]),
    ],
)
def test_an_error_says_what_is_wrong(
    reference: str, texts: list[str], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raises.py").write_text("\n1 / 0\n")
    (tmp_path / "syntax.py").write_text("def (:\n")
    (tmp_path / "empty.py").write_text("")
    taken = (
        "from oner_fast.train.config.registry import recipe\n@recipe\ndef clip_tiny_icons_cpu():\n    '''Taken.'''\n"
    )
    (tmp_path / "taken.py").write_text(taken)
    with pytest.raises(SystemExit) as stop:
        parse(["--recipe", reference], clip_recipes.DEFAULT, "prog", CLIPConfiguration)
    assert stop.value.code == 2
    output = capsys.readouterr().err
    for text in texts:
        assert text in output


def test_recipes_of_a_file_share_no_run_folder_with_ours_or_each_other(file: str) -> None:
    folders = [get_recipe(f"{file}:mine_{system}_cpu").run.run_dir for system in ("clip", "uta", "lit")]
    assert folders == ["runs/mine_clip_cpu", "runs/mine_uta_cpu", "runs/mine_lit_cpu"]
