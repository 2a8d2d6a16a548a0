"""What a page of HTML shows."""

from __future__ import annotations

from html.parser import HTMLParser


class Shown(HTMLParser):
    """The text that a page shows, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{ZERO WIDTH SPACE}", "")

    @property
    def words(self) -> list[str]:
        return self.text.split()
