"""Text to token ids and back with the bundle's own tokenizer.json and chat template."""

from __future__ import annotations

from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from dllm_export.errors import IntegrityError, UsageError


class Tokenizer:
    """A tokenizer.json without any model code."""

    def __init__(self, path: Path, chat_template: str | None, bos: str) -> None:
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise IntegrityError(f"{path.name} is not a tokenizer.json: {error}") from None
        # A file may carry the settings of its training run, which would cut or pad a prompt without a word.
        self._fast.no_truncation()
        self._fast.no_padding()
        self._chat_template, self._bos = chat_template, bos

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it is; special tokens in it count as such."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens."""
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text

    def piece(self, token: int) -> str:
        """One token as readable text, special tokens included."""
        text: str = self._fast.decode([token], skip_special_tokens=False)
        return text

    def chat(self, text: str) -> str:
        """The text as one user turn of the model's chat template, ready for the answer."""
        if self._chat_template is None:
            raise UsageError("this model has no chat template (it is a base model); leave out --chat")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

        def raise_exception(message: str) -> None:
            raise UsageError(f"the chat template refuses this conversation: {message}")

        environment.globals["raise_exception"] = raise_exception
        messages = [{"role": "user", "content": text}]
        try:
            template = environment.from_string(self._chat_template)
            return template.render(messages=messages, add_generation_prompt=True, bos_token=self._bos)
        except UsageError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            raise IntegrityError(f"the bundle's chat template does not render: {error}") from None
