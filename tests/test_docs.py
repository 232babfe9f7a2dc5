"""The pages under docs: their code runs, and prints what they say that it prints.

`python tests/test_docs.py` writes their output anew.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCKS = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)


def with_output(page):
    """The page, each text block replaced by what the python block before it prints; a page is one program."""
    names, printed = {"__name__": "__main__"}, ""

    def run(block):
        nonlocal printed
        if block[1] == "text":
            return f"```text\n{printed}```"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block[2], str(page), "exec"), names)
        printed = out.getvalue()
        return block[0]

    return BLOCKS.sub(run, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_prints_what_the_page_says(page):
    assert with_output(page) == page.read_text(encoding="utf-8"), (
        "python tests/test_docs.py writes the pages anew"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_exist(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert all((DOCS / link).exists() for link in links if "://" not in link), links


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_output(page), encoding="utf-8")
