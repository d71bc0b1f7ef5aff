"""`anymal doctor`: show what is installed, what is missing, what that costs and how to fix it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from megatron_anymal.environment import OK, Finding, examine


def main(argv: Sequence[str]) -> int:
    """Print the table; return 0 if all required components are installed in a supported version, else 1."""
    parser = argparse.ArgumentParser(prog="anymal doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of the table")
    arguments = parser.parse_args(argv)
    findings = examine()
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if arguments.json else table(findings))
    return 0 if all(finding.state == OK for finding in findings if finding.required) else 1


def table(findings: Sequence[Finding]) -> str:
    """Format the findings as aligned text; each problem is followed by its cost and its fix, and the line of
    megatron-core by what it lacks."""
    part_width = max(len(finding.part) for finding in findings)
    version_width = max(len(finding.version) for finding in findings)
    lines = []
    for finding in findings:
        need = "required" if finding.required else "optional"
        lines.append(f"{finding.part:<{part_width}}  {finding.version:<{version_width}}  {need}  {finding.state}")
        if finding.state != OK:
            lines.append(f"{'':<{part_width}}    without it: {finding.cost}")
            lines.append(f"{'':<{part_width}}    fix: {finding.fix}")
        lines += [f"{'':<{part_width}}    lacks: {lacking}" for lacking in finding.lacks]
    wrong = [finding.part for finding in findings if finding.required and finding.state != OK]
    lines += ["", f"Fix first: {', '.join(wrong)}." if wrong else "All required components are installed."]
    lines.append("Run commands with -e in this project's folder.")
    return "\n".join(lines)
