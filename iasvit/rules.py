"""What the text of an `Admission` says: which rules are broken. It needs no torch, so that tables can use it."""

from __future__ import annotations

import re

_SENTENCES = (
    (r"(\d+) values at (\d+) bits", "A quantizer gives {0} different values at {1} bits; at most {most} are allowed."),
    (r"fractional zero-points", "A zero-point is not a whole number; all zero-points must be."),
    (r"dynamic parameters", "A quantizer's parameters depend on the values that it is given; they must be fixed."),
    (r"activations per (\w+)", "An activation has a range for each {0}; one range for the tensor is allowed."),
    (r"(\d+) weights in float", "No quantizer touches {0} of the weights; each must have one."),
    (r"(\d+) activations in float", "No quantizer touches {0} of the activations; each but the image must have one."),
)


def violations(rules: str) -> list[str]:
    """What breaks the common rule, each in a few words, read from `str(Admission)`: as `Admission.violations`."""
    found = []
    for part in rules.split("; "):
        if match := re.fullmatch(r"(\d+) codes at (\d+) bits", part):
            codes, bits = map(int, match.groups())
            found += [f"{codes} values at {bits} bits"] * (codes > 2**bits)
        elif part == "dynamic":
            found.append("dynamic parameters")
        elif part == "fractional zero-points" or re.fullmatch(r"activations per (?!tensor$).*", part):
            found.append(part)
        elif part.startswith("float: "):
            operands = part.removeprefix("float: ").split(", ")
            found += [f"{operand} in float" for operand in operands if operand not in ("image", "nothing")]
    return found


def sentence(violation: str) -> str:
    """A violation in one sentence, with what the rule is."""
    for pattern, text in _SENTENCES:
        if match := re.fullmatch(pattern, violation):
            bits = match.groups()[1:]
            return text.format(*match.groups(), most=2 ** int(bits[0]) if bits else None)
    return f"It breaks a rule: {violation}."
