"""The words of README.md and docs/ hold: blocks run, links lead somewhere, commands exist.

Every ```` ```python ```` block runs by itself, with warnings as errors, in a folder that holds
``pairs.jsonl`` (preference pairs) and ``model`` (a tiny Llama with its tokenizer). A block that
cannot run here says why in its fence: ```` ```python no-run: needs a CUDA device ````.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "kernels" / "README.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
    if path.is_file()
]
MAX_NOT_RUN = 3
PAIRS = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, mostly."},
    {"prompt": "Two and two make", "chosen": " four.", "rejected": " five."},
    {"prompt": "A cat says", "chosen": " meow.", "rejected": " woof, and then it sits."},
]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```", re.M | re.S
)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)[^)]*\)")


class Block(NamedTuple):
    page: Path
    line: int
    info: str
    body: str

    @property
    def shown(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        words = match["info"].split(maxsplit=1)
        if not words or words[0] != language:
            continue
        indent = match["indent"]
        body = "\n".join(line.removeprefix(indent) for line in match["body"].splitlines())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, words[1] if len(words) > 1 else "", body + "\n"))
    return found


PYTHON = [block for page in PAGES for block in blocks_of(page, "python")]
SHELL = [block for page in PAGES for name in ("bash", "sh") for block in blocks_of(page, name)]


def commands_in(script: str) -> list[list[str]]:
    """The commands of a shell script as words, without comments, prompts and variables."""
    commands = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|()<>"):
                commands.append(words)
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
    return [words for words in commands if words]


def fastdaa_words(words: list[str]) -> list[str] | None:
    """What follows ``fastdaa`` in a command; None where the command runs something else."""
    if words[0].split("/")[-1] == "fastdaa":
        return words[1:]
    return words[words.index("fastdaa.cli") + 1 :] if "fastdaa.cli" in words else None


FASTDAA_COMMANDS = [
    (block, arguments)
    for block in SHELL
    for words in commands_in(block.body)
    if (arguments := fastdaa_words(words)) is not None
]


@cache
def help_of(*command: str) -> str:
    """What the whole help of ``fastdaa COMMAND`` prints: the real parser's word, nothing runs."""
    from fastdaa.cli import main
    from fastdaa.cli.common_options import COMMON

    whole = "--help-all" if command and command[0] in COMMON else "--help"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
        raise SystemExit(main([*command, whole]))
    assert stop.value.code in (0, None), said.getvalue()
    return said.getvalue()


def unknown_words(words: list[str]) -> list[str]:
    """Subcommand and flags of a command line that the parser does not list."""
    command = [word for word in words[:1] if not word.startswith("-")]
    if command and not re.search(rf"\b{re.escape(command[0])}\b", help_of()):
        return command
    # `bench` and `study` have sub-commands of their own, each on a line of their help.
    action = words[1] if command and len(words) > 1 else "-"
    if re.search(rf"^ +{re.escape(action)} ", help_of(*command), re.M) and action.isalpha():
        command = [*command, action]
    flags = {word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)}
    listed = set(re.findall(r"--?[A-Za-z][\w-]*", help_of(*command)))
    return sorted(flags - listed)


def test_readme_exists() -> None:
    assert (ROOT / "README.md") in PAGES
    assert [block for block in PYTHON if block.page.name == "README.md"], "no example in README.md"


def test_few_blocks_are_left_out() -> None:
    left_out = [block for block in PYTHON if block.info.startswith("no-run")]
    for block in left_out:
        assert re.fullmatch(r"no-run: \S.*", block.info), f"{block.shown}: say why it cannot run"
    assert len(left_out) <= MAX_NOT_RUN, [block.shown for block in left_out]


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' examples name: their own pairs and a model that loads at once."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("examples")
    rows = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    (folder / "pairs.jsonl").write_text(rows, encoding="utf-8")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    bpe.train_from_iterator(
        [text for pair in PAIRS for text in pair.values()],
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[1]
    )
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.shown)
def test_python_block(
    block: Block, example_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(example_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "block.py"
    path.write_text(block.body, encoding="utf-8")
    if block.info:
        assert block.info.startswith("no-run"), f"{block.shown}: unknown fence '{block.info}'"
        compile(block.body, block.shown, "exec")
        return
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = {match["target"] for match in LINK.finditer(text)}
    missing = []
    for target in sorted(targets):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / file) if file else page
        wants_anchor = bool(anchor) and path.suffix == ".md"
        if not path.exists() or (wants_anchor and anchor not in anchors_of(path)):
            missing.append(target)
    assert missing == []


def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_text_exist(page: Path) -> None:
    """`fastdaa/...py`, `docs/...md` and their like, in backticks, from the root."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(
        r"`((?:fastdaa|kernels|benchmarks|tests|docs|requirements)/[\w./-]+\.(?:py|md|txt))`", text
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("block", "words"),
    FASTDAA_COMMANDS,
    ids=[f"{block.shown}-{'-'.join(words[:1])}" for block, words in FASTDAA_COMMANDS],
)
def test_command_line_exists(block: Block, words: list[str]) -> None:
    assert unknown_words(words) == [], f"{block.shown}: fastdaa {' '.join(words)}"


def test_make_verbs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set()
    scripts = [block.body for block in SHELL]
    for page in PAGES:
        scripts += re.findall(r"`(make [^`\n]+)`", page.read_text(encoding="utf-8"))
    for words in (words for script in scripts for words in commands_in(script)):
        if words[0] == "make":
            named |= {word for word in words[1:] if "=" not in word}
    assert named <= verbs, f"the Makefile has no {sorted(named - verbs)}"


@pytest.mark.parametrize(
    ("script", "commands"),
    [
        ("$ make test  # all of it", [["make", "test"]]),
        ("A=1 fastdaa train \\\n  --loss dpo", [["fastdaa", "train", "--loss", "dpo"]]),
        ("cd fastdaa && make demo; ls > x", [["cd", "fastdaa"], ["make", "demo"], ["ls"], ["x"]]),
        ("pip install 'fastdaa[peft]'", [["pip", "install", "fastdaa[peft]"]]),
    ],
    ids=["prompt-comment", "variable-continued", "several", "quoted"],
)
def test_commands_are_read_as_a_shell_would(script: str, commands: list[list[str]]) -> None:
    assert commands_in(script) == commands
