"""What eval_passk.py grades with: answers.py reads and compares answers, sandbox.py runs programs."""
