"""Twenty prompts that try tokenizers and attention alike: prose, code, lists, other scripts, one token, many."""

LONG = (
    "To the Senate and House of Representatives: The condition of the country, and its relations with other nations, "
    "gives cause for gratitude. The harvests have been abundant, commerce has revived, and the public credit stands "
    "higher than at any time in our history. It remains for the Congress to consider in what manner the revenue may be "
    "reduced without hardship to any industry, and how the debt may be paid before it falls due. I recommend, first,"
)

PROMPTS = (
    "My fellow citizens of the Senate",
    "The",
    "In the year of our Lord",
    "The treaty with Great Britain has been",
    "Our commerce with foreign nations",
    "I recommend to the Congress that",
    "Once upon a time there was a",
    "The capital of France is",
    "Water boils at a temperature of",
    "To bake a loaf of bread, first",
    'She turned to him and said, "I never',
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 2, 3, 4, 5,",
    "SELECT name, price FROM products WHERE",
    "Shopping list:\n- milk\n- eggs\n-",
    "Dear Sir or Madam,\n\nI am writing to",
    "Größe und Preis: 12 €, naïve café – 日本語 🙂",
    "  two leading spaces and a tab\t, then",
    "Question: Why is the sky blue?\nAnswer:",
    LONG,
)
