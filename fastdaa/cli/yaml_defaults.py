"""A YAML file below the command line: its values become the defaults of the options."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastdaa.cli.other_names import SIMILAR, is_idle, own_name, what_instead
from fastdaa.counted import counted
from fastdaa.validation import shown

if TYPE_CHECKING:
    from fastdaa.cli.options import OptionParser

_FEW = 12
"""So many choices fit into the line of an error."""


def apply_yaml(parser: OptionParser, path: Path) -> None:
    """Makes the values of a YAML file the defaults of ``parser``.

    Raises:
        ValueError: the file is no mapping, a key is unknown or there twice, or a value does not
            fit its option.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        got = f"{path} is a folder" if path.is_dir() else f"there is no {path}"
        raise FileNotFoundError(f"config: expected a YAML file, {got}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML in UTF-8, got {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise ValueError(f"{path}: expected 'option: value' lines, got {got}")
    options = parser._option_string_actions
    if content.get("warmup_ratio") and content.get("warmup_steps") == 0:
        del content["warmup_steps"]  # files that name both mean the ratio, as for transformers
    content = {
        key: value
        for key, value in content.items()
        if f"--{key}" in options or not is_idle(str(key), value, str(content))
    }
    known = {
        key: options.get(f"--{own_name(str(key), value, options)}")
        for key, value in content.items()
    }
    unknown = [
        f"{key!r}{nearest_option(parser, str(key), value=content[key])}"
        for key, action in known.items()
        if action is None or action.dest in ("config", "help", "help_all")
    ]
    if unknown:
        raise ValueError(f"{path}: unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}")
    seen: dict[str, str] = {}
    for key, action in known.items():
        assert action is not None
        value = content[key]
        # `loss` and `loss_type` are one option, and so are `max_steps` and `max-steps`.
        if action.dest in seen:
            raise ValueError(
                f"{path}: expected an option once, got {seen[action.dest]!r} and {key!r}"
            )
        seen[action.dest] = key
        try:
            action.default = _from_yaml(action, value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{path}: {key}: got {shown(value)}: {error}") from error
        action.required = False


def nearest_option(parser: OptionParser, given: str, prefix: str = "", value: Any = None) -> str:
    """`` (did you mean ...?)`` with the option most like ``given``, or nothing.

    Args:
        parser: of the command.
        given: a name that is none of its options, without dashes before it.
        prefix: what stands before names of options where ``given`` is from.
        value: what a file has under that name.
    """
    wanted = given.replace("-", "_")
    for action in parser._actions:
        # What was a switch once and is a choice now.
        if wanted in (action.choices or ()):
            return f" (did you mean {f'{prefix}{action.dest} {wanted}'!r}?)"
    instead = what_instead(wanted, value)
    named = re.findall(r"--\w+", instead or "")
    if instead is not None and all(name in parser._option_string_actions for name in named):
        ours = instead.startswith(("--", "dataset: "))
        instead = f"instead: {instead}" if ours else instead
        return f" ({instead.replace('--', prefix)})"
    switch = wanted.removeprefix("no_")
    if switch != wanted and f"--{switch}" in parser._option_string_actions:
        off = f"{prefix}{switch} false" if prefix else f"{switch}: false"
        return f" (did you mean {off!r}?)"
    # What other programs call an option: --base_model, or --epochs for a common one.
    common = [name for names in parser.common.values() for name in names]
    ends = [name for name in common if name.endswith(f"_{wanted}")]
    for name in (SIMILAR.get(wanted), *ends):
        if f"--{name}" in parser._option_string_actions:
            return f" (did you mean {f'{prefix}{name}'!r}?)"
    names = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
    spelled = [name for name in names if "-" not in name]
    near = difflib.get_close_matches(wanted, spelled, n=1)
    return f" (did you mean {prefix + near[0]!r}?)" if near else ""


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``no`` is a word (``eval_strategy: no``), ``1e-6`` is a number.

    And its mappings, in which a key is there only once; PyYAML would take the last of several.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        # Before keys are merged in (`<<`), which those beside it may override.
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                line = key.start_mark.line + 1
                raise ValueError(f"expected a key once, got {key.value!r} again in line {line}")
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    _BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_YamlLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF))$"),
    list("-+.0123456789"),
)


def _from_yaml(action: argparse.Action, value: Any) -> Any:
    """A value of the file as its option would have read it."""
    if isinstance(value, dict):
        return value
    if value == "" and action.nargs == "+":
        # As settings of transformers are written where there is nothing: `debug: ''`.
        return action.default
    if value is None:
        return _convert(action, "none") if action.default is not None else None
    if isinstance(value, list):
        # `optim_target_modules` takes a list although its option takes one word.
        return [_convert(action, item) for item in value]
    converted = _convert(action, value)
    return [converted] if action.nargs == "+" else converted


def _convert(action: argparse.Action, value: Any) -> Any:
    convert: Any = action.type or str
    converted = convert(str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"expected {one_of(action.choices, converted)}")
    return converted


def one_of(choices: Iterable[Any], given: object) -> str:
    """``one of ...`` with all choices, or of many with those most like the given one."""
    names = [str(choice) for choice in choices]
    if len(names) <= _FEW:
        return f"one of {', '.join(names)}"
    near = [name for name in names if name.startswith(str(given))]
    near += difflib.get_close_matches(str(given), names, n=4, cutoff=0.0)
    return (
        f"one of {counted(len(names), 'name')} such as {', '.join(list(dict.fromkeys(near))[:4])}"
    )
