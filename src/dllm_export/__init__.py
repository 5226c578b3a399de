"""dllm-export: diffusion LLM checkpoints to split ONNX graphs and engines, and a small runtime for them.

    from dllm_export import DiffusionLM, DllmCache, GenerationOptions
    with DiffusionLM.from_pretrained("bundle") as model:
        print(model.generate(["7 + 5 ="], GenerationOptions(gen_length=8), DllmCache())[0].text)

Names are loaded on first use, so that importing a part of the package costs only that part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dllm_export.errors import DllmExportError as DllmExportError
    from dllm_export.runtime.bundle import Bundle as Bundle
    from dllm_export.runtime.bundle import open_bundle as open_bundle
    from dllm_export.runtime.generate import Frame as Frame
    from dllm_export.runtime.model import DiffusionLM as DiffusionLM
    from dllm_export.runtime.model import Generation as Generation
    from dllm_export.runtime.options import GenerationOptions as GenerationOptions
    from dllm_export.runtime.policies import CachePolicy as CachePolicy
    from dllm_export.runtime.policies import DllmCache as DllmCache
    from dllm_export.runtime.policies import NoCache as NoCache
    from dllm_export.runtime.policies import SharedPrefix as SharedPrefix
    from dllm_export.runtime.session import SessionOptions as SessionOptions

_HOMES = {
    "Bundle": "runtime.bundle",
    "CachePolicy": "runtime.policies",
    "DiffusionLM": "runtime.model",
    "DllmCache": "runtime.policies",
    "DllmExportError": "errors",
    "Frame": "runtime.generate",
    "Generation": "runtime.model",
    "GenerationOptions": "runtime.options",
    "NoCache": "runtime.policies",
    "SessionOptions": "runtime.session",
    "SharedPrefix": "runtime.policies",
    "open_bundle": "runtime.bundle",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """A public name, imported from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dllm_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dllm_export.{_HOMES[name]}"), name)
