"""Text, token ids and chat templates of a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from dllm_export.errors import IntegrityError, UsageError
from dllm_export.runtime.tokenizer import Tokenizer

BOS, EOT = "<|startoftext|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", EOT)
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def byte_letters() -> dict[str, int]:
    """The byte-level alphabet of GPT-2 as a vocabulary of 256."""
    return {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json with LLaDA's special tokens from id 256 on."""
    fast = FastTokenizer(models.BPE(vocab=byte_letters(), merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    fast.save(str(file))
    return file


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path, LLADA_TEMPLATE, BOS)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40).filter(lambda text: "<|" not in text))
def test_decoding_gives_back_every_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_in_a_text_are_single_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|mdm_mask|>b")
    assert ids[1] == 258
    assert len(ids) == 3


def test_encoding_adds_no_tokens_of_its_own(path: Path, tmp_path: Path) -> None:
    fast = FastTokenizer.from_file(str(path))
    fast.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    fast.save(str(tmp_path / "tokenizer.json"))
    assert 256 in fast.encode("hi").ids
    assert 256 not in Tokenizer(tmp_path / "tokenizer.json", None, "").encode("hi")


def test_decoding_leaves_special_tokens_out_and_a_single_piece_shows_them(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("ok"), 257, 257]) == "ok"
    assert tokenizer.piece(257) == "<|endoftext|>"


def test_a_chat_turn_is_rendered_as_llada_was_trained(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat("  What is 2+2?\n") == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_blocks_of_a_template_leave_no_blank_lines(path: Path) -> None:
    template = (
        "{% for message in messages %}\n    {% if true %}\n{{ message.content }}\n    {% endif %}\n{% endfor %}\n"
    )
    assert Tokenizer(path, template, BOS).chat("hi") == "hi\n"


def test_a_model_without_a_template_says_so(path: Path) -> None:
    with pytest.raises(UsageError, match=r"no chat template.*leave out --chat"):
        Tokenizer(path, None, "").chat("hi")


def test_a_template_can_refuse_a_conversation(path: Path) -> None:
    with pytest.raises(UsageError, match="refuses this conversation: roles must alternate"):
        Tokenizer(path, "{{ raise_exception('roles must alternate') }}", "").chat("hi")


@pytest.mark.parametrize("value", ["''", "messages", "messages[0]", "raise_exception"])
@pytest.mark.parametrize("attribute", ["__class__", "__init__", "__globals__", "__code__"])
def test_a_template_sees_no_python_attributes(value: str, attribute: str, path: Path) -> None:
    assert Tokenizer(path, f"{{{{ {value}.{attribute} }}}}|{{{{ {value}['{attribute}'] }}}}", "").chat("hi") == "|"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ (messages[0].content|attr('__class__')).mro() }}",
        "{% set x = messages.append('more') %}",
        "{% include 'other' %}",
        "{% for x in %}",
        "{{ missing.attribute }}",
        "{{ messages | no_such_filter }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ range(99999999999) }}",
    ],
)
def test_a_template_that_reaches_out_or_is_broken_is_refused(template: str, path: Path) -> None:
    with pytest.raises(IntegrityError, match="chat template does not render"):
        Tokenizer(path, template, BOS).chat("hi")


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"model": {"type": "BPE"}}', '{"version": "9.9"}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json", None, "")


def test_truncation_and_padding_in_the_file_do_not_touch_a_prompt(path: Path, tmp_path: Path) -> None:
    tokenizer = FastTokenizer.from_file(str(path))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "cut.json"))
    text = "more than five bytes"
    assert Tokenizer(tmp_path / "cut.json", None, "").encode(text) == Tokenizer(path, None, "").encode(text)
