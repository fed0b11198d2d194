"""The chats that the model card shows, none of them among the prompts trained on."""

from __future__ import annotations

from dataclasses import dataclass

# Sets with prompts as people type them; their replies' lengths are compared with the base's.
REPLY_PROMPT_SETS = ("vicuna_bench", "mt_bench", "dolly_hhrlhf_small", "arena_hard_v01")


@dataclass(frozen=True, slots=True)
class Chat:
    """What the user says, turn by turn; temperature 0 is greedy, else top-p 0.9 and seed 0."""

    user_turns: tuple[str, ...]
    temperature: float = 0.0
    max_tokens: int = 220


CHATS = (
    Chat(("What is the capital of France?",)),
    Chat(("Hi there!", "I have a free afternoon and it is raining. Any ideas?")),
    Chat(("Which planet has the most moons?", "And which one is the hottest?")),
    Chat(("Write a Python function that returns the largest number in a list.",)),
    Chat(("My flight was cancelled. Write a polite message asking for a refund.",)),
    Chat(("Tom has 3 boxes with 8 pencils each and gives away 5 pencils. How many are left?",)),
    Chat(("Explain what a mixture-of-experts model is to a baker.", "Make it shorter.")),
    Chat(("What are the symptoms of dehydration?",)),
    Chat(("Write a short poem about a lighthouse.",), temperature=0.7),
    Chat(
        ("Suggest a name for a small bookshop and a slogan for it.", "Another one, please."),
        temperature=0.7,
    ),
)
