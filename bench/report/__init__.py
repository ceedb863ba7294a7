"""README's results out of the records of campaigns: `python -m bench.report`.

`campaign` reads one device's record, `text` writes Markdown, `tables`, `more_tables` and `cells` say what README shows,
`series` picks what is plotted and `plots`, which alone needs matplotlib, draws it.
"""
