"""The pages under docs: their code runs, and prints what they say that it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCKS = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_prints_what_the_page_says(page):
    """The blocks of a page are one program; the text block after a python block is what that block prints."""
    names, printed, texts = {"__name__": "__main__"}, None, 0
    for kind, content in BLOCKS.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(content, str(page), "exec"), names)
            printed = out.getvalue()
        else:
            assert printed == content, f"{page.name} says\n{content}\nbut it prints\n{printed}"
            texts += 1
    assert texts > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_exist(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert all((DOCS / link).exists() for link in links if "://" not in link), links
