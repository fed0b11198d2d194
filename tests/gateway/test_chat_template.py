"""Templates render as transformers renders them, inside a sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.chat_template import ChatTemplate
from remoe.errors import CheckpointError, InvalidRequestError

HELLO = [{"role": "user", "content": "hello <b>"}]


def test_template_file_wins_over_the_tokenizer_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    (tmp_path / "chat_template.jinja").write_text("new")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "new"


def test_named_templates_mean_the_default_one(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "d"


def test_a_base_model_has_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None


def test_special_tokens_are_variables(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "model_max_length": 4}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "<s></s>"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hello <b>"}'),
        ("{{ messages[0].content }}", "hello <b>"),
        (
            "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
            "user",
        ),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("{% if true %}\n  y\n{% endif %}", "  y\n"),
        ("{{ add_generation_prompt }}{{ tools }}{{ mood }}", "TrueNonecalm"),
    ],
)
def test_helpers(source: str, expected: str) -> None:
    assert ChatTemplate(source, {}).render(HELLO, {"mood": "calm"}) == expected


def test_today_is_known() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(HELLO)
    assert year.isdecimal()
    assert len(year) == 4


def test_a_template_can_refuse_a_conversation() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        template.render(HELLO)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render(HELLO)


def test_extra_variables_cannot_replace_the_conversation() -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        ChatTemplate("x", {}).render(HELLO, {"messages": []})


def test_a_broken_template_fails_at_start() -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate("{% for %}", {})
