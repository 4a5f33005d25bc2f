"""Evaluates ARM templates as far as can be done without Azure: what Azure knows alone gets a stand-in."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"\s*(?:(?P<text>'(?:[^']|'')*')|(?P<number>-?\d+)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[()\[\],.]))")
SUFFIX = "abcdefghijklm"
"""Stands for uniqueString(), which has 13 characters."""


class Fault(Exception):
    """What is wrong with a template, in one line."""


class Template:
    """A template with one set of parameters.

    Args:
        content: of the template.
        given: values of parameters, as a parameter file has them.

    Raises:
        Fault: a parameter is not declared, has no value, or a value that is not allowed.
    """

    def __init__(self, content: Mapping[str, Any], given: Mapping[str, Any]):
        self.content, self.used = content, set()
        self.copies: dict[str, int] = {}
        declared = content["parameters"]
        for name in given.keys() - declared.keys():
            raise Fault(f"parameter {name} is not declared")
        for name in declared.keys() - given.keys():
            if "defaultValue" not in declared[name]:
                raise Fault(f"parameter {name} has no value")
        self.parameters = {name: given.get(name, of.get("defaultValue")) for name, of in declared.items()}
        for name, of in declared.items():
            _check(name, self.parameters[name], of)
        resources = [one for resource in content["resources"] for one in self._expanded(resource)]
        self.ids = {identity(one["type"], one["name"]) for one in resources}
        self.resources = [self._filled(one) for one in resources]

    def _expanded(self, resource: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The resources that one entry makes, with their names; none where its condition is false."""
        if not self.value(resource.get("condition", True)):
            return []
        copy = resource.get("copy")
        made = []
        for number in range(self.value(copy["count"]) if copy else 1):
            self.copies[""] = number
            made.append({**resource, "name": self.value(resource["name"]), "number": number})
        return made

    def _filled(self, resource: Mapping[str, Any]) -> dict[str, Any]:
        self.copies[""] = resource["number"]
        body = {
            key: value for key, value in resource.items() if key not in ("copy", "condition", "number", "dependsOn")
        }
        targets = [self.value(target) for target in resource.get("dependsOn", [])]
        loops = {one["copy"]["name"] for one in self.content["resources"] if "copy" in one}
        for target in targets:
            if target not in self.ids and target not in loops:
                raise Fault(f"{body['name']}: depends on {target}, which is not in the template")
        return {**self.value(body), "dependsOn": targets}

    def value(self, content: Any) -> Any:
        """Content with every expression evaluated, and property copies unrolled."""
        if isinstance(content, str):
            return self._evaluated(content) if re.fullmatch(r"\[[^\[].*]", content, re.S) else content
        if isinstance(content, Sequence):
            return [self.value(item) for item in content]
        if isinstance(content, Mapping):
            plain = {self.value(key): self.value(item) for key, item in content.items() if key != "copy"}
            loops = content.get("copy", [])
            return plain | {loop["name"]: self._unrolled(loop) for loop in loops if isinstance(loop, Mapping)}
        return content

    def _unrolled(self, loop: Mapping[str, Any]) -> list[Any]:
        made = []
        for number in range(self.value(loop["count"])):
            self.copies[loop["name"]] = number
            made.append(self.value(loop["input"]))
        return made

    def _evaluated(self, text: str) -> Any:
        tokens = _tokens(text[1:-1])
        value, rest = self._term(tokens, 0)
        if rest != len(tokens):
            raise Fault(f"{text}: cannot be read after {tokens[:rest]}")
        return value

    def _term(self, tokens: Sequence[Any], at: int) -> tuple[Any, int]:
        kind, token = tokens[at]
        at += 1
        if kind == "text":
            value: Any = token[1:-1].replace("''", "'")
        elif kind == "number":
            value = int(token)
        else:
            arguments, at = self._arguments(tokens, at)
            value = self._call(token, arguments)
        while at < len(tokens) and tokens[at][1] in ".[":
            if tokens[at][1] == ".":
                value, at = _part(value, tokens[at + 1][1]), at + 2
            else:
                index, at = self._term(tokens, at + 1)
                value, at = _part(value, index), at + 1
        return value, at

    def _arguments(self, tokens: Sequence[Any], at: int) -> tuple[list[Any], int]:
        arguments: list[Any] = []
        at += 1  # (
        while tokens[at][1] != ")":
            argument, at = self._term(tokens, at)
            arguments.append(argument)
            at += tokens[at][1] == ","
        return arguments, at + 1

    def _call(self, name: str, given: list[Any]) -> Any:
        functions: dict[str, Callable[..., Any]] = {
            "parameters": self._parameter,
            "variables": self._variable,
            "format": lambda form, *rest: re.sub(r"\{(\d)}", lambda m: str(rest[int(m[1])]), form),
            "take": lambda text, count: text[:count],
            "string": str,
            "length": len,
            "if": lambda condition, one, other: one if condition else other,
            "copyIndex": lambda loop="": self.copies[loop],
            "resourceId": self._resource_id,
            "subscriptionResourceId": lambda *words: "/".join(("subscription", *words)),
            "uniqueString": lambda *_: SUFFIX,
            "guid": lambda *words: hashlib.sha256("|".join(words).encode()).hexdigest()[:32],
            "resourceGroup": lambda: {"id": "group", "location": "westeurope"},
            "subscription": lambda: {"tenantId": "tenant"},
            "environment": lambda: {"suffixes": {"storage": "core.windows.net"}},
            "reference": lambda target, version: self._reference(target),
        }
        if name not in functions:
            raise Fault(f"{name}() is a function that these tests do not know")
        return functions[name](*given)

    def _parameter(self, name: str) -> Any:
        if name not in self.parameters:
            raise Fault(f"parameter {name} is used and not declared")
        self.used.add(f"parameter {name}")
        return self.value(self.parameters[name])

    def _variable(self, name: str) -> Any:
        if name not in self.content["variables"]:
            raise Fault(f"variable {name} is used and not declared")
        self.used.add(f"variable {name}")
        return self.value(self.content["variables"][name])

    def _resource_id(self, type_: str, *names: str) -> str:
        if len(names) != type_.count("/"):
            raise Fault(f"resourceId of {type_} needs {type_.count('/')} names, has {list(names)}")
        return identity(type_, "/".join(names))

    def _reference(self, target: str) -> dict[str, str]:
        if target not in self.ids:
            raise Fault(f"reference to {target}, which is not in the template")
        return dict.fromkeys(("principalId", "loginServer", "vaultUri"), f"of {target}")

    def outputs(self) -> dict[str, Any]:
        return {name: self.value(output["value"]) for name, output in self.content["outputs"].items()}

    def unused(self) -> set[str]:
        """What is declared for nothing."""
        self.outputs()
        declared = {f"parameter {name}" for name in self.content["parameters"]}
        return (declared | {f"variable {name}" for name in self.content["variables"]}) - self.used


def identity(type_: str, name: str) -> str:
    return f"{type_}:{name}"


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text.rstrip()):
        match = TOKEN.match(text, at)
        if not match:
            raise Fault(f"{text}: cannot be read at {text[at:]!r}")
        found.append((str(match.lastgroup), match[match.lastgroup]))
        at = match.end()
    return found


def _part(value: Any, key: Any) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError) as error:
        raise Fault(f"{key!r} is not in {value}") from error


def _check(name: str, value: Any, declared: Mapping[str, Any]) -> None:
    kinds = {"string": str, "int": int, "bool": bool}
    if not isinstance(value, kinds[declared["type"]]) or (declared["type"] == "int" and isinstance(value, bool)):
        raise Fault(f"parameter {name}: {value!r} is not {declared['type']}")
    if value not in declared.get("allowedValues", [value]):
        raise Fault(f"parameter {name}: {value!r} is not allowed")
    if declared["type"] == "int" and not declared.get("minValue", value) <= value <= declared.get("maxValue", value):
        raise Fault(f"parameter {name}: {value} is out of range")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def values(path: Path) -> dict[str, Any]:
    """Of a parameter file."""
    return {name: given["value"] for name, given in read_json(path)["parameters"].items()}
