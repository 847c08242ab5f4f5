"""Adds three files of the repository's root to the site, with their links adapted."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of `PAGES`. (mkdocs calls this function by its name.)"""
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        text = (root / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for name, other in PAGES.items():
            text = text.replace(f"]({name})", f"]({other})")
        text = text.replace("](CITATION.cff)", "](https://arxiv.org/abs/2503.01873)")
        files.append(File.generated(config, page, content=text))
    return files
