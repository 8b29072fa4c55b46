"""A language is a folder of prompts/: its templates, seeds and queries lie together."""

from pathlib import Path

PROMPTS = Path(__file__).parents[2] / "prompts"


def files(name: str) -> list[Path]:
    """The file of that name of every language that has one, in the order of the languages' codes."""
    return sorted(PROMPTS.glob(f"*/{name}"))
