"""Which checkout is used, and where the relative paths of a preset lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.engine import paths
from tasks.engine.errors import UserError
from tasks.engine.paths import MARKS, REPOSITORY, find_checkout, project_path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What counts as a checkout."""
    for mark in MARKS:
        (tmp_path / "project" / mark).mkdir(parents=True)
    return tmp_path / "project"


def test_the_code_lies_in_a_checkout_which_is_used_from_anywhere(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in (tmp_path, checkout):
        monkeypatch.chdir(directory)
        assert find_checkout(None) == REPOSITORY
        assert project_path(Path(".artifacts")) == REPOSITORY / ".artifacts"


def test_what_is_given_comes_first_and_may_be_relative(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkout("project") == find_checkout("~/project") == checkout.resolve()


@pytest.mark.parametrize("below", [".", "docs/deep"])
def test_an_installed_package_uses_the_checkout_around_the_current_directory(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path / "site-packages")
    (checkout / below).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(checkout / below)
    assert find_checkout(None) == checkout.resolve()
    assert project_path(Path("out")) == checkout / below / "out", "it has no directory of its own to write to"


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_what_is_no_checkout_is_one_line_that_says_what_to_do(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    (checkout / MARKS[0]).rename(tmp_path / "elsewhere")
    fix = "Name the directory that `git clone` has made" if given else "Change into a checkout, or name it"
    with pytest.raises(UserError, match=fix):
        find_checkout(given)


def test_absolute_paths_and_those_of_home_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert project_path(Path("/data/store")) == Path("/data/store")
    assert project_path(Path("~/store")) == Path("/home/me/store")
