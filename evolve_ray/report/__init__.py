"""report.json, report.html, the model card and the ledger.

In: the committed stages of a run.
Out: report.json, a page that loads nothing, tables, model cards.
Never imports: stages, engines or trainers.
"""
