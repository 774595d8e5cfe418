"""What the registry shows of audits: a version's tags and the marked block in its description, and
the marked table of the latest audits in the registered model's description.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from flataudit.errors import InputError, first_of, printable
from flataudit.keys import POLICY

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from flataudit.models.registry import ModelSource

BEGIN, END = "<!-- flataudit:begin -->", "<!-- flataudit:end -->"
DESCRIPTION_LIMIT = 5000  # characters, of MLflow's column

TITLE = "**flataudit: latest audit of each version**"
_HEAD = (
    "| Version | Verdict | Gap, nats per example | Rely on it | Audited (UTC) | Run |\n"
    "|---|---|---|---|---|---|"
)
_PLAIN = re.compile(r"[\w .,+:\[\]\N{EN DASH}-]*")  # says what it says in a markdown table
_RUN_LINK = re.compile(r"\(<(#/experiments/[^>\s]+)>\)")
PAGE = 1000  # versions per request
_ROUNDS = 20  # of writing the table, where other audits end at the same time

log = logging.getLogger(__name__)

# A block's first line, where it has a title, stands before the first marker: the UI's lists show
# the beginning of a description as it is.
_TITLE = rf"\**flataudit: (?:pass|warn|fail|error|{TITLE.strip('*').partition(': ')[2]})\b"
_BLOCK = re.compile(rf"(?:{_TITLE}(?:\.?\**\s*|[^\n]*?))?{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)


def merge_description(old: str | None, block: str) -> str:
    """A description with flataudit's own block replaced, or added at its end.

    Whatever stands outside the markers stays, but for the first line of the block; a marker
    without its partner is dropped.

    >>> text = merge_description("Churn model.", "pass")
    >>> merge_description(text + " Ask Ann.", "warn").splitlines()[-2:]
    ['warn', '<!-- flataudit:end --> Ask Ann.']
    """
    block = _unmarked(block)
    ours = f"{BEGIN}\n{block}\n{END}"
    if re.match(_TITLE, block):
        line, _, more = block.partition("\n")
        ours = f"{line}{BEGIN}\n{more}\n{END}"
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

    A version's policy tag (`keys.POLICY`) is taken off before all and written after all: without
    it a verdict was not written whole, as where the process was killed. That it cannot be written
    is logged alone: the verdict is there, and the next sweep adds the mark.

    model_id: of the logged model in this store, for a model without a registered version.
    """
    if source.kind == "registry":
        _set_on_version(client, str(source.name), str(source.version), tags, block, clear)
    elif model_id is not None:
        before = client.get_logged_model(model_id).tags
        stale = {key: before[key] for key in clear if key in before and key not in tags}
        try:
            for key in stale:
                _delete_model_tag(client, model_id, key)
            client.set_logged_model_tags(model_id, dict(tags))  # all in one call
        except BaseException:
            with suppress(Exception):
                client.set_logged_model_tags(model_id, stale)
            raise


def _delete_model_tag(client: MlflowClient, model_id: str, key: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_logged_model_tag(model_id, key)
    except MlflowException as error:  # gone already, in a try whose answer was lost
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
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
    others = {key: value for key, value in tags.items() if key != POLICY}
    stale = [key for key in clear if key in before.tags and key not in others and key != POLICY]
    try:
        if POLICY in before.tags:
            client.delete_model_version_tag(name, version, POLICY)
        for text in (block, block.partition("\n")[0]):  # a long description leaves less room
            description = merge_description(before.description, text)
            if len(description) <= DESCRIPTION_LIMIT:
                client.update_model_version(name, version, description)
                break
        for key in stale:
            client.delete_model_version_tag(name, version, key)
        for key, value in others.items():
            client.set_model_version_tag(name, version, key, value)
    except BaseException:
        _take_back(client, before, [*stale, *reversed(list(others))])
        raise
    if POLICY in tags:
        try:
            client.set_model_version_tag(name, version, POLICY, tags[POLICY])
        except Exception as error:
            log.warning(
                "the verdict of %s version %s is written, but not that it is whole: %s; audit it"
                " again", name, version, _one_line(error),
            )  # fmt: skip


def _take_back(client: MlflowClient, before: ModelVersion, changed: Iterable[str]) -> None:
    """Description and tags as they were, as far as the store allows; the policy last, and only
    where nothing else is missing."""
    name, version = before.name, str(before.version)

    def put(key: str) -> None:
        if key in before.tags:
            client.set_model_version_tag(name, version, key, before.tags[key])
        else:
            client.delete_model_version_tag(name, version, key)

    whole = True
    with suppress(Exception):
        client.update_model_version(name, version, before.description or "")
    for key in changed:
        try:
            put(key)
        except Exception:
            whole = False
    if whole and POLICY in before.tags:
        with suppress(Exception):
            put(POLICY)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def search_versions(client: MlflowClient, query: str) -> Iterator[ModelVersion]:
    """All versions that match MLflow's filter, page by page."""
    token: str | None = None
    while True:
        page = client.search_model_versions(query, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def quoted(text: str) -> str:
    """A name as a value in MLflow's filters; InputError where they cannot write it."""
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text:
        return f'"{text}"'
    raise InputError(
        f"expected a model's name with one kind of quotes, got {text!r}; MLflow's search cannot"
        " write both: rename the model"
    )


# --- the registered model's table ---------------------------------------------------------------


def update_model_table(client: MlflowClient, source: ModelSource) -> None:
    """Brings the table in the registered model's description up to date; never raises.

    The table follows from the versions' tags alone, so of two audits that end at once the later
    writer has both; it is read again after it was written, and written again where another audit
    or a person came between. A failure is logged: the verdict stands without the table.
    """
    if source.kind != "registry":
        return
    name = str(source.name)
    try:
        for _ in range(_ROUNDS):
            versions = search_versions(client, f"name = {quoted(name)}")
            before = client.get_registered_model(name).description or ""
            wanted = merge_table(before, versions)
            if wanted == before:
                return
            client.update_registered_model(name, wanted)
    except Exception as error:
        log.warning(
            "the audit is logged, but the table in the description of %s could not be updated: %s",
            name,
            _one_line(error),
        )


def merge_table(old: str, versions: Iterable[ModelVersion]) -> str:
    """A registered model's description with the table of its versions' latest audits.

    As many rows as fit beside what people wrote, the newest versions first; without room for one
    row there is no table.
    """
    ordered = sorted(versions, key=lambda version: -int(version.version))
    rows = [_table_row(version) for version in ordered if _audited(version)]
    if not rows:
        return _without_block(old)
    missing = [str(version.version) for version in ordered if not _audited(version)]
    rest = f"\n\nNot audited: {first_of(missing, 10)}." if missing else ""
    for shown in range(len(rows), 0, -1):
        lines = [TITLE, "", _HEAD, *rows[:shown]]
        if shown < len(rows):
            lines += ["", f"{len(rows) - shown} older audited version(s) are not shown."]
        text = merge_description(old, "\n".join(lines) + rest)
        if len(text) <= DESCRIPTION_LIMIT:
            return text
    return _without_block(old)


def markdown_cell(text: str, limit: int = 60) -> str:
    """Text as it is in one cell of a markdown table: one line, special characters escaped.

    >>> markdown_cell("0.052 [0.041, 0.064]"), markdown_cell("a|b <i>")
    ('0.052 [0.041, 0.064]', 'a\\\\|b &lt;i&gt;')
    """
    line = _unmarked(" ".join(text.split()))[:limit].strip()
    if _PLAIN.fullmatch(line) and "](" not in line and "][" not in line:
        return line
    return markdown_text(line)


def _table_row(version: ModelVersion) -> str:
    tags = version.tags
    verdict, gap, confidence, when = (
        markdown_cell(tags.get(f"flataudit.{key}") or "\N{EN DASH}")
        for key in ("verdict", "gap", "confidence", "audited_at")
    )
    day = when[:16].replace("T", " ")
    link = _RUN_LINK.search(version.description or "")
    run = tags.get("flataudit.run_id") or ""
    shown = f"[run](<{link[1]}>)" if link and link[1].endswith(f"/{run}") else markdown_cell(run)
    return f"| {version.version} | **{verdict}** | {gap} | {confidence} | {day} | {shown} |"


def _audited(version: ModelVersion) -> bool:
    return bool(version.tags.get("flataudit.verdict"))


def _without_block(text: str) -> str:
    return _unmarked(_BLOCK.sub("", text)).rstrip() if BEGIN in text or END in text else text


def _unmarked(text: str) -> str:
    return text.replace(BEGIN, "").replace(END, "")
