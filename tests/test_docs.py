"""The documentation names everything public; its links, commands and code are valid."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

import zo2ext
import zo2ext.ops
from zo2ext.commands import arguments
from zo2ext.commands.main import COMMANDS, main
from zo2ext.commands.options import CommandLine

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
REFERENCE = ROOT / "docs" / "reference"
TRAINERS = {n for n in dir(zo2ext) if n.startswith(("ZOTrain", "ZOSFT"))}  # not for `import *`

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")


def _id(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def _documented(page: str) -> set[str]:
    """Return the last part of each name that `page` documents."""
    return set(re.findall(r"^::: (?:\w+\.)+(\w+)$", (REFERENCE / page).read_text(), re.MULTILINE))


def _shell(page: Path) -> list[str]:
    """Return the lines of a page's indented and fenced shell blocks, continuations joined."""
    text = page.read_text()
    blocks = [body for language, body in _FENCE.findall(text) if language in ("", "sh", "bash")]
    blocks += re.findall(r"^ {4}(?! )(.*)$", _FENCE.sub("", text), re.MULTILINE)
    return [line.strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]


def _commands(page: Path) -> Iterator[str]:
    """Yield what follows ``zo2ext`` in the shell lines of a page."""
    for line in _shell(page):
        found = re.search(r"(?:^|\s|/)zo2ext (.*)$", line)
        if found and not line.startswith(("#", "pip ")):
            yield re.split(r" [|>] | 2> ", found[1])[0].strip()


def _mentions(page: Path) -> Iterator[str]:
    """Yield what follows ``zo2ext`` in inline code that names options."""
    for code in re.findall(r"`zo2ext ([^`]+)`", _prose(page).replace("\n", " ")):
        if " --" in code and "COMMAND" not in code:
            yield code


COMMAND_LINES = sorted({(page, words) for page in PAGES for words in _commands(page)})
MENTIONS = sorted({words for page in PAGES for words in _mentions(page)})
BLOCKS = [
    pytest.param(body, id=f"{_id(page)}-{index}")
    for page in PAGES
    for index, (language, body) in enumerate(_FENCE.findall(page.read_text()))
    if language == "python"
]


def test_every_public_name_is_on_the_reference_pages() -> None:
    public = {*zo2ext.__all__, *TRAINERS} - {"__version__", "direction_key"}
    assert len(TRAINERS) == 5
    assert _documented("zo2ext.md") == public
    assert {"zo2ext.__version__", "zo2ext.direction_key"} <= set(
        re.findall(r"`([\w.]+)`", (REFERENCE / "zo2ext.md").read_text())
    )


def test_every_name_of_ops_is_on_the_reference_page() -> None:
    source = ast.parse(Path(zo2ext.ops.__file__).read_text())
    public = {
        alias.asname
        for node in source.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert "update_perturb" in public
    assert _documented("ops.md") == public


def test_every_command_is_on_the_command_line_page() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text()
    assert set(re.findall(r"^\| `zo2ext (\w+)` \|", page, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_relative_links_point_to_files(page: Path) -> None:
    links = [link for link in _LINK.findall(_prose(page)) if "://" not in link]
    for link in links:
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        if anchor and target.suffix == ".md" and "reference" not in target.parts:
            assert anchor in _anchors(target), f"{link}: no such heading"


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub and MkDocs give the headings of `page`."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    kept = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", heading) for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_pages_install_a_clone_in_one_way(page: Path) -> None:
    """With isolation, pip would build the extension against another torch than the user's."""
    lines = re.findall(r"pip install [^`\n#]*(?<=\s)'?\.[^`\n#]*", page.read_text())
    for line in lines:
        assert re.fullmatch(r"pip install --no-build-isolation -e ('\.\[[\w,]+\]'|\.)\s*", line)


def test_there_are_commands_to_check() -> None:
    assert {words.split()[0] for _, words in COMMAND_LINES} >= {"train", "generate", "export"}
    assert len(MENTIONS) > 5


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES, ids=_id)
def test_command_lines_parse(
    page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *words = shlex.split(line, comments=True)
    assert name in COMMANDS
    monkeypatch.chdir(tmp_path)
    if "--config" in words:  # the file stands for the options that the line leaves out
        file = Path(words[words.index("--config") + 1])
        file.parent.mkdir(parents=True, exist_ok=True)
        written = json.dumps({"model": "m", "text": "t", "out": "o"})
        file.write_text(written if file.suffix == ".json" else _yaml(page))
    command = CommandLine(words, prog=f"zo2ext {name}")
    options = getattr(arguments, COMMANDS[name].choose(command).options)
    command.parse(options)  # exits where a word does not fit


@pytest.mark.parametrize("line", MENTIONS)
def test_mentioned_options_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = line.split()
    named = {word for word in words if word.startswith("--")}
    of_task = ["--task", "sst2"] if "--task" in named or "--keep" in named else []
    main([name, *of_task, "--help"])
    shown = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert named <= shown


def _yaml(page: Path) -> str:
    """Return the options file that `page` shows."""
    return next(body for language, body in _FENCE.findall(page.read_text()) if language == "yaml")


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_compile(code: str) -> None:
    compile(code, "<documentation>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_readme_runs_as_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zo2ext").symlink_to(ROOT / "zo2ext")
    monkeypatch.chdir(tmp_path)
    corpus = next(line for line in _shell(ROOT / "README.md") if "make_demo_corpus" in line)
    _, script, *words = shlex.split(corpus)
    monkeypatch.setattr("sys.argv", [script, *words])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    namespace: dict[str, object] = {}
    for language, body in _FENCE.findall((ROOT / "README.md").read_text()):
        if language == "python":  # a few of the steps that the text shows
            few = re.sub(r"range\(\d+\)", "range(2)", body)
            exec(re.sub(r"max_steps=\d+", "max_steps=2", few), namespace)
    assert 0.7 < float(capsys.readouterr().out.split()[-1]) < 0.9
    assert (tmp_path / "runs" / "python" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "trainer" / "journal.zo2").is_file()
