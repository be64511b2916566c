"""XLA's own estimate of the cycles of a compiled program, from its text."""

import re

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{%([\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


def cycles(text: str) -> int:
    """Cycles of all that may run, each once, but for what a condition calls for.

    Of the branches of a `lax.cond` the first one counts: a kernel's fallback is the second. XLA has
    no estimate for kernels, and the largest integer for what it gives to the SparseCore.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match.group(2)
            entry = name if match.group(1) else entry
        lines.setdefault(name, []).append(line)
    reached, waiting = set(), [entry]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            body = "\n".join(lines.get(name, []))
            waiting += _CALLED.findall(body) + _BRANCHES.findall(body)
    numbers = (int(n) for name in reached for n in _CYCLES.findall("\n".join(lines.get(name, []))))
    return sum(n for n in numbers if n < 2**62)
