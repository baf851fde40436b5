"""The table of the variants: whole, free of contradictions, and asked by all of the package."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest

import grit
from grit import GRITConfig
from grit.config import Variant
from grit.variants import VARIANTS, GritVariant, eigenvectors, kfac_roots, turned_back

PACKAGE = Path(str(grit.__file__)).parent


def test_the_setting_names_each_row_and_no_other() -> None:
    assert sorted(get_args(Variant)) == sorted(VARIANTS)


def test_no_variant_is_asked_for_by_its_name_outside_of_the_table() -> None:
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            names = {part.value for side in compared for part in ast.walk(side) if isinstance(part, ast.Constant)}
            assert not names & set(VARIANTS), f"{file.name}, line {node.lineno}: ask the row"


@pytest.mark.parametrize("fields", [{"changes_gradient": False, "new_updates": turned_back}, {"new_updates": None}])
def test_a_basis_that_updates_do_not_leave_again_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must turn the updates back"):
        GritVariant(eigenvectors, is_basis=True, **fields)


def test_a_name_that_is_no_row_is_refused_and_one_that_is_becomes_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"variant": "made_up"}
    with pytest.raises(ValueError, match="GRITConfig.variant: 'made_up' is out of bounds"):
        GRITConfig(**settings)
    monkeypatch.setitem(VARIANTS, "made_up", GritVariant(kfac_roots, changes_gradient=False))
    assert GRITConfig(**settings).first_basis == "initial", "it only measures"
    with pytest.raises(ValueError, match="reprojection_freq: the variant made_up only measures"):
        GRITConfig(**settings, reprojection_freq=5)
