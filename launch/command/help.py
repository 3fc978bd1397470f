"""``ditscale JOB --help``: print what a job does, its choices, and each setting with its default and meaning.

The descriptions are the comments in ``conf/`` and at the fields of `launch.command.settings`, and the first sentences
of docstrings, so that nothing is written twice.
"""

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf

from launch.command.app import CONF, default_config
from launch.command.settings import SETTINGS
from launch.jobs import JOBS

_PACKAGE = re.compile(r"^# @package (\S+)", re.MULTILINE)
_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w/.-]+):(?P<rest>.*)")
_SENTENCE_END = re.compile(r"(?<=\.)(?<!al\.)\s|\n\n")
_COMMENT = re.compile(r"(?:^|\s)# (?P<text>.*)$")


def help_of(job: str) -> str:
    """Return the whole help of a job."""
    config = default_config(job)
    choices = {str(group): str(choice) for group, choice in config.hydra.runtime.choices.items()}
    groups = {group: choice for group, choice in sorted(choices.items()) if not group.startswith("hydra/")}
    plain: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    comments = comments_of(job, groups)
    lines = [f"ditscale {job}: {JOBS[job].summary}", "", f"usage: ditscale {job} [NAME=VALUE ...]", ""]
    lines += ["Choices (NAME=OPTION; * is the default):", *_choices(groups), "", "Settings (NAME=VALUE):"]
    lines += [
        _row(name, value, comments.get(name, "")) for name, value in _leaves(plain) if not name.startswith("hydra.")
    ]
    return "\n".join(lines)


def _choices(groups: Mapping[str, str]) -> Iterator[str]:
    for group, chosen in groups.items():
        yield f"  {group}"
        for name, description in options_of(group).items():
            yield _wrapped(f"  {'*' if name == chosen else ' '} {name}", description)


def options_of(group: str) -> dict[str, str]:
    """Return the options of a group, each with the first sentence of its file or of the class that it builds."""
    folder = CONF / group
    pattern = "**/*.yaml" if group == "experiment" else "*.yaml"  # whole studies lie in subfolders
    paths = [path for path in sorted(folder.glob(pattern)) if path.stem != "recipe"]
    return {str(path.relative_to(folder).with_suffix("")): _description(path) for path in paths}


def _description(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    heading = [
        line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ") and "@package" not in line
    ]
    if heading:
        return _SENTENCE_END.split(heading[0])[0].rstrip(".")
    target = (yaml.safe_load(text) or {}).get("_target_", "")
    return _first_sentence(target)


def _first_sentence(target: str) -> str:
    """Return the first sentence of the docstring of a class or function of ours, without importing it."""
    module, _, name = target.rpartition(".")
    file = CONF.parent / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        return target
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            text = _SENTENCE_END.split(ast.get_docstring(node) or "")[0]
            return text.replace("\n", " ").replace("`", "").rstrip(".")
    return target


def comments_of(job: str, groups: Mapping[str, str]) -> dict[str, str]:
    """Return the comment of each setting by its dotted name: from the schema, then from the chosen config files."""
    found = dict(_of_schema(SETTINGS[job], ""))
    for group, choice in groups.items():
        for path in _with_bases(CONF / group / f"{choice}.yaml"):
            found |= _of_yaml(path, group.replace("/", "."))
    return found | _of_yaml(CONF / f"{job}.yaml", "")


def bases_of(content: Mapping[str, Any]) -> list[str]:
    """Return the names of the config files that the defaults of a config file name, without choices of groups."""
    return [name for name in content.get("defaults", []) if isinstance(name, str) and name != "_self_"]


def _with_bases(path: Path) -> list[Path]:
    """Return a config file, preceded by the files of its folder that its defaults name."""
    if not path.is_file():
        return []
    names = bases_of(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    return [*(base for name in names for base in _with_bases(path.parent / f"{name}.yaml")), path]


def _of_schema(kind: type, prefix: str) -> Iterator[tuple[str, str]]:
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base)).splitlines()
        hints = get_type_hints(base)
        for node in ast.walk(ast.parse("\n".join(source))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno:
                comment = _COMMENT.search(source[node.end_lineno - 1].replace("# type: ignore[assignment]  ", ""))
                if comment is not None:
                    yield f"{prefix}{node.target.id}", comment["text"]
        for field in fields(base):
            if is_dataclass(hints[field.name]):
                yield from _of_schema(hints[field.name], f"{prefix}{field.name}.")


def _of_yaml(path: Path, place: str) -> dict[str, str]:
    text = path.read_text(encoding="utf-8")
    if (header := _PACKAGE.search(text)) is not None:
        place = "" if header.group(1) == "_global_" else header.group(1)
    found, parents = {}, [(-1, place)]
    for line in text.splitlines():
        key = _LINE.fullmatch(line)
        if key is None:
            continue
        while parents[-1][0] >= len(key["indent"]):
            parents.pop()
        name = f"{parents[-1][1]}.{key['key']}".lstrip(".")
        parents.append((len(key["indent"]), name))
        if (comment := _COMMENT.search(key["rest"])) is not None:
            found[name] = comment["text"]
    return found


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            yield f"{prefix}{key}", value


def _row(name: str, value: Any, comment: str) -> str:
    shown = (
        "" if value == "???" else yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n")
    )
    return _wrapped(f"  {name} (must be given)" if value == "???" else f"  {name}={shown.strip()}", comment)


def _wrapped(left: str, right: str, column: int = 48) -> str:
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    if not right:
        return left
    gap = " " * max(2, column - len(left))
    return textwrap.fill(
        f"{left}{gap}{right}", width, subsequent_indent=" " * column, break_on_hyphens=False, drop_whitespace=True
    )
