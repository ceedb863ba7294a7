"""README's results out of the records of campaigns: `python -m bench.report`.

`campaign` reads one device's record, `text` writes Markdown and `sheet` numbers footnotes. `tables` says what README
shows, `page` and `more_tables` what a device's own page does, with `parts`, `cells` and `machine` for both. `series`
picks what is plotted and `plots`, which alone needs matplotlib, draws it; `png` tells of which record a plot is.
"""
