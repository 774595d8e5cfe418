"""The verdict on a model: its tags, and the marked block in a version's description."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from flataudit.errors import printable

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flataudit.models.registry import ModelSource

BEGIN, END = "<!-- flataudit:begin -->", "<!-- flataudit:end -->"
DESCRIPTION_LIMIT = 5000  # characters, of MLflow's column

_BLOCK = re.compile(f"{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)


def merge_description(old: str | None, block: str) -> str:
    """A description with flataudit's own block replaced, or added at its end.

    Whatever stands outside the markers stays; a marker without its partner is dropped.

    >>> text = merge_description("Churn model.", "pass")
    >>> merge_description(text + " Ask Ann.", "warn").splitlines()[-2:]
    ['warn', '<!-- flataudit:end --> Ask Ann.']
    """
    ours = f"{BEGIN}\n{_unmarked(block)}\n{END}"
    first, *rest = _BLOCK.split(old or "") or [""]
    others = [_unmarked(part) for part in rest]
    if others:
        return _unmarked(first) + ours + "".join(others)
    text = _unmarked(first).rstrip()
    return f"{text}\n\n{ours}" if text else ours


def markdown_text(text: str) -> str:
    """One line of text that Markdown and the HTML in it leave as it is.

    >>> markdown_text("got [a](b) <script>")
    'got \\\\[a\\\\]\\\\(b\\\\) &lt;script&gt;'
    """
    line = printable(" ".join(text.split()))
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", line)
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        escaped = escaped.replace(character, name)
    # Bare addresses become links by themselves.
    return re.sub(r"(?i)\b(https?|ftp|www)([:.])", r"\1&#8203;\2", escaped)


def set_verdict(
    client: MlflowClient,
    source: ModelSource,
    model_id: str | None,
    tags: Mapping[str, str],
    block: str,
    *,
    clear: Collection[str] = (),
) -> None:
    """Sets the tags in their order, the verdict last; takes off those of `clear` not among them.

    A version also gets the block. Where a call fails, what was written is taken back as far as
    the store allows, and the error goes on.

    model_id: of the logged model in this store, for a model without a registered version.
    """
    if source.kind == "registry":
        _set_on_version(client, str(source.name), str(source.version), tags, block, clear)
    elif model_id is not None:
        before = client.get_logged_model(model_id).tags
        stale = {key: before[key] for key in clear if key in before and key not in tags}
        try:
            for key in stale:
                client.delete_logged_model_tag(model_id, key)
            client.set_logged_model_tags(model_id, dict(tags))  # all in one call
        except BaseException:
            with suppress(Exception):
                client.set_logged_model_tags(model_id, stale)
            raise


def _set_on_version(
    client: MlflowClient,
    name: str,
    version: str,
    tags: Mapping[str, str],
    block: str,
    clear: Collection[str],
) -> None:
    before = client.get_model_version(name, version)
    stale = [key for key in clear if key in before.tags and key not in tags]
    try:
        for text in (block, block.partition("\n")[0]):  # a long description leaves less room
            description = merge_description(before.description, text)
            if len(description) <= DESCRIPTION_LIMIT:
                client.update_model_version(name, version, description)
                break
        for key in stale:
            client.delete_model_version_tag(name, version, key)
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
    except BaseException:
        with suppress(Exception):
            client.update_model_version(name, version, before.description or "")
        for key in (*stale, *reversed(list(tags))):
            with suppress(Exception):
                if key in before.tags:
                    client.set_model_version_tag(name, version, key, before.tags[key])
                else:
                    client.delete_model_version_tag(name, version, key)
        raise


def _unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")
