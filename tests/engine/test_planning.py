"""What stands for results that are still to come: it has what they will have, and no more."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.planning import Pending, is_pending, planning
from tasks.engine.stage import stage
from tests.support.chained_stages import second


class Pair(BaseModel):
    left: Artifact
    right: Artifact | None = None

    @property
    def newest(self) -> Artifact:
        return self.left

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {"left": self.left.size}


class Lone(BaseModel):
    left: int = 0
    right: Artifact | None = None


class PairOfTuple(NamedTuple):
    left: Artifact
    right: Any


@dataclass(frozen=True)
class PairOfDataclass:
    left: Artifact
    right: Any


@stage()
def make_pair(number: int, *, store: Store) -> Pair:
    """Never called."""
    raise AssertionError(number)


@stage()
def use(bundle: Any, number: int = 0, *, store: Store) -> Artifact:
    """Never called."""
    raise AssertionError(bundle)


@pytest.fixture
def pair(store: Store) -> Any:
    with planning():
        return make_pair(1, store=store)


def test_what_the_annotated_type_has_can_be_read(pair: Any) -> None:
    artifacts = [pair.left, pair.right, pair.newest, Pending(PairOfTuple).left, Pending(PairOfDataclass).left]
    for artifact in artifacts:
        assert is_pending(artifact.digest) and is_pending(artifact.files) and is_pending(artifact.is_whole())
        with pytest.raises(AttributeError, match="Artifact has no gufg; it has kind, path, files, size, facts, digest"):
            artifact.gufg  # noqa: B018, reading it is the error
    assert is_pending(pair.sizes["left"])


@pytest.mark.parametrize("name", ["lft", "facts", "_left", "__len__"])
def test_what_it_lacks_is_refused(pair: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(pair, name)


def test_the_refusal_names_the_stage_the_type_and_what_that_has(pair: Any) -> None:
    with pytest.raises(AttributeError, match=r"the result of make_pair: Pair has no lft; it has left, right, newest"):
        pair.lft  # noqa: B018, reading it is the error
    with pytest.raises(AttributeError, match=r"the result of make_pair: str has no uper; it has "):
        pair.left.kind.uper  # noqa: B018, reading it is the error
    with pytest.raises(TypeError, match=r"the result of make_pair: Pair holds no 'left'"):
        pair["left"]
    with pytest.raises(TypeError, match=r"the result of make_pair: Pair cannot be called"):
        pair()


def test_facts_hold_anything(pair: Any) -> None:
    facts = pair.left.facts
    values = facts.get("license"), facts["rows"]["train"], facts["checks"][0].name, facts["name"].upper()
    assert all(map(is_pending, values))
    with pytest.raises(AttributeError, match=r"dict has no gett"):
        facts.gett("license")


def test_a_pending_result_cannot_be_gone_through_which_would_never_end(pair: Any) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        list(pair.left.facts["rows"])
    with pytest.raises(TypeError, match="not iterable"):
        "rows" in pair.left.facts  # noqa: B015, reading it is the error


def test_a_pending_result_can_be_copied(pair: Any) -> None:
    assert is_pending(copy.deepcopy({"pair": pair})["pair"].left)


@pytest.mark.parametrize("pending_part", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda part: part, id="alone"),
        pytest.param(lambda part: (1, part), id="tuple"),
        pytest.param(lambda part: [(part,)], id="list of tuples"),
        pytest.param(lambda part: {"a": {"b": part}}, id="dictionaries"),
        pytest.param(lambda part: PairOfTuple(part, 1), id="named tuple"),
        pytest.param(lambda part: PairOfDataclass(part, 1), id="dataclass"),
        pytest.param(lambda part: Pair.model_construct(left=part), id="model"),
        pytest.param(lambda part: Lone.model_construct(right=part), id="optional field"),
        pytest.param(lambda part: (PairOfTuple(1, Pair.model_construct(left=part)),), id="all in each other"),
    ],
)
def test_a_stage_waits_for_what_is_pending_in_a_bundle(store: Store, wrap: Any, pending_part: bool) -> None:
    with store.draft("thing") as draft:
        (draft.path / "a.txt").write_text("a")
    with planning() as plan:
        part = make_pair(1, store=store).left if pending_part else draft.done()
        bundle = wrap(part)
        assert is_pending(bundle) is pending_part
        if pending_part:
            results = [use(bundle, store=store), use(bundle=bundle, store=store), second(number=bundle, store=store)]
            assert all(map(is_pending, results))
            assert [state for _, state in plan.stages] == ["to run"] * 4
            assert len(plan.keys) == 1, "of the first stage alone"
