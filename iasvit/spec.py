"""QuantSpec: which layer gets how many bits ("W3A3", and overrides for single layers)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from iasvit.errors import IasvitError, shown

MIN_BITS, MAX_BITS = 2, 8
FULL_PRECISION = 32
_BITS = re.compile(r"[Ww]([0-9]{1,4})[Aa]([0-9]{1,4})")


def _parse_bits(text: str, override: bool = False) -> tuple[int, int]:
    match = _BITS.fullmatch(text.strip())
    if match is None:
        raise IasvitError(
            f"bits {shown(text)} are not of the form W<weight bits>A<activation bits>, such as W3A3 or W4A8"
        )
    w_bits, a_bits = int(match[1]), int(match[2])
    if override and w_bits == a_bits == FULL_PRECISION:
        return w_bits, a_bits
    for bits in (w_bits, a_bits):
        if not MIN_BITS <= bits <= MAX_BITS:
            raise IasvitError(f"bits {text!r} name {bits} bits, but {MIN_BITS} to {MAX_BITS} are supported")
    return w_bits, a_bits


@dataclass(frozen=True)
class QuantSpec:
    """Bit-widths of a quantized model: everywhere (w_bits, a_bits), except in layers that an override's glob matches.

    Written "W3A3", or with overrides "W3A3,head=W8A8,blocks.0.*=W4A8"; a layer's name is its path in the model as
    `named_modules` prints it, globs are those of fnmatch, and the last override that matches wins. First and last
    layers use the same bits as the rest unless an override says otherwise. A layer at W32A32 stays in full precision.
    """

    w_bits: int
    a_bits: int
    overrides: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def parse(cls, spec: str | QuantSpec) -> QuantSpec:
        """Read a spec from text; a QuantSpec passes through.

        Raises:
            IasvitError: the text is no spec, or a bit-width is out of [2, 8].
        """
        if isinstance(spec, QuantSpec):
            return spec
        head, *rest = str(spec).split(",")
        w_bits, a_bits = _parse_bits(head)
        overrides = []
        for part in rest:
            glob, equals, bits = part.partition("=")
            if not equals or not glob.strip() or not glob.isprintable():
                raise IasvitError(
                    f"override {shown(part)} is not of the form <layer glob>=W<bits>A<bits>, such as head=W8A8"
                )
            overrides.append((glob.strip(), *_parse_bits(bits, override=True)))
        return cls(w_bits, a_bits, tuple(overrides))

    def for_layer(self, name: str) -> tuple[int, int]:
        """Weight and activation bits of the layer with this path."""
        for glob, w_bits, a_bits in reversed(self.overrides):
            if fnmatchcase(name, glob):
                return w_bits, a_bits
        return self.w_bits, self.a_bits

    def check_overrides(self, names: list[str]) -> None:
        """Raise IasvitError for an override that matches none of the layer names: a typing error would go unseen."""
        for glob, _, _ in self.overrides:
            if not any(fnmatchcase(name, glob) for name in names):
                raise IasvitError(
                    f"override {shown(glob)} matches no quantized layer; layers are {', '.join(names[:4])}, ..."
                )

    @property
    def hash(self) -> str:
        """Twelve hex digits that change when any bit-width does."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        parts = [f"W{self.w_bits}A{self.a_bits}"]
        parts += [f"{glob}=W{w_bits}A{a_bits}" for glob, w_bits, a_bits in self.overrides]
        return ",".join(parts)
