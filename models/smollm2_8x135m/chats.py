"""Prompts written for this model: what the dense base is asked when its own answers are collected."""

from __future__ import annotations

import random

_SUBJECTS = """
photosynthesis|the French Revolution|black holes|baking bread|inflation|a good night's sleep|volcanoes
the water cycle|Python lists|recursion|SQL joins|binary search|git branches|the stock market|chess openings
growing tomatoes|learning Spanish|job interviews|public speaking|time management|vaccines|the immune system
gravity|electric cars|solar panels|the Roman Empire|ancient Egypt|World War II|the Moon landing|dinosaurs
climate change|coral reefs|bees|dogs|cats|whales|running a marathon|yoga|stretching|healthy breakfasts
coffee|green tea|pasta|vegetarian cooking|budgeting|credit cards|renting a flat|moving to a new city
a trip to Japan|camping|hiking boots|photography|watercolour painting|the guitar|jazz|Shakespeare
the printing press|the internet|email etiquette|remote work|teamwork|negotiation|writing a CV|poetry
haiku|probability|fractions|prime numbers|triangles|the speed of light|DNA|antibiotics|blood pressure
headaches|stress|friendship|a broken bicycle|recycling|rain forests|deserts|the Amazon river|Mount Everest
""".replace("\n", "|")

_COUNTRIES = """
France|Italy|Spain|Germany|Portugal|Japan|China|India|Egypt|Kenya|Brazil|Peru|Canada|Mexico|Norway|Sweden
Poland|Greece|Turkey|Ireland|Australia|Thailand|Vietnam|Argentina|Chile|Austria|Hungary|Finland|Denmark
""".replace("\n", "|")

_SUBJECT_TEMPLATES = (
    "Explain {} to a ten-year-old.",
    "What is the most important thing to know about {}?",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "Give me five tips about {}.",
    "What are common misunderstandings about {}?",
    "Summarise {} in three sentences.",
    "I want to learn more about {}. Where should I start?",
    "Why does {} matter?",
    "Can you help me with {}?",
    "Write a short email to a friend about {}.",
    "Make a list of questions about {}.",
    "What do you think about {}?",
    "Tell me something surprising about {}.",
)

_COUNTRY_TEMPLATES = (
    "What is the capital of {}?",
    "Plan a three-day trip to {}.",
    "What food is {} known for?",
    "Which languages are spoken in {}?",
    "Tell me about the history of {}.",
)

_SINGLE = """
Hi!|Hello, how are you?|Good morning|Who are you?|What can you do?|Who made you?|Thank you!|Tell me a joke.
What is your name?|I feel sad today.|I am bored. What should I do?|How do I boil an egg?|What is 12 times 7?
What is 2 + 2?|Is 97 a prime number?|Write a Python function that reverses a string.|What is a binary tree?
Write a Python function that checks whether a word is a palindrome.|How do I read a file in Python?
How do I list the files in a folder in Linux?|What does the command grep do?|How do I undo a git commit?
Write a SQL query that counts the orders of each customer.|Explain the difference between a list and a tuple.
Translate 'good morning' into French.|Translate 'where is the station?' into Spanish.|What is the time?
Correct this sentence: She go to school every days.|Give me a synonym for happy.|What rhymes with moon?
Who wrote Romeo and Juliet?|Who painted the Mona Lisa?|What is the largest planet?|How far away is the Moon?
How many continents are there?|What is the boiling point of water?|Why is the sky blue?|Why do leaves fall?
What are the symptoms of a cold?|How much water should I drink?|How can I fall asleep faster?
Write a thank-you note to my teacher.|Write a birthday message for my sister.|Suggest a name for a kitten.
Give me a recipe for pancakes.|What should I cook with rice and eggs?|How do I make my code faster?
Write the opening of a detective novel.|Describe a sunset over the sea.|Write a limerick about a frog.
What is the difference between weather and climate?|How does a bill become a law?|What is a contract?
What is machine learning?|What is a mixture of experts?|How does a transformer model work?
""".replace("\n", "|")

FOLLOW_UPS = (
    "Can you explain that more simply?",
    "Can you give me an example?",
    "Please make it shorter.",
    "Thank you! Anything else I should know?",
    "Why is that?",
    "Can you say more about the last point?",
    "What would be the first step?",
    "Rewrite your answer as a list.",
    "Are you sure?",
    "What is the opposite view?",
    "Could you say it in a friendlier way?",
    "Now summarise it in one sentence.",
    "How would you explain it to an expert?",
    "What are the disadvantages?",
    "Thanks, that helps.",
    "Tell me more.",
    "How much would that cost?",
    "What happened next?",
    "Can you write it in Python?",
    "Who was involved?",
)


def written_prompts(count: int, seed: int) -> list[str]:
    """Return `count` different prompts (fewer if there are fewer), in random order."""
    prompts = _split(_SINGLE)
    prompts += [t.format(s) for s in _split(_SUBJECTS) for t in _SUBJECT_TEMPLATES]
    prompts += [t.format(c) for c in _split(_COUNTRIES) for t in _COUNTRY_TEMPLATES]
    random.Random(seed).shuffle(prompts)
    return prompts[:count]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split("|") if part.strip()]
