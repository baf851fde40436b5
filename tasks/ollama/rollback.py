"""Putting a former version of a model back into use."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

from tasks.engine.artifacts import Store
from tasks.engine.errors import UserError
from tasks.ollama.names import ModelName, parse_name
from tasks.ollama.registry import Registry, registry
from tasks.ollama.tag_history import History, TagRecord, remember_tag
from tasks.settings.export import OllamaSettings


class Version(NamedTuple):
    """A version that Ollama has."""

    name: ModelName
    digest: str
    state: str
    """`in use`, `was in use`, `withdrawn`, or `never in use`."""
    note: str
    """What its judgement said against it, or its validation loss."""


class Versions:
    """The versions of one model.

    Args:
        settings: where it is registered.
        name: its name with the tag that is in use.
        store: where versions are recorded.

    Raises:
        UserError: the settings register nowhere; in all methods, as the place has them.
        TemporaryError: in all methods, as the place has them.
    """

    def __init__(self, settings: OllamaSettings, name: str, store: Store) -> None:
        place = registry(settings)
        if place is None:
            fix = "Use the settings of the run that registered the model."
            raise UserError("nothing is registered by these settings", where="ollama.target", fix=fix)
        self.place: Registry = place
        self.name, self.store = parse_name(name), store

    def history(self) -> History:
        """What is recorded of them."""
        return History(self.store, self.place.where, str(self.name))

    def all(self) -> list[Version]:
        """Those that Ollama has and that are known, newest first."""
        history, there = self.history(), {str(name).lower() for name in self.place.models()}
        in_use, former, withdrawn = self.place.digest(self.name), history.ever_in_use(), history.withdrawn()
        versions = []
        for digest, text in history.names().items():
            name = parse_name(text)
            if str(name).lower() in there:
                state = "was in use" if digest in former else "never in use"
                state = "withdrawn" if digest in withdrawn else state
                state = "in use" if digest == in_use else state
                versions.append(Version(name, digest, state, _note(history.of(digest))))
        return versions

    def roll_back(self, to: str | None = None) -> tuple[ModelName | None, ModelName]:
        """Put a version into use. Those that were in use later are not promoted again by any run.

        Args:
            to: its tag or name; none for the one that was in use before the present one.

        Returns:
            What was in use, if anything was, and the version that is now.

        Raises:
            UserError: there is no such version.
        """
        versions, history, digest = self.all(), self.history(), self.place.digest(self.name)
        former = history.in_use_before(digest)
        target = self._named(to, versions) if to else self._newest(former, versions)
        later = former[: former.index(target.digest)] if target.digest in former else []
        withdrawn = tuple(used for used in (digest, *later) if used and used != target.digest)
        self.place.copy(target.name, self.name)
        record = TagRecord(
            at=datetime.now(UTC), event="rolled back", place=self.place.where, name=str(self.name),
            version=str(target.name), digest=target.digest, in_use=target.digest, before=digest, withdrawn=withdrawn,
        )  # fmt: skip
        remember_tag(self.store, record)
        before = (version.name for version in versions if version.digest == digest)
        return (next(before, self.name) if digest else None), target.name

    def _named(self, to: str, versions: list[Version]) -> Version:
        name = parse_name(to) if ":" in to else replace(self.name, tag=to)
        target = next((version for version in versions if version.name.is_same(name)), None)
        if target is None:
            tags = ", ".join(version.name.tag for version in versions) or "none"
            raise UserError(f"there is no version {name}", where="--to", fix=f"There are: {tags}.")
        return target

    def _newest(self, former: list[str], versions: list[Version]) -> Version:
        there = {version.digest: version for version in versions}
        newest = next((there[digest] for digest in former if digest in there), None)
        if newest is None:
            fix = "Name a version by --to; --plan lists them."
            raise UserError("no version was in use before", where=self.name, fix=fix)
        return newest


def _note(record: TagRecord | None) -> str:
    if record is None:
        return ""
    failed = [check.name for check in record.checks if check.reading == "failed"]
    return f"failed: {', '.join(failed)}" if failed else ""
