"""Small decoders trained from scratch, with and without a latent memory: on text, and on in-context recall.

`text_study.run_text` and `recall_study.run_recall` train and measure; `tables.all_tables` says what was
found.
"""
