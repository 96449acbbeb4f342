"""A MkDocs hook: on the site, a link from docs/ to another file of the repository is its path."""

import posixpath
import re


def on_page_markdown(markdown: str, page, **_) -> str:
    """Replaces the links that lead out of docs/, which the site does not contain."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def replace(link: re.Match) -> str:
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        if ":" in target or posixpath.commonpath(["docs", path]) == "docs":
            return link[0]
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", replace, markdown)
