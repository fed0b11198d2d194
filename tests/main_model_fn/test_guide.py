"""Every answer within a grammar, whatever the model would rather say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from main_model_fn.engine import Engine
from main_model_fn.guide import Guide, Guides
from remoe.errors import InvalidRequestError
from remoe.generation import SamplingParams
from tests.gateway.tiny_text import write_model
from tests.main_model_fn.asking import Pages, ask, collect
from tests.main_model_fn.conftest import LIMITS
from tests.tiny_model import InProcessTransport, build_tiny_checkpoint, new_meter, split

END = 0
SCHEMAS: list[dict[str, object]] = [
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "sky": {"enum": ["clear", "grey", "né 漢"]},
        },
        "required": ["city", "days", "sky"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"anyOf": [{"const": None}, {"type": "number", "minimum": 0, "maximum": 9.5}]},
    {
        "$defs": {
            "leaf": {
                "type": "object",
                "properties": {"x": {"enum": [1, "a"]}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
        "type": "array",
        "items": {"$ref": "#/$defs/leaf"},
        "minItems": 2,
        "maxItems": 2,
    },
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_model(tmp_path_factory.mktemp("guided-text"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def guided(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("guided")
    size = tokenizer.get_vocab_size()
    build_tiny_checkpoint(folder, vocabulary=size)
    tokenizer.save(str(folder / "tokenizer.json"))
    meter = new_meter()
    model = split(folder, ((), (), ()), InProcessTransport(folder), meter)
    guides = Guides(folder / "tokenizer.json", vocab_size=size)
    engine = Engine(model, meter, limits=LIMITS, deployment_plan_id="plan-test", guides=guides)
    engine.start()
    yield engine
    engine.stop()


def grammar(schema: dict[str, object]) -> str:
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={"whitespace_flexible": False}
    )


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_sampled_answer_keeps_to_its_schema(
    guided: Engine, tokenizer: Tokenizer, schema: dict[str, object]
) -> None:
    # Random weights: alone, this model never wrote a brace.
    async def answer(seed: int) -> tuple[str, str | None]:
        request = ask(
            [5, 6, 7 + seed],
            tokens=100,
            stop=(END,),
            # The first is greedy, others increasingly wild.
            sampling=SamplingParams(temperature=seed / 4, seed=seed),
            grammar=grammar(schema),
            logprobs=1 if seed == 3 else None,
        )
        tokens, last = await collect(guided, request)
        return tokenizer.decode(tokens), last.finish

    async def run() -> list[tuple[str, str | None]]:
        return await asyncio.gather(*(answer(seed) for seed in range(8)))

    validator = jsonschema_rs.validator_for(schema)
    answers = asyncio.run(run())
    for text, finish in answers:
        assert finish == "stop", text
        validator.validate(json.loads(text))
    assert len({text for text, _ in answers}) > 1


def test_the_guided_do_not_disturb_the_others(guided: Engine) -> None:
    free = ask([5, 6, 7], tokens=12, sampling=SamplingParams(seed=1))

    async def run() -> tuple[list[int], list[int]]:
        alone, _ = await collect(guided, free)
        bound = ask([5, 6, 7], tokens=40, stop=(END,), grammar=grammar(SCHEMAS[0]))
        together = await asyncio.gather(collect(guided, free), collect(guided, bound))
        return alone, together[0][0]

    alone, in_company = asyncio.run(run())
    assert alone == in_company


def test_log_probabilities_stay_the_model_s_own(guided: Engine) -> None:
    async def first(text: str | None) -> float:
        request = ask([5, 6, 7], tokens=1, stop=(END,), grammar=text, logprobs=0)
        async for event in guided.generate(request):
            if event.logprobs:
                return event.logprobs[0].logprob
        raise AssertionError

    free = asyncio.run(first(None))
    # One token remains possible; its probability among all is what is told, not 1.
    assert asyncio.run(first(grammar(SCHEMAS[1]))) < min(free, -0.01)


def test_what_cannot_be_followed_is_refused(guided: Engine, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="not a grammar"):
        asyncio.run(collect(guided, ask([5], stop=(END,), grammar="start: nonsense(")))
    with pytest.raises(InvalidRequestError, match="stop tokens"):
        asyncio.run(collect(guided, ask([5], grammar=grammar({}))))
    missing = Guides(Path("/nowhere/tokenizer.json"), vocab_size=9)
    with pytest.raises(InvalidRequestError, match="cannot be used"):
        missing.guide(grammar({}), (END,))


def test_an_answer_that_left_its_grammar_fails_alone(
    guided: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llguidance gives up on grammars that grow too large; here it is handed a wrong token."""
    wrong = tokenizer.encode("}", add_special_tokens=False).ids[0]
    accept = Guide.accept
    calls: list[int] = []

    def stumble(guide: Guide, token: int) -> bool:
        calls.append(token)
        return accept(guide, wrong if len(calls) == 3 else token)

    async def run() -> tuple[str | None, list[int], str | None]:
        with monkeypatch.context() as patch:
            patch.setattr(Guide, "accept", stumble)
            _, failed = await collect(
                guided, ask([5], tokens=60, stop=(END,), grammar=grammar(SCHEMAS[0]))
            )
        tokens, last = await collect(guided, ask([5, 6], tokens=4))
        return failed.finish, tokens, last.finish

    finish, tokens, later = asyncio.run(run())
    assert finish == "error"
    assert (len(tokens), later) == (4, "length")
    # The engine was told to end it rather than go on to the limit.
    assert len(calls) <= 5
    asyncio.run(Pages(guided).become_idle())
