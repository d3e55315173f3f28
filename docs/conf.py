"""Configuration of the documentation; `scripts/docs.py` assembles the sources and builds."""

project = "prune_nb"
author = "The prune_nb authors"
copyright = "2026 onwards, The prune_nb authors"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = "prune_nb"
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": True,
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are those that the notebooks store
nb_merge_streams = True
# What the notebooks show and no page of the site is for: links to files of the repository.
suppress_warnings = ["myst.xref_missing", "mystnb.unknown_mime_type"]
