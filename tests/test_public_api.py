"""The public names are exactly those that can be imported."""

from __future__ import annotations

import pytest

import dllm_export


def test_every_public_name_can_be_imported() -> None:
    for name in dllm_export.__all__:
        assert getattr(dllm_export, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = dllm_export.missing
