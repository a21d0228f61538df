"""``fastdaa online --pipeline``: fine-tuning, reward model and on-policy training in one command.

A stage that has ended leaves ``stage.json`` with its options; the next run skips it if they are
still the same. A stage that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdaa.cli.arguments import holds_unpaired
from fastdaa.cli.option_names import named_as
from fastdaa.cli.runs import INTERRUPTED, continuation, log_lines

if TYPE_CHECKING:
    from fastdaa.cli.online_arguments import OnlineArguments
    from fastdaa.online.config import OnlineConfig

logger = logging.getLogger(__name__)
DONE_FILE = "stage.json"
# Options that name data and how models are loaded, which all stages share.
_SHARED = (
    "dataset_config", "dataset_split", "eval_dataset", "eval_split", "test_size",
    "max_train_samples", "dtype", "attn_implementation", "chat_template", "dataset_weights",
    "prompt_column", "chosen_column", "rejected_column", "completion_column", "messages_column",
    "text_column", "label_column",
)  # fmt: skip
_SHARED_SWITCHES = ("trust_remote_code", "use_cpu", "on_bad_row", "seed")
_OF_PIPELINE = ("model", "dataset", "output_dir", "resume_from_checkpoint")


def run_pipeline(
    arguments: OnlineArguments,
    config: OnlineConfig,
    argv: Sequence[str],
    *,
    main_process: bool = True,
) -> int:
    """Runs the stages that are not done yet; 130 where a signal stopped one of them.

    Several processes run each stage together; the main one speaks and writes.
    """
    from fastdaa.cli import online

    root = Path(str(config.output_dir))
    online.check_paths(replace(arguments, resume_from_checkpoint=None), config)
    stages: list[tuple[str, str, dict[str, Any]]] = [
        ("sft", arguments.model, {**_revision(arguments), **_options(arguments.sft_options)})
    ]
    _check_last_stages(arguments)
    policy = str(root / "sft")
    if arguments.reward is None:
        stages.append(("reward", policy, _options(arguments.reward_options)))
    # Mistakes in the options of a later stage are found before the first.
    commands = [
        (command, _stage_argv(arguments, config, model, root / command, options), {*options})
        for command, model, options in stages
    ]
    for command, words, own in commands:
        with _stage_named(command, own):
            _stage(command).parse(words)
    for command, words, own in commands:
        folder = root / command
        if not _is_done(folder, words, main_process):
            with _stage_named(command, own):
                code = _run_stage(command, words, folder, main_process)
            if code:
                if code == INTERRUPTED and main_process:
                    print(f"To continue the pipeline:\n  {continuation('online', argv, None)}")
                return code
            _mark_done(folder, words, main_process)
    last = replace(
        arguments,
        model=policy,
        model_revision=None,
        reward=arguments.reward or str(root / "reward"),
        pipeline=False,
        resume_from_checkpoint="true" if _was_begun(root / "online") else None,
    )
    return _run_online(last, config, root / "online", argv, main_process)


def _check_last_stages(arguments: OnlineArguments) -> None:
    """Find before the first stage what would stop a later one.

    Raises:
        ValueError: there are no pairs to train a reward on, or a reward function is missing.
    """
    from fastdaa.online.reward_functions import load_function

    if arguments.reward is None and holds_unpaired(arguments):
        raise ValueError(
            "dataset: expected preference pairs, on which --pipeline trains a reward model, got "
            "none; --reward names another reward"
        )
    for name in ("reward", "gold_reward"):
        given = getattr(arguments, name)
        if given is not None and ":" in given:
            with named_as(reward=name):
                load_function(given)


def _run_online(
    arguments: OnlineArguments,
    config: OnlineConfig,
    folder: Path,
    argv: Sequence[str],
    main_process: bool,
) -> int:
    from fastdaa.cli import online

    settings = replace(config, output_dir=str(folder))
    fixed = {key: value for key, value in settings.to_dict().items() if key != "output_dir"}
    words = [arguments.model, str(arguments.reward), json.dumps(fixed, sort_keys=True)]
    if arguments.use_peft:
        words.append(f"use_peft {arguments.lora_r} {arguments.lora_alpha}")
    if arguments.quantizes is not None:
        kind, nested = arguments.bnb_4bit_quant_type, arguments.use_bnb_nested_quant
        words.append(f"{arguments.quantizes} {kind} {nested}")
    for name in ("gold_reward", "ref_model", "ref_model_revision"):
        if getattr(arguments, name) is not None:
            words.append(f"{name} {getattr(arguments, name)}")
    if _is_done(folder, words, main_process):
        return 0
    # Its continuation is the pipeline's own command.
    with log_lines(main_process=main_process):
        logger.info("stage online: %s", settings.algorithm)
        code = online.train_online(arguments, settings, argv, main_process=main_process)
    if code == 0:
        _mark_done(folder, words, main_process)
    return code


def _revision(arguments: OnlineArguments) -> dict[str, Any]:
    revision = arguments.model_revision
    return {} if revision is None else {"model_revision": revision}


def _options(given: Any) -> dict[str, Any]:
    assert isinstance(given, dict)
    return given


def _stage_argv(
    arguments: OnlineArguments,
    config: OnlineConfig,
    model: str,
    folder: Path,
    options: dict[str, Any],
) -> list[str]:
    """The command line of a stage: what all stages share, and its own options over that."""
    values: dict[str, Any] = {"seed": config.seed, "report_to": "none"}
    values |= {name: getattr(arguments, name) for name in _SHARED}
    for name in ("trust_remote_code", "use_cpu"):
        values[name] = getattr(arguments, name) or None
    values |= {"on_bad_row": arguments.on_bad_row, **options}
    for name in ("model", "dataset", "output_dir"):
        if name in options:
            raise ValueError(
                f"{folder.name}_options: expected no {name!r}: the pipeline sets models, data and "
                "folders"
            )
    words = ["--model", model, "--dataset", *arguments.dataset, "--output_dir", str(folder)]
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def _stage(command: str) -> Any:
    return importlib.import_module(f"fastdaa.cli.{command}")


def _run_stage(command: str, words: list[str], folder: Path, main_process: bool) -> int:
    resume = ["--resume_from_checkpoint"] if _was_begun(folder) else []
    with log_lines(main_process=main_process):
        logger.info("stage %s", command)
    return int(_stage(command).run([*words, *resume]))


@contextlib.contextmanager
def _stage_named(command: str, own: Set[str]) -> Iterator[None]:
    """Errors of a stage begin with it, and tell its options from those of the pipeline.

    Args:
        own: names among ``_SHARED`` that the stage has values of its own for.
    """
    shared = {*_OF_PIPELINE, *_SHARED, *_SHARED_SWITCHES} - own

    def named(option: re.Match[str]) -> str:
        return option[0] if option[2] in shared else f'"{option[2]}"'

    try:
        yield
    except ModuleNotFoundError:
        raise  # its name tells what to install
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        text = re.sub(r"(['\"]?)--(\w+)\1", named, str(error))
        first = text.partition(":")[0]
        where = "" if first in shared else f" (--{command}_options)"
        raise ValueError(f"stage {command}{where}: {text}") from error


def _was_begun(folder: Path) -> bool:
    from fastdaa.train.checkpoints import complete

    return bool(complete(folder))


def _is_done(folder: Path, words: list[str], main_process: bool) -> bool:
    """Whether the stage has ended before, with the same options.

    Raises:
        ValueError: it has, with others.
    """
    try:
        done = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError):
        return False
    if done != words:
        raise ValueError(
            f"{folder}: expected a stage of the same options, this one was done with others "
            f"({'; '.join(_changes(done, words)[:3])}); delete it or choose another "
            "output_dir"
        )
    with log_lines(main_process=main_process):
        logger.info("stage %s is done: %s", folder.name, folder)
    return True


def _changes(done: list[str], words: list[str]) -> list[str]:
    """The options that differ, each with its values then and now."""
    before, now = _named(done), _named(words)
    return [
        f"{name} {before.get(name, 'not given')} -> {now.get(name, 'not given')}".strip()
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _named(words: list[str]) -> dict[str, str]:
    """Values by option; those of no option are one value, but for an object of settings."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
        elif not name and word.startswith("{"):
            found |= {key: str(value) for key, value in json.loads(word).items()}
        else:
            found[name] = f"{found[name]} {word}" if name in found else word
    return found


def _mark_done(folder: Path, words: list[str], main_process: bool) -> None:
    from fastdaa.online.ranks import part

    if not main_process:
        part()
        return
    temporary = folder / f"{DONE_FILE}.tmp"
    temporary.write_text(json.dumps({"options": words}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / DONE_FILE)
    part()
