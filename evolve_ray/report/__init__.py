"""report.json, report.html, the model card and the ledger.

In: what a run has committed.
Out: one page that loads nothing, tables, cards.
Never imports: stages, engines or trainers.
"""
