"""Layouts that the demo model is trained in: how each differs from LLaDA's, and the tokenizer files it is published with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import FAMILIES

FAST = "PreTrainedTokenizerFast"
END, MASK = 257, 258
"""Ids of the tokens that end a text and that hide one; bytes are 0..255, and no layout moves these two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One line of checkpoints that a trained model can be written as."""

    family: str
    special_tokens: tuple[str, ...]
    """Ids 256 and up, in this order."""
    tokenizer_class: str = FAST
    """That of one tokenizer.json, or another of vocab.json and merges.txt."""
    begins: bool = True
    """Whether the first special token is the one that begins a text."""
    queries_per_key: int = 1
    """Query heads that share a head of keys and values."""
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_float32: bool = True
    shift: bool = False

    def adapt(self, shape: ModelShape, block: int) -> ModelShape:
        """The same sizes with this layout's flags; `block` counts where rows see by blocks."""
        return replace(
            shape,
            kv_heads=shape.heads // self.queries_per_key,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            rope_float32=self.rope_float32,
            shift=self.shift,
            block=block if FAMILIES[self.family].by_blocks else 0,
        )

    def tokenizer_files(self) -> dict[str, str]:
        """Text by file name. Vocabulary and merges give every byte the id of its value, in either form."""
        if self.tokenizer_class == FAST:
            return {"tokenizer.json": byte_tokenizer(self.special_tokens).to_str(pretty=True)}
        return {"vocab.json": json.dumps(byte_letters(), ensure_ascii=False), "merges.txt": "#version: 0.2\n"}

    def tokenizer_config(self, shape: ModelShape) -> dict[str, object]:
        """tokenizer_config.json. Where the vocabulary has bytes only, it lists the special tokens."""
        begin, end, mask = self.special_tokens[:3]
        settings: dict[str, object] = {
            "add_prefix_space": False,
            "bos_token": begin if self.begins else None,
            "clean_up_tokenization_spaces": False,
            "eos_token": end,
            "model_max_length": shape.max_length,
            "pad_token": end,
            "tokenizer_class": self.tokenizer_class,
        }
        if self.tokenizer_class == FAST:
            return settings
        added = {
            str(number): {"content": text, "special": True} for number, text in enumerate(self.special_tokens, 256)
        }
        return settings | {"added_tokens_decoder": added, "mask_token": mask}


LLADA = Layout(
    family="llada",
    special_tokens=(
        "<|startoftext|>",
        "<|endoftext|>",
        "<|mdm_mask|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
)
DREAM = Layout(
    family="dream",
    special_tokens=("<|beginoftext|>", "<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>"),
    tokenizer_class="DreamTokenizer",
    queries_per_key=2,
    qkv_bias=True,
    rope_float32=False,
    shift=True,
)
SDAR = Layout(
    family="sdar",
    special_tokens=("<|im_start|>", "<|endoftext|>", "<|MASK|>", "<|im_end|>"),
    tokenizer_class="Qwen2Tokenizer",
    begins=False,
    queries_per_key=2,
    qk_norm=True,
    rope_float32=False,
)
LAYOUTS: Mapping[str, Layout] = {layout.family: layout for layout in (LLADA, DREAM, SDAR)}


def byte_tokenizer(special_tokens: tuple[str, ...] = LLADA.special_tokens) -> Tokenizer:
    """Byte-level BPE without merges: token id = byte value, special tokens from 256 on."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_letters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    return tokenizer


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (as GPT-2 defined it): itself if printable."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
