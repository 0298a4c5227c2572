"""QuantSpec: reading, overriding, refusing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iasvit.errors import IasvitError
from iasvit.spec import QuantSpec

bits = st.integers(2, 8)
globs = st.text("abcdefghijklmnopqrstuvwxyz0123456789._*?", min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("text", "w_bits", "a_bits"), [("W3A3", 3, 3), ("W4A8", 4, 8), ("w2a8", 2, 8), (" W8A2 ", 8, 2)]
)
def test_text_becomes_bits(text: str, w_bits: int, a_bits: int) -> None:
    assert QuantSpec.parse(text) == QuantSpec(w_bits, a_bits)


@given(bits, bits, st.lists(st.tuples(globs, bits, bits), max_size=4))
def test_a_spec_written_and_read_is_the_same(w_bits: int, a_bits: int, overrides: list[tuple[str, int, int]]) -> None:
    spec = QuantSpec(w_bits, a_bits, tuple(overrides))
    assert QuantSpec.parse(str(spec)) == spec
    assert QuantSpec.parse(spec) is spec


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("3", "'3'"),
        ("W3", "'W3'"),
        ("A3W3", "'A3W3'"),
        ("W3A3x", "'W3A3x'"),
        ("W-3A3", "'W-3A3'"),
        ("W3.5A3", "'W3.5A3'"),
        ("W1A3", "1 bits"),
        ("W3A9", "9 bits"),
        ("W32A32", "32 bits"),
        ("W3A3,", "''"),
        ("W3A3,head", "'head'"),
        ("W3A3,=W8A8", "'=W8A8'"),
        ("W3A3,head=8", "'8'"),
        ("W3A3,head=W8A16", "16 bits"),
        ("W3A3,head=W32A8", "32 bits"),
        ("W3A3,head=W4A32", "32 bits"),
        ("W٣A٣", "'W٣A٣'"),
        pytest.param(f"W{'3' * 5000}A3", "...", id="digits"),
        ("W3A3,he[!\n]d=W8A8", "'he[!\\n]d=W8A8'"),
    ],
)
def test_what_is_no_spec_is_named(text: str, named: str) -> None:
    with pytest.raises(IasvitError, match=r"bits|override") as error:
        QuantSpec.parse(text)
    assert named in str(error.value)


def test_overrides_match_globs_and_the_last_one_wins() -> None:
    spec = QuantSpec.parse("W3A4, blocks.*=W5A5 , blocks.1?.attn.*=W6A7,blocks.10.attn.qkv=W8A8")
    assert spec.for_layer("head") == (3, 4)
    assert spec.for_layer("blocks.1.attn.qkv") == (5, 5)  # "1?" needs a second character
    assert spec.for_layer("blocks.11.attn.qkv") == (6, 7)
    assert spec.for_layer("blocks.10.attn.qkv") == (8, 8)
    assert spec.for_layer("Blocks.1.attn.qkv") == (3, 4)  # names are case-sensitive on every system
    assert QuantSpec.parse("W3A3,head=W8A8,*=W4A4").for_layer("head") == (4, 4)


def test_a_layer_may_stay_in_full_precision() -> None:
    spec = QuantSpec.parse("W3A3,head=w32a32")
    assert spec.for_layer("head") == (32, 32)
    assert str(spec) == "W3A3,head=W32A32"
    assert QuantSpec.parse(str(spec)) == spec
    assert spec.hash != QuantSpec.parse("W3A3,head=W8A8").hash


def test_an_override_that_matches_nothing_is_named() -> None:
    spec = QuantSpec.parse("W3A3,head=W8A8,haed*=W8A8")
    with pytest.raises(IasvitError, match=r"override 'haed\*' matches no quantized layer.*blocks\.0"):
        spec.check_overrides(["blocks.0.attn.qkv", "head"])
    QuantSpec.parse("W3A3,head=W8A8").check_overrides(["blocks.0.attn.qkv", "head"])


def test_the_hash_changes_with_every_bit_width() -> None:
    texts = ["W3A3", "W3A4", "W4A3", "W3A3,head=W8A8", "W3A3,head=W8A7", "W3A3,tail=W8A8", "W3A3,a=W4A4,b=W5A5"]
    texts.append("W3A3,b=W5A5,a=W4A4")  # the order matters where both match
    hashes = {QuantSpec.parse(text).hash for text in texts}
    assert len(hashes) == len(texts)
    assert QuantSpec.parse("w3a3").hash == QuantSpec(3, 3).hash
