"""A page as a browser would take it: what it loads, says and draws; and what holds for every page of ours."""

import html.parser
import re


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced; collects ids, the text, and everything that a browser would load."""

    VOID = {"meta", "br", "hr", "img", "input", "link", "col", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.loads, self.ids, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.note(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def note(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
                self.loads.append(value)

    def __contains__(self, words):
        return words in " ".join(" ".join(self.text).split())


def assert_loads_nothing(text):
    """One file: no address in it, no script, and every reference has its target inside."""
    page = Page(text)
    assert all(target.startswith("#") for target in page.loads)
    assert "://" not in text and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert "default-src 'none'" in text and "<script>" not in text
    assert len(page.ids) == len(set(page.ids))
    references = {target[1:] for target in page.loads} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert references and references <= set(page.ids)


def assert_pictures_suit_both_themes(text):
    """Every picture is described and takes its colours from variables that the light and the dark theme have.

    Returns how many there are.
    """
    pictures = re.findall(r"<svg viewBox[^>]*role.*?</svg>", text, flags=re.S)
    assert all('role="img"' in svg and 'aria-label="' in svg for svg in pictures)
    assert not any(re.search(r"#[0-9a-f]{6}\b(?!-)", svg) for svg in pictures)
    light, dark = text[: text.index("</style>")].split("prefers-color-scheme: dark")
    variables = set(re.findall(r"var\(--([\w-]+)\)", "".join(re.findall("<svg.*?</svg>", text, flags=re.S))))
    assert variables and all(f"--{name}:" in light and f"--{name}:" in dark for name in variables)
    return len(pictures)
