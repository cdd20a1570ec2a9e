"""Studies: a question about training or about its approximation, answered by measured tables that ship.

`study.Study` is the one idea: a plan, arms, one table that resumes, and findings written as Markdown. A study
is a class with `@study.register_study`, in a file of its own in this folder; the commands find it there.
"""
