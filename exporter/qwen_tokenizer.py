"""vocab.json and merges.txt of Qwen's byte-level BPE -> one tokenizer, for checkpoints that ship no tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dllm_export.errors import CheckpointError
from dllm_export.exporter.json_file import JSON_LIMIT, read_json

CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")
"""Values of tokenizer_class that mean this tokenizer. Other classes have the same two files and split text otherwise."""

PIECES = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # the end of a contraction
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with one sign or space before them
        r"\p{N}",  # a single digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with a space before and line breaks behind them
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""What text is split into before bytes are merged; the first alternative that fits counts."""


def has_qwen_files(directory: Path) -> bool:
    """Whether both files are there."""
    return all((directory / name).is_file() for name in ("vocab.json", "merges.txt"))


def build_qwen_tokenizer(directory: Path, kind: object) -> Tokenizer:
    """The tokenizer without its added tokens; `kind` is the checkpoint's tokenizer_class."""
    if kind not in CLASSES:
        raise CheckpointError(
            f"tokenizer.json is missing in {directory}, and of vocab.json and merges.txt one can be made only where "
            f"tokenizer_config.json names the tokenizer_class {', '.join(CLASSES)}, not {kind!r}: add a tokenizer.json, or "
            f"export with --no-tokenizer and work with token ids"
        )
    vocabulary = read_json(directory / "vocab.json")
    if not all(isinstance(number, int) for number in vocabulary.values()):
        raise CheckpointError("vocab.json is not a table from tokens to ids; download it again")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=read_merges(directory / "merges.txt")))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"vocab.json and merges.txt do not fit together: {error}") from None
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of tokens that are merged, the earlier the sooner."""
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"{path.name} has {path.stat().st_size} bytes, more than any tokenizer needs")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path.name} is not UTF-8 text; download it again") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.rstrip("\r").partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointError(
                f"{path.name}, line {number}: {line[:40]!r} is not a pair of tokens; download it again"
            )
        merges.append((left, right))
    return merges
