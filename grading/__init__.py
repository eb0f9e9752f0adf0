"""What eval_passk.py asks and grades with.

tasks.py      problems and prompts
answers.py    final answers, read and compared; algebra.py: the process that compares those of MATH
sandbox.py    programs, run and judged; candidate.py: the process that runs one
metrics.py    pass@k, votes, intervals, diversity
"""
