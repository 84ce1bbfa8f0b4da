"""A page read back with the standard library's parser: its elements, their attributes and their text."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
CLOSED = {"use", "line", "rect", "path"}  # written <line/>, which the parser reports as such


@dataclass
class Element:
    """One element; `text` is everything below it."""

    tag: str
    attributes: dict[str, str | None]
    parent: "Element | None" = None
    children: list["Element"] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(self.own).split())

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    def all(self, tag: str = "", style: str = "") -> list["Element"]:
        """Everything below of a tag and class, in the order of the document."""
        found = []
        for child in self.children:
            if (not tag or child.tag == tag) and (not style or style in child.classes):
                found.append(child)
            found += child.all(tag, style)
        return found

    def one(self, tag: str = "", style: str = "") -> "Element":
        (found,) = self.all(tag, style)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.at = self.root = Element("document", {})

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), self.at)
        assert len(element.attributes) == len(attrs), f"an attribute twice in {tag}"
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_startendtag(self, tag, attrs):
        assert tag in CLOSED, f"<{tag}/> does not close in HTML"
        self.at.children.append(Element(tag, dict(attrs), self.at))

    def handle_endtag(self, tag):
        assert tag == self.at.tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        element = self.at
        while element is not None:
            element.own.append(data)
            element = element.parent


def read(html: str) -> Element:
    """The document; fails where tags do not match."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.at is reader.root
    return reader.root
