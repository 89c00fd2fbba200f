"""Point the whole book at another copy of its repository.

    make repository URL=https://github.com/you/fork

The one setting is `[project.urls] Repository` in pyproject.toml. This script changes it together with every
link, badge and install cell that follows it.
"""
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLLOWERS = ["pyproject.toml", "_config.yml", "*.md", "*.cff", "book/*.md", "book/*.ipynb", "templates/*.ipynb"]


def setting(root=ROOT):
    """Return the repository's URL, as pyproject.toml says it."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def owner_and_name(url):
    """Return "owner/name" of a GitHub URL."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", url)
    if not found:
        raise ValueError(f"the repository must be named like https://github.com/you/fork, got {url!r} "
                         "(Colab opens notebooks from GitHub)")
    return found[1]


def follow(url, root=ROOT):
    """Change the setting and everything that follows it to `url`; return the files changed."""
    old, new = owner_and_name(setting(root)), owner_and_name(url)
    link = re.compile(rf"(github\.com/|colab\.research\.google\.com/github/){re.escape(old)}(?![\w-])")
    changed = []
    for path in sorted({path for pattern in FOLLOWERS for path in root.glob(pattern)}):
        before = path.read_text(encoding="utf-8")
        after = link.sub(rf"\g<1>{new}", before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path.relative_to(root))
    return changed


if __name__ == "__main__":
    try:
        files = follow(sys.argv[1] if len(sys.argv) > 1 else "")
    except ValueError as problem:
        sys.exit(f"make repository: {problem}")
    print(*files, sep="\n")
    print(f"The book now points at {setting()}." if files else "Nothing to change.")
