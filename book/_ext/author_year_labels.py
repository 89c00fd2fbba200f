"""Label the entries of the bibliography as the text cites them: "Ho et al., 2020"."""
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style
from pybtex.style.labels import BaseLabelStyle


class AuthorYear(BaseLabelStyle):
    """Family names, "et al." from the third on, and the year."""

    def format_labels(self, sorted_entries):
        for entry in sorted_entries:
            names = [" ".join(map(str, person.rich_prelast_names + person.rich_last_names))
                     for person in entry.persons["author"]]
            who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
            yield f"{who}, {entry.fields['year']}"


class LabelledByAuthorAndYear(Style):
    """pybtex's plain style with these labels, sorted by them."""

    default_label_style = AuthorYear
    default_sorting_style = "author_year_title"


def setup(app):
    register_plugin("pybtex.style.formatting", "author_year", LabelledByAuthorAndYear)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
