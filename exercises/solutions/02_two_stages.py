"""One call gives HABIT words. Of two stages the first writes two paragraphs of HABIT / 2 words and keeps one of them,
the second three of HABIT / 3: 1.5 HABIT in all. The break belongs to the prefix, so that the model sees it too.
"""


def first_share(text: str, share: tuple[int, int]) -> str:
    paragraphs = text.split("\n\n")
    return "\n\n".join(paragraphs[: max(1, len(paragraphs) * share[0] // share[1])])


def extend(draft: str, write) -> str:
    first = write(first_share(draft, (1, 2)), "")
    # Where stage 1 writes a single paragraph, the project keeps two thirds of its sentences; here all of it is kept.
    prefix = first_share(first, (2, 3)) + "\n\n"
    return prefix + write(draft, prefix)
