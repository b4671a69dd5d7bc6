"""A hook of mkdocs: puts the settings of `ZOConfig`, which are declared once, into the pages."""

from dataclasses import fields

from zo2ext.config import ZOConfig

PLACE = "<!-- settings -->"


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Replace the placeholder by a table of all settings."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for entry in fields(ZOConfig):
        meaning = entry.metadata["help"].replace("|", "\\|")
        rows.append(
            f"| `{entry.name}` | `{getattr(entry.default, 'value', entry.default)}` | {meaning} |"
        )
    return markdown.replace(PLACE, "\n".join(rows))
