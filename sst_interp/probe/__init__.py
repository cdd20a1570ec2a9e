"""The halting probe: from position 0, before a word is written, tell whether thinking longer helps or breaks.

`labels` says what is to be told, `features` what it is told from, `design` what kind of probe, `fitting`
trains many of them at once, `selection` and `validation` see to it that nothing is chosen with the answer
in hand, and `saving` is the one probe that is kept. What is made of the scores is the business of
`analyses.halting`.
"""
