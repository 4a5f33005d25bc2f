"""What a deployment script in PowerShell must keep to, read with a real grammar."""

import re
from collections.abc import Iterator
from typing import Any

import tree_sitter_powershell
from tree_sitter import Language, Parser

HELPER = "Invoke-Az"


def faults(text: str) -> list[str]:
    """What is wrong with the script, one line each."""
    root = _parsed(text)
    if root.has_error:
        bad = next(n for n in nodes(root) if n.type == "ERROR" or n.is_missing)
        return [f"line {bad.start_point[0] + 1}: cannot be parsed: {_text(bad)[:60]!r}"]
    found = []
    commands = [n for n in nodes(root) if n.type == "command"]
    names = {_name(command).lower() for command in commands}
    if not re.search(r"^Set-StrictMode -Version Latest$", text, re.M):
        found.append("StrictMode is not set")
    if not re.search(r"^\$ErrorActionPreference = 'Stop'$", text, re.M):
        found.append("ErrorActionPreference is not Stop")
    if "SupportsShouldProcess = $true" not in text.partition("param(")[0]:
        found.append("the script does not declare SupportsShouldProcess")
    if names & {"iex", "invoke-expression"}:
        found.append("evaluates text as code")
    found += [
        f"line {command.start_point[0] + 1}: az is called outside of {HELPER}"
        for command in commands
        if _name(command).lower() in ("az", "az.cmd", "az.exe") and _function(command) != HELPER
    ]
    found += _faults_of_helper(root)
    # What is changed must come after the place where -WhatIf has returned.
    returned = re.search(r"^if \(\$WhatIfPreference\) \{\n[^}]*'what-if'[^}]*\n    return\n\}", text, re.M)
    if not returned or returned.end() > text.find("-Action 'create'"):
        found.append("what-if: -WhatIf does not return before the deployment is created")
    return found


def _faults_of_helper(root: Any) -> list[str]:
    helper = next((n for n in nodes(root) if n.type == "function_statement" and _called(n) == HELPER), None)
    if helper is None:
        return [f"there is no {HELPER}"]
    checks = [n for n in nodes(helper) if n.type == "if_statement" and "$LASTEXITCODE -ne 0" in _text(n)]
    calls = [n for n in nodes(helper) if n.type == "command" and _name(n) == "az"]
    if len(calls) != 1 or not checks or checks[0].start_byte < calls[0].end_byte:
        return [f"{HELPER} does not look at $LASTEXITCODE after its one call of az"]
    if not any(n.type == "flow_control_statement" and _text(n).startswith("throw") for n in nodes(checks[0])):
        return [f"{HELPER} does not throw where az fails"]
    return []


def parameters(text: str) -> set[str]:
    """Names of the script's own parameters."""
    block = next(n for n in nodes(_parsed(text)) if n.type == "param_block")
    return {_text(n).lstrip("$") for n in nodes(block) if n.type == "variable" and n.parent.type == "script_parameter"}


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in node.children:
        yield from nodes(child)


def _parsed(text: str) -> Any:
    return Parser(Language(tree_sitter_powershell.language())).parse(text.encode()).root_node


def _text(node: Any) -> str:
    return node.text.decode()


def _name(command: Any) -> str:
    name = command.child_by_field_name("command_name")
    return _text(name).strip("'\"") if name else ""


def _called(function: Any) -> str:
    return next((_text(n) for n in function.children if n.type == "function_name"), "")


def _function(node: Any) -> str | None:
    while node is not None:
        if node.type == "function_statement":
            return _called(node)
        node = node.parent
    return None
