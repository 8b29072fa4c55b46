"""With the oldest preempted, two long texts can take each other's pages for ever. At the end of the queue, a preempted
text is overtaken by all that came after it, and where more keep coming it may never end.
"""

from collections import deque


class Scheduler:
    def __init__(self, max_rows: int, num_pages: int, page_tokens: int):
        self.max_rows, self.page_tokens = max_rows, page_tokens
        self.free, self.waiting, self.running = list(range(num_pages)), deque(), []

    def add(self, text) -> None:
        self.waiting.append(text)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def schedule(self) -> list:
        promised = 0  # pages for those that are admitted now
        while self.waiting and len(self.running) < self.max_rows:
            text = self.waiting[0]
            needed = self.pages_for(text.prompt + text.written + 1)
            if promised + needed > len(self.free):
                break
            promised += needed
            self.running.append(self.waiting.popleft())
        for text in list(self.running):
            if text in self.running:  # not preempted by an older one
                self.grow(text)
        return list(self.running)

    def grow(self, text) -> None:
        while len(text.pages) < self.pages_for(text.prompt + text.written):
            if self.free:
                text.pages.append(self.free.pop())
                continue
            youngest = self.running[-1]
            self.finish(youngest)
            self.waiting.appendleft(youngest)
            if youngest is text:
                return

    def finish(self, text) -> None:
        self.running.remove(text)
        self.free += text.pages
        text.pages.clear()
