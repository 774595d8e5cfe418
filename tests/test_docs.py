"""Documents are tests: what README and docs tell people to type exists and parses."""

import ast
import doctest
import importlib
import inspect
import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

import flataudit
from flataudit import cli
from flataudit.audit import audit
from flataudit.config import AuditOptions

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")),
             *sorted(ROOT.glob("pipelines/*.md"))]  # fmt: skip
DOCUMENTS = list(dict.fromkeys(DOCUMENTS))
SHELL = {"", "sh", "bash", "shell", "console", "text"}
PLACEHOLDER = re.compile(r"\.\.\.|…|\[[^\]]*\]|\b[A-Z]+_URI\b")
FENCE = re.compile(r"^( *)(```+|~~~+) *([\w-]*)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)

project = yaml.safe_load((ROOT / "MLproject").read_text())
command = typer.main.get_command(cli.app)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    where: str
    language: str
    text: str


def blocks(text, name="README.md"):
    """The fenced blocks of a document; a fence that is never closed is an error."""
    found = [
        Block(
            f"{name}:{text[: match.start()].count(chr(10)) + 1}",
            match[3].lower(),
            "\n".join(line.removeprefix(match[1]) for line in match[4].splitlines()),
        )
        for match in FENCE.finditer(text)
    ]
    assert not re.search(r"^ *(```|~~~)", FENCE.sub("", text), re.MULTILINE), f"{name}: open fence"
    return found


def shell_lines(text):
    """The command lines of a shell block: prompts and comments off, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\s*(\$|%)\s+", "", line)
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line:
            yield line


def commands(line):
    """The words of each command of a line, without environment variables before it."""
    for part in re.split(r"\s*(?:&&|\|\||;|\|)\s*", line):
        lexer = shlex.shlex(part, posix=True, punctuation_chars="<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = list(lexer)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        while words and set(words[-2:-1]) & {">", ">>", "<", "2>"}:
            words = words[:-2]
        if words:
            yield words


def typed():
    """(where, words) of every command that a document tells people to type, in blocks or spans.

    A paragraph that says what comes with a later release is not about what can be typed now.
    """
    for path in DOCUMENTS:
        if not path.is_file():
            continue
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        paragraphs = re.split(r"\n\s*\n", FENCE.sub("", text))
        now = "\n\n".join(part for part in paragraphs if "a later release" not in part)
        lines = [
            (name, span)
            for span in re.findall(r"`([^`]+)`", now)
            if re.match(r"\S*(flataudit|mlflow|make) \w+ ", span)
        ]
        for block in blocks(text, name):
            if block.language in SHELL:
                lines += [(block.where, line) for line in shell_lines(block.text)]
        for where, line in lines:
            try:
                found = list(commands(" ".join(line.split())))
            except ValueError:  # output or prose, not a command
                continue
            yield from ((where, words) for words in found)


def program(words):
    """The program's own name, and its arguments; `python -m NAME` is NAME."""
    name, *rest = words
    name = Path(name).name
    if name.startswith("python") and rest[:1] == ["-m"] and len(rest) > 1:
        name, rest = rest[1], rest[2:]
    return name, rest


def check_flataudit(words):
    """Parses the words as the command line does, without running anything."""
    if "--help" in words:
        words = [word for word in words if word != "--help"]
        assert not words or words[0] in command.commands
        return
    assert words, "no command"
    assert words[0] in command.commands, f"no command {words[0]!r}"
    sub = command.commands[words[0]]
    if hasattr(sub, "commands") and len(words) > 1:  # a group: its command is the next word
        assert words[1] in sub.commands, f"no command {words[0]} {words[1]!r}"
        sub, words = sub.commands[words[1]], words[1:]
    if any(PLACEHOLDER.fullmatch(word) for word in words):  # a form, not a command
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in options(sub), word
        return
    sub.make_context(words[0], list(words[1:]))


def check_mlflow_run(words):
    entry = project["entry_points"][words[words.index("-e") + 1] if "-e" in words else "main"]
    given = [after for word, after in itertools.pairwise(words) if word == "-P"]
    names = {item.partition("=")[0] for item in given}
    known = entry.get("parameters", {})
    assert names <= set(known), names - set(known)
    needed = {name for name, kind in known.items() if isinstance(kind, str)}
    assert needed <= names, needed - names


def check_make(words):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [word for word in words if "=" not in word and not word.startswith("-")]
    assert set(named) <= set(targets), set(named) - set(targets)


CHECKS = {
    "flataudit": check_flataudit,
    "make": check_make,
    "mlflow": lambda words: check_mlflow_run(words) if words[:1] == ["run"] else None,
}


def options(sub):
    """The long options of a command."""
    return {name for param in sub.params for name in param.opts if name.startswith("--")}


# --- README and docs ----------------------------------------------------------------------------


def test_readme_has_its_two_commands_and_one_audit():
    found = [program(words) for where, words in typed() if where.startswith("README.md")]
    for name, first in (("make", "demo"), ("make", "test"), ("flataudit", "audit")):
        assert any(n == name and rest[:1] == [first] for n, rest in found), f"{name} {first}"


def test_every_command_line_parses():
    wrong = []
    for where, words in typed():
        name, rest = program(words)
        if name in CHECKS:
            try:
                CHECKS[name](rest)
            except Exception as error:
                said = getattr(error, "format_message", lambda error=error: str(error))()
                wrong.append(f"{where}: {' '.join(words)}: {said or type(error).__name__}")
    assert wrong == []


def test_the_check_of_command_lines_can_fail():
    good = "flataudit audit models:/a/1 --train a.npz --json - > out.json"
    assert [program(words) for words in commands(f"X=1 .venv/bin/{good} && make demo")] == [
        ("flataudit", good.split()[1:-2]),
        ("make", ["demo"]),
    ]
    check_flataudit(good.split()[1:-2])
    for bad in (
        "audit models:/a/1",
        "audit a --train b --pennalty 1",
        "adit a",
        "audit a b",
        "webhook serv",
        "webhook serve --prt 1",
    ):
        with pytest.raises(Exception):  # noqa: B017, PT011 (typer's own, whose module is private)
            check_flataudit(bad.split())
    with pytest.raises(AssertionError):
        check_make(["nothing"])
    with pytest.raises(AssertionError):
        check_mlflow_run(["run", ".", "-e", "main", "-P", "model_uri=a", "-P", "data=b"])
    with pytest.raises(AssertionError):
        check_mlflow_run(["run", ".", "-P", "model_uri=a"])
    assert list(shell_lines("$ make a \\\n  b # x; y\n# c\n\nmake d")) == ["make a    b", "make d"]
    with pytest.raises(AssertionError, match="open fence"):
        blocks("```sh\nmake\n")


def test_options_named_in_prose_exist():
    """`--option` in code spans: of flataudit where the span or its line is about flataudit."""
    known = set().union(*(options(sub) for sub in command.commands.values()))
    known |= {"--env-manager", "--backend-store-uri", "--port", "--help", "--no-deps"}
    path = ROOT / "README.md"
    text = FENCE.sub("", path.read_text(encoding="utf-8")) if path.is_file() else ""
    named = {word for span in re.findall(r"`([^`\n]+)`", text)
             for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}  # fmt: skip
    assert named <= known, named - known


def python_blocks():
    for path in DOCUMENTS:
        if path.is_file():
            name = str(path.relative_to(ROOT))
            for block in blocks(path.read_text(encoding="utf-8"), name):
                if block.language in ("python", "py", "pycon"):
                    yield block


def source_of(block):
    if ">>>" in block.text:
        examples = doctest.DocTestParser().get_examples(block.text)
        return "".join(example.source for example in examples)
    return block.text


def check_python(source, where="<test>"):
    """Compiles, imports of ours resolve, and calls of the public functions name real arguments."""
    tree = ast.parse(source, where)
    functions = {"audit": audit}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
                found = getattr(module, alias.name)
                found = getattr(found, alias.name, found)  # flataudit.audit, function and module
                functions[alias.asname or alias.name] = found
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in OURS:
                    importlib.import_module(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "flataudit":
            assert hasattr(flataudit, node.attr), f"flataudit.{node.attr}"
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(
            node.func, "id", "")  # fmt: skip
        owner = getattr(getattr(node.func, "value", None), "id", "flataudit")
        function = functions.get(name) if owner == "flataudit" else None
        if function is None or any(isinstance(arg, ast.Starred) for arg in node.args):
            continue
        keywords = {k.arg: None for k in node.keywords if k.arg}
        real = inspect.unwrap(getattr(function, "fn", function))
        bind = inspect.signature(real)
        (bind.bind if all(k.arg for k in node.keywords) else bind.bind_partial)(
            *([None] * len(node.args)), **keywords
        )


OURS = ("flataudit", "flows")


def test_every_python_block_is_python_of_this_version():
    wrong = []
    for block in python_blocks():
        try:
            check_python(source_of(block), block.where)
        except Exception as error:
            wrong.append(f"{block.where}: {type(error).__name__}: {error}")
    assert wrong == []


def test_the_check_of_python_can_fail():
    check_python("import flataudit\nreport = flataudit.audit(m, (x, y), penalty=0.1)")
    check_python("from flows.audit import audit_flow\naudit_flow('models:/a/1', 'a.npz')")
    for bad in (
        "import flataudit\nflataudit.audit(m, (x, y), pennalty=0.1)",
        "import flataudit\nflataudit.audit(m)",
        "import flataudit\nflataudit.adit(m)",
        "from flataudit import adit",
        "from flataudit import audit\naudit(m, (x, y), pennalty=0.1)",
        "from flows.audit import audit_flow\naudit_flow('models:/a/1', 'a.npz', data=1)",
        "flataudit.audit(",
    ):
        with pytest.raises((AssertionError, TypeError, SyntaxError)):
            check_python(bad)


def test_links_to_files_lead_somewhere():
    broken = []
    for path in DOCUMENTS:
        if not path.is_file():
            continue
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)", text):
            if not re.match(r"[a-z]+:|#", target):
                place = path.parent / target.partition("#")[0]
                if not place.exists():
                    broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


# --- the command line, MLproject and the contract -----------------------------------------------

AUDIT = {
    "--train", "--heldout", "--target", "--family", "--penalty", "--dispersion", "--training",
    "--curvature", "--solver", "--device", "--config", "--json", "--no-log", "--deadline",
    "--tracking-uri", "--sensitivity", "--slices", "--memory-limit", "--checkpoint",
}  # fmt: skip


def test_options_are_the_contract_s():
    assert set(command.commands) >= {"audit", "demo"}
    sub = command.commands["audit"]
    assert options(sub) >= AUDIT
    assert [param.name for param in sub.params if param.required] == ["model_uri", "train"]


def test_every_option_is_explained():
    groups = [sub.commands for sub in command.commands.values() if hasattr(sub, "commands")]
    for name, sub in [*command.commands.items(), *(item for g in groups for item in g.items())]:
        assert sub.help, name
        for param in sub.params:
            assert param.help, f"{name} {param.name}"


def test_options_in_files_are_those_of_the_command_line():
    """Two of Python's are of files and flows alone; paths and logging are of the command alone."""
    names = {option.removeprefix("--").replace("-", "_") for option in AUDIT}
    assert set(AuditOptions.model_fields) - names == {"seed", "recalibrate"}
    assert names - set(AuditOptions.model_fields) == {"train", "heldout", "config", "json",
                                                      "no_log"}  # fmt: skip


def test_python_function_is_the_contract_s():
    parameters = inspect.signature(audit).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    contract = {
        "heldout": None, "family": "auto", "penalty": "auto", "dispersion": "auto",
        "training": None, "curvature": "ggn", "solver": "auto", "device": "auto", "seed": 0,
        "progress": None,
    }  # fmt: skip
    assert list(parameters)[:2] == ["model", "train"]
    assert {name: defaults[name] for name in contract} == contract


@pytest.mark.parametrize("name", project["entry_points"])
def test_mlproject_s_commands_parse(name):
    """With every parameter at its default, and at a value."""
    entry = project["entry_points"][name]
    parameters = entry.get("parameters", {})
    values = {key: "x" if isinstance(kind, str) else kind["default"] for key, kind in
              parameters.items()}  # fmt: skip
    for filled in (values, dict.fromkeys(parameters, "1")):
        line = entry["command"].format(**{key: shlex.quote(v) for key, v in filled.items()})
        (words,) = commands(line)
        called, rest = program(words)
        assert called == "flataudit"
        check_flataudit(rest)
    assert re.findall(r"\{(\w+)\}", entry["command"]) == list(parameters)
